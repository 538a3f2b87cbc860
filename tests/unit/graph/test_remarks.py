"""What `fcluster check` says of a job that does what its file says, but perhaps not what is meant."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Job, Session, Stream, Tumbling, count, last, max_, sum_
from fcluster.common.settings import Settings
from fcluster.graph.remarks import remarks_on

TEN = timedelta(milliseconds=10)


def remarks(
    behind: Callable[[Stream[Any, Any]], None], emit: Any = "update", windows: Any = None
) -> list[str]:
    """What is said of a job with these steps behind a window "w"."""
    job = Job("j")
    windowed = job.stream(job.topic("in")).window(windows or Tumbling(TEN), name="w", emit=emit)
    behind(windowed.aggregate(n=count()))
    return [remark.message for remark in remarks_on(job.build(Settings()))]


def total(stream: Stream[Any, Any]) -> None:
    table = stream.aggregate(total=sum_(lambda result: result["n"]), name="total")
    table_is_used(stream, table)


def table_is_used(_stream: Any, table: Any) -> None:
    table.to_stream().to("out")


def by_key(stream: Stream[Any, Any]) -> Stream[Any, Any]:
    return stream.map(lambda result: result).key_by("key", name="by-key")


@pytest.mark.parametrize("emit", ["update", TEN])
def test_running_aggregate_of_results_that_are_passed_on_early_is_named(emit: Any) -> None:
    (told,) = remarks(lambda stream: total(by_key(stream)), emit)
    when = "after each record" if emit == "update" else "at intervals"
    assert told == (
        f"The running aggregate 'total' adds up results of the window 'w', which are passed on {when}: "
        "former results of a window count besides the newest one."
    )


def test_withdrawn_results_of_sessions_are_named() -> None:
    (told,) = remarks(lambda stream: total(by_key(stream)), windows=Session(TEN))
    assert told.endswith("count besides the newest one, and those that are withdrawn.")


def test_count_reduce_and_a_further_window_are_named() -> None:
    def counted(stream: Stream[Any, Any]) -> None:
        table_is_used(stream, by_key(stream).count(name="counted"))

    def reduced(stream: Stream[Any, Any]) -> None:
        table_is_used(stream, by_key(stream).reduce(lambda a, b: a, name="reduced"))

    def windowed(stream: Stream[Any, Any]) -> None:
        window = by_key(stream).window(Tumbling(TEN), name="further")
        window.aggregate(n=sum_(lambda result: result["n"])).to("out")

    for behind, name in ((counted, "counted"), (reduced, "reduced"), (windowed, "further")):
        (told,) = remarks(behind)
        assert repr(name) in told


def test_nothing_is_said_where_each_window_counts_once_or_somebody_has_taken_care() -> None:
    def filtered(stream: Stream[Any, Any]) -> None:
        total(by_key(stream.filter(lambda result: result["n"] == 100)))

    def handled(stream: Stream[Any, Any]) -> None:
        total(by_key(stream.process(lambda ctx, result: result, name="h")))

    def newest(stream: Stream[Any, Any]) -> None:
        table = by_key(stream).aggregate(n=last(), most=max_(lambda result: result["n"]), name="newest")
        table_is_used(stream, table)

    def grouped(stream: Stream[Any, Any]) -> None:
        table = by_key(stream).table(name="results")
        table_is_used(stream, table.group_by("key", name="groups").aggregate(n=sum_(lambda row: row["n"])))

    assert remarks(lambda stream: total(by_key(stream)), "close") == []
    for behind in (filtered, handled, newest, grouped, lambda stream: stream.to("out")):
        assert remarks(behind) == []


@pytest.mark.parametrize("emit", ["update", TEN])
def test_parts_of_windows_of_all_records_may_be_added_up_but_not_their_results(emit: Any) -> None:
    def told(behind: Callable[[Stream[Any, Any]], None]) -> list[str]:
        job = Job("j")
        windowed = job.stream(job.topic("in")).window_all(Tumbling(TEN), name="w", emit=emit)
        behind(windowed.aggregate(n=count()))
        return [remark.message for remark in remarks_on(job.build(Settings()))]

    assert told(lambda results: results.to("out")) == []
    (message,) = told(lambda results: total(results.key_by(lambda _result: "all", name="all")))
    assert "The running aggregate 'total' adds up results of the window 'w'" in message
