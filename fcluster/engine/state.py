"""The memory layers of a shard's state, above the store.

Responsible for: the live state of each key, the changes of an epoch, and the changes that the store doesn't
have yet. Invariant 3: the store holds only committed state. So a change is written to the store only after
`commit`. Must not know Kafka, RocksDB, threads or the clock: times are passed in.

The layers, newest first. A read uses the first layer that has the key:

    open       `touched`: the live dicts that handlers got since the last barrier
    clean      live dicts of earlier epochs, equal to what the layers below say; bounded (`memory`)
    prepared   encoded changes of an epoch that was frozen and isn't committed yet
    pending    encoded changes of committed epochs, merged, waiting to be written together
    writing    a batch on its way to the store; readable here until it is done
    store      RocksDB

There are two kinds of tables on these layers: `StateTable`, here, for `ctx.state`, and `entries.EntryTable`,
for the states that a handler declares (`kinds`).

In a StateTable, a key's state in one store is one dict. `StateTable.get` returns the live dict itself and
counts the key as touched, so a nested value that is changed in place is never lost. At the barrier, each
touched dict is encoded once, however often it changed, and compared with its former value. An empty dict
means that the key is deleted. A handler must not keep the dict beyond its record: a change without a `get`
before it isn't noticed.

Threads: two may use a ShardState at the same time, without a lock. The commit thread calls only `commit` and
`flush`; the main thread calls the rest. That is safe because only the main thread reads, it reads the layers
from top to bottom, and the commit thread adds changes to a lower layer before it removes them from the upper
one. `discard` may only be called while the commit thread is idle.
"""

from __future__ import annotations

import marshal
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from math import ceil
from typing import NamedTuple, NoReturn, Protocol, cast

from fcluster.common.errors import JobError, ProcessingError
from fcluster.common.failures import bounded_repr
from fcluster.engine.changelog import Delta
from fcluster.engine.entries import EntryTable
from fcluster.engine.kinds import (
    make_kept_table,
    make_pair_tables,
    make_tables,
    make_timer_tables,
    make_window_tables,
    migrations_of,
)
from fcluster.engine.memory import MeanBytes, StateMemory
from fcluster.engine.migrating import PLAIN_VERSIONED, VERSION_BYTES, Migrations
from fcluster.engine.steps import RecordError
from fcluster.engine.values import (
    KEPT,
    TYPED_MARK,
    State,
    UnkeptError,
    decode_state,
    describe_unkept,
    encode_states,
)
from fcluster.graph.joins import PairStore
from fcluster.graph.stages import AnyStore
from fcluster.graph.states import DocumentState, StateStore
from fcluster.graph.tables import TableStore
from fcluster.graph.timers import TimerStore
from fcluster.graph.windows import WindowStore

STORE_PREFIX_BYTES = 4
DELETED = b""
"""The encoded value of a deleted key."""


class StoreMeta(NamedTuple):
    """The position of a store.

    Attributes:
        state_epoch: the last epoch whose changes it holds, 0 if none.
        changelog_offset: of the next changelog record to apply.
        changelog_id: the identity of the changelog topic that `changelog_offset` belongs to; "" if unknown.
    """

    state_epoch: int = 0
    changelog_offset: int = 0
    changelog_id: str = ""


class Store(Protocol):
    """The store below the layers, as far as they need it. A read may overlap a write of another thread."""

    def meta(self) -> StoreMeta:
        """Its position."""
        ...

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`. None if it has none."""
        ...

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """The values of `keys`, in their order."""
        ...

    def scan(self, start: bytes, stop: bytes, limit: int, *, reverse: bool) -> list[tuple[bytes, bytes]]:
        """The entries from `start` up to but not including `stop`, in the order of their bytes or backwards,
        at most `limit`. Only tables that are scanned use it.
        """
        ...

    def apply(self, changes: Mapping[bytes, bytes], meta: StoreMeta) -> None:
        """Write `changes` (an empty value deletes) and `meta`. If the process dies meanwhile, the store has
        all of it or nothing of it, or can't be used any more.
        """
        ...


class FlushLimits(NamedTuple):
    """When committed changes are written to the store: whichever limit is reached first."""

    entries_max: int = 5_000
    bytes_max: int = 8 * 1024 * 1024
    age_ms_max: float = 1000.0


def _clean_bytes(table: StoreTable) -> int:
    """What the clean entries of `table` take in memory."""
    return int(table.counts()[1] * table.mean_bytes.value)


def store_prefix(name: str) -> bytes:
    """The prefix of all keys of the store `name`. It depends only on the name, so stores can be added and
    removed.
    """
    return blake2b(name.encode(), digest_size=STORE_PREFIX_BYTES).digest()


class StoreTable(Protocol):
    """What every kind of table offers `ShardState`, and the engine (`context.AnyTable`).

    A handler touches entries. At the barrier, changes are encoded and the epoch is closed. The changes of a
    failed record are undone, and uncommitted ones are dropped. Another kind of state is another class with
    these methods.

    Attributes:
        name: the store's name.
        step: the name of the step, which is the handler's.
        prefix: the prefix of its keys in the layers below.
        mean_bytes: what an entry takes in memory.
    """

    name: str
    step: str
    prefix: bytes
    mean_bytes: MeanBytes

    def begin_undo(self) -> None:
        """Begin a record whose changes may have to be undone. The record before it can no longer be
        undone.
        """
        ...

    def rollback(self) -> None:
        """Undo what the record changed since `begin_undo`."""
        ...

    def end_undo(self) -> None:
        """Keep what the record changed: the record is through."""
        ...

    def check_changed(self) -> None:
        """Raise ProcessingError if something that the record changed since `begin_undo` can't be stored."""
        ...

    def counts(self) -> tuple[int, int]:
        """(open, clean) entries in memory."""
        ...

    def encode_touched(self) -> dict[bytes, bytes]:
        """The changes of the open epoch, by key without prefix; `DELETED` for deleted keys. Changes nothing.

        Raises:
            ProcessingError: a value can't be stored.
        """
        ...

    def close_epoch(self, changed: Mapping[bytes, bytes], epoch: int) -> None:
        """The open layer was frozen as `epoch`: what was open is clean now."""
        ...

    def forget_touched(self) -> None:
        """Drop the open layer."""
        ...

    def forget(self, key: bytes) -> None:
        """Drop a key from memory if it isn't open."""
        ...

    def evict(self, entries: int) -> None:
        """Drop the `entries` clean ones that were unused for the longest time."""
        ...


@dataclass(frozen=True, slots=True)
class _Layer:
    """A frozen epoch that isn't committed yet."""

    epoch: int
    changes: Mapping[bytes, bytes]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """Committed changes on their way to the store. Immutable."""

    changes: Mapping[bytes, bytes]
    meta: StoreMeta


class StateTable:
    """The state of one store of one shard: a dict for each key.

    Attributes:
        name: the store's name.
        step: the name of the step, which is the handler's.
        mean_bytes: what a live dict takes in memory.
        touched: key -> live dict of the keys touched in the open epoch. It stays the same object, so a caller
            that uses no undo may bind `touched.get` once, and call `get` only if that returns None.
    """

    __slots__ = (
        "_begin",
        "_clean",
        "_encoded",
        "_images",
        "_migrations",
        "_shard",
        "mean_bytes",
        "name",
        "prefix",
        "step",
        "touched",
    )

    def __init__(self, name: str, shard: ShardState) -> None:
        self.name = self.step = name
        self.mean_bytes = MeanBytes()
        self.touched: dict[bytes, State] = {}
        self.prefix = store_prefix(name)
        self._shard = shard
        self._clean: dict[bytes, State] = {}
        # The values of the live dicts, touched or clean, when they were last equal to the layers below.
        self._encoded: dict[bytes, bytes] = {}
        # While undo is on: the values of the dicts when the record first saw them.
        self._images: dict[bytes, bytes] | None = None
        # With versions: what an encoded dict of the present one begins with, before the JSON.
        self._begin = b""
        self._migrations: Migrations | None = None

    def migrate_with(self, migrations: Migrations) -> None:
        """Give its dicts a version. Call it once, before anything else.

        A dict of a former version is migrated when a record gets it. It counts as touched like any other, so
        it is in the delta in its new form; see `engine.migrating`.
        """
        self._migrations = migrations
        self._begin = PLAIN_VERSIONED + migrations.version.to_bytes(VERSION_BYTES, "big")

    def get(self, key: bytes) -> State:
        """The live state of `key`, empty if it has none. The key then counts as touched in the open epoch."""
        state = self.touched.get(key)
        if state is None:
            state = self._clean.pop(key, None)
            if state is None:
                state = self._load(key)
            self.touched[key] = state
        if self._images is not None and key not in self._images:
            self._images[key] = self._image(key, state)
        return state

    def peek(self, key: bytes) -> State:
        """A copy of the state of `key`, without touching it; for checks and tests."""
        state = self.touched.get(key)
        if state is None:
            state = self._clean.get(key)
        if state is not None:
            return decode_state(encode_states([state])[0])
        value = self._shard.read(self.prefix + key)
        return self._decode(value) if value else {}

    def load_many(self, keys: Iterable[bytes]) -> int:
        """Bring the state of `keys` into memory. Unknown ones take one read of the store.

        It pays off for a batch of keys that are mostly cold. Returns how many were loaded.
        """
        touched, clean, prefix = self.touched, self._clean, self.prefix
        cold = [key for key in dict.fromkeys(keys) if key not in touched and key not in clean]
        if cold:
            for key, value in zip(cold, self._shard.read_many([prefix + key for key in cold]), strict=True):
                if value:
                    if self._migrations is not None and not value.startswith(self._begin):
                        continue  # whoever meets it migrates it
                    self._encoded[key] = value
                    clean[key] = self._decode(value)
                else:
                    clean[key] = {}
        return len(cold)

    def begin_undo(self) -> None:
        """Begin a record whose changes may have to be undone. The record before it can no longer be undone.

        Undo stays on until the barrier: `get` remembers the value of each dict when the record first saw it.
        """
        if self._images is None:
            self._images = {}
        else:
            self._images.clear()

    def rollback(self) -> None:
        """Undo what the record changed since `begin_undo`, in the dicts that `get` has returned since."""
        images = self._images or {}
        for key, image in images.items():
            state = self.touched[key]
            state.clear()
            state.update(decode_state(image) if image.startswith(TYPED_MARK) else marshal.loads(image))
        images.clear()

    def end_undo(self) -> None:
        """Keep what the record changed, and stop remembering."""
        self._images = None

    def check_changed(self) -> None:
        """Raise ProcessingError if a state that the record touched since `begin_undo` can't be stored."""
        touched = {key: self.touched[key] for key in self._images or ()}
        try:
            encode_states(touched.values())
        except UnkeptError:
            self._raise_first_unkept(touched)

    # --- for ShardState ------------------------------------------------------------------------------

    def counts(self) -> tuple[int, int]:
        """(touched, clean) keys in memory."""
        return len(self.touched), len(self._clean)

    def encode_touched(self) -> dict[bytes, bytes]:
        """The changes of the open epoch, by key. Changes nothing itself.

        Raises:
            ProcessingError: a value can't be stored.
        """
        touched = self.touched
        if not touched:
            return {}
        states = touched.values()
        try:
            values = encode_states(states)
        except UnkeptError:
            self._raise_first_unkept(touched)
        if self._begin:
            values = list(map(self._begin.__add__, values))
        before = map(self._encoded.get, touched)
        changed = {
            key: value for key, value, old in zip(touched, values, before, strict=True) if value != old
        }
        if not all(states):
            for key in [key for key, state in touched.items() if not state]:
                if key in self._encoded:
                    changed[key] = DELETED
                else:
                    del changed[key]
        return changed

    def close_epoch(self, changed: Mapping[bytes, bytes], epoch: int) -> None:  # noqa: ARG002  required by the base class
        """The open layer was frozen: its dicts are clean now, and equal to `changed` and the layers below."""
        encoded = self._encoded
        encoded.update(changed)
        if DELETED in changed.values():
            for key in [key for key, value in changed.items() if not value]:
                del encoded[key]
        for key, state in islice(self.touched.items(), 1):
            self.mean_bytes.sample(key, state, encoded.get(key))
        self._clean.update(self.touched)
        self.touched.clear()
        self._images = None

    def forget_touched(self) -> None:
        """Drop the open layer."""
        for key in self.touched:
            self._encoded.pop(key, None)
        self.touched.clear()
        self._images = None

    def forget(self, key: bytes) -> None:
        """Drop a key from memory if it isn't touched."""
        self._clean.pop(key, None)
        self._encoded.pop(key, None)

    def evict(self, entries: int) -> None:
        """Drop the `entries` clean dicts that were untouched for the longest time."""
        clean, encoded = self._clean, self._encoded
        for key in list(islice(clean, entries)):
            del clean[key]
            encoded.pop(key, None)

    def _load(self, key: bytes) -> State:
        value = self._shard.read(self.prefix + key)
        if not value:
            return {}
        state = self._decode(value)
        self._encoded[key] = value
        return state

    def _decode(self, value: bytes) -> State:
        migrations = self._migrations
        if migrations is None:
            return decode_state(value)
        version, at = 1, 0
        if value[:1] == PLAIN_VERSIONED:
            at = len(self._begin)
            version = int.from_bytes(value[1:at], "big")
        if version == migrations.version:
            return decode_state(value[at:])
        state = migrations.migrated(version, value[at:])
        if type(state) is not dict:
            raise RecordError(
                f"migrate[{migrations.version - 1}] of ctx.state of {self.name!r} returned "
                f"{bounded_repr(state)}, not a dict"
            )
        return cast("State", state)

    def _image(self, key: bytes, state: State) -> bytes:
        try:
            # marshal keeps what JSON would change, so a tuple that was there before is still noticed later.
            return marshal.dumps(state)
        except ValueError:
            pass  # it can't hold Decimals and times
        try:
            return encode_states([state])[0]
        except UnkeptError:
            raise self._unkept(key, state) from None

    def _raise_first_unkept(self, touched: Mapping[bytes, State]) -> NoReturn:
        for key, state in touched.items():
            if describe_unkept(state) is not None:
                raise self._unkept(key, state)
        raise AssertionError(f"store {self.name!r}: a value can't be stored, but no single one causes it")

    def _unkept(self, key: bytes, state: State) -> ProcessingError:
        return ProcessingError(
            f"store {self.name!r}, key {bounded_repr(key)}: {describe_unkept(state)}",
            remedy=f"State may hold {KEPT}; convert other values before you put them into it.",
        )


class ShardState:
    """The state of one shard: its tables, and the changes that its store doesn't have yet.

    Args:
        store: holds committed state, and knows its epoch.
        stores: the names of the operators that have a dict for each key, the states that handlers declare,
            the timers of handlers that have some, the open windows of steps that have some, tables, and
            joins of streams.
        memory: bounds the entries that are kept over a barrier.
        flush_limits: when committed changes are written to the store.

    The life of an epoch: handlers get and change dicts; `freeze(e)` returns the delta; after Kafka's commit,
    `commit(e, ...)` writes to the store if enough changes have accumulated. If the epoch fails, call
    `discard`. After a restore that changed the store, create a new ShardState.

    Attributes:
        documents: the tables of dicts, by the handler's name.
        tables: these and all other tables, by the name of the store.
        clean_bytes, checked_bytes: see `memory.Holder`.
    """

    def __init__(
        self,
        store: Store,
        stores: Sequence[AnyStore],
        memory: StateMemory,
        flush_limits: FlushLimits | None = None,
    ) -> None:
        self.documents = {name: StateTable(name, self) for name in stores if isinstance(name, str)}
        self._entry_tables: dict[str, EntryTable] = {}
        for wanted in stores:
            if isinstance(wanted, StateStore) and wanted.state.kind == DocumentState.kind:
                if wanted.state.version > 1:
                    self.documents[wanted.handler].migrate_with(migrations_of(wanted))
                continue
            if isinstance(wanted, StateStore):
                made = make_tables(wanted, self, store_prefix, self._entry_tables)
            elif isinstance(wanted, TimerStore):
                made = make_timer_tables(wanted, self, store_prefix)
            elif isinstance(wanted, WindowStore):
                made = make_window_tables(wanted, self, store_prefix)
            elif isinstance(wanted, TableStore):
                made = make_kept_table(wanted, self, store_prefix, self._entry_tables)
            elif isinstance(wanted, PairStore):
                made = make_pair_tables(wanted, self, store_prefix)
            else:
                continue
            self._entry_tables.update((table.name, table) for table in made)
        self.tables: dict[str, StoreTable] = {**self.documents, **self._entry_tables}
        self._by_prefix = {table.prefix: table for table in self.tables.values()}
        if len(self._by_prefix) != len(self.tables):
            raise JobError(
                f"two of the stores {', '.join(map(repr, self.tables))} would share their keys' prefix",
                remedy="Rename one of them.",
            )
        self._store = store
        self._stores = tuple(stores)
        self._memory = memory
        self.clean_bytes = self.checked_bytes = 0
        memory.add(self)
        self._limits = flush_limits or FlushLimits()
        self._meta = store.meta()
        self._frozen_epoch = self._meta.state_epoch
        self._prepared: deque[_Layer] = deque()
        self._pending: dict[bytes, bytes] = {}
        self._pending_bytes = 0
        self._pending_since_ms: float | None = None
        self._writing: _Batch | None = None

    @property
    def state_epoch(self) -> int:
        """The last epoch that changed state, including frozen epochs. It goes into the committed metadata."""
        return self._frozen_epoch

    @property
    def committed_epoch(self) -> int:
        """The last committed epoch that changed state."""
        return self._meta.state_epoch

    def freeze(self, epoch: int) -> Delta | None:
        """Close the open layer as epoch number `epoch`. Returns the delta to write, None if nothing changed.

        Raises:
            ProcessingError: a value can't be stored; nothing is frozen then.
        """
        if epoch <= self._frozen_epoch:
            raise ValueError(f"epoch {epoch} can't follow epoch {self._frozen_epoch}")
        if self._entry_tables:
            for table in self._entry_tables.values():
                table.end_undo()
            for table in self._entry_tables.values():
                table.settle()
        encoded = [(table, table.encode_touched()) for table in self.tables.values()]
        changes: dict[bytes, bytes] = {}
        for table, changed in encoded:
            changes.update(zip(map(table.prefix.__add__, changed), changed.values(), strict=True))
            table.close_epoch(changed, epoch)
        self.clean_bytes = sum(map(_clean_bytes, self.tables.values()))
        self._memory.settle(self)
        if not changes:
            return None
        delta = Delta(epoch, self._frozen_epoch, changes)
        self._prepared.append(_Layer(epoch, changes, sum(map(len, changes.values()))))
        self._frozen_epoch = epoch
        return delta

    def commit(self, epoch: int, changelog_offset_next: int, now_ms: float) -> None:
        """Kafka committed `epoch`, for which `freeze` returned a delta. Called by the commit thread.

        Its changes may reach the store later, together with others: the flush limits decide.

        Args:
            epoch: the oldest frozen epoch.
            changelog_offset_next: the offset after the delta's last record.
            now_ms: the time on a monotonic clock.

        Raises:
            Whatever the store raises if it can't be written. Nothing is lost; the next `flush` tries again.
        """
        if not self._prepared or self._prepared[0].epoch != epoch:
            raise ValueError(f"epoch {epoch} is not the oldest prepared one")
        layer = self._prepared[0]
        self._pending.update(layer.changes)
        self._pending_bytes += layer.size_bytes
        if self._pending_since_ms is None:
            self._pending_since_ms = now_ms
        self._meta = self._meta._replace(state_epoch=epoch, changelog_offset=changelog_offset_next)
        self._prepared.popleft()
        if (
            len(self._pending) >= self._limits.entries_max
            or self._pending_bytes >= self._limits.bytes_max
            or now_ms - self._pending_since_ms >= self._limits.age_ms_max
        ):
            self.flush()

    def flush_is_due(self, now_ms: float) -> bool:
        """Whether committed changes have waited too long to be written to the store, because no later commit
        wrote them.
        """
        since_ms = self._pending_since_ms
        return since_ms is not None and now_ms - since_ms >= self._limits.age_ms_max

    def flush(self) -> None:
        """Write everything committed to the store. Called by the commit thread, or by another one while that
        is idle.

        Raises:
            Whatever the store raises. Nothing is lost; the next `flush` tries again.
        """
        self._write_batch()
        if self._pending:
            self._writing = _Batch(self._pending, self._meta)
            self._pending, self._pending_bytes, self._pending_since_ms = {}, 0, None
            self._write_batch()

    def evict_bytes(self, size_bytes: int) -> None:
        """See `memory.Holder`. The largest tables come first."""
        for table in sorted(self.tables.values(), key=_clean_bytes, reverse=True):
            if size_bytes <= 0:
                break
            before_bytes = _clean_bytes(table)
            table.evict(ceil(size_bytes / table.mean_bytes.value))
            size_bytes -= before_bytes - _clean_bytes(table)
        self.clean_bytes = sum(map(_clean_bytes, self.tables.values()))

    def discard(self) -> None:
        """Drop everything that isn't committed: the open layer and all prepared ones."""
        for table in self.tables.values():
            table.forget_touched()
        for layer in self._prepared:
            for key in layer.changes:
                self._by_prefix[key[:STORE_PREFIX_BYTES]].forget(key[STORE_PREFIX_BYTES:])
        self._prepared.clear()
        self._frozen_epoch = self._meta.state_epoch

    def of_the_store(self) -> ShardState:
        """A new one with what the store has, as after a restore. Call `flush` first: what isn't in the store
        by then is lost.
        """
        assert not self._pending
        assert self._writing is None
        return ShardState(self._store, self._stores, self._memory, self._limits)

    def read(self, key: bytes) -> bytes | None:
        """The encoded value of a store key below the live dicts. None or empty if it has none."""
        value = self._read_layers(key)
        return self._store.get(key) if value is None else value

    def read_many(self, keys: list[bytes]) -> list[bytes | None]:
        """Like `read`, for many keys, with one read of the store."""
        values = [self._read_layers(key) for key in keys]
        missing = [key for key, value in zip(keys, values, strict=True) if value is None]
        found = iter(self._store.get_many(missing) if missing else ())
        return [next(found) if value is None else value for value in values]

    def scan_store(
        self, start: bytes, stop: bytes, limit: int, *, reverse: bool
    ) -> list[tuple[bytes, bytes]]:
        """See `entries.Layers`."""
        return self._store.scan(start, stop, limit, reverse=reverse)

    def written_epoch(self) -> int:
        """See `entries.Layers`."""
        return self._store.meta().state_epoch

    def _read_layers(self, key: bytes) -> bytes | None:
        # From top to bottom: meanwhile, the commit thread moves changes in the same direction.
        for layer in reversed(tuple(self._prepared)):
            value = layer.changes.get(key)
            if value is not None:
                return value
        value = self._pending.get(key)
        if value is None:
            writing = self._writing
            if writing is not None:
                value = writing.changes.get(key)
        return value

    def _write_batch(self) -> None:
        batch = self._writing
        if batch is not None:
            self._store.apply(batch.changes, batch.meta)
            self._writing = None
