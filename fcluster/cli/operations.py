"""What the commands that change a running cluster do while they wait (`fcluster drain`, `fcluster scale`).

Responsible for: sending the request, showing progress, and saying exactly what is missing after a timeout.
Rules: every wait is bounded; a request is repeated if a new leader may not know it; a leader that knows it
isn't asked again. Must not parse options. Must not print: lines are passed to a callback.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fcluster.common.errors import FclusterError
from fcluster.wire.admin_client import CoordinatorSilent, RequestRefused

if TYPE_CHECKING:
    from fcluster.wire.admin_client import AdminClient

POLL_S = 0.3
SHARDS_NAMED_MAX = 8

_T = TypeVar("_T")
Say = Callable[[str], None]


class NotReached(FclusterError):  # noqa: N818
    """The requested change isn't complete after the given time."""


class Line(Protocol):
    """Requests to the leader of the job: see `connection.AdminLine`."""

    def ask(self, request: Callable[[AdminClient], _T]) -> _T: ...
    def status(self) -> dict[str, Any]: ...


class _Patience:
    """A bounded wait that reports changes."""

    def __init__(self, timeout_s: float, say: Say) -> None:
        self._deadline_s = time.monotonic() + timeout_s
        self._say = say
        self._said = ""

    def say(self, text: str) -> None:
        """Report it once, until it changes."""
        if text != self._said:
            self._say(text)
        self._said = text

    def pause(self) -> bool:
        """Wait a moment. Returns False if the time is over."""
        left_s = self._deadline_s - time.monotonic()
        time.sleep(max(0.0, min(POLL_S, left_s)))
        return left_s > 0

    def status(self, line: Line) -> dict[str, Any] | None:
        """The status document. None while there is no answer: a new leader may come soon."""
        try:
            return line.status()
        except CoordinatorSilent:
            self.say("the coordinator doesn't answer; waiting for it or a new leader")
            return None


# --- drain -----------------------------------------------------------------------------------------


def drain(line: Line, name: str, *, wait: bool, timeout_s: float, say: Say) -> None:
    """Let one worker leave, and wait until it is gone. If `wait` is False, wait only until it has the
    order.

    Args:
        line: the connection to the coordinator.
        name: the worker: its slot, its id, or HOST:PID.
        wait: whether to wait until it is gone.
        timeout_s: the longest wait.
        say: called with lines about the progress.

    Raises:
        RequestRefused: there is no such worker, or the job is stopping.
        NotReached: it is still running when the time is over.
        FclusterError: the coordinator can't be asked.
    """
    reply = line.ask(lambda client: client.drain(name))
    called = f"worker {reply.worker} (slot {reply.slot})"
    say(f"{called} is leaving")
    if not reply.others:
        say("no other worker can take its shards; they wait for one")
    patience = _Patience(timeout_s, say)
    term, left = reply.term, "it hasn't answered"
    while patience.pause():
        document = patience.status(line)
        if document is None:
            continue
        worker = next((w for w in document["workers"] if w["worker"] == reply.worker), None)
        if worker is None or (worker["leaving_said"] and not wait):
            say(
                f"{called} has left" if worker is None else f"{called} has the order and will leave by itself"
            )
            return
        if document["term"] != term and not worker["leaving"]:
            term = _repeat_drain(line, reply.worker, document["term"])
        left = _what_is_left(document, worker["slot"])
        patience.say(left)
    raise NotReached(
        f"{called} is still running after {timeout_s:g} s: {left}",
        remedy="It is still leaving. `fcluster status` shows its progress; its log may say what holds it up.",
    )


def _repeat_drain(line: Line, worker: str, term: int) -> int:
    """A new leader learns of it from the worker, unless the worker hadn't received it yet."""
    try:
        return line.ask(lambda client: client.drain(worker)).term
    except RequestRefused:
        return term  # it has left in the meantime
    except CoordinatorSilent:
        return 0


def _what_is_left(document: Mapping[str, Any], slot: int) -> str:
    shards = [shard for shard in document["shards"] if shard["slot"] == slot]
    if not shards:
        return "no shards left"
    named = ", ".join(
        f"{shard['stage']}/{shard['partition']} {shard['phase']}"
        + (f" for slot {shard['moving_to']}" if shard["moving_to"] >= 0 else "")
        for shard in shards[:SHARDS_NAMED_MAX]
    )
    more = ", ..." if len(shards) > SHARDS_NAMED_MAX else ""
    return f"{len(shards)} {'shard' if len(shards) == 1 else 'shards'} left: {named}{more}"


# --- scale -----------------------------------------------------------------------------------------


def scale(
    line: Line, total: int, places: Mapping[str, int], *, wait: bool, timeout_s: float, say: Say
) -> None:
    """Run the wanted number of workers, and wait until they work. If `wait` is False, wait only until the
    agents have the order.

    Args:
        line: the connection to the coordinator.
        total: the number of workers, spread over all agents. -1: see `places`.
        places: how many at each place: an agent's host, HOST:PID, or id.
        wait: whether to wait until the workers have joined, and surplus ones are gone.
        timeout_s: the longest wait.
        say: called with lines about the progress.

    Raises:
        RequestRefused: there is no such agent, or none at all, or the job is stopping.
        NotReached: the change isn't complete when the time is over.
        FclusterError: the coordinator can't be asked.
    """
    reply = line.ask(lambda client: client.scale(total, places))
    targets = {target.agent: target.target for target in reply.targets}
    for target in reply.targets:
        say(f"agent {target.host}:{target.pid}: {_workers(target.target)}")
    called = {target.agent: f"{target.host}:{target.pid}" for target in reply.targets}
    patience = _Patience(timeout_s, say)
    term = reply.term
    missing = ["nothing is known yet"]
    while patience.pause():
        document = patience.status(line)
        if document is None:
            continue
        if document["term"] != term:
            term = _repeat_scale(line, document, targets, term)
        missing = _missing(document, targets, called, workers_too=wait)
        if not missing:
            if others := sum(not worker["agent"] for worker in document["workers"]):
                say(f"{_workers(others)} more without an agent: use `fcluster drain` to remove those")
            say("done" if wait else "the agents have the order and carry it out")
            return
        patience.say("; ".join(missing))
    raise NotReached(
        f"not complete after {timeout_s:g} s: {'; '.join(missing)}",
        remedy="The change goes on. `fcluster status` shows its progress; the agents' logs say what fails.",
    )


def _repeat_scale(line: Line, document: Mapping[str, Any], targets: Mapping[str, int], term: int) -> int:
    """A new leader learns the agents' targets from them. Agents that hadn't received the order yet must be
    told again.
    """
    connected = {agent["agent"] for agent in document["agents"]}
    if not connected.issuperset(targets):
        return term  # the agents come back one by one
    try:
        return line.ask(lambda client: client.scale(places=targets)).term
    except (CoordinatorSilent, RequestRefused):
        return term


def _missing(
    document: Mapping[str, Any], targets: Mapping[str, int], called: Mapping[str, str], *, workers_too: bool
) -> list[str]:
    """What isn't complete yet: a phrase for each agent."""
    agents = {agent["agent"]: agent for agent in document["agents"]}
    missing: list[str] = []
    for name, target in targets.items():
        agent = agents.get(name)
        workers = [worker for worker in document["workers"] if worker["agent"] == name]
        working = sum(worker["phase"] in ("running", "restoring") for worker in workers)
        leaving = sum(worker["leaving"] for worker in workers)
        if agent is None:
            missing.append(f"agent {called[name]} isn't connected")
        elif agent["target"] != target:
            missing.append(f"agent {called[name]} hasn't confirmed its target of {_workers(target)}")
        elif workers_too and (working != target or agent["running"] != target):
            more = f", {leaving} leaving" if leaving else ""
            missing.append(f"agent {called[name]}: {working} of {_workers(target)} working{more}")
    return missing


def _workers(number: int) -> str:
    return f"{number} worker" if number == 1 else f"{number} workers"
