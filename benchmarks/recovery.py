"""How long the output of a killed worker's shards pauses, and how the other shards are affected.

    python -m benchmarks.recovery [--brokers HOST:PORT] [--rate 2000] [--kills 10] [--keys 20000]

Four workers run under a steady load, first without a standby, then with one. They are killed with `kill -9`
one after another. Each is started again once the others have taken its shards. For each kill, a live
read_committed reader shows:

- how long it took until the output of the dead worker's shards resumed (the slowest partition counts), and
  the longest time without output in one of them around the kill,
- where that time went, according to the coordinator's status and the log of the worker that took over,
- the p99 latency, producer to reader, in the partitions of the other workers: of all records that were on
  their way between the kill and the moment when the dead worker's partitions had output again, and of those
  seen in the 5 s before.

The p99 of half a second is that of a few hundred records. So it is also given for the windows of all kills
together, next to all the seconds before them. The floor is the same load without a job, through one topic.
Medians are printed.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.live import (
    Load,
    Pause,
    Seen,
    cluster_under_load,
    latencies_ms,
    load_of,
    longest_pause,
    p99,
    seen_before,
    under_way,
)
from benchmarks.support import Names, median, parser, topics, workplace
from tests.harness import Cluster, worker_name
from tests.pauses import status_of, wait_settled

BEFORE_S = 5.0
AROUND_S = 0.5
AFTER_S = 1.5
"""If output pauses again this soon, that belongs to the pause."""
FLOOR_S = 8.0
STEPS = ("noticed", "journalled", "fenced", "assigned", "restored")
RESTORED = re.compile(
    r"restored \d+ shards, \d+ of them warm: positions (\d+) ms, copies (\d+) ms, the rest (\d+) ms"
)


@dataclass(frozen=True)
class Kill:
    """One death.

    Attributes:
        steps_ms: where the time went.
        restored_ms: where the time went in the worker whose restore took longest.
    """

    slot: int
    killed_ns: int
    partitions: Sequence[int]
    steps_ms: Mapping[str, int]
    restored_ms: tuple[int, int, int]


@dataclass(frozen=True)
class Outcome:
    """The result of one kill."""

    kill: Kill
    resumed_ms: float
    paused_ms: float
    before_ms: Sequence[float]
    window_ms: Sequence[float]

    @property
    def ratio(self) -> float:
        """The others' p99 in the window divided by that before."""
        return p99(self.window_ms) / p99(self.before_ms)


def kill(running: Cluster, names: Names, slot: int, load: Load, replicas: int) -> Kill:
    """`kill -9` the worker of `slot` in a settled cluster under load, and start it again."""
    status = wait_settled(running, names.job, replicas)
    partitions = [shard["partition"] for shard in status["shards"] if shard["slot"] == slot]
    assert partitions, f"slot {slot} has no shards"
    load.wait_flowing(range(load.partitions), BEFORE_S)
    killed_ns = time.time_ns()
    running.kill(worker_name(slot))
    load.wait_reached(partitions, killed_ns)
    time.sleep(AFTER_S)
    takeover = [one for one in status_of(running.brokers, names.job)["takeovers"] if one["slot"] == slot][-1]
    restored_ms = max(restores(running.data_dir, killed_ns), default=(0, 0, 0), key=sum)
    running.start_worker(slot)
    return Kill(slot, killed_ns, partitions, takeover["steps_ms"], restored_ms)


def restores(data_dir: Path, since_ns: int) -> list[tuple[int, int, int]]:
    """What the workers' logs say about restores since then: positions, copies and the rest, in
    milliseconds.
    """
    found: list[tuple[int, int, int]] = []
    for path in (data_dir / "test-logs").glob("worker-*.log"):
        for line in path.read_text(errors="replace").splitlines():
            match = RESTORED.search(line)
            if match and moment_ns(line) >= since_ns:
                found.append((int(match[1]), int(match[2]), int(match[3])))
    return found


def moment_ns(line: str) -> int:
    """The time at which a log line was written."""
    return int(datetime.strptime(line[:24], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp() * 1e9)


def outcome(one: Kill, seen: Mapping[int, Sequence[Seen]]) -> Outcome:
    """The result, from what was seen around the kill."""
    from_ns, to_ns = one.killed_ns - int(AROUND_S * 1e9), one.killed_ns + int(30e9)
    resumed = [
        min(row.seen_ns for row in seen[partition] if row.produced_ns >= one.killed_ns)
        for partition in one.partitions
    ]
    pauses: list[Pause] = [
        longest_pause(seen[partition], partition, from_ns, min(to_ns, resumed_ns + int(AFTER_S * 1e9)))
        for partition, resumed_ns in zip(one.partitions, resumed, strict=True)
    ]
    # Output resumes with what the dead worker left unfinished, which is older than the kill.
    resumed_ns = max(pause.to_ns for pause in pauses)
    others = sorted(set(seen) - set(one.partitions))
    return Outcome(
        one,
        (resumed_ns - one.killed_ns) / 1e6,
        max(pause.ms for pause in pauses),
        latencies_ms(seen, others, seen_before(one.killed_ns, BEFORE_S)),
        latencies_ms(seen, others, under_way(one.killed_ns, resumed_ns)),
    )


def measure(brokers: str, directory: Path, replicas: int, arguments: Any) -> list[Outcome]:
    """One cluster, several kills."""
    names = Names.new()
    settings = {"num.standby.replicas": str(replicas)}
    with cluster_under_load(brokers, directory, names, settings, arguments) as (running, load):
        kills = [
            kill(running, names, number % arguments.workers, load, replicas)
            for number in range(arguments.kills)
        ]
        seen = load.finish()
    return [outcome(one, seen) for one in kills]


def floor(brokers: str, arguments: Any) -> list[float]:
    """Latencies of the same load without a job."""
    names = Names.new()
    with (
        topics(brokers, names, arguments.partitions),
        load_of(brokers, names.source, names.source, arguments) as load,
    ):
        load.wait_flowing(range(arguments.partitions), 2.0)
        from_ns = time.time_ns()
        time.sleep(FLOOR_S)
        to_ns = time.time_ns()
        return latencies_ms(load.finish(), range(arguments.partitions), under_way(from_ns, to_ns))


def main() -> int:
    """Run and print."""
    made = parser(__doc__)
    made.set_defaults(partitions=8)
    made.add_argument("--rate", type=float, default=2000, help="Records a second.")
    made.add_argument("--kills", type=int, default=10, help="Of each kind.")
    made.add_argument("--keys", type=int, default=20_000)
    made.add_argument("--workers", type=int, default=4)
    made.add_argument("--replicas", type=int, action="append", help="Standbys; by default 0, then 1.")
    arguments = made.parse_args()
    print(
        f"{arguments.workers} workers, {arguments.partitions} partitions, {arguments.rate:,.0f} records/s, "
        f"{arguments.kills} kills each",
        flush=True,
    )
    with workplace(arguments.brokers) as (brokers, directory):
        for replicas in arguments.replicas or (0, 1):
            name = "with one standby" if replicas == 1 else f"with {replicas or 'no'} standbys"
            show(name, measure(brokers, directory, replicas, arguments))
        bare_ms = floor(brokers, arguments)  # last: a broker that has just started is slow
    print(f"floor: median {median(bare_ms):.0f} ms, p99 {p99(bare_ms):.0f} ms")
    return 0


def show(name: str, outcomes: Sequence[Outcome]) -> None:
    """A line for each kill, then the medians."""
    print(f"{name}:", flush=True)
    for one in outcomes:
        steps = " ".join(f"{step} {one.kill.steps_ms[step]}" for step in STEPS)
        inner = "+".join(map(str, one.kill.restored_ms))
        print(
            f"  slot {one.kill.slot}: resumes after {one.resumed_ms:5.0f} ms, pause {one.paused_ms:5.0f} ms "
            f"({steps} [{inner}]); others' p99 {p99(one.before_ms):4.0f} ms before, "
            f"{p99(one.window_ms):4.0f} ms meanwhile ({len(one.window_ms)} records), ratio {one.ratio:.1f}"
        )
    resumed_ms, paused_ms = [one.resumed_ms for one in outcomes], [one.paused_ms for one in outcomes]
    print(
        f"  medians of {len(outcomes)}: output resumes after {median(resumed_ms):.0f} ms, pauses for "
        f"{median(paused_ms):.0f} ms"
    )
    steps = ", ".join(
        f"{step} {median([one.kill.steps_ms[step] for one in outcomes]):.0f} ms" for step in STEPS
    )
    rest_ms = median([one.resumed_ms - sum(one.kill.steps_ms.values()) for one in outcomes])
    inner = ", ".join(
        f"{part} {median([one.kill.restored_ms[index] for one in outcomes]):.0f} ms"
        for index, part in enumerate(("positions", "copies", "changelog"))
    )
    print(f"  of that: {steps} ({inner}), to the first output {rest_ms:.0f} ms")
    before = [latency_ms for one in outcomes for latency_ms in one.before_ms]
    window = [latency_ms for one in outcomes for latency_ms in one.window_ms]
    print(
        f"  others: p99 {median([p99(one.before_ms) for one in outcomes]):.0f} ms before, "
        f"{median([p99(one.window_ms) for one in outcomes]):.0f} ms meanwhile; "
        f"median ratio {median([one.ratio for one in outcomes]):.2f}; all kills together "
        f"{p99(before):.0f} and {p99(window):.0f} ms, ratio {p99(window) / p99(before):.2f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
