"""The last events of a core, kept for whoever has to find out how a process came to where it is.

Responsible for: keeping them, and writing them to a file that `tests.simulation.replay` feeds to the same
core again. A core is pure, so the same events give the same effects; the names of these are in the file, too.

What is kept are references to events that never change, so that noting one costs next to nothing. A file has
no secrets, and nothing of users' data but names and offsets: texts about failures are left out. Trouble with
a file is logged and never raised, and writing it takes at most `WRITE_S_MAX` of the caller's time.
"""

from __future__ import annotations

import faulthandler
import itertools
import logging
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import msgspec

EVENTS_KEPT: Final = 1_000
FILES_MAX: Final = 10
"""So many files are written in the life of a process."""
WRITE_S_MAX: Final = 2.0
_LEFT_OUT: Final = frozenset({"reason", "message", "remedy", "record"})
"""Fields with texts about failures, which may quote a user's data."""

_log = logging.getLogger("fcluster.events")


class RingFile(msgspec.Struct, frozen=True):
    """What a file holds.

    Attributes:
        role: of the process: "worker" or "coordinator".
        version: of fcluster.
        begin: what the core was made with.
        complete: the first event of the core is there, so a replay has to give the same effects.
        events: when, the event's class, its fields, and the classes of the effects.
    """

    role: str
    version: str
    begin: dict[str, Any]
    complete: bool
    events: list[tuple[float, str, Any, list[str]]]


_decoder = msgspec.msgpack.Decoder(RingFile)


class EventRing:
    """The ring of one core.

    Args:
        role: see `RingFile`.
        version: likewise.
        begin: likewise; what `msgspec` can encode. No secrets.
        directory: where files go, if it exists; otherwise the system's directory for temporary files.
    """

    def __init__(self, role: str, version: str, begin: Mapping[str, Any], directory: Path) -> None:
        self._role = role
        self._version = version
        self._begin = begin
        self._directory = directory
        self._events: deque[tuple[float, Any, Sequence[Any]]] = deque(maxlen=EVENTS_KEPT)
        self._noted = 0
        self._numbers = itertools.count(1)

    def note(self, now_ms: float, event: object, effects: Sequence[object]) -> None:
        """The core has handled an event. For the thread that has the core."""
        self._events.append((now_ms, event, effects))
        self._noted += 1

    def encode(self) -> bytes:
        """The contents of a file. For any thread."""
        kept = self._events.copy()
        events = [
            (now_ms, type(event).__name__, _plain(event), [type(effect).__name__ for effect in effects])
            for now_ms, event, effects in kept
        ]
        complete = self._noted == len(kept)
        begin = _plain(self._begin)
        return msgspec.msgpack.encode(RingFile(self._role, self._version, begin, complete, events))

    def dump(self) -> None:
        """Write a file, and log its name. For any thread, and for signal handlers."""
        writing = threading.Thread(target=self._write, name="events", daemon=True)
        writing.start()
        writing.join(WRITE_S_MAX)

    def dump_on_signal(self) -> None:
        """From now on, SIGUSR1 dumps this ring besides the stacks of all threads. For the main thread."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGUSR1"):
            return
        faulthandler.unregister(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, lambda _number, _frame: self.dump())
        try:
            faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=True, chain=True)
        except (OSError, ValueError):  # a stream without a descriptor (a test's)
            _log.debug("no stacks on SIGUSR1")

    def _write(self) -> None:
        number = next(self._numbers)
        if number > FILES_MAX:
            return
        directory = self._directory if self._directory.is_dir() else Path(tempfile.gettempdir())
        path = directory / f"events-{self._role}-{os.getpid()}-{number}.msgpack"
        try:
            data = self.encode()
            # Not through a link that somebody else has put there.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
        except Exception as error:  # noqa: BLE001  the process has other things to do
            _log.warning("the last events can't be written to %s: %s", path, error)
        else:
            _log.warning("the last %d events are in %s", len(self._events), path)


def _plain(value: Any) -> Any:
    return _without_texts(msgspec.to_builtins(value, builtin_types=(bytes,)))


def _without_texts(value: Any) -> Any:
    if isinstance(value, dict):
        fields = cast("dict[Any, Any]", value)
        return {
            name: "" if name in _LEFT_OUT and isinstance(field, str) else _without_texts(field)
            for name, field in fields.items()
        }
    if isinstance(value, list | tuple):
        return [_without_texts(one) for one in cast("Sequence[Any]", value)]
    return value


def read_ring(path: Path) -> RingFile:
    """The contents of a file.

    Raises:
        msgspec.MsgspecError: it is no such file.
        OSError: it can't be read.
    """
    return _decoder.decode(path.read_bytes())
