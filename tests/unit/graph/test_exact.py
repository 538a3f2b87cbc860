"""Sums from which numbers are taken away again, as if they had never been there."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster import Aggregate, Job, mean, sum_, variance
from fcluster.engine.values import decode_value, encode_values
from fcluster.graph.exact import exact, rounded, shifted
from fcluster.testing import Driver

numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.sampled_from([1e17, -1e17, 1e-300, 0.1, -0.0, 3.0]),
    st.integers(-(10**20), 10**20),
)
came_and_left = st.lists(st.tuples(numbers, st.booleans()), max_size=12)


def stored(kept: Any) -> Any:
    """As it comes back from the store."""
    return decode_value(encode_values([kept])[0])


def result_of(aggregate: Aggregate[Any], rows: list[tuple[Any, bool]]) -> Any:
    changing = aggregate.for_groups
    assert changing is not None
    assert changing.subtract is not None
    kept = changing.init()
    for number, _leaves in rows:
        kept = stored(changing.add(kept, number))
    for number, leaves in rows:
        if leaves:
            kept = stored(changing.subtract(kept, number))
    return changing.result(kept)


@given(came_and_left)
def test_groups_compute_what_is_left_and_round_once(rows: list[tuple[Any, bool]]) -> None:
    left = [Fraction(number) for number, leaves in rows if not leaves]
    total, squares = sum(left), sum(one * one for one in left)
    of_ints = all(isinstance(number, int) for number, _leaves in rows)
    assert result_of(sum_(), rows) == (int(total) if of_ints else float(total))
    if not left:
        assert result_of(mean(), rows) is result_of(variance(), rows) is None
        return
    assert result_of(mean(), rows) == float(total / len(left))
    spread = squares / len(left) - (total / len(left)) ** 2
    assert result_of(variance(), rows) == float(spread)
    of_sample = None if len(left) == 1 else float(spread * len(left) / (len(left) - 1))
    assert result_of(variance(sample=True), rows) == of_sample


@given(came_and_left)
def test_what_is_kept_depends_only_on_what_is_left(rows: list[tuple[Any, bool]]) -> None:
    kept: Any = 0.0
    for number, leaves in rows:
        kept = shifted(kept, number, 1)
        if leaves:
            kept = shifted(kept, number, -1)
    alone: Any = 0.0
    for number, leaves in reversed(rows):
        alone = alone if leaves else shifted(alone, number, 1)
    assert exact(kept) == exact(shifted(shifted(alone, 0.5, 1), 0.5, -1))


def test_sum_of_ints_is_an_int_with_all_digits() -> None:
    assert result_of(sum_(), [(10**30, False), (1, False), (5, True)]) == 10**30 + 1
    assert type(result_of(sum_(), [(1, False), (0.5, True)])) is float


def test_sum_of_floats_that_an_older_version_has_kept_goes_on() -> None:
    kept = shifted(0.75, 0.5, 1)
    assert rounded(json.loads(json.dumps(kept))) == 1.25
    assert rounded(shifted(kept, 1.25, -1)) == 0.0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(number: float) -> None:
    with pytest.raises((ValueError, OverflowError)):
        shifted(0, number, 1)


def test_row_with_a_huge_amount_leaves_nothing_behind() -> None:
    job = Job("j")
    accounts = job.table(job.topic("accounts"))
    groups = accounts.group_by("branch", name="g").aggregate(
        total=sum_(lambda row: row["cents"]),
        mean=mean(lambda row: row["cents"]),
        spread=variance(lambda row: row["cents"]),
    )
    groups.to_stream().to("out")
    with Driver(job) as driver:
        for key, cents in (("a", 1e17), ("b", 3.0), ("c", 0.1)):
            driver.send("accounts", {"branch": "north", "cents": cents}, key=key)
        driver.send("accounts", None, key="a")
        driver.send("accounts", None, key="c")
        assert driver.table(groups) == {"north": {"total": 3.0, "mean": 3.0, "spread": 0.0}}
        driver.send("accounts", None, key="b")
        assert driver.table(groups) == {"north": {"total": 0.0, "mean": None, "spread": None}}
