"""One shard of the job under test: the engine with its state, and the restore from the changelog.

Responsible for: restoring exactly the committed epoch from encoded deltas, processing records in order, and
returning what an epoch commits. Pure.
"""

from __future__ import annotations

import copy
import dataclasses
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from fcluster.common.errors import StateDamaged
from fcluster.common.ids import ShardId
from fcluster.common.letter_counts import decode_counts, encode_counts
from fcluster.common.positions import CommittedPosition, InputOffset
from fcluster.engine.changelog import DeltaReader, encode_delta
from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.failure import Condemnation
from fcluster.engine.firing import make_timers
from fcluster.engine.kinds import make_access
from fcluster.engine.loading import loaded_marks, unloaded_inputs
from fcluster.engine.memory import StateMemory
from fcluster.engine.records import OutputPort
from fcluster.engine.runner import StageRunner
from fcluster.engine.state import STORE_PREFIX_BYTES, ShardState, StoreMeta, store_prefix
from fcluster.engine.steps import StepFailure
from fcluster.engine.views import compile_find
from fcluster.engine.watermarks import OwnRecord, make_clock
from fcluster.graph.operators import AnyTable, kept_in
from fcluster.graph.stages import Stage
from fcluster.graph.states import ListAccess, MapAccess, StateStore
from fcluster.graph.timers import TimerClock
from fcluster.testing.topics import Partition, StoredRecord


class MemoryStore:
    """The committed state of a shard, encoded; see `engine.state.Store`."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._ordered: list[bytes] = []
        self._meta = StoreMeta()

    def meta(self) -> StoreMeta:
        """Its position."""
        return self._meta

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`, None if there is none."""
        return self._values.get(key)

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """The values of `keys`, in their order."""
        return [self._values.get(key) for key in keys]

    def scan(self, start: bytes, stop: bytes, limit: int, *, reverse: bool) -> list[tuple[bytes, bytes]]:
        """The entries from `start` up to `stop`, in order or backwards, at most `limit`."""
        begin, end = bisect_left(self._ordered, start), bisect_left(self._ordered, stop)
        if reverse:
            found = self._ordered[max(begin, end - limit) : end][::-1]
        else:
            found = self._ordered[begin : min(end, begin + limit)]
        return [(key, self._values[key]) for key in found]

    def apply(self, changes: Mapping[bytes, bytes], meta: StoreMeta) -> None:
        """Write `changes` (an empty value deletes) and `meta`."""
        for key, value in changes.items():
            if value:
                if key not in self._values:
                    insort(self._ordered, key)
                self._values[key] = value
            elif self._values.pop(key, None) is not None:
                del self._ordered[bisect_left(self._ordered, key)]
        self._meta = meta

    def keys_of(self, name: str) -> Iterator[bytes]:
        """The keys in the store `name`, without its prefix."""
        prefix = store_prefix(name)
        return (key[STORE_PREFIX_BYTES:] for key in self._values if key.startswith(prefix))


@dataclass(frozen=True, slots=True)
class FrozenShard:
    """What an epoch commits for one shard.

    Attributes:
        position: the committed offset, whose metadata names the epoch.
        delta: the records for the changelog. Empty if the state hasn't changed.
    """

    shard: Shard
    position: CommittedPosition
    delta: list[bytes]


@dataclass(slots=True)
class _Here:
    """Used in place of a handler's context."""

    _key: bytes | None


class _Runner(StageRunner):
    """An input of a shard."""

    shard: Shard

    def passed(self, record: Any) -> None:
        """See `StageRunner.passed`."""
        self.shard.passed(self.number, record)


class Shard:
    """A running shard.

    Args:
        stage: the job's stage.
        partition: the partition of the stage's inputs.
        position: the committed position.
        changelog: the partition with the deltas of its state, or None if the stage has no state.
        port: takes the outputs.
        passing: exceptions that no record causes.
        condemned: records that are known to fail, by input and offset.
        wall_ms: returns the driver's processing time.
        job_start: the number of the job's start.

    Attributes:
        clock: its event time; None if the job doesn't use event time.
        timers: its handlers' timers. None if they set none.
        unloaded: returns the inputs that it has to read before the others; see `loading.unloaded_inputs`.

    Raises:
        StateDamaged: the changelog doesn't lead to the state of the committed epoch.
    """

    def __init__(
        self,
        stage: Stage,
        partition: int,
        position: CommittedPosition,
        changelog: Partition | None,
        port: OutputPort,
        passing: tuple[type[BaseException], ...],
        condemned: list[tuple[int, int, Condemnation]],
        wall_ms: Callable[[], int],
        job_start: int,
    ) -> None:
        self.id = ShardId(stage.name, partition)
        self.stage = stage
        self.position = position
        self.dirty = False
        self.clock = make_clock(stage, position)
        self._next = [at.offset for at in position.inputs]
        self._loading: Literal["reads", "has to tell", "told"] = "reads" if stage.broadcasts else "told"
        self._store = MemoryStore()
        if changelog is not None:
            self._restore(changelog)
        # Nothing stays decoded over a barrier: each epoch reads what the last one encoded.
        self.state = ShardState(self._store, stage.all_stores, StateMemory(0))
        tables = self.state.tables
        self._job_start = job_start
        self._letters = port.letters.of(self.id)
        self._letters.restore(decode_counts(position.letters, job_start, stage.dead_letter_names))
        unloaded = unloaded_inputs(stage, tables, job_start)
        self.unloaded = unloaded or (lambda: frozenset[int]())
        self.timers = make_timers(
            stage, partition, tables, port, passing, self.clock, wall_ms, lambda: self._next[0], unloaded
        )
        self.runners = [
            _Runner(stage, partition, tables, port, passing, number, self.clock, self.timers)
            for number in range(len(stage.inputs))
        ]
        for runner in self.runners:
            runner.shard = self
        for number, offset, failure in condemned:
            if self.timers is not None and failure.is_of_timer:
                self.timers.condemn(failure)
            else:
                self.runners[number].condemn(offset, failure)

    def next_offset(self, number: int) -> int:
        """The next record of that input to process."""
        return self._next[number]

    def handle(self, record: StoredRecord) -> None:
        """Process the next record of an input. Raises what `StageRunner.handle` raises."""
        number = self.stage.input_of(record.topic())
        self.runners[number].handle(record)
        self.passed(number, record)

    def passed(self, number: int, record: StoredRecord) -> None:
        """The record is through. Timers that are due after it may fire."""
        self._next[number] = record.offset() + 1
        self.dirty = True

    def note_loaded(self) -> bool:
        """The topics of its global tables are read to their ends. Returns whether it has to say so now."""
        if self._loading != "reads":
            return False
        self._loading, self.dirty = "has to tell", True
        return True

    def take_loaded_marks(self, sizes: Mapping[str, int]) -> list[OwnRecord]:
        """What it has to tell of its global tables in this epoch. It counts as told."""
        if self._loading != "has to tell":
            return []
        self._loading = "told"
        return loaded_marks(self.stage, self.id.partition, sizes, self._job_start)

    def fire(self) -> bool:
        """Fire the next timer that is due. Returns False if none is due. Raises what `StageRunner.handle`
        raises.
        """
        if self.timers is None or not self.timers.fire_due(1):
            return False
        self.dirty = True
        return True

    def find_unkept(self) -> Condemnation | None:
        """See `StageRunner.find_unkept`."""
        return self.runners[0].find_unkept()

    def freeze(self, epoch: int) -> FrozenShard:
        """End the open epoch.

        Raises:
            ProcessingError: a state can't be stored.
        """
        first, *further = self._next
        delta = self.state.freeze(epoch)
        state_epoch = self.position.state_epoch
        encoded: list[bytes] = []
        if delta is not None:
            state_epoch = epoch
            named = dict(zip(self.stage.topics[1:], further, strict=True))
            encoded = encode_delta(dataclasses.replace(delta, source_offset=first, further_offsets=named))
        letters = encode_counts(self._job_start, self.stage.dead_letter_names, self._letters.counts)
        position = dataclasses.replace(
            self.position, epoch=epoch, state_epoch=state_epoch, letters=letters
        ).at(
            [InputOffset(offset, clock=self._encode_time(number)) for number, offset in enumerate(self._next)]
        )
        return FrozenShard(self, position, encoded)

    def _encode_time(self, number: int) -> str:
        return "" if self.clock is None else self.clock.encode(number)

    def pending_timers(self, handler: str, key: bytes) -> dict[str, tuple[TimerClock, int]]:
        """The timers of a key that are set: clock and time. Reading them leaves no trace."""
        if self.timers is None or handler not in self.timers.handlers:
            return {}
        return self.timers.handlers[handler].pending(key)

    def pass_time(self, to_ms: int) -> None:
        """Advance the watermarks of the inputs that aren't the cluster's own. No record comes from this."""
        assert self.clock is not None
        for number, source in enumerate(self.stage.inputs):
            if not source.internal and source.watermark is not None:
                self.clock.observe(number, to_ms + source.watermark.max_delay_ms)
                self.dirty = True

    def set_idle(self, number: int) -> None:
        """Don't wait for this input until its next record."""
        if self.clock is not None:
            self.clock.set_idle(number, True)
            self.dirty = True

    def end(self) -> None:
        """All inputs that are users' topics have been read to their ends."""
        if self.clock is not None and self.clock.may_end:
            self.clock.end()
            self.dirty = True

    def committed(self, frozen: FrozenShard, changelog_offset_next: int) -> None:
        """The epoch is committed, and the next one is open."""
        self.position = frozen.position
        self.dirty = False
        if frozen.delta:
            self.state.commit(frozen.position.epoch, changelog_offset_next, 0.0)
            self.state.flush()

    def keys_of(self, handler: str) -> list[bytes]:
        """The keys that may have state, including those of the open epoch."""
        return list(dict.fromkeys([*self._store.keys_of(handler), *self.state.documents[handler].touched]))

    def rows_of(self, table: AnyTable) -> dict[bytes, Any]:
        """The values of a table's rows, including those of the open epoch. Those for which a function fails
        count as none.

        Raises:
            Whatever a function raises if the rule of its step is "stop".
        """
        keys: dict[bytes, None] = {}
        for kept in kept_in(table):
            name = kept.store.name
            entries = cast("EntryTable", self.state.tables[name])
            keys |= dict.fromkeys([*self._store.keys_of(name), *entries.encode_touched()])
        find = compile_find(table, self.state.tables, ())
        rows: dict[bytes, Any] = {}
        for key in keys:
            try:
                rows[key] = find(key, None)
            except StepFailure as failure:
                if failure.rule == "stop":
                    raise failure.error from None
        return {key: row for key, row in rows.items() if row is not ABSENT}

    def look(self, store: StateStore, key: bytes) -> Any:
        """A copy of what a declared state contains for `key`. Unlike a handler's access, this leaves no
        trace.
        """
        tables = self.state.tables
        for name in store.store_names:
            tables[name].begin_undo()
        try:
            access = make_access(store, tables, _Here(key))
            if isinstance(access, MapAccess):
                return copy.deepcopy(dict(access.scan()))
            if isinstance(access, ListAccess):
                return copy.deepcopy(list(access))
            return copy.deepcopy(access.get())
        finally:
            for name in store.store_names:
                tables[name].rollback()

    def _restore(self, changelog: Partition) -> None:
        name = f"{self.stage.changelog}/{self.id.partition}"
        reader = DeltaReader(name, self._store.meta().state_epoch)
        for record in changelog.read(0, "read-committed"):
            delta = reader.feed(record.offset(), record.value())
            if delta is not None:
                self._store.apply(delta.changes, StoreMeta(delta.epoch, record.offset() + 1))
        reader.finish()
        if reader.state_epoch != self.position.state_epoch:
            raise StateDamaged(
                f"The changelog {name} ends at epoch {reader.state_epoch}, but the committed offset says "
                f"epoch {self.position.state_epoch}."
            )
