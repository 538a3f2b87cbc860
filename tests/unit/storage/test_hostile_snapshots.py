"""What an attacker who can write to the snapshot store can't do.

Such an attacker can withhold snapshots, and forge them with matching hashes (docs/security.md). But nothing
is unpickled, no file outside of the store is reached, memory and disk aren't filled beyond what a manifest
says, no process hangs, and good snapshots of others remain usable.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle  # noqa: TID251  to forge what must not be unpickled
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rocksdict import Options, Rdict

from fcluster.common.errors import FclusterError, SettingsError, StateDamaged
from fcluster.common.ids import ShardId
from fcluster.engine.state import StoreMeta
from fcluster.storage import snapshot_store as snapshot_store_module
from fcluster.storage.snapshot_store import DirectorySnapshotStore, SnapshotStoreUnavailable
from fcluster.storage.snapshots import (
    latest_valid,
    prune,
    restore_snapshot,
    take_snapshot,
    usable_manifests,
    verify,
)
from fcluster.storage.store import RocksStore, StateDirectoryFullError, StoreDirectory
from tests.unit.storage.test_snapshots import LocalObjectStore

SHARD = ShardId("flights", 3)
FOLDER = Path("job/flights/3")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


@pytest.fixture
def store(directory: StoreDirectory) -> RocksStore:
    return directory.open(SHARD)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory of another user, with an old file."""
    path = tmp_path / "outside"
    path.mkdir()
    precious = path / "precious"
    precious.write_text("kept")
    os.utime(precious, (0, 0))
    return path


def write(store: RocksStore, epoch: int) -> None:
    store.apply({b"key": b"%d" % epoch}, StoreMeta(epoch, epoch * 10, ""))


def in_time(call: Callable[[], object]) -> object:
    """What `call` returns or raises, if it does so within 10 seconds."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:  # noqa: BLE001
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert outcome, "it hangs"
    return outcome[0]


def change_manifest(root: Path, change: Callable[[dict[str, object]], None]) -> None:
    (path,) = (root / FOLDER / "manifests").glob("*.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- the store's identity ---------------------------------------------------------------------------------


def test_identity_that_is_a_link_is_refused_without_showing_its_target(root: Path, outside: Path) -> None:
    root.mkdir()
    (root / "STORE-ID").symlink_to(outside / "precious")
    with pytest.raises(SettingsError, match="STORE-ID") as raised:
        DirectorySnapshotStore(root, "job")
    assert "kept" not in str(raised.value)


def test_identity_that_is_a_pipe_is_refused_without_waiting(root: Path) -> None:
    root.mkdir()
    os.mkfifo(root / "STORE-ID")
    assert isinstance(in_time(lambda: DirectorySnapshotStore(root, "job")), SettingsError)


@pytest.mark.parametrize("content", [b"x" * 5_000_000, b"not an identity", b"\xff" * 32, b""])
def test_identity_that_fcluster_did_not_write_is_refused(root: Path, content: bytes) -> None:
    root.mkdir()
    (root / "STORE-ID").write_bytes(content)
    with pytest.raises(SettingsError, match="STORE-ID"):
        DirectorySnapshotStore(root, "job")
    with pytest.raises((SettingsError, SnapshotStoreUnavailable), match="STORE-ID"):
        LocalObjectStore(root)


# --- entries of the wrong kind ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["files", "manifests"])
def test_planted_directory_does_not_prevent_taking_and_pruning_snapshots(
    store: RocksStore, snapshots: DirectorySnapshotStore, root: Path, kind: str
) -> None:
    for name in ("evil", "f" * 64, f"{9:020d}-{9:020d}.json"):
        planted = root / FOLDER / kind / name
        planted.mkdir(parents=True)
        (planted / "inside").write_text("x")
        os.utime(planted, (0, 0))
    for epoch in (1, 2, 3):
        write(store, epoch)
        taken = take_snapshot(store, SHARD, snapshots)
        assert latest_valid(snapshots, SHARD) == taken.manifest
    assert len(list(usable_manifests(snapshots, SHARD))) == 2


def test_planted_pipes_and_links_are_neither_opened_nor_followed(
    store: RocksStore, snapshots: DirectorySnapshotStore, root: Path, outside: Path
) -> None:
    manifests = root / FOLDER / "manifests"
    manifests.mkdir(parents=True)
    os.mkfifo(manifests / f"{8:020d}-{8:020d}.json")
    (manifests / f"{9:020d}-{9:020d}.json").symlink_to(outside / "precious")
    write(store, 1)
    taken = in_time(lambda: take_snapshot(store, SHARD, snapshots))
    assert not isinstance(taken, Exception), taken
    assert (outside / "precious").read_text() == "kept"


def test_hard_link_in_place_of_a_file_is_replaced_and_not_written_through(
    store: RocksStore, snapshots: DirectorySnapshotStore, root: Path, outside: Path
) -> None:
    write(store, 1)
    first = take_snapshot(store, SHARD, snapshots).manifest
    for file in first.files:
        planted = root / FOLDER / "files" / file.hash
        planted.unlink()
        os.link(outside / "precious", planted)
    write(store, 2)
    second = take_snapshot(store, SHARD, snapshots).manifest
    verify(snapshots, SHARD, second)
    assert (outside / "precious").read_text() == "kept"


@pytest.mark.parametrize("what", ["job", "job/flights", "job/flights/3", "job/flights/3/files"])
def test_folder_that_becomes_a_link_at_the_last_moment_is_not_followed(
    store: RocksStore,
    snapshots: DirectorySnapshotStore,
    root: Path,
    outside: Path,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the check and the use, wherever that is: whoever waits for a race wins it some day."""
    write(store, 1)
    take_snapshot(store, SHARD, snapshots)
    real_scandir = os.scandir

    def scandir(directory: object) -> object:
        if not (root / "aside").exists():
            (root / what).rename(root / "aside")
            (root / what).symlink_to(outside)
        return real_scandir(directory)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scandir)
    with contextlib.suppress(FclusterError):
        prune(snapshots, SHARD, store.meta(), grace_s=0)
    assert (root / what).is_symlink()
    assert (outside / "precious").exists(), "a file outside of the store was removed"


# --- manifests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../x", "/etc/passwd", "a/b", "a\0b", "x" * 300, "db/../../x", "\u0661", "a\nb"]
)
def test_manifest_that_names_a_path_is_unusable(
    store: RocksStore, snapshots: DirectorySnapshotStore, root: Path, directory: StoreDirectory, name: str
) -> None:
    write(store, 1)
    taken = take_snapshot(store, SHARD, snapshots).manifest

    def change(manifest: dict[str, object]) -> None:
        manifest["files"][0]["name"] = name  # type: ignore[index]

    change_manifest(root, change)
    assert list(usable_manifests(snapshots, SHARD)) == []
    assert taken.files


def test_file_longer_than_its_manifest_says_is_not_read_to_its_end(
    store: RocksStore, snapshots: DirectorySnapshotStore, root: Path, directory: StoreDirectory
) -> None:
    write(store, 1)
    taken = take_snapshot(store, SHARD, snapshots).manifest
    path = root / FOLDER / "files" / taken.files[-1].hash
    os.truncate(path, 2**42)  # a sparse file of four terabytes
    outcome = in_time(lambda: verify(snapshots, SHARD, taken))
    assert isinstance(outcome, StateDamaged)
    directory.destroy(SHARD)
    outcome = in_time(lambda: restore_snapshot(snapshots, SHARD, taken, directory))
    assert isinstance(outcome, StateDamaged)
    held = sum(file.stat().st_size for file in directory.root.rglob("*") if file.is_file())
    assert held < 64 * 1024 * 1024


def test_snapshot_too_large_for_the_disk_is_refused_before_it_fills_it(
    store: RocksStore, snapshots: DirectorySnapshotStore, root: Path, directory: StoreDirectory
) -> None:
    write(store, 1)
    take_snapshot(store, SHARD, snapshots)

    def change(manifest: dict[str, object]) -> None:
        manifest["files"][-1]["size_bytes"] = 2**50  # type: ignore[index]

    change_manifest(root, change)
    (manifest,) = usable_manifests(snapshots, SHARD)
    with pytest.raises(StateDirectoryFullError, match="bytes free"):
        restore_snapshot(snapshots, SHARD, manifest, directory)


@pytest.mark.parametrize(
    "change",
    [
        {"changelog_offset": -1},
        {"changelog_offset": 2**70},
        {"state_epoch": -1},
        {"partition": 2**70},
        {"created_ms": -1},
    ],
)
def test_manifest_with_absurd_numbers_is_unusable(
    store: RocksStore, snapshots: DirectorySnapshotStore, root: Path, change: dict[str, object]
) -> None:
    write(store, 1)
    take_snapshot(store, SHARD, snapshots)
    change_manifest(root, lambda manifest: manifest.update(change))
    assert list(usable_manifests(snapshots, SHARD)) == []


@pytest.mark.parametrize("objects", [False, True])
def test_giant_manifest_is_unusable_and_not_read_whole(
    store: RocksStore, root: Path, objects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = LocalObjectStore(root) if objects else DirectorySnapshotStore(root, "job")
    write(store, 1)
    taken = take_snapshot(store, SHARD, snapshots).manifest
    name = f"{5:020d}-{5:020d}.json"
    path = root / FOLDER / "manifests" / name
    path.touch()
    os.truncate(path, 2**40)
    outcome = in_time(lambda: list(usable_manifests(snapshots, SHARD)))
    assert outcome == [taken]


@pytest.mark.parametrize("objects", [False, True])
def test_odd_names_in_the_store_are_ignored(store: RocksStore, root: Path, objects: bool) -> None:
    snapshots = LocalObjectStore(root) if objects else DirectorySnapshotStore(root, "job")
    manifests = root / FOLDER / "manifests"
    manifests.mkdir(parents=True)
    digits = "\u0661" * 20  # digits, but not the ones that we write
    for name in ("..json", f"{digits}-{digits}.json", "-rf", "a b", "x" * 200, f"{1:020d}-{1:020d}.json~"):
        (manifests / name).write_text("{}")
    write(store, 1)
    taken = take_snapshot(store, SHARD, snapshots).manifest
    assert snapshots.manifest_names(SHARD) == [
        f"{taken.state_epoch:020d}-{taken.created_ms:020d}.json",
    ]
    assert latest_valid(snapshots, SHARD) == taken


# --- content ----------------------------------------------------------------------------------------------


class _Exploit:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("comparator_of_ours", [True, False])
def test_nothing_is_unpickled_from_a_forged_database(
    tmp_path: Path, directory: StoreDirectory, comparator_of_ours: bool
) -> None:
    """rocksdict can keep pickled Python objects, and a file next to the database says so. We only store
    bytes."""
    mark = tmp_path / "unpickled"
    path = directory.shard_path(SHARD) / "db"
    path.parent.mkdir(parents=True)
    if comparator_of_ours:
        options = Options(raw_mode=True)
        forged = Rdict(str(path), options, column_families={"default": options})
        for kind in range(16):
            forged[bytes([kind])] = bytes([kind]) + pickle.dumps(_Exploit(mark))
    else:
        forged = Rdict(str(path))
        forged[b"key"] = _Exploit(mark)
    forged.close()
    (path / "rocksdict-config.json").write_text('{"raw_mode":false,"prefix_extractors":{}}')
    mark.unlink(missing_ok=True)
    try:
        opened = directory.open(SHARD)
        for kind in range(16):
            value = opened.get(bytes([kind]))
            assert value is None or type(value) is bytes
        assert all(type(value) in (bytes, type(None)) for value in opened.get_many([b"\x01", b"key"]))
    except FclusterError:
        pass
    assert not mark.exists()


def test_store_module_accepts_ascii_digits_only() -> None:
    assert snapshot_store_module.MANIFEST_NAME.fullmatch(f"{1:020d}-{1:020d}.json")
    assert not snapshot_store_module.MANIFEST_NAME.fullmatch("\u0661" * 20 + "-" + "1" * 20 + ".json")
