"""One log format for all processes.

Responsible for: the format (time, level, name, message), the level, and stack dumps on demand. Every process
that called `configure_logging` prints the stacks of all its threads on SIGUSR1 and on a crash of the
interpreter. Logs go to stderr, so that stdout stays free for data. Must not import anything from fcluster.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import signal
import sys
from datetime import UTC, datetime
from typing import TextIO

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class LogFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z INFO    fcluster.worker.server  message``, in UTC on every host."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        # Some texts come from other programs, and logs are read on terminals.
        return super().format(record).translate(_CONTROL)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802
        moment = datetime.fromtimestamp(record.created, UTC)
        return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def configure_logging(level: str = "info", stream: TextIO | None = None) -> None:
    """Send all logging of this process to `stream` (default: stderr), from `level` upwards: "debug", "info",
    "warning" or "error".
    """
    target = stream if stream is not None else sys.stderr
    handler = logging.StreamHandler(target)
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # A stream without a descriptor (a test's) can't take a stack dump; only the main thread can register
    # signals.
    with contextlib.suppress(OSError, ValueError):
        faulthandler.enable(target)
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, target, all_threads=True)
