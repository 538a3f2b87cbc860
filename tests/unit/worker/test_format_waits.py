"""A worker waits for a schema registry that doesn't answer: no record is lost, skipped, or stops the job."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fcluster import Codec, Job, Watermark
from fcluster.common.errors import FormatUnavailable, FormatUnusable
from fcluster.common.settings import Settings
from fcluster.engine.records import TimerRecord
from fcluster.graph.codecs import decode_json, encode_json
from fcluster.graph.topology import Topology
from fcluster.worker import chunks, format_waits
from fcluster.worker.core import events
from fcluster.worker.format_waits import FormatWaits
from fcluster.worker.record_pump import _can_stay
from tests.unit.worker.worker_parts import SESSION, Message, Pumping, count, shard_of

GONE = FormatUnavailable("the registry can't be reached", remedy="start it")


@pytest.fixture(autouse=True)
def wide_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk ends only where the batch ends, however slow the machine is."""
    monkeypatch.setattr(chunks, "AIM_S", 1e6)


@dataclass
class Format:
    """A codec whose registry doesn't answer so many times, with what was asked."""

    failures: list[FormatUnusable] = field(default_factory=list[FormatUnusable])

    def decode(self, raw: bytes) -> Any:
        if self.failures and b"new" in raw:
            raise self.failures.pop(0)
        return decode_json(raw)

    def encode(self, value: Any) -> bytes:
        if self.failures:
            raise self.failures.pop(0)
        return encode_json(value)

    @property
    def codec(self) -> Codec[Any]:
        return Codec("registered", self.encode, self.decode)


def reading(form: Format, **options: Any) -> Topology:
    job = Job("j")
    dead = job.topic("dead", key="bytes", value="bytes")
    source = job.topic("in", value=form.codec, on_error=dead, **options)
    job.process(source, to=job.topic("out"), name="count", on_error=dead)(count)
    return job.build(Settings())


def writing(form: Format) -> Topology:
    job = Job("j")
    out = job.topic("out", value=form.codec)
    job.process(job.topic("in"), to=out, name="count", on_error="skip")(count)
    return job.build(Settings())


@pytest.fixture
def pumped() -> Iterator[list[Pumping]]:
    made: list[Pumping] = []
    yield made
    for one in made:
        one.close()


def pumping_of(topology: Topology, made: list[Pumping]) -> Pumping:
    made.append(Pumping(topology))
    return made[-1]


def records() -> list[Message]:
    return [Message(0), Message(1, b'"new"'), Message(2)]


def test_record_that_cannot_be_decoded_yet_is_tried_again_and_the_epoch_before_it_can_be_committed(
    pumped: list[Pumping], caplog: pytest.LogCaptureFixture
) -> None:
    form = Format([GONE, GONE, GONE])
    topology = reading(form)
    pumping = pumping_of(topology, pumped)
    runner = pumping.start()
    pumping.read(*records())
    with caplog.at_level(logging.WARNING, "fcluster.worker"):
        pumping.pump.run_chunk()
    shards = frozenset({shard_of(topology)})
    assert pumping.fed == [events.RecordsProcessed(shards, 1, backlog=False)]
    assert runner.inputs[0].next_offset == 1, "a barrier here would commit the first record, and only that"
    assert pumping.pump.records == 1
    assert pumping.pump.has_work
    assert pumping.record_watch.record is None
    (said,) = [record.getMessage() for record in caplog.records]
    expected = "record in/0 at offset 1 waits: the registry can't be reached; it is tried again"
    assert said.startswith(expected)
    pumping.run()
    assert pumping.counts() == [1, 2, 3], "each of them once, in order, and none is a dead letter"
    assert pumping.pump.records == 3
    assert runner.inputs[0].next_offset == 3
    assert form.failures == []
    assert all(isinstance(event, events.RecordsProcessed) for event in pumping.fed)
    assert pumping.port.skipped == 0


def test_record_that_cannot_be_written_yet_is_undone_with_its_epoch_and_comes_again(
    pumped: list[Pumping],
) -> None:
    pumping = pumping_of(writing(Format([GONE])), pumped)
    pumping.start()
    pumping.read(*records())
    pumping.pump.run_chunk()
    assert pumping.fed[-1] == events.TransactionFailed(
        SESSION, "record in/0 at offset 0 waits: the registry can't be reached", abortable=True
    )
    assert pumping.counts() == []
    assert pumping.port.skipped == 0


def test_registry_that_refuses_stops_the_job(pumped: list[Pumping]) -> None:
    refused = FormatUnusable("the registry refuses access", remedy="say who you are")
    topology = reading(Format([refused]))
    pumping = pumping_of(topology, pumped)
    pumping.start()
    pumping.read(*records())
    pumping.pump.run_chunk()
    (failed,) = [event for event in pumping.fed if isinstance(event, events.StopRecordReached)]
    assert "refuses access" in failed.failure.message
    assert pumping.port.skipped == 0


def test_piece_of_an_epoch_goes_on_with_the_record_that_has_waited(pumped: list[Pumping]) -> None:
    pumping = pumping_of(reading(Format([GONE])), pumped)
    pumping.core_state.pieces.failed(4)
    pumping.start()
    pumping.read(*records())
    pumping.run()
    assert pumping.counts() == [1, 2, 3]


def test_merged_records_whose_order_is_not_known_are_read_again(pumped: list[Pumping]) -> None:
    form = Format([GONE])
    job = Job("j")
    one = job.topic("a", value=form.codec, timestamp=lambda value: 5, watermark=Watermark())
    job.merge(one, job.topic("b")).process(count, name="count").to(job.topic("out"))
    pumping = pumping_of(job.build(Settings()), pumped)
    pumping.start()
    pumping.read(Message(0, b'"new"', topic="a"))
    failed = pumping.fed[-1]
    assert isinstance(failed, events.TransactionFailed)
    assert failed.abortable
    assert failed.reason == "the time of a record of 'j' isn't known: the registry can't be reached"
    assert pumping.reader.batches_done == 1


def test_merged_record_that_cannot_be_decoded_yet_is_read_again(pumped: list[Pumping]) -> None:
    job = Job("j")
    one = job.topic("a", value=Format([GONE]).codec)
    job.merge(one, job.topic("b")).process(count, name="count").to(job.topic("out"))
    pumping = pumping_of(job.build(Settings(max_task_idle_ms=-1)), pumped)
    runner = pumping.start()
    assert not _can_stay(GONE, runner.inputs[0])
    pumping.shards._merges[runner.shard]._merge._idle_ms = -1
    pumping.read(Message(0, b'"new"', topic="a"))
    pumping.pump.add_merged()
    pumping.pump.run_chunk()
    assert isinstance(pumping.fed[-1], events.TransactionFailed)


def test_wait_is_said_when_it_begins_and_from_time_to_time(caplog: pytest.LogCaptureFixture) -> None:
    waits = FormatWaits()
    first = TimerRecord(b"k", 5, "in", 0, 3, "timer t", lambda: "the timer 't'")
    second = TimerRecord(b"k", 5, "in", 0, 3, "timer u", lambda: "the timer 'u'")
    with caplog.at_level(logging.WARNING, "fcluster.worker"):
        for record, at_ms in (
            (first, 0.0),
            (first, format_waits.SAID_AGAIN_MS - 1),
            (first, format_waits.SAID_AGAIN_MS),
            (second, format_waits.SAID_AGAIN_MS + 1),
        ):
            waits.note(record, GONE, at_ms)
    said = [record.getMessage().partition(" waits")[0] for record in caplog.records]
    assert said == ["the timer 't'", "the timer 't'", "the timer 'u'"]
