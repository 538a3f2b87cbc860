"""Partitions that wait for each other in event time (`max_drift`): what waits behind them stays small, the
results are the same, and nobody waits for ever, whatever happens.
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import timedelta
from functools import cache
from typing import Any

from fcluster import Job, Tumbling, Watermark, count
from fcluster.common.settings import Settings
from fcluster.graph.partitioner import partition_of
from tests.simulation.job_mix import DRIFT_SEEDS_FROM
from tests.simulation.jobs import BEGIN_MS, SimJob, Written
from tests.simulation.mutations import Mutation
from tests.simulation.run import run
from tests.simulation.worker_shell import Fetched, Runner, SimWorker

SEEDS = 150
RECORDS = 250
STEPS_MS = (10, 100)
"""The time between two records of each partition. They are read equally fast, so one is soon far ahead."""
WINDOW_MS = 100
MAX_DRIFT_MS = 1_000
END_MS = BEGIN_MS + 2 * RECORDS * STEPS_MS[1]


def test_nobody_waits_for_ever_and_results_are_the_same() -> None:
    landed: Counter[str] = Counter()
    for seed in range(DRIFT_SEEDS_FROM, DRIFT_SEEDS_FROM + SEEDS):
        result = run(seed)
        assert not result.failure, f"seed {seed}: {result.failure}"
        landed += result.landed
    assert landed["shard held back"] > SEEDS
    assert landed["input idle"]
    assert landed["crash of a worker"]


def click(key: bytes, at_ms: int) -> Written:
    return Written(key, json.dumps({"user": "u"}).encode(), at_ms)


@cache
def windows_job(max_drift_ms: int | None) -> SimJob:
    """Windows behind a `key_by`. All records are there at the start, in two partitions."""
    job = Job("sim")
    clicks = job.topic("clicks", watermark=Watermark(idle_ms=150, max_drift_ms=max_drift_ms))
    windows = job.stream(clicks).key_by("user").window(Tumbling(timedelta(milliseconds=WINDOW_MS)), name="w")
    windows.aggregate(n=count()).to(job.topic("out"))
    keys = {partition_of(key, 2): key for key in map(str.encode, "abcdefgh")}
    given: list[tuple[str, Written]] = []
    for number in range(RECORDS):
        for partition, step_ms in enumerate(STEPS_MS):
            given.append(("clicks", click(keys[partition], BEGIN_MS + number * step_ms)))
    given += [("clicks", click(key, END_MS)) for key in keys.values()]
    return SimJob(job.build(Settings()), given=given, there=len(given), partitions=2)


def played(seed: int, max_drift_ms: int | None) -> tuple[list[Any], int]:
    """The results, and how many windows were open at most."""
    opened: list[int] = [0]

    class Counting(SimWorker):
        def _process(self, runner: Runner, fetched: Fetched) -> None:
            super()._process(runner, fetched)
            stores = {} if self.disk is None else self.disk.stores
            opened.append(sum(len(store.data) for shard, store in stores.items() if shard.stage == "w"))

    counting = Mutation("counts", seed, "", worker_class=Counting)
    result = run(seed, job=windows_job(max_drift_ms), mutation=counting)
    assert not result.failure, result.failure
    found = [record.data for part in result.outputs["out"] for record in part]
    return sorted(found, key=repr), max(opened)


def test_windows_do_not_pile_up_behind_a_slow_partition() -> None:
    many, few = 0, 0
    for seed in (1, 2, 4, 8, 10, 11, 12):
        results, opened = played(seed, None)
        aligned, opened_aligned = played(seed, MAX_DRIFT_MS)
        assert aligned == results
        many, few = many + opened, few + opened_aligned
    # Faults let one get ahead: nobody waits for a worker that is gone.
    assert few < many / 2
