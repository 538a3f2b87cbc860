"""What can be wrong with a record, in the words that the engine and its shells share.

Responsible for: the description of a failure that was found outside the engine (at the barrier or at the
broker) and that the engine shall act on when the record comes again; and the exceptions between both. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fcluster.common.failures import Failure

TIMER_STEP: Final = "timer "
"""The name of the step of a timer begins with this; no other does."""


@dataclass(frozen=True, slots=True)
class Condemnation:
    """Why a record fails when it is processed again. Plain data: it outlives the session that found it.

    Whoever finds it tells what it knows; the engine finds the step responsible, and what that step's
    `on_error` says is done:

    - `topic` given: the first output to that topic, of the record's chains in order, counts as refused. This
      may be a sink, a repartition topic, the topic of a `Record`, or the dead letter itself (a stub is
      written instead then). Condemned once more for the same topic, the next output to it is refused as well.
      With `step` besides, only outputs of that step are meant: the engine tells it where it has found out
      itself (`HandlerError.condemnation`). Without it, several chains that write to the topic can't be told
      apart.
    - `step` alone: that step fails without being called. It is a handler's name, as of one whose state can't
      be kept (the store's name is the handler's), or what `worker.processing.running_step` gave.
    - neither: the record stops the job. The failure's message is the whole message then.

    Attributes:
        failure: with `topic` or `step` its message is only the cause; the engine puts the record's and the
            step's names in front.
        topic: the output topic that refused.
        step: the name of the step that failed.
    """

    failure: Failure
    topic: str = ""
    step: str = ""

    @property
    def is_of_timer(self) -> bool:
        """Whether a timer fails, not a record."""
        return self.step.startswith(TIMER_STEP)


class OutputRefusedError(Exception):
    """Raised by the port's `produce`: this output can't be written as it is, however often it is tried.

    Nothing of it was written. Whatever else `produce` raises is taken for trouble of the worker, unless it is
    a TypeError, a ValueError or an OverflowError, which the output's fields cause.

    Attributes:
        failure: its message is only the cause.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def output_too_large(topic: str, value: bytes | None, key: bytes | None) -> Failure:
    """Why an output is refused that is larger than the producer may send."""
    size = len(value or b"") + len(key or b"")
    return Failure.of_record(
        f"the output to {topic!r} has {size:,} bytes, more than message.max.bytes of the job's producers",
        "raise message.max.bytes under [kafka] and max.message.bytes of the topic, write less "
        "into one record, or give the step on_error='skip' or a dead-letter topic",
    )


class UnkeptStateError(Exception):
    """A state that an earlier record of the open epoch left can't be kept; which record's, isn't known.

    To be treated as the same trouble at the barrier is: the epoch is replayed in smaller pieces.

    Attributes:
        condemnation: of the record, once it is known: store, key, and what can't be kept; and the step, which
            is the handler that has the state.
    """

    def __init__(self, failure: Failure, step: str) -> None:
        super().__init__(str(failure))
        self.condemnation = Condemnation(failure, step=step)
