"""How much a restore would replay, from what was counted and what follows from it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fcluster.storage.replay_size import STEPS_MAX, ReplaySize


def test_chain_consists_of_the_deltas_after_the_snapshot() -> None:
    replay = ReplaySize(0)
    replay.snapshotted(0)
    replay.grown(2, 100)
    replay.grown(4, 50)
    assert replay.bytes == 150
    replay.snapshotted(2)
    assert replay.bytes == 50, "the second delta came after the snapshot"
    replay.snapshotted(4)
    assert replay.bytes == 0


def test_uncounted_deltas_are_assumed_to_be_like_the_counted_ones() -> None:
    replay = ReplaySize(1_000)
    replay.grown(1_010, 500)
    assert replay.bytes == 500, "the newest snapshot's offset isn't known yet"
    replay.snapshotted(900)
    assert replay.bytes == 500 + 100 * 50
    replay.snapshotted(1_010)
    assert replay.bytes == 0


def test_size_is_unknown_and_not_due_before_anything_was_counted() -> None:
    replay = ReplaySize(1_000)
    replay.snapshotted(0)
    assert replay.bytes == 0


@given(st.lists(st.integers(1, 1_000), min_size=1, max_size=3 * STEPS_MAX), st.floats(0, 1))
def test_long_chain_is_counted_in_little_memory_and_never_underestimated(
    sizes: list[int], share: float
) -> None:
    replay = ReplaySize(0)
    for number, size in enumerate(sizes, 1):
        replay.grown(2 * number, size)
    replay.snapshotted(0)
    assert replay.bytes == sum(sizes)
    taken = int(len(sizes) * share)
    replay.snapshotted(2 * taken)
    assert replay.bytes >= sum(sizes[taken:])
