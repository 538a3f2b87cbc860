"""Which record is being processed, and for how long. Used to find slow handlers, and handlers that hang.

Responsible for: noticing from another thread, at next to no cost for the processing thread, that one record
takes long; and for the message about a record that exceeds its limit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from confluent_kafka import Message

from fcluster.common.failures import bounded_text
from fcluster.common.settings import Settings
from fcluster.engine.records import TimerRecord, describe_record

_frames: Callable[[], dict[int, FrameType]] = sys._current_frames  # pyright: ignore[reportPrivateUsage]
_PACKAGE = str(Path(__file__).parents[1])


UNUSED_S_MAX = 1.0
"""If there is more time than this between two samples, it counts only as far as the process used CPU in it:
while a process is suspended or gets no CPU, its handlers do nothing. Samples are much closer together, except
while a handler holds the interpreter's lock, and such a handler uses CPU.
"""


@dataclass(frozen=True, slots=True)
class Running:
    """A record that has been processed for at least this long."""

    record: Message | TimerRecord
    running_s: float


class RecordWatch:
    """Knows the record that is being processed.

    Attributes:
        record: set by the processing thread before each record and timer. None while it does something else.
        running: the result of the last `sample`.
    """

    __slots__ = ("_cpu_s", "_now_s", "_running_s", "_sampled", "record", "running")

    def __init__(self) -> None:
        self.record: Message | TimerRecord | None = None
        self.running: Running | None = None
        self._sampled: Message | TimerRecord | None = None
        self._now_s = self._cpu_s = self._running_s = 0.0

    def sample(self, now_s: float, cpu_s: float) -> Running | None:
        """The record that was already being processed at the last sample. For one thread only.

        Args:
            now_s: the time on a monotonic clock.
            cpu_s: the CPU time that this process has used so far.
        """
        record = self.record
        if record is not self._sampled:
            self._sampled, self._running_s = record, 0.0  # kept, so no other object can get its address
            self.running = None
        else:
            self._running_s += min(now_s - self._now_s, UNUSED_S_MAX + cpu_s - self._cpu_s)
            self.running = None if record is None else Running(record, self._running_s)
        self._now_s, self._cpu_s = now_s, cpu_s
        return self.running


def frame_of(thread_id: int) -> FrameType | None:
    """The innermost frame of a thread. None if there is no such thread."""
    return _frames().get(thread_id)


def describe_overdue(running: Running, settings: Settings, frame: FrameType | None) -> str:
    """A message about a record that exceeds its limit, for people to read.

    Args:
        running: the record.
        settings: the settings, which have the limit.
        frame: the frame of the thread that processes it (`frame_of`).
    """
    record = running.record
    where = handler_of(frame)
    bound = f"record.timeout.ms = {settings.record_timeout_ms}"
    if not settings.record_timeout_ms:
        bound = f"transaction.timeout.ms = {settings.transaction_timeout_ms} leaves for one record"
    return (
        f"{describe_record(record)} has been processed for "
        f"{running.running_s:.1f} s, longer than {bound}, {where}"
    )


def handler_of(frame: FrameType | None) -> str:
    """The user's function that a thread is in, and the line."""
    innermost = outermost = None
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_PACKAGE):
            innermost = innermost or frame
            outermost = frame
        elif outermost is not None:
            break  # the operator that called the user's function
        frame = frame.f_back
    if innermost is None or outermost is None:
        return "in fcluster itself"
    line = f"{innermost.f_code.co_filename}:{innermost.f_lineno}"
    return bounded_text(f"in {outermost.f_code.co_qualname} ({line})", 500)
