"""Runs records through a stage's operators: the hot path.

Responsible for: turning a stage's chains into one function for each shard (`ShardRunner`), and for what a
record leads to: outputs, state, or an error. Chains are compiled to nested closures once, when a shard
starts; what is left to do for each record is what the job says.

Invariants kept:
- A record that fails under `on_error="skip"` or a dead-letter topic leaves no trace of its failed
  processing: its outputs are held back until all its handlers are through, and its keys' states go back to
  what they were before it.
- A record that fails under `on_error="stop"` raises `HandlerError`: the caller aborts the open epoch, so
  nothing of the record is ever committed.

Must not: know about epochs, transactions or the coordinator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from confluent_kafka import Message

from fcluster.common.codecs import key_codec, value_codec
from fcluster.common.errors import ProcessingError, one_line
from fcluster.common.job import UNSET, Record
from fcluster.common.positions import CommittedPosition
from fcluster.common.topology import Chain, Filter, Map, Process, Rekey, Stage, TopicSpec, rekey_description
from fcluster.engine.failure import Failure
from fcluster.worker.state import ShardState, StateTable
from fcluster.worker.store import LOCAL_TROUBLE
from fcluster.worker.transactions import TransactionLostError

Produce = Callable[..., None]
"""``produce(topic, value, key, timestamp_ms, headers=None)``: the partitioner chooses by the key."""


class RecordError(Exception):
    """A record that can't be processed. `reason` is for the user."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UnreadableRecordError(RecordError):
    """The record can't be decoded; nothing of it was processed."""


class HandlerError(RecordError):
    """A step failed in the midst of the record: the open epoch must be aborted.

    Attributes:
        failure: what the record's shard is to be told with `ShardRunner.condemn` before the replay.
    """

    def __init__(self, reason: str, failure: Failure | None = None) -> None:
        super().__init__(reason)
        self.failure = failure or Failure(reason)


class OutputPort:
    """Where outputs go. `produce` is rebound at each epoch to the producer of that epoch."""

    __slots__ = ("produce", "records", "skipped")

    def __init__(self) -> None:
        self.produce: Produce = _not_open
        self.records = 0
        self.skipped = 0

    def close(self) -> None:
        """Let go of the producer; the next epoch brings another."""
        self.produce = _not_open


def _not_open(*_arguments: Any) -> None:
    raise AssertionError("a record was processed outside an epoch")


class HandlerContext:
    """What a handler sees as `ctx`. One for each handler and shard; it shows the record being processed."""

    __slots__ = ("_decode_key", "_key", "_load", "_message", "_touched", "partition", "topic")

    def __init__(
        self, topic: str, partition: int, decode_key: Callable[[bytes], Any], table: StateTable
    ) -> None:
        self.topic = topic
        self.partition = partition
        self._decode_key = decode_key
        self._touched = table.touched.get
        self._load = table.get
        self._message: Any = None
        self._key: bytes | None = None

    @property
    def key(self) -> Any:
        """The record's key, decoded as the topic says; None if it has none."""
        key = self._key
        return None if key is None else self._decode_key(key)

    @property
    def state(self) -> dict[str, Any]:
        """The current key's state: a plain dict, saved with the epoch as it is then.

        Raises:
            RecordError: the record has no key.
        """
        state = self._touched(self._key)  # type: ignore[arg-type]  # None is in no table
        return self._first_state() if state is None else state

    def _first_state(self) -> dict[str, Any]:
        if self._key is None:
            raise RecordError("the record has no key, so it has no state; give it one with key_by() first")
        return self._load(self._key)

    @property
    def timestamp(self) -> int:
        """The record's timestamp in milliseconds since 1970."""
        return self._message.timestamp()[1]

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """The record's headers, in order."""
        return self._message.headers() or []

    @property
    def offset(self) -> int:
        """The record's offset in its partition."""
        return self._message.offset()


class UndoableContext(HandlerContext):
    """The context of a handler whose failures are tolerated: the table remembers what was before."""

    __slots__ = ()

    @property
    def state(self) -> dict[str, Any]:
        """As in `HandlerContext`."""
        return self._first_state()


class Step(Protocol):
    """A compiled operator and all that follow it."""

    def __call__(self, message: Message, key: bytes | None, value: Any, /) -> None:
        """Process one value of the record `message`."""
        ...


class ShardRunner:
    """One running shard: its position, its state, and the function that processes its records.

    Attributes:
        last: the newest record processed since the last barrier, None if there is none.
        position: the committed position it started from or last froze; `next_offset` tells where it stands.
        read_position: how far reading has come, control records counted.
        generation: records of earlier generations of the assignment aren't for this runner.
    """

    __slots__ = (
        "chains",
        "end",
        "generation",
        "handle",
        "last",
        "partition",
        "position",
        "read_position",
        "stage",
        "state",
        "stop_offset",
        "stop_reason",
        "topic",
    )

    def __init__(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, port: OutputPort
    ) -> None:
        self.stage = stage
        self.partition = partition
        self.topic = stage.source.name
        self.state = state
        self.position = position
        self.read_position = position.offset
        self.end = -1
        self.generation = 0
        self.last: Any = None
        self.stop_offset = -1
        self.stop_reason = ""
        chains = [_compile_chain(chain, stage, partition, state, port) for chain in stage.chains]
        self.handle: Callable[[Message], None] = chains[0] if len(chains) == 1 else _all(chains)

    @property
    def next_offset(self) -> int:
        """The next record to process."""
        return self.position.offset if self.last is None else self.last.offset() + 1

    def condemn(self, offset: int, failure: Failure) -> None:
        """Let the record at `offset` fail with `failure` when it comes, by the rule of the step responsible.

        "stop": `UnreadableRecordError` is raised there, and nothing of the record is in the open epoch.
        "skip", dead letter: the record's chain leaves no other trace, and processing goes on. May be called
        several times for an offset, when after one failure another is found; and before any record only.
        """
        self.stop_before(offset, failure.reason)

    def find_unkept(self) -> Failure | None:
        """Whether the open epoch holds a state that can't be kept: what to condemn the record with whose
        handlers ran last. Looks at all keys touched since the barrier: for replays in small pieces."""
        for table in self.state.tables.values():
            try:
                table.encode_touched()
            except ProcessingError as error:
                return Failure(one_line(error), step=table.name)
        return None

    def stop_before(self, offset: int, reason: str) -> None:
        """Process nothing from `offset` on: `UnreadableRecordError(reason)` is raised there."""
        handle = self.handle

        def guarded(message: Message) -> None:
            if message.offset() == offset:
                raise UnreadableRecordError(reason)
            handle(message)

        self.handle = guarded


def _all(chains: Sequence[Callable[[Message], None]]) -> Callable[[Message], None]:
    def handle(message: Message) -> None:
        # Each chain decodes the record for itself: what one does to its value must not show in another.
        for chain in chains:
            chain(message)

    return handle


def describe_record(message: Message) -> str:
    """Which record, for messages: topic, partition and offset."""
    return f"record {message.topic()}/{message.partition()} at offset {message.offset()}"


# --- compiling ------------------------------------------------------------------------------------------


def _compile_chain(
    chain: Chain, stage: Stage, partition: int, state: ShardState, port: OutputPort
) -> Callable[[Message], None]:
    """One function that takes a record through the chain."""
    on_error = chain.on_error
    held = None if on_error == "stop" else _HeldOutputs(port)
    step = _compile_sink(chain, stage, held or port)
    last_process = chain.processes[-1] if chain.processes else None
    for operator in reversed(chain.operators):
        match operator:
            case Filter():
                step = _filter(operator.function, step)
            case Map():
                step = _map(operator.function, step)
            case Process():
                decode_key = key_codec(stage.source.key)[0]
                context_type = HandlerContext if held is None else UndoableContext
                context = context_type(stage.source.name, partition, decode_key, state.tables[operator.name])
                final = operator is last_process and operator is chain.operators[-1] and chain.rekey is None
                step = _process(operator, context, step, _record_writer(chain, held or port, final))
    decode = value_codec(stage.source.value)[0]
    if held is None:
        return _stopping(decode, step, chain)
    tables = [state.tables[process.name] for process in chain.processes]
    dead_letters = on_error if isinstance(on_error, TopicSpec) else None
    return _tolerant(decode, step, tables, held, port, dead_letters, chain)


def _stopping(decode: Callable[[bytes], Any], step: Step, chain: Chain) -> Callable[[Message], None]:
    def handle(message: Message) -> None:
        raw = message.value()
        if raw is None:
            value = None  # a tombstone
        else:
            try:
                value = decode(raw)
            except Exception as error:
                raise UnreadableRecordError(
                    f"{describe_record(message)} can't be decoded: {error}"
                ) from error
        try:
            step(message, message.key(), value)
        except (TransactionLostError, *LOCAL_TROUBLE):
            raise  # not the record's fault
        except Exception as error:
            raise HandlerError(_handler_failure(chain, message, error)) from error

    return handle


def _tolerant(
    decode: Callable[[bytes], Any],
    step: Step,
    tables: Sequence[StateTable],
    held: _HeldOutputs,
    port: OutputPort,
    dead_letters: TopicSpec | None,
    chain: Chain,
) -> Callable[[Message], None]:
    """As `_stopping`, but a record that fails is skipped, or written to the dead-letter topic as it came."""

    def handle(message: Message) -> None:
        for table in tables:
            table.begin_undo()
        raw = message.value()
        try:
            step(message, message.key(), None if raw is None else decode(raw))
        except LOCAL_TROUBLE:
            raise  # not the record's fault: it must not be skipped
        except Exception as error:  # noqa: BLE001  whatever a handler may raise
            for table in tables:
                table.rollback()
            held.drop()
            port.skipped += 1
            if dead_letters is not None:
                _write_dead_letter(port, dead_letters, message, chain, error)
        else:
            held.release()

    return handle


def _write_dead_letter(
    port: OutputPort, topic: TopicSpec, message: Message, chain: Chain, error: Exception
) -> None:
    headers: list[Any] = list(message.headers() or [])
    headers += [
        ("fcluster.error", f"{type(error).__name__}: {error}".encode()),
        ("fcluster.handler", chain.name.encode()),
        ("fcluster.topic", (message.topic() or "").encode()),
        ("fcluster.partition", str(message.partition()).encode()),
        ("fcluster.offset", str(message.offset()).encode()),
    ]
    port.produce(topic.name, message.value(), message.key(), message.timestamp()[1], headers)
    port.records += 1


def _handler_failure(chain: Chain, message: Message, error: Exception) -> str:
    if isinstance(error, RecordError):
        return f"{describe_record(message)} failed in {chain.name!r}: {error.reason}"
    where = ""
    traceback = error.__traceback__
    while traceback is not None:  # the innermost frame: the user's line, unless a library raised
        where = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return f"{describe_record(message)} failed in {chain.name!r}: {type(error).__name__}: {error} ({where})"


def _filter(function: Callable[[Any], Any], following: Step) -> Step:
    def step(message: Message, key: bytes | None, value: Any) -> None:
        if function(value):
            following(message, key, value)

    return step


def _map(function: Callable[[Any], Any], following: Step) -> Step:
    def step(message: Message, key: bytes | None, value: Any) -> None:
        following(message, key, function(value))

    return step


def _process(
    operator: Process,
    context: HandlerContext,
    following: Step,
    write_record: Callable[[Message, bytes | None, Record], None],
) -> Step:
    function = operator.function

    def many(message: Message, key: bytes | None, value: Any) -> None:
        context._message = message  # pyright: ignore[reportPrivateUsage]  # a method call for each record costs
        context._key = key  # pyright: ignore[reportPrivateUsage]
        for output in function(context, value) or ():
            if output.__class__ is Record:
                write_record(message, key, output)
            elif output is not None:
                following(message, key, output)

    def one(message: Message, key: bytes | None, value: Any) -> None:
        context._message = message  # pyright: ignore[reportPrivateUsage]
        context._key = key  # pyright: ignore[reportPrivateUsage]
        output = function(context, value)
        if output.__class__ is Record:
            write_record(message, key, output)
        elif output is not None:
            following(message, key, output)

    return many if operator.returns == "many" else one


def _compile_sink(chain: Chain, stage: Stage, port: OutputPort | _HeldOutputs) -> Step:
    """The last step: encode and produce."""
    sink = chain.sink
    if sink is None:
        return _discard
    topic = sink.name
    encode = value_codec(sink.value)[1]
    if chain.rekey is not None:
        return _rekey(chain.rekey, topic, key_codec(sink.key)[1], encode, port)
    transcode = _key_transcoder(stage.source, sink)

    def write(message: Message, key: bytes | None, value: Any) -> None:
        port.produce(topic, encode(value), key, message.timestamp()[1])
        port.records += 1

    def write_transcoded(message: Message, key: bytes | None, value: Any) -> None:
        written_key = None if key is None else transcode(key)
        port.produce(topic, encode(value), written_key, message.timestamp()[1])
        port.records += 1

    return write if transcode is _same else write_transcoded


def _discard(_message: Message, _key: bytes | None, _value: Any) -> None:
    return None


def _same(key: bytes) -> bytes:
    return key


def _key_transcoder(source: TopicSpec, sink: TopicSpec) -> Callable[[bytes], bytes]:
    """From a key's bytes in the source to its bytes in the sink."""
    if source.key == sink.key:
        return _same
    decode, encode = key_codec(source.key)[0], key_codec(sink.key)[1]
    return lambda key: encode(decode(key))


def _rekey(
    rekey: Rekey,
    topic: str,
    encode_key: Callable[[Any], bytes],
    encode: Callable[[Any], bytes],
    port: OutputPort | _HeldOutputs,
) -> Step:
    by_field = rekey if isinstance(rekey, str) else None
    function: Callable[[Any], Any] = _field_of(by_field) if by_field is not None else rekey  # type: ignore[assignment]

    def write(message: Message, _key: bytes | None, value: Any) -> None:
        new_key = function(value)
        if new_key is None:
            raise RecordError(
                f"key_by by {rekey_description(rekey)} gave no key; filter such records out before it"
            )
        port.produce(topic, encode(value), encode_key(new_key), message.timestamp()[1])

    return write


def _field_of(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda value: value.get(name)


def _record_writer(
    chain: Chain, port: OutputPort | _HeldOutputs, final: bool
) -> Callable[[Message, bytes | None, Record], None]:
    """Writes a `Record` to its own topic or to the chain's sink. `final`: nothing follows in the chain."""

    def write(message: Message, key: bytes | None, record: Record) -> None:
        target = record.topic or (chain.sink if final else None)
        if target is None:
            raise RecordError(
                "a Record without a topic can only be yielded by the last handler of a chain that has a "
                "target (to=...); yield a plain value, or give the Record a topic"
            )
        if record.key is not UNSET:
            key = None if record.key is None else key_codec(target.key)[1](record.key)
        if record.value is UNSET:
            raw = message.value()
        else:
            raw = None if record.value is None else value_codec(target.value)[1](record.value)
        timestamp = message.timestamp()[1] if record.timestamp is UNSET else record.timestamp
        headers = message.headers() if record.headers is UNSET else record.headers
        port.produce(target.name, raw, key, timestamp, headers)
        port.records += 1

    return write


class _HeldOutputs:
    """Stands in for the port while a record is processed that may fail: holds its outputs back."""

    __slots__ = ("_held", "_port", "records")

    def __init__(self, port: OutputPort) -> None:
        self._port = port
        self._held: list[tuple[Any, ...]] = []
        self.records = 0

    def produce(self, *arguments: Any) -> None:
        self._held.append(arguments)

    def release(self) -> None:
        if self._held:
            produce = self._port.produce
            for arguments in self._held:
                produce(*arguments)
            self._port.records += self.records
            self.drop()

    def drop(self) -> None:
        self._held.clear()
        self.records = 0
