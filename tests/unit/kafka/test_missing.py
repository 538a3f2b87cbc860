"""The message about a topic that doesn't exist."""

from __future__ import annotations

from fcluster.kafka.missing import missing_topic


def test_similar_topics_are_named_whatever_their_case_except_kafkas_own() -> None:
    error = missing_topic("flights", ["Flights", "__flights", "cities"], "Correct the name.")
    assert error.message == "The topic 'flights' doesn't exist."
    assert error.remedy == "Did you mean 'Flights'? Correct the name."


def test_without_a_similar_one_the_first_topics_are_listed() -> None:
    existing = ["__consumer_offsets", *(f"t{number}" for number in reversed(range(9)))]
    remedy = missing_topic("flights", existing).remedy
    assert remedy == "Topics there: t0, t1, t2, t3, t4, t5, t6, t7 and more."


def test_cluster_without_topics_is_reported() -> None:
    assert missing_topic("flights", ["__consumer_offsets"]).remedy == "The cluster has no topics yet."
