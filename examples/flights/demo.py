"""The demo: 336,776 real flights through four workers and real Kafka, checked against a recount.

    make demo

Starts an embedded Kafka (unless --brokers names one), loads the flights unless they are there, runs the job
until it has caught up, shows the totals, and compares all of them with an independent recount from the CSV.
The exit code is 0 only if they are equal. The demo keeps everything in its data directory. If it is run
again, it finds its work done; if it was interrupted, it continues where it stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import click
import orjson
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from rich.console import Console
from rich.table import Table

from examples.flights.data import FLIGHTS, airline_names, data_directory
from examples.flights.load import load_flights
from examples.flights.recount import DIFFERENCES_SHOWN_MAX, Totals, differences, recount_csv
from fcluster.common.errors import FclusterError, KafkaUnavailable

JOB_FILE = Path(__file__).with_name("flights.py")
READ_TIMEOUT_S = 120


@contextmanager
def kafka(brokers: str | None, data_dir: Path, console: Console) -> Iterator[str]:
    """The bootstrap servers that were named, or those of an embedded broker that runs during the block."""
    if brokers:
        yield brokers
        return
    from fcluster.kafka.embedded import EmbeddedKafka

    with console.status("Starting Kafka ..."):
        embedded = EmbeddedKafka(data_dir / "kafka")
        started = embedded.start()
    console.print(f"Kafka answers at {started}.")
    try:
        yield started
    finally:
        embedded.stop()


def run_job(brokers: str, data_dir: Path, workers: int) -> int:
    """Run `fcluster up` in the foreground until it has caught up. Returns its exit code."""
    command = [sys.executable, "-m", "fcluster", "up", str(JOB_FILE)]
    command += ["--brokers", brokers, "--workers", str(workers), "--data-dir", str(data_dir / "job")]
    job = subprocess.Popen([*command, "--until-caught-up"])
    while True:
        try:
            return job.wait()
        except KeyboardInterrupt:
            # The terminal sent the signal to the job as well: it drains and ends by itself.
            continue


def read_results(brokers: str, topic: str, key_field: str) -> dict[str, list[Totals]]:
    """Everything that the job wrote to `topic` and committed: the results of each key, in order."""
    consumer = Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": "flights-demo",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    results: dict[str, list[Totals]] = defaultdict(list)
    deadline = time.monotonic() + READ_TIMEOUT_S
    try:
        unread = set(consumer.list_topics(timeout=15).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, partition, 0) for partition in unread])
        while unread:
            if time.monotonic() > deadline:
                raise KafkaUnavailable(
                    f"{topic} can't be read to its end in {READ_TIMEOUT_S} s.",
                    remedy="Look for a transaction left open: `fcluster status` names who holds it.",
                )
            for message in consumer.consume(5000, 0.2):
                error = message.error()
                if error is None:
                    totals = orjson.loads(message.value())
                    results[totals[key_field]].append(totals)
                elif error.code() == KafkaError._PARTITION_EOF:
                    unread.discard(message.partition())
                else:
                    raise KafkaException(error)
    finally:
        consumer.close()
    return results


def carriers_table(results: dict[str, list[Totals]]) -> Table:
    """Each carrier's last totals, the busiest first."""
    table = Table(title="Flights from New York in 2013, by carrier")
    table.add_column("Carrier")
    for heading in ("Flights", "Cancelled", "Mean delay at departure", "at arrival", "Worst"):
        table.add_column(heading, justify="right")
    names = airline_names()
    for last in sorted((rows[-1] for rows in results.values()), key=lambda row: -row["flights"]):
        cancelled = last.get("cancelled", 0)
        table.add_row(
            names.get(last["carrier"], last["carrier"]),
            f"{last['flights']:,}",
            f"{cancelled:,}",
            _minutes(last.get("departure_delay", 0), last["flights"] - cancelled),
            _minutes(last.get("arrival_delay", 0), last.get("arrived", 0)),
            f"{last.get('worst_delay', 0):,} min",
        )
    return table


def aircraft_table(results: dict[str, list[Totals]], rows_max: int = 5) -> Table:
    """The aircraft that flew most often."""
    table = Table(title="The busiest aircraft")
    table.add_column("Tail number")
    table.add_column("Carriers")
    for heading in ("Flights", "Miles", "Hours in the air"):
        table.add_column(heading, justify="right")
    last_of_all = sorted((rows[-1] for rows in results.values()), key=lambda row: -row["flights"])
    for last in last_of_all[:rows_max]:
        table.add_row(
            last["tailnum"],
            ", ".join(sorted(last["carriers"])),
            f"{last['flights']:,}",
            f"{last['miles']:,}",
            f"{last['minutes'] / 60:,.0f}",
        )
    return table


def check(
    carriers: dict[str, list[Totals]], aircraft: dict[str, list[Totals]], rows: int, console: Console
) -> bool:
    """Compare with the recount, and print the result."""
    by_carrier, by_aircraft = recount_csv(rows)
    found = differences("carrier", by_carrier, carriers) + differences("aircraft", by_aircraft, aircraft)
    if not found:
        console.print(
            f"Checked against a recount of {rows:,} flights from the CSV: {len(by_carrier)} carriers and "
            f"{len(by_aircraft):,} aircraft are equal, each flight counted exactly once.",
            style="green",
        )
        return True
    console.print(f"The totals are NOT those of the CSV: {len(found)} differences.", style="bold red")
    for line in found[:DIFFERENCES_SHOWN_MAX]:
        console.print(f"  {line}", markup=False)
    return False


def run_demo(brokers: str | None, data_dir: Path, workers: int, rows: int, console: Console) -> int:
    """Run the whole demo. Returns its exit code."""
    data_directory()  # this is most likely to be missing, so check it before Kafka is started
    data_dir.mkdir(parents=True, exist_ok=True)
    with kafka(brokers, data_dir, console) as servers:
        load_flights(servers, console, rows=rows)
        started = time.monotonic()
        code = run_job(servers, data_dir, workers)
        if code != 0:
            console.print(f"The job ended with exit code {code}.", style="red")
            return code
        console.print(f"The job took {time.monotonic() - started:.0f} s, its start and its end included.")
        carriers = read_results(servers, "carrier-totals", "carrier")
        aircraft = read_results(servers, "aircraft-totals", "tailnum")
    console.print(carriers_table(carriers))
    console.print(aircraft_table(aircraft))
    return 0 if check(carriers, aircraft, rows, console) else 1


@click.command()
@click.option("--brokers", help="Bootstrap servers; without it an embedded Kafka is started.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Default: .fcluster/demo")
@click.option("--workers", default=4, show_default=True)
@click.option("--rows", default=FLIGHTS, show_default=True, help="How many flights, from the first on.")
def main(brokers: str | None, data_dir: Path | None, workers: int, rows: int) -> None:
    """Run the flights through fcluster and check the result."""
    console = Console()
    # With another number of flights, the topic's content differs, so it gets its own Kafka.
    name = "demo" if rows == FLIGHTS else f"demo-{rows}"
    directory = data_dir or Path(os.environ.get("FCLUSTER_STATE_DIR", ".fcluster")) / name
    try:
        code = run_demo(brokers, directory.resolve(), workers, rows, console)
    except FclusterError as error:
        console.print(error.message, style="red", markup=False)
        console.print(error.remedy, markup=False)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code)


def _minutes(total: int, count: int) -> str:
    return f"{total / count:+.1f} min" if count else "-"


if __name__ == "__main__":
    main()
