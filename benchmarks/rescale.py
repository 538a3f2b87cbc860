"""How long the output of a shard pauses when a cluster under load grows from two workers to four.

    python -m benchmarks.rescale [--brokers HOST:PORT] [--rate 2000] [--keys 20000] [--rounds 3]

Two workers run all shards under a steady load until each shard has snapshots and its changelog is truncated
up to the older one. Then two more workers are started, which get their share by warm moves. For each shard
that moved, a live read_committed reader shows the longest time without output around its move, next to the
longest one in the same partition in the seconds before. The coordinator's status shows where the time went.

No shard may be restored from the beginning of its changelog. Workers log what a warm copy and a restore began
with, and how many records of the changelog a restore read. The run fails if a copy or a restore began with
nothing, if a restore didn't begin with local files (the warm copy), or if a move was cold. Medians are
printed.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confluent_kafka import TopicPartition

from benchmarks.live import (
    Seen,
    cluster_under_load,
    latencies_ms,
    longest_pause,
    p99,
    seen_before,
    under_way,
)
from benchmarks.recovery import moment_ns, restores
from benchmarks.support import Names, median, parser, workplace
from fcluster.common.ids import changelog_topic
from fcluster.common.settings import resolve
from fcluster.kafka.clients import make_admin
from fcluster.kafka.offsets import begin_offsets
from tests.harness import Cluster, wait_until
from tests.pauses import settled, status_of

BEFORE_S = 5.0
AROUND_S = 0.5
AFTER_S = 2.0
GROWTH_TIMEOUT_S = 90
SNAPSHOT_INTERVAL_MS = 3000
STEPS = ("released", "assigned", "restored")
COPIED = re.compile(r"keeping a copy of \S+/(?P<partition>\d+), from (?P<base>.+) at epoch \d+")
RESTORED = re.compile(
    r"\S+/(?P<partition>\d+) is at epoch \d+: from (?P<base>.+) at epoch \d+, (?P<records>\d+) records"
)


@dataclass(frozen=True)
class Move:
    """One shard's move.

    Attributes:
        pause_ms: the longest pause around it. `usual_ms`: the longest one in the seconds before.
        copied_from: what its warm copy began with. `restored_from`: what its restore began with.
        records: how many records of the changelog the restore read.
        steps_ms: where the time went.
    """

    partition: int
    pause_ms: float
    usual_ms: float
    copied_from: str
    restored_from: str
    records: int
    steps_ms: Mapping[str, int]


@dataclass(frozen=True)
class Growth:
    """One cluster that grew. `restores_ms`: the times for positions, copies and changelog in each restore."""

    moves: Sequence[Move]
    seconds: float
    before_ms: Sequence[float]
    meanwhile_ms: Sequence[float]
    restores_ms: Sequence[tuple[int, int, int]]


def grow(brokers: str, directory: Path, arguments: Any) -> Growth:
    """Start a cluster, let it grow, and evaluate what was seen."""
    names = Names.new()
    settings = {"snapshot.interval.ms": str(SNAPSHOT_INTERVAL_MS)}
    with cluster_under_load(brokers, directory, names, settings, arguments) as (running, load):
        wait_even(running, names, arguments.workers)
        wait_truncated(brokers, names, arguments.partitions)
        load.wait_flowing(range(load.partitions), BEFORE_S)
        owners = owners_of(brokers, names)
        began_ns = time.time_ns()
        for slot in range(arguments.workers, arguments.to):
            running.start_worker(slot)
        status = wait_even(running, names, arguments.to)
        ended_ns = time.time_ns()
        time.sleep(AFTER_S)
        moved = [at for at, slot in owners_of(brokers, names).items() if owners[at] != slot]
        seen = load.finish()
        assert moved, "nothing moved"
        assert status["counters"]["cold_moves"] == 0, status["counters"]
        return Growth(
            list(moves(running, status, moved, seen, began_ns, ended_ns)),
            (ended_ns - began_ns) / 1e9,
            latencies_ms(seen, seen, seen_before(began_ns, BEFORE_S)),
            latencies_ms(seen, seen, under_way(began_ns, ended_ns)),
            restores(running.data_dir, began_ns),
        )


def wait_even(running: Cluster, names: Names, workers: int) -> dict[str, Any]:
    """Wait until this many workers have an even share of the shards, and nothing moves. Returns the
    status.
    """
    found: dict[str, Any] = {}

    def look() -> bool:
        running.assert_alive()
        found.update(status_of(running.brokers, names.job))
        return settled(found, workers, 0)

    wait_until(look, f"{workers} workers with an even share", GROWTH_TIMEOUT_S, 0.1)
    return found


def wait_truncated(brokers: str, names: Names, partitions: int) -> None:
    """Wait until no changelog has its first records any more, because all shards have two snapshots."""
    admin = make_admin(resolve({}, None, {}, {"bootstrap.servers": brokers}))
    changelog = changelog_topic(names.job, names.source)
    wanted = [TopicPartition(changelog, partition) for partition in range(partitions)]
    wait_until(
        lambda: all(begin > 0 for begin in begin_offsets(admin, wanted).values()),
        "snapshots of all shards",
        GROWTH_TIMEOUT_S,
        0.5,
    )


def owners_of(brokers: str, names: Names) -> dict[int, int]:
    """The slot of each partition."""
    return {shard["partition"]: shard["slot"] for shard in status_of(brokers, names.job)["shards"]}


def moves(
    running: Cluster,
    status: Mapping[str, Any],
    moved: Sequence[int],
    seen: Mapping[int, Sequence[Seen]],
    began_ns: int,
    ended_ns: int,
) -> Iterator[Move]:
    """The result for each shard that moved."""
    logs = log_lines(running.data_dir, began_ns)
    copies = {int(found["partition"]): found["base"] for line in logs if (found := COPIED.search(line))}
    restored_by = {int(found["partition"]): found for line in logs if (found := RESTORED.search(line))}
    steps = {move["partition"]: move["steps_ms"] for move in status["moves"]}
    for partition in sorted(moved):
        restored = restored_by[partition]
        move = Move(
            partition,
            longest_pause(seen[partition], partition, began_ns, ended_ns + int(AROUND_S * 1e9)).ms,
            longest_pause(seen[partition], partition, began_ns - int(BEFORE_S * 1e9), began_ns).ms,
            copies[partition],
            restored["base"],
            int(restored["records"]),
            steps[partition],
        )
        assert move.copied_from != "nothing", f"the copy of {partition} began at the changelog's beginning"
        assert move.restored_from == "local files", f"{partition} was restored from {move.restored_from}"
        yield move


def log_lines(data_dir: Path, since_ns: int) -> list[str]:
    """What workers have logged since then."""
    return [
        line
        for path in (data_dir / "test-logs").glob("worker-*.log")
        for line in path.read_text(errors="replace").splitlines()
        if line[:2] == "20" and moment_ns(line) >= since_ns
    ]


def main() -> int:
    """Run and print."""
    made = parser(__doc__)
    made.set_defaults(partitions=8)
    made.add_argument("--rate", type=float, default=2000, help="Records a second.")
    made.add_argument("--keys", type=int, default=20_000)
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--to", type=int, default=4)
    made.add_argument("--rounds", type=int, default=3)
    arguments = made.parse_args()
    print(
        f"{arguments.workers} to {arguments.to} workers, {arguments.partitions} partitions, "
        f"{arguments.rate:,.0f} records/s, {arguments.rounds} times",
        flush=True,
    )
    growths: list[Growth] = []
    with workplace(arguments.brokers) as (brokers, directory):
        for _ in range(arguments.rounds):
            growths.append(grow(brokers, directory, arguments))
            show(growths[-1])
    summarise(growths)
    return 0


def show(growth: Growth) -> None:
    """Print a line for each shard."""
    print(
        f"  {len(growth.moves)} shards moved within {growth.seconds:.1f} s of the start of the new workers:"
    )
    for move in growth.moves:
        steps = " ".join(f"{step} {move.steps_ms[step]}" for step in STEPS)
        print(
            f"    shard {move.partition}: output pauses for {move.pause_ms:4.0f} ms (usually up to "
            f"{move.usual_ms:.0f}); {steps}; copy from {move.copied_from}, restored from "
            f"{move.restored_from} and {move.records} records",
            flush=True,
        )
    inner = ", ".join("+".join(map(str, one)) for one in growth.restores_ms)
    print(f"    restores (ms for positions + copies + changelog): {inner}", flush=True)


def summarise(growths: Sequence[Growth]) -> None:
    """Print the medians of all shards in all rounds."""
    moved = [move for growth in growths for move in growth.moves]
    pauses_ms = sorted(move.pause_ms for move in moved)
    steps = ", ".join(f"{step} {median([move.steps_ms[step] for move in moved]):.0f} ms" for step in STEPS)
    before = [latency_ms for growth in growths for latency_ms in growth.before_ms]
    meanwhile = [latency_ms for growth in growths for latency_ms in growth.meanwhile_ms]
    print(
        f"{len(moved)} moves: output pauses for {median(pauses_ms):.0f} ms (median; longest "
        f"{pauses_ms[-1]:.0f}; usual {median([move.usual_ms for move in moved]):.0f}); {steps}; "
        "none was restored from the beginning of its changelog"
    )
    print(
        f"p99 of all records: {p99(before):.0f} ms before, {p99(meanwhile):.0f} ms from the start of the new "
        "workers until all has moved"
    )


if __name__ == "__main__":
    sys.exit(main())
