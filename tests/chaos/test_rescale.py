"""Workers are added and removed under load, with and without a death during the move."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from fcluster.common.failpoints import Arm
from tests.chaos.runner import PLAIN, REGROUPED, Chaos, variants, workers_of
from tests.chaos.tally import KILLED_IN_MOVE, RESCALED

pytestmark = pytest.mark.timeout(300)

SIZES = (2, 5, 3, 2, 1)
SLOTS = 5


def resize(run: Chaos, workers: int) -> None:
    """Start or end workers, highest slots first. Doesn't wait for the shards."""
    shown = run.open_epoch()  # asked first: leaving takes time, and the last one to write may be leaving
    running = len(workers_of(run))
    for slot in range(running, workers):
        run.cluster.start_worker(slot)
    for slot in range(running - 1, workers - 1, -1):
        run.cluster.stop(f"worker-{slot}")
    run.note(RESCALED, f"from {running} to {workers} workers", shown=shown)


@pytest.mark.parametrize(
    ("job_file", "replicas"), variants([(REGROUPED, 0)], [(PLAIN, 0), (PLAIN, 1), (REGROUPED, 1)])
)
def test_rescaling_under_load_loses_and_repeats_nothing(
    chaos: Callable[..., AbstractContextManager[Chaos]], job_file: str, replicas: int
) -> None:
    with chaos("rescaled", job_file=job_file, replicas=replicas, workers=1, slots=SLOTS) as run:
        for size in SIZES:
            resize(run, size)
            run.await_shards(size)
            run.await_flow()


@pytest.mark.parametrize(
    ("job_file", "replicas"), variants([(PLAIN, 1)], [(PLAIN, 0), (REGROUPED, 0), (REGROUPED, 1)])
)
def test_rescaling_with_a_death_during_each_move_loses_and_repeats_nothing(
    chaos: Callable[..., AbstractContextManager[Chaos]], job_file: str, replicas: int
) -> None:
    title = "rescaled with deaths"
    with chaos(title, job_file=job_file, replicas=replicas, workers=1, slots=SLOTS) as run:
        former = 1
        for size in SIZES:
            if size > former:
                # The old owner dies with its stores still open, the new owner during its restore.
                victims = {"worker-0": "worker.shards-released", f"worker-{size - 1}": "worker.mid-restore"}
            else:
                victims = {"worker-0": "worker.mid-restore"}
            for victim, point in victims.items():
                run.cluster.arm(victim, point, Arm("kill"))
            shown = run.open_epoch()
            resize(run, size)
            for victim, point in victims.items():
                run.await_death_at(victim, point, kind=KILLED_IN_MOVE, shown=shown)
                run.start(victim)
            run.await_shards(size)
            run.await_flow()
            former = size
