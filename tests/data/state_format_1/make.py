"""Made the state that lies beside it, with the code of the commit before it was added: don't run it again.

What newer versions must be able to go on from (tests/unit/engine/test_old_state.py): the journal's
description of the job, and for each stage the shard 0: committed metadata, changelog records, and the RocksDB
files of a snapshot that is two epochs behind.

    python tests/data/state_format_1/make.py DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fcluster import Job
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings
from fcluster.engine.changelog import encode_delta
from fcluster.engine.state import FlushLimits, ShardState
from fcluster.storage.store import StoreDirectory
from tests.state_memory import EntriesMax

job = Job("shop")
orders = job.topic("orders")
totals = job.topic("totals")


@job.process(orders, to=totals)
def customers(ctx: Any, order: Any) -> Any:
    """Counts orders, and keeps the last ones."""
    if order is None:
        ctx.state.clear()
        return None
    state = ctx.state
    state["orders"] = state.get("orders", 0) + 1
    state.setdefault("last", []).append({"sku": order["sku"], "price": order["price"]})
    del state["last"][:-3]
    state["big"] = state.get("big", 2**70) + 1
    return {"customer": ctx.key, "orders": state["orders"]}


def by_city(ctx: Any, order: Any) -> Any:
    """Sums up prices."""
    ctx.state["total"] = ctx.state.get("total", 0.0) + order["price"]
    return {"city": ctx.key, "total": ctx.state["total"]}


job.stream(orders).filter(bool).key_by("city").process(by_city, to=totals)

EPOCHS = [
    [("ann", "Zürich", "a", 1.5), ("bob", "Łódź", "b", 2.25), ("ann", "Zürich", "c", 1e-9)],
    [("cy\u0000d", "東京", "d", 7.0), ("gone", "Łódź", "e", 3.0)],
    [("ann", "Łódź", "f", 11.0), ("ann", "Łódź", "g", 0.1)],
    [("gone", None, None, None), ("bob", "Zürich", "h", 5.5)],
]


def main() -> None:
    """Write it below the directory that the command line names."""
    root = Path(sys.argv[1])
    topology = job.build(Settings())
    (root / "description.json").write_text(json.dumps(topology.describe(), indent=1))
    directory = StoreDirectory(root / "work")
    for stage in topology.stages:
        store = directory.open(ShardId(stage.name, 0))
        state = ShardState(store, stage.stores, EntriesMax(100), FlushLimits(entries_max=1))
        table = state.tables[stage.stores[0]]
        deltas: list[tuple[int, str]] = []
        offset, source_offset = 0, 0
        handler: Any = {"customers": customers, "by_city": by_city}[stage.stores[0]]
        for epoch, records in enumerate(EPOCHS, start=1):
            for customer, city, sku, price in records:
                source_offset += 1
                key = (customer if table.name == "customers" else city or "").encode()
                order = None if price is None else {"sku": sku, "price": price, "city": city}
                if order is not None or table.name == "customers":
                    handler(_Context(table, key), order)
            delta = state.freeze(epoch)
            assert delta is not None
            for record in encode_delta(delta):
                deltas.append((offset, record.hex()))
                offset += 1
            offset += 1  # the transaction's marker
            state.commit(epoch, offset, 0.0)
            if epoch == 2:
                store.checkpoint(root / f"{stage.name}-db")
                snapshot = store.meta()._asdict()
        position = CommittedPosition(source_offset, 4, 4, topology.fingerprint, "AAAAAAAAAAAAAAAAAAAAAA")
        found = {
            "stage": stage.name,
            "offset": source_offset,
            "metadata": position.encode_metadata(),
            "changelog": deltas,
            "snapshot": snapshot,
        }
        (root / f"{stage.name}.json").write_text(json.dumps(found, indent=1))
    directory.close_all()


class _Context:
    def __init__(self, table: Any, key: bytes) -> None:
        self.key = key.decode()
        self.state = table.get(key)


if __name__ == "__main__":
    main()
