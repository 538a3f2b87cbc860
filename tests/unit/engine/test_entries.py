"""The kinds of state over their layers, compared with plain dicts and lists, over barriers, undo and
crashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fcluster import Codec, ListState, MapState, ValueState
from fcluster.common.errors import ProcessingError
from fcluster.engine import entries as entries_module
from fcluster.engine.changelog import DeltaReader, encode_delta
from fcluster.engine.entries import Clock, EntryTable
from fcluster.engine.failure import UnkeptStateError
from fcluster.engine.kinds import ListOfKey, MapOfKey, ValueOfKey, make_access
from fcluster.engine.state import FlushLimits, ShardState, StoreMeta, store_prefix
from fcluster.engine.steps import RecordError
from fcluster.graph.states import State, StateStore
from tests.state_memory import EntriesMax
from tests.unit.engine.memory_store import MemoryStore

EAGER = FlushLimits(entries_max=1)
LAZY = FlushLimits(entries_max=10**9, bytes_max=10**9, age_ms_max=1e9)


@dataclass
class Handler:
    """A handler's states in one shard, as the engine sets them up."""

    states: tuple[State, ...]
    store: MemoryStore = field(default_factory=MemoryStore)
    limits: FlushLimits = LAZY
    cache: int = 100
    epoch: int = 0
    _key: bytes | None = b"key"

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        """Open the states, as after a restore."""
        stores = [StateStore("h", state, state) for state in self.states]
        self.shard = ShardState(self.store, ["h", *stores], EntriesMax(self.cache), self.limits)
        self.tables: dict[str, Any] = self.shard.tables
        self.access: dict[str, Any] = {
            store.state.name: make_access(store, self.tables, self) for store in stores if store.store_names
        }

    def map(self, name: str = "m") -> MapOfKey:
        return self.access[name]

    def list(self, name: str = "l") -> ListOfKey:
        return self.access[name]

    def value(self, name: str = "v") -> ValueOfKey:
        return self.access[name]

    def at(self, time_ms: int) -> None:
        """Start a record with this time."""
        Clock(self.tables["h//clock"]).advance(time_ms)

    def freeze(self) -> Mapping[bytes, bytes]:
        self.epoch += 1
        delta = self.shard.freeze(self.epoch)
        return {} if delta is None else delta.changes

    def commit(self, epoch: int | None = None) -> None:
        self.shard.commit(self.epoch if epoch is None else epoch, self.epoch, 0.0)

    def barrier(self) -> Mapping[bytes, bytes]:
        changes = self.freeze()
        if changes:
            self.commit()
        return changes


# --- value ------------------------------------------------------------------------------------------------


def test_value_is_kept_read_and_cleared() -> None:
    handler = Handler((ValueState("v", "int"),))
    value = handler.value()
    assert (value.get(), value.get(7)) == (None, 7)
    value.set(2**100)
    assert value.get() == 2**100
    assert len(handler.barrier()) == 1
    handler.shard.flush()
    handler.open()
    assert handler.value().get() == 2**100
    handler.value().clear()
    assert handler.value().get() is None
    (deleted,) = handler.barrier().values()
    assert deleted == b""


def test_unchanged_value_is_not_in_the_delta() -> None:
    handler = Handler((ValueState("v"),))
    handler.value().set({"n": 1})
    assert len(handler.barrier()) == 1
    handler.value().set({"n": 1})
    assert handler.barrier() == {}


def test_change_in_place_is_noticed() -> None:
    handler = Handler((ValueState("v"), MapState("m", key="int"), ListState("l")))
    handler.value().set([1])
    handler.map()[5] = {"a": []}
    handler.list().append({"b": 1})
    handler.barrier()
    handler.shard.flush()
    handler.open()
    handler.value().get().append(2)
    for _, found in handler.map().scan():
        found["a"].append("x")
    handler.list()[0]["b"] = 2
    assert len(handler.barrier()) == 3
    handler.shard.flush()
    handler.open()
    assert handler.value().get() == [1, 2]
    assert handler.map()[5] == {"a": ["x"]}
    assert list(handler.list()) == [{"b": 2}]


def test_keys_have_their_own_values() -> None:
    handler = Handler((ValueState("v"), MapState("m"), ListState("l")))
    for key in (b"", b"a", b"aa", b"a\xff", b"\xff" * 300):
        handler._key = key
        assert handler.value().get() is None
        assert not handler.map()
        assert not handler.list()
        handler.value().set(key.hex())
        handler.map()["x"] = key.hex()
        handler.list().append(key.hex())
        assert list(handler.map().items()) == [("x", key.hex())]
        assert list(handler.list()) == [key.hex()]


def test_record_without_key_has_no_state() -> None:
    handler = Handler((ValueState("v"), MapState("m"), ListState("l")))
    handler._key = None
    for call in (handler.value().get, lambda: handler.map()["x"], lambda: len(handler.list())):
        with pytest.raises(RecordError, match="has no key"):
            call()


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("json", (1, 2)),
        ("json", {1: 2}),
        ("json", float("nan")),
        ("text", 5),
        ("int", True),
        ("int", 1.0),
        ("bytes", "text"),
        ("msgpack", (1, 2)),
        ("msgpack", {1, 2}),
        ("msgpack", 2**70),
    ],
)
def test_value_that_would_be_read_back_differently_is_refused(kind: Any, bad: Any) -> None:
    handler = Handler((ValueState("v", kind),))
    handler.value().set(bad)
    with pytest.raises(ProcessingError, match=r"store 'h/v', key b'key'"):
        handler.freeze()
    assert handler.shard.state_epoch == 0


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        ("json", None),
        ("json", 2**200),
        ("json", -(2**64) - 1),
        ("json", ""),
        ("text", ""),
        ("bytes", b""),
        ("int", -(2**63) - 1),
        ("int", 0),
        ("msgpack", {"a": [b"x", 2**64 - 1, {1: None}]}),
        (Codec("pair", lambda pair: b"%d,%d" % pair, lambda raw: tuple(map(int, raw.split(b",")))), (3, 4)),
    ],
)
def test_value_is_read_back_unchanged(kind: Any, good: Any) -> None:
    handler = Handler((ValueState("v", kind),))
    handler.value().set(good)
    handler.barrier()
    handler.shard.flush()
    handler.open()
    assert handler.value().get("missing") == good


# --- map --------------------------------------------------------------------------------------------------


def test_scan_sees_all_layers_in_order() -> None:
    handler = Handler((MapState("m", key="int"),))
    entries = handler.map()
    entries[30] = "store"
    entries[10] = "store"
    handler.barrier()
    handler.shard.flush()
    entries[40] = "pending"
    entries[10] = "pending over store"
    handler.barrier()
    entries[20] = "prepared"
    del entries[30]
    handler.freeze()
    entries[-5] = "open"
    entries[40] = "open over pending"
    assert list(entries.scan()) == [
        (-5, "open"),
        (10, "pending over store"),
        (20, "prepared"),
        (40, "open over pending"),
    ]
    assert list(reversed(entries)) == [40, 20, 10, -5]
    assert list(entries.scan(10, 40)) == [(10, "pending over store"), (20, "prepared")]
    assert list(entries.scan(11, reverse=True)) == [(40, "open over pending"), (20, "prepared")]
    handler.shard.discard()
    assert list(entries.scan()) == [(10, "pending over store"), (30, "store"), (40, "pending")]


def test_scan_continues_over_changes() -> None:
    handler = Handler((MapState("m", key="int"),))
    entries = handler.map()
    for number in range(0, 100, 2):
        entries[number] = 0
    handler.barrier()
    handler.shard.flush()
    handler.open()
    entries = handler.map()
    seen: list[int] = []
    for number, _ in entries.scan():
        seen.append(number)
        del entries[number]
        if number % 4 == 0:
            entries.pop(number + 2, None)  # ahead of the scan: not returned any more
            entries[number + 3] = 1  # ahead of the scan: returned
            entries[number - 1] = 1  # behind the scan
    assert seen == sorted(seen)
    assert seen == [
        number for pair in zip(range(0, 100, 4), range(3, 103, 4), strict=True) for number in pair
    ]


def test_scan_cannot_continue_after_its_epoch() -> None:
    handler = Handler((MapState("m", key="int"),))
    entries = handler.map()
    entries[1] = entries[2] = 0
    scan = entries.scan()
    assert next(scan) == (1, 0)
    handler.freeze()
    with pytest.raises(RuntimeError, match="can't continue after the record"):
        next(scan)


def test_scan_of_a_large_map_reads_the_store_in_few_chunks_and_keeps_nothing() -> None:
    handler = Handler((MapState("m", key="int"),))
    for number in range(5_000):
        handler.map()[number] = number
    handler.barrier()
    handler.shard.flush()
    handler.open()
    assert len(handler.map()) == 5_000
    assert handler.store.scans < 15
    assert {table.counts() for table in handler.shard.tables.values()} == {(0, 0)}
    handler.store.scans = 0
    assert next(handler.map().scan(4_000)) == (4_000, 4_000)
    assert handler.store.scans == 1


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("int", [-(2**80), -(2**64), -65536, -257, -256, -255, -1, 0, 1, 255, 256, 2**31, 2**63, 2**90]),
        ("text", ["", "\0", "a", "a\0b", "ab", "z", "é", "\U0001f600"]),
        ("bytes", [b"", b"\0", b"\0\xff", b"a", b"a\0", b"\xff"]),
        (("text", "int"), [("", -1), ("", 0), ("\0", 5), ("a", -300), ("a", 2**70), ("a\0", 0), ("aa", 0)]),
        (
            ("int", "bytes", "int"),
            [(1,), (1, b""), (1, b"", 0), (1, b"\0", 0), (1, b"\0\0", -1), (2, b"", 3)],
        ),
    ],
)
def test_order_of_keys(kind: Any, keys: list[Any]) -> None:
    handler = Handler((MapState("m", key=kind),))
    for key in reversed(keys):
        handler.map()[key] = repr(key)
    assert list(handler.map().items()) == [(key, repr(key)) for key in keys]
    handler.barrier()
    handler.shard.flush()
    handler.open()
    assert list(handler.map()) == keys
    assert [key for key, _ in handler.map().scan(keys[2], keys[-1])] == keys[2:-1]


@pytest.mark.parametrize("bad", [1.0, True, "1", 2**1100, None])
def test_wrong_key_is_refused_where_it_is_used(bad: Any) -> None:
    entries = Handler((MapState("m", key="int"),)).map()
    with pytest.raises((TypeError, ValueError)):
        entries[bad] = 1
    if bad is not None:
        with pytest.raises((TypeError, ValueError)):
            entries.scan(bad)


# --- list -------------------------------------------------------------------------------------------------


def test_list_shrinks_at_both_ends_and_writes_only_what_changed() -> None:
    handler = Handler((ListState("l"),))
    handler.list().extend(range(100))
    handler.barrier()
    elements = handler.list()
    elements.append(100)
    assert len(handler.barrier()) == 2  # the element and the bounds
    assert (elements.popleft(), elements.pop(), elements[0], elements[-1], len(elements)) == (
        0,
        100,
        1,
        99,
        99,
    )
    assert elements[2:5] == [3, 4, 5]
    assert list(reversed(elements))[:2] == [99, 98]
    elements[1] = "two"
    assert elements[1] == "two"
    with pytest.raises(IndexError):
        elements[99]
    with pytest.raises(IndexError):
        elements[-100] = 1
    elements.clear()
    assert (list(elements), len(elements), bool(elements)) == ([], 0, False)
    with pytest.raises(IndexError):
        elements.pop()
    handler.barrier()
    handler.shard.flush()
    assert handler.store.values == {}


# --- undo -------------------------------------------------------------------------------------------------


def test_undo_reverts_only_what_a_record_changed() -> None:
    states = (ValueState("v"), MapState("m", key="int"), ListState("l", ttl=timedelta(seconds=9)))
    handler = Handler(states)
    handler.at(5)
    handler.value().set({"n": 1})
    handler.map()[1] = ["kept"]
    handler.map()[2] = "stored"
    handler.list().extend("ab")
    handler.barrier()
    handler.map()[3] = {"open": 1}
    for table in handler.tables.values():
        table.begin_undo()
    handler.at(10_000)
    assert list(handler.list()) == []
    handler.value().get()["n"] = 2
    handler.map()[1].append("lost")
    del handler.map()[2]
    handler.map()[3]["open"] = 2
    handler.map()[4] = "new"
    handler.list().append("c")
    for table in handler.tables.values():
        table.rollback()
    assert handler.value().get() == {"n": 1}
    assert list(handler.map().items()) == [(1, ["kept"]), (2, "stored"), (3, {"open": 1})]
    assert list(handler.list()) == ["a", "b"]
    assert Clock(handler.tables["h//clock"]).now_ms() == 5
    assert len(handler.barrier()) == 1


def test_entry_of_an_earlier_record_that_cannot_be_stored_is_reported_when_undo_needs_it() -> None:
    handler = Handler((ValueState("v"),))
    table = handler.tables["h/v"]
    table.begin_undo()
    handler.value().set({"when": (1, 2)})
    table.begin_undo()
    with pytest.raises(UnkeptStateError) as raised:
        handler.value().get()
    assert raised.value.condemnation.step == "h"


# --- TTL --------------------------------------------------------------------------------------------------

HOUR_MS = 3_600_000
TTL = timedelta(hours=1)


def test_entry_is_invisible_from_its_ttl_on() -> None:
    handler = Handler((ValueState("v", ttl=TTL), MapState("m", key="int", ttl=TTL), ListState("l", ttl=TTL)))
    handler.at(1_000)
    handler.value().set(1)
    handler.map()[1] = "old"
    handler.list().append("old")
    handler.at(2_000)
    handler.map()[2] = "new"
    handler.list().append("new")
    handler.at(1_000 + HOUR_MS - 1)
    assert (handler.value().get(), len(handler.map()), len(handler.list())) == (1, 2, 2)
    handler.at(1_000 + HOUR_MS)
    assert handler.value().get() is None
    assert list(handler.map().items()) == [(2, "new")]
    assert 1 not in handler.map()
    assert list(handler.list()) == ["new"]
    assert handler.list()[0] == "new"
    handler.at(5)  # a late record: event time doesn't go back
    assert handler.value().get() is None
    handler.map()[1] = "again"
    assert list(handler.map()) == [1, 2]


def test_expired_entries_are_deleted_in_the_delta_without_being_read() -> None:
    handler = Handler((ValueState("v", ttl=TTL), MapState("m", key="int", ttl=TTL), ListState("l", ttl=TTL)))
    for number in range(50):
        handler._key = b"%d" % number
        handler.at(number)
        handler.value().set(1)
        handler.map()[number] = 1
        handler.list().extend("xyz")
    handler.barrier()
    handler.shard.flush()
    handler.open()
    kept = {store_prefix("h//clock")}
    assert len(handler.store.values) > 50 * 5
    handler.at(3 * HOUR_MS)
    deleted = [key for key, value in handler.barrier().items() if not value]
    assert len(deleted) >= 50 * (1 + 1 + 3 + 1)  # value, entry, three elements, bounds
    handler.shard.flush()
    assert {key[:4] for key in handler.store.values} == kept


def test_due_entries_are_removed_in_bounded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries_module, "EXPIRED_PER_EPOCH_MAX", 10)
    handler = Handler((MapState("m", key="int", ttl=TTL),))
    for number in range(25):
        handler.map()[number] = 1
    handler.barrier()
    left: list[int] = []
    for step in range(4):
        handler.at(2 * HOUR_MS + step)
        assert list(handler.map()) == []
        handler.barrier()
        handler.shard.flush()
        left.append(sum(key[:4] == store_prefix("h/m") for key in handler.store.values))
    assert left == [15, 5, 0, 0]


def test_entry_that_is_put_again_stays_and_needs_few_notes() -> None:
    handler = Handler((ValueState("v", ttl=TTL),))
    notes = 0
    for minute in range(180):
        handler.at(minute * 60_000)
        handler.value().set(minute)
        notes += sum(
            bool(value) and key[:4] == store_prefix("h/v/times") for key, value in handler.barrier().items()
        )
    assert handler.value().get() == 179
    assert notes <= 3 * entries_module.TIME_STEPS + 1
    handler.at(180 * 60_000 + 2 * HOUR_MS)
    handler.barrier()
    handler.shard.flush()
    assert {key[:4] for key in handler.store.values} == {store_prefix("h//clock")}


def test_ttl_may_be_longer_or_shorter_in_the_next_run() -> None:
    for hours in (0.1, 10):
        handler = Handler((MapState("m", key="int", ttl=TTL),))
        handler.at(0)
        handler.map()[1] = 1
        handler.at(HOUR_MS // 2)
        handler.map()[2] = 1
        handler.barrier()
        handler.states = (MapState("m", key="int", ttl=timedelta(hours=hours)),)
        handler.shard.flush()
        handler.open()
        expected = [] if hours < 1 else [1, 2]
        handler.at(HOUR_MS)
        assert list(handler.map()) == expected
        handler.map()[3] = 1
        handler.at(21 * HOUR_MS)
        handler.barrier()
        handler.shard.flush()
        assert {key[:4] for key in handler.store.values} == {store_prefix("h//clock")}


# --- planted bugs -----------------------------------------------------------------------------------------


def test_scan_that_misses_the_open_layer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted_only_when_frozen(table: EntryTable, key: bytes, value: Any) -> None:
        table._clean.pop(key, None)
        table._open[key] = value

    monkeypatch.setattr(EntryTable, "_replace", noted_only_when_frozen)
    with pytest.raises(AssertionError):
        test_scan_sees_all_layers_in_order()


def test_expiry_that_is_not_in_the_delta_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntryTable, "settle", lambda table: None)
    with pytest.raises(AssertionError):
        test_expired_entries_are_deleted_in_the_delta_without_being_read()


def test_expiry_that_bypasses_the_changelog_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a compaction filter would do it."""

    def delete_in_the_store(table: EntryTable) -> None:
        store = table._layers._store
        for key in [key for key in store.values if key[:4] == table.prefix and table._ttl is not None]:
            del store.values[key]

    monkeypatch.setattr(EntryTable, "settle", delete_in_the_store)
    with pytest.raises(AssertionError):
        test_expired_entries_are_deleted_in_the_delta_without_being_read()


# --- against a model --------------------------------------------------------------------------------------

KEYS = st.sampled_from([b"", b"a", b"b", b"\xff" * 260])
NAMES = st.integers(-3, 12)
VALUES = st.sampled_from([None, 0, "", "x", [1], {"a": [1]}])
Model = dict[str, dict[bytes, Any]]


class Machine(RuleBasedStateMachine):
    """Values, maps and lists with and without TTL, next to plain dicts and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.ttl_ms = 50
        ttl = timedelta(milliseconds=self.ttl_ms)
        states = (
            ValueState("v"),
            MapState("m", key="int"),
            ListState("l"),
            MapState("mt", key="int", ttl=ttl),
            ListState("lt", ttl=ttl),
        )
        self.handler = Handler(states, limits=FlushLimits(entries_max=6, age_ms_max=1e9), cache=3)
        self.log: list[tuple[int, bytes]] = []
        self.open = self._empty()
        self.prepared: list[tuple[int, Model]] = []
        self.committed = self._empty()
        self.undo: Model | None = None

    def _empty(self) -> Model:
        return {"v": {}, "m": {}, "l": {}, "mt": {}, "lt": {}, "clock": {b"": 0}}

    # What handlers do. An entry with TTL is (value, time at which it was put).

    @rule(key=KEYS, value=VALUES)
    def set_value(self, key: bytes, value: Any) -> None:
        self.handler._key = key
        self.handler.value().set(copied(value))
        self.open["v"][key] = copied(value)

    @rule(key=KEYS)
    def clear_value(self, key: bytes) -> None:
        self.handler._key = key
        self.handler.value().clear()
        self.open["v"].pop(key, None)

    @rule(key=KEYS)
    def change_in_place(self, key: bytes) -> None:
        self.handler._key = key
        for found, expected in (
            (self.handler.value().get(), self.open["v"].get(key)),
            *((value, self.open["m"][key][name]) for name, value in self.handler.map().scan()),
        ):
            if isinstance(found, list):
                found.append(2)
                expected.append(2)

    @rule(key=KEYS, name=NAMES, value=VALUES)
    def put(self, key: bytes, name: int, value: Any) -> None:
        self.handler._key = key
        self.handler.map("m")[name] = copied(value)
        self.open["m"].setdefault(key, {})[name] = copied(value)
        self.handler.map("mt")[name] = copied(value)
        self.open["mt"].setdefault(key, {})[name] = (copied(value), self.now)

    @rule(key=KEYS, name=NAMES)
    def remove(self, key: bytes, name: int) -> None:
        self.handler._key = key
        for which in ("m", "mt"):
            self.handler.map(which).pop(name, None)
            self.open[which].get(key, {}).pop(name, None)

    @rule(key=KEYS, start=NAMES, stop=NAMES, reverse=st.booleans())
    def scan(self, key: bytes, start: int, stop: int, reverse: bool) -> None:
        self.handler._key = key
        for which in ("m", "mt"):
            expected = [(name, value) for name, value in self.seen(which, key) if start <= name < stop]
            found = list(self.handler.map(which).scan(start, stop, reverse=reverse))
            assert found == (expected[::-1] if reverse else expected), which

    @rule(key=KEYS, start=NAMES)
    def scan_and_change(self, key: bytes, start: int) -> None:
        self.handler._key = key
        entries, model = self.handler.map("m"), self.open["m"].setdefault(key, {})
        place = start
        for name, value in entries.scan(start):
            assert name == min(one for one in model if one >= place)
            assert value == model[name]
            place = name + 1
            if name % 3 == 0:
                del entries[name], model[name]
            elif name < 12:
                entries[name + 2] = model[name + 2] = "ahead"
        assert not [one for one in model if one >= place]

    @rule(key=KEYS, values=st.lists(VALUES, max_size=3))
    def extend(self, key: bytes, values: list[Any]) -> None:
        self.handler._key = key
        self.handler.list("l").extend(copied(values))
        self.open["l"].setdefault(key, []).extend(copied(values))
        self.handler.list("lt").extend(copied(values))
        self.open["lt"].setdefault(key, []).extend((value, self.now) for value in copied(values))

    @rule(key=KEYS, left=st.booleans())
    def pop(self, key: bytes, left: bool) -> None:
        self.handler._key = key
        for which in ("l", "lt"):
            model = self.open[which].setdefault(key, [])
            if which == "lt":
                model[:] = [one for one in model if one[1] + self.ttl_ms > self.now]
            elements = self.handler.list(which)
            if not model:
                with pytest.raises(IndexError):
                    elements.pop()
                continue
            expected = model.pop(0 if left else -1)
            found = elements.popleft() if left else elements.pop()
            assert found == (expected[0] if which == "lt" else expected)

    @rule(ahead=st.integers(0, 40))
    def time_goes_on(self, ahead: int) -> None:
        self.handler.at(self.now + ahead)
        self.open["clock"][b""] += ahead

    # What the shard does.

    @rule()
    def begin_undo(self) -> None:
        for table in self.handler.tables.values():
            table.begin_undo()
        self.undo = copied(self.open)

    @precondition(lambda self: self.undo is not None)
    @rule()
    def rollback(self) -> None:
        for table in self.handler.tables.values():
            table.rollback()
        self.open, self.undo = self.undo, None

    @rule()
    def freeze(self) -> None:
        self.handler.epoch += 1
        delta = self.handler.shard.freeze(self.handler.epoch)
        self.undo = None
        if delta is not None:
            self.prepared.append((delta.epoch, copied(self.open)))
            self.log += [(delta.epoch, record) for record in encode_delta(delta)]

    @precondition(lambda self: self.prepared)
    @rule()
    def commit(self) -> None:
        epoch, self.committed = self.prepared.pop(0)
        self.handler.commit(epoch)

    @rule()
    def discard(self) -> None:
        self.handler.shard.discard()
        self._fall_back()

    @rule()
    def crash(self) -> None:
        """Restore from the deltas what wasn't written to the store."""
        self._fall_back()
        store = self.handler.store
        committed = self.handler.shard.committed_epoch
        reader = DeltaReader("log", store.meta().state_epoch)
        for epoch, record in self.log:
            if store.meta().state_epoch < epoch <= committed:
                delta = reader.feed(0, record)
                if delta is not None:
                    store.apply(delta.changes, StoreMeta(delta.epoch))
        reader.finish()
        self.handler.open()

    @invariant()
    def everything_is_as_in_the_model(self) -> None:
        for key in (b"", b"a", b"b", b"\xff" * 260):
            self.handler._key = key
            assert list(self.handler.map("m").scan()) == self.seen("m", key)
            assert list(self.handler.list("l")) == self.open["l"].get(key, [])

    @invariant()
    def what_expires_is_as_in_the_model(self) -> None:
        for key in (b"a", b"b"):
            self.handler._key = key
            assert list(self.handler.map("mt").scan()) == self.seen("mt", key)
            assert self.handler.value().get("none") == self.open["v"].get(key, "none")
            seen = [
                value for value, put_ms in self.open["lt"].get(key, []) if put_ms + self.ttl_ms > self.now
            ]
            assert list(self.handler.list("lt")) == seen

    @property
    def now(self) -> int:
        return self.open["clock"][b""]

    def seen(self, which: str, key: bytes) -> list[tuple[int, Any]]:
        entries = sorted(self.open[which].get(key, {}).items())
        if which == "m":
            return entries
        return [(name, value) for name, (value, put_ms) in entries if put_ms + self.ttl_ms > self.now]

    def _fall_back(self) -> None:
        self.log = [one for one in self.log if one[0] <= self.handler.shard.committed_epoch]
        self.prepared, self.undo = [], None
        self.open = copied(self.committed)


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
