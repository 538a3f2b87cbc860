"""`fcluster.testing.Driver`: what the test of a job sees, and that a cluster would do the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcluster import Job, Record
from fcluster.common.errors import IncompatibleState, JobError, SettingsError, StateDamaged
from fcluster.common.ids import changelog_topic, repartition_topic
from fcluster.graph.partitioner import partition_of
from fcluster.testing import Driver, JobStopped
from fcluster.testing import driver as driver_module


class Counting:
    """A job with two stages: words are counted by key, then by their length."""

    def __init__(self, **options: Any) -> None:
        self.job = Job("counting", **options)
        self.words = self.job.topic("words")
        self.counts = self.job.topic("counts")
        self.lengths = self.job.topic("lengths", key="json")
        self.calls: list[Any] = []

        def count(ctx: Any, word: str) -> Iterator[Any]:
            self.calls.append(word)
            ctx.state["n"] = ctx.state.get("n", 0) + 1
            if word == "set":
                ctx.state["words"] = {word}
            yield {"word": word, "n": ctx.state["n"]}
            if word == "bad":
                raise ValueError("a bad word")

        def length(ctx: Any, counted: Any) -> Any:
            ctx.state["n"] = ctx.state.get("n", 0) + counted["n"]
            return {"length": ctx.key, **ctx.state}

        stream = self.job.stream(self.words)
        stream.process(count, to=self.counts)
        (
            self.job.stream(self.words)
            .map(lambda word: {"word": word, "n": 1})
            .key_by(lambda counted: len(counted["word"]), key="json", name="by-length")
            .process(length, to=self.lengths)
        )

    def driver(self, **options: Any) -> Driver:
        return Driver(self.job, **options)


def pairs(driver: Driver, topic: Any) -> list[tuple[Any, Any]]:
    return [(record.key, record.value) for record in driver.read(topic)]


# --- records --------------------------------------------------------------------------------------------


def test_record_passes_all_stages_before_send_returns() -> None:
    counting = Counting()
    with counting.driver() as driver:
        driver.send(counting.words, "one", key="k")
        driver.send(counting.words, "two", key="k")
        assert pairs(driver, counting.counts) == [
            ("k", {"word": "one", "n": 1}),
            ("k", {"word": "two", "n": 2}),
        ]
        assert pairs(driver, counting.lengths) == [(3, {"length": 3, "n": 1}), (3, {"length": 3, "n": 2})]


def test_read_returns_each_record_once_and_records_returns_all() -> None:
    counting = Counting()
    driver = counting.driver()
    driver.send("words", "one", key="k")
    assert driver.read_values("counts") == [{"word": "one", "n": 1}]
    assert driver.read_values("counts") == []
    driver.send("words", "two", key="k")
    assert driver.read_values("counts") == [{"word": "two", "n": 2}]
    assert [record.value["n"] for record in driver.records("counts")] == [1, 2]


def test_key_timestamp_and_headers_are_kept_in_the_output() -> None:
    counting = Counting()
    driver = counting.driver(now_ms=1000)
    sent = driver.send("words", "one", key="k", headers=[("h", "text"), ("none", None)])
    driver.send("words", "two", key="k", timestamp=5)
    driver.now_ms += 1
    driver.send("words", "three", key="k")
    first, *others = driver.read("counts")
    assert sent.raw_value == b'"one"'
    assert (first.key, first.raw_key, first.raw_value) == ("k", b"k", b'{"word":"one","n":1}')
    assert first.headers == [("h", b"text"), ("none", None)]
    assert [first.timestamp, *(record.timestamp for record in others)] == [1000, 5, 1001]


def test_record_may_set_all_and_a_timestamp_of_0_is_written_as_none() -> None:
    job = Job("j")
    source, out, other = job.topic("in"), job.topic("out"), job.topic("other", key="json", value="text")

    @job.process(source, to=out)
    def handle(ctx: Any, value: Any) -> Iterator[Any]:
        yield Record(value=None, timestamp=0)
        yield Record(topic=other, key=[1], value="text", headers=[("h", b"1")])

    driver = Driver(job)
    driver.send(source, 1, key="k", headers=[("own", b"")])
    (tombstone,) = driver.read(out)
    (set_record,) = driver.read(other)
    assert (tombstone.value, tombstone.raw_value, tombstone.timestamp) == (None, None, -1)
    assert (set_record.key, set_record.value, set_record.headers) == ([1], "text", [("h", b"1")])


def test_tombstone_arrives_as_none() -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out")
    job.stream(source).to(out)
    driver = Driver(job)
    driver.send(source, None, key="k")
    driver.send_raw(source, b"null", key=b"k")
    assert [record.raw_value for record in driver.read(out)] == [None, b"null"]


@pytest.mark.parametrize(
    ("value", "error"), [({1}, TypeError), (float("nan"), ValueError), ("\ud83d", (TypeError, ValueError))]
)
def test_value_that_the_source_cannot_hold_is_refused(value: Any, error: Any) -> None:
    driver = Counting().driver()
    with pytest.raises(error):
        driver.send("words", value, key="k")
    assert driver.records("words") == []


def test_partition_is_that_of_the_key_or_the_one_that_is_named() -> None:
    driver = Counting().driver(partitions=7)
    for number in range(30):
        key = f"key{number}"
        assert driver.send("words", "w", key=key).partition == partition_of(key.encode(), 7)
    assert driver.send("words", "w", key="k", partition=6).partition == 6
    with pytest.raises(ValueError, match="has the partitions 0 to 6, and no 7"):
        driver.send("words", "w", key="k", partition=7)


def test_driver_of_something_else_than_a_job_is_refused() -> None:
    with pytest.raises(JobError, match=r"^Driver got 'shop\.py', not a job"):
        Driver("shop.py")  # type: ignore[arg-type]


def test_time_that_is_no_number_of_milliseconds_does_not_pass() -> None:
    with Counting().driver() as driver:
        for options in ({"by_ms": timedelta(minutes=1)}, {"to_ms": datetime(2026, 1, 1, tzinfo=UTC)}):
            with pytest.raises(TypeError, match=r"of advance\(\) is no number of milliseconds"):
                driver.advance(**options)  # type: ignore[arg-type]


def test_names_of_other_test_drivers_say_what_they_are_here() -> None:
    with Counting().driver() as driver:
        for name, hint in (
            ("pipe_input", "Here it is .send(topic, value, key=...)"),
            ("advanceWallClockTime", "Here it is .advance(by_ms=...)"),
            ("getStateStore", "Here it is .state(handler, key)"),
            ("red", "Did you mean .read?"),
        ):
            with pytest.raises(AttributeError) as raised:
                getattr(driver, name)
            assert raised.value.__notes__[0].startswith(hint)
        with pytest.raises(TypeError) as missing:
            driver.advance(1_000)  # type: ignore[misc]
        assert missing.value.__notes__ == ["Call Driver.advance([by_ms=...], [to_ms=...], [clock=...])."]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"timestamp": datetime(2026, 1, 1, tzinfo=UTC)}, TypeError, r"^timestamp= of send\(\) is datetime"),
        ({"timestamp": 1.5}, TypeError, "milliseconds since 1970 as an int"),
        ({"timestamp": -2}, ValueError, "is -2; Kafka takes 0"),
        ({"timestamp": 2**63}, ValueError, "Kafka takes 0"),
        ({"headers": {"trace": b"t1"}}, TypeError, r"^headers= of send\(\) are .* pairs of a str and bytes"),
        ({"headers": [("trace", 5)]}, TypeError, "pairs of a str and bytes or None"),
    ],
)
def test_record_that_kafka_would_not_take_is_not_sent(
    options: Any, error: type[Exception], match: str
) -> None:
    counting = Counting()
    with counting.driver() as driver:
        with pytest.raises(error, match=match):
            driver.send(counting.words, "a", key="k", **options)
        assert counting.calls == []


def test_repartitioned_record_goes_to_the_shard_of_its_new_key() -> None:
    counting = Counting()
    driver = counting.driver(partitions=5)
    for length in range(1, 20):
        driver.send(counting.words, "w" * length, key="k")
    repartition = driver.records(repartition_topic("counting", "by-length"))
    assert {record.partition for record in repartition} == set(range(5))
    assert all(record.partition == partition_of(record.raw_key or b"", 5) for record in repartition)


def test_topics_have_as_many_partitions_as_the_cluster_would_give_them() -> None:
    job = Job("j")
    few, many, out = job.topic("few"), job.topic("many"), job.topic("out")
    left = job.topic("left")
    job.stream(few).key_by("id", name="again").process(lambda ctx, value: value, name="h", to=out)
    job.stream(many).to(job.topic("copy"))
    driver = Driver(job, partitions={"few": 2, "many": 9})
    counts = {
        name: len(driver._topics.partitions(name))  # pyright: ignore[reportPrivateUsage]
        for name in ("few", "many", "out", "copy", "left", repartition_topic("j", "again"))
    }
    assert counts == {
        "few": 2,
        "many": 9,
        "out": 2,
        "copy": 9,
        left.name: 9,
        repartition_topic("j", "again"): 2,
    }


def test_record_without_a_key_has_no_state_but_can_be_repartitioned() -> None:
    counting = Counting()
    driver = counting.driver()
    with pytest.raises(JobStopped, match="has no key"):
        driver.send(counting.words, "one")


def test_output_larger_than_the_producer_may_send_fails_as_on_kafka() -> None:
    job = Job("j", settings={"kafka.message.max.bytes": 2_000})
    source, out, dead = job.topic("in"), job.topic("out"), job.topic("dead", value="bytes")
    job.process(source, to=out, on_error=dead, name="h")(lambda ctx, value: value * 1_000)
    driver = Driver(job)
    driver.send(source, "x", key="k")
    driver.send(source, "xxx", key="k")
    assert driver.read_values(out) == ["x" * 1_000]
    (letter,) = driver.dead_letters()
    assert "more than message.max.bytes" in letter.error


# --- state ----------------------------------------------------------------------------------------------


def test_state_is_shown_by_key_and_is_a_copy() -> None:
    counting = Counting()
    driver = counting.driver()
    driver.send(counting.words, "one", key="a")
    driver.send(counting.words, "three", key="b")
    driver.send(counting.words, "one", key="b")
    assert driver.state("count", "a") == {"n": 1}
    assert driver.state("count", "nobody") == {}
    assert driver.state("length", 3) == {"n": 2}
    assert driver.states("count") == {"a": {"n": 1}, "b": {"n": 2}}
    assert driver.states("length") == {3: {"n": 2}, 5: {"n": 1}}
    driver.state("count", "a")["n"] = 100
    assert driver.state("count", "a") == {"n": 1}


def test_state_of_a_record_in_another_partition_than_its_keys() -> None:
    counting = Counting()
    driver = counting.driver(partitions=2)
    elsewhere = 1 - partition_of(b"a", 2)
    driver.send(counting.words, "one", key="a", partition=elsewhere)
    assert driver.state("count", "a") == {}
    assert driver.state("count", "a", partition=elsewhere) == {"n": 1}


def test_state_that_cannot_be_stored_stops_the_job_at_its_record() -> None:
    counting = Counting()
    driver = counting.driver()
    driver.send(counting.words, "one", key="k")
    with pytest.raises(JobStopped, match=r"failed in 'count': .*is a set, which would not come back") as stop:
        driver.send(counting.words, "set", key="k")
    assert (stop.value.topic, stop.value.offset) == ("words", 1)
    assert driver.state("count", "k") == {"n": 1}
    assert driver.read_values(counting.counts) == [{"word": "one", "n": 1}]


def test_handler_that_keeps_state_beyond_its_record_is_found() -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out")
    kept: list[Any] = []

    @job.process(source, to=out)
    def handle(ctx: Any, value: Any) -> Any:
        if not kept:
            kept.append(ctx.state)
        kept[0]["n"] = kept[0].get("n", 0) + 1
        return dict(ctx.state)

    driver = Driver(job)
    driver.send(source, 1, key="k")
    driver.send(source, 1, key="k")
    # A change without asking for the state again is lost. In a cluster, that would happen at some later time.
    assert driver.read_values(out) == [{"n": 1}, {"n": 1}]


# --- failures -------------------------------------------------------------------------------------------


def test_job_that_stops_names_the_record_and_shows_the_handlers_own_exception() -> None:
    counting = Counting()
    driver = counting.driver()
    driver.send(counting.words, "one", key="k")
    with pytest.raises(JobStopped) as stop:
        driver.send(counting.words, "bad", key="k")
    partition = partition_of(b"k", 4)
    assert stop.value.message.startswith(
        f"record words/{partition} at offset 1 failed in 'count': ValueError: a bad word"
    )
    assert (stop.value.topic, stop.value.partition, stop.value.offset) == ("words", partition, 1)
    assert "on_error" in stop.value.remedy
    assert isinstance(stop.value.__cause__, ValueError)
    assert stop.value.__notes__ == ["Its key: b'k'", "Its value: b'\"bad\"'"]


def test_stopped_job_accepts_nothing_until_it_is_restarted() -> None:
    counting = Counting()
    driver = counting.driver()
    with pytest.raises(JobStopped):
        driver.send(counting.words, "bad", key="k")
    for call in (lambda: driver.send(counting.words, "one", key="k"), driver.barrier, driver.settle):
        with pytest.raises(JobStopped, match="a bad word"):
            call()
    assert driver.read(counting.counts) == []
    with pytest.raises(JobStopped, match="a bad word"):
        driver.crash()


def test_restarted_job_retries_the_record() -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out")
    service = {"is_down": True}

    @job.process(source, to=out)
    def handle(ctx: Any, value: Any) -> Any:
        if service["is_down"]:
            raise ConnectionError("no answer")
        return value

    driver = Driver(job)
    with pytest.raises(JobStopped, match="no answer"):
        driver.send(source, 1, key="k")
    service["is_down"] = False
    driver.crash()
    assert driver.read_values(out) == [1]


def test_undecodable_record_stops_or_becomes_a_dead_letter() -> None:
    driver = Counting().driver()
    with pytest.raises(JobStopped, match="can't be decoded") as stop:
        driver.send_raw("words", b"{", key=b"k")
    assert isinstance(stop.value.__cause__, ValueError)

    tolerant = Job("tolerant")
    source, out, dead = tolerant.topic("in"), tolerant.topic("out"), tolerant.topic("dead", value="bytes")
    tolerant.stream(source, on_error=dead).to(out)
    driver = Driver(tolerant)
    driver.send_raw(source, b"{", key=b"k", headers=[("h", "1")])
    (letter,) = driver.dead_letters(dead)
    assert (letter.topic, letter.offset, letter.is_stub) == ("in", 0, False)
    assert (letter.record.raw_value, letter.record.headers[0]) == (b"{", ("h", b"1"))
    assert driver.skipped == 1
    assert driver.read(out) == []


def test_dead_letter_names_its_origin_and_leaves_no_other_effect() -> None:
    job = Job("j")
    source, out, dead = job.topic("in"), job.topic("out"), job.topic("dead", value="bytes")

    @job.process(source, to=out, on_error=dead)
    def handle(ctx: Any, value: Any) -> Iterator[Any]:
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        yield value
        if value == "bad":
            raise ValueError("a bad value")

    driver = Driver(job)
    driver.send(source, "good", key="k")
    sent = driver.send(source, "bad", key="k")
    assert driver.read_values(out) == ["good"]
    assert driver.state("handle", "k") == {"n": 1}
    (letter,) = driver.dead_letters()
    assert (letter.topic, letter.partition, letter.offset) == ("in", sent.partition, sent.offset)
    assert (letter.handler, letter.error) == ("handle", "ValueError: a bad value")
    assert letter.record.value == b'"bad"'
    assert driver.skipped == 1


def test_interrupt_and_pytests_outcomes_are_raised_whatever_the_rule_is() -> None:
    for error in (KeyboardInterrupt, pytest.fail.Exception):
        job = Job("j", on_error="skip")
        source, out = job.topic("in"), job.topic("out")
        raising: list[type[BaseException]] = [error]

        @job.process(source, to=out)
        def handle(ctx: Any, value: Any, raising: Any = raising) -> Any:
            if raising:
                raise raising.pop()
            return value

        driver = Driver(job)
        with pytest.raises(error):
            driver.send(source, 1, key="k")
        driver.send(source, 2, key="k")
        assert driver.read_values(out) == [1, 2]


def test_unknown_names_are_refused_with_a_similar_one() -> None:
    driver = Counting().driver()
    for call, name in (
        (lambda: driver.send("word", "x"), "Did you mean 'words'"),
        (lambda: driver.send("counts", "x"), "is not read by the job"),
        (lambda: driver.read("count"), "Did you mean 'counts'"),
        (lambda: driver.state("counts", "x"), "Did you mean 'count'"),
        (lambda: Counting().driver(partitions={"word": 2}), "Did you mean 'words'"),
    ):
        with pytest.raises(JobError, match=name):
            call()
    with pytest.raises(SettingsError, match="Did you mean"):
        Counting().driver(settings={"isolation.levle": "read-committed"})
    with pytest.raises(ValueError, match="not a number of partitions"):
        Counting().driver(partitions=0)


# --- epochs ---------------------------------------------------------------------------------------------


def test_open_epoch_is_visible_to_read_uncommitted_only_and_to_no_later_stage() -> None:
    counting = Counting()
    driver = counting.driver(auto_barrier=False)
    driver.send(counting.words, "one", key="k")
    assert driver.read(counting.counts) == []
    assert len(driver.records(counting.counts, isolation="read-uncommitted")) == 1
    assert driver.records(counting.lengths, isolation="read-uncommitted") == []
    driver.barrier()
    assert len(driver.read(counting.counts)) == 1
    assert driver.read(counting.lengths) == []
    assert len(driver.records(counting.lengths, isolation="read-uncommitted")) == 1
    driver.settle()
    assert driver.read_values(counting.lengths) == [{"length": 3, "n": 1}]


def test_crash_rolls_back_the_open_epoch_and_processes_it_again() -> None:
    counting = Counting()
    driver = counting.driver(auto_barrier=False)
    driver.send(counting.words, "one", key="k")
    driver.barrier()
    driver.send(counting.words, "two", key="k")
    assert driver.state("count", "k") == {"n": 2}
    assert counting.calls == ["one", "two"]
    driver.crash()
    assert counting.calls == ["one", "two", "two"]
    assert driver.state("count", "k") == {"n": 2}
    assert driver.read_values(counting.counts) == [{"word": "one", "n": 1}]
    assert [record.value["n"] for record in driver.records("counts", isolation="read-uncommitted")] == [
        1,
        2,
        2,
    ]
    driver.barrier()
    assert driver.read_values(counting.counts) == [{"word": "two", "n": 2}]


def test_state_after_a_crash_follows_from_the_deltas() -> None:
    counting = Counting()
    driver = counting.driver()
    for number in range(20):
        driver.send(counting.words, "w" * (number % 4 + 1), key=f"k{number % 5}")
    before = driver.states("count"), driver.states("length")
    driver.crash()
    assert (driver.states("count"), driver.states("length")) == before
    assert driver.read(counting.counts)[-1].value["n"] == 4


def test_deleted_state_stays_deleted_after_a_crash() -> None:
    job = Job("j")
    source = job.topic("in")

    @job.process(source)
    def handle(ctx: Any, value: Any) -> None:
        ctx.state.clear()
        ctx.state.update(value)

    driver = Driver(job)
    driver.send(source, {"a": 1}, key="k")
    driver.send(source, {}, key="k")
    driver.crash()
    assert driver.states("handle") == {}


def test_failure_in_an_open_epoch_commits_the_records_before_it() -> None:
    counting = Counting()
    driver = counting.driver(auto_barrier=False)
    driver.send(counting.words, "one", key="k")
    with pytest.raises(JobStopped, match="a bad word") as stop:
        driver.send(counting.words, "bad", key="k")
    assert isinstance(stop.value.__cause__, ValueError)
    assert driver.read_values(counting.counts) == [{"word": "one", "n": 1}]
    assert driver.state("count", "k") == {"n": 1}


def test_bad_state_in_a_large_epoch_is_traced_to_its_record() -> None:
    counting = Counting()
    driver = counting.driver(auto_barrier=False)
    for word in ("one", "set", "two"):
        driver.send(counting.words, word, key=word)
    with pytest.raises(JobStopped, match="is a set") as stop:
        driver.settle()
    assert stop.value.offset == driver.records("words")[1].offset
    assert [record.value["word"] for record in driver.records(counting.counts)] == ["one"]


def test_bad_state_follows_the_rule_of_its_handler() -> None:
    counting = Counting(on_error="skip")
    driver = counting.driver(auto_barrier=False)
    for word in ("one", "set", "two", "bad"):
        driver.send(counting.words, word, key="k")
    driver.settle()
    assert driver.read_values(counting.counts) == [{"word": "one", "n": 1}, {"word": "two", "n": 2}]
    assert driver.skipped == 2


def test_damaged_delta_is_noticed() -> None:
    counting = Counting()
    driver = counting.driver(partitions=1)
    driver.send(counting.words, "one", key="k")
    (partition,) = driver._topics.partitions(changelog_topic("counting", "words"))  # pyright: ignore[reportPrivateUsage]
    partition.records.pop()
    driver.crash()
    with pytest.raises(StateDamaged, match="ends at epoch 0, but the committed offset says epoch 1"):
        driver.state("count", "k")


def test_stage_that_reads_uncommitted_records_reads_open_and_lost_ones() -> None:
    job = Job("j")
    source, middle, out = job.topic("in"), job.topic("middle", isolation="read-uncommitted"), job.topic("out")
    job.stream(source).to(middle)
    job.stream(middle).to(out)
    driver = Driver(job, partitions=1, auto_barrier=False)
    driver.send(source, 1, key="k")
    driver.crash()
    driver.settle()
    assert driver.read_values(middle) == [1]
    assert driver.read_values(out) == [1, 1]


words = st.lists(
    st.tuples(st.sampled_from(["a", "bb", "ccc", "dddd"]), st.sampled_from(["k", "l", "m"])), max_size=12
)
pauses = st.lists(st.sampled_from(["", "", "barrier", "crash", "settle"]), min_size=12, max_size=12)


def run_with(sent: list[tuple[str, str]], between: list[str]) -> dict[str, Any]:
    """All committed outputs, with these actions between the records."""
    counting = Counting()
    driver = counting.driver(auto_barrier=not between, partitions=3)
    for (word, key), what in zip(sent, between or [""] * len(sent), strict=False):
        driver.send(counting.words, word, key=key)
        if what:
            getattr(driver, what)()
    driver.settle()
    outputs = {
        topic.name: [
            (record.partition, record.raw_key, record.raw_value, record.timestamp)
            for record in driver.records(topic)
        ]
        for topic in (counting.counts, counting.lengths)
    }
    return {**outputs, "states": (driver.states("count"), driver.states("length"))}


@settings(max_examples=150, deadline=None)
@given(words, pauses)
def test_committed_results_do_not_depend_on_barriers_and_crashes(
    sent: list[tuple[str, str]], between: list[str]
) -> None:
    assert run_with(sent, between) == run_with(sent, [])


@pytest.mark.parametrize("planted", ["outputs stay", "offsets stay behind", "state goes on"])
def test_that_comparison_can_fail(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if planted == "outputs stay":
        monkeypatch.setattr(driver_module.Topics, "abort", driver_module.Topics.commit)
    elif planted == "offsets stay behind":
        monkeypatch.setattr(driver_module.CommittedPosition, "encode_metadata", lambda _self: "1:0:0:f")
    else:
        monkeypatch.setattr(driver_module.Shard, "freeze", _freeze_without_delta(driver_module.Shard.freeze))
    sent, between = [("a", "k"), ("bb", "k"), ("a", "k")], ["barrier", "crash", "crash"]
    with pytest.raises((AssertionError, StateDamaged)):
        assert run_with(sent, between) == run_with(sent, [])


def _freeze_without_delta(freeze: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, epoch: int) -> Any:
        frozen = freeze(self, epoch)
        frozen.delta.clear()
        return frozen

    return planted


# --- what it needs --------------------------------------------------------------------------------------


def test_driver_imports_neither_kafka_nor_rocksdb_nor_sockets() -> None:
    script = (
        "import sys\n"
        "from fcluster import Job\n"
        "from fcluster.testing import Driver\n"
        "job = Job('j')\n"
        "handle = lambda ctx, value: ctx.state.update(n=1)\n"
        "job.stream(job.topic('in')).process(handle, name='h')\n"
        "driver = Driver(job)\n"
        "driver.send('in', 1, key='k')\n"
        "driver.crash()\n"
        "assert driver.state('h', 'k') == {'n': 1}\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'confluent_kafka', 'rocksdict', 'zmq', 'obstore', 'pytest', 'socket'}))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# --- merged topics --------------------------------------------------------------------------------------


def merging_job() -> Job:
    job = Job("j")
    orders, payments, out = job.topic("orders"), job.topic("payments"), job.topic("out")

    def balance(ctx: Any, value: Any) -> Any:
        ctx.state["sum"] = ctx.state.get("sum", 0) + value["amount"]
        return [ctx.topic, ctx.state["sum"]]

    job.merge(orders, job.stream(payments).key_by("account")).process(balance, to=out)
    return job


def test_merged_topics_change_one_state() -> None:
    with Driver(merging_job(), partitions={"orders": 3, "payments": 2}) as driver:
        driver.send("orders", {"amount": 1}, key="a")
        driver.send("payments", {"amount": 10, "account": "a"}, key="other")
        driver.crash()
        driver.send("orders", {"amount": 100}, key="a")
        crossing = driver.topology.stage("orders").topics[1]
        assert driver.read_values("out") == [["orders", 1], [crossing, 11], ["orders", 111]]
        assert driver.state("balance", "a") == {"sum": 111}
        assert driver.states("balance") == {"a": {"sum": 111}}


def test_merged_records_that_wait_together_are_processed_by_their_timestamps() -> None:
    job = Job("j")
    first, second = job.topic("first"), job.topic("second")
    job.merge(first, second).to(job.topic("out"))
    with Driver(job, partitions=1, auto_barrier=False) as driver:
        for topic, timestamp in ((first, 30), (second, 20), (first, 40), (second, 30)):
            driver.send(topic, f"{topic.name} {timestamp}", timestamp=timestamp)
        driver.crash()
        driver.settle()
        assert driver.read_values("out") == ["second 20", "first 30", "second 30", "first 40"]


def test_failed_record_is_not_confused_with_that_of_another_topic_at_its_offset() -> None:
    job = Job("j")
    first, second = job.topic("first"), job.topic("second", value="text")

    def positive(_ctx: Any, value: Any) -> Any:
        return int(value) if int(value) > 0 else {}[value]

    job.merge(first, second).process(positive, to=job.topic("out"), on_error="skip")
    with Driver(job, partitions=1) as driver:
        driver.send(first, 1, key="k")
        driver.send(second, "0", key="k")
        driver.send(second, "2", key="k")
        assert (driver.read_values("out"), driver.skipped) == ([1, 2], 1)


def test_merged_topics_with_different_numbers_of_partitions_are_refused() -> None:
    job = Job("j")
    job.merge(job.topic("first"), job.topic("second")).to(job.topic("out"))
    with pytest.raises(IncompatibleState, match=r"'first' \(2 partitions\) and 'second' \(3 partitions\)"):
        Driver(job, partitions={"first": 2, "second": 3})


def test_stop_after_bad_state_ends_although_timestamps_order_the_records() -> None:
    job = Job("j", on_error="skip")
    first, second, third = job.topic("first"), job.topic("second"), job.topic("third")
    calls: list[Any] = []

    def handle(ctx: Any, value: Any) -> Any:
        calls.append(value)
        if value == "unkept":
            ctx.state["odd"] = {1}
        return value

    def fails_later(value: Any) -> Any:
        if value == "fails" and calls.count("fails") > 1:
            raise ValueError("this time it fails")
        return value

    merged = job.merge(first, second, third).process(handle)
    merged.map(fails_later, on_error="stop").to(job.topic("out"))
    with Driver(job, partitions=1, auto_barrier=False) as driver:
        for topic, value, timestamp in ((first, "fails", 30), (second, "unkept", 20), (third, "x", 10)):
            driver.send(topic, value, key="k", timestamp=timestamp)
        with pytest.raises(JobStopped, match="this time it fails"):
            driver.crash()
        assert (driver.read_values("out"), driver.skipped) == (["x"], 1)


@pytest.mark.parametrize("auto_barrier", [True, False])
def test_job_stops_at_the_record_behind_the_last_dead_letter_that_may_be_written(auto_barrier: bool) -> None:
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    job.stream(job.topic("in")).map(lambda value: 1 // value, on_error=dead).to(job.topic("out"))
    settings = {"dead.letters.max": 2}
    with Driver(job, partitions=1, settings=settings, auto_barrier=auto_barrier) as driver:
        for value in (0, 1, 0, 1):
            driver.send("in", value, key="k")
        with pytest.raises(JobStopped) as caught:
            driver.send("in", 0, key="k")
        assert caught.value.message == (
            "record in/0 at offset 4 failed: ZeroDivisionError: integer division or modulo by zero; and 2 "
            "dead letters were already written to 'dead' since the job has started (dead.letters.max)"
        )
        assert [letter.offset for letter in driver.dead_letters()] == [0, 2]
        assert driver.read_values("out") == [1, 1]
        driver.crash()  # the job is started again, and counts anew
        assert [letter.offset for letter in driver.dead_letters()][:2] == [0, 2]


@pytest.mark.parametrize("crashes", [False, True])
def test_dead_letters_of_all_shards_and_workers_count(crashes: bool) -> None:
    job = Job("j")
    dead, other = job.topic("dead", value="bytes"), job.topic("other", value="bytes")
    stream = job.stream(job.topic("in"))
    stream.map(lambda value: 1 // value, on_error=dead).to(job.topic("out"))
    stream.filter(lambda value: value == 0).map(lambda value: 1 // value, on_error=other).to("out")
    with Driver(job, partitions=4, settings={"dead.letters.max": 3}) as driver:
        for key in ("a", "b", "c"):
            driver.send("in", 0, key=key)
            if crashes:
                driver.crash()  # another worker has the shards
        with pytest.raises(JobStopped, match="3 dead letters were already written to 'dead'"):
            driver.send("in", 0, key="d")
        assert [len(driver.dead_letters(topic)) for topic in (dead, other)] == [3, 3]


def test_dead_letters_of_an_epoch_that_is_lost_do_not_count() -> None:
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    stream = job.stream(job.topic("in")).map(lambda value: 1 // value, on_error=dead)
    stream.map(lambda value: {}[value] if value == -1 else value).to(job.topic("out"))
    with Driver(job, partitions=1, settings={"dead.letters.max": 1}, auto_barrier=False) as driver:
        driver.send("in", 0, key="k")
        with pytest.raises(JobStopped, match="KeyError"):
            driver.send("in", -1, key="k")  # the epoch is lost, and processed again up to here
        assert len(driver.dead_letters()) == 1


# --- keys of any kind -------------------------------------------------------------------------------------


class Place(msgspec.Struct, frozen=True):
    """A key that is hashable."""

    city: str


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("text", ["a", "b"]),
        ("int", [3, 7]),
        ("bytes", [b"\0", b"x"]),
        ("json", [{"city": "Bern", "zip": 3000}, {"city": "Wien"}]),
        ("msgpack", [["a", 1], ["b", 2]]),
        (Place, [Place("Bern"), Place("Wien")]),
    ],
)
def test_rows_have_keys_of_any_kind(kind: Any, keys: list[Any]) -> None:
    job = Job("j")
    places = job.topic("places", key=kind)
    table = job.table(places)
    table.map(lambda value: [value]).to_stream().to(job.topic("out", key=kind))
    with Driver(job) as driver:
        for number, key in enumerate(reversed(keys)):
            driver.send(places, number, key=key)
        assert driver.rows(table) == driver.rows("places") == [(keys[0], 1), (keys[1], 0)]
        driver.send(places, None, key=keys[0])
        assert driver.rows(table) == [(keys[1], 0)]


def test_table_and_states_with_keys_that_are_not_hashable_say_what_to_use() -> None:
    job = Job("j")
    places = job.topic("places", key="json")
    table = job.table(places)
    table.to_stream().process(lambda ctx, value: ctx.state.update(last=value), name="keep")
    with Driver(job) as driver:
        assert driver.table(table) == {}
        driver.send(places, 5, key={"city": "Bern"})
        with pytest.raises(JobError, match=r"aren't hashable: \{'city': 'Bern'\}") as caught:
            driver.table(table)
        assert caught.value.remedy == "Use driver.rows(table)."
        with pytest.raises(JobError, match="The keys of the handler 'keep'") as caught:
            driver.states("keep")
        assert caught.value.remedy == "Use driver.state('keep', key)."
        assert driver.state("keep", {"city": "Bern"}) == {"last": 5}
