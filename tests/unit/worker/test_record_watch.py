"""Which record takes long, observed from another thread."""

from __future__ import annotations

import sys
import threading
from typing import Any

from fcluster.common.settings import Settings
from fcluster.worker.record_watch import RecordWatch, Running, describe_overdue, handler_of


class FakeRecord:
    """Takes the place of a message."""

    def topic(self) -> str:
        return "in"

    def partition(self) -> int:
        return 2

    def offset(self) -> int:
        return 7


def record() -> Any:
    return FakeRecord()


def test_record_counts_from_the_first_sample_that_saw_it() -> None:
    watch = RecordWatch()
    assert watch.sample(1.0, 1.0) is None
    first = watch.record = record()
    assert watch.sample(2.0, 2.0) is None
    assert watch.sample(5.0, 5.0) == Running(first, 3.0)


def test_another_record_is_timed_from_zero() -> None:
    watch = RecordWatch()
    watch.record = record()
    watch.sample(1.0, 1.0)
    watch.record = record()
    assert watch.sample(2.0, 2.0) is None
    watch.record = None
    assert watch.sample(3.0, 3.0) is None
    assert watch.sample(4.0, 4.0) is None


def test_time_in_which_the_process_was_suspended_does_not_count() -> None:
    watch, slow = RecordWatch(), record()
    watch.record = slow
    watch.sample(10.0, 1.0)
    assert watch.sample(10.25, 1.0) == Running(slow, 0.25), "it slept, but samples saw the record"
    assert watch.sample(70.25, 1.0) == Running(slow, 1.25)
    assert watch.sample(75.25, 5.0) == Running(slow, 6.25), (
        "it held the interpreter's lock, and used the time"
    )


def test_overdue_record_is_named_with_the_bound() -> None:
    text = describe_overdue(Running(record(), 5.25), Settings(record_timeout_ms=5000), None)
    assert text == (
        "record in/2 at offset 7 has been processed for 5.2 s, longer than record.timeout.ms = 5000, "
        "in fcluster itself"
    )


def test_record_that_takes_longer_than_a_transaction_may_is_named_with_that_bound() -> None:
    settings = Settings(record_timeout_ms=0, transaction_timeout_ms=41_500)
    assert settings.record_bound_ms == 10_500
    text = describe_overdue(Running(record(), 11.0), settings, None)
    assert "longer than transaction.timeout.ms = 41500 leaves for one record" in text


def test_nothing_bounds_a_record_without_transactions_and_without_a_timeout() -> None:
    assert Settings(record_timeout_ms=0, processing_guarantee="at-least-once").record_bound_ms == 0


def test_handler_that_hangs_is_named_with_its_line() -> None:
    release = threading.Event()

    def my_handler() -> None:
        release.wait()

    thread = threading.Thread(target=my_handler)
    thread.start()
    try:
        text = handler_of(sys._current_frames()[thread.ident or 0])
    finally:
        release.set()
        thread.join()
    assert "threading.py:" in text  # the innermost lines, not only the thread's first ones


def test_ended_thread_is_in_no_handler() -> None:
    assert handler_of(None) == "in fcluster itself"
