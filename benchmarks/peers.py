"""Others beside fcluster: Kafka Streams (by Maven and javac), Quix Streams (by pip).

Responsible for: fetching and compiling once (kept in the cache of the embedded Kafka; Quix Streams in a
virtual environment of its own there, so that nothing of it is a dependency), and running our programs as
children that end with us. Whoever lacks a tool or a network measures without them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fcluster.common.processes import ChildProcess, spawn
from fcluster.kafka.jars import EmbeddedKafkaError, cache_dir, find_java

_SOURCES = Path(__file__).with_name("kafka_streams")
QUIX = "quixstreams==3.28.1"
_QUIX_PROGRAM = Path(__file__).parent / "quix_streams" / "running_totals.py"
_PROGRAM = "RunningTotals"
FETCH_TIMEOUT_S = 600.0
HEAP = "-Xmx256m"


class NoPeerError(Exception):
    """A peer can't be had here; the message says why."""


# --- Kafka Streams --------------------------------------------------------------------------------------


def streams_version() -> str:
    """Of Kafka Streams, as its POM says."""
    found = re.search(r"<kafka\.version>(.*)</kafka\.version>", (_SOURCES / "pom.xml").read_text())
    return found[1] if found else ""


def resolve() -> Path:
    """The directory with the jars and the compiled program.

    Raises:
        NoPeerError: there is no Maven or no javac, or they failed.
    """
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.read_bytes())
    with _cached(f"kafka-streams-{digest.hexdigest()[:8]}") as target:
        if not target.is_dir():
            _make(target)
    return target


@contextmanager
def _cached(name: str) -> Iterator[Path]:
    """A path in the cache, while no other process makes it."""
    try:
        cache = cache_dir()
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield cache / name
    except OSError as error:
        raise NoPeerError(f"{name} can't be kept: {error}") from error


def _make(target: Path) -> None:
    maven, javac = shutil.which("mvn"), shutil.which("javac")
    if maven is None or javac is None:
        raise NoPeerError(f"no {'mvn' if maven is None else 'javac'} on the PATH")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        jars = Path(folder) / "jars"
        pom = Path(folder) / "pom.xml"
        pom.write_bytes((_SOURCES / "pom.xml").read_bytes())
        goals = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
        _run([maven, "-B", "-q", "-f", str(pom), *goals], "Maven could not fetch Kafka Streams")
        program = str(_SOURCES / f"{_PROGRAM}.java")
        _run([javac, "-cp", f"{jars}{os.sep}*", "-d", str(jars), program], "javac refuses its program")
        jars.rename(target)


def _run(command: Sequence[str], otherwise: str) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NoPeerError(f"{otherwise}: it takes more than {FETCH_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        raise NoPeerError(f"{otherwise}: {done.stdout.decode(errors='replace')[-500:]}")


def start(
    jars: Path,
    brokers: str,
    job: str,
    source: str,
    output: str,
    directory: Path,
    *settings: str,
    heap: str = HEAP,
) -> ChildProcess:
    """Start the job. Its log is `streams.log` in `directory`.

    Args:
        settings: NAME=VALUE, of Kafka Streams or of the program (see there).
        heap: Java's option.

    Raises:
        NoPeerError: there is no suitable Java.
    """
    try:
        java = find_java()
    except EmbeddedKafkaError as error:
        raise NoPeerError(error.message) from error
    directory.mkdir(parents=True, exist_ok=True)
    # The log goes to standard error, from warnings upwards.
    (directory / "log4j2.properties").write_text(
        "status = error\n"
        "appender.console.type = Console\n"
        "appender.console.name = console\n"
        "appender.console.target = SYSTEM_ERR\n"
        "appender.console.layout.type = PatternLayout\n"
        "appender.console.layout.pattern = %d{ISO8601} %-5p %c{1} %m%n\n"
        "rootLogger.level = warn\n"
        "rootLogger.appenderRef.console.ref = console\n"
    )
    command = [str(java), heap, f"-Dlog4j2.configurationFile={directory / 'log4j2.properties'}"]
    command += ["-cp", f"{jars}{os.sep}*{os.pathsep}{jars}", _PROGRAM]
    command += [brokers, job, source, output, str(directory / "state"), *settings]
    return spawn("streams", command, log_file=directory / "streams.log")


# --- Quix Streams -----------------------------------------------------------------------------------------


def resolve_quix() -> Path:
    """The Python of a virtual environment that has Quix Streams.

    Raises:
        NoPeerError: pip failed.
    """
    with _cached(QUIX.replace("==", "-")) as target:
        python, ready = target / "bin" / "python", target / ".ready"
        if not ready.exists():
            shutil.rmtree(target, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(target)], "no virtual environment can be made")
            command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install", QUIX]
            _run(command, f"pip could not install {QUIX}")
            ready.touch()
    return python


def start_quix(
    python: Path, brokers: str, job: str, source: str, output: str, directory: Path, *more: str
) -> ChildProcess:
    """Start the job; its log is `quix.log` in `directory`.

    Args:
        more: the program's last arguments: see there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    command = [str(python), str(_QUIX_PROGRAM), brokers, job, source, output, str(directory / "state"), *more]
    return spawn("quix", command, log_file=directory / "quix.log")
