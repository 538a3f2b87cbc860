"""The thread in which the job's async functions run: it makes the calls of `map_async` steps.

Responsible for: awaiting the functions on one event loop for as long as the process lives, and telling what
has come of each attempt. The thread begins with the first call.

Must not: know records, or decide when a call is made; `engine.call_scheduler` does.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fcluster.engine.call_scheduler import AttemptCancelledError
from fcluster.engine.calling import Call
from fcluster.worker.record_watch import frame_of, handler_of

CLOSE_S = 1.0
BLOCKED_S = 1.0
"""If the event loop hasn't got to something for longer than this, a function blocks it."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What has come of an attempt.

    Attributes:
        call: the call.
        number: which attempt.
        result: what the function has returned.
        error: what it has raised. None: nothing.
    """

    call: Call
    number: int
    result: Any = None
    error: BaseException | None = None


class CallThread:
    """See the module's docstring. The methods are for the main thread.

    Args:
        wake: called in the thread when attempts have ended.
        threads: how many functions of `asyncio.to_thread` run at the same time, at most.
    """

    def __init__(self, wake: Callable[[], None], threads: int) -> None:
        self._wake = wake
        self._threads = threads
        self._ended: queue.SimpleQueue[Attempt] = queue.SimpleQueue()
        self._told = threading.Event()
        self._begun = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = asyncio.Event()
        self._tasks: dict[Call, asyncio.Task[None]] = {}  # only the thread's own
        self._asked_s: float | None = None

    def make(self, calls: Iterable[Call]) -> None:
        """Begin the next attempts of these calls."""
        attempts = [(call, call.attempt) for call in calls]
        if attempts:
            self._soon(lambda: self._begin(attempts))

    def give_up(self, calls: Iterable[Call]) -> None:
        """Cancel the attempts of these calls. What comes of them may still be told."""
        given_up = list(calls)
        if given_up:
            self._soon(lambda: self._cancel(given_up))

    def ended(self) -> Iterator[Attempt]:
        """The attempts that have ended since the last call."""
        self._told.clear()
        while not self._ended.empty():
            yield self._ended.get_nowait()

    def blocked_in(self) -> str:
        """Where a function keeps the event loop from going on. Empty: none does."""
        asked_s, thread = self._asked_s, self._thread
        if asked_s is None or thread is None or time.monotonic() - asked_s < BLOCKED_S:
            return ""
        return handler_of(frame_of(thread.ident or 0))

    def close(self) -> None:
        """End the thread, without waiting long for its calls."""
        thread = self._thread
        if thread is not None:
            self._soon(self._stopping.set)
            thread.join(CLOSE_S)

    def _soon(self, function: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="calls", daemon=True)
            self._thread.start()
            self._begun.wait()
        assert self._loop is not None
        if self._asked_s is None:
            self._asked_s = time.monotonic()

        def run() -> None:
            self._asked_s = None
            function()

        self._loop.call_soon_threadsafe(run)

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        # At exit, Python waits for these threads, but not for long: see `handler_processes.leave_within`.
        self._loop.set_default_executor(ThreadPoolExecutor(self._threads, thread_name_prefix="calls"))
        self._begun.set()
        await self._stopping.wait()

    def _begin(self, attempts: Iterable[tuple[Call, int]]) -> None:
        assert self._loop is not None
        for call, number in attempts:
            self._tasks[call] = self._loop.create_task(self._attempt(call, number))

    def _cancel(self, calls: Iterable[Call]) -> None:
        for call in calls:
            task = self._tasks.pop(call, None)
            if task is not None:
                task.cancel()

    async def _attempt(self, call: Call, number: int) -> None:
        try:
            attempt = Attempt(call, number, await call.node.function(call.context, call.value))
        except asyncio.CancelledError as error:  # if the attempt was given up, it isn't looked at
            attempt = Attempt(call, number, error=AttemptCancelledError(error))
        except BaseException as error:  # noqa: BLE001  whatever it is (also SystemExit), the attempt has failed
            attempt = Attempt(call, number, error=error)
        if self._tasks.get(call) is asyncio.current_task():
            del self._tasks[call]
        self._ended.put(attempt)
        if not self._told.is_set():
            self._told.set()
            self._wake()
