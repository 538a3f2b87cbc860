"""What the author of a job most likely meant with a call of ours that doesn't fit.

Responsible for: the hint for such a call, and that the `TypeError` of a method carries it wherever the call
is: in a test or at a prompt as well as in a job file, for which `hints` shows it. Rule: a hint is a guess, so
it never hides what Python says.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Final, TypeVar

from fcluster.common.spelling import near_names

_T = TypeVar("_T")
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
_OF_WINDOWS = ("allowed_lateness", "grace", "grace_ms", "grace_period")
_CALLED_ELSEWHERE: Final = {
    "by": ("key",),
    "every": ("advance", "advance_by", "hop", "slide", "step"),
    "function": ("fn", "func", "mapper", "predicate"),
    "gap": ("inactivity_gap", "session_gap", "timeout"),
    "grace": ("allowed_lateness", "grace_period"),
    "idle": ("idle_timeout", "idleness"),
    "key": ("key_deserializer", "key_serde", "key_serializer", "key_type"),
    "max_delay": ("allowed_lateness", "bounded_out_of_orderness", "lateness", "max_out_of_orderness"),
    "n": ("k", "limit"),
    "name": ("materialized", "store", "store_name"),
    "on": ("foreign_key", "foreign_key_extractor", "key_extractor", "key_selector"),
    "size": ("duration", "length"),
    "timestamp": ("timestamp_extractor", "timestamp_field"),
    "value": ("schema", "value_deserializer", "value_serde", "value_serializer", "value_type"),
    "with_": ("joiner", "merge", "value_joiner"),
    "within": ("time_difference", "window", "windows"),
}
"""What parameters are called in other libraries. A unit at the end is left out."""


def hint_of_call(function: Callable[..., Any], called: str, text: str) -> str:
    """What to write instead.

    Args:
        function: what was called.
        called: its name, as in `Stream.window`.
        text: what Python says.
    """
    if called == "Stream.aggregate":
        return (
            "Name the table and what it computes: .aggregate(n=count(), total=sum_(function), name='totals')."
        )
    if called.endswith(".aggregate"):
        return "Name what it computes: .aggregate(n=count(), total=sum_(function))."
    parameters = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    wrong = _UNEXPECTED.search(text)
    if wrong and wrong[1] in _OF_WINDOWS and called.endswith((".window", ".window_all")):
        return "Say that of the windows: Tumbling(..., grace=...)."
    meant = meant_parameter(wrong[1], [one.name for one in parameters]) if wrong else None
    if meant:
        return f"Did you mean {meant}=?"
    return f"Call {called}({', '.join(map(_shown, parameters))})."


def meant_parameter(wrong: str, names: Sequence[str]) -> str | None:
    """Which of these parameters a wrong name may have meant: one that is written in a similar way, or that is
    called so in another library.
    """
    for here, elsewhere in _CALLED_ELSEWHERE.items():
        if here in names and wrong.removesuffix("_ms") in elsewhere:
            return here
    near = near_names(wrong, names)
    return near[0] if near else None


def _shown(parameter: inspect.Parameter) -> str:
    """A parameter as one would write it; in brackets if it may be left out."""
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return f"{parameter.name}, ..."
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return "..."
    named = parameter.kind is inspect.Parameter.KEYWORD_ONLY
    shown = f"{parameter.name}=..." if named else parameter.name
    return shown if parameter.default is inspect.Parameter.empty else f"[{parameter.name}=...]"


def hints_at_calls(kind: type[_T]) -> type[_T]:
    """A decorator for a class: if a call of one of its public methods doesn't fit, or there is no such
    method, the error has the hint as a note, which Python and pytest show below it.
    """
    if "__getattr__" not in vars(kind):
        setattr(kind, "__getattr__", no_such)  # noqa: B010  for type checkers it would have every name
    for name, method in list(vars(kind).items()):
        if isinstance(method, FunctionType) and not name.startswith("_"):
            setattr(kind, name, _with_hint(method))
    return kind


def no_such(owner: object, name: str) -> Any:
    """Raise the AttributeError for a name that an object of the API doesn't have, with the hint as a note."""
    error = AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}", name=name, obj=owner)
    if not name.startswith("_"):
        from fcluster.api.hints import hint  # it knows these classes

        if said := hint(error):
            error.add_note(said)
    raise error


def _with_hint(method: FunctionType) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        __tracebackhide__ = True  # pytest shows the line of the call
        try:
            return method(*arguments, **named)
        except TypeError as error:
            trace = error.__traceback__
            if trace is not None and trace.tb_next is None:  # otherwise the method has begun
                error.add_note(hint_of_call(method, method.__qualname__, str(error)))
            raise

    return call
