"""Java and the jars of the embedded Kafka broker.

Responsible for: finding a Java that is new enough, and fetching the broker's jars through Maven into a cache
directory, once for each version. Invariant: a cache directory either has all jars or doesn't exist. (The
directory is filled under another name and then renamed, and a list of its contents is checked at each use.)
Must not start brokers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fcluster.common.errors import FclusterError
from fcluster.common.processes import popen_bound

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

Progress = Callable[[str], None]
"""Called with one line for the user when something takes a while."""

JAVA_MAJOR_MIN = 17
MAVEN_TIMEOUT_S = 900
_LIST_FILE = "jars.json"
_PACKAGE = Path(__file__).resolve().parent.parent


class EmbeddedKafkaError(FclusterError):
    """The embedded broker can't be set up or started."""


def deploy_file(name: str) -> Path:
    """A file of `deploy/`: in the package if that was installed from a wheel, next to it in a checkout."""
    installed = _PACKAGE / "deploy" / name
    return installed if installed.exists() else _PACKAGE.parent / "deploy" / name


def other_ways() -> str:
    """Alternatives for machines without Java and Maven."""
    return (
        "use running brokers (--brokers HOST:PORT), or start one with Docker: docker compose -f "
        f"{deploy_file('compose.yaml')} up --detach --wait, then --brokers 127.0.0.1:9092"
    )


def cache_dir() -> Path:
    """`FCLUSTER_CACHE_DIR`, or `~/.cache/fcluster`."""
    configured = os.environ.get("FCLUSTER_CACHE_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "fcluster"


# --- Java --------------------------------------------------------------------------------------------


def find_java() -> Path:
    """The first `java` of JAVA_HOME or the PATH that is new enough.

    Raises:
        EmbeddedKafkaError: there is none, or all are too old.
    """
    found: list[str] = []
    for candidate in _java_candidates():
        version = _java_version(candidate)
        major = java_major(version)
        if major is not None and major >= JAVA_MAJOR_MIN:
            return candidate
        found.append(f"{candidate} is {f'version {major}' if major else 'no working Java'}")
    what = "; ".join(found) if found else "no java in JAVA_HOME or on the PATH"
    raise EmbeddedKafkaError(
        f"the embedded Kafka broker needs Java {JAVA_MAJOR_MIN} or newer: {what}",
        remedy=f"Install Java {JAVA_MAJOR_MIN} or newer and Maven (for example the packages "
        f"openjdk-{JAVA_MAJOR_MIN}-jdk-headless and maven), or {other_ways()}.",
    )


def _java_candidates() -> Iterator[Path]:
    home = os.environ.get("JAVA_HOME")
    if home and (Path(home) / "bin" / "java").exists():
        yield Path(home) / "bin" / "java"
    on_path = shutil.which("java")
    if on_path:
        yield Path(on_path)


def _java_version(java: Path) -> str:
    try:
        done = subprocess.run(
            [str(java), "-version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def java_major(version_output: str) -> int | None:
    """The major version in the output of `java -version`. None if there is none."""
    match = re.search(r'version "(?:1\.)?(\d+)', version_output)
    return int(match.group(1)) if match else None


# --- jars --------------------------------------------------------------------------------------------


def kafka_version() -> str:
    """The Kafka version in the POM."""
    match = re.search(r"<kafka\.version>([\w.-]+)</kafka\.version>", _pom().decode())
    assert match is not None, "deploy/kafka/pom.xml names no kafka.version"
    return match.group(1)


def _pom() -> bytes:
    return deploy_file("kafka/pom.xml").read_bytes()


def jars_dir(cache: Path) -> Path:
    """Where the jars of this POM are kept. Each version and each POM has its own directory."""
    return cache / f"kafka-{kafka_version()}-{hashlib.sha256(_pom()).hexdigest()[:8]}"


def resolve_jars(progress: Progress, cache: Path | None = None) -> Path:
    """The directory with the broker's jars, fetched by Maven if they aren't there yet.

    Raises:
        EmbeddedKafkaError: Maven is missing, or couldn't fetch them.
    """
    cache = cache or cache_dir()
    target = jars_dir(cache)
    if _is_complete(target):
        return target
    maven = shutil.which("mvn")
    if maven is None:
        raise EmbeddedKafkaError(
            f"the embedded Kafka broker needs Maven to fetch Apache Kafka {kafka_version()}, but there is "
            "no mvn on the PATH",
            remedy=f"Install Java {JAVA_MAJOR_MIN} or newer and Maven (for example the packages "
            f"openjdk-{JAVA_MAJOR_MIN}-jdk-headless and maven), or {other_ways()}.",
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _only_one(cache / f"{target.name}.lock"):
            if not _is_complete(target):
                _fetch(maven, target, progress)
    except OSError as error:
        raise EmbeddedKafkaError(
            f"cannot keep Apache Kafka's jars in {cache}: {error.strerror}",
            remedy="Set FCLUSTER_CACHE_DIR to a writable directory with 100 MB of free space.",
        ) from error
    return target


def _is_complete(target: Path) -> bool:
    # Programs that clean cache directories remove single old files. A missing jar would then show as a Java
    # stack trace.
    try:
        sizes: dict[str, int] = json.loads((target / _LIST_FILE).read_bytes())
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


@contextmanager
def _only_one(lock_file: Path) -> Generator[None]:
    """If two processes fetch at the same time, the second one waits, and then finds the jars."""
    with lock_file.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(maven: str, target: Path, progress: Progress) -> None:
    for stale in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        jars = partial / "jars"
        # A copy, since Maven may write next to the POM, which may be in a read-only installation.
        (partial / "pom.xml").write_bytes(_pom())
        progress(f"fetching Apache Kafka {kafka_version()} through Maven (44 MB, only once)")
        _run_maven(maven, partial / "pom.xml", jars, progress)
        sizes = {jar.name: jar.stat().st_size for jar in sorted(jars.glob("*.jar"))}
        (jars / _LIST_FILE).write_text(json.dumps(sizes, indent=1))
        if target.exists():
            shutil.rmtree(target)
        jars.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run_maven(maven: str, pom: Path, jars: Path, progress: Progress) -> None:
    goals = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
    process = popen_bound([maven, "-B", "-f", str(pom), *goals], stdout=subprocess.PIPE)
    tail: deque[str] = deque(maxlen=200)
    fetched = 0
    watchdog = threading.Timer(MAVEN_TIMEOUT_S, process.kill)
    watchdog.start()
    assert process.stdout is not None
    try:
        for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip()
            tail.append(line)
            if "Downloaded from" in line:
                fetched += 1
                if fetched % 25 == 0:
                    progress(f"fetching Apache Kafka through Maven: {fetched} files")
        code = process.wait()
    finally:
        # This also applies after a Ctrl-C: neither Maven nor the watchdog may delay our exit.
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    if code == 0 and any(jars.glob("kafka_*.jar")):
        return
    errors = [line for line in tail if line.startswith("[ERROR]")] or list(tail)[-3:]
    raise EmbeddedKafkaError(
        f"Maven could not fetch Apache Kafka {kafka_version()} (exit code {code}): " + " ".join(errors[:3]),
        remedy="Check that Maven can reach its repository (proxies and mirrors are set in "
        f"~/.m2/settings.xml), or {other_ways()}.",
    )
