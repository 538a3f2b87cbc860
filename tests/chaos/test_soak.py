"""A short soak: the random mixture of faults, as `make soak` runs it for longer."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.chaos import plan
from tests.chaos.network import BrokerFor, Island
from tests.chaos.runner import LONG
from tests.chaos.soak import soak

pytestmark = pytest.mark.timeout(400)

SECONDS = 120.0 if LONG else 30.0
SEED = 2177
"""In CI always the same seed, so that a failure comes from the change under test."""


def test_random_mixture_of_faults_loses_and_repeats_nothing(
    stoppable_kafka: BrokerFor, island_or_reason: Island | str, topic_prefix: str, tmp_path: Path
) -> None:
    seed = SEED if os.environ.get("CI") and not LONG else random.SystemRandom().randrange(100_000)
    place = island_or_reason if isinstance(island_or_reason, Island) else None
    report = soak(stoppable_kafka, place, topic_prefix, tmp_path / "data", seed=seed, seconds=SECONDS)
    print(report)
    assert len(report.faults) >= SECONDS / 10, "too few faults hit for the test to mean anything"


def test_seed_gives_the_same_schedule_however_long_it_is() -> None:
    short = list(plan.rounds(7, 2 * plan.ROUND_S, 3))
    assert list(plan.rounds(7, 5 * plan.ROUND_S, 3))[:2] == short
    assert list(plan.rounds(8, 2 * plan.ROUND_S, 3)) != short


@pytest.mark.parametrize("weights", [plan.WEIGHTS, plan.TRIO_WEIGHTS], ids=["one-broker", "three-brokers"])
def test_long_schedule_has_every_fault_in_it(weights: dict[str, int]) -> None:
    drawn = {fault.kind for one in plan.rounds(1, 1800, 3, weights) for fault in one.faults}
    assert drawn == set(weights)


def test_sixteen_turns_hit_each_role_at_each_step_killed_and_stopped() -> None:
    roles = ("a", "b", "c", "d", "e", "f")
    hit = {one for number in range(plan.TURNS) for one in plan.turn(number, roles)}
    assert hit == {
        (role, step, hard) for role in roles for step in plan.EPOCH_STEPS for hard in (True, False)
    }
    assert all([role for role, _, _ in plan.turn(number, roles)] == list(roles) for number in range(99))
