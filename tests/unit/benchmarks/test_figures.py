"""Schedules, percentiles, parts and ratios: the arithmetic behind all figures of the benchmarks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.figures import (
    Progress,
    Schedule,
    Spread,
    latency_figures,
    part_rates,
    percentile,
    ratios,
    reached_s,
    spreads,
)

MS = 1_000_000


# --- schedule -------------------------------------------------------------------------------------------


@given(
    st.floats(0.1, 1e6),
    st.integers(0, 10**15),
    st.integers(0, 10**11),
)
def test_number_of_due_records_follows_the_schedule(rate: float, start_ns: int, after_ns: int) -> None:
    schedule = Schedule(rate, start_ns)
    count = schedule.count_due(start_ns + after_ns)
    assert schedule.due_ns(count - 1) <= start_ns + after_ns < schedule.due_ns(count)


def test_nothing_is_due_before_the_start() -> None:
    assert Schedule(1000, 5_000).count_due(4_999) == 0
    assert Schedule(1000, 5_000).count_due(5_000) == 1


def test_stalled_writer_shows_in_latencies_from_the_schedule_and_not_in_those_from_writing() -> None:
    """Coordinated omission: 1,000 records a second for 2 s, each answered 1 ms after it is written. For 1 s
    the
    writer stalls, and everything with it."""
    schedule = Schedule(1000, 0)
    stall_begin_ns, stall_end_ns = 500 * MS, 1500 * MS
    from_schedule: list[int] = []
    from_writing: list[int] = []
    for number in range(2000):
        due_ns = schedule.due_ns(number)
        written_ns = stall_end_ns if stall_begin_ns <= due_ns < stall_end_ns else due_ns
        seen_ns = written_ns + 1 * MS
        from_schedule.append(seen_ns - due_ns)
        from_writing.append(seen_ns - written_ns)
    assert latency_figures(from_writing)["p99_ms"] == 1.0
    figures = latency_figures(from_schedule)
    # Half of the records were due during that second. Each waited for the rest of it.
    assert figures["p99_ms"] == pytest.approx(981, abs=2)
    assert figures["median_ms"] == pytest.approx(1, abs=1)
    assert figures["max_ms"] == pytest.approx(1001)


# --- percentiles ------------------------------------------------------------------------------------------


def test_percentiles_by_hand() -> None:
    ordered = [float(value) for value in range(1, 101)]
    assert [percentile(ordered, share) for share in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert percentile([7.0], 0.999) == 7
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2
    assert percentile([1.0, 2.0], 0.5) == 1


@given(st.lists(st.integers(0, 1000), min_size=1), st.floats(0.001, 1.0))
def test_percentile_is_the_smallest_value_that_enough_values_do_not_exceed(
    values: list[int], share: float
) -> None:
    found = percentile(sorted(values), share)

    def enough(value: float) -> bool:
        # Computed like in the function: 0.1 * 30 is a little more than 3.
        return sum(one <= value for one in values) >= share * len(values)

    assert found in values
    assert enough(found)
    assert not any(enough(value) for value in values if value < found)


def test_figures_of_latencies_are_in_milliseconds_and_have_the_prefix() -> None:
    figures = latency_figures([2 * MS, 1 * MS, 3 * MS], "committed_")
    assert figures == {
        "committed_median_ms": 2.0,
        "committed_p90_ms": 3.0,
        "committed_p99_ms": 3.0,
        "committed_p999_ms": 3.0,
        "committed_max_ms": 3.0,
    }


def test_latencies_of_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match="no record"):
        latency_figures([])


# --- parts of a drain -----------------------------------------------------------------------------------


def test_time_between_two_samples_is_interpolated() -> None:
    progress = [Progress(10.0, 0), Progress(11.0, 100), Progress(13.0, 300)]
    assert reached_s(progress, 0) == 10.0
    assert reached_s(progress, 50) == 10.5
    assert reached_s(progress, 100) == 11.0
    assert reached_s(progress, 250) == 12.5
    assert reached_s(progress, 300) == 13.0


def test_halves_have_their_own_rates() -> None:
    progress = [Progress(0.0, 0), Progress(1.0, 500), Progress(5.0, 1000)]
    assert part_rates(progress, 500, 0) == {"first_part_rate": 500.0, "second_part_rate": 125.0}


def test_a_part_of_too_few_records_has_no_rate() -> None:
    progress = [Progress(0.0, 0), Progress(1.0, 500), Progress(5.0, 1000)]
    assert part_rates(progress, 100, 200) == {"second_part_rate": pytest.approx(900 / 4.8)}
    assert part_rates(progress, 1000, 0) == {}
    assert part_rates(progress, 2000, 0) == {}


# --- rounds ---------------------------------------------------------------------------------------------


def test_spread_over_rounds() -> None:
    assert spreads([{"rate": 3.0}, {"rate": 1.0, "cpu_s": 5.0}, {"rate": 2.0}]) == {
        "rate": Spread(2.0, 1.0, 3.0),
        "cpu_s": Spread(5.0, 5.0, 5.0),
    }


def test_ratios_are_computed_within_each_round() -> None:
    """Twice as fast in each round, although the machine was four times slower in one of them."""
    ours = {1: {"rate": 200.0}, 2: {"rate": 50.0}, 3: {"rate": 220.0}}
    others = {1: {"rate": 100.0}, 2: {"rate": 25.0}, 3: {"rate": 100.0}}
    assert ratios(ours, others) == {"rate": Spread(2.0, 2.0, 2.2)}


def test_ratios_leave_out_what_one_side_lacks() -> None:
    ours = {1: {"rate": 200.0, "coordinator_cpu_s": 1.0}, 2: {"rate": 100.0}}
    others = {1: {"rate": 100.0, "broker_cpu_s": 0.0}, 3: {"rate": 1.0}}
    assert ratios(ours, others) == {"rate": Spread(2.0, 2.0, 2.0)}
    assert ratios({1: {"cpu_s": 1.0}}, {1: {"cpu_s": 0.0}}) == {}
