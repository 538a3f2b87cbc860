"""Sums, means and variances of Decimals are exact, whatever the order of the numbers."""

from __future__ import annotations

import decimal
from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster import Aggregate, mean, sum_, variance
from fcluster.engine.values import decode_value, encode_values
from fcluster.graph.decimals import DIGITS

amounts = st.one_of(
    st.decimals(-(10**6), 10**6, places=2),
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**60), max_value=10**60),
    st.sampled_from(
        list(map(Decimal, ("1E+30", "1E-30", "-0.00", "0.10", "1E+3", "9." + 60 * "9", "1E-400")))
    ),
)
few = st.lists(amounts, min_size=1, max_size=10)


def stored(kept: Any) -> Any:
    return decode_value(encode_values([kept])[0])


def kept_of(aggregate: Aggregate[Any], numbers: Sequence[Any]) -> Any:
    kept = aggregate.init()
    for number in numbers:
        kept = stored(aggregate.add(kept, number))
    return kept


def group_of(aggregate: Aggregate[Any], numbers: Sequence[Any], gone: Sequence[Any] = ()) -> Any:
    changing = aggregate.for_groups
    assert changing is not None
    assert changing.subtract is not None
    kept = kept_of(changing, numbers)
    for number in gone:
        kept = stored(changing.subtract(kept, number))
    return kept


def places_of(number: Decimal) -> int:
    return max(0, -int(number.as_tuple().exponent))


def nearest(number: Fraction, digits: int = DIGITS) -> Decimal:
    return decimal.Context(prec=digits).divide(Decimal(number.numerator), Decimal(number.denominator))


@given(few, st.randoms(use_true_random=False))
def test_sum_is_exact_in_any_order_and_has_the_places_of_the_numbers(
    numbers: list[Decimal], chance: Any
) -> None:
    shuffled, at = chance.sample(numbers, len(numbers)), chance.randrange(len(numbers) + 1)
    aggregate = sum_()
    merge, changing = aggregate.merge, aggregate.for_groups
    assert merge is not None
    assert changing is not None
    kept = [
        kept_of(aggregate, numbers),
        kept_of(aggregate, shuffled),
        merge(kept_of(aggregate, numbers[:at]), kept_of(aggregate, numbers[at:])),
        *(changing.result(group_of(aggregate, one)) for one in (numbers, shuffled)),
    ]
    for found in kept:
        assert type(found) is Decimal
        assert Fraction(found) == sum(map(Fraction, numbers))
        assert places_of(found) == max(map(places_of, numbers))
    assert len({repr(found) for found in kept}) == 1


@given(few, st.lists(amounts, max_size=5), st.randoms(use_true_random=False))
def test_what_leaves_a_group_leaves_nothing(numbers: list[Decimal], gone: list[Decimal], chance: Any) -> None:
    for make in (sum_, mean, variance):
        came = chance.sample([*numbers, *gone], len(numbers) + len(gone))
        assert encode_values([group_of(make(), came, gone)]) == encode_values([group_of(make(), numbers)])


def test_group_without_decimals_is_a_sum_of_ints_again() -> None:
    assert group_of(sum_(), [5, Decimal("1.25")], [Decimal("1.25")]) == 5
    assert group_of(mean(), [Decimal("1.25")], [Decimal("1.25")]) == [0, 0]


@given(few)
def test_mean_and_variance_are_rounded_once(numbers: list[Decimal]) -> None:
    exact = list(map(Fraction, numbers))
    total, number = sum(exact), len(exact)
    squares = sum(one * one for one in exact) / number - (total / number) ** 2
    digits = max(DIGITS, len(kept_of(sum_(), numbers).as_tuple().digits))
    spreads = [(variance(), squares)]
    if number > 1:
        spreads.append((variance(sample=True), squares * number / (number - 1)))
    for aggregate in (mean(), mean().for_groups):
        assert aggregate is not None
        found = aggregate.result(kept_of(aggregate, numbers))
        assert (type(found), found) == (Decimal, nearest(total / number, digits))
    for aggregate, expected in spreads:
        for one in (aggregate, aggregate.for_groups):
            assert one is not None
            found = one.result(kept_of(one, numbers))
            assert (type(found), found) == (Decimal, nearest(expected))


@given(few, few)
def test_merged_variances_equal_one_over_all(early: list[Decimal], later: list[Decimal]) -> None:
    aggregate = variance()
    assert aggregate.merge is not None
    merged = stored(aggregate.merge(kept_of(aggregate, early), kept_of(aggregate, later)))
    assert repr(merged) == repr(kept_of(aggregate, [*early, *later]))


def test_results_look_like_money() -> None:
    prices = [Decimal("3.30"), Decimal("1.10"), 2]
    assert str(sum_().result(kept_of(sum_(), prices))) == "6.40"
    assert str(mean().result(kept_of(mean(), [Decimal("3.00"), Decimal("1.00")]))) == "2.00"
    assert variance(sample=True).result(kept_of(variance(sample=True), [Decimal(1)])) is None


def test_context_of_the_thread_changes_nothing() -> None:
    with decimal.localcontext(prec=2, traps=[decimal.Inexact]):
        assert kept_of(sum_(), [Decimal("123.45"), Decimal("0.01")]) == Decimal("123.46")
        assert mean().result(kept_of(mean(), [Decimal("123.45"), Decimal("0.02")])) == Decimal("61.735")


@pytest.mark.parametrize("make", [sum_, mean, variance])
@pytest.mark.parametrize("of_group", [False, True])
def test_decimals_and_floats_are_not_mixed(make: Any, of_group: bool) -> None:
    aggregate = make().for_groups if of_group else make()
    # What `variance` keeps of numbers doesn't say whether they were floats.
    said = r"^Decimals and (float values can't be .*Decimal\(str\(number\)\)|other values)"
    for numbers in ([Decimal(1), 0.5], [0.5, Decimal(1)]):
        with pytest.raises(TypeError, match=said):
            kept_of(aggregate, numbers)


def test_merged_decimals_and_floats_are_refused() -> None:
    for make in (sum_, mean, variance):
        merge = make().merge
        assert merge is not None
        for one, other in ((Decimal(1), 0.5), (0.5, Decimal(1))):
            with pytest.raises(TypeError, match=r"^Decimals and (float|other) values"):
                merge(kept_of(make(), [one]), kept_of(make(), [other]))


def test_variance_takes_decimals_alone() -> None:
    for numbers in ([Decimal(1), 5], [5, Decimal(1)]):
        with pytest.raises(
            TypeError, match=r"^Decimals and (int|other) values can't be computed with together"
        ):
            kept_of(variance(), numbers)


@pytest.mark.parametrize("text", ["NaN", "sNaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("make", [sum_, mean, variance])
def test_what_is_no_number_is_refused(make: Any, text: str) -> None:
    for aggregate in (make(), make().for_groups):
        for before in ([], [Decimal(1)]):
            with pytest.raises(ValueError, match="can't be added up: filter such values out before"):
                kept_of(aggregate, [*before, Decimal(text)])


@pytest.mark.parametrize("text", ["1E+1001", "1E-5000", "1E+999999999", "0E-2500", "1." + 1_001 * "0"])
@pytest.mark.parametrize("make", [sum_, mean, variance])
def test_numbers_that_would_take_all_memory_are_refused(make: Any, text: str) -> None:
    for aggregate in (make(), make().for_groups):
        with pytest.raises(ValueError, match=r"is too long to be added up exactly: .* round it before"):
            kept_of(aggregate, [Decimal(1), Decimal(text)])


@pytest.mark.parametrize("make", [sum_, mean, variance])
def test_longest_numbers_are_added_up_exactly(make: Any) -> None:
    numbers = [Decimal(f"9.{999 * '9'}E{at}") for at in (1_000, -1_000)] * 3
    for aggregate in (make(), make().for_groups):
        assert aggregate.result(kept_of(aggregate, numbers))


def test_durations_are_added_up() -> None:
    durations = [timedelta(hours=1), timedelta(microseconds=1), timedelta(days=-1)]
    total = sum(durations, timedelta())
    assert kept_of(sum_(), durations) == kept_of(sum_(), [0, *durations]) == total
    assert sum_().result(kept_of(sum_(), [*durations, 0])) == total
    assert group_of(sum_(), durations, durations[:2]) == timedelta(days=-1)
    assert mean().result(kept_of(mean(), durations)) == total / 3
    changing = mean().for_groups
    assert changing is not None
    assert changing.result(group_of(mean(), durations, durations[:1])) == (total - durations[0]) / 2
    for numbers in ([timedelta(1), 5], [5, timedelta(1)]):
        with pytest.raises(TypeError, match="unsupported operand"):
            kept_of(sum_(), numbers)
