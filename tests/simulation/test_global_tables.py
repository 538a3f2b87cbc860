"""Global tables in the simulation: processes crash and stop, messages are lost, shards move; and each record
meets a row that it may meet, once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from fcluster import Job
from fcluster.common.settings import Settings
from fcluster.coordinator.core import starts
from fcluster.engine import loading
from fcluster.worker import processing
from tests.simulation.jobs import SimJob, Written
from tests.simulation.run import run

SEEDS = range(8)
PARTITIONS = 3
ROW_KEYS = [f"r{number}" for number in range(7)]
Given = tuple[str, Written]


def joined_job() -> Job:
    job = Job("sim")
    rows = job.global_table(job.topic("rows"))
    stream = job.stream(job.topic("calls"))
    stream.join(rows, lambda call, row: {**call, "row": row}, on="row", how="left").to(job.topic("out"))
    return job


def row(key: str, value: int | None, at_ms: int) -> Given:
    return "rows", Written(key.encode(), None if value is None else b"%d" % value, at_ms)


def calls(chance: Random, first: int, count: int) -> list[Given]:
    return [
        (
            "calls",
            Written(
                f"c{chance.randrange(20)}".encode(),
                json.dumps({"n": number, "row": chance.choice([*ROW_KEYS, "nobody", None])}).encode(),
                chance.randrange(1, 100),
            ),
        )
        for number in range(first, first + count)
    ]


def played(seed: int, given: list[Given], there: int, outage: list[Given] | None = None) -> list[list[Any]]:
    """The results of each partition, in order."""
    topology = joined_job().build(Settings())
    job = SimJob(topology, given=given, there=there, outage=outage or (), partitions=PARTITIONS)
    result = run(seed, job=job)
    assert not result.failure, result.failure
    return [[record.data for record in part] for part in result.outputs["out"]]


def check_rows_that_stay(seed: int) -> None:
    """All rows are there before the job, and behind calls: so all calls meet them, whatever happens."""
    chance = Random(f"global {seed}")
    expected: dict[str, int | None] = {}
    given = calls(chance, 0, 10)
    for number in range(30):
        key, value = chance.choice(ROW_KEYS), None if chance.random() < 0.2 else number
        expected[key] = value
        given.append(row(key, value, 1000 + number))
    there = len(given)
    given += calls(chance, 10, 30)
    found = [result for part in played(seed, given, there) for result in part]
    asked = {one["n"]: one["row"] for one in (json.loads(w.value or b"") for t, w in given if t == "calls")}
    wanted = {n: None if key is None else expected.get(key) for n, key in asked.items()}
    assert sorted((one["n"], one["row"] if one["row"] is not None else -1) for one in found) == sorted(
        (n, -1 if value is None else value) for n, value in wanted.items()
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_all_records_meet_the_rows_of_the_start(seed: int) -> None:
    check_rows_that_stay(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_record_is_joined_once_and_no_shard_goes_back_to_a_former_row(seed: int) -> None:
    chance = Random(f"global changes {seed}")
    given = [row(key, 0, 1) for key in ROW_KEYS]
    there = len(given)
    for number in range(1, 40):
        given.append(row(chance.choice(ROW_KEYS), number, number))
        given += calls(chance, number, 1)
    parts = played(seed, given, there)
    found = [result for part in parts for result in part]
    assert sorted(one["n"] for one in found) == list(range(1, 40))
    asked = {one["n"]: one["row"] for one in (json.loads(w.value or b"") for t, w in given if t == "calls")}
    for part in parts:
        newest: dict[Any, int] = defaultdict(int)
        for one in part:
            key = asked[one["n"]]
            if key in ROW_KEYS:
                assert one["row"] is not None, "there always is a row"
                assert one["row"] >= newest[key]
                newest[key] = one["row"]


def check_outage(seed: int) -> None:
    """In an outage, calls are written, and behind them a row of each key: those calls meet that, or a later
    one.
    """
    chance = Random(f"global outage {seed}")
    given = [row(key, 0, 1) for key in ROW_KEYS]
    there = len(given)
    for number in range(1, 20):
        given.append(row(chance.choice(ROW_KEYS), number, number))
        given += calls(chance, number, 1)
    outage = calls(chance, 100, 10) + [row(key, 1_000, 1_000) for key in ROW_KEYS]
    found = [result for part in played(seed, given, there, outage) for result in part]
    assert sorted(one["n"] for one in found) == [*range(1, 20), *range(100, 110)]
    asked = {one["n"]: one["row"] for one in (json.loads(w.value or b"") for t, w in outage if t == "calls")}
    since_ms = outage[0][1].put_at_ms
    later = {int(w.value or b"") for topic, w in given if topic == "rows" and w.put_at_ms >= since_ms}
    for one in found:
        if one["n"] >= 100:
            assert one["row"] in ({1_000, *later} if asked[one["n"]] in ROW_KEYS else {None}), one


@pytest.mark.parametrize("seed", SEEDS)
def test_calls_of_an_outage_meet_the_rows_that_are_there_when_the_job_starts_again(seed: int) -> None:
    check_outage(seed)


def assert_caught(check: Callable[[int], None] = check_rows_that_stay) -> None:
    """At least one seed notices."""
    for seed in range(20):
        try:
            check(seed)
        except AssertionError:
            return
    raise RuntimeError("nobody has noticed")


def test_records_that_do_not_wait_for_the_rows_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processing, "unloaded_inputs", lambda *_: None)
    assert_caught()


def test_a_mark_of_one_shard_that_counts_for_all_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.Loading, "is_loaded", property(is_any_heard))
    assert_caught()


def is_any_heard(self: Any) -> bool:
    return self._heard.get(b"all") is not loading.ABSENT


def is_ever_loaded(self: Any) -> bool:
    shards = self._heard.get(b"all")
    return shards is not loading.ABSENT and all(
        self._heard.get(shard.to_bytes(4, "big")) is not loading.ABSENT for shard in range(shards)
    )


def test_marks_of_a_former_start_that_count_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.Loading, "is_loaded", property(is_ever_loaded))
    assert_caught(check_outage)


def goes_on_with_the_last_start(self: Any) -> None:
    cluster = self._cluster
    if cluster.job_start is None and cluster.started and not cluster.awaits_sessions():
        cluster.job_start = self._last


def test_an_outage_that_is_no_start_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts.Starts, "decide", goes_on_with_the_last_start)
    assert_caught(check_outage)


def begins_another_start(self: Any) -> bool:
    is_new = self._cluster.job_start is None
    self._cluster.job_start = self._cluster.term
    return is_new


def test_a_failover_that_is_a_start_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that move wait for marks that nobody writes."""
    monkeypatch.setattr(starts.Starts, "goes_on", begins_another_start)
    assert_caught()
