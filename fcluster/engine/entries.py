"""A table with many entries for each key of the stream. Values, maps and lists are kept in it.

Responsible for: the live entries of one store of one shard, their undo, the changes of an epoch, ordered
scans through all layers, and the removal of expired entries. It uses the same layers as `state.StateTable`;
see `state` for them.

An entry is a key (bytes, sorted) and a decoded value. `get` and `scan` return live values: if a dict or list
is changed in place, that is noticed at the barrier, as with `ctx.state`. A value that can't be changed in
place (text, numbers, bytes) is encoded only if it was put.

Invariants:
- A scan returns each entry that exists when the scan reaches its key, in the order of keys, whichever layer
  holds it. The result doesn't depend on where barriers fell, or on what was written to the store.
- Whether an entry is expired depends only on what was read: it is if `time of its put + TTL <= clock`. The
  clock is the greatest timestamp of the records that its handler was called with. An expired entry is
  invisible.
- Expired entries are deleted by `settle`, before the barrier. Like every change, the deletion is in the delta
  (invariant 6).

An encoded entry consists of a mark, the time of its put (if the store has a TTL), and the value. It is never
empty, because an empty one means deleted.

    0 | value                          without TTL
    1 | time (8 bytes) | value         with TTL
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from itertools import islice
from typing import Any, Final, NoReturn, Protocol, cast

from fcluster.common.errors import ProcessingError, failure_of
from fcluster.common.failures import bounded_repr
from fcluster.engine.failure import UnkeptStateError
from fcluster.engine.memory import MeanBytes
from fcluster.engine.ordered_keys import TIME_BYTES, decode_time, encode_time
from fcluster.engine.values import UnkeptError
from fcluster.graph.typed import TYPED, TYPES_TEXT

DELETED = b""
SCAN_CHUNK_MIN = 16
SCAN_CHUNK_MAX = 1_024
EXPIRED_PER_EPOCH_MAX = 10_000
"""How many entries are examined for removal before one barrier, so that a barrier doesn't take longer when
many have expired. The rest follows in later epochs; expired entries are invisible until then, too.
"""
FORGOTTEN_PER_EPOCH = 1_000
"""About how many keys that a write of the store has caught up with are forgotten at one barrier. That write
may have had the changes of a hundred epochs, and a barrier isn't to take longer because of it. If an epoch
changes more keys than that, twice as many are forgotten, so they don't pile up.
"""
TIME_STEPS = 8
"""If an entry is put again and again, it is noted again at most this often within its TTL."""


class Mark(Enum):
    """The type of `ABSENT`."""

    ABSENT = "absent"
    UNKNOWN = "unknown"


ABSENT: Final = Mark.ABSENT
"""There is no such entry."""
_UNKNOWN: Final = Mark.UNKNOWN

_UNCHANGING = frozenset({str, bytes, int, float, bool, type(None), Mark, *TYPED})
"""Values of these types can't be changed in place."""
_REBUILT_AT = 64
"""A list of keys is rebuilt when more than one key in this many is removed."""
PLAIN = b"\x00"
TIMED = b"\x01"
"""The marks with which an encoded entry begins."""
VALUE_AT = 1 + TIME_BYTES
"""Where the value of an entry with a TTL begins."""


class ValueCodec(Protocol):
    """How a store encodes its values."""

    def encode_all(self, values: Collection[Any], /) -> list[bytes]:
        """The encoded values, in order. Raises UnkeptError if one can't be stored."""
        ...

    def decode(self, raw: bytes, /) -> Any:
        """Decode one value."""
        ...

    def describe_unkept(self, value: Any, /) -> str | None:
        """Why `value` can't be stored. None if it can."""
        ...


class Layers(Protocol):
    """The layers below a table, as far as the table needs them. Implemented by `state.ShardState`."""

    def read(self, key: bytes) -> bytes | None:
        """The encoded value below the live entries. None or empty if there is none."""
        ...

    def read_many(self, keys: list[bytes]) -> list[bytes | None]:
        """Like `read`, for many keys."""
        ...

    def scan_store(
        self, start: bytes, stop: bytes, limit: int, *, reverse: bool
    ) -> list[tuple[bytes, bytes]]:
        """The store's own entries from `start` up to `stop`, in order or backwards, at most `limit`."""
        ...

    def written_epoch(self) -> int:
        """The last epoch whose changes are all in the store."""
        ...


class EntryTable:
    """The entries of one store of one shard.

    Args:
        name: the store's name.
        prefix: the prefix of its keys in the layers below.
        step: the name of the handler that has it.
        layers: the layers below it.
        codec: the codec of its values.
        group_of: returns the group that a key belongs to, for tables that are scanned. A scan stays within
            one group.

    Attributes:
        key_text: shows a key in messages.
        describe_unkept: why a value can't be stored; see `ValueCodec`.
        mean_bytes: what an entry takes in memory.
    """

    __slots__ = (
        "_below",
        "_clean",
        "_codec",
        "_epochs",
        "_frozen",
        "_group_of",
        "_groups",
        "_groups_open",
        "_images",
        "_layers",
        "_open",
        "_times",
        "_ttl",
        "describe_unkept",
        "key_text",
        "mean_bytes",
        "name",
        "prefix",
        "step",
    )

    mark = PLAIN
    """What entries without a TTL begin with."""
    timed_mark = TIMED
    """What those with a TTL begin with, before their time."""
    version = b""
    """What they have after it; see `engine.migrating`."""

    def __init__(
        self,
        name: str,
        prefix: bytes,
        step: str,
        layers: Layers,
        codec: ValueCodec,
        group_of: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self.name = name
        self.prefix = prefix
        self.step = step
        self.key_text: Callable[[bytes], str] = bounded_repr
        self.describe_unkept: Callable[[Any], str | None] = codec.describe_unkept
        self.mean_bytes = MeanBytes()
        self._layers = layers
        self._codec = codec
        self._group_of = group_of
        self._ttl: Expiry | None = None
        self._open: dict[bytes, Any] = {}
        self._clean: dict[bytes, Any] = {}
        # For keys in memory: their value in the layers below, if it is known. Empty: they have no entry
        # there.
        self._below: dict[bytes, bytes] = {}
        # For entries in memory, with a TTL: when they were put.
        self._times: dict[bytes, int] = {}
        self._images: dict[bytes, tuple[Any, int]] | None = None
        # By group: the sorted keys whose newest value may not be in the store. Extra keys do no harm.
        self._groups: dict[bytes, list[bytes]] = {}
        self._groups_open: set[bytes] = set()
        self._epochs: dict[bytes, int] = {}
        self._frozen: deque[tuple[int, list[bytes]]] = deque()

    def expire_with(self, expiry: Expiry) -> None:
        """Give its entries a TTL. Call it once, before anything else."""
        self._ttl = expiry

    # --- for handlers ---------------------------------------------------------------------------------

    def get(self, key: bytes) -> Any:
        """The live value of `key`, or `ABSENT`."""
        value = self._open.get(key, _UNKNOWN)
        if value is _UNKNOWN:
            value = self._clean.pop(key, _UNKNOWN)
            if value is _UNKNOWN:
                value = self._take(key, self._layers.read(self.prefix + key))
            if type(value) in _UNCHANGING:
                self._clean[key] = value
            else:
                if self._images is not None and key not in self._images:
                    self._images[key] = (_UNKNOWN, 0)
                self._open[key] = value
        elif self._images is not None and key not in self._images and type(value) not in _UNCHANGING:
            self._remember(key)
        if self._ttl is not None and value is not ABSENT and self._ttl.is_over(self._times[key]):
            return ABSENT
        return value

    def put(self, key: bytes, value: Any) -> None:
        """Make `value` the entry of `key`, with the present time."""
        self._replace(key, value)
        if self._ttl is not None:
            self._times[key] = self._ttl.now_ms()

    def put_at(self, key: bytes, value: Any, time_ms: int) -> None:
        """Like `put`, with this time if it is later than the present one."""
        self.put(key, value)
        if self._ttl is not None:
            self._times[key] = max(time_ms, self._times[key])

    def put_new(self, key: bytes, value: Any) -> None:
        """Like `put`, for a `key` that is known to have no entry. If it is deleted in the same epoch, nothing
        of it is written.
        """
        if key not in self._open:
            self._below[key] = DELETED
        self.put(key, value)

    def replace(self, key: bytes, value: Any) -> None:
        """Like `put`, for a `key` that `get` has just returned. With a TTL, its time doesn't change."""
        self._replace(key, value)

    def delete(self, key: bytes) -> None:
        """Remove the entry of `key`, if it has one."""
        self._replace(key, ABSENT)

    def scan(self, start: bytes, stop: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, Any]]:
        """The entries from `start` up to `stop`, in order or backwards. Both must be in one group.

        Entries may be put and deleted during the scan: each entry is returned as it is when the scan reaches
        it.
        """
        for key, stored in self._scan_keys(start, stop, reverse=reverse):
            value = self.get(key) if stored is None else self._get_stored(key, stored)
            if value is not ABSENT:
                yield key, value

    def load_many(self, keys: Collection[bytes]) -> None:
        """Bring the entries of `keys` into memory. Unknown ones take one read of the store."""
        cold = [key for key in keys if key not in self._open and key not in self._clean]
        if cold:
            prefix = self.prefix
            found = self._layers.read_many([prefix + key for key in cold])
            for key, raw in zip(cold, found, strict=True):
                self._clean[key] = self._take(key, raw)

    def begin_undo(self) -> None:
        """Begin a record whose changes may have to be undone. The record before it can no longer be
        undone.
        """
        if self._images is None:
            self._images = {}
        else:
            self._images.clear()

    def rollback(self) -> None:
        """Undo what the record changed since `begin_undo`."""
        images = self._images or {}
        for key, (image, time_ms) in images.items():
            if image is _UNKNOWN:
                # It wasn't in the open layer, so the value in the layers below is valid again.
                self._open.pop(key, None)
                self.forget(key)
                continue
            if type(image) is list:
                image = self._codec.decode(cast("list[bytes]", image)[0])
            self._open[key] = image
            if self._ttl is not None:
                self._times[key] = time_ms
        images.clear()

    def end_undo(self) -> None:
        """Keep what the record changed."""
        self._images = None

    def check_changed(self) -> None:
        """Raise ProcessingError if something that the record changed since `begin_undo` can't be stored."""
        images = self._images or ()
        live = {key: value for key in images if (value := self._open.get(key, ABSENT)) is not ABSENT}
        if not live:
            return  # most timers delete what they touch, and encoding nothing isn't free
        try:
            self._codec.encode_all(live.values())
        except UnkeptError:
            self._raise_first_unkept(live)

    # --- for ShardState -------------------------------------------------------------------------------

    def counts(self) -> tuple[int, int]:
        """(open, clean) entries in memory."""
        return len(self._open), len(self._clean)

    def settle(self) -> None:
        """Delete expired entries, and note when new ones will expire. Called before the open epoch ends."""
        if self._ttl is not None:
            for key, value in self._open.items():
                if value is not ABSENT:
                    below = self._below.get(key)
                    before = decode_time(below[1:VALUE_AT]) if below else None
                    self._ttl.note(key, self._times[key], before)
            self._ttl.expire()

    def time_of(self, key: bytes) -> int | None:
        """When the entry of `key` was put, even if it is expired. None if there is none."""
        if key not in self._open and key not in self._clean:
            self.load_many([key])
        value = self._open.get(key, _UNKNOWN)
        if value is _UNKNOWN:
            value = self._clean[key]
        return None if value is ABSENT else self._times[key]

    def encode_touched(self) -> dict[bytes, bytes]:
        """The changes of the open epoch, by key. Changes nothing itself.

        Raises:
            ProcessingError: a value can't be stored.
        """
        opened = self._open
        if not opened:
            return {}
        live = {key: value for key, value in opened.items() if value is not ABSENT}
        try:
            values = self._codec.encode_all(live.values())
        except UnkeptError:
            self._raise_first_unkept(live)
        below, mark, timed_mark, version = self._below, self.mark, self.timed_mark, self.version
        changed: dict[bytes, bytes] = {}
        for key, raw in zip(live, values, strict=True):
            if self._ttl is None:
                encoded = mark + raw
            else:
                encoded = timed_mark + encode_time(self._times[key]) + version + raw
            if below.get(key) != encoded:
                changed[key] = encoded
        if len(live) < len(opened):
            for key, value in opened.items():
                if value is ABSENT and below.get(key) != DELETED:
                    changed[key] = DELETED
        return changed

    def close_epoch(self, changed: Mapping[bytes, bytes], epoch: int) -> None:
        """The open layer was frozen: its entries are clean now, and equal to `changed` and the layers
        below.
        """
        self._below.update(changed)
        for key, value in islice(self._open.items(), 1):
            self.mean_bytes.sample(key, value, self._below.get(key))
        self._clean.update(self._open)
        self._open.clear()
        self._images = None
        if self._group_of is None:
            return
        if changed:
            noted = self._groups_open
            for key in changed:
                if key not in noted:  # it was changed in place
                    self._note_group(key)
            self._epochs.update(dict.fromkeys(changed, epoch))
            self._frozen.append((epoch, list(changed)))
        self._forget_groups(self._groups_open)
        self._groups_open.clear()
        written = self._layers.written_epoch()
        done: list[bytes] = []
        done_max = max(FORGOTTEN_PER_EPOCH, 2 * len(changed))
        while self._frozen and self._frozen[0][0] <= written and len(done) < done_max:
            frozen_epoch, keys = self._frozen.popleft()
            for key in keys:
                if self._epochs.get(key) == frozen_epoch:
                    del self._epochs[key]
                    done.append(key)
        if done:
            self._forget_groups(done)

    def forget_touched(self) -> None:
        """Drop the open layer."""
        for key in self._open:
            self._below.pop(key, None)
            self._times.pop(key, None)
        self._open.clear()
        self._images = None
        self._forget_groups(self._groups_open)
        self._groups_open.clear()
        if self._ttl is not None:
            self._ttl.fall_back()

    def forget(self, key: bytes) -> None:
        """Drop a key from memory if it isn't touched."""
        self._clean.pop(key, None)
        self._below.pop(key, None)
        self._times.pop(key, None)

    def evict(self, entries: int) -> None:
        """Drop the `entries` clean ones that were unused for the longest time."""
        for key in [key for _, key in zip(range(entries), self._clean, strict=False)]:
            self.forget(key)

    # --- within ---------------------------------------------------------------------------------------

    def _replace(self, key: bytes, value: Any) -> None:
        if self._images is not None and key not in self._images:
            self._remember(key)
        if key not in self._open:
            self._clean.pop(key, None)
            if self._group_of is not None:
                self._note_group(key)
        self._open[key] = value

    def _remember(self, key: bytes) -> None:
        """Keep the open layer's value of `key`, for `rollback`."""
        value = self._open.get(key, _UNKNOWN)
        if type(value) not in _UNCHANGING:
            try:
                # In a list, to distinguish it from a value that is bytes.
                value = self._codec.encode_all([value])
            except UnkeptError:
                raise UnkeptStateError(failure_of(self._unkept(key, value)), self.step) from None
        assert self._images is not None
        self._images[key] = (value, self._times.get(key, 0))

    def _get_stored(self, key: bytes, stored: bytes) -> Any:
        """Like `get`, for a key whose newest frozen value is in the store."""
        if key not in self._open and key not in self._clean:
            value = self._take(key, stored)
            if type(value) in _UNCHANGING:
                # It isn't kept in memory, because a scan may go through all entries.
                is_over = self._ttl is not None and self._ttl.is_over(self._times[key])
                self.forget(key)
                return ABSENT if is_over else value
            self._clean[key] = value
        return self.get(key)

    def _take(self, key: bytes, raw: bytes | None) -> Any:
        """Decode an entry, and note the value below."""
        if not raw:
            self._below[key] = DELETED
            return ABSENT
        self._below[key] = raw
        if raw[:1] == TIMED:
            self._times[key] = decode_time(raw[1:VALUE_AT])
            return self._codec.decode(raw[VALUE_AT:])
        return self._codec.decode(raw[1:])

    def _scan_keys(self, start: bytes, stop: bytes, *, reverse: bool) -> Iterator[tuple[bytes, bytes | None]]:
        """The keys in the range that may have an entry, each with the encoded entry if the store has the
        newest one.
        """
        assert self._group_of is not None
        group = self._group_of(start)
        chunk: deque[tuple[bytes, bytes]] = deque()
        limit, more = SCAN_CHUNK_MIN, True
        frozen_until = self._layers.written_epoch() if not self._frozen else self._frozen[-1][0]
        while True:
            if more and not chunk:
                chunk.extend(self._read_chunk(start, stop, limit, reverse=reverse))
                more, limit = len(chunk) == limit, min(4 * limit, SCAN_CHUNK_MAX)
            # The list may have grown or been replaced since the last key.
            noted = self._groups.get(group, ())
            key = _nearest(noted, start, stop, reverse=reverse)
            stored: bytes | None = None
            if chunk:
                first = chunk[0][0]
                if key is None or (first > key if reverse else first < key):
                    key, stored = chunk.popleft()
                elif first == key:
                    chunk.popleft()
            if key is None:
                return
            yield key, stored
            if self._frozen and self._frozen[-1][0] > frozen_until:
                raise RuntimeError("a scan of a state can't continue after the record that began it")
            if reverse:
                stop = key
            else:
                start = key + b"\x00"

    def _read_chunk(
        self, start: bytes, stop: bytes, limit: int, *, reverse: bool
    ) -> list[tuple[bytes, bytes]]:
        if start >= stop:
            return []
        prefix = self.prefix
        found = self._layers.scan_store(prefix + start, prefix + stop, limit, reverse=reverse)
        length = len(prefix)
        return [(key[length:], raw) for key, raw in found]

    def _note_group(self, key: bytes) -> None:
        assert self._group_of is not None
        group = self._group_of(key)
        noted = self._groups.get(group)
        if noted is None:
            self._groups[group] = [key]
        else:
            at = bisect_left(noted, key)
            if at < len(noted) and noted[at] == key:
                return
            noted.insert(at, key)
        self._groups_open.add(key)

    def _forget_groups(self, keys: Collection[bytes]) -> None:
        """Remove keys from the groups if the store has their newest value."""
        if self._group_of is None:
            return
        gone: dict[bytes, set[bytes]] = {}
        for key in keys:
            if key not in self._epochs and key not in self._open:
                gone.setdefault(self._group_of(key), set()).add(key)
        for group, members in gone.items():
            noted = self._groups.get(group)
            if noted is None:
                continue
            if len(members) * _REBUILT_AT > len(noted):
                # Removing keys one by one would move all keys after each of them, and a batch of the store
                # may have many.
                noted[:] = [key for key in noted if key not in members]
            else:
                for key in members:
                    at = bisect_left(noted, key)
                    if at < len(noted) and noted[at] == key:
                        del noted[at]
            if not noted:
                del self._groups[group]

    def _raise_first_unkept(self, live: Mapping[bytes, Any]) -> NoReturn:
        for key, value in live.items():
            if self.describe_unkept(value) is not None:
                raise self._unkept(key, value)
        raise AssertionError(f"store {self.name!r}: a value can't be stored, but no single one causes it")

    def _unkept(self, key: bytes, value: Any) -> ProcessingError:
        return ProcessingError(
            f"store {self.name!r}, key {self.key_text(key)}: {self.describe_unkept(value)}",
            remedy=_OF_AGGREGATES if "//" in self.name else _OF_STATES,
        )


_OF_STATES = "Convert such values before you put them into the state, or give the state another codec."
_OF_AGGREGATES = (
    "What an aggregate keeps is saved as JSON: numbers, text, lists, dicts with text as keys, booleans, "
    f"None, and {TYPES_TEXT}. Let its functions return that, or give the step an on_error."
)


def _nearest(keys: Collection[bytes], start: bytes, stop: bytes, *, reverse: bool) -> bytes | None:
    """The first of the ordered `keys` in the range, or the last one if `reverse`."""
    if not keys:
        return None
    assert isinstance(keys, list)
    at = bisect_left(keys, stop) - 1 if reverse else bisect_left(keys, start)
    if not 0 <= at < len(keys):
        return None
    key: bytes = keys[at]
    return key if start <= key < stop else None


class Clock:
    """The greatest timestamp of the records that a handler was called with. It is state, because expiry
    depends on it.

    Args:
        table: its own store.
    """

    def __init__(self, table: EntryTable) -> None:
        self._table = table

    def advance(self, time_ms: int) -> None:
        """Note the timestamp of a record. The clock never goes back."""
        if time_ms > self.now_ms():
            self._table.put(b"", time_ms)

    def now_ms(self) -> int:
        """Milliseconds since 1970. 0 before the first record that has a timestamp."""
        time_ms = self._table.get(b"")
        return 0 if time_ms is ABSENT else time_ms


class Expiry:
    """The TTL of one table: it knows what is expired, and finds it without looking at every entry.

    For each entry there is a note in a table ordered by time. A note's time is the time of the put, rounded
    up to a multiple of the TTL divided by `TIME_STEPS`. If an entry is put again within such a step, it needs
    no further note. If its entry was put later, a note is written anew when it is due, so the TTL may change
    between two runs.

    Args:
        ttl_ms: how long an entry is kept.
        clock: the handler's clock.
        entries: the table.
        notes: the table of notes, whose keys are all in one group.
        on_expired: called with the key of each entry that was removed.
    """

    def __init__(
        self,
        ttl_ms: int,
        clock: Clock,
        entries: EntryTable,
        notes: EntryTable,
        on_expired: Callable[[bytes], None] | None = None,
    ) -> None:
        self._ttl_ms = ttl_ms
        self._step_ms = max(1, ttl_ms // TIME_STEPS)
        self._entries = entries
        self._notes = notes
        self._on_expired = on_expired
        # There is no note of an earlier time. A search from the beginning would have to skip all notes that
        # RocksDB holds as deleted.
        self._begin_ms = 0
        self.now_ms = clock.now_ms

    def is_over(self, put_ms: int) -> bool:
        """Whether an entry that was put at this time is expired."""
        return put_ms + self._ttl_ms <= self.now_ms()

    def note(self, key: bytes, put_ms: int, before_ms: int | None) -> None:
        """Note an entry of the open epoch. `before_ms`: when the entry that it replaces was put."""
        step_ms = self._rounded(put_ms)
        if before_ms is None or self._rounded(before_ms) != step_ms:
            self._notes.put(encode_time(step_ms) + key, b"")

    def expire(self) -> None:
        """Delete the expired entries, those with the oldest notes first."""
        due_ms = self.now_ms() - self._ttl_ms
        if due_ms < 0:
            return
        notes = self._notes
        found = notes.scan(encode_time(self._begin_ms), encode_time(due_ms + 1))
        due = [note for note, _ in islice(found, EXPIRED_PER_EPOCH_MAX)]
        # Entries that are put from now on get notes of later times, which aren't due.
        self._begin_ms = due_ms + 1 if len(due) < EXPIRED_PER_EPOCH_MAX else decode_time(due[-1])
        if not due:
            return
        self._entries.load_many(list(dict.fromkeys(note[TIME_BYTES:] for note in due)))
        for note in due:
            notes.delete(note)
            key = note[TIME_BYTES:]
            put_ms = self._entries.time_of(key)
            if put_ms is None:
                continue
            if put_ms <= due_ms:
                self._entries.delete(key)
                if self._on_expired is not None:
                    self._on_expired(key)
            else:
                self.note(key, put_ms, None)

    def fall_back(self) -> None:
        """Uncommitted changes are dropped, so notes that were deleted exist again."""
        self._begin_ms = 0

    def _rounded(self, time_ms: int) -> int:
        return -(-time_ms // self._step_ms) * self._step_ms
