"""How durations are written in messages."""

from __future__ import annotations

from datetime import timedelta

import pytest

from fcluster import days, hours, milliseconds, minutes, seconds
from fcluster.graph.durations import shown


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (seconds(5), "5 s"),
        (seconds(90), "1 min 30 s"),
        (seconds(0), "0 s"),
        (-seconds(90), "-1 min 30 s"),
        (seconds(1.5), "1 s 500 ms"),
        (milliseconds(0.5), "500 us"),
        (days(1), "1 d"),
        (days(366 * 100) + hours(1) + minutes(2), "36600 d 1 h 2 min"),
        (timedelta.min, "-999999999 d"),
    ],
)
def test_duration_is_written_as_people_write_it(duration: timedelta, text: str) -> None:
    assert shown(duration) == text
