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
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final

import fcluster
from fcluster.api.call_hints import hint_of_call
from fcluster.api.job import Job
from fcluster.api.streams import Stream
from fcluster.api.tables import GroupedTable, Table
from fcluster.api.windowed import GatheredStream, WindowedStream
from fcluster.common.spelling import near_names
from fcluster.graph.operators import TopicSpec
from fcluster.graph.record import HOW_TO_WRITE

_CALL = re.compile(r"^([\w.]+)\(\) (?:missing|got|takes)")
_IMPORT = re.compile(r"^cannot import name '(\w+)' from 'fcluster")
_MODULES: Final = {
    "timedelta": "datetime",
    "datetime": "datetime",
    "dataclass": "dataclasses",
    "Any": "typing",
}
"""What job files often need, and where it is."""
_CALLED_HERE: Final = {
    "add_sink": "to(topic)",
    "agg": "window(Tumbling(...), name=...).aggregate(n=count()), or without an end .aggregate(n=count(), "
    "name=...)",
    "apply": "map(function)",
    "assign_timestamps": "job.topic(name, timestamp=...)",
    "for_each": "peek(function)",
    "foreach": "peek(function)",
    "group_by": "key_by(...)",
    "group_by_key": "key_by(...)",
    "groupby": "key_by(...)",
    "hopping_window": "window(Hopping(...), name=...)",
    "left_join": "join(other, how='left')",
    "map_values": "map(function)",
    "merge": "job.merge(stream, other)",
    "outer_join": "join(other, how='outer')",
    "print": "peek(print)",
    "repartition": "key_by(...)",
    "select": "map(function)",
    "select_key": "key_by(...)",
    "session_window": "window(Session(...), name=...)",
    "sink": "to(topic)",
    "sink_to": "to(topic)",
    "sliding_window": "window(Sliding(...), name=...)",
    "sum": "window(Tumbling(...), name=...).aggregate(total=sum_(...)), or without an end "
    ".aggregate(total=sum_(...), name=...)",
    "to_topic": "to(topic)",
    "transform": "process(handler)",
    "tumbling_window": "window(Tumbling(...), name=...)",
    "union": "job.merge(stream, other)",
    "update": "peek(function)",
    "where": "filter(function)",
    "window_by": "window(...)",
}
"""How streams of other libraries call what streams have here."""


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
        return _hint_of_call(found[1], text) if found else ""
    return ""


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
    near = near_names(name, fcluster.__all__)
    if near:
        return f"Did you mean {near[0]}?"
    return f"fcluster has {', '.join(one for one in fcluster.__all__ if not one.startswith('_'))}."


def _hint_of_attribute(owner: Any, name: str) -> str:
    kind = _kind_of(owner)
    of_stream = f".{name}(...)" if name in _public(Stream) else _CALLED_HERE.get(name, "")
    of_stream = of_stream if of_stream.startswith((".", "job.")) or not of_stream else f".{of_stream}"
    if owner is None:
        if not of_stream:
            return ""
        return "A stream ends with .to(topic), which returns nothing. To go on, use .through(topic) instead."
    if isinstance(owner, WindowedStream | GatheredStream | GroupedTable):
        return "Say first what to compute: .aggregate(n=count()). What follows goes behind it."
    if isinstance(owner, TopicSpec | Job) and of_stream:
        return of_stream if of_stream.startswith("job.") else f"Begin a stream: job.stream(topic){of_stream}"
    if isinstance(owner, Table) and name in _public(GroupedTable):
        return f"Say first what the groups of its rows are: table.group_by(by, name=...).{name}(...)"
    if isinstance(owner, Table) and name in _public(Stream):
        return f"A table isn't a stream. The stream of its changes is: table.to_stream().{name}(...)"
    if isinstance(owner, Job) and name in ("run", "start"):
        return "Leave it out: a job file only declares the job, and `fcluster up FILE` runs it."
    if isinstance(owner, Stream) and of_stream:
        return f"Here it is {of_stream}"
    if not kind.__module__.startswith("fcluster."):
        return ""
    names = _public(kind)
    near = near_names(name, names)
    title = "Topic" if kind is TopicSpec else kind.__name__
    return f"Did you mean .{near[0]}?" if near else f"A {title} has {', '.join(names)}."


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
