"""The dead letters of a process's shards."""

from __future__ import annotations

from fcluster.common.ids import ShardId
from fcluster.engine.letter_limit import LetterLimit

A, B = ShardId("in", 0), ShardId("in", 1)


def test_limit_holds_for_all_shards_together_and_for_each_topic() -> None:
    limit = LetterLimit(2)
    limit.of(A).count("dead", "one")
    assert not limit.of(B).is_reached("dead")
    limit.of(B).count("dead", "two")
    assert limit.of(A).is_reached("dead")
    assert not limit.of(A).is_reached("other")
    assert limit.last == "two"


def test_shard_that_begins_again_has_what_it_has_committed() -> None:
    limit = LetterLimit(3)
    limit.of(A).count("dead", "aborted")
    limit.of(B).count("dead", "kept")
    limit.of(A).restore({"dead": 1, "other": 5})
    assert +limit.totals == {"dead": 2, "other": 5}
    assert limit.of(A).is_reached("other")


def test_shard_of_another_process_does_not_count() -> None:
    limit = LetterLimit(1)
    limit.of(A).count("dead", "gone")
    limit.forget([A, B])
    assert not limit.of(B).is_reached("dead")
    limit.of(B).count("dead", "lost")
    limit.clear()
    assert not limit.of(B).is_reached("dead")


def test_without_a_limit_nothing_is_counted() -> None:
    limit = LetterLimit()
    limit.of(A).count("dead", "one")
    assert not limit.of(A).is_reached("dead")
    assert limit.of(A).counts == {}
