"""Snapshots in a real S3 server: the tests that all stores share, and those that need a server."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from obstore.store import from_url

from fcluster.common.errors import SettingsError
from fcluster.common.ids import ShardId
from fcluster.storage import object_snapshot_store as module
from fcluster.storage.object_snapshot_store import ObjectSnapshotStore, open_object_snapshot_store
from fcluster.storage.snapshot_store import SnapshotStoreUnavailable, open_snapshot_store, store_identity
from fcluster.storage.snapshots import latest_valid, prune, take_snapshot
from fcluster.storage.store import RocksStore
from tests.s3.server import S3Server
from tests.unit.storage.test_snapshots import (  # noqa: F401  pytest finds tests and fixtures by their names here
    SHARD,
    file_of,
    store,
    take,
    test_changelog_may_be_truncated_only_below_the_older_of_two_intact_snapshots,
    test_damaged_snapshot_is_skipped_with_the_reason,
    test_late_former_owner_removes_its_own_snapshot_and_not_those_of_its_successor,
    test_manifest_with_another_epoch_than_its_files_is_refused,
    test_newest_two_are_kept_with_their_files,
    test_restore_interrupted_anywhere_leaves_the_old_state_or_none_or_the_new,
    test_restored_snapshot_has_the_values_and_epoch_of_its_time,
    test_restoring_a_damaged_snapshot_does_not_change_the_local_store,
    test_second_snapshot_uploads_only_files_that_are_new,
    test_snapshot_interrupted_anywhere_breaks_nothing,
    test_snapshot_newer_than_wanted_is_skipped,
    test_snapshot_of_unchanged_state_is_the_existing_one,
    test_snapshots_of_another_changelog_do_not_count,
    test_untrustworthy_manifest_is_skipped_and_pruned,
    test_young_unreferenced_files_survive_pruning,
    write,
)

BUCKET = "snapshots"
PART_BYTES = 8 * 1024 * 1024


class BucketStore(ObjectSnapshotStore):
    """A store in S3; `root` is the directory in which the server keeps its objects.

    Tests damage objects without the server's knowledge, so the e_tag stays the same, which can't happen in a
    real
    store. So this store doesn't remember what it verified. `tests/unit/storage/test_snapshots.py` tests that.
    """

    root: Path

    def is_verified(self, shard: ShardId, file_hash: str, size_bytes: int) -> bool:
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture
def url(server: S3Server, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{topic_prefix}prefix"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same time limits, but shorter."""
    monkeypatch.setattr(module, "_REQUEST_TIMEOUT", timedelta(milliseconds=500))
    monkeypatch.setattr(
        module,
        "_RETRIES",
        {
            "max_retries": 20,
            "retry_timeout": timedelta(seconds=3),
            "backoff": {
                "init_backoff": timedelta(milliseconds=50),
                "max_backoff": timedelta(milliseconds=200),
                "base": 2,
            },
        },
    )


def open_store(url: str, server: S3Server) -> BucketStore:
    found = BucketStore(from_url(url, client_options={"allow_http": True}), url, "job")
    found.root = server.root / url.removeprefix("s3://")
    return found


@pytest.fixture
def snapshots(url: str, server: S3Server) -> BucketStore:
    return open_store(url, server)


# --- identity -------------------------------------------------------------------------------------------


def test_identity_created_by_many_at_once_is_the_same(url: str) -> None:
    barrier = threading.Barrier(12)

    def join(_number: int) -> str:
        barrier.wait()
        return store_identity(url, "job")

    with ThreadPoolExecutor(12) as pool:
        identities = set(pool.map(join, range(12)))
    assert len(identities) == 1
    assert len(identities.pop()) == 32


def test_identity_depends_on_the_prefix_and_not_on_job_or_spelling(url: str) -> None:
    one = store_identity(url, "job")
    assert one == store_identity(f"{url}/", "other-job")
    assert one != store_identity(f"{url}/deeper", "job")


# --- content ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [0, 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES - 7])
def test_file_of_any_size_is_read_back_unchanged(url: str, tmp_path: Path, size_bytes: int) -> None:
    opened = open_snapshot_store(url, "job")
    content = os.urandom(size_bytes)
    name = hashlib.sha256(content).hexdigest()
    assert opened.file_size(SHARD, name) is None
    (tmp_path / "file").write_bytes(content)
    opened.put_file(SHARD, name, tmp_path / "file")
    assert opened.file_size(SHARD, name) == size_bytes
    with opened.open_file(SHARD, name) as file:
        assert file.read(3) == content[:3]
        assert file.read() == content[3:]


def test_large_file_is_written_and_read_in_little_memory(url: str, tmp_path: Path) -> None:
    script = """
import hashlib, resource, sys
from pathlib import Path
from fcluster.common.ids import ShardId
from fcluster.storage.snapshot_store import open_snapshot_store
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
store, shard, source = open_snapshot_store(sys.argv[1], "job"), ShardId("flights", 1), Path(sys.argv[2])
before = peak()
store.put_file(shard, "a" * 64, source)
uploaded = peak()
digest, size = hashlib.blake2b(), 0
with store.open_file(shard, "a" * 64) as file:
    while chunk := file.read(1 << 20):
        digest.update(chunk)
        size += len(chunk)
with source.open("rb") as file:
    assert digest.digest() == hashlib.file_digest(file, "blake2b").digest()
print(size, uploaded - before, peak() - uploaded)
"""
    big = tmp_path / "big"
    with big.open("wb") as file:
        for _ in range(200):
            file.write(os.urandom(1024 * 1024))
    done = subprocess.run(
        [sys.executable, "-c", script, url, str(big)], stdout=subprocess.PIPE, check=True, timeout=100
    )
    size, upload_bytes, download_bytes = map(int, done.stdout.split())
    assert size == 200 * 1024 * 1024
    assert upload_bytes < 64 * 1024 * 1024
    assert download_bytes < 32 * 1024 * 1024


def test_truncated_file_and_missing_file_make_a_snapshot_unusable(
    store: RocksStore,  # noqa: F811  the fixture
    snapshots: BucketStore,
) -> None:
    oldest = take(store, snapshots, 1)
    middle = take(store, snapshots, 2)
    assert latest_valid(snapshots, SHARD) == middle
    path = file_of(snapshots, middle)
    path.write_bytes(path.read_bytes()[:-1])
    assert latest_valid(snapshots, SHARD) == oldest
    file_of(snapshots, oldest).unlink()
    assert latest_valid(snapshots, SHARD) is None
    newest = take(store, snapshots, 3)
    assert latest_valid(snapshots, SHARD) == newest


def test_other_objects_beside_the_snapshots_are_left_alone(
    store: RocksStore,  # noqa: F811  the fixture
    snapshots: BucketStore,
) -> None:
    take(store, snapshots, 1)
    others = snapshots.root / "job" / "flights" / "3" / "files" / "notes.txt"
    others.write_text("not ours")
    os.utime(others, (1, 1))
    assert prune(snapshots, SHARD, store.meta(), grace_s=0) == 0
    assert others.exists()


# --- trouble --------------------------------------------------------------------------------


def test_slow_server_delays_a_snapshot_and_nothing_else(
    store: RocksStore,  # noqa: F811  the fixture
    url: str,
    server: S3Server,
    impatient: None,
) -> None:
    opened = open_snapshot_store(url, "job")
    write(store, 1)
    server.pause()
    resumed = threading.Timer(1.5, server.resume)
    resumed.start()
    try:
        began_s = time.monotonic()
        manifest = take_snapshot(store, SHARD, opened, 1).manifest
        assert time.monotonic() - began_s > 1
    finally:
        resumed.join()
    assert latest_valid(opened, SHARD) == manifest


def test_server_that_never_answers_is_an_error_in_bounded_time_and_not_damage(
    store: RocksStore,  # noqa: F811  the fixture
    url: str,
    server: S3Server,
    impatient: None,
) -> None:
    opened = open_snapshot_store(url, "job")
    write(store, 1)
    manifest = take_snapshot(store, SHARD, opened, 1).manifest
    write(store, 2)
    server.pause()
    try:
        for action in (
            lambda: take_snapshot(store, SHARD, opened, 2),
            lambda: latest_valid(opened, SHARD),
            lambda: prune(opened, SHARD, store.meta(), grace_s=0),
        ):
            began_s = time.monotonic()
            with pytest.raises(SnapshotStoreUnavailable) as raised:
                action()
            assert time.monotonic() - began_s < 15
            assert url in raised.value.message
            assert "network" in raised.value.remedy
    finally:
        server.resume()
    assert latest_valid(opened, SHARD) == manifest


def test_endpoint_without_a_server_is_reported_with_url_and_remedy(
    url: str, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(SnapshotStoreUnavailable) as raised:
        open_snapshot_store(url, "job")
    assert url in raised.value.message
    assert "127.0.0.1:1" in raised.value.message
    assert "Debug source" not in raised.value.message
    assert "AWS_ENDPOINT_URL" in raised.value.remedy


def test_wrong_secret_is_reported_as_a_problem_of_credentials(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(SnapshotStoreUnavailable) as raised:
        open_snapshot_store(url, "job")
    assert "credentials" in raised.value.remedy
    assert "wrong" not in str(raised.value)


def test_missing_bucket_is_reported_by_name(url: str) -> None:
    with pytest.raises(SnapshotStoreUnavailable, match="s3://nowhere/x") as raised:
        open_snapshot_store("s3://nowhere/x", "job")
    assert "bucket" in raised.value.remedy


@pytest.mark.parametrize(
    "bad",
    ["s3://", "s3:///x", "s3://bucket/a//b", "s3://bucket/../x", "s3://bucket/x?y=1", "s3://bucket/a b"],
)
def test_url_that_names_no_bucket_is_refused(bad: str) -> None:
    with pytest.raises(SettingsError, match="not a bucket") as raised:
        open_object_snapshot_store(bad, "job", {})
    assert "s3://bucket/prefix" in raised.value.remedy


def test_credentials_in_the_url_are_refused_and_not_printed() -> None:
    with pytest.raises(SettingsError, match="credentials") as raised:
        open_object_snapshot_store("s3://me:hidden@bucket/x", "job", {})
    assert "hidden" not in str(raised.value)


def test_azure_without_an_account_says_which_variable_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AZURE_"):
            monkeypatch.delenv(name)
    with pytest.raises(SettingsError, match="az://container/x") as raised:
        open_snapshot_store("az://container/x", "job")
    assert "AZURE_STORAGE_ACCOUNT_NAME" in raised.value.remedy
