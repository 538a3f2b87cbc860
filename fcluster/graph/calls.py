"""How calls to other services are made: how often they are repeated, and when nobody is called for a while.

Responsible for: the objects that a job file gives to `map_async`, and their checks. `fcluster.engine.calling`
acts on them. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal, cast

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.graph.durations import MILLISECOND, check_duration, shown

CONCURRENCY_MAX: Final = 10_000
ATTEMPTS_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class Retry:
    """A call that fails is made again, after a pause that doubles each time.

    Args:
        attempts: how often a call is made at most, the first time included.
        backoff: the pause before the second attempt.
        max_backoff: no pause is longer than this.
        on: the exceptions after which a call is made again. A time-out is a `TimeoutError`. Default: all
            subclasses of Exception. After any other one, the call has failed at once.

    Raises:
        JobError: one of them isn't valid.
    """

    attempts: int = 3
    backoff: timedelta = timedelta(milliseconds=100)
    max_backoff: timedelta = timedelta(seconds=10)
    on: tuple[type[BaseException], ...] = (Exception,)

    def __post_init__(self) -> None:
        check_count("attempts", self.attempts, "Retry", ATTEMPTS_MAX)
        check_duration("Retry", "backoff", self.backoff, timedelta())
        check_duration("Retry", "max_backoff", self.max_backoff, timedelta())
        if self.backoff > self.max_backoff:
            raise JobError(
                f"Retry got backoff={shown(self.backoff)}, and max_backoff={shown(self.max_backoff)}: no "
                "pause would be as long as the first one.",
                remedy="Set max_backoff= to the longest pause. (It is 10 s if it isn't given.)",
            )
        given: Any = self.on
        kinds = cast("tuple[Any, ...]", given if isinstance(given, tuple) else (given,))
        if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
            raise JobError(
                f"on={bounded_repr(kinds)} of Retry is not a tuple of exceptions.",
                remedy="Name their classes: on=(ConnectionError, TimeoutError).",
            )
        object.__setattr__(self, "on", kinds)

    def wait_ms(self, failed: int) -> int:
        """How long to wait after this many failed attempts."""
        doubled = min(failed - 1, 62)
        return min(self.backoff // MILLISECOND << doubled, self.max_backoff // MILLISECOND)


@dataclass(frozen=True, slots=True)
class Circuit:
    """Calls nobody for a while after many failures in a row: the service is down, and records can wait.

    After `open_for` one call is tried. If it succeeds, calls go on as before. Otherwise the circuit stays
    open for as long again.

    Failures are exceptions after which calls are made again (`Retry.on`). Any other exception is an answer
    of the service, like a result.

    Args:
        failures: after this many failed attempts in a row the circuit opens.
        open_for: how long it stays open before a call is tried.
        when_open: "wait": records wait until it closes, and attempts that fail meanwhile don't count. "fail":
            calls fail at once, with `CircuitOpenError`, and the step's `on_error` applies.

    Raises:
        JobError: one of them isn't valid.
    """

    failures: int = 20
    open_for: timedelta = timedelta(seconds=10)
    when_open: Literal["wait", "fail"] = "wait"

    def __post_init__(self) -> None:
        check_count("failures", self.failures, "Circuit", 1_000_000)
        check_duration("Circuit", "open_for", self.open_for, MILLISECOND)
        if self.when_open not in ("wait", "fail"):
            raise JobError(
                f"when_open={bounded_repr(self.when_open)} of Circuit is unknown.",
                remedy="Use when_open='wait' or when_open='fail'.",
            )


class CircuitOpenError(Exception):
    """A call wasn't made, because the circuit of its step is open."""


def check_count(name: str, value: object, what: str, most: int) -> None:
    """Check the argument `name` of `what`: a number of something.

    Raises:
        JobError: it isn't a whole number from 1 to `most`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise JobError(
            f"{name}={bounded_repr(value)} of {what} is not a whole number from 1 to {most}.",
            remedy=f"Use {name}=10, for example.",
        )


def check_together(what: str, retry: Retry, circuit: Circuit | None) -> None:
    """Check that one bad record can't open a circuit that waits: it would wait for ever.

    Raises:
        JobError: it could.
    """
    if circuit is not None and circuit.when_open == "wait" and circuit.failures <= retry.attempts:
        raise JobError(
            f"The {what} makes up to {retry.attempts} attempts for a call, and its circuit opens after "
            f"{circuit.failures} failures in a row: one bad record would open it, and wait for ever.",
            remedy=f"Let the circuit open later: Circuit(failures={4 * retry.attempts}).",
        )


ONCE: Final = Retry(attempts=1)
"""What applies without a `Retry`."""
