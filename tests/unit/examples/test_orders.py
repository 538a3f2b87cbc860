"""The example with all kinds of state, in the driver: crashes don't change what it writes."""

from __future__ import annotations

import random

import pytest

from examples.orders.orders import counted, job, orders
from examples.orders.recount import recount
from fcluster.testing import Driver


@pytest.mark.parametrize("crash_every", [0, 37])
def test_orders_are_counted_as_in_the_recount(crash_every: int) -> None:
    chance = random.Random(7)
    records = []
    for number in range(600):
        order = max(0, number - chance.choice((0, 0, 0, 1, 30, 200)))
        timestamp_ms = 1_700_000_000_000 + 40_000 * number - chance.choice((0, 90_000))
        records.append((f"c{order % 7}", {"number": f"n{order}", "price": order * 7 % 50}, timestamp_ms))
    expected, within, beyond = recount(records)
    assert min(within, beyond) > 20
    found = []
    with Driver(job, partitions=1) as driver:
        for number, (key, order, timestamp_ms) in enumerate(records, start=1):
            driver.send(orders, order, key=key, timestamp=timestamp_ms)
            if crash_every and number % crash_every == 0:
                driver.crash()
        found = driver.read_values(counted)
    assert found == expected
