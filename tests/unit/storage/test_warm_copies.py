"""Warm copies on a failing disk: what wasn't written doesn't count as written."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from pathlib import Path

import pytest

from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings
from fcluster.engine.changelog import Delta, encode_delta
from fcluster.engine.state import StoreMeta
from fcluster.storage.restore_plan import Base, RestorePlan
from fcluster.storage.store import (
    RocksStore,
    StateDirectoryFailedError,
    StateDirectoryFullError,
    StoreDirectory,
)
from fcluster.storage.warm_copies import StandbyTail, _Copy

SHARD = ShardId("in", 0)


def feed(copy: _Copy, epoch: int, changes: Mapping[bytes, bytes]) -> None:
    """Feed the delta of `epoch`, which follows that of the epoch before. Its offset is the epoch's number."""
    (record,) = encode_delta(Delta(epoch, epoch - 1, dict(changes)))
    copy.feed(epoch, record)


def test_copy_whose_write_failed_writes_the_missing_changes_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = StoreDirectory(tmp_path)
    copy = _Copy(SHARD, "changelog", directory, exactly_once=True)
    store = directory.open(SHARD)
    copy.begin(store, RestorePlan(Base.NOTHING, None, StoreMeta(), 10), "")
    feed(copy, 1, {b"aaaa-k": b"1"})

    def full(_store: RocksStore, _changes: object, _meta: object) -> None:
        raise StateDirectoryFullError("full")

    with monkeypatch.context() as disk:
        disk.setattr(RocksStore, "apply", full)
        with pytest.raises(StateDirectoryFullError):
            copy.write()
    feed(copy, 2, {b"aaaa-l": b"2"})
    copy.write()
    assert store.meta().state_epoch == 2
    assert sorted(store.items()) == [(b"aaaa-k", b"1"), (b"aaaa-l", b"2")]
    directory.close_all()


def test_disk_that_cannot_hold_a_copy_is_reported_before_shards_move_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: queue.Queue[Failure] = queue.Queue()
    tail = StandbyTail(Settings(), None, None, failures.put)  # type: ignore[arg-type]  # neither is reached

    def fails(_copy: _Copy) -> None:
        raise StateDirectoryFailedError("the disk fails")

    monkeypatch.setattr(tail, "_set_up", fails)
    directory = StoreDirectory(tmp_path)
    tail.keep(directory, {SHARD: "changelog"})
    assert failures.get(timeout=10).message == "the disk fails"
    tail.close()
    directory.close_all()
