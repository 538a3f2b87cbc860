"""Functions of values that take a context, too: it is bound to them, and shows what they are called for.

So the steps that call them are the same as for functions of a value alone, which pay nothing. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fcluster.engine.context import RecordContext, RowContext
from fcluster.engine.records import SourceRecord
from fcluster.engine.steps import Step
from fcluster.graph.codecs import Kind, key_codec
from fcluster.graph.operators import TopicSpec
from fcluster.graph.signatures import takes_context


def of_values(
    topic: TopicSpec, partition: int, *functions: Callable[..., Any]
) -> tuple[tuple[Callable[..., Any], ...], Callable[[Step], Step]]:
    """A step's functions as functions of a value alone, and what to do with the step that calls them.

    Those that take a context get one, which shows the record that comes to the step. If none does, nothing is
    done with the step.

    Args:
        topic: the topic that the chain reads.
        partition: the shard's partition.
        functions: the functions.
    """
    if not any(map(takes_context, functions)):
        return functions, _as_it_is
    context = RecordContext(topic.name, partition, key_codec(topic.key)[0])

    def showing(step: Step) -> Step:
        def show(record: SourceRecord, key: bytes | None, value: Any) -> None:
            context._record = record  # pyright: ignore[reportPrivateUsage]  a method call would cost time
            context._key = key  # pyright: ignore[reportPrivateUsage]
            step(record, key, value)

        return show

    return _with(context, functions), showing


def of_rows(
    key: Kind, *functions: Callable[..., Any]
) -> tuple[tuple[Callable[..., Any], ...], Callable[[bytes], None] | None]:
    """Functions of a table's rows as functions of a value alone, and what has to be called with the row's key
    in front of them. None: nothing.

    Args:
        key: the kind of the table's keys.
    """
    if not any(map(takes_context, functions)):
        return functions, None
    context = RowContext(key_codec(key)[0])

    def show(row_key: bytes) -> None:
        context._key = row_key  # pyright: ignore[reportPrivateUsage]

    return _with(context, functions), show


def _with(context: RowContext, functions: tuple[Callable[..., Any], ...]) -> tuple[Callable[..., Any], ...]:
    return tuple(partial(one, context) if takes_context(one) else one for one in functions)


def _as_it_is(step: Step) -> Step:
    return step
