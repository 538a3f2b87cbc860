"""A shard's position, built from what is committed for each of its inputs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from fcluster.common.errors import IncompatibleState
from fcluster.common.ids import ShardId
from fcluster.common.letter_counts import encode_counts
from fcluster.common.positions import (
    RESET_FINGERPRINT,
    CommittedPosition,
    InputOffset,
    SplitPositionError,
    UnreadableMetadataError,
    decode_position,
    joined_position,
)
from fcluster.coordinator.checks import check_inputs
from fcluster.worker.shards import ShardHost
from tests.unit.coordinator.coordinator_harness import merged_stages

NOW, FORMER = "now", "former"


def at(offset: int, epoch: int, state_epoch: int = 3, fingerprint: str = NOW) -> CommittedPosition:
    return CommittedPosition(offset, epoch, state_epoch, fingerprint, f"id-{offset}")


def test_offsets_of_one_transaction_make_one_position() -> None:
    position = joined_position([at(7, 5), at(9, 5)], [0, 0], NOW)
    assert position.inputs == (InputOffset(7, "id-7"), InputOffset(9, "id-9"))
    assert (position.offset, position.epoch, position.state_epoch) == (7, 5, 3)
    assert [position.of_input(number) for number in range(2)] == [at(7, 5), at(9, 5)]


def test_each_input_is_committed_with_the_usual_metadata() -> None:
    position = joined_position([at(7, 5), at(9, 5)], [0, 0], NOW)
    second = position.of_input(1)
    assert decode_position(second.offset, second.encode_metadata()) == at(9, 5)
    only = joined_position([at(7, 5)], [0], NOW)
    assert only == at(7, 5)
    assert only.of_input(0).encode_metadata() == "2:5:3:now:id-7"


def test_dead_letters_are_committed_with_the_first_input() -> None:
    letters = encode_counts(3, ("dead", "other"), {"other": 12})
    position = replace(joined_position([at(7, 5), at(9, 5)], [0, 0], NOW), letters=letters)
    first, second = position.of_input(0), position.of_input(1)
    assert first.encode_metadata() == f"4:5:3:now:id-7::{letters}"
    assert second.encode_metadata() == "2:5:3:now:id-9"
    read = [decode_position(one.offset, one.encode_metadata()) for one in (first, second)]
    assert joined_position(read, [0, 0], NOW) == position
    timed = replace(at(7, 5), clock="a!", letters=letters)
    assert decode_position(7, timed.encode_metadata()) == timed


@pytest.mark.parametrize("metadata", ["4:5:3:now:id-7::", "4:5:3:now:id-7:a:x y", "4:5:3:now:id-7:1.0.1"])
def test_damaged_count_of_dead_letters_is_noticed(metadata: str) -> None:
    with pytest.raises(UnreadableMetadataError):
        decode_position(7, metadata)


def test_without_committed_offsets_each_input_starts_at_its_beginning() -> None:
    assert joined_position([None, None], [4, 6], NOW) == CommittedPosition(
        4, 0, 0, NOW, further=(InputOffset(6),)
    )


@pytest.mark.parametrize(
    ("committed", "why"),
    [
        ([at(7, 5), None], "input 2 has no committed offset"),
        ([None, at(9, 5)], "input 2 was committed in epoch 5, but input 1 wasn't"),
        ([at(7, 5), at(9, 4)], "input 2 was committed in epoch 4"),
        ([at(7, 5), at(9, 5, 2)], "with state of epoch 2"),
    ],
)
def test_offsets_from_several_transactions_are_refused(
    committed: list[CommittedPosition | None], why: str
) -> None:
    with pytest.raises(SplitPositionError, match=why):
        joined_position(committed, [0, 0], NOW)


def test_new_input_starts_at_its_beginning() -> None:
    position = joined_position([at(7, 5, fingerprint=FORMER), None], [0, 2], NOW)
    assert [one.offset for one in position.inputs] == [7, 2]
    assert (position.epoch, position.state_epoch) == (5, 3)


def test_input_that_the_job_once_had_continues_with_the_state_of_the_first() -> None:
    position = joined_position([at(7, 50, 40, FORMER), at(9, 4, 2)], [0, 0], NOW)
    assert [one.offset for one in position.inputs] == [7, 9]
    assert (position.epoch, position.state_epoch) == (50, 40)


def test_position_has_no_unknown_offset() -> None:
    with pytest.raises(ValueError, match="a position: clients"):
        at(7, 5).at([InputOffset(7), InputOffset(-1001)])


def test_offsets_that_do_not_belong_together_stop_the_job_with_a_choice() -> None:
    host: Any = ShardHost.__new__(ShardHost)
    stage = SimpleNamespace(topics=("a", "b"))
    host._topology = SimpleNamespace(job="job", fingerprint=NOW, stage=lambda _name: stage)
    with pytest.raises(IncompatibleState, match="don't go together, though the job commits them in") as error:
        host._joined(ShardId("a", 0), [at(7, 5), None], [0, 0])
    assert "the inputs are a, b" in error.value.message
    assert "fcluster reset" in error.value.remedy


def test_input_that_was_read_before_does_not_count_as_new_without_an_offset() -> None:
    topology = merged_stages()
    past = {"topology": topology.describe()}
    more, crossing = topology.stage("more").topics
    committed = {TopicPartition(topic, 0): at(7, 5, fingerprint=FORMER) for topic in (more, crossing)}
    check_inputs(past, topology, committed)
    check_inputs({}, topology, {TopicPartition(more, 0): at(7, 5)})
    with pytest.raises(IncompatibleState, match=f"no committed offset for partition 0 of {crossing}"):
        check_inputs(past, topology, {TopicPartition(more, 0): at(7, 5, fingerprint=FORMER)})
    # Partition 1 has no processed record, and a reset has chosen where to begin.
    check_inputs(past, topology, {TopicPartition(more, 1): at(7, 5, fingerprint=RESET_FINGERPRINT)})
