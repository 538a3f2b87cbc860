"""Many keys are restored by copying files and replaying the last deltas, not by replaying each key.

A small form of `benchmarks/restore.py`. Its speed would mean little on a busy host, so it checks what is
read.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.restore import JOB, Plan, Prepared, prepare, restore
from fcluster.storage.restore import RestoreProgress
from fcluster.storage.snapshot_store import DirectorySnapshotStore

pytestmark = pytest.mark.timeout(240)

KEYS, SHARDS, DELTAS, DELTA_KEYS = 200_000, 4, 5, 300


@pytest.fixture
def plan(kafka: str, topic_prefix: str, tmp_path: Path) -> Plan:
    return Plan(
        brokers=kafka,
        directory=tmp_path,
        changelog=f"{topic_prefix}changelog",
        replay_topic="",
        keys=KEYS,
        shards=SHARDS,
        value_bytes=100,
        deltas=DELTAS,
        delta_keys=DELTA_KEYS,
    )


@pytest.fixture
def prepared(plan: Plan) -> list[Prepared]:
    return prepare(plan)


def test_many_keys_are_restored_from_snapshots_and_the_deltas_after_them(
    plan: Plan, prepared: list[Prepared]
) -> None:
    told: list[RestoreProgress] = []
    restored = restore(plan, prepared, plan.snapshots, told.append, checked=True)
    assert restored.bases == dict.fromkeys(range(SHARDS), "snapshot")
    assert restored.progress.shards_done == SHARDS
    # Of the changelog, only what comes after the snapshots was read, one record for each of those epochs, and
    # the
    # last record of each snapshot, which shows that Kafka has torn no transaction (decision 0095).
    assert restored.progress.records == SHARDS * (DELTAS + 1)
    assert sum(one.records_before for one in prepared) > 2 * SHARDS
    # The snapshots were read completely, and their size was known in advance.
    snapshot_bytes = sum(size for one in prepared for _, size in one.snapshot_files)
    assert snapshot_bytes > KEYS * 90
    assert restored.progress.bytes == snapshot_bytes + restored.progress.record_bytes
    assert restored.progress.record_bytes > sum(one.bytes_behind for one in prepared)
    assert max(one.snapshot_bytes_left for one in told) > snapshot_bytes / SHARDS
    assert told[-1].bytes_left == 0

    without = restore(plan, prepared, DirectorySnapshotStore(plan.directory / "none", JOB), checked=True)
    assert without.bases == dict.fromkeys(range(SHARDS), "nothing")
    assert without.progress.records == sum(one.records_before + one.records_behind for one in prepared)
