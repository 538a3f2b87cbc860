"""Timers: when they fire, in which order, what remains of them, and what follows if they fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fcluster import Job, Record, ValueState
from fcluster.common.errors import JobError
from fcluster.common.failures import Failure
from fcluster.engine.failure import Condemnation
from fcluster.engine.runner import HandlerError, UnreadableRecordError
from fcluster.engine.steps import RecordError
from fcluster.engine.timers import Timer, timer_title
from tests.unit.engine.timers_bench import TimersBench


def fired(_key: Any, ctx: Any) -> Any:
    return ["fired", ctx.key, ctx.timestamp]


def setting(ctx: Any, value: Any) -> Any:
    """Sets and cancels timers: the value is pairs of a name and a time. None cancels."""
    for name, at, *clock in value:
        if at is None:
            ctx.cancel_timer(name)
        else:
            ctx.timer(name, at=at, clock=clock[0] if clock else "event")
    return ["set"]


def job_with(handler: Callable[..., Any] = setting, *, on_error: Any = None, **timers: Any) -> Job:
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    on_error = dead if on_error == "dead" else on_error
    job.process(
        job.topic("in"), to=job.topic("out"), name="h", timers=timers or {"t": fired}, on_error=on_error
    )(handler)
    return job


def endless(key: str, ctx: Any) -> Any:
    """Sets itself for its own time, in the same clock, which it finds out from the time."""
    ctx.timer("t", at=ctx.timestamp, clock="processing" if ctx.timestamp >= 10_000 else "event")
    return [key, ctx.timestamp]


# --- when -----------------------------------------------------------------------------------------------


def test_timer_fires_once_after_the_record_that_moves_the_clock_to_its_time() -> None:
    bench = TimersBench(job_with())
    bench.run([["t", 100]], 50)
    bench.run([], 99)
    assert bench.values() == [["set"], ["set"]]
    bench.run([], 100, key=b"other")
    assert bench.values() == [["set"], ["set"], ["set"], ["fired", "k", 100]]
    assert bench.open[-1][2:4] == (b"k", 100)  # key and timestamp of the output
    bench.run([], 1_000)
    assert len(bench.values()) == 5
    assert bench.pending() == {}


def test_timer_for_a_past_time_fires_after_the_current_record() -> None:
    bench = TimersBench(job_with())
    bench.run([], 100)
    bench.run([["t", 7]], 50)  # the clock doesn't move
    assert bench.values()[-1] == ["fired", "k", 7]


def test_timer_set_again_moves_and_a_cancelled_one_is_removed() -> None:
    bench = TimersBench(job_with())
    bench.run([["t", 100]], 0)
    bench.run([["t", 200]], 0)
    bench.run([], 150)
    assert len(bench.values()) == 3
    bench.run([["t", 300, "processing"]], 150)
    bench.run([], 250)
    assert bench.pending() == {"t": ("processing", 300)}
    bench.run([["t", None], ["t", None]], 250)
    assert bench.pending() == {}
    assert bench.advance(1_000) == 0
    assert all(value == ["set"] for value in bench.values())


def test_processing_time_fires_by_the_wall_clock_only() -> None:
    bench = TimersBench(job_with())
    bench.run([["t", 100, "processing"]], 1_000)
    assert bench.timers.next_processing_ms() == 100
    assert bench.advance(99) == 0
    assert bench.advance(100) == 1
    assert bench.values() == [["set"], ["fired", "k", 100]]
    assert bench.timers.next_processing_ms() is None


def test_timers_fire_by_time_then_key_then_name_whatever_the_handlers_and_layers() -> None:
    names = ["a", "b", "a.a"]
    keys = [b"", b"\x00", b"\x00\x00", b"\x00\xff", b"a", b"aa", b"b" * 300, b"z"]
    job = Job("j")
    source = job.topic("in", key="bytes")
    seen: list[tuple[int, bytes, str]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda key, ctx: seen.append((ctx.timestamp, key, name))

    job.process(source, name="h", timers={name: note(name) for name in names})(setting)
    bench = TimersBench(job)
    expected = []
    for number, key in enumerate(keys):
        times = {name: 100 + (number * 7 + index) % 3 for index, name in enumerate(names)}
        bench.run([[name, at] for name, at in times.items()], 0, key=key)
        expected += [(at, key, name) for name, at in times.items()]
        if number % 3 == 0:
            bench.barrier(flush=number % 2 == 0)
    bench.run([], 1_000)
    assert seen == sorted(expected)


def test_timers_of_two_handlers_fire_in_one_order() -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out")

    def first(ctx: Any, value: Any) -> Any:
        ctx.timer("t", at=value[0])
        return value

    def second(ctx: Any, value: Any) -> None:
        if isinstance(value, list):
            ctx.timer("t", at=value[1])

    def tell(name: str) -> Callable[..., Any]:
        return lambda _key, ctx: Record(topic=out, value=[name, ctx.timestamp])

    job.stream(source).process(first, name="a", timers={"t": tell("a")}).process(
        second, name="b", timers={"t": tell("b")}
    )
    bench = TimersBench(job)
    bench.run([30, 20], 0, key=b"x")
    bench.run([20, 30], 0, key=b"y")
    bench.run([500, 500], 100, key=b"z")
    assert bench.values() == [["b", 20], ["a", 20], ["a", 30], ["b", 30]]  # x before y


def test_timer_set_while_others_fire_fires_in_order() -> None:
    def again(key: str, ctx: Any) -> Any:
        if ctx.timestamp < 130:
            ctx.timer("t", at=ctx.timestamp + 10)
        return [key, ctx.timestamp]

    bench = TimersBench(job_with(t=again))
    bench.run([["t", 100]], 0, key=b"a")
    bench.run([["t", 115]], 0, key=b"b")
    bench.run([], 1_000)
    assert bench.values()[3:] == [
        ["a", 100],
        ["a", 110],
        ["b", 115],
        ["a", 120],
        ["b", 125],
        ["a", 130],
        ["b", 135],
    ]


def test_timer_that_sets_itself_in_the_past_waits_until_event_time_moves_on() -> None:
    bench = TimersBench(job_with(t=endless))
    bench.run([["t", 100]], 150)
    assert bench.values() == [["set"], ["k", 100]]
    assert bench.pending() == {"t": ("event", 151)}
    bench.barrier()
    bench.crash()
    assert not bench.timers.event_is_due(), "a new owner knows it as well"
    bench.run([], 150)
    assert bench.values()[2:] == [["set"]]
    bench.run([], 200)
    assert bench.values()[3:] == [["set"], ["k", 151]]
    assert bench.pending() == {"t": ("event", 201)}


def test_timer_that_sets_itself_in_the_past_waits_until_processing_time_moves_on() -> None:
    bench = TimersBench(job_with(t=endless))
    bench.run([["t", 10_000, "processing"]], 0)
    assert bench.advance(20_000) == 1
    assert bench.advance(20_000) == 0
    assert bench.timers.next_processing_ms() == 20_001
    assert bench.advance(20_005) == 1
    assert bench.pending() == {"t": ("processing", 20_006)}


def test_timers_that_set_each_other_in_two_clocks_end() -> None:
    def ping(_key: str, ctx: Any) -> str:
        ctx.timer("pong", at=1, clock="processing")
        return "ping"

    def pong(_key: str, ctx: Any) -> str:
        ctx.timer("ping", at=1)
        return "pong"

    bench = TimersBench(job_with(ping=ping, pong=pong))
    bench.wall_ms = 500
    bench.run([["ping", 1]], 100)
    assert bench.advance(500) == 0
    assert bench.advance(501) == 1
    assert bench.pending() == {"ping": ("event", 101)}
    bench.run([], 101)
    assert bench.values() == [["set"], "ping", "pong", ["set"], "ping"]


def test_processing_timer_may_set_an_event_timer_before_the_first_record_has_a_time() -> None:
    def wall(_key: str, ctx: Any) -> str:
        ctx.timer("event", at=7)
        return "wall"

    bench = TimersBench(job_with(wall=wall, event=fired))
    bench.run([["wall", 5, "processing"]], -1)
    assert bench.clock.now_ms is None
    assert bench.advance(5) == 1
    assert bench.pending() == {"event": ("event", 7)}


def test_count_of_set_timers_is_right_however_they_end() -> None:
    def failing(_key: str, ctx: Any) -> None:
        ctx.timer("again", at=ctx.timestamp + 1_000)
        ctx.cancel_timer("other")
        raise ValueError("no good")

    bench = TimersBench(job_with(on_error="skip", failing=failing, again=fired, other=fired))
    assert bench.timers.count == 0
    bench.run([["failing", 100], ["other", 500], ["other", 600]], 0)
    bench.run([["again", 500, "processing"]], 0, key=b"b")
    bench.barrier()
    assert bench.timers.count == 3
    bench.run([], 100)
    assert bench.timers.count == 2, "one failed, and was rolled back"
    bench.crash()
    assert bench.timers.count == 3
    bench.run([["failing", None], ["other", None], ["again", None]], 0)
    assert bench.timers.count == 1
    assert bench.advance(500) == 1
    assert bench.timers.count == 0


def test_record_without_a_key_has_no_timers() -> None:
    bench = TimersBench(job_with(on_error="skip"))
    bench.run([["t", 100]], 0, key=None)
    assert bench.port.skipped == 1
    with pytest.raises(HandlerError, match=r"the record has no key, so it has no timers"):
        TimersBench(job_with()).run([["t", 100]], 0, key=None)


@pytest.mark.parametrize(
    ("timer", "message"),
    [
        (["u", 1], r"LookupError: the handler 'h' has no timer 'u'"),
        (["t", "soon"], r"TypeError: at='soon' of a timer is a str"),
        (["t", -1], r"ValueError: at=-1 of a timer is out of range"),
        (["t", 2**60], r"out of range"),
        (["t", 1, "wall"], r"ValueError: clock='wall' of a timer; it takes 'event' or 'processing'"),
    ],
)
def test_wrong_timers_are_refused_when_they_are_set(timer: list[Any], message: str) -> None:
    with pytest.raises(HandlerError, match=message):
        TimersBench(job_with()).run([timer], 0)


def test_handler_without_timers_says_how_to_declare_one() -> None:
    job = Job("j")
    job.process(job.topic("in"), name="h")(setting)
    with pytest.raises(HandlerError, match=r"has no timers; declare one with @h.on_timer\(name\)"):
        TimersBench(job).run([["t", 1]], 0)


def test_timer_function_has_state_and_its_values_pass_the_rest_of_the_chain() -> None:
    total: ValueState[int] = ValueState("total", "int")
    job = Job("j")
    source, out = job.topic("in"), job.topic("out")

    def add(ctx: Any, value: int) -> None:
        ctx.value(total).set(ctx.value(total).get(0) + value)
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        ctx.timer("close", at=100)

    def close(_key: str, ctx: Any) -> Iterator[Any]:
        yield ctx.value(total).get(0)
        yield ctx.state["n"]
        ctx.value(total).clear()
        ctx.state.clear()

    job.stream(source).process(add, states=[total], timers={"close": close}).map(lambda n: n * 10).to(out)
    bench = TimersBench(job)
    bench.run(3, 0)
    bench.run(4, 0)
    bench.run(0, 100, key=b"other")
    assert bench.values() == [70, 20, 0, 10]
    bench.barrier()
    bench.run(1, 200)
    assert bench.values()[4:] == [10, 10]


def test_processing_time_is_the_shells_clock() -> None:
    def remember(ctx: Any, _value: Any) -> Any:
        ctx.timer("t", at=ctx.processing_time + 5, clock="processing")
        return ctx.processing_time

    bench = TimersBench(job_with(remember))
    bench.wall_ms = 77
    bench.run(1, 0)
    assert bench.pending() == {"t": ("processing", 82)}
    assert bench.values() == [77]


def test_timers_beyond_the_limit_fire_later_but_before_the_next_record() -> None:
    left: list[str] = []
    bench = TimersBench(job_with())
    bench.timers.left = lambda: left.append("left")
    for number in range(8):
        bench.run([["t", 100]], 0, key=b"%d" % number)
    bench.timers.at_once_max = 3
    bench.run([], 100)
    assert left == ["left"]
    assert bench.timers.fired == 3
    bench.barrier()
    bench.crash()
    assert bench.timers.is_due()
    bench.run(["not a timer"] * 0, 100, key=b"later")
    values = bench.values()
    assert [value[1] for value in values if value[0] == "fired"] == [str(n) for n in range(8)]
    assert values[-1] == ["set"]


# --- what is kept -------------------------------------------------------------------------------------


def test_timers_survive_a_crash_and_fire_once() -> None:
    bench = TimersBench(job_with())
    bench.run([["t", 100]], 0)
    bench.barrier()
    bench.crash()
    bench.run([], 100, key=b"o")
    assert bench.values()[-1] == ["fired", "k", 100]
    bench.crash()  # before the epoch was committed
    bench.run([], 100, key=b"o")
    bench.barrier()
    bench.crash()
    bench.run([], 200, key=b"o")
    bench.barrier()
    assert [value for value in bench.values() if value[0] == "fired"] == [["fired", "k", 100]]
    assert not any(bench.store.keys_of("h//timers"))
    assert not any(bench.store.keys_of("h//due"))


def test_timer_that_is_set_and_fires_in_one_epoch_leaves_nothing_in_the_delta() -> None:
    bench = TimersBench(job_with())
    bench.run([["t", 10]], 100)
    bench.barrier()
    assert bench.deltas == []


def test_scan_that_misses_the_open_layer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from fcluster.engine.entries import EntryTable

    def noted_only_when_frozen(table: EntryTable, key: bytes, value: Any) -> None:
        table._open[key] = value

    monkeypatch.setattr(EntryTable, "_replace", noted_only_when_frozen)
    with pytest.raises(AssertionError):
        test_timer_fires_once_after_the_record_that_moves_the_clock_to_its_time()


# --- failures -----------------------------------------------------------------------------------------


def failing(_key: Any, ctx: Any) -> Iterator[Any]:
    ctx.state["trace"] = 1
    ctx.timer("t", at=5_000)
    yield "trace"
    raise ValueError("no good")


def test_timer_that_stops_the_job_is_named_and_stays_set_without_other_effects() -> None:
    bench = TimersBench(job_with(t=failing))
    bench.run([["t", 1_767_225_600_123]], 0)
    with pytest.raises(
        UnreadableRecordError,
        match=r"^timer 't' of the handler 'h' for the key b'k' at 2026-01-01T00:00:00.123Z failed in "
        r"'failing': ValueError: no good \(.*test_timers.py:\d+\)$",
    ):
        bench.run([], 1_767_225_600_123, key=b"other")
    assert bench.offset == 2  # the record is processed
    assert bench.values() == [["set"], ["set"]]
    assert bench.pending() == {"t": ("event", 1_767_225_600_123)}
    bench.barrier()
    assert bench.state.documents["h"].peek(b"k") == {}
    bench.crash()
    with pytest.raises(UnreadableRecordError):
        bench.run([], 1_767_225_600_124)
    assert bench.offset == 2  # the timer fires before any record


@pytest.mark.parametrize("rule", ["skip", "dead"])
def test_skipped_timer_is_removed_and_leaves_no_other_effect(rule: str) -> None:
    bench = TimersBench(job_with(t=failing, on_error=rule))
    bench.run([["t", 100]], 0)
    bench.run([], 200)
    assert bench.pending() == {}
    assert bench.state.documents["h"].peek(b"k") == {}
    assert bench.port.skipped == 1
    outputs = [output for output in bench.open if output[0] == "dead"]
    if rule == "dead":
        ((_topic, value, key, timestamp, headers),) = outputs
        assert (value, key, timestamp) == (None, b"k", 100)
        assert {name: (text or b"").decode() for name, text in headers} == {
            "fcluster.error": "ValueError: no good",
            "fcluster.handler": "h",
            "fcluster.timer": "t",
            "fcluster.topic": "in",
            "fcluster.partition": "0",
            "fcluster.offset": "2",
        }
    else:
        assert outputs == []
    assert [output[0] for output in bench.open if output[0] == "out"] == ["out", "out"]


def test_state_that_cannot_be_stored_fails_the_timer_at_once() -> None:
    def leave(_key: Any, ctx: Any) -> None:
        ctx.state["set"] = {1, 2}

    bench = TimersBench(job_with(t=leave, on_error="dead"))
    bench.run([["t", 100]], 100)
    assert bench.open[-1][0] == "dead"
    bench.barrier()
    assert bench.state.documents["h"].peek(b"k") == {}


def test_failure_after_the_handler_follows_the_rule_of_its_own_step() -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out")
    job.stream(source).process(setting, name="h", timers={"t": fired}).map(
        lambda value: {"set": 1}[value[0]], on_error="skip"
    ).to(out)
    bench = TimersBench(job)
    bench.run([["t", 100]], 100)
    assert bench.values() == [1]
    assert bench.port.skipped == 1
    assert bench.pending() == {}


def test_first_refused_output_fails_the_timer_and_a_later_one_condemns_it() -> None:
    def three(_key: Any, _ctx: Any) -> Iterator[Any]:
        yield "one"
        yield "two"
        yield "three"

    bench = TimersBench(job_with(t=three, on_error="skip"))
    bench.refuses = lambda _topic, value: value == b'"one"'
    bench.run([["t", 100]], 100)
    assert bench.values() == [["set"]]
    assert bench.port.skipped == 1
    bench = TimersBench(job_with(t=three, on_error="skip"))
    bench.refuses = lambda _topic, value: value == b'"two"'
    with pytest.raises(HandlerError) as raised:
        bench.run([["t", 100]], 100)
    condemnation = raised.value.condemnation
    assert (condemnation.topic, condemnation.step) == ("out", timer_title("h", Timer(100, b"k", "t")))
    assert condemnation.is_of_timer
    bench.crash()
    bench.timers.condemn(condemnation)
    bench.run([["t", 100]], 100)
    assert bench.values() == [["set"]]
    assert bench.port.skipped == 1


def test_condemned_timer_fails_without_being_called() -> None:
    def deadly(_key: Any, _ctx: Any) -> None:
        raise AssertionError("called")

    title = timer_title("h", Timer(100, b"k", "t"))
    bench = TimersBench(job_with(t=deadly, on_error="dead"))
    bench.timers.condemn(Condemnation(Failure.of_record("it ends processes"), step=title))
    bench.run([["t", 100]], 100)
    assert dict(bench.open[-1][4])["fcluster.error"] == b"it ends processes"
    bench = TimersBench(job_with(t=deadly))
    bench.timers.condemn(Condemnation(Failure.of_record("it ends processes"), step=title))
    with pytest.raises(UnreadableRecordError, match=r"failed in 'deadly': it ends processes"):
        bench.run([["t", 100]], 100)


def test_dead_letter_refused_twice_stops_the_job_and_the_timer_stays_set() -> None:
    bench = TimersBench(job_with(t=failing, on_error="dead"))
    bench.refuses = lambda topic, _value: topic == "dead"
    with pytest.raises(UnreadableRecordError, match=r"not even a stub of it can be written"):
        bench.run([["t", 100]], 100)
    assert bench.pending() == {"t": ("event", 100)}


def test_record_that_fails_sets_no_timer() -> None:
    def fail(ctx: Any, _value: Any) -> None:
        ctx.timer("t", at=100)
        raise RecordError("no good")

    bench = TimersBench(job_with(fail, on_error="skip"))
    bench.run(1, 200)
    assert bench.pending() == {}
    assert bench.values() == []


def test_condemned_record_moves_time_as_well() -> None:
    bench = TimersBench(job_with(on_error="skip"))
    bench.run([["t", 100]], 0)
    bench.runner.condemn(1, Condemnation(Failure.of_record("no good"), step="h"))
    bench.run([], 100)
    assert bench.values() == [["set"], ["fired", "k", 100]]


# --- declaring ----------------------------------------------------------------------------------------


def test_decorator_declares_timers_and_the_handler_remains_a_function() -> None:
    job = Job("j")

    @job.process(job.topic("in"), to=job.topic("out"))
    def customer(ctx: Any, value: Any) -> Any:
        ctx.timer("remind", at=100)
        return value

    @customer.on_timer("remind")
    def remind(key: str, _ctx: Any) -> Any:
        return f"remind {key}"

    class Context:
        def timer(self, name: str, *, at: int) -> None:
            assert (name, at) == ("remind", 100)

    assert customer(Context(), 5) == 5
    bench = TimersBench(job)
    bench.run(1, 100)
    assert bench.values() == [1, "remind k"]
    assert remind("x", None) == "remind x"


def test_wrong_declarations_are_refused() -> None:
    job = Job("j")
    source = job.topic("in")
    handler = job.process(source, name="h")(setting)
    handler.on_timer("t")(fired)
    with pytest.raises(JobError, match=r"'t' of the handler 'h' is taken"):
        handler.on_timer("t")(fired)
    with pytest.raises(JobError, match=r"isn't valid"):
        handler.on_timer("a/b")(fired)
    with pytest.raises(JobError, match=r"on_timer 'one' is declared as one\(key"):

        @handler.on_timer("one")
        def one(key: Any) -> None: ...

    with pytest.raises(JobError, match=r"timers= of the handler 'g' got \['t'\]"):
        job.stream(source).process(setting, name="g", timers=["t"])  # type: ignore[arg-type]


def test_job_without_timers_keeps_its_description_and_timer_names_must_not_be_removed() -> None:
    from fcluster.common.settings import Settings
    from fcluster.graph.compatibility import incompatibility

    def built(*names: str) -> Any:
        job = Job("j")
        job.process(job.topic("in"), name="h", timers=dict.fromkeys(names, fired))(setting)
        return job.build(Settings())

    plain, one, two = built(), built("a"), built("a", "b")
    assert plain.describe()["format"] == 1
    assert "timers" not in plain.describe()["stages"]["in"]
    assert one.describe()["format"] == 2
    assert one.describe()["stages"]["in"]["timers"] == {"h": ["a"]}
    assert len({plain.fingerprint, one.fingerprint, two.fingerprint}) == 3
    assert incompatibility(plain.describe(), one) is None
    assert incompatibility(one.describe(), two) is None
    assert incompatibility(two.describe(), one) == (
        "The timer 'b' of the handler 'h' may be set, but no longer has an on_timer function."
    )
    assert "renamed to 'c'" in str(incompatibility(one.describe(), built("c")))
