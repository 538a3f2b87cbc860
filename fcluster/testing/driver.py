"""`Driver`: runs a job in the test's own process, record by record.

Responsible for: what a worker's shell does around the engine (epochs, replays, stops), and answering a test's
questions. Invariant 1: outputs, offsets and deltas of an epoch become visible together, and everything
uncommitted is rolled back as a whole. Knows no Kafka, RocksDB, threads or clocks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from fcluster.api.call_hints import hints_at_calls
from fcluster.api.job import GlobalTable, Job, Table
from fcluster.api.tables import described_table
from fcluster.common.errors import (
    FclusterError,
    FormatUnavailable,
    IncompatibleState,
    JobError,
    ProcessingError,
)
from fcluster.common.failures import bounded_repr
from fcluster.common.ids import ShardId
from fcluster.common.isolation import Isolation
from fcluster.common.letter_counts import decode_counts
from fcluster.common.positions import CommittedPosition, decode_position, joined_position
from fcluster.common.settings import Settings, resolve
from fcluster.common.spelling import near_names
from fcluster.engine.failure import Condemnation, OutputRefusedError, UnkeptStateError, output_too_large
from fcluster.engine.firing import TimerStopsError
from fcluster.engine.framing import compile_parting
from fcluster.engine.loading import is_loaded_mark
from fcluster.engine.operators.write import checked_headers, checked_timestamp
from fcluster.engine.records import NO_TIMESTAMP_MS, OutputPort
from fcluster.engine.runner import HandlerError, UnreadableRecordError
from fcluster.engine.stamps import orders_of
from fcluster.engine.steps import StepFailure
from fcluster.engine.watermarks import OwnRecord, Telling, is_watermark
from fcluster.graph.codecs import key_codec, value_codec
from fcluster.graph.compatibility import incompatibility
from fcluster.graph.generics import K, V
from fcluster.graph.operators import (
    KeptTable,
    TopicSpec,
    declared_name,
    names_of_table,
    replaced_table,
)
from fcluster.graph.stages import Stage, check_copartitioned, written_topics
from fcluster.graph.states import State
from fcluster.graph.timers import TIMER_CLOCKS, TimerClock
from fcluster.graph.topology import Topology
from fcluster.testing.calls import DriverCalls
from fcluster.testing.shards import Shard
from fcluster.testing.topics import Header, StoredRecord, TopicRecord, Topics, Visibility

_T = TypeVar("_T")

PARTITIONS = 4
REGISTRY_URL = "mock://driver"
"""confluent-kafka's stand-in for a schema registry, in the test's own process."""
START_MS = 1_767_225_600_000
"""The beginning of 2026."""
FAILURES_MAX = 100
"""If a record has failed in this many different ways, it counts as failing in another way each time."""
_MESSAGE_BYTES_MAX = 1_000_000
"""librdkafka's default of message.max.bytes."""
_MESSAGE_OVERHEAD_BYTES = 36
"""What librdkafka adds to a record's size when it compares it with message.max.bytes."""


class JobStopped(FclusterError):  # noqa: N818  named like the errors of the API
    """A record has stopped the job. Everything before it is committed, and none of its own changes.

    Its `__cause__` is the exception that a function of the job raised.

    Attributes:
        topic: of the record. For a timer: "".
        partition: of the record. For a timer: -1.
        offset: of the record. For a timer: -1.
    """

    def __init__(self, message: str, *, remedy: str = "", record: StoredRecord | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.topic = record.topic() if record is not None else ""
        self.partition = record.partition() if record is not None else -1
        self.offset = record.offset() if record is not None else -1


@dataclass(frozen=True)
class DeadLetter:
    """A failed record in a dead-letter topic.

    Attributes:
        record: the dead letter itself.
        error: what went wrong.
        handler: the step that failed.
        topic: of the failed record.
        partition: of the failed record.
        offset: of the failed record.
        is_stub: the record was too large, so its value and headers are left out.
    """

    record: TopicRecord
    error: str
    handler: str
    topic: str
    partition: int
    offset: int
    is_stub: bool


@hints_at_calls
class Driver:
    """Runs a job in this process, without Kafka. Use it in a `with` block.

    Example::

        def test_orders_are_added_up():
            with Driver(job) as driver:
                driver.send(orders, {"cents": 250}, key="ann")
                assert driver.read_values(totals) == [{"account": "ann", "cents": 250}]

    It uses the engine of the workers: operators, codecs, state, dead letters, deltas. Each record that is
    sent goes through all stages before `send` returns. Each step on its way is its own epoch, unless
    `auto_barrier` is False. A downstream stage reads only committed records, as in a cluster.

    Records of different partitions are processed in the order in which they were written. Records of merged
    topics that wait at the same time are processed in the order of their timestamps.

    Args:
        job: the job under test. It isn't changed, so many drivers can run it.
        partitions: partition counts of the topics that the job reads, by topic or for all of them. The counts
            of other topics follow from these, as in a cluster, unless they are given too.
        settings: override those of the job. Neither fcluster.toml nor the environment is read. Schemas are
            registered in the process's memory, unless `schema.registry.url` is given here.
        auto_barrier: if False, records stay in an open epoch until `barrier` is called, so that `crash` loses
            something.
        now_ms: the timestamp of records that are sent without one, in milliseconds since 1970.

    Attributes:
        topology: the built job.
        now_ms: the time; it may be set.
        skipped: how many records were skipped or became dead letters.
        late: how many records came too late for their windows.

    Raises:
        JobError, SettingsError: the job or a setting isn't valid.
    """

    def __init__(
        self,
        job: Job,
        *,
        partitions: int | Mapping[str, int] = PARTITIONS,
        settings: Mapping[str, Any] | None = None,
        auto_barrier: bool = True,
        now_ms: int = START_MS,
    ) -> None:
        if not isinstance(job, Job):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise JobError(
                f"Driver got {bounded_repr(job)}, not a job.",
                remedy="Import the job from its file: from shop import job.",
            )
        resolved = _resolved(job, settings)
        self.topology: Topology = job.build(resolved)
        self.now_ms = now_ms
        self.skipped = 0
        self.late = 0
        self._auto_barrier = auto_barrier
        self._specs = _specs_of(self.topology)
        self._topics = Topics(_partition_counts(self.topology, partitions))
        self._message_bytes_max = _message_bytes_max(resolved)
        self._passing = (KeyboardInterrupt, *_outcomes_of_tests())
        self._port = OutputPort()
        self._port.letters.most = resolved.dead_letters_max
        self._port.produce = self._produce
        self._stage_sizes = self._port.stage_sizes = self._sizes_of_stages()
        self._telling = Telling(self.topology, seldom_ms=0)
        self._epoch = 0
        self._job_start = 1
        self._committed: dict[tuple[str, int], tuple[int, str]] = {}
        self._orders = {stage.name: orders_of(stage) for stage in self.topology.stages}
        self._shards: dict[ShardId, Shard] = {}
        self._condemned: dict[ShardId, list[tuple[int, int, Condemnation]]] = {}
        self._causes: dict[tuple[str, int, int], BaseException] = {}
        self._stopped: JobStopped | None = None
        self._read: dict[str, int] = {}
        self._finished = False
        self._calls = DriverCalls(lambda: self.now_ms, self._passing)
        self._held_up: set[ShardId] = set()
        self._load()
        self._commit()  # what there is of global tables is read, however records are committed later

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the job's state. Written records can still be read."""
        self._shards.clear()
        self._stopped = self._stopped or JobStopped("The driver is closed.", remedy="Create another one.")

    # --- records in ---------------------------------------------------------------------------------------

    def send(
        self,
        topic: TopicSpec[K, V] | str,
        value: V | None,
        *,
        key: K | None = None,
        timestamp: int | None = None,
        headers: Sequence[tuple[str, bytes | str | None]] = (),
        partition: int | None = None,
    ) -> TopicRecord[K, V]:
        """Write a record to a topic that the job reads, and process it.

        Args:
            topic: a topic that the job reads.
            value: the value, of the topic's kind. None is a tombstone.
            key: the key, of the topic's kind. None: no key.
            timestamp: milliseconds since 1970. Default: `now_ms`.
            headers: pairs of a name and a value, in order.
            partition: the partition. Default: chosen by the key, as Kafka's producers do it. Without a key,
                the value decides.

        Returns:
            The record as written to the topic.

        Raises:
            TypeError, ValueError: the value or key can't be encoded for the topic, or another argument isn't
                what Kafka takes.
            JobStopped: the record, or another one that it caused, has stopped the job.
        """
        __tracebackhide__ = True
        spec = self._source(topic)
        raw_value = None if value is None else value_codec(spec.value)[1](value)
        raw_key = None if key is None else key_codec(spec.key)[1](key)
        part = compile_parting(spec)
        if part is not None:
            pairs = checked_headers(headers, "headers= of send()")
            raw_key, raw_value, pairs = part(raw_key, raw_value, pairs)
            headers = pairs or ()
        return self.send_raw(
            spec, raw_value, key=raw_key, timestamp=timestamp, headers=headers, partition=partition
        )

    def send_raw(
        self,
        topic: TopicSpec[K, V] | str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        timestamp: int | None = None,
        headers: Sequence[tuple[str, bytes | str | None]] = (),
        partition: int | None = None,
    ) -> TopicRecord[K, V]:
        """Like `send`, with raw bytes: for data that no codec produces, for example invalid JSON."""
        __tracebackhide__ = True
        spec = self._source(topic)
        self._check_running()
        at_ms = self.now_ms if timestamp is None else checked_timestamp(timestamp, "timestamp= of send()")
        pairs = checked_headers(headers, "headers= of send()") or []
        count = len(self._topics.partitions(spec.name))
        if partition is None:
            partition = self._topics.partition_for(spec.name, key, value)
        elif not 0 <= partition < count:
            raise ValueError(f"{spec.name!r} has the partitions 0 to {count - 1}, and no {partition}")
        record = self._topics.add(
            spec.name,
            partition,
            key,
            value,
            at_ms,
            pairs,
            Visibility.COMMITTED,
        )
        self._advance(one_by_one=self._auto_barrier)
        return TopicRecord(spec, record)

    # --- epochs -------------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Commit the open epoch, then process what downstream stages can read now.

        Raises:
            JobStopped: a record has stopped the job.
        """
        __tracebackhide__ = True
        self._check_running()
        last = self._topics.sequence
        while not self._commit():
            # A state can't be stored. Which record left it shows when each record is committed on its own.
            self._roll_back()
            self._advance(one_by_one=True, until=last)
        self._advance(one_by_one=self._auto_barrier)

    def settle(self) -> None:
        """Call `barrier` until no stage has anything left to process or to commit.

        Raises:
            JobStopped: a record has stopped the job.
        """
        __tracebackhide__ = True
        self._check_running()
        while self._dirty():
            self.barrier()

    def crash(self) -> None:
        """Simulate the death of the process: another one continues from what is committed.

        State is restored from the encoded deltas of all epochs. Outputs of the open epoch disappear for
        "read-committed" readers, and the records that caused them are processed again immediately. A job that
        was stopped by a record is restarted, and tries that record again.

        Raises:
            JobStopped: a record has stopped the job (again).
        """
        __tracebackhide__ = True
        stopped, self._stopped = self._stopped is not None, None
        self._condemned.clear()
        self._causes.clear()
        self._roll_back()
        self._calls.reset()
        if stopped:
            self._job_start += 1
            self._port.letters.clear()
        self._advance(one_by_one=self._auto_barrier)

    def restart(self, job: Job, *, settings: Mapping[str, Any] | None = None) -> None:
        """Stop the job, and start another version of it: with its topics, its offsets and its state.

        Topics that only the new version has are empty. What isn't committed is processed by the new version.

        Args:
            job: the new version. It has the same name.
            settings: as for the driver.

        Raises:
            IncompatibleState: the new version doesn't fit the state that there is. Nothing has changed then.
            JobStopped: a record has stopped the job.
        """
        __tracebackhide__ = True
        resolved = _resolved(job, settings)
        changed = job.build(resolved)
        reason = incompatibility(self.topology.describe(), changed)
        if reason is not None:
            remedy = "Undo it, or do what the message says. In a cluster, `fcluster reset` begins anew."
            raise IncompatibleState(reason, remedy=remedy)
        self._roll_back()
        self.topology = changed
        self._specs = _specs_of(changed)
        self._topics.add_missing(_partition_counts(changed, self._topics.counts_of(self._specs)))
        self._message_bytes_max = _message_bytes_max(resolved)
        self._stage_sizes = self._port.stage_sizes = self._sizes_of_stages()
        self._telling = Telling(changed, seldom_ms=0)
        self._orders = {stage.name: orders_of(stage) for stage in changed.stages}
        self._job_start += 1
        self._port.letters.clear()
        self.crash()

    def advance(
        self, *, by_ms: int | None = None, to_ms: int | None = None, clock: TimerClock = "processing"
    ) -> None:
        """Let time pass, and fire the timers that become due.

        Args:
            by_ms: by how much. For event time, this is added to the latest event time of all partitions.
            to_ms: to which time, in milliseconds since 1970. Give one of the two.
            clock: "processing" moves `now_ms`. "event" moves the event time of all partitions, as if each
                partition of the topics that the job reads had got a record with that time that no handler
                sees.

        Raises:
            TypeError, ValueError: not exactly one of `by_ms` and `to_ms` is given, it isn't an int, or the
                clock is unknown.
            JobStopped: a timer, or a record that it caused, has stopped the job.
        """
        __tracebackhide__ = True
        if (by_ms is None) == (to_ms is None) or clock not in TIMER_CLOCKS:
            raise ValueError("advance takes by_ms or to_ms, and clock='event' or 'processing'")
        for name, given in (("by_ms", by_ms), ("to_ms", to_ms)):
            if not isinstance(given, int | None):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"{name}={bounded_repr(given)} of advance() is no number of milliseconds")
        self._check_running()
        if clock == "processing":
            self.now_ms = self.now_ms + by_ms if by_ms is not None else max(self.now_ms, to_ms or 0)
        else:
            self._advance_event_time(by_ms, to_ms)
        self._advance(one_by_one=self._auto_barrier)
        if self._auto_barrier:
            self.barrier()

    def _advance_event_time(self, by_ms: int | None, to_ms: int | None) -> None:
        shards = [
            self._shard(stage, partition)
            for stage in self.topology.stages
            if stage.keeps_time
            for partition in range(self._stage_sizes[stage.name])
        ]
        if to_ms is None:
            known = [shard.clock.now_ms for shard in shards if shard.clock is not None]
            to_ms = max((at for at in known if at is not None), default=self.now_ms) + (by_ms or 0)
        for shard in shards:
            shard.pass_time(to_ms)

    def finish(self) -> None:
        """End the run as `fcluster up --end` does: what is in the topics is processed, stage by stage, then
        all windows, joins and event-time timers are due. Everything is committed, and the job processes
        nothing any more.

        Raises:
            JobStopped: something that comes of it has stopped the job.
        """
        __tracebackhide__ = True
        self.settle()
        for stage in self.topology.stages:  # upstream first
            if stage.keeps_time:
                for partition in range(self._stage_sizes[stage.name]):
                    self._shard(stage, partition).end()
                self._advance(one_by_one=self._auto_barrier)
                self.settle()
        self._finished = True

    # --- looking ------------------------------------------------------------------------------------------

    def read(self, topic: TopicSpec[K, V] | str) -> list[TopicRecord[K, V]]:
        """The committed records of `topic` that `read` or `read_values` haven't returned yet, in the order in
        which they were written.
        """
        records = self.records(topic)
        name = self._spec(topic).name
        given, self._read[name] = self._read.get(name, 0), len(records)
        return records[given:]

    def read_values(self, topic: TopicSpec[Any, V] | str) -> list[V]:
        """The values of the records that `read` would return."""
        return [record.value for record in self.read(topic)]

    def records(
        self, topic: TopicSpec[K, V] | str, *, isolation: Isolation = "read-committed"
    ) -> list[TopicRecord[K, V]]:
        """All records of `topic`, in the order in which they were written.

        Args:
            topic: a topic that the job declares, or the name of one of its repartition topics.
            isolation: "read-uncommitted" also returns records of the open epoch, and of epochs that were
                lost.
        """
        spec = self._spec(topic)
        internal = spec.name in self.topology.internal_topics
        found = [
            record
            for partition in self._topics.partitions(spec.name)
            for record in partition.read(0, isolation)
            if not (internal and (is_watermark(record) or is_loaded_mark(record)))
        ]
        return [TopicRecord(spec, record) for record in sorted(found, key=lambda record: record.sequence)]

    def event_times(self, stage: str) -> dict[int, int | None]:
        """The event time of each partition of a stage, in milliseconds since 1970; None if it has none
        yet.

        Args:
            stage: the stage's name: that of the topic that it reads, or of the first handler after a
                `key_by`. Or the name of another handler in it.

        Raises:
            JobError: the job has no such stage, or doesn't use event time.
        """
        found = next((one for one in self.topology.stages if one.name == stage), None)
        found = found or self._stage_of(stage)
        if not found.keeps_time:
            raise JobError(
                f"The job {self.topology.job!r} doesn't use event time.",
                remedy="Declare it: job.topic(name, watermark=Watermark()).",
            )
        clocks = [self._shard(found, number).clock for number in range(self._stage_sizes[found.name])]
        return {number: clock.now_ms for number, clock in enumerate(clocks) if clock is not None}

    def set_idle(self, topic: TopicSpec | str, partition: int) -> None:
        """Make a partition idle, as it is in a cluster when it has had no record for `Watermark.idle_ms`:
        event time doesn't wait for it until its next record.

        Raises:
            JobStopped: a consequence of this has stopped the job.
        """
        __tracebackhide__ = True
        spec = self._source(topic)
        self._check_running()
        stage = self.topology.stages_by_topic[spec.name]
        self._shard(stage, partition).set_idle(stage.input_of(spec.name))
        if self._auto_barrier:
            self.barrier()

    def dead_letters(self, topic: TopicSpec | str | None = None) -> list[DeadLetter]:
        """All committed dead letters, in this dead-letter topic or in all of them."""
        if topic is not None:
            specs = [self._spec(topic)]
        else:
            specs = [spec for stage in self.topology.stages for spec in stage.dead_letter_topics]
        letters = [
            letter for spec in dict.fromkeys(specs) for letter in map(_dead_letter, self.records(spec))
        ]
        return [letter for letter in letters if letter is not None]

    def state(
        self, handler: str, key: Any, declared: State | None = None, *, partition: int | None = None
    ) -> Any:
        """A copy of the handler's state for `key`.

        Args:
            handler: the handler's name.
            key: the key, as the handler sees it in `ctx.key`.
            declared: a state that the handler declares. None: its `ctx.state`.
            partition: the records' partition, if the key doesn't determine it.

        Returns:
            A dict, which is empty if there is no state. For a declared value: the value or None. For a map: a
            sorted dict. For a list: a list.

        Raises:
            LookupError: the handler doesn't declare such a state.
        """
        stage = self._stage_of(handler)
        source = stage.inputs[0].topic
        raw_key = key_codec(source.key)[1](key)
        if partition is None:
            partition = self._topics.partition_for(source.name, raw_key, None)
        shard = self._shard(stage, partition)
        if declared is None:
            return shard.state.documents[handler].peek(raw_key)
        for store in stage.state_stores:
            if store.handler == handler and store.declared is declared:
                return shard.look(store, raw_key)
        raise LookupError(f"the handler {handler!r} declares no {declared.kind} {declared.name!r}")

    def timers(self, handler: str, key: Any, *, partition: int | None = None) -> dict[str, int]:
        """The timers that the handler has set for `key`, by name: when they are due.

        Args:
            handler, key, partition: as in `state`.
        """
        stage = self._stage_of(handler)
        source = stage.inputs[0].topic
        raw_key = key_codec(source.key)[1](key)
        if partition is None:
            partition = self._topics.partition_for(source.name, raw_key, None)
        pending = self._shard(stage, partition).pending_timers(handler, raw_key)
        return {name: at_ms for name, (_clock, at_ms) in sorted(pending.items())}

    def states(self, handler: str) -> dict[Any, dict[str, Any]]:
        """Copies of the handler's `ctx.state` dicts, by key, of all partitions.

        Raises:
            JobError: the keys are JSON objects, or something else that isn't hashable. Use `state` for them.
        """
        stage = self._stage_of(handler)
        source = stage.inputs[0].topic
        decode = key_codec(source.key)[0]
        found: list[tuple[Any, dict[str, Any]]] = []
        for partition in range(len(self._topics.partitions(source.name))):
            shard = self._shard(stage, partition)
            for raw_key in shard.keys_of(handler):
                state = shard.state.documents[handler].peek(raw_key)
                if state:
                    found.append((decode(raw_key), state))
        return _by_key(found, f"The keys of the handler {handler!r}", f"driver.state({handler!r}, key)")

    def table(self, table: Table | GlobalTable | str) -> dict[Any, Any]:
        """The rows of a table, by key, of all partitions.

        Args:
            table: a table of the job, or its name if it has one. The rows of one that `filter`, `map` or
                `join` has made are computed. Of a global table: the rows of all its copies.

        Raises:
            JobError: the job has no such table; or its keys are JSON objects, or something else that isn't
                hashable. Use `rows` for them.
        """
        return _by_key(self.rows(table), "The keys of the table", "driver.rows(table)")

    def rows(self, table: Table | GlobalTable | str) -> list[tuple[Any, Any]]:
        """Like `table`, as pairs of a key and a value, for keys of any kind. They are in the order of the
        keys' bytes.

        Raises:
            JobError: the job has no such table.
        """
        tables: dict[str, list[tuple[Stage, KeptTable]]] = {}
        for stage in self.topology.stages:
            for one in stage.tables:
                tables.setdefault(declared_name(one), []).append((stage, one))
        described = None if isinstance(table, str) else described_table(table)
        name = table if isinstance(table, str) else names_of_table(described_table(table))[0]
        if name not in tables:
            raise _unknown("table", name, tables, f"is not one of the job {self.topology.job!r}")
        rows: dict[bytes, tuple[Any, Any]] = {}
        for stage, kept in tables[name]:
            is_copy = declared_name(kept) != kept.name
            wanted = kept if described is None else replaced_table(described, kept) if is_copy else described
            source = next(stage.inputs[chain.input] for chain in stage.chains if kept in chain.tables)
            decode_key = key_codec(source.topic.key)[0]
            for partition in range(self._stage_sizes[stage.name]):
                found = self._shard(stage, partition).rows_of(wanted)
                rows |= {key: (decode_key(key), row) for key, row in found.items()}
        return [rows[key] for key in sorted(rows)]

    # --- processing ---------------------------------------------------------------------------------------

    def _advance(self, *, one_by_one: bool, until: int | None = None) -> None:
        """Process what can be read.

        Args:
            one_by_one: commit after each record.
            until: process no records that were written after the record with this sequence.
        """
        __tracebackhide__ = True
        self._held_up.clear()
        while True:
            if self._load() and one_by_one:
                self._commit()
            shard = self._next_timed()
            record: StoredRecord | None = None
            if shard is None:
                found = self._next()
                if found is None:
                    return
                shard, record = found
                if until is not None and record.sequence > until:
                    return
                if not self._called(shard, record):
                    self._held_up.add(shard.id)
                    continue
            if self._process(shard, record) and one_by_one and not self._commit():
                found = shard.find_unkept()
                assert found is not None, "a state can't be stored, but no single one causes it"
                self._roll_back()
                self._condemn(shard, record, found)

    def _load(self) -> bool:
        """Let the shards that have read their global tables to the end say so with the next barrier. Returns
        whether there are some.
        """
        found = False
        for stage in self.topology.stages:
            for partition in range(self._stage_sizes[stage.name]) if stage.broadcasts else ():
                shard = self._shard(stage, partition)
                left = (self._first_of(stage, number, partition) for number, _step in stage.broadcasts)
                if all(record is None for record in left):
                    found |= shard.note_loaded()
        return found

    def _called(self, shard: Shard, record: StoredRecord) -> bool:
        """Make the calls of the shard's next record. Returns False if it has to wait for a circuit."""
        runner = shard.runners[shard.stage.input_of(record.topic())]
        return runner.calls is None or self._calls.make(runner.calls, lambda: runner.begin_calls(record))

    def _next_timed(self) -> Shard | None:
        """A shard whose timer is due."""
        for stage in self.topology.stages:
            if stage.timed_steps:
                for partition in range(self._stage_sizes[stage.name]):
                    shard = self._shard(stage, partition)
                    if shard.timers is not None and shard.timers.is_due():
                        return shard
        return None

    def _next(self) -> tuple[Shard, StoredRecord] | None:
        """The oldest record that can be read and hasn't been processed, and its shard."""
        oldest: tuple[Stage, StoredRecord] | None = None
        for stage in self.topology.stages:
            for partition in range(len(self._topics.partitions(stage.topics[0]))):
                if ShardId(stage.name, partition) in self._held_up:
                    continue
                record = self._next_of(stage, partition)
                if record is not None and (oldest is None or record.sequence < oldest[1].sequence):
                    oldest = (stage, record)
        if oldest is None:
            return None
        stage, record = oldest
        return self._shard(stage, record.partition()), record

    def _next_of(self, stage: Stage, partition: int) -> StoredRecord | None:
        """The next record of a shard: the one with the smallest timestamp of those that its inputs have."""
        unloaded = self._shard(stage, partition).unloaded() if stage.copies else ()
        first, first_ms = None, 0
        orders = self._orders[stage.name]
        for number in stage.precedence:
            record = self._first_of(stage, number, partition)
            if record is None or (unloaded and number not in unloaded):
                continue
            try:
                order_ms = orders[number](record)
            except FormatUnavailable:
                order_ms = NO_TIMESTAMP_MS  # the job is going to stop at it
            if first is None or order_ms < first_ms:
                first, first_ms = record, order_ms
        return first

    def _first_of(self, stage: Stage, number: int, partition: int) -> StoredRecord | None:
        """The next record of an input of a shard."""
        running = self._shards.get(ShardId(stage.name, partition))
        source = stage.inputs[number]
        committed, _metadata = self._committed.get((source.topic.name, partition), (0, ""))
        offset = committed if running is None else running.next_offset(number)
        held = self._topics.partitions(source.topic.name)[partition]
        return held.first_from(offset, source.topic.isolation)

    def _process(self, shard: Shard, record: StoredRecord | None) -> bool:
        """Process a record, or fire a timer. Returns False if the open epoch was rolled back, and will be
        processed again.
        """
        __tracebackhide__ = True
        try:
            if record is None:
                shard.fire()
            else:
                shard.handle(record)
        except UnreadableRecordError as error:
            if self._commit():  # the records before it
                self._stop(record, error)
            # A state can't be stored. The record comes again after those that are committed one by one.
            last = self._topics.sequence
            self._roll_back()
            self._advance(one_by_one=True, until=last)
            return False
        except HandlerError as error:
            self._roll_back()
            if record is not None:
                self._causes.setdefault(_place_of(record), _cause_of(error))
            self._condemn(shard, record, error.condemnation)
            return False
        except UnkeptStateError as error:
            alone, last = not self._dirty(), self._topics.sequence
            self._roll_back()
            if alone:
                self._condemn(shard, record, error.condemnation)
            else:
                self._advance(one_by_one=True, until=last)
            return False
        except BaseException:
            self._roll_back()
            raise
        return True

    def _sizes_of_stages(self) -> dict[str, int]:
        return {stage.name: len(self._topics.partitions(stage.topics[0])) for stage in self.topology.stages}

    def _dirty(self) -> list[Shard]:
        return [shard for shard in self._shards.values() if shard.dirty]

    def _commit(self) -> bool:
        """Commit the open epoch. Returns False if a state can't be stored: then the epoch must be rolled
        back.
        """
        dirty = self._dirty()
        if not dirty:
            return True
        epoch = self._epoch + 1
        try:
            frozen = [shard.freeze(epoch) for shard in dirty]
        except ProcessingError:
            return False
        for part in frozen:
            for record in part.delta:
                changelog = part.shard.stage.changelog
                assert changelog is not None
                self._topics.add(
                    changelog, part.shard.id.partition, None, record, self.now_ms, None, Visibility.OPEN
                )
        for told in self._told_by(dirty):
            self._topics.add(
                told.topic, told.partition, None, told.value, NO_TIMESTAMP_MS, told.headers, Visibility.OPEN
            )
        self._topics.commit()
        self._epoch = epoch
        self.skipped, self._port.skipped = self.skipped + self._port.skipped, 0
        self.late, self._port.late = self.late + self._port.late, 0
        for part in frozen:
            shard = part.shard
            for number, topic in enumerate(shard.stage.topics):
                at = part.position.of_input(number)
                self._committed[topic, shard.id.partition] = (at.offset, at.encode_metadata())
            shard.committed(part, self._changelog_end(shard.stage, shard.id.partition))
            left = [
                one
                for one in self._condemned.pop(shard.id, ())
                if one[1] >= part.position.inputs[one[0]].offset
            ]
            if left:
                self._condemned[shard.id] = left
        return True

    def _told_by(self, shards: list[Shard]) -> list[OwnRecord]:
        """What shards have to tell the stages downstream in this epoch."""
        clocks = {shard.id: shard.clock for shard in shards if shard.clock is not None}
        told = self._telling.due(clocks, self._stage_sizes, 0.0)
        for shard in shards:
            told += shard.take_loaded_marks(self._stage_sizes)
        return told

    def _roll_back(self) -> None:
        """Drop everything that isn't committed."""
        self._topics.abort()
        self._telling.forget(self._shards)
        self._calls.forget()
        for shard in self._shards.values():
            self._port.letters.of(shard.id).restore(self._letters_of(shard))
        self._shards.clear()
        self._port.skipped = self._port.late = 0

    def _condemn(self, shard: Shard, record: StoredRecord | None, condemnation: Condemnation) -> None:
        """Make the record, or the timer that the condemnation names, fail with it when it comes again."""
        condemned = self._condemned.setdefault(shard.id, [])
        if record is None or condemnation.is_of_timer:
            condemned.append((0, shard.next_offset(0), condemnation))
        else:
            condemned.append((shard.stage.input_of(record.topic()), record.offset(), condemnation))
        if len(condemned) > FAILURES_MAX:
            message = f"{condemnation.failure.message} (after failing in {FAILURES_MAX} other ways)"
            raise JobStopped(message, remedy=condemnation.failure.remedy, record=record)

    def _stop(self, record: StoredRecord | None, error: UnreadableRecordError) -> None:
        __tracebackhide__ = True
        message = error.failure.message
        remedy = (
            error.failure.remedy
            or "Correct the job, or give the step an on_error ('skip', or a dead-letter topic)."
        )
        cause = _cause_of(error)
        if isinstance(error, TimerStopsError):
            self._stopped = stopped = JobStopped(message, remedy=remedy)
            stopped.add_note(f"Its key: {bounded_repr(error.timer.key())}")
            raise stopped from cause
        assert record is not None
        self._stopped = stopped = JobStopped(message, remedy=remedy, record=record)
        stopped.add_note(f"Its key: {bounded_repr(record.key())}")
        stopped.add_note(f"Its value: {bounded_repr(record.value(), 1_000)}")
        raise stopped from self._causes.get(_place_of(record), cause)

    def _check_running(self) -> None:
        __tracebackhide__ = True
        stopped = self._stopped
        if stopped is None and self._finished:
            stopped = JobStopped("The run is finished.", remedy="Create another driver.")
        if stopped is not None:
            again = JobStopped(stopped.message, remedy=stopped.remedy)
            again.topic, again.partition, again.offset = stopped.topic, stopped.partition, stopped.offset
            raise again

    def _shard(self, stage: Stage, partition: int) -> Shard:
        """The running shard. It is restored if it doesn't run yet."""
        shard = self._shards.get(ShardId(stage.name, partition))
        if shard is None:
            shard_id = ShardId(stage.name, partition)
            changelog = None
            if stage.changelog is not None:
                changelog = self._topics.partitions(stage.changelog)[partition]
            shard = self._shards[shard_id] = Shard(
                stage,
                partition,
                self._position(stage, partition),
                changelog,
                self._port,
                self._passing,
                self._condemned.get(shard_id, []),
                lambda: self.now_ms,
                self._job_start,
            )
        return shard

    def _letters_of(self, shard: Shard) -> dict[str, int]:
        """The committed dead letters of a shard."""
        letters = self._position(shard.stage, shard.id.partition).letters
        return decode_counts(letters, self._job_start, shard.stage.dead_letter_names)

    def _position(self, stage: Stage, partition: int) -> CommittedPosition:
        committed = [self._committed.get((topic, partition)) for topic in stage.topics]
        positions = [None if at is None else decode_position(*at) for at in committed]
        return joined_position(positions, [0] * len(positions), self.topology.fingerprint)

    def _changelog_end(self, stage: Stage, partition: int) -> int:
        if stage.changelog is None:
            return 0
        return len(self._topics.partitions(stage.changelog)[partition].records)

    def _produce(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        timestamp_ms: int,
        headers: Sequence[Header] | None = None,
        partition: int | None = None,
    ) -> None:
        """What a worker's producer does with an output; see `engine.records.Produce`."""
        if _size_bytes(value, key, headers) > self._message_bytes_max:
            raise OutputRefusedError(output_too_large(topic, value, key))
        if partition is None:
            partition = self._topics.partition_for(topic, key, value)
        self._topics.add(
            topic, partition, key, value, timestamp_ms or NO_TIMESTAMP_MS, headers, Visibility.OPEN
        )

    # --- names --------------------------------------------------------------------------------------------

    def _spec(self, topic: TopicSpec | str) -> TopicSpec:
        name = topic if isinstance(topic, str) else topic.name
        spec = self._specs.get(name)
        if spec is None:
            raise _unknown("topic", name, self._specs, f"is not one of the job {self.topology.job!r}")
        return spec

    def _source(self, topic: TopicSpec | str) -> TopicSpec:
        spec = self._spec(topic)
        sources = [source.name for source in self.topology.sources]
        if spec.name not in sources:
            raise _unknown("topic", spec.name, sources, f"is not read by the job {self.topology.job!r}")
        return spec

    def _stage_of(self, handler: str) -> Stage:
        stages = {store: stage for stage in self.topology.stages for store in stage.stores}
        if handler not in stages:
            raise _unknown("handler", handler, stages, f"is not one of the job {self.topology.job!r}")
        return stages[handler]


def _by_key(pairs: Iterable[tuple[Any, _T]], what: str, instead: str) -> dict[Any, _T]:
    found: dict[Any, _T] = {}
    for key, value in pairs:
        try:
            found[key] = value
        except TypeError:
            raise JobError(
                f"{what} can't be keys of a dict, because they aren't hashable: {bounded_repr(key)}.",
                remedy=f"Use {instead}.",
            ) from None
    return found


def _resolved(job: Job, settings: Mapping[str, Any] | None) -> Settings:
    # Schemas are registered in this process, whatever registry the job names.
    return resolve(job.settings, None, {}, {"schema.registry.url": REGISTRY_URL, **(settings or {})})


def _specs_of(topology: Topology) -> dict[str, TopicSpec]:
    """All topics of the job except changelogs, by name."""
    specs = [topic for stage in topology.stages for topic in written_topics(stage)]
    specs += [source.topic for source in topology.inputs]
    return {spec.name: spec for spec in [*specs, *topology.topics]}


def _partition_counts(topology: Topology, given: int | Mapping[str, int]) -> dict[str, int]:
    """The partition count of each topic. Topics that the cluster would create get as many as the cluster
    would give them.
    """
    named: Mapping[str, int] = {} if isinstance(given, int) else given
    specs = _specs_of(topology)
    for name, count in named.items():
        if name not in specs:
            raise _unknown("topic", name, specs, f"is not one of the job {topology.job!r}")
        _check_count(name, count)
    default = given if isinstance(given, int) else PARTITIONS
    _check_count("partitions", default)
    counts = dict(named)
    copies = {stage.topics[number] for stage in topology.stages for number in stage.copies}
    for stage in topology.stages:
        own = [topic for topic in stage.topics if topic not in copies]
        if len(own) > 1:
            count = next((counts[topic] for topic in own if topic in counts), default)
            counts |= dict.fromkeys(own, count) | {t: counts[t] for t in own if t in counts}
    for stage in topology.stages:
        count = counts.setdefault(stage.topics[0], default)
        for number in stage.copies:
            counts.setdefault(stage.topics[number], count)
        check_copartitioned(stage, counts)
        for topic in written_topics(stage):
            if topic.name not in copies:
                counts.setdefault(topic.name, count)
        if stage.changelog is not None:
            counts[stage.changelog] = count
    most = max(counts[topic.name] for topic in topology.sources)
    for name in specs:
        counts.setdefault(name, most)
    return counts


def _place_of(record: StoredRecord) -> tuple[str, int, int]:
    return record.topic(), record.partition(), record.offset()


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{name}: {count!r} is not a number of partitions")


def _unknown(kind: str, name: str, known: Mapping[str, Any] | Sequence[str], trouble: str) -> JobError:
    near = near_names(name, known)
    remedy = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(map(repr, known))}."
    return JobError(f"The {kind} {name!r} {trouble}.", remedy=remedy)


def _message_bytes_max(settings: Settings) -> int:
    for name in ("producer.message.max.bytes", "message.max.bytes"):
        if name in settings.kafka:
            return int(settings.kafka[name])
    return _MESSAGE_BYTES_MAX


def _size_bytes(value: bytes | None, key: bytes | None, headers: Sequence[Header] | None) -> int:
    """The size that librdkafka compares with message.max.bytes."""
    size = _MESSAGE_OVERHEAD_BYTES + len(value or b"") + len(key or b"")
    for name, text in headers or ():
        for field in (name.encode(), text or b""):
            size += len(field) + _length_bytes(len(field))
    return size


def _length_bytes(length: int) -> int:
    """How many bytes Kafka writes a length with."""
    return max(1, -(-(2 * length).bit_length() // 7))


def _outcomes_of_tests() -> Iterator[type[BaseException]]:
    """If a handler raises what pytest.fail or pytest.skip raises, it is for pytest, whatever `on_error`
    says.
    """
    outcomes = sys.modules.get("_pytest.outcomes")
    if outcomes is not None:
        yield outcomes.OutcomeException


def _cause_of(error: BaseException) -> BaseException:
    """The exception that a function of the job or a codec raised, if the engine's exceptions have it."""
    cause = error.__cause__
    while isinstance(cause, StepFailure | HandlerError):
        cause = cause.error if isinstance(cause, StepFailure) else cause.__cause__
    return error if cause is None else cause


def _dead_letter(record: TopicRecord) -> DeadLetter | None:
    # A dead letter that was made from another dead letter has these twice. The last ones are its own.
    said = {name: (text or b"").decode() for name, text in record.headers if name.startswith("fcluster.")}
    if "fcluster.error" not in said:
        return None
    return DeadLetter(
        record,
        said["fcluster.error"],
        said["fcluster.handler"],
        said["fcluster.topic"],
        int(said["fcluster.partition"]),
        int(said["fcluster.offset"]),
        "fcluster.stub" in said,
    )
