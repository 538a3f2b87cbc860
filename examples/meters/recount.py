"""What the job of `meters.py` writes, counted in a slow and obvious way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

QUARTER_MS = 15 * 60_000
HOUR_MS = 4 * QUARTER_MS
GRACE_MS = 60_000
DELAY_MS = 10_000

Reading = tuple[str, dict[str, Any], int]
"""Key, value and timestamp."""


def recount_quarters(readings: Iterable[Reading]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The quarters that one partition leads to, and its late readings."""
    quarters: list[dict[str, Any]] = []
    late: list[dict[str, Any]] = []
    opened: dict[tuple[int, str], list[int]] = {}
    now_ms = -DELAY_MS
    for meter, reading, timestamp_ms in readings:
        end_ms = (timestamp_ms // QUARTER_MS + 1) * QUARTER_MS
        if end_ms + GRACE_MS <= now_ms:
            late.append(reading)
        else:
            opened.setdefault((end_ms, meter), []).append(reading["wh"])
        now_ms = max(now_ms, timestamp_ms - DELAY_MS)
        for end_ms, name in sorted(opened):
            if end_ms + GRACE_MS <= now_ms:
                used = opened.pop((end_ms, name))
                quarters.append(
                    {
                        "key": name,
                        "start": end_ms - QUARTER_MS,
                        "end": end_ms,
                        "readings": len(used),
                        "wh": sum(used),
                        "peak": max(used),
                    }
                )
    return quarters, late


def recount_hours(readings: Iterable[Reading], until_ms: int) -> dict[tuple[str, int], int]:
    """What each district used in each hour that ends at `until_ms` or before, by district and end, if no
    reading is late."""
    used: dict[tuple[str, int], int] = {}
    for _meter, reading, timestamp_ms in readings:
        first_ms = (timestamp_ms // QUARTER_MS + 1) * QUARTER_MS
        for end_ms in range(first_ms, first_ms + HOUR_MS, QUARTER_MS):
            if end_ms <= until_ms:
                hour = reading["district"], end_ms
                used[hour] = used.get(hour, 0) + reading["wh"]
    return used
