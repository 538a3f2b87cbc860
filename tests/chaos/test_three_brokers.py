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
    BrokerFaults,
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
        faults = BrokerFaults(run, trio, seed=TURN)
        for role, step, hard in turn(TURN, ROLES):
            (faults.kill if hard else faults.stop)(role, step)


def test_brokers_that_hang_or_hand_over_or_are_cut_off_lose_nothing(chaos_on_trio: Runs, trio: Trio) -> None:
    with chaos_on_trio("brokers hang", job_file=REGROUPED, settings=SETTINGS, rate=RATE) as run:
        faults = BrokerFaults(run, trio)
        faults.cut(1, 10.0)
        faults.move_leaders()
        faults.hang(GROUP)
        faults.take_two_away(AWAY_S, clean=False)
        faults.cut(0, 10.0)


def test_coordinator_dies_with_a_broker_that_its_journal_needs(chaos_on_trio: Runs, trio: Trio) -> None:
    with chaos_on_trio(
        "a coordinator takes over without a broker",
        settings=SETTINGS,
        rate=RATE,
        cluster_type=TwoCoordinators,
    ) as run:
        faults = BrokerFaults(run, trio)
        faults.kill_with_leader(JOURNAL)
        faults.kill_with_leader(JOURNAL_WRITER)


if LONG:

    @pytest.mark.timeout(2400)
    @pytest.mark.parametrize("hard", [True, False], ids=["killed", "stopped"])
    @pytest.mark.parametrize("role", ROLES, ids=[role.replace(" ", "-") for role in ROLES])
    def test_broker_is_disturbed_at_each_step_of_an_epoch(
        chaos_on_trio: Runs, trio: Trio, role: str, hard: bool
    ) -> None:
        job_file = REGROUPED if role in (CHANGELOG, GROUP) else PLAIN
        with chaos_on_trio(f"{role}, at each step", job_file=job_file, settings=SETTINGS, rate=RATE) as run:
            faults = BrokerFaults(run, trio, seed=ROLES.index(role))
            for step in EPOCH_STEPS:
                (faults.kill if hard else faults.stop)(role, step)

    @pytest.mark.timeout(1200)
    def test_two_of_three_brokers_down_for_a_minute_delay_the_job_and_lose_nothing(
        chaos_on_trio: Runs, trio: Trio
    ) -> None:
        with chaos_on_trio("two of three away", job_file=PLAIN, settings=SETTINGS, rate=RATE) as run:
            faults = BrokerFaults(run, trio)
            faults.take_two_away(AWAY_S, clean=True)
            faults.take_two_away(AWAY_S, clean=False)
            for _ in range(3):
                faults.stop(CONTROLLER, "worker.commit")
                faults.kill(CONTROLLER, "worker.offsets-sent")
                faults.move_leaders()
