"""`approx_distinct`: its error, and that nothing but the set of values matters."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcluster import Job, Session, approx_distinct
from fcluster.common.errors import JobError
from fcluster.engine.values import decode_value, encode_values
from fcluster.graph.sketches import RECENT_MAX
from fcluster.testing import Driver

COUNT = approx_distinct()
STANDARD_ERROR = 0.0109


def stored(kept: Any) -> Any:
    """What is kept, after it was encoded as state."""
    return decode_value(encode_values([kept])[0])


def kept_of(values: Any, every: int = 0) -> Any:
    """What is kept for these values. It is encoded and decoded after each `every` of them."""
    kept = COUNT.init()
    for number, value in enumerate(values, 1):
        kept = COUNT.add(kept, value)
        if every and number % every == 0:
            kept = stored(kept)
    return kept


def merged(kept: Any, later: Any) -> Any:
    assert COUNT.merge is not None
    return COUNT.merge(kept, later)


@pytest.mark.parametrize("number", [1, 2, RECENT_MAX - 1, RECENT_MAX])
def test_few_values_are_counted_exactly(number: int) -> None:
    values = [{"visitor": one % number} for one in range(3 * number)]
    assert COUNT.result(kept_of(values)) == number
    assert COUNT.result(merged(kept_of(values[::2]), kept_of(values[1::2]))) == number


@pytest.mark.parametrize("number", [257, 300, 1_000, 4_000, 50_000])
def test_error_is_within_three_standard_errors(number: int) -> None:
    kept = kept_of(f"visitor {one}" for one in range(number))
    assert COUNT.result(kept) == pytest.approx(number, rel=3 * STANDARD_ERROR)
    assert len(encode_values([kept])[0]) < 9_000


def test_errors_of_many_windows_have_the_promised_spread() -> None:
    errors = [
        COUNT.result(kept_of(range(start, start + 2_000))) / 2_000 - 1 for start in range(0, 40_000, 2_000)
    ]
    assert sum(error * error for error in errors) / len(errors) < (1.5 * STANDARD_ERROR) ** 2
    assert abs(sum(errors) / len(errors)) < STANDARD_ERROR


@settings(max_examples=25, deadline=None)
@given(st.integers(200, 1_500), st.integers(1, 700), st.randoms(use_true_random=False), st.integers(0, 300))
def test_only_the_set_of_values_matters(number: int, cut: int, random: Any, every: int) -> None:
    values = list(range(number))
    plain = COUNT.result(kept_of(values))
    again = [*values, *random.sample(values, 100)]
    random.shuffle(again)
    assert COUNT.result(kept_of(again, every)) == plain
    parts = kept_of(again[:cut], every), kept_of(again[cut:], every)
    assert COUNT.result(merged(*map(stored, parts))) == plain
    assert COUNT.result(stored(merged(*reversed(parts)))) == plain
    more = merged(merged(stored(parts[0]), stored(parts[1])), kept_of(values[:50]))
    assert COUNT.result(more) == plain


def test_a_merged_window_goes_on() -> None:
    kept = merged(kept_of(range(600)), kept_of(range(400, 1_000)))
    for value in range(1_000, 1_500):
        kept = COUNT.add(kept, value)
    assert COUNT.result(kept) == COUNT.result(kept_of(range(1_500)))


def test_values_are_the_same_if_their_json_is() -> None:
    assert COUNT.result(kept_of([1, 1.0, "1", {"a": 1, "b": 2}, {"b": 2, "a": 1}, None])) == 5


def sessions() -> Job:
    job = Job("j")
    stream = job.stream(job.topic("in"))
    windows = stream.window(Session(timedelta(seconds=10), grace=timedelta(minutes=1)), name="visits")
    windows.aggregate(n=approx_distinct(lambda value: value["page"])).to(job.topic("out"))
    return job


@pytest.mark.parametrize("crashes", [False, True])
def test_sessions_that_become_one_have_the_same_number_whatever_crashes(crashes: bool) -> None:
    with Driver(sessions(), partitions=1, auto_barrier=False) as driver:
        for number in range(600):
            second = (0, 15)[number % 2]  # two sessions, until the last record
            driver.send("in", {"page": number}, key="k", timestamp=1_000_000 + second * 1_000)
            if number % 90 == 0:
                driver.barrier()
            if crashes and number % 70 == 0:
                driver.crash()
        driver.send("in", {"page": 0}, key="k", timestamp=1_007_000)
        driver.finish()
        (result,) = driver.read_values("out")
    assert result["n"] == COUNT.result(kept_of(range(600)))


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketches", None)
    with pytest.raises(
        JobError, match="needs the library Apache DataSketches, which can't be imported here"
    ) as refused:
        approx_distinct()
    assert "pip install 'fcluster[sketches]'" in refused.value.remedy


def test_a_field_name_is_refused() -> None:
    with pytest.raises(JobError, match="not a function"):
        approx_distinct("page")  # type: ignore[arg-type]


def test_groups_of_a_table_refuse_it() -> None:
    job = Job("j")
    groups = job.table(job.topic("rows")).group_by("at", name="places")
    with pytest.raises(JobError, match="can't be taken away"):
        groups.aggregate(n=approx_distinct())
