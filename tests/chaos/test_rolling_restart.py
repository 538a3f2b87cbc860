"""All workers are restarted one after another under load, as in a rollout, and nothing is aborted."""

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
    """The coordinator's counters."""
    status: dict[str, Any] = wait_until(run.cluster.status, "the coordinator answers")
    return status["counters"]


@pytest.mark.parametrize("job_file", [PLAIN, REGROUPED])
def test_rolling_restart_of_all_workers_loses_and_repeats_nothing(
    chaos: Callable[..., AbstractContextManager[Chaos]], job_file: str
) -> None:
    # Long, so that a process that a busy host delays for a second doesn't count as dead.
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
        # All workers left cleanly, and each shard moved to a warm copy, so nothing was aborted.
        assert risen["leaves"] == risen["joins"] == len(workers)
        assert {risen[name] for name in ("deaths", "evictions", "resets", "fences", "cold_moves")} == {0}
        assert risen["moves"] > 0
