"""A server for tests that is written in Java: fetched by Maven once, started on a free port, and ended.

Responsible for: the cache of what Maven has fetched (that of the embedded Kafka broker), the server's
process, and finding its port in its log. Must not know which server it is.
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
from typing import Self

from fcluster.common.processes import popen_bound
from fcluster.kafka.jars import cache_dir
from tests.harness import wait_until

_FETCH_TIMEOUT_S = 900


class JavaServer:
    """A server that ends with this process. Use it in a `with` block.

    Args:
        name: for messages, such as "S3 server".
        log: a file for what it prints.
        port_pattern: a regular expression that finds its port in that.
        start_timeout_s: how long its start may take.

    Attributes:
        port: the port that it has chosen.
    """

    def __init__(self, name: str, log: Path, port_pattern: str, start_timeout_s: float) -> None:
        self._name = name
        self._log = log
        self._port_pattern = port_pattern
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str]:
        """What starts it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        command = list(self.command())
        with self._log.open("wb") as log:
            self._process = popen_bound(command, stdout=log, cwd=self._log.parent)
        try:
            self.port = int(wait_until(self._port_in_log, f"the {self._name} starts", self._start_timeout_s))
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
        assert self._process.poll() is None, f"the {self._name} ended:\n{text}"
        found = re.search(self._port_pattern, text)
        return found.group(1) if found else ""

    def pause(self) -> None:
        """From now on it accepts connections and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """From now on it answers again."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)


def fetched(pom: Path, name: str, goal: str) -> Path:
    """The directory with what this POM depends on. Maven fetches it if it isn't in the cache yet.

    Args:
        name: of the directory in the cache; a digest of the POM is added.
        goal: of Maven's dependency plugin.
    """
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{name}-{hashlib.sha256(pom.read_bytes()).hexdigest()[:8]}"
    with (cache / f"{target.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _fetch(pom, target, goal)
    return target


def _fetch(pom: Path, target: Path, goal: str) -> None:
    maven = shutil.which("mvn")
    assert maven is not None, f"{target.name} is fetched by Maven: no mvn on the PATH"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        copied = Path(folder) / "pom.xml"  # Maven writes beside it
        copied.write_bytes(pom.read_bytes())
        output = Path(folder) / "output"
        command = [maven, "-B", "-q", "-f", str(copied), f"dependency:{goal}", f"-DoutputDirectory={output}"]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_FETCH_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout.decode(errors="replace")
        output.rename(target)
