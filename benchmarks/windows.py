"""What windows cost, without Kafka: the real runner, state layers and RocksDB.

    python -m benchmarks.windows [--rounds 9]             the cost of a record
    python -m benchmarks.windows --only session           the same of the jobs with this in their names
    python -m benchmarks.windows --close 1000000          how long others wait while so many windows close

*The cost of a record.* A running count of each key, and windows with a count of each key, take the same
records in turns, in one process; each processor time is the best of all rounds. Windows close on the way:
each of the 1,000 keys has a new one every 20 records. Results at intervals come every 10 records of a key,
and when windows close. Of windows of all records, it is the shards that compute parts; the one that puts
them together has a record for each shard and interval, and not for each record.

*Closing.* One shard has a window of each key in RocksDB, and a record makes all of them due. After that,
records of other keys and due windows take turns as in a worker: about 5 ms each. There is a commit every 100
ms, which is part of the measured time, although a worker has another thread for half of it. It measures the
longest time from one such record to the next: the processor time of the thread, which doesn't depend on what
else the machine does, and the time by the clock. It also says what the phases of a commit took, and
collections of garbage. `benchmarks/closing.py` measures the same from outside, with a worker and a broker.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
from confluent_kafka import Message

from benchmarks.engine import EPOCH_RECORDS, Epochs
from fcluster import Counted, Cumulative, Hopping, Job, Session, Sliding, Tumbling, count
from fcluster.common import garbage
from fcluster.storage.store import StoreDirectory

RECORDS = 60_000
KEYS = 1_000
CHUNK_RECORDS = 500
BEGIN_MS = 1_700_000_000_000
STEP_MS = 1
_MS = timedelta(milliseconds=1)
_S = timedelta(seconds=1)
LENGTH = 20_000 * _MS  # of event time: 20 records of each key
TURN_S = 0.005
COMMIT_S = 0.1
EARLIER_S = 1e6
"""Later than all epochs with which the windows were filled."""

KINDS: dict[str, Any] = {
    "tumbling": Tumbling(LENGTH),
    "hopping, 4 at a time": Hopping(LENGTH, LENGTH / 4),
    "cumulative, 4 steps": Cumulative(LENGTH, LENGTH / 4),
    "session": Session(2_000 * _MS),
    "sliding, 4 records": Sliding(3_500 * _MS),
    "counted": Counted(20),
}


def running_count() -> Job:
    """What windows are compared with."""
    job = Job("count")

    @job.process(job.topic("in"), to=job.topic("out"))
    def counted(ctx: Any, _value: Any) -> Any:
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        return {"key": ctx.key, "n": ctx.state["n"]}

    return job


def windowed_count(windows: Any, emit: Any = "close", clock: Any = "event") -> Job:
    """A count in windows."""
    job = Job("windows")
    stream = job.stream(job.topic("in")).window(windows, name="w", emit=emit, clock=clock)
    stream.aggregate(n=count()).to(job.topic("out"))
    return job


def count_of_all(windows: Any, emit: Any = "close") -> Job:
    """A count in windows of all records."""
    job = Job("windows")
    stream = job.stream(job.topic("in")).window_all(windows, name="w", emit=emit)
    stream.aggregate(n=count()).to(job.topic("out"))
    return job


def make_messages(numbers: Sequence[int], keys: int, step_ms: int = STEP_MS) -> list[Message]:
    """Records of the keys in turns. Event time moves by `step_ms` with each."""
    return [
        Message(
            topic="in",
            partition=0,
            offset=number,
            key=b"k%d" % (number % keys),
            value=orjson.dumps({"id": number, "value": number % 1000}),
            timestamp=(1, BEGIN_MS + number * step_ms),
        )
        for number in numbers
    ]


def run_in_turns(epochs: Epochs, messages: Sequence[Message]) -> None:
    """Process the records, and commit. As in a worker, what is due and has waited fires between chunks."""
    runner, timers = epochs.shard.inputs[0], epochs.shard.timers
    for begin in range(0, len(messages), EPOCH_RECORDS):
        for at in range(begin, begin + EPOCH_RECORDS, CHUNK_RECORDS):
            for message in messages[at : at + CHUNK_RECORDS]:
                runner.handle(message)
                runner.last = message
            if timers is not None and timers.behind:
                timers.fire_due(len(messages))
        epochs.commit()


def cpu_us(job: Job, messages: Sequence[Message]) -> float:
    """Microseconds of processor time for a record."""
    directory = Path(tempfile.mkdtemp(prefix="fcluster-windows-"))
    stores = StoreDirectory(directory)
    try:
        epochs = Epochs(job, stores)
        gc.collect()
        began_s = time.process_time()
        run_in_turns(epochs, messages)
        return (time.process_time() - began_s) / len(messages) * 1e6
    finally:
        stores.close_all()
        shutil.rmtree(directory)


def compare(rounds: int, only: str = "") -> dict[str, float]:
    """The best processor time of each job, by its name; "count" is the running count.

    Args:
        rounds: how many.
        only: a part of the names of the jobs. The running count is always measured.
    """
    messages = make_messages(range(RECORDS), KEYS)
    jobs = {name: windowed_count(kind) for name, kind in KINDS.items()}
    jobs["tumbling, each update"] = windowed_count(KINDS["tumbling"], "update")
    jobs["tumbling, in processing time"] = windowed_count(KINDS["tumbling"], clock="processing")
    jobs["all records"] = count_of_all(KINDS["tumbling"])
    for name, kind in KINDS.items():
        jobs[f"{name}, at intervals"] = windowed_count(kind, 10 * _S)
    jobs["all records, at intervals"] = count_of_all(KINDS["tumbling"], 10 * _S)
    jobs = {"count": running_count(), **{name: job for name, job in jobs.items() if only in name}}
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, job in jobs.items():
            best[name] = min(best.get(name, float("inf")), cpu_us(job, messages))
    return best


class Longest:
    """The processor time of the thread that steps of each kind have taken: the longest, and in all."""

    def __init__(self) -> None:
        self.longest_s: dict[str, float] = {}
        self.total_s: dict[str, float] = {}
        self._began_s = self._since_s = 0.0
        gc.callbacks.append(self._collected)

    def begin(self) -> None:
        """The first step begins."""
        self._since_s = time.thread_time()

    def ended(self, step: str) -> None:
        """The step has ended, and the next one begins."""
        self._note(step, self._since_s)
        self._since_s = time.thread_time()

    def _note(self, step: str, began_s: float) -> None:
        took_s = time.thread_time() - began_s
        self.longest_s[step] = max(self.longest_s.get(step, 0.0), took_s)
        self.total_s[step] = self.total_s.get(step, 0.0) + took_s

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began_s = time.thread_time()
        else:
            self._note(f"garbage {info['generation']}", self._began_s)

    def close(self) -> None:
        """Note no more collections."""
        gc.callbacks.remove(self._collected)

    def describe(self) -> str:
        """What the steps took."""
        return "; ".join(
            f"{step} at most {longest_s * 1000:.1f} ms, {self.total_s[step]:.1f} s in all"
            for step, longest_s in self.longest_s.items()
        )


def close_many(windows: int, limit_s: float) -> str:
    """Close so many windows of one end, or as many as close in that processor time, and say how long others
    waited.
    """
    garbage.settle()  # as in a worker
    directory = Path(tempfile.mkdtemp(prefix="fcluster-windows-"))
    stores = StoreDirectory(directory)
    try:
        epochs = Epochs(windowed_count(Tumbling(timedelta(days=1)), "close"), stores, 20_000)
        epochs.run(make_messages(range(windows), windows, 0))
        runner, timers = epochs.shard.inputs[0], epochs.shard.timers
        assert timers is not None
        next_day = 2 * 86_400_000 // windows + 1
        others = make_messages(range(windows, windows + 10_000_000 // 1_000), 1_000, next_day)
        used_s = time.thread_time
        began_s = last_s = committed_s = used_s()
        last_clock_s = time.perf_counter()
        longest_s, longest_clock_s, passed, closed = 0.0, 0.0, 0, 0
        steps = Longest()
        for message in others:
            turn_ends_s = used_s() + TURN_S
            while used_s() < turn_ends_s:
                runner.handle(message)
                runner.last = message
                now_s, clock_s = used_s(), time.perf_counter()
                longest_s, last_s = max(longest_s, now_s - last_s), now_s
                longest_clock_s, last_clock_s = max(longest_clock_s, clock_s - last_clock_s), clock_s
                passed += 1
            turn_ends_s = used_s() + TURN_S
            closed += timers.fire_due(windows, lambda: used_s() >= turn_ends_s)  # noqa: B023
            if used_s() - committed_s > COMMIT_S:
                steps.begin()
                # As if each epoch took twice its processor time.
                epochs.commit((used_s() + EARLIER_S) * 2_000, steps.ended)
                committed_s = used_s()
            if closed >= windows or used_s() - began_s > limit_s:
                break
        steps.close()
        return (
            f"{closed:,} windows closed in {used_s() - began_s:.1f} s of processor time; meanwhile "
            f"{passed:,} records of other keys, with at most {longest_s * 1000:.0f} ms of processor time "
            f"from one to the next (by the clock {longest_clock_s * 1000:.0f} ms, at a load of "
            f"{os.getloadavg()[0]:.0f})\n{steps.describe()}"
        )
    finally:
        stores.close_all()
        shutil.rmtree(directory)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", metavar="PART", help="jobs with this in their names")
    parser.add_argument("--close", type=int, metavar="WINDOWS")
    parser.add_argument("--limit-s", type=float, default=600, help="Processor time for closing.")
    chosen = parser.parse_args()
    if chosen.close:
        print(close_many(chosen.close, chosen.limit_s))
        return
    best = compare(chosen.rounds, chosen.only)
    for name, us in best.items():
        print(f"{name:33} {us:6.2f} us per record, {us / best['count']:.2f} times the running count")


if __name__ == "__main__":
    main()
