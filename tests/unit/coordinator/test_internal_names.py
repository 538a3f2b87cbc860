"""Which names a job uses for its internal topics, and which existing topics it refuses to touch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from fcluster import Job
from fcluster.common.errors import IncompatibleState, MissingTopic
from fcluster.common.ids import (
    changelog_topic,
    former_changelog_topic,
    former_repartition_topic,
    journal_topic,
    repartition_topic,
)
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings
from fcluster.coordinator import owned_topics, server
from fcluster.coordinator.internal_names import (
    Claim,
    claim_of,
    internal_names,
    possible_claims,
    unowned_topics,
)
from fcluster.graph.description import described_topics
from fcluster.graph.topology import Topology
from fcluster.kafka.topics import ensure_internal_topics

WITH_STATE = CommittedPosition(10, 5, 5, "f")
WITHOUT_STATE = CommittedPosition(10, 5, 0, "f")


def count(ctx: Any, value: Any) -> Any:
    return value


def built(name: str = "billing-eu", source: str = "orders", *, keyed: bool = False) -> Topology:
    job = Job(name)
    stream = job.stream(job.topic(source))
    (stream.key_by("k") if keyed else stream).process(count)
    return job.build(Settings())


def old_description(topology: Topology) -> dict[str, Any]:
    """The description that a version with only one kind of names wrote."""
    description = topology.describe()
    for name, stage in description["stages"].items():
        stage.pop("changelog", None)
        if "key_by" in stage:
            stage["source"] = former_repartition_topic(topology.job, name)
            del stage["key_by"]["identity"]
    return description


def names(
    topology: Topology,
    description: dict[str, Any] | None,
    *existing: str,
    committed: dict[str, CommittedPosition] | None = None,
) -> dict[str, str]:
    def positions(job: str, topic: str) -> list[CommittedPosition]:
        assert job == topology.job
        return [committed[topic]] if committed and topic in committed else []

    return internal_names(topology, description, existing, positions)


FORMER = former_changelog_topic("billing-eu", "orders")
PRESENT = changelog_topic("billing-eu", "orders")


def test_new_job_uses_the_present_names_although_a_topic_has_its_former_one() -> None:
    assert names(built(), None, "orders", FORMER) == {}


def test_state_is_found_under_its_former_name() -> None:
    topology = built()
    found = names(topology, old_description(topology), "orders", FORMER, committed={"orders": WITH_STATE})
    assert found == {PRESENT: FORMER}


def test_state_is_found_under_its_former_name_though_the_journal_is_lost() -> None:
    assert names(built(), None, "orders", FORMER, committed={"orders": WITH_STATE}) == {PRESENT: FORMER}


def test_job_that_never_wrote_state_does_not_claim_the_former_name() -> None:
    topology = built()
    for committed in ({}, {"orders": WITHOUT_STATE}):
        assert names(topology, old_description(topology), "orders", FORMER, committed=committed) == {}


def test_records_in_flight_are_found_under_the_former_name() -> None:
    topology = built(keyed=True)
    former = former_repartition_topic("billing-eu", "count")
    changelog = former_changelog_topic("billing-eu", "count")
    found = names(
        topology,
        old_description(topology),
        "orders",
        former,
        changelog,
        committed={"orders": WITHOUT_STATE, former: WITH_STATE},
    )
    assert found == {
        repartition_topic("billing-eu", "count"): former,
        changelog_topic("billing-eu", "count"): changelog,
    }
    # The stage that reads it hasn't committed anything yet.
    found = names(topology, old_description(topology), former, committed={"orders": WITHOUT_STATE})
    assert found == {repartition_topic("billing-eu", "count"): former}


def test_journalled_names_are_kept() -> None:
    topology = built(keyed=True)
    named = topology.with_internal_topics(
        names(
            topology,
            old_description(topology),
            former_repartition_topic("billing-eu", "count"),
            former_changelog_topic("billing-eu", "count"),
            committed={
                "orders": WITH_STATE,
                former_repartition_topic("billing-eu", "count"): WITH_STATE,
            },
        )
    )
    assert named.fingerprint == topology.fingerprint
    assert set(described_topics(named.describe()).values()) == set(named.internal_topics)
    assert topology.with_internal_topics(named.renamed_topics) == named
    # The stage that writes the repartition topic and the one that reads it use the same name.
    (chain,) = named.stage("orders").chains
    assert chain.sink is not None
    assert (
        chain.sink.name == named.stage("count").topics[0] == former_repartition_topic("billing-eu", "count")
    )


def test_only_jobs_that_could_have_had_the_name_are_asked() -> None:
    existing = [journal_topic(job) for job in ("billing", "billing-eu", "billing-eu-orders", "b", "other")]
    assert list(possible_claims(FORMER, "billing-eu", existing)) == ["billing"]
    assert list(possible_claims("a-b-c-repartition", "a", [journal_topic("a-b")])) == ["a-b"]


def test_another_jobs_claim_counts_if_it_has_written() -> None:
    description = old_description(built("billing", "eu-orders"))

    def positions(committed: CommittedPosition) -> Any:
        return lambda job, topic: [committed] if (job, topic) == ("billing", "eu-orders") else []

    assert claim_of("billing", FORMER, description, positions(WITH_STATE)) == Claim("billing", "eu-orders")
    assert claim_of("billing", FORMER, description, positions(WITHOUT_STATE)) is None
    present = built("billing", "eu-orders").describe()
    assert claim_of("billing", FORMER, present, positions(WITH_STATE)) is None


def test_topic_that_the_journal_does_not_name_needs_other_evidence() -> None:
    topology = built(keyed=True)
    changelog, repartition = changelog_topic("billing-eu", "count"), repartition_topic("billing-eu", "count")
    both = {changelog, repartition}
    assert {topic for topic, _ in unowned_topics(topology, None, both)} == both
    assert unowned_topics(topology, None, set()) == []
    assert unowned_topics(topology, topology.describe(), both) == []
    grown = built().describe()
    assert dict(unowned_topics(topology, grown, both)) == {changelog: repartition, repartition: repartition}


def test_topic_that_two_earlier_jobs_have_written_to_is_refused_by_name(monkeypatch: Any) -> None:
    # Nobody can tell which record belongs to which job: neither may continue, and neither may delete the
    # topic.
    journals = {
        "billing": {"term": {"term": 1}, "topology": old_description(built("billing", "eu-orders"))},
        "billing-eu": {"term": {"term": 1}, "topology": old_description(built())},
    }
    existing = {"orders": 1, "eu-orders": 1, FORMER: 1, "billing-journal": 1, "billing-eu-journal": 1}
    monkeypatch.setattr(owned_topics, "existing_topics", lambda admin: existing)
    monkeypatch.setattr(owned_topics, "read_journal", lambda settings, job: journals[job])
    monkeypatch.setattr(owned_topics, "make_consumer", lambda *_, **extra: NoConsumer())
    monkeypatch.setattr(
        owned_topics,
        "read_committed_positions",
        lambda consumer, job, wanted: dict.fromkeys(wanted, WITH_STATE),
    )
    with pytest.raises(IncompatibleState) as caught:
        owned_topics.own_names(Settings(), cast(Any, None), built())
    assert (
        f"The topic {FORMER!r} contains records of two jobs, 'billing-eu' and 'billing' (its stage "
        "'eu-orders')" in caught.value.message
    )
    assert "fcluster reset billing" in caught.value.remedy


def test_foreign_topic_with_the_journals_name_is_refused_by_name(monkeypatch: Any) -> None:
    monkeypatch.setattr(owned_topics, "existing_topics", lambda admin: {"billing-eu-journal": 1})
    monkeypatch.setattr(owned_topics, "read_journal", lambda settings, job: {"user": {"name": "x"}})
    with pytest.raises(IncompatibleState, match="contains records that no coordinator writes") as caught:
        owned_topics.own_names(Settings(), cast(Any, None), built())
    assert "'billing-eu-journal'" in caught.value.message


def test_topic_that_kafka_would_refuse_to_create_is_refused_with_the_reason() -> None:
    class Kafka:
        def list_topics(self, **_: Any) -> Any:
            topic = SimpleNamespace(error=None, partitions={0: None})
            return SimpleNamespace(topics={"orders": topic, "billing_eu-journal": topic})

    with pytest.raises(MissingTopic) as caught:
        ensure_internal_topics(cast(Any, Kafka()), built("billing.eu"), Settings())
    assert (
        "'billing.eu-journal' doesn't exist, and can't be created because 'billing_eu-journal' exists"
        in caught.value.message
    )
    assert "of the job" in caught.value.remedy


def test_brokers_that_forget_sooner_than_idle_shards_commit_are_named(
    monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "broker_setting", lambda admin, name: 4_000)
    assert server.refresh_interval_s(Settings(), cast(Any, None)) == 1
    assert "the brokers forget transactional ids that are idle for 4000 ms" in caplog.text
    assert "at most 1000 ms" in caplog.text
    for remembered in (None, 7 * 86_400_000):
        monkeypatch.setattr(server, "broker_setting", lambda admin, name, known=remembered: known)
        assert server.refresh_interval_s(Settings(), cast(Any, None)) == 21_600


class NoConsumer:
    def close(self) -> None:
        return None
