"""The engine's guard: it measures the real engine, and judges the figures correctly."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import engine
from benchmarks.engine import CASES, Case, Epochs, Measured, Reference, find_worse, make_messages
from fcluster.common.ids import ShardId
from fcluster.storage.store import StoreDirectory

SMALL = Case("small", records=60, keys=20, known=10, cache_entries_max=5)


def test_each_case_has_a_recorded_ratio() -> None:
    assert engine.recorded().keys() == {case.name for case in CASES}


def test_engine_and_reference_write_the_same_totals(tmp_path: Path) -> None:
    known = make_messages(SMALL, range(0, 2 * SMALL.known, 2))
    messages = make_messages(SMALL, range(SMALL.records))
    stores = StoreDirectory(tmp_path / "engine")
    reference = Reference(tmp_path / "reference", SMALL.cache_entries_max)
    try:
        epochs = Epochs(engine.totals_job(), stores, SMALL.cache_entries_max, epoch_records=25)
        for records in (known, messages):
            epochs.run(records)
            reference.run(records)
        (shard,) = stores_of(stores)
        assert shard == dict(reference.items())
        assert len(shard) == SMALL.keys
    finally:
        reference.close()
        stores.close_all()


def stores_of(stores: StoreDirectory) -> list[dict[bytes, bytes]]:
    opened = stores.opened(ShardId("totals", 0)) or stores.opened(ShardId("in", 0))
    assert opened is not None
    return [{key[4:]: value for key, value in opened.items()}]


def test_known_keys_are_half_of_the_many() -> None:
    many = next(case for case in CASES if case.name == "many keys")
    keys = [many.key(number) for number in range(many.records)]
    known = {many.key(number) for number in range(0, 2 * many.known, 2)}
    assert len(set(keys)) == many.records
    assert sum(key in known for key in keys) == many.records // 2


@pytest.mark.parametrize(("engine_us", "says"), [(6.2, ""), (6.3, "26% slower")])
def test_25_percent_worse_than_recorded_is_too_much(engine_us: float, says: str) -> None:
    worse = find_worse({"few keys": Measured(engine_us, 2.0)}, {"few keys": 2.5})
    if not says:
        assert not worse
    else:
        assert says in worse["few keys"]
        assert "docs/performance.md" in worse["few keys"]


def test_rounds_continue_while_a_case_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy at first: the best round counts."""
    rounds: list[int] = []

    def measured(cases, rounds_max: int):
        for number in range(rounds_max):
            rounds.append(number)
            yield {"few keys": Measured(9.0 if number < 4 else 2.0, 1.0), "many keys": Measured(1.0, 1.0)}

    monkeypatch.setattr(engine, "measure", measured)
    monkeypatch.setattr(engine, "recorded", lambda: {"few keys": 2.0, "many keys": 1.0})
    assert not engine.judge(rounds_min=2, rounds_max=10)
    assert len(rounds) == 5
    rounds.clear()
    assert list(engine.judge(rounds_min=2, rounds_max=3)) == ["few keys"]
    assert len(rounds) == 3
