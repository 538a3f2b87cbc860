from __future__ import annotations

import datetime
import decimal
import enum
import threading
import zoneinfo
from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.json import decode, encode

from fcluster.common.errors import JobError, ProcessingError
from fcluster.engine import state as state_module
from fcluster.engine.state import FlushLimits, ShardState, StoreMeta, store_prefix
from tests.state_memory import EntriesMax
from tests.unit.engine.memory_store import MemoryStore

EAGER = FlushLimits(entries_max=1)
LAZY = FlushLimits(entries_max=10**9, bytes_max=10**9, age_ms_max=1e9)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def make(store: MemoryStore, limits: FlushLimits = LAZY, cache: int = 100, names: tuple[str, ...] = ("s",)):
    state = ShardState(store, names, EntriesMax(cache), limits)
    return state, state.tables[names[0]]


# --- the layers -------------------------------------------------------------------------------------------


def test_changed_key_is_in_the_delta_once_and_read_only_key_is_not(store: MemoryStore) -> None:
    state, table = make(store)
    for n in range(10):
        table.get(b"a")["n"] = n
    table.get(b"b")
    delta = state.freeze(3)
    assert delta is not None
    assert (delta.epoch, delta.previous_epoch) == (3, 0)
    assert delta.changes == {store_prefix("s") + b"a": b'{"n":9}'}
    state.commit(3, 17, 0)
    table.get(b"a")["n"] = 9
    assert state.freeze(4) is None
    assert state.state_epoch == 3


def test_nested_value_changed_in_place_is_noticed(store: MemoryStore) -> None:
    state, table = make(store)
    table.get(b"a")["list"] = [1]
    state.freeze(1)
    state.commit(1, 1, 0)
    table.get(b"a")["list"].append(2)
    delta = state.freeze(2)
    assert delta is not None
    assert list(delta.changes.values()) == [b'{"list":[1,2]}']


def test_touched_is_always_the_same_object(store: MemoryStore) -> None:
    state, table = make(store)
    touched = table.touched
    live = table.get(b"a")
    live["n"] = 1
    assert touched.get(b"a") is live
    state.freeze(1)
    assert touched == {}
    assert table.get(b"a") is live
    state.discard()
    assert table.touched is touched


def test_emptied_dict_deletes_the_key_and_a_new_empty_one_changes_nothing(store: MemoryStore) -> None:
    state, table = make(store, EAGER)
    table.get(b"a")["n"] = 1
    state.freeze(1)
    state.commit(1, 1, 0)
    assert store.decoded("s") == {b"a": {"n": 1}}
    table.get(b"a").clear()
    table.get(b"b")["x"] = 1
    table.get(b"b").clear()
    delta = state.freeze(2)
    assert delta is not None
    assert delta.changes == {store_prefix("s") + b"a": b""}
    assert table.get(b"a") == {}
    state.commit(2, 2, 0)
    assert store.decoded("s") == {}


def test_key_deleted_in_a_prepared_epoch_reads_as_empty_after_eviction(store: MemoryStore) -> None:
    state, table = make(store, EAGER, cache=0)
    table.get(b"a")["n"] = 1
    state.freeze(1)
    state.commit(1, 1, 0)
    table.get(b"a").clear()
    state.freeze(2)
    assert table.get(b"a") == {}


def test_store_stays_at_the_committed_epoch_until_the_commit(store: MemoryStore) -> None:
    state, table = make(store, EAGER)
    table.get(b"a")["n"] = 1
    state.freeze(5)
    assert (state.state_epoch, state.committed_epoch, store.stands_at.state_epoch) == (5, 0, 0)
    assert store.values == {}
    state.commit(5, 42, 0)
    assert (state.committed_epoch, store.stands_at) == (5, StoreMeta(5, 42))


def test_discard_drops_open_and_prepared_layers_and_the_dicts_touched_in_them(store: MemoryStore) -> None:
    state, table = make(store)
    table.get(b"a")["n"] = 1
    table.get(b"kept")["n"] = 1
    state.freeze(1)
    state.commit(1, 1, 0)
    table.get(b"a")["n"] = 2
    state.freeze(2)
    table.get(b"b")["n"] = 3
    table.get(b"kept")["n"] = 4
    state.discard()
    assert (state.state_epoch, state.committed_epoch) == (1, 1)
    assert [table.get(key) for key in (b"a", b"b", b"kept")] == [{"n": 1}, {}, {"n": 1}]
    assert state.freeze(3) is None
    table.get(b"a")["n"] = 5
    delta = state.freeze(4)
    assert delta is not None
    assert delta.previous_epoch == 1


def test_several_epochs_are_merged_into_one_write_with_the_newest_meta(store: MemoryStore) -> None:
    state, table = make(store, FlushLimits(entries_max=1000, age_ms_max=100))
    for epoch in range(1, 5):
        table.get(b"a")["n"] = epoch
        table.get(b"k%d" % epoch)["n"] = epoch
        state.freeze(epoch)
        state.commit(epoch, epoch * 10, now_ms=epoch * 30.0)
        assert store.writes == []
    table.get(b"a")["n"] = 5
    state.freeze(5)
    state.commit(5, 50, now_ms=131.0)
    assert store.writes == [(5, StoreMeta(5, 50))]
    assert store.decoded("s")[b"a"] == {"n": 5}
    state.flush()
    assert len(store.writes) == 1, "nothing is left to write"


def test_pending_bytes_or_entries_over_their_limit_are_written_at_once(store: MemoryStore) -> None:
    for limits in (FlushLimits(bytes_max=10, age_ms_max=1e9), FlushLimits(entries_max=1, age_ms_max=1e9)):
        state, table = make(store, limits)
        table.get(b"a")["n"] = f"{limits}"
        epoch = state.state_epoch + 1
        state.freeze(epoch)
        state.commit(epoch, 1, 0)
        assert store.stands_at.state_epoch == epoch


def test_failed_write_loses_nothing_and_is_repeated_by_the_next_flush(store: MemoryStore) -> None:
    state, table = make(store, EAGER, cache=0)
    store.failure = OSError("no space")
    table.get(b"a")["n"] = 1
    state.freeze(1)
    with pytest.raises(OSError, match="no space"):
        state.commit(1, 1, 0)
    assert table.get(b"a") == {"n": 1}
    table.get(b"a")["n"] = 2
    state.freeze(2)
    with pytest.raises(OSError, match="no space"):
        state.commit(2, 2, 0)
    state.discard()
    assert (state.committed_epoch, table.get(b"a")) == (2, {"n": 2})
    store.failure = None
    state.flush()
    assert (store.stands_at, store.decoded("s")) == (StoreMeta(2, 2), {b"a": {"n": 2}})


def test_clean_dicts_are_evicted_longest_untouched_first(store: MemoryStore) -> None:
    state, table = make(store, EAGER, cache=2)
    for epoch, key in enumerate((b"a", b"b", b"c"), start=1):
        table.get(key)["n"] = epoch
        state.freeze(epoch)
        state.commit(epoch, epoch, 0)
    assert table.counts() == (0, 2)
    store.reads = 0
    assert table.get(b"c") == {"n": 3}
    assert table.get(b"b") == {"n": 2}
    assert store.reads == 0
    assert table.get(b"a") == {"n": 1}
    assert store.reads == 1


def test_prefetched_keys_are_loaded_with_one_look_into_the_store(store: MemoryStore) -> None:
    state, table = make(store, EAGER, cache=0)
    for key in (b"a", b"b", b"c"):
        table.get(key)["k"] = key.decode()
    state.freeze(1)
    state.commit(1, 1, 0)
    table.get(b"a")["k"] = "touched"
    store.reads = 0
    assert table.load_many([b"a", b"b", b"c", b"b", b"new"]) == 3
    states = {key: dict(table.get(key)) for key in (b"a", b"b", b"c", b"new")}
    assert states == {b"a": {"k": "touched"}, b"b": {"k": "b"}, b"c": {"k": "c"}, b"new": {}}
    assert store.reads == 1
    delta = state.freeze(2)
    assert delta is not None
    assert list(delta.changes) == [store_prefix("s") + b"a"]


def test_tables_with_equal_keys_do_not_mix(store: MemoryStore) -> None:
    state, _ = make(store, EAGER, names=("s", "t"))
    state.tables["s"].get(b"k")["from"] = "s"
    state.tables["t"].get(b"k")["from"] = "t"
    state.freeze(1)
    state.commit(1, 1, 0)
    state.tables["t"].get(b"k")["from"] = "t2"
    state.freeze(2)
    state.discard()
    assert state.tables["t"].get(b"k") == {"from": "t"}
    assert (store.decoded("s"), store.decoded("t")) == ({b"k": {"from": "s"}}, {b"k": {"from": "t"}})


def test_state_continues_from_the_stores_position(store: MemoryStore) -> None:
    store.stands_at = StoreMeta(9, 100, "topic-id")
    state, table = make(store, EAGER)
    table.get(b"a")["n"] = 1
    delta = state.freeze(12)
    assert delta is not None
    assert delta.previous_epoch == 9
    state.commit(12, 103, 0)
    assert store.stands_at == StoreMeta(12, 103, "topic-id")


def test_epochs_out_of_order_are_refused(store: MemoryStore) -> None:
    state, table = make(store)
    table.get(b"a")["n"] = 1
    state.freeze(2)
    with pytest.raises(ValueError, match="can't follow"):
        state.freeze(2)
    with pytest.raises(ValueError, match="not the oldest"):
        state.commit(1, 1, 0)


def test_stores_whose_prefixes_collide_are_refused(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "store_prefix", lambda name: b"same")
    with pytest.raises(JobError, match="'s', 't'"):
        ShardState(store, ["s", "t"], EntriesMax(10))


def test_main_thread_reads_committed_values_while_the_commit_thread_moves_them(store: MemoryStore) -> None:
    """Each read of an uncached key returns exactly the newest frozen value, whatever the commit thread is
    doing."""
    state, table = make(store, FlushLimits(entries_max=3), cache=0)
    frozen, committed, epochs = threading.Semaphore(0), threading.Semaphore(0), 300

    def commit_all() -> None:
        for epoch in range(1, epochs + 1):
            assert frozen.acquire(timeout=30)
            state.commit(epoch, epoch, 0)
            committed.release()

    with ThreadPoolExecutor(1) as commit_thread:
        done = commit_thread.submit(commit_all)
        for epoch in range(1, epochs + 1):
            for n in range(5):
                live = table.get(b"%d" % n)
                assert live.get("epoch", 0) == epoch - 1
                live["epoch"] = epoch
            # Two epochs overlap, as in a worker: this one is frozen while the one before is committed.
            state.freeze(epoch)
            frozen.release()
            for n in range(5):
                assert table.peek(b"%d" % n) == {"epoch": epoch}
            if epoch > 1:
                assert committed.acquire(timeout=30)
        done.result(timeout=30)
    assert store.stands_at.state_epoch == epochs


# --- what can be kept -------------------------------------------------------------------------------------


class Level(enum.IntEnum):
    LOW = 1


class Colour(enum.Enum):
    RED = "red"


class Text(str):
    __slots__ = ()


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        Point(1, 2),
        {1, 2},
        bytearray(b"bytes"),
        datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        decimal.Decimal("NaN"),
        Level.LOW,
        Colour.RED,
        Text("x"),
        OrderedDict(a=1),
        float("nan"),
        float("inf"),
        {1: "x"},
        {Text("k"): "x"},
        "\ud800",
        orjson.Fragment(b"1"),
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v], lambda v: {"in": {"deep": [1, [v]]}}])
def test_value_that_would_not_be_read_back_is_refused_with_store_and_key(
    store: MemoryStore, value: Any, wrap: Any
) -> None:
    state, table = make(store)
    table.get(b"good")["n"] = None
    table.get(b"bad")["v"] = wrap(value)
    with pytest.raises(ProcessingError, match=r"store 's', key b'bad': state") as raised:
        state.freeze(1)
    assert raised.value.remedy
    assert state.state_epoch == 0
    del table.get(b"bad")["v"]
    assert state.freeze(1) is not None


def test_state_that_contains_itself_is_refused(store: MemoryStore) -> None:
    state, table = make(store)
    table.get(b"bad")["me"] = [table.get(b"bad")]
    with pytest.raises(ProcessingError, match="contains itself"):
        state.freeze(1)


def test_non_string_key_of_the_state_itself_is_refused(store: MemoryStore) -> None:
    state, table = make(store)
    table.get(b"bad")[1] = "x"  # type: ignore[index]
    with pytest.raises(ProcessingError, match="has the key 1, a int"):
        state.freeze(1)


def test_integers_of_any_size_are_stored(store: MemoryStore) -> None:
    state, table = make(store, EAGER, cache=0)
    numbers = [2**64, -(2**63) - 1, 10**100]
    table.get(b"a")["numbers"] = numbers
    state.freeze(1)
    state.commit(1, 1, 0)
    assert table.get(b"a") == {"numbers": numbers}
    table.get(b"a")["numbers"] = 10**5000
    with pytest.raises(ProcessingError, match="can't be encoded"):
        state.freeze(2)


def test_text_with_every_kind_of_line_end_is_stored(store: MemoryStore) -> None:
    state, table = make(store, EAGER, cache=0)
    text = "a\nb\r\nc\u2028d\x85e\x00"
    table.get(b"a")["text"] = text
    table.get(b"b")[text] = [text]
    state.freeze(1)
    state.commit(1, 1, 0)
    assert (table.get(b"a"), table.get(b"b")) == ({"text": text}, {text: [text]})


def test_null_beside_floats_is_stored(store: MemoryStore) -> None:
    state, table = make(store)
    table.get(b"a").update(none=None, number=1.5, text="null")
    delta = state.freeze(1)
    assert delta is not None
    assert list(delta.changes.values()) == [b'{"none":null,"number":1.5,"text":"null"}']


# --- undo -------------------------------------------------------------------------------------------------


def test_rollback_reverts_the_record_and_only_the_record(store: MemoryStore) -> None:
    state, table = make(store)
    table.begin_undo()
    table.get(b"a").update(n=1, nested=[1])
    table.begin_undo()
    live = table.get(b"a")
    live["nested"].append(2)
    live["n"] = 2
    table.get(b"new")["n"] = 1
    table.rollback()
    assert table.get(b"a") is live
    assert (live, table.get(b"new")) == ({"n": 1, "nested": [1]}, {})
    delta = state.freeze(1)
    assert delta is not None
    assert list(delta.changes.values()) == [b'{"n":1,"nested":[1]}']


def test_rollback_without_changes_or_after_a_barrier_does_nothing(store: MemoryStore) -> None:
    state, table = make(store)
    table.rollback()
    table.begin_undo()
    table.get(b"a")["n"] = 1
    state.freeze(1)
    table.rollback()
    assert table.get(b"a") == {"n": 1}


def test_value_that_cannot_be_stored_is_reported_when_the_next_record_of_the_key_needs_undo(
    store: MemoryStore,
) -> None:
    _, table = make(store)
    table.begin_undo()
    table.get(b"a")["v"] = object()
    table.begin_undo()
    with pytest.raises(ProcessingError, match=r"state\['v'\] is a object"):
        table.get(b"a")


# --- against a model --------------------------------------------------------------------------------------

keys_strategy = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
leaves |= st.floats(allow_nan=False, allow_infinity=False)
values_strategy = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2), max_leaves=4)
stores_strategy = st.sampled_from(["s", "t"])


class StateModel(RuleBasedStateMachine):
    """ShardState next to plain dicts: what is open, what each prepared epoch contains, what is committed."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.shard = ShardState(
            self.store, ["s", "t"], EntriesMax(3), FlushLimits(entries_max=4, age_ms_max=5)
        )
        self.open: dict[tuple[str, bytes], Any] = {}
        self.committed: dict[tuple[str, bytes], Any] = {}
        self.prepared: list[tuple[int, dict[tuple[str, bytes], Any]]] = []
        self.changelog: dict[bytes, bytes] = {}
        self.deltas: dict[int, Mapping[bytes, bytes]] = {}
        self.epoch = 0
        self.now_ms = 0

    def table(self, store: str):
        return self.shard.tables[store]

    @rule(store=stores_strategy, key=keys_strategy)
    def get(self, store: str, key: bytes) -> None:
        assert self.table(store).get(key) == self.open.get((store, key), {})

    @rule(store=stores_strategy, key=keys_strategy, field=st.sampled_from("xy"), value=values_strategy)
    def change(self, store: str, key: bytes, field: str, value: Any) -> None:
        self.table(store).get(key)[field] = value
        self.open.setdefault((store, key), {})[field] = decode(encode(value))

    @rule(store=stores_strategy, key=keys_strategy)
    def delete(self, store: str, key: bytes) -> None:
        self.table(store).get(key).clear()
        self.open.pop((store, key), None)

    @rule(store=stores_strategy, key=keys_strategy, value=values_strategy)
    def change_and_roll_back(self, store: str, key: bytes, value: Any) -> None:
        table = self.table(store)
        table.begin_undo()
        table.get(key)["x"] = [value]
        table.rollback()
        assert table.get(key) == self.open.get((store, key), {})

    @rule(store=stores_strategy, keys=st.lists(keys_strategy))
    def load_many(self, store: str, keys: list[bytes]) -> None:
        self.table(store).load_many(keys)

    @rule()
    def freeze(self) -> None:
        self.epoch += 1
        last = self.prepared[-1][1] if self.prepared else self.committed
        image = {key: decode(encode(value)) for key, value in self.open.items() if value}
        delta = self.shard.freeze(self.epoch)
        if delta is None:
            assert image == last
        else:
            assert {k: encode(v) for k, v in image.items()} != {k: encode(v) for k, v in last.items()}
            self.prepared.append((self.epoch, image))
            self.deltas[self.epoch] = delta.changes

    @rule(later_ms=st.integers(0, 4))
    def commit(self, later_ms: int) -> None:
        self.now_ms += later_ms
        if self.prepared:
            epoch, self.committed = self.prepared.pop(0)
            self.shard.commit(epoch, epoch * 2, self.now_ms)
            self.changelog.update(self.deltas[epoch])

    @rule()
    def flush(self) -> None:
        self.shard.flush()
        assert self.stored() == self.committed
        assert self.store.stands_at.state_epoch == self.shard.committed_epoch

    @rule()
    def discard(self) -> None:
        self.shard.discard()
        self.prepared.clear()
        self.open = {key: decode(encode(value)) for key, value in self.committed.items()}

    @rule()
    def crash(self) -> None:
        """Drop what is in memory. The store replays what the changelog has beyond it."""
        self.store.apply(self.changelog, StoreMeta(self.shard.committed_epoch, 0))
        self.shard = ShardState(
            self.store, ["s", "t"], EntriesMax(3), FlushLimits(entries_max=4, age_ms_max=5)
        )
        self.discard()

    def stored(self) -> dict[tuple[str, bytes], Any]:
        return {(n, key): value for n in "st" for key, value in self.store.decoded(n).items()}

    @invariant()
    def layers_together_say_what_the_model_says(self) -> None:
        for store in "st":
            for key in (b"a", b"b", b"c", b"d", b"e"):
                assert self.table(store).peek(key) == self.open.get((store, key), {})

    @invariant()
    def cache_and_store_stay_in_bounds(self) -> None:
        assert self.store.stands_at.state_epoch <= self.shard.committed_epoch
        replayed = {key: value for key, value in self.changelog.items() if value}
        committed = {store_prefix(n) + key: encode(value) for (n, key), value in self.committed.items()}
        assert {k: decode(v) for k, v in replayed.items()} == {k: decode(v) for k, v in committed.items()}


StateModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestStateAgainstTheModel = StateModel.TestCase


def test_changes_without_a_later_commit_become_due() -> None:
    store = MemoryStore()
    state = ShardState(store, ["a"], EntriesMax(100), FlushLimits(age_ms_max=1000))
    state.tables["a"].get(b"k")["n"] = 1
    state.freeze(1)
    assert not state.flush_is_due(5000)  # nothing is committed yet
    state.commit(1, 1, 5000)
    assert not state.flush_is_due(5999)
    assert state.flush_is_due(6000)
    state.flush()
    assert not state.flush_is_due(9000)
    assert store.meta().state_epoch == 1
