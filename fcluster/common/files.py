"""Small steps with files that must outlive a power failure or can't be trusted.

Responsible for: names that are safe as file names, files that are there whole or not at all, and files that
are plain files and no links. Must not know what the files are for.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import uuid
from pathlib import Path
from typing import IO

COPY_BYTES = 1024 * 1024
"""Copied or hashed at a time: large enough that the interpreter is rarely needed."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")


class NotPlainFileError(Exception):
    """There is no such file, or it is a link, a directory or a device."""


def checked_name(name: str) -> str:
    """`name`, which is safe as the name of a file or directory.

    Raises:
        ValueError: it isn't.
    """
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise ValueError(f"{name!r} can't be the name of a directory")
    return name


def boot_id() -> str:
    """Names the present boot of this host, "" if the system doesn't.

    What was written since is there whatever becomes of the process that wrote it; after another boot only what was
    synced is.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def sync_directory(path: Path) -> None:
    """Make the names in `path` outlive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: IO[bytes] | bytes) -> None:
    """Write a file durably; it has its name only when all of it is there."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                shutil.copyfileobj(content, file, COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def open_plain(path: Path) -> IO[bytes]:
    """Open a plain file to read it.

    Raises:
        NotPlainFileError: it is missing, or something else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NotPlainFileError(f"{path.name} can't be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotPlainFileError(f"{path.name} is no plain file")
    return os.fdopen(descriptor, "rb")
