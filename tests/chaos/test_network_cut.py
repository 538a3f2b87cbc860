"""One worker is cut off from the coordinator, both ways and one way, or from Kafka."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fcluster.common import embedded_kafka
from fcluster.common.embedded_kafka import EmbeddedKafka
from tests.chaos.cluster import ChaosCluster
from tests.chaos.network import COORDINATOR, KAFKA, Island, island
from tests.chaos.runner import Chaos, chaos_run
from tests.harness import wait_until

pytestmark = pytest.mark.timeout(300)

CUT_OFF = "worker-0"
CUT_S = 4.0
"""Longer than `session.timeout.ms` and `checkpoint.timeout.ms`."""


@pytest.fixture
def place() -> Iterator[Island]:
    with island() as made:
        yield made


@pytest.fixture
def reachable_broker(
    place: Island, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[EmbeddedKafka, str]]:
    """A broker that listens where the island can reach it, and its bootstrap servers."""
    properties = embedded_kafka.server_properties
    address = place.ways[KAFKA].service

    def elsewhere(launch: object, log_dir: Path) -> dict[str, str]:
        found = properties(launch, log_dir)  # type: ignore[arg-type]
        listen = found["advertised.listeners"]
        return {
            **found,
            "listeners": found["listeners"].replace(listen, listen.replace("127.0.0.1", "0.0.0.0")),
            "advertised.listeners": listen.replace("127.0.0.1", address),
        }

    monkeypatch.setattr(embedded_kafka, "server_properties", elsewhere)
    broker = EmbeddedKafka(tmp_path / "kafka")
    try:
        yield broker, broker.start().replace("127.0.0.1", address)
    finally:
        broker.stop()


def cluster_on(place: Island) -> type[ChaosCluster]:
    """A kind of cluster of which one worker lives on the island."""

    class IslandCluster(ChaosCluster):
        def prefix_of(self, name: str) -> Sequence[str]:
            return place.prefix if name == CUT_OFF else ()

    return IslandCluster


def endure(run: Chaos, what: str, cut: Callable[[], AbstractContextManager[None]]) -> None:
    """Cut, see that others take over, heal, see that the worker comes back."""
    started_ns = time.time_ns()
    run.cluster.may_end = CUT_OFF
    with cut():
        run.note(f"{CUT_OFF}: {what}", started_ns, in_open_epoch=False)
        began_s = time.monotonic()
        wait_until(lambda: not run.cluster.shards_running(3), "the coordinator notices", 30, 0.1)
        run.await_flow()  # in all shards: those of the lost one are with others
        run.await_shards(2)
        time.sleep(max(0.0, began_s + CUT_S - time.monotonic()))  # the fault itself
    run.cluster.may_end = ""
    if run.cluster.child(CUT_OFF).poll() is not None:
        run.note("its watchdog has ended it", in_open_epoch=False)
        run.cluster.forget(CUT_OFF)
        run.start(CUT_OFF)
    run.await_shards(3)
    run.await_flow()


def test_worker_that_is_cut_off_is_replaced_and_comes_back(
    place: Island, reachable_broker: tuple[EmbeddedKafka, str], topic_prefix: str, tmp_path: Path
) -> None:
    settings = {
        "coordinator.bind": f"tcp://{place.ways[COORDINATOR].service}:0",
        "insecure": True,
        "checkpoint.timeout.ms": 3000,
    }
    _broker, servers = reachable_broker
    with chaos_run(
        servers,
        topic_prefix,
        tmp_path / "data",
        "one worker cut off",
        settings=settings,
        cluster_type=cluster_on(place),
        rate=600.0,
    ) as run:
        endure(run, "cut off from the coordinator", lambda: place.cut(COORDINATOR))
        endure(run, "not heard by the coordinator", lambda: place.mute(COORDINATOR))
        endure(run, "doesn't hear the coordinator", lambda: place.deafen(COORDINATOR))
        endure(run, "cut off from Kafka", lambda: place.cut(KAFKA))
