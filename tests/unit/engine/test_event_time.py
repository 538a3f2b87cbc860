"""How the records of a shard affect its event time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest

from fcluster import Job
from fcluster.common.failures import Failure
from fcluster.common.settings import Settings
from fcluster.engine.clock import EventClock, Said, encode_watermark
from fcluster.engine.failure import Condemnation
from fcluster.engine.records import OutputPort
from fcluster.engine.runner import HandlerError, StageRunner, UnreadableRecordError
from fcluster.engine.state import ShardState
from fcluster.engine.watermarks import WATERMARK_HEADERS
from tests.state_memory import EntriesMax
from tests.unit.worker.processing_bench import EmptyStore, FakeMessage


class Bench:
    """One input of a shard that has a clock. `handler` is the stage's handler."""

    def __init__(self, handler: Callable[[Any, Any], Any], *, behind_key_by: bool, **options: Any) -> None:
        job = Job("j")
        stream = job.stream(job.topic("in"))
        if behind_key_by:
            stream = stream.key_by("id")
        stream.process(handler, to=job.topic("out"), name="h", **options)
        stage = job.build(Settings()).stages[-1]
        self.outputs: list[Any] = []
        self.port = OutputPort()
        self.port.produce = lambda *arguments: self.outputs.append(orjson.loads(arguments[1]))
        self.clock = EventClock([None if behind_key_by else 0])
        tables = ShardState(EmptyStore(lambda _key: None), stage.all_stores, EntriesMax(1_000)).tables
        self.runner = StageRunner(stage, 0, tables, self.port, (), clock=self.clock)

    def run(self, value: bytes | None, **fields: Any) -> None:
        self.runner.handle(FakeMessage(value, **fields))

    def hear(self, shards: int, *said: Said, offset: int = 0) -> None:
        value = encode_watermark(shards, said)
        self.run(value, key=None, headers=list(WATERMARK_HEADERS), timestamp=-1, offset=offset)


def passing(_ctx: Any, value: Any) -> Iterator[Any]:
    if value == "bad":
        raise ValueError("no good")
    yield value


def test_record_moves_event_time_after_its_handler() -> None:
    seen: list[int | None] = []

    def look(_ctx: Any, _value: Any) -> None:
        seen.append(bench.clock.now_ms)

    bench = Bench(look, behind_key_by=False)
    for timestamp in (1_000, 3_000, 2_000):
        bench.run(b'"x"', timestamp=timestamp)
    assert seen == [None, 1_000, 3_000]
    assert bench.clock.now_ms == 3_000


def test_record_that_fails_moves_event_time_if_processing_continues() -> None:
    bench = Bench(passing, behind_key_by=False, on_error="skip")
    bench.run(b'"bad"', timestamp=1_000)
    assert bench.clock.now_ms == 1_000
    bench = Bench(passing, behind_key_by=False)
    with pytest.raises(HandlerError):
        bench.run(b'"bad"', timestamp=1_000)
    with pytest.raises(UnreadableRecordError):
        bench.run(b"{", timestamp=1_000)
    assert bench.clock.now_ms is None


def test_condemned_record_moves_event_time_too() -> None:
    bench = Bench(passing, behind_key_by=False, on_error="skip")
    bench.runner.condemn(0, Condemnation(Failure.of_record("no good"), step="h"))
    bench.run(b'"x"', timestamp=1_000, offset=0)
    assert bench.outputs == []
    assert bench.clock.now_ms == 1_000


def test_behind_a_repartition_only_watermark_records_move_event_time() -> None:
    bench = Bench(passing, behind_key_by=True)
    bench.run(b'"x"', timestamp=9_000)
    assert bench.clock.now_ms is None
    bench.hear(2, Said(0, 1_000), Said(1, 2_000))
    assert bench.clock.now_ms == 1_000
    assert bench.outputs == ["x"]  # the handler doesn't see the watermark record
    assert bench.port.watermarks_read == 1


def test_record_with_a_key_is_data_whatever_its_headers_are() -> None:
    bench = Bench(passing, behind_key_by=True)
    bench.run(b'"x"', headers=list(WATERMARK_HEADERS))
    assert bench.outputs == ["x"]


def test_damaged_watermark_record_stops_the_job() -> None:
    bench = Bench(passing, behind_key_by=True)
    with pytest.raises(UnreadableRecordError, match="record in/0 at offset 0: a watermark record"):
        bench.run(b"\xff", key=None, headers=list(WATERMARK_HEADERS))


def test_watermark_record_that_is_condemned_stops_the_job() -> None:
    bench = Bench(passing, behind_key_by=True)
    bench.runner.condemn(7, Condemnation(Failure.of_record("a process died at it")))
    with pytest.raises(UnreadableRecordError, match="a process died at it"):
        bench.hear(1, Said(0, 1_000), offset=7)
