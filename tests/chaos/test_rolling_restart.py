"""All workers are restarted one after the other under load, as a rollout does it: nobody notices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from tests.chaos.runner import PLAIN, REGROUPED, Chaos, workers_of
from tests.chaos.tally import RESTARTED
from tests.harness import wait_until

pytestmark = pytest.mark.timeout(240)


def counters(run: Chaos) -> dict[str, int]:
    """The coordinator's."""
    status: dict[str, Any] = wait_until(run.cluster.status, "the coordinator answers")
    return status["counters"]


@pytest.mark.parametrize("job_file", [PLAIN, REGROUPED])
def test_rolling_restart_of_all_workers_loses_and_repeats_nothing(
    chaos: Callable[..., AbstractContextManager[Chaos]], job_file: str
) -> None:
    # A busy host that lets a process wait for a second shall not pass for a death here.
    patient = {"session.timeout.ms": 10_000}
    with chaos("rolling restart", job_file=job_file, settings=patient) as run:
        before = counters(run)
        workers = workers_of(run)
        for worker in workers:
            run.cluster.stop(worker)
            run.note(RESTARTED, f"SIGTERM to {worker}, which left", shown=run.open_epoch())
            run.start(worker)
            run.await_shards(len(workers))
            run.await_flow()
        after = counters(run)
        risen = {name: after[name] - before[name] for name in after}
        # All of them left in good order, and every shard was warm where it went: nothing was aborted.
        assert risen["leaves"] == risen["joins"] == len(workers)
        assert {risen[name] for name in ("deaths", "evictions", "resets", "fences", "cold_moves")} == {0}
        assert risen["moves"] > 0
