"""A job on three brokers, which are disturbed one after another; see `trio`.

One job lives through several faults, as in production; that also saves time. The short version plays one turn
a day: each role is hit once, with a kill or a stop, at a step that differs from day to day.
FCLUSTER_TEST_TURN chooses a turn. The long version plays all turns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.chaos.plan import EPOCH_STEPS, turn
from tests.chaos.runner import LONG, PLAIN, REGROUPED, Chaos
from tests.chaos.trio import (
    CHANGELOG,
    CONTROLLER,
    GROUP,
    JOURNAL,
    JOURNAL_WRITER,
    ROLES,
    Hurt,
    Trio,
    TwoCoordinators,
)

pytestmark = pytest.mark.timeout(900)

RATE = 300.0
SETTINGS = {
    # Default timeouts: a broker's session may end in an epoch, and other brokers have to take over.
    "checkpoint.timeout.ms": 30_000,
    "session.timeout.ms": 3000,
}
TURN = int(os.environ.get("FCLUSTER_TEST_TURN", time.time() // 86_400))
AWAY_S = 60.0 if LONG else 15.0
Runs = Callable[..., AbstractContextManager[Chaos]]


def test_broker_after_broker_is_disturbed_and_the_job_hardly_pauses(chaos_on_trio: Runs, trio: Trio) -> None:
    with chaos_on_trio(f"FCLUSTER_TEST_TURN={TURN}", job_file=PLAIN, settings=SETTINGS, rate=RATE) as run:
        hurt = Hurt(run, trio, seed=TURN)
        for role, step, hard in turn(TURN, ROLES):
            (hurt.kill if hard else hurt.stop)(role, step)


def test_brokers_that_hang_or_hand_over_or_are_cut_off_lose_nothing(chaos_on_trio: Runs, trio: Trio) -> None:
    with chaos_on_trio("brokers hang", job_file=REGROUPED, settings=SETTINGS, rate=RATE) as run:
        hurt = Hurt(run, trio)
        hurt.cut(1, 10.0)
        hurt.move_leaders()
        hurt.hang(GROUP)
        hurt.take_two_away(AWAY_S, clean=False)
        hurt.cut(0, 10.0)


def test_coordinator_dies_with_a_broker_that_its_journal_needs(chaos_on_trio: Runs, trio: Trio) -> None:
    with chaos_on_trio(
        "a coordinator takes over without a broker",
        settings=SETTINGS,
        rate=RATE,
        cluster_type=TwoCoordinators,
    ) as run:
        hurt = Hurt(run, trio)
        hurt.kill_with_leader(JOURNAL)
        hurt.kill_with_leader(JOURNAL_WRITER)


if LONG:

    @pytest.mark.timeout(2400)
    @pytest.mark.parametrize("hard", [True, False], ids=["killed", "stopped"])
    @pytest.mark.parametrize("role", ROLES, ids=[role.replace(" ", "-") for role in ROLES])
    def test_broker_is_disturbed_at_each_step_of_an_epoch(
        chaos_on_trio: Runs, trio: Trio, role: str, hard: bool
    ) -> None:
        job_file = REGROUPED if role in (CHANGELOG, GROUP) else PLAIN
        with chaos_on_trio(f"{role}, at each step", job_file=job_file, settings=SETTINGS, rate=RATE) as run:
            hurt = Hurt(run, trio, seed=ROLES.index(role))
            for step in EPOCH_STEPS:
                (hurt.kill if hard else hurt.stop)(role, step)

    @pytest.mark.timeout(1200)
    def test_two_of_three_brokers_down_for_a_minute_delay_the_job_and_lose_nothing(
        chaos_on_trio: Runs, trio: Trio
    ) -> None:
        with chaos_on_trio("two of three away", job_file=PLAIN, settings=SETTINGS, rate=RATE) as run:
            hurt = Hurt(run, trio)
            hurt.take_two_away(AWAY_S, clean=True)
            hurt.take_two_away(AWAY_S, clean=False)
            for _ in range(3):
                hurt.stop(CONTROLLER, "worker.commit")
                hurt.kill(CONTROLLER, "worker.offsets-sent")
                hurt.move_leaders()
