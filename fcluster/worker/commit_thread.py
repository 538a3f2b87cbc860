"""The commit thread of a session. It runs tasks one after another, and can be abandoned if it hangs.

Responsible for: a thread in which a call of a client library may never return, and for not blocking others
then. Python can't interrupt such a call. Code that waits until the session's work is complete doesn't wait
for an abandoned thread: Kafka refuses everything that this thread may still do, since its transactional ids
are fenced, and it changes nothing else. The thread is a daemon, so that the process can exit.

Must not: know what it runs.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class CommitThread(Executor):
    """Runs tasks in one thread, in order."""

    def __init__(self, name: str = "commit") -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._closed = False
        self._ended = False
        self._abandoned = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a task after the tasks that were submitted before.

        An abandoned thread runs nothing, and the future is cancelled. Any thread may abandon it, so the
        caller may not know about that yet.

        Raises:
            RuntimeError: the thread was shut down.
        """
        with self._changed:
            future = Future[Any]()
            if self._abandoned:
                future.cancel()
                return future
            if self._closed:
                raise RuntimeError("the commit thread takes no more work")
            self._tasks.put((future, lambda: fn(*args, **kwargs)))
            return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more tasks. Submitted tasks are run, or cancelled if they haven't begun.

        Args:
            wait: wait until they are done, or until the thread is abandoned.
            cancel_futures: cancel tasks that haven't begun.
        """
        with self._changed:
            if not self._closed:
                self._closed = True
                self._tasks.put(None)
        if cancel_futures:
            self._cancel()
        if wait:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._abandoned)

    def abandon(self) -> None:
        """Stop waiting for the thread: it hangs in a call. It does nothing after that call."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
        self.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait until the thread has really ended, abandoned or not. Shut it down first."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended)

    def _cancel(self) -> None:
        kept: list[Any] = []
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is None:
                kept.append(task)
            else:
                task[0].cancel()
        for task in kept:
            self._tasks.put(task)

    def _run(self) -> None:
        try:
            while (task := self._tasks.get()) is not None:
                future, run = task
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(run())
                except BaseException as error:  # noqa: BLE001  the waiting code receives it
                    future.set_exception(error)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
