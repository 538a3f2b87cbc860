"""When standbys suspect the leader, and in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fcluster.coordinator.core.election import (
    PROBE_INTERVAL_MS,
    RANK_STEP_MS,
    REFUSED_MS,
    ROSTER_KEPT_MS,
    ROSTER_MAX,
    Bounds,
    Resignation,
    Roster,
    Watch,
)

SILENT_MS = 3_000.0
BOUNDS = Bounds(silent_ms=SILENT_MS, check_interval_ms=500)


def followed(rank: int = 0) -> Watch:
    """A watch on a leader that answered at 0 ms."""
    watch = Watch(BOUNDS, 0)
    watch.linked(0)
    watch.heard(rank, 0)
    return watch


def run(watch: Watch, until_ms: float, refused: bool | None = None, *, from_ms: float = 0) -> float | None:
    """Let time pass in steps of 10 ms. Returns when the leader was suspected. `refused`: what probes find."""
    now_ms = from_ms
    while now_ms <= until_ms:
        if refused is not None and watch.wants_probe(now_ms):
            watch.probed(refused, now_ms)
        if watch.suspicion(now_ms):
            return now_ms
        now_ms += 10
    return None


def test_leader_that_answers_is_never_suspected() -> None:
    watch = followed()
    for now_ms in range(0, 20_000, 100):
        if watch.wants_check(now_ms):
            watch.heard(0, now_ms)
        assert not watch.suspicion(now_ms)


def test_leader_that_becomes_silent_is_suspected_after_the_time_limit() -> None:
    assert run(followed(), 10_000) == SILENT_MS


def test_closed_connection_alone_is_not_suspicious_before_the_time_limit() -> None:
    watch = followed()
    watch.unlinked(100)
    assert run(watch, 10_000, refused=False, from_ms=100) == SILENT_MS


def test_leader_whose_address_refuses_twice_is_suspected() -> None:
    watch = followed()
    watch.unlinked(1_000)
    suspected_ms = run(watch, 10_000, refused=True, from_ms=1_000)
    assert suspected_ms is not None
    assert REFUSED_MS <= suspected_ms - 1_000 <= REFUSED_MS + 2 * PROBE_INTERVAL_MS


def test_leader_that_is_back_in_time_is_not_suspected() -> None:
    watch = followed()
    watch.unlinked(1_000)
    assert run(watch, 1_000 + REFUSED_MS - 20, refused=True, from_ms=1_000) is None
    watch.linked(1_090)
    watch.heard(0, 1_095)
    watch.unlinked(1_100)
    assert run(watch, 1_100 + REFUSED_MS - 20, refused=True, from_ms=1_100) is None, (
        "refusals aren't added up"
    )


def test_refusal_between_other_answers_does_not_count() -> None:
    watch = followed()
    watch.unlinked(0)
    for now_ms in range(0, 2_000, 60):
        watch.probed(now_ms % 120 == 0, now_ms)
        assert not watch.suspicion(now_ms)


def test_standby_that_was_suspended_restarts_the_leaders_time_limit() -> None:
    watch = followed()
    assert run(watch, 500) is None
    assert not watch.suspicion(60_000), "it was the standby itself that was stopped"
    suspected_ms = run(watch, 70_000, from_ms=60_000)
    assert suspected_ms is not None
    assert suspected_ms >= 60_000 + SILENT_MS - 500


def test_leader_that_never_answered_at_its_journalled_address_is_suspected() -> None:
    suspected_ms = run(Watch(BOUNDS, 0), 10_000, refused=True)
    assert suspected_ms is not None
    assert suspected_ms <= REFUSED_MS + 2 * PROBE_INTERVAL_MS


@given(ranks=st.lists(st.integers(0, 20), min_size=2, max_size=2, unique=True), refused=st.booleans())
def test_standbys_suspect_in_the_order_of_their_ranks_a_step_apart(ranks: list[int], refused: bool) -> None:
    moments: list[float] = []
    for rank in sorted(ranks):
        watch = followed(rank)
        watch.unlinked(0)
        moment = run(watch, 60_000, refused)
        assert moment is not None
        moments.append(moment)
    assert moments[1] - moments[0] >= RANK_STEP_MS - PROBE_INTERVAL_MS


def test_next_check_is_never_later_than_the_suspicion() -> None:
    watch = followed()
    now_ms = 0.0
    while not watch.suspicion(now_ms):
        watch.wants_check(now_ms)
        now_ms = max(now_ms + 1, watch.next_ms())
    assert now_ms == SILENT_MS


def test_roster_ranks_by_arrival_and_fills_gaps() -> None:
    roster = Roster()
    assert [roster.heard(peer, peer.decode(), 0) for peer in (b"a", b"b", b"c", b"a")] == [0, 1, 2, 0]
    later_ms = ROSTER_KEPT_MS + 1
    for peer in (b"b", b"c"):
        roster.heard(peer, peer.decode(), later_ms / 2)
    assert [roster.heard(peer, peer.decode(), later_ms) for peer in (b"c", b"b")] == [1, 0]
    assert roster.names(later_ms) == ["b", "c"]


def test_roster_is_bounded() -> None:
    roster = Roster()
    for number in range(3 * ROSTER_MAX):
        roster.heard(str(number).encode(), "x", 0)
    assert len(roster.names(0)) == ROSTER_MAX


def test_refusals_count_though_the_standby_was_slow_in_between() -> None:
    watch = followed()
    watch.unlinked(100)
    watch.probed(True, 100)
    watch.probed(True, 60_000)
    assert watch.suspicion(60_000), "a busy host must not delay the take-over from a dead leader"


def test_signs_of_life_are_counted() -> None:
    watch = followed()
    before = watch.signs
    watch.unlinked(1)
    watch.probed(True, 2)
    assert watch.signs == before
    watch.linked(3)
    assert watch.signs > before


def test_invited_standby_takes_over_at_once_whatever_its_rank() -> None:
    watch = followed(rank=5)
    assert not watch.suspicion(10)
    watch.heard(5, 20, resigns=True)
    assert "hands over" in watch.suspicion(20)
    watch.heard(5, 30)
    assert not watch.suspicion(30), "the leader stays"


def test_invited_standby_that_becomes_silent_has_time_before_another_is_invited() -> None:
    roster = Roster()
    roster.heard(b"a", "a", 0)
    roster.heard(b"b", "b", 0)
    resignation = Resignation(roster, 0, 0)
    assert resignation.advance(0).invite == b"a"
    asked: list[bytes] = []
    for now_ms in range(0, 5_000, 50):
        roster.heard(b"b", "b", now_ms)
        step = resignation.advance(now_ms)
        assert not step.give_up
        asked += [step.invite] if step.invite else []
    assert asked == [b"b"]
    assert resignation.advance(5_000).give_up


def test_roster_keeps_standbys_that_ask_rarely() -> None:
    roster = Roster(check_interval_ms=10_000)
    roster.heard(b"a", "a", 0)
    assert roster.first(20_000) == b"a"
    roster.leaves(b"a")
    assert roster.first(20_000) is None
