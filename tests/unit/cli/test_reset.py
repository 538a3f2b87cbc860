from __future__ import annotations

from pathlib import Path

import pytest

from fcluster.cli.reset import (
    Move,
    ResetPlan,
    _last_entries,
    _new_offset,
    _notes_on,
    _with_one_epoch,
    check_directory,
)
from fcluster.common.errors import DirectoryInUse, IncompatibleState
from fcluster.common.positions import CommittedPosition, InputOffset, decode_position, joined_position
from fcluster.common.settings import Settings
from fcluster.coordinator.internal_names import Claim
from fcluster.coordinator.owned_topics import Found
from fcluster.host.data_directory import DirectoryLock
from tests.unit.coordinator.coordinator_harness import merged_stages, two_stages

KEPT = CommittedPosition(5, 9, 7, "former", "id-1")
PAST = {
    "term": {"term": 3},
    "epoch": {"reserved_until": 100},
    "slot/0": {"session": 0},
    "assignment/in/0": {"slot": 0},
    "partitions/in": {"count": 1},
    "topic/in": {"id": "id-1"},
    "deaths/in/0": {"committed": {"0": 5}, "times": 2, "suspects": []},
    "overdue/in/0": {"records": []},
    "topology": {},
    "leader": {},
    "resetting": {},
}


def plan(*, keeps_state: bool) -> ResetPlan:
    moves = [Move("in", 0, 5, KEPT, False, 2, 8), Move("in", 1, 4, None, True, 0, 8)]
    return ResetPlan(
        job="job",
        target="the given offsets",
        keeps_state=keeps_state,
        moves=moves,
        topic_ids={"in": "id-2"},
        topics=[] if keeps_state else ["job-in-changelog"],
        shards=[],
        snapshots="" if keeps_state else "./snapshots",
        local=[] if keeps_state else [Path("state/job")],
        slots=[0],
        epoch=9,
        notes=["look before"],
    )


def test_plan_says_what_is_deleted_and_where_offsets_move() -> None:
    text = "\n".join(plan(keeps_state=False).describe())
    for part in (
        "reset of job 'job' to the given offsets, with empty state",
        "in/0: 5 -> 2, of 8",
        "in/1: 4 (not committed by fcluster) -> 0, of 8",
        "topic job-in-changelog: deleted",
        "snapshots of the job in ./snapshots: deleted",
        "local state state/job: deleted",
        "note: look before",
    ):
        assert part in text
    kept = "\n".join(plan(keeps_state=True).describe())
    assert "keeping the state" in kept
    assert "deleted" not in kept


def test_new_offsets_have_no_state_or_that_of_the_former_ones() -> None:
    moves = plan(keeps_state=False).moves
    anew = _new_offset(moves[0], two_stages(), plan(keeps_state=False))
    fingerprint = two_stages().fingerprint
    assert decode_position(anew.offset, anew.metadata) == CommittedPosition(2, 9, 0, fingerprint, "id-2")
    kept = _new_offset(moves[0], two_stages(), plan(keeps_state=True))
    assert decode_position(kept.offset, kept.metadata) == CommittedPosition(2, 9, 7, "former", "id-2")


def test_journal_keeps_numbers_that_must_not_be_reused() -> None:
    gone = _last_entries(PAST, keeps_state=False)
    assert set(gone.values()) == {None}
    assert gone.keys() >= {"assignment/in/0", "partitions/in", "topic/in", "topology", "leader", "resetting"}
    assert gone.keys() >= {"deaths/in/0", "overdue/in/0"}
    assert not gone.keys() & {"term", "epoch", "slot/0"}
    kept = _last_entries(PAST, keeps_state=True)
    assert kept.keys() >= {"topic/in", "leader", "resetting", "deaths/in/0", "overdue/in/0"}
    assert not kept.keys() & {"term", "epoch", "slot/0", "topology", "partitions/in", "assignment/in/0"}


def test_topic_that_another_job_writes_to_is_kept() -> None:
    topology = two_stages()
    (note,) = _notes_on(Found(topology, {"job-in-changelog": Claim("other", "in")}, []))
    assert "job-in-changelog is kept" in note
    assert "'other'" in note
    with pytest.raises(IncompatibleState, match="job-b-repartition"):
        _notes_on(Found(topology, {"job-b-repartition": Claim("other", "b")}, []))
    (note,) = _notes_on(Found(topology, {}, ["job-b-changelog"]))
    assert "only its name" in note


def test_directory_of_a_running_cluster_is_refused(tmp_path: Path) -> None:
    settings = Settings(state_dir=str(tmp_path))
    check_directory(settings)
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    try:
        with pytest.raises(DirectoryInUse, match="in use by process"):
            check_directory(settings)
    finally:
        lock.release()


def test_inputs_of_one_shard_are_committed_with_the_epoch_of_one_state() -> None:
    kept = CommittedPosition(5, 9, 7, "former")
    moves = [
        Move("more", 0, -1, None, False, 1, 8),
        Move("in", 0, 4, kept, False, 2, 8),
        Move("more", 1, 4, kept, False, 3, 8),
    ]
    assert [move.kept for move in _with_one_epoch(moves, merged_stages())] == [None, kept, kept]


def test_position_after_a_reset_does_not_look_like_a_torn_transaction() -> None:
    """The repartition topic that it reads as well has no committed offset any more."""
    plan_ = plan(keeps_state=False)
    anew = _new_offset(Move("more", 0, 5, KEPT, False, 2, 8), merged_stages(), plan_)
    position = decode_position(anew.offset, anew.metadata)
    fingerprint = merged_stages().fingerprint
    assert joined_position([position, None], [0, 0], fingerprint).inputs == (InputOffset(2), InputOffset(0))
