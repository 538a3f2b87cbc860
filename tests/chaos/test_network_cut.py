"""One worker is cut off from the coordinator, in both directions or in one, or from Kafka."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest

from fcluster.common.failpoints import Arm
from tests.chaos.cluster import ChaosCluster
from tests.chaos.network import COORDINATOR, KAFKA, Island
from tests.chaos.runner import RECOVERY_S, Chaos
from tests.chaos.tally import NETWORK_CUT
from tests.harness import wait_until

pytestmark = pytest.mark.timeout(300)

CUT_OFF = "worker-0"
STEP = "worker.offsets-sent"
"""The step at which the worker is cut off: offsets are in its transaction, and the coordinator doesn't know
yet."""
HOLD_MS = 2000
"""How long it is held there. A cut takes a few milliseconds, or some hundred on a busy machine."""
CUT_S = 4.0
"""Longer than `session.timeout.ms` and `checkpoint.timeout.ms`."""


def cluster_on(place: Island) -> type[ChaosCluster]:
    """The class of a cluster with one worker on the island."""

    class IslandCluster(ChaosCluster):
        def prefix_of(self, name: str) -> Sequence[str]:
            return place.prefix if name == CUT_OFF else ()

    return IslandCluster


def endure(run: Chaos, what: str, cut: Callable[[], AbstractContextManager[None]]) -> None:
    """Cut off the worker in an epoch and check that others take over. End the cut and check that it comes
    back."""
    run.cluster.may_end = CUT_OFF
    run.cluster.arm(CUT_OFF, STEP, Arm("hold", after_ms=HOLD_MS))
    mark = run.cluster.await_mark(CUT_OFF, STEP)
    with cut():
        began_s, began_ns = time.monotonic(), time.time_ns()
        assert began_ns < mark.time_ns + HOLD_MS * 1_000_000, f"{what}: the epoch may have been over by then"
        shown = f"held at {STEP} of epoch {mark.detail} when it was cut off"
        run.note(NETWORK_CUT, f"{CUT_OFF}: {what}", began_ns, shown=shown)
        wait_until(lambda: not run.cluster.shards_running(3), "the coordinator notices", 30, 0.1)
        run.await_flow()  # in all shards, so others have taken over its shards
        run.await_shards(2)
        time.sleep(max(0.0, began_s + CUT_S - time.monotonic()))  # the fault itself

    def back() -> bool:
        # If a request to Kafka hangs for longer than the cut lasts, the watchdog may end the worker even now.
        if run.cluster.child(CUT_OFF).poll() is not None:
            run.cluster.assert_alive()  # no other process may have ended
            run.cluster.forget(CUT_OFF)
            run.start(CUT_OFF)
        return run.cluster.shards_running(3)

    wait_until(back, "3 workers run all shards", RECOVERY_S, 0.1)
    run.cluster.may_end = ""
    run.await_flow()


def test_worker_that_is_cut_off_is_replaced_and_comes_back(
    place: Island, chaos_on_stoppable_broker: Callable[..., AbstractContextManager[Chaos]]
) -> None:
    settings = {
        "coordinator.bind": f"tcp://{place.ways[COORDINATOR].service}:0",
        "insecure": True,
        "checkpoint.timeout.ms": 3000,
    }
    with chaos_on_stoppable_broker(
        "one worker cut off", settings=settings, cluster_type=cluster_on(place), rate=600.0
    ) as run:
        endure(run, "cut off from the coordinator", lambda: place.cut(COORDINATOR))
        endure(run, "not heard by the coordinator", lambda: place.drop_outgoing(COORDINATOR))
        endure(run, "doesn't hear the coordinator", lambda: place.drop_incoming(COORDINATOR))
        endure(run, "cut off from Kafka", lambda: place.cut(KAFKA))
