"""Announces each step of a record before it is called, because it may end the process.

Responsible for: noticing, while one record is processed, each step that calls the user's function. The last
one that began is the one that ended the process. This slows handlers down, so it is only used for suspect
records.

Must not: know why a record is suspect, or how others learn of a step.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from types import FrameType

from fcluster.worker.processing import step_of


@contextlib.contextmanager
def announced_steps(announce: Callable[[str], None]) -> Generator[None]:
    """Call `announce(step)` in this thread, once for each step, before it calls the user's function."""
    seen: set[str] = set()

    def on_call(frame: FrameType, event: str, _argument: object) -> None:
        caller = frame.f_back if event == "call" else frame if event == "c_call" else None
        step = step_of(caller) if caller is not None else ""
        if step and step not in seen:
            seen.add(step)
            announce(step)

    sys.setprofile(on_call)
    try:
        yield
    finally:
        sys.setprofile(None)
