"""Builds `widen.c`, and provides the environment of processes that run with it.

WIDEN_US=1000 make chaos       all processes of the clusters of `tests/chaos` run with it; `make soak` too

Responsible for: building it once a session, and the environment. Must not be imported by the product.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

SOURCE = Path(__file__).with_name("widen.c")


def has_compiler() -> bool:
    """Whether there is a C compiler on the path."""
    return shutil.which("cc") is not None


@functools.cache
def _build_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fcluster-widen-")  # removed with this process


@functools.cache
def library() -> Path:
    """The library. It is built if this process hasn't built it yet."""
    built = Path(_build_directory().name) / "widen.so"
    subprocess.run(
        ["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", built, SOURCE, "-ldl"],
        check=True,
    )
    return built


def widened(pause_us: int, threads: str = "application") -> dict[str, str]:
    """Variables to add to the environment of a process in which races should become likely.

    Args:
        pause_us: how long a thread sleeps after it has released a write lock, in microseconds.
        threads: which threads do that; see `widen.c`.
    """
    preloaded = [str(library()), *filter(None, [os.environ.get("LD_PRELOAD")])]
    return {"LD_PRELOAD": " ".join(preloaded), "WIDEN_US": str(pause_us), "WIDEN_THREADS": threads}


def asked_for() -> Mapping[str, str]:
    """What this process's own environment asks for: `WIDEN_US`, and perhaps `WIDEN_THREADS`."""
    pause_us = int(os.environ.get("WIDEN_US") or 0)
    return widened(pause_us, os.environ.get("WIDEN_THREADS") or "application") if pause_us else {}
