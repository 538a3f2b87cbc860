"""Writes to a running job all the time, so that there is always something to interrupt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

INTERVAL_S = 0.02


@contextmanager
def all_the_time(write: Callable[[], object]) -> Generator[None]:
    """Call `write` in its own thread, about fifty times a second, while the block runs."""
    enough = threading.Event()

    def run() -> None:
        while not enough.wait(INTERVAL_S):
            write()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()
