"""Snapshots in an object store: `s3://`, `gs://` and `az://`, through obstore.

Responsible for: the same guarantees as the directory store. An object exists completely or not at all: it is
put in one step, or in parts that become an object in one step. The identity is created by a conditional put:
if two processes create it at the same time, one wins, and both see its identity. Memory is bounded (parts of
a fixed size), and so is the time of each request with all its retries. A store that can't be reached is
distinguished from one that lacks something: only the latter makes a snapshot count as damaged.

A directory store keeps a file from being pruned by touching it. Objects can't be touched, so a marker of the
same name in `uses` says when a file was last used. Ages are measured by the store's clock, never ours.

Layout: as in the directory store, plus ``<job>/<stage>/<partition>/uses``. Must not delete unknown objects.
Threads: any thread may call it, and several processes may use the same store.
"""

from __future__ import annotations

import io
import os
import time
import uuid
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import from_url

from fcluster.common.errors import SettingsError
from fcluster.common.files import NotPlainFileError, checked_name
from fcluster.common.ids import ShardId
from fcluster.common.settings import is_secret
from fcluster.storage.snapshot_store import (
    HASH,
    IDENTITY_BYTES_MAX,
    IDENTITY_NAME,
    MANIFEST_BYTES_MAX,
    MANIFEST_NAME,
    SnapshotStoreUnavailable,
    bad_identity,
    checked_hash,
    checked_identity,
    checked_manifest_name,
)

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_MIB: Final = 1024 * 1024
_PART_BYTES: Final = 8 * _MIB
_PARTS_AT_ONCE: Final = 2
_READ_BYTES: Final = 4 * _MIB
_LISTED_AT_ONCE: Final = 1000
_MARKER_LASTS_S: Final = 900.0
"""How long a marker of a file stays valid. This is far below the time for which unreferenced files are
kept.
"""
_MARKERS_NOTED_MAX: Final = 10_000
_VERIFIED_NOTED_MAX: Final = 20_000
_REASON_CHARACTERS_MAX: Final = 500

_RETRIES: Final[RetryConfig] = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2},
}
_CONNECT_TIMEOUT: Final = timedelta(seconds=5)
_REQUEST_TIMEOUT: Final = timedelta(seconds=30)

_CREDENTIALS: Final = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or the machine's role, AWS_REGION, and "
    "AWS_ENDPOINT_URL for a store that isn't Amazon's",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (the path of a key file) or the machine's service account",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or the "
    "machine's identity",
}
_ENDPOINT_VARIABLES: Final = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
    "GOOGLE_BASE_URL",
)
_PLAIN_HTTP_VARIABLES: Final = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")
_EMULATOR_VARIABLE: Final = "AZURE_STORAGE_USE_EMULATOR"


def open_object_snapshot_store(
    url: str, job: str, env: Mapping[str, str] = os.environ
) -> ObjectSnapshotStore:
    """The snapshot store at `url`, such as ``s3://bucket/some/prefix``. The bucket has to exist.

    Args:
        url: without credentials; those come from the environment or the machine's role.
        job: its name becomes part of the objects' names.
        env: the environment. It shows whether the endpoint is plain HTTP.

    Raises:
        SettingsError: the URL or the environment's settings can't be used.
        SnapshotStoreUnavailable: the store can't be reached or rejects us.
    """
    _check_url(url)
    client: ClientConfig = {
        "connect_timeout": _CONNECT_TIMEOUT,
        "timeout": _REQUEST_TIMEOUT,
        "allow_http": _plain_http_allowed(env),
    }
    try:
        objects = from_url(url, client_options=client, retry_config=_RETRIES)
    except (BaseError, ValueError) as error:
        raise SettingsError(
            f"snapshots: {url} can't be used: {_first_line(error)}",
            remedy=f"Set in the environment: {_CREDENTIALS[urlsplit(url).scheme]}.",
        ) from error
    return ObjectSnapshotStore(objects, url, job)


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if is_secret("snapshots", url):
        raise SettingsError(
            "snapshots: the URL must not contain credentials",
            remedy=f"Remove the part before the @. Set in the environment: {_CREDENTIALS[parts.scheme]}.",
        )
    try:
        for name in (parts.netloc, *parts.path.strip("/").split("/")):
            if name or not parts.netloc:
                checked_name(name)
        usable = not parts.query and not parts.fragment and "//" not in parts.path
    except ValueError:
        usable = False
    if not usable:
        raise SettingsError(
            f"snapshots: {url} is not a bucket with a prefix",
            remedy=f"Write {parts.scheme}://bucket/prefix, with letters, digits, dots, dashes, underscores.",
        )


def _plain_http_allowed(env: Mapping[str, str]) -> bool:
    """Whether plain HTTP may be used: only if the endpoint is given as ``http://``."""
    said = (env.get(name, "").lower() for name in (*_PLAIN_HTTP_VARIABLES, _EMULATOR_VARIABLE))
    return any(value in ("1", "true", "yes") for value in said) or any(
        env.get(name, "").startswith("http://") for name in _ENDPOINT_VARIABLES
    )


class ObjectSnapshotStore:
    """A snapshot store in a bucket.

    Args:
        objects: the prefix of all names.
        url: the store's URL, for messages.
        job: its name becomes part of the objects' names.

    Raises:
        SnapshotStoreUnavailable: the store can't be reached, rejects us, or has no such bucket.
    """

    def __init__(self, objects: ObjectStore, url: str, job: str) -> None:
        self._objects = objects
        self._url = url
        self._job = checked_name(job)
        self._useful_until_s: dict[str, float] = {}
        self._opened: dict[str, _Content] = {}
        self._verified: dict[str, _Content] = {}
        self._identity = self._read_or_make_identity()

    def identity(self) -> str:
        return self._identity

    def file_size(self, shard: ShardId, file_hash: str) -> int | None:
        path = self._path(shard, "files", checked_hash(file_hash))
        found = self._head(path)
        if found is not None and self._useful_until_s.get(path, 0.0) < time.monotonic():
            self._put(self._path(shard, "uses", file_hash), b"")
            # Pruning checks the marker last: if the file still exists now, it stays.
            found = self._head(path)
            self._note_useful(path)
        return None if found is None else found["size"]

    def put_file(self, shard: ShardId, file_hash: str, source: Path) -> None:
        path = self._path(shard, "files", checked_hash(file_hash))
        self._put(path, source)
        self._note_useful(path)

    def open_file(self, shard: ShardId, file_hash: str) -> IO[bytes]:
        path = self._path(shard, "files", checked_hash(file_hash))
        found = self._head(path)
        if found is None:
            raise NotPlainFileError(f"{file_hash} is not in {self._url}")
        _remember(self._opened, path, (found["e_tag"] or "", found["size"]))
        return io.BufferedReader(_RangeReader(self, path, found["size"]), _READ_BYTES)

    def note_verified(self, shard: ShardId, file_hash: str) -> None:
        path = self._path(shard, "files", checked_hash(file_hash))
        content = self._opened.pop(path, None)
        if content is not None and content[0]:
            _remember(self._verified, path, content)

    def is_verified(self, shard: ShardId, file_hash: str, size_bytes: int) -> bool:
        path = self._path(shard, "files", checked_hash(file_hash))
        noted = self._verified.get(path)
        if noted is None or noted[1] != size_bytes:
            return False
        found = self._head(path)
        if found is not None and (found["e_tag"] or "", found["size"]) == noted:
            return True
        self._verified.pop(path, None)
        return False

    def put_manifest(self, shard: ShardId, name: str, content: bytes) -> None:
        self._put(self._path(shard, "manifests", checked_manifest_name(name)), content)

    def manifest_names(self, shard: ShardId) -> list[str]:
        names = [name for _kind, name, _found in self._list(shard, "manifests")]
        return sorted((name for name in names if MANIFEST_NAME.fullmatch(name)), reverse=True)

    def read_manifest(self, shard: ShardId, name: str) -> bytes:
        path = self._path(shard, "manifests", checked_manifest_name(name))
        with self._told(f"reading {path}"):
            try:
                found = obstore.get(self._objects, path)
                if found.meta["size"] > MANIFEST_BYTES_MAX:
                    raise NotPlainFileError(f"{name} is too large for a manifest")
                return bytes(found.bytes())
            except FileNotFoundError:
                raise NotPlainFileError(f"{name} is not in {self._url}") from None

    def delete_manifest(self, shard: ShardId, name: str) -> None:
        self._delete(self._path(shard, "manifests", checked_manifest_name(name)))

    def delete_unreferenced(self, shard: ShardId, referenced: set[str], older_than_s: float) -> int:
        changed = {(kind, name): found["last_modified"] for kind, name, found in self._list(shard)}
        if not changed:
            return 0
        # The last write shows the store's time, at worst a little too early.
        old = max(changed.values()) - timedelta(seconds=older_than_s)
        deleted = 0
        for kind, name in changed:
            if kind == "files" and HASH.fullmatch(name) and name not in referenced:
                useful = max(changed["files", name], changed.get(("uses", name), changed["files", name]))
                if useful <= old and not self._became_useful(shard, name, old):
                    self._delete(self._path(shard, "files", name))
                    deleted += 1
        for kind, name in changed:
            if kind == "uses" and HASH.fullmatch(name) and changed[kind, name] <= old:
                self._delete(self._path(shard, "uses", name))
        return deleted

    def _became_useful(self, shard: ShardId, file_hash: str, since: datetime) -> bool:
        """Whether a marker was put in the meantime."""
        marker = self._head(self._path(shard, "uses", file_hash))
        return marker is not None and marker["last_modified"] > since

    def _note_useful(self, path: str) -> None:
        now_s = time.monotonic()
        if len(self._useful_until_s) >= _MARKERS_NOTED_MAX:
            self._useful_until_s = {
                noted: until_s for noted, until_s in self._useful_until_s.items() if until_s >= now_s
            }
        self._useful_until_s[path] = now_s + _MARKER_LASTS_S

    def _path(self, shard: ShardId, kind: str, name: str) -> str:
        return f"{self._folder(shard)}/{kind}/{name}"

    def _folder(self, shard: ShardId) -> str:
        return f"{self._job}/{checked_name(shard.stage)}/{int(shard.partition)}"

    def _read_or_make_identity(self) -> str:
        with self._told(f"reading {IDENTITY_NAME}"):
            for _attempt in range(2):
                try:
                    found = obstore.get(self._objects, IDENTITY_NAME)
                    if found.meta["size"] > IDENTITY_BYTES_MAX:
                        raise bad_identity(self._url)
                    return checked_identity(bytes(found.bytes()), self._url)
                except FileNotFoundError:
                    self._make_identity()
            raise BaseError("it was written but isn't there")

    def _make_identity(self) -> None:
        try:
            obstore.put(self._objects, IDENTITY_NAME, uuid.uuid4().hex.encode() + b"\n", mode="create")
        except AlreadyExistsError:
            pass  # another process was faster, or our own first attempt succeeded after all
        except FileNotFoundError as error:  # the bucket itself doesn't exist
            raise BaseError(str(error)) from None

    # --- requests -------------------------------------------------------------------------------------

    def _head(self, path: str) -> ObjectMeta | None:
        with self._told(f"looking for {path}"):
            try:
                return obstore.head(self._objects, path)
            except FileNotFoundError:
                return None

    def _put(self, path: str, content: bytes | Path) -> None:
        with self._told(f"writing {path}"):
            try:
                obstore.put(
                    self._objects, path, content, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
                )
            except FileNotFoundError as error:
                if isinstance(content, Path) and not content.exists():
                    raise
                raise BaseError(str(error)) from None

    def _delete(self, path: str) -> None:
        with self._told(f"deleting {path}"):
            try:
                obstore.delete(self._objects, path)
            except FileNotFoundError:
                pass

    def _list(self, shard: ShardId, kind: str = "") -> Iterator[tuple[str, str, ObjectMeta]]:
        """Kind, name and the rest of all objects of a shard, or of its objects of one kind."""
        folder = self._folder(shard)
        with self._told(f"listing {folder}"):
            prefix = f"{folder}/{kind}" if kind else folder
            # One of its overloads uses types of a package that isn't needed here.
            chunks = obstore.list(self._objects, prefix, chunk_size=_LISTED_AT_ONCE)  # pyright: ignore[reportUnknownMemberType]
            for chunk in chunks:
                for found in chunk:
                    found_kind, _, name = found["path"].removeprefix(f"{folder}/").partition("/")
                    yield found_kind, name, found

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Some bytes of an object that existed a moment ago. Fewer if it has become shorter."""
        with self._told(f"reading {path}"):
            try:
                return bytes(obstore.get_range(self._objects, path, start=start, length=length))
            except FileNotFoundError:
                raise NotPlainFileError(f"{path} has disappeared from {self._url}") from None

    @contextmanager
    def _told(self, doing: str) -> Generator[None]:
        try:
            yield
        except (BaseError, ValueError) as error:
            raise self._unavailable(doing, error) from error

    def _unavailable(self, doing: str, error: Exception) -> SnapshotStoreUnavailable:
        scheme = urlsplit(self._url).scheme
        reason = _first_line(error)
        refused = isinstance(error, PermissionDeniedError | UnauthenticatedError) or "403 Forbidden" in reason
        check = (
            "the credentials and their permissions"
            if refused
            else "the bucket's name, the endpoint, and this machine's network"
        )
        remedy = f"Check {check}. Set in the environment: {_CREDENTIALS.get(scheme, 'nothing')}."
        return SnapshotStoreUnavailable(f"the snapshot store {self._url}: {doing}: {reason}", remedy=remedy)


class _RangeReader(io.RawIOBase):
    """An object as a file, read range by range: each request is small enough for its timeout."""

    def __init__(self, store: ObjectSnapshotStore, path: str, size_bytes: int) -> None:
        self._store = store
        self._path = path
        self._left_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        length = min(len(buffer), self._left_bytes)
        if length == 0:
            return 0
        content = self._store.read_range(self._path, self._position, length)
        buffer[: len(content)] = content
        self._position += len(content)
        self._left_bytes -= len(content)
        return len(content)


_Content = tuple[str, int]
"""The store's description of an object's content: its e_tag, which differs for different content, and its
size."""


def _remember(noted: dict[str, _Content], path: str, content: _Content) -> None:
    noted.pop(path, None)
    noted[path] = content
    while len(noted) > _VERIFIED_NOTED_MAX:
        noted.pop(next(iter(noted)), None)


def _first_line(error: Exception) -> str:
    """The text without the library's dump of its inner state."""
    return " ".join(str(error).split("\n\nDebug source", 1)[0].split())[:_REASON_CHARACTERS_MAX]
