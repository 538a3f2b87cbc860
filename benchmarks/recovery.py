"""How long the output of a killed worker's shards pauses, without and with a standby.

    python -m benchmarks.recovery [--brokers HOST:PORT] [--rate 2000] [--kills 10] [--keys 20000]

Four workers under a steady load; one after the other is killed with `kill -9`, and started again once the
others have taken its shards. The pause is the longest time in which a live read_committed reader saw no
output in a partition of the dead worker, from half a second before the kill on; of each kill the partition
that paused longest counts. Medians are printed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.support import Names, median, parser, settings_of, topics, workplace
from tests.checker.generate import Generator
from tests.checker.live import LiveReader
from tests.checker.reading import READ_COMMITTED
from tests.harness import Cluster
from tests.pauses import Kill, kill_and_measure

JOB_FILE = Path(__file__).parents[1] / "tests" / "jobs" / "running_totals.py"


def measure(brokers: str, directory: Path, replicas: int, arguments: Any) -> list[Kill]:
    """One cluster, several kills."""
    names = Names.new()
    env = {
        "FCLUSTER_TEST_JOB": names.job,
        "FCLUSTER_TEST_SOURCE": names.source,
        "FCLUSTER_TEST_OUTPUT": names.output,
    }
    settings = {"num.standby.replicas": str(replicas)} | settings_of(arguments)
    with (
        topics(brokers, names, arguments.partitions),
        Cluster(
            JOB_FILE, brokers, directory / names.job, workers=arguments.workers, env=env, settings=settings
        ) as cluster,
    ):
        cluster.start()
        reader = LiveReader(brokers, names.output, READ_COMMITTED).start()
        load = Generator(brokers, names.source, rate=arguments.rate, keys=arguments.keys).start()
        try:
            return [
                kill_and_measure(cluster, names.job, number % arguments.workers, reader, replicas)
                for number in range(arguments.kills)
            ]
        finally:
            load.stop()
            reader.stop()


def main() -> int:
    """Run and print."""
    made = parser(__doc__)
    made.set_defaults(partitions=8)
    made.add_argument("--rate", type=float, default=2000, help="Records a second.")
    made.add_argument("--kills", type=int, default=10, help="Of each kind.")
    made.add_argument("--keys", type=int, default=20_000)
    made.add_argument("--workers", type=int, default=4)
    arguments = made.parse_args()
    print(
        f"{arguments.workers} workers, {arguments.partitions} partitions, {arguments.rate:,.0f} records/s, "
        f"{arguments.kills} kills each"
    )
    with workplace(arguments.brokers) as (brokers, directory):
        for replicas in (0, 1):
            pauses_ms = sorted(kill.longest_ms for kill in measure(brokers, directory, replicas, arguments))
            name = "with one standby" if replicas else "without a standby"
            shown = " ".join(f"{pause_ms:.0f}" for pause_ms in pauses_ms)
            print(f"{name}: output pauses for {median(pauses_ms):.0f} ms (median; all: {shown})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
