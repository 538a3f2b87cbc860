"""What the author of a job file most likely meant, where Python only says what failed.

Responsible for: the remedy of an exception that importing a job file raised, for the mistakes that are made
often: a name that is misspelt or wasn't imported, a method of another object or another library, a call that
doesn't fit. Rule: a hint is a guess, so it never hides what Python says. Must not execute anything of the job
file.
"""

from __future__ import annotations

import builtins
import inspect
import re
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final

import fcluster
from fcluster.api.call_hints import hint_of_call
from fcluster.api.job import Job
from fcluster.api.streams import Stream
from fcluster.api.tables import GlobalTable, GroupedTable, Table
from fcluster.api.windowed import GatheredStream, WindowedStream
from fcluster.common.spelling import near_names
from fcluster.graph.operators import TopicSpec
from fcluster.graph.record import HOW_TO_WRITE

_CALL = re.compile(r"^([\w.]+)\(\) (?:missing|got|takes)")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_IMPORT = re.compile(r"^cannot import name '(\w+)' from 'fcluster")
_OF_VALUES = re.compile(
    r"'(?:GlobalTable|Stream|Table|TopicSpec)'"
    r"(?: object is not (?:iterable|subscriptable)| object does not support item| has no len| and ')"
    r"| and '(?:Stream|Table)'"
)
"""Python's messages for what others do with a data frame, a list or a number."""
_MODULES: Final = {
    "timedelta": "datetime",
    "datetime": "datetime",
    "dataclass": "dataclasses",
    "Any": "typing",
}
"""What job files often need, and where it is."""
_WINDOW = "window({}, name=...)"
_NOT_FILTER: Final = "filter(lambda value: not ...)"
_SEEN_BEFORE: Final = "process(handler), with states=[ValueState('seen', ttl=...)]"
_CALLED_HERE: Final = {
    "add_sink": "to(topic)",
    "agg": "window(Tumbling(...), name=...).aggregate(n=count()), or without an end .aggregate(n=count(), "
    "name=...)",
    "apply": "map(function)",
    "assign_timestamps": "job.topic(name, timestamp=...)",
    "assign_timestamps_and_watermarks": "job.topic(name, timestamp=..., watermark=Watermark(...))",
    "co_group": "job.merge(stream, other)",
    "cogroup": "job.merge(stream, other)",
    "concat": "job.merge(stream, other)",
    "connect": "job.merge(stream, other)",
    "count_window": _WINDOW.format("Counted(...)"),
    "distinct": _SEEN_BEFORE,
    "drop_duplicates": _SEEN_BEFORE,
    "exclude": _NOT_FILTER,
    "expand": "flat_map(function)",
    "filter_not": _NOT_FILTER,
    "flat_map_values": "flat_map(function)",
    "flat_transform": "process(handler)",
    "for_each": "peek(function)",
    "foreach": "peek(function)",
    "get_side_output": "process(handler), whose handler yields Record(topic=...)",
    "group_by": "key_by(...)",
    "group_by_key": "key_by(...)",
    "groupby": "key_by(...)",
    "hopping_count_window": _WINDOW.format("Counted(...)"),
    "hopping_window": _WINDOW.format("Hopping(...)"),
    "interval_join": "join(other, within=..., name=...)",
    "join_asof": "join(table)",
    "join_interval": "join(other, within=..., name=...)",
    "join_lookup": "join(global_table, on=...)",
    "left_join": "join(other, how='left')",
    "map_values": "map(function)",
    "merge": "job.merge(stream, other)",
    "outer_join": "join(other, how='outer')",
    "print": "peek(print)",
    "process_values": "process(handler)",
    "repartition": "key_by(...)",
    "select": "map(function)",
    "select_key": "key_by(lambda ctx, value: ...)",
    "session_window": _WINDOW.format("Session(...)"),
    "side_output": "process(handler), whose handler yields Record(topic=...)",
    "sink": "to(topic)",
    "sink_to": "to(topic)",
    "sliding_count_window": _WINDOW.format("Counted(...)"),
    "sliding_window": _WINDOW.format("Sliding(...)"),
    "split": "branch(function, ...)",
    "sum": "window(Tumbling(...), name=...).aggregate(total=sum_(...)), or without an end "
    ".aggregate(total=sum_(...), name=...)",
    "suppress": "window(..., emit='close'), the default: a result is passed on when its window closes",
    "take": _WINDOW.format("Counted(...)") + ".aggregate(values=collect())",
    "time_window": _WINDOW.format("Tumbling(...)"),
    "to_table": "table(name=...)",
    "to_topic": "to(topic)",
    "transform": "process(handler)",
    "transform_values": "process(handler)",
    "tumbling_count_window": _WINDOW.format("Counted(...)"),
    "tumbling_window": _WINDOW.format("Tumbling(...)"),
    "union": "job.merge(stream, other)",
    "update": "peek(function)",
    "where": "filter(function)",
    "window_by": "window(...)",
    "windowed_by": "window(...)",
}
"""How streams of other libraries call what streams have here. Names in camel case count as these."""
_CALLED_IN_TESTS: Final = {
    "advance_wall_clock_time": "advance(by_ms=...)",
    "create_input_topic": "send(topic, value, key=...)",
    "create_output_topic": "read(topic)",
    "get_key_value_store": "state(handler, key) of a handler, and .table(table) of a table",
    "get_state_store": "state(handler, key) of a handler, and .table(table) of a table",
    "pipe_input": "send(topic, value, key=...)",
    "poll": "read(topic)",
    "produce": "send(topic, value, key=...)",
    "process": "send(topic, value, key=...)",
    "read_output": "read(topic)",
    "read_record": "read(topic)",
    "read_values_to_list": "read_values(topic)",
}
"""What test drivers of other libraries call what `fcluster.testing.Driver` has."""
_LETTERS_MIN: Final = 5
"""A shorter name of ours says nothing if another one begins with it."""
_HANDLER: Final = "a function, def handler(ctx, value), for job.stream(topic).process(handler)"
_IMPORTED_HERE: Final = {
    "App": "Job",
    "Application": "Job",
    "KeyedProcessFunction": _HANDLER,
    "ProcessFunction": _HANDLER,
    "Processor": _HANDLER,
    "StreamExecutionEnvironment": "Job",
    "StreamsBuilder": "Job",
    "TimeWindows": "Tumbling or Hopping",
}
"""What is imported from other libraries."""
_CALLED_IN_TABLES: Final = {
    "filter_not": _NOT_FILTER,
    "left_join": "join(other, how='left')",
    "map_values": "map(function)",
    "outer_join": "join(other, how='outer')",
    "select": "map(function)",
    "transform_values": "map(function)",
    "where": "filter(function)",
}
"""The same for tables."""
_OF_WINDOWS: Final = {
    "allowed_lateness": "Say that of the windows: Tumbling(..., grace=...).",
    "current": "Say when results are passed on: window(..., emit='update').",
    "emit_strategy": "Say when results are passed on: window(..., emit='update').",
    "final": "That is the default: a result is passed on when its window closes.",
    "grace": "Say that of the windows: Tumbling(..., grace=...).",
    "side_output_late_data": "Name the topic of late records: window(..., late=topic).",
    "suppress": "That is the default: a result is passed on when its window closes.",
    "trigger": "Say when results are passed on: window(..., emit='update'), or emit=seconds(10).",
}
"""What other libraries say behind a window, and where that belongs here."""


def hint(error: BaseException) -> str:
    """What to do about an exception that importing a job file raised. Empty if it is no common mistake."""
    text = str(error)
    if isinstance(error, NameError):
        return _hint_of_name(str(getattr(error, "name", "")), _visible(error.__traceback__))
    if isinstance(error, AttributeError):
        return _hint_of_attribute(getattr(error, "obj", None), str(getattr(error, "name", "")))
    if isinstance(error, ImportError):
        found = _IMPORT.match(text)
        return _hint_of_import(found[1]) if found else ""
    if isinstance(error, TypeError):
        found = _CALL.match(text)
        if found is None and _OF_VALUES.search(text):
            return (
                "Its records aren't here yet. Say with functions what to do with each of their values: "
                ".map(lambda value: value['cents']), .filter(lambda value: value['cents'] > 5)."
            )
        return _hint_of_call(found[1], text) if found else ""
    if isinstance(error, ValueError) and "values to unpack" in text and ".branch(" in _line(error):
        return "branch() gives one more stream than functions: the last one has all other records."
    return ""


def _line(error: BaseException) -> str:
    """The line of code that failed."""
    lines = traceback.extract_tb(error.__traceback__, -1)
    return (lines[-1].line or "") if lines else ""


def _visible(trace: TracebackType | None) -> list[str]:
    """The names that the code that failed could have used."""
    if trace is None:
        return []
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    return [*frame.f_locals, *frame.f_globals, *dir(builtins)]


def _hint_of_name(name: str, visible: Iterable[str]) -> str:
    if name in fcluster.__all__:
        return f"Import it: from fcluster import {name}"
    if name in _MODULES:
        return f"Import it: from {_MODULES[name]} import {name}"
    near = near_names(name, visible)
    if near:
        return f"Did you mean {near[0]}?"
    near = near_names(name, fcluster.__all__)
    return f"Did you mean {near[0]}? Then: from fcluster import {near[0]}" if near else ""


def _hint_of_import(name: str) -> str:
    if name in _IMPORTED_HERE:
        return f"Here it is {_IMPORTED_HERE[name]}."
    begun = [one for one in fcluster.__all__ if len(one) >= _LETTERS_MIN and name.startswith(one)]
    near = begun or near_names(name, fcluster.__all__)
    if near:
        return f"Did you mean {near[0]}?"
    return f"fcluster has {', '.join(one for one in fcluster.__all__ if not one.startswith('_'))}."


def _hint_of_attribute(owner: Any, name: str) -> str:
    kind = _kind_of(owner)
    snake = _snake(name)
    of_stream = f".{snake}(...)" if snake in _public(Stream) else _CALLED_HERE.get(snake, "")
    of_stream = of_stream if of_stream.startswith((".", "job.")) or not of_stream else f".{of_stream}"
    if owner is None:
        if not of_stream:
            return ""
        return "A stream ends with .to(topic), which returns nothing. To go on, use .through(topic) instead."
    if isinstance(owner, WindowedStream | GatheredStream) and snake in _OF_WINDOWS:
        return f"{_OF_WINDOWS[snake]} Behind the window, say what to compute: .aggregate(n=count())."
    if isinstance(owner, WindowedStream | GatheredStream | GroupedTable):
        return "Say first what to compute: .aggregate(n=count()). What follows goes behind it."
    if isinstance(owner, TopicSpec | Job) and of_stream:
        return of_stream if of_stream.startswith("job.") else f"Begin a stream: job.stream(topic){of_stream}"
    if isinstance(owner, Table | GlobalTable) and snake in _CALLED_IN_TABLES:
        return f"Here it is .{_CALLED_IN_TABLES[snake]}"
    if kind.__module__.startswith("fcluster.testing.") and snake in _CALLED_IN_TESTS:
        return f"Here it is .{_CALLED_IN_TESTS[snake]}"
    if snake != name and snake in _public(kind) and kind.__module__.startswith("fcluster."):
        return f"Here it is .{snake}(...)"
    if isinstance(owner, Table) and snake in _public(GroupedTable):
        return f"Say first what the groups of its rows are: table.group_by(by, name=...).{snake}(...)"
    if isinstance(owner, Table) and snake in _public(Stream):
        return f"A table isn't a stream. The stream of its changes is: table.to_stream().{snake}(...)"
    if isinstance(owner, Job) and snake in ("run", "start", "execute"):
        return "Leave it out: a job file only declares the job, and `fcluster up FILE` runs it."
    if isinstance(owner, Stream) and of_stream:
        return f"Here it is {of_stream}"
    if not kind.__module__.startswith("fcluster."):
        return ""
    names = _public(kind)
    near = near_names(name, names)
    title = "Topic" if kind is TopicSpec else kind.__name__
    return f"Did you mean .{near[0]}?" if near else f"A {title} has {', '.join(names)}."


def _snake(name: str) -> str:
    """`mapValues` as `map_values`."""
    return _HUMP.sub("_", name).lower()


def _hint_of_call(called: str, text: str) -> str:
    """For a call of ours that doesn't fit its parameters."""
    function: Any = fcluster
    for part in called.split("."):
        function = getattr(function, part, None)
    first = getattr(fcluster, called.split(".")[0], None)
    if function is None or not (getattr(first, "__module__", None) or "").startswith("fcluster."):
        return ""
    if function is fcluster.Record.__init__:
        return f"Write {HOW_TO_WRITE}; it takes {', '.join(_parameters(function))}, all by name."
    return hint_of_call(function, called.removesuffix(".__init__"), text)


def _parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _kind_of(value: object) -> type[Any]:
    return type(value)


def _public(kind: type[Any]) -> list[str]:
    return [name for name in dir(kind) if not name.startswith("_")]
