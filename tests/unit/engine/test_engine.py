"""What happens to a record that fails in some step: which rule applies, and what remains of the record."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster import Job, Record, Topic
from fcluster.common.errors import JobError
from fcluster.common.failures import Failure, FailureKind
from fcluster.common.ids import repartition_topic
from fcluster.engine.failure import Condemnation, OutputRefusedError, UnkeptStateError
from fcluster.worker.processing import HandlerError, UnreadableRecordError, running_step
from tests.unit.worker.processing_bench import Bench

HALF_AN_EMOJI = "\ud83d"


def fail(_value: Any) -> Any:
    raise ValueError("no good")


def passing(_ctx: Any, value: Any) -> Any:
    return value


def refusing(bench: Bench, refuses: Callable[[str, bytes | None], bool]) -> None:
    """Let the port refuse some outputs, chosen by topic and value."""

    def produce(topic: str, value: bytes | None, *rest: Any) -> None:
        if refuses(topic, value):
            raise OutputRefusedError(Failure.of_record("it is too large", "raise the limit"))
        bench.outputs.append((topic, value, *rest))

    bench.port.produce = produce


def headers_of(output: tuple[Any, ...]) -> dict[str, bytes]:
    return dict(output[4])


# --- whose rule ------------------------------------------------------------------------------------------


def one_step_job(step: str, rule: Any, **job_options: Any) -> Job:
    """A job in which `step` fails for each record, with this `rule`. None: without a rule."""
    job = Job("j", **job_options)
    source, out = job.topic("in"), job.topic("out", value="text" if step == "to" else "json")
    rule = job.topic("dead") if rule == "dead" else rule
    options = {} if rule is None else {"on_error": rule}
    stream = job.stream(source)
    if step == "filter":
        stream.filter(fail, **options).to(out)
    elif step == "map":
        stream.map(fail, **options).to(out)
    elif step == "flat_map":
        stream.flat_map(fail, **options).to(out)
    elif step == "peek":
        stream.peek(fail, **options).to(out)
    elif step == "key_by":
        stream.key_by(fail, **options).to(out)
    elif step == "key_by to a stage":
        stream.key_by(fail, **options).process(passing, to=out)
    elif step == "process":
        stream.process(lambda _ctx, value: fail(value), name="h", **options).to(out)
    else:
        stream.to(out, **options)
    return job


STEPS = ["filter", "map", "flat_map", "peek", "key_by", "key_by to a stage", "process", "to"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("by_default", [False, True])
def test_each_step_follows_its_own_rule_or_the_jobs(step: str, by_default: bool) -> None:
    for rule in ("skip", "dead"):
        default = Topic("dead") if rule == "dead" else rule
        job = one_step_job(step, None, on_error=default) if by_default else one_step_job(step, rule)
        bench = Bench(job)
        bench.run({"a": 1}, offset=4)
        assert bench.port.skipped == 1
        assert [output[0] for output in bench.outputs] == (["dead"] if rule == "dead" else [])
        assert bench.port.records == len(bench.outputs)
        for output in bench.outputs:
            assert output[1:4] == (b'{"a":1}', b"k", 1234)
            named = {"process": "h", "to": "writing to 'out'"}.get(step, step.split()[0])
            assert headers_of(output)["fcluster.handler"].decode().startswith(named)
    with pytest.raises(HandlerError, match=r"^record in/0 at offset 4 failed "):
        Bench(one_step_job(step, None)).run({"a": 1}, offset=4)


def test_rule_of_the_first_handler_does_not_apply_to_the_second() -> None:
    def failing(_ctx: Any, value: Any) -> Any:
        fail(value)

    job = Job("j")
    source, out = job.topic("in"), job.topic("out")
    job.stream(source).process(passing, on_error="skip", name="a").process(failing, name="b", to=out)
    with pytest.raises(HandlerError, match=r"failed in 'b': ValueError: no good"):
        Bench(job).run(1)


def test_dead_letter_topic_of_the_second_handler_is_used_and_the_state_of_the_first_is_restored() -> None:
    def count(ctx: Any, _value: Any) -> Any:
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        return ctx.state["n"]

    def even_only(_ctx: Any, value: int) -> int:
        if value % 2:
            raise ValueError(value)
        return value

    job = Job("j")
    source, out, dead = job.topic("in"), job.topic("out"), job.topic("dead")
    job.stream(source).process(count, name="a").process(even_only, name="b", on_error=dead, to=out)
    bench = Bench(job)
    bench.run("x")
    bench.run("x")
    assert [output[0] for output in bench.outputs] == ["dead", "dead"]
    assert headers_of(bench.outputs[0])["fcluster.handler"] == b"b"
    assert bench.state.tables["a"].peek(b"k") == {}


def test_sink_uses_the_rule_of_the_step_before_unless_it_has_its_own() -> None:
    job = Job("j")
    source, out, dead = job.topic("in"), job.topic("out", value="text"), job.topic("dead")
    job.stream(source).map(lambda v: v, on_error="skip").to(out)
    job.stream(source).map(lambda v: v, on_error="skip").to(out, on_error=dead)
    bench = Bench(job)
    bench.run({"a": 1})
    assert [output[0] for output in bench.outputs] == ["dead"]
    assert b"is written as 'text'" in headers_of(bench.outputs[0])["fcluster.error"]


def test_record_with_its_own_topic_follows_the_handlers_rule() -> None:
    def elsewhere(_ctx: Any, value: Any) -> Record:
        return Record(value=value, topic=other)

    job = Job("j")
    source, other = job.topic("in"), job.topic("other", value="bytes")
    job.process(source, on_error="skip")(elsewhere)
    bench = Bench(job)
    bench.run({"a": 1})
    assert (bench.outputs, bench.port.skipped) == ([], 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"headers": [("a", 5)]},
        {"headers": [(b"a", b"b")]},
        {"headers": 7},
        {"headers": [(HALF_AN_EMOJI, b"b")]},
        {"timestamp": "now"},
        {"timestamp": 2**70},
        {"timestamp": -5},
        {"key": 5},
        {"value": {1, 2}},
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_record_with_impossible_fields_fails_before_anything_is_written(fields: Any, on_error: str) -> None:
    def odd(_ctx: Any, _value: Any) -> Iterator[Any]:
        yield "good"
        yield Record(**fields)

    job = Job("j")
    job.process(job.topic("in"), to=job.topic("out"), on_error=on_error)(odd)  # type: ignore[arg-type]
    bench = Bench(job)
    if on_error == "stop":
        with pytest.raises(HandlerError, match=r"^record in/0 at offset 0 failed "):
            bench.run(1)
    else:
        bench.run(1)
        assert (bench.outputs, bench.port.skipped) == ([], 1)


# --- decoding --------------------------------------------------------------------------------------------


def test_record_that_cannot_be_decoded_becomes_one_dead_letter_for_all_handlers() -> None:
    job = Job("j")
    dead = job.topic("dead")
    source = job.topic("in", on_error=dead)
    job.process(source, on_error=dead, name="a")(passing)
    job.process(source, on_error="stop", name="b")(passing)
    bench = Bench(job)
    bench.run(b"{")
    assert [output[:2] for output in bench.outputs] == [("dead", b"{")]
    assert b"JSONDecodeError" in headers_of(bench.outputs[0])["fcluster.error"]


def test_record_that_cannot_be_decoded_leaves_nothing_if_one_handler_stops() -> None:
    job = Job("j")
    source, dead = job.topic("in"), job.topic("dead")
    job.process(source, on_error=dead, name="a")(passing)
    job.process(source, on_error="stop", name="b")(passing)
    bench = Bench(job)
    with pytest.raises(UnreadableRecordError, match="record in/0 at offset 3 can't be decoded") as stop:
        bench.run(b"{", offset=3)
    assert "job.topic('in', on_error=...)" in stop.value.failure.remedy, "a rule of a step wouldn't help"
    assert bench.outputs == []


@pytest.mark.parametrize("where", ["topic", "stream", "job", "handlers"])
def test_rule_for_records_that_cannot_be_decoded(where: str) -> None:
    job = Job("j", on_error="skip") if where == "job" else Job("j")
    source = job.topic("in", on_error="skip") if where == "topic" else job.topic("in")
    rule: Any = {"on_error": "skip" if where == "handlers" else "stop"} if where != "job" else {}
    job.process(source, name="a", **rule)(passing)
    stream = job.stream(source, on_error="skip") if where == "stream" else job.stream(source)
    stream.process(passing, name="b", **rule)
    bench = Bench(job)
    bench.run(b"{")
    assert bench.port.skipped == 1


def test_two_rules_for_one_topic_are_refused() -> None:
    job = Job("j")
    source = job.topic("in", on_error="skip")
    with pytest.raises(JobError, match="two on_error rules"):
        job.stream(source, on_error="stop")


@pytest.mark.parametrize(
    "build", ["filter", "map", "flat_map", "peek", "key_by", "to", "stream", "topic", "job"]
)
def test_unknown_rule_is_refused_with_the_known_ones(build: str) -> None:
    job = Job("j")
    source = job.topic("in")
    stream = job.stream(source)
    acts: dict[str, Callable[[], Any]] = {
        "filter": lambda: stream.filter(bool, on_error="ignore"),  # type: ignore[arg-type]
        "map": lambda: stream.map(bool, on_error="ignore"),  # type: ignore[arg-type]
        "flat_map": lambda: stream.flat_map(list, on_error="ignore"),  # type: ignore[arg-type]
        "peek": lambda: stream.peek(bool, on_error="ignore"),  # type: ignore[arg-type]
        "key_by": lambda: stream.key_by("k", on_error="ignore"),  # type: ignore[arg-type]
        "to": lambda: stream.to(source, on_error="ignore"),  # type: ignore[arg-type]
        "stream": lambda: job.stream(source, on_error="ignore"),  # type: ignore[arg-type]
        "topic": lambda: job.topic("x", on_error="ignore"),  # type: ignore[arg-type]
        "job": lambda: Job("j", on_error="ignore"),  # type: ignore[arg-type]
    }
    with pytest.raises(JobError, match="on_error='ignore'") as caught:
        acts[build]()
    assert "'stop', 'skip', or a topic" in caught.value.remedy


# --- whatever is raised ----------------------------------------------------------------------------------


class Unprintable(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise SystemExit(3)


def endless() -> Any:
    return endless()


RAISES: dict[str, Callable[[], Any]] = {
    "half an emoji": lambda: fail_with(ValueError(f"unknown name {HALF_AN_EMOJI}")),
    "exit": lambda: sys.exit("no configuration"),
    "interrupt": lambda: fail_with(KeyboardInterrupt()),
    "generator exit": lambda: fail_with(GeneratorExit()),
    "unprintable": lambda: fail_with(Unprintable()),
    "megabytes": lambda: fail_with(ValueError("x" * 5_000_000)),
    "group": lambda: fail_with(BaseExceptionGroup("g", [SystemExit(1), ValueError("v")])),
    "recursion": endless,
    "stop iteration": lambda: fail_with(StopIteration()),
}


def fail_with(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize("kind", RAISES)
@pytest.mark.parametrize(
    "when", ["call", "before the first output", "after it", "filter", "map", "flat_map", "peek", "key_by"]
)
def test_any_exception_follows_the_rule_and_is_described_in_one_bounded_line(kind: str, when: str) -> None:
    def handler(_ctx: Any, value: Any) -> Any:
        return RAISES[kind]()

    def generator(_ctx: Any, value: Any) -> Iterator[Any]:
        if when == "after it":
            yield value
        RAISES[kind]()
        yield value

    def build(rule: Any) -> Bench:
        job = Job("j")
        source, out = job.topic("in"), job.topic("out")
        on_error = job.topic("dead") if rule == "dead" else rule
        stream = job.stream(source)
        if when in ("filter", "map", "flat_map", "peek", "key_by"):
            getattr(stream, when)(lambda _value: RAISES[kind](), on_error=on_error).to(out)
        else:
            function = handler if when == "call" else generator
            stream.process(function, name="h", on_error=on_error, to=out)
        return Bench(job)

    with pytest.raises(HandlerError) as caught:
        build("stop").run(1, offset=2)
    line = str(caught.value.failure)
    assert line.startswith("record in/0 at offset 2 failed in ")
    assert len(line) <= 4_000
    assert line.isprintable()
    line.encode()
    for rule in ("skip", "dead"):
        bench = build(rule)
        bench.run(1)
        assert bench.port.skipped == 1
        assert [output[0] for output in bench.outputs] == (["dead"] if rule == "dead" else [])
        for output in bench.outputs:
            assert len(headers_of(output)["fcluster.error"]) <= 8_000


def test_generator_is_closed_before_its_state_is_restored() -> None:
    def handler(ctx: Any, value: Any) -> Iterator[Any]:
        try:
            yield value
        finally:
            ctx.state["touched"] = True

    job = Job("j")
    job.stream(job.topic("in")).process(handler, name="h").map(fail, on_error="skip").to(job.topic("out"))
    bench = Bench(job)
    bench.run(1)
    assert bench.port.skipped == 1
    assert bench.state.tables["h"].peek(b"k") == {}


def test_value_without_a_truth_value_fails_in_its_filter() -> None:
    class Torn:
        def __bool__(self) -> bool:
            raise ValueError("neither")

    job = Job("j")
    job.stream(job.topic("in")).filter(lambda _value: Torn(), on_error="skip").to(job.topic("out"))
    bench = Bench(job)
    bench.run(1)
    assert bench.port.skipped == 1


# --- outputs that are refused ----------------------------------------------------------------------------


def count_twice(ctx: Any, value: Any) -> Iterator[Any]:
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    yield {"small": value}
    yield {"large": value}


def refused_job(on_error: Any) -> Job:
    job = Job("j")
    rule = job.topic("dead") if on_error == "dead" else on_error
    job.process(job.topic("in"), to=job.topic("out"), name="h", on_error=rule)(count_twice)
    return job


def is_large(_topic: str, value: bytes | None) -> bool:
    return value is not None and b"large" in value


@pytest.mark.parametrize("on_error", ["stop", "skip", "dead"])
def test_refused_output_follows_the_rule_after_the_replay(on_error: str) -> None:
    bench = Bench(refused_job(on_error))
    refusing(bench, is_large)
    with pytest.raises(HandlerError) as caught:
        bench.run("x", offset=7)
    assert caught.value.failure == Failure(
        FailureKind.RECORD,
        "record in/0 at offset 7 failed writing to 'out' at the end of 'h': it is too large",
        "raise the limit",
        "in/0@7",
    )
    bench = Bench(refused_job(on_error))
    refusing(bench, is_large)
    condemnation = caught.value.condemnation
    if on_error == "stop":
        condemnation = Condemnation(Failure.of_record("it is too large"), topic="out")
    bench.runner.condemn(7, condemnation)
    if on_error == "stop":
        with pytest.raises(UnreadableRecordError, match=r"record in/0 at offset 7 failed writing to 'out'"):
            bench.run("x", offset=7)
    else:
        bench.run("x", offset=7)
    assert [output[0] for output in bench.outputs] == (["dead"] if on_error == "dead" else [])
    assert bench.state.tables["h"].peek(b"k") == {}
    refusing(bench, lambda *_: False)
    bench.outputs.clear()
    bench.run("y", offset=8)
    assert [value for _topic, value, _key in bench.values()] == [{"small": "y"}, {"large": "y"}]


def test_first_refused_output_follows_the_rule_at_once() -> None:
    bench = Bench(refused_job("dead"))
    refusing(bench, lambda topic, _value: topic == "out")
    bench.run("x")
    assert [output[0] for output in bench.outputs] == ["dead"]
    assert bench.state.tables["h"].peek(b"k") == {}


def test_dead_letter_that_is_too_large_is_replaced_by_a_stub() -> None:
    job = Job("j")
    dead = job.topic("dead")
    job.process(job.topic("in", value="text"), name="h", on_error=dead)(lambda _ctx, value: fail(value))
    bench = Bench(job)
    refusing(bench, lambda _topic, value: value is not None and len(value) > 100)
    bench.run(b"y" * 1000, offset=5, headers=[("own", b"z" * 5000)])
    ((topic, value, key, timestamp, _headers),) = bench.outputs
    assert (topic, value, key, timestamp) == ("dead", None, b"k", 1234)
    assert headers_of(bench.outputs[0]) == {
        "fcluster.error": b"ValueError: no good",
        "fcluster.handler": b"h",
        "fcluster.topic": b"in",
        "fcluster.partition": b"0",
        "fcluster.offset": b"5",
        "fcluster.stub": b"it is too large; remedy: raise the limit",
        "fcluster.value.bytes": b"1000",
        "fcluster.value.sha256": hashlib.sha256(b"y" * 1000).hexdigest().encode(),
    }
    assert (bench.port.records, bench.port.skipped) == (1, 1)


def test_stub_leaves_out_a_key_that_is_too_large() -> None:
    job = Job("j")
    job.process(job.topic("in"), name="h", on_error=job.topic("dead"))(lambda _ctx, value: fail(value))
    bench = Bench(job)
    refusing(bench, lambda _topic, value: value is not None)
    bench.run(1, key=b"k" * 2000)
    assert bench.outputs[0][:3] == ("dead", None, None)
    assert headers_of(bench.outputs[0])["fcluster.key.bytes"] == b"2000"


def test_dead_letter_refused_as_a_stub_too_stops_the_job() -> None:
    bench = Bench(refused_job("dead"))
    refusing(bench, lambda *_: True)
    with pytest.raises(HandlerError, match=r"^record in/0 at offset 0 failed: .*not even a stub.*'dead'"):
        bench.run("x")


# --- condemned records -----------------------------------------------------------------------------------


def test_condemned_dead_letter_is_replaced_by_a_stub_and_then_stops_the_job() -> None:
    for condemnations, outcome in ((1, "letter"), (2, "stub"), (3, "stop")):
        bench = Bench(refused_job("dead"))
        bench.runner.condemn(4, Condemnation(Failure.of_record("the broker: too large"), topic="out"))
        for _ in range(condemnations - 1):
            bench.runner.condemn(
                4, Condemnation(Failure.of_record("the broker: too large again"), topic="dead")
            )
        if outcome == "stop":
            with pytest.raises(UnreadableRecordError, match="not even a stub"):
                bench.run("x", offset=4)
            assert bench.outputs == []
            continue
        bench.run("x", offset=4)
        ((topic, value, *_rest),) = bench.outputs
        assert (topic, value) == ("dead", b'"x"' if outcome == "letter" else None)
        assert ("fcluster.stub" in headers_of(bench.outputs[0])) is (outcome == "stub")


def two_chains(first: Any, second: Any) -> Job:
    job = Job("j")
    source = job.topic("in")
    dead = job.topic("dead")
    for name, rule in (("a", first), ("b", second)):
        on_error = dead if rule == "dead" else rule
        job.process(source, to=job.topic("out"), name=name, on_error=on_error)(count_twice)
    return job


def test_only_the_chain_of_a_condemned_handler_is_rolled_back() -> None:
    bench = Bench(two_chains("skip", "stop"))
    bench.runner.condemn(
        1, Condemnation(Failure.of_record("store 'a', key b'k': state['x'] is a set"), step="a")
    )
    bench.run("x", offset=1)
    assert len(bench.outputs) == 2
    assert bench.state.tables["a"].peek(b"k") == {}
    assert bench.state.tables["b"].peek(b"k") == {"n": 1}
    assert (bench.port.skipped, bench.port.records) == (1, 2)


def test_nothing_of_a_condemned_record_is_left_if_one_chain_stops() -> None:
    bench = Bench(two_chains("dead", "stop"))
    bench.run("w", offset=0)
    before = list(bench.outputs)
    bench.runner.condemn(1, Condemnation(Failure.of_record("can't be kept"), step="a"))
    bench.runner.condemn(1, Condemnation(Failure.of_record("can't be kept either"), step="b"))
    with pytest.raises(
        UnreadableRecordError, match=r"record in/0 at offset 1 failed in 'b': can't be kept either"
    ):
        bench.run("x", offset=1)
    assert bench.outputs == before, "not even the first chain's dead letter"
    assert bench.port.skipped == 0
    assert bench.state.tables["a"].peek(b"k") == {"n": 1}


def test_second_condemnation_for_a_topic_hits_the_next_output_to_it() -> None:
    bench = Bench(two_chains("skip", "dead"))
    for _ in range(2):
        bench.runner.condemn(1, Condemnation(Failure.of_record("too large"), topic="out"))
    bench.run("x", offset=1)
    ((topic, *_rest),) = bench.outputs
    assert topic == "dead"
    assert headers_of(bench.outputs[0])["fcluster.error"] == b"too large"
    assert bench.port.skipped == 2


def test_output_refused_in_the_second_chain_does_not_affect_the_first() -> None:
    job = Job("j")
    source, out, dead = job.topic("in"), job.topic("out"), job.topic("dead")
    job.process(source, to=out, name="a", on_error="skip")(passing)
    job.process(source, to=out, name="b", on_error=dead)(count_twice)

    def build() -> Bench:
        bench = Bench(job)
        refusing(bench, is_large)
        return bench

    with pytest.raises(HandlerError) as caught:
        build().run("x")
    bench = build()
    bench.runner.condemn(0, caught.value.condemnation)
    bench.run("x")
    assert [output[:2] for output in bench.outputs] == [("out", b'"x"'), ("dead", b'"x"')]


def test_record_condemned_without_a_step_stops_the_job_before_it() -> None:
    bench = Bench(two_chains("skip", "skip"))
    bench.runner.condemn(1, Condemnation(Failure.of_record("record in/0 at offset 1 failed: known to fail")))
    with pytest.raises(UnreadableRecordError, match="known to fail"):
        bench.run("x", offset=1)
    assert bench.outputs == []


def test_records_after_the_condemned_one_take_the_fast_path_again() -> None:
    bench = Bench(two_chains("skip", "skip"))
    fast = bench.runner.handle
    bench.runner.condemn(1, Condemnation(Failure.of_record("no"), step="a"))
    bench.run("w", offset=0)
    bench.run("x", offset=1)
    assert bench.runner.handle is fast


# --- state that can't be kept ----------------------------------------------------------------------------


def test_state_that_cannot_be_stored_is_found_with_its_handler() -> None:
    def keep(ctx: Any, value: Any) -> None:
        ctx.state["v"] = {value} if value == "odd" else value

    job = Job("j")
    job.process(job.topic("in"), name="h", on_error="skip")(keep)
    bench = Bench(job)
    bench.run("even")
    assert bench.runner.find_unkept() is None
    bench.run("odd", offset=1)
    failure = bench.runner.find_unkept()
    assert failure is not None
    assert failure.step == "h"
    assert failure.failure.message.startswith("store 'h', key b'k': state['v'] is a set")


def test_bad_state_left_by_an_earlier_record_does_not_fail_the_next_one() -> None:
    def keep(ctx: Any, value: Any) -> None:
        ctx.state["v"] = object() if value == "odd" else value

    job = Job("j")
    job.process(job.topic("in"), name="h", on_error="skip")(keep)
    bench = Bench(job)
    bench.run("odd")
    with pytest.raises(UnkeptStateError) as caught:
        bench.run("good", offset=1)
    assert caught.value.condemnation.step == "h"
    assert bench.port.skipped == 0


def test_running_step_is_named_from_a_frame() -> None:
    seen: list[str] = []

    def look(_value: Any) -> Any:
        seen.append(running_step(sys._getframe()))  # pyright: ignore[reportPrivateUsage]
        return "key"

    job = Job("j")
    source, out = job.topic("in"), job.topic("out")
    job.stream(source).filter(look).process(lambda _ctx, value: look(value), name="h").key_by(look).to(out)
    Bench(job).run(1)
    assert seen == [
        "filter 'look' (step 1 of 'h')",
        "h",
        "key_by (function look) at the end of 'h'",
    ]
    assert running_step(sys._getframe()) == ""  # pyright: ignore[reportPrivateUsage]


# --- values, keys, headers, timestamps -------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def as_json(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=1).encode()


raw_headers = st.none() | st.lists(st.tuples(texts, st.none() | st.binary(max_size=5)), max_size=3)
keys = st.none() | texts.map(str.encode)
timestamps = st.sampled_from([-1, 0, 1, 1234]) | st.integers(-1, 2**62)


@given(st.none() | documents.map(as_json), keys, timestamps, raw_headers)
def test_any_record_passes_a_filter_unchanged_to_the_byte(
    raw: bytes | None, key: bytes | None, timestamp: int, headers: Any
) -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out")
    job.stream(source).filter(lambda _value: True).to(out)
    job.stream(source).filter(lambda _value: True).to(out)
    bench = Bench(job)
    bench.run(raw, key=key, headers=headers, timestamp=timestamp)
    assert bench.outputs == [("out", raw, key, timestamp, headers)] * 2


@given(st.none() | documents.map(as_json), keys, timestamps, raw_headers)
def test_any_record_passes_a_map_unchanged_in_value(
    raw: bytes | None, key: bytes | None, timestamp: int, headers: Any
) -> None:
    job = Job("j")
    job.stream(job.topic("in")).map(lambda value: value).to(job.topic("out"))
    bench = Bench(job)
    bench.run(raw, key=key, headers=headers, timestamp=timestamp)
    ((_topic, written, *rest),) = bench.outputs
    assert rest == [key, timestamp, headers]
    assert (written is None) is (raw is None)
    if raw is not None:
        assert_same(json.loads(written), json.loads(raw))


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    assert one == other
    if isinstance(one, dict):
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list):
        for value, twin in zip(one, other, strict=True):
            assert_same(value, twin)


@pytest.mark.parametrize("kind", ["json", "text", "bytes"])
@pytest.mark.parametrize("steps", ["none", "filter", "map", "filter and map", "key_by", "map and key_by"])
def test_null_value_stays_null_through_every_step_and_sink(kind: Any, steps: str) -> None:
    seen: list[Any] = []

    def look(value: Any) -> Any:
        seen.append(value)
        return True

    def by(_value: Any) -> str:
        return "new"

    job = Job("j")
    source, out = job.topic("in", value=kind), job.topic("out", value=kind)
    stream = job.stream(source)
    if "filter" in steps:
        stream = stream.filter(look)
    if "map" in steps:
        stream = stream.map(lambda value: value)
    if "key_by" in steps:
        stream = stream.key_by(by)
    stream.to(out)
    bench = Bench(job)
    bench.run(None, headers=[("h", b"1")])
    assert bench.outputs == [("out", None, b"new" if "key_by" in steps else b"k", 1234, [("h", b"1")])]
    assert seen in ([], [None])


def test_handler_gets_a_null_value_as_none() -> None:
    job = Job("j")
    seen: list[Any] = []

    @job.process(job.topic("in"), to=job.topic("out"))
    def look(_ctx: Any, value: Any) -> Record:
        seen.append(value)
        return Record(value=None)

    bench = Bench(job)
    bench.run(None)
    assert seen == [None]
    assert bench.outputs[0][1] is None


def test_none_returned_by_a_map_is_json_null_and_not_a_tombstone() -> None:
    job = Job("j")
    job.stream(job.topic("in")).map(lambda value: value.get("a")).to(job.topic("out"))
    bench = Bench(job)
    bench.run({"b": 1})
    assert bench.outputs[0][1] == b"null"


def test_json_null_does_not_become_a_tombstone() -> None:
    job = Job("j")
    job.stream(job.topic("in")).map(lambda value: value).to(job.topic("out"))
    bench = Bench(job)
    bench.run(b"null")
    assert bench.outputs[0][1] == b"null"


def test_key_by_field_of_a_null_value_says_what_to_do() -> None:
    job = Job("j")
    job.stream(job.topic("in")).key_by("tail").to(job.topic("out"))
    with pytest.raises(HandlerError, match=r"in key_by.*the value is null \(a tombstone\); filter such"):
        Bench(job).run(None)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), [1, {"a": -float("inf")}], {"n": None, "x": float("nan")}]
)
def test_number_that_json_lacks_is_refused_with_its_place(value: Any) -> None:
    job = Job("j")
    job.process(job.topic("in"), to=job.topic("out"), name="h")(lambda _ctx, _value: value)
    with pytest.raises(HandlerError, match=r"ValueError: the value.* is -?(nan|inf), which JSON can't hold"):
        Bench(job).run(1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"tags": {"a"}}, "the value['tags'] is of type set, which JSON can't hold; write sorted(...) of it"),
        ([b"x"], "the value[0] is of type bytes, which JSON can't hold"),
        ({"by": {1: "a"}}, "the value['by'] has the key 1 of type int; names in JSON are text"),
    ],
)
def test_result_that_is_not_json_is_refused_with_its_place(value: Any, text: str) -> None:
    job = Job("j")
    job.process(job.topic("in"), to=job.topic("out"), name="h")(lambda _ctx, _value: value)
    with pytest.raises(HandlerError, match=re.escape(text)):
        Bench(job).run(1)


def test_record_to_a_topic_that_is_not_the_jobs_fails() -> None:
    job = Job("j")
    job.process(job.topic("in"), name="h")(lambda _ctx, value: Record(value=value, topic=Topic("elsewhere")))
    with pytest.raises(
        HandlerError, match="a Record's topic is 'elsewhere', which isn't a topic of this job"
    ):
        Bench(job).run(1)


def test_failure_of_a_library_names_the_line_of_the_job() -> None:
    job = Job("j")
    job.stream(job.topic("in")).map(lambda value: json.loads(value["text"])).to(job.topic("out"))
    with pytest.raises(HandlerError, match=r"JSONDecodeError.*test_engine\.py:\d+\)"):
        Bench(job).run({"text": "{"})


def test_headers_are_kept_unless_a_handler_sets_them() -> None:
    job = Job("j")
    source = job.topic("in")

    def setting(_ctx: Any, _value: Any) -> Iterator[Any]:
        yield 1
        yield Record(value=2)
        yield Record(value=3, headers=[("mine", "text"), ("none", None)])  # type: ignore[list-item]
        yield Record(value=4, headers=None)
        yield Record(value=5, headers=[])

    job.process(source, to=job.topic("out"))(setting)
    job.stream(source).map(lambda v: v).to(job.topic("mapped"))
    job.stream(source).key_by(str).to(job.topic("keyed"))
    job.stream(source).key_by(str).process(passing, to=job.topic("staged"))
    bench = Bench(job)
    came = [("trace", b"1"), ("trace", b"2")]
    bench.run(7, headers=came)
    by_topic: dict[str, list[Any]] = {}
    for output in bench.outputs:
        by_topic.setdefault(output[0], []).append(output[4])
    assert by_topic["out"] == [came, came, [("mine", b"text"), ("none", None)], None, []]
    assert by_topic["mapped"] == by_topic["keyed"] == by_topic[repartition_topic("j", "passing")] == [came]


def test_everything_written_is_counted() -> None:
    job = Job("j")
    source = job.topic("in")
    job.stream(source).key_by(str).to(job.topic("keyed"))
    job.stream(source).key_by(str).process(passing, to=job.topic("staged"))
    job.stream(source).to(job.topic("copy"))
    job.stream(source).map(fail, on_error=job.topic("dead")).to(job.topic("never"))
    bench = Bench(job)
    bench.run(7)
    assert len(bench.outputs) == bench.port.records == 4


def test_long_integer_in_key_and_state_and_output_keeps_its_digits() -> None:
    number = 12345678901234567890123456789

    def total(ctx: Any, value: Any) -> Any:
        ctx.state["sum"] = ctx.state.get("sum", 0) + value["wei"]
        return {"sum": ctx.state["sum"], "key": ctx.key}

    job = Job("j")
    job.process(job.topic("in", key="json"), to=job.topic("out", key="json"))(total)
    bench = Bench(job)
    raw = b'{"wei":%d}' % number
    for _ in range(2):
        bench.run(raw, key=b"%d" % number)
    assert bench.outputs[1][1:3] == (b'{"sum":%d,"key":%d}' % (2 * number, number), b"%d" % number)
    assert bench.state.freeze(1) is not None
