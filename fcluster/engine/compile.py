"""Compiles a chain into nested closures that take a record through its operators.

This happens once, when a shard starts. For each record, only the job's own functions then run, without
dispatch between operators. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fcluster.engine.call_results import CallResults
from fcluster.engine.context import AnyTable, HandlerContext, KeyTimers, UndoableContext
from fcluster.engine.failure import UnkeptStateError
from fcluster.engine.operators import operator_for
from fcluster.engine.operators.base import (
    EventMs,
    Surroundings,
    TimerStep,
    WriteRecord,
    field_of,
    no_event_ms,
)
from fcluster.engine.operators.map_async import MapAsyncOperator
from fcluster.engine.operators.write import (
    Target,
    compile_passing_on,
    compile_record_writer,
    compile_rekeyed_write,
    compile_write,
    discard,
)
from fcluster.engine.pairs import AnyOpen
from fcluster.engine.records import HeldOutputs, OutputPort
from fcluster.engine.showing import of_values
from fcluster.engine.steps import Place, Step, StepFailure, where_of_function
from fcluster.graph.description import rekey_description
from fcluster.graph.stages import Chain, Stage


@dataclass(frozen=True, slots=True)
class CompiledChain:
    """A chain, ready to run in one shard.

    Attributes:
        name: the chain's name.
        step: takes a record through the whole chain.
        places: the places where it can fail, by name.
        tables: the tables of its handlers.
        held: holds its outputs back. None: they go to the port at once.
        timers: what to call when a timer is due, by the names of handler and timer.
    """

    name: str
    step: Step
    places: Mapping[str, Place]
    tables: tuple[AnyTable, ...]
    held: HeldOutputs | None
    timers: Mapping[tuple[str, str], TimerStep]


def is_tolerant(chain: Chain) -> bool:
    """Whether a record may fail in the chain without stopping the job. Then its outputs must be held back."""
    return any(rule != "stop" for rule in chain.rules)


def compile_chain(
    chain: Chain,
    stage: Stage,
    partition: int,
    tables: Mapping[str, AnyTable],
    port: OutputPort,
    passing: tuple[type[BaseException], ...],
    held: HeldOutputs | None,
    timers: Mapping[str, KeyTimers | AnyOpen],
    results: CallResults,
    event_ms: EventMs = no_event_ms,
) -> CompiledChain:
    """Compile the chain for the shard `partition` of `stage`.

    Args:
        tables: the shard's tables, by the name of the store.
        port: takes the outputs, unless they are held back.
        passing: exceptions that no record causes, wherever they are raised.
        held: takes the outputs until the record is through.
        timers: the timers of the shard's handlers that set some, and its open windows, by the step's name.
        results: what has come of the calls of records. The steps in front of the last `map_async` run when
            these calls are made, and not here.
        event_ms: returns the shard's event time.
    """
    operators = [
        operator_for(node, number, chain.name) for number, node in enumerate(chain.operators, start=1)
    ]
    places = {operator.place.name: operator.place for operator in operators}

    def port_at(place: Place) -> OutputPort:
        places[place.name] = place
        return port if held is None else held.at(place)

    source = stage.inputs[chain.input].topic
    sink_name = chain.sink.name if chain.sink is not None else "nowhere"
    writing = f"writing to {sink_name!r} at the end of {chain.name!r}"
    last = operators[-1] if operators else None
    # What can't be written is what the last function returned.
    sink_place = Place(writing, writing, chain.sink_on_error, last.place.where if last else "")

    writable = stage.declared and stage.declared | {topic.name for topic in chain.sinks}

    def record_writer(place: Place, following: Step | None) -> WriteRecord:
        is_last = last is not None and place is last.place and chain.rekey is None
        if is_last or following is None:
            return compile_record_writer(chain.sink, source, place, sink_place, port_at, writable)
        pass_on = compile_passing_on(following, source, place)
        return compile_record_writer(None, source, place, sink_place, port_at, writable, pass_on)

    surroundings = Surroundings(
        source,
        partition,
        tables,
        HandlerContext if held is None else UndoableContext,
        (StepFailure, UnkeptStateError, *passing),
        record_writer,
        port_at,
        port.stage_sizes,
        results,
        timers,
        event_ms=event_ms,
    )
    step: Step = discard
    if chain.sink is not None:
        target = Target(
            chain.sink,
            sink_place,
            all(operator.keeps_value for operator in operators),
            any(operator.stores for operator in operators),
        )
        if chain.rekey is not None:
            name = f"key_by ({rekey_description(chain.rekey)}) at the end of {chain.name!r}"
            where = where_of_function(chain.rekey)
            rekey_place = places[name] = Place(name, f"in {name}", chain.rekey_on_error, where)
            by = field_of(chain.rekey, "key_by") if isinstance(chain.rekey, str) else chain.rekey
            (key_of,), showing = of_values(source, partition, by)
            sink_port = port_at(sink_place)
            step = showing(compile_rekeyed_write(target, source, chain.rekey, key_of, rekey_place, sink_port))
        else:
            step = compile_write(target, source, port_at(sink_place))
    for operator in reversed(operators):
        step = operator.compile(surroundings, step)
        if isinstance(operator, MapAsyncOperator):
            break
    stores = [store for operator in operators for store in operator.stores]
    used = tuple(tables[store] for store in stores)
    return CompiledChain(chain.name, step, places, used, held, surroundings.fire)
