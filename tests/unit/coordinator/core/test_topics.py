"""How the coordinator's core reacts to topics that are deleted, replaced or grown under a running job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fcluster import Job
from fcluster.common.errors import FclusterError, IncompatibleState, MissingTopic
from fcluster.common.ids import ShardId, repartition_topic
from fcluster.common.settings import Settings
from fcluster.coordinator.checks import check_partitions, check_topics, remembered_ids
from fcluster.coordinator.core import events
from fcluster.coordinator.core.topics import CONFIRM_MS, Role, roles_of, topic_key
from fcluster.graph.stages import Chain, Input, Stage
from fcluster.graph.topology import Topology
from fcluster.kafka.topic_ids import Look, TopicReplaced, TopicSeen
from fcluster.kafka.topics import TopicPlan
from fcluster.wire import messages
from fcluster.wire.messages import ShardStatus
from tests.unit.coordinator.coordinator_harness import FakeWorker, Harness, one_stage, topic, two_stages

IDS = {"in": "in-1", "out": "out-1", "job-in-changelog": "log-1", "job-journal": "journal-1"}
SEEN: dict[str, TopicSeen | None] = {
    "in": TopicSeen("in-1", 4),
    "out": TopicSeen("out-1", 4),
    "job-in-changelog": TopicSeen("log-1", 4),
    "job-journal": TopicSeen("journal-1", 1),
}


def stateless() -> Topology:
    return Topology(
        "job", (Stage("in", (Input(topic("in")),), (Chain("a", (), None, topic("out")),), (), None),)
    )


def running(
    topology: Topology, workers: int = 2, settings: Settings | None = None
) -> tuple[Harness, list[FakeWorker]]:
    harness = Harness(topology, workers=workers, settings=settings or Settings(), topic_ids=IDS)
    players = [FakeWorker(harness, f"w{number}") for number in range(workers)]
    for player in players:
        player.hello(topology=topology.fingerprint)
    for player in players:
        player.learn()
        player.running()
    return harness, players


def look(harness: Harness, seen: Look, *, again_after_ms: float = 0) -> None:
    harness.feed(events.TopicsLooked(seen))
    if again_after_ms:
        harness.pass_ms(again_after_ms)
        harness.feed(events.TopicsLooked(seen))


def notices(harness: Harness) -> list[str]:
    return harness.core.status()["notices"]


@pytest.mark.parametrize("workers", [0, 2])
def test_matching_or_unknown_topics_change_nothing(workers: int) -> None:
    harness, _ = running(one_stage(), workers)
    for seen in (SEEN, {}, {"in": TopicSeen("", 4)}):
        look(harness, seen, again_after_ms=10 * CONFIRM_MS)
    assert harness.core.phase.value == "running"
    assert notices(harness) == []


@pytest.mark.parametrize(
    ("name", "now", "parts"),
    [
        ("in", TopicSeen("in-2", 4), ("'in'", "in-1", "in-2", "fcluster reset", "--keep-state")),
        ("in", None, ("'in'", "was deleted", "fcluster reset")),
        ("out", None, ("output topic 'out'", "was deleted", "sink.missing=create", "fcluster reset")),
        ("out", TopicSeen("out-2", 4), ("'out'", "created again", "sink.missing=create", "fcluster reset")),
        ("job-in-changelog", None, ("changelog 'job-in-changelog'", "fcluster reset")),
        ("job-journal", TopicSeen("x", 1), ("journal 'job-journal'", "created again")),
    ],
)
def test_topic_that_is_missing_or_replaced_ends_the_job_with_name_and_choice(
    name: str, now: TopicSeen | None, parts: tuple[str, ...]
) -> None:
    harness, _ = running(one_stage())
    changed = {**SEEN, name: now}
    look(harness, changed)
    assert harness.core.phase.value == "running", "the answer of one broker, which may lag, isn't enough"
    assert harness.core.topics_in_doubt
    look(harness, changed, again_after_ms=CONFIRM_MS)
    assert harness.core.failure
    for part in parts:
        assert part in str(harness.core.failure)
    harness.pass_ms(3_000)  # no drain, because nothing more can be committed
    assert harness.stopped is not None
    assert harness.stopped.exit_code == 3


def test_answer_of_a_lagging_broker_is_not_trusted() -> None:
    harness, _ = running(one_stage())
    for _ in range(5):
        look(harness, {**SEEN, "out": None})
        harness.pass_ms(CONFIRM_MS - 1)
        look(harness, SEEN)
    assert harness.core.phase.value == "running"
    assert not harness.core.topics_in_doubt


def test_nothing_is_committed_once_a_source_is_replaced() -> None:
    harness, (first, _) = running(one_stage())
    first.dirty()
    look(harness, {**SEEN, "in": TopicSeen("in-2", 4)}, again_after_ms=CONFIRM_MS)
    assert harness.core.phase.value in ("stopping", "stopped")


def test_records_that_may_be_of_the_new_topic_are_named() -> None:
    harness, (first, _) = running(one_stage(), 2)
    shard = first.assigned[0]
    first.heartbeat(ShardStatus(shard, 50, 50, 50, False, 1))
    look(harness, SEEN)
    look(harness, {**SEEN, "in": TopicSeen("in-2", 4)})
    first.heartbeat(ShardStatus(shard, 80, 80, 80, False, 2))
    look(harness, {**SEEN, "in": TopicSeen("in-2", 4)}, again_after_ms=CONFIRM_MS)
    assert f"perhaps of the new one: in/{shard.partition} 50 to 79" in str(harness.core.failure)


def test_drain_ends_although_the_output_topic_is_missing() -> None:
    harness, (first, _) = running(one_stage())
    first.dirty()
    harness.feed(events.StopRequested())
    assert harness.core.phase.value == "draining"
    look(harness, {**SEEN, "out": None}, again_after_ms=CONFIRM_MS)
    harness.pass_ms(3_000)
    assert harness.stopped is not None
    assert harness.stopped.exit_code == 3
    assert "'out'" in harness.stopped.reason


def test_output_topic_is_recreated_if_the_user_allowed_it() -> None:
    harness, _ = running(one_stage(), settings=replace(Settings(), sink_missing="create"))
    harness.transcript()
    look(harness, {**SEEN, "out": None}, again_after_ms=CONFIRM_MS)
    assert "make topic out with 4 partitions" in harness.transcript()
    assert topic_key("out") not in harness.journal
    look(harness, {**SEEN, "out": TopicSeen("out-2", 4)})
    assert harness.journal[topic_key("out")] == {"id": "out-2"}
    look(harness, {**SEEN, "out": TopicSeen("out-3", 4)}, again_after_ms=CONFIRM_MS)
    assert harness.journal[topic_key("out")] == {"id": "out-3"}
    assert harness.core.phase.value == "running"


def test_new_topic_id_is_remembered() -> None:
    harness = Harness(one_stage())
    look(harness, SEEN)
    assert remembered_ids(harness.journal) == IDS


@pytest.mark.parametrize("with_workers", [True, False])
def test_partitions_added_to_a_source_without_state_are_read(with_workers: bool) -> None:
    harness, players = running(stateless(), 2 if with_workers else 0)
    look(harness, {**SEEN, "in": TopicSeen("in-1", 6)})
    assert harness.journal["partitions/in"] == {"count": 6}
    assert ShardId("in", 5) in harness.core.shards
    assert notices(harness) == []
    if with_workers:
        for player in players:
            player.running()
        held = sorted(shard.partition for player in players for shard in player.assigned)
        assert held == [0, 1, 2, 3, 4, 5]
        assert all(shard.phase.value == "running" for shard in harness.core.shards.values())
    look(harness, {**SEEN, "in": TopicSeen("in-1", 6)}, again_after_ms=CONFIRM_MS)
    assert len(harness.core.shards) == 6


def test_partitions_added_to_a_source_with_state_are_not_read_and_reported() -> None:
    harness, _ = running(one_stage())
    for _ in range(3):
        look(harness, {**SEEN, "in": TopicSeen("in-1", 6)}, again_after_ms=CONFIRM_MS)
    assert harness.core.phase.value == "running"
    assert len(harness.core.shards) == 4
    (notice,) = notices(harness)
    for part in ("'in' has 6 partitions", "partitions 4 to 5 are not read", "fcluster reset"):
        assert part in notice
    assert sum("has 6 partitions" in line for line in harness.log) == 1, "said once"


def test_partitions_added_to_the_topic_of_a_global_table_are_read_and_workers_know_how_many_there_are() -> (
    None
):
    job = Job("j")
    rates = job.global_table(job.topic("rates"))
    job.stream(job.topic("calls")).join(rates, on="in").to(job.topic("out"))
    topology = job.build(Settings())
    copy = repartition_topic("j", "rates-in-calls")
    harness = Harness(topology, {"rates": 2, "calls": 3, copy: 3}, workers=1)
    worker = FakeWorker(harness, "w0")
    worker.hello(topology=topology.fingerprint)

    def told() -> dict[str, int]:
        return harness.messages_to(worker.peer, messages.Assign)[-1].stages

    assert told() == {"rates": 2, "calls": 3}
    worker.learn()
    worker.running()
    look(harness, {"rates": TopicSeen("", 4)})
    assert ShardId("rates", 3) in harness.core.shards
    assert notices(harness) == []
    assert told() == {"rates": 4, "calls": 3}


def test_foreign_members_of_the_group_are_reported_while_they_are_there() -> None:
    harness, _ = running(one_stage())
    for _ in range(2):
        harness.feed(events.GroupLooked({("in", 0): 7}, ["rdkafka at 10.0.0.1"]))
    assert any("rdkafka at 10.0.0.1" in text and "group.id of its own" in text for text in notices(harness))
    assert any("in/0 at 7" in text and "fcluster reset" in text for text in notices(harness))
    assert sum("rdkafka at" in line for line in harness.log) == 1
    harness.feed(events.GroupLooked({}, None))  # a broker is down
    assert any("rdkafka at 10.0.0.1" in text for text in notices(harness)), (
        "an unknown answer doesn't end the notice"
    )
    harness.feed(events.GroupLooked({}, []))
    assert notices(harness) == []
    assert any("over: group members" in line for line in harness.log)


# --- at the start ------------------------------------------------------------------------------------------


def test_roles_say_what_the_job_uses_a_topic_for() -> None:
    assert roles_of(two_stages()) == {
        "in": Role.SOURCE,
        "job-in-changelog": Role.CHANGELOG,
        "job-b-repartition": Role.REPARTITION,
        "job-b-changelog": Role.CHANGELOG,
        "out": Role.SINK,
        "job-journal": Role.JOURNAL,
    }


@pytest.mark.parametrize(
    ("name", "now", "kind"),
    [
        ("in", TopicSeen("in-2", 4), TopicReplaced),
        ("in", None, MissingTopic),
        ("out", None, TopicReplaced),
        ("out", TopicSeen("out-2", 4), TopicReplaced),
        ("job-in-changelog", TopicSeen("log-2", 4), TopicReplaced),
    ],
)
def test_start_on_a_replaced_topic_is_refused(
    name: str, now: TopicSeen | None, kind: type[FclusterError]
) -> None:
    with pytest.raises(kind, match=f"'{name}'"):
        check_topics(one_stage(), Settings(), IDS, {**SEEN, name: now})


def test_start_on_known_new_or_accepted_topics_is_allowed() -> None:
    assert check_topics(one_stage(), Settings(), {}, SEEN) == IDS
    assert check_topics(one_stage(), Settings(), IDS, {}) == IDS
    accepting = replace(Settings(), sink_missing="create")
    assert check_topics(one_stage(), accepting, IDS, {**SEEN, "out": TopicSeen("out-2", 1)})["out"] == "out-2"
    assert check_topics(one_stage(), accepting, IDS, {**SEEN, "out": None}) == IDS


def test_start_with_more_partitions_is_refused_only_with_state() -> None:
    past = {"partitions/in": {"count": 4}}
    check_partitions(past, stateless(), {"in": 6})
    for topology, now in ((one_stage(), 6), (one_stage(), 3), (stateless(), 3)):
        with pytest.raises(FclusterError, match=f"has {now} partitions") as caught:
            check_partitions(past, topology, {"in": now})
        assert "fcluster reset" in caught.value.remedy


def merged_without_state() -> Topology:
    chains = tuple(Chain(name, (), None, topic("out"), input=number) for number, name in enumerate("ab"))
    return Topology("job", (Stage("in", (Input(topic("in")), Input(topic("more"))), chains, (), None),))


def test_partitions_added_to_merged_topics_are_read_once_all_topics_have_them() -> None:
    ids = {"in": "in-1", "more": "more-1", "out": "out-1", "job-journal": "journal-1"}
    harness = Harness(
        merged_without_state(), workers=1, partitions={"in": 2, "more": 2}, topic_ids=ids, settings=Settings()
    )
    player = FakeWorker(harness, "w0")
    player.hello(topology=merged_without_state().fingerprint)
    player.learn()
    player.running()
    assert len(harness.core.shards) == 2
    look(harness, {"in": TopicSeen("in-1", 4), "more": TopicSeen("more-1", 2)})
    (notice,) = notices(harness)
    assert "'in' has 4 partitions now, and 'more', which it is merged with" in notice
    assert "records in partitions 2 to 3 are not read" in notice
    assert len(harness.core.shards) == 2
    look(harness, {"in": TopicSeen("in-1", 4), "more": TopicSeen("more-1", 3)})
    assert len(harness.core.shards) == 3
    assert "records in partitions 3 to 3 are not read" in notices(harness)[0]
    look(harness, {"in": TopicSeen("in-1", 4), "more": TopicSeen("more-1", 4)})
    assert len(harness.core.shards) == 4
    assert notices(harness) == []


def test_merged_repartition_topic_gets_as_many_partitions_as_the_other_inputs() -> None:
    job = Job("j")
    orders, payments = job.topic("orders"), job.topic("payments")

    def count(ctx: Any, value: Any) -> Any: ...

    job.merge(orders, job.stream(payments).key_by("k")).process(count, to=job.topic("out"))
    topology = job.build(Settings())
    crossing = repartition_topic("j", "count")

    def counts(existing: dict[str, int]) -> dict[str, int]:
        plan = TopicPlan(topology, existing)
        for stage in topology.stages:
            plan.add_stage(stage)
        return plan.counts

    found = counts({"orders": 5, "payments": 3})
    assert (found[crossing], found[topology.stage("orders").changelog or ""]) == (5, 5)
    with pytest.raises(IncompatibleState, match="merges topics with different numbers of partitions"):
        counts({"orders": 5, "payments": 3, crossing: 3})
