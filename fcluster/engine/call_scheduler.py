"""Decides when which call is made: concurrency, order, time-outs, pauses between attempts, circuits.

Responsible for: `CallScheduler`, for all calls of a process. A shell makes the attempts that `start` returns,
tells what has come of each, and asks again when `due_ms` has come. All times are milliseconds on a clock that
never goes back.

Invariants:
- At most `concurrency` attempts of a step run at the same time, over all shards of the process. They share
  the circuit, too.
- Calls with the same turn are made one after another, in the order in which they were added. A call keeps
  its turn until it has a result or has failed for good.
- A call ends exactly once. What comes of an attempt that was given up (it took too long, or its shard is
  gone) is ignored.
- While a circuit that waits is open, failed attempts don't count. So a service that is down fails no record.

Must not: make calls, or read a clock. Pure.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Any, Final

from fcluster.common.failures import bounded_text, describe_exception
from fcluster.engine.calling import Call
from fcluster.graph.calls import CircuitOpenError
from fcluster.graph.durations import MILLISECOND
from fcluster.graph.operators import MapAsync

NEVER_MS: Final = float("inf")
CAUSE_CHARACTERS_MAX: Final = 200


class AttemptCancelledError(Exception):
    """Something within the function, such as a client library, has cancelled the attempt. That is no answer:
    the attempt has failed, and another one may be made, whatever `Retry.on` says.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__("something within the function has cancelled it")
        self.__traceback__ = error.__traceback__


@dataclass(slots=True)
class _Step:
    """The calls of one step.

    Attributes:
        ready: those that can be made at once.
        running: those that are being made, and when the attempt will have taken too long, in this order.
        pauses: when the next attempt of a call is due, a number that keeps the order, and the call.
        failures: attempts that have failed in a row.
        open_until_ms: when a call is tried again. None: the circuit is closed.
        probe: the call that is tried.
        cause: the last failure.
    """

    node: MapAsync
    ready: deque[Call] = field(default_factory=deque[Call])
    running: dict[Call, float] = field(default_factory=dict[Call, float])
    pauses: list[tuple[float, int, Call]] = field(default_factory=list[tuple[float, int, Call]])
    failures: int = 0
    open_until_ms: float | None = None
    probe: Call | None = None
    cause: str = ""


class CallScheduler:
    """See the module's docstring.

    Args:
        say: called with a line for the log when a circuit opens, and when it closes.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._steps: dict[int, _Step] = {}  # by the identity of the step
        self._turns: dict[Any, deque[Call]] = {}  # the calls behind the one whose turn it is
        self._numbers = count()

    # --- calls come and go --------------------------------------------------------------------------------

    def add(self, calls: Iterable[Call]) -> None:
        """Make these calls, each as soon as it may be made."""
        for call in calls:
            if call.turn in self._turns:
                self._turns[call.turn].append(call)
                continue
            if call.turn is not None:
                self._turns[call.turn] = deque()
            self._step_of(call).ready.append(call)

    def drop(self, owners: Collection[object]) -> list[Call]:
        """Forget all calls of these owners. Returns those that are being made: give them up."""
        running: list[Call] = []
        for step in self._steps.values():
            gone = [call for call in step.running if call.owner in owners]
            for call in gone:
                del step.running[call]
            running += gone
            step.ready = deque(call for call in step.ready if call.owner not in owners)
            step.pauses = [pause for pause in step.pauses if pause[2].owner not in owners]
            heapq.heapify(step.pauses)
            if step.probe is not None and step.probe.owner in owners:
                step.probe = None
        self._turns = {turn: calls for turn, calls in self._turns.items() if turn[0] not in owners}
        return running

    def _step_of(self, call: Call) -> _Step:
        step = self._steps.get(id(call.node))
        if step is None:
            step = self._steps[id(call.node)] = _Step(call.node)
        return step

    # --- attempts -----------------------------------------------------------------------------------------

    def start(self, now_ms: float) -> list[Call]:
        """The calls of which an attempt begins now. `Call.attempt` is its number."""
        begun: list[Call] = []
        for step in list(self._steps.values()):
            while step.pauses and step.pauses[0][0] <= now_ms:
                step.ready.append(heapq.heappop(step.pauses)[2])
            if step.open_until_ms is not None and self._fails(step):
                self._fail_at_once(step, now_ms)
            for _ in range(self._room(step, now_ms)):
                call = step.ready.popleft()
                if step.open_until_ms is not None:
                    step.probe = call
                step.running[call] = now_ms + step.node.timeout_ms
                call.attempt += 1
                call.context.attempt = call.attempt
                begun.append(call)
        return begun

    def _room(self, step: _Step, now_ms: float) -> int:
        """How many attempts may begin now."""
        if step.open_until_ms is None:
            return min(len(step.ready), step.node.concurrency - len(step.running))
        may_try = now_ms >= step.open_until_ms and step.probe is None
        return min(len(step.ready), int(may_try))

    def _fails(self, step: _Step) -> bool:
        return step.node.circuit is not None and step.node.circuit.when_open == "fail"

    def _fail_at_once(self, step: _Step, now_ms: float) -> None:
        """The circuit is open: all calls fail that aren't tried."""
        keep = self._room(step, now_ms)
        while len(step.ready) > keep:
            call = step.ready.pop() if keep else step.ready.popleft()
            error = CircuitOpenError(f"the circuit is open after {step.failures} failures: {step.cause}")
            self._end(call, error=error)

    def succeeded(self, call: Call, attempt: int, result: Any) -> None:
        """An attempt has returned `result`."""
        step = self._given_back(call, attempt)
        if step is not None:
            self._answered(step)
            self._end(call, result=result)

    def failed(self, call: Call, attempt: int, error: BaseException, now_ms: float) -> None:
        """An attempt has raised `error`."""
        step = self._given_back(call, attempt)
        if step is not None:
            self._judge(step, call, error, now_ms)

    def expire(self, now_ms: float, why: Callable[[Call], str] = lambda _call: "") -> list[Call]:
        """End the attempts that have taken too long: they have failed. Returns their calls: give them up.

        Call it before `start`, which may begin their next attempts. `why` tells what is known about a call.
        """
        late: list[Call] = []
        for step in list(self._steps.values()):
            by_time = step.running.items()
            gone = [call for call, _ms in takewhile(lambda item: item[1] <= now_ms, by_time)]
            for call in gone:
                del step.running[call]
                error = TimeoutError(f"no answer within {step.node.timeout_ms:,} ms{why(call)}")
                self._judge(step, call, error, now_ms)
            late += gone
        return late

    def _given_back(self, call: Call, attempt: int) -> _Step | None:
        """The step of an attempt that counts. None: it was given up."""
        step = self._step_of(call)
        if call.attempt != attempt or step.running.pop(call, None) is None:
            return None
        return step

    def _judge(self, step: _Step, call: Call, error: BaseException, now_ms: float) -> None:
        retry = step.node.retry
        if not isinstance(error, (*retry.on, AttemptCancelledError)):
            self._answered(step)  # the service is there: it has refused this call
            call.failed += 1
            self._end(call, error=error)
            return
        step.cause = bounded_text(describe_exception(error), CAUSE_CHARACTERS_MAX)
        self._note_failure(step, call, now_ms)
        if step.open_until_ms is not None and not self._fails(step):
            step.ready.append(call)  # another one may be tried first
            return
        call.failed += 1
        if call.failed >= retry.attempts:
            self._end(call, error=error)
        else:
            due_ms = now_ms + retry.wait_ms(call.failed)
            heapq.heappush(step.pauses, (due_ms, next(self._numbers), call))

    def _note_failure(self, step: _Step, call: Call, now_ms: float) -> None:
        step.failures += 1
        circuit = step.node.circuit
        if circuit is None:
            return
        open_ms = circuit.open_for // MILLISECOND
        if step.open_until_ms is None:
            if step.failures < circuit.failures:
                return
            step.open_until_ms = now_ms + open_ms
            what = "wait" if circuit.when_open == "wait" else "fail"
            self._say(
                f"map_async {step.node.name!r}: the circuit opens after {step.failures} failures in a row. "
                f"Its calls {what}; one is tried in {open_ms / 1000:g} s. The last failure: {step.cause}"
            )
        elif step.probe is call:
            step.probe = None
            step.open_until_ms = now_ms + open_ms

    def _answered(self, step: _Step) -> None:
        """The service has answered."""
        step.failures = 0
        if step.open_until_ms is not None:
            step.open_until_ms = step.probe = None
            self._say(f"map_async {step.node.name!r}: the circuit closes, because a call was answered")

    def _end(self, call: Call, result: Any = None, error: BaseException | None = None) -> None:
        call.result, call.error = result, error
        following = self._turns.get(call.turn)
        if following:
            behind = following.popleft()
            self._step_of(behind).ready.append(behind)
        else:
            self._turns.pop(call.turn, None)
        self.add(call.on_done(call))

    # --- when, and what -----------------------------------------------------------------------------------

    def due_ms(self) -> float:
        """When `expire` and `start` have something to do if no attempt ends before. `NEVER_MS`: never."""
        return min((self._due_ms(step) for step in self._steps.values()), default=NEVER_MS)

    def _due_ms(self, step: _Step) -> float:
        too_late_ms = next(iter(step.running.values()), NEVER_MS)
        next_ms = step.pauses[0][0] if step.pauses else NEVER_MS
        if step.open_until_ms is not None and not self._fails(step):
            next_ms = step.open_until_ms if step.ready else max(step.open_until_ms, next_ms)
            if step.probe is not None:
                next_ms = NEVER_MS
        return min(too_late_ms, next_ms)

    def pause_ms(self) -> float:
        """When the next attempt of a call is due that pauses between two attempts, and isn't held up by a
        circuit. `NEVER_MS`: there is none.
        """
        pausing = (step for step in self._steps.values() if step.open_until_ms is None or self._fails(step))
        return min((step.pauses[0][0] for step in pausing if step.pauses), default=NEVER_MS)

    def open_circuits(self, now_ms: float) -> list[str]:
        """What waits because a circuit is open, a line for each."""
        return [
            f"map_async {step.node.name!r}: the circuit is open, the next call in "
            f"{max(0.0, step.open_until_ms - now_ms) / 1000:.0f} s ({step.cause})"
            for step in self._steps.values()
            if step.open_until_ms is not None
        ]

    @property
    def running(self) -> int:
        """How many attempts are being made."""
        return sum(len(step.running) for step in self._steps.values())
