"""What an epoch costs and how many steps it takes, without Kafka: latency, as far as it isn't Kafka's.

    python -m benchmarks.epochs [--rounds 9] [--record] [--guard]

The real cores of a worker and a coordinator, their real messages, the record pump, the epoch pipeline with
its commit thread, the transactions, and RocksDB. Only the client library is a model: it acknowledges at once.
An epoch has ten records of two partitions. It begins when the records are there, and ends when the worker
knows that it is committed; the next one begins after that.

*Steps* are counted: messages to and from the coordinator, how often the main thread waits for another thread,
tasks of the commit thread, the requests that Kafka would get, and sleeps. A step more is a delay more for
each record, whatever a machine's speed; so the numbers are compared exactly.

*Processor time* of an epoch is divided by that of a reference loop: what the same records and messages ask
for with the same libraries, with the same number of turns of two threads, and some plain Python, of which an
epoch mostly consists. Both run in this one process, in turns, and the best part of each counts: a machine
that is slow, or busy so that caches are spoiled, slows both.

Both are recorded in `epoch_figures.json`, and guard against changes that make epochs slower
(`tests/integration/test_epoch_guard.py`); `--record` writes them anew.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import orjson
from confluent_kafka import Message, TopicPartition

from fcluster import Job
from fcluster.common.clocks import monotonic_ms
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings
from fcluster.coordinator.core import events as leading
from fcluster.coordinator.core.coordinator import Coordinator
from fcluster.coordinator.core.model import Terms
from fcluster.engine.memory import StateMemory
from fcluster.engine.state import ShardState
from fcluster.graph.topology import Topology
from fcluster.storage.store import StoreDirectory
from fcluster.wire import messages
from fcluster.worker import epoch_pipeline
from fcluster.worker.batches import Batches
from fcluster.worker.commit_thread import CommitThread
from fcluster.worker.consuming import Batch
from fcluster.worker.core import events, model
from fcluster.worker.core.worker import WorkerCore
from fcluster.worker.epoch_pipeline import EpochPipeline
from fcluster.worker.inbox import Inbox
from fcluster.worker.kafka_waits import KafkaWaits
from fcluster.worker.processing import OutputPort
from fcluster.worker.record_pump import RecordPump
from fcluster.worker.record_watch import RecordWatch
from fcluster.worker.running_shards import RunningShards
from fcluster.worker.source_checks import SourceChecks
from fcluster.worker.transactions import TransactionalWriter
from fcluster.worker.watchdog import Watchdog

FIGURES_FILE = Path(__file__).with_name("epoch_figures.json")
PARTITIONS = 2
RECORDS = 10
KEYS = 100
EPOCHS = 300
PART_EPOCHS = 30
WORSE_MAX = 1.25
"""The guard fails above the recorded ratio times this."""
TIME_LIMIT_S = 120.0
VERSION = "1"
SETTINGS = Settings(
    commit_interval_min_ms=0,
    initial_rebalance_delay_ms=0,
    session_timeout_ms=3_600_000,
    checkpoint_timeout_ms=3_600_000,
    transaction_timeout_ms=4 * 3_600_000,
)
"""No epoch waits for its interval, and nobody is dead because the machine is busy."""


def totals_topology() -> Topology:
    """Running count and sum for each key."""
    job = Job("epochs")

    @job.process(job.topic("in", value="json"), to=job.topic("out", value="json"))
    def totals(ctx: Any, record: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
        state = ctx.state
        state["count"] = state.get("count", 0) + 1
        state["sum"] = state.get("sum", 0) + record["value"]
        return {"id": record["id"], "count": state["count"], "sum": state["sum"]}

    return job.build(SETTINGS)


def make_epochs(count: int) -> list[list[Message]]:
    """The records of so many epochs, as a consumer returns them."""
    offsets = [itertools.count() for _ in range(PARTITIONS)]
    return [
        [
            Message(
                topic="in",
                partition=number % PARTITIONS,
                offset=next(offsets[number % PARTITIONS]),
                key=b"k%d" % (number * 7919 % KEYS),
                value=orjson.dumps({"id": number, "value": number % 1000}),
                timestamp=(1, 1_700_000_000_000 + number),
            )
            for number in range(epoch * RECORDS, (epoch + 1) * RECORDS)
        ]
        for epoch in range(count)
    ]


# --- what is counted ----------------------------------------------------------------------------------


class Steps(Counter[str]):
    """How often each step was taken in one epoch. Both threads count."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def note(self, step: str, times: int = 1) -> None:
        """It was taken."""
        with self._lock:
            self[step] += times

    def take(self) -> tuple[tuple[str, int], ...]:
        """What was counted since the last call."""
        with self._lock:
            counted = tuple(sorted(self.items()))
            self.clear()
        return counted


class Acknowledged:
    """The report of a delivered record."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def offset(self) -> int:
        """Its offset."""
        return self._offset


class ModelProducer:
    """A transactional producer whose brokers answer at once. It counts the requests that they would get."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._unsent: list[tuple[str, Callable[[Any, Any], None] | None]] = []
        self._registered: set[str] = set()
        self._next_offset = 0

    def __len__(self) -> int:
        return len(self._unsent)

    def begin_transaction(self) -> None:
        """Local to the client."""
        self._registered.clear()

    def produce(
        self,
        topic: str,
        _value: bytes | None,
        _key: bytes | None = None,
        _partition: int = -1,
        _callback: Any = None,
        on_delivery: Callable[[Any, Any], None] | None = None,
        *_more: Any,
        partition: int = -1,
    ) -> None:
        """Queue a record."""
        self._unsent.append((f"{topic} {partition}" if partition >= 0 else topic, on_delivery))

    def poll(self, timeout_s: float) -> int:
        """Serve delivery reports."""
        if timeout_s > 0:
            self._steps.note("waits of the client")
        return 0

    def flush(self, timeout_s: float) -> int:
        """Send what is queued."""
        unsent, self._unsent = self._unsent, []
        if not unsent:
            return 0
        # Both may be sent in one round or in two: two threads produce them.
        for kind in sorted({"deltas" if " " in topic else "outputs" for topic, _ in unsent}):
            self._steps.note(f"rounds of Produce for {kind}")
        for topic in {topic for topic, _ in unsent} - self._registered:
            self._registered.add(topic)
            self._steps.note("partitions registered" if " " in topic else "output topics registered")
        for _, on_delivery in unsent:
            if on_delivery is not None:
                self._next_offset += 1
                on_delivery(None, Acknowledged(self._next_offset))
        return 0

    def send_offsets_to_transaction(self, offsets: Sequence[TopicPartition], *_more: Any) -> None:
        """Two requests: AddOffsetsToTxn and TxnOffsetCommit."""
        self._steps.note("offsets", len(offsets))
        self._steps.note("AddOffsetsToTxn and TxnOffsetCommit")

    def commit_transaction(self, _timeout_s: float) -> None:
        """One request. It flushes before."""
        self.flush(0)
        self._steps.note("EndTxn")

    def purge(self) -> None:
        """The session is over."""
        self._unsent.clear()


class WriterWithoutKafka(TransactionalWriter):
    """The real writer with modelled producers."""

    steps: Steps

    def _open_one(self, config: Mapping[str, Any], transactional_id: str) -> Any:
        return ModelProducer(self.steps)


class CountingCommitThread(CommitThread):
    """Counts its tasks."""

    steps: Steps

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.steps.note("tasks of the commit thread")
        return super().submit(fn, *args, **kwargs)


class ModelReader:
    """A reader that is given its batches by the benchmark."""

    newest_generation = 1

    def start(self, offsets: Any, *, watched: bool = False) -> int:
        """Returns the generation."""
        return self.newest_generation

    def stop(self, partitions: Any) -> int:
        """Returns the generation."""
        return self.newest_generation

    def pause(self) -> None:
        """Nothing to be done."""

    def resume(self) -> None:
        """Nothing to be done."""

    def close(self, timeout_s: float) -> None:
        """Nothing to be done."""

    def done(self) -> None:
        """A batch is processed."""


# --- a worker and its coordinator ----------------------------------------------------------------------


class OneWorker:
    """A coordinator and a worker in one process, without sockets.

    Args:
        directory: for the worker's state.
        slower: how many times as long an epoch is to take: a planted slowdown if it is more than 1.
        steps_more: how many tasks more the commit thread gets for each epoch: a planted step.

    Attributes:
        committed: how many epochs are committed.
        states: the states of its shards.
    """

    def __init__(self, directory: Path, slower: float = 1.0, steps_more: int = 0) -> None:
        self.steps = steps = Steps()
        self._slower, self._steps_more = slower, steps_more
        self._topology = topology = totals_topology()
        self._stores = StoreDirectory(directory)
        self._memory = StateMemory(SETTINGS.state_memory_bytes)
        self.states: dict[ShardId, ShardState] = {}
        terms = Terms(1, topology, {"in": PARTITIONS}, SETTINGS, 1, VERSION)
        self._leader = Coordinator.recover({}, terms, monotonic_ms())
        identity = model.Identity("worker-1", "host", 1, -1, topology.fingerprint, "store", VERSION)
        bounds = model.Bounds(epoch_records_max=1_000, coordinator_loss_ms=10**9, offset_refresh_ms=10**9)
        self._core = WorkerCore(identity, bounds, monotonic_ms())
        self._inbox = Inbox()
        self._to_worker: deque[bytes] = deque()
        self._port = OutputPort()
        checks = SourceChecks(topology.job, lambda _topics: Future(), lambda _expected: {})
        watchdog = Watchdog()
        self._shards = RunningShards(
            topology, SETTINGS, self._inbox.put, wake=lambda: None, say=lambda _text: None
        )
        self._reader = ModelReader()
        setattr(self._shards, "_readers", {("read-committed", False): self._reader})  # noqa: B010
        self._batches = Batches(SETTINGS, lambda _topic: None)
        self._pipeline = EpochPipeline(
            topology,
            self._core.state,
            self._port,
            self._batches,
            checks,
            watchdog,
            TIME_LIMIT_S,
            self._inbox.post,
            lambda *_delta: None,
        )
        link: Any = None
        self._pump = RecordPump(
            self._shards,
            self._pipeline,
            self._core.state,
            self._feed,
            self._inbox,
            link,
            checks,
            RecordWatch(),
            watchdog,
            TIME_LIMIT_S,
            lambda: None,
        )
        self._waits = KafkaWaits(watchdog)
        self.committed = 0
        with counting_threads(steps):
            self._lead(leading.Started())
            self._feed(events.Connected())
            self._work(lambda: len(self._shards.runners) == PARTITIONS)

    def run(self, epochs: Sequence[list[Message]]) -> list[tuple[tuple[str, int], ...]]:
        """Commit each of these epochs. Returns the steps of each."""
        self.steps.take()
        taken: list[tuple[tuple[str, int], ...]] = []
        for records in epochs:
            began_s = time.process_time()
            wanted = self.committed + 1
            reader: Any = self._reader
            self._pump.add(Batch(reader, reader.newest_generation, records, False))
            self._work(lambda: self.committed >= wanted)  # noqa: B023  called at once
            taken.append(self.steps.take())
            if self._slower > 1:
                ends_s = began_s + self._slower * (time.process_time() - began_s)
                while time.process_time() < ends_s:
                    pass
        return taken

    def close(self) -> None:
        """End its threads."""
        self._pipeline.destroy()
        self._pipeline.close()
        self._stores.close_all()

    def _work(self, is_done: Callable[[], bool]) -> None:
        """The worker's main loop, and the coordinator's."""
        deadline_s = time.monotonic() + TIME_LIMIT_S
        while not is_done():
            assert time.monotonic() < deadline_s, "the worker doesn't get on"
            if self._pump.has_work:
                for event in self._inbox.take(0):
                    self._handle(event)
                self._pump.run_chunk()
            elif not self._deliver():
                self.steps.note("waits of the main thread")
                for event in self._inbox.take(1.0):
                    self._handle(event)

    def _handle(self, event: Any) -> None:
        self._feed(event)
        if isinstance(event, events.EpochCommitted):
            self.committed += 1

    def _deliver(self) -> bool:
        """Whether there was a message for the worker."""
        if not self._to_worker:
            return False
        frame = self._to_worker.popleft()
        self._feed(events.MessageReceived(messages.decode_from_coordinator(frame)))
        return True

    def _feed(self, event: events.Event) -> None:
        for effect in self._core.handle(event, monotonic_ms()):
            match effect:
                case events.Send(message):
                    self.steps.note(f"{type(message).__name__} to the coordinator")
                    received = messages.decode_for_coordinator(messages.encode(message))
                    self._lead(leading.MessageReceived(b"worker", received))
                case events.PrepareEpoch():
                    self._pipeline.prepare(effect, self._shards.runners)
                case events.CommitEpoch():
                    self._pipeline.commit(effect)
                    for _ in range(self._steps_more):
                        self._pipeline.rest()
                case events.OpenProducers(session):
                    self._pipeline.open(session, self._make_writer)
                case events.RestoreShards(session, shards):
                    for shard in shards:
                        store = self._stores.open(shard)
                        stores = self._topology.stage(shard.stage).all_stores
                        self.states[shard] = ShardState(store, stores, self._memory)
                        position = CommittedPosition(0, 0, 0, "")
                        self._inbox.post(events.ShardRestored(session, shard, position))
                case events.StartReading(shard):
                    stage = self._topology.stage(shard.stage)
                    self._pump.start(effect, stage, self.states[shard], self._port)
                case events.Exit():
                    raise AssertionError(effect.reason)
                case _:
                    pass

    def _make_writer(self, give_up: Callable[[str], None]) -> WriterWithoutKafka:
        writer = WriterWithoutKafka(
            SETTINGS, self._topology.job, 0, None, self._batches, self._waits, give_up
        )
        writer.steps = self.steps
        return writer

    def _lead(self, event: leading.Event) -> None:
        waiting = [event]
        while waiting:
            for effect in self._leader.handle(waiting.pop(0), monotonic_ms()):
                match effect:
                    case leading.SendMessage(_, message):
                        self.steps.note(f"{type(message).__name__} to the worker")
                        self._to_worker.append(messages.encode(message))
                    case leading.WriteJournal():
                        waiting.append(leading.JournalWritten(effect.sequence))
                    case leading.FenceSlot(slot):
                        waiting.append(leading.SlotFenced(slot))
                    case _:
                        pass


@contextmanager
def counting_threads(steps: Steps) -> Iterator[None]:
    """Commit threads that are created meanwhile count their tasks."""

    def make() -> Executor:
        thread = CountingCommitThread()
        thread.steps = steps
        return thread

    before = epoch_pipeline.CommitThread
    setattr(epoch_pipeline, "CommitThread", make)  # noqa: B010
    try:
        yield
    finally:
        setattr(epoch_pipeline, "CommitThread", before)  # noqa: B010


@contextmanager
def counting_sleeps(steps: Steps) -> Iterator[None]:
    """Count the calls of `time.sleep` in all threads."""
    sleep = time.sleep

    def counted(seconds: float) -> None:
        steps.note("sleeps")
        sleep(seconds)

    setattr(time, "sleep", counted)  # noqa: B010
    try:
        yield
    finally:
        setattr(time, "sleep", sleep)  # noqa: B010


# --- the reference loop ---------------------------------------------------------------------------------


class Reference:
    """The least that the task asks for, with the same libraries: a main thread that processes the records, a
    second one that encodes what has changed, five messages, and two turns of the second thread. Besides, the
    standard library encodes each output, in Python.
    """

    def __init__(self) -> None:
        self._encode_in_python = json.JSONEncoder(indent=1).encode
        self._state: dict[bytes, dict[str, int]] = {}
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._messages: list[messages.ToCoordinator | messages.FromCoordinator] = [
            messages.Dirty(1, False),
            messages.Barrier(1, 1, 1),
            messages.Prepared(1, 1, RECORDS, 1.0, False),
            messages.Complete(1, 1, 1),
            messages.Committed(1, 1, 1.0, False, []),
        ]
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder().decode

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            self._done.put(None)

    def run(self, epochs: Sequence[list[Message]]) -> None:
        """Process these epochs."""
        for records in epochs:
            touched: dict[bytes, dict[str, int]] = {}
            outputs: list[bytes] = []
            for message in records:
                key: Any = message.key()
                record = orjson.loads(message.value() or b"")
                found = self._state.setdefault(key, {"count": 0, "sum": 0})
                found["count"] += 1
                found["sum"] += record["value"]
                touched[key] = found
                outputs.append(orjson.dumps({"id": record["id"], **found}))
                for number in range(3):
                    self._encode_in_python({"id": record["id"], **found, "number": number})
            for one in self._messages:
                self._decode(self._encode(one))
            for task in (lambda: self._encode_all(touched), outputs.clear):  # noqa: B023  done at once
                self._tasks.put(task)
                self._done.get()

    def _encode_all(self, touched: Mapping[bytes, dict[str, int]]) -> None:
        self._encode({key: orjson.dumps(value) for key, value in touched.items()})

    def close(self) -> None:
        """End its thread."""
        self._tasks.put(None)
        self._thread.join()


# --- measuring and judging ------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What was found.

    Attributes:
        epoch_us, reference_us: processor time for an epoch in microseconds, the best part of all rounds.
        planted_us: the same with the planted slowdown.
        steps: of most epochs.
    """

    epoch_us: float = float("inf")
    reference_us: float = float("inf")
    planted_us: float = float("inf")
    steps: Mapping[str, int] = {}

    @property
    def ratio(self) -> float:
        """The epoch's processor time by the loop's."""
        return self.epoch_us / self.reference_us


def _us(run: Callable[[Sequence[list[Message]]], object], epochs: Sequence[list[Message]]) -> float:
    """Microseconds of processor time for an epoch, in the best part: short parts are disturbed less often."""
    gc.collect()
    best_s = float("inf")
    for begin in range(0, len(epochs), PART_EPOCHS):
        part = epochs[begin : begin + PART_EPOCHS]
        began_s = time.process_time()
        run(part)
        best_s = min(best_s, (time.process_time() - began_s) / len(part))
    return best_s * 1e6


def measure(rounds: int, slower: float = 0.0, steps_more: int = 0) -> Iterator[Measured]:
    """After each round, the best of all rounds until then.

    Args:
        slower: measure besides epochs that take so many times as long. 0: don't.
        steps_more: see `OneWorker`.
    """
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)  # as in a worker
    sys.setswitchinterval(0.001)
    epochs = make_epochs(EPOCHS)
    found = Measured()
    counted: Counter[tuple[tuple[str, int], ...]] = Counter()
    for _ in range(rounds):
        directory = Path(tempfile.mkdtemp(prefix="fcluster-epochs-"))
        reference = Reference()
        worker = OneWorker(directory / "one", 1.0, steps_more)
        planted = OneWorker(directory / "planted", slower) if slower else None
        try:
            with counting_sleeps(worker.steps):
                epoch_us = _us(lambda epochs: counted.update(worker.run(epochs)), epochs)  # noqa: B023
            found = found._replace(
                epoch_us=min(found.epoch_us, epoch_us),
                reference_us=min(found.reference_us, _us(reference.run, epochs)),
                steps=dict(counted.most_common(1)[0][0]),
            )
            if planted is not None:
                found = found._replace(planted_us=min(found.planted_us, _us(planted.run, epochs)))
            yield found
        finally:
            reference.close()
            worker.close()
            if planted is not None:
                planted.close()
            shutil.rmtree(directory)


class Recorded(msgspec.Struct):
    """The contents of `epoch_figures.json`."""

    ratio: float
    steps: dict[str, int]


def recorded() -> Recorded:
    """The figures to compare with."""
    return msgspec.json.decode(FIGURES_FILE.read_bytes(), type=Recorded)


def find_more_steps(found: Mapping[str, int], known: Mapping[str, int]) -> str:
    """What to say about steps that differ from the recorded ones. Empty if none do."""
    differing = [
        f"{step}: {found.get(step, 0)}, recorded {known.get(step, 0)}"
        for step in sorted({*found, *known})
        if found.get(step, 0) != known.get(step, 0)
    ]
    if not differing:
        return ""
    return (
        f"an epoch takes other steps than recorded: {'; '.join(differing)}. More steps are more latency for "
        "each record. docs/performance.md says what to do."
    )


def find_slower(epoch_us: float, reference_us: float, ratio: float) -> str:
    """What to say if an epoch takes too much processor time. Empty if it doesn't."""
    now = epoch_us / reference_us
    if now <= ratio * WORSE_MAX:
        return ""
    return (
        f"latency: an epoch takes {epoch_us:.0f} us of processor time, {now:.2f} times the reference loop "
        f"({reference_us:.0f} us). Recorded is {ratio:.2f} times: this is {100 * (now / ratio - 1):.0f}% "
        f"slower, and the limit is {100 * (WORSE_MAX - 1):.0f}%. docs/performance.md says how to find the "
        "cause, and when to record another ratio."
    )


def judge(rounds_min: int, rounds_max: int, steps_more: int = 0) -> list[str]:
    """What is wrong in the end. Rounds go on while epochs are too slow: each can only improve the best."""
    wrong: list[str] = []
    for number, found in enumerate(measure(rounds_max, steps_more=steps_more), start=1):
        known = recorded()
        slower = find_slower(found.epoch_us, found.reference_us, known.ratio)
        wrong = [one for one in (find_more_steps(found.steps, known.steps), slower) if one]
        if number >= rounds_min and not slower:
            break
    return wrong


def judge_planted(slower: float, rounds_min: int, rounds_max: int) -> list[str]:
    """What is said of a planted slowdown, by the ratio of the same rounds without it. Rounds go on until
    it is found.
    """
    wrong = ""
    for number, found in enumerate(measure(rounds_max, slower), start=1):
        wrong = find_slower(found.planted_us, found.reference_us, found.ratio)
        if number >= rounds_min and wrong:
            break
    return [wrong] if wrong else []


def main() -> int:
    """Run and print; 1 if `--guard` finds something."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--record", action="store_true", help="Write the figures that the guard compares with.")
    made.add_argument("--guard", action="store_true", help="Fail if an epoch is slower, or has other steps.")
    made.add_argument("--plant", type=float, metavar="TIMES", help="Judge epochs so many times slower.")
    made.add_argument("--plant-step", action="store_true", help="Judge epochs with a step more.")
    chosen = made.parse_args()
    if chosen.guard:
        rounds = chosen.rounds, 5 * chosen.rounds
        if chosen.plant:
            wrong = judge_planted(chosen.plant, *rounds)
        else:
            wrong = judge(*rounds, steps_more=int(chosen.plant_step))
        print(*wrong, sep="\n")
        return 1 if wrong else 0
    *_, found = measure(chosen.rounds)
    print(
        f"an epoch of {RECORDS} records: {found.epoch_us:.0f} us of processor time, the reference loop "
        f"{found.reference_us:.0f} us, ratio {found.ratio:.2f}"
    )
    for step, times in sorted(found.steps.items()):
        print(f"    {step}: {times}")
    if chosen.record:
        figures = {"ratio": round(found.ratio, 3), "steps": found.steps}
        FIGURES_FILE.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
