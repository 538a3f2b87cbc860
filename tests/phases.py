"""Checks each change of a phase against its table (invariant 17), wherever a core runs in a test."""

from __future__ import annotations

from typing import Any

from fcluster.common.transitions import Transitions
from fcluster.coordinator.core import model as coordinator
from fcluster.coordinator.core.cluster import Cluster
from fcluster.worker.core import model as worker
from fcluster.worker.core.state import CoreState

WATCHED: tuple[tuple[type, str, Transitions[Any]], ...] = (
    (Cluster, "phase", coordinator.PHASES),
    (coordinator.Session, "phase", coordinator.SESSION_PHASES),
    (coordinator.Session, "epoch_phase", coordinator.EPOCH_PHASES),
    (coordinator.Shard, "phase", coordinator.SHARD_PHASES),
    (CoreState, "phase", worker.PHASES),
    (worker.OwnedShard, "phase", worker.SHARD_PHASES),
    (worker.InFlight, "phase", worker.EPOCH_PHASES),
)


def watch_phases() -> None:
    """From now on, a change that no table has raises AssertionError where it happens. Calling this again has
    no effect.
    """
    for kind in {kind for kind, _name, _transitions in WATCHED}:
        tables = {name: transitions for watched, name, transitions in WATCHED if watched is kind}
        _watch(kind, tables)


def _watch(kind: type, tables: dict[str, Transitions[Any]]) -> None:
    def checked(self: Any, name: str, value: Any) -> None:
        if name in tables:
            try:
                tables[name].check(getattr(self, name, None), value)
            except AssertionError as error:
                raise AssertionError(f"{kind.__qualname__}.{name}: {error}") from None
        object.__setattr__(self, name, value)

    kind.__setattr__ = checked  # type: ignore[method-assign, assignment]
