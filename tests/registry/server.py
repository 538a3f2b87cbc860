"""A real schema registry for tests: Apicurio Registry, fetched by Maven, which keeps schemas in memory.

Responsible for: fetching it once into the cache of the embedded Kafka broker, starting it on a free port of
this machine, suspending it, and leaving nothing behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from fcluster.common.processes import popen_bound
from fcluster.kafka.jars import cache_dir, find_java
from tests.harness import wait_until

_POM = Path(__file__).parent / "pom.xml"
_FETCH_TIMEOUT_S = 900
_START_TIMEOUT_S = 300
"""It takes 20 seconds on an idle machine."""
_OPTIONS = ("-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")


class RegistryServer:
    """A schema registry that ends with this process. Use it in a `with` block.

    Args:
        directory: for its log.

    Attributes:
        url: for `schema.registry.url`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._log = directory / "registry.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RegistryServer:
        jar, java = resolve_jar(), find_java()
        command = [str(java), *_OPTIONS, "-Dquarkus.http.host=127.0.0.1", "-Dquarkus.http.port=0"]
        with self._log.open("wb") as log:
            self._process = popen_bound([*command, "-jar", str(jar)], stdout=log, cwd=self._directory)
        try:
            port = wait_until(self._port_in_log, "the schema registry starts", _START_TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise
        self.url = f"http://127.0.0.1:{port}/apis/ccompat/v7"
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def _port_in_log(self) -> str:
        assert self._process is not None
        text = self._log.read_text(errors="replace")
        assert self._process.poll() is None, f"the schema registry ended:\n{text}"
        found = re.search(r"Listening on: http://127\.0\.0\.1:(\d+)", text)
        return found.group(1) if found else ""

    def pause(self) -> None:
        """From now on it accepts connections and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """From now on it answers again."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)


def resolve_jar() -> Path:
    """The jar to run, fetched with all it needs by Maven if it isn't in the cache yet (140 MB, once)."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"apicurio-registry-{hashlib.sha256(_POM.read_bytes()).hexdigest()[:8]}"
    with (cache / f"{target.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _fetch(target)
    (jar,) = target.glob("*-runner.jar")
    return jar


def _fetch(target: Path) -> None:
    maven = shutil.which("mvn")
    assert maven is not None, "the tests' schema registry is fetched by Maven: no mvn on the PATH"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        pom = Path(folder) / "pom.xml"
        pom.write_bytes(_POM.read_bytes())
        unpacked = Path(folder) / "unpacked"
        goals = ["dependency:unpack-dependencies", f"-DoutputDirectory={unpacked}"]
        done = subprocess.run(
            [maven, "-B", "-q", "-f", str(pom), *goals],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_FETCH_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout.decode(errors="replace")
        unpacked.rename(target)
