"""Truncation while brokers are down is logged once, and logged again when it works."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from fcluster.common.errors import KafkaUnavailable
from fcluster.common.ids import ShardId
from fcluster.coordinator import truncation
from fcluster.coordinator.truncation import Truncation


def test_lasting_failure_is_logged_once_and_once_when_it_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away = True
    deleted: list[int] = []

    def delete(_admin: object, offsets: Mapping[TopicPartition, int]) -> None:
        if away:
            raise KafkaUnavailable("no leader")
        deleted.extend(offsets.values())

    monkeypatch.setattr(truncation, "delete_records_before", delete)
    source = SimpleNamespace(internal=True, topic=SimpleNamespace(name="between"))
    stage = SimpleNamespace(name="second", inputs=(source,))
    topology: Any = SimpleNamespace(stages=[stage])
    duty = Truncation(topology, None)  # type: ignore[arg-type]  # not reached
    with caplog.at_level(logging.INFO, logger="fcluster.coordinator"):
        for offset in range(20_000, 20_025):
            duty.run({(ShardId("second", 0), 0): offset})
        assert len(caplog.messages) == 1
        assert "retrying" in caplog.messages[0]
        away = False
        duty.run({(ShardId("second", 0), 0): 30_000})
        duty.run({(ShardId("second", 0), 0): 50_000})
    assert deleted == [30_000, 50_000]
    assert len(caplog.messages) == 2
    assert "truncated again" in caplog.messages[1]
