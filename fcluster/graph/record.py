"""`Record`: the output of a handler that sets more than a value.

Responsible for: `Record`, and the marker for fields that are left out. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Final

from fcluster.graph.operators import TopicSpec


class Unset(Enum):
    """The type of `UNSET`."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET
"""Marks a field of a `Record` that carries over from the record being processed. None is a value."""


HOW_TO_WRITE: Final = "Record(value=..., key=...)"
"""What a call of `Record` looks like, for messages: Python only counts the arguments of a wrong one."""


def is_miswritten(error: BaseException) -> bool:
    """Whether the exception comes from a call of `Record` with arguments that it doesn't take."""
    return isinstance(error, TypeError) and str(error).startswith(_MISWRITTEN)


_MISWRITTEN: Final = ("Record.__init__() takes 1 positional", "Record.__init__() got an unexpected keyword")


class Record:
    """An output of a handler that sets more than the value.

    Fields that are left out carry over from the record being processed; a key gets the form that the target
    topic declares. If steps follow the handler, they get
    the value of a record without a topic, with its timestamp and headers. It can't set a key then.

    Example::

        yield Record(value=order, topic=refused)  # to another topic than the handler's `to`
        yield Record(value=None)  # a tombstone

    Attributes:
        key: the key, of the kind declared as the target topic's `key`. None is the null key.
        value: the value, of the kind declared as the target topic's `value`. None is a tombstone.
        headers: pairs of a name and bytes (or None), in order.
        timestamp: milliseconds since 1970. 0 is written as -1 ("none").
        topic: a topic of the job, used instead of the handler's `to`.
    """

    __slots__ = ("headers", "key", "timestamp", "topic", "value")

    def __init__(
        self,
        *,
        key: Any = UNSET,
        value: Any = UNSET,
        headers: Sequence[tuple[str, bytes | None]] | Unset | None = UNSET,
        timestamp: int | Unset = UNSET,
        topic: TopicSpec | None = None,
    ) -> None:
        self.key = key
        self.value = value
        self.headers = headers
        self.timestamp = timestamp
        self.topic = topic

    def _fields(self) -> tuple[Any, ...]:
        return (self.key, self.value, self.headers, self.timestamp, self.topic)

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if isinstance(other, Record) else NotImplemented

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # values are documents, and mutable

    def __repr__(self) -> str:
        named = zip(("key", "value", "headers", "timestamp", "topic"), self._fields(), strict=True)
        return f"Record({', '.join(f'{k}={v!r}' for k, v in named if v is not UNSET and v is not None)})"
