"""Damages snapshots without fcluster's knowledge."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from fcluster.storage.manifest import Manifest, content_hash

PARTITIONS = 8


class Snapshots:
    """The files of one stage's snapshots in a directory, by partition."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def manifests(self, partition: int) -> list[Path]:
        """The manifests, newest first."""
        return sorted((self._root / str(partition) / "manifests").glob("[0-9]*.json"), reverse=True)

    def file(self, partition: int, file_hash: str) -> Path:
        """The path of the file with that hash."""
        return self._root / str(partition) / "files" / file_hash

    def own_file(self, partition: int) -> Path:
        """A file that only the newest snapshot has."""
        newest, older = (
            {file.hash for file in read_manifest(path).files} for path in self.manifests(partition)[:2]
        )
        return self.file(partition, min(newest - older))

    def two_each(self) -> bool:
        """Whether every shard has two snapshots of different state."""
        return all(len(self.manifests(partition)) == 2 for partition in range(PARTITIONS))

    def is_whole(self, partition: int, manifest: Path) -> bool:
        """Whether that snapshot can be read, and all its files are unchanged."""
        try:
            return all(
                content_hash(self.file(partition, file.hash).read_bytes()).hexdigest() == file.hash
                for file in read_manifest(manifest).files
            )
        except (OSError, msgspec.DecodeError):
            return False

    def all_whole(self) -> bool:
        """Whether every shard has two snapshots, and all of them are whole."""
        return self.two_each() and all(
            self.is_whole(partition, manifest)
            for partition in range(PARTITIONS)
            for manifest in self.manifests(partition)
        )


def read_manifest(path: Path) -> Manifest:
    """Raises msgspec.DecodeError, OSError."""
    return msgspec.json.decode(path.read_bytes(), type=Manifest)


def flip_a_bit(snapshots: Snapshots, partition: int) -> None:
    """Flip a bit in a file that only the newest snapshot has."""
    path = snapshots.own_file(partition)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(snapshots: Snapshots, partition: int) -> None:
    """Truncate a file that only the newest snapshot has."""
    path = snapshots.own_file(partition)
    os.truncate(path, path.stat().st_size // 2)


def lose_a_file(snapshots: Snapshots, partition: int) -> None:
    """Delete a file that only the newest snapshot has."""
    snapshots.own_file(partition).unlink()


def take_anothers_manifest(snapshots: Snapshots, partition: int) -> None:
    """Replace the newest manifest by that of another shard."""
    other = snapshots.manifests((partition + 1) % PARTITIONS)[0]
    shutil.copyfile(other, snapshots.manifests(partition)[0])


def promise_a_later_epoch(snapshots: Snapshots, partition: int) -> None:
    """Make the manifest plausible, but let its files not contain what it says."""
    newest, older = snapshots.manifests(partition)[:2]
    content = msgspec.to_builtins(read_manifest(newest))
    content["files"] = msgspec.to_builtins(read_manifest(older))["files"]
    newest.write_bytes(msgspec.json.encode(content))


def cut_the_manifest(snapshots: Snapshots, partition: int) -> None:
    """Cut off the end of the newest manifest."""
    os.truncate(snapshots.manifests(partition)[0], 40)


DAMAGES: tuple[Callable[[Snapshots, int], None], ...] = (
    flip_a_bit,
    truncate,
    lose_a_file,
    take_anothers_manifest,
    promise_a_later_epoch,
    cut_the_manifest,
)


def damage_newest(snapshots: Snapshots, partition: int, how: str) -> str:
    """Damage the newest snapshot of a shard that still takes snapshots, if the older one is whole.

    Returns:
        Why it wasn't done. Empty if it was.
    """
    manifests = snapshots.manifests(partition)[:2]
    if len(manifests) < 2 or not all(snapshots.is_whole(partition, path) for path in manifests):
        return "there are no two whole snapshots"
    try:
        {damage.__name__: damage for damage in DAMAGES}[how](snapshots, partition)
    except (OSError, ValueError, msgspec.DecodeError) as error:
        return f"the snapshots have changed meanwhile: {error}"
    return ""
