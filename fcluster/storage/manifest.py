"""The contents of a snapshot, and the position of its state.

Responsible for: the manifest's fields and their meaning. Pure: `snapshots` stores manifests.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated

import msgspec

from fcluster.engine.state import StoreMeta

MANIFEST_FORMAT = 2
FILES_MAX = 100_000

_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""Limits for offsets, epochs, sizes and times. The contents of a store can't be trusted."""

content_hash = sha256
"""The hash that a file is named after. Processors have instructions for it, so a copy with verification takes
hardly longer than one without (docs/decisions/0072-restore-at-the-speed-of-copying.md).
"""


class SnapshotFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a snapshot: its name in the RocksDB directory, its size and the hash of its content."""

    name: str
    size_bytes: _Number
    hash: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of a snapshot, and the position of its state."""

    format: int
    stage: str
    partition: _Number
    state_epoch: _Number
    changelog_offset: _Number
    changelog_id: str
    created_ms: _Number
    files: Annotated[list[SnapshotFile], msgspec.Meta(max_length=FILES_MAX)]

    @property
    def meta(self) -> StoreMeta:
        """The position of its state."""
        return StoreMeta(self.state_epoch, self.changelog_offset, self.changelog_id)

    @property
    def size_bytes(self) -> int:
        """The size of all its files."""
        return sum(file.size_bytes for file in self.files)


def same_changelog(one: str, other: str) -> bool:
    """Whether two changelog ids can belong to the same topic. An unknown id may be any."""
    return not one or not other or one == other
