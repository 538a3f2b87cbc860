"""The effect of a record: outputs and state, or an error that leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Job, ListState, MapState, Record, ValueState
from fcluster.common.errors import StateDamaged
from fcluster.common.failures import Failure
from fcluster.common.ids import repartition_topic
from fcluster.worker.announcing import announced_steps
from fcluster.worker.processing import HandlerError, UnreadableRecordError
from tests.unit.worker.processing_bench import Bench


def job_with(handler: Callable[..., Any], **options: Any) -> Job:
    job = Job("j")
    job.process(job.topic("in"), to=job.topic("out"), name="h", **options)(handler)
    return job


def count(ctx: Any, value: Any) -> Iterator[Any]:
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    if value == "bad":
        raise ValueError("a bad value")
    yield {"n": ctx.state["n"]}


def test_generator_yields_values_with_key_and_timestamp_carried_over() -> None:
    bench = Bench(job_with(count))
    bench.run("x")
    bench.run("x")
    assert bench.outputs == [
        ("out", b'{"n":1}', b"k", 1234, None),
        ("out", b'{"n":2}', b"k", 1234, None),
    ]


def test_states_of_two_keys_are_separate() -> None:
    bench = Bench(job_with(count))
    for key in (b"a", b"b", b"a"):
        bench.run("x", key=key)
    assert [value["n"] for _topic, value, _key in bench.values()] == [1, 1, 2]


def test_plain_function_returning_none_emits_nothing() -> None:
    def only_big(_ctx: Any, value: int) -> int | None:
        return value if value > 5 else None

    bench = Bench(job_with(only_big))
    bench.run(3)
    bench.run(7)
    assert bench.values() == [("out", 7, b"k")]


def test_context_shows_the_record() -> None:
    seen: list[Any] = []

    def look(ctx: Any, _value: Any) -> None:
        seen.extend((ctx.key, ctx.timestamp, ctx.headers, ctx.topic, ctx.partition, ctx.offset))

    bench = Bench(job_with(look))
    bench.run(1, key="schlüssel".encode(), offset=9, headers=[("h", b"1")])
    assert seen == ["schlüssel", 1234, [("h", b"1")], "in", 0, 9]


def test_record_sets_the_fields_that_it_names_and_keeps_the_rest() -> None:
    job = Job("j")
    source, out, other = job.topic("in"), job.topic("out"), job.topic("other")

    @job.process(source, to=out)
    def handler(_ctx: Any, value: Any) -> Iterator[Record]:
        yield Record(key="new", value=value)
        yield Record(value=1, topic=other, timestamp=5, headers=[("a", b"b")])
        yield Record(value=None)

    bench = Bench(job)
    bench.run(7, headers=[("h", b"1")])
    assert bench.outputs == [
        ("out", b"7", b"new", 1234, [("h", b"1")]),
        ("other", b"1", b"k", 5, [("a", b"b")]),
        ("out", None, b"k", 1234, [("h", b"1")]),
    ]


def test_filter_and_map_come_before_the_handler() -> None:
    job = Job("j")
    out = job.topic("out")

    def handler(_ctx: Any, value: int) -> int:
        return value * 10

    job.stream(job.topic("in")).filter(lambda v: v > 1).map(lambda v: v + 1).process(handler, to=out)
    bench = Bench(job)
    bench.run(1)
    bench.run(2)
    assert bench.values() == [("out", 30, b"k")]


def test_key_by_writes_to_the_repartition_topic_under_the_new_key() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in")).key_by("tail")
    stream.process(lambda _ctx, v: v, to=job.topic("out"), name="by_tail")
    bench = Bench(job)
    bench.run({"tail": "N1"})
    assert bench.values() == [(repartition_topic("j", "by_tail"), {"tail": "N1"}, b"N1")]


def test_key_by_without_a_key_is_an_error_that_says_what_to_do() -> None:
    job = Job("j")
    job.stream(job.topic("in")).key_by("tail").process(lambda _c, v: v, to=job.topic("out"), name="p")
    with pytest.raises(HandlerError, match="returned no key; correct it, or filter such records out"):
        Bench(job).run({"tail": None})


def test_state_of_a_record_without_key_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(HandlerError, match=r"no key.*key_by"):
        Bench(job_with(count)).run("x", key=None)


def test_unreadable_value_is_distinguished_from_a_failing_handler() -> None:
    bench = Bench(job_with(count))
    with pytest.raises(UnreadableRecordError, match="record in/0 at offset 5 can't be decoded"):
        bench.run(b"{not json", offset=5)
    with pytest.raises(
        HandlerError, match=r"record in/0 at offset 6 failed in 'h': ValueError: a bad value \(.*:\d+\)"
    ):
        bench.run("bad", offset=6)


def test_stop_record_is_not_processed() -> None:
    bench = Bench(job_with(count))
    bench.runner.stop_before(2, Failure.of_record("known to fail"))
    bench.run("x", offset=1)
    with pytest.raises(UnreadableRecordError, match="known to fail"):
        bench.run("x", offset=2)
    assert len(bench.outputs) == 1


def test_skipped_record_leaves_no_state_and_no_output() -> None:
    def two_outputs(ctx: Any, value: Any) -> Iterator[Any]:
        ctx.state.setdefault("seen", []).append(value)
        yield "first"
        if value == "bad":
            raise ValueError
        yield list(ctx.state["seen"])

    bench = Bench(job_with(two_outputs, on_error="skip"))
    for value in ("a", "bad", "b"):
        bench.run(value)
    assert [value for _topic, value, _key in bench.values()] == ["first", ["a"], "first", ["a", "b"]]
    assert (bench.port.skipped, bench.port.records) == (1, 4)


@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_store_that_cannot_be_read_is_not_an_error_of_the_record(on_error: str) -> None:
    def fail(_key: bytes) -> bytes | None:
        raise StateDamaged("RocksDB can't go on: I/O error")

    bench = Bench(job_with(count, on_error=on_error), get=fail)
    with pytest.raises(StateDamaged):
        bench.run({"v": 1})
    assert bench.port.skipped == 0


def test_unreadable_record_is_skipped_too() -> None:
    bench = Bench(job_with(count, on_error="skip"))
    bench.run(b"{")
    bench.run("x")
    assert bench.values() == [("out", {"n": 1}, b"k")]


def test_dead_letter_is_the_unchanged_record_with_its_error() -> None:
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    job.process(job.topic("in"), to=job.topic("out"), name="h", on_error=dead)(count)
    bench = Bench(job)
    bench.run("bad", offset=3, headers=[("trace", b"1")])
    ((topic, raw, key, timestamp, headers),) = bench.outputs
    assert (topic, raw, key, timestamp) == ("dead", b'"bad"', b"k", 1234)
    assert dict(headers) == {
        "trace": b"1",
        "fcluster.error": b"ValueError: a bad value",
        "fcluster.handler": b"h",
        "fcluster.topic": b"in",
        "fcluster.partition": b"0",
        "fcluster.offset": b"3",
    }


def test_two_handlers_of_one_topic_do_not_share_values() -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out")

    @job.process(source, to=out)
    def spoil(_ctx: Any, value: dict[str, Any]) -> dict[str, Any]:
        value["spoilt"] = True
        return value

    @job.process(source, to=out)
    def look(_ctx: Any, value: dict[str, Any]) -> dict[str, Any]:
        return value

    bench = Bench(job)
    bench.run({"a": 1})
    assert [value for _topic, value, _key in bench.values()] == [{"a": 1, "spoilt": True}, {"a": 1}]


# --- declared states --------------------------------------------------------------------------------------

TOTAL: ValueState[int] = ValueState("total", "int")
BY_NAME: MapState[str, Any] = MapState("by-name", key="text")
LAST: ListState[int] = ListState("last", ttl=timedelta(milliseconds=100))


def keep(ctx: Any, value: Any) -> Any:
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    ctx.value(TOTAL).set(ctx.value(TOTAL).get(0) + value["n"])
    ctx.map(BY_NAME).setdefault(value["name"], []).append(value["n"])
    ctx.list(LAST).append(value["n"])
    if value.get("bad"):
        raise ValueError("a bad value")
    return {
        "n": ctx.state["n"],
        "total": ctx.value(TOTAL).get(),
        "by": dict(ctx.map(BY_NAME).items()),
        "last": list(ctx.list(LAST)),
    }


def test_handler_uses_the_states_that_it_declares() -> None:
    bench = Bench(job_with(keep, states=[TOTAL, BY_NAME, LAST]))
    bench.run({"n": 1, "name": "b"}, timestamp=1000)
    bench.run({"n": 2, "name": "a"}, timestamp=1060)
    bench.run({"n": 3, "name": "a"}, timestamp=1110)
    bench.run({"n": 4, "name": "a"}, key=b"other", timestamp=5)
    assert [value for _, value, _ in bench.values()][2:] == [
        {"n": 3, "total": 6, "by": {"a": [2, 3], "b": [1]}, "last": [2, 3]},
        {"n": 1, "total": 4, "by": {"a": [4]}, "last": [4]},
    ]


def test_skipped_record_leaves_nothing_in_any_kind_of_state_and_does_not_move_the_clock() -> None:
    bench = Bench(job_with(keep, states=[TOTAL, BY_NAME, LAST], on_error="skip"))
    bench.run({"n": 1, "name": "a"}, timestamp=1000)
    bench.run({"n": 2, "name": "a", "bad": 1}, timestamp=9_000)
    bench.run({"n": 3, "name": "b"}, timestamp=1001)
    assert bench.port.skipped == 1
    assert bench.values()[-1][1] == {"n": 2, "total": 4, "by": {"a": [1], "b": [3]}, "last": [1, 3]}


def test_state_that_is_not_declared_is_an_error_of_the_handler_that_names_it() -> None:
    bench = Bench(job_with(keep, states=[TOTAL, LAST]))
    with pytest.raises(HandlerError, match="'h' declares no map 'by-name'"):
        bench.run({"n": 1, "name": "b"})


def test_declared_state_that_cannot_be_stored_is_found_with_its_handler() -> None:
    def bad(ctx: Any, value: Any) -> None:
        ctx.value(TOTAL).set("text")

    bench = Bench(job_with(bad, states=[TOTAL], on_error="skip"))
    bench.run(1)
    unkept = bench.runner.find_unkept()
    assert unkept is not None
    assert unkept.step == "h"
    assert "store 'h/total', key b'k'" in unkept.failure.message
    bench.state.discard()
    bench.runner.condemn(0, unkept)
    bench.run(1)
    assert bench.port.skipped == 1
    assert bench.state.freeze(1) is None


# --- records under suspicion ----------------------------------------------------------------------------


def test_steps_are_announced_in_order_each_once_before_they_begin() -> None:
    job, said = Job("j"), list[str]()

    def many(_ctx: Any, value: int) -> Iterator[int]:
        said.append("many runs")
        yield value
        yield value + 1

    stream = job.stream(job.topic("in")).filter(bool).map(float)
    stream.process(many, to=job.topic("out"))
    bench = Bench(job)
    with announced_steps(said.append):
        bench.run(2)
    filtering, mapping, *rest = said
    assert (filtering.split()[0], mapping.split()[0]) == ("filter", "map")
    assert rest == ["many", "many runs", "writing to 'out' at the end of 'many'"]
    assert [value for _topic, value, _key in bench.values()] == [2.0, 3.0]
    assert sys.getprofile() is None


def test_only_suspect_records_are_announced_and_later_ones_run_at_full_speed() -> None:
    bench = Bench(job_with(count))
    fast, announced = bench.runner.handle, list[int]()

    def run(record: Any, handle: Callable[[Any], None]) -> None:
        announced.append(record.offset())
        handle(record)

    bench.runner.announce(range(3, 6), run)
    for offset in (1, 3, 4, 8):  # offsets in Kafka have gaps
        bench.run("x", offset=offset)
    assert announced == [3, 4]
    assert bench.runner.handle is fast
    assert [value["n"] for _topic, value, _key in bench.values()] == [1, 2, 3, 4]


def test_without_suspect_records_nothing_changes() -> None:
    bench = Bench(job_with(count))
    fast = bench.runner.handle
    bench.runner.announce(range(0), lambda _record, _handle: None)
    assert bench.runner.handle is fast
