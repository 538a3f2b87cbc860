"""Checks of names, functions and options as a job file gives them. Each error says what to write instead."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, Final, Literal

from fcluster.api.call_hints import meant_parameter
from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.common.ids import TOPIC_NAME_CHARACTERS_MAX
from fcluster.common.isolation import ISOLATIONS, Isolation
from fcluster.common.settings import isolation_from
from fcluster.graph.codecs import Kind, ModelCodec
from fcluster.graph.models import check_field
from fcluster.graph.operators import TopicSpec
from fcluster.graph.signatures import (
    counted_arguments,
    declared_otherwise,
    does_yield,
    is_async,
    name_of,
    parameter_names,
    takes_context,
)

LEGAL_NAME = re.compile(r"[a-zA-Z0-9._-]+")
TOPIC_OPTIONS: Final = ("key", "value", "timestamp", "watermark", "isolation", "on_error")
_KEYS: Final = frozenset({"k", "key"})
_VALUES: Final = frozenset({"self", "v", "value"})
_CONTEXTS: Final = frozenset({"context", "ctx"})
_ISOLATION_OPTIONS: Final = frozenset({"isolation.level", "kafka.consumer.isolation.level"})


def check_function(
    function: Any, role: str, parameters: tuple[str, ...], *, may_yield: bool = False, hint: str = ""
) -> None:
    """Check a function that is called with these parameters.

    Args:
        hint: how else it could be declared, as the end of a sentence.

    Raises:
        JobError: it takes other parameters, or is no function that is called for a result.
    """
    call = f"{role}({', '.join(parameters)})"
    if not callable(function):
        raise JobError(
            f"{role} got {given(function)}, not a function.", remedy=f"Pass a function for {call}."
        )
    name = name_of(function)
    if is_async(function):
        raise JobError(
            f"The {role} {name!r} is declared with async def, and async functions aren't supported.",
            remedy="Declare it with plain def. Calls to other services are made by a step of their own: "
            "stream.map_async(function), and the other steps behind it get the results.",
        )
    if not may_yield and does_yield(function):
        raise JobError(
            f"The {role} function {name!r} yields, but it has to return one result.",
            remedy="Return it, or use .flat_map(function) to emit several values.",
        )
    _check_parameters(function, name, role, parameters, hint)


def check_function_of(
    what: Literal["record", "row"], function: Any, role: str, *, may_yield: bool = False
) -> None:
    """Check a function of a value, which may take the context of its record or row in front of it.

    Raises:
        JobError: it takes other parameters, or is no function that is called for a result.
    """
    if not callable(function) or not takes_context(function):
        hint = f", or as {name_of(function)}(ctx, value) to get the {what}'s key with ctx.key"
        check_function(function, role, ("value",), may_yield=may_yield, hint=hint)
        return
    check_function(function, role, ("ctx", "value"), may_yield=may_yield)
    first, second = parameter_names(function)[:2]
    if first in _KEYS | _VALUES or second in _KEYS | _CONTEXTS:
        known = "ctx.key" if what == "row" else "ctx.key, ctx.timestamp and ctx.headers"
        raise JobError(
            f"The {role} {name_of(function)!r} is declared with ({first}, {second}), but a function with two "
            f"parameters is called with the context of the {what}, and then its value.",
            remedy=f"Declare it as {name_of(function)}(ctx, value). It has {known}.",
        )


def _check_parameters(
    function: Any, name: str, role: str, parameters: tuple[str, ...], hint: str = ""
) -> None:
    declared = declared_otherwise(function, parameters)
    if declared is not None:
        raise JobError(
            f"The {role} {name!r} is declared as {declared}, but is called with "
            f"{counted_arguments(parameters)}.",
            remedy=f"Declare it as {name}({', '.join(parameters)}){hint}.",
        )


def given(value: object) -> str:
    """What a function of the API got instead of what it takes, in words."""
    if isinstance(value, TopicSpec):
        return f"the topic {value.name!r}"
    kind = type(value)
    if kind.__module__.startswith("fcluster.api."):
        return f"a {kind.__name__}"
    if isinstance(value, list | tuple):
        return f"a {kind.__name__}"
    if inspect.isfunction(value):
        return f"the function {value.__name__!r}"
    return bounded_repr(value)


def check_async_function(function: Any, role: str, parameters: tuple[str, ...]) -> None:
    """Like `check_function`, for a function that has to be async."""
    if not callable(function):
        raise JobError(
            f"{role} got {given(function)}, not a function.",
            remedy=f"Pass an async function for {role}({', '.join(parameters)}).",
        )
    name = getattr(function, "__name__", repr(function))
    called = (function, inspect.unwrap(function), getattr(function, "__call__", None))  # noqa: B004
    if not any(map(inspect.iscoroutinefunction, called)):
        yields = any(map(inspect.isasyncgenfunction, called))
        raise JobError(
            f"The {role} function {name!r} " + ("yields." if yields else "isn't declared with async def."),
            remedy="Return a list, and put .flat_map(lambda values: values) behind it."
            if yields
            else "Declare it with async def, and await the client of the service in it; for a function that "
            "doesn't wait, use .map(function).",
        )
    _check_parameters(function, name, role, parameters)


def check_name(name: str, what: str, how: str = "") -> None:
    if not isinstance(name, str) or not LEGAL_NAME.fullmatch(name) or name in (".", ".."):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise JobError(
            f"{what} {bounded_repr(name)} isn't valid, because it becomes part of Kafka topic names.",
            remedy=f"Choose one{how} of letters a-z and A-Z, digits, '.', '_' and '-'.",
        )
    if len(name) > TOPIC_NAME_CHARACTERS_MAX:
        raise JobError(
            f"{what} {bounded_repr(name, 40)} has {len(name)} characters; Kafka allows "
            f"{TOPIC_NAME_CHARACTERS_MAX}.",
            remedy=f"Choose a shorter one{how}.",
        )


def check_field_of(values: Kind | None, field: str, what: str, step: str) -> None:
    """Check a field that a step takes by its name.

    Args:
        values: the kind of the values that the step gets. None: nothing is known about them.
        field: the field's name.
        what: names the step, as the beginning of a sentence.
        step: the call in which it is given.

    Raises:
        JobError: there can't be such a field.
    """
    if values in ("text", "bytes", "int"):
        raise JobError(
            f"{what} names a field, but the values there are {values}, not JSON objects.",
            remedy=f"Declare the topic with value='json', or give {step} a function.",
        )
    if isinstance(values, ModelCodec):
        check_field(values.model, field, what)


def checked_version(version: object, step: str) -> str | None:
    """The `version=` of a step, as text."""
    if not isinstance(version, str | int | None) or isinstance(version, bool):
        raise JobError(
            f"version={version!r} of {step} is neither text nor a number.", remedy="Use version=1."
        )
    return None if version is None else str(version)


def _topic_option_remedy(option: str) -> str:
    meant = meant_parameter(option, TOPIC_OPTIONS)
    if meant:
        return f"Did you mean {meant}=?"
    return (
        f"Topics take {', '.join(TOPIC_OPTIONS)}. Partitions and retention are set in Kafka, where the topic "
        "is created."
    )


def chosen_isolation(topic: str, isolation: str | None, options: Mapping[str, Any]) -> Isolation | None:
    given: dict[str, Any] = {} if isolation is None else {"isolation": isolation}
    for option, value in options.items():
        if option.replace("_", ".").replace("-", ".").lower() not in _ISOLATION_OPTIONS:
            raise JobError(
                f"The option {option!r} of the topic {topic!r} is unknown.",
                remedy=_topic_option_remedy(option),
            )
        given[option] = value
    chosen: set[Isolation] = set()
    for option, value in given.items():
        level = isolation_from(value)
        if level is None:
            raise JobError(
                f"{option}={value!r} of the topic {topic!r} is unknown.",
                remedy=f"Use one of {', '.join(map(repr, ISOLATIONS))}.",
            )
        chosen.add(level)
    if len(chosen) > 1:
        raise JobError(
            f"The topic {topic!r} has two isolation levels.", remedy="Keep only one of the options."
        )
    return chosen.pop() if chosen else None
