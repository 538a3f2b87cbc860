"""Warm copies on a failing disk: what wasn't written doesn't count as written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fcluster.common.ids import ShardId
from fcluster.engine.changelog import Delta, encode_delta
from fcluster.engine.state import StoreMeta
from fcluster.storage.restore_plan import Base, RestorePlan
from fcluster.storage.store import StateDirectoryFullError, StoreDirectory
from fcluster.storage.warm_copies import _Copy

SHARD = ShardId("totals", 0)


class FakeStore:
    """A store on a disk that may be full."""

    def __init__(self) -> None:
        self.full = False
        self.data: dict[bytes, bytes] = {}
        self._meta = StoreMeta()

    def meta(self) -> StoreMeta:
        return self._meta

    def apply(self, changes: Mapping[bytes, bytes], meta: StoreMeta) -> None:
        if self.full:
            raise StateDirectoryFullError("full", remedy="")
        self.data.update(changes)
        self._meta = meta


def test_failed_write_is_included_in_the_next_one(tmp_path: Path) -> None:
    store: Any = FakeStore()
    copy = _Copy(SHARD, "changelog", StoreDirectory(tmp_path), exactly_once=True)
    copy.begin(store, RestorePlan(Base.NOTHING, None, StoreMeta(), 0), "id")
    feed(copy, 0, Delta(1, 0, {b"a": b"1"}))
    store.full = True
    with pytest.raises(StateDirectoryFullError):
        copy.write()
    store.full = False
    feed(copy, 1, Delta(2, 1, {b"b": b"2"}))
    copy.write()
    assert store.data == {b"a": b"1", b"b": b"2"}
    assert store.meta().state_epoch == 2


def feed(copy: _Copy, offset: int, delta: Delta) -> None:
    (record,) = encode_delta(delta, 10_000)
    copy.feed(offset, record)
