"""What all tests share: one real broker for the session, unique topic names, Hypothesis profiles, and the
directories of a test's shards and snapshots.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from fcluster.api import job_files
from fcluster.kafka.embedded import EmbeddedKafka
from fcluster.storage.snapshot_store import DirectorySnapshotStore
from fcluster.storage.store import StoreDirectory
from tests.phases import watch_phases

# Examples are as slow as the machine is busy, so a deadline for each of them would fail by chance. In CI the
# same examples run each time, so a failure there comes from the change under test.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, print_blob=True
)
# If a phase changes in a way that no table has, the test in which it happens fails.
watch_phases()

settings.load_profile("ci" if os.environ.get("CI") else "local")

# Brokers of tests live for seconds or minutes, so the cost of Java's second compiler would never pay off.
os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")

_DIRECTORY_MARKERS = {"integration", "simulation", "chaos"}
_TESTS = Path(__file__).parent
_topic_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _TESTS in item.path.parents:
            directory = item.path.relative_to(_TESTS).parts[0]
            if directory in _DIRECTORY_MARKERS:
                item.add_marker(directory)


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Bootstrap servers of a real broker that all tests of the session use. Never stop it.

    FCLUSTER_TEST_BROKERS names running brokers to use instead.
    """
    running = os.environ.get("FCLUSTER_TEST_BROKERS")
    if running:
        yield running
        return
    broker = EmbeddedKafka(tmp_path_factory.mktemp("kafka"))
    try:
        yield broker.start(progress=print)
    finally:
        broker.stop()


@pytest.fixture
def topic_prefix() -> str:
    """A prefix for names of topics, groups and jobs that no other test and no other session uses."""
    return f"t{os.getpid():x}-{os.urandom(2).hex()}-{next(_topic_numbers)}-"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[StoreDirectory]:
    """A worker's stores. They are closed afterwards."""
    directory = StoreDirectory(tmp_path / "state")
    yield directory
    directory.close_all()


@pytest.fixture
def snapshots(tmp_path: Path) -> DirectorySnapshotStore:
    """An empty snapshot store of the job `job`."""
    return DirectorySnapshotStore(tmp_path / "snapshots", "job")


@pytest.fixture
def forgets_jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Job files that the test loads into its own process are forgotten after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    variable = job_files.ENVIRONMENT_VARIABLE
    monkeypatch.setenv(variable, os.environ.get(variable, ""))
    yield
    for name in [name for name in sys.modules if name.startswith(f"{job_files.__name__}.")]:
        del sys.modules[name]
