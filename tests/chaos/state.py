"""The job's state, even where the changelog was truncated because of snapshots.

Responsible for: a `check_state` like that of the checker, but beginning at a snapshot where there are some:
the snapshot's files, read with RocksDB, then the deltas after it. Every snapshot in the store is verified,
there are at most two for a shard, and the newer one contains what the older one and the deltas between them
give. So does each local store that isn't older than the snapshots.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rocksdict import AccessType, Options, Rdict

from fcluster.common.ids import ShardId, changelog_topic
from fcluster.engine.changelog import Delta, DeltaReader
from fcluster.storage.manifest import Manifest
from fcluster.storage.snapshot_store import SnapshotStore, open_snapshot_store
from fcluster.storage.snapshots import SNAPSHOTS_KEPT, usable_manifests, verify
from fcluster.storage.store import META_KEY
from tests.checker.reading import READ_COMMITTED, read_topic
from tests.checker.state import check_state as check_whole_state
from tests.checker.state import committed_state_epochs, decoded, read_local_stores
from tests.checker.verdict import Verdict, judge_state


def check_state(
    brokers: str,
    job: str,
    stage: str,
    source: str,
    store: str,
    expected: Mapping[str, Mapping[str, Any]],
    data_dir: Path,
    snapshots_url: str = "",
) -> Verdict:
    """Compare the state of a stage with the fold of its input. The arguments are as in
    `tests.checker.state`.
    """
    snapshots = open_snapshot_store(snapshots_url or str(data_dir / "snapshots"), job)
    topic = changelog_topic(job, stage)
    records = read_topic(brokers, topic, READ_COMMITTED, lambda message: (message.offset(), message.value()))
    manifests = {
        partition: list(usable_manifests(snapshots, ShardId(stage, partition))) for partition in records
    }
    if not any(manifests.values()):
        return check_whole_state(brokers, job, stage, source, store, expected, data_dir)
    verdict = Verdict(f"state of {stage} with snapshots")
    epochs = committed_state_epochs(brokers, job, source)
    local_stores = read_local_stores(data_dir, stage)
    actual: dict[str, Any] = {}
    for partition, rows in records.items():
        shard = ShardId(stage, partition)
        found = manifests[partition]
        if len(found) > SNAPSHOTS_KEPT:
            verdict.found("state", f"{shard}: {len(found)} snapshots are kept")
        for manifest in found:
            verify(snapshots, shard, manifest)
        # The oldest snapshot: after it, the changelog must be complete.
        base = min(found, key=lambda manifest: manifest.state_epoch, default=None)
        content, epoch = _content(snapshots, shard, base) if base else ({}, 0)
        claims = [
            (f"snapshot at {manifest.state_epoch}", *_content(snapshots, shard, manifest))
            for manifest in found
        ]
        claims += [
            (f"{local.path}", local.content, local.state_epoch)
            for local in local_stores
            if local.partition == partition
        ]
        fold = _Fold(shard, content, epoch, claims, verdict)
        reader = DeltaReader(f"{topic}[{partition}]", epoch)
        for offset, value in rows:
            if base is None or offset >= base.changelog_offset:
                delta = reader.feed(offset, value)
                if delta is not None:
                    fold.take(delta)
        reader.finish()
        fold.finish()
        if reader.state_epoch != epochs.get(partition, 0):
            verdict.found(
                "state", f"{shard}: ends at {reader.state_epoch}, committed {epochs.get(partition)}"
            )
        actual.update(decoded({key: value for key, value in content.items() if value}, store))
    verdict.notes.append(
        f"{sum(map(len, manifests.values()))} snapshots verified, {len(local_stores)} local stores"
    )
    return verdict.merge(judge_state(expected, actual, f"snapshots and changelog of {stage}"))


class _Fold:
    """A shard's state from its oldest snapshot on. It is compared with everything that claims to be at an
    epoch on the way.

    Args:
        content: the content at `epoch`. It is changed in place.
        claims: what claims it, its content, and its epoch. Epochs older than `epoch` can't be judged.
    """

    def __init__(
        self,
        shard: ShardId,
        content: dict[bytes, bytes],
        epoch: int,
        claims: Sequence[tuple[str, Mapping[bytes, bytes], int]],
        verdict: Verdict,
    ) -> None:
        self._shard = shard
        self._content = content
        self._verdict = verdict
        self._claims = sorted((claim for claim in claims if claim[2] >= epoch), key=lambda claim: claim[2])
        self._judge(epoch)

    def take(self, delta: Delta) -> None:
        """Take the next delta."""
        self._content.update(delta.changes)
        self._judge(delta.epoch)

    def finish(self) -> None:
        """There are no more deltas."""
        for who, _content, epoch in self._claims:
            self._verdict.found(
                "state", f"{self._shard}: {who} claims epoch {epoch}, which was never committed"
            )

    def _judge(self, epoch: int) -> None:
        while self._claims and self._claims[0][2] <= epoch:
            who, content, claimed = self._claims.pop(0)
            if claimed < epoch:
                what = f"{who} claims epoch {claimed}, which was never committed"
                self._verdict.found("state", f"{self._shard}: {what}")
                continue
            known = {key: value for key, value in self._content.items() if value}
            differing = [key for key in known.keys() | content.keys() if known.get(key) != content.get(key)]
            for key in sorted(differing):
                self._verdict.found("state", f"{self._shard}: {who} at epoch {epoch} differs in {key!r}")


def _content(snapshots: SnapshotStore, shard: ShardId, manifest: Manifest) -> tuple[dict[bytes, bytes], int]:
    with tempfile.TemporaryDirectory() as folder:
        for file in manifest.files:
            with (
                snapshots.open_file(shard, file.hash) as source,
                (Path(folder) / file.name).open("wb") as copy,
            ):
                shutil.copyfileobj(source, copy)
        store = Rdict(folder, Options(raw_mode=True), access_type=AccessType.read_only())
        try:
            content = dict(store.items())
        finally:
            store.close()
    meta = content.pop(META_KEY, None)
    return content, json.loads(meta)["state_epoch"] if meta is not None else 0
