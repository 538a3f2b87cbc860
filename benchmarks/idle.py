"""What an idle cluster costs: the CPU time of one coordinator and four workers, and their resident memory.

    python -m benchmarks.idle [--brokers HOST:PORT] [--seconds 30]

The job has processed a few records, and then has nothing to do. Kafka isn't counted.
"""

from __future__ import annotations

import sys
import time

from benchmarks.drain import fill
from benchmarks.records import Input
from benchmarks.support import Names, cluster, parser, settings_of, topics, workplace
from tests.checker.reading import READ_COMMITTED, committed_offsets, end_offsets
from tests.harness import cpu_seconds, memory_bytes, wait_until

SETTLE_S = 5.0


def main() -> int:
    """Run and print."""
    made = parser(__doc__)
    made.add_argument("--workers", type=int, default=4)
    made.add_argument("--seconds", type=float, default=30)
    arguments = made.parse_args()
    with workplace(arguments.brokers) as (brokers, directory):
        names = Names.new()
        with topics(brokers, names, arguments.partitions):
            fill(brokers, names.source, Input(1000, 100))
            with cluster(brokers, directory, names, arguments.workers, settings_of(arguments)) as running:
                running.start()
                ends = end_offsets(brokers, [names.source], READ_COMMITTED)
                wait_until(
                    lambda: ends.items() <= committed_offsets(brokers, names.job).items(), "catching up", 60
                )
                time.sleep(SETTLE_S)
                running.assert_alive()
                pids = running.pids()
                before = {name: cpu_seconds(pid) for name, pid in pids.items()}
                started_s = time.monotonic()
                time.sleep(arguments.seconds)
                wall_s = time.monotonic() - started_s
                used = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
                memory = {name: memory_bytes(pid) for name, pid in pids.items()}
                running.assert_alive()
    for name, seconds in used.items():
        print(
            f"  {name:<12} {100 * seconds / wall_s:6.2f}% of a core   {memory[name] / 1e6:6.1f} MB resident"
        )
    print(f"in all {100 * sum(used.values()) / wall_s:.2f}% of one core, idle for {wall_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
