"""Counts for each key, of which the second version of the job keeps more. It says how often it migrated."""

from __future__ import annotations

import os
from typing import Any

from fcluster import Context, DocumentState, Job, MapState, ValueState

NAMES = [os.environ[f"FCLUSTER_TEST_{name}"] for name in ("JOB", "SOURCE", "OUTPUT")]
VERSION = int(os.environ["FCLUSTER_TEST_VERSION"])


def with_migrations(former: Any) -> dict[str, Any]:
    """A count, and how often it was migrated."""
    return {"n": former, "migrations": 1}


def document(former: dict[str, Any]) -> dict[str, Any]:
    """The same of `ctx.state`."""
    return {**former, "migrations": former.get("migrations", 0) + 1}


COUNT: ValueState[Any] = ValueState("count", "int")
SEEN: MapState[str, Any] = MapState("seen", value="int")
STATES: list[Any] = [COUNT, SEEN]
if VERSION == 2:
    COUNT = ValueState("count", version=2, migrate={1: ("int", with_migrations)})
    SEEN = MapState("seen", version=2, migrate={1: ("int", with_migrations)})
    STATES = [COUNT, SEEN, DocumentState(version=2, migrate={1: document})]

job = Job(NAMES[0])
numbers = job.topic(NAMES[1])
counts = job.topic(NAMES[2])


@job.process(numbers, to=counts, states=STATES)
def count(ctx: Context[str], number: int) -> dict[str, Any]:
    """Count the key in all of its states, in the shape of this version."""
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    seen, part = ctx.map(SEEN), str(number % 3)
    if VERSION == 1:
        ctx.value(COUNT).set(ctx.value(COUNT).get(0) + 1)
        seen[part] = seen.get(part, 0) + 1
        return {"n": ctx.state["n"]}
    total = ctx.value(COUNT).get({"n": 0, "migrations": 0})
    ctx.value(COUNT).set({**total, "n": total["n"] + 1})
    entry = seen.get(part, {"n": 0, "migrations": 0})
    seen[part] = {**entry, "n": entry["n"] + 1}
    return {"n": ctx.state["n"], "document": ctx.state, "value": ctx.value(COUNT).get(), "map": dict(seen)}
