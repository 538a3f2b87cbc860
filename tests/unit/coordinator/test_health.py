"""What a coordinator reports at its HTTP port."""

from __future__ import annotations

import pytest

from fcluster.coordinator.health import CoordinatorHealth
from fcluster.wire.discovery import Leader
from fcluster.wire.http_port import Verdict
from tests.harness import wait_until

LEADER = Leader("tcp://127.0.0.1:7000", 3, "host", 42, "run")


def test_coordinator_is_ready_as_leader_and_as_standby_and_reports_which() -> None:
    health = CoordinatorHealth("job")
    assert not health.ready().ok
    health.looks_for_leader()
    assert not health.ready().ok
    health.stands_by(LEADER)
    assert health.ready() == Verdict(True, "standing by: process 42 on host leads job job in term 3")
    assert health.status() == {
        "role": "standby",
        "job": "job",
        "leader": {"address": LEADER.address, "term": 3, "host": "host", "pid": 42},
    }
    health.looks_for_leader()
    assert not health.ready().ok, "the one it followed is gone"
    health.takes_over()
    assert not health.ready().ok
    health.leads(LEADER, lambda: {"epoch": 5})
    assert health.ready() == Verdict(True, "leads job job in term 3")
    assert health.status() == {"role": "leader", "epoch": 5}
    assert health.live().ok


def test_coordinator_whose_loop_stops_is_neither_live_nor_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcluster.coordinator.health.LOOP_BOUND_S", 0.02)
    health = CoordinatorHealth("job")
    health.leads(LEADER, dict)
    wait_until(lambda: not health.live().ok, "the stopped loop is noticed", 5)
    assert not health.ready().ok
    assert "main loop" in health.live().text
    health.turned()
    assert health.live().ok
