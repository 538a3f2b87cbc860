"""The simulation can fail: each planted bug is caught, by the seed in the table or by one nearby."""

from __future__ import annotations

from itertools import chain

import pytest

from tests.simulation.mutations import MUTATIONS, Mutation
from tests.simulation.run import run

SEARCHED_SEEDS = 1500
"""When a core changes, other things happen in the same seed. So many others are tried then."""


def names(mutation: Mutation) -> str:
    return mutation.name


def catches(seed: int, mutation: Mutation) -> bool:
    """Whether the seed finds the planted bug, and finds nothing without it (or with only a part of it)."""
    if mutation.finding not in run(seed, mutation=mutation).failure:
        return False
    return not run(seed).failure and not any(run(seed, mutation=part).failure for part in mutation.parts)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=names)
def test_planted_bug_is_caught(mutation: Mutation) -> None:
    assert mutation.finding, "which finding proves it?"
    for seed in chain((mutation.seed,), range(SEARCHED_SEEDS)):
        if catches(seed, mutation):
            if seed != mutation.seed:
                print(f"{mutation.name}: seed {mutation.seed} doesn't catch it any more, but {seed} does")
            return
    pytest.fail(
        f"no seed below {SEARCHED_SEEDS} catches it; look further with "
        f'python -m tests.simulation --find "{mutation.name}" --seed {SEARCHED_SEEDS}'
    )
