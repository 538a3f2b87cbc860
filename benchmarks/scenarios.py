"""The scenarios of the suite, by name. No Kafka; `suite` runs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from benchmarks.lanes import AT_LEAST_ONCE, Task
from benchmarks.latency import Load
from benchmarks.records import Input

RECORDS_MIN, KEYS_MIN, SECONDS_MIN = 1_000, 10, 1.0
"""However small the scale."""


_TASK, _INPUT, _LOAD = Task(), Input(1_000_000, 50_000), Load(2_000)
"""What scenarios have that don't say otherwise."""


class UnknownScenarioError(Exception):
    """No scenario has this name; the message lists those that there are."""


@dataclass(frozen=True)
class Scenario:
    """What is measured.

    Attributes:
        kind: "drain": how fast records that exist are processed; "latency": how soon, at a steady rate;
            "engine": processor time of the engine without Kafka.
        input: of a drain.
        parts: what the first and the second part of a drain are. By default its halves; otherwise the
            records that bring new keys, and the rest.
        load: of a latency.
        yardsticks: measure besides what does the same without fcluster.
    """

    name: str
    about: str
    kind: Literal["drain", "latency", "engine"] = "drain"
    task: Task = _TASK
    input: Input = _INPUT
    parts: Literal["halves", "new keys and updates"] = "halves"
    load: Load = _LOAD
    yardsticks: bool = False

    @property
    def warms_up(self) -> bool:
        """Whether a round that doesn't count comes first. A broker that has just started takes twice as long
        for a transaction, until Java's compiler is done with it after some minutes.
        """
        return self.kind == "latency"

    @property
    def split_at(self) -> int:
        """How many records are the first part of a drain."""
        return self.input.records // 2 if self.parts == "halves" else self.input.keys

    def scaled(self, scale: float) -> Scenario:
        """With so many times the records: for a latency, so many times the seconds, at the same rate."""

        def times(count: int, least: int) -> int:
            return max(min(count, least), round(count * scale))

        def seconds(before: float) -> float:
            return max(min(before, SECONDS_MIN), before * scale)

        made = replace(
            self.input, records=times(self.input.records, RECORDS_MIN), keys=times(self.input.keys, KEYS_MIN)
        )
        load = replace(self.load, seconds=seconds(self.load.seconds), warm_up_s=seconds(self.load.warm_up_s))
        return replace(self, input=made, load=load)

    def settings(self) -> dict[str, str | int | float]:
        """What it was measured with, for the results."""
        if self.kind == "engine":
            return {}
        found: dict[str, str | int | float] = {
            "job": self.task.job,
            "guarantee": self.task.guarantee,
            "partitions": self.task.partitions,
            "workers": self.task.workers,
        }
        if self.kind == "drain":
            return found | {
                "records": self.input.records,
                "keys": self.input.keys,
                "size_bytes": self.input.size_bytes,
                "zipf": self.input.zipf,
                "parts": self.parts,
                "split_at": self.split_at,
            }
        return found | {
            "rate": self.load.rate,
            "keys": self.load.keys,
            "seconds": self.load.seconds,
            "warm_up_s": self.load.warm_up_s,
        }


def _state(name: str, keys: int) -> Scenario:
    return Scenario(
        f"state-{name}",
        f"drain over {keys:,} keys: new keys first, then updates of all of them",
        input=Input(keys + max(keys, 500_000), keys),
        parts="new keys and updates",
    )


def _size(name: str, size_bytes: int, records: int) -> Scenario:
    return Scenario(
        f"size-{name}",
        f"drain of records of {size_bytes:,} bytes",
        input=Input(records, 50_000, size_bytes),
    )


def _latency(rate: int) -> Scenario:
    return Scenario(
        f"latency-{rate}",
        f"latency at {rate:,} records/s",
        "latency",
        Task(quick=True),
        load=Load(rate),
        yardsticks=True,
    )


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("engine", "processor time of the engine without Kafka, by record", "engine"),
    Scenario("drain-few", "drain over few keys (running count and sum)", yardsticks=True),
    Scenario(
        "drain-many",
        "drain over many keys: four of five records bring a new one",
        input=Input(2_000_000, 1_600_000),
        yardsticks=True,
    ),
    Scenario("drain-at-least-once", "drain over few keys, at least once", task=Task(guarantee=AT_LEAST_ONCE)),
    Scenario("drain-stateless", "drain by a job without state", task=Task("stateless")),
    Scenario("drain-repartitioned", "drain through a repartition topic", task=Task("regrouped")),
    *(
        Scenario(
            f"two-workers-{name}",
            f"{about}, by two workers; Kafka Streams has two threads in one process",
            task=Task(job, workers=2, peers=1),
            input=input_,
        )
        for name, about, job, input_ in (
            ("few", "drain over few keys", "totals", _INPUT),
            ("many", "drain over many keys", "totals", Input(2_000_000, 1_600_000)),
            ("repartitioned", "drain through a repartition topic", "regrouped", _INPUT),
        )
    ),
    *map(_latency, (200, 2_000, 20_000)),
    Scenario(
        "latency-at-least-once",
        "latency at 2,000 records/s, at least once",
        "latency",
        Task(guarantee=AT_LEAST_ONCE, quick=True),
    ),
    Scenario(
        "latency-repartitioned",
        "latency at 2,000 records/s through a repartition topic",
        "latency",
        Task("regrouped", quick=True),
    ),
    _state("1e4", 10_000),
    _state("1e5", 100_000),
    _state("1e6", 1_000_000),
    _state("1e7", 10_000_000),
    Scenario(
        "zipf",
        "drain over 1,000,000 keys of which some are much busier than others (Zipf, exponent 1)",
        input=Input(2_000_000, 1_000_000, zipf=1.0),
    ),
    _size("100", 100, 1_000_000),
    _size("1k", 1_000, 500_000),
    _size("10k", 10_000, 100_000),
    *(
        Scenario(f"partitions-{count}", f"drain of {count} partitions", task=Task(partitions=count))
        for count in (1, 4, 16, 64)
    ),
    *(
        Scenario(
            f"workers-{count}", f"drain of 8 partitions by {count} workers", task=Task("totals", 8, count)
        )
        for count in (1, 2, 4)
    ),
)


def choose(wanted: Sequence[str]) -> list[Scenario]:
    """Scenarios by name or by a pattern (`state-*`), in their own order; all of them if none is named.

    Raises:
        UnknownScenarioError: a name or pattern fits none.
    """
    for pattern in wanted:
        if not any(fnmatchcase(scenario.name, pattern) for scenario in SCENARIOS):
            raise UnknownScenarioError(f"no scenario {pattern!r}; there are {', '.join(names(SCENARIOS))}")
    return [
        scenario
        for scenario in SCENARIOS
        if not wanted or any(fnmatchcase(scenario.name, pattern) for pattern in wanted)
    ]


def names(scenarios: Iterable[Scenario]) -> list[str]:
    """Their names."""
    return [scenario.name for scenario in scenarios]
