"""Transactions that Kafka has torn: what a restore finds, and how a shard continues."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fcluster.common.errors import StateDamaged, TornTransaction
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition, InputOffset
from fcluster.common.settings import Settings, TornPolicy
from fcluster.engine.changelog import UNKNOWN_SOURCE_OFFSET, Delta, encode_delta
from fcluster.engine.state import StoreMeta
from fcluster.storage.restore import (
    ShardRestored,
    _Shard,  # pyright: ignore[reportPrivateUsage]
)
from fcluster.storage.restore_plan import Base, RestorePlan, RestoreRequest
from fcluster.storage.store import StoreDirectory
from fcluster.storage.torn import UNKNOWN_EPOCH, Tear, TornShard, go_on

SHARD = ShardId("flights", 3)
COMMITTED = CommittedPosition(offset=700, epoch=8, state_epoch=7, fingerprint="f")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[StoreDirectory]:
    opened = StoreDirectory(tmp_path / "state")
    yield opened
    opened.close_all()


class Restore:
    """A shard with a base at an epoch, and a changelog with one record for each delta.

    After each delta comes the marker of its transaction, so the n-th delta has the offset 2n.
    """

    def __init__(
        self,
        directory: StoreDirectory,
        *,
        at: int,
        at_offset: int,
        end: int,
        begin: int = 0,
        policy: TornPolicy = "stop",
    ) -> None:
        meta = StoreMeta(at, at_offset, "id")
        store = directory.open(SHARD)
        store.apply({}, meta)
        plan = RestorePlan(Base.LOCAL, None, meta, at_offset)
        request = RestoreRequest(SHARD, "log", COMMITTED, "id")
        self.store = store
        self.shard = _Shard(request, plan, store, Settings(torn_transaction=policy), begin, end)

    def feed(
        self, number: int, epoch: int, previous: int, source_offset: int = UNKNOWN_SOURCE_OFFSET
    ) -> None:
        [record] = encode_delta(Delta(epoch, previous, {b"k": b"%d" % epoch}, source_offset))
        self.shard.feed(2 * number, record)

    def finish(self) -> ShardRestored:
        return self.shard.finish(self.shard.end())


def test_changelog_is_read_from_the_last_record_of_the_base_to_its_end(directory: StoreDirectory) -> None:
    restore = Restore(directory, at=7, at_offset=5, end=9)
    assert (restore.shard.offset, restore.shard.read_to) == (4, 9)


def test_changelog_truncated_after_the_base_is_not_searched_for_its_last_record(
    directory: StoreDirectory,
) -> None:
    restore = Restore(directory, at=7, at_offset=5, end=6, begin=5)
    assert restore.shard.read_to <= restore.shard.offset, "there is room for a marker only"
    assert restore.finish().go_on is None
    longer = Restore(directory, at=7, at_offset=5, end=7, begin=5)
    assert (longer.shard.offset, longer.shard.read_to) == (5, 7)


def test_base_whose_last_delta_is_the_last_visible_one_is_whole(directory: StoreDirectory) -> None:
    restore = Restore(directory, at=7, at_offset=5, end=8)
    restore.feed(2, 7, 5)
    restored = restore.finish()
    assert (restored.go_on, restored.changed) == (None, False)


def test_delta_beyond_the_committed_epoch_is_distinguished_from_a_whole_state(
    directory: StoreDirectory,
) -> None:
    restore = Restore(directory, at=7, at_offset=5, end=8)
    restore.feed(2, 7, 5)
    restore.feed(3, 9, 7, 800)
    with pytest.raises(TornTransaction) as error:
        restore.finish()
    said = str(error.value)
    assert "flights/3" in said
    assert "committed the delta of epoch 9 in the changelog log/3" in said
    assert "the committed offset is still 700" in said
    assert (
        "at offset 700 with the state of epoch 7: nothing is lost, but outputs of epoch 9 may come twice"
        in said
    )
    assert "at offset 800 with the state of epoch 9" in said
    assert restore.store.meta().state_epoch == 7, "nothing was applied"


def test_continuing_from_the_offsets_ignores_the_delta_and_starts_a_new_changelog(
    directory: StoreDirectory,
) -> None:
    restore = Restore(directory, at=5, at_offset=3, end=9, policy="offsets")
    restore.feed(1, 5, 0)
    restore.feed(2, 7, 5)
    restore.feed(3, 9, 7, 800)
    restored = restore.finish()
    assert restored.go_on is not None
    assert restored.go_on.rebase
    assert restored.go_on.position == COMMITTED
    assert restored.store.meta() == StoreMeta(7, 9, "id")
    assert restored.store.get(b"k") == b"7"


def test_continuing_from_the_delta_uses_its_state_and_its_offset(directory: StoreDirectory) -> None:
    restore = Restore(directory, at=7, at_offset=5, end=9, policy="delta")
    restore.feed(2, 7, 5, 700)
    restore.feed(3, 9, 7, 800)
    restored = restore.finish()
    assert restored.go_on is not None
    assert not restored.go_on.rebase
    assert restored.go_on.position == CommittedPosition(800, 9, 9, "f")
    assert restored.store.meta() == StoreMeta(9, 7, "id")
    assert restored.store.get(b"k") == b"9"


def test_delta_of_the_old_format_has_no_offset_to_continue_from(directory: StoreDirectory) -> None:
    restore = Restore(directory, at=7, at_offset=5, end=9, policy="delta")
    restore.feed(3, 9, 7)
    with pytest.raises(TornTransaction, match="not possible, because the changelog doesn't say which offset"):
        restore.finish()


def test_committed_epoch_without_its_delta_is_reported(directory: StoreDirectory) -> None:
    restore = Restore(directory, at=5, at_offset=3, end=9)
    restore.feed(1, 5, 0, 500)
    with pytest.raises(TornTransaction) as error:
        restore.finish()
    assert "committed the offset 700 with state of epoch 7, but not the delta of that epoch" in str(
        error.value
    )
    assert "log/3 ends with epoch 5" in str(error.value)


def test_committed_epoch_without_its_delta_can_continue_from_the_last_delta(
    directory: StoreDirectory,
) -> None:
    restore = Restore(directory, at=5, at_offset=3, end=9, policy="delta")
    restore.feed(1, 5, 0, 500)  # only the base's own last record
    restored = restore.finish()
    assert restored.go_on is not None
    assert restored.go_on.position == CommittedPosition(500, 8, 5, "f")
    assert restored.store.meta().state_epoch == 5


def test_committed_epoch_without_its_delta_can_continue_at_the_offset_with_older_state(
    directory: StoreDirectory,
) -> None:
    restore = Restore(directory, at=5, at_offset=3, end=9, policy="offsets")
    restore.feed(1, 5, 0, 500)
    restored = restore.finish()
    assert restored.go_on is not None
    assert (restored.go_on.position, restored.go_on.rebase) == (COMMITTED, True)
    assert restored.store.meta() == StoreMeta(7, 9, "id"), "the changelog goes on behind it"


def test_state_at_the_committed_epoch_whose_delta_was_aborted_is_torn_and_kept(
    directory: StoreDirectory,
) -> None:
    restore = Restore(directory, at=7, at_offset=5, end=8)
    torn = restore.shard.end()
    assert torn is not None
    assert (torn.tear, torn.has_state) == (Tear.OFFSET_WITHOUT_DELTA, True)
    with pytest.raises(TornTransaction, match="which is still available here"):
        restore.shard.finish(torn)
    again = Restore(directory, at=7, at_offset=5, end=8, policy="offsets")
    restored = again.finish()
    assert restored.go_on is not None
    assert restored.go_on.rebase
    assert restored.store.meta() == StoreMeta(7, 8, "id")


def test_base_of_another_changelog_is_damage_and_not_a_torn_transaction(
    directory: StoreDirectory,
) -> None:
    restore = Restore(directory, at=7, at_offset=5, end=8)
    with pytest.raises(StateDamaged, match="it has part 0 of epoch 6 there") as error:
        restore.feed(2, 6, 5)
    assert not isinstance(error.value, TornTransaction)


def test_shard_does_not_continue_without_the_users_choice() -> None:
    torn = TornShard(SHARD, "log", Tear.DELTA_WITHOUT_OFFSET, COMMITTED, 9, 800)
    with pytest.raises(TornTransaction):
        go_on(torn, "stop")
    assert "at offset 700" in go_on(torn, "offsets").text
    assert "at offset 800" in go_on(torn, "delta").text
    unknown = replace(torn, tear=Tear.OFFSET_WITHOUT_DELTA, delta_epoch=UNKNOWN_EPOCH, has_state=True)
    assert "lacks it" in str(unknown.error())


def test_position_of_a_delta_can_be_committed() -> None:
    torn = TornShard(SHARD, "log", Tear.DELTA_WITHOUT_OFFSET, COMMITTED, 9, 800)
    position = torn.delta_position
    assert position is not None
    assert position.encode_metadata() == "1:9:9:f"


def test_delta_of_several_inputs_says_where_each_continues() -> None:
    committed = replace(COMMITTED, further=(InputOffset(50, "id-b"), InputOffset(60, "id-c")))
    torn = TornShard(
        SHARD,
        "log",
        Tear.DELTA_WITHOUT_OFFSET,
        committed,
        9,
        800,
        further_topics=("b", "c"),
        delta_further_offsets={"c": 65, "b": 55},
    )
    position = torn.delta_position
    assert position is not None
    assert position.inputs == (InputOffset(800), InputOffset(55, "id-b"), InputOffset(65, "id-c"))
    assert (position.epoch, position.state_epoch) == (9, 9)
    assert "at offset 800+55+65" in go_on(torn, "delta").text
    assert "is still 700+50+60" in torn.describe()
    # It isn't known for a stage that had fewer inputs when the delta was written.
    before = replace(torn, delta_further_offsets={"b": 55})
    assert before.delta_position is None
    assert "not possible" in before.choices()
