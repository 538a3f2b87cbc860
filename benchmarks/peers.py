"""Kafka Streams next to fcluster: Maven fetches its jars, and javac compiles our own small program.

Responsible for: fetching and compiling once (kept in the embedded Kafka's cache), and running the program as
a child that ends with us. Without Maven, javac or a network, the benchmarks run without it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fcluster.common.processes import ChildProcess, spawn
from fcluster.kafka.jars import EmbeddedKafkaError, cache_dir, find_java

_SOURCES = Path(__file__).with_name("kafka_streams")
_PROGRAM = "RunningTotals"
FETCH_TIMEOUT_S = 600.0
HEAP = "-Xmx256m"


class NoPeerError(Exception):
    """Kafka Streams isn't available here. The message says why."""


def resolve() -> Path:
    """The directory with the jars and the compiled program.

    Raises:
        NoPeerError: there is no Maven or no javac, or they failed.
    """
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.read_bytes())
    try:
        cache = cache_dir()
        cache.mkdir(parents=True, exist_ok=True)
        target = cache / f"kafka-streams-{digest.hexdigest()[:8]}"
        with (cache / f"{target.name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _make(target)
    except OSError as error:
        raise NoPeerError(f"its jars can't be kept: {error}") from error
    return target


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
    jars: Path, brokers: str, job: str, source: str, output: str, directory: Path, *settings: str
) -> ChildProcess:
    """Start the job. Its log is `streams.log` in `directory`.

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
    command = [str(java), HEAP, f"-Dlog4j2.configurationFile={directory / 'log4j2.properties'}"]
    command += ["-cp", f"{jars}{os.sep}*{os.pathsep}{jars}", _PROGRAM]
    command += [brokers, job, source, output, str(directory / "state"), *settings]
    return spawn("streams", command, log_file=directory / "streams.log")
