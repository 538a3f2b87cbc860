"""Snapshots: workers that die around them, and snapshots that are damaged behind everybody's back."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest

from fcluster.common.failpoints import Arm
from fcluster.worker.manifest import Manifest
from tests.chaos.runner import Chaos, workers_of
from tests.harness import wait_until

pytestmark = pytest.mark.timeout(300)

SNAPSHOTS_OFTEN = {"snapshot.interval.ms": 1000}


class Snapshots:
    """The files of a run's snapshot store, by shard."""

    def __init__(self, run: Chaos) -> None:
        self._root = run.data_dir / "snapshots" / run.job / run.source

    def manifests(self, partition: int) -> list[Path]:
        """Newest first."""
        return sorted((self._root / str(partition) / "manifests").glob("*.json"), reverse=True)

    def file(self, partition: int, file_hash: str) -> Path:
        return self._root / str(partition) / "files" / file_hash

    def own_file(self, partition: int) -> Path:
        """A file that only the newest snapshot has."""
        newest, older = (
            {file.hash for file in read_manifest(path).files} for path in self.manifests(partition)[:2]
        )
        return self.file(partition, min(newest - older))

    def two_each(self) -> bool:
        """Whether every shard has two snapshots of different state."""
        return all(len(self.manifests(partition)) == 2 for partition in range(8))


def read_manifest(path: Path) -> Manifest:
    return msgspec.json.decode(path.read_bytes(), type=Manifest)


def test_workers_killed_around_snapshots_and_restores_leave_nothing_half_made(
    chaos: Callable[..., AbstractContextManager[Chaos]],
) -> None:
    with chaos("killed around snapshots", settings=SNAPSHOTS_OFTEN) as run:
        snapshots = Snapshots(run)
        wait_until(snapshots.two_each, "two snapshots of each shard", 60, 0.2)
        for point, victim in (("worker.mid-snapshot", "worker-0"), ("worker.snapshot-taken", "worker-1")):
            run.kill_at(victim, point, Arm("kill", passing=1), in_open_epoch=False)
            run.start(victim)
            run.await_flow()
            run.await_shards(3)
        # A take-over that dies after its first shard: its shards move on once more.
        run.cluster.arm("worker-2", "worker.mid-restore", Arm("kill"))
        run.cluster.kill("worker-1")
        run.note("kill -9 worker-1", in_open_epoch=False)
        mark = run.cluster.await_mark("worker-2", "worker.mid-restore")
        run.cluster.await_death("worker-2")
        run.note(f"kill -9 worker-2 at worker.mid-restore ({mark.detail})", mark.time_ns)
        for victim in ("worker-1", "worker-2"):
            run.start(victim)
        run.await_flow()
        run.await_shards(3)


def flip_a_bit(snapshots: Snapshots, partition: int) -> None:
    path = snapshots.own_file(partition)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(snapshots: Snapshots, partition: int) -> None:
    path = snapshots.own_file(partition)
    os.truncate(path, path.stat().st_size // 2)


def lose_a_file(snapshots: Snapshots, partition: int) -> None:
    snapshots.own_file(partition).unlink()


def take_anothers_manifest(snapshots: Snapshots, partition: int) -> None:
    other = snapshots.manifests((partition + 1) % 8)[0]
    shutil.copyfile(other, snapshots.manifests(partition)[0])


def promise_a_later_epoch(snapshots: Snapshots, partition: int) -> None:
    """The manifest is plausible, but its files don't hold what it says."""
    newest, older = snapshots.manifests(partition)[:2]
    content = msgspec.to_builtins(read_manifest(newest))
    content["files"] = msgspec.to_builtins(read_manifest(older))["files"]
    newest.write_bytes(msgspec.json.encode(content))


def cut_the_manifest(snapshots: Snapshots, partition: int) -> None:
    os.truncate(snapshots.manifests(partition)[0], 40)


DAMAGES = [
    flip_a_bit,
    truncate,
    lose_a_file,
    take_anothers_manifest,
    promise_a_later_epoch,
    cut_the_manifest,
]


def lose_local_state(run: Chaos) -> None:
    """`kill -9` all workers and delete their state directories: only snapshots and changelog are left."""
    for worker in workers_of(run):
        run.cluster.kill(worker)
    shutil.rmtree(run.data_dir / "state")
    run.note("kill -9 all workers, their local state deleted", in_open_epoch=False)


def test_damaged_snapshots_are_passed_over_for_the_older_one(
    chaos: Callable[..., AbstractContextManager[Chaos]],
) -> None:
    with chaos("newest snapshots damaged", settings=SNAPSHOTS_OFTEN) as run:
        snapshots = Snapshots(run)
        wait_until(snapshots.two_each, "two snapshots of each shard", 60, 0.2)
        lose_local_state(run)
        damaged: dict[int, Path] = {}
        for partition, damage in enumerate(DAMAGES):
            damaged[partition] = snapshots.manifests(partition)[0]
            damage(snapshots, partition)
            run.note(f"snapshot of shard {partition}: {damage.__name__}", in_open_epoch=False)
        for slot in range(3):
            run.cluster.start_worker(slot)
        run.await_flow()
        run.await_shards(3)
        said = "\n".join(run.cluster.log(f"worker-{slot}", 10**6) for slot in range(3))
        for partition in damaged:
            pattern = rf"restoring \S*in/{partition} from [^:]*: snapshot"
            assert re.search(pattern, said), f"{pattern!r} isn't in {said}"
        gone = lambda: not any(path.exists() for path in damaged.values())  # noqa: E731
        wait_until(gone, "the damaged snapshots are replaced", 60, 0.2)
        wait_until(snapshots.two_each, "two snapshots of each shard", 60, 0.2)


def test_job_whose_snapshots_are_all_damaged_refuses_to_run(
    chaos_unjudged: Callable[..., AbstractContextManager[Chaos]],
) -> None:
    """The changelog doesn't reach back far enough any more: there is no right state, so there is none."""
    with chaos_unjudged(settings=SNAPSHOTS_OFTEN) as run:
        snapshots = Snapshots(run)
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
