"""A store in memory for tests of the state's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.json import decode

from fcluster.engine.state import StoreMeta, store_prefix


class MemoryStore:
    """Implements `engine.state.Store`, counts how it is used, and can be told to fail.

    Attributes:
        values: the stored entries.
        stands_at: the position of the last write.
        writes: the number of changes and the position of each write.
        reads: how often values were read.
        scans: how often entries were scanned.
        failure: raised by each write, if set.
    """

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.stands_at = StoreMeta()
        self.writes: list[tuple[int, StoreMeta]] = []
        self.reads = 0
        self.scans = 0
        self.failure: Exception | None = None

    def meta(self) -> StoreMeta:
        return self.stands_at

    def get(self, key: bytes) -> bytes | None:
        self.reads += 1
        return self.values.get(key)

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        self.reads += 1
        return [self.values.get(key) for key in keys]

    def scan(self, start: bytes, stop: bytes, limit: int, *, reverse: bool) -> list[tuple[bytes, bytes]]:
        self.scans += 1
        found = sorted((key for key in self.values if start <= key < stop), reverse=reverse)
        return [(key, self.values[key]) for key in found[:limit]]

    def apply(self, changes: Mapping[bytes, bytes], meta: StoreMeta) -> None:
        if self.failure is not None:
            raise self.failure
        for key, value in changes.items():
            if value:
                self.values[key] = value
            else:
                self.values.pop(key, None)
        self.stands_at = meta
        self.writes.append((len(changes), meta))

    def decoded(self, name: str) -> dict[bytes, Any]:
        """The dicts of a table, by key."""
        prefix = store_prefix(name)
        return {key[4:]: decode(value) for key, value in self.values.items() if key[:4] == prefix}
