"""Writes a worker's epochs to Kafka: outputs, deltas and offsets, which become visible together or not at
all.

Responsible for: the two transactional producers of a session and the order of calls on them. While one
producer's epoch is prepared and committed in the commit thread, the other producer takes the outputs of the
next epoch. Deltas and offsets are on their way while the main thread still waits for the acknowledgements of
the epoch's outputs (decision 0131).

Invariants:
- `open` initialises both producers, once: an `EpochWriter` lives for one session (invariant 8).
- Outputs of an epoch are acknowledged before the first output of the next one is produced. So the order of a
  key's outputs is the order of its inputs, even across epochs (invariant 10).
- Nothing is guessed: a call that fails, times out or has an unknown outcome raises `TransactionLostError`.
  The writer is destroyed then, and the committed offsets decide what is true (invariant 9). If the error says
  that the producer can abort and go on, `abort` is enough, unless a commit was being carried out.

Must not: decide when to commit, or use state.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from fcluster.common import failpoints
from fcluster.common.failures import Failure, FailureKind
from fcluster.common.ids import ShardId, transactional_ids
from fcluster.common.offsets import offset_or_none
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings
from fcluster.engine.changelog import Delta, encode_delta
from fcluster.engine.failure import Condemnation, OutputRefusedError, output_too_large
from fcluster.engine.records import NO_TIMESTAMP_MS
from fcluster.engine.watermarks import OwnRecord
from fcluster.kafka.asking import cause_of, reason_of
from fcluster.kafka.clients import make_consumer, make_producer, serve_rest
from fcluster.kafka.failover import failover_is_over
from fcluster.kafka.troubles import Trouble, remedy_for_refusal, trouble_of
from fcluster.kafka.waking import look_again
from fcluster.worker import sending
from fcluster.worker.batches import Batches
from fcluster.worker.epoch_trace import EpochTrace
from fcluster.worker.kafka_waits import KafkaWaits

FLUSH_TIMEOUT_S = 30.0
INIT_TIMEOUT_S = 30.0
ABORT_TIMEOUT_S = 10.0
"""Longer than a failover. After that, new producers are the better way."""
OUTPUT_QUEUE_RECORDS_MAX = 500_000
"""librdkafka's own limit on unacknowledged records. `produce` waits when this limit is reached."""
_REFUSED_TOPIC = re.compile(r"ProduceRequest for (\S+) \[")
_ACKNOWLEDGEMENTS = "the leaders of partitions that it writes to"
TOPICS_NAMED_MAX = 5
DELTA_RECORD_BYTES_MAX = 900_000
"""Below the broker's default `message.max.bytes` (1 MiB), with room for the record's own fields."""
ANY_PARTITION = -1
"""This value lets the partitioner choose by key."""


def never() -> bool:
    """No failure elsewhere ends a wait."""
    return False


class TransactionLostError(Exception):
    """A transaction failed, or its outcome is unknown.

    Attributes:
        code: Kafka's error code. None if it isn't an error from Kafka.
        abortable: the producer can abort the transaction and begin another one. Otherwise the writer must be
            destroyed.
    """

    def __init__(self, reason: str, code: int | None = None, *, abortable: bool = False) -> None:
        super().__init__(reason)
        self.code = code
        self.abortable = abortable

    @classmethod
    def of(cls, what: str, error: KafkaException) -> TransactionLostError:
        """What `error` says, about what was being done."""
        cause = cause_of(error)
        abortable = bool(cause.txn_requires_abort())
        return cls(f"{what}: {reason_of(error)}", cause.code(), abortable=abortable)

    def refusal(self, outputs: Collection[str]) -> Failure | None:
        """Why no replay can help, whatever the records are. None if one may help.

        Args:
            outputs: the topics that were written to. A transaction doesn't say which of them refused.
        """
        if self.code is None or trouble_of(self.code) is not Trouble.FORBIDDEN:
            return None
        remedy = remedy_for_refusal(self.code, self.topic or _one_of(outputs))
        message = f"Kafka refuses what the job writes: {self}"
        return Failure(FailureKind.OUTPUT, message, remedy, self.topic).fitted()

    def condemnation(self) -> Condemnation | None:
        """What to condemn the record with whose output Kafka refused. None if no record caused the error."""
        if self.code is None or trouble_of(self.code) is not Trouble.RECORD:
            return None
        topic = self.topic
        reason = KafkaError(self.code).str()
        remedy = remedy_for_refusal(self.code, topic)
        failure = Failure.of_record(f"Kafka refuses the output to {topic!r}: {reason}", remedy)
        return Condemnation(failure, topic=topic)

    def is_unexpected(self) -> bool:
        """Whether the error isn't known to be temporary.

        "Erroneous state" and "fatal" say only that there was an error before, which may well be temporary.
        """
        if self.code in (None, KafkaError._STATE, KafkaError._FATAL):
            return False
        return trouble_of(self.code) is Trouble.UNEXPECTED

    @property
    def topic(self) -> str:
        """The topic that refused something. Empty if unknown."""
        topic = _REFUSED_TOPIC.search(str(self))
        return topic[1] if topic is not None else ""


@contextlib.contextmanager
def told(what: str) -> Generator[None]:
    """Turns exceptions of a producer into one error that says what was being done.

    Raises:
        TransactionLostError: it failed.
    """
    try:
        yield
    except KafkaException as error:
        raise TransactionLostError.of(what, error) from error
    except SystemError as error:
        # A fatal error is raised from within the call that serves callbacks. If another callback is
        # due in it, such as a line for the log, the client runs that with the exception set, which
        # Python complains about.
        cause = error.__cause__ or error.__context__
        if not isinstance(cause, KafkaException):
            raise
        raise TransactionLostError.of(what, cause) from error


@dataclass(slots=True)
class ShardEpoch:
    """One shard's part in an epoch.

    Attributes:
        topics: the topics that the shard reads. The partition has the shard's number.
        position: the position to commit for them.
        changelog: the topic of the deltas. None if the stage has no state.
        delta: the changes of the state. None if nothing has changed.
        records: the delta as it is written. `FrozenEpoch.encode` fills it.
    """

    shard: ShardId
    topics: Sequence[str]
    position: CommittedPosition
    changelog: str | None
    delta: Delta | None = None
    records: Sequence[bytes] = ()


@dataclass(slots=True)
class FrozenEpoch:
    """Everything that one worker commits in an epoch.

    `prepare` fills `changelog_next`: for each shard with a delta, the changelog offset after it. `unplaced`
    are the shards with a delta record whose offset isn't known.
    """

    epoch: int
    records: int
    parts: Sequence[ShardEpoch]
    changelog_next: dict[ShardId, int] = field(default_factory=lambda: dict[ShardId, int]())
    unplaced: set[ShardId] = field(default_factory=lambda: set[ShardId]())
    trace: EpochTrace = field(default_factory=lambda: EpochTrace(time.monotonic()))

    def encode(self) -> None:
        """Encode the deltas. The commit thread does it, because it takes too long for the main thread."""
        for part in self.parts:
            if part.delta is not None:
                part.records = encode_delta(part.delta, DELTA_RECORD_BYTES_MAX)

    def positions(self) -> dict[ShardId, CommittedPosition]:
        """The positions of the epoch's shards once the epoch is committed."""
        return {part.shard: part.position for part in self.parts}


class OutputsFailedError(Exception):
    """The main thread couldn't write the epoch's outputs. It has reported that."""


class AwaitedOutputs:
    """Whether the outputs of an epoch are acknowledged. After the barrier the main thread waits for that,
    while the commit thread prepares the epoch. If either fails, both are over, and the first reports it.
    """

    def __init__(self) -> None:
        self._known = threading.Event()
        self._lock = threading.Lock()
        self._failed = False

    @classmethod
    def none(cls) -> AwaitedOutputs:
        """There is nothing to wait for."""
        outputs = cls()
        outputs.acknowledge()
        return outputs

    def acknowledge(self) -> None:
        """All of them are acknowledged (main thread)."""
        self._known.set()

    def fail(self) -> bool:
        """The epoch has failed (any thread). Returns whether the caller is the first to say so."""
        with self._lock:
            is_first, self._failed = not self._failed, True
        self._known.set()
        return is_first

    def failed(self) -> bool:
        """Whether the epoch has failed (any thread)."""
        return self._failed

    def known(self) -> bool:
        """Whether the main thread has stopped waiting, or will soon (any thread)."""
        return self._known.is_set()

    def wait(self) -> None:
        """Wait until they are acknowledged (commit thread).

        Raises:
            OutputsFailedError: they can't be written.
        """
        self._known.wait()
        if self._failed:
            raise OutputsFailedError


class EpochTransaction(Protocol):
    """The transaction that an epoch is written in. A writer's `begin` returns it.

    At first it belongs to the main thread. Once everything is frozen, it belongs to the commit thread, except
    that the main thread still waits for its outputs.
    """

    @property
    def produce(self) -> Callable[..., None]:
        """Produces an output (main thread). See `waiting_produce`."""
        ...

    def tell(self, records: Iterable[OwnRecord]) -> None:
        """Produce watermark records, and what else shards tell, after all outputs (main thread)."""
        ...

    def serve(self, send: bool) -> int:
        """Serve delivery reports. Returns how many outputs aren't acknowledged yet (main thread).

        Args:
            send: send outputs now. Otherwise they may wait for the barrier, or until there are many.
        """
        ...

    def check(self) -> None:
        """Raise the error with which the epoch has failed, if it is already known (main thread)."""
        ...

    def flush_outputs(self, failed: Callable[[], bool] = never) -> None:
        """Wait until all outputs are acknowledged (main thread).

        Args:
            failed: whether the epoch has failed in the commit thread. Then waiting is useless.
        """
        ...

    def prepare(self, frozen: FrozenEpoch, outputs: AwaitedOutputs) -> None:
        """Write deltas and offsets, and wait for all of it, outputs included (commit thread).

        Args:
            outputs: tells when they are acknowledged, which the main thread finds out.
        """
        ...

    def commit(self, frozen: FrozenEpoch) -> None:
        """Make the epoch visible (commit thread)."""
        ...


class EpochWriter(Protocol):
    """Writes the epochs of one session. There is one implementation for each guarantee."""

    def open(self) -> None:
        """Connect and initialise. Called once, in any thread. It may take some time."""
        ...

    def begin(self) -> EpochTransaction:
        """Begin the next epoch. The previous one must be flushed (main thread)."""
        ...

    def abort(self) -> None:
        """Abort what isn't committed. After that, `begin` begins the next epoch (commit thread).

        Raises:
            TransactionLostError: it isn't certain that everything is aborted.
        """
        ...

    def destroy(self, last_use: Callable[[], object]) -> None:
        """Release everything, without waiting. Uncommitted data will never be committed.

        Args:
            last_use: waits until the commit thread is done with its tasks.
        """
        ...


class ProducerTransactions:
    """One transactional producer and its transactions, one after another; see `EpochTransaction`.

    Args:
        producer: an initialised producer.
        settings: the worker's settings.
        job: the job's name, also the consumer group.
        group_metadata: the metadata of the job's group.
        waits: records what waits for Kafka.
        give_up: see `TransactionalWriter`.
    """

    def __init__(
        self,
        producer: Producer,
        settings: Settings,
        job: str,
        group_metadata: Any,
        waits: KafkaWaits,
        give_up: Callable[[str], None],
    ) -> None:
        self._owned: Producer | None = producer
        self._settings = settings
        self._job = job
        self._group_metadata = group_metadata
        self._waits = waits
        self._give_up = give_up
        self._is_begun = False
        self._deltas_written = 0
        self._deltas_reported = 0
        self._calling = threading.Lock()
        """Held in calls about the transaction while both threads have it: the client refuses a call while
        another one is going on. Sending and serving reports are no such calls.
        """
        self.produce: Callable[..., None] = waiting_produce(producer, explain, check_transaction)

    @property
    def _producer(self) -> Producer:
        assert self._owned is not None, "its session is over"
        return self._owned

    def begin(self) -> None:
        """Begin the next transaction."""
        with told("beginning a transaction"):
            self._producer.begin_transaction()
        self._is_begun = True

    def abort(self) -> None:
        """Abort the transaction, if one has begun. The client drops what it hasn't sent, and gets a new
        producer epoch from the broker where it needs one.

        Raises:
            TransactionLostError: it isn't certain that it is aborted.
        """
        if not self._is_begun:
            return
        with self._waits.waiting("its transactions' coordinator"), told("aborting a transaction"):
            self._producer.abort_transaction(ABORT_TIMEOUT_S)
        self._is_begun = False

    def release(self) -> None:
        """Release the producer. The code that destroys it also holds a reference."""
        self._owned = None
        self.produce = _released

    def serve(self, send: bool) -> int:
        return serve(self._producer, send)

    def check(self) -> None:
        check_transaction(self._producer)

    def tell(self, records: Iterable[OwnRecord]) -> None:
        produce_own_records(self._producer, records, check_transaction)

    def flush_outputs(self, failed: Callable[[], bool] = never) -> None:
        producer = self._producer

        def unacknowledged() -> int:
            # The commit thread produces deltas meanwhile, and counts each of them afterwards. Only this
            # thread serves reports now. So the result may be too high for a moment, but never too low.
            deltas = self._deltas_written - self._deltas_reported
            return 0 if failed() else len(producer) - deltas

        def check(producer: Producer) -> None:
            if self._calling.acquire(blocking=False):  # otherwise the call finds out itself
                try:
                    check_transaction(producer)
                finally:
                    self._calling.release()

        flush(producer, self._waits, check, unacknowledged)

    def prepare(self, frozen: FrozenEpoch, outputs: AwaitedOutputs) -> None:
        producer = self._producer
        try:
            self._prepare(producer, frozen, outputs)
        except TransactionLostError as error:
            # While outputs are on their way, one that is refused makes any of these calls fail.
            with self._calling:
                raise explain(producer, error) from None  # it may be the same error, no cause of itself

    def _prepare(self, producer: Producer, frozen: FrozenEpoch, outputs: AwaitedOutputs) -> None:
        self._produce_deltas(producer, frozen, outputs)
        if outputs.known():  # until then, the main thread sends them together with the outputs
            serve(producer, send=True)
        frozen.trace.ended("deltas")
        with (
            self._waits.unsticking(
                "the group's coordinator",
                self._failover_is_over,
                self._look_again,
                self._leave_behind,
            ),
            told(f"sending the offsets of epoch {frozen.epoch}"),
            self._calling,
        ):
            # While this waits for its answers, the deltas are being sent, so flush() finds most of them done.
            producer.send_offsets_to_transaction(offsets_of(frozen), self._group_metadata, FLUSH_TIMEOUT_S)
        frozen.trace.ended("offsets")
        wait_for(outputs, self._waits)
        frozen.trace.ended("outputs")
        failpoints.reach("worker.offsets-sent", frozen.epoch)
        flush(producer, self._waits, check_transaction)
        check_deltas(frozen)
        frozen.trace.ended("flush")
        failpoints.reach("worker.delta-flushed", frozen.epoch)

    def _produce_deltas(self, producer: Producer, frozen: FrozenEpoch, outputs: AwaitedOutputs) -> None:
        def make_room() -> None:
            wait_for(outputs, self._waits)  # reports are this thread's from then on
            _wait_for_room(producer, check_transaction)

        for topic, partition, record, note in deltas_of(frozen):

            def reported(error: Any, message: Any, note: Callable[[Any, Any], None] = note) -> None:
                self._deltas_reported += 1
                note(error, message)

            fields = {"partition": partition, "on_delivery": reported}
            _produce_own(producer, topic, record, fields, make_room)
            self._deltas_written += 1

    def commit(self, frozen: FrozenEpoch) -> None:
        failpoints.reach("worker.commit", frozen.epoch)
        with (
            self._waits.waiting("its transactions' coordinator"),
            told(f"committing epoch {frozen.epoch}"),
        ):
            self._producer.commit_transaction(FLUSH_TIMEOUT_S)
        self._is_begun = False

    def _failover_is_over(self, waited_s: float) -> bool:
        return failover_is_over(self._settings, self._job, waited_s=waited_s)

    def _look_again(self) -> bool:
        producer = self._owned
        return producer is not None and look_again(producer, self._settings.bootstrap_servers)

    def _leave_behind(self) -> None:
        # librdkafka remembers the old coordinator and waits for it, whatever the call's timeout is (decision
        # 0082). A new producer asks for the new one. This is used where waking the old one up isn't possible.
        self._give_up("the group's coordinator has moved, but sending offsets still waits for the old one")


class TransactionalWriter:
    """Exactly-once: two transactional producers, used in turn.

    Args:
        settings: the worker's settings.
        job: the job's name, also the consumer group.
        slot: names the transactional ids.
        group_metadata: the metadata of the job's group.
        batches: how large batches may be.
        waits: records what waits for Kafka.
        give_up: called in some thread with the reason when a call in the commit thread keeps waiting for a
            dead broker. That thread has to be abandoned, and the writer destroyed.
    """

    def __init__(
        self,
        settings: Settings,
        job: str,
        slot: int,
        group_metadata: Any,
        batches: Batches,
        waits: KafkaWaits,
        give_up: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._job = job
        self._batches = batches
        self._waits = waits
        self._give_up = give_up
        self._ids = transactional_ids(job, slot)
        self._group_metadata = group_metadata
        self._producers: list[Producer] = []
        self._transactions: list[ProducerTransactions] = []
        self._turn = 0

    def open(self) -> None:
        config = _producer_config(self._settings, self._batches)
        with ThreadPoolExecutor(len(self._ids)) as pool:
            self._producers = list(pool.map(functools.partial(self._open_one, config), self._ids))
        self._transactions = [
            ProducerTransactions(
                producer, self._settings, self._job, self._group_metadata, self._waits, self._give_up
            )
            for producer in self._producers
        ]

    def _open_one(self, config: Mapping[str, Any], transactional_id: str) -> Producer:
        producer = make_producer(self._settings, transactional_id=transactional_id, **config)
        with self._waits.waiting("its transactions' coordinator"), told(f"initialising {transactional_id}"):
            producer.list_topics(timeout=INIT_TIMEOUT_S)  # once connected, initialising takes no 500 ms timer
            producer.init_transactions(INIT_TIMEOUT_S)
        return producer

    def begin(self) -> EpochTransaction:
        transaction = self._transactions[self._turn]
        transaction.begin()
        self._turn = 1 - self._turn
        return transaction

    def abort(self) -> None:
        for transaction in self._transactions:
            transaction.abort()

    def destroy(self, last_use: Callable[[], object]) -> None:
        def take() -> list[Producer]:
            # The thread finishes its current task, which may be `open`. The broker, not we, decides what a
            # fenced id may do.
            last_use()
            for transaction in self._transactions:
                transaction.release()
            doomed, self._producers, self._transactions = self._producers, [], []
            return doomed

        _destroy_in_thread(take)


class AtLeastOnceWriter:
    """At-least-once: one idempotent producer; offsets are committed after everything is flushed.

    There are no transactions, so it writes all epochs itself: it is its own `EpochTransaction`.

    Args:
        settings: the worker's settings.
        offsets_consumer: commits the offsets. It must not be the one that reads.
        batches: how large batches may be.
        waits: records what waits for Kafka.
    """

    def __init__(
        self, settings: Settings, offsets_consumer: Consumer, batches: Batches, waits: KafkaWaits
    ) -> None:
        self._settings = settings
        self._batches = batches
        self._waits = waits
        self._offsets_consumer = offsets_consumer
        self._owned: Producer | None = None
        self.produce: Callable[..., None] = _released
        self._failure = ""
        self._failure_code: int | None = None

    def open(self) -> None:
        config = _producer_config(self._settings, self._batches)
        self._owned = make_producer(self._settings, None, on_delivery=self._note_failure, **config)
        self.produce = waiting_produce(self._owned)

    @property
    def _producer(self) -> Producer:
        assert self._owned is not None, "its session is over"
        return self._owned

    def _note_failure(self, error: Any, message: Any) -> None:
        if error is not None and not self._failure:
            self._failure = f"ProduceRequest for {message.topic()} [{message.partition()}]: {error.str()}"
            self._failure_code = error.code()

    def begin(self) -> EpochTransaction:
        return self

    def abort(self) -> None:
        raise TransactionLostError("at-least-once has no transactions that could be aborted")

    def tell(self, records: Iterable[OwnRecord]) -> None:
        produce_own_records(self._producer, records)

    def serve(self, send: bool) -> int:
        return serve(self._producer, send)

    def check(self) -> None:
        self._raise_failure()

    def flush_outputs(self, failed: Callable[[], bool] = never) -> None:
        flush(self._producer, self._waits, unacknowledged=lambda: 0 if failed() else len(self._producer))
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure:  # there is no transaction that would notice it
            raise TransactionLostError(f"an output was not written: {self._failure}", self._failure_code)

    def prepare(self, frozen: FrozenEpoch, outputs: AwaitedOutputs) -> None:
        wait_for(outputs, self._waits)  # without a transaction, no delta may be written whose outputs aren't
        frozen.trace.ended("outputs")
        producer = self._producer
        for topic, partition, record, note in deltas_of(frozen):
            fields = {"partition": partition, "on_delivery": note}
            _produce_own(producer, topic, record, fields, lambda: _wait_for_room(producer, _unchecked))
        flush(producer, self._waits)
        check_deltas(frozen)
        self._raise_failure()

    def commit(self, frozen: FrozenEpoch) -> None:
        with (
            self._waits.waiting("the group's coordinator"),
            told(f"committing the offsets of epoch {frozen.epoch}"),
        ):
            self._offsets_consumer.commit(offsets=offsets_of(frozen), asynchronous=False)

    def destroy(self, last_use: Callable[[], object]) -> None:
        def take() -> list[Producer]:
            last_use()  # the commit thread may still be in a call, or in `open`
            doomed = [] if self._owned is None else [self._owned]
            self._owned, self.produce = None, _released
            return doomed

        _destroy_in_thread(take)


def make_writer(
    settings: Settings,
    job: str,
    slot: int,
    group_metadata: Any,
    batches: Batches,
    waits: KafkaWaits,
    give_up: Callable[[str], None],
) -> EpochWriter:
    """The writer for the job's guarantee. For the arguments see `TransactionalWriter`."""
    if settings.processing_guarantee == "exactly-once":
        return TransactionalWriter(settings, job, slot, group_metadata, batches, waits, give_up)
    offsets_consumer = make_consumer(settings, "read-committed", **{"group.id": job})
    return AtLeastOnceWriter(settings, offsets_consumer, batches, waits)


def _producer_config(settings: Settings, batches: Batches) -> dict[str, Any]:
    """The configuration that producers of both guarantees share. May ask the brokers for topics' limits."""
    return {
        "queue.buffering.max.messages": OUTPUT_QUEUE_RECORDS_MAX,
        **sending.sending_config(settings),
        **batches.producer_config(),
    }


def check_transaction(producer: Producer) -> None:
    """If the transaction of this producer has failed, raise its error.

    A failed transaction sends nothing more. The records in its queue stay there.

    Raises:
        TransactionLostError: it has failed.
    """
    try:
        with told("writing outputs"):
            # This is refused within a transaction, with the transaction's own error. Nothing is sent.
            producer.begin_transaction()
    except TransactionLostError as error:
        if error.code != KafkaError._STATE:
            raise


def explain(producer: Producer, error: TransactionLostError) -> TransactionLostError:
    """The reason why the transaction failed, if a call says only that it has failed, or that something wasn't
    acknowledged.
    """
    if error.code not in (None, KafkaError._STATE):
        return error
    try:
        check_transaction(producer)
    except TransactionLostError as cause:
        return cause
    return error


def _one_of(topics: Collection[str]) -> str:
    named = sorted(topics)[:TOPICS_NAMED_MAX]
    more = ["..."] if len(topics) > len(named) else []
    return " or ".join([*named, *more])


def _released(*_arguments: Any) -> None:
    raise AssertionError("an output was produced after its session had ended")


def _unexplained(_producer: Producer, error: TransactionLostError) -> TransactionLostError:
    return error


def _unchecked(_producer: Producer) -> None:
    return None


def waiting_produce(
    producer: Producer,
    explained: Callable[[Producer, TransactionLostError], TransactionLostError] = _unexplained,
    check: Callable[[Producer], None] = _unchecked,
) -> Callable[..., None]:
    """Like `producer.produce`, but it waits where that raises BufferError because the queue is full.

    `explained` finds out why a transaction accepts no more records. `check` raises if it accepts no more.

    The client interprets a timestamp of 0 as "now", which would be different in each replay. So 0 is also
    written as Kafka's "no timestamp" (-1).

    The returned function raises:
        OutputRefusedError: the record is larger than this producer may send.
        TransactionLostError: it can't be produced for other reasons.
    """
    produce: Callable[..., None] = producer.produce

    def waiting(
        topic: str,
        value: bytes | None,
        key: bytes | None,
        timestamp_ms: int,
        headers: Any = None,
        partition: int = ANY_PARTITION,
    ) -> None:
        # By position, which is much faster than by name for a C function: partition, callback, on_delivery
        # (an alias of callback that takes its own position, contrary to the documented signature), then the
        # rest.
        try:
            produce(topic, value, key, partition, None, None, timestamp_ms or NO_TIMESTAMP_MS, headers)
        except BufferError:
            _wait_for_room(producer, check)
            produce(topic, value, key, partition, None, None, timestamp_ms or NO_TIMESTAMP_MS, headers)
        except KafkaException as error:
            cause: Any = error.args[0]
            if cause.code() == KafkaError.MSG_SIZE_TOO_LARGE:
                raise OutputRefusedError(output_too_large(topic, value, key)) from error
            # The exception gets no name here. A frame that holds the exception that it raises is a cycle. It
            # would keep the producer until the garbage collector runs, which destroys it in any thread.
            raise explained(producer, TransactionLostError.of("producing", error)) from error

    return waiting


def _wait_for_room(producer: Producer, check: Callable[[Producer], None]) -> None:
    deadline = time.monotonic() + FLUSH_TIMEOUT_S
    while len(producer) >= OUTPUT_QUEUE_RECORDS_MAX * 9 // 10:
        if time.monotonic() > deadline:
            raise TransactionLostError(f"Kafka has acknowledged no output for {FLUSH_TIMEOUT_S:.0f} s")
        with told("waiting for acknowledgements"):
            sending.nudge(producer)
            producer.poll(0.05)
        check(producer)


def serve(producer: Producer, send: bool) -> int:
    """Serve delivery reports. Returns how many records aren't acknowledged yet.

    Args:
        send: send records that aren't sent yet.

    Raises:
        TransactionLostError: the producer can't continue.
    """
    with told("serving delivery reports"):
        if send:
            return sending.nudge(producer)
        producer.poll(0)
    return len(producer)


def flush(
    producer: Producer,
    waits: KafkaWaits,
    check: Callable[[Producer], None] = _unchecked,
    unacknowledged: Callable[[], int] | None = None,
) -> None:
    """Wait until everything produced is acknowledged. `check` raises the errors that make waiting useless.

    Args:
        unacknowledged: how many records there are still to wait for, if not for all.

    Raises:
        TransactionLostError: something isn't acknowledged in time, or before the job's end. (A failed record
            makes the transaction's commit fail, so it isn't checked here.)
    """

    def look(producer: Producer) -> None:
        if waits.in_vain:  # acknowledgements of a deleted topic never come
            raise TransactionLostError("the job is over, and some records aren't acknowledged yet")
        check(producer)

    with waits.waiting(_ACKNOWLEDGEMENTS), told("flushing"):
        waiting = sending.flush(producer, FLUSH_TIMEOUT_S, look, unacknowledged)
    if waiting:
        raise TransactionLostError(f"{waiting} records weren't acknowledged within {FLUSH_TIMEOUT_S:.0f} s")


def wait_for(outputs: AwaitedOutputs, waits: KafkaWaits) -> None:
    """Wait until the main thread knows that they are acknowledged.

    Raises:
        OutputsFailedError: they can't be written.
    """
    with waits.waiting(_ACKNOWLEDGEMENTS):
        outputs.wait()


def deltas_of(frozen: FrozenEpoch) -> Iterator[tuple[str, int, bytes, Callable[[Any, Any], None]]]:
    """The epoch's deltas: topic, partition, record, and the callback by which `changelog_next` gets its
    offset once it is acknowledged.
    """
    for part in frozen.parts:
        if part.records and part.changelog is not None:
            note = _delivery_note(frozen, part.shard)
            for record in part.records:
                yield part.changelog, part.shard.partition, record, note


def produce_own_records(
    producer: Producer,
    records: Iterable[OwnRecord],
    check: Callable[[Producer], None] = _unchecked,
) -> None:
    """Produce what shards tell, after everything that the epoch has produced so far."""
    for record in records:
        fields = {
            "partition": record.partition,
            "timestamp": NO_TIMESTAMP_MS,
            "headers": list(record.headers),
        }
        _produce_own(producer, record.topic, record.value, fields, lambda: _wait_for_room(producer, check))


def _produce_own(
    producer: Producer,
    topic: str,
    value: bytes | None,
    fields: Mapping[str, Any],
    make_room: Callable[[], None],
) -> None:
    """Produce a record for the job's own use. `make_room` waits until the full queue takes records again."""
    try:
        producer.produce(topic, value, **fields)
    except BufferError:
        make_room()
        producer.produce(topic, value, **fields)
    except KafkaException as error:
        raise TransactionLostError.of(f"writing to {topic}", error) from error


def _delivery_note(frozen: FrozenEpoch, shard: ShardId) -> Callable[[Any, Any], None]:
    def note(error: Any, message: Any) -> None:
        if error is not None:
            return
        # If the answer got lost, a broker may only say that it already has the record.
        offset = offset_or_none(message.offset())
        if offset is None:
            frozen.unplaced.add(shard)
        else:
            frozen.changelog_next[shard] = max(frozen.changelog_next.get(shard, 0), offset + 1)

    return note


def check_deltas(frozen: FrozenEpoch) -> None:
    """Check that every delta of the epoch was acknowledged, and that its offset is known.

    Raises:
        TransactionLostError: one wasn't acknowledged, or its offset is unknown.
    """
    for part in frozen.parts:
        if part.records and (part.shard not in frozen.changelog_next or part.shard in frozen.unplaced):
            raise TransactionLostError(
                f"the delta of {part.shard} in epoch {frozen.epoch} was not acknowledged"
            )


def offsets_of(frozen: FrozenEpoch) -> list[TopicPartition]:
    """The offsets to commit, one for each input of each shard, with the epoch in their metadata."""
    offsets: list[TopicPartition] = []
    for part in frozen.parts:
        for number, topic in enumerate(part.topics):
            at = part.position.of_input(number)
            offsets.append(
                TopicPartition(topic, part.shard.partition, at.offset, metadata=at.encode_metadata())
            )
    return offsets


def _destroy_in_thread(take: Callable[[], list[Producer]]) -> None:
    """Destroy the producers that `take` returns, in their own thread.

    That stops the client's threads. At that time, no other thread may be in a call on a producer, or destroy
    one by dropping what happens to be the last reference. So `take` waits for the last call, and the list
    that it returns has to hold the last references.
    """

    def destroy() -> None:
        doomed = take()
        for producer in doomed:
            serve_rest(producer)
            del producer
        doomed.clear()

    threading.Thread(target=destroy, name="destroy-producers", daemon=True).start()
