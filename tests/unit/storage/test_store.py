from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rocksdict import Options, Rdict, WriteBatch, WriteOptions

from fcluster.common.errors import DirectoryInUse, FclusterError, IncompatibleState, StateDamaged
from fcluster.common.files import checked_name, sync
from fcluster.common.ids import ShardId
from fcluster.engine.state import FlushLimits, ShardState, StoreMeta
from fcluster.storage import store as store_module
from fcluster.storage.restore import local_meta
from fcluster.storage.store import (
    LOCAL_TROUBLE,
    META_KEY,
    StateDirectoryFailedError,
    StateDirectoryFullError,
    StoreDirectory,
)
from tests.harness import wait_until
from tests.state_memory import EntriesMax

SHARD = ShardId("flights", 3)


def test_values_and_meta_survive_closing(directory: StoreDirectory) -> None:
    store = directory.open(SHARD)
    assert store.meta() == StoreMeta()
    store.apply({b"key-a": b"1", b"key-b": b"2"}, StoreMeta(3, 7, "id"))
    store.apply({b"key-a": b"", b"key-c": b"3"}, StoreMeta(4, 9, "id"))
    assert directory.open(SHARD) is store
    directory.close(SHARD)
    store = directory.open(SHARD)
    assert store.meta() == StoreMeta(4, 9, "id")
    assert store.get(b"key-a") is None
    assert store.get_many([b"key-c", b"key-a", b"key-b"]) == [b"3", None, b"2"]
    assert store.get_many([]) == []
    assert store.items() == [(b"key-b", b"2"), (b"key-c", b"3")]


def test_scan_returns_a_range_forwards_and_backwards(directory: StoreDirectory) -> None:
    store = directory.open(SHARD)
    keys = [b"aaaa", b"aaab", b"aaab\0", b"aaab\xff", b"aaac", b"bbbb"]
    store.apply({key: key for key in reversed(keys)}, StoreMeta(1, 1))
    store.apply({b"aaab\xff": b""}, StoreMeta(2, 2))
    store.apply({b"aaab": b"new"}, StoreMeta(3, 3))
    inside = [(b"aaab", b"new"), (b"aaab\0", b"aaab\0")]
    assert store.scan(b"aaab", b"aaac", 10, reverse=False) == inside
    assert store.scan(b"aaab", b"aaac", 10, reverse=True) == inside[::-1]
    assert store.scan(b"aaab", b"aaac", 1, reverse=False) == inside[:1]
    assert store.scan(b"aaab", b"aaac", 1, reverse=True) == inside[1:]
    assert store.scan(b"c", b"d", 10, reverse=True) == []
    assert [key for key, _ in store.scan(b"\0\0", b"\xff", 10, reverse=False)] == [*keys[:3], *keys[4:]]


def test_store_of_a_killed_process_is_at_one_epoch_with_its_values(tmp_path: Path) -> None:
    """The write-ahead log is off, so what wasn't flushed is lost, values together with their epoch."""
    script = f"""
import os, sys
from pathlib import Path
from fcluster.common.ids import ShardId
from fcluster.engine.state import StoreMeta
from fcluster.storage.store import StoreDirectory
store = StoreDirectory(Path({str(tmp_path / "state")!r})).open(ShardId("flights", 3))
for epoch in range(1, 6):
    store.apply({{b"key%d" % n: b"%d" % epoch for n in range(100)}}, StoreMeta(epoch, epoch))
    if epoch == 3:
        store.checkpoint(Path({str(tmp_path / "checkpoint")!r}))
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == -9
    directory = StoreDirectory(tmp_path / "state")
    store = directory.open(SHARD)
    epoch = store.meta().state_epoch
    assert epoch >= 3
    assert {value for _, value in store.items()} == {b"%d" % epoch}
    directory.close_all()


@pytest.mark.parametrize("batches", [1, 3, 6, 7])
def test_store_of_a_process_killed_within_a_large_write_is_whole_or_damaged(
    tmp_path: Path, batches: int
) -> None:
    script = f"""
import os
from pathlib import Path
from fcluster.common.ids import ShardId
from fcluster.engine.state import StoreMeta
from fcluster.storage import store as store_module
store = store_module.StoreDirectory(Path({str(tmp_path / "state")!r})).open(ShardId("flights", 3))
store.apply({{b"key%02d" % n: b"1" for n in range(60)}}, StoreMeta(1, 1))
store_module._BATCH_ENTRIES_MAX = 10
class Dying:
    writes = 0
    def write(self, batch, options):
        db.write(batch, options)
        db.flush()
        self.writes += 1
        if self.writes == {batches}:
            os.kill(os.getpid(), 9)
db, store._db = store._db, Dying()
store.apply({{b"key%02d" % n: b"2" if n % 2 else b"" for n in range(60)}}, StoreMeta(2, 2))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == -9
    directory = StoreDirectory(tmp_path / "state")
    if batches < 7:
        with pytest.raises(StateDamaged, match="a crash has cut short the last write"):
            directory.open(SHARD)
        assert local_meta(directory, SHARD) is None
        directory.destroy(SHARD)
        assert directory.open(SHARD).meta() == StoreMeta()
    else:
        store = directory.open(SHARD)
        assert store.meta() == StoreMeta(2, 2)
        assert [store.get(b"key%02d" % n) for n in range(60)] == [None, b"2"] * 30
        assert len(store.items()) == 30
    directory.close_all()


class CountingWrites:
    """A database that notes how many entries each write has."""

    def __init__(self, db: Rdict) -> None:
        self._db = db
        self.sizes: list[int] = []

    def write(self, batch: WriteBatch, options: WriteOptions) -> None:
        self.sizes.append(len(batch))
        self._db.write(batch, options)

    def close(self) -> None:
        self._db.close()


def test_large_write_is_split_by_entries_and_bytes(
    directory: StoreDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_BATCH_ENTRIES_MAX", 10)
    monkeypatch.setattr(store_module, "_BATCH_BYTES_MAX", 100)
    store = directory.open(SHARD)
    counting = CountingWrites(store._db)
    monkeypatch.setattr(store, "_db", counting)
    store.apply({b"key%02d" % n: b"v" for n in range(9)}, StoreMeta(1, 1))
    assert counting.sizes == [10], "with the position"
    counting.sizes.clear()
    store.apply({b"key%02d" % n: b"v" for n in range(25)}, StoreMeta(2, 2))
    assert counting.sizes == [11, 10, 7], "the first one with the mark, the last one without it"
    counting.sizes.clear()
    store.apply({b"key%02d" % n: b"v" * 60 for n in range(5)}, StoreMeta(3, 3))
    assert counting.sizes == [3, 2, 3]


def test_checkpoint_has_the_values_of_its_epoch_and_not_later_ones(
    directory: StoreDirectory, tmp_path: Path
) -> None:
    store = directory.open(SHARD)
    store.apply({b"key-a": b"1"}, StoreMeta(3, 7))
    path = directory.shard_path(SHARD) / "checkpoint"
    assert store.checkpoint(path) == StoreMeta(3, 7)
    store.apply({b"key-a": b"2"}, StoreMeta(4, 8))
    shutil.move(path, tmp_path / "other/flights/3/db")
    other = StoreDirectory(tmp_path / "other")
    copy = other.open(SHARD)
    assert (copy.meta(), copy.get(b"key-a")) == (StoreMeta(3, 7), b"1")
    other.close_all()


def test_reopened_store_keeps_the_shared_limits(directory: StoreDirectory) -> None:
    for _ in range(2):
        store = directory.open(SHARD)
        store.apply({b"key-a": b"1"}, StoreMeta(1, 1))
        directory.close(SHARD)
    newest = max((directory.shard_path(SHARD) / "db").glob("OPTIONS-*"))
    options = newest.read_text()
    assert "filter_policy=bloomfilter" in options
    assert "write_buffer_size=16777216" in options


def test_directory_of_another_process_is_refused(directory: StoreDirectory) -> None:
    script = f"""
from pathlib import Path
from fcluster.common.errors import DirectoryInUse
from fcluster.storage.store import StoreDirectory
try:
    StoreDirectory(Path({str(directory.root)!r}))
except DirectoryInUse as error:
    print(error.message, "|", error.remedy)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], timeout=60, check=True, capture_output=True, text=True
    )
    assert str(directory.root) in done.stdout
    assert "state.dir" in done.stdout


def test_directory_is_free_after_it_is_closed(directory: StoreDirectory) -> None:
    directory.open(SHARD)
    directory.close_all()
    StoreDirectory(directory.root).close_all()


def test_rocksdb_locked_by_another_process_is_a_directory_in_use(directory: StoreDirectory) -> None:
    path = directory.shard_path(SHARD) / "db"
    other = Rdict(str(path), Options(raw_mode=True))
    with pytest.raises(DirectoryInUse):
        directory.open(SHARD)
    other.close()


def test_looking_for_local_files_creates_none(directory: StoreDirectory) -> None:
    assert not directory.has_files(SHARD)
    assert local_meta(directory, SHARD) == StoreMeta()
    assert not directory.shard_path(SHARD).exists()
    assert directory.opened(SHARD) is None
    directory.open(SHARD).apply({b"abcd-k": b"1"}, StoreMeta(3, 7, "id"))
    assert local_meta(directory, SHARD) == StoreMeta(3, 7, "id")
    directory.close(SHARD)
    assert directory.has_files(SHARD)
    assert local_meta(directory, SHARD) == StoreMeta(3, 7, "id")


def adopted(root: Path) -> StoreDirectory:
    """A state directory whose shard uses files that were just adopted. They contain one key."""
    directory = StoreDirectory(root)
    source = directory.open(ShardId("from", 0))
    source.apply({b"abcd-k": b"1"}, StoreMeta(3, 7, "id"))
    files = directory.shard_path(SHARD) / "files"
    files.parent.mkdir(parents=True)
    source.checkpoint(files)
    directory.adopt(SHARD, files)
    return directory


def test_adopted_files_are_synced_and_then_trusted_after_any_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SYNC_DELAY_S", 0.0)
    synced: list[str] = []

    def noted_sync(path: Path | str) -> None:
        synced.append(Path(path).name)
        sync(path)

    monkeypatch.setattr(store_module, "sync", noted_sync)
    directory = adopted(tmp_path)
    note = directory.shard_path(SHARD) / "unsynced"
    wait_until(lambda: not note.exists(), "the files are synced")
    assert {"CURRENT"} < set(synced)
    directory.close_all()
    monkeypatch.setattr(store_module, "boot_id", lambda: "another boot")
    again = StoreDirectory(tmp_path)
    assert again.open(SHARD).get(b"abcd-k") == b"1"
    again.close_all()


@pytest.mark.parametrize("note", [None, b""])
def test_adopted_files_that_were_not_synced_are_not_used_after_another_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: bytes | None
) -> None:
    directory = adopted(tmp_path)
    assert directory.open(SHARD).get(b"abcd-k") == b"1"
    directory.close_all()
    same_boot = StoreDirectory(tmp_path)
    assert same_boot.open(SHARD).get(b"abcd-k") == b"1", "the process ended, but the host didn't"
    path = same_boot.shard_path(SHARD)
    same_boot.close_all()
    assert (path / "unsynced").exists()
    if note is None:
        monkeypatch.setattr(store_module, "boot_id", lambda: "another boot")
    else:
        (path / "unsynced").write_bytes(note)  # the file's content was lost as well
    other_boot = StoreDirectory(tmp_path)
    store = other_boot.open(SHARD)
    assert store.meta() == StoreMeta()
    assert store.items() == []
    assert not (path / "unsynced").exists(), "RocksDB itself syncs what is written from now on"
    other_boot.close_all()


def test_adopted_files_are_synced_at_once_if_the_boot_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "boot_id", lambda: "")
    directory = adopted(tmp_path)
    assert not (directory.shard_path(SHARD) / "unsynced").exists()
    directory.close_all()


def test_destroyed_store_is_empty_when_opened_again(directory: StoreDirectory) -> None:
    directory.open(SHARD).apply({b"key-a": b"1"}, StoreMeta(1, 1))
    directory.destroy(SHARD)
    assert directory.opened(SHARD) is None
    store = directory.open(SHARD)
    assert (store.meta(), store.items()) == (StoreMeta(), [])
    directory.destroy(ShardId("never", 1))


def test_damaged_files_are_reported_as_damage(directory: StoreDirectory) -> None:
    directory.open(SHARD).apply({b"key-a": b"1"}, StoreMeta(1, 1))
    directory.close(SHARD)
    path = directory.shard_path(SHARD) / "db"
    for file in path.glob("*.sst"):
        file.unlink()
    with pytest.raises(StateDamaged, match="RocksDB can't continue"):
        directory.open(SHARD)
    directory.destroy(SHARD)
    assert directory.open(SHARD).meta() == StoreMeta()


def test_leftovers_of_an_interrupted_snapshot_are_removed_when_opened(directory: StoreDirectory) -> None:
    path = directory.shard_path(SHARD)
    (path / "checkpoint-x").mkdir(parents=True)
    (path / "checkpoint-x" / "file").write_text("x")
    (path / "stray").write_text("x")
    directory.open(SHARD)
    assert sorted(os.listdir(path)) == ["db"]


def test_leftovers_of_shards_that_moved_are_removed_at_the_next_start(tmp_path: Path) -> None:
    left = tmp_path / "in" / "3" / "checkpoint-x"
    left.mkdir(parents=True)
    (left / "000007.sst").write_text("x")
    (tmp_path / "in" / "3" / "db").mkdir()
    StoreDirectory(tmp_path).close_all()
    assert os.listdir(tmp_path / "in" / "3") == ["db"]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (b"not json", StateDamaged),
        (b'{"format":9,"state_epoch":1,"changelog_offset":1,"changelog_id":""}', IncompatibleState),
    ],
)
def test_meta_that_cannot_be_read_is_refused(
    directory: StoreDirectory, value: bytes, error: type[FclusterError]
) -> None:
    other = Rdict(str(directory.shard_path(SHARD) / "db"), Options(raw_mode=True))
    other[META_KEY] = value
    other.close()
    with pytest.raises(error):
        directory.open(SHARD)


def test_full_disk_is_named(directory: StoreDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    store = directory.open(SHARD)

    class FullDisk:
        def write(self, *_: object) -> None:
            raise Exception("IO error: No space left on device: While appending to file: /x/000009.sst")

    monkeypatch.setattr(store, "_db", FullDisk())
    with pytest.raises(StateDirectoryFullError, match="full") as raised:
        store.apply({}, StoreMeta(1, 1))
    assert raised.value.remedy
    assert store.meta() == StoreMeta()
    monkeypatch.undo()


@pytest.mark.parametrize("words", ["Input/output error", "Read-only file system", "File too large"])
def test_failing_disk_is_distinguished_from_damaged_files(
    directory: StoreDirectory, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    store = directory.open(SHARD)

    class FailingDisk:
        def write(self, *_: object) -> None:
            raise Exception(f"IO error: {words}: While appending to file: /x/000009.sst")

    monkeypatch.setattr(store, "_db", FailingDisk())
    with pytest.raises(StateDirectoryFailedError, match=words) as raised:
        store.apply({b"aaaa-k": b"1"}, StoreMeta(1, 1))
    assert isinstance(raised.value, LOCAL_TROUBLE)
    assert store.meta() == StoreMeta()
    monkeypatch.undo()


def test_disk_that_cannot_hold_a_store_is_not_reported_as_damage(
    directory: StoreDirectory,
) -> None:
    directory.open(SHARD)
    directory.close(SHARD)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # each write to a file fails with EFBIG
    try:
        with pytest.raises(StateDamaged):
            directory.open(SHARD)  # perhaps the files are damaged
        directory.destroy(SHARD)
        with pytest.raises(StateDirectoryFailedError):
            directory.open(SHARD)  # it is the disk
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    directory.destroy(SHARD)
    assert directory.open(SHARD).meta() == StoreMeta()


def test_stage_names_that_are_not_file_names_are_refused(directory: StoreDirectory) -> None:
    for name in ("", ".", "..", "a/b", "a\x00b", "x" * 256):
        with pytest.raises(ValueError, match="can't be the name"):
            directory.shard_path(ShardId(name, 0))
    with pytest.raises(ValueError, match="can't be the name"):
        checked_name("a b")


def test_layers_over_rocksdb_read_back_what_they_wrote(directory: StoreDirectory) -> None:
    store = directory.open(SHARD)
    state = ShardState(store, ["s"], EntriesMax(0), FlushLimits(entries_max=1))
    for n in range(100):
        state.tables["s"].get(b"%d" % n)["n"] = n
    state.freeze(1)
    state.commit(1, 5, 0)
    assert state.tables["s"].load_many([b"%d" % n for n in range(101)]) == 101
    assert [state.tables["s"].get(b"%d" % n).get("n") for n in range(101)] == [*range(100), None]
    assert store.meta() == StoreMeta(1, 5)


def test_compactions_leave_the_processors_to_the_job(directory: StoreDirectory, tmp_path: Path) -> None:
    """Otherwise one keeps commits from running for 0.1 s (decision 0182)."""
    store = directory.open(SHARD)
    for number in range(1, 6):  # a checkpoint makes a file, and four files are compacted
        store.apply({b"key-a": b"%d" % number}, StoreMeta(number, number))
        store.checkpoint(tmp_path / f"checkpoint-{number}")

    def priorities() -> set[int]:
        threads = [one for one in Path("/proc/self/task").iterdir() if (one / "comm").exists()]
        low = [one for one in threads if (one / "comm").read_text().strip() == "rocksdb:low"]
        return {os.getpriority(os.PRIO_PROCESS, int(one.name)) for one in low}

    wait_until(lambda: priorities() == {19}, "a compaction of low priority")
