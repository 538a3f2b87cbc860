"""The calls that a record waits for before it is processed.

Responsible for: the part of a chain up to its last `map_async` step, which runs in advance (`InputCalls`,
`RecordCalls`). `engine.call_results` has the results for the rest of the chain. `engine.call_scheduler` and
the shells decide when calls are made.

Invariants:
- The steps in front of a `map_async` have no state, so nothing that runs in advance belongs to an epoch. A
  record whose calls aren't done isn't processed: its offset isn't committed, and it leaves no trace.
- The rest of the chain gets the results in the order of the values, whichever call was done first.
- A step in front that fails, or a call, fails the record when it is processed, by the rule of that step.

Must not: make calls, read a clock, or know about epochs. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from fcluster.common.errors import FormatUnusable
from fcluster.engine.call_results import Called, CallResults
from fcluster.engine.context import HandlerContext
from fcluster.engine.failure import Condemnation
from fcluster.engine.operators import operator_for
from fcluster.engine.operators.base import CompiledOperator, Surroundings, WriteRecord
from fcluster.engine.operators.flat_map import FlatMapOperator
from fcluster.engine.records import OutputPort, SourceRecord, describe_record
from fcluster.engine.shared_steps import SharedSteps
from fcluster.engine.stamps import Stamper
from fcluster.engine.steps import Place, Step, StepFailure
from fcluster.graph.codecs import key_codec, value_codec
from fcluster.graph.operators import MapAsync
from fcluster.graph.stages import Chain, Input


class CallContext:
    """The first argument of an async function; see `fcluster.api.context.CallContext`."""

    __slots__ = ("_decode_key", "_record", "attempt", "idempotency_key")

    def __init__(self, record: SourceRecord, decode_key: Callable[[bytes], Any], number: int | None) -> None:
        self._record = record
        self._decode_key = decode_key
        self.attempt = 0
        self.idempotency_key = f"{record.topic()}/{record.partition()}/{record.offset()}"
        if number is not None:
            self.idempotency_key += f"/{number}"

    @property
    def key(self) -> Any:
        """The record's key, decoded."""
        key = self._record.key()
        return None if key is None else self._decode_key(key)

    @property
    def timestamp(self) -> int:
        """Milliseconds since 1970; -1 if it has none."""
        return self._record.timestamp()[1]

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """The record's headers, in order."""
        return self._record.headers() or []

    @property
    def topic(self) -> str:
        """The topic that it was read from."""
        return str(self._record.topic())

    @property
    def partition(self) -> int:
        """The partition that it was read from."""
        return int(self._record.partition())

    @property
    def offset(self) -> int:
        """Its offset there."""
        return int(self._record.offset())


class Call:
    """One call of an async function, with all its attempts.

    Args:
        owner: whose call it is: those of a shard that is gone are dropped.
        node: the step.
        place: the place of its failures.
        context, value: the function's arguments.
        turn: calls with the same turn are made one after another. Its first part is the owner. None: it has
            no turn.
        on_done: called once with the call when it has a result or has failed. It returns the calls that
            follow from it.

    Attributes:
        result: what the function has returned.
        error: why the call has failed. None: it hasn't.
        failed: how many attempts have failed and count.
        attempt: the number of the present or last attempt, from 1.
    """

    __slots__ = (
        "attempt",
        "context",
        "error",
        "failed",
        "node",
        "on_done",
        "owner",
        "place",
        "result",
        "turn",
        "value",
    )

    def __init__(
        self,
        owner: object,
        node: MapAsync,
        place: Place,
        context: CallContext,
        value: Any,
        turn: Any,
        on_done: Callable[[Call], Sequence[Call]],
    ) -> None:
        self.owner = owner
        self.node = node
        self.place = place
        self.context = context
        self.value = value
        self.turn = turn
        self.on_done = on_done
        self.result: Any = None
        self.error: BaseException | None = None
        self.failed = 0
        self.attempt = 0

    def describe(self) -> str:
        """For messages: which step, and which record."""
        return f"map_async {self.node.name!r} of {describe_record(self.context._record)}"  # pyright: ignore[reportPrivateUsage]


Segment = Callable[[SourceRecord, bytes | None, Any, list[Any]], None]
"""The steps up to the next `map_async`: appends the values that reach it to the list."""
GoOn = Callable[[], Sequence[Call]]


def _go_on_at_once(_record: SourceRecord, go_on: GoOn) -> Sequence[Call]:
    return go_on()


@dataclass(frozen=True, slots=True)
class ChainCalls:
    """The part of a chain that runs in advance.

    Attributes:
        name: the chain's name.
        segments: the steps in front of each `map_async`.
        nodes: these `map_async` steps.
        places: the places of their failures.
        steps: the names of all places in the chain.
    """

    name: str
    segments: Sequence[Segment]
    nodes: Sequence[MapAsync]
    places: Sequence[Place]
    steps: frozenset[str]


class InputCalls:
    """The chains of one input that make calls.

    Args:
        source: the input.
        chains: all chains of the input.
        partition: the shard's partition.

    Attributes:
        results: what has come of the calls.
        chains: those that make calls.
        run_between: runs the steps between two calls of a record, by calling the function that it gets. A
            shell may set it, to know that they run.
    """

    def __init__(self, source: Input, chains: Sequence[Chain], partition: int) -> None:
        self.results = CallResults()
        self.run_between: Callable[[SourceRecord, GoOn], Sequence[Call]] = _go_on_at_once
        self._source = source
        self._shared = SharedSteps(chains)
        self._decode = value_codec(source.topic.value)[0]
        self._decode_key = key_codec(source.topic.key)[0]
        self._stamper = None if source.timestamp is None else Stamper(source.timestamp, source.topic.value)
        self.chains = [
            _compile_chain(chain, source, partition)
            for chain in chains
            if any(isinstance(node, MapAsync) for node in chain.operators)
        ]

    def begin(self, record: SourceRecord, condemned: Sequence[Condemnation]) -> RecordCalls:
        """Begin with the calls of a record. Runs the steps in front of them.

        Args:
            record: the record.
            condemned: what is known to fail. Chains in which a step fails without being called make no calls.
        """
        named = {name for one in condemned if not one.topic for name in self._shared.names(one.step)}
        chains = [chain for chain in self.chains if not named or not ("" in named or named & chain.steps)]
        raw = record.value()
        try:
            values = [None if raw is None else self._decode(raw) for _chain in chains]
            stamped = record
            if self._stamper is not None and chains:
                stamped = self._stamper.stamp(record, values[0])
        except FormatUnusable as error:
            # It may be usable when the record is processed, for which there are no calls then.
            for chain in chains:
                failure = StepFailure(chain.places[0], error)
                self.results.put(chain.name, record, Called(failure=failure))
            return RecordCalls(self, record, record, (), ())
        except BaseException:  # noqa: BLE001  the record fails in the same way when it is processed
            return RecordCalls(self, record, record, (), ())
        return RecordCalls(self, record, stamped, chains, values)

    def turn_of(self, chain: ChainCalls, level: int, key: bytes | None) -> Any:
        """Calls of one step for one key are made one after another."""
        return None if key is None else (self, chain.name, level, key)

    def context_of(self, record: SourceRecord, number: int | None) -> CallContext:
        """What the function gets."""
        return CallContext(record, self._decode_key, number)


@dataclass(slots=True)
class _InChain:
    """How far a record has come in one chain."""

    chain: ChainCalls
    level: int = 0
    calls: list[Call] = field(default_factory=list[Call])
    left: int = 0


class RecordCalls:
    """The calls of one record, and what has come of them.

    Attributes:
        record: the record.
        first: the calls that are made first. Those that follow are returned by `Call.on_done`.
    """

    __slots__ = ("_inputs", "_stamped", "_undone", "first", "record")

    def __init__(
        self,
        inputs: InputCalls,
        record: SourceRecord,
        stamped: SourceRecord,
        chains: Sequence[ChainCalls],
        values: Sequence[Any],
    ) -> None:
        self._inputs = inputs
        self._stamped = stamped
        self.record = record
        self._undone = len(chains)
        self.first: list[Call] = []
        for chain, value in zip(chains, values, strict=True):
            self.first += self._go_on(_InChain(chain), [value])

    @property
    def owner(self) -> object:
        """The owner of its calls."""
        return self._inputs

    @property
    def is_done(self) -> bool:
        """Whether the record can be processed."""
        return not self._undone

    def _go_on(self, at: _InChain, values: Sequence[Any]) -> Sequence[Call]:
        """Take these values to the next calls of the chain. Returns the calls."""
        key = self._stamped.key()
        reached: list[Any] = []
        try:
            for value in values:
                at.chain.segments[at.level](self._stamped, key, value, reached)
        except StepFailure as failure:
            return self._done(at.chain, Called(failure=failure))
        if not reached:
            return self._done(at.chain, Called())
        node, place = at.chain.nodes[at.level], at.chain.places[at.level]
        turn = self._inputs.turn_of(at.chain, at.level, key)

        def on_done(_call: Call) -> Sequence[Call]:
            at.left -= 1
            return self._called(at) if not at.left else ()

        at.left = len(reached)
        at.calls = [
            Call(
                self._inputs,
                node,
                place,
                self._inputs.context_of(self._stamped, number if len(reached) > 1 else None),
                value,
                turn,
                on_done,
            )
            for number, value in enumerate(reached)
        ]
        return at.calls

    def _called(self, at: _InChain) -> Sequence[Call]:
        """All calls of a step are done."""
        for call in at.calls:
            if call.error is not None:
                place = call.place
                if call.failed > 1:
                    place = replace(place, doing=f"{place.doing}, after {call.failed} attempts of the call")
                return self._done(at.chain, Called(failure=StepFailure(place, call.error)))
        values = [call.result for call in at.calls]
        at.level += 1
        if at.level == len(at.chain.nodes):
            return self._done(at.chain, Called(values))
        return self._inputs.run_between(self.record, lambda: self._go_on(at, values))

    def _done(self, chain: ChainCalls, called: Called) -> Sequence[Call]:
        self._inputs.results.put(chain.name, self.record, called)
        self._undone -= 1
        return ()


def _compile_chain(chain: Chain, source: Input, partition: int) -> ChainCalls:
    operators = [
        operator_for(node, number, chain.name) for number, node in enumerate(chain.operators, start=1)
    ]
    segments: list[Segment] = []
    nodes: list[MapAsync] = []
    places: list[Place] = []
    before: list[CompiledOperator] = []
    for node, operator in zip(chain.operators, operators, strict=True):
        if isinstance(node, MapAsync):
            segments.append(_compile_segment(before, source, partition))
            nodes.append(node)
            places.append(operator.place)
            before = []
        else:
            before.append(operator)
    steps = frozenset(operator.place.name for operator in operators)
    return ChainCalls(chain.name, segments, nodes, places, steps)


def _compile_segment(operators: Sequence[CompiledOperator], source: Input, partition: int) -> Segment:
    reached: list[Any] = []
    # A generator may yield the same object several times, with changes in between.
    needs_copies = any(isinstance(operator, FlatMapOperator) for operator in operators)

    def reach(_record: SourceRecord, _key: bytes | None, value: Any) -> None:
        reached.append(deepcopy(value) if needs_copies else value)

    surroundings = Surroundings(
        source.topic, partition, {}, HandlerContext, (StepFailure,), _no_writer, _no_port, {}, CallResults()
    )
    step: Step = reach
    for operator in reversed(operators):
        step = operator.compile(surroundings, step)

    def segment(record: SourceRecord, key: bytes | None, value: Any, into: list[Any]) -> None:
        reached.clear()
        try:
            step(record, key, value)
            into += reached
        finally:
            reached.clear()

    return segment


def _no_port(_place: Place) -> OutputPort:
    raise AssertionError("a step in front of a map_async writes nothing")


def _no_writer(_place: Place, _following: Step | None) -> WriteRecord:
    raise AssertionError("a step in front of a map_async has no state, and writes nothing")
