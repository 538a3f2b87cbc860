"""The clocks of this process and of its host, in whole milliseconds."""

from __future__ import annotations

import time


def monotonic_ms() -> int:
    """Milliseconds on a clock that never goes back, since some time in the past."""
    return time.monotonic_ns() // 1_000_000


def wall_ms() -> int:
    """Milliseconds since 1970, by the host's clock."""
    return time.time_ns() // 1_000_000
