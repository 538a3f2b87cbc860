"""How much a restore would replay, by what was counted and what can be concluded from it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fcluster.worker.chain import STEPS_MAX, Chain


def test_chain_is_the_deltas_behind_the_snapshot() -> None:
    chain = Chain(0)
    chain.snapshotted(0)
    chain.grown(2, 100)
    chain.grown(4, 50)
    assert chain.bytes == 150
    chain.snapshotted(2)
    assert chain.bytes == 50, "the second delta came after the snapshot"
    chain.snapshotted(4)
    assert chain.bytes == 0


def test_uncounted_past_is_taken_to_be_like_what_was_counted() -> None:
    chain = Chain(1_000)
    chain.grown(1_010, 500)
    assert chain.bytes == 500, "where the newest snapshot is isn't known yet"
    chain.snapshotted(900)
    assert chain.bytes == 500 + 100 * 50
    chain.snapshotted(1_010)
    assert chain.bytes == 0


def test_past_without_anything_counted_is_unknown_and_not_due() -> None:
    chain = Chain(1_000)
    chain.snapshotted(0)
    assert chain.bytes == 0


@given(st.lists(st.integers(1, 1_000), min_size=1, max_size=3 * STEPS_MAX), st.floats(0, 1))
def test_long_chain_is_counted_in_little_memory_and_never_too_low(sizes: list[int], share: float) -> None:
    chain = Chain(0)
    for number, size in enumerate(sizes, 1):
        chain.grown(2 * number, size)
    chain.snapshotted(0)
    assert chain.bytes == sum(sizes)
    taken = int(len(sizes) * share)
    chain.snapshotted(2 * taken)
    assert chain.bytes >= sum(sizes[taken:])
