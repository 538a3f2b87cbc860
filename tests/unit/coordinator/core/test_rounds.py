"""Epoch numbers and intervals in any history."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fcluster.coordinator.core.rounds import RESERVED_EPOCHS, EpochNumbers, next_interval_ms

milliseconds = st.floats(0, 100_000)


@given(milliseconds, st.booleans(), milliseconds, st.floats(0, 100), st.floats(100, 5_000))
def test_interval_stays_within_its_bounds(
    interval_ms: float, backlog: bool, epoch_ms: float, least_ms: float, most_ms: float
) -> None:
    result_ms = next_interval_ms(interval_ms, backlog, epoch_ms, least_ms, most_ms)
    assert least_ms <= result_ms <= most_ms
    if not backlog:
        assert result_ms == least_ms


def test_interval_grows_from_zero() -> None:
    assert next_interval_ms(0, True, 0, 0, 1000) > 0


@given(st.lists(st.one_of(st.just("take"), st.just("written"), st.integers(0, 50_000)), max_size=60))
def test_epoch_numbers_increase_and_stay_below_the_reservation_across_leaders(
    history: list[str | int],
) -> None:
    """An integer is an epoch that some worker knows. After each of them, the leader may change."""
    journal, taken = 1, 0
    numbers = EpochNumbers(0)
    requested: int | None = None
    for step in history:
        requested = numbers.wanted_reservation() or requested
        if step == "written" and requested is not None:
            journal = requested
            numbers.reserved(requested)
        elif step == "take":
            number = numbers.take()
            assert number is None or taken < number < journal
            taken = number or taken
        elif isinstance(step, int):
            numbers.observe(step)
            if step % 3 == 0:
                numbers, requested = EpochNumbers(max(journal - 1, step)), None


def test_reservation_is_renewed_before_the_numbers_run_out() -> None:
    numbers = EpochNumbers(0)
    first = numbers.wanted_reservation()
    assert first is not None
    assert numbers.wanted_reservation() is None
    numbers.reserved(first)
    asked = [
        number
        for number in range(RESERVED_EPOCHS // 2 + 1)
        if numbers.take() and numbers.wanted_reservation()
    ]
    assert len(asked) == 1
    assert numbers.available
