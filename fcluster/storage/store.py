"""Committed state on disk: one RocksDB for each shard, under one directory for each worker.

Responsible for: opening, reading, writing, checkpointing and removing the RocksDB of a shard, and the memory
that all of a process share. It supports invariant 3: values and `StoreMeta` change together, so a store is
always at exactly one epoch, even after a crash. (The write-ahead log is off: changes that weren't flushed are
lost as a whole, and the changelog has them.) A large write is several batches. The first one has a mark that
the last one removes. A store that has it was cut short in that write, and counts as damaged. Must not know
Kafka, and must not decide what to restore.

Layout: ``<root>/LOCK``, ``<root>/<stage>/<partition>/db``. Other entries next to ``db`` are temporary, and
are removed when the directory or the shard is next opened, except for ``unsynced``: adopted files are synced
in the background, and until that is done this file says in which boot of the host they were written. After
another boot they can't be trusted, and the shard counts as having no store. See
docs/decisions/0010-rocksdb-through-rocksdict.md and 0072-restore-at-the-speed-of-copying.md.

Threads: any thread may call it, but two must not call `apply` of one store at the same time. RocksDB's reads
and writes hold the interpreter's lock, but `flush` doesn't.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, cast

import msgspec
from rocksdict import (
    BlockBasedOptions,
    Cache,
    Checkpoint,
    ChecksumType,
    DBCompressionType,
    Env,
    Options,
    Rdict,
    WriteBatch,
    WriteBufferManager,
    WriteOptions,
)

from fcluster.common.errors import DirectoryInUse, FclusterError, IncompatibleState, StateDamaged
from fcluster.common.failures import FailureKind
from fcluster.common.files import boot_id, checked_name, sync
from fcluster.common.ids import ShardId
from fcluster.engine.state import STORE_PREFIX_BYTES, StoreMeta

_log = logging.getLogger("fcluster.worker")

STORE_FORMAT = 1
META_KEY = b"\x00"
"""Shorter than any key of state, which begins with a prefix of `STORE_PREFIX_BYTES`."""

CACHE_BYTES = 96 * 1024 * 1024
"""By default: the memory of a process for blocks, indexes, filters and write buffers of all its stores
together. If filters don't fit, each read of an unknown key reads a filter from the disk.
"""
_WRITE_BUFFER_BYTES_MAX = 16 * 1024 * 1024
_LOG_BYTES = 1024 * 1024
SYNC_DELAY_S = 5.0
_BATCH_ENTRIES_MAX = 4_000
_BATCH_BYTES_MAX = 4 * 1024 * 1024
"""RocksDB writes a batch with the interpreter's lock held: about a microsecond for each entry, 0.1 s for
100,000. In that time no record is processed.
"""
_UNSYNCED = "unsynced"

_CUT_SHORT_KEY = b"\x00\x00"
"""The mark of a write that isn't complete. Like `META_KEY`, it sorts before all keys of state."""

assert len(META_KEY) < len(_CUT_SHORT_KEY) < STORE_PREFIX_BYTES


class StateDirectoryFullError(FclusterError):
    """The disk below the state directory is full."""

    kind = FailureKind.HOST


class StateDirectoryFailedError(FclusterError):
    """The disk below the state directory can't be written, for a reason that doesn't depend on its
    contents.
    """

    kind = FailureKind.HOST


DISK_TROUBLE = (StateDirectoryFullError, StateDirectoryFailedError)
"""Errors that no other base for a restore would fix."""
LOCAL_TROUBLE = (*DISK_TROUBLE, StateDamaged)
"""What reading and writing a store raises when the disk below it is full or fails. That is a problem of this
worker alone: elsewhere its shards can continue, since everything that is committed is in Kafka.
"""

_DISK_FAILS = tuple(os.strerror(number) for number in (errno.EIO, errno.EROFS, errno.EFBIG))
"""How RocksDB describes it. It also reports a missing file as an I/O error, but for us that is damage."""


class _MetaRecord(msgspec.Struct, frozen=True):
    """`StoreMeta` as it is written in the store."""

    format: int
    state_epoch: int
    changelog_offset: int
    changelog_id: str


_encode_meta = msgspec.json.Encoder().encode
_decode_meta = msgspec.json.Decoder(_MetaRecord).decode


class RocksStore:
    """The RocksDB of one shard. Created by `StoreDirectory.open`."""

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        # Options must be given for the column family too. Otherwise an existing store would load them from
        # its files, without the shared cache and its limits.
        self._db = Rdict(str(path), options, column_families={"default": options})
        self._without_log = WriteOptions()
        # An attribute, although rocksdict's type stub declares a method.
        setattr(self._without_log, "disable_wal", True)  # noqa: B010
        # Held while writing and while creating a checkpoint, so that values and epoch of a checkpoint belong
        # together.
        self._writing = threading.Lock()
        # Held while RocksDB works without the interpreter's lock. Closing it then would be an error.
        self._in_use = threading.Lock()
        self._closed = False
        self._meta = self._read_meta()

    def meta(self) -> StoreMeta:
        """The position of the store."""
        return self._meta

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`, None if there is none. Raises StateDamaged if RocksDB can't read it."""
        try:
            return self._db.get(key)
        except Exception as error:  # noqa: BLE001  rocksdict raises nothing more specific
            self._raise(error)

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """The values of `keys`, in their order. Releases the interpreter's lock meanwhile."""
        if not keys:
            return []
        try:
            values: Any = self._db.get(cast("list[Any]", keys))
        except Exception as error:  # noqa: BLE001  rocksdict raises nothing more specific
            self._raise(error)
        return values

    def scan(self, start: bytes, stop: bytes, limit: int, *, reverse: bool) -> list[tuple[bytes, bytes]]:
        """The entries from `start` up to but not including `stop`, in the order of their bytes or backwards,
        at most `limit`.

        Raises:
            StateDamaged: RocksDB can't read them.
        """
        found: list[tuple[bytes, bytes]] = []
        try:
            # rocksdict doesn't accept raw bytes as bounds of iterators, so keys are compared here.
            iterator = self._db.iter()
            if reverse:
                iterator.seek_for_prev(stop)
                if iterator.valid() and iterator.key() == stop:
                    iterator.prev()
            else:
                iterator.seek(start)
            step = iterator.prev if reverse else iterator.next
            while len(found) < limit and iterator.valid():
                key: bytes = iterator.key()
                if not start <= key < stop:
                    break
                found.append((key, iterator.value()))
                step()
            iterator.status()
        except Exception as error:  # noqa: BLE001  rocksdict raises nothing more specific
            self._raise(error)
        return found

    def apply(self, changes: Mapping[bytes, bytes], meta: StoreMeta) -> None:
        """Write `changes` (an empty value deletes) and `meta`. If the process dies meanwhile, the store has
        all of it, nothing of it, or counts as damaged.

        Raises:
            StateDirectoryFullError, StateDirectoryFailedError: it must be written again.
            StateDamaged: RocksDB can't continue.
        """
        is_split = False
        with self._writing:
            try:
                batch, size_bytes = WriteBatch(raw_mode=True), 0
                for key, value in changes.items():
                    if value:
                        batch.put(key, value)
                    else:
                        batch.delete(key)
                    size_bytes += len(value)
                    if size_bytes >= _BATCH_BYTES_MAX or len(batch) >= _BATCH_ENTRIES_MAX:
                        if not is_split:
                            batch.put(_CUT_SHORT_KEY, b"\x01")
                            is_split = True
                        self._db.write(batch, self._without_log)
                        batch, size_bytes = WriteBatch(raw_mode=True), 0
                if is_split:
                    batch.delete(_CUT_SHORT_KEY)
                batch.put(META_KEY, _encode_meta(_MetaRecord(STORE_FORMAT, *meta)))
                self._db.write(batch, self._without_log)
            except Exception as error:  # noqa: BLE001  rocksdict raises nothing more specific
                self._raise(error)
            self._meta = meta

    def checkpoint(self, path: Path) -> StoreMeta:
        """Copy the store to `path`, which must not exist, by hard links. Returns the position of the copy."""
        with self._in_use:
            try:
                # This runs without the interpreter's lock. The checkpoint doesn't, and would write what is
                # left and wait for the disk. So nothing is left; the second flush is short.
                self._db.flush()
                with self._writing:
                    self._db.flush()
                    Checkpoint(self._db).create_checkpoint(str(path))
                    return self._meta
            except Exception as error:  # noqa: BLE001  rocksdict raises nothing more specific
                self._raise(error)

    def items(self) -> list[tuple[bytes, bytes]]:
        """All entries of state, for checks and tests."""
        pairs: Any = self._db.items()
        return [(key, value) for key, value in pairs if key not in (META_KEY, _CUT_SHORT_KEY)]

    def close(self) -> None:
        """Write what is in memory, and close. May be called twice."""
        with self._in_use, self._writing:
            if self._closed:
                return
            self._closed = True
            try:
                self._db.close()
            except Exception as error:  # noqa: BLE001  rocksdict raises nothing more specific
                self._raise(error)

    def _read_meta(self) -> StoreMeta:
        if self.get(_CUT_SHORT_KEY) is not None:
            raise StateDamaged(f"a crash has cut short the last write to the state in {self.path}")
        value = self.get(META_KEY)
        if value is None:
            return StoreMeta()
        try:
            record = _decode_meta(value)
        except msgspec.DecodeError as error:
            raise StateDamaged(
                f"the state in {self.path} doesn't say at which epoch it is: {error}"
            ) from error
        if record.format != STORE_FORMAT:
            raise IncompatibleState(
                f"the state in {self.path} has format {record.format}, but this version reads {STORE_FORMAT}",
                remedy="Run the version that wrote it, or delete the directory: it is rebuilt from Kafka.",
            )
        return StoreMeta(record.state_epoch, record.changelog_offset, record.changelog_id)

    def _raise(self, error: Exception) -> NoReturn:
        raise explain_trouble(error, self.path) from error


class StoreDirectory:
    """The state directory of one worker: its stores, and the memory that they share.

    Args:
        root: created if missing. No other process may use it at the same time.
        cache_bytes: see `CACHE_BYTES`. Half of it may be used by write buffers.

    Raises:
        DirectoryInUse: another process uses it.
    """

    def __init__(self, root: Path, cache_bytes: int = CACHE_BYTES) -> None:
        self.root = root
        self._stores: dict[ShardId, RocksStore] = {}
        self._mutex = threading.Lock()
        self._closing = threading.Event()
        self._syncing = ThreadPoolExecutor(1, thread_name_prefix="syncing")
        self._env = Env()
        # Compactions aren't urgent. On busy processors they would keep commits from running for 0.1 s.
        self._env.lower_thread_pool_cpu_priority()
        self._cache = Cache(cache_bytes)
        self._write_buffer_bytes = min(_WRITE_BUFFER_BYTES_MAX, cache_bytes // 4)
        self._buffers = WriteBufferManager.new_write_buffer_manager_with_cache(
            cache_bytes // 2, allow_stall=False, cache=self._cache
        )
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(root / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise explain_trouble(error, root) from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_file)
            raise _in_use(root) from error
        # Including shards that this worker may never get again. A worker that was killed during a snapshot
        # leaves a checkpoint, which keeps files on the disk that RocksDB has long deleted.
        for path in root.glob("*/*"):
            remove_temporaries(path)

    def shard_path(self, shard: ShardId) -> Path:
        """The path of the files of `shard`."""
        return self.root / checked_name(shard.stage) / str(int(shard.partition))

    def opened(self, shard: ShardId) -> RocksStore | None:
        """The store of `shard`, if it is open."""
        return self._stores.get(shard)

    def has_files(self, shard: ShardId) -> bool:
        """Whether there is a store to open. If not, `open` creates an empty one, which takes a while."""
        return shard in self._stores or (self.shard_path(shard) / "db" / "CURRENT").exists()

    def open(self, shard: ShardId) -> RocksStore:
        """The store of `shard`, empty if it has none. Returns the same object until it is closed.

        Raises:
            StateDamaged: RocksDB can't open it; `destroy` makes room for a new one.
            DirectoryInUse, StateDirectoryFullError, IncompatibleState: see there.
            StateDirectoryFailedError: not even a new store can be created.
        """
        with self._mutex:
            store = self._stores.get(shard)
            if store is None:
                path = self.shard_path(shard)
                remove_temporaries(path)
                self._look_for_unsynced(path)
                is_new = not (path / "db" / "CURRENT").exists()
                try:
                    (path / "db").mkdir(parents=True, exist_ok=True)
                    store = RocksStore(path / "db", self._options())
                except FclusterError:
                    raise
                except Exception as error:
                    explained = explain_trouble(error, path)
                    if isinstance(explained, StateDirectoryFailedError) and not is_new:
                        # One bad file is enough to cause this. Whether the disk is the cause shows when the
                        # file is replaced.
                        explained = _damaged(path, str(error))
                    raise explained from error
                self._stores[shard] = store
            return store

    def destroy(self, shard: ShardId, *, keep: Path | None = None) -> None:
        """Close and remove the store of `shard`, if there is one.

        Args:
            keep: an entry next to the store that isn't removed with it.

        Raises:
            FclusterError: its directory can't be removed.
        """
        try:
            self.close(shard)
        except FclusterError:
            pass  # what couldn't be written is about to be removed
        path = self.shard_path(shard)
        with self._mutex:
            _remove_store(path)
        remove_temporaries(path, keep)

    def adopt(self, shard: ShardId, files: Path) -> None:
        """Turn the directory `files`, which is next to the shard's `db`, into its store, atomically.

        The shard must have no store (see `destroy`). The files need not be synced: they are synced in the
        background.

        Raises:
            FclusterError: the directory can't be moved.
        """
        path = self.shard_path(shard)
        boot = boot_id()
        note = f"{boot} {uuid.uuid4().hex}".encode()
        try:
            with self._mutex:
                # The note isn't synced either, because that may wait for all copied data. A file system's
                # journal keeps the order of these two operations, and a note that lost its content matches no
                # boot.
                (path / _UNSYNCED).write_bytes(note)
                files.rename(path / "db")
        except OSError as error:
            raise explain_trouble(error, path) from error
        if boot:
            self._syncing.submit(self._sync_later, path, note)
        else:
            self._sync(path, note)

    def close(self, shard: ShardId) -> None:
        """Close the store of `shard`, if it is open. Its files stay."""
        with self._mutex:
            store = self._stores.pop(shard, None)
        if store is not None:
            store.close()

    def close_all(self) -> None:
        """Close all stores and release the directory. May be called twice."""
        for shard in list(self._stores):
            self.close(shard)
        self._closing.set()
        self._syncing.shutdown(wait=True, cancel_futures=True)
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    def _look_for_unsynced(self, path: Path) -> None:
        """Files that were adopted in another boot may have holes, which RocksDB would find only when it reads
        there.
        """
        try:
            note = (path / _UNSYNCED).read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise explain_trouble(error, path) from error
        boot = boot_id().encode()
        if boot and note.startswith(boot):
            self._syncing.submit(self._sync_later, path, note)
            return
        _log.warning("the state in %s wasn't on the disk yet when the host went down: not used", path)
        _remove_store(path)
        remove_temporaries(path)

    def _sync_later(self, path: Path, note: bytes) -> None:
        """Wait until other parts of the same restore no longer need the disk."""
        if not self._closing.wait(SYNC_DELAY_S):
            self._sync(path, note)

    def _sync(self, path: Path, note: bytes) -> None:
        """Sync adopted files, then remove the note, unless it belongs to other files by then."""
        try:
            for entry in os.scandir(path / "db"):
                # A file that is gone was compacted. RocksDB itself syncs what it writes instead.
                with contextlib.suppress(FileNotFoundError):
                    sync(entry.path)
            sync(path / "db")
            with self._mutex:
                if (path / _UNSYNCED).read_bytes() == note:
                    (path / _UNSYNCED).unlink()
                    sync(path)
        except FileNotFoundError:
            pass  # the store was replaced in the meantime
        except OSError as error:
            # Then they are restored again if the host crashes.
            _log.warning("can't sync %s: %s", path, error.strerror or error)

    def _options(self) -> Options:
        blocks = BlockBasedOptions()
        blocks.set_block_cache(self._cache)
        blocks.set_cache_index_and_filter_blocks(True)
        blocks.set_pin_l0_filter_and_index_blocks_in_cache(True)
        blocks.set_bloom_filter(10, False)
        blocks.set_checksum_type(ChecksumType.xxh3())
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_block_based_table_factory(blocks)
        options.set_compression_type(DBCompressionType.lz4())
        options.set_write_buffer_manager(self._buffers)
        options.set_write_buffer_size(self._write_buffer_bytes)
        # Most keys that are asked for aren't in the write buffer. A filter costs less than a search there. In
        # a buffer of entries of 100 bytes, this fraction is 16 bits for each key.
        options.set_memtable_whole_key_filtering(True)
        options.set_memtable_prefix_bloom_ratio(0.02)
        options.set_max_write_buffer_number(2)
        options.set_max_background_jobs(2)
        options.set_max_open_files(128)
        options.set_keep_log_file_num(2)
        options.set_max_log_file_size(_LOG_BYTES)
        options.set_env(self._env)
        options.set_stats_dump_period_sec(0)
        options.set_stats_persist_period_sec(0)
        return options


def remove_temporaries(shard_path: Path, keep: Path | None = None) -> None:
    """Remove what an interrupted snapshot or restore left next to the RocksDB of a shard, except for
    `keep`.
    """
    if not shard_path.is_dir():
        return
    for entry in shard_path.iterdir():
        if entry.name not in ("db", _UNSYNCED) and entry != keep:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _remove_store(shard_path: Path) -> None:
    """Move the RocksDB of a shard, if it has one, to a place where `remove_temporaries` finds it."""
    try:
        # In one step: half of a RocksDB must never look like a whole one.
        (shard_path / "db").rename(shard_path / f"removed-{uuid.uuid4().hex}")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise explain_trouble(error, shard_path) from error
    (shard_path / _UNSYNCED).unlink(missing_ok=True)


def explain_trouble(error: Exception, path: Path) -> FclusterError:
    """The meaning of an error of the operating system or of RocksDB below `path`."""
    text = str(error)
    if "No space left" in text or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    ):
        return StateDirectoryFullError(
            f"the disk of {path} is full", remedy="Free some space, or move state.dir to a larger disk."
        )
    if "lock hold by" in text or "While lock file" in text:
        return _in_use(path)
    if isinstance(error, OSError):
        return StateDirectoryFailedError(
            f"can't use {path}: {error.strerror or error}",
            remedy="Set state.dir to a directory that this user may write, on a disk that works.",
        )
    if any(words in text for words in _DISK_FAILS):
        return StateDirectoryFailedError(
            f"the disk of {path} fails: {text}", remedy="Check it, or move state.dir to another one."
        )
    return _damaged(path, text)


def _damaged(path: Path, text: str) -> StateDamaged:
    return StateDamaged(
        f"RocksDB can't continue in {path}: {text}",
        remedy="Delete that directory and start again: it is rebuilt from snapshot and changelog.",
    )


def _in_use(path: Path) -> DirectoryInUse:
    return DirectoryInUse(
        f"{path} is in use by another process",
        remedy="Stop that process, or set another state.dir for this worker.",
    )
