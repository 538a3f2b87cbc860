"""What a worker logs about shards that wait for global tables."""

from __future__ import annotations

import logging

import pytest

from fcluster.common.ids import ShardId
from fcluster.worker.table_waits import AGAIN_MS, LONG_MS, TableWaits
from tests.unit.worker.test_global_tables import COPY, Bench, mark, row


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged since the last call."""
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "fcluster.worker")
    return caplog


def test_it_is_logged_how_long_shards_have_read_their_global_tables(caplog: pytest.LogCaptureFixture) -> None:
    waits, first, second = TableWaits(), Bench("calls"), Bench("calls", partition=1)
    runners = [first.runner, second.runner, Bench("rates").runner]
    waits.look(runners, 1_000)
    first.read(row(0, COPY), mark(1, b"0/2/7"))
    waits.look(runners, 2_000)
    assert lines(caplog) == []
    assert waits.shards == [ShardId("calls", 0), ShardId("calls", 1)]
    first.read(mark(2, b"1/2/7"))
    waits.look(runners, 3_500)
    assert lines(caplog) == ["1 shards have read their global tables, after 2.5 s"]
    assert waits.shards == [ShardId("calls", 1)]
    waits.look(runners, 4_000)
    assert lines(caplog) == []


def test_shards_that_wait_long_are_named_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    waits = TableWaits()
    runners = [Bench("calls", partition).runner for partition in range(8)]
    waits.look(runners, 0)
    waits.look(runners, LONG_MS - 1)
    assert lines(caplog) == []
    waits.look(runners, LONG_MS)
    (line,) = lines(caplog)
    assert line.startswith("calls/0, calls/1, calls/2, calls/3, calls/4, 3 more process no records for 15 s")
    assert "they wait until all rows of the global tables 'rates' are there" in line
    waits.look(runners, LONG_MS + AGAIN_MS - 1)
    assert lines(caplog) == []
    waits.look(runners, LONG_MS + AGAIN_MS)
    assert len(lines(caplog)) == 1


def test_shards_that_are_no_longer_read_are_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    waits, bench = TableWaits(), Bench("calls")
    waits.look([bench.runner], 0)
    waits.look([], 1)
    waits.look([], LONG_MS * 2)
    assert lines(caplog) == []
