"""What a run may not leave behind: processes, descriptors, transactional ids, files, snapshots."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from fcluster.common.ids import transactional_ids
from fcluster.storage.manifest import Manifest
from fcluster.storage.snapshots import SNAPSHOTS_KEPT, UNREFERENCED_GRACE_S
from tests.chaos.cluster import ChaosCluster
from tests.chaos.transactions_log import AT_REST, transactional_ids_of
from tests.harness import COORDINATOR, processes_with, wait_until

DESCRIPTORS_SLACK = 28
"""How many descriptors may come and go: those of three Kafka clients with nine each: the consumer of
restores, that of the copies, and producers that are kept ready to fence a worker that has joined since.
"""
_STORE_FILE = re.compile(r".*/state/[^/]+/slot-\d+/(?P<stage>[^/]+)/(?P<partition>\d+)/db/")

_LOST_SESSION = re.compile("joining again|replaying from the committed offsets")


class Descriptors:
    """Checks that the processes of a cluster close what they open.

    Processes that have survived everything have no more descriptors than before, not counting files of
    RocksDB, which come and go. And no worker has an open file of a store that belongs neither to its shards
    nor to a warm copy. A worker that has lost a session may have one: it keeps that session's stores open, in
    case it gets them back.
    """

    def __init__(self, cluster: ChaosCluster) -> None:
        self._cluster = cluster
        self._before: dict[int, int] = {}

    def remember(self) -> None:
        """Remember the present state, for later comparison."""
        pids = self._cluster.pids()
        for name, targets in self._cluster.open_files().items():
            self._before[pids[name]] = len(_countable(targets))

    def judge(self, timeout_s: float = 15) -> None:
        """Wait until nothing is left open.

        Raises:
            TimeoutError: something is left open. The message says what.
        """
        wait_until(lambda: not self._leaking(), f"descriptors given back ({self._leaking()})", timeout_s, 0.5)

    def _leaking(self) -> dict[str, object]:
        found: dict[str, object] = {}
        status = self._cluster.status()
        pids = self._cluster.pids()
        held = stores_held(status) if status is not None else {}
        for name, targets in self._cluster.open_files().items():
            before = self._before.get(pids[name])
            count = len(_countable(targets))
            if before is not None and count > before + DESCRIPTORS_SLACK:
                found[name] = (before, count)
            if name in held and not _LOST_SESSION.search(self._cluster.log(name, 10**6)):
                strange = {store for store in map(_store_of, targets) if store} - held[name]
                if strange:
                    found[name] = sorted(strange)
        return found


def stores_held(status: dict[str, Any]) -> dict[str, set[tuple[str, int]]]:
    """By worker: the (stage, partition) of the shards that it has or copies."""
    held: dict[str, set[tuple[str, int]]] = {}
    for worker in status["workers"]:
        held[f"worker-{worker['slot']}"] = set()
    for shard in status["shards"]:
        slots = [shard["slot"], shard["moving_to"], *(copy["slot"] for copy in shard["standbys"])]
        for slot in slots:
            held.get(f"worker-{slot}", set()).add((shard["stage"], shard["partition"]))
    return held


def _countable(targets: list[str]) -> list[str]:
    return [target for target in targets if not _STORE_FILE.match(target)]


def _store_of(target: str) -> tuple[str, int] | None:
    found = _STORE_FILE.match(target)
    return (found["stage"], int(found["partition"])) if found else None


def judge_processes(data_dir: Path) -> None:
    """No process that was started with this directory runs any more."""
    processes = [pid for pid in processes_with(str(data_dir)) if pid != os.getpid()]
    assert not processes, f"processes are left: {processes}"


def judge_transactions(brokers: str, job: str, slots: int) -> None:
    """The job used only the ids of its slots and of its coordinator, and none of them has an open
    transaction.
    """
    known = {identity for slot in range(slots) for identity in transactional_ids(job, slot)}
    found = transactional_ids_of(brokers, f"{job}-")
    strange = set(found) - known - {f"{job}-{COORDINATOR}"}
    restless = {identity: state for identity, state in found.items() if state not in AT_REST}
    said = [f"transactional ids that no slot has: {strange}"] if strange else []
    said += [f"transactions are left: {restless}"] if restless else []
    assert not said, "; ".join(said)


def judge_files(data_dir: Path) -> None:
    """No part of a snapshot or restore is left. Each shard has at most two snapshots, with all their
    files.
    """
    halves = [str(path) for path in half_made(data_dir)]
    assert not halves, f"left behind: {halves}"
    for folder in shard_folders(data_dir / "snapshots"):
        kept = sorted((folder / "manifests").iterdir())
        assert len(kept) <= SNAPSHOTS_KEPT, f"more snapshots than {SNAPSHOTS_KEPT}: {kept}"
        missing = referenced(folder) - {path.name for path in (folder / "files").iterdir()}
        assert not missing, f"{folder}: manifests name files that aren't there: {missing}"


def half_made(data_dir: Path) -> Iterator[Path]:
    """What a snapshot or restore leaves behind if it isn't cleaned up.

    What a killed worker left in the snapshot store is removed with its next snapshot, once it is old enough.
    """
    now_s = time.time()
    for path in data_dir.rglob("*"):
        if path.name.startswith(("checkpoint-", "restoring-", "removed-")):
            yield path
        if path.name.startswith(".") and "snapshots" in path.parts:
            age_s = now_s - path.stat().st_mtime
            if age_s > UNREFERENCED_GRACE_S:
                yield path


def shard_folders(snapshots: Path) -> list[Path]:
    """The folders of a snapshot store: one for each shard that has files in it."""
    return sorted(path.parent for path in snapshots.glob("*/*/*/files"))


def referenced(folder: Path) -> set[str]:
    """The hashes that the manifests of a shard name."""
    found: set[str] = set()
    for path in (folder / "manifests").glob("[0-9]*.json"):
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        except (FileNotFoundError, msgspec.DecodeError):
            continue  # pruned in the meantime, or damaged by the test
        found |= {file.hash for file in manifest.files}
    return found


def await_snapshots_collected(snapshots: Path, timeout_s: float = 60) -> None:
    """Make everything in the store hours older, and wait until the files that no snapshot needs are
    removed.

    Files that no manifest names stay for an hour, in case they belong to a snapshot in progress. Older ones
    are removed with the shard's next snapshot, so the job must be under load.

    Raises:
        TimeoutError: a file that no manifest names is kept, so it leaks.
    """
    long_ago_s = time.time() - 2 * UNREFERENCED_GRACE_S
    for folder in shard_folders(snapshots):
        for path in [*(folder / "files").iterdir(), *(folder / "manifests").iterdir()]:
            try:
                os.utime(path, (long_ago_s, long_ago_s), follow_symlinks=False)
            except FileNotFoundError:
                pass  # pruned in the meantime

    def leaked() -> list[Path]:
        return [path for folder in shard_folders(snapshots) for path in aged(folder, long_ago_s + 1)]

    wait_until(lambda: not leaked(), "snapshots that nobody needs are removed", timeout_s, 0.2)


def aged(folder: Path, before_s: float) -> Iterator[Path]:
    """Files of a shard's snapshots that no manifest names and that are older than that."""
    needed = referenced(folder)
    for kind in ("files", "manifests"):
        for path in (folder / kind).iterdir():
            manifest = kind == "manifests" and not path.name.startswith(".")
            try:
                if not manifest and path.name not in needed and path.stat().st_mtime < before_s:
                    yield path
            except FileNotFoundError:
                pass  # pruned in the meantime
