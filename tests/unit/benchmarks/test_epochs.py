"""The guard of epochs: a worker and a coordinator without Kafka commit epochs, and figures are judged
correctly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import epochs
from benchmarks.epochs import KEYS, RECORDS, OneWorker, find_more_steps, find_slower, make_epochs


def test_epochs_are_committed_in_the_recorded_steps(tmp_path: Path) -> None:
    worker = OneWorker(tmp_path)
    try:
        taken = worker.run(make_epochs(20))
        assert worker.committed == 20
        tables = [state.documents["totals"] for state in worker.states.values()]
        counts = [table.peek(b"k%d" % key).get("count", 0) for table in tables for key in range(KEYS)]
    finally:
        worker.close()
    assert sum(counts) == 20 * RECORDS
    assert dict(Counter(taken).most_common(1)[0][0]) == epochs.recorded().steps


@pytest.mark.parametrize(("epoch_us", "says"), [(620, ""), (630, "26% slower")])
def test_25_percent_slower_than_recorded_is_too_much(epoch_us: float, says: str) -> None:
    found = find_slower(epoch_us, 200.0, 2.5)
    assert (says in found) if says else not found


def test_a_step_more_or_less_is_told() -> None:
    known = {"EndTxn": 1, "sleeps": 0}
    assert not find_more_steps({"EndTxn": 1}, known)
    assert "EndTxn: 2, recorded 1" in find_more_steps({"EndTxn": 2}, known)
    assert "EndTxn: 0, recorded 1" in find_more_steps({}, known)
