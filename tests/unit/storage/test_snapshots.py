"""What a snapshot guarantees, with each kind of store that works without a server.

`tests/integration/test_object_snapshot_store.py` runs the same tests with a real S3 server. Tests damage the
files in which a store keeps its content; all stores used here have such files.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import msgspec
import pytest
from obstore.store import LocalStore

from fcluster.common import files as files_module
from fcluster.common.errors import FclusterError, SettingsError, StateDamaged
from fcluster.common.ids import ShardId
from fcluster.engine.state import StoreMeta
from fcluster.storage import object_snapshot_store as object_snapshot_store_module
from fcluster.storage import snapshot_store as snapshot_store_module
from fcluster.storage import snapshots as snapshots_module
from fcluster.storage.object_snapshot_store import ObjectSnapshotStore
from fcluster.storage.snapshot_store import (
    DirectorySnapshotStore,
    SnapshotStoreUnavailable,
    open_snapshot_store,
    store_identity,
)
from fcluster.storage.snapshots import (
    Manifest,
    Unusable,
    latest_valid,
    prune,
    restore_snapshot,
    take_snapshot,
    truncation_offset,
    usable_manifests,
    verify,
)
from fcluster.storage.store import RocksStore, StoreDirectory

SHARD = ShardId("flights", 3)


class LocalObjectStore(ObjectSnapshotStore):
    """Objects as files below `root`: the code of the object store without a server."""

    def __init__(self, root: Path) -> None:
        self.root = root
        super().__init__(LocalStore(root, mkdir=True), f"s3://{root.name}", "job")


AnyStore = DirectorySnapshotStore | LocalObjectStore


@pytest.fixture(params=["directory", "objects"])
def snapshots(request: pytest.FixtureRequest, tmp_path: Path) -> AnyStore:
    root = tmp_path / "snapshots"
    return DirectorySnapshotStore(root, "job") if request.param == "directory" else LocalObjectStore(root)


@pytest.fixture
def store(directory: StoreDirectory) -> RocksStore:
    return directory.open(SHARD)


def write(store: RocksStore, epoch: int, *, changelog_id: str = "") -> None:
    changes = {b"key-%d" % n: b"%d" % epoch for n in range(epoch % 7 + 1)}
    store.apply(changes, StoreMeta(epoch, epoch * 10, changelog_id))


def take(store: RocksStore, snapshots: AnyStore, epoch: int) -> Manifest:
    write(store, epoch)
    return take_snapshot(store, SHARD, snapshots, created_ms=epoch * 1000).manifest


def shard_folder(snapshots: AnyStore) -> Path:
    return snapshots.root / "job" / "flights" / "3"


def file_of(snapshots: AnyStore, manifest: Manifest, suffix: str = ".sst") -> Path:
    hashes = [file.hash for file in manifest.files if file.name.endswith(suffix)]
    return shard_folder(snapshots) / "files" / hashes[-1]  # the newest, which other snapshots don't share


def make_old(path: Path) -> None:
    """Make a file look as if it was written and used long ago."""
    for found in (path, path.parent.parent / "uses" / path.name):
        if found.exists():
            os.utime(found, (1, 1))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_restored_snapshot_has_the_values_and_epoch_of_its_time(
    store: RocksStore, snapshots: AnyStore, directory: StoreDirectory
) -> None:
    manifest = take(store, snapshots, 5)
    items = store.items()
    write(store, 9)
    assert latest_valid(snapshots, SHARD) == manifest
    restored = restore_snapshot(snapshots, SHARD, manifest, directory)
    assert restored is directory.open(SHARD)
    assert (restored.meta(), restored.items()) == (StoreMeta(5, 50), items)
    assert manifest.created_ms == 5000
    assert set(os.listdir(directory.shard_path(SHARD))) == {"db", "unsynced"}
    write(restored, 6)
    assert restored.meta().state_epoch == 6


def test_second_snapshot_uploads_only_files_that_are_new(store: RocksStore, snapshots: AnyStore) -> None:
    store.apply({b"key-%d" % n: os.urandom(1000) for n in range(1000)}, StoreMeta(1, 1))
    first = take_snapshot(store, SHARD, snapshots, 1)
    store.apply({b"key-1": b"x"}, StoreMeta(2, 2))
    second = take_snapshot(store, SHARD, snapshots, 2)
    assert first.uploaded_bytes > 900_000
    assert second.uploaded_bytes < 50_000
    assert second.manifest.size_bytes > 900_000


def test_snapshot_of_unchanged_state_is_the_existing_one(store: RocksStore, snapshots: AnyStore) -> None:
    first = take(store, snapshots, 5)
    second = take_snapshot(store, SHARD, snapshots, created_ms=99_000)
    assert (second.manifest, second.uploaded_files) == (first, 0)
    damage(file_of(snapshots, first))
    third = take_snapshot(store, SHARD, snapshots, created_ms=99_000)
    assert third.manifest.created_ms == 99_000
    assert third.uploaded_files > 0
    assert latest_valid(snapshots, SHARD) == third.manifest


def test_newest_two_are_kept_with_their_files(store: RocksStore, snapshots: AnyStore) -> None:
    manifests = [take(store, snapshots, epoch) for epoch in (1, 2, 3, 4)]
    assert list(usable_manifests(snapshots, SHARD)) == manifests[:1:-1]
    prune(snapshots, SHARD, store.meta(), grace_s=0)
    for manifest in manifests[2:]:
        verify(snapshots, SHARD, manifest)
    kept = {file.hash for manifest in manifests[2:] for file in manifest.files}
    assert set(os.listdir(shard_folder(snapshots) / "files")) == kept
    with pytest.raises(StateDamaged):
        verify(snapshots, SHARD, manifests[0])


def test_young_unreferenced_files_survive_pruning(store: RocksStore, snapshots: AnyStore) -> None:
    take(store, snapshots, 1)
    path = shard_folder(snapshots) / "files" / ("0" * 64)
    path.write_bytes(b"of a snapshot that another process is taking")
    assert prune(snapshots, SHARD, store.meta()) == 0
    make_old(path)
    assert snapshots.file_size(SHARD, "0" * 64) == path.stat().st_size  # used again, so it is young again
    assert prune(snapshots, SHARD, store.meta()) == 0
    make_old(path)
    assert prune(snapshots, SHARD, store.meta()) == 1
    assert not path.exists()
    assert not (shard_folder(snapshots) / "uses" / path.name).exists()


def test_changelog_may_be_truncated_only_below_the_older_of_two_intact_snapshots(
    store: RocksStore, snapshots: AnyStore
) -> None:
    assert truncation_offset(snapshots, SHARD) is None
    older = take(store, snapshots, 1)
    assert truncation_offset(snapshots, SHARD) is None
    take(store, snapshots, 2)
    assert truncation_offset(snapshots, SHARD) == 10
    damage(file_of(snapshots, older))
    assert truncation_offset(snapshots, SHARD) is None


def test_snapshots_of_another_changelog_do_not_count(store: RocksStore, snapshots: AnyStore) -> None:
    """They are left from an earlier run of the job, whose topics were deleted."""
    write(store, 50, changelog_id="old")
    take_snapshot(store, SHARD, snapshots, 1)
    write(store, 60, changelog_id="old")
    take_snapshot(store, SHARD, snapshots, 2)
    assert truncation_offset(snapshots, SHARD, "old") == 500
    assert truncation_offset(snapshots, SHARD, "new") is None
    write(store, 55, changelog_id="new")
    new = take_snapshot(store, SHARD, snapshots, 3).manifest
    assert list(usable_manifests(snapshots, SHARD)) == [new]


def test_late_former_owner_removes_its_own_snapshot_and_not_those_of_its_successor(
    store: RocksStore, snapshots: AnyStore, tmp_path: Path
) -> None:
    """Found by the simulation: a worker that was suspended during an upload removed what the changelog
    needed."""
    directory = StoreDirectory(tmp_path / "other-state")
    successor = directory.open(SHARD)
    late = StoreMeta(6, 60, "changelog")
    write(store, late.state_epoch, changelog_id="changelog")
    for epoch in (10, 12):
        write(successor, epoch, changelog_id="changelog")
        take_snapshot(successor, SHARD, snapshots, epoch)
    assert truncation_offset(snapshots, SHARD, "changelog") == 100
    take_snapshot(store, SHARD, snapshots, 6)
    assert [manifest.state_epoch for manifest in usable_manifests(snapshots, SHARD)] == [12, 10]
    prune(snapshots, SHARD, late)
    assert [manifest.state_epoch for manifest in usable_manifests(snapshots, SHARD)] == [12, 10]
    directory.close_all()


def test_damaged_snapshot_is_skipped_with_the_reason(store: RocksStore, snapshots: AnyStore) -> None:
    older, newer = take(store, snapshots, 1), take(store, snapshots, 2)
    damage(file_of(snapshots, newer))
    unusable: list[Unusable] = []
    assert latest_valid(snapshots, SHARD, None, unusable) == older
    assert [(entry.name[:20], "has the wrong content" in entry.reason) for entry in unusable] == [
        (f"{2:020d}", True)
    ]
    file_of(snapshots, older).unlink()
    assert latest_valid(snapshots, SHARD) is None


def test_snapshot_newer_than_wanted_is_skipped(store: RocksStore, snapshots: AnyStore) -> None:
    older, newer = take(store, snapshots, 1), take(store, snapshots, 2)
    assert latest_valid(snapshots, SHARD, state_epoch_max=2) == newer
    assert latest_valid(snapshots, SHARD, state_epoch_max=1) == older
    assert latest_valid(snapshots, SHARD, state_epoch_max=0) is None


def corrupt_text(path: Path) -> None:
    path.write_text("{")


def wrong_shard(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"partition":3', b'"partition":4'))


def wrong_format(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"format":2', b'"format":1'))


def escaping_name(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"CURRENT"', b'"../../x"'))


def wrong_hash(path: Path) -> None:
    manifest = msgspec.json.decode(path.read_bytes())
    manifest["files"][0]["hash"] = "../" + manifest["files"][0]["hash"][3:]
    path.write_bytes(msgspec.json.encode(manifest))


def same_name_twice(path: Path) -> None:
    manifest = msgspec.json.decode(path.read_bytes())
    manifest["files"].append(manifest["files"][0])
    path.write_bytes(msgspec.json.encode(manifest))


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    "spoil", [corrupt_text, wrong_shard, wrong_format, escaping_name, wrong_hash, same_name_twice]
)
def test_untrustworthy_manifest_is_skipped_and_pruned(
    store: RocksStore, snapshots: AnyStore, spoil: Callable[[Path], None]
) -> None:
    older, _ = take(store, snapshots, 1), take(store, snapshots, 2)
    [name] = [name for name in snapshots.manifest_names(SHARD) if name.startswith(f"{2:020d}")]
    spoil(shard_folder(snapshots) / "manifests" / name)
    unusable: list[Unusable] = []
    assert latest_valid(snapshots, SHARD, None, unusable) == older
    assert [entry.name for entry in unusable] == [name]
    prune(snapshots, SHARD, store.meta())
    assert len(snapshots.manifest_names(SHARD)) == 1


def test_link_in_place_of_a_manifest_is_skipped_and_pruned(store: RocksStore, tmp_path: Path) -> None:
    snapshots = DirectorySnapshotStore(tmp_path / "snapshots", "job")
    test_untrustworthy_manifest_is_skipped_and_pruned(store, snapshots, link)


def test_link_in_place_of_a_file_or_folder_is_refused(store: RocksStore, tmp_path: Path) -> None:
    snapshots = DirectorySnapshotStore(tmp_path / "snapshots", "job")
    manifest = take(store, snapshots, 1)
    path = file_of(snapshots, manifest)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert latest_valid(snapshots, SHARD) is None
    folder = shard_folder(snapshots)
    shutil.move(folder, tmp_path / "folder")
    folder.symlink_to(tmp_path / "folder")
    with pytest.raises(FclusterError, match="is a link"):
        list(usable_manifests(snapshots, SHARD))


def test_restoring_a_damaged_snapshot_does_not_change_the_local_store(
    store: RocksStore, snapshots: AnyStore, directory: StoreDirectory
) -> None:
    manifest = take(store, snapshots, 1)
    write(store, 2)
    damage(file_of(snapshots, manifest))
    with pytest.raises(StateDamaged, match="wrong content"):
        restore_snapshot(snapshots, SHARD, manifest, directory)
    assert directory.open(SHARD) is store
    assert store.meta().state_epoch == 2
    assert os.listdir(directory.shard_path(SHARD)) == ["db"]


def test_manifest_with_another_epoch_than_its_files_is_refused(
    store: RocksStore, snapshots: AnyStore, directory: StoreDirectory
) -> None:
    manifest = msgspec.structs.replace(take(store, snapshots, 1), state_epoch=2)
    with pytest.raises(StateDamaged, match="its manifest says"):
        restore_snapshot(snapshots, SHARD, manifest, directory)


class Crash(BaseException):
    """The process ends here without cleaning up."""


class CrashAfter:
    """Lets `steps` steps that change files happen, then ends the process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
        self.steps_left = steps
        self.crashed = False
        for owner, name in [
            (files_module.os, "fsync"),
            (snapshot_store_module.os, "utime"),
            (snapshot_store_module.os, "unlink"),
            (object_snapshot_store_module.obstore, "put"),
            (object_snapshot_store_module.obstore, "delete"),
            (files_module.os, "rename"),
            (files_module.os, "mkdir"),
            (RocksStore, "checkpoint"),
            (snapshots_module.shutil, "rmtree"),
        ]:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, real: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **options: object) -> object:
            if self.crashed or self.steps_left == 0:
                self.crashed = True
                raise Crash
            self.steps_left -= 1
            return real(*args, **options)

        return step


def crash_everywhere(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> Iterator[int]:
    """Run `action` with a crash after 0, 1, 2, ... steps, until it completes."""
    for steps in range(1000):
        with monkeypatch.context() as patch:
            crash = CrashAfter(patch, steps)
            try:
                action()
            except Crash:
                pass
        yield steps
        if not crash.crashed:
            return
    raise AssertionError("it never completed")


def test_snapshot_interrupted_anywhere_breaks_nothing(
    store: RocksStore, snapshots: AnyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(store, snapshots, 1)
    take(store, snapshots, 2)
    epoch = 3
    write(store, epoch)
    crashes = 0
    for _steps in crash_everywhere(monkeypatch, lambda: take_snapshot(store, SHARD, snapshots, 7)):
        crashes += 1
        found = latest_valid(snapshots, SHARD)
        assert found is not None
        assert found.state_epoch in (epoch - 1, epoch)
        for manifest in usable_manifests(snapshots, SHARD):
            verify(snapshots, SHARD, manifest)
        if found.state_epoch == epoch:  # complete except for the clean-up: take the next one
            prune(snapshots, SHARD, store.meta())
            epoch += 1
            write(store, epoch)
    assert crashes > 10
    last = take(store, snapshots, epoch + 1)
    prune(snapshots, SHARD, store.meta(), grace_s=0)
    names = os.listdir(shard_folder(snapshots) / "files")
    assert all(len(name) == 64 for name in names)
    assert latest_valid(snapshots, SHARD) == last


def test_restore_interrupted_anywhere_leaves_the_old_state_or_none_or_the_new(
    store: RocksStore,
    snapshots: AnyStore,
    directory: StoreDirectory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = take(store, snapshots, 1)
    write(store, 2)
    seen: set[int] = set()
    crashes = 0

    def restore() -> None:
        restore_snapshot(snapshots, SHARD, manifest, directory)

    for _steps in crash_everywhere(monkeypatch, restore):
        crashes += 1
        directory.close(SHARD)
        opened = directory.open(SHARD)
        seen.add(opened.meta().state_epoch)
        assert {"db"} <= set(os.listdir(directory.shard_path(SHARD))) <= {"db", "unsynced"}
        if opened.meta().state_epoch != 2:
            write(opened, 2)
    assert crashes > 10
    assert seen == {0, 1, 2}


def test_identity_depends_on_the_store_and_not_on_job_or_process(tmp_path: Path) -> None:
    one = store_identity(str(tmp_path / "a"), "job")
    assert one == store_identity(f"file://{tmp_path}/a", "other-job")
    assert one != store_identity(str(tmp_path / "b"), "job")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert one == open_snapshot_store(str(tmp_path / "link"), "job").identity()


def test_url_of_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="ftp:// is not supported") as raised:
        open_snapshot_store("ftp://host/x", "job")
    assert "s3://" in raised.value.remedy
    with pytest.raises(SettingsError):
        open_snapshot_store("", "job")


def test_directory_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingsError, match="can't be used"):
        open_snapshot_store(str(tmp_path / "file" / "snapshots"), "job")


# --- what isn't damage, and what needn't be read again ------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT])
def test_manifest_that_temporarily_cannot_be_read_is_not_damaged(
    store: RocksStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    snapshots = DirectorySnapshotStore(tmp_path / "snapshots", "job")
    take(store, snapshots, 1)
    newest = take(store, snapshots, 2)
    names = snapshots.manifest_names(SHARD)
    with monkeypatch.context() as patched:

        def trouble(_directory: int, name: str) -> IO[bytes]:
            raise OSError(number, os.strerror(number), name)

        patched.setattr(snapshot_store_module, "open_plain", trouble)
        unusable: list[Unusable] = []
        for attempt in (
            lambda: latest_valid(snapshots, SHARD, None, unusable),
            lambda: truncation_offset(snapshots, SHARD),
            lambda: prune(snapshots, SHARD, store.meta()),
        ):
            with pytest.raises(SnapshotStoreUnavailable, match=os.strerror(number)):
                attempt()
        assert not unusable
    assert snapshots.manifest_names(SHARD) == names, "pruned because of a temporary failure"
    assert latest_valid(snapshots, SHARD) == newest


def test_listing_that_temporarily_fails_is_not_an_empty_store(
    store: RocksStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = DirectorySnapshotStore(tmp_path / "snapshots", "job")
    newest = take(store, snapshots, 1)

    def trouble(_directory: int) -> list[str]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(snapshot_store_module.os, "listdir", trouble)
        with pytest.raises(SnapshotStoreUnavailable):
            latest_valid(snapshots, SHARD)
    assert latest_valid(snapshots, SHARD) == newest


class CountingObjectStore(LocalObjectStore):
    """Counts how often files are read back."""

    def __init__(self, root: Path) -> None:
        self.read: Counter[str] = Counter()
        super().__init__(root)

    def read_range(self, path: str, start: int, length: int) -> bytes:
        content = super().read_range(path, start, length)
        self.read[path] += len(content)
        return content


def test_each_file_is_read_back_once_however_often_it_is_used(store: RocksStore, tmp_path: Path) -> None:
    snapshots = CountingObjectStore(tmp_path / "snapshots")
    for epoch in range(1, 6):
        manifest = take(store, snapshots, epoch)
        offset = truncation_offset(snapshots, SHARD)
        assert offset == (None if epoch == 1 else 10 * (epoch - 1))
        assert take_snapshot(store, SHARD, snapshots).manifest == manifest, "nothing has changed"
    sizes = {file.hash: file.size_bytes for file in manifest.files}
    read = {path.rpartition("/")[2]: read_bytes for path, read_bytes in snapshots.read.items()}
    assert {name: read.get(name, 0) for name in sizes} == sizes
    assert latest_valid(snapshots, SHARD) == manifest
    assert sum(snapshots.read.values()) == sum(read.values()), "nor later"


def test_changed_file_is_read_again_and_found_damaged(store: RocksStore, tmp_path: Path) -> None:
    snapshots = CountingObjectStore(tmp_path / "snapshots")
    older, newer = take(store, snapshots, 1), take(store, snapshots, 2)
    assert latest_valid(snapshots, SHARD) == newer
    damage(file_of(snapshots, newer))
    assert latest_valid(snapshots, SHARD) == older
    file_of(snapshots, older).unlink()
    assert latest_valid(snapshots, SHARD) is None


def test_another_process_verifies_files_itself(store: RocksStore, tmp_path: Path) -> None:
    manifest = take(store, CountingObjectStore(tmp_path / "snapshots"), 1)
    other = CountingObjectStore(tmp_path / "snapshots")
    assert latest_valid(other, SHARD) == manifest
    assert sum(other.read.values()) == manifest.size_bytes


def test_copying_reports_its_progress_piece_by_piece(
    store: RocksStore, snapshots: AnyStore, directory: StoreDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots_module, "COPY_BYTES", 100)
    manifest = take(store, snapshots, 1)
    pieces: list[int] = []
    restore_snapshot(snapshots, SHARD, manifest, directory, pieces.append)
    assert sum(pieces) == manifest.size_bytes
    assert max(pieces) <= 100
