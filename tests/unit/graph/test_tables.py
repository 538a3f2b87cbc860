"""Tables in the description of a job: what may change, and what the topics of a join need."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Codec, Job, Table, Topic, Tumbling, last, sum_
from fcluster import count as counted
from fcluster.common.errors import IncompatibleState, JobError
from fcluster.common.ids import repartition_topic
from fcluster.graph.codecs import decode_json, encode_json
from fcluster.graph.compatibility import incompatibilities
from fcluster.graph.stages import check_copartitioned
from fcluster.graph.topology import Topology
from tests.unit.graph.test_compatibility import built, change, count

Grow = Callable[[Job], Any]


def joined(job: Job) -> None:
    table = job.table(job.topic("t"))
    job.stream(job.topic("s")).join(table).to(job.topic("out"))


def not_joined(job: Job) -> None:
    job.stream(job.topic("s")).to(job.topic("out"))


def keyed(job: Job, **options: Any) -> None:
    table = job.table(job.topic("t"))
    job.stream(job.topic("s")).key_by("id", **options).join(table).to(job.topic("out"))


def changes(before: Grow, after: Grow) -> list[str]:
    """Why the one job can't go on as the other: the first reason of each stage."""
    old = json.loads(json.dumps(built(before).describe()))
    return list(incompatibilities(old, built(after)))


# --- what may change --------------------------------------------------------------------------------------


def test_table_is_state_of_the_stage_that_joins_it() -> None:
    (stage,) = built(joined).stages
    assert (stage.name, stage.topics, stage.stores) == ("s", ("s", "t"), ("t",))
    assert stage.changelog is not None
    description = built(joined).describe()
    assert description["format"] == 2
    assert description["stages"]["s"]["tables"] == {"t": {"sources": ["t"], "key": "text", "value": "json"}}


def test_a_table_may_be_added_and_its_joins_may_change() -> None:
    def otherwise(job: Job) -> None:
        table = job.table(job.topic("t"), on_error="skip")
        stream = job.stream(job.topic("s")).filter(bool)
        stream.join(table, lambda value, _row: value, how="left").join(table).to(job.topic("another"))

    assert change(not_joined, joined) is None
    assert change(joined, otherwise) is None
    assert built(joined).fingerprint == built(otherwise).fingerprint != built(not_joined).fingerprint


def test_further_join_does_not_rename_the_stage() -> None:
    def more(job: Job) -> None:
        joined(job)
        table = job.table(job.topic("t"))
        job.stream(job.topic("another")).join(table).to(job.topic("out"))

    assert change(joined, more) is None
    assert [stage.topics for stage in built(more).stages] == [("s", "t", "another")]


def named(name: str | None = None, topic: str = "t", **options: Any) -> Grow:
    def grow(job: Job) -> None:
        table = job.table(job.topic(topic, **options), name=name)
        stream = job.stream(job.topic("s", key=options.get("key", "text")))
        stream.join(table).to(job.topic("out", key=options.get("key", "text")))

    return grow


def handler_named(name: str) -> Grow:
    return lambda job: job.stream(job.topic("s")).process(count, name=name, to=job.topic("out"))


handler = handler_named("t")


def len_of(value: Any) -> int:
    return len(value)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (named(), not_joined, "The table 't' of stage 's' has state, but is no longer in the job."),
        (named(), named("rows"), "no longer in the job (renamed to 'rows'?)."),
        (
            named("rows"),
            named("rows", "u"),
            "The table 'rows' used to be filled from 't', and is now filled from 'u'",
        ),
        (
            named(),
            named(value="text"),
            "has text keys and json values, and is now declared with text keys and text",
        ),
        (named(), named(key="int"), "is now declared with int keys and json values"),
        (named(), named(value=Codec("own", encode_json, decode_json)), "text keys and own values"),
        (named(), handler, "The step 't' has state as a table, and is now a handler."),
        (handler, named(), "The step 't' has state as a handler, and is now a table."),
    ],
)
def test_change_that_does_not_fit_the_rows_is_incompatible(before: Grow, after: Grow, told: str) -> None:
    assert told in str(change(before, after))


def test_stage_behind_a_key_by_is_named_after_a_handler_or_the_table_whatever_is_written() -> None:
    def handled(job: Job) -> None:
        stream = job.stream(job.topic("s")).key_by("id").join(job.table(job.topic("t")))
        stream.process(count, to=job.topic("out"))

    assert [stage.name for stage in built(keyed).stages] == ["s", "with-t"]
    assert [stage.name for stage in built(handled).stages] == ["s", "count"]


def kept(name: str = "kept", topic: str = "s", **options: Any) -> Grow:
    def grow(job: Job) -> None:
        job.stream(job.topic(topic)).map(len_of).table(name=name, **options).to_stream().to(job.topic("out"))

    return grow


def computed(job: Job) -> None:
    table = job.table(job.topic("t"), name="kept").filter(len_of).join(job.table(job.topic("u")), how="outer")
    table.map(len_of).changes().to(job.topic("out"))
    job.stream(job.topic("s")).join(table, how="left").to(job.topic("out"))


def test_table_of_a_stream_is_state_of_its_stage_and_computed_tables_are_none() -> None:
    (stage,) = built(kept()).stages
    assert (stage.name, stage.stores) == ("s", ("kept",))
    assert built(kept()).describe()["stages"]["s"]["tables"] == {
        "kept": {"sources": ["s"], "key": "text", "value": "json"}
    }
    (stage,) = built(computed).stages
    assert (stage.topics, stage.stores) == (("t", "u", "s"), ("kept", "u"))
    assert [chain.follows for chain in stage.chains] == [None, "kept", None, "u", None]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (kept(), kept("other"), "no longer in the job (renamed to 'other'?)."),
        (kept(), kept(value="text"), "has text keys and json values, and is now declared with text keys and"),
        (kept(), handler_named("kept"), "The step 'kept' has state as a table, and is now a handler."),
    ],
)
def test_change_that_does_not_fit_the_table_of_a_stream(before: Grow, after: Grow, told: str) -> None:
    assert told in str(change(before, after))


def test_what_computes_a_table_and_who_follows_it_may_change() -> None:
    def otherwise(job: Job) -> None:
        table = job.table(job.topic("t"), name="kept").join(job.table(job.topic("u")))
        table.to_stream().to(job.topic("another"))

    assert change(computed, otherwise) is None
    assert change(otherwise, computed) is None


def grouped(name: str = "g", by: Any = "of", **options: Any) -> Grow:
    def grow(job: Job) -> None:
        groups = job.table(job.topic("t")).group_by(by, name=name, **options)
        groups.aggregate(n=counted(), total=sum_()).to_stream().to(
            job.topic("out", key=options.get("key", "text"))
        )

    return grow


def other_aggregates(job: Job) -> None:
    groups = job.table(job.topic("t")).group_by("of", name="g")
    groups.aggregate(n=counted()).to_stream().to(job.topic("out"))


def test_groups_are_a_table_of_a_stage_behind_a_repartition() -> None:
    first, second = built(grouped()).stages
    assert (first.name, first.stores) == ("t", ("t", "g-members"))
    assert (second.name, second.stores) == ("g", ("g",))
    described = built(grouped()).describe()["stages"]
    assert described["t"]["groupings"] == {"g-members": "g"}
    assert described["g"]["key_by"]["by"] == "field of"
    assert described["g"]["encoding"] == {"key": "text", "value": "halves-of-json"}
    assert described["g"]["tables"]["g"] == {
        "sources": ["g"],
        "key": "text",
        "computes": [["n", "count"], ["total", "sum"]],
    }


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (grouped(), grouped("other"), "The table 'g' of stage 'g' has state, but is no longer in the job"),
        (grouped(), other_aggregates, "The table 'g' used to have n=count, total=sum, and now has n=count"),
        (
            grouped(),
            grouped(by="whose"),
            "The group_by of 'g' used the field of, and now uses the field whose",
        ),
        (grouped(), grouped(key="int"), "'g' has text keys"),
        (
            grouped(),
            kept("g", "t"),
            "The table 'g' has state in stage 'g', but is now in 't'",
        ),
    ],
)
def test_change_that_does_not_fit_the_groups(before: Grow, after: Grow, told: str) -> None:
    assert any(told in reason for reason in changes(before, after))


def test_what_rows_contribute_and_what_becomes_of_empty_groups_may_change() -> None:
    assert change(grouped(), grouped(value=len_of, drop_empty=True, on_error="skip")) is None


def test_mistakes_in_groups_are_told() -> None:
    def group(by: Any = "of", *, fields: Any = None, name: str = "g", **options: Any) -> str:
        def grow(job: Job) -> None:
            groups = job.table(job.topic("t")).group_by(by, name=name, **options)
            groups.aggregate(**({"n": counted()} if fields is None else fields))

        return refused(grow)

    assert "The table 'g' is not used" in group()
    assert "group_by got an empty field name" in group("")
    assert "is called with 1 argument" in group(refused_three)
    assert "version=1.5 of group_by is neither text nor a number" in group(version=1.5)
    assert "The name of the groups 'a/b' isn't valid" in group(name="a/b")
    assert "aggregate() of the groups 'g' got nothing to compute" in group(fields={})
    assert "The field 'n' of the groups 'g' is 5, not an aggregate" in group(fields={"n": 5})
    assert "computes 'last', from which a row that changes can't be taken away" in group(fields={"m": last()})
    assert "are named 'g'" in refused(lambda job: (grouped()(job), handler_named("g")(job)))


# --- inputs -----------------------------------------------------------------------------------------------


def test_followed_tables_are_read_from_the_beginning_too_but_event_time_waits_for_them() -> None:
    topology = built(computed)
    (stage,) = topology.stages
    assert topology.table_topics == {"t", "u"}
    assert (stage.table_inputs, stage.timeless_inputs) == ({0, 1}, frozenset())


def test_tables_that_are_joined_need_equally_many_partitions() -> None:
    assert "Copy 'u' to a topic with 6 partitions" in check(built(computed), "t", t=6, u=2, s=6).remedy


def test_tables_come_first_at_equal_timestamps_and_hold_no_event_time_back() -> None:
    def several(job: Job) -> None:
        rows, both = job.table(job.topic("rows")), job.topic("both")
        out = job.topic("out")
        job.stream(job.topic("s")).join(rows).join(job.table(both)).to(out)
        job.stream(both).to(out)

    topology = built(several)
    (stage,) = topology.stages
    assert stage.topics == ("s", "rows", "both")
    assert stage.precedence == (1, 2, 0)
    assert stage.table_inputs == stage.timeless_inputs == {1}
    assert topology.table_topics == {"rows"}
    assert [chain.name for chain in stage.chains] == ["s-to-out", "rows", "both", "both-to-out"]


def check(topology: Topology, name: str, **counts: int) -> IncompatibleState:
    with pytest.raises(IncompatibleState) as caught:
        check_copartitioned(topology.stage(name), counts)
    return caught.value


def test_topics_of_a_join_need_equally_many_partitions() -> None:
    check_copartitioned(built(joined).stages[0], {"s": 3, "t": 3})
    error = check(built(joined), "s", s=4, t=6)
    assert (
        "joins topics with different numbers of partitions: 's' (4 partitions) and 't' (6 partitions)"
        in error.message
    )
    assert "Put .key_by(...) between the stream of 's' and the join" in error.remedy
    assert "with 6 partitions" in error.remedy


def test_tables_with_different_numbers_of_partitions_are_told_so() -> None:
    def two(job: Job) -> None:
        stream = job.stream(job.topic("s"))
        stream.join(job.table(job.topic("t"))).join(job.table(job.topic("u"))).to(job.topic("out"))

    assert "Copy 'u' to a topic with 6 partitions" in check(built(two), "s", s=6, t=6, u=2).remedy


def test_streams_that_are_joined_need_equally_many_partitions_too() -> None:
    def streams(job: Job) -> None:
        other = job.stream(job.topic("r"))
        job.stream(job.topic("l")).join(other, within=timedelta(1), name="p").to(job.topic("out"))

    error = check(built(streams), "l", l=4, r=6)
    assert "joins topics with different numbers of partitions: 'l' (4 partitions)" in error.message
    assert "Put .key_by(...) between the stream of 'r' and the join" in error.remedy


def test_repartition_topic_from_before_the_join_is_told_so() -> None:
    topic = repartition_topic("j", "with-t")
    assert "fcluster reset" in check(built(keyed), "with-t", **{topic: 2, "t": 6}).remedy


# --- mistakes ---------------------------------------------------------------------------------------------


def refused(grow: Grow) -> str:
    """Why the job that grows this way can't be."""
    with pytest.raises(JobError) as caught:
        built(grow)
    return caught.value.message


def test_table_is_declared_once() -> None:
    job = Job("j")
    topic = job.topic("t")
    table = job.table(topic, name="rows")
    assert job.table(topic) is job.table(topic, name="rows") is table
    assert table.name == "rows"
    with pytest.raises(JobError, match="'t' is declared as a table twice, in different ways"):
        job.table(topic, name="others")


def test_table_that_nobody_uses_is_refused() -> None:
    assert "The table 't' is not used" in refused(lambda job: job.table(job.topic("t")))
    assert "The table 't' is not used" in refused(lambda job: job.table(job.topic("t")).filter(len_of))
    assert "The table 'x' is not used" in refused(lambda job: job.stream(job.topic("t")).table(name="x"))


def test_stream_of_a_table_needs_a_next_step() -> None:
    told = refused(lambda job: job.table(job.topic("t")).to_stream())
    assert told == "The stream on topic 't' ends in a to_stream with nothing after it."


def test_table_that_is_filled_as_time_passes_can_be_looked_up_but_not_followed() -> None:
    def grow(job: Job, *, follow: bool) -> None:
        windows = job.stream(job.topic("s")).window(Tumbling(timedelta(seconds=1)), name="w")
        table = windows.aggregate(n=counted()).table(name="newest")
        if follow:
            table.to_stream().to(job.topic("out"))
        else:
            job.stream(job.topic("r")).join(table).to(job.topic("out"))

    assert built(lambda job: grow(job, follow=False)).stages[0].topics == ("r", "s")
    told = refused(lambda job: grow(job, follow=True))
    assert "The table 'newest' follows 'w', which has results as time passes" in told


def test_join_of_tables_needs_a_table_and_a_function_of_two_values() -> None:
    def join(*arguments: Any, **options: Any) -> str:
        return refused(lambda job: job.table(job.topic("t")).join(*arguments, **options))

    other = Job("other")
    table = other.table(other.topic("t"))
    assert "join() of the table 't' got 'u', not a table" in join("u")
    assert "got the table 't' of the job 'other'" in join(table)
    assert "is called with 2 arguments" in join(table, len_of)
    assert "how='both' of the join with 't' is unknown" in join(table, how="both")
    assert "is called with 1 argument" in refused(lambda job: job.table(job.topic("t")).map(refused_three))


def refused_three(left: Any, right: Any, third: Any) -> Any:
    return left, right, third


def test_join_needs_a_table_and_a_function_of_two_values() -> None:
    def join(*arguments: Any, **options: Any) -> str:
        def grow(job: Job) -> None:
            given = [one(job) if one is rows or one is topic else one for one in arguments]
            job.stream(job.topic("s")).join(*given, **options)

        return refused(grow)

    def rows(job: Job) -> Table:
        return job.table(job.topic("t"))

    def topic(job: Job) -> Topic:
        return job.topic("t")

    assert "join() got" in join(topic)
    assert "how='outer' of the join with 't' is unknown" in join(rows, how="outer")
    assert "is called with 2 arguments" in join(rows, len_of)
    assert "ends in a join with nothing after it" in join(rows)


def test_keys_of_different_kinds_are_refused() -> None:
    def grow(job: Job) -> None:
        table = job.table(job.topic("t", key="int"))
        out = job.topic("out", key="int")
        job.stream(job.topic("s", key="int")).join(table).to(out)
        job.stream(job.topic("x")).join(table).to(out)

    told = refused(grow)
    assert "Topics are joined whose keys are of different kinds: 's' (int), 't' (int), 'x' (text)" in told


def test_name_of_a_table_is_its_own() -> None:
    def grow(job: Job) -> None:
        handler(job)
        named()(job)

    assert "of the job 'j' are named 't'" in refused(grow)


def test_table_of_another_job_is_refused() -> None:
    one, other = Job("one"), Job("other")
    table = other.table(other.topic("t"))
    with pytest.raises(JobError, match="got the table 't' of the job 'other'"):
        one.stream(one.topic("s")).join(table)
