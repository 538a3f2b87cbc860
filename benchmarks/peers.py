"""Others beside fcluster: Kafka Streams (by Maven and javac), Quix Streams (by pip), PyFlink (by all three).

Responsible for: fetching and compiling once (kept in the cache of the embedded Kafka; those of Python each
in a virtual environment of its own there, so that nothing of them is a dependency), and running our programs
as children that end with us. Whoever lacks a tool or a network measures without them.
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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fcluster.common.processes import ChildProcess, spawn
from fcluster.kafka.jars import EmbeddedKafkaError, cache_dir, find_java

_SOURCES = Path(__file__).with_name("kafka_streams")
QUIX = "quixstreams==3.28.1"
_QUIX_PROGRAM = Path(__file__).parent / "quix_streams" / "running_totals.py"
FLINK = "apache-flink==2.2.1"
_FLINK_SOURCES = Path(__file__).with_name("pyflink")
_PROGRAM = "RunningTotals"
FETCH_TIMEOUT_S = 1200.0
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
    with _cached(f"kafka-streams-{_digest(_SOURCES.iterdir())}") as target:
        if not target.is_dir():
            _make(target, _SOURCES / "pom.xml", _SOURCES / f"{_PROGRAM}.java", "Kafka Streams")
    return target


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


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


def _make(target: Path, pom_file: Path, program: Path, what: str, libraries: Path | None = None) -> None:
    """Fetch the jars, and compile the program against them (or those of another directory)."""
    maven, javac = shutil.which("mvn"), shutil.which("javac")
    if maven is None or javac is None:
        raise NoPeerError(f"no {'mvn' if maven is None else 'javac'} on the PATH")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        jars = Path(folder) / "jars"
        pom = Path(folder) / "pom.xml"
        pom.write_bytes(pom_file.read_bytes())
        goals = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
        _run([maven, "-B", "-q", "-f", str(pom), *goals], f"Maven could not fetch {what}")
        classpath = f"{libraries or jars}{os.sep}*"
        _run([javac, "-cp", classpath, "-d", str(jars), str(program)], f"javac refuses {program.name}")
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
    java = _find_java()
    logging = _configure_logging(directory, "SYSTEM_ERR")
    command = [str(java), heap, f"-Dlog4j2.configurationFile={logging}"]
    command += ["-cp", f"{jars}{os.sep}*{os.pathsep}{jars}", _PROGRAM]
    command += [brokers, job, source, output, str(directory / "state"), *settings]
    return spawn("streams", command, log_file=directory / "streams.log")


def _find_java() -> Path:
    try:
        return find_java()
    except EmbeddedKafkaError as error:
        raise NoPeerError(error.message) from error


def _configure_logging(directory: Path, target: str) -> Path:
    """A file that sends Java's log there, from warnings upwards. Makes the directory, too."""
    directory.mkdir(parents=True, exist_ok=True)
    written = directory / "log4j2.properties"
    written.write_text(
        "status = error\n"
        "appender.console.type = Console\n"
        "appender.console.name = console\n"
        f"appender.console.target = {target}\n"
        "appender.console.layout.type = PatternLayout\n"
        "appender.console.layout.pattern = %d{ISO8601} %-5p %c{1} %m%n\n"
        # Flink warns of one of its own names at each checkpoint.
        "logger.metrics.name = org.apache.flink.metrics.MetricGroup\n"
        "logger.metrics.level = error\n"
        "rootLogger.level = warn\n"
        "rootLogger.appenderRef.console.ref = console\n"
    )
    return written


# --- Quix Streams -----------------------------------------------------------------------------------------


def resolve_quix() -> Path:
    """The Python of a virtual environment that has Quix Streams.

    Raises:
        NoPeerError: pip failed.
    """
    return _environment_with(QUIX) / "bin" / "python"


def _environment_with(requirement: str) -> Path:
    """A virtual environment with this package alone.

    Raises:
        NoPeerError: pip failed.
    """
    with _cached(requirement.replace("==", "-")) as target:
        python, ready = target / "bin" / "python", target / ".ready"
        if not ready.exists():
            shutil.rmtree(target, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(target)], "no virtual environment can be made")
            command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
            _run([*command, requirement], f"pip could not install {requirement}")
            ready.touch()
    return target


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


# --- PyFlink ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flink:
    """What a PyFlink job needs.

    Attributes:
        python: of a virtual environment that has it.
        jars: a directory with the jar of the connector to Kafka, and our class.
    """

    python: Path
    jars: Path


def resolve_flink() -> Flink:
    """PyFlink by pip, with Java's Flink in it; the connector by Maven.

    Raises:
        NoPeerError: there is no Maven or no javac, or they failed, or pip did.
    """
    environment = _environment_with(FLINK)
    libraries = next(environment.glob("lib/python*/site-packages/pyflink/lib"), environment)
    pom, column = _FLINK_SOURCES / "pom.xml", _FLINK_SOURCES / "Column.java"
    with _cached(f"flink-connector-{_digest([pom, column])}") as jars:
        if not jars.is_dir():
            _make(jars, pom, column, "Flink's connector to Kafka", libraries)
    return Flink(environment / "bin" / "python", jars)


def start_flink(
    flink: Flink,
    brokers: str,
    job: str,
    source: str,
    output: str,
    directory: Path,
    *more: str,
    heap_mb: int,
) -> ChildProcess:
    """Start the job; its log, and Java's, is `flink.log` in `directory`.

    It is a process that starts Java, which holds the cluster and perhaps starts the Pythons in which records
    are processed. All are of its session.

    Args:
        more: the program's last arguments but the jars: see there.
        heap_mb: the most that Java's heap may take.

    Raises:
        NoPeerError: there is no suitable Java.
    """
    packages = next(flink.python.parent.parent.glob("lib/python*/site-packages"))
    environment = os.environ | {
        # The Python within Java isn't that of the virtual environment.
        "PYTHONPATH": str(packages),
        "JAVA_HOME": str(_find_java().resolve().parent.parent),
        "JVM_ARGS": f"-Xmx{heap_mb}m",
        "LOG4J_PROPERTIES": str(_configure_logging(directory, "SYSTEM_OUT")),  # nobody reads the other
    }
    command = [str(flink.python), str(_FLINK_SOURCES / "running_totals.py")]
    command += [brokers, job, source, output, str(directory / "state"), *more, str(flink.jars)]
    return spawn("flink", command, log_file=directory / "flink.log", env=environment)
