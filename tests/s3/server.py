"""A real S3 server for tests: S3Proxy, fetched by Maven, with a directory as its storage.

Responsible for: fetching its jar once into the cache of the embedded Kafka broker, starting it on a free port
of this machine, suspending it, and leaving nothing behind. A bucket is a directory below `root`, and an
object is a file in it, so tests can damage and age objects as in a directory store.
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
from collections.abc import Sequence
from pathlib import Path

from fcluster.common.processes import popen_bound
from fcluster.kafka.jars import cache_dir, find_java
from tests.harness import wait_until

ACCESS_KEY = "tests"
SECRET_KEY = "not-a-secret"

_POM = Path(__file__).parent / "pom.xml"
_FETCH_TIMEOUT_S = 600
_START_TIMEOUT_S = 60
_HEAP = "-Xmx192m"


class S3Server:
    """An S3 server that ends with this process. Use it in a `with` block.

    Args:
        directory: for its data, settings and log.
        address: the address that it listens on.
        prefix: a command that starts it, without forking.
    """

    def __init__(self, directory: Path, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        self._address = address
        self._prefix = prefix
        self.root = directory / "buckets"
        self._log = directory / "s3proxy.log"
        self._settings = directory / "s3proxy.conf"
        self._process: subprocess.Popen[bytes] | None = None
        self.root.mkdir(parents=True)

    def __enter__(self) -> S3Server:
        jar, java = resolve_jar(), find_java()
        self._settings.write_text(
            f"s3proxy.endpoint=http://{self._address}:0\n"
            "s3proxy.authorization=aws-v2-or-v4\n"
            f"s3proxy.identity={ACCESS_KEY}\n"
            f"s3proxy.credential={SECRET_KEY}\n"
            "jclouds.provider=filesystem-nio2\n"
            f"jclouds.filesystem.basedir={self.root}\n"
        )
        command = [*self._prefix, str(java), _HEAP, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        command += ["-jar", str(jar), "--properties", str(self._settings)]
        with self._log.open("wb") as log:
            self._process = popen_bound(command, stdout=log)
        try:
            self.port = int(wait_until(self._port_in_log, "the S3 server starts", _START_TIMEOUT_S))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def _port_in_log(self) -> str:
        assert self._process is not None
        text = self._log.read_text(errors="replace")
        assert self._process.poll() is None, f"the S3 server ended:\n{text}"
        found = re.search(rf"Started \S*ServerConnector.*\{{{re.escape(self._address)}:(\d+)\}}", text)
        return found.group(1) if found else ""

    def make_bucket(self, name: str) -> Path:
        """Create a bucket. Returns its directory."""
        path = self.root / name
        path.mkdir()
        return path

    def environment(self) -> dict[str, str]:
        """Variables for the environment of a client."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self._address}:{self.port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }

    def pause(self) -> None:
        """From now on it accepts connections and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """From now on it answers again."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)


def resolve_jar() -> Path:
    """The server's jar, fetched by Maven if it isn't in the cache yet (55 MB, once)."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"s3proxy-{hashlib.sha256(_POM.read_bytes()).hexdigest()[:8]}"
    with (cache / f"{target.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _fetch(target)
    (jar,) = target.glob("s3proxy-*.jar")
    return jar


def _fetch(target: Path) -> None:
    maven = shutil.which("mvn")
    assert maven is not None, "the tests' S3 server is fetched by Maven: no mvn on the PATH"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        pom = Path(folder) / "pom.xml"
        pom.write_bytes(_POM.read_bytes())
        jars = Path(folder) / "jars"
        goals = ["dependency:copy-dependencies", f"-DoutputDirectory={jars}"]
        done = subprocess.run(
            [maven, "-B", "-q", "-f", str(pom), *goals],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_FETCH_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout.decode(errors="replace")
        jars.rename(target)
