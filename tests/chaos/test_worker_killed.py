"""`kill -9` of one worker, and of all, at each step of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from fcluster.common.failpoints import Arm
from tests.chaos.runner import PLAIN, REGROUPED, Chaos, workers_of

pytestmark = pytest.mark.timeout(300)

KILL = Arm("kill")
STEPS: dict[str, Arm] = {
    "worker.barrier-received": KILL,
    "worker.layers-frozen": KILL,
    "worker.offsets-sent": KILL,
    "worker.delta-flushed": KILL,
    # The commit thread waits, while the main thread tells the coordinator and may hear that it is complete.
    "worker.prepared": Arm("kill", after_ms=20),
    "worker.complete-received": KILL,
    # While the request is under way: a commit takes one to three milliseconds.
    "worker.commit": Arm("kill", after_ms=1, in_background=True),
    "worker.committed": KILL,
}
NOT_ABORTED = {"worker.commit", "worker.committed"}
"""What was open there may be committed."""


def kill_one(run: Chaos, point: str, victim: str) -> None:
    run.kill_at(victim, point, STEPS[point], in_open_epoch=point not in NOT_ABORTED)
    run.start(victim)
    run.await_flow()


def kill_all(run: Chaos, point: str) -> None:
    """Arm all; each dies when it gets there itself."""
    victims = workers_of(run)
    for victim in victims:
        run.cluster.arm(victim, point, STEPS[point])
    for victim in victims:
        mark = run.cluster.await_mark(victim, point)
        run.cluster.await_death(victim)
        run.note(
            f"kill -9 {victim} (all) at {point} ({mark.detail})",
            mark.time_ns,
            in_open_epoch=point not in NOT_ABORTED,
        )
    for victim in victims:
        run.start(victim)
    run.await_flow()


@pytest.mark.parametrize("job_file", [PLAIN, REGROUPED])
def test_one_worker_killed_at_each_step_of_an_epoch_loses_and_repeats_nothing(
    chaos: Callable[..., AbstractContextManager[Chaos]], job_file: str
) -> None:
    with chaos("one worker killed at each step", job_file=job_file) as run:
        for number, point in enumerate(STEPS):
            kill_one(run, point, f"worker-{number % 3}")


def test_all_workers_killed_at_each_step_of_an_epoch_lose_and_repeat_nothing(
    chaos: Callable[..., AbstractContextManager[Chaos]],
) -> None:
    with chaos("all workers killed at each step", workers=2) as run:
        for point in STEPS:
            kill_all(run, point)
