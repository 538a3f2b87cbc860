"""Models of what stores bytes: a worker's local stores, and the snapshot store.

A local store is RocksDB without a write-ahead log: after a crash it is at the state of its last flush, some
epochs behind, or it is lost, for example if the crash has cut short a large write. The snapshot store keeps
files under their content's hash. The real functions of `storage.snapshots` prune it, and say what can be
truncated safely.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import IO

import msgspec

from fcluster.common.errors import FclusterError, StateDamaged
from fcluster.common.files import NotPlainFileError
from fcluster.common.ids import ShardId
from fcluster.engine.state import StoreMeta
from fcluster.storage.manifest import content_hash
from fcluster.storage.snapshots import MANIFEST_FORMAT, Manifest, SnapshotFile

VERSIONS_KEPT = 4
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(dict[bytes, bytes])

Applied = Callable[[ShardId, Mapping[bytes, bytes], StoreMeta], None]


class SimStore:
    """One shard's local store. Implements `engine.state.Store`.

    Args:
        on_apply: called with the store's contents after each write.
    """

    def __init__(self, disk: Disk, shard: ShardId) -> None:
        self.disk = disk
        self.shard = shard
        self.closed = False
        self.data: dict[bytes, bytes] = {}
        self._meta = StoreMeta()
        self.versions: list[tuple[dict[bytes, bytes], StoreMeta]] = [(self.data, self._meta)]

    def meta(self) -> StoreMeta:
        return self._meta

    def get(self, key: bytes) -> bytes | None:
        self._check_open()
        return self.data.get(key)

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        self._check_open()
        return [self.data.get(key) for key in keys]

    def scan(self, start: bytes, stop: bytes, limit: int, *, reverse: bool) -> list[tuple[bytes, bytes]]:
        self._check_open()
        found = sorted((key for key in self.data if start <= key < stop), reverse=reverse)
        return [(key, self.data[key]) for key in found[:limit]]

    def apply(self, changes: Mapping[bytes, bytes], meta: StoreMeta) -> None:
        self._check_open()
        if self.disk.full:
            raise FclusterError("the disk is full")
        data = self.data | changes
        self.replace({key: value for key, value in data.items() if value}, meta)
        self.disk.on_apply(self.shard, self.data, meta)

    def replace(self, data: dict[bytes, bytes], meta: StoreMeta) -> None:
        """Replace the store's content by this."""
        self.data, self._meta = data, meta
        self.versions.append((data, meta))
        del self.versions[:-VERSIONS_KEPT]

    def flushed(self) -> None:
        """The store was closed cleanly: its contents are on the disk."""
        self.versions = [(self.data, self._meta)]

    def fall_back(self, random: Random) -> None:
        """A crash: the part of RocksDB in memory is lost."""
        at = random.randrange(len(self.versions))
        self.data, self._meta = self.versions[at]
        if at + 1 < len(self.versions):
            self._cut_short(*self.versions[at + 1])
        self.versions = [(self.data, self._meta)]

    def _cut_short(self, data: Mapping[bytes, bytes], meta: StoreMeta) -> None:
        """Perhaps some batches of the next write have come to the disk, but not the last one, with its
        `meta`. Then the store has a mark and counts as damaged, as if it weren't there.
        """
        written = [key for key in self.data | data if self.data.get(key) != data.get(key)]
        # Drawn on its own, so that all else that happens in a seed stays the same.
        count = Random(f"{self.shard} {meta}").randrange(2 * len(written) + 1)
        if 0 < count < len(written):
            self._damage({key: data.get(key, b"") for key in written[:count]}, meta)

    def _damage(self, _changes: Mapping[bytes, bytes], _meta: StoreMeta) -> None:
        self.data, self._meta = {}, StoreMeta()

    def _check_open(self) -> None:
        if self.closed:
            raise StateDamaged(f"the store of {self.shard} is closed")


class Disk:
    """The part of a host's state directory that belongs to one slot. Only one process at a time may use
    it.
    """

    def __init__(self, on_apply: Applied) -> None:
        self.on_apply = on_apply
        self.owner: object = None
        self.full = False
        self.stores: dict[ShardId, SimStore] = {}

    def open(self, shard: ShardId) -> SimStore:
        """The shard's store. It is created if missing."""
        store = self.stores.get(shard)
        if store is None:
            store = self.stores[shard] = SimStore(self, shard)
        elif store.closed:
            # A different object each time: a thread of an earlier life may still have the former one.
            reopened = self.stores[shard] = SimStore(self, shard)
            reopened.data, reopened._meta, reopened.versions = store.data, store._meta, store.versions
            store = reopened
        return store

    def close(self, shard: ShardId) -> None:
        """Close the shard's store cleanly."""
        store = self.stores.get(shard)
        if store is not None and not store.closed:
            store.flushed()
            store.closed = True

    def destroy(self, shard: ShardId) -> None:
        """Remove the shard's store."""
        store = self.stores.pop(shard, None)
        if store is not None:
            store.closed = True

    def crash(self, random: Random) -> None:
        """Its process has died without closing anything."""
        for store in self.stores.values():
            if not store.closed:
                store.fall_back(random)
                store.closed = True
        self.owner = None

    def lose(self) -> None:
        """The disk was replaced by an empty one."""
        assert self.owner is None
        self.stores.clear()


def _hash(content: bytes) -> str:
    return content_hash(content).hexdigest()


class SimSnapshotStore:
    """Implements `storage.snapshot_store.SnapshotStore` in memory, except for `put_file`, which takes
    bytes.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[ShardId, str], bytes] = {}
        self.manifests: dict[ShardId, dict[str, bytes]] = {}
        self.rotten: set[ShardId] = set()
        """The shards with a damaged snapshot."""

    def identity(self) -> str:
        return "snapshots"

    def file_size(self, shard: ShardId, file_hash: str) -> int | None:
        content = self.files.get((shard, file_hash))
        return None if content is None else len(content)

    def put_file(self, shard: ShardId, file_hash: str, source: Path) -> None:
        raise NotImplementedError

    def open_file(self, shard: ShardId, file_hash: str) -> IO[bytes]:
        content = self.files.get((shard, file_hash))
        if content is None:
            raise NotPlainFileError(f"{file_hash} is missing")
        return io.BytesIO(content)

    def note_verified(self, shard: ShardId, file_hash: str) -> None:
        pass

    def is_verified(self, shard: ShardId, file_hash: str, size_bytes: int) -> bool:
        return False

    def put_manifest(self, shard: ShardId, name: str, content: bytes) -> None:
        self.manifests.setdefault(shard, {})[name] = content

    def manifest_names(self, shard: ShardId) -> list[str]:
        return sorted(self.manifests.get(shard, ()), reverse=True)

    def read_manifest(self, shard: ShardId, name: str) -> bytes:
        content = self.manifests.get(shard, {}).get(name)
        if content is None:
            raise NotPlainFileError(f"{name} is missing")
        return content

    def delete_manifest(self, shard: ShardId, name: str) -> None:
        self.manifests.get(shard, {}).pop(name, None)

    def delete_unreferenced(self, shard: ShardId, referenced: set[str], older_than_s: float) -> int:
        return 0

    # --- for the model of a worker --------------------------------------------------------------------

    def upload(self, shard: ShardId, data: dict[bytes, bytes], meta: StoreMeta, *, damaged: bool) -> Manifest:
        """Store a snapshot's content, without its manifest. `damaged`: it is changed on the way."""
        content = _encoder.encode(data)
        file = SnapshotFile("state", len(content), _hash(content))
        self.files[shard, file.hash] = content[:-1] + b"?" if damaged else content
        return Manifest(MANIFEST_FORMAT, shard.stage, shard.partition, *meta, 0, [file])

    def is_intact(self, shard: ShardId, manifest: Manifest) -> bool:
        """Whether the snapshot's content is what it should be."""
        return all(_hash(self.files.get((shard, file.hash), b"")) == file.hash for file in manifest.files)

    def publish(self, shard: ShardId, manifest: Manifest) -> None:
        """Store the manifest, so that the snapshot exists."""
        name = f"{manifest.state_epoch:020d}-{manifest.created_ms:020d}.json"
        self.put_manifest(shard, name, msgspec.json.encode(manifest))

    def content(self, shard: ShardId, manifest: Manifest) -> dict[bytes, bytes]:
        """The contents of the snapshot.

        Raises:
            StateDamaged: the snapshot isn't intact.
        """
        if not self.is_intact(shard, manifest):
            raise StateDamaged(f"the snapshot of {shard} at epoch {manifest.state_epoch} is damaged")
        return _decoder.decode(self.files[shard, manifest.files[0].hash])

    def rot(self, random: Random, shard: ShardId) -> bool:
        """Damage one of the shard's snapshots. Returns False if it has none."""
        names = self.manifest_names(shard)
        if not names:
            return False
        self.rotten.add(shard)
        manifest = msgspec.json.decode(self.manifests[shard][random.choice(names)], type=Manifest)
        self.files[shard, manifest.files[0].hash] = b"rotten"
        return True
