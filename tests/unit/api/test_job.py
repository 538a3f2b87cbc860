from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from fcluster import UNSET, Job, Record, Topic, Tumbling
from fcluster import count as count_
from fcluster.common.errors import JobError
from fcluster.common.ids import TOPIC_NAME_CHARACTERS_MAX, changelog_topic, repartition_topic
from fcluster.common.settings import Settings, resolve
from fcluster.graph.operators import Filter, Map, Process
from fcluster.graph.stages import Input
from fcluster.graph.topology import Topology


def refused(act: Callable[[], Any]) -> JobError:
    with pytest.raises(JobError) as caught:
        act()
    assert caught.value.message
    assert caught.value.remedy, "a refusal has to say what to do"
    return caught.value


def refused_build(job: Job) -> JobError:
    return refused(lambda: job.build(Settings()))


def count(ctx: Any, value: Any) -> Any:
    return value


def total(ctx: Any, value: Any) -> Any:
    yield value


def only_process(topology: Topology) -> Process:
    (stage,) = topology.stages
    (chain,) = stage.chains
    (process,) = chain.processes
    return process


# --- what is built --------------------------------------------------------------------------------------


def test_decorated_handler_becomes_one_stage_named_after_its_topic() -> None:
    job = Job("carrier-delays")
    flights, totals = job.topic("flights"), job.topic("carrier-totals")

    @job.process(flights, to=totals)
    def carrier(ctx: Any, flight: Any) -> Any:
        yield flight

    topology = job.build(Settings())
    (stage,) = topology.stages
    assert (topology.job, stage.name, stage.inputs) == (
        "carrier-delays",
        "flights",
        (Input(flights, internal=False, name="flights"),),
    )
    assert (stage.stores, stage.changelog) == (("carrier",), changelog_topic("carrier-delays", "flights"))
    assert [(chain.name, chain.sink, chain.rekey) for chain in stage.chains] == [("carrier", totals, None)]
    assert only_process(topology) == Process("carrier", carrier, "stop", "many")


def test_key_by_starts_a_stage_after_a_repartition_topic() -> None:
    job = Job("j")
    flights, totals = job.topic("flights"), job.topic("totals")
    job.stream(flights).filter(bool).map(dict).key_by("tailnum").process(count, to=totals)
    first, second = job.build(Settings()).stages
    assert (first.name, first.stores, first.changelog) == ("flights", (), None)
    (chain,) = first.chains
    assert chain.operators == (Filter(bool), Map(dict))
    assert (chain.rekey, chain.sink) == ("tailnum", second.inputs[0].topic)
    (source,) = second.inputs
    assert (second.name, source.internal, source.topic.name) == (
        "count",
        True,
        repartition_topic("j", "count"),
    )
    assert source.topic.isolation == "read-committed"
    assert [(c.name, c.sink) for c in second.chains] == [("count", totals)]


def test_stages_come_upstream_first_whatever_the_order_in_the_file() -> None:
    job = Job("j")
    a, b, c = job.topic("a"), job.topic("b"), job.topic("c")
    job.stream(b).process(count, name="late", to=c)
    job.stream(a).process(count, name="early", to=b)
    assert [stage.name for stage in job.build(Settings()).stages] == ["a", "b"]


def test_handlers_of_one_topic_share_its_stage() -> None:
    job = Job("j")
    source = job.topic("a")
    job.process(source)(count)
    job.process(source)(total)
    (stage,) = job.build(Settings()).stages
    assert stage.stores == ("count", "total")
    assert [chain.sink for chain in stage.chains] == [None, None]


def test_stream_that_branches_before_any_handler_becomes_several_chains() -> None:
    job = Job("j")
    shared = job.stream(job.topic("a")).filter(bool)
    shared.process(count)
    shared.process(total)
    (stage,) = job.build(Settings()).stages
    assert [[type(o) for o in chain.operators] for chain in stage.chains] == [[Filter, Process]] * 2


def test_two_handlers_after_one_key_by_share_its_stage() -> None:
    job = Job("j")
    keyed = job.stream(job.topic("a")).key_by("k")
    keyed.process(total)
    keyed.process(count)
    _, stage = job.build(Settings()).stages
    assert (stage.name, stage.stores) == ("total", ("total", "count"))


def test_key_by_directly_into_a_topic_needs_no_further_stage() -> None:
    job = Job("j")
    out = job.topic("out")
    job.stream(job.topic("a")).key_by("k").to(out)
    (stage,) = job.build(Settings()).stages
    assert [(chain.rekey, chain.sink) for chain in stage.chains] == [("k", out)]


def test_key_by_followed_only_by_a_map_is_named_after_the_output_topic() -> None:
    job = Job("j")
    job.stream(job.topic("a")).key_by("k").map(dict).to(job.topic("out"))
    assert [stage.name for stage in job.build(Settings()).stages] == ["a", "out"]


def test_named_key_by_names_its_stage() -> None:
    job = Job("j")
    job.stream(job.topic("a")).key_by("k", name="by-k").process(count)
    assert [stage.name for stage in job.build(Settings()).stages] == ["a", "by-k"]


def test_two_key_bys_in_a_row_chain_three_stages() -> None:
    job = Job("j")
    job.stream(job.topic("a")).key_by("k").process(count).key_by("m").process(total)
    first, second, third = job.build(Settings()).stages
    assert [first.name, second.name, third.name] == ["a", "count", "total"]
    assert second.chains[0].sink == third.inputs[0].topic


def test_unmapped_values_keep_the_sources_encoding_in_a_repartition_topic() -> None:
    job = Job("j")
    raw = job.topic("a", value="bytes")
    job.stream(raw).key_by(lambda value: value[:4].decode()).process(count)
    job.stream(raw).map(len).key_by(str).process(total)
    values = {stage.name: stage.inputs[0].topic.value for stage in job.build(Settings()).stages}
    assert values == {"a": "bytes", "count": "bytes", "total": "json"}


def test_building_twice_gives_the_same() -> None:
    job = Job("j")
    job.stream(job.topic("a")).key_by("k").process(count)
    assert job.build(Settings()) == job.build(Settings())


def test_partial_and_wrapped_generators_count_as_generators() -> None:
    @functools.wraps(total)
    def logged(*args: Any) -> Any:
        return total(*args)

    class Yielding:
        def __call__(self, ctx: Any, value: Any) -> Any:
            yield value

    for handler in (functools.partial(total), logged, Yielding()):
        job = Job("j")
        job.process(job.topic("a"), name="h")(handler)
        assert only_process(job.build(Settings())).returns == "many"
    job = Job("j")
    job.process(job.topic("a"))(count)
    assert only_process(job.build(Settings())).returns == "one"


def test_unset_isolation_follows_the_settings() -> None:
    job = Job("j", settings={"kafka.consumer.isolation-level": "READ_UNCOMMITTED"})
    open_, fixed = job.topic("open"), job.topic("fixed", isolation="read-committed")
    job.stream(open_).process(count)
    job.stream(fixed).process(total)

    def isolations(topology: Topology) -> list[str]:
        return [source.topic.isolation for source in topology.inputs]

    of_the_job_file = resolve(job.settings, None, {}, {})
    assert isolations(job.build(of_the_job_file)) == ["read-uncommitted", "read-committed"]
    from_flags = resolve(job.settings, None, {}, {"isolation.level": "read-committed"})
    assert isolations(job.build(from_flags)) == ["read-committed", "read-committed"]


@pytest.mark.parametrize(
    "options",
    [
        {"isolation": "read-uncommitted"},
        {"isolation_level": "read_uncommitted"},
        {"kafka.consumer.isolation-level": "read-uncommitted"},
        {"isolation.level": "READ_UNCOMMITTED"},
    ],
)
def test_topic_accepts_every_name_of_its_isolation(options: dict[str, Any]) -> None:
    assert Job("j").topic("a", **options).isolation == "read-uncommitted"


def test_settings_are_accepted_by_name_and_as_keywords() -> None:
    job = Job("j", settings={"commit.interval.ms": 50}, num_standby_replicas=1)
    settings = resolve(job.settings, None, {}, {})
    assert (settings.commit_interval_max_ms, settings.num_standby_replicas) == (50, 1)


def test_topic_declared_twice_alike_is_one_topic() -> None:
    job = Job("j")
    assert job.topic("a") is job.topic("a")


def test_outputs_are_all_topics_that_may_be_written() -> None:
    job = Job("j")
    source, out, letters, extra = (job.topic(name) for name in ("a", "out", "letters", "extra"))
    job.stream(source).key_by("k").process(count, to=out, on_error=letters)
    topology = job.build(Settings())
    assert topology.sources == (source,)
    assert set(topology.outputs) == {out, letters, extra}


# --- records --------------------------------------------------------------------------------------------


def test_record_distinguishes_unset_fields_from_none() -> None:
    record = Record(key=None)
    assert record.key is None
    assert (record.value, record.headers, record.timestamp, record.topic) == (UNSET, UNSET, UNSET, None)
    assert not hasattr(record, "__dict__")


def test_records_compare_by_their_fields() -> None:
    assert Record(value={"a": 1}, topic=Topic("t")) == Record(value={"a": 1}, topic=Topic("t"))
    assert Record(value=1) != Record(value=1, key=None)
    assert repr(Record(value=1, timestamp=5)) == "Record(value=1, timestamp=5)"


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "carrier delays", "a/b", ".", "..", "ü", "a\n", "x" * 250])
def test_illegal_names_are_refused(name: str) -> None:
    refused(lambda: Job(name))
    refused(lambda: Job("j").topic(name))
    job = Job("j")
    if name:
        refused(lambda: job.stream(job.topic("a")).process(count, name=name))


@pytest.mark.parametrize("name", ["j-a-changelog", "j-x-repartition", "j-journal", "__consumer_offsets"])
def test_reserved_topic_names_are_refused(name: str) -> None:
    assert "reserved" in refused(lambda: Job("j").topic(name)).message


def test_topic_that_only_begins_like_the_job_is_accepted() -> None:
    assert Job("flights").topic("flights-totals").name == "flights-totals"


def test_internal_names_are_within_kafkas_limit() -> None:
    job = Job("j" * 200)
    job.stream(job.topic("t" * 240)).process(count).key_by("k", name="s" * 249).process(total)
    topics = job.build(Settings()).internal_topics
    assert [len(topic) for topic in topics] == [TOPIC_NAME_CHARACTERS_MAX] * 3
    assert len(set(topics)) == 3


def test_job_without_handlers_is_refused() -> None:
    job = Job("j")
    job.topic("a")
    assert "no handlers" in refused_build(job).message


def test_two_handlers_of_one_name_are_refused_with_a_remedy() -> None:
    job = Job("j")
    job.process(job.topic("a"))(count)
    job.process(job.topic("b"))(count)
    error = refused_build(job)
    assert "'count'" in error.message
    assert "name=" in error.remedy


@pytest.mark.parametrize("handler", [lambda ctx, value: None, functools.partial(count)])
def test_handler_without_a_name_has_to_be_given_one(handler: Any) -> None:
    job = Job("j")
    stream = job.stream(job.topic("a"))
    assert "name=" in refused(lambda: stream.process(handler)).remedy
    stream.process(handler, name="named")
    assert only_process(job.build(Settings())).name == "named"


def test_async_functions_are_refused() -> None:
    async def later(ctx: Any, value: Any) -> Any:
        return value

    async def later_and_more(ctx: Any, value: Any) -> Any:
        yield value

    async def sieve(value: Any) -> bool:
        return True

    job = Job("j")
    stream = job.stream(job.topic("a"))
    for act in (
        lambda: stream.process(later),
        lambda: stream.process(later_and_more),
        lambda: stream.filter(sieve),
    ):
        assert "async def" in refused(act).message


def test_functions_with_the_wrong_parameters_are_refused() -> None:
    def one(value: Any) -> Any:
        return value

    job = Job("j")
    stream = job.stream(job.topic("a"))

    def three(ctx: Any, value: Any, more: Any) -> Any:
        return value, more

    assert "one(ctx, value)" in refused(lambda: stream.process(one)).remedy
    assert "three(value), or as three(ctx, value)" in refused(lambda: stream.map(three)).remedy
    refused(lambda: stream.key_by(three))
    refused(lambda: stream.process("count"))  # type: ignore[arg-type]


def test_filters_and_maps_that_yield_are_refused() -> None:
    def many(value: Any) -> Any:
        yield value

    job = Job("j")
    stream = job.stream(job.topic("a"))
    for act in (lambda: stream.filter(many), lambda: stream.map(many), lambda: stream.key_by(many)):
        assert "yields" in refused(act).message


@pytest.mark.parametrize("operator", ["filter", "map"])
def test_stream_that_ends_in_nothing_is_refused(operator: str) -> None:
    job = Job("j")
    getattr(job.stream(job.topic("a")), operator)(bool)
    assert "nothing after it" in refused_build(job).message


def test_empty_stream_and_dangling_key_by_are_refused() -> None:
    for grow in (lambda stream: stream, lambda stream: stream.key_by("k")):
        job = Job("j")
        grow(job.stream(job.topic("a")))
        assert "nothing after it" in refused_build(job).message


def test_steps_after_to_are_refused() -> None:
    job = Job("j")
    out = job.topic("out")
    closed = job.stream(job.topic("a")).process(count, to=out)
    refused(lambda: closed.map(bool))
    refused(lambda: closed.to(out))


def test_output_of_a_handler_used_twice_is_refused() -> None:
    job = Job("j")
    counted = job.stream(job.topic("a")).process(count)
    counted.to(job.topic("x"))
    counted.map(dict).to(job.topic("y"))
    assert "used in 2 places" in refused_build(job).message


def test_loops_are_refused_and_name_their_topics() -> None:
    job = Job("j")
    a, b = job.topic("a"), job.topic("b")
    job.stream(a).process(count, to=a)
    assert "'a'" in refused_build(job).message

    job = Job("j")
    a, b = job.topic("a"), job.topic("b")
    job.stream(a).process(count, to=b)
    job.stream(b).process(total, to=a)
    assert "b -> a -> b" in refused_build(job).message


def test_dead_letters_into_the_own_source_are_refused() -> None:
    job = Job("j")
    a = job.topic("a")
    job.stream(a).process(count, on_error=a)
    assert "loop" in refused_build(job).message


def test_stage_named_like_a_source_topic_is_refused() -> None:
    job = Job("j")
    job.process(job.topic("count"))(total)
    job.stream(job.topic("a")).key_by("k").process(count)
    assert "'count'" in refused_build(job).message


def test_topics_of_another_job_and_plain_names_are_refused() -> None:
    job, other = Job("j"), Job("other")
    foreign = other.topic("a")
    stream = job.stream(job.topic("b"))
    assert "not declared on the job 'j'" in refused(lambda: job.stream(foreign)).message
    refused(lambda: stream.to(foreign))
    refused(lambda: stream.process(count, to=foreign))
    refused(lambda: stream.process(count, on_error=foreign))
    assert "job.topic('b')" in refused(lambda: job.stream("b")).remedy  # type: ignore[arg-type]


def test_refused_calls_leave_the_job_unchanged() -> None:
    job = Job("j")
    stream = job.stream(job.topic("a"))
    refused(lambda: stream.process(count, to=Topic("elsewhere")))
    stream.process(count)
    assert only_process(job.build(Settings())).name == "count"


def test_topic_declared_in_two_ways_is_refused() -> None:
    job = Job("j")
    job.topic("a", value="json")
    refused(lambda: job.topic("a", value="text"))
    refused(lambda: job.topic("a", isolation="read-uncommitted"))


@pytest.mark.parametrize(
    "options",
    [
        {"key": "avro"},
        {"value": "avro"},
        {"isolation": "serializable"},
        {"retention": 5},
        {"isolation": "read-committed", "isolation.level": "read-uncommitted"},
    ],
)
def test_wrong_topic_options_are_refused(options: dict[str, Any]) -> None:
    refused(lambda: Job("j").topic("a", **options))


def test_field_as_a_key_is_refused_if_values_are_not_objects() -> None:
    job = Job("j")
    job.stream(job.topic("a", value="text")).key_by("k").process(count)
    assert "field k" in refused_build(job).message
    assert refused(lambda: job.stream(job.topic("b")).key_by(""))


def test_unknown_on_error_is_refused() -> None:
    job = Job("j")
    refused(lambda: job.stream(job.topic("a")).process(count, on_error="ignore"))  # type: ignore[arg-type]


def test_topics_that_cannot_exist_together_in_kafka_are_refused_with_the_reason() -> None:
    job = Job("j")
    job.topic("orders.eu_west")
    error = refused(lambda: job.topic("orders_eu.west"))
    assert "can't both exist: Kafka treats '.' and '_' in topic names as equal" in error.message
    assert "misspelt" in error.remedy


@pytest.mark.parametrize("name", ["x-y-changelog-0123456789", "x-repartition-abcdefabcd"])
def test_internal_topics_of_any_job_are_reserved(name: str) -> None:
    assert "reserved" in refused(lambda: Job("j").topic(name)).message


# --- merging --------------------------------------------------------------------------------------------


def test_merged_topics_are_inputs_of_one_stage_with_one_store() -> None:
    job = Job("j")
    orders, payments, out = job.topic("orders"), job.topic("payments", value="text"), job.topic("out")
    job.merge(job.stream(orders).filter(bool), payments).process(count, to=out)
    (stage,) = job.build(Settings()).stages
    assert stage.name == "orders"
    assert stage.topics == ("orders", "payments")
    assert (stage.stores, stage.changelog) == (("count",), changelog_topic("j", "orders"))
    process = Process("count", count)
    assert [(chain.input, chain.operators, chain.sink) for chain in stage.chains] == [
        (0, (Filter(bool), process), out),
        (1, (process,), out),
    ]
    assert len({chain.name for chain in stage.chains}) == 2


def test_merged_stage_contains_all_chains_of_its_topics() -> None:
    job = Job("j")
    a, b = job.topic("a"), job.topic("b")
    job.process(a, name="alone")(count)
    job.merge(a, b).process(total)
    job.stream(b).map(dict).to(job.topic("out"))
    (stage,) = job.build(Settings()).stages
    assert [(chain.name, chain.input) for chain in stage.chains] == [
        ("alone", 0),
        ("total", 0),
        ("total-2", 1),
        ("b-to-out", 1),
    ]
    assert stage.stores == ("alone", "total")


def test_merges_that_share_a_topic_are_one_stage_in_the_order_in_which_inputs_are_named() -> None:
    job = Job("j")
    a, b, c = job.topic("a"), job.topic("b"), job.topic("c")
    merged = job.merge(b, a)
    job.merge(c, merged).process(count)
    merged.process(total)
    (stage,) = job.build(Settings()).stages
    assert (stage.name, stage.topics) == ("c", ("c", "b", "a"))
    assert [(chain.name, chain.input) for chain in stage.chains] == [
        ("count-3", 0),
        ("count", 1),
        ("total", 1),
        ("count-2", 2),
        ("total-2", 2),
    ]


def test_repartition_topics_can_be_merged_and_have_their_own_names() -> None:
    job = Job("j")
    a, b, c = job.topic("a"), job.topic("b"), job.topic("c")
    job.merge(job.stream(b).key_by("k"), job.stream(a).key_by("k"), c).process(count)
    stages = {stage.name: stage for stage in job.build(Settings()).stages}
    assert list(stages) == ["b", "a", "count"]
    inputs = stages["count"].inputs
    assert [(one.name, one.internal) for one in inputs] == [("count", True), ("count-2", True), ("c", False)]
    assert stages["count"].topics == (repartition_topic("j", "count"), repartition_topic("j", "count-2"), "c")
    assert stages["b"].chains[0].sink == inputs[0].topic
    assert stages["a"].chains[0].sink == inputs[1].topic


def test_key_by_after_a_merge_reads_one_topic_that_all_inputs_write() -> None:
    job = Job("j")
    job.merge(job.topic("a"), job.topic("b")).key_by("k").process(count)
    first, second = job.build(Settings()).stages
    assert first.topics == ("a", "b")
    assert [chain.sink for chain in first.chains] == [second.inputs[0].topic] * 2


def test_each_input_has_its_own_rule_for_undecodable_records() -> None:
    job = Job("j")
    a, b = job.topic("a", on_error="skip"), job.topic("b")
    job.merge(a, b).process(count)
    (stage,) = job.build(Settings()).stages
    assert [source.on_error for source in stage.inputs] == ["skip", "stop"]


def test_impossible_merges_are_refused() -> None:
    job, other = Job("j"), Job("other")
    a, b = job.topic("a"), job.topic("b")
    assert "got 1 stream" in refused(lambda: job.merge(a)).message
    assert "the job 'other'" in refused(lambda: job.merge(a, other.stream(other.topic("b")))).message
    written = job.stream(a).process(count, to=job.topic("out"))
    assert "ends there" in refused(lambda: job.merge(written, b)).message
    refused(lambda: job.merge(a, Topic("undeclared")))


def test_merge_with_nothing_after_it_is_refused() -> None:
    job = Job("j")
    job.merge(job.topic("a"), job.topic("b"))
    assert "ends in a merge with nothing after it" in refused_build(job).message


def test_merged_keys_of_different_kinds_are_refused() -> None:
    job = Job("j")
    job.merge(job.topic("a", key="text"), job.topic("b", key="json")).process(count)
    error = refused_build(job)
    assert "Topics are merged whose keys are of different kinds: 'a' (text), 'b' (json)" in error.message
    assert "key_by" in error.remedy


def test_handler_before_a_merge_and_something_else_is_refused() -> None:
    job = Job("j")
    stream = job.stream(job.topic("a")).process(count)
    stream.to(job.topic("out"))
    job.merge(stream, job.topic("b")).process(total)
    assert "used in 2 places" in refused_build(job).message


def test_merged_stage_that_feeds_itself_is_refused() -> None:
    job = Job("j")
    a = job.topic("a")
    job.merge(a, job.stream(a).key_by("k")).process(count)
    assert "a loop" in refused_build(job).message


def test_window_without_aggregates_is_refused() -> None:
    job = Job("j")
    stream, table = job.stream(job.topic("a")), job.table(job.topic("b"))
    window = stream.window(Tumbling(timedelta(minutes=1)), name="w")
    assert "It isn't said what to compute of the window 'w'" in refused_build(job).message
    window.aggregate(n=count_())
    everything = stream.window_all(Tumbling(timedelta(minutes=1)), name="all")
    assert "It isn't said what to compute of the window 'all'" in refused_build(job).message
    everything.aggregate(n=count_())
    groups = table.group_by("k", name="g")
    assert "It isn't said what to compute of the groups 'g'" in refused_build(job).message
    groups.count().to_stream().to(job.topic("out"))
    assert "ends in a window with nothing after it" in refused_build(job).message
