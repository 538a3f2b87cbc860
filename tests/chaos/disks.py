"""Small disks that tests create and remove. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FILLER = "filler"


@contextmanager
def small_disk(path: Path, size_kb: int) -> Iterator[Path]:
    """A file system of that size at `path`. Where none can be mounted, the test is skipped, with the
    reason.
    """
    if os.geteuid() != 0:
        pytest.skip("disk full: not tested, small file systems need root")
    path.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(path)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"disk full: not tested, no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        # Unmounted lazily, so that files that are still open in it don't prevent that.
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> None:
    """Fill the disk at `path` to the last byte."""
    with (path / FILLER).open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    assert shutil.disk_usage(path).free < 4096


def is_full(path: Path) -> bool:
    """Whether `fill` has filled the disk at `path`, and nobody has made room."""
    return (path / FILLER).exists()


def make_room(path: Path) -> None:
    """Undo `fill`."""
    (path / FILLER).unlink()
