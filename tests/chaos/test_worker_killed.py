"""`kill -9` of one worker, and of all, at each step of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from fcluster.common.failpoints import Arm
from tests.chaos.runner import PLAIN, REGROUPED, Chaos, variants, workers_of
from tests.chaos.tally import ALL_KILLED

pytestmark = pytest.mark.timeout(300)

KILL = Arm("kill")
STEPS: dict[str, Arm] = {
    "worker.barrier-received": KILL,
    "worker.layers-frozen": KILL,
    "worker.offsets-sent": KILL,
    "worker.delta-flushed": KILL,
    # The commit thread waits there, while the main thread reports to the coordinator and may get its answer.
    "worker.prepared": Arm("kill", after_ms=20),
    "worker.complete-received": KILL,
    # While the request to commit is in flight: a commit takes one to three milliseconds.
    "worker.commit": Arm("kill", after_ms=1, in_background=True),
    "worker.committed": KILL,
}
SHOWN = {
    "worker.layers-frozen": "its layers were frozen",
    "worker.commit": "its commit was under way",
    "worker.committed": "committed and not applied",
}
"""What a worker had open at these steps may be committed, or not have been sent yet: a worker with a backlog
sends its outputs after it has frozen its layers. So perhaps nothing is aborted. The step itself shows that an
epoch was open.
"""


def kill_one(run: Chaos, point: str, victim: str) -> None:
    run.kill_at(victim, point, STEPS[point], shown=SHOWN.get(point, ""))
    run.start(victim)
    run.await_flow()


def kill_all(run: Chaos, point: str) -> None:
    """Arm all workers. Each dies when it reaches the point."""
    victims = workers_of(run)
    for victim in victims:
        run.cluster.arm(victim, point, STEPS[point])
    for victim in victims:
        run.await_death_at(victim, point, kind=ALL_KILLED, shown=SHOWN.get(point, ""))
    for victim in victims:
        run.start(victim)
    run.await_flow()


@pytest.mark.parametrize(
    ("job_file", "replicas"), variants([(PLAIN, 0), (REGROUPED, 1)], [(PLAIN, 1), (REGROUPED, 0)])
)
def test_one_worker_killed_at_each_step_of_an_epoch_loses_and_repeats_nothing(
    chaos: Callable[..., AbstractContextManager[Chaos]], job_file: str, replicas: int
) -> None:
    with chaos("one worker killed at each step", job_file=job_file, replicas=replicas) as run:
        for number, point in enumerate(STEPS):
            kill_one(run, point, f"worker-{number % 3}")


@pytest.mark.parametrize(
    ("job_file", "replicas"), variants([(PLAIN, 1)], [(PLAIN, 0), (REGROUPED, 0), (REGROUPED, 1)])
)
def test_all_workers_killed_at_each_step_of_an_epoch_lose_and_repeat_nothing(
    chaos: Callable[..., AbstractContextManager[Chaos]], job_file: str, replicas: int
) -> None:
    title = "all workers killed at each step"
    with chaos(title, job_file=job_file, replicas=replicas, workers=2) as run:
        for point in STEPS:
            kill_all(run, point)
