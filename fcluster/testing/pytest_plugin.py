"""The fixture `fcluster_driver` for pytest, which finds this module through its entry point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fcluster.api.job import Job
    from fcluster.testing.driver import Driver


@pytest.fixture
def fcluster_driver() -> Iterator[Callable[..., Driver]]:
    """Creates a `fcluster.testing.Driver` for a job, with the same arguments, and closes it after the
    test.
    """
    from fcluster.testing.driver import Driver  # imported here, and not at each start of pytest

    with ExitStack() as drivers:

        def make(job: Job, **options: Any) -> Driver:
            return drivers.enter_context(Driver(job, **options))

        yield make
