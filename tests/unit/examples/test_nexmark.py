"""The queries of Nexmark in the driver, compared with DuckDB: crashes change nothing."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import pytest

from examples.nexmark.generator import AUCTIONS, BIDS, FIRST_ID, OF, PERSONS, Generator
from examples.nexmark.recount import QUERIES, Recount
from fcluster import Job
from fcluster.api.loader import load_job
from fcluster.common.settings import Settings
from fcluster.testing import Driver
from tests.nexmark_events import DIRECTORY, Arrivals, side_records

PREFIX = "nexmark-"
PARTITIONS = 3


@cache
def arrivals(seed: int) -> Arrivals:
    return Arrivals(PARTITIONS, seed=seed)


@cache
def recount(seed: int) -> Recount:
    return arrivals(seed).recount()


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loading a job adds its directory to the import path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for file in DIRECTORY.glob("*.py"):
        sys.modules.pop(file.stem, None)


def file_of(query: str) -> Path:
    return DIRECTORY / f"q{int(query[1:]):02}.py"


def written(job: Job, query: str, seed: int) -> list[dict[str, Any]]:
    """What the job writes. A barrier or a crash comes after up to 60 events; time passes between some."""
    chance = random.Random(seed)
    with Driver(job, partitions=PARTITIONS, auto_barrier=False) as driver:
        sources = {source.name for source in driver.topology.sources}
        if f"{PREFIX}side-inputs" in sources:
            for key, value in side_records():
                driver.send_raw(f"{PREFIX}side-inputs", value, key=key, timestamp=1)
            driver.settle()
        left = 0
        for kind, partition, value in arrivals(seed).arrivals:
            if f"{PREFIX}{kind}" not in sources:
                continue
            if left == 0:
                left = chance.randrange(60)
                driver.crash() if chance.randrange(3) == 0 else driver.barrier()
                if chance.randrange(3) == 0:
                    # Bids that have arrived are counted: a replay doesn't count them in a later window.
                    driver.settle()
                    driver.advance(by_ms=chance.randrange(8_000))
            left -= 1
            if kind == "bids":
                value["arrived"] = driver.now_ms
            driver.send_raw(f"{PREFIX}{kind}", orjson.dumps(value), partition=partition)
        driver.settle()
        driver.advance(by_ms=10_000)
        driver.settle()
        assert driver.late == 0
        return driver.read_values(f"{PREFIX}{query}")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("query", QUERIES)
def test_query_gives_what_duckdb_gives(query: str, seed: int) -> None:
    rows = written(load_job(str(file_of(query))), query, seed)
    # The bids of q12 arrive while it runs, so DuckDB can't know them before.
    expected = arrivals(seed).recount() if query == "q12" else recount(seed)
    assert expected.rows(query)
    assert expected.differences(query, rows) == []


WRONG = {
    "q0": ("bids(job)", "bids(job).filter(lambda bid: bid.auction % 7)"),
    "q1": ("* 908", "* 909"),
    "q2": ("1007, ", ""),
    "q3": ('setdefault("waiting", [])', 'setdefault("lost", [])'),
    "q4": ('ctx.state["auctions"]}', '(ctx.state["auctions"] + 1)}'),
    "q5": ("seconds(10)", "seconds(12)"),
    "q6": ("AUCTIONS = 10", "AUCTIONS = 9"),
    "q7": ("SIZE = seconds(10)", "SIZE = seconds(5)"),
    "q8": ("seconds(10)", "seconds(30)"),
    "q9": ('winning_bids(job, "q9")', 'winning_bids(job, "q9").filter(lambda won: won["price"] % 9)'),
    "q11": ("seconds(10)", "seconds(9.8)"),
    "q12": ("seconds(10)", "seconds(9)"),
    "q13": ("% ROWS", "// 2 % ROWS"),
    "q14": ("8 <= hour", "7 <= hour"),
    "q15": ('name="q15-days"', 'name="q15-days", emit="update"'),
    "q16": ("max_(minute_of_day)", "max_(lambda bid: minute_of_day(bid)[:4])"),
    "q17": ("mean(price)", "mean(lambda bid: bid.price + 1)"),
    "q18": ("[bid.date_time, -bid.price]", "[-bid.price, bid.date_time]"),
    "q19": ("PLACES = 10", "PLACES = 9"),
    "q20": ("category == 10", "category in (10, 11)"),
    "q21": ("bid.channel.lower()", "bid.channel"),
    "q22": ("dir1, dir2, dir3, *_", "dir2, dir1, dir3, *_"),
}


def test_each_query_has_a_wrong_variant() -> None:
    assert list(WRONG) == list(QUERIES)


@pytest.mark.parametrize("query", QUERIES)
def test_wrong_query_is_found(query: str, tmp_path: Path) -> None:
    right, wrong = WRONG[query]
    text = file_of(query).read_text(encoding="utf-8")
    assert right in text
    changed = tmp_path / f"wrong_{query}.py"
    changed.write_text(text.replace(right, wrong, 1), encoding="utf-8")
    sys.path.insert(0, str(DIRECTORY))
    rows = written(load_job(str(changed)), query, 1)
    expected = arrivals(1).recount() if query == "q12" else recount(1)
    assert expected.differences(query, rows) != []


@pytest.mark.parametrize("query", QUERIES)
def test_lost_and_repeated_results_are_found(query: str) -> None:
    rows = recount(1).rows(query)
    if query == "q12":
        rows = [{"bidder": 1, "end": 10_000, "bids": 1}]
        expected = Recount([], [], [{"bidder": 1, "arrived": 5}], {}, 0)
    else:
        expected = recount(1)
    assert expected.differences(query, rows) == []
    assert len(expected.differences(query, rows[1:])) == 1
    if QUERIES[query].key is None:
        assert len(expected.differences(query, [*rows, rows[-1]])) == 1


def test_wrong_winner_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    job = load_job(str(file_of("q9")))
    winning = sys.modules["winning"]
    keep_better = winning.consider

    def ignore_the_end(state: dict[str, Any], price: int, date_time: int, bidder: int) -> None:
        keep_better(state, price, min(date_time, state["auction"]["expires"]), bidder)

    monkeypatch.setattr(winning, "consider", ignore_the_end)
    assert recount(1).differences("q9", written(job, "q9", 1)) != []


def test_several_queries_run_in_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXMARK_QUERIES", ",".join(QUERIES))
    topology = load_job(str(DIRECTORY / "together.py")).build(Settings())
    assert {topic.name for topic in topology.topics} >= {f"{PREFIX}{query}" for query in QUERIES}


def test_events_come_in_the_published_proportions() -> None:
    events = list(Generator(gap_ms=20).events(20 * OF * 10))
    kinds = Counter(event.kind for event in events)
    assert kinds == {"persons": 200 * PERSONS, "auctions": 200 * AUCTIONS, "bids": 200 * BIDS}
    times = [event.value["date_time"] for event in events]
    assert times == sorted(times)
    for kind in ("persons", "auctions"):
        ids = [event.value["id"] for event in events if event.kind == kind]
        assert ids == list(range(FIRST_ID, FIRST_ID + len(ids)))
    bids = [event.value for event in events if event.kind == "bids"]
    hot_auctions = sum(bid["auction"] % 100 == 0 for bid in bids)
    hot_bidders = sum(bid["bidder"] % 100 == 1 for bid in bids)
    assert 0.5 < hot_auctions / len(bids) < 0.54
    assert 0.74 < hot_bidders / len(bids) < 0.78
    assert 0.48 < sum(not bid["channel"].startswith("channel-") for bid in bids) / len(bids) < 0.52
    assert 100 <= min(bid["price"] for bid in bids) < max(bid["price"] for bid in bids) <= 10**8


def test_an_event_depends_on_its_number_and_the_seed_alone() -> None:
    events = list(Generator().events(200))
    assert list(Generator().events(50, first=150)) == events[150:]
    assert list(Generator(seed=2).events(200)) != events
