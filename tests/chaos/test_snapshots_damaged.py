"""Workers die while they take or restore snapshots, and snapshots are damaged by something else."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fcluster.common.failpoints import Arm
from tests.chaos.damage import DAMAGES, Snapshots
from tests.chaos.runner import PLAIN, REGROUPED, Chaos, variants, workers_of
from tests.chaos.tally import KILLED_IN_MOVE, SNAPSHOT_DAMAGED, STATE_LOST
from tests.harness import wait_until

pytestmark = pytest.mark.timeout(300)

SNAPSHOTS_OFTEN = {"snapshot.interval.ms": 1000}


def snapshots_of(run: Chaos) -> Snapshots:
    return Snapshots(run.data_dir / "snapshots" / run.job / run.stage)


def test_workers_killed_around_snapshots_and_restores_leave_nothing_unfinished(
    chaos: Callable[..., AbstractContextManager[Chaos]],
) -> None:
    with chaos("killed around snapshots", settings=SNAPSHOTS_OFTEN) as run:
        snapshots = snapshots_of(run)
        wait_until(snapshots.two_each, "two snapshots of each shard", 60, 0.2)
        for point, victim in (("worker.mid-snapshot", "worker-0"), ("worker.snapshot-taken", "worker-1")):
            # What counts is the snapshot. On a busy host, the worker may have sent nothing since its commit.
            run.kill_at(victim, point, Arm("kill"), shown="its snapshot was under way")
            run.start(victim)
            run.await_flow()
            run.await_shards(3)
        # The worker that takes over dies after restoring its first shard, so its shards move once more.
        run.cluster.arm("worker-2", "worker.mid-restore", Arm("kill"))
        run.kill("worker-1")
        run.await_death_at("worker-2", "worker.mid-restore", kind=KILLED_IN_MOVE)
        for victim in ("worker-1", "worker-2"):
            run.start(victim)
        run.await_flow()
        run.await_shards(3)


def lose_local_state(run: Chaos) -> None:
    """`kill -9` all workers and delete their state directories. Only snapshots and changelog are left."""
    began_ns = time.time_ns()
    for worker in workers_of(run):
        run.cluster.kill(worker)
    shutil.rmtree(run.data_dir / "state")
    run.note(STATE_LOST, "kill -9 all workers, their local state deleted", began_ns)


@pytest.mark.parametrize(
    ("job_file", "replicas"), variants([(PLAIN, 1)], [(PLAIN, 0), (REGROUPED, 0), (REGROUPED, 1)])
)
def test_damaged_snapshot_is_skipped_for_the_older_one(
    chaos: Callable[..., AbstractContextManager[Chaos]], job_file: str, replicas: int
) -> None:
    title = "newest snapshots damaged"
    with chaos(title, job_file=job_file, replicas=replicas, settings=SNAPSHOTS_OFTEN) as run:
        snapshots = snapshots_of(run)
        wait_until(snapshots.two_each, "two snapshots of each shard", 60, 0.2)
        lose_local_state(run)
        damaged: dict[int, Path] = {}
        for partition, damage in enumerate(DAMAGES):
            damaged[partition] = snapshots.manifests(partition)[0]
            damage(snapshots, partition)
            # The job makes no progress in the meantime: either killing them hit an open epoch, or the run
            # fails.
            run.note(
                SNAPSHOT_DAMAGED, f"shard {partition}: {damage.__name__}", shown="all were killed mid-epoch"
            )
        for slot in range(3):
            run.cluster.start_worker(slot)
        run.await_flow()
        run.await_shards(3)
        said = "\n".join(run.cluster.log(f"worker-{slot}", 10**6) for slot in range(3))
        for partition in damaged:
            pattern = rf"restoring {re.escape(run.stage)}/{partition} from [^:]*: snapshot"
            assert re.search(pattern, said), f"{pattern!r} isn't in {said}"
        gone = lambda: not any(path.exists() for path in damaged.values())  # noqa: E731
        wait_until(gone, "the damaged snapshots are replaced", 60, 0.2)
        wait_until(snapshots.two_each, "two snapshots of each shard", 60, 0.2)


def test_job_whose_snapshots_are_all_damaged_refuses_to_run(
    chaos_unjudged: Callable[..., AbstractContextManager[Chaos]],
) -> None:
    """The changelog no longer reaches back far enough, so the right state is lost, and the job must not
    start with a wrong one."""
    with chaos_unjudged(settings=SNAPSHOTS_OFTEN) as run:
        snapshots = snapshots_of(run)
        wait_until(snapshots.two_each, "two snapshots of each shard", 60, 0.2)
        lose_local_state(run)
        for path in snapshots.file(3, "x").parent.iterdir():
            os.truncate(path, path.stat().st_size // 2)
        for slot in range(3):
            run.cluster.start_worker(slot)
        child = run.cluster.child("coordinator")
        wait_until(lambda: child.poll() is not None, "the job stops", 60)
        assert child.poll() == 3
        said = run.cluster.log("coordinator", 10**6)
        assert re.search(rf"{run.source}/3 .*(damaged|changelog)", said), said
