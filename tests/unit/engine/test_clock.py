"""The event time of a shard: what moves it, and that it never goes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.engine.clock import (
    ENCODED_CHARACTERS_MAX,
    END_MS,
    FORMER_END_MS,
    EventClock,
    Said,
    UnreadableClockError,
    decode_watermark,
    encode_watermark,
)


def restored(clock: EventClock, delays_ms: Sequence[int | None]) -> EventClock:
    """A clock that goes on from what this one would commit."""
    again = EventClock(delays_ms)
    for number in range(len(delays_ms)):
        again.restore(number, clock.encode(number))
    return again


def test_time_of_one_topic_is_the_highest_timestamp_less_the_delay() -> None:
    clock = EventClock([100])
    assert clock.now_ms is None
    assert clock.observe(0, 1_000)
    assert clock.now_ms == 900
    assert not clock.observe(0, 700)  # late
    assert clock.observe(0, 1_001)
    assert clock.now_ms == 901


def test_record_without_a_timestamp_changes_nothing() -> None:
    clock = EventClock([0])
    assert not clock.observe(0, -1)
    assert clock.now_ms is None
    assert clock.observe(0, 0)
    assert clock.now_ms == 0


def test_time_of_several_topics_is_that_of_the_slowest() -> None:
    clock = EventClock([0, 0])
    assert not clock.observe(0, 500)  # nothing is known of the other one
    assert clock.observe(1, 300)
    assert clock.now_ms == 300
    assert clock.observe(1, 900)
    assert clock.now_ms == 500


def test_inputs_that_only_fill_tables_do_not_count() -> None:
    clock = EventClock([0, 0, None], {1, 2})
    assert not clock.observe(1, 900)
    assert clock.now_ms is None
    assert clock.observe(0, 50)
    assert not clock.heard(2, 1, [Said(0, 10)])
    assert clock.now_ms == 50
    clock.set_idle(0, True)
    assert clock.is_idle
    assert clock.now_ms == 50
    restored = EventClock([0, 0, None], {1, 2})
    for number in range(3):
        restored.restore(number, clock.encode(number))
    assert restored.now_ms == 50


def test_idle_topic_is_left_out_until_its_next_record_however_old() -> None:
    clock = EventClock([0, 0])
    clock.observe(0, 500)
    clock.observe(1, 300)
    assert clock.set_idle(1, True)
    assert clock.now_ms == 500
    clock.observe(1, 200)
    assert not clock.look()[1].idle
    assert clock.now_ms == 500  # it doesn't go back
    assert not clock.observe(0, 600)  # and waits for the one that is back


def test_idle_inputs_do_not_hold_each_other_back() -> None:
    clock = EventClock([0, 0])
    clock.observe(0, 500)
    clock.observe(1, 300)
    clock.set_idle(0, True)
    assert clock.now_ms == 300
    assert clock.set_idle(1, True)
    assert clock.now_ms == 500


def test_shard_that_says_at_once_how_far_it_came_and_that_it_is_idle_moves_the_time() -> None:
    clock = EventClock([None])
    clock.heard(0, 2, [Said(0, 500), Said(1, 400)])
    clock.heard(0, 2, [Said(0, 700, idle=True)])
    assert clock.now_ms == 400
    assert clock.heard(0, 2, [Said(1, 701, idle=True)])
    assert clock.now_ms == 701


def test_time_stands_if_all_are_idle() -> None:
    clock = EventClock([0, 0])
    clock.observe(0, 500)
    clock.observe(1, 300)
    clock.set_idle(1, True)
    assert not clock.is_idle
    clock.set_idle(0, True)
    assert clock.is_idle
    assert clock.now_ms == 500


def test_repartition_topic_waits_for_each_shard_that_writes_to_it() -> None:
    clock = EventClock([None])
    assert not clock.heard(0, 3, [Said(0, 500), Said(2, 700)])
    assert clock.look()[0].slowest == 1
    assert clock.heard(0, 3, [Said(1, 600)])
    assert clock.now_ms == 500
    assert clock.heard(0, 3, [Said(0, 900, idle=True)])
    assert clock.now_ms == 600
    assert clock.look()[0].idle_upstream == 1
    clock.heard(0, 3, [Said(1, 600, True), Said(2, 700, True)])
    assert clock.is_idle
    assert clock.now_ms == 900, "nobody is waited for any more"


def test_shard_that_is_added_upstream_is_waited_for_and_time_does_not_go_back() -> None:
    clock = EventClock([None])
    clock.heard(0, 1, [Said(0, 500)])
    assert not clock.heard(0, 2, [Said(0, 900)])
    assert clock.now_ms == 500
    clock.heard(0, 1, [Said(0, 950)])  # somebody who doesn't know of it yet
    assert clock.now_ms == 500
    assert clock.heard(0, 2, [Said(1, 800)])
    assert clock.now_ms == 800


def test_what_was_said_earlier_does_not_set_a_shard_back() -> None:
    clock = EventClock([None])
    clock.heard(0, 2, [Said(0, 500), Said(1, 500)])
    clock.heard(0, 2, [Said(0, 100)])
    assert clock.heard(0, 2, [Said(0, 600), Said(1, 600)])
    assert clock.now_ms == 600


def test_time_does_not_go_back_over_a_restore_with_a_longer_delay() -> None:
    clock = EventClock([0])
    clock.observe(0, 1_000)
    again = restored(clock, [400])
    assert again.now_ms == 1_000
    assert not again.observe(0, 1_200)
    assert again.now_ms == 1_000
    assert again.observe(0, 1_500)
    assert again.now_ms == 1_100


def test_time_does_not_go_back_if_a_source_becomes_a_repartition_topic() -> None:
    clock = EventClock([0])
    clock.observe(0, 1_000)
    again = restored(clock, [None])
    assert again.now_ms == 1_000
    again.heard(0, 1, [Said(0, 10)])
    assert again.now_ms == 1_000


def test_nothing_committed_is_a_beginning() -> None:
    clock = EventClock([0])
    clock.restore(0, "")
    assert clock.now_ms is None


@pytest.mark.parametrize("text", ["s", "s\x00", "u0", "sé", "u" + EventClock([0]).encode(0)[1:-1]])
def test_what_nobody_has_committed_is_refused(text: str) -> None:
    with pytest.raises(UnreadableClockError):
        EventClock([0 if text[0] == "s" else None]).restore(0, text)


def test_so_many_shards_upstream_that_only_the_slowest_is_committed() -> None:
    shards = 5_000
    clock = EventClock([None])
    clock.heard(0, shards, [Said(shard, 10**12 + shard * 1_000) for shard in range(shards)])
    text = clock.encode(0)
    assert len(text) <= ENCODED_CHARACTERS_MAX
    again = restored(clock, [None])
    assert again.now_ms == clock.now_ms == 10**12
    again.heard(0, shards, [Said(shard, 2 * 10**12) for shard in range(shards)])
    assert again.now_ms == 2 * 10**12


def test_eight_hundred_shards_upstream_within_an_hour_are_all_committed() -> None:
    clock = EventClock([None])
    said = [Said(shard, 1_767_225_600_000 + (shard * 7_919) % 3_600_000) for shard in range(800)]
    clock.heard(0, 800, said)
    assert len(clock.encode(0)) <= ENCODED_CHARACTERS_MAX
    assert restored(clock, [None]).look() == clock.look()


_TIMES = st.integers(-(10**6), 10**14)
_SAID = st.builds(Said, st.integers(0, 4), st.none() | _TIMES, st.booleans())
_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("observe"), st.integers(0, 1), st.integers(-1, 10**14)),
        st.tuples(st.just("idle"), st.integers(0, 1), st.booleans()),
        st.tuples(st.just("heard"), st.integers(1, 5), st.lists(_SAID, max_size=4)),
    ),
    max_size=30,
)


def _happen(clock: EventClock, event: tuple[object, ...]) -> bool:
    match event:
        case ("observe", int() as number, int() as at):
            return clock.observe(number, at)
        case ("idle", int() as number, bool() as idle):
            return clock.set_idle(number, idle)
        case ("heard", int() as shards, said):
            return clock.heard(2, shards, cast("list[Said]", said))
        case _:
            raise AssertionError(event)


@given(_EVENTS, st.lists(st.booleans(), min_size=30, max_size=30))
def test_restores_change_nothing_and_time_never_goes_back(
    events: list[tuple[object, ...]], restores: list[bool]
) -> None:
    delays = [0, 1_000, None]
    lasting, restarted = EventClock(delays), EventClock(delays)
    before: int | None = None
    for event, is_restored in zip(events, restores, strict=False):
        if is_restored:
            restarted = restored(restarted, delays)
            assert restarted.now_ms == before
        moved = _happen(lasting, event)
        assert _happen(restarted, event) == moved
        assert restarted.now_ms == lasting.now_ms
        assert restarted.look() == lasting.look()
        if moved:
            assert lasting.now_ms is not None
            assert before is None or lasting.now_ms > before
        else:
            assert lasting.now_ms == before
        before = lasting.now_ms


@given(st.integers(0, 500), st.lists(_SAID, max_size=20))
def test_watermark_records_say_what_was_said(shards: int, said: list[Said]) -> None:
    assert decode_watermark(encode_watermark(shards, said)) == (shards, said)


@pytest.mark.parametrize(
    "value", [b"", b"{}", b"\x01", b"\x01\x04\x01", b"\x01\xff", b"\x01\xff\xff\xff\x7f"]
)
def test_other_values_are_no_watermarks(value: bytes) -> None:
    with pytest.raises(UnreadableClockError):
        decode_watermark(value)


def test_end_of_all_inputs_makes_everything_due_and_leaves_the_time_as_it_is() -> None:
    clock = EventClock([100, 100])
    clock.observe(0, 1_000)
    clock.observe(1, 2_000)
    assert (clock.now_ms, clock.due_ms, clock.ended) == (900, 900, False)
    assert clock.may_end
    assert clock.end()
    assert (clock.now_ms, clock.due_ms, clock.ended) == (900, END_MS, True)
    assert not clock.end()
    clock.follow(5_000)
    clock.follow(4_000)
    assert clock.now_ms == 5_000


def test_end_is_committed_with_the_offsets() -> None:
    clock = EventClock([100, None])
    clock.observe(0, 1_000)
    clock.heard(1, 2, [Said(0, 500), Said(1, END_MS)])
    again = restored(clock, [100, None])
    assert (again.now_ms, again.due_ms, again.may_end) == (500, 500, False)
    again.heard(1, 2, [Said(0, END_MS)])
    assert again.may_end
    again.end()
    last = restored(again, [100, None])
    assert (last.now_ms, last.ended) == (again.now_ms, True)


def test_shard_upstream_that_has_ended_holds_nobody_back() -> None:
    clock = EventClock([None])
    clock.heard(0, 3, [Said(0, 500), Said(1, 700), Said(2, 900)])
    clock.heard(0, 3, [Said(0, END_MS)])
    assert clock.now_ms == 700
    clock.heard(0, 3, [Said(1, END_MS), Said(2, 950, idle=True)])
    assert (clock.now_ms, clock.ended) == (950, False)  # an idle one may go on
    clock.heard(0, 3, [Said(2, END_MS)])
    assert (clock.now_ms, clock.ended) == (950, True)


def test_end_comes_after_the_greatest_timestamp_of_kafka() -> None:
    clock = EventClock([0])
    clock.observe(0, 2**63 - 1)
    assert clock.end()
    assert (clock.now_ms, clock.ended) == (2**63 - 1, True)


def test_end_that_a_former_version_has_told_is_the_end() -> None:
    clock = EventClock([None])
    clock.heard(0, 2, [Said(0, FORMER_END_MS), Said(1, END_MS)])
    assert clock.may_end
    assert clock.ended


def test_idle_input_does_not_end_event_time() -> None:
    clock = EventClock([0, None])
    clock.observe(0, 300)
    clock.set_idle(0, True)
    clock.heard(1, 1, [Said(0, END_MS)])
    assert (clock.now_ms, clock.ended) == (300, False)


def test_ends_of_many_shards_upstream_survive_a_restart_though_their_times_do_not_fit() -> None:
    clock = EventClock([None])
    count = 3_000
    ended = set(range(0, count, 3))
    clock.heard(
        0, count, [Said(one, END_MS if one in ended else 10**12 + one * 10**7) for one in range(count)]
    )
    text = clock.encode(0)
    assert len(text) <= ENCODED_CHARACTERS_MAX
    again = restored(clock, [None])
    assert again.now_ms == clock.now_ms
    again.heard(0, count, [Said(one, END_MS) for one in range(count) if one not in ended])
    assert again.ended


@given(
    st.lists(
        st.tuples(st.one_of(st.none(), st.just(END_MS), st.integers(0, 2**41)), st.booleans()), min_size=1
    )
)
def test_reports_from_upstream_are_restored_as_they_were(reports: list[tuple[int | None, bool]]) -> None:
    clock = EventClock([None])
    clock.heard(0, len(reports), [Said(one, at, idle) for one, (at, idle) in enumerate(reports)])
    again = restored(clock, [None])
    assert again.look() == clock.look()
    assert (again.now_ms, again.due_ms) == (clock.now_ms, clock.due_ms)
