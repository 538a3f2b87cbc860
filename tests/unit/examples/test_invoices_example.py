"""The example with a table, in the driver: crashes change nothing of what it writes."""

from __future__ import annotations

import random

import pytest

from examples.invoices.invoices import invoices, job, unknown
from examples.invoices.recount import Sent, recount
from fcluster.testing import Driver
from fcluster.testing.driver import START_MS


def plan(count: int) -> list[Sent]:
    """Orders, and customers who come, move and go."""
    chance = random.Random(7)
    sent: list[Sent] = []
    for number in range(count):
        customer = f"c{chance.randrange(12)}"
        if chance.random() < 0.3:
            row = {"name": f"N{number}", "country": chance.choice(["DE", "FR", "IT"])}
            sent.append(("customers", customer, row if chance.random() < 0.8 else None))
        else:
            order = {"id": number, "customer": customer, "cents": chance.randrange(10_000)}
            sent.append(("orders", f"o{number}", order))
    return sent


@pytest.mark.parametrize("crash_every", [0, 23])
@pytest.mark.parametrize("partitions", [1, 3])
def test_invoices_are_those_of_the_recount(partitions: int, crash_every: int) -> None:
    sent = plan(400)
    expected, expected_unknown = recount(sent)
    assert len(expected) > 150
    assert len(expected_unknown) > 30
    with Driver(job, partitions=partitions) as driver:
        for number, (topic, key, value) in enumerate(sent, start=1):
            driver.send(topic, value, key=key, timestamp=START_MS + number)
            if crash_every and number % crash_every == 0:
                driver.crash()
        assert driver.read_values(invoices) == expected
        assert driver.read_values(unknown) == expected_unknown
