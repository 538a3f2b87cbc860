"""Runs for chaos tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from fcluster.common.embedded_kafka import EmbeddedKafka
from tests.chaos.runner import Chaos, chaos_run


@pytest.fixture
def chaos(kafka: str, topic_prefix: str, tmp_path: Path) -> Callable[..., AbstractContextManager[Chaos]]:
    """Makes a run on the session's broker: `with chaos("title", workers=3) as run`."""
    return partial(_run, kafka, topic_prefix, tmp_path / "data")


@pytest.fixture
def chaos_unjudged(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> Callable[..., AbstractContextManager[Chaos]]:
    """Makes a run that has to end badly: nothing is judged."""
    return partial(Chaos, kafka, topic_prefix, tmp_path / "data")


def _run(
    brokers: str, name: str, data_dir: Path, title: str, **more: object
) -> AbstractContextManager[Chaos]:
    return chaos_run(brokers, name, data_dir, title, **more)


@pytest.fixture(scope="session")
def mortal_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedKafka]:
    """A broker that chaos tests may stop and kill. It runs again when they give it back."""
    broker = EmbeddedKafka(tmp_path_factory.mktemp("mortal"))
    try:
        broker.start(progress=print)
        yield broker
    finally:
        broker.stop()


@pytest.fixture
def chaos_on_mortal_broker(
    mortal_broker: EmbeddedKafka, topic_prefix: str, tmp_path: Path
) -> Callable[..., AbstractContextManager[Chaos]]:
    """As `chaos`, on `mortal_broker`."""
    return partial(_run, mortal_broker.start(), topic_prefix, tmp_path / "data")
