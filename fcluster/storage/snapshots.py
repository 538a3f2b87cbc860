"""Full copies of a shard's RocksDB in the snapshot store.

Responsible for: taking, verifying, listing, restoring and pruning snapshots. Rules: a snapshot exists only
when it is complete (first the files, each named after its content's hash; then the manifest, in one step); no
file in the store is trusted unless its hash matches; the newest two snapshots are kept. So an interrupted
snapshot leaves only some unreferenced files, which a later `prune` removes.

Must not decide when to take a snapshot, and must not truncate the changelog: `truncation_offset` only says
what is safe.

Threads: any thread may call it. Hashing and copying release the interpreter lock.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from fcluster.common import failpoints
from fcluster.common.clocks import wall_ms
from fcluster.common.errors import FclusterError, StateDamaged
from fcluster.common.files import COPY_BYTES, NotPlainFileError, checked_name
from fcluster.common.ids import ShardId
from fcluster.engine.state import StoreMeta
from fcluster.storage.manifest import (
    MANIFEST_FORMAT,
    Manifest,
    SnapshotFile,
    content_hash,
    same_changelog,
)
from fcluster.storage.snapshot_store import SnapshotStore, checked_hash, open_snapshot_store
from fcluster.storage.store import RocksStore, StateDirectoryFullError, StoreDirectory, explain_trouble

__all__ = [
    "Manifest",
    "SnapshotTaken",
    "Unusable",
    "latest_valid",
    "open_snapshot_store",
    "prune",
    "restore_snapshot",
    "same_changelog",
    "take_snapshot",
    "truncation_offset",
    "usable_manifests",
    "verify",
]

SNAPSHOTS_KEPT = 2
UNREFERENCED_GRACE_S = 3600.0
_decode_manifest = msgspec.json.Decoder(Manifest).decode
"""Younger files are never pruned: they may belong to a snapshot whose manifest hasn't been written yet."""


@dataclass(frozen=True, slots=True)
class SnapshotTaken:
    """`manifest` is in the store and verified. The other fields say how much had to be uploaded."""

    manifest: Manifest
    uploaded_files: int
    uploaded_bytes: int


@dataclass(frozen=True, slots=True)
class Unusable:
    """A snapshot that can't be used, and why."""

    name: str
    reason: str


class DamagedSnapshotError(Exception):
    """A file in the snapshot store is missing, or doesn't match its name or manifest."""


def take_snapshot(
    store: RocksStore, shard: ShardId, snapshots: SnapshotStore, created_ms: int | None = None
) -> SnapshotTaken:
    """Copy the state of `store` to the snapshot store, verify it there, and prune.

    Args:
        store: the store to copy. It stays open and in use. Everything applied to it so far is in the
            snapshot.
        created_ms: the wall-clock time for the manifest. Default: now.

    Raises:
        FclusterError: the store or the snapshot store can't be read or written.
    """
    folder = store.path.parent / f"checkpoint-{uuid.uuid4().hex}"
    try:
        meta = store.checkpoint(folder)
        existing = _usable_at(snapshots, shard, meta)
        if existing is not None:
            return SnapshotTaken(existing, 0, 0)
        now_ms = wall_ms()
        return _upload(folder, meta, shard, snapshots, now_ms if created_ms is None else created_ms)
    except OSError as error:
        raise _store_failed(shard, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _upload(
    folder: Path, meta: StoreMeta, shard: ShardId, snapshots: SnapshotStore, created_ms: int
) -> SnapshotTaken:
    files: list[SnapshotFile] = []
    uploaded: list[SnapshotFile] = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as content:
            size_bytes, digest = _measure(content)
        file = SnapshotFile(path.name, size_bytes, digest)
        if snapshots.file_size(shard, file.hash) != size_bytes:
            snapshots.put_file(shard, file.hash, path)
            uploaded.append(file)
        files.append(file)
    manifest = Manifest(MANIFEST_FORMAT, shard.stage, shard.partition, *meta, created_ms, files)
    # Existing files may have been damaged since they were written. The local copy can replace them.
    damaged = [file for file in files if _problem_with(snapshots, shard, file) is not None]
    for file in damaged:
        snapshots.put_file(shard, file.hash, folder / file.name)
        uploaded.append(file)
    if damaged:
        verify(snapshots, shard, manifest)
    failpoints.reach("worker.mid-snapshot", shard)
    snapshots.put_manifest(shard, _name_of(manifest), msgspec.json.encode(manifest))
    prune(snapshots, shard, meta)
    return SnapshotTaken(manifest, len(uploaded), sum(file.size_bytes for file in uploaded))


def verify(snapshots: SnapshotStore, shard: ShardId, manifest: Manifest) -> None:
    """Read every file of a snapshot back and compare it with its hash.

    Raises:
        StateDamaged: something is missing or different.
    """
    problems = [
        problem for file in manifest.files if (problem := _problem_with(snapshots, shard, file)) is not None
    ]
    if problems:
        raise StateDamaged(
            f"the snapshot of {shard} at epoch {manifest.state_epoch} is damaged: {'; '.join(problems)}",
            remedy="Check the disk or share of the snapshot store. The next snapshot replaces this one.",
        )


def usable_manifests(
    snapshots: SnapshotStore, shard: ShardId, unusable: list[Unusable] | None = None
) -> Iterator[Manifest]:
    """The readable manifests, newest state epoch first. Files aren't checked.

    Args:
        unusable: receives the unreadable ones, with the reason.
    """
    for name in snapshots.manifest_names(shard):
        try:
            yield _read_manifest(snapshots, shard, name)
        except DamagedSnapshotError as error:
            if unusable is not None:
                unusable.append(Unusable(name, str(error)))


def latest_valid(
    snapshots: SnapshotStore,
    shard: ShardId,
    state_epoch_max: int | None = None,
    unusable: list[Unusable] | None = None,
) -> Manifest | None:
    """The newest snapshot whose files are all present and intact. None if there is none.

    Args:
        state_epoch_max: newer snapshots are skipped.
        unusable: receives the damaged ones that were skipped, with the reason.
    """
    for manifest in usable_manifests(snapshots, shard, unusable):
        if state_epoch_max is not None and manifest.state_epoch > state_epoch_max:
            continue
        try:
            verify(snapshots, shard, manifest)
        except StateDamaged as error:
            if unusable is not None:
                unusable.append(Unusable(_name_of(manifest), error.message))
        else:
            return manifest
    return None


def truncation_offset(snapshots: SnapshotStore, shard: ShardId, changelog_id: str = "") -> int | None:
    """The offset below which the shard's changelog may be deleted. None if nothing may be deleted.

    That is the position of the older one of the newest two snapshots, after both were verified.

    Args:
        changelog_id: the topic's id. Snapshots of another changelog don't count.
    """
    newest: list[Manifest] = []
    for manifest in usable_manifests(snapshots, shard):
        if not same_changelog(manifest.changelog_id, changelog_id):
            continue
        try:
            verify(snapshots, shard, manifest)
        except StateDamaged:
            continue
        newest.append(manifest)
        if len(newest) == SNAPSHOTS_KEPT:
            return min(manifest.changelog_offset for manifest in newest)
    return None


def prune(
    snapshots: SnapshotStore, shard: ShardId, meta: StoreMeta, grace_s: float = UNREFERENCED_GRACE_S
) -> int:
    """Keep the newest two snapshots and their files. Returns how many files were deleted.

    Args:
        meta: the position of the caller's copy of the shard. Snapshots of another changelog are left over
            from an earlier run of the job, and are deleted first. Snapshots of a later epoch are kept: the
            caller may have lost the shard while it was uploading, and its successor truncates the changelog
            according to its own snapshots.
        grace_s: unreferenced files are kept for this long.
    """
    kept: list[Manifest] = []
    for name in snapshots.manifest_names(shard):
        try:
            manifest = _read_manifest(snapshots, shard, name)
        except DamagedSnapshotError:
            snapshots.delete_manifest(shard, name)
            continue
        foreign = not same_changelog(manifest.changelog_id, meta.changelog_id)
        if foreign or len(kept) == SNAPSHOTS_KEPT:
            snapshots.delete_manifest(shard, name)
        else:
            kept.append(manifest)
    referenced = {file.hash for manifest in kept for file in manifest.files}
    return snapshots.delete_unreferenced(shard, referenced, grace_s)


def restore_snapshot(
    snapshots: SnapshotStore,
    shard: ShardId,
    manifest: Manifest,
    directory: StoreDirectory,
    copied: Callable[[int], None] = lambda _copied_bytes: None,
) -> RocksStore:
    """Replace the store of `shard` with a snapshot, and open it.

    The copy is verified before the old store is removed, and becomes the store in one step.

    Args:
        copied: called with the size of each copied piece, in bytes.

    Raises:
        StateDamaged: the snapshot is damaged, or doesn't open at its epoch.
        StateDirectoryFullError, StateDirectoryFailedError: it can't be written here.
    """
    path = directory.shard_path(shard)
    folder = path / f"restoring-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True)
        _check_room(manifest, shard, folder)
        for file in manifest.files:
            _download(snapshots, shard, file, folder / file.name, copied)
        directory.destroy(shard, keep=folder)
        directory.adopt(shard, folder)
    except (DamagedSnapshotError, NotPlainFileError) as error:
        raise StateDamaged(
            f"the snapshot of {shard} at epoch {manifest.state_epoch} is damaged: {error}",
            remedy="Check the disk or share of the snapshot store.",
        ) from error
    except OSError as error:
        raise explain_trouble(error, path) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    store = directory.open(shard)
    if store.meta() != manifest.meta:
        raise StateDamaged(
            f"the snapshot of {shard} is at {store.meta()}, but its manifest says {manifest.meta}"
        )
    return store


# --- details ----------------------------------------------------------------------------------------------


def _usable_at(snapshots: SnapshotStore, shard: ShardId, meta: StoreMeta) -> Manifest | None:
    """An intact snapshot of exactly this state, if there is one: nothing has changed since it was taken."""
    for manifest in usable_manifests(snapshots, shard):
        if manifest.meta == meta:
            try:
                verify(snapshots, shard, manifest)
            except StateDamaged:
                continue
            return manifest
    return None


def _name_of(manifest: Manifest) -> str:
    return f"{manifest.state_epoch:020d}-{manifest.created_ms:020d}.json"


def _read_manifest(snapshots: SnapshotStore, shard: ShardId, name: str) -> Manifest:
    try:
        manifest = _decode_manifest(snapshots.read_manifest(shard, name))
    except (NotPlainFileError, OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedSnapshotError(f"the manifest can't be read: {error}") from error
    if manifest.format != MANIFEST_FORMAT:
        raise DamagedSnapshotError(
            f"the manifest has format {manifest.format}, but this version reads {MANIFEST_FORMAT}"
        )
    if (manifest.stage, manifest.partition) != shard or _name_of(manifest) != name:
        raise DamagedSnapshotError("the manifest belongs to another shard or snapshot")
    try:
        for file in manifest.files:
            checked_name(file.name)
            checked_hash(file.hash)
    except ValueError as error:
        raise DamagedSnapshotError(str(error)) from error
    if len({file.name for file in manifest.files}) != len(manifest.files):
        raise DamagedSnapshotError("the manifest lists a file twice")
    return manifest


def _problem_with(snapshots: SnapshotStore, shard: ShardId, file: SnapshotFile) -> str | None:
    if snapshots.is_verified(shard, file.hash, file.size_bytes):
        return None
    try:
        with snapshots.open_file(shard, file.hash) as content:
            found = _measure(content, file.size_bytes)
    except (NotPlainFileError, OSError) as error:
        return f"{file.name}: {error}"
    if found != (file.size_bytes, file.hash):
        return f"{file.name} has the wrong content"
    snapshots.note_verified(shard, file.hash)
    return None


def _check_room(manifest: Manifest, shard: ShardId, folder: Path) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if manifest.size_bytes > free_bytes:
        raise StateDirectoryFullError(
            f"the snapshot of {shard} at epoch {manifest.state_epoch} takes {manifest.size_bytes} bytes, "
            f"but {folder.parent} has only {free_bytes} bytes free",
            remedy="Free some space on the disk of the state directory, or choose another one (--data-dir).",
        )


def _download(
    snapshots: SnapshotStore,
    shard: ShardId,
    file: SnapshotFile,
    target: Path,
    copied: Callable[[int], None],
) -> None:
    digest, size_bytes = content_hash(), 0
    try:
        opened = snapshots.open_file(shard, file.hash)
    except OSError as error:
        raise DamagedSnapshotError(f"{file.name} can't be opened: {error}") from error
    with opened as source, target.open("xb") as copy:
        while size_bytes <= file.size_bytes and (chunk := _read(source, file)):
            digest.update(chunk)
            size_bytes += len(chunk)
            copy.write(chunk)
            copied(len(chunk))
    if (size_bytes, digest.hexdigest()) != (file.size_bytes, file.hash):
        raise DamagedSnapshotError(f"{file.name} has the wrong content")


def _read(source: IO[bytes], file: SnapshotFile) -> bytes:
    """The next bytes. This distinguishes read errors of the snapshot store from write errors."""
    try:
        return source.read(COPY_BYTES)
    except OSError as error:
        raise DamagedSnapshotError(f"{file.name} can't be read: {error}") from error


def _measure(content: IO[bytes], size_bytes_max: int | None = None) -> tuple[int, str]:
    """Size and hash. If the file is longer than `size_bytes_max`: some larger size and a meaningless hash."""
    digest, size_bytes = content_hash(), 0
    while (size_bytes_max is None or size_bytes <= size_bytes_max) and (chunk := content.read(COPY_BYTES)):
        digest.update(chunk)
        size_bytes += len(chunk)
    return size_bytes, digest.hexdigest()


def _store_failed(shard: ShardId, error: OSError) -> FclusterError:
    return FclusterError(
        f"can't copy a snapshot of {shard}: {error}",
        remedy="Check the disk or share of the snapshot store and of the state directory.",
    )
