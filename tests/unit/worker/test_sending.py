"""A producer is flushed in pulses. While it can't send, it would use CPU for as long as it is flushed."""

from __future__ import annotations

from typing import Any

import pytest

from fcluster.common.settings import resolve
from fcluster.kafka.clients import make_producer, producer_config
from fcluster.worker import sending


class Producer:
    """Acknowledges everything at a moment of its own clock. Records for how long it was flushed."""

    def __init__(self, answer_at_s: float) -> None:
        self.answer_at_s = answer_at_s
        self.now_s = 0.0
        self.flushed_s = 0.0

    def __len__(self) -> int:
        return int(self.now_s < self.answer_at_s)

    def flush(self, timeout_s: float) -> int:
        takes_s = min(timeout_s, max(0.0, self.answer_at_s - self.now_s))
        self.now_s += takes_s
        self.flushed_s += takes_s
        return len(self)

    def poll(self, timeout_s: float) -> int:
        self.now_s += min(timeout_s, max(0.0, self.answer_at_s - self.now_s))
        return 0 if len(self) else 1


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Any:
    def wait(answer_at_s: float, timeout_s: float) -> tuple[int, Producer]:
        producer: Any = Producer(answer_at_s)
        monkeypatch.setattr(sending.time, "monotonic", lambda: producer.now_s)
        return sending.flush(producer, timeout_s), producer

    return wait


def test_answer_of_healthy_brokers_ends_the_wait(wait: Any) -> None:
    left, producer = wait(0.02, 30.0)
    assert left == 0
    assert producer.now_s == pytest.approx(0.02)


@pytest.mark.parametrize(("answer_at_s", "pulses"), [(0.001, 1), (0.004, 1), (0.15, 22)])
def test_producer_is_flushed_for_a_small_part_of_the_wait(wait: Any, answer_at_s: float, pulses: int) -> None:
    """If it lasted until the answer, it would use a core while records of a partition wait for others."""
    _, producer = wait(answer_at_s, 30.0)
    assert producer.flushed_s <= pulses * sending.PULSE_S + 1e-9


def test_nothing_is_waited_for_if_only_records_of_others_are_on_their_way() -> None:
    producer: Any = Producer(answer_at_s=0.02)
    assert sending.flush(producer, 30.0, unacknowledged=lambda: 0) == 0
    assert (producer.now_s, producer.flushed_s) == (0.0, 0.0)


def test_brokers_that_take_long_are_asked_less_often(wait: Any) -> None:
    left, producer = wait(8.0, 30.0)
    assert left == 0
    assert producer.now_s == pytest.approx(8.0, abs=sending.LONG_PULSE_S), "waits without an answer are short"
    assert producer.flushed_s < sending.HEALTHY_S + 0.1 * 8.0


def test_wait_is_bounded_and_says_what_is_left(wait: Any) -> None:
    left, producer = wait(99.0, 5.0)
    assert left == 1
    assert 5.0 <= producer.now_s < 5.0 + sending.LONG_PAUSE_S + sending.LONG_PULSE_S


@pytest.mark.parametrize("transaction_timeout_ms", [40_000, 341_000])
def test_client_takes_the_settings(transaction_timeout_ms: int) -> None:
    settings = resolve(
        {}, None, {}, {"brokers": "127.0.0.1:1", "transaction.timeout.ms": transaction_timeout_ms}
    )
    config = sending.sending_config(settings)
    assert sending.HEALTHY_S * 1000 < config["linger.ms"] < transaction_timeout_ms
    make_producer(settings, transactional_id="t", **config)


def test_linger_set_by_the_user_is_kept() -> None:
    settings = resolve({}, None, {}, {"brokers": "127.0.0.1:1", "kafka.linger.ms": 3})
    assert producer_config(settings, "t", **sending.sending_config(settings))["linger.ms"] == "3"
