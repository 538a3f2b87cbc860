"""The last events of a core, kept to find out how a process got into its present state.

Responsible for: keeping the events, and writing them to a file that `tests.simulation.replay` feeds to the
same core again. A core is pure, so the same events have the same effects; the file names these too.

The ring keeps references to immutable events, so noting one costs next to nothing. A file contains no
secrets, and nothing of a user's data except names and offsets: texts about failures are left out. An error
while a file is written is logged and never raised. Writing takes at most `WRITE_S_MAX` of the caller's time.
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
"""How many files a process writes at most."""
WRITE_S_MAX: Final = 2.0
_LEFT_OUT: Final = frozenset({"reason", "message", "remedy", "record"})
"""Fields with texts about failures. They may quote a user's data."""

_log = logging.getLogger("fcluster.events")


class RingFile(msgspec.Struct, frozen=True):
    """What a file holds.

    Attributes:
        role: of the process: "worker" or "coordinator".
        version: of fcluster.
        begin: the arguments that the core was created with.
        complete: whether the core's first event is in the file. Then a replay must have the same effects.
        events: for each: its time, the event's class, its fields, and the classes of its effects.
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
        version: see `RingFile`.
        begin: see `RingFile`. Must be encodable by `msgspec` and contain no secrets.
        directory: where files are written if it exists. Otherwise the system's directory for temporary files
            is used.
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
        """Note that the core has handled an event. Call it only from the core's thread."""
        self._events.append((now_ms, event, effects))
        self._noted += 1

    def encode(self) -> bytes:
        """The contents of a file. May be called from any thread."""
        kept = self._events.copy()
        events = [
            (now_ms, type(event).__name__, _plain(event), [type(effect).__name__ for effect in effects])
            for now_ms, event, effects in kept
        ]
        complete = self._noted == len(kept)
        begin = _plain(self._begin)
        return msgspec.msgpack.encode(RingFile(self._role, self._version, begin, complete, events))

    def dump(self) -> None:
        """Write a file, and log its name. May be called from any thread and from signal handlers."""
        writing = threading.Thread(target=self._write, name="events", daemon=True)
        writing.start()
        writing.join(WRITE_S_MAX)

    def dump_on_signal(self) -> None:
        """From now on, SIGUSR1 dumps this ring in addition to the stacks of all threads. Call it from the
        main thread.
        """
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
            # Don't follow a link that somebody else has put there.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
        except Exception as error:  # noqa: BLE001  a failed dump must not disturb the process
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
        msgspec.MsgspecError: it isn't a ring file.
        OSError: it can't be read.
    """
    return _decoder.decode(path.read_bytes())
