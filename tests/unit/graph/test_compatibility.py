from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Codec, Job, ListState, MapState, ValueState
from fcluster.common.ids import ShardId, repartition_topic
from fcluster.common.settings import Settings
from fcluster.graph.compatibility import incompatibility, unverified_keys
from fcluster.graph.description import described_topics
from fcluster.graph.topology import Topology

Grow = Callable[[Job], Any]


def count(ctx: Any, value: Any) -> Any:
    return value


def total(ctx: Any, value: Any) -> Any:
    return value


def by_origin(value: Any) -> Any:
    return value["origin"]


def by_target(value: Any) -> Any:
    return value["target"]


def built(grow: Grow, name: str = "j") -> Topology:
    job = Job(name)
    grow(job)
    return job.build(Settings())


def change(before: Grow, after: Grow) -> str | None:
    """The message about a change from one job file to another. The description passes through the journal."""
    old = json.loads(json.dumps(built(before).describe()))
    return incompatibility(old, built(after))


def plain(job: Job) -> None:
    job.stream(job.topic("a")).process(count, to=job.topic("out"))


def keyed(job: Job) -> None:
    job.stream(job.topic("a")).key_by(by_origin).process(count, to=job.topic("out"))


def test_there_is_one_shard_for_each_partition_of_each_stage_upstream_first() -> None:
    topology = built(keyed)
    assert topology.shards({"a": 2, repartition_topic("j", "count"): 1}) == [
        ShardId("a", 0),
        ShardId("a", 1),
        ShardId("count", 0),
    ]


def test_stage_is_found_by_name() -> None:
    topology = built(keyed)
    assert topology.stage("count").inputs[0].internal
    with pytest.raises(KeyError):
        topology.stage("j-count-repartition")


def test_fingerprint_is_twelve_hex_digits_and_stays_the_same() -> None:
    # It is written with every committed offset: if it changes, running jobs see another topology.
    assert built(plain).fingerprint == "70bba3ff676a"
    assert built(keyed).fingerprint == "e6f00dfda5ec"


def test_edits_that_keep_state_correct_keep_the_fingerprint() -> None:
    def edited(job: Job) -> None:
        def other_code(ctx: Any, value: Any) -> Any:
            yield from (value, value)

        letters = job.topic("letters", key="bytes")
        source = job.topic("a", isolation="read-uncommitted")
        stream = job.stream(source).filter(bool).map(dict)
        stream.process(other_code, name="count", to=job.topic("elsewhere"), on_error=letters)

    assert built(edited).fingerprint == built(plain).fingerprint
    assert change(plain, edited) is None


def test_order_of_handlers_in_the_file_does_not_matter() -> None:
    def forth(job: Job) -> None:
        job.stream(job.topic("a")).process(count)
        job.stream(job.topic("a")).process(total)

    def back(job: Job) -> None:
        job.stream(job.topic("a")).process(total)
        job.stream(job.topic("a")).process(count)

    assert built(forth).fingerprint == built(back).fingerprint


def test_new_stores_and_stages_change_the_fingerprint_but_are_compatible() -> None:
    def more(job: Job) -> None:
        plain(job)
        job.stream(job.topic("a")).process(total)
        job.stream(job.topic("b")).process(count, name="more")
        job.stream(job.topic("b")).key_by("k").process(total, name="keyed")

    assert built(more).fingerprint != built(plain).fingerprint
    assert change(plain, more) is None


def test_renamed_store_is_incompatible_and_the_new_name_is_suggested() -> None:
    def renamed(job: Job) -> None:
        job.stream(job.topic("a")).process(count, name="counter", to=job.topic("out"))

    reason = change(plain, renamed)
    assert reason is not None
    assert "'count'" in reason
    assert "'counter'" in reason


def test_removed_store_is_incompatible() -> None:
    def removed(job: Job) -> None:
        job.stream(job.topic("a")).to(job.topic("out"))

    reason = change(plain, removed)
    assert reason is not None
    assert "'count'" in reason
    assert "no longer in the job" in reason


def test_store_that_moved_to_another_topic_is_incompatible() -> None:
    def moved(job: Job) -> None:
        job.stream(job.topic("b")).process(count)

    reason = change(plain, moved)
    assert reason is not None
    assert "'a'" in reason
    assert "'b'" in reason


def test_store_that_moved_after_a_key_by_is_incompatible() -> None:
    assert change(plain, keyed) is not None
    assert change(keyed, plain) is not None


def test_stage_fed_from_another_topic_is_incompatible() -> None:
    def fed_from_b(job: Job) -> None:
        job.stream(job.topic("b")).key_by(by_origin).process(count)

    reason = change(keyed, fed_from_b)
    assert reason is not None
    assert "from the stage 'a'" in reason
    assert "'b'" in reason


@pytest.mark.parametrize("by", ["origin", by_target, str])
def test_changed_key_by_is_incompatible(by: Any) -> None:
    def other_key(job: Job) -> None:
        job.stream(job.topic("a")).key_by(by).process(count)

    reason = change(keyed, other_key)
    assert reason is not None
    assert "function by_origin" in reason
    assert built(other_key).fingerprint != built(keyed).fingerprint


def test_changed_encoding_of_a_repartition_topic_is_incompatible() -> None:
    def other_encoding(job: Job) -> None:
        job.stream(job.topic("a")).key_by(by_origin, key="json").process(count)

    reason = change(keyed, other_encoding)
    assert reason is not None
    assert "json and json" in reason


def test_removed_stage_after_key_by_without_state_is_incompatible_too() -> None:
    def stateless(job: Job) -> None:
        job.stream(job.topic("a")).key_by("k", name="rest").map(dict).to(job.topic("out"))

    def gone(job: Job) -> None:
        job.stream(job.topic("a")).to(job.topic("out"))

    reason = change(stateless, gone)
    assert reason is not None
    assert "'rest'" in reason


def test_source_without_state_may_be_removed() -> None:
    def both(job: Job) -> None:
        plain(job)
        job.stream(job.topic("b")).to(job.topic("copy"))

    assert change(both, plain) is None


def test_another_job_or_format_is_incompatible() -> None:
    description = built(plain).describe()
    assert "'other'" in (incompatibility(description, built(plain, "other")) or "")
    assert incompatibility({**description, "format": 99}, built(plain)) is not None
    assert incompatibility({}, built(plain)) is not None


def with_states(*states: Any) -> Grow:
    return lambda job: job.stream(job.topic("a")).process(count, states=states)


def test_declared_states_make_format_2_and_others_are_described_as_before() -> None:
    assert built(plain).describe()["format"] == 1
    description = built(with_states(MapState("seen", key=("int", "text"), ttl=timedelta(1)))).describe()
    assert description["format"] == 2
    assert description["stages"]["a"]["stores"] == ["count"]
    assert description["stages"]["a"]["states"] == {
        "count/seen": {"kind": "map", "key": ["int", "text"], "value": "json", "ttl": True}
    }


def test_states_may_be_added_and_a_ttl_may_be_longer() -> None:
    hour, day = timedelta(hours=1), timedelta(days=1)
    assert change(plain, with_states(ValueState("v"))) is None
    assert change(with_states(ValueState("v")), with_states(ListState("l"), ValueState("v"))) is None
    assert change(with_states(ValueState("v", ttl=hour)), with_states(ValueState("v", ttl=day))) is None


def same(value: Any) -> Any:
    return value


def test_versions_of_states_make_format_3() -> None:
    description = built(with_states(ValueState("v", version=3, migrate={2: ("int", same)}))).describe()
    assert description["format"] == 3
    assert description["stages"]["a"]["states"] == {
        "count/v": {"kind": "value", "value": "json", "version": 3, "former": {"2": "int"}}
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ValueState("s"), ValueState("s", version=2, migrate={1: same})),
        (ValueState("s", "int"), ValueState("s", version=2, migrate={1: ("int", same)})),
        (ValueState("s"), ValueState("s", version=3, migrate={1: same, 2: same})),
        (ValueState("s", version=4), ValueState("s", version=5, migrate={4: same})),
        (ValueState("s", version=2, migrate={1: same}), ValueState("s", version=2, migrate={1: same})),
    ],
)
def test_state_may_have_a_new_version_that_says_how_its_entries_change(before: Any, after: Any) -> None:
    assert change(with_states(before), with_states(after)) is None


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (ValueState("s"), ValueState("s", version=2), "may have entries of version 1, and migrate= has no"),
        (
            ValueState("s", version=2, migrate={1: same}),
            ValueState("s", version=3, migrate={2: same}),
            "may have entries of version 1, and migrate= has no function for them",
        ),
        (
            ValueState("s", "int"),
            ValueState("s", version=2, migrate={1: same}),
            "has entries of version 1 that are int values, and is now declared as if they were json values",
        ),
        (ValueState("s", version=2), ValueState("s"), "has entries of version 2, and is now declared with"),
        (
            ValueState("s"),
            ListState("s", version=2, migrate={1: same}),
            "is now declared as list of json values",
        ),
    ],
)
def test_version_that_does_not_fit_the_entries_is_incompatible(before: Any, after: Any, words: str) -> None:
    reason = change(with_states(before), with_states(after)) or ""
    assert "The state 's' of the handler 'count'" in reason
    assert words in reason


def pair(name: str) -> Codec[Any]:
    return Codec(name, bytes, bytes)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            ValueState("s"),
            MapState("s"),
            "declared as value of json values without a TTL, and is now declared as map",
        ),
        (ValueState("s"), ListState("s"), "is now declared as list of json values"),
        (ValueState("s"), ValueState("s", "msgpack"), "is now declared as value of msgpack values"),
        (
            ValueState("s"),
            ValueState("s", ttl=timedelta(1)),
            "is now declared as value of json values with a TTL",
        ),
        (ValueState("s", ttl=timedelta(1)), ValueState("s"), "without a TTL"),
        (MapState("s"), MapState("s", key="int"), "with text keys of json values without a TTL, and is now"),
        (MapState("s"), MapState("s", key=("text", "int")), "with text, int keys"),
        (ValueState("s", pair("one")), ValueState("s", pair("two")), "of one values"),
    ],
)
def test_changed_kind_or_codec_is_incompatible_and_the_message_says_what_to_do(
    before: Any, after: Any, words: str
) -> None:
    reason = change(with_states(before), with_states(after)) or ""
    assert "The state 's' of the handler 'count'" in reason
    assert words in reason
    assert "declare another state under a new name" in reason
    only_values = (type(before), before.ttl, getattr(before, "key", None)) == (
        type(after),
        after.ttl,
        getattr(after, "key", None),
    )
    assert ("declare it with version=2 and migrate={1: (" in reason) is only_values


def test_removed_state_is_incompatible_and_a_new_name_is_suggested() -> None:
    assert "is no longer declared." in (change(with_states(ValueState("s")), plain) or "")
    reason = change(with_states(ValueState("seen")), with_states(ValueState("seem")))
    assert reason is not None
    assert "(renamed to 'seem'?)" in reason


def test_fingerprint_depends_on_declared_states_but_not_on_the_length_of_a_ttl() -> None:
    fingerprints = [
        built(grow).fingerprint
        for grow in (
            plain,
            with_states(ValueState("v")),
            with_states(ValueState("v", ttl=timedelta(1))),
            with_states(ValueState("v", ttl=timedelta(2))),
        )
    ]
    assert len(set(fingerprints)) == 3
    assert fingerprints[2] == fingerprints[3]


def lambda_a(version: str | None = None) -> Grow:
    return lambda job: job.stream(job.topic("a")).key_by(lambda v: v["a"], version=version).process(count)


def lambda_b(version: str | None = None) -> Grow:
    return lambda job: job.stream(job.topic("a")).key_by(lambda v: v["b"], version=version).process(count)


def test_another_lambda_in_key_by_is_incompatible_and_the_message_names_a_remedy() -> None:
    reason = incompatibility(built(lambda_a()).describe(), built(lambda_b()))
    assert reason is not None
    assert "uses another function <lambda> than the one that the state is keyed by" in reason
    assert "version=1" in reason


def test_unchanged_lambda_in_key_by_is_compatible() -> None:
    former = built(lambda_a()).describe()
    assert incompatibility(former, built(lambda_a())) is None
    assert unverified_keys(former, built(lambda_a())) == []


def test_workers_with_another_lambda_have_another_fingerprint() -> None:
    assert built(lambda_a()).fingerprint != built(lambda_b()).fingerprint


def test_lambda_described_before_lambdas_were_distinguished_is_accepted_with_a_warning() -> None:
    former = built(lambda_a()).describe()
    del former["stages"]["count"]["key_by"]["identity"]
    assert incompatibility(former, built(lambda_a())) is None
    (remark,) = unverified_keys(former, built(lambda_a()))
    assert "The key_by before 'count' (function <lambda>) is assumed to return the same keys" in remark


def test_version_of_key_by_is_compared_instead_of_the_function() -> None:
    former = built(lambda_a("1")).describe()
    assert incompatibility(former, built(lambda_b("1"))) is None
    reason = incompatibility(former, built(lambda_a("2")))
    assert reason is not None
    assert "says version=2, but said version=1" in reason


def test_first_version_of_a_key_by_means_that_the_key_is_the_same() -> None:
    former = built(lambda_a()).describe()
    assert incompatibility(former, built(lambda_b("1"))) is None
    assert len(unverified_keys(former, built(lambda_b("1")))) == 1


def test_bytecode_of_another_python_version_is_not_compared() -> None:
    former = built(lambda_a()).describe()
    former["stages"]["count"]["key_by"]["identity"] = "bytecode-cpython-3.1/0123456789ab"
    assert incompatibility(former, built(lambda_a())) is None
    assert len(unverified_keys(former, built(lambda_a()))) == 1


# --- merged inputs --------------------------------------------------------------------------------------


def merged(job: Job) -> None:
    job.merge(job.topic("a"), job.topic("b")).process(count, to=job.topic("out"))


def merged_keyed(job: Job) -> None:
    job.merge(job.topic("a"), job.stream(job.topic("b")).key_by(by_origin)).process(count)


def test_shards_of_a_merged_stage_are_those_of_one_of_its_topics() -> None:
    assert built(merged).shards({"a": 2, "b": 2}) == [ShardId("a", 0), ShardId("a", 1)]


def test_stage_may_get_further_inputs_and_lose_source_topics() -> None:
    assert built(merged).fingerprint != built(plain).fingerprint
    assert change(plain, merged) is None
    assert change(merged, plain) is None


def test_order_of_inputs_is_part_of_the_fingerprint_and_the_first_stays() -> None:
    def three(job: Job) -> None:
        job.merge(job.topic("a"), job.topic("b"), job.topic("c")).process(count)

    def reordered(job: Job) -> None:
        job.merge(job.topic("a"), job.topic("c"), job.topic("b")).process(count)

    def other_first(job: Job) -> None:
        job.merge(job.topic("b"), job.topic("a"), job.topic("c")).process(count)

    assert built(three).fingerprint != built(reordered).fingerprint
    assert change(three, reordered) is None
    reason = change(three, other_first)
    assert reason is not None
    assert "is now in 'b'" in reason


def test_topic_that_moves_to_another_stage_is_incompatible() -> None:
    """Its offsets are committed with the epochs of the former stage's state."""

    def apart(job: Job) -> None:
        plain(job)
        job.stream(job.topic("b")).to(job.topic("elsewhere"))

    for before, after in ((apart, merged), (merged, apart)):
        reason = change(before, after)
        assert reason is not None
        assert "The topic 'b' was read in the stage" in reason


def test_merged_key_by_is_compared_like_any_other() -> None:
    def otherwise(job: Job) -> None:
        job.merge(job.topic("a"), job.stream(job.topic("b")).key_by(by_target)).process(count)

    assert change(merged_keyed, merged_keyed) is None
    reason = change(merged_keyed, otherwise)
    assert reason is not None
    assert "used the function by_origin, and now uses the function by_target" in reason
    reason = change(merged_keyed, plain)
    assert reason is not None
    assert "is gone, but its repartition topic may still have unprocessed records" in reason


def test_internal_topics_of_merged_inputs_are_described_and_renamed() -> None:
    topology = built(merged_keyed)
    crossing = repartition_topic("j", "count")
    assert topology.internal_topics == (crossing, topology.stage("a").changelog)
    assert described_topics(topology.describe())["a/count/repartition"] == crossing
    renamed = topology.with_internal_topics({crossing: "other"})
    assert renamed.stage("a").topics == ("a", "other")
    assert renamed.fingerprint == topology.fingerprint
    assert renamed.renamed_topics == {crossing: "other"}
