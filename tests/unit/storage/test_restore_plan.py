from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fcluster.common.errors import StateDamaged
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.engine.state import StoreMeta
from fcluster.storage.manifest import Manifest
from fcluster.storage.restore_plan import (
    Base,
    RestorePlan,
    RestoreRequest,
    plan_restore,
    plan_standby,
    stands_exactly,
)

SHARD = ShardId("flights", 3)
EMPTY = StoreMeta()


def request(state_epoch: int | None, changelog_id: str = "id") -> RestoreRequest:
    """A request for a shard whose state last changed in `state_epoch`. None: nothing is committed for it."""
    committed = None if state_epoch is None else CommittedPosition(100, state_epoch + 5, state_epoch, "f")
    return RestoreRequest(SHARD, "job-flights-changelog", committed, changelog_id)


def at(epoch: int, offset: int, changelog_id: str = "id") -> StoreMeta:
    return StoreMeta(epoch, offset, changelog_id)


def snapshot(epoch: int, offset: int, changelog_id: str = "id") -> Manifest:
    return Manifest(1, "flights", 3, epoch, offset, changelog_id, 0, [])


def test_new_shard_starts_empty_and_reads_the_changelog() -> None:
    """It may have the records of an aborted first epoch. Only reading it shows that no state is lost."""
    plan = plan_restore(request(None), EMPTY, [], 0, 7)
    assert (plan.base, plan.meta, plan.read_to, plan.offsets_to_read) == (Base.NOTHING, at(0, 0), 7, 7)
    assert plan_restore(request(None), EMPTY, [], 0, 0).offsets_to_read == 0


def test_local_files_at_the_committed_epoch_need_nothing_else() -> None:
    assert stands_exactly(request(9), at(9, 40))
    assert stands_exactly(request(0), EMPTY)
    assert not stands_exactly(request(9), at(8, 40))
    assert not stands_exactly(request(9), at(10, 40))
    assert not stands_exactly(request(9), at(9, 40, "other"))
    assert not stands_exactly(request(None), EMPTY)
    plan = plan_restore(request(9), at(9, 40), [snapshot(9, 40)], 50, 60)
    assert (plan.base, plan.offsets_to_read) == (Base.LOCAL, 0)
    plan = plan_restore(request(9), None, [snapshot(9, 40)], 50, 60)
    assert (plan.base, plan.offsets_to_read) == (Base.SNAPSHOT, 0)


def test_local_files_that_are_behind_continue_with_the_changelog() -> None:
    plan = plan_restore(request(9), at(5, 20), [snapshot(3, 10)], 15, 40)
    assert plan == RestorePlan(Base.LOCAL, None, at(5, 20), 40)
    assert plan.offsets_to_read == 20


def test_local_files_are_preferred_to_a_newer_snapshot_if_the_changelog_reaches_back_to_them() -> None:
    assert plan_restore(request(9), at(5, 20), [snapshot(8, 35)], 20, 40).base is Base.LOCAL


def test_snapshot_is_used_if_local_files_are_older_than_the_changelog() -> None:
    plan = plan_restore(request(9), at(5, 20), [snapshot(8, 35), snapshot(7, 30)], 30, 40)
    assert (plan.base, plan.snapshot, plan.meta) == (Base.SNAPSHOT, snapshot(8, 35), at(8, 35))
    assert plan.reasons == (
        "the local state at epoch 5 needs the changelog from offset 20, which begins at 30",
    )


def test_local_files_ahead_of_the_committed_epoch_are_dropped() -> None:
    """Invariant 3 rules this out. If it happens anyway, Kafka is right."""
    plan = plan_restore(request(9), at(12, 40), [], 0, 40)
    assert plan.base is Base.NOTHING
    assert plan.reasons == ("the local state at epoch 12 is ahead of the committed epoch 9",)
    plan = plan_restore(request(9), at(12, 40), [snapshot(13, 41), snapshot(8, 30)], 0, 40)
    assert plan.snapshot == snapshot(8, 30)
    assert plan_restore(request(0), at(12, 40), [], 0, 0).base is Base.NOTHING


def test_snapshot_or_whole_changelog_is_used_if_local_files_are_unreadable() -> None:
    assert plan_restore(request(9), None, [snapshot(8, 35)], 10, 40).base is Base.SNAPSHOT
    plan = plan_restore(request(9), None, [], 0, 40)
    assert (plan.base, plan.reasons) == (Base.NOTHING, ("the local files can't be read",))


def test_empty_local_files_count_as_nothing() -> None:
    plan = plan_restore(request(9), EMPTY, [snapshot(8, 35)], 0, 40)
    assert plan.base is Base.SNAPSHOT
    assert plan_restore(request(9), EMPTY, [], 0, 40).base is Base.NOTHING


def test_missing_committed_offset_with_a_truncated_changelog_is_an_error_that_names_it() -> None:
    with pytest.raises(
        StateDamaged, match=r"no committed offset for flights/3.*job-flights-changelog"
    ) as error:
        plan_restore(request(None), at(5, 20), [snapshot(5, 20)], 10, 40)
    assert error.value.remedy


def test_committed_epoch_that_cannot_be_reached_is_an_error_with_all_reasons() -> None:
    with pytest.raises(StateDamaged, match="flights/3 at epoch 9 can't be restored") as error:
        plan_restore(request(9), at(5, 20), [snapshot(4, 15), snapshot(3, 50)], 30, 40)
    for reason in ("local state at epoch 5", "snapshot at epoch 4", "ends at 40", "begins only at offset 30"):
        assert reason in error.value.message
    assert error.value.remedy


def test_files_and_snapshots_of_a_deleted_changelog_are_ignored() -> None:
    plan = plan_restore(request(9), at(9, 20, "old"), [snapshot(8, 10, "old"), snapshot(7, 5)], 0, 40)
    assert plan.snapshot == snapshot(7, 5)
    assert len(plan.reasons) == 2
    assert plan_restore(request(9, ""), at(9, 20, "old"), [], 0, 40).base is Base.LOCAL


def test_at_least_once_state_may_be_ahead_of_the_committed_epoch() -> None:
    """Deltas are written before offsets, so a crash in between leaves state that Kafka didn't commit."""
    plan = plan_restore(request(9), at(12, 30), [], 0, 40, exactly_once=False)
    assert (plan.base, plan.offsets_to_read) == (Base.LOCAL, 10)
    plan = plan_restore(request(None), EMPTY, [], 0, 40, exactly_once=False)
    assert (plan.base, plan.offsets_to_read) == (Base.NOTHING, 40)
    plan = plan_restore(request(None), EMPTY, [snapshot(3, 20)], 10, 40, exactly_once=False)
    assert plan.base is Base.SNAPSHOT
    with pytest.raises(StateDamaged):
        plan_restore(request(None), EMPTY, [], 10, 40, exactly_once=False)


metas = st.builds(at, st.integers(0, 12), st.integers(0, 12), st.sampled_from(["id", "old", ""]))


@example(target=None, local=None, manifests=[at(0, 1)], offsets=[0, 0], exactly_once=True)
@given(
    target=st.none() | st.integers(0, 12),
    local=st.none() | metas,
    manifests=st.lists(metas, max_size=3),
    offsets=st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted),
    exactly_once=st.booleans(),
)
def test_chosen_base_can_always_lead_to_the_committed_epoch(
    target: int | None,
    local: StoreMeta | None,
    manifests: list[StoreMeta],
    offsets: list[int],
    exactly_once: bool,
) -> None:
    begin, end = offsets
    wanted = request(target)
    snapshots = [snapshot(*meta) for meta in manifests]
    try:
        plan = plan_restore(wanted, local, snapshots, begin, end, exactly_once=exactly_once)
    except StateDamaged:
        assert begin > 0, "with a complete changelog, a restore is always possible"
        return
    assert plan.meta.changelog_id in ("id", "")
    if exactly_once:
        assert plan.meta.state_epoch <= wanted.target_epoch
    if not (exactly_once and plan.meta.state_epoch == wanted.target_epoch and target is not None):
        assert begin <= plan.meta.changelog_offset <= end
    assert (plan.snapshot is not None) == (plan.base is Base.SNAPSHOT)


# --- copies of others' shards ---------------------------------------------------------------------------


def test_copy_starts_from_local_files_that_the_changelog_continues() -> None:
    plan = plan_standby("id", at(9, 40), [snapshot(12, 60)], 30, 100)
    assert plan is not None
    assert (plan.base, plan.meta, plan.offsets_to_read) == (Base.LOCAL, at(9, 40), 60)


@pytest.mark.parametrize("local", [None, EMPTY, at(9, 20), at(9, 101), at(9, 40, "other")])
def test_copy_without_usable_files_starts_from_the_newest_matching_snapshot(local: StoreMeta | None) -> None:
    newest_first = [snapshot(14, 70, "other"), snapshot(12, 60), snapshot(10, 50)]
    plan = plan_standby("id", local, newest_first, 30, 100)
    assert plan is not None
    assert (plan.base, plan.snapshot) == (Base.SNAPSHOT, newest_first[1])


def test_copy_starts_empty_only_if_the_changelog_is_complete() -> None:
    plan = plan_standby("id", EMPTY, [], 0, 100)
    assert plan is not None
    assert (plan.base, plan.meta, plan.read_to) == (Base.NOTHING, at(0, 0), 100)
    assert plan_standby("id", EMPTY, [snapshot(3, 5)], 10, 100) is None
