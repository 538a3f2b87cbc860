"""How operators name workers: by slot, by id, or by HOST:PID.

Responsible for: finding the worker with that name, or returning a sentence that lists the workers. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from fcluster.coordinator.core.model import Session

NAMED_MAX = 20


def find_worker(name: str, sessions: Iterable[Session]) -> Session | str:
    """The session of the worker with this name: a slot number, a worker's id, or HOST:PID.

    Returns:
        The session. If there is none or more than one: a sentence that says so and lists the workers.
    """
    sessions = sorted(sessions, key=lambda session: session.slot)
    if name.isascii() and name.isdigit():
        found = [session for session in sessions if session.slot == int(name)]
    else:
        found = [session for session in sessions if name in (session.worker, _place(session))]
    if len(found) == 1:
        return found[0]
    if not sessions:
        return f"there is no worker {name!r}: no worker is running"
    listed = ", ".join(f"{session.slot} ({_place(session)})" for session in sessions[:NAMED_MAX])
    more = f" and {len(sessions) - NAMED_MAX} more" if len(sessions) > NAMED_MAX else ""
    what = "there are several workers" if found else "there is no worker"
    return f"{what} {name!r}. Running, by slot: {listed}{more}"


def _place(session: Session) -> str:
    return f"{session.host}:{session.pid}"
