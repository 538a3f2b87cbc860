"""What the engine takes for a record, without Kafka: the real runner, state layers and RocksDB.

    python -m benchmarks.engine [--rounds 9] [--record] [--guard]

A job counts and sums for each key; its outputs go nowhere. Each epoch is frozen, its delta encoded, and its
changes are written to RocksDB, as a worker does it. Beside it, in turns, a reference loop does the least that
this task asks for with the same libraries: `orjson.loads`, a dict, `orjson.dumps`, one read of RocksDB for
each new key, one write batch for each epoch.

- *few keys*: 1,000 keys that stay in memory.
- *many keys*: no key comes twice; half of them are in RocksDB from before, half are new.

What counts is the engine's processor time divided by the loop's, each the best of all rounds. Both run in
this one process: a slow or busy machine slows both, and the best rounds are those that were disturbed least.
The ratios that are recorded in `engine_ratios.json` guard against changes that make the engine slower
(`tests/integration/test_engine_guard.py`); `--record` writes them anew.

The module uses nothing else of `benchmarks`, so that the suite can run it with another source tree.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from confluent_kafka import Message
from rocksdict import Options, Rdict, WriteBatch

from fcluster import Job
from fcluster.common import garbage
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings
from fcluster.engine.changelog import encode_delta
from fcluster.engine.state import ShardState
from fcluster.storage.store import StoreDirectory
from fcluster.worker.processing import OutputPort, ShardRunner

RATIOS_FILE = Path(__file__).with_name("engine_ratios.json")
EPOCH_RECORDS = 5_000
ENTRY_BYTES = 500
"""What a small dict takes in memory."""
WORSE_MAX = 1.25
"""The guard fails above the recorded ratio times this."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        records: in one round.
        keys: that the records have, in turns.
        known: so many of the keys are in RocksDB, and not in memory, before the round.
        cache_entries_max: about so many of them may stay in memory.
    """

    name: str
    records: int
    keys: int
    known: int
    cache_entries_max: int

    def key(self, number: int) -> bytes:
        """Of the record of this number: keys known and unknown alternate."""
        return b"k%d" % (number * 7919 % self.keys)


CASES = (
    Case("few keys", 20_000, 1_000, 0, 200_000),
    Case("many keys", 20_000, 20_000, 10_000, 1_000),
)


def make_messages(case: Case, numbers: Sequence[int]) -> list[Message]:
    """Records of the source topic, as a consumer returns them."""
    return [
        Message(
            topic="in",
            partition=0,
            offset=offset,
            key=(key := case.key(number)),
            value=orjson.dumps({"id": number, "key": key.decode(), "value": number % 1000, "at": 0}),
            timestamp=(1, 1_700_000_000_000 + offset),
        )
        for offset, number in enumerate(numbers)
    ]


def _room_for(entries: int) -> Any:
    """What bounds the entries in memory: bytes, or in older source trees their number."""
    try:
        from fcluster.engine.memory import StateMemory
    except ImportError:
        return entries
    return StateMemory(entries * ENTRY_BYTES)


class Epochs:
    """A running shard of a job, fed record by record, with a barrier every `epoch_records` records.

    Args:
        job: its first stage is run.
        stores: where its state is.
        cache_entries_max: see `Case`.

    Attributes:
        shard: the shard.
    """

    def __init__(
        self,
        job: Job,
        stores: StoreDirectory,
        cache_entries_max: int = 200_000,
        epoch_records: int = EPOCH_RECORDS,
    ) -> None:
        stage = job.build(Settings()).stages[0]
        store = stores.open(ShardId(stage.name, 0))
        self._state = ShardState(store, stage.all_stores, _room_for(cache_entries_max))
        port = OutputPort()
        port.produce = _discard
        self.shard = ShardRunner(stage, 0, self._state, CommittedPosition(0, 0, 0, ""), port)
        self._epoch = 0
        self._epoch_records = epoch_records

    def run(self, messages: Sequence[Any]) -> None:
        """Process the records, and commit."""
        runner = self.shard.inputs[0]
        for begin in range(0, len(messages), self._epoch_records):
            for message in messages[begin : begin + self._epoch_records]:
                runner.handle(message)
                runner.last = message
            self.commit()
        self._state.flush()

    def commit(self, now_ms: float | None = None, note: Callable[[str], None] = lambda _phase: None) -> None:
        """Commit the open epoch.

        Args:
            now_ms: the time. By default an epoch comes each second, so each is written to the store at once.
            note: called after each phase with its name.
        """
        self._epoch += 1
        delta = self.shard.freeze(self._epoch, "")
        note("freeze")
        if delta is not None:
            written = len(encode_delta(delta))
            note("encode")
            now_ms = self._epoch * 1_000.0 if now_ms is None else now_ms
            self._state.commit(self._epoch, self._epoch * written, now_ms)
            note("apply")


def _discard(*_arguments: Any, **_named: Any) -> None:
    """A producer that keeps nothing."""


def totals_job() -> Job:
    """Running count and sum for each key."""
    job = Job("engine")

    @job.process(job.topic("in", value="json"), to=job.topic("out", value="json"))
    def totals(ctx: Any, record: Any) -> Any:
        state = ctx.state
        state["count"] = state.get("count", 0) + 1
        state["sum"] = state.get("sum", 0) + record["value"]
        return {
            "id": record["id"],
            "key": record["key"],
            "count": state["count"],
            "sum": state["sum"],
            "at": record["at"],
        }

    return job


class Reference:
    """The least that the task asks for, with the same libraries."""

    def __init__(self, directory: Path, cache_entries_max: int) -> None:
        self._cache_entries_max = cache_entries_max
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        self._db = Rdict(str(directory), options)
        self._state: dict[bytes, dict[str, int]] = {}

    def run(self, messages: Sequence[Any]) -> None:
        """Process the records, and write each epoch to RocksDB."""
        db_get, loads, dumps, produce = self._db.get, orjson.loads, orjson.dumps, _discard
        for begin in range(0, len(messages), EPOCH_RECORDS):
            state, touched = self._state, set[bytes]()
            for message in messages[begin : begin + EPOCH_RECORDS]:
                key, record = message.key(), loads(message.value())
                found = state.get(key)
                if found is None:
                    stored: Any = db_get(key)
                    found = state[key] = loads(stored) if stored else {"count": 0, "sum": 0}
                found["count"] += 1
                found["sum"] += record["value"]
                touched.add(key)
                output = dumps(
                    {
                        "id": record["id"],
                        "key": record["key"],
                        "count": found["count"],
                        "sum": found["sum"],
                        "at": record["at"],
                    }
                )
                produce("out", output, key, message.timestamp())
            batch = WriteBatch(raw_mode=True)
            for key in touched:
                batch.put(key, dumps(state[key]))
            self._db.write(batch)
            if len(state) > self._cache_entries_max:
                state.clear()

    def items(self) -> Iterable[tuple[bytes, bytes]]:
        """What its RocksDB holds."""
        pairs: Any = self._db.items()
        return pairs

    def close(self) -> None:
        """Close its RocksDB."""
        self._db.close()


# --- measuring ----------------------------------------------------------------------------------------


Run = Callable[[Sequence[Message]], None]
Prepare = Callable[[Case, Sequence[Message], Path], AbstractContextManager[Run]]


@contextmanager
def prepared_engine(case: Case, known: Sequence[Message], directory: Path) -> Iterator[Run]:
    """The engine with what it knows before a round."""
    stores = StoreDirectory(directory / "engine")
    try:
        epochs = Epochs(totals_job(), stores, case.cache_entries_max)
        epochs.run(known)
        yield epochs.run
    finally:
        stores.close_all()


@contextmanager
def prepared_reference(case: Case, known: Sequence[Message], directory: Path) -> Iterator[Run]:
    """The reference loop, the same."""
    reference = Reference(directory / "reference", case.cache_entries_max)
    try:
        reference.run(known)
        yield reference.run
    finally:
        reference.close()


def cpu_s_of(
    prepare: Prepare, case: Case, known: Sequence[Message], messages: Sequence[Message], times: float
) -> float:
    """Seconds of processor time for these records, with the known keys in RocksDB.

    Args:
        times: spend so many times of it: a planted slowdown if it is more than 1.
    """
    directory = Path(tempfile.mkdtemp(prefix="fcluster-engine-"))
    try:
        with prepare(case, known, directory) as run:
            gc.collect()
            began_s = time.process_time()
            run(messages)
            end_s = began_s + times * (time.process_time() - began_s)
            while (now_s := time.process_time()) < end_s:
                pass
            return now_s - began_s
    finally:
        shutil.rmtree(directory)


@dataclass
class Measured:
    """The best of all rounds of a case, in microseconds of processor time for a record.

    Attributes:
        planted_us: of the engine with a planted slowdown, if one was asked for.
    """

    engine_us: float = float("inf")
    reference_us: float = float("inf")
    planted_us: float = float("inf")

    @property
    def ratio(self) -> float:
        """The engine's by the loop's."""
        return self.engine_us / self.reference_us


def measure(cases: Sequence[Case], rounds: int, slower: float = 0.0) -> Iterator[dict[str, Measured]]:
    """After each round, the best of all rounds until then, by the name of the case.

    Args:
        slower: measure besides an engine that takes so many times as long. 0: don't.
    """
    garbage.settle()  # as in a worker
    # Known are the keys of every other record.
    inputs = {
        case.name: (
            make_messages(case, range(0, 2 * case.known, 2)),
            make_messages(case, range(case.records)),
        )
        for case in cases
    }
    found = {case.name: Measured() for case in cases}
    for number in range(rounds):
        for case in cases:
            best, (known, messages) = found[case.name], inputs[case.name]

            def us(prepare: Prepare, times: float = 1.0) -> float:
                return cpu_s_of(prepare, case, known, messages, times) * 1e6 / case.records  # noqa: B023

            # Whoever comes first finds colder caches.
            if number % 2:
                best.reference_us = min(best.reference_us, us(prepared_reference))
            best.engine_us = min(best.engine_us, us(prepared_engine))
            if slower:
                best.planted_us = min(best.planted_us, us(prepared_engine, slower))
            if not number % 2:
                best.reference_us = min(best.reference_us, us(prepared_reference))
        yield found


# --- judging ------------------------------------------------------------------------------------------


def recorded() -> dict[str, float]:
    """The ratios to compare with, by the name of the case."""
    return json.loads(RATIOS_FILE.read_text())


def find_worse(found: dict[str, Measured], ratios: dict[str, float]) -> dict[str, str]:
    """The cases that are too slow, each with what to say about it."""
    return {
        name: (
            f"{name}: the engine takes {one.engine_us:.2f} us for a record, {one.ratio:.2f} times the "
            f"reference loop ({one.reference_us:.2f} us). Recorded is {ratios[name]:.2f} times: this is "
            f"{100 * (one.ratio / ratios[name] - 1):.0f}% slower, and the limit is "
            f"{100 * (WORSE_MAX - 1):.0f}%. "
            "docs/performance.md says how to find the cause, and when to record another ratio."
        )
        for name, one in found.items()
        if one.ratio > ratios[name] * WORSE_MAX
    }


def judge(rounds_min: int, rounds_max: int) -> dict[str, str]:
    """What `find_worse` says in the end, by the recorded ratios.

    Rounds go on while a case is too slow: each one can only make the best ones better, and a machine that is
    busy for some seconds is no reason to fail.
    """
    worse: dict[str, str] = {}
    for number, found in enumerate(measure(CASES, rounds_max), start=1):
        worse = find_worse(found, recorded())
        if number >= rounds_min:
            if not worse:
                break
            if number == rounds_min:
                print("too slow so far, more rounds follow:", *worse.values(), flush=True)
    return worse


def judge_planted(slower: float, rounds_min: int, rounds_max: int) -> dict[str, str]:
    """What `find_worse` says of a planted slowdown, by the ratios of the same rounds without it.

    Rounds go on until it is found in all cases: more of them bring the best ones closer to the truth.
    """
    worse: dict[str, str] = {}
    for number, found in enumerate(measure(CASES, rounds_max, slower), start=1):
        planted = {name: Measured(one.planted_us, one.reference_us) for name, one in found.items()}
        worse = find_worse(planted, {name: one.ratio for name, one in found.items()})
        if number >= rounds_min and len(worse) == len(CASES):
            break
    return worse


def main() -> int:
    """Run and print; 1 if `--guard` finds a case too slow."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--json", action="store_true", help="Print only the figures, as JSON.")
    made.add_argument("--record", action="store_true", help="Write the ratios that the guard compares with.")
    made.add_argument("--guard", action="store_true", help="Fail if a case is much slower than recorded.")
    made.add_argument("--plant", type=float, metavar="TIMES", help="Judge an engine so many times slower.")
    arguments = made.parse_args()
    if arguments.guard:
        rounds = arguments.rounds, 5 * arguments.rounds
        worse = judge_planted(arguments.plant, *rounds) if arguments.plant else judge(*rounds)
        print(*worse.values(), sep="\n")
        return 1 if worse else 0
    *_, found = measure(CASES, arguments.rounds)
    if arguments.json:
        print(json.dumps({name: [one.engine_us, one.reference_us] for name, one in found.items()}))
        return 0
    for name, one in found.items():
        print(
            f"{name:<10} engine {one.engine_us:6.2f} us   reference loop {one.reference_us:6.2f} us"
            f"   ratio {one.ratio:.2f}   recorded {recorded()[name]:.2f}"
        )
    if arguments.record:
        ratios = {name: round(one.ratio, 2) for name, one in found.items()}
        RATIOS_FILE.write_text(json.dumps(ratios, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
