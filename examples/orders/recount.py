"""What the job in orders.py must make of a partition: an independent recount, in one loop over plain
dicts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HOUR_MS = 3_600_000


def recount(records: Iterable[tuple[str, Any, int]]) -> tuple[list[Any], int, int]:
    """The outputs, and how many orders were repeated within an hour, and later.

    Args:
        records: key, order, and timestamp in milliseconds, in the partition's order.
    """
    customers: dict[str, dict[str, Any]] = {}
    outputs: list[Any] = []
    clock_ms, within, beyond = 0, 0, 0
    for key, order, timestamp_ms in records:
        clock_ms = max(clock_ms, timestamp_ms)
        customer = customers.setdefault(key, {"count": 0, "seen": {}, "prices": set(), "last": []})
        number = order["number"]
        put_ms = customer["seen"].get(number)
        if put_ms is not None and put_ms + HOUR_MS > clock_ms:
            within += 1
            continue
        beyond += put_ms is not None
        customer["seen"][number] = clock_ms
        customer["count"] += 1
        customer["prices"].add((order["price"], number))
        customer["last"] = [*customer["last"], number][-3:]
        outputs.append(
            {
                "customer": key,
                "number": number,
                "count": customer["count"],
                "last": customer["last"],
                "cheapest": list(min(customer["prices"])),
                "dearest": list(max(customer["prices"])),
            }
        )
    return outputs, within, beyond
