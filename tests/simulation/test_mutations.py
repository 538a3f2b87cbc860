"""The simulation can fail: each planted bug is caught by the seed in the table, and that seed is fine without
it."""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS, Mutation
from tests.simulation.run import run


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_planted_bug_is_caught(mutation: Mutation) -> None:
    assert run(mutation.seed).failure == ""
    assert mutation.finding in run(mutation.seed, mutation=mutation).failure
    assert mutation.finding, "which finding proves it?"


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.parts], ids=lambda mutation: mutation.name)
def test_bug_that_needs_two_rules_broken_is_not_caught_by_one(mutation: Mutation) -> None:
    for part in mutation.parts:
        assert mutation.finding not in run(mutation.seed, mutation=part).failure
