"""How many requests a job asks of Kafka: for each epoch, and when it is idle.

    python -m benchmarks.requests [--workers 1] [--partitions 10] [--rate 200] [--seconds 5]

It starts a broker of its own, and lets that broker log all requests (`kafka.request.logger`). A producer
writes at a steady rate for a while, then nothing is written any more. In both times, the requests of the
job's processes are counted by kind, as the broker's log shows them. Those of the producer and of other
clients of this script don't count.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.live import Load
from benchmarks.support import Names, cluster, settings_of, topics
from fcluster.kafka.embedded import EmbeddedKafka
from fcluster.kafka.jars import find_java, resolve_jars
from tests.checker.reading import forget_admins
from tests.pauses import status_of

SETTLE_S = 5.0
CLIENT = "fcluster"
"""The `client.id` of all of fcluster's clients."""
LOGGED = re.compile(
    r'^(?P<at>[0-9T:,.-]+) DEBUG .*"clientId":"(?P<client>[^"]*)".*?"requestApiKeyName":"(?P<kind>[A-Z_]+)"'
)


def set_request_log(brokers: str, level: str) -> None:
    """Set the level of the broker's log of requests."""
    command = [
        *(str(find_java()), "-cp", f"{resolve_jars(print)}/*", "kafka.admin.ConfigCommand"),
        *("--bootstrap-server", brokers, "--entity-type", "broker-loggers", "--entity-name", "1"),
        *("--alter", "--add-config", f"kafka.request.logger={level}"),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def count_requests(logs: Path, from_s: float, to_s: float) -> Counter[str]:
    """The job's requests between these times (Unix seconds), by kind."""
    counted: Counter[str] = Counter()
    for path in sorted(logs.glob("server.log*")):
        for line in path.read_text(errors="replace").splitlines():
            found = LOGGED.match(line)
            if found is None or found["client"] != CLIENT:
                continue
            at = datetime.fromisoformat(found["at"].replace(",", ".")).astimezone(UTC)
            if from_s <= at.timestamp() <= to_s:
                counted[found["kind"]] += 1
    return counted


def epochs_of(brokers: str, job: str) -> int:
    """How many epochs all workers together have committed."""
    return sum(worker["epochs_committed"] for worker in status_of(brokers, job)["workers"])


def main() -> int:
    """Run and print."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--workers", type=int, default=1)
    made.add_argument("--partitions", type=int, default=10)
    made.add_argument("--rate", type=float, default=200.0, help="Records a second.")
    made.add_argument("--seconds", type=float, default=5.0)
    made.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    arguments = made.parse_args()
    partitions, names = arguments.partitions, Names.new()
    with tempfile.TemporaryDirectory(prefix="fcluster-bench-") as name:
        directory = Path(name)
        broker = EmbeddedKafka(directory / "kafka")
        brokers = broker.start()
        logs = directory / "kafka" / "logs"
        try:
            with (
                topics(brokers, names, partitions),
                cluster(brokers, directory, names, arguments.workers, settings_of(arguments)) as running,
            ):
                running.start()
                load = Load(
                    brokers, names.source, names.output, rate=arguments.rate, keys=1000, partitions=partitions
                )
                with load:
                    load.wait_flowing(range(partitions), 2.0)
                    set_request_log(brokers, "DEBUG")
                    epochs, from_s = epochs_of(brokers, names.job), time.time()
                    time.sleep(arguments.seconds)
                    epochs, to_s = epochs_of(brokers, names.job) - epochs, time.time()
                    set_request_log(brokers, "INFO")
                    load.finish()
                busy = count_requests(logs, from_s, to_s)
                time.sleep(SETTLE_S)
                set_request_log(brokers, "DEBUG")
                idle_from_s = time.time()
                time.sleep(arguments.seconds)
                idle_to_s = time.time()
                set_request_log(brokers, "INFO")
                idle = count_requests(logs, idle_from_s, idle_to_s)
        finally:
            forget_admins()
            broker.stop()
    print(
        f"{arguments.workers} workers, {partitions} partitions, {arguments.rate:.0f} records/s: "
        f"{epochs / (to_s - from_s):.1f} epochs of workers a second"
    )
    print(f"{'request':<26} {'for each epoch':>15} {'a second':>10} {'a second, idle':>15}")
    for kind in sorted(busy | idle, key=lambda one: -busy[one]):
        print(
            f"{kind:<26} {busy[kind] / max(1, epochs):>15.2f} {busy[kind] / (to_s - from_s):>10.1f} "
            f"{idle[kind] / (idle_to_s - idle_from_s):>15.1f}"
        )
    total, idle_total = sum(busy.values()), sum(idle.values())
    print(
        f"{'all':<26} {total / max(1, epochs):>15.2f} {total / (to_s - from_s):>10.1f} "
        f"{idle_total / (idle_to_s - idle_from_s):>15.1f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
