"""The job's state, read back from the changelog in Kafka and from RocksDB on disk.

Responsible for: folding the changelog (read_committed, as a restore does) and opening the local stores of
workers that have ended, and the verdicts on both:

- the changelog's fold ends at the epoch that the committed offset's metadata names, and its keys have the
  values that a fold of the input up to the committed offsets gives;
- a local store may be behind (its write-ahead log is off). Then it contains exactly what the changelog says
  for the store's epoch, and never anything of an aborted epoch.

It uses fcluster's decoders of deltas and values, because they define the format, but not its restore.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocksdict import AccessType, Options, Rdict

from fcluster.common.errors import StateDamaged
from fcluster.common.ids import changelog_topic
from fcluster.common.positions import decode_position
from fcluster.engine.changelog import Delta, DeltaReader
from fcluster.engine.state import store_prefix
from fcluster.engine.values import decode_state
from fcluster.storage.store import META_KEY
from tests.checker.reading import READ_COMMITTED, committed_positions, read_topic
from tests.checker.verdict import Verdict, judge_state

Encoded = dict[bytes, bytes]


@dataclass(frozen=True)
class Changelog:
    """The committed deltas of one shard, in order."""

    partition: int
    deltas: Sequence[Delta]

    @property
    def state_epoch(self) -> int:
        """The epoch of the last delta."""
        return self.deltas[-1].epoch if self.deltas else 0

    def fold(self, epoch: int | None = None) -> Encoded:
        """By store key: the encoded value after `epoch` (None: after all epochs)."""
        state: Encoded = {}
        for delta in self.deltas:
            if epoch is not None and delta.epoch > epoch:
                break
            state.update(delta.changes)
        return {key: value for key, value in state.items() if value}


def read_changelog(brokers: str, job: str, stage: str) -> list[Changelog]:
    """The changelog of a stage, shard by shard.

    Raises:
        StateDamaged: a chain is broken, or the changelog was truncated: then its fold isn't the whole state.
    """
    topic = changelog_topic(job, stage)
    parts = read_topic(brokers, topic, READ_COMMITTED, lambda message: (message.offset(), message.value()))
    found: list[Changelog] = []
    for partition, records in sorted(parts.items()):
        reader = DeltaReader(f"{topic}[{partition}]", 0)
        whole = [reader.feed(offset, value) for offset, value in records]
        reader.finish()
        found.append(Changelog(partition, [delta for delta in whole if delta is not None]))
    return found


def committed_state_epochs(brokers: str, job: str, source: str) -> dict[int, int]:
    """By partition: the state epoch that the committed offset's metadata names."""
    return {
        partition: decode_position(offset, metadata).state_epoch
        for (topic, partition), (offset, metadata) in committed_positions(brokers, job).items()
        if topic == source
    }


def decoded(state: Mapping[bytes, bytes], store: str) -> dict[str, Any]:
    """By key as text: the decoded state in one store."""
    prefix = store_prefix(store)
    return {
        key[len(prefix) :].decode(): decode_state(value)
        for key, value in state.items()
        if key.startswith(prefix)
    }


@dataclass(frozen=True)
class LocalStore:
    """The contents of one RocksDB directory."""

    path: Path
    partition: int
    state_epoch: int
    content: Encoded


def read_local_stores(data_dir: Path, stage: str) -> list[LocalStore]:
    """The RocksDB of each shard of `stage` below `data_dir`, of any worker. The workers must have ended."""
    found: list[LocalStore] = []
    for path in sorted(data_dir.rglob(f"{stage}/*/db")):
        if not (path / "CURRENT").exists():
            continue
        store = Rdict(str(path), Options(raw_mode=True), access_type=AccessType.read_only())
        try:
            content = dict(store.items())
        finally:
            store.close()
        meta = content.pop(META_KEY, None)
        epoch = json.loads(meta)["state_epoch"] if meta is not None else 0
        found.append(LocalStore(path, int(path.parent.name), epoch, content))
    return found


def check_state(
    brokers: str,
    job: str,
    stage: str,
    source: str,
    store: str,
    expected: Mapping[str, Mapping[str, Any]],
    data_dir: Path | None = None,
) -> Verdict:
    """Compare the state of a stage with the fold of its input.

    Args:
        brokers: bootstrap servers.
        job: the job's name.
        stage: the stage's name in the topology.
        source: the topic whose committed offsets carry the stage's epochs.
        store: the operator's name.
        expected: by key, the state, from `verdict.state_by_key` or `state_by_group`.
        data_dir: the job's data directory. If given, the local stores are compared too, and no worker may be
            running.
    """
    verdict = Verdict(f"state of {stage}", keys=len(expected))
    try:
        changelogs = read_changelog(brokers, job, stage)
    except StateDamaged as error:
        verdict.found("state", str(error))
        return verdict
    actual: dict[str, Any] = {}
    epochs = committed_state_epochs(brokers, job, source)
    for changelog in changelogs:
        wanted = epochs.get(changelog.partition, 0)
        if changelog.state_epoch != wanted:
            verdict.found(
                "state",
                f"{stage}/{changelog.partition}: the changelog ends at epoch {changelog.state_epoch}, "
                f"the committed offset names {wanted}",
            )
        actual.update(decoded(changelog.fold(), store))
    verdict.merge(judge_state(expected, actual, f"changelog of {stage}"))
    if data_dir is not None:
        verdict.merge(judge_local_stores(changelogs, read_local_stores(data_dir, stage)))
    return verdict


def judge_local_stores(changelogs: Sequence[Changelog], stores: Sequence[LocalStore]) -> Verdict:
    """Whether each local store contains what the changelog says for the store's epoch."""
    verdict = Verdict("local stores")
    by_partition = {changelog.partition: changelog for changelog in changelogs}
    for store in stores:
        changelog = by_partition[store.partition]
        known = {0, *(delta.epoch for delta in changelog.deltas)}
        if store.state_epoch not in known:
            verdict.found(
                "state", f"{store.path} claims epoch {store.state_epoch}, which was never committed"
            )
            continue
        wanted = changelog.fold(store.state_epoch)
        differing = [
            key for key in wanted.keys() | store.content.keys() if wanted.get(key) != store.content.get(key)
        ]
        for key in sorted(differing):
            verdict.found(
                "state",
                f"{store.path} at epoch {store.state_epoch}: {key!r} is {store.content.get(key)!r}, "
                f"the changelog says {wanted.get(key)!r}",
            )
    verdict.notes.append(f"{len(stores)} local stores compared with the changelog at their epochs")
    return verdict
