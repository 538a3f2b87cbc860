"""What `fcluster drain` and `fcluster scale` print and do while they wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fcluster.cli import operations
from fcluster.cli.operations import NotReached, drain, scale
from fcluster.wire import messages
from fcluster.wire.admin_client import CoordinatorSilent, RequestRefused

WORKER = "host-1-77-abc"


class FakeLine:
    """A coordinator that returns one status document after another, and then always the last one."""

    def __init__(self, *documents: dict[str, Any] | Exception, others: int = 1) -> None:
        self.documents = list(documents)
        self.others = others
        self.asked: list[Any] = []
        self.refusal = ""

    def ask(self, request: Callable[[Any], Any]) -> Any:
        return request(self)

    def status(self) -> dict[str, Any]:
        document = self.documents.pop(0) if len(self.documents) > 1 else self.documents[0]
        if isinstance(document, Exception):
            raise document
        return document

    def drain(self, name: str) -> messages.DrainReply:
        self.asked.append(name)
        if self.refusal:
            raise RequestRefused(self.refusal)
        return messages.DrainReply(len(self.asked), 2, WORKER, "host-1", 77, self.others)

    def scale(self, total: int = -1, places: Any = None) -> messages.ScaleReply:
        self.asked.append(total if total >= 0 else dict(places))
        targets = [messages.AgentTarget("a1", "h1", 1, 2), messages.AgentTarget("a2", "h2", 2, 1)]
        return messages.ScaleReply(len(self.asked), targets)


def worker(*, leaving: bool = True, said: bool = True, agent: str = "", phase: str = "") -> dict[str, Any]:
    phase = phase or ("leaving" if leaving else "running")
    shown = {"worker": WORKER, "slot": 2, "leaving": leaving, "leaving_said": said, "agent": agent}
    return shown | {"phase": phase}


def agent(name: str, target: int, running: int) -> dict[str, Any]:
    return {"agent": name, "target": target, "running": running, "wanted": -1}


def status(*workers: dict[str, Any], term: int = 1, **more: Any) -> dict[str, Any]:
    return {"term": term, "workers": list(workers), "shards": [], "agents": []} | more


SHARD = {"stage": "in", "partition": 3, "slot": 2, "phase": "warming", "moving_to": 0}
BOTH = [agent("a1", 2, 2), agent("a2", 1, 1)]
AT_WORK = [worker(leaving=False, agent=name) for name in ("a1", "a1", "a2")]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "POLL_S", 0.001)


def drained(line: FakeLine, *, wait: bool = True, timeout_s: float = 10) -> list[str]:
    said: list[str] = []
    drain(line, "2", wait=wait, timeout_s=timeout_s, say=said.append)
    return said


def scaled(line: FakeLine, *, wait: bool = True, timeout_s: float = 10) -> list[str]:
    said: list[str] = []
    scale(line, 3, {}, wait=wait, timeout_s=timeout_s, say=said.append)
    return said


def test_drain_shows_what_is_left_until_the_worker_has_left() -> None:
    line = FakeLine(status(worker(), shards=[SHARD]), status(worker(), shards=[SHARD]), status())
    assert drained(line) == [
        f"worker {WORKER} (slot 2) is leaving",
        "1 shard left: in/3 warming for slot 0",
        f"worker {WORKER} (slot 2) has left",
    ]
    assert line.asked == ["2"]


def test_drain_of_the_last_worker_says_that_its_shards_wait() -> None:
    assert drained(FakeLine(status(), others=0))[1].startswith("no other worker can take its shards")


def test_drain_without_waiting_returns_when_the_worker_has_the_order() -> None:
    line = FakeLine(status(worker(said=False)), status(worker()))
    assert drained(line, wait=False)[-1].endswith("has the order and will leave by itself")


def test_drain_that_a_new_leader_does_not_know_is_requested_again() -> None:
    line = FakeLine(
        status(worker(said=False)),
        CoordinatorSilent("gone"),
        status(worker(leaving=False, said=False), term=2),
        status(worker(), term=2),
        status(term=2),
    )
    said = drained(line)
    assert line.asked == ["2", WORKER]
    assert "the coordinator doesn't answer; waiting for it or a new leader" in said


def test_drain_that_a_new_leader_knows_is_not_requested_again() -> None:
    line = FakeLine(status(worker(), term=2), status(term=2))
    drained(line)
    assert line.asked == ["2"]


def test_drain_that_takes_too_long_says_what_delays_it() -> None:
    with pytest.raises(
        NotReached, match=r"still running after 0\.05 s: 1 shard left: in/3 warming for slot 0"
    ):
        drained(FakeLine(status(worker(), shards=[SHARD])), timeout_s=0.05)


def test_drain_of_an_unknown_worker_is_refused() -> None:
    line = FakeLine(status())
    line.refusal = "there is no worker"
    with pytest.raises(RequestRefused, match="there is no worker"):
        drained(line)


def test_scale_waits_for_workers_and_says_what_is_missing() -> None:
    line = FakeLine(
        status(agents=[agent("a1", 1, 1)]),
        status(agents=[agent("a1", 2, 2), agent("a2", 2, 2)]),
        status(worker(agent="a2"), worker(leaving=False, agent="a2"), agents=BOTH),
        status(*AT_WORK, agents=BOTH),
    )
    assert scaled(line) == [
        "agent h1:1: 2 workers",
        "agent h2:2: 1 worker",
        "agent h1:1 hasn't confirmed its target of 2 workers; agent h2:2 isn't connected",
        "agent h1:1: 0 of 2 workers working; agent h2:2 hasn't confirmed its target of 1 worker",
        "agent h1:1: 0 of 2 workers working",
        "done",
    ]
    assert line.asked == [3]


def test_scale_without_waiting_returns_when_the_agents_have_the_order() -> None:
    assert (
        scaled(FakeLine(status(agents=BOTH)), wait=False)[-1] == "the agents have the order and carry it out"
    )


def test_scale_names_workers_that_no_agent_runs() -> None:
    said = scaled(FakeLine(status(*AT_WORK, worker(leaving=False), agents=BOTH)))
    assert said[-2:] == ["1 worker more without an agent: use `fcluster drain` to remove those", "done"]


def test_scale_is_requested_again_by_agent_when_a_new_leader_knows_them_all() -> None:
    line = FakeLine(
        status(agents=[agent("a1", 1, 1)], term=2),
        status(agents=[agent("a1", 1, 1), agent("a2", 1, 1)], term=2),
        status(*AT_WORK, agents=BOTH, term=2),
    )
    scaled(line)
    assert line.asked == [3, {"a1": 2, "a2": 1}]


def test_scale_that_takes_too_long_says_what_is_missing() -> None:
    line = FakeLine(status(*AT_WORK[1:], agents=BOTH))
    with pytest.raises(NotReached, match=r"not complete after 0\.05 s: agent h1:1: 1 of 2 workers working"):
        scaled(line, timeout_s=0.05)
