"""When a worker looks for the leader, and which leader it follows."""

from __future__ import annotations

import pytest

from fcluster.wire.discovery import Leader
from fcluster.wire.leader_search import FIXED_PATIENCE_MS, TURN_MS, Ends, Search

SILENT_MS = 1_500.0


def leader(term: int, port: int = 0) -> Leader:
    """The journal's record of a term's leader."""
    return Leader(f"tcp://127.0.0.1:{port or 7000 + term}", term, "host", 1, f"run{term}")


def connected(term: int = 1) -> Search:
    """A search that found the leader of that term, and has been connected to it since 0 ms."""
    search = Search(fixed=False, silent_ms=SILENT_MS, now_ms=0)
    assert search.follows(leader(term), 0, 0)
    search.linked(0)
    return search


def test_worker_without_an_address_searches_at_once_until_it_is_connected() -> None:
    search = Search(fixed=False, silent_ms=SILENT_MS, now_ms=0)
    assert search.is_wanted(0)
    assert search.follows(leader(1), 0, 0)
    assert search.is_wanted(10), "not connected yet"
    assert not search.follows(leader(1), 0, 20), "already connected to it, as far as it can know"
    search.linked(30)
    assert not search.is_wanted(40)


def test_worker_searches_at_once_after_a_lost_connection_and_follows_the_next_leader() -> None:
    search = connected()
    search.unlinked(5_000)
    assert search.is_wanted(5_000)
    assert not search.follows(leader(1), 1, 5_010)
    assert search.follows(leader(2), 1, 5_020)


def test_leader_that_answers_is_kept_whatever_the_journal_says() -> None:
    search = connected()
    search.heard(900)
    assert not search.is_wanted(1_000)
    assert not search.follows(leader(2), 1, 1_000)


def test_silent_leader_is_left_only_for_one_of_a_newer_term() -> None:
    search = connected(term=2)
    assert search.is_wanted(SILENT_MS)
    assert not search.follows(leader(1), 2, SILENT_MS)
    assert search.follows(leader(3), 2, SILENT_MS)
    search.unlinked(SILENT_MS + 1)  # about the connection that it left
    assert search.following == leader(3)


def test_worker_reconnects_to_a_leader_that_restarted_at_the_same_address() -> None:
    search = connected()
    search.unlinked(100)
    assert search.follows(leader(2, port=7001), 1, 200)


def test_given_address_is_tried_first_and_then_alternates_with_the_journals() -> None:
    search = Search(fixed=True, silent_ms=SILENT_MS, now_ms=0)
    assert not search.is_wanted(FIXED_PATIENCE_MS - 1)
    assert search.follows(leader(2), 1, FIXED_PATIENCE_MS)
    now_ms = FIXED_PATIENCE_MS + TURN_MS
    assert not search.turns_back(now_ms - 1)
    assert search.turns_back(now_ms)
    assert search.following is None
    assert not search.follows(leader(2), 1, now_ms + TURN_MS - 1)
    assert search.follows(leader(2), 1, now_ms + TURN_MS)


def test_given_address_that_answers_is_kept() -> None:
    search = Search(fixed=True, silent_ms=SILENT_MS, now_ms=0)
    search.linked(10)
    search.heard(10_000)
    assert not search.is_wanted(10_100)
    assert not search.turns_back(20_000)
    search.unlinked(20_000)
    assert not search.is_wanted(20_000), "a restart at the same address needs no journal"
    assert search.is_wanted(20_000 + FIXED_PATIENCE_MS)


def test_leader_of_an_older_term_is_left_for_the_one_in_the_journal() -> None:
    search = Search(fixed=True, silent_ms=SILENT_MS, now_ms=0)
    search.linked(0)
    search.heard(10)
    assert not search.is_wanted(20)
    search.misled()
    assert search.is_wanted(30)
    assert not search.follows(leader(1), 2, 30), "no newer than the present one"
    assert search.follows(leader(2), 2, 40)
    search.linked(50)
    assert not search.is_wanted(60)


def test_message_of_the_present_term_ends_the_doubt() -> None:
    search = connected(2)
    search.misled()
    search.heard(10)
    assert not search.is_wanted(20)


def test_broken_connection_ends_the_doubt() -> None:
    search = connected(1)
    search.misled()
    search.unlinked(10)
    search.linked(20)
    assert not search.is_wanted(30)


# --- the end of the job ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first_look", "ended_term", "concerns_us"),
    [
        ((None, 4), 4, False),  # the end of the former run: this process was started for the next one
        ((None, 4), 5, True),  # the next run ended before this process found its leader
        ((None, 0), 1, True),
        ((leader(4), 0), 4, True),  # there was a leader when this process was started
        ((leader(4), 0), 5, True),
        ((leader(4), 0), 3, False),
    ],
)
def test_end_counts_if_it_is_newer_than_the_first_read_of_the_journal(
    first_look: tuple[Leader | None, int], ended_term: int, concerns_us: bool
) -> None:
    ends = Ends()
    ends.looked(*first_look)
    ends.looked(None, ended_term)  # later reads don't change what ended before
    assert ends.concerns_us(ended_term, 0) is concerns_us


@pytest.mark.parametrize(("ended_term", "concerns_us"), [(3, False), (4, True), (5, True)])
def test_end_counts_for_processes_that_knew_its_leader_or_an_earlier_one(
    ended_term: int, concerns_us: bool
) -> None:
    ends = Ends()
    ends.looked(None, ended_term)
    assert ends.concerns_us(ended_term, 4) is concerns_us
