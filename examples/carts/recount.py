"""What the job in `carts.py` writes in event time, counted in a slow and obvious way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MINUTE_MS = 60_000
DAY_MS = 24 * 60 * MINUTE_MS
DELAY_MS = 10_000

Event = tuple[str, dict[str, Any], int]
"""Key, value and timestamp."""


def recount(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The letters that follow from one partition, without receipts: those depend on the wall clock."""
    letters: list[dict[str, Any]] = []
    carts: dict[str, list[str]] = {}
    due: dict[tuple[str, str], int] = {}  # by customer and letter
    now_ms = -DELAY_MS
    for customer, event, timestamp_ms in events:
        if event["do"] == "add":
            carts.setdefault(customer, []).append(event["product"])
            due[customer, "reminder"] = timestamp_ms + 30 * MINUTE_MS
            due[customer, "emptied"] = timestamp_ms + DAY_MS
        elif event["do"] == "pay":
            carts.pop(customer, None)
            due.pop((customer, "reminder"), None)
            due.pop((customer, "emptied"), None)
        now_ms = max(now_ms, timestamp_ms - DELAY_MS)
        passed = sorted((at_ms, *what) for what, at_ms in due.items() if at_ms <= now_ms)
        for _at_ms, name, letter in sorted(passed, key=lambda one: (one[0], one[1])):
            del due[name, letter]
            products: Any = list(carts[name]) if letter == "reminder" else len(carts.pop(name))
            letters.append({"to": name, "letter": letter, "products": products})
    return letters
