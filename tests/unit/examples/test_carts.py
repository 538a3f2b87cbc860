"""The example with timers, in the driver: crashes don't change what it writes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from examples.carts.carts import cart, carts, job, letters
from examples.carts.recount import DAY_MS, MINUTE_MS, recount
from fcluster.testing import Driver
from fcluster.testing.driver import START_MS


def events(count: int) -> list[tuple[str, dict[str, Any], int]]:
    chance = random.Random(3)
    found = []
    for number in range(count):
        what = chance.choice(("add", "add", "pay"))
        event = {"do": what, "product": f"p{number}"} if what == "add" else {"do": what}
        at_ms = START_MS + 17 * MINUTE_MS * number - chance.choice((0, 0, 5_000, 40_000))
        found.append((f"c{chance.randrange(60)}", event, at_ms))
    return found


@pytest.mark.parametrize("crash_every", [0, 23])
def test_letters_equal_the_recount(crash_every: int) -> None:
    plan = events(400)
    expected = recount(plan)
    kinds = [letter["letter"] for letter in expected]
    assert min(kinds.count("reminder"), kinds.count("emptied")) > 20
    with Driver(job, partitions=1) as driver:
        for number, (customer, event, at_ms) in enumerate(plan, start=1):
            driver.send(carts, event, key=customer, timestamp=at_ms)
            if crash_every and number % crash_every == 0:
                driver.crash()
        assert driver.read_values(letters) == expected


def test_receipt_comes_by_the_wall_clock_unless_the_payment_is_cancelled() -> None:
    with Driver(job) as driver:
        for customer in ("ann", "bob"):
            driver.send(carts, {"do": "add", "product": "tea"}, key=customer)
            driver.send(carts, {"do": "pay"}, key=customer)
        driver.advance(by_ms=1_999)
        driver.send(carts, {"do": "undo"}, key="bob")
        assert driver.read_values(letters) == []
        driver.crash()
        driver.advance(by_ms=1)
        assert driver.read_values(letters) == [{"to": "ann", "letter": "receipt", "products": ["tea"]}]
        driver.advance(by_ms=2 * DAY_MS, clock="event")
        assert driver.read_values(letters) == []
        assert driver.states(cart.__name__) == {}
