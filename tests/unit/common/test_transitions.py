"""Changes of phases are checked against the tables next to their enums (invariant 17)."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

import pytest

import fcluster
from fcluster.common.ids import ShardId
from fcluster.common.transitions import Transitions
from fcluster.coordinator.core import model as coordinator
from fcluster.worker.core import model as worker
from tests.phases import WATCHED


class Light(Enum):
    GREEN = 1
    YELLOW = 2
    RED = 3


LIGHT = Transitions(
    [Light.RED], {Light.GREEN: [Light.YELLOW], Light.YELLOW: [Light.RED], Light.RED: [Light.GREEN]}
)


def test_changes_in_the_table_and_no_change_are_accepted() -> None:
    LIGHT.check(None, Light.RED)
    LIGHT.check(Light.RED, Light.GREEN)
    LIGHT.check(Light.GREEN, Light.GREEN)


@pytest.mark.parametrize(("before", "after"), [(None, Light.GREEN), (Light.GREEN, Light.RED)])
def test_change_that_is_not_in_the_table_is_named(before: Light | None, after: Light) -> None:
    with pytest.raises(AssertionError, match=str(after)):
        LIGHT.check(before, after)


@pytest.mark.parametrize(
    "following",
    [
        {Light.RED: [Light.GREEN], Light.GREEN: [Light.YELLOW]},
        {Light.RED: [Light.GREEN], Light.GREEN: [Light.RED], Light.YELLOW: [Light.RED]},
    ],
)
def test_table_without_a_row_or_with_an_unreachable_phase_is_refused(
    following: dict[Light, list[Light]],
) -> None:
    with pytest.raises(ValueError, match="isn't complete"):
        Transitions([Light.RED], following)


def test_illegal_change_in_a_core_is_caught_where_it_happens() -> None:
    shard = coordinator.Shard(ShardId("stage", 0))
    with pytest.raises(AssertionError, match=r"Shard\.phase: ShardPhase\.RUNNING follows ShardPhase\.FREE"):
        shard.phase = coordinator.ShardPhase.RUNNING
    assert shard.phase is coordinator.ShardPhase.FREE
    with pytest.raises(AssertionError, match=r"OwnedShard\.phase: begins as ShardPhase\.RUNNING"):
        worker.OwnedShard(worker.ShardPhase.RUNNING)


def test_every_enum_of_phases_has_a_table_that_is_watched() -> None:
    folder = Path(fcluster.__file__).parent
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        found |= {
            f"{path.parts[-3]}.{name}" for name in re.findall(r"^class (\w*Phase)\(", path.read_text(), re.M)
        }
    watched: set[str] = set()
    for _kind, _name, transitions in WATCHED:
        enum = type(next(iter(transitions.first)))
        watched.add(f"{enum.__module__.split('.')[1]}.{enum.__name__}")
    assert found == watched
