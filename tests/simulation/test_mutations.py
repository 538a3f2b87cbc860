"""The simulation catches each planted bug, with the seed that the table names for it."""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS, Mutation
from tests.simulation.run import catches


def names(mutation: Mutation) -> str:
    return mutation.name


@pytest.mark.parametrize("mutation", MUTATIONS, ids=names)
def test_planted_bug_is_caught(mutation: Mutation) -> None:
    assert mutation.finding, "say which finding proves it"
    assert catches(mutation.seed, mutation), (
        f"seed {mutation.seed} doesn't catch it. When a core changes, other things happen in the same seed: "
        f'find another one with python -m tests.simulation --find "{mutation.name}", and put it in the table'
    )
