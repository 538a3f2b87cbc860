"""Runs for chaos tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from tests.chaos.runner import Chaos, chaos_run


@pytest.fixture
def chaos(kafka: str, topic_prefix: str, tmp_path: Path) -> Callable[..., AbstractContextManager[Chaos]]:
    """Makes a run on the session's broker: `with chaos("title", workers=3) as run`."""
    return partial(_run, kafka, topic_prefix, tmp_path / "data")


def _run(
    brokers: str, name: str, data_dir: Path, title: str, **more: object
) -> AbstractContextManager[Chaos]:
    return chaos_run(brokers, name, data_dir, title, **more)
