"""Full disks and I/O errors, for snapshots, state and logs: the last good snapshot remains usable.

The errors are made without device mapper. A full disk is a small tmpfs (needs root). Errors of the disk with
the state come from the kernel: with `RLIMIT_FSIZE` at 0, every write to a file fails (EFBIG, "File too
large"), and RocksDB reports that as an I/O error. Errors of the snapshot store are an EIO that is raised at
a failpoint, when all files of a snapshot are written, but not its manifest. Logs are written by the process
that started the worker, which is the test's own process here; in it, the file raises EIO.
"""

from __future__ import annotations

import errno
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import pytest

from fcluster.common.exit_codes import ExitCode
from fcluster.common.failpoints import Arm
from tests.chaos.cluster import ChaosCluster
from tests.chaos.disks import fill, make_room, small_disk
from tests.chaos.runner import Chaos
from tests.chaos.tally import DISK_FULL, IO_ERRORS, STATE_LOST
from tests.harness import COORDINATOR, wait_until

pytestmark = pytest.mark.timeout(300)

SNAPSHOTS_OFTEN = {"snapshot.interval.ms": 500}
ROTTEN = "worker-1"


def newest_manifests(run: Chaos) -> dict[int, str]:
    """The name of the newest snapshot, by partition."""
    root = run.data_dir / "snapshots" / run.job / run.source
    return {
        partition: max(
            (path.name for path in (root / str(partition) / "manifests").glob("[0-9]*.json")), default=""
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


def restore_without_local_files(run: Chaos, worker: str) -> None:
    """`kill -9`, and delete the local state, so that the worker has to restore from snapshot and
    changelog."""
    shown, began_ns = run.open_epoch(), time.time_ns()
    run.cluster.kill(worker)
    slot_dir = run.data_dir / "state" / run.job / worker.replace("worker", "slot")
    for entry in slot_dir.iterdir():  # the directory itself may be a mount point
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    run.note(STATE_LOST, f"kill -9 {worker}, its local state deleted", began_ns, shown=shown)
    run.start(worker)
    run.await_flow()


def await_leaving(run: Chaos, worker: str) -> None:
    """Wait until the worker leaves because of its own disk and others have its shards. No other process
    ends."""
    child = run.cluster.child(worker)
    wait_until(lambda: child.poll() is not None, f"{worker} leaves", 60)
    assert child.poll() == ExitCode.MISTAKE
    run.cluster.forget(worker)
    run.await_flow()
    for name, pid in run.cluster.pids().items():
        assert run.cluster.child(name).poll() is None, (
            f"{name} (pid {pid}) ended because of another worker's disk"
        )


def test_full_disks_leave_the_last_good_snapshots_usable_and_the_job_running(
    chaos: Callable[..., AbstractContextManager[Chaos]], topic_prefix: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    with (
        small_disk(data / "snapshots", size_kb=24_000) as snapshot_disk,
        small_disk(data / "state" / f"{topic_prefix}job" / "slot-1", size_kb=8_000) as state_disk,
        chaos("full disks", settings=SNAPSHOTS_OFTEN) as run,
    ):
        await_new_snapshots(run)
        lengths = log_lengths(run)
        fill(snapshot_disk)
        wait_until(lambda: said_since(run, "No space left", lengths), "a snapshot fails", 30, 0.1)
        run.note(DISK_FULL, "of the snapshot store", shown=run.open_epoch())
        run.await_flow()
        restore_without_local_files(run, "worker-2")
        make_room(snapshot_disk)
        await_new_snapshots(run)

        lengths = log_lengths(run)
        fill(state_disk)
        # A short interval, because each snapshot first writes what is in memory to the disk.
        wait_until(lambda: said_since(run, "is full", lengths), "a write to the store fails", 60, 0.1)
        run.note(DISK_FULL, f"of the state of {ROTTEN}", shown=run.open_epoch())
        await_leaving(run, ROTTEN)
        make_room(state_disk)
        run.start(ROTTEN)
        run.await_shards(3)
        run.await_flow()


class RottenDisksCluster(ChaosCluster):
    """A cluster in which a process can be started with a failing disk."""

    rotten: str = ""

    def prefix_of(self, name: str) -> Sequence[str]:
        return ("prlimit", "--fsize=0", "--") if name == self.rotten else ()


def test_io_errors_leave_the_last_good_snapshots_usable_and_the_job_running(
    chaos: Callable[..., AbstractContextManager[Chaos]],
) -> None:
    with chaos("I/O errors", settings=SNAPSHOTS_OFTEN, cluster_type=RottenDisksCluster) as run:
        cluster = run.cluster
        assert isinstance(cluster, RottenDisksCluster)
        await_new_snapshots(run)
        lengths = log_lengths(run)
        for worker in lengths:
            cluster.arm(worker, "worker.mid-snapshot", Arm("raise", errno=errno.EIO, every=True))
        for worker in lengths:
            cluster.await_mark(worker, "worker.mid-snapshot")
        run.note(IO_ERRORS, "amid all snapshots", shown=run.open_epoch())
        wait_until(lambda: said_since(run, "Input/output error", lengths), "a snapshot fails", 30, 0.1)
        run.await_flow()
        restore_without_local_files(run, "worker-2")
        for worker in lengths:
            cluster.disarm(worker, "worker.mid-snapshot")
        await_new_snapshots(run)

        # The disk with a worker's state fails while the worker runs.
        lengths = log_lengths(run)
        resource.prlimit(cluster.child(ROTTEN).pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        wait_until(lambda: said_since(run, "File too large", lengths), "a write to the store fails", 60, 0.1)
        run.note(IO_ERRORS, f"of the state of {ROTTEN}", shown=run.open_epoch())
        await_leaving(run, ROTTEN)

        # The disk fails from the start, when shards are restored to it.
        cluster.rotten = ROTTEN
        run.start(ROTTEN)
        run.note(IO_ERRORS, f"of the state of {ROTTEN}, from its start", shown=run.open_epoch())
        await_leaving(run, ROTTEN)
        cluster.rotten = ""
        run.start(ROTTEN)
        run.await_shards(3)
        run.await_flow()
        await_new_snapshots(run)


class FailingFile:
    """A file on a failing disk."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def close(self) -> None:
        self._file.close()


def test_logs_that_cannot_be_written_lose_only_log_lines(
    chaos: Callable[..., AbstractContextManager[Chaos]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "data" / "test-logs", size_kb=64) as disk, chaos("logs fail") as run:
        for name in (COORDINATOR, "worker-0"):
            log = run.cluster.child(name)._log
            assert log is not None
            monkeypatch.setattr(log, "_file", FailingFile(log._file))
        run.note(IO_ERRORS, "of the logs of coordinator and worker-0", shown=run.open_epoch())
        fill(disk)
        run.note(DISK_FULL, "of all logs", shown=run.open_epoch())
        # Deaths cause log lines.
        run.kill_at("worker-1", "worker.offsets-sent", Arm("kill"))
        run.start("worker-1")
        run.await_flow()
        run.await_shards(3)
        make_room(disk)
