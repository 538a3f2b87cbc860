"""How long the committed output of other keys pauses while very many windows close at once.

    python -m benchmarks.closing [--windows 1000000] [--rate 200] [--brokers HOST:PORT]

A job with one shard has a window for each of so many keys, and counts other records, which have other keys.
The other records come at a steady rate. A read_committed consumer notes when each of their outputs becomes
visible. First no window closes, for some time: what is seen then is the job, the broker and the machine. Then
one record makes all windows due. The longest time without an output is given for both, and how the times
between two outputs are distributed.

For the longest times, it is said what the worker did meanwhile: the phases of the epochs that were under way
(`docs/performance.md` explains them), and collections of garbage, writes to the local store and checkpoints
of it, all by the clock. A phase that waits for a busy processor looks long as well.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import orjson
from confluent_kafka import OFFSET_BEGINNING, Producer, TopicPartition

from fcluster import Job, Tumbling, count
from fcluster.kafka.embedded import EmbeddedKafka
from fcluster.storage.store import RocksStore
from fcluster.worker.epoch_trace import EpochTrace, EpochTraces
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, end_offsets, new_consumer
from tests.harness import Cluster

JOB, SOURCE, OTHERS, CLOSED = "closing-job", "closing-in", "closing-others", "closing-windows"
DAY_MS = 86_400_000
BEGIN_MS = 20_000 * DAY_MS
OTHER_KEYS = 100
QUIET_S = 20
LIMIT_S = 1_800
STEPS_VARIABLE = "BENCH_CLOSING_STEPS"
"""The environment variable that names the file for the worker's steps."""
STEP_MS_MIN = 2.0
LONGEST_SHOWN = 5

job = Job(JOB)
source = job.topic(SOURCE, value="bytes")
others, closed = job.topic(OTHERS), job.topic(CLOSED)
stream = job.stream(source)
(
    stream.filter(lambda value: value == b"w")
    .window(Tumbling(timedelta(milliseconds=DAY_MS)), name="days")
    .aggregate(n=count())
    .to(closed)
)


def counted(ctx, _value):
    """A running count of each of the other keys."""
    ctx.state["n"] = number = ctx.state.get("n", 0) + 1
    return number


stream.filter(lambda value: value == b"o").process(counted, name="others").to(others)


class Step(NamedTuple):
    """What the worker did, on the monotonic clock of the host."""

    what: str
    begin_s: float
    end_s: float


class StepLog:
    """In the worker, which loads this file as its job: writes down what it does.

    Args:
        file: takes a line of JSON for each step.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._collection_began_s = 0.0
        gc.callbacks.append(self._collected)
        setattr(EpochTraces, "add", self._with_epochs(EpochTraces.add))  # noqa: B010
        for name in ("apply", "checkpoint"):
            setattr(RocksStore, name, self._timed(f"store: {name}", getattr(RocksStore, name)))

    def _note(self, what: str, begin_s: float, end_s: float) -> None:
        if (end_s - begin_s) * 1_000 >= STEP_MS_MIN:
            self._file.write(orjson.dumps([what, begin_s, end_s]).decode() + "\n")

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._collection_began_s = time.monotonic()
        else:
            self._note(f"garbage {info['generation']}", self._collection_began_s, time.monotonic())

    def _with_epochs(self, add: Callable[..., Any]) -> Callable[..., Any]:
        def noting(traces: EpochTraces, trace: EpochTrace) -> Any:
            begin_s = time.monotonic() - sum(trace.took_ms.values()) / 1_000
            for phase, took_ms in trace.took_ms.items():
                self._note(f"epoch: {phase}", begin_s, begin_s + took_ms / 1_000)
                begin_s += took_ms / 1_000
            return add(traces, trace)

        return noting

    def _timed(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*arguments: Any) -> Any:
            begin_s = time.monotonic()
            try:
                return call(*arguments)
            finally:
                self._note(what, begin_s, time.monotonic())

        return timing


if STEPS_VARIABLE in os.environ:
    StepLog(Path(os.environ[STEPS_VARIABLE]).open("a", buffering=1))  # noqa: SIM115  until the worker ends


def steps_between(steps: Sequence[Step], from_s: float, to_s: float) -> str:
    """What the worker did in between, in milliseconds from `from_s`. The open epoch isn't shown: there nearly
    always is one.
    """
    shown = [
        f"{one.what} {(one.begin_s - from_s) * 1_000:.0f} to {(one.end_s - from_s) * 1_000:.0f}"
        for one in sorted(steps, key=lambda one: one.begin_s)
        if one.begin_s < to_s and one.end_s > from_s and one.what != "epoch: open"
    ]
    return ", ".join(shown) or "nothing that took long"


class Watch:
    """Notes when outputs become visible."""

    def __init__(self, brokers: str) -> None:
        self.seen_s: list[float] = []
        self._consumer = new_consumer(brokers, READ_COMMITTED, **{"fetch.wait.max.ms": 5})
        self._consumer.assign([TopicPartition(OTHERS, 0, OFFSET_BEGINNING)])
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            message = self._consumer.poll(0.05)  # `consume` would wait for more of them
            if message is not None and message.error() is None:
                self.seen_s.append(time.monotonic())

    def close(self) -> None:
        """End it."""
        self._ended.set()
        self._thread.join()
        self._consumer.close()

    def describe(self, from_s: float, to_s: float) -> str:
        """The times without output in between."""
        times = self._times(from_s, to_s)
        gaps_ms = sorted((after - before) * 1_000 for before, after in pairwise(times) if after > before)
        half_ms, most_ms = gaps_ms[len(gaps_ms) // 2], gaps_ms[len(gaps_ms) * 99 // 100]
        return (
            f"{len(times) - 2:,} outputs in {to_s - from_s:.0f} s; at most {gaps_ms[-1]:.0f} ms without one, "
            f"{sum(gap > 100 for gap in gaps_ms)} times more than 100 ms; half of the times at most "
            f"{half_ms:.0f} ms, 99 % at most {most_ms:.0f} ms"
        )

    def explain(self, steps: Sequence[Step], from_s: float, to_s: float) -> Iterator[str]:
        """What the worker did in the longest times without output in between."""
        gaps = sorted(pairwise(self._times(from_s, to_s)), key=lambda gap: gap[0] - gap[1])
        for begin_s, end_s in gaps[:LONGEST_SHOWN]:
            yield f"    {(end_s - begin_s) * 1_000:.0f} ms: {steps_between(steps, begin_s, end_s)}"

    def _times(self, from_s: float, to_s: float) -> list[float]:
        return [from_s, *(at for at in self.seen_s if from_s <= at <= to_s), to_s]


class Feed:
    """Writes other records at a steady rate."""

    def __init__(self, producer: Producer, rate: int) -> None:
        self.at_ms = BEGIN_MS
        self.sent = 0
        self._producer, self._rate = producer, rate
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began_s = time.monotonic()
        while not self._ended.wait(0.002):
            while self.sent < (time.monotonic() - began_s) * self._rate:
                key = b"o%d" % (self.sent % OTHER_KEYS)
                self._producer.produce(SOURCE, b"o", key, 0, timestamp=self.at_ms)
                self.sent += 1
            self._producer.poll(0)

    def close(self) -> None:
        """End it."""
        self._ended.set()
        self._thread.join()


def fill(producer: Producer, windows: int) -> None:
    """A record for each window."""
    for number in range(windows):
        while True:
            try:
                producer.produce(SOURCE, b"w", b"k%d" % number, 0, timestamp=BEGIN_MS)
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()


def wait_for(brokers: str, topic: str, records: int, cluster: Cluster) -> None:
    """Wait until a topic has so many committed records, or a few more."""
    began_s = time.monotonic()
    while end_offsets(brokers, [topic], READ_COMMITTED)[topic, 0] < records:
        cluster.assert_alive()
        if time.monotonic() - began_s > LIMIT_S:
            raise TimeoutError(f"{topic} doesn't get {records} records")
        time.sleep(0.5)


@contextmanager
def broker() -> Iterator[str]:
    """A broker of its own."""
    with tempfile.TemporaryDirectory(prefix="fcluster-closing-kafka-") as directory:
        kafka = EmbeddedKafka(Path(directory))
        try:
            yield kafka.start(progress=print)
        finally:
            kafka.stop()


def measure(brokers: str, windows: int, rate: int, directory: Path) -> None:
    """Fill, wait, close, and print what was seen."""
    for topic in (SOURCE, OTHERS, CLOSED):
        create_topic(brokers, topic, 1)
    producer = Producer({"bootstrap.servers": brokers, "linger.ms": 2})
    fill(producer, windows)
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    steps_file = directory / "steps"
    env = {STEPS_VARIABLE: str(steps_file)}

    def say(what: str, watch: Watch, began_s: float) -> None:
        now_s = time.monotonic()
        steps = [Step(*orjson.loads(line)) for line in steps_file.read_text().splitlines()]
        print(f"{what}:", watch.describe(began_s, now_s))
        print(*watch.explain(steps, began_s, now_s), sep="\n", flush=True)

    with Cluster(Path(__file__), brokers, directory, workers=1, env=env) as cluster:
        cluster.start()
        watch, feed = Watch(brokers), Feed(producer, rate)
        try:
            wait_for(brokers, OTHERS, 1, cluster)
            time.sleep(5)
            began_s = time.monotonic()
            time.sleep(QUIET_S)
            say("no window closes", watch, began_s)
            feed.at_ms = BEGIN_MS + 2 * DAY_MS
            began_s = time.monotonic()
            wait_for(brokers, CLOSED, windows, cluster)
            say(f"{windows:,} windows close", watch, began_s)
            print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        finally:
            feed.close()
            watch.close()


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=1_000_000)
    parser.add_argument("--rate", type=int, default=200, help="Other records a second.")
    parser.add_argument("--brokers", help="Default: a broker is started.")
    chosen = parser.parse_args()
    with (
        nullcontext(chosen.brokers) if chosen.brokers else broker() as brokers,
        tempfile.TemporaryDirectory(prefix="fcluster-closing-") as directory,
    ):
        measure(brokers, chosen.windows, chosen.rate, Path(directory))


if __name__ == "__main__":
    main()
