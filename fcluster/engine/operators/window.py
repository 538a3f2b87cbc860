"""Window: keeps aggregates for each key and window, and passes on their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, Final, cast

from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.interval_notes import RESULT
from fcluster.engine.interval_windows import NOTED, OpenWindowsAtIntervals
from fcluster.engine.operators.base import Surroundings
from fcluster.engine.ordered_keys import encode_time
from fcluster.engine.records import LaterRecord, OutputPort, SourceRecord, TimerRecord
from fcluster.engine.steps import Place, RecordError, Step, StepFailure
from fcluster.engine.values import describing_fields
from fcluster.engine.windows import CLOSE, OpenWindows
from fcluster.graph.aggregates import Aggregate, unshared
from fcluster.graph.codecs import key_codec
from fcluster.graph.operators import GroupTable, JoinStreams, Window
from fcluster.graph.record import Record
from fcluster.graph.typed import TYPED
from fcluster.graph.windows import InTime

_UNCHANGING = frozenset({int, float, str, bool, type(None), *TYPED})
"""Values of these types can't be changed in place. A look at the type saves most copies."""
_OF_VALUES: Final = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What functions raise that get a value they don't expect."""
NO_KEY: Final = b""
"""Of windows of all records, whatever their keys are."""
ResultOf = Callable[[bytes, int, int, list[Any]], dict[str, Any]]
"""Returns the result of a window, given its key, start and end, and its aggregates."""


_Update = Callable[[SourceRecord, "bytes | None", bytes, int, list[Any]], None]
"""Called with a record, its key, and the key, end and aggregates of a window."""


class OfWindow:
    """What the operators of all kinds of windows have in common."""

    keeps_value = False

    def __init__(self, node: Window) -> None:
        self._node = node
        self.stores = (node.name, *node.store.store_names)
        self.place = Place(node.name, f"in the window {node.name!r}", node.on_error)

    def name_fields(self, table: EntryTable, kept_in: Callable[[Any], Iterable[list[Any]]]) -> None:
        """Let messages about what can't be stored name the field. For `kept_in`, see `describing_fields`."""
        names = [name for name, _aggregate in self._node.fields]
        table.describe_unkept = describing_fields(f"the window {self._node.name!r}", names, kept_in)

    def passing_on(
        self, surroundings: Surroundings, following: Step, results_at: Callable[[bytes, int], Iterable[Any]]
    ) -> Callable[[TimerRecord, bytes], None]:
        """The function that `firing` calls when results are due.

        Args:
            surroundings: of the step.
            following: gets the results.
            results_at: returns them, given their key and the timestamp of the timer.
        """
        place, passing, keyed = self.place, surroundings.passing, not self._node.keyless

        def pass_on(timer_record: TimerRecord, key: bytes) -> None:  # `step_of` looks for `timer_record`
            try:
                results = results_at(key, timer_record.timestamp()[1])
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error
            for result in results:
                following(timer_record, key if keyed else None, result)

        return pass_on


class WindowOperator(OfWindow):
    """Adds each value to the windows that its timestamp is in; `firing` calls the function that closes
    them.
    """

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        assert isinstance(node.windows, InTime)
        windows = cast("OpenWindows", surroundings.timers[node.name])
        surroundings.fire[node.name, CLOSE] = (place, self._compile_close(surroundings, windows, following))
        clock, table, opened = windows.clock, windows.table, windows.opened
        self.name_fields(table, lambda kept: [kept])
        get, put, late = table.get, table.put, compile_late(node, place, surroundings, windows.port)
        if node.is_part and node.emit == "update":
            # The part of each record is passed on alone: nothing is kept.
            get, put, opened = _get_nothing, _do_nothing, _do_nothing
        ends_of = node.windows.ends_of()
        grace_ms, floor_ms, keyed = node.windows.grace_ms, windows.floor_ms, not node.keyless
        inits, add_all = compile_fields(node)
        update = self._compile_update(surroundings, following) if node.emit == "update" else None
        noting = windows if isinstance(windows, OpenWindowsAtIntervals) else None
        if noting is not None:
            results_at = self._compile_results(surroundings, noting)
            surroundings.fire[node.name, RESULT] = (
                place,
                self.passing_on(surroundings, following, results_at),
            )
        nothing_yet = () if noting is None else (0,)

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            timestamp_ms = record.timestamp()[1]
            try:
                own = key if keyed else NO_KEY
                if own is None or timestamp_ms < 0:
                    raise in_no_window(own)
                now_ms = clock.now_ms
                closed_ms = floor_ms if now_ms is None else now_ms - grace_ms
                if closed_ms < floor_ms:
                    closed_ms = floor_ms
                is_late = True
                for end_ms in ends_of(timestamp_ms):
                    if end_ms <= closed_ms:
                        continue
                    is_late = False
                    entry = encode_time(end_ms) + own
                    kept = get(entry)
                    if kept is ABSENT:
                        kept = [init() for init in inits]
                        kept += nothing_yet
                        put(entry, kept)
                        opened(own, end_ms)
                    elif noting is not None and now_ms is not None and 0 < kept[NOTED] <= now_ms:
                        noting.changing(own, end_ms, kept)
                    add_all(kept, value, timestamp_ms)
                    if noting is not None:
                        if not kept[NOTED]:  # asked here, as most records find it noted
                            noting.changed(own, end_ms, kept, timestamp_ms)
                    elif update is not None:
                        update(record, key, own, end_ms, kept)
                if is_late:
                    late(record, key, value)
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return step

    def _compile_update(self, surroundings: Surroundings, following: Step) -> _Update:
        """What passes on the result of a window that a record has changed."""
        node = self._node
        assert isinstance(node.windows, InTime)
        start_of, result_of = node.windows.start_of(), compile_result(node, surroundings)
        keyed = not node.keyless

        def update(record: SourceRecord, key: bytes | None, own: bytes, end_ms: int, kept: list[Any]) -> None:
            result = apart(result_of(own, start_of(end_ms), end_ms, kept))
            following(record, key if keyed else None, result)

        return update

    def _compile_results(
        self, surroundings: Surroundings, noting: OpenWindowsAtIntervals
    ) -> Callable[[bytes, int], list[dict[str, Any]]]:
        """What is passed on at an interval."""
        node = self._node
        assert isinstance(node.windows, InTime)
        start_of, result_of = node.windows.start_of(), compile_result(node, surroundings)

        def results_at(key: bytes, at_ms: int) -> list[dict[str, Any]]:
            return [
                apart(result_of(key, start_of(end_ms), end_ms, kept))
                for end_ms, kept in noting.take_noted(key, at_ms)
            ]

        return results_at

    def _compile_close(
        self, surroundings: Surroundings, windows: OpenWindows, following: Step
    ) -> Callable[[TimerRecord, bytes], None]:
        node, place, passing = self._node, self.place, surroundings.passing
        assert isinstance(node.windows, InTime)
        table, start_of, keyed = windows.table, node.windows.start_of(), not node.keyless
        noting = windows if isinstance(windows, OpenWindowsAtIntervals) else None
        result_of = compile_result(node, surroundings)
        updates = node.emit == "update" and not node.is_part  # a part is left from when it wasn't passed on

        def close(timer_record: TimerRecord, key: bytes) -> None:  # `step_of` looks for `timer_record`
            try:
                end_ms = timer_record.timestamp()[1] + 1
                entry = encode_time(end_ms) + key
                kept = table.get(entry)
                if noting is not None:
                    noting.closing(key, end_ms, kept)
                table.delete(entry)
                if updates:
                    return
                value = result_of(key, start_of(end_ms), end_ms, kept)
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error
            if node.is_part and noting is not None:  # see `interval_gathered`
                following(LaterRecord(timer_record, end_ms + node.closes_after_ms), None, value)
            else:
                following(timer_record, key if keyed else None, value)

        return close


# --- what windows of all kinds share ----------------------------------------------------------------------


def compile_fields(
    node: Window | GroupTable,
) -> tuple[tuple[Callable[[], Any], ...], Callable[[list[Any], Any, int], None]]:
    """The initial aggregates of a window or a row, and a function that adds a value with its timestamp to
    them. It raises `StepFailure` with the name of the field that doesn't take the value.
    """
    inits = tuple(aggregate.init for _name, aggregate in node.fields)
    adds = [(at, of_own_values(one, one.add), one.takes_time) for at, (_name, one) in enumerate(node.fields)]
    untimed = [(at, add) for at, add, takes_time in adds if not takes_time]
    timed = [(at, add) for at, add, takes_time in adds if takes_time]

    def add_all(kept: list[Any], value: Any, timestamp_ms: int) -> None:
        at = 0
        try:
            for at, add in untimed:
                kept[at] = add(kept[at], value)
            for at, add in timed:
                kept[at] = add(kept[at], value, timestamp_ms)
        except _OF_VALUES as error:
            owner = "window" if isinstance(node, Window) else "table"
            title = f"in the field {node.fields[at][0]!r} of the {owner} {node.name!r}"
            raise StepFailure(Place(node.name, title, node.on_error), error) from error

    return inits, add_all


def of_own_values(aggregate: Aggregate[Any, Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the aggregate that takes what is kept and a value. It gets a value that it may keep, and
    that no other aggregate, and no other window, has.
    """
    if not aggregate.takes_copies:
        return function

    def on_its_own(kept: Any, value: Any, *time: Any) -> Any:
        return function(kept, unshared(value), *time)

    return on_its_own


def compile_result(node: Window, surroundings: Surroundings) -> ResultOf:
    """The function that makes the results of the step's windows."""
    decode_key = None if node.keyless else key_codec(surroundings.source.key)[0]
    results = tuple((name, at, one.result) for at, (name, one) in enumerate(node.fields))

    def result_of(key: bytes, start_ms: int, end_ms: int, kept: list[Any]) -> dict[str, Any]:
        value: dict[str, Any] = {} if decode_key is None else {"key": decode_key(key)}
        value["start"], value["end"] = start_ms, end_ms
        for name, at, result in results:
            value[name] = result(kept[at])
        return value

    return result_of


def apart(result: dict[str, Any]) -> dict[str, Any]:
    """The result, for steps that may change it in place: what the window keeps stays as it is."""
    for name, value in result.items():
        if type(value) not in _UNCHANGING:
            result[name] = deepcopy(value)
    return result


def compile_late(
    node: Window | JoinStreams, place: Place, surroundings: Surroundings, port: OutputPort
) -> Callable[[SourceRecord, bytes | None, Any], None]:
    """What to do with a record that comes too late."""
    topic = node.late
    write_record = surroundings.record_writer(place, None)

    def drop(_record: SourceRecord, _key: bytes | None, _value: Any) -> None:
        port.late += 1

    def write(record: SourceRecord, key: bytes | None, value: Any) -> None:
        port.late += 1
        write_record(record, key, Record(topic=topic, value=value))

    return drop if topic is None else write


def _get_nothing(_entry: bytes) -> Any:
    return ABSENT


def _do_nothing(*_arguments: object) -> None:
    pass


def in_no_window(key: bytes | None) -> RecordError:
    """Why a record without key or timestamp fails."""
    if key is None:
        return RecordError("the record has no key, so it is in no window; give it one with key_by() first")
    return RecordError(
        "the record has no timestamp (behind a key_by, 0 is none): it is in no window; filter it out before"
    )
