"""What a handler with its timers is in the graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, Literal, cast

from fcluster.api.checks import LEGAL_NAME, check_function, check_name
from fcluster.api.context import AnyFunction, Handler
from fcluster.api.nodes import Node
from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.graph.operators import Process
from fcluster.graph.timers import TimerFunction

_TIMER_CHARACTERS_MAX: Final = 200


def process_operator(handler: Handler, name: str | None) -> Process:
    check_function(handler, "handler", ("ctx", "value"), may_yield=True)
    if name is None:
        name = getattr(handler, "__name__", None)
        if name is None or name == "<lambda>":
            what = "A lambda" if name else f"The handler {bounded_repr(handler)}"
            raise JobError(
                f"{what} has no name of its own, but a handler's name identifies its state.",
                remedy="Name it with name=, such as name='totals'.",
            )
    check_name(name, "The handler name", " with name=")
    return Process(name, handler, returns=_returns(handler))


def on_timer_of(node: Node, name: str) -> Callable[[AnyFunction], AnyFunction]:
    """See `HandlerFunction.on_timer`."""

    def decorate(function: AnyFunction) -> AnyFunction:
        add_timer(node, name, function)
        return function

    return decorate


def checked_timers(handler: str, timers: Any) -> Mapping[str, Handler]:
    if timers is None:
        return {}
    if not isinstance(timers, Mapping):
        raise JobError(
            f"timers= of the handler {handler!r} got {timers!r}.",
            remedy="Give a dict: timers={'remind': function}.",
        )
    return cast("Mapping[str, Handler]", timers)


def add_timer(node: Node, name: str, function: Any) -> None:
    step = cast(Process, node.step)
    what = f"The timer name {name!r} of the handler {step.name!r}"
    if not isinstance(name, str) or not LEGAL_NAME.fullmatch(name) or len(name) > _TIMER_CHARACTERS_MAX:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise JobError(
            f"{what} isn't valid.",
            remedy=f"Use at most {_TIMER_CHARACTERS_MAX} letters a-z and A-Z, digits, '.', '_' and '-'.",
        )
    if any(timer.name == name for timer in step.timers):
        raise JobError(f"{what} is taken.", remedy="Each name has one on_timer function.")
    check_function(function, "on_timer", ("key", "ctx"), may_yield=True)
    node.step = replace(step, timers=(*step.timers, TimerFunction(name, function, _returns(function))))


def _returns(handler: Handler) -> Literal["many", "one"]:
    # A decorator around a generator function (functools.wraps) returns the generator too.
    for candidate in (handler, inspect.unwrap(handler), getattr(handler, "__call__", None)):  # noqa: B004
        if inspect.isgeneratorfunction(candidate):
            return "many"
    return "one"
