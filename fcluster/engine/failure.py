"""Descriptions of what can be wrong with a record, shared by the engine and its shells.

Responsible for: the description of a failure that was found outside the engine (at the barrier or at the
broker), on which the engine has to act when the record comes again; and the exceptions that engine and shells
exchange. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fcluster.common.failures import Failure

TIMER_STEP: Final = "timer "
"""The name of a timer's step begins with this. No other step's name does."""


@dataclass(frozen=True, slots=True)
class Condemnation:
    """Why a record fails when it is processed again. Plain data: it outlives the session in which it was
    found.

    The finder tells what it knows. The engine finds the responsible step, and applies that step's `on_error`:

    - With `topic`: the first output to that topic, over the record's chains in order, counts as refused. The
      topic may be a sink, a repartition topic, the topic of a `Record`, or the dead-letter topic itself (then
      a stub is written instead). If the record is condemned again for the same topic, the next output to it
      is refused as well. With `step` too, only outputs of that step are meant: the engine sets it if it found
      the failure itself (`HandlerError.condemnation`). Without it, several chains that write to the topic
      can't be distinguished.
    - With `step` alone: that step fails without being called. It is a handler's name if the handler's state
      can't be stored (the store has the handler's name), or what `worker.processing.running_step` returned.
    - With neither: the record stops the job. The failure's message is then the whole message.

    Attributes:
        failure: with `topic` or `step`, its message is only the cause. The engine puts the names of record
            and step in front.
        topic: the output topic that refused the output.
        step: the name of the step that failed.
    """

    failure: Failure
    topic: str = ""
    step: str = ""

    @property
    def is_of_timer(self) -> bool:
        """Whether a timer failed, and not a record."""
        return bool(timer_in(self.step))


def timer_in(step: str) -> str:
    """The step, if it is a timer's, which no other timer has while that one is set. Otherwise empty."""
    return step if step.startswith(TIMER_STEP) else ""


class OutputRefusedError(Exception):
    """Raised by the port's `produce`: this output can't be written as it is, however often one tries.

    Nothing of it was written. Every other exception of `produce` counts as an error of the worker, except a
    TypeError, a ValueError or an OverflowError, which the output's fields cause.

    Attributes:
        failure: its message is only the cause.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def output_too_large(topic: str, value: bytes | None, key: bytes | None) -> Failure:
    """Why an output that is larger than the producer may send is refused."""
    size = len(value or b"") + len(key or b"")
    return Failure.of_record(
        f"the output to {topic!r} has {size:,} bytes, more than message.max.bytes of the job's producers",
        "raise message.max.bytes under [kafka] and max.message.bytes of the topic, write less "
        "into one record, or give the step on_error='skip' or a dead-letter topic",
    )


class UnkeptStateError(Exception):
    """A state that an earlier record of the open epoch left can't be stored. It isn't known which record that
    was.

    It has to be handled like the same failure at the barrier: the epoch is replayed in smaller pieces.

    Attributes:
        condemnation: what to condemn the record with, once it is known: store, key, what can't be stored, and
            the step, which is the handler that has the state.
    """

    def __init__(self, failure: Failure, step: str) -> None:
        super().__init__(str(failure))
        self.condemnation = Condemnation(failure, step=step)
