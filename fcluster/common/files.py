"""Small file operations that survive a power failure, or that don't trust what they find.

Responsible for: names that are safe as file names, files that exist completely or not at all, and files that
are plain files and not links. Must not know what the files are for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

COPY_BYTES = 1024 * 1024
"""How many bytes are copied or hashed at a time. It is large, so that the interpreter runs rarely."""

_NOT_PLAIN = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV})
_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")


class NotPlainFileError(Exception):
    """There is no such file, or it is a link, a directory or a device."""


def checked_name(name: str) -> str:
    """`name`, if it is safe as the name of a file or directory.

    Raises:
        ValueError: it isn't.
    """
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise ValueError(f"{name!r} can't be the name of a directory")
    return name


def boot_id() -> str:
    """An id of the current boot of this host, "" if the system doesn't provide one.

    Data written since then survives the end of the process that wrote it. After another boot, only synced
    data is certain.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def sync(path: Path | str) -> None:
    """Make a file's content, or the names in a directory, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def opened_directory(root: Path, *parts: str, make: bool = False) -> Generator[int]:
    """The descriptor of the directory with the path `parts` below `root`. None of the parts may be a link;
    `root` may.

    Operations through the descriptor happen in that very directory, even if its path has been changed to lead
    elsewhere.

    Args:
        root: has to exist.
        parts: checked names.
        make: create missing directories.

    Raises:
        NotPlainFileError: one of them is a link, or not a directory.
        FileNotFoundError: one is missing, and `make` isn't set.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            inner = _open_part(descriptor, part, make)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _open_part(directory: int, part: str, make: bool) -> int:
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, dir_fd=directory)
    try:
        return os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise NotPlainFileError(f"{part} is a link, or isn't a directory") from error
        raise


def write_whole(directory: int, name: str, content: IO[bytes] | bytes) -> None:
    """Write a file into an opened directory, durably. It gets its name only when it is complete."""
    temporary = f".{name}-{uuid.uuid4().hex}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o666, dir_fd=directory), "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                shutil.copyfileobj(content, file, COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)


def open_plain(directory: int, name: str) -> IO[bytes]:
    """Open a plain file in an opened directory for reading.

    Raises:
        NotPlainFileError: it is missing, or not a plain file.
        OSError: the file can't be inspected. That may be temporary.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno in _NOT_PLAIN:
            raise NotPlainFileError(f"{name} can't be opened: {error.strerror}") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotPlainFileError(f"{name} isn't a plain file")
    return os.fdopen(descriptor, "rb")


def remove_plain(directory: int, name: str) -> bool:
    """Remove a name from an opened directory. Returns whether it existed and could be removed. A directory is
    kept, because it isn't ours.
    """
    try:
        os.unlink(name, dir_fd=directory)
    except (FileNotFoundError, IsADirectoryError):
        return False
    except PermissionError:  # some systems raise this for a directory
        return False
    return True
