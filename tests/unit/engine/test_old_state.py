"""A job continues from state that older versions wrote. Samples of it are in tests/data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fcluster import Job
from fcluster.common.ids import ShardId
from fcluster.common.positions import decode_position
from fcluster.common.settings import Settings
from fcluster.engine.changelog import DeltaReader
from fcluster.engine.state import ShardState, StoreMeta
from fcluster.graph.compatibility import incompatibility
from fcluster.graph.topology import Topology
from fcluster.storage.store import RocksStore, StoreDirectory
from fcluster.worker.processing import OutputPort, ShardRunner
from tests.data.state_format_1.make import job
from tests.state_memory import EntriesMax

FORMAT_1 = Path(__file__).parents[2] / "data" / "state_format_1"
CITY_TOTALS = {"Zürich": 1.500000001 + 5.5, "Łódź": 2.25 + 3.0 + 11.0 + 0.1, "東京": 7.0}


class Message:
    """A record as a consumer returns it."""

    def __init__(self, offset: int, key: str, value: Any) -> None:
        self._offset, self._key, self._value = offset, key.encode(), json.dumps(value).encode()

    def key(self) -> bytes:
        return self._key

    def value(self) -> bytes:
        return self._value

    def offset(self) -> int:
        return self._offset

    def timestamp(self) -> tuple[int, int]:
        return (1, 1_700_000_000_000)

    def headers(self) -> None:
        return None

    def topic(self) -> str:
        return "orders"

    def partition(self) -> int:
        return 0


@pytest.fixture
def topology() -> Topology:
    return job.build(Settings())


def restored(directory: StoreDirectory, stage: str) -> tuple[RocksStore, Mapping[str, Any]]:
    """The stored state of the stage's shard 0: its snapshot, and the deltas after it."""
    kept = json.loads((FORMAT_1 / f"{stage}.json").read_text())
    shard = ShardId(stage, 0)
    path = directory.shard_path(shard)
    path.mkdir(parents=True)
    shutil.copytree(FORMAT_1 / f"{stage}-db", path / "db")
    store = directory.open(shard)
    assert store.meta() == StoreMeta(**kept["snapshot"])
    reader = DeltaReader(stage, store.meta().state_epoch)
    for offset, record in kept["changelog"]:
        if offset >= store.meta().changelog_offset:
            delta = reader.feed(offset, bytes.fromhex(record))
            assert delta is not None
            store.apply(delta.changes, StoreMeta(delta.epoch, offset + 2))
    reader.finish()
    return store, kept


def test_format_1_fits_the_same_job() -> None:
    former = json.loads((FORMAT_1 / "description.json").read_text())
    assert former["format"] == 1
    assert incompatibility(former, job.build(Settings())) is None


def test_format_1_with_another_handler_is_refused() -> None:
    former = json.loads((FORMAT_1 / "description.json").read_text())
    other = Job("shop")
    other.process(other.topic("orders"), name="clients")(lambda ctx, value: None)
    reason = incompatibility(former, other.build(Settings()))
    assert reason is not None
    assert "The handler 'customers' of stage 'orders' has state" in reason


@pytest.mark.parametrize("stage", ["orders", "by_city"])
def test_job_continues_from_state_of_format_1_without_loss(
    topology: Topology, tmp_path: Path, stage: str, run: Callable[..., list[Any]]
) -> None:
    directory = StoreDirectory(tmp_path / "state")
    store, kept = restored(directory, stage)
    position = decode_position(kept["offset"], kept["metadata"])
    assert store.meta().state_epoch == position.state_epoch
    state = ShardState(store, topology.stage(stage).stores, EntriesMax(100))
    table = state.tables["customers" if stage == "orders" else "by_city"]
    if stage == "orders":
        assert table.peek(b"ann") == {
            "orders": 4,
            "last": [{"sku": "c", "price": 1e-9}, {"sku": "f", "price": 11.0}, {"sku": "g", "price": 0.1}],
            "big": 2**70 + 4,
        }
        assert table.peek(b"gone") == {}
        assert table.peek(b"cy\0d")["big"] == 2**70 + 1
    else:
        assert {city: table.peek(city.encode())["total"] for city in CITY_TOTALS} == pytest.approx(
            CITY_TOTALS
        )
    outputs = run(topology.stage(stage), state, position)
    if stage == "orders":
        assert outputs == [{"customer": "ann", "orders": 5}, {"customer": "gone", "orders": 1}]
    else:
        assert outputs == [
            {"city": "Łódź", "total": pytest.approx(CITY_TOTALS["Łódź"] + 1.0)},
            {"city": "Bern", "total": 2.0},
        ]
    delta = state.freeze(5)
    assert delta is not None
    assert (delta.previous_epoch, len(delta.changes)) == (4, 2)
    state.commit(5, 99, 0.0)
    state.flush()
    directory.close_all()


@pytest.fixture
def run() -> Callable[..., list[Any]]:
    def process(stage: Any, state: ShardState, position: Any) -> list[Any]:
        port, outputs = OutputPort(), []
        port.produce = lambda topic, value, *_rest: (
            outputs.append(json.loads(value)) if topic == "totals" else None
        )
        runner = ShardRunner(stage, 0, state, position, port).inputs[0]
        keys = ("ann", "gone") if stage.name == "orders" else ("Łódź", "Bern")
        for number, key in enumerate(keys):
            price = float(number + 1)
            order = {"sku": "z", "price": price, "city": key}
            runner.handle(Message(position.offset + number, key, order))
        return outputs

    return process
