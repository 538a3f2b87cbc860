"""Names of internal topics and transactional ids: no two things share a legal name."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fcluster.common.ids import (
    TOPIC_NAME_CHARACTERS_MAX,
    changelog_topic,
    colliding_topic,
    coordinator_id,
    former_changelog_topic,
    former_repartition_topic,
    is_internal_topic,
    journal_topic,
    repartition_topic,
    transactional_ids,
)

LEGAL = re.compile(r"[a-zA-Z0-9._-]{1,249}")
# Few characters, and the words that names are made of, so that collisions are likely.
PARTS = st.sampled_from(["a", "b", "-", ".", "_", "-slot-0", "-0", "-journal", "-changelog", "-coordinator"])
SHORT_NAMES = st.lists(PARTS, min_size=1, max_size=6).map("".join)
LONG_NAMES = st.tuples(SHORT_NAMES, st.integers(1, 249)).map(lambda pair: (pair[0] * 249)[: pair[1]])
NAMES = st.one_of(SHORT_NAMES, LONG_NAMES, st.from_regex(LEGAL, fullmatch=True)).filter(
    lambda name: name not in (".", "..")
)


def topics_of(job: str, stage: str) -> list[str]:
    return [journal_topic(job), changelog_topic(job, stage), repartition_topic(job, stage)]


def ids_of(job: str, slot: int) -> list[str]:
    return [coordinator_id(job), *transactional_ids(job, slot)]


def as_kafka_compares(topic: str) -> str:
    return topic.replace(".", "_")


@given(NAMES, NAMES)
def test_internal_topics_have_names_that_kafka_accepts(job: str, stage: str) -> None:
    for topic in topics_of(job, stage):
        assert LEGAL.fullmatch(topic), topic
        assert len(topic) <= TOPIC_NAME_CHARACTERS_MAX


@given(st.tuples(NAMES, NAMES), st.tuples(NAMES, NAMES))
def test_two_pairs_of_job_and_stage_never_share_a_topic(one: tuple[str, str], other: tuple[str, str]) -> None:
    assume(one != other)
    assert not set(topics_of(*one)[1:]) & set(topics_of(*other))
    if one[0] != other[0]:
        assert journal_topic(one[0]) != journal_topic(other[0])


@given(NAMES, st.data())
def test_no_two_ways_to_split_a_name_into_job_and_stage_share_a_topic(text: str, data: st.DataObject) -> None:
    dashes = [place for place, character in enumerate(text) if character == "-" and 0 < place < len(text) - 1]
    assume(len(dashes) > 1)
    one, other = data.draw(st.lists(st.sampled_from(dashes), min_size=2, max_size=2, unique=True))
    former = {former_changelog_topic(text[:at], text[at + 1 :]) for at in (one, other)}
    assert len(former) == 1, "these are the pairs that used to share a changelog"
    assert len({changelog_topic(text[:at], text[at + 1 :]) for at in (one, other)}) == 2
    assert len({repartition_topic(text[:at], text[at + 1 :]) for at in (one, other)}) == 2


@given(NAMES, NAMES, NAMES, NAMES)
def test_no_topic_has_the_former_name_of_another_jobs_topic(
    job: str, stage: str, other_job: str, other_stage: str
) -> None:
    former = {
        former_changelog_topic(other_job, other_stage),
        former_repartition_topic(other_job, other_stage),
    }
    assert not former & {changelog_topic(job, stage), repartition_topic(job, stage)}


@given(NAMES, NAMES, NAMES, NAMES)
def test_topics_of_jobs_that_differ_in_dots_and_underscores_can_exist_together(
    job: str, stage: str, other_job: str, other_stage: str
) -> None:
    assume((job, stage) != (other_job, other_stage))
    mine = {as_kafka_compares(topic) for topic in topics_of(job, stage)[1:]}
    assert not mine & {as_kafka_compares(topic) for topic in topics_of(other_job, other_stage)[1:]}


@given(NAMES, st.integers(0, 20), NAMES, st.integers(0, 20))
def test_two_jobs_or_slots_never_share_a_transactional_id(
    job: str, slot: int, other: str, other_slot: int
) -> None:
    if job != other:
        assert not set(ids_of(job, slot)) & set(ids_of(other, other_slot))
    elif slot != other_slot:
        assert not set(transactional_ids(job, slot)) & set(transactional_ids(job, other_slot))
    assert len(set(ids_of(job, slot))) == 3


def test_jobs_that_once_shared_a_changelog_have_their_own() -> None:
    assert former_changelog_topic("billing", "eu-orders") == former_changelog_topic("billing-eu", "orders")
    assert changelog_topic("billing", "eu-orders") != changelog_topic("billing-eu", "orders")


def test_names_stay_the_same_in_every_version() -> None:
    # State is stored under these names.
    assert changelog_topic("billing", "eu-orders") == "billing-eu-orders-changelog-c8b4416853"
    assert repartition_topic("billing", "by.key") == "billing-by.key-repartition-9937dc7989"
    assert journal_topic("billing") == "billing-journal"
    assert transactional_ids("billing", 3) == ("billing-slot-3-0", "billing-slot-3-1")
    assert coordinator_id("billing") == "billing-coordinator"


@given(NAMES, NAMES)
def test_internal_topics_are_recognised(job: str, stage: str) -> None:
    assert is_internal_topic(changelog_topic(job, stage))
    assert is_internal_topic(repartition_topic(job, stage))


@pytest.mark.parametrize("name", ["orders", "app-store-changelog", "x-journal", "a-changelog-2024"])
def test_other_topics_are_not_taken_for_internal_ones(name: str) -> None:
    assert not is_internal_topic(name)


def test_topic_that_differs_in_dots_and_underscores_only_is_found() -> None:
    assert colliding_topic("a.b_c", ["x", "a_b.c"]) == "a_b.c"
    assert colliding_topic("a.b", ["a.b", "a-b", "ab"]) is None
