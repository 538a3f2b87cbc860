"""The checker's verdict on state has to find a store that differs from the changelog."""

from __future__ import annotations

from pathlib import Path

import pytest

from fcluster.engine.changelog import Delta
from fcluster.engine.state import store_prefix
from tests.checker.state import Changelog, LocalStore, decoded, judge_local_stores

PREFIX = store_prefix("totals")


def key(name: str) -> bytes:
    return PREFIX + name.encode()


CHANGELOG = Changelog(
    0,
    [
        Delta(3, 0, {key("a"): b'{"count":1}', key("b"): b'{"count":1}'}),
        Delta(7, 3, {key("a"): b'{"count":2}', key("b"): b""}),
    ],
)


def store_at(epoch: int, content: dict[bytes, bytes]) -> LocalStore:
    return LocalStore(Path("worker-0/source/0/db"), 0, epoch, content)


def test_fold_ends_at_the_given_epoch_and_drops_deleted_keys() -> None:
    assert decoded(CHANGELOG.fold(3), "totals") == {"a": {"count": 1}, "b": {"count": 1}}
    assert decoded(CHANGELOG.fold(), "totals") == {"a": {"count": 2}}
    assert decoded(CHANGELOG.fold(), "another") == {}
    assert (CHANGELOG.state_epoch, Changelog(1, []).state_epoch) == (7, 0)


@pytest.mark.parametrize("epoch", [0, 3, 7])
def test_store_that_is_behind_but_correct_for_its_epoch_is_accepted(epoch: int) -> None:
    assert judge_local_stores([CHANGELOG], [store_at(epoch, CHANGELOG.fold(epoch))]).ok


@pytest.mark.parametrize(
    ("epoch", "content"),
    [
        (3, CHANGELOG.fold(7)),
        (7, CHANGELOG.fold(3)),
        (7, {}),
        (7, {**CHANGELOG.fold(7), key("c"): b'{"count":1}'}),
        (5, CHANGELOG.fold(3)),
        (8, CHANGELOG.fold(7)),
    ],
    ids=["ahead", "behind", "empty", "key of an aborted epoch", "epoch never committed", "epoch of an abort"],
)
def test_store_that_is_wrong_for_its_epoch_is_found(epoch: int, content: dict[bytes, bytes]) -> None:
    verdict = judge_local_stores([CHANGELOG], [store_at(epoch, content)])
    assert verdict.counts["state"] > 0
