"""Says which record waits because a schema registry doesn't answer."""

from __future__ import annotations

import logging
from typing import Any, Final

from fcluster.common.errors import FormatUnavailable
from fcluster.engine.records import describe_record

_log = logging.getLogger("fcluster.worker")

SAID_AGAIN_MS: Final = 30_000.0


class FormatWaits:
    """Logs each wait when it begins, and from time to time while it lasts."""

    def __init__(self) -> None:
        self._said = ""
        self._said_ms = 0.0

    def note(self, record: Any, error: FormatUnavailable, now_ms: float) -> None:
        """`record` couldn't be decoded for now, and is tried again. `now_ms` never goes back."""
        title = describe_record(record)
        if title != self._said or now_ms - self._said_ms >= SAID_AGAIN_MS:
            self._said, self._said_ms = title, now_ms
            _log.warning("%s; it is tried again until it succeeds", why(record, error))


def why(record: Any, error: FormatUnavailable) -> str:
    """Which record waits for what, in one line."""
    return f"{describe_record(record)} waits: {error.message}"
