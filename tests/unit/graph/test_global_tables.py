"""Global tables in the description of a job: its stages and topics, what may change, and mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Job
from fcluster.common.errors import IncompatibleState, JobError
from fcluster.common.ids import repartition_topic
from fcluster.common.settings import Settings
from fcluster.graph.outline import outline
from fcluster.graph.stages import check_copartitioned
from fcluster.kafka.topics import plan_topics
from tests.unit.graph.test_compatibility import built, change

Grow = Callable[[Job], Any]
COPY = repartition_topic("j", "rates-in-calls")


def joined(
    name: str | None = None, on: Any = "in", topic: str = "rates", stream: str = "calls", **options: Any
) -> Grow:
    def grow(job: Job) -> None:
        rates = job.global_table(job.topic(topic, **options), name=name)
        job.stream(job.topic(stream)).join(rates, on=on).to(job.topic("out"))

    return grow


def keyed(job: Job) -> None:
    """The stage that joins is behind a repartition, and its feeder comes behind the stage of the table."""
    rates = job.global_table(job.topic("a-rates"))
    job.stream(job.topic("calls")).key_by("to").join(rates, on="in").to(job.topic("out"))


def test_rows_go_through_the_last_input_of_the_stage_that_joins() -> None:
    topology = built(joined())
    writer, reader = topology.stages
    assert (writer.name, writer.stores, writer.changelog) == ("rates", (), None)
    assert [topic.name for chain in writer.chains for topic in chain.sinks] == [COPY]
    assert (reader.name, reader.topics, reader.stores) == ("calls", ("calls", COPY), ("rates-in-calls",))
    assert reader.precedence == (1, 0)
    assert reader.table_inputs == reader.timeless_inputs == {1}
    assert topology.table_topics == {"rates"}
    assert [topic.name for topic in topology.sources] == ["rates", "calls"]


def test_a_join_is_added_behind_others_without_renaming_the_stage() -> None:
    def both(job: Job) -> None:
        joined()(job)
        job.stream(job.topic("calls")).join(job.table(job.topic("people"))).to(job.topic("out"))

    assert [stage.name for stage in built(both).stages] == ["rates", "calls"]
    assert change(joined(), both) is None


def test_the_copys_topic_gets_as_many_partitions_as_the_joining_stage_has() -> None:
    counts = plan_topics(built(joined()), {"rates": 1, "calls": 6}).counts
    assert counts[COPY] == 6
    topology = built(keyed)
    plan = plan_topics(topology, {"a-rates": 1, "calls": 6})
    by_to, copy = (repartition_topic("j", name) for name in ("with-a-rates", "a-rates-in-with-a-rates"))
    assert plan.counts[by_to] == plan.counts[copy] == 6
    assert plan.missing[copy][1]["retention.ms"] == "-1"


def test_a_grown_source_is_told_what_to_do() -> None:
    reader = built(joined()).stage("calls")
    with pytest.raises(IncompatibleState, match="joins topics with different numbers of partitions") as told:
        check_copartitioned(reader, {"calls": 8, COPY: 6})
    assert "has a copy of a global table" in told.value.remedy
    assert "`fcluster reset` deletes the topic" in told.value.remedy
    assert "with 8 partitions" in told.value.remedy


def test_internal_topics_may_have_other_names() -> None:
    plain = built(joined())
    topology = plain.with_internal_topics({name: f"{name}-x" for name in plain.internal_topics})
    read = {source.topic.name for source in topology.inputs if source.internal}
    written = {sink.name for stage in topology.stages for chain in stage.chains for sink in chain.sinks}
    assert read == written - {"out"} == {f"{COPY}-x"}


def test_outline_shows_who_writes_to_whom() -> None:
    writer, reader = outline(built(joined())).stages
    (step,) = writer.chains[0].steps
    assert (step.kind, step.name) == ("global_table", "rates")
    assert step.details == {"to": "all shards of calls"}
    assert [flow.topic for flow in step.writes] == [COPY]
    steps = [step for chain in reader.chains for step in chain.steps]
    joins = [step.details for step in steps if step.kind == "join"]
    assert joins == [{"table": "rates", "how": "inner", "on": "field in"}]
    assert [step.details for step in steps if step.kind == "table"] == [{"copy_of": "rates"}]


# --- changes --------------------------------------------------------------------------------------------


def not_joined(job: Job) -> None:
    job.stream(job.topic("calls")).to(job.topic("out"))


def as_table(job: Job) -> None:
    job.stream(job.topic("calls")).join(job.table(job.topic("rates"))).to(job.topic("out"))


def stream_of_rates(job: Job) -> None:
    not_joined(job)
    job.stream(job.topic("rates")).to(job.topic("out"))


def in_another_stage(job: Job) -> None:
    joined()(job)
    joined(stream="more")(job)


def of_merged(topic: str) -> Grow:
    """The table's topic is read in one stage with another one."""

    def grow(job: Job) -> None:
        topics = [job.topic(name) for name in ("a", "b")]
        job.merge(*map(job.stream, topics)).to(job.topic("merged"))
        rates = job.global_table(job.topic(topic), name="fx")
        job.stream(job.topic("calls")).join(rates, on="in").to(job.topic("out"))

    return grow


def test_a_global_table_may_be_added_and_what_is_looked_up_may_change() -> None:
    assert change(not_joined, joined()) is None
    assert change(joined(), joined(on=lambda call: call["from"])) is None


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (
            joined(),
            not_joined,
            "'rates' was joined in the stage 'calls', which has a copy of its rows, and is no longer in the",
        ),
        (joined(), joined("fx"), "and is no longer in the job (renamed to 'fx'?). (Undo"),
        (
            in_another_stage,
            joined(),
            "joined in the stage 'more', which has a copy of its rows, and is no longer joined there. (Undo",
        ),
        (
            joined("fx"),
            joined("fx", topic="other"),
            "The global table 'fx' used to be filled from 'rates', and is now filled from 'other'",
        ),
        (of_merged("a"), of_merged("b"), "'fx' used to be filled from 'a', and is now filled from 'b'"),
        (
            joined(),
            joined(value="text"),
            "The global table 'rates' has text keys and json values, and is now",
        ),
        (joined(), joined(key="int"), "is now declared with int keys"),
        (as_table, joined(), "The table 'rates' of stage 'calls' has state, and is now a global table"),
        (joined(), as_table, "'rates' was read in the stage 'rates', but is now read in 'calls'"),
        (stream_of_rates, joined(), "topic 'rates' is new in the stage 'calls', but the job has read that"),
        (joined(), in_another_stage, "topic 'rates' is new in the stage 'more', but the job has read that"),
    ],
)
def test_change_that_does_not_fit_the_rows_is_incompatible(before: Grow, after: Grow, told: str) -> None:
    assert told in str(change(before, after))


# --- mistakes -------------------------------------------------------------------------------------------


def topic_of_that_name(job: Job) -> None:
    job.stream(job.topic("rates-in-calls")).to(job.topic("out"))


def stage_of_that_name(job: Job) -> None:
    keyed = job.stream(job.topic("more")).key_by("in", name="rates-in-calls")
    keyed.process(lambda _ctx, value: value, name="h").to(job.topic("out"))


def handler_of_that_name(job: Job) -> None:
    job.stream(job.topic("more")).process(lambda _ctx, value: value, name="rates-in-calls").to(
        job.topic("out")
    )


@pytest.mark.parametrize("other", [topic_of_that_name, stage_of_that_name, handler_of_that_name])
@pytest.mark.parametrize("is_first", [False, True])
def test_what_has_the_name_of_a_copy_is_told_what_has_that_name(other: Grow, is_first: bool) -> None:
    def both(job: Job) -> None:
        for grow in (other, joined()) if is_first else (joined(), other):
            grow(job)

    error = refused(both)
    assert error.message.startswith(
        "The copy of the global table 'rates' in the stage 'calls' is named 'rates-in"
    )
    assert "job.global_table(topic, name=)" in error.remedy


def refused(grow: Grow) -> JobError:
    with pytest.raises(JobError) as caught:
        built(grow)
    return caught.value


def test_table_is_declared_once() -> None:
    job = Job("j")
    topic = job.topic("rates")
    table = job.global_table(topic)
    assert job.global_table(topic) is table
    for options in ({"name": "other"}, {"history": timedelta(1)}, {"on_error": "skip"}):
        with pytest.raises(JobError, match="declared as a table twice"):
            job.global_table(topic, **options)  # type: ignore[arg-type]


def test_table_that_nobody_uses_is_refused() -> None:
    assert "'rates' is not used" in refused(lambda job: job.global_table(job.topic("rates"))).message


def test_stream_that_leads_to_the_table_itself_is_a_loop() -> None:
    def joins_itself(job: Job) -> None:
        topic = job.topic("rates")
        job.stream(topic).join(job.global_table(topic), on="in").to(job.topic("out"))

    def writes_it(job: Job) -> None:
        topic = job.topic("rates")
        job.stream(job.topic("calls")).join(job.global_table(topic), on="in").to(topic)

    for grow in (joins_itself, writes_it):
        error = refused(grow)
        assert "The global table 'rates' is joined in a stage in front of it" in error.message
        assert "stream.key_by(" in error.remedy
        assert "another job copy the topic" in error.remedy


def test_key_by_in_front_of_the_join_is_a_way_out_of_the_loop() -> None:
    job = Job("j")
    topic = job.topic("rates")
    stream = job.stream(topic).key_by("in", name="by-currency")
    stream.join(job.global_table(topic), on="in").to(job.topic("out"))
    assert [stage.name for stage in job.build(Settings()).stages] == ["rates", "by-currency"]


def test_streams_without_on_need_the_tables_kind_of_key() -> None:
    error = refused(joined(on=None, key="int"))
    assert "got no on=, and the stream's keys are text, those of the table int" in error.message


def test_what_only_tables_have_is_refused() -> None:
    job = Job("j")
    rates: Any = job.global_table(job.topic("rates"))
    table = job.table(job.topic("people"))
    for call in (lambda: rates.to_stream(), lambda: rates.group_by("x", name="g")):
        with pytest.raises(JobError, match=r"The global table 'rates' has no \w+\(\)"):
            call()
    with pytest.raises(JobError, match="got the global table 'rates', which only streams can"):
        table.join(rates)
    with pytest.raises(AttributeError):
        rates.nothing  # noqa: B018


def test_on_and_tables_have_to_fit_the_join() -> None:
    job, other = Job("j"), Job("other")
    rates = job.global_table(job.topic("rates"))
    texts: Any = job.stream(job.topic("texts", value="text"))
    calls: Any = job.stream(job.topic("calls"))
    for refused_call, told in [
        (lambda: calls.join(other.global_table(other.topic("x"))), "got the table 'x' of the job 'other'"),
        (lambda: calls.join(rates, on=7), "join"),
        (lambda: calls.join(rates, on=""), "empty field name"),
        (lambda: texts.join(rates, on="in"), "the values there are text, not JSON objects"),
        (lambda: calls.join(job.table(job.topic("t")), on="in"), "A join with a table got on="),
        (lambda: calls.join(rates, on="in", name="x"), "got within=, name=, grace= or late="),
        (lambda: calls.join(rates, on="in", how="outer"), "how='outer' of the join with 'rates' is unknown"),
    ]:
        with pytest.raises(JobError, match=told):
            refused_call()


@dataclass
class Call:
    currency: str


def test_field_that_the_model_lacks_is_refused_with_what_was_meant() -> None:
    def misspelt(job: Job) -> None:
        calls = job.stream(job.topic("calls", value=Call))
        calls.join(job.global_table(job.topic("rates")), on="curency").to(job.topic("out"))

    error = refused(misspelt)
    assert "on='curency' of the join with 'rates' names the field 'curency'" in error.message
    assert "currency" in error.remedy


def test_timestamps_in_values_are_for_streams() -> None:
    def stamped(job: Job) -> None:
        rates = job.global_table(job.topic("rates", timestamp="at"))
        job.stream(job.topic("calls")).join(rates, on="in").to(job.topic("out"))

    assert "'rates' is declared with timestamp=, and is read as a table" in refused(stamped).message
