"""The kinds of state that a handler can declare, over tables of entries.

Responsible for: making the tables that a declared state needs, and the objects through which a handler uses
them: `ValueOfKey`, `MapOfKey`, `ListOfKey`. There is one such object for each handler and shard; it acts on
the key of the record that is being processed. To add a kind, add a class here and its declaration in
`fcluster.graph.states`. Pure.

    value        key of the stream                     -> the value
    map          group of the key | ordered key        -> the value
    list         group of the key | place (8 bytes)    -> the element
      /bounds    key of the stream                     -> first place, place behind the last one
    any /times   time (8 bytes) | key of the entry     -> nothing: notes of `entries.Expiry`
    //clock      nothing                               -> the handler's clock
    //timers     group of the key | name of the timer  -> clock (1 byte) | time (8 bytes)
    //due        clock | time | ended key | name       -> nothing: the timers in the order in which they fire
    //windows    end (8 bytes) | key of the stream     -> what is kept of the window, an element per aggregate
    //grace      nothing                               -> the grace, what had closed when it changed
    //sessions   key of the stream                     -> its sessions in order: start, end, and what is kept
      //due      end (8 bytes) | key of the stream     -> nothing: when a session of the key may end
    //left       end (8 bytes) | key of the stream     -> records of some time: timestamp, bytes, has partner
    //right      the same of the other side of a join
      //due      closing time | ended key | what       -> nothing: what is due in a join; see `engine.pairs`
    //table      key of the stream                     -> the row of a table: time, bytes of its codec
    //versions, //due, //clock of a table: its former rows; see `engine.history`
    //members    key of a row                          -> its contribution to a group; see `graph.groups`
    //groups     key of the group                      -> its row: time, number of members, aggregates
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from struct import Struct
from typing import Any, Final, Protocol, cast, overload

from fcluster.common.failures import bounded_repr, bounded_text, describe_exception, type_name
from fcluster.engine.entries import ABSENT, Clock, EntryTable, Expiry, Layers, ValueCodec
from fcluster.engine.migrating import MigratingTable, Migrations
from fcluster.engine.ordered_keys import (
    TIME_BYTES,
    decode_time,
    end_of_prefix,
    group_of_entry,
    group_of_key,
    key_of_group,
    ordered_key,
)
from fcluster.engine.rows import ExpiringRowTable, FollowedTable, RowTable
from fcluster.engine.steps import RecordError
from fcluster.engine.values import UnkeptError, decode_value, describe_unkept, encode_values
from fcluster.graph.codecs import Kind, ModelCodec, codec_name, decode_msgpack, value_codec
from fcluster.graph.joins import PairStore
from fcluster.graph.states import ListAccess, MapAccess, MapState, StateStore, ValueAccess
from fcluster.graph.tables import TableStore
from fcluster.graph.timers import TimerStore
from fcluster.graph.windows import WindowStore

_BOUNDS = Struct(">QQ")
_PLACE_BYTES = 8
_LOAD_CHUNK = 1_000


class Here(Protocol):
    """Where a handler is called: its context."""

    _key: bytes | None


# --- codecs -----------------------------------------------------------------------------------------------


class _JsonCodec:
    """JSON that is the same when decoded, or refused; see `values`."""

    def __init__(self) -> None:
        self.encode_all: Callable[[Collection[Any]], list[bytes]] = encode_values
        self.decode: Callable[[bytes], Any] = decode_value
        self.describe_unkept: Callable[[Any], str | None] = describe_unkept


class _EachCodec:
    """A codec that takes one value at a time."""

    def __init__(self, kind: Kind) -> None:
        self._name = codec_name(kind)
        self.decode, self._encode = value_codec(kind)

    def encode_all(self, values: Collection[Any]) -> list[bytes]:
        """See `ValueCodec`."""
        try:
            return list(map(self._encode, values))
        except Exception as error:  # whatever a user's codec raises
            raise UnkeptError(describe_exception(error)) from error

    def describe_unkept(self, value: Any) -> str | None:
        """See `ValueCodec`."""
        try:
            self._encode(value)
        except Exception as error:  # noqa: BLE001  whatever a user's codec raises
            return bounded_text(f"{self._name} can't store the value: {describe_exception(error)}", 1_000)
        return None


class _ModelCodec(_EachCodec):
    """A model that is the same when decoded, or refused."""

    def __init__(self, codec: ModelCodec[Any]) -> None:
        super().__init__(codec)
        self._name = codec.model.__name__
        self.decode, self._encode = codec.decode_explained, codec.encode_state


class _MsgpackCodec(_EachCodec):
    """msgpack that is the same when decoded, or refused: it would turn tuples and sets into lists, and other
    types into text.
    """

    def encode_all(self, values: Collection[Any]) -> list[bytes]:
        """See `ValueCodec`."""
        encoded = super().encode_all(values)
        for value in values:
            if _find_changed(value):
                raise UnkeptError("a value would come back as something else")
        return encoded

    def describe_unkept(self, value: Any) -> str | None:
        """See `ValueCodec`."""
        problem = super().describe_unkept(value)
        if problem is None:
            changed = _find_changed(value)
            if changed is not None:
                problem = f"msgpack can't store a {type_name(changed)}: it would come back as something else"
        return problem


_MSGPACK_TYPES = frozenset({str, bytes, int, float, bool, type(None)})


def _find_changed(value: Any) -> type | None:
    """A type in `value` that msgpack decodes as another one."""
    kind = cast("type[Any]", type(value))
    if kind in _MSGPACK_TYPES:
        return None
    if kind is list:
        parts: Iterable[Any] = value
    elif kind is dict:
        parts = [*value.keys(), *value.values()]
    else:
        return kind
    for part in parts:
        changed = _find_changed(part)
        if changed is not None:
            return changed
    return None


def state_codec(kind: Kind) -> ValueCodec:
    """How values of that kind are stored."""
    if kind == "json":
        return _JsonCodec()
    if isinstance(kind, ModelCodec):
        return _ModelCodec(kind)
    return _MsgpackCodec(kind) if kind == "msgpack" else _EachCodec(kind)


def migrations_of(store: StateStore) -> Migrations:
    """How former entries of a declared state become those of its present version."""
    state = store.state
    return Migrations(
        store.name, state.version, state.migrations, lambda kind: state_codec(kind).decode, state.value_kind
    )


# --- tables -----------------------------------------------------------------------------------------------


def make_tables(
    store: StateStore, layers: Layers, prefix_of: Callable[[str], bytes], known: Mapping[str, EntryTable]
) -> list[EntryTable]:
    """The tables that a declared state needs and that aren't in `known` yet."""
    state = store.state
    made: dict[str, EntryTable] = {}

    def make(
        name: str,
        codec: ValueCodec,
        group_of: Callable[[bytes], bytes] | None = None,
        kind: type[EntryTable] = EntryTable,
    ) -> EntryTable:
        table = made[name] = kind(name, prefix_of(name), store.handler, layers, codec, group_of)
        return table

    kind = EntryTable if state.version == 1 else MigratingTable
    is_grouped = isinstance(state, MapState)
    entries = make(store.name, state_codec(state.value_kind), group_of_entry if is_grouped else None, kind)
    if isinstance(entries, MigratingTable):
        entries.migrate_with(migrations_of(store))
    if state.kind != "value":
        entries.key_text = _entry_text
    on_expired = None
    if state.kind == "list":
        on_expired = _shorten(make(store.bounds_name, state_codec("bytes")))
    if state.ttl_ms is not None:
        notes = make(store.times_name, state_codec("bytes"), _one_group)
        clock = known.get(store.clock_name) or make(store.clock_name, state_codec("int"))
        entries.expire_with(Expiry(state.ttl_ms, Clock(clock), entries, notes, on_expired))
    return list(made.values())


def make_timer_tables(
    store: TimerStore, layers: Layers, prefix_of: Callable[[str], bytes]
) -> list[EntryTable]:
    """The tables of a handler's timers; see `engine.timers`."""
    codec = state_codec("bytes")
    timers = EntryTable(store.name, prefix_of(store.name), store.handler, layers, codec)
    timers.key_text = _entry_text
    due_prefix = prefix_of(store.due_name)
    return [timers, EntryTable(store.due_name, due_prefix, store.handler, layers, codec, clock_of_due)]


def make_window_tables(
    store: WindowStore, layers: Layers, prefix_of: Callable[[str], bytes]
) -> list[EntryTable]:
    """The tables of a step's open windows; see `engine.windows`, `engine.sessions` and
    `engine.interval_notes`.
    """
    in_time = store.kind == "windows"
    codec = _RecordsCodec() if store.kind == "sliding" else state_codec("json")
    group_of = _one_group if in_time else None
    table = EntryTable(store.name, prefix_of(store.name), store.step, layers, codec, group_of)
    if in_time:
        table.key_text = _window_text
    notes, clock = state_codec("json" if in_time else "bytes"), state_codec("int")
    return [
        table,
        *(
            EntryTable(
                name,
                prefix_of(name),
                store.step,
                layers,
                clock if name == store.clock_name else notes,
                _one_group,
            )
            for name in store.store_names[1:]
        ),
        *([] if store.kind == "counted" else [_make_grace_table(store, layers, prefix_of)]),
    ]


def make_kept_table(
    store: TableStore, layers: Layers, prefix_of: Callable[[str], bytes], known: Mapping[str, EntryTable]
) -> list[EntryTable]:
    """The rows of a table, or what is kept for its groups, history or joins; see `engine.rows`. If it has a
    TTL: also its notes, and its clock. Nothing if it is in `known` already.
    """
    if store.name in known:
        return []
    if store.ttl_ms is not None:
        return _make_expiring_table(store, store.ttl_ms, layers, prefix_of, known)
    parts = store.name, prefix_of(store.name), store.table, layers
    if store.of == "groups":
        return [FollowedTable(*parts, state_codec("json"))]
    if store.of == "rows":
        return [RowTable(*parts, state_codec("bytes"))]
    groups = {
        "versions": group_of_entry,
        "due": _one_group,
        "times": _one_group,
        "subscribers": group_of_entry,
    }
    codec = state_codec("int" if store.of in ("clock", "count", "seen", "loaded") else "bytes")
    return [EntryTable(*parts, codec, groups.get(store.of))]


def _make_expiring_table(
    store: TableStore,
    ttl_ms: int,
    layers: Layers,
    prefix_of: Callable[[str], bytes],
    known: Mapping[str, EntryTable],
) -> list[EntryTable]:
    made: list[EntryTable] = []

    def further(of: TableStore) -> EntryTable:
        if of.name in known:
            return known[of.name]
        made.extend(make_kept_table(of, layers, prefix_of, known))
        return made[-1]

    kind = ExpiringRowTable if store.of == "rows" else EntryTable
    entries = kind(store.name, prefix_of(store.name), store.table, layers, state_codec("bytes"))
    notes, clock = further(TableStore(store.table, "times")), further(TableStore(store.clock, "clock"))
    entries.expire_with(Expiry(ttl_ms, Clock(clock), entries, notes))
    return [entries, *made]


class _RecordsCodec:
    """What `engine.pairs` and `engine.sliding` keep of records. It is of our own making, so nothing in it can
    be refused.
    """

    def __init__(self) -> None:
        self.decode: Callable[[bytes], Any] = decode_msgpack
        self._encode = value_codec("msgpack")[1]

    def encode_all(self, values: Collection[Any]) -> list[bytes]:
        """See `ValueCodec`."""
        return list(map(self._encode, values))

    def describe_unkept(self, value: Any) -> str | None:  # noqa: ARG002  required by the protocol
        """See `ValueCodec`."""
        return None


def make_pair_tables(store: PairStore, layers: Layers, prefix_of: Callable[[str], bytes]) -> list[EntryTable]:
    """The tables of a join of two streams; see `engine.pairs`."""
    sides = [
        EntryTable(name, prefix_of(name), store.step, layers, _RecordsCodec())
        for name in (store.left_name, store.right_name)
    ]
    for table in sides:
        table.key_text = _window_text
    due_prefix = prefix_of(store.due_name)
    due = EntryTable(store.due_name, due_prefix, store.step, layers, state_codec("bytes"), _one_group)
    return [*sides, due, _make_grace_table(store, layers, prefix_of)]


def _make_grace_table(
    store: WindowStore | PairStore, layers: Layers, prefix_of: Callable[[str], bytes]
) -> EntryTable:
    """What remembers the grace of a step; see `engine.grace`."""
    name = store.grace_name
    return EntryTable(name, prefix_of(name), store.step, layers, state_codec("json"))


def clock_of_due(due: bytes) -> bytes:
    """The clock that a key in the table of due timers begins with. Only timers of one clock are scanned at a
    time.
    """
    return due[:1]


def _one_group(_key: bytes) -> bytes:
    return b""


def _window_text(entry: bytes) -> str:
    return f"{bounded_repr(entry[TIME_BYTES:])}, window that ends at {decode_time(entry)}"


def _entry_text(entry: bytes) -> str:
    group = group_of_entry(entry)
    return f"{bounded_repr(key_of_group(group))}, entry {bounded_repr(entry[len(group) :])}"


def _shorten(bounds: EntryTable) -> Callable[[bytes], None]:
    """Lets a list begin after an element that was removed: elements expire from the first one on."""

    def shorten(element: bytes) -> None:
        key = key_of_group(element[:-_PLACE_BYTES])
        raw = bounds.get(key)
        if raw is ABSENT:
            return
        first, end = _BOUNDS.unpack(raw)
        place = int.from_bytes(element[-_PLACE_BYTES:], "big")
        if first <= place < end:
            _set_bounds(bounds, key, place + 1, end)

    return shorten


def _set_bounds(bounds: EntryTable, key: bytes, first: int, end: int) -> None:
    if first == end:
        bounds.delete(key)
    else:
        bounds.put(key, _BOUNDS.pack(first, end))


# --- what handlers get ------------------------------------------------------------------------------------


def make_access(
    store: StateStore, tables: Mapping[str, Any], here: Here
) -> ValueOfKey | MapOfKey | ListOfKey:
    """The object that the handler at `here` gets for a state that it declares.

    Args:
        tables: the shard's tables, by name.
    """
    entries = tables[store.name]
    state = store.state
    if isinstance(state, MapState):
        return MapOfKey(entries, here, *ordered_key(cast("MapState[Any, Any]", state).key))
    if state.kind == "list":
        return ListOfKey(entries, tables[store.bounds_name], here, can_expire=state.ttl is not None)
    return ValueOfKey(entries, here)


_VALUE, _MAP, _LIST = "ctx.value(STATE)", "ctx.map(STATE)", "ctx.list(STATE)"
_CALLED_HERE: Final = {
    _VALUE: {"delete": "clear()", "put": "set(value)", "update": "set(value)", "value": "get()"},
    _MAP: {
        "contains": "key in it",
        "delete": "del it[key]",
        "entries": "scan()",
        "put": "it[key] = value",
        "range": "scan(start, stop)",
        "remove": "del it[key]",
        "set": "it[key] = value",
    },
    _LIST: {"add": "append(value)", "add_all": "extend(values)", "get": "it[0], or list(it)"},
}
"""What states of other libraries have, and what it is here."""


def _hint(what: str, kind: type[object], name: str) -> str:
    """What to say to a handler that has asked a state of this kind for something that it doesn't have."""
    here = _CALLED_HERE[what].get(name)
    if here:
        return f"{what} has no {name!r}; here it is {here}"
    return f"{what} has no {name!r}; it has {', '.join(one for one in dir(kind) if not one.startswith('_'))}"


def _key_here(here: Here) -> bytes:
    key = here._key  # pyright: ignore[reportPrivateUsage]  a method call would cost time
    if key is None:
        raise RecordError("the record has no key, so it has no state; give it one with key_by() first")
    return key


class ValueOfKey(ValueAccess[Any]):
    """See `ValueAccess`."""

    __slots__ = ("_entries", "_here")

    def __init__(self, entries: EntryTable, here: Here) -> None:
        self._entries = entries
        self._here = here

    @staticmethod
    def hint_for(name: str) -> str:
        """See `steps.HasHints`."""
        return _hint(_VALUE, ValueAccess, name)

    def get(self, default: Any = None) -> Any:
        """See `ValueAccess`."""
        value = self._entries.get(_key_here(self._here))
        return default if value is ABSENT else value

    def set(self, value: Any) -> None:
        """See `ValueAccess`."""
        self._entries.put(_key_here(self._here), value)

    def clear(self) -> None:
        """See `ValueAccess`."""
        self._entries.delete(_key_here(self._here))


class MapOfKey(MapAccess[Any, Any]):
    """See `MapAccess`."""

    __slots__ = ("_decode", "_encode", "_entries", "_here")

    def __init__(
        self,
        entries: EntryTable,
        here: Here,
        encode: Callable[[Any], bytes],
        decode: Callable[[bytes], Any],
    ) -> None:
        self._entries = entries
        self._here = here
        self._encode = encode
        self._decode = decode

    @staticmethod
    def hint_for(name: str) -> str:
        """See `steps.HasHints`."""
        return _hint(_MAP, MapAccess, name)

    def __getitem__(self, key: Any) -> Any:
        value = self._entries.get(self._entry(key))
        if value is ABSENT:
            raise KeyError(key)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        self._entries.put(self._entry(key), value)

    def __delitem__(self, key: Any) -> None:
        entry = self._entry(key)
        if self._entries.get(entry) is ABSENT:
            raise KeyError(key)
        self._entries.delete(entry)

    def __contains__(self, key: object) -> bool:
        return self._entries.get(self._entry(key)) is not ABSENT

    def __iter__(self) -> Iterator[Any]:
        return (key for key, _ in self.scan())

    def __reversed__(self) -> Iterator[Any]:
        return (key for key, _ in self.scan(reverse=True))

    def __len__(self) -> int:
        return sum(1 for _ in self.scan())

    def __bool__(self) -> bool:
        return next(self.scan(), None) is not None

    def clear(self) -> None:
        """See `MapAccess`."""
        for entry, _ in self._entries.scan(*self._range(None, None)):
            self._entries.delete(entry)

    def scan(
        self, start: Any = None, stop: Any = None, *, reverse: bool = False
    ) -> Iterator[tuple[Any, Any]]:
        """See `MapAccess`."""
        # Errors in the bounds are raised here, and not when the first entry is read.
        first, end = self._range(start, stop)
        return self._scan(first, end, reverse=reverse)

    def _scan(self, first: bytes, end: bytes, *, reverse: bool) -> Iterator[tuple[Any, Any]]:
        length = len(group_of_entry(first))
        decode = self._decode
        for entry, value in self._entries.scan(first, end, reverse=reverse):
            yield decode(entry[length:]), value

    def _range(self, start: Any, stop: Any) -> tuple[bytes, bytes]:
        group = group_of_key(_key_here(self._here))
        first = group if start is None else group + self._encode(start)
        return first, end_of_prefix(group) if stop is None else group + self._encode(stop)

    def _entry(self, key: Any) -> bytes:
        return group_of_key(_key_here(self._here)) + self._encode(key)


class ListOfKey(ListAccess[Any]):
    """See `ListAccess`."""

    __slots__ = ("_bounds", "_can_expire", "_entries", "_here")

    def __init__(self, entries: EntryTable, bounds: EntryTable, here: Here, *, can_expire: bool) -> None:
        self._entries = entries
        self._bounds = bounds
        self._here = here
        self._can_expire = can_expire

    @staticmethod
    def hint_for(name: str) -> str:
        """See `steps.HasHints`."""
        return _hint(_LIST, ListAccess, name)

    def append(self, value: Any) -> None:
        """See `ListAccess`."""
        key, first, end = self._extent()
        self._entries.put(_element(key, end), value)
        _set_bounds(self._bounds, key, first, end + 1)

    def extend(self, values: Iterable[Any]) -> None:
        """See `ListAccess`."""
        for value in values:
            self.append(value)

    def pop(self) -> Any:
        """See `ListAccess`."""
        key, first, end = self._extent(not_empty=True)
        value = self._take(key, end - 1)
        _set_bounds(self._bounds, key, first, end - 1)
        return value

    def popleft(self) -> Any:
        """See `ListAccess`."""
        key, first, end = self._extent(not_empty=True)
        value = self._take(key, first)
        _set_bounds(self._bounds, key, first + 1, end)
        return value

    def clear(self) -> None:
        """See `ListAccess`."""
        key, first, end = self._extent()
        for place in range(first, end):
            self._entries.delete(_element(key, place))
        self._bounds.delete(key)

    def __len__(self) -> int:
        _, first, end = self._extent()
        return end - first

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        key, first, end = self._extent()
        if isinstance(index, slice):
            places = range(first, end)[index]
            return list(self._elements(key, places))
        return self._entries.get(_element(key, _place(index, first, end)))

    def __setitem__(self, index: int, value: Any) -> None:
        key, first, end = self._extent()
        element = _element(key, _place(index, first, end))
        self._entries.get(element)
        self._entries.replace(element, value)

    def __iter__(self) -> Iterator[Any]:
        key, first, end = self._extent()
        return self._elements(key, range(first, end))

    def __reversed__(self) -> Iterator[Any]:
        key, first, end = self._extent()
        return self._elements(key, range(first, end)[::-1])

    def _elements(self, key: bytes, places: range) -> Iterator[Any]:
        for begin in range(0, len(places), _LOAD_CHUNK):
            elements = [_element(key, place) for place in places[begin : begin + _LOAD_CHUNK]]
            self._entries.load_many(elements)
            for element in elements:
                value = self._entries.get(element)
                if value is not ABSENT:  # removed since the loop began
                    yield value

    def _take(self, key: bytes, place: int) -> Any:
        element = _element(key, place)
        value = self._entries.get(element)
        self._entries.delete(element)
        return value

    def _extent(self, *, not_empty: bool = False) -> tuple[bytes, int, int]:
        """The key, the first place, and the place after the last one."""
        key = _key_here(self._here)
        raw = self._bounds.get(key)
        first, end = (0, 0) if raw is ABSENT else _BOUNDS.unpack(raw)
        if self._can_expire and first < end:
            begin = first
            # Elements expire in the order in which they were appended.
            while first < end and self._entries.get(_element(key, first)) is ABSENT:
                self._entries.delete(_element(key, first))
                first += 1
            if begin < first:
                _set_bounds(self._bounds, key, first, end)
                if first == end:
                    first = end = 0
        if not_empty and first == end:
            raise IndexError("the list is empty")
        return key, first, end


def _element(key: bytes, place: int) -> bytes:
    return group_of_key(key) + place.to_bytes(_PLACE_BYTES, "big")


def _place(index: int, first: int, end: int) -> int:
    place = index + (first if index >= 0 else end)
    if not first <= place < end:
        raise IndexError(f"the list has {end - first} elements, but no number {index}")
    return place
