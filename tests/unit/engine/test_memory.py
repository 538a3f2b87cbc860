"""Bounding what the live entries of all shards take together."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.engine.memory import StateMemory, estimate_bytes
from fcluster.engine.state import FlushLimits, ShardState, StoreMeta
from fcluster.engine.values import describe_unkept
from fcluster.graph.codecs import encode_json
from tests.unit.engine.test_entries import MemoryStore


@dataclass(eq=False)
class Shard:
    clean_bytes: int = 0
    checked_bytes: int = 0

    def evict_bytes(self, size_bytes: int) -> None:
        assert 0 < size_bytes <= self.clean_bytes
        self.clean_bytes -= size_bytes


def test_one_shard_may_use_what_others_leave() -> None:
    memory = StateMemory(1000)
    busy, idle = Shard(), Shard()
    for shard in (busy, idle):
        memory.add(shard)
    busy.clean_bytes = 1000
    memory.settle(busy)
    assert busy.clean_bytes == 1000
    busy.clean_bytes = 1200
    memory.settle(busy)
    assert busy.clean_bytes == 1000


def test_shard_that_is_idle_makes_room_for_one_that_needs_it() -> None:
    memory = StateMemory(1000)
    idle, busy = Shard(), Shard()
    for shard in (idle, busy):
        memory.add(shard)
    idle.clean_bytes = 1000
    memory.settle(idle)
    for size in range(100, 700, 100):
        busy.clean_bytes = size
        memory.settle(busy)
    assert (idle.clean_bytes, busy.clean_bytes) == (500, 500)


def test_shard_that_is_gone_has_no_share() -> None:
    memory = StateMemory(1000)
    gone, rest = Shard(), Shard()
    gone.clean_bytes = rest.clean_bytes = 1000
    memory.add(gone)
    memory.add(rest)
    del gone
    gc.collect()
    memory.settle(rest)
    assert rest.clean_bytes == 1000


@given(st.data(), st.integers(1, 5), st.integers(0, 10_000))
def test_bound_is_kept_to_an_eighth_and_equal_shares_are_respected(
    data: st.DataObject, shards: int, bytes_max: int
) -> None:
    memory = StateMemory(bytes_max)
    held = [Shard() for _ in range(shards)]
    for shard in held:
        memory.add(shard)
    share = bytes_max // shards
    for _ in range(data.draw(st.integers(1, 20))):
        shard = data.draw(st.sampled_from(held))
        grown = shard.clean_bytes = data.draw(st.integers(0, 20_000))
        memory.settle(shard)
        assert sum(one.clean_bytes for one in held) <= bytes_max + shards * (share // 8)
        assert shard.clean_bytes >= min(share, grown), "it has its share"


SHAPES: dict[str, Callable[[int], Any]] = {
    "count and sum": lambda n: {"count": 1000 + n, "sum": 12345 + n},
    "ten numbers": lambda n: {name: n * 1000 + at for at, name in enumerate("abcdefghij")},
    "text": lambda n: {"text": f"{n:01000d}"},
    "a hundred numbers": lambda n: {"last": [n * 1000 + at for at in range(100)]},
    "records in a list": lambda n: {"last": [{"id": n * 100 + at, "sku": f"{n}-{at}"} for at in range(40)]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_estimate_is_close_to_what_values_take(shape: str) -> None:
    make, count = SHAPES[shape], 300
    gc.collect()
    tracemalloc.start()
    values = [make(1000 + n) for n in range(count)]
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    estimated = sum(map(estimate_bytes, values))
    assert 0.6 < estimated / taken < 1.4


def test_estimate_of_a_huge_value_looks_at_a_few_elements_only() -> None:
    seen = 0

    class Counted(list[int]):
        def __len__(self) -> int:
            nonlocal seen
            seen += 1
            return 1

    huge = {"rows": [[Counted() for _ in range(1000)] for _ in range(1000)]}
    assert estimate_bytes(huge) > 1_000_000
    assert seen < 200


def test_state_of_many_keys_stays_within_the_bound_and_keeps_the_latest_keys() -> None:
    bytes_max = 100_000
    store = MemoryStore()
    state = ShardState(store, ["s"], StateMemory(bytes_max), FlushLimits(entries_max=1))
    table = state.documents["s"]
    for epoch in range(1, 41):
        for number in range(50):
            table.get(b"key-%d-%d" % (epoch, number))["n"] = number
        state.freeze(epoch)
        state.commit(epoch, epoch, 0)
        assert state.clean_bytes <= bytes_max * 9 // 8
    kept = table.counts()[1]
    assert 100 < kept < 400
    assert store.meta() == StoreMeta(40, 40)
    store.values.clear()  # what is read from now on comes from memory
    assert table.get(b"key-40-49") == {"n": 49}
    assert table.get(b"key-1-0") == {}


@pytest.mark.parametrize("depth", [10, 300, 900, 1_100, 5_000])
def test_nesting_of_any_depth_is_kept_or_said(depth: int) -> None:
    """Python gives up at about 1,000 levels, and its error says nothing of the state."""
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    assert estimate_bytes(value) > 0
    trouble = describe_unkept({"a": value})
    assert trouble is None or "is nested too deeply to be kept: flatten it" in trouble
    assert (trouble is None) == (depth < 1_000)


def test_output_that_is_nested_too_deeply_is_named() -> None:
    value: Any = 1
    for _ in range(300):
        value = [value]
    with pytest.raises(TypeError, match="nested more than 254 levels deep"):
        encode_json(value)
