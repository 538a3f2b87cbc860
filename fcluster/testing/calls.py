"""Makes the calls of `map_async` steps in a test's own process.

Responsible for: the calls of a record, until they are done or wait for a circuit. Pauses between attempts
take no time. `engine.call_scheduler` decides when which call is made, and `event_loop` makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fcluster.engine.call_scheduler import NEVER_MS, CallScheduler
from fcluster.engine.calling import Call, RecordCalls


class DriverCalls:
    """The calls of a driver.

    Args:
        now_ms: returns the driver's time.
        passing: exceptions that are for the test, and not failures of a call.
    """

    def __init__(self, now_ms: Callable[[], int], passing: tuple[type[BaseException], ...]) -> None:
        self._driver_ms = now_ms
        self._passing = passing
        self._skipped_ms = 0.0
        self._scheduler = CallScheduler(lambda _text: None)
        self._waiting: dict[object, RecordCalls] = {}

    def reset(self) -> None:
        """Another process goes on: it has made no calls yet."""
        self._scheduler = CallScheduler(lambda _text: None)
        self._waiting.clear()

    def forget(self) -> None:
        """The records that wait are read again."""
        self._scheduler.drop({calls.owner for calls in self._waiting.values()})
        self._waiting.clear()

    def open_circuits(self) -> list[str]:
        """What waits for a circuit, a line for each."""
        return self._scheduler.open_circuits(self._now_ms)

    def make(self, shard: object, begin: Callable[[], RecordCalls]) -> bool:
        """Make the calls of the shard's next record.

        Args:
            shard: identifies the shard.
            begin: begins with these calls, if they haven't begun.

        Returns:
            False: a circuit is open, so the record waits.
        """
        calls = self._waiting.get(shard)
        if calls is None:
            calls = self._waiting[shard] = begin()
            self._scheduler.add(calls.first)
        while not calls.is_done:
            attempts = self._scheduler.start(self._now_ms)
            if attempts:
                self._await(attempts)
                continue
            pause_ms = self._scheduler.pause_ms()
            if calls.is_done:
                break
            if pause_ms == NEVER_MS:
                return False
            self._skipped_ms += max(0.0, pause_ms - self._now_ms)
        del self._waiting[shard]
        return True

    @property
    def _now_ms(self) -> float:
        return self._driver_ms() + self._skipped_ms

    def _await(self, attempts: Sequence[Call]) -> None:
        from fcluster.testing.event_loop import await_calls  # sockets come with it, which few tests need

        for call, result, error in await_calls(attempts, self._passing):
            if error is None:
                self._scheduler.succeeded(call, call.attempt, result)
            else:
                self._scheduler.failed(call, call.attempt, error, self._now_ms)
