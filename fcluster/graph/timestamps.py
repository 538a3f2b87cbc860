"""`timestamp=` of a topic: a record's time is in its value, not in Kafka's timestamp.

Responsible for: its checks, and its description, which is compared with existing state when a job has
changed. `fcluster.engine.stamps` applies it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.graph.codecs import Kind, ModelCodec
from fcluster.graph.models import check_field

Timestamp = str | Callable[[Any], Any]
"""The field of a value that holds the time, or a function of the value that returns it."""
FROM_KAFKA = "from Kafka"


def check_timestamp(topic: str, value: Kind, timestamp: Timestamp) -> None:
    """Check the `timestamp` of a topic with such values. The caller checks the parameters of a function.

    Raises:
        JobError: it can't be found in these values.
    """
    what = f"timestamp={bounded_repr(timestamp)} of the topic {topic!r}"
    if not isinstance(timestamp, str):
        if not callable(timestamp):
            raise JobError(
                f"{what} is neither a field nor a function.",
                remedy="Use the name of a field, timestamp='ts', or a function, timestamp=lambda value: ...",
            )
        return
    if not timestamp:
        raise JobError(f"{what} is empty.", remedy="Name the field that holds the time.")
    if value in ("text", "bytes", "int"):
        raise JobError(
            f"{what} names a field, but the values of the topic are {value}, not objects.",
            remedy="Give it a function of the value, or declare the topic with value='json' or a model.",
        )
    if isinstance(value, ModelCodec):
        check_field(value.model, timestamp, what)


def timestamp_text(timestamp: Timestamp | None) -> str:
    """How descriptions and messages name it: the field, or the function's name."""
    if timestamp is None:
        return FROM_KAFKA
    if isinstance(timestamp, str):
        return f"from the field {timestamp!r}"
    return f"from the function {getattr(timestamp, '__name__', type(timestamp).__name__)!r}"


def describe_timestamp(timestamp: Timestamp) -> str:
    """What open windows and event time depend on. A function may be written in another way."""
    return timestamp_text(timestamp) if isinstance(timestamp, str) else "from a function"
