"""Process: calls a handler that has state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fcluster.engine.context import Table
from fcluster.engine.entries import Clock, EntryTable
from fcluster.engine.kinds import make_access
from fcluster.engine.operators.base import Surroundings, WriteRecord, close_generator
from fcluster.engine.records import SourceRecord, TimerRecord
from fcluster.engine.steps import Place, Step, StepFailure, where_of_function
from fcluster.graph.codecs import key_codec
from fcluster.graph.operators import Process
from fcluster.graph.record import Record
from fcluster.graph.timers import TimerFunction


class ProcessOperator:
    """Calls `handler(ctx, value)` for each value and passes on what it yields or returns."""

    keeps_value = False

    def __init__(self, node: Process) -> None:
        self._node = node
        declared = dict.fromkeys(name for store in node.stores for name in store.store_names)
        timers = () if node.timer_store is None else node.timer_store.store_names
        self.stores = (node.name, *declared, *timers)
        where = where_of_function(node.function)
        self.place = Place(node.name, f"in {node.name!r}", node.on_error, where)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        source, node, place = surroundings.source, self._node, self.place
        context: Any = surroundings.context_type(
            source.name,
            surroundings.partition,
            key_codec(source.key)[0],
            cast("Table", surroundings.tables[node.name]),
        )
        tables = surroundings.tables
        context._access = {
            store.state.name: (store.declared, make_access(store, tables, context))
            for store in node.stores
            if store.store_names
        }
        if node.timers:
            context._timers = surroundings.timers[node.name]
        function, passing = node.function, surroundings.passing
        clocks = {store.clock_name for store in node.stores if store.state.ttl is not None}
        for name in clocks:  # at most one
            function = _advancing(function, Clock(cast("EntryTable", tables[name])))
        write_record = surroundings.record_writer(place, following)
        for timer in node.timers:
            name = getattr(timer.function, "__name__", timer.name)
            timer_where = where_of_function(timer.function)
            timer_place = Place(node.name, f"in {name!r}", node.on_error, timer_where)
            surroundings.fire[node.name, timer.name] = (
                timer_place,
                _compile_timer(timer, timer_place, context, passing, write_record, following),
            )

        def many(record: SourceRecord, key: bytes | None, value: Any) -> None:
            context._record = record  # a method call for each record would cost time
            context._key = key
            outputs = None
            try:
                outputs = function(context, value)
                for output in outputs or ():
                    if type(output) is Record:
                        write_record(record, key, output)
                    elif output is not None:
                        following(record, key, output)
            except passing:
                close_generator(outputs)
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        def one(record: SourceRecord, key: bytes | None, value: Any) -> None:
            context._record = record
            context._key = key
            try:
                output = function(context, value)
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error
            if type(output) is Record:
                write_record(record, key, output)
            elif output is not None:
                following(record, key, output)

        return many if node.returns == "many" else one


def _compile_timer(
    timer: TimerFunction,
    place: Place,
    context: Any,
    passing: tuple[type[BaseException], ...],
    write_record: WriteRecord,
    following: Step,
) -> Callable[[TimerRecord, bytes], None]:
    """What to call when the timer is due. Timers are rare compared with records, so all kinds of functions
    are handled in one way.
    """
    function, is_many = timer.function, timer.returns == "many"

    def fire(timer_record: TimerRecord, key: bytes) -> None:  # `step_of` looks for the name `timer_record`
        context._record = timer_record
        context._key = key
        outputs = None
        try:
            outputs = function(context.key, context)
            for output in (outputs or ()) if is_many else (outputs,):
                if type(output) is Record:
                    write_record(timer_record, key, output)
                elif output is not None:
                    following(timer_record, key, output)
        except passing:
            close_generator(outputs)
            raise
        except BaseException as error:
            raise StepFailure(place, error) from error

    return fire


def _advancing(function: Callable[[Any, Any], Any], clock: Clock) -> Callable[[Any, Any], Any]:
    """The handler, which advances its clock with each record before it sees it."""

    def advancing(context: Any, value: Any) -> Any:
        clock.advance(context._record.timestamp()[1])
        return function(context, value)

    return advancing
