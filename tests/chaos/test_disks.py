"""Full disks and I/O errors, of snapshots, state and logs: the last good snapshot stays usable."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fcluster.common.failpoints import Arm
from fcluster.worker.core import EXIT_MISTAKE
from tests.chaos.disks import fill, make_room, small_disk
from tests.chaos.runner import Chaos
from tests.harness import wait_until

pytestmark = pytest.mark.timeout(300)

SNAPSHOTS_OFTEN = {"snapshot.interval.ms": 500}


def newest_manifests(run: Chaos) -> dict[int, str]:
    """Partition to the name of its newest snapshot."""
    root = run.data_dir / "snapshots" / run.job / run.source
    return {
        partition: max(
            (path.name for path in (root / str(partition) / "manifests").glob("*.json")), default=""
        )
        for partition in range(8)
    }


def await_new_snapshots(run: Chaos) -> dict[int, str]:
    """Wait until every shard has a newer snapshot than now."""
    before = newest_manifests(run)
    wait_until(
        lambda: all(name > before[partition] for partition, name in newest_manifests(run).items()),
        "new snapshots of all shards",
        60,
        0.2,
    )
    return newest_manifests(run)


def said_since(run: Chaos, text: str, before: dict[str, int]) -> bool:
    return any(text in run.cluster.log(worker, 10**6)[length:] for worker, length in before.items())


def log_lengths(run: Chaos) -> dict[str, int]:
    return {f"worker-{slot}": len(run.cluster.log(f"worker-{slot}", 10**6)) for slot in range(3)}


def restore_without_local_files(run: Chaos, slot: int) -> None:
    """`kill -9`, and the local state is gone: snapshot and changelog have to do."""
    run.cluster.kill(f"worker-{slot}")
    shutil.rmtree(run.data_dir / "state" / run.job / f"slot-{slot}")
    run.note(f"kill -9 worker-{slot}, its local state deleted", in_open_epoch=False)
    run.cluster.start_worker(slot)
    run.await_flow()


def test_full_snapshot_disk_keeps_the_last_good_snapshots_and_the_job_going(
    chaos: Callable[..., AbstractContextManager[Chaos]], tmp_path: Path
) -> None:
    title = "snapshot disk full"
    snapshots = tmp_path / "data" / "snapshots"
    with small_disk(snapshots, size_kb=16_000) as disk, chaos(title, settings=SNAPSHOTS_OFTEN) as run:
        await_new_snapshots(run)
        lengths = log_lengths(run)
        fill(disk)
        run.note(title, in_open_epoch=False)
        wait_until(lambda: said_since(run, "No space left", lengths), "a snapshot fails", 30, 0.1)
        run.await_flow()
        restore_without_local_files(run, 1)
        make_room(disk)
        await_new_snapshots(run)


def test_failing_snapshot_store_keeps_the_last_good_snapshots_and_the_job_going(
    chaos: Callable[..., AbstractContextManager[Chaos]],
) -> None:
    with chaos("snapshot store fails", settings=SNAPSHOTS_OFTEN) as run:
        await_new_snapshots(run)
        lengths = log_lengths(run)
        for worker in lengths:
            run.cluster.arm(worker, "worker.mid-snapshot", Arm("raise", errno=errno.EIO, every=True))
        for worker in lengths:
            run.cluster.await_mark(worker, "worker.mid-snapshot")
        run.note("I/O errors amid all snapshots", in_open_epoch=False)
        wait_until(lambda: said_since(run, "Input/output error", lengths), "a snapshot fails", 30, 0.1)
        run.await_flow()
        restore_without_local_files(run, 1)
        for worker in lengths:
            run.cluster.disarm(worker, "worker.mid-snapshot")
        await_new_snapshots(run)


def test_worker_with_a_full_state_disk_neither_loses_anything_nor_stops_the_others(
    chaos: Callable[..., AbstractContextManager[Chaos]], topic_prefix: str, tmp_path: Path
) -> None:
    state = tmp_path / "data" / "state" / f"{topic_prefix}job" / "slot-1"
    title = "state disk of one worker full"
    # Often: a snapshot writes what is in memory to the disk first.
    with small_disk(state, size_kb=8_000) as disk, chaos(title, settings=SNAPSHOTS_OFTEN) as run:
        await_new_snapshots(run)
        lengths = log_lengths(run)
        fill(disk)
        run.note(title, in_open_epoch=False)
        wait_until(lambda: said_since(run, "is full", lengths), "a write to the store fails", 60, 0.1)
        # It leaves, and others take its shards.
        child = run.cluster.child("worker-1")
        wait_until(lambda: child.poll() is not None, "worker-1 leaves", 30)
        assert child.poll() == EXIT_MISTAKE
        run.cluster.forget("worker-1")
        run.await_flow()
        for name in ("coordinator", "worker-0", "worker-2"):
            assert run.cluster.child(name).poll() is None, f"{name} ended because of another's disk"
        make_room(disk)
        run.start("worker-1")
        run.await_shards(3)
        run.await_flow()


def test_full_log_disk_costs_log_lines_and_nothing_else(
    chaos: Callable[..., AbstractContextManager[Chaos]], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "data" / "test-logs", size_kb=64) as disk, chaos("log disk full") as run:
        fill(disk)
        run.note("log disk full", in_open_epoch=False)
        # Deaths make for log lines.
        run.kill_at("worker-1", "worker.offsets-sent", Arm("kill"))
        run.start("worker-1")
        run.await_flow()
        run.await_shards(3)
        make_room(disk)
