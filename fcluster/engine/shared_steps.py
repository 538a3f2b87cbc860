"""Steps with which several chains of an input begin: those in front of a branch, or of a stream that is used
in several places.

They run once for each of these chains, with the same value, so they fail in each of them. That is one
failure. `SharedSteps` knows whether another chain has handled it. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from fcluster.engine.operators import operator_for
from fcluster.engine.records import SourceRecord
from fcluster.engine.steps import Place
from fcluster.graph.stages import Chain


class SharedSteps:
    """The shared steps of the chains of one input, and which of them a record has failed in.

    A step is shared if it and all steps in front of it are the same objects in several chains. An equal step
    of another stream isn't the same.
    """

    def __init__(self, chains: Sequence[Chain]) -> None:
        named: dict[tuple[int, ...], list[str]] = {}
        for chain in chains:
            path: tuple[int, ...] = ()
            for number, node in enumerate(chain.operators, start=1):
                path = (*path, id(node))
                named.setdefault(path, []).append(operator_for(node, number, chain.name).place.name)
        self._names = {name: names for names in named.values() if len(names) > 1 for name in names}
        self._handled: dict[str, tuple[SourceRecord, str]] = {}

    def names(self, step: str) -> Sequence[str]:
        """The names that a step has in the chains that share it; only its own if it isn't shared."""
        return self._names.get(step, (step,))

    def is_handled(self, place: Place, record: SourceRecord) -> bool:
        """Whether another chain has handled that `record` failed at `place`. If none has, the caller does."""
        names = self._names.get(place.name)
        if names is None:
            return False
        found = self._handled.get(names[0])
        if found is not None and found[0] is record and found[1] != place.name:
            return True
        self._handled[names[0]] = record, place.name
        return False
