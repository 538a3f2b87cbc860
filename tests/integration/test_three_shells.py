"""Example jobs and the README's job do the same in `fcluster.testing`, in the simulation, and on Kafka."""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fcluster import Job
from fcluster.common.settings import Settings
from fcluster.graph.partitioner import partition_of
from fcluster.testing import Driver
from tests.checker.generate import create_topic, plain_producer
from tests.harness import REPOSITORY, Up
from tests.in_driver import by_key, rows_in_driver, rows_on_kafka
from tests.simulation.jobs import BEGIN_MS, SimJob, Written
from tests.simulation.run import run
from tests.unit.test_documents import README, code_blocks

pytestmark = pytest.mark.timeout(180)

PARTITIONS = 2
SEEDS = range(6)
"""Seeds of the simulation, with crashes, stops, moves, and other faults."""
SENT = 60

WRAPPER = """
from pathlib import Path

import fcluster

class Prefixed(fcluster.Job):
    def __init__(self, name):
        super().__init__({prefix!r} + name)

    def topic(self, name, **options):
        return super().topic({prefix!r} + name, **options)

original, fcluster.Job = fcluster.Job, Prefixed
try:
    exec(compile(Path({path!r}).read_text(), {path!r}, "exec"))
finally:
    fcluster.Job = original
"""
"""Runs a job file with other names for the job and its topics, because the broker is shared."""


@dataclass(frozen=True)
class Case:
    """A job and its records.

    Attributes:
        text: the job file.
        records: topic, key, value and timestamp.
        outputs: the topics to compare.
        in_order: False if the job merges topics and its result depends on when records arrive. Then the last
            output of each key is compared, and the number of outputs.
    """

    text: str
    records: Sequence[tuple[str, str | None, dict[str, Any], int]]
    outputs: tuple[str, ...]
    in_order: bool = True


def flights() -> list[tuple[str, str | None, dict[str, Any], int]]:
    """Some flights. Each aircraft belongs to one carrier, so its flights keep their order."""
    made: list[tuple[str, str | None, dict[str, Any], int]] = []
    for number in range(SENT):
        aircraft = number * 7 % 11
        carrier = ("UA", "AA", "B6")[aircraft % 3]
        flight = {
            "carrier": carrier,
            "tailnum": None if number % 13 == 5 else f"N{aircraft}",
            "dep_delay": None if number % 9 == 4 else number % 5 - 2,
            "arr_delay": None if number % 9 in (4, 7) else number % 7 - 3,
            "distance": 100 + number,
            "air_time": None if number % 9 == 4 else 30 + number,
        }
        made.append(("flights", carrier, flight, BEGIN_MS + number))
    return made


def orders() -> list[tuple[str, str | None, dict[str, Any], int]]:
    """Orders, many of which are repeated, within the hour of their TTL and after it."""
    numbers = [number if number % 3 else max(0, number - (3, 30)[number % 2]) for number in range(SENT)]
    return [
        (
            "orders",
            f"c{number % 4}",
            {"number": f"n{number}", "price": number * 37 % 50},
            BEGIN_MS + place * 300_000,
        )
        for place, number in enumerate(numbers)
    ]


def meters() -> list[tuple[str, str | None, dict[str, Any], int]]:
    """Readings over some hours. They are out of order by less than the delay, so none is late in any
    shell."""
    made: list[tuple[str, str | None, dict[str, Any], int]] = []
    for number in range(SENT):
        meter = number * 5 % 7
        reading = {"meter": f"m{meter}", "district": f"d{meter % 3}", "wh": number * 37 % 61}
        at_ms = BEGIN_MS + number * 240_000 - number % 3 * 4_000
        made.append(("readings", f"m{meter}", reading, at_ms))
    return made


def balances() -> list[tuple[str, str | None, dict[str, Any], int]]:
    """Orders keyed by account, and payments with the account in their value."""
    made: list[tuple[str, str | None, dict[str, Any], int]] = []
    for number in range(SENT):
        account, cents = f"a{number * 5 % 7}", 10 + number
        if number % 3:
            made.append(("orders", account, {"cents": cents}, BEGIN_MS + number))
        else:
            made.append(("payments", None, {"account": account, "cents": cents}, BEGIN_MS + number))
    return made


def invoices() -> list[tuple[str, str | None, dict[str, Any], int]]:
    """Customers, of whom some aren't known, and orders. Those of a customer keep their order."""
    made: list[tuple[str, str | None, dict[str, Any], int]] = []
    for number in range(6):
        customer = {"name": f"N{number}", "country": ("DE", "FR", "IT")[number % 3]}
        made.append(("customers", f"c{number}", customer, BEGIN_MS + number))
    for number in range(SENT):
        order = {"id": number, "customer": (name := f"c{number * 5 % 9}"), "cents": 100 + number}
        made.append(("orders", name, order, BEGIN_MS + 1_000 + number))
    return made


def shipments() -> list[tuple[str, str | None, dict[str, Any], int]]:
    """Orders, of which some are shipped late or never, and shipments of nothing."""
    made: list[tuple[str, str | None, dict[str, Any], int]] = []
    for number in range(SENT):
        at_ms, order = BEGIN_MS + number * 6 * 3_600_000, f"o{number}"
        if number % 7:
            made.append(("orders", order, {"id": number}, at_ms))
        if number % 5:
            hours = (5, 80, -1, 40)[number % 4]
            made.append(("shipments", order, {"id": 1_000 + number}, at_ms + hours * 3_600_000))
    return sorted(made, key=lambda one: one[3])


def carts() -> list[tuple[str, str | None, dict[str, Any], int]]:
    """Carts that are filled over some days. A third of the records means nothing to a cart. Nobody pays,
    because
    receipts depend on the wall clock."""
    return [
        (
            "carts",
            f"c{number * 5 % 7}",
            {"do": "undo"} if number % 3 == 2 else {"do": "add", "product": f"p{number}"},
            BEGIN_MS + (number + number % 4 * 3) * 3_600_000,
        )
        for number in range(SENT)
    ]


def example(name: str) -> str:
    return (REPOSITORY / "examples" / name / f"{name}.py").read_text(encoding="utf-8")


CASES = {
    "readme": Case(
        "\n".join(code_blocks(README, "python")[:2]), flights(), ("carrier-totals", "aircraft-totals")
    ),
    "flights": Case(example("flights"), flights(), ("carrier-totals", "aircraft-totals")),
    "orders": Case(example("orders"), orders(), ("orders-counted",)),
    "balances": Case(example("balances"), balances(), ("balances",), in_order=False),
    "meters": Case(example("meters"), meters(), ("meter-quarters", "district-hours")),
    "invoices": Case(example("invoices"), invoices(), ("invoices", "orders-unknown"), in_order=False),
    "shipments": Case(example("shipments"), shipments(), ("orders-told",), in_order=False),
    "carts": Case(example("carts"), carts(), ("letters",)),
}

Outputs = dict[str, dict[Any, list[Any]]]
"""Outputs by topic and key."""


def records_of(case: Case, prefix: str) -> list[tuple[str, int, Written]]:
    """Topic, partition and record. Without a key, the value determines the partition."""
    made: list[tuple[str, int, Written]] = []
    for topic, key, data, timestamp_ms in case.records:
        value = json.dumps(data).encode()
        raw_key = None if key is None else key.encode()
        written = Written(raw_key, value, timestamp_ms)
        made.append((f"{prefix}{topic}", partition_of(raw_key or value, PARTITIONS), written))
    return made


def in_driver(job: Job, case: Case, prefix: str) -> Outputs:
    with Driver(job, partitions=PARTITIONS) as driver:
        for topic, partition, record in records_of(case, prefix):
            driver.send_raw(
                topic, record.value, key=record.key, timestamp=record.timestamp_ms, partition=partition
            )
        return {topic: by_key(rows_in_driver(driver, f"{prefix}{topic}")) for topic in case.outputs}


def in_simulation(job: Job, case: Case, prefix: str, seed: int) -> Outputs:
    given = [(topic, record) for topic, _, record in records_of(case, prefix)]
    result = run(seed, job=SimJob(job.build(Settings()), given=given, partitions=PARTITIONS))
    assert not result.failure
    outputs: Outputs = {}
    for topic in case.outputs:
        parts = enumerate(result.outputs[f"{prefix}{topic}"])
        rows = {
            number: [(record.key, record.value, record.timestamp_ms, []) for record in records]
            for number, records in parts
        }
        outputs[topic] = by_key(rows)
    return outputs


def on_kafka(path: Path, case: Case, prefix: str, brokers: str, directory: Path) -> Outputs:
    topics = {f"{prefix}{topic}" for topic in (*(topic for topic, *_ in case.records), *case.outputs)}
    for topic in sorted(topics):
        create_topic(brokers, topic, PARTITIONS)
    producer = plain_producer(brokers)
    for topic, partition, record in records_of(case, prefix):
        producer.produce(topic, record.value, record.key, partition=partition, timestamp=record.timestamp_ms)
    assert producer.flush(30) == 0
    with Up(path, brokers, directory, "--until-caught-up") as up:
        ended = up.wait(120)
    assert ended.code == 0, ended.text
    return {topic: by_key(rows_on_kafka(brokers, f"{prefix}{topic}")) for topic in case.outputs}


def comparable(case: Case, outputs: Outputs) -> Outputs:
    if case.in_order:
        return outputs
    return {
        topic: {key: [len(values), values[-1]] for key, values in keys.items()}
        for topic, keys in outputs.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_job_writes_the_same_in_three_shells(
    name: str, kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    case = CASES[name]
    original, path = tmp_path / f"{name}.py", tmp_path / "job.py"
    original.write_text(case.text)
    path.write_text(WRAPPER.format(prefix=topic_prefix, path=str(original)))
    job: Job = runpy.run_path(str(path))["job"]
    expected = comparable(case, in_driver(job, case, topic_prefix))
    assert all(len(keys) >= 3 for keys in expected.values())
    for seed in SEEDS:
        assert comparable(case, in_simulation(job, case, topic_prefix, seed)) == expected, f"seed {seed}"
    found = on_kafka(path, case, topic_prefix, kafka, tmp_path / "data")
    assert comparable(case, found) == expected
