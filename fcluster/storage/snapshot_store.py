"""Where snapshots are kept: files named after their content's hash, and manifests that list them.

Responsible for: the store that a URL names, as a place for bytes; `snapshots` knows their meaning. Rules: a
file or manifest exists completely or not at all; no link is followed; no unchecked name becomes part of a
path. Coordinator and workers compare its `identity`.

Layout of the directory: ``<root>/STORE-ID`` and ``<root>/<job>/<stage>/<partition>/{files,manifests}``.
Threads: any thread may call it, and several processes may use the same store.
"""

from __future__ import annotations

import os
import re
import stat
import time
import uuid
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Protocol

from fcluster.common.errors import FclusterError, SettingsError
from fcluster.common.failures import FailureKind
from fcluster.common.files import (
    NotPlainFileError,
    checked_name,
    open_plain,
    opened_directory,
    remove_plain,
    write_whole,
)
from fcluster.common.ids import ShardId

MANIFEST_BYTES_MAX = 16 * 1024 * 1024
HASH = re.compile(r"[0-9a-f]{64}")
MANIFEST_NAME = re.compile(r"[0-9]{20}-[0-9]{20}\.json")
IDENTITY_NAME = "STORE-ID"
IDENTITY_BYTES_MAX = 64
_IDENTITY = re.compile(rb"[0-9a-f]{32}\n?")
OBJECT_STORE_SCHEMES = frozenset({"s3", "gs", "az"})


class SnapshotStoreUnavailable(FclusterError):  # noqa: N818  named like the other errors that users see
    """The store can't be reached or rejects us. This says nothing about its contents, and may be
    temporary.
    """

    kind = FailureKind.HOST


class SnapshotStore(Protocol):
    """Where snapshots are kept. Everything in it may be damaged or missing: callers verify.

    All methods may raise SnapshotStoreUnavailable.
    """

    def identity(self) -> str:
        """A text that is unique to this store. Workers compare it to prove that they see the same store."""
        ...

    def file_size(self, shard: ShardId, file_hash: str) -> int | None:
        """The size of a file in bytes. None if it doesn't exist. Keeps the file from being pruned for a
        while.
        """
        ...

    def put_file(self, shard: ShardId, file_hash: str, source: Path) -> None:
        """Store the content of `source`, durably and in one step, replacing an existing file."""
        ...

    def open_file(self, shard: ShardId, file_hash: str) -> IO[bytes]:
        """Read a file. Raises NotPlainFileError if it is missing or not a plain file."""
        ...

    def note_verified(self, shard: ShardId, file_hash: str) -> None:
        """The content that `open_file` last returned for that file was read to its end, and matches its
        hash.
        """
        ...

    def is_verified(self, shard: ShardId, file_hash: str, size_bytes: int) -> bool:
        """Whether this process has noted that the file is verified, and the store says that its content
        hasn't changed. Then it needn't be read again. Always false if the store can't tell.
        """
        ...

    def put_manifest(self, shard: ShardId, name: str, content: bytes) -> None:
        """Store a manifest, durably and in one step."""
        ...

    def manifest_names(self, shard: ShardId) -> list[str]:
        """The names of all manifests, newest state epoch first."""
        ...

    def read_manifest(self, shard: ShardId, name: str) -> bytes:
        """Raises NotPlainFileError if it is missing or not a plain file."""
        ...

    def delete_manifest(self, shard: ShardId, name: str) -> None:
        """Remove a manifest, if it exists."""
        ...

    def delete_unreferenced(self, shard: ShardId, referenced: set[str], older_than_s: float) -> int:
        """Remove files whose hash isn't `referenced` and that weren't used for this long. Returns how
        many.
        """
        ...


def open_snapshot_store(url: str, job: str) -> SnapshotStore:
    """The snapshot store at `url`: a directory's path, ``file:///path``, or an object store's URL.

    Args:
        url: a directory is created if missing. ``s3://bucket/prefix``, ``gs://...`` and ``az://...`` take
            credentials from the usual environment variables.
        job: the job that owns the snapshots.

    Raises:
        SettingsError: the URL's scheme isn't supported, or the directory or bucket can't be used.
        SnapshotStoreUnavailable: the object store can't be reached or rejects us.
    """
    scheme, separator, rest = url.partition("://")
    if separator and scheme in OBJECT_STORE_SCHEMES:
        # Imported only where it is needed, because it takes memory and time in each worker.
        from fcluster.storage.object_snapshot_store import open_object_snapshot_store

        return open_object_snapshot_store(url, job)
    if separator and scheme != "file":
        raise SettingsError(
            f"snapshots: {scheme}:// is not supported",
            remedy="Use a directory, file:///path, s3://bucket/prefix, gs://bucket/prefix or "
            "az://container/prefix.",
        )
    path = rest if separator else url
    if not path:
        raise SettingsError("snapshots: the directory has no name", remedy="Give its path.")
    return DirectorySnapshotStore(Path(path).expanduser().absolute(), job)


def store_identity(url: str, job: str) -> str:
    """The identity of the store at `url`, to be compared between coordinator and workers."""
    return open_snapshot_store(url, job).identity()


class DirectorySnapshotStore:
    """A snapshot store in a local or shared directory.

    Other users may write there too, and change it at any moment. So each step uses descriptors of directories
    that were opened without following a link.

    Args:
        root: created if missing. It may be a link; nothing inside may be.
        job: its name becomes the name of a directory.

    Raises:
        SettingsError: the directory can't be used.
    """

    def __init__(self, root: Path, job: str) -> None:
        self.root = root
        self._job = checked_name(job)
        try:
            root.mkdir(parents=True, exist_ok=True)
            with opened_directory(root) as directory:
                self._identity = self._read_or_make_identity(directory)
        except OSError as error:
            raise SettingsError(
                f"snapshots: {root} can't be used: {error.strerror or error}",
                remedy="Choose a directory that this user may write to.",
            ) from error

    def identity(self) -> str:
        return self._identity

    def file_size(self, shard: ShardId, file_hash: str) -> int | None:
        name = checked_hash(file_hash)
        try:
            with self._folder(shard, "files") as folder:
                found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if not stat.S_ISREG(found.st_mode):
                    return None
                os.utime(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return found.st_size

    def put_file(self, shard: ShardId, file_hash: str, source: Path) -> None:
        with source.open("rb") as content, self._folder(shard, "files", make=True) as folder:
            write_whole(folder, checked_hash(file_hash), content)

    def open_file(self, shard: ShardId, file_hash: str) -> IO[bytes]:
        return self._open(shard, "files", checked_hash(file_hash))

    def note_verified(self, shard: ShardId, file_hash: str) -> None:
        """No effect: a disk may corrupt data without changing size and time, and reading the file again costs
        little.
        """

    def is_verified(self, shard: ShardId, file_hash: str, size_bytes: int) -> bool:  # noqa: ARG002
        return False

    def put_manifest(self, shard: ShardId, name: str, content: bytes) -> None:
        with self._folder(shard, "manifests", make=True) as folder:
            write_whole(folder, checked_manifest_name(name), content)

    def manifest_names(self, shard: ShardId) -> list[str]:
        try:
            with self._told(f"listing the snapshots of {shard}"), self._folder(shard, "manifests") as folder:
                names = os.listdir(folder)
        except FileNotFoundError:
            return []
        return sorted((name for name in names if MANIFEST_NAME.fullmatch(name)), reverse=True)

    def read_manifest(self, shard: ShardId, name: str) -> bytes:
        checked = checked_manifest_name(name)
        with self._told(f"reading {name}"), self._open(shard, "manifests", checked) as file:
            content = file.read(MANIFEST_BYTES_MAX + 1)
        if len(content) > MANIFEST_BYTES_MAX:
            raise NotPlainFileError(f"{name} is too large for a manifest")
        return content

    def delete_manifest(self, shard: ShardId, name: str) -> None:
        with self._folder(shard, "manifests", make=True) as folder:
            if remove_plain(folder, checked_manifest_name(name)):
                os.fsync(folder)

    def delete_unreferenced(self, shard: ShardId, referenced: set[str], older_than_s: float) -> int:
        deleted, now_s = 0, time.time()
        for kind in ("files", "manifests"):
            with self._folder(shard, kind, make=True) as folder:
                for entry in os.scandir(folder):
                    whole = HASH if kind == "files" else MANIFEST_NAME
                    if whole.fullmatch(entry.name) and (kind == "manifests" or entry.name in referenced):
                        continue
                    try:
                        age_s = now_s - entry.stat(follow_symlinks=False).st_mtime
                    except FileNotFoundError:
                        continue  # another process is pruning the same shard
                    if age_s >= older_than_s:
                        deleted += remove_plain(folder, entry.name)
        return deleted

    @contextmanager
    def _told(self, doing: str) -> Generator[None]:
        """An error of the disk or share (an I/O error, a server that is down, permissions) says nothing about
        the contents.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise SnapshotStoreUnavailable(
                f"the snapshot store {self.root}: {doing}: {error.strerror or error}",
                remedy="Check the disk or share, and that this user may read it.",
            ) from error

    def _open(self, shard: ShardId, kind: str, name: str) -> IO[bytes]:
        try:
            with self._folder(shard, kind) as folder:
                return open_plain(folder, name)
        except FileNotFoundError as error:
            raise NotPlainFileError(f"{name} can't be opened: {error.strerror}") from error

    @contextmanager
    def _folder(self, shard: ShardId, kind: str, *, make: bool = False) -> Generator[int]:
        parts = (self._job, checked_name(shard.stage), str(int(shard.partition)), kind)
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(opened_directory(self.root, *parts, make=make))
            except NotPlainFileError as error:
                raise FclusterError(
                    f"{self.root.joinpath(*parts)} in the snapshot store is refused: {error}",
                    remedy="Replace it with a directory; only the store's root itself may be a link.",
                ) from error
            yield folder

    def _read_or_make_identity(self, directory: int) -> str:
        temporary = f".{IDENTITY_NAME}-{uuid.uuid4().hex}"
        try:
            os.stat(IDENTITY_NAME, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            write_whole(directory, temporary, uuid.uuid4().hex.encode() + b"\n")
            try:  # unlike a rename, this fails if another process was faster
                os.link(temporary, IDENTITY_NAME, src_dir_fd=directory, dst_dir_fd=directory)
            except FileExistsError:
                pass
            finally:
                remove_plain(directory, temporary)
            os.fsync(directory)
        try:
            with open_plain(directory, IDENTITY_NAME) as file:
                return checked_identity(file.read(IDENTITY_BYTES_MAX), str(self.root))
        except NotPlainFileError as error:
            raise bad_identity(str(self.root)) from error


def checked_identity(content: bytes, where: str) -> str:
    """A store's identity as stored there. Raises SettingsError if it can't be one."""
    if not _IDENTITY.fullmatch(content):
        raise bad_identity(where)
    return content.decode().strip()


def bad_identity(where: str) -> SettingsError:
    """The error for a bad identity. The message doesn't quote what was found."""
    return SettingsError(
        f"snapshots: {IDENTITY_NAME} in {where} was not written by fcluster",
        remedy="Find out which other program writes to the store, or use another store, which may be empty.",
    )


def checked_hash(file_hash: str) -> str:
    """`file_hash`, if it is a content hash. Raises ValueError if it can't be one."""
    if not HASH.fullmatch(file_hash):
        raise ValueError(f"{file_hash!r} is not a hash")
    return file_hash


def checked_manifest_name(name: str) -> str:
    """`name`, if it is the name of a manifest. Raises ValueError if it can't be one."""
    if not MANIFEST_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a manifest")
    return name
