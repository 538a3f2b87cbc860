"""The check of snapshots and local stores against the changelog can fail."""

from __future__ import annotations

from fcluster.common.ids import ShardId
from fcluster.engine.changelog import Delta
from tests.chaos.state import _Fold
from tests.checker.verdict import Verdict

DELTAS = [Delta(epoch, epoch - 1, {b"k": b"%d" % epoch}) for epoch in (4, 5, 6)]


def judged(*claims: tuple[str, dict[bytes, bytes], int]) -> Verdict:
    verdict = Verdict()
    fold = _Fold(ShardId("in", 0), {b"k": b"3"}, 3, claims, verdict)
    for delta in DELTAS:
        fold.take(delta)
    fold.finish()
    return verdict


def test_stores_that_agree_with_the_changelog_at_their_epochs_are_accepted() -> None:
    verdict = judged(("old", {b"k": b"other"}, 2), ("base", {b"k": b"3"}, 3), ("newest", {b"k": b"6"}, 6))
    assert verdict.ok, verdict.report()


def test_store_with_another_value_is_found() -> None:
    assert judged(("store", {b"k": b"6"}, 5)).counts["state"] == 1
    assert judged(("base", {b"k": b"4"}, 3)).counts["state"] == 1


def test_store_with_an_unwritten_key_is_found() -> None:
    assert judged(("store", {b"k": b"5", b"l": b"1"}, 5)).counts["state"] == 1


def test_store_at_an_epoch_that_was_never_committed_is_found() -> None:
    assert judged(("store", {b"k": b"7"}, 7)).counts["state"] == 1
