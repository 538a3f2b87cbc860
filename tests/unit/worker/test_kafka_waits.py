"""Waiting for Kafka is told apart from hanging; a call that goes on waiting for nobody is left behind."""

from __future__ import annotations

import threading
import time
from typing import Any, cast

import pytest

from fcluster.worker import kafka_waits
from fcluster.worker.commit_thread import CommitThread
from fcluster.worker.kafka_waits import KafkaWaits
from fcluster.worker.watchdog import Watchdog
from tests.harness import wait_until


@pytest.fixture
def overdue() -> list[str]:
    return []


@pytest.fixture
def watchdog(overdue: list[str]) -> Watchdog:
    return Watchdog(overdue.append)


@pytest.fixture
def waits(watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> KafkaWaits:
    monkeypatch.setattr(kafka_waits, "TOLD_AFTER_S", 0.02)
    monkeypatch.setattr(kafka_waits, "ANSWERED_PATIENCE_S", 0.05)
    monkeypatch.setattr(kafka_waits, "WAKE_AFTER_S", 0.02)
    monkeypatch.setattr(kafka_waits, "_POLL_S", 0.005)
    return KafkaWaits(watchdog)


# --- the watchdog ------------------------------------------------------------------------------------------


def test_step_that_waits_for_kafka_beyond_its_bound_isnt_taken_for_a_hung_one(
    watchdog: Watchdog, waits: KafkaWaits, overdue: list[str]
) -> None:
    with watchdog.bounded("committing epoch 7", 0.05):
        with waits.waiting("the transactions' coordinator"):
            time.sleep(0.1)
            watchdog.check()
        watchdog.check()  # the time that it waited doesn't count afterwards either
        assert not overdue
        time.sleep(0.1)
        watchdog.check()
    assert overdue == ["committing epoch 7 has taken more than 0 s"]


def test_another_threads_hang_is_noticed_while_one_waits_for_kafka(
    watchdog: Watchdog, waits: KafkaWaits, overdue: list[str]
) -> None:
    hangs, end = threading.Event(), threading.Event()

    def hang() -> None:
        with watchdog.bounded("a handler", 0.0):
            hangs.set()
            end.wait(10)

    thread = threading.Thread(target=hang)
    thread.start()
    assert hangs.wait(10)
    with watchdog.bounded("committing", 0.0), waits.waiting("the group's coordinator"):
        time.sleep(0.01)
        watchdog.check()
    end.set()
    thread.join(10)
    assert overdue == ["a handler has taken more than 0 s"]


def test_relief_is_told_how_long_the_longest_wait_lasts(watchdog: Watchdog) -> None:
    told: list[float] = []

    class FakeRelief:
        def waited(self, waited_s: float) -> None:
            told.append(waited_s)

    waits = KafkaWaits(watchdog, cast(Any, FakeRelief()))
    waits.check()
    with waits.waiting("the transactions' coordinator"):
        time.sleep(0.02)
        with waits.waiting("the group's coordinator"):
            waits.check()
    waits.check()
    assert told[0] == told[2] == 0.0
    assert told[1] >= 0.02


def test_only_a_wait_that_takes_longer_than_usual_is_told(waits: KafkaWaits) -> None:
    with waits.waiting("the group's coordinator"):
        assert waits.longest() == ("", 0.0)
        time.sleep(0.03)
        what, waited_s = waits.longest()
        assert what == "the group's coordinator"
        assert waited_s >= 0.03
    assert waits.longest() == ("", 0.0)


# --- calls that are stuck ----------------------------------------------------------------------------------


class Stuck:
    """A call that ends when it is told to, and a Kafka that answers when it is told to."""

    def __init__(
        self,
        waits: KafkaWaits,
        answer_takes_s: float = 0.0,
        *,
        wakes: int | None = None,
        ends_at_wake: int = 0,
    ) -> None:
        self.answer_takes_s = answer_takes_s
        self.wakes, self.ends_at_wake = wakes, ends_at_wake
        self.end = threading.Event()
        self.kafka_answers = threading.Event()
        self.asked = 0
        self.given_up_s = float("inf")
        self._waits = waits
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._thread.start()
        wait_until(lambda: waits._waits, "the call", 10, 0.001)

    def _call(self) -> None:
        with self._waits.unsticking("the group's coordinator", self._answers, self._wake, self._give_up):
            self.end.wait(10)

    def _answers(self, _waited_s: float) -> bool:
        self.asked += 1
        time.sleep(self.answer_takes_s)
        return self.kafka_answers.is_set()

    def _wake(self) -> bool:
        if self.wakes is None:
            return False
        self.wakes += 1
        if self.wakes == self.ends_at_wake:
            self.end.set()
        return True

    def _give_up(self) -> None:
        self.given_up_s = time.monotonic()
        self.end.set()

    def watch_until(self, condition: Any, what: str) -> None:
        def look() -> bool:
            self._waits.check()
            return bool(condition())

        wait_until(look, what, 10, 0.005)

    def join(self) -> None:
        self.end.set()
        self._thread.join(10)


def test_call_is_left_behind_once_kafka_answers_others_and_not_before(waits: KafkaWaits) -> None:
    stuck = Stuck(waits)
    stuck.watch_until(lambda: stuck.asked >= 5, "Kafka to be asked again")
    assert not stuck.end.is_set(), "given up while there is no coordinator: another call would wait as well"
    stuck.kafka_answers.set()
    stuck.watch_until(stuck.end.is_set, "the call to be left behind")
    stuck.join()


def test_call_that_ends_soon_after_kafkas_answer_is_kept(waits: KafkaWaits) -> None:
    stuck = Stuck(waits)
    stuck.kafka_answers.set()
    stuck.watch_until(lambda: stuck.asked, "Kafka to be asked")
    stuck.join()
    time.sleep(0.1)
    assert stuck.given_up_s == float("inf")


def test_call_that_can_be_woken_up_is_kept_and_goes_on(
    waits: KafkaWaits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_waits, "WAKE_INTERVAL_S", 0.1)
    stuck = Stuck(waits, wakes=0, ends_at_wake=3)
    stuck.kafka_answers.set()
    stuck.watch_until(stuck.end.is_set, "the call to go on")
    stuck.join()
    assert (stuck.wakes, stuck.given_up_s) == (3, float("inf"))


def test_call_is_woken_up_before_kafka_answers_a_new_client(
    waits: KafkaWaits, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After a clean restart on a busy machine, a new client took seconds to be answered. The call itself
    # needed only to look.
    monkeypatch.setattr(kafka_waits, "WAKE_INTERVAL_S", 0.05)
    stuck = Stuck(waits, wakes=0, ends_at_wake=2)
    stuck.watch_until(stuck.end.is_set, "the call to go on")
    stuck.join()
    assert (stuck.wakes, stuck.given_up_s) == (2, float("inf"))


def test_call_that_takes_no_longer_than_healthy_ones_isnt_woken_up(
    waits: KafkaWaits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_waits, "WAKE_AFTER_S", 60.0)
    stuck = Stuck(waits, wakes=0)
    stuck.watch_until(lambda: stuck.asked >= 2, "Kafka to be asked again")
    stuck.join()
    assert stuck.wakes == 0


def test_call_that_being_woken_up_does_not_help_is_left_behind(
    waits: KafkaWaits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_waits, "WAKE_INTERVAL_S", 0.1)
    monkeypatch.setattr(kafka_waits, "WOKEN_PATIENCE_S", 0.35)
    stuck = Stuck(waits, wakes=0)
    stuck.kafka_answers.set()
    stuck.watch_until(stuck.end.is_set, "the call to be left behind")
    stuck.join()
    assert stuck.wakes
    assert stuck.given_up_s < float("inf")


def test_call_that_takes_no_longer_than_usual_costs_no_question(waits: KafkaWaits) -> None:
    stuck = Stuck(waits)
    waits.check()
    stuck.join()
    assert stuck.asked == 0


def test_patience_grows_while_new_producers_dont_help_and_falls_back_when_all_is_well(
    waits: KafkaWaits,
) -> None:
    for patience_s in (0.05, 0.1, 0.2):
        assert waits._patience_s == pytest.approx(patience_s)
        stuck = Stuck(waits)
        stuck.kafka_answers.set()
        stuck.watch_until(stuck.end.is_set, "the call to be left behind")
        stuck.join()
    Stuck(waits).join()
    assert waits._patience_s == pytest.approx(0.05)


def test_on_a_busy_machine_a_call_may_take_longer_before_it_counts_as_stuck(waits: KafkaWaits) -> None:
    with waits.waiting("the leaders of partitions that it writes to"):
        time.sleep(0.3)
    began_s = time.monotonic()
    stuck = Stuck(waits)
    stuck.kafka_answers.set()
    time.sleep(0.1)
    waits.check()
    assert not stuck.asked
    stuck.watch_until(stuck.end.is_set, "the call to be left behind")
    assert stuck.given_up_s - began_s >= 0.58, "twice as long as usual"
    stuck.join()


def test_after_a_failover_a_call_gets_no_longer_than_librdkafka_needs_to_repeat_it(waits: KafkaWaits) -> None:
    with waits.waiting("the leaders of partitions that it writes to"):
        time.sleep(1.0)  # a busy machine
    stuck = Stuck(waits)
    stuck.watch_until(lambda: stuck.asked >= 2, "Kafka to be asked in vain")
    stuck.kafka_answers.set()
    answered_s = time.monotonic()
    stuck.watch_until(stuck.end.is_set, "the call to be left behind")
    assert stuck.given_up_s - answered_s < 0.9
    stuck.join()


def test_call_may_take_longer_if_kafka_is_slow_to_answer_a_new_client(waits: KafkaWaits) -> None:
    began_s = time.monotonic()
    stuck = Stuck(waits, answer_takes_s=0.2)
    stuck.kafka_answers.set()
    stuck.watch_until(stuck.end.is_set, "the call to be left behind")
    assert stuck.given_up_s - began_s >= 0.6
    stuck.join()


def test_time_of_a_failover_isnt_taken_for_a_busy_machines(
    waits: KafkaWaits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_waits, "USUAL_S_MAX", 0.05)
    with waits.waiting("the leaders of partitions that it writes to"):
        time.sleep(0.1)
    assert waits._usual_s == 0.0


# --- the commit thread -------------------------------------------------------------------------------------


def test_tasks_run_in_order_and_their_errors_are_told() -> None:
    thread, ran = CommitThread(), list[int]()
    futures = [thread.submit(ran.append, number) for number in range(5)]
    failing = thread.submit(lambda: 1 // 0)
    thread.shutdown(wait=True)
    assert ran == [0, 1, 2, 3, 4]
    assert all(future.done() for future in futures)
    assert isinstance(failing.exception(), ZeroDivisionError)
    with pytest.raises(RuntimeError):
        thread.submit(ran.append, 6)


def test_nobody_waits_for_an_abandoned_thread_but_who_has_to_know_its_real_end() -> None:
    thread, began, end, ran = CommitThread(), threading.Event(), threading.Event(), list[int]()

    def hang() -> None:
        began.set()
        end.wait(10)

    thread.submit(hang)
    later = thread.submit(ran.append, 1)
    assert began.wait(10)
    joined = threading.Thread(target=thread.join)
    thread.abandon()
    thread.shutdown(wait=True)  # returns
    joined.start()
    assert later.cancelled()
    # Who doesn't know of it yet gives it more: the watch abandons it in a thread of its own.
    assert thread.submit(ran.append, 2).cancelled()
    assert joined.is_alive()
    end.set()
    joined.join(10)
    assert not joined.is_alive()
    assert not ran, "it went on after the call that it was left behind in"


def test_shutdown_waits_for_what_runs_and_leaves_out_what_hasnt_begun() -> None:
    thread, began, end, ran = CommitThread(), threading.Event(), threading.Event(), list[int]()

    def run() -> None:
        began.set()
        end.wait(10)
        ran.append(0)

    thread.submit(run)
    later = thread.submit(ran.append, 1)
    assert began.wait(10)
    thread.shutdown(wait=False, cancel_futures=True)
    end.set()
    thread.shutdown(wait=True)
    assert ran == [0]
    assert later.cancelled()
