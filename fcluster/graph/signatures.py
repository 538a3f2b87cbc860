"""What can be seen of a function before it is called: how it is declared, and what it takes (pure)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any


def name_of(function: Any) -> str:
    """Its name, for messages."""
    return getattr(function, "__name__", repr(function))


def is_async(function: Any) -> bool:
    """Whether it is declared with async def."""
    return any(
        inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one) for one in _called(function)
    )


def does_yield(function: Any) -> bool:
    """Whether it is a generator function."""
    return any(map(inspect.isgeneratorfunction, _called(function)))


def declared_otherwise(function: Any, parameters: Sequence[str]) -> str | None:
    """How it is declared, if it can't be called with as many arguments. None: it can, or nobody knows."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None  # built-ins such as str have no signature
    try:
        signature.bind(*parameters)
    except TypeError:
        return f"{name_of(function)}{signature}"
    return None


def takes_context(function: Any) -> bool:
    """Whether the function of a value is called with a context in front of it: if it can't be called with the
    value alone, but with both.
    """
    if declared_otherwise(function, ("value",)) is None:
        return False
    return declared_otherwise(function, ("ctx", "value")) is None


def parameter_names(function: Any) -> list[str]:
    """The names of the parameters of a function that has a signature."""
    return list(inspect.signature(function).parameters)


def counted_arguments(parameters: Sequence[str]) -> str:
    """How many arguments these are, in words."""
    return f"{len(parameters) or 'no'} argument{'' if len(parameters) == 1 else 's'}"


def _called(function: Any) -> tuple[Any, ...]:
    """What says how it is declared."""
    return function, inspect.unwrap(function), getattr(function, "__call__", None)  # noqa: B004
