from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fcluster.common.errors import DirectoryInUse
from fcluster.host.data_directory import (
    LOG_FILES_KEPT,
    ClusterNote,
    DirectoryLock,
    DirectoryUnusable,
    SharedLog,
    create_directory,
    log_path,
    read_note,
    remove_note,
    rotate_log,
    write_note,
)

NOTE = ClusterNote(
    "job", "job.py", "h:9092", "tcp://127.0.0.1:1", os.getpid(), "2026-01-01T00:00:00Z", {"a": 1}
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    create_directory(tmp_path)
    return tmp_path


def test_held_lock_names_its_holder(directory: Path) -> None:
    lock = DirectoryLock(directory)
    lock.acquire()
    with pytest.raises(DirectoryInUse) as raised:
        DirectoryLock(directory).acquire()
    assert f"in use by process {os.getpid()}" in raised.value.message
    assert "--data-dir" in raised.value.remedy
    lock.release()


def test_released_lock_can_be_taken_again(directory: Path) -> None:
    first = DirectoryLock(directory)
    first.acquire()
    assert DirectoryLock(directory).holder() == os.getpid()
    first.release()
    assert DirectoryLock(directory).holder() is None
    second = DirectoryLock(directory)
    second.acquire()
    second.release()


def test_lock_of_a_killed_process_is_free(directory: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from fcluster.host.data_directory import DirectoryLock\n"
        "lock = DirectoryLock(Path(sys.argv[1])); lock.acquire(); print('locked', flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).parents[3])
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(directory)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"locked\n"
        assert DirectoryLock(directory).holder() == holder.pid
        holder.kill()
    assert DirectoryLock(directory).holder() is None


def test_directory_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryUnusable, match="file/data: Not a directory"):
        create_directory(tmp_path / "file" / "data")


def test_note_is_read_while_its_cluster_runs(directory: Path) -> None:
    lock = DirectoryLock(directory)
    lock.acquire()
    write_note(directory, NOTE)
    assert read_note(directory) == NOTE
    remove_note(directory)
    assert read_note(directory) is None
    lock.release()


def test_note_of_an_ended_cluster_is_not_trusted(directory: Path) -> None:
    write_note(directory, NOTE)  # this process runs, but holds no lock
    assert read_note(directory) is None


def test_note_of_a_dead_process_is_not_trusted(directory: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock = DirectoryLock(directory)
    lock.acquire()
    write_note(directory, ClusterNote("job", "t", "b", "c", dead.pid, "s"))
    assert read_note(directory) is None
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"job": "x"})])
def test_damaged_note_counts_as_none(directory: Path, content: str) -> None:
    (directory / "cluster.json").write_text(content)
    assert read_note(directory) is None


def test_logs_are_set_aside_and_the_oldest_are_deleted(directory: Path) -> None:
    for run in range(LOG_FILES_KEPT + 3):
        rotate_log(directory, "worker-0")
        log_path(directory, "worker-0").write_text(str(run))
    kept = sorted((path.name, path.read_text()) for path in (directory / "logs").iterdir())
    newest = LOG_FILES_KEPT + 2
    assert kept == [("worker-0.log", str(newest))] + [
        (f"worker-0.log.{n}", str(newest - n)) for n in range(1, LOG_FILES_KEPT + 1)
    ]


def test_shared_log_keeps_lines_and_drops_those_after_its_end(directory: Path) -> None:
    log = SharedLog(directory, "cluster")
    log.write("one")
    log.close()
    log.write("two")
    assert log_path(directory, "cluster").read_text() == "one\n"
