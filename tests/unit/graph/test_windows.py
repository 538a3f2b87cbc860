"""Which windows a timestamp is in, and which declarations are refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster import Cumulative, Hopping, Tumbling
from fcluster.common.errors import JobError

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
MS = timedelta(milliseconds=1)


def ms(text: str, zone: str = "UTC") -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def windows_of(windows: Any, timestamp_ms: int) -> list[tuple[int, int]]:
    """Start and end of each window that the timestamp is in."""
    start_of = windows.start_of()
    return [(start_of(end), end) for end in windows.ends_of()(timestamp_ms)]


def test_tumbling_windows_follow_one_another() -> None:
    minute = Tumbling(timedelta(minutes=1))
    assert windows_of(minute, 59_999) == [(0, 60_000)]
    assert windows_of(minute, 60_000) == [(60_000, 120_000)]


def test_tumbling_windows_begin_at_their_offset() -> None:
    quarter_past = Tumbling(HOUR, offset=timedelta(minutes=15))
    assert windows_of(quarter_past, ms("2026-03-01T10:14:59")) == [
        (ms("2026-03-01T09:15:00"), ms("2026-03-01T10:15:00"))
    ]
    assert windows_of(quarter_past, 0) == [(-2_700_000, 900_000)]


def test_hopping_windows_overlap_and_are_in_the_order_of_their_ends() -> None:
    windows = Hopping(10 * MS, 5 * MS)
    assert windows_of(windows, 3) == [(0, 10)]  # no window begins before 1970
    assert windows_of(windows, 5) == [(0, 10), (5, 15)]
    assert windows_of(windows, 14) == [(5, 15), (10, 20)]
    assert windows_of(Hopping(10 * MS, 4 * MS, offset=2 * MS), 21) == [(14, 24), (18, 28)]


def test_cumulative_windows_begin_together_and_grow() -> None:
    windows = Cumulative(15 * MS, 5 * MS)
    assert windows_of(windows, 0) == [(0, 5), (0, 10), (0, 15)]
    assert windows_of(windows, 7) == [(0, 10), (0, 15)]
    assert windows_of(windows, 14) == [(0, 15)]
    assert windows_of(windows, 15) == [(15, 20), (15, 25), (15, 30)]
    assert windows_of(Cumulative(10 * MS, 5 * MS, offset=3 * MS), 9) == [(3, 13)]


def test_cumulative_windows_of_a_day_in_berlin_follow_its_hours() -> None:
    windows = Cumulative(DAY, HOUR, timezone="Europe/Berlin")
    for day, next_day, hours in [("2026-03-29", "2026-03-30", 23), ("2026-10-25", "2026-10-26", 25)]:
        start, end = ms(f"{day}T00:00", "Europe/Berlin"), ms(f"{next_day}T00:00", "Europe/Berlin")
        found = windows_of(windows, start)
        assert found == [(start, start + hour * 3_600_000) for hour in range(1, hours + 1)]
        assert windows_of(windows, end - 1) == [(start, end)]
    quarters = Cumulative(DAY, 6 * HOUR, timezone="Europe/Berlin")
    hours_of = [(end - start) // 3_600_000 for start, end in windows_of(quarters, ms("2026-03-29T00:30"))]
    assert hours_of == [6, 12, 18, 23]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 10 * MS, "every": 3 * MS}, "isn't a multiple of every"),
        ({"size": HOUR, "every": HOUR, "timezone": "Europe/Berlin"}, "isn't a number of days"),
        ({"size": DAY, "every": HOUR, "timezone": "Berlin"}, "timezone='Berlin' of Cumulative is unknown"),
        ({"size": DAY, "every": HOUR, "offset": DAY}, "offset="),
        ({"size": DAY, "every": 5}, "every=5 of Cumulative is not a timedelta"),
    ],
)
def test_cumulative_windows_that_cannot_work_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        Cumulative(**arguments)


def test_day_in_berlin_has_23_or_25_hours_when_clocks_are_changed() -> None:
    days = Tumbling(DAY, timezone="Europe/Berlin")
    for day, next_day, hours in [
        ("2026-01-15", "2026-01-16", 24),
        ("2026-03-29", "2026-03-30", 23),
        ("2026-10-25", "2026-10-26", 25),
    ]:
        start, end = ms(f"{day}T00:00", "Europe/Berlin"), ms(f"{next_day}T00:00", "Europe/Berlin")
        assert end - start == hours * 3_600_000
        for at in (start, start + 1, (start + end) // 2, end - 1):
            assert windows_of(days, at) == [(start, end)]
        assert windows_of(days, end)[0][0] == end
        assert windows_of(days, start - 1)[0][1] == start


def test_days_may_begin_at_another_hour_and_be_several() -> None:
    shifts = Tumbling(2 * DAY, offset=timedelta(hours=6), timezone="America/New_York")
    ((start, end),) = windows_of(shifts, ms("2026-03-07T12:00", "America/New_York"))
    begin = datetime.fromtimestamp(start / 1000, ZoneInfo("America/New_York"))
    assert (begin.hour, begin.minute) == (6, 0)
    assert (datetime.fromtimestamp(end / 1000, begin.tzinfo).hour, (end - start) // 3_600_000) == (6, 47)


@given(
    st.integers(0, 4_000_000_000_000),
    st.sampled_from(["Europe/Berlin", "America/Santiago", "Asia/Beirut", "Australia/Lord_Howe", "UTC"]),
    st.integers(1, 3),
    st.integers(0, 23),
)
def test_windows_of_days_leave_no_gap(at: int, zone: str, days: int, hour: int) -> None:
    windows = Tumbling(days * DAY, offset=hour * HOUR, timezone=zone)
    ends_of, start_of = windows.ends_of(), windows.start_of()
    (end,) = ends_of(at)
    start = start_of(end)
    assert start <= at < end
    assert ends_of(end - 1) == ends_of(start) == (end,)
    assert start_of(ends_of(end)[0]) == end
    assert abs(end - start - days * 86_400_000) <= 7_200_000


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 60), st.integers(0, 60))
def test_hopping_windows_equal_those_found_by_counting(at: int, size: int, every: int, offset: int) -> None:
    every = min(every, size)
    offset %= every
    windows = Hopping(size * MS, every * MS, offset=offset * MS)
    starts = [start for start in range(offset, at + 1, every) if start <= at < start + size]
    assert windows_of(windows, at) == [(start, start + size) for start in starts]


def test_window_with_an_offset_is_the_same_for_all_its_timestamps() -> None:
    whole = Tumbling(DAY)
    assert windows_of(whole, ms("2026-05-01T23:59:59.999"))[0][1] == ms("2026-05-02T00:00")
    assert datetime.fromtimestamp(windows_of(whole, 0)[0][0] / 1000, UTC).year == 1970


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tumbling(60_000), "size=60000 of Tumbling is not a timedelta"),  # type: ignore[arg-type]
        (lambda: Tumbling(timedelta()), "size=.* of Tumbling is out of range"),
        (lambda: Tumbling(-HOUR), "size=.* of Tumbling is out of range"),
        (lambda: Tumbling(HOUR, grace=-MS), "grace=.* of Tumbling is out of range"),
        (lambda: Tumbling(timedelta(microseconds=1_500)), "not a whole number of milliseconds"),
        (lambda: Tumbling(HOUR, offset=HOUR), "offset=.* is not less than size"),
        (lambda: Tumbling(DAY, timezone="Europe/Berln"), "timezone='Europe/Berln' of Tumbling is unknown"),
        (lambda: Tumbling(DAY, timezone=2), "timezone=2 of Tumbling is unknown"),  # type: ignore[arg-type]
        (lambda: Tumbling(HOUR, timezone="Europe/Berlin"), "isn't a number of days"),
        (lambda: Hopping(HOUR, 2 * HOUR), "records between two windows would be in none"),
        (lambda: Hopping(HOUR, timedelta()), "every=.* of Hopping is out of range"),
        (lambda: Hopping(DAY, HOUR, offset=2 * HOUR), "offset=.* is not less than every"),
    ],
)
def test_impossible_windows_are_refused_with_a_remedy(make: Any, message: str) -> None:
    with pytest.raises(JobError, match=message) as refused:
        make()
    assert refused.value.remedy
