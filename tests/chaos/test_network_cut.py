"""One worker is cut off from the coordinator, both ways and one way, or from Kafka."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest

from fcluster.common.ids import transactional_ids
from tests.chaos.cluster import ChaosCluster
from tests.chaos.network import COORDINATOR, KAFKA, Island
from tests.chaos.runner import LONG, RECOVERY_S, Chaos
from tests.chaos.tally import NETWORK_CUT
from tests.chaos.transactions_log import ids_with_open_transaction
from tests.harness import wait_until

pytestmark = pytest.mark.timeout(300)

CUT_OFF = "worker-0"
CUT_S = 4.0
"""Longer than `session.timeout.ms` and `checkpoint.timeout.ms`."""
TRIES_MAX = 10


def cluster_on(place: Island) -> type[ChaosCluster]:
    """A kind of cluster of which one worker lives on the island."""

    class IslandCluster(ChaosCluster):
        def prefix_of(self, name: str) -> Sequence[str]:
            return place.prefix if name == CUT_OFF else ()

    return IslandCluster


def open_transactions(run: Chaos, slot: int, timeout_s: float = 0.5) -> set[str]:
    """The transactional ids of that slot with a transaction open, once there are any.

    Asked for within the session: nobody has fenced them yet, so what is open stays open because of the cut.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found = ids_with_open_transaction(run.brokers, run.job) & set(transactional_ids(run.job, slot))
        if found or time.monotonic() > deadline:
            return found


def endure(run: Chaos, what: str, cut: Callable[[], AbstractContextManager[None]]) -> None:
    """Cut, see that others take over, heal, see that the worker comes back."""
    for _ in range(TRIES_MAX):
        session = run.cluster.session(CUT_OFF)
        assert session is not None
        started_ns = time.time_ns()
        run.cluster.may_end = CUT_OFF
        with cut():
            began_s = time.monotonic()
            found = open_transactions(run, session["slot"])
            if not found:
                continue  # between two epochs: healed within the session, and cut again
            shown = f"{' and '.join(sorted(found))} had a transaction open when it was cut off"
            run.note(NETWORK_CUT, f"{CUT_OFF}: {what}", started_ns, shown=shown)
            wait_until(lambda: not run.cluster.shards_running(3), "the coordinator notices", 30, 0.1)
            run.await_flow()  # in all shards: those of the lost one are with others
            run.await_shards(2)
            time.sleep(max(0.0, began_s + CUT_S - time.monotonic()))  # the fault itself
        break
    else:
        raise AssertionError(f"none of {TRIES_MAX} cuts landed in an open epoch: {what}")

    def back() -> bool:
        # A call on Kafka that hangs for longer than the cut lasts may have its watchdog end it even now.
        if run.cluster.child(CUT_OFF).poll() is not None:
            run.cluster.assert_alive()  # nothing else may have
            run.cluster.forget(CUT_OFF)
            run.start(CUT_OFF)
        return run.cluster.shards_running(3)

    wait_until(back, "3 workers run all shards", RECOVERY_S, 0.1)
    run.cluster.may_end = ""
    run.await_flow()


def test_worker_that_is_cut_off_is_replaced_and_comes_back(
    place: Island, chaos_on_mortal_broker: Callable[..., AbstractContextManager[Chaos]]
) -> None:
    settings = {
        "coordinator.bind": f"tcp://{place.ways[COORDINATOR].service}:0",
        "insecure": True,
        "checkpoint.timeout.ms": 3000,
    }
    with chaos_on_mortal_broker(
        "one worker cut off", settings=settings, cluster_type=cluster_on(place), rate=600.0
    ) as run:
        endure(run, "cut off from the coordinator", lambda: place.cut(COORDINATOR))
        endure(run, "not heard by the coordinator", lambda: place.mute(COORDINATOR))
        endure(run, "doesn't hear the coordinator", lambda: place.deafen(COORDINATOR))
        if LONG:  # not settled: the coordinator doesn't notice it within 30 s any more
            endure(run, "cut off from Kafka", lambda: place.cut(KAFKA))
