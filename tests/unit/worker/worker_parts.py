"""Shared by tests of the worker's parts: a shard of a counting job, its records, and a writer without
Kafka."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import orjson

from fcluster import Job, Watermark
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition, InputOffset
from fcluster.common.settings import Settings
from fcluster.engine.state import ShardState
from fcluster.graph.topology import Topology
from fcluster.worker.batches import Batches
from fcluster.worker.consuming import Batch
from fcluster.worker.core import events, model
from fcluster.worker.core.state import CoreState
from fcluster.worker.epoch_pipeline import EpochPipeline
from fcluster.worker.inbox import CallsEnded, Inbox
from fcluster.worker.processing import OutputPort, ShardRunner
from fcluster.worker.record_pump import RecordPump
from fcluster.worker.record_watch import RecordWatch
from fcluster.worker.running_shards import RunningShards
from fcluster.worker.source_checks import SourceChecks
from fcluster.worker.transactions import AwaitedOutputs, FrozenEpoch, TransactionLostError, never
from fcluster.worker.watchdog import Watchdog
from tests.state_memory import EntriesMax
from tests.unit.engine.memory_store import MemoryStore

SESSION = 7
IDENTITY = model.Identity("worker-1", "host", 1, -1, "fingerprint", "store", "1")
BOUNDS = model.Bounds(epoch_records_max=100, coordinator_loss_ms=1_000, offset_refresh_ms=1_000)
PATIENCE_S = 20.0


class Message:
    """A consumed message."""

    def __init__(
        self, offset: int, value: bytes = b'"x"', topic: str = "in", partition: int = 0, timestamp_ms: int = 5
    ) -> None:
        self._offset, self._value, self._topic, self._partition = offset, value, topic, partition
        self._timestamp_ms = timestamp_ms

    def __len__(self) -> int:
        return len(self._value)

    def key(self) -> bytes:
        return b"k"

    def value(self) -> bytes:
        return self._value

    def timestamp(self) -> tuple[int, int]:
        return 1, self._timestamp_ms

    def headers(self) -> Any:
        return None

    def topic(self) -> str:
        return self._topic

    def partition(self) -> int:
        return self._partition

    def offset(self) -> int:
        return self._offset


def count(ctx: Any, value: Any) -> Iterator[Any]:
    """The handler of the counting job. It raises on "bad", and its state can't be stored on "odd"."""
    if value == "bad":
        raise ValueError("a bad value")
    ctx.state["n"] = object() if value == "odd" else ctx.state.get("n", 0) + 1
    yield {"n": 0 if value == "odd" else ctx.state["n"]}


def counting_topology(**options: Any) -> Topology:
    """A job from `in` to `out`."""
    job = Job("j")
    job.process(job.topic("in"), to=job.topic("out"), name="count", **options)(count)
    return job.build(Settings())


def merging_topology() -> Topology:
    """A job from `a` and `b`, in the order of their timestamps, to `out`."""
    job = Job("j")
    job.merge(job.topic("a"), job.topic("b")).process(count, name="count").to(job.topic("out"))
    return job.build(Settings())


def timed_topology(idle_ms: int, max_drift_ms: int | None = None) -> Topology:
    """A job from `in` to `out`, with event time."""
    job = Job("j")
    watermark = Watermark(idle_ms=idle_ms, max_drift_ms=max_drift_ms)
    job.process(job.topic("in", watermark=watermark), to=job.topic("out"), name="count")(count)
    return job.build(Settings())


def shard_of(topology: Topology, partition: int = 0) -> ShardId:
    """A shard of the first stage."""
    return ShardId(topology.stages[0].name, partition)


def new_state(topology: Topology) -> ShardState:
    """The state of a shard of the first stage, above an empty store."""
    return ShardState(MemoryStore(), topology.stages[0].all_stores, EntriesMax(1000))


def new_runner(topology: Topology, port: OutputPort, partition: int = 0) -> ShardRunner:
    """The runner of a shard of the first stage that has read nothing yet."""
    start = CommittedPosition(0, 0, 0, "")
    return ShardRunner(topology.stages[0], partition, new_state(topology), start, port)


def new_core_state() -> CoreState:
    """A worker's core in a session."""
    state = CoreState(IDENTITY, BOUNDS, 0)
    state.session, state.slot, state.phase = SESSION, 0, model.Phase.STARTING
    state.phase = model.Phase.ACTIVE
    return state


class FakeTransaction:
    """Acknowledges everything, unless `fail` says otherwise."""

    def __init__(self, log: list[str], fail: dict[str, BaseException], number: int) -> None:
        self._log, self._fail, self._number = log, fail, number
        self.outputs: list[tuple[Any, ...]] = []
        self.sent = 0
        self.preparing = threading.Event()
        self.acknowledges = threading.Event()
        self.acknowledges.set()
        self.waiting: list[int] = []  # what `serve` returns, in turn; after that 0

    def note(self, what: str) -> None:
        self._log.append(f"{what} {self._number}")
        if what in self._fail:
            raise self._fail[what]

    def produce(self, *arguments: Any) -> None:
        self.outputs.append(arguments)

    def serve(self, send: bool) -> int:
        self.sent += send
        return self.waiting.pop(0) if self.waiting else 0

    def check(self) -> None:
        self.note("check")

    def flush_outputs(self, failed: Callable[[], bool] = never) -> None:
        """Takes until `acknowledges` is set, or the epoch has failed."""
        while not self.acknowledges.wait(0.001) and not failed():
            pass
        self.note("flush")

    def prepare(self, frozen: FrozenEpoch, outputs: AwaitedOutputs) -> None:
        self.preparing.set()
        if "prepare" in self._fail:
            self.note("prepare")
        outputs.wait()
        self.note("prepare")
        for part in frozen.parts:
            if part.records:
                frozen.changelog_next[part.shard] = 100 * frozen.epoch

    def commit(self, frozen: FrozenEpoch) -> None:
        self.note("commit")


class FakeWriter:
    """Records the calls, in order.

    Attributes:
        fail: errors to raise, by the name of the call.
        opening: set when `open` is called. It returns once `opens` is set, which it is unless a test clears
        it.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self.transactions: list[FakeTransaction] = []
        self.give_up: Callable[[str], None] = lambda _reason: None
        self.last_use: Callable[[], object] | None = None
        self.opening = threading.Event()
        self.opens = threading.Event()
        self.opens.set()

    def make(self, give_up: Callable[[str], None]) -> FakeWriter:
        """The factory that an `EpochPipeline` gets."""
        self.give_up = give_up
        return self

    def open(self) -> None:
        self.opening.set()
        assert self.opens.wait(PATIENCE_S)
        self.log.append("open")
        if "open" in self.fail:
            raise self.fail["open"]

    def begin(self) -> FakeTransaction:
        if "begin" in self.fail:
            raise self.fail["begin"]
        transaction = FakeTransaction(self.log, self.fail, len(self.transactions))
        self.transactions.append(transaction)
        transaction.note("begin")
        return transaction

    def abort(self) -> None:
        self.log.append("abort")
        if "abort" in self.fail:
            raise self.fail["abort"]

    def destroy(self, last_use: Callable[[], object]) -> None:
        self.log.append("destroy")
        self.last_use = last_use


def lost(code: int | None = None, *, abortable: bool = False) -> TransactionLostError:
    """The error of a failed transaction."""
    return TransactionLostError("ProduceRequest for out [0] failed", code, abortable=abortable)


class FakeReader:
    """Records what it is told to read. Nothing arrives by itself."""

    def __init__(self) -> None:
        self.newest_generation = 0
        self.read: dict[tuple[str, int], int] = {}
        self.reads = True
        self.batches_done = 0
        self.held: list[tuple[tuple[str, int], str]] = []

    def hold(self, partition: tuple[str, int], why: str = "full") -> None:
        self.held.append((partition, why))

    def release(self, partition: tuple[str, int], why: str = "full") -> None:
        self.held.remove((partition, why))

    def start(self, offsets: Mapping[tuple[str, int], int], *, watched: bool = False) -> int:
        self.read |= offsets
        self.newest_generation += 1
        return self.newest_generation

    def stop(self, partitions: set[tuple[str, int]]) -> int:
        for partition in partitions:
            del self.read[partition]
        self.newest_generation += 1
        return self.newest_generation

    def pause(self) -> None:
        self.reads = False

    def resume(self) -> None:
        self.reads = True

    def done(self) -> None:
        self.batches_done += 1

    def close(self, timeout_s: float) -> None:
        self.read.clear()


class FakeLink:
    """A connection that is open. It keeps what is sent."""

    def __init__(self) -> None:
        self.connected = True
        self.sent: list[Any] = []
        self.trouble: list[str] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)

    announce = send

    def say_trouble(self, trouble: str) -> None:
        self.trouble.append(trouble)


class Pumping:
    """A record pump with its shards, readers and epochs, in a session. The events for the core are kept."""

    def __init__(self, topology: Topology) -> None:
        settings = Settings()
        self.topology = topology
        self.core_state = new_core_state()
        self.fed: list[events.Event] = []
        self.on_feed: Callable[[events.Event], None] = lambda _event: None
        self.inbox = Inbox()
        self.link = FakeLink()
        self.port = OutputPort()
        self.reader = FakeReader()
        self.writer = FakeWriter()
        self.record_watch = RecordWatch()
        self.told = 0
        self.said: list[str] = []
        self.shards = RunningShards(
            topology,
            settings,
            self.inbox.put,
            wake=lambda: self.inbox.put(CallsEnded()),
            say=self.said.append,
        )
        for stage in topology.stages:
            for source in stage.inputs:
                key = (source.topic.isolation, len(stage.inputs) > 1)
                self.shards._readers[key] = self.reader  # type: ignore[assignment]
        checks = SourceChecks("j", lambda _topics: Future(), lambda _expected: {})
        self.pipeline = EpochPipeline(
            topology,
            self.core_state,
            self.port,
            Batches(settings, lambda _topic: None),
            checks,
            Watchdog(),
            60.0,
            self.inbox.post,
            lambda *_delta: None,
        )
        self.pump = RecordPump(
            self.shards,
            self.pipeline,
            self.core_state,
            self._feed,
            self.inbox,
            self.link,  # type: ignore[arg-type]
            checks,
            self.record_watch,
            Watchdog(),
            60.0,
            self._note_told,
        )
        self.pump._chunks._record_s = 1e-7  # as if it had already learned how long a record takes
        self.pipeline.open(SESSION, self.writer.make)
        assert next(self.inbox.take(PATIENCE_S)) == events.ProducersOpened(SESSION)
        self.inbox.interrupts.clear()

    def _feed(self, event: events.Event) -> None:
        self.fed.append(event)
        self.on_feed(event)

    def _note_told(self) -> None:
        self.told += 1

    def start(self, partition: int = 0, **fields: Any) -> ShardRunner:
        """Start to read a shard of the first stage."""
        shard, stage = shard_of(self.topology, partition), self.topology.stages[0]
        further = tuple(InputOffset(0) for _ in stage.inputs[1:])
        position = CommittedPosition(0, 0, 0, "", further=further)
        effect = events.StartReading(shard, position, **{"stop_record": None, **fields})
        self.pump.start(effect, stage, new_state(self.topology), self.port)
        self.core_state.shards[shard] = owned = model.OwnedShard(model.ShardPhase.RESTORING)
        owned.phase = model.ShardPhase.RESTORED
        owned.phase = model.ShardPhase.RUNNING
        return self.shards.runners[shard]

    def read(self, *messages: Message, full: bool = False, **fields: Any) -> None:
        """Let the reader read these records."""
        batch: Any = Batch(self.reader, self.reader.newest_generation, list(messages), full, **fields)  # type: ignore[arg-type]
        self.pump.add(batch)

    def run(self) -> None:
        """Process everything that was read."""
        while self.pump.has_work:
            self.inbox.interrupts.clear()
            self.pump.run_chunk()
            self.pump.add_merged()

    def counts(self) -> list[int]:
        """What the handler has written in all epochs."""
        outputs = [output for one in self.writer.transactions for output in one.outputs]
        return [orjson.loads(output[1])["n"] for output in outputs]

    def close(self) -> None:
        self.pipeline.destroy()
        self.pipeline.close()
