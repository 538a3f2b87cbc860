"""The limit on dead letters in the simulation: processes crash and stop, messages are lost, shards move, and
the coordinator knows in the end exactly how many dead letters have been committed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from fcluster import Job
from fcluster.common.settings import Settings
from fcluster.coordinator.core.letters import Letters
from fcluster.engine.letter_limit import ShardLetters
from fcluster.worker import processing
from tests.simulation.jobs import SimJob, Written
from tests.simulation.run import run

SEEDS = range(16)
PARTITIONS = 3
RECORDS = 60


def failing_job() -> Job:
    """A third of its records fails in the first stage, and half of the others in the second one."""

    def first(value: dict[str, int]) -> dict[str, int]:
        return {**value, "first": 1 // (value["n"] % 3)}

    def second(value: dict[str, int]) -> dict[str, int]:
        return {**value, "second": 1 // (value["n"] % 2)}

    job = Job("sim")
    dead, other = job.topic("dead", value="bytes"), job.topic("other", value="bytes")
    stream = job.stream(job.topic("in"))
    stream.map(first, on_error=dead).key_by("k", name="again").map(second, on_error=other).to(
        job.topic("out")
    )
    return job


def check_counts(seed: int) -> None:
    chance = Random(f"dead letters {seed}")
    given = [
        (
            "in",
            Written(
                f"k{chance.randrange(20)}".encode(),
                json.dumps({"n": number, "k": f"k{chance.randrange(9)}"}).encode(),
                chance.randrange(1, 100),
            ),
        )
        for number in range(RECORDS)
    ]
    topology = failing_job().build(Settings())
    job = SimJob(topology, given=given, partitions=PARTITIONS, dead_letters_max=1_000_000)
    result = run(seed, job=job)
    assert not result.failure, result.failure
    written = {topic: sum(map(len, parts)) for topic, parts in result.outputs.items()}
    assert written["dead"] == len(range(0, RECORDS, 3))
    assert written["other"] == len([n for n in range(RECORDS) if n % 3 and n % 2 == 0])


@pytest.mark.parametrize("seed", SEEDS)
def test_coordinator_knows_exactly_how_many_dead_letters_there_are(seed: int) -> None:
    check_counts(seed)


def assert_caught() -> None:
    """At least one seed notices that the count is wrong."""
    for seed in range(40):
        try:
            check_counts(seed)
        except AssertionError as error:
            if "are counted, and there are" in str(error):
                return
            raise
    raise RuntimeError("nobody has noticed")


def test_counting_on_when_a_shard_begins_again_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was aborted would count twice, and what another worker has written not at all."""
    monkeypatch.setattr(ShardLetters, "restore", lambda *_: None)
    assert_caught()


def test_counts_that_are_not_committed_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be lost with the worker."""
    monkeypatch.setattr(processing, "decode_counts", lambda *_: {})
    assert_caught()


def adds_what_it_hears(method: Callable[..., None]) -> Callable[..., None]:
    def learn(self: Any, status: Any, last: str = "") -> None:
        self._texts.clear()
        method(self, status, last)

    return learn


def test_adding_up_reports_that_are_repeated_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letters, "learn", adds_what_it_hears(Letters.learn))
    assert_caught()
