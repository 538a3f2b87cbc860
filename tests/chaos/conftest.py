"""Runs for chaos tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from fcluster.kafka.embedded import EmbeddedKafka
from tests.chaos import tally
from tests.chaos.network import BrokerFor, Island, NoIslandError, island
from tests.chaos.runner import Chaos, chaos_run
from tests.chaos.trio import Trio


@pytest.fixture
def chaos(kafka: str, topic_prefix: str, tmp_path: Path) -> Callable[..., AbstractContextManager[Chaos]]:
    """Creates a run on the session's broker: `with chaos("title", workers=3) as run`."""
    return partial(_run, kafka, topic_prefix, tmp_path / "data")


@pytest.fixture
def chaos_unjudged(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> Callable[..., AbstractContextManager[Chaos]]:
    """Creates a run that has to end badly: nothing is judged."""
    return partial(Chaos, kafka, topic_prefix, tmp_path / "data")


def _run(
    brokers: str, name: str, data_dir: Path, title: str, **more: object
) -> AbstractContextManager[Chaos]:
    return chaos_run(brokers, name, data_dir, title, **more)


@pytest.fixture(scope="session")
def island_or_reason() -> Iterator[Island | str]:
    """A network for one worker alone, or why that isn't possible."""
    try:
        with island() as made:
            yield made
    except NoIslandError as error:
        yield str(error)


@pytest.fixture
def place(island_or_reason: Island | str) -> Island:
    """Like `island_or_reason`, but skips the test with the reason where there can be none."""
    if isinstance(island_or_reason, str):
        pytest.skip(f"network cut: not tested, {island_or_reason}")
    return island_or_reason


@pytest.fixture(scope="session")
def stoppable_kafka(
    island_or_reason: Island | str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BrokerFor]:
    """A broker that chaos tests may stop and kill, reachable from the island. `servers` brings it back."""
    place = island_or_reason if isinstance(island_or_reason, Island) else None
    with BrokerFor(tmp_path_factory.mktemp("stoppable_kafka"), place) as broker:
        yield broker


@pytest.fixture
def stoppable_broker(stoppable_kafka: BrokerFor) -> EmbeddedKafka:
    """The broker of `stoppable_kafka`."""
    return stoppable_kafka.broker


@pytest.fixture
def chaos_on_stoppable_broker(
    stoppable_kafka: BrokerFor, topic_prefix: str, tmp_path: Path
) -> Callable[..., AbstractContextManager[Chaos]]:
    """Like `chaos`, on the broker of `stoppable_kafka`."""
    return partial(_run, stoppable_kafka.servers, topic_prefix, tmp_path / "data")


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """Three brokers that tests may disturb, one at a time. `servers` brings back those that are down."""
    with Trio(tmp_path_factory.mktemp("trio")) as made:
        yield made


@pytest.fixture
def chaos_on_trio(
    trio: Trio, topic_prefix: str, tmp_path: Path
) -> Callable[..., AbstractContextManager[Chaos]]:
    """Like `chaos`, on the brokers of `trio`."""
    return partial(_run, trio.servers, topic_prefix, tmp_path / "data", kafka_dir=trio.cluster.data_dir)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print which faults were injected, and how often."""
    if tally.SESSION:
        terminalreporter.section("faults injected")
        terminalreporter.write_line(tally.table(tally.SESSION))
