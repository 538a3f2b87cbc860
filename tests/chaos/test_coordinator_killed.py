"""`kill -9` of the coordinator: around journal writes and fences, in a broadcast, in a reassignment."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest

from fcluster.common.failpoints import Arm
from tests.chaos.runner import LONG, PLAIN, REGROUPED, Chaos, variants, workers_of
from tests.chaos.tally import COORDINATOR_KILLED
from tests.harness import COORDINATOR

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Step:
    """A step at which the coordinator dies. `victim`: it only gets there after the death of a worker."""

    point: str
    passing: int = 1
    victim: bool = True


STEPS = [
    Step("coordinator.before-journal"),  # the end of a session
    Step("coordinator.mid-journal"),
    Step("coordinator.after-journal"),
    Step("coordinator.before-fence"),
    Step("coordinator.after-fence"),
    Step("coordinator.before-journal", passing=2),  # the assignment to others, or the victim's next session
    Step("coordinator.after-journal", passing=2),
    Step("coordinator.mid-reassignment"),
    Step("coordinator.mid-reassignment", passing=2),  # one worker has its new shards, another doesn't
    Step("coordinator.mid-broadcast", passing=2, victim=False),  # one worker knows that an epoch is complete
]


def kill_coordinator(run: Chaos, step: Step, victim: str) -> None:
    run.cluster.arm(COORDINATOR, step.point, Arm("kill", passing=step.passing))
    if step.victim:
        run.kill(victim)
    mark = run.cluster.await_mark(COORDINATOR, step.point)
    run.cluster.await_death(COORDINATOR)
    # Nobody can declare it complete: it stays open until there is another coordinator.
    place = f"{step.point}, passing {step.passing} ({mark.detail})"
    run.note(COORDINATOR_KILLED, f"kill -9 coordinator at {place}", mark.time_ns, shown=run.open_epoch())
    run.start(COORDINATOR)
    if step.victim:
        run.start(victim)
    run.await_flow()
    run.await_shards(3)


@pytest.mark.parametrize(
    ("job_file", "replicas"), variants([(PLAIN, 0), (REGROUPED, 1)], [(PLAIN, 1), (REGROUPED, 0)])
)
def test_coordinator_killed_while_it_decides_loses_nothing_and_workers_stay(
    chaos: Callable[..., AbstractContextManager[Chaos]], job_file: str, replicas: int
) -> None:
    # In the short version, each job gets half of the steps.
    steps = STEPS if LONG else STEPS[job_file == REGROUPED :: 2]
    with chaos("coordinator killed at each step", job_file=job_file, replicas=replicas) as run:
        for number, step in enumerate(steps):
            victim = f"worker-{number % 3}"
            pids = run.cluster.pids()
            kill_coordinator(run, step, victim)
            died = {COORDINATOR, victim} if step.victim else {COORDINATOR}
            stayed = {name for name in workers_of(run) if run.cluster.pids()[name] == pids[name]}
            assert stayed == pids.keys() - died
