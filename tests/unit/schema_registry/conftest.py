from __future__ import annotations

from collections.abc import Iterator

import pytest

from fcluster.schema_registry import registry


@pytest.fixture(autouse=True)
def without_registries() -> Iterator[None]:
    """Each test has a registry of its own, and leaves no connection."""
    yield
    registry.close_registries()
