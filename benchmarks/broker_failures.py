"""How long output pauses when one of three brokers dies or is restarted, compared with the floor and with
Kafka Streams.

    python -m benchmarks.broker_failures [--kills 20] [--restarts 6] [--rate 1000] [--peers] [--json FILE]

It starts three brokers (three replicas, `min.insync.replicas=2`, `broker.session.timeout.ms=6000`). One
idempotent producer writes. Its records are read by a plain read_committed consumer (the floor), by fcluster,
by fcluster with a repartition, and with --peers by a Kafka Streams job (exactly_once_v2). So all of them
experience the same deaths at the same moments. The brokers are killed with `kill -9` one after another. Each
is started again 12 s later, and the next one is killed when all replicas are in sync again. Then each broker
is stopped cleanly and started.

Processes that end are started again, whichever lane they belong to. Ctrl-C ends the run and reports what was
measured until then.

For each event and each of the four lanes, it measures the longest time without output in any partition of the
lane's output topic. The result is the pause beyond the floor of the same event. Over the whole run it also
counts sessions that ended, processes that ended, and lines with errors in the logs. At the end every input
must have exactly one output.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import confluent_kafka
import orjson
from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, Consumer, KafkaError, Producer, TopicPartition

from benchmarks import peers
from benchmarks.support import Names
from fcluster.common.processes import ChildProcess
from fcluster.kafka.embedded_cluster import EmbeddedCluster
from fcluster.kafka.jars import kafka_version
from fcluster.worker import sending
from tests.brokers import wait_whole
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, end_offsets
from tests.harness import COORDINATOR, REPOSITORY, Cluster, wait_until
from tests.pauses import status_of

PLAIN, REGROUPED, FLOOR, STREAMS = "fcluster", "with a repartition", "floor", "Kafka Streams"
JOBS = {PLAIN: "running_totals_job.py", REGROUPED: "regrouped_totals_job.py"}
BROKER_SETTINGS = {"broker.session.timeout.ms": "6000"}
AWAY_S = 12.0
BEFORE_S = 1.0
SETTLE_S = 5.0
"""The time after all replicas are in sync, and before the next event. What is late belongs to the previous
event.
"""
FLOW_S = 120.0
START_S = 300.0
"""Kafka Streams needs time for the first assignment."""
TICK_S = 0.01
ERROR = re.compile(r" (ERROR|CRITICAL) |Traceback \(most recent call last\)")
WARNING = re.compile(r" WARNING ")


# --- the load ------------------------------------------------------------------------------------------


def produce(brokers: str, topic: str, rate: float, keys: int, written: Any, end: Any) -> None:
    """Write at a steady rate until `end`, then deliver all of it. Runs in its own process."""
    producer = Producer(
        {
            "bootstrap.servers": brokers,
            "enable.idempotence": True,
            "linger.ms": 5000,  # it is flushed; a shorter linger takes whole cores while a broker is down
            "partitioner": "murmur2_random",
            "queue.buffering.max.messages": 1_000_000,
            "log_level": 0,
        }
    )
    failed: list[KafkaError] = []

    def delivered(error: KafkaError | None, _message: object) -> None:
        if error is not None:
            failed.append(error)

    started_s, count = time.monotonic(), 0
    while not end.is_set():
        due = rate * (time.monotonic() - started_s)
        while count < due:
            key = f"k{count * 7919 % keys}"
            record = {"id": count, "key": key, "value": count % 1000, "at": time.time_ns()}
            try:
                producer.produce(topic, orjson.dumps(record), key, on_delivery=delivered)
            except BufferError:
                producer.poll(0.05)
                continue
            count += 1
        sending.nudge(producer)
        time.sleep(TICK_S)
    left = sending.flush(producer, 120)
    written.value = count if not left and not failed else -1


def read(brokers: str, topics: Sequence[str], newest: Any, ready: Any, end: Any, answer: Any) -> None:
    """Note when something was seen in each partition of each topic, until `end`. Runs in its own process.

    Meanwhile, `newest` shows when the input of the newest record in each partition was produced.
    """
    consumer = consumer_of(brokers)
    counts = {
        topic: len(consumer.list_topics(topic, timeout=30).topics[topic].partitions) for topic in topics
    }
    at = {(topic, number): place for place, (topic, number) in enumerate(places(counts))}
    seen: list[array[int]] = [array("q") for _ in at]
    consumer.assign([TopicPartition(topic, number, OFFSET_END) for topic, number in at])
    consumer.poll(1.0)
    ready.set()
    while not end.is_set():
        first = consumer.poll(0.1)
        for message in (first, *consumer.consume(1000, 0)) if first is not None else ():
            if message.error() is None:
                place = at[message.topic(), message.partition()]
                seen[place].append(time.time_ns())
                newest[place] = orjson.loads(message.value())["at"]
    answer.put(seen)
    consumer.close()


def places(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Each topic's partitions, in the order in which the reader and this script number them."""
    return [(topic, number) for topic, count in counts.items() for number in range(count)]


def consumer_of(brokers: str) -> Consumer:
    """A plain reader without a group."""
    return Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": "fcluster-bench",
            "enable.auto.commit": False,
            "isolation.level": READ_COMMITTED,
            "auto.offset.reset": "error",
            "fetch.wait.max.ms": 20,
            "enable.partition.eof": True,
            "log_level": 0,
        }
    )


# --- what is measured ----------------------------------------------------------------------------------


@dataclass
class Event:
    """One death or restart, with the longest pause of each lane, in seconds."""

    kind: str
    broker: int
    from_ns: int
    to_ns: int
    pauses_s: dict[str, float]

    def beyond_floor_s(self, lane: str) -> float:
        """The lane's pause minus the pause of a plain producer and consumer."""
        return self.pauses_s[lane] - self.pauses_s[FLOOR]


def longest_pause_s(seen: Sequence[Sequence[int]], from_ns: int, to_ns: int) -> float:
    """The longest time without output in one of the partitions, between these moments. A partition without
    any record has paused the whole time.
    """
    worst_ns = 0
    for times_ns in seen:
        inside = [from_ns, *(ns for ns in times_ns if from_ns <= ns <= to_ns), to_ns]
        worst_ns = max(worst_ns, *(after - before for before, after in pairwise(inside)))
    return worst_ns / 1e9


@dataclass
class Exactly:
    """What a lane's output topic contains at the end."""

    inputs: int
    outputs: int
    missing: int
    repeated: int

    @property
    def ok(self) -> bool:
        """Whether every input has exactly one output."""
        return self.inputs > 0 and not self.missing and not self.repeated


def check(brokers: str, topic: str, inputs: int) -> Exactly:
    """Read a whole output topic, and count each input's outputs."""
    ends = {number: end for (_, number), end in end_offsets(brokers, [topic], READ_COMMITTED).items()}
    found = bytearray(inputs)
    outputs = repeated = 0
    consumer = consumer_of(brokers)
    consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in ends])
    left = {number for number, end in ends.items() if end > 0}
    deadline_s = time.monotonic() + 300
    while left and time.monotonic() < deadline_s:
        for message in consumer.consume(5000, 0.5):
            error = message.error()
            if error is None:
                outputs += 1
                number = orjson.loads(message.value())["id"]
                repeated += found[number] > 0
                found[number] = 1
            elif error.code() == KafkaError._PARTITION_EOF and message.offset() >= ends[message.partition()]:
                left.discard(message.partition())
    consumer.close()
    assert not left, f"{topic} isn't read to its end: {sorted(left)}"
    return Exactly(inputs, outputs, inputs - sum(found), repeated)


# --- the lanes -------------------------------------------------------------------------------------------


class Job:
    """An fcluster job that is watched: processes that end are counted and started again, as a supervisor
    would do.
    """

    def __init__(self, lane: str, brokers: str, directory: Path, source: str, arguments: Any) -> None:
        self.lane = lane
        self.names = Names.new(source)
        self.ended_processes = 0
        self._brokers = brokers
        self._sessions: set[int] = set()
        self._first_sessions = 0
        settings = dict(item.split("=", 1) for item in arguments.settings)
        self.cluster = Cluster(
            Path(__file__).with_name(JOBS[lane]),
            brokers,
            directory / self.names.job,
            workers=arguments.workers,
            env=self.names.env(),
            settings=settings,
        )

    @property
    def output(self) -> str:
        """The topic of its output."""
        return self.names.output

    def look(self) -> None:
        """Count what has ended since the last call."""
        for name in list(self.cluster.pids()):
            code = self.cluster.child(name).poll()
            if code is not None:
                self.ended_processes += 1
                print(f"  {self.lane}: {name} ended with {code}", flush=True)
                if name == COORDINATOR:
                    self.cluster.start_coordinator()
                else:
                    self.cluster.start_worker(int(name.rpartition("-")[2]))

    def look_at_sessions(self) -> None:
        """Count sessions by their numbers: each new number means that a former session has ended."""
        try:
            numbers = [worker["session"] for worker in status_of(self._brokers, self.names.job)["workers"]]
        except Exception as error:  # noqa: BLE001  (no answer now; the next call will tell)
            print(f"  {self.lane}: no status ({error})", flush=True)
            return
        self._sessions.update(numbers)
        self._first_sessions = self._first_sessions or len(self._sessions)

    @property
    def ended_sessions(self) -> int:
        """How many sessions were begun again. Sessions that had ended before a status was read aren't
        counted.
        """
        return len(self._sessions) - self._first_sessions

    def lines(self, kind: re.Pattern[str]) -> list[str]:
        """Lines of that kind in the logs of all its processes."""
        return [
            line
            for path in sorted((self.cluster.data_dir / "test-logs").glob("*.log"))
            for line in path.read_text(errors="replace").splitlines()
            if kind.search(line)
        ]


@contextmanager
def brokers_that_start_soon() -> Generator[None]:
    """Brokers that are started in this block don't use Java's second compiler.

    On a small host, it would take most of the CPU after each start. Kafka Streams isn't started in this
    block.
    """
    os.environ["JDK_JAVA_OPTIONS"] = "-XX:TieredStopAtLevel=1"
    try:
        yield
    finally:
        del os.environ["JDK_JAVA_OPTIONS"]


class Run:
    """All lanes, on three brokers."""

    def __init__(self, arguments: argparse.Namespace, directory: Path, closing: ExitStack) -> None:
        self._arguments = arguments
        self._directory = directory
        self._closing = closing
        self.events: list[Event] = []
        self.brokers = EmbeddedCluster(directory / "kafka", 3, heap_mb=384, settings=BROKER_SETTINGS)
        closing.callback(self.brokers.kill)
        with brokers_that_start_soon():
            self.servers = self.brokers.start(print)
        self.source = Names.new().source
        self.jobs: list[Job] = []
        self.topics = {FLOOR: self.source}
        self._streams: ChildProcess | None = None
        self._begin_streams: Callable[[], ChildProcess] | None = None
        self.ended_peers = 0

    def start(self) -> None:
        """Create topics, start the jobs and the load. Returns once all lanes have output in all
        partitions.
        """
        arguments = self._arguments
        self._create(self.source)
        for lane in JOBS:
            job = Job(lane, self.servers, self._directory, self.source, arguments)
            self.jobs.append(job)
            self.topics[lane] = job.output
            self._create(job.output)
        if arguments.peers:
            self._start_streams()
        context = multiprocessing.get_context("spawn")
        self._end_writing, self._end_reading, ready = context.Event(), context.Event(), context.Event()
        self._written, self._answer = context.Value("q", 0), context.Queue()
        self._order = places(dict.fromkeys(self.topics.values(), arguments.partitions))
        self._newest = context.Array("q", len(self._order), lock=False)
        load = (self.servers, self.source, arguments.rate, arguments.keys, self._written, self._end_writing)
        self._writer = context.Process(target=produce, args=load, daemon=True)
        reading = (
            self.servers,
            list(self.topics.values()),
            self._newest,
            ready,
            self._end_reading,
            self._answer,
        )
        self._reader = context.Process(target=read, args=reading, daemon=True)
        self._reader.start()
        self._closing.callback(self._reader.kill)
        if not ready.wait(60):
            raise TimeoutError("the reader doesn't start")
        self._writer.start()
        self._closing.callback(self._writer.kill)
        for job in self.jobs:
            self._closing.callback(job.cluster.close)
            job.cluster.start()
        if not self.await_flow(START_S):
            raise TimeoutError("not all lanes have output: see the logs with --keep")
        wait_whole(self.servers)
        time.sleep(SETTLE_S)
        for job in self.jobs:
            job.look_at_sessions()

    def _create(self, topic: str) -> None:
        config = {"min.insync.replicas": "2"}
        create_topic(self.servers, topic, self._arguments.partitions, config)

    def _start_streams(self) -> None:
        name = f"{self.source}-streams"
        try:
            jars = peers.resolve()
            self._create(f"{name}-out")
            directory = self._directory / "streams"
            self._begin_streams = functools.partial(
                peers.start, jars, self.servers, name, self.source, f"{name}-out", directory
            )
            self._streams = self._begin_streams()
        except peers.NoPeerError as error:
            print(f"without Kafka Streams: {error}", flush=True)
            return
        self._closing.callback(lambda: self._streams and self._streams.kill())
        self.topics[STREAMS] = f"{name}-out"

    def look(self) -> None:
        """Count processes that have ended, and start them again."""
        for job in self.jobs:
            job.look()
        if self._streams is not None and self._begin_streams is not None and self._streams.poll() is not None:
            print(f"  {STREAMS}: ended with {self._streams.poll()}", flush=True)
            self.ended_peers += 1
            self._streams = self._begin_streams()

    @property
    def replaced_threads(self) -> int:
        """How many threads of Kafka Streams have failed and were replaced by it."""
        log = self._directory / "streams" / "streams.log"
        return sum(line.startswith("REPLACED ") for line in log.read_text(errors="replace").splitlines())

    def await_flow(self, timeout_s: float = FLOW_S) -> bool:
        """Wait until every lane's output contains, in every partition, what is produced from now on. Returns
        whether it does.
        """
        since_ns = time.time_ns()

        def flows() -> bool:
            self.look()
            return all(newest_ns > since_ns for newest_ns in self._newest)

        try:
            wait_until(flows, "output in all partitions of all lanes", timeout_s, 0.2)
            return True
        except TimeoutError as error:
            late = {at for at, newest in zip(self._order, self._newest, strict=True) if newest <= since_ns}
            print(f"  {error}: {sorted(late)[:4]}", flush=True)
            return False

    def event(self, kind: str, node: int) -> None:
        """One broker goes down and comes back. Returns when everything is whole and calm again."""
        from_ns = time.time_ns() - int(BEFORE_S * 1e9)
        began_s = time.monotonic()
        if kind == "kill":
            self.brokers.kill_node(node)
            while time.monotonic() < began_s + AWAY_S:
                time.sleep(0.2)
                self.look()
        else:
            self.brokers.stop_node(node)
        with brokers_that_start_soon():
            self.brokers.start_node(node)
        wait_whole(self.servers, timeout_s=180)
        self.await_flow()
        time.sleep(SETTLE_S)
        self.look()
        for job in self.jobs:
            job.look_at_sessions()
        self.events.append(Event(kind, node, from_ns, time.time_ns(), {}))
        print(f"  {kind} broker {node}: whole after {time.monotonic() - began_s:.0f} s", flush=True)

    def make_whole(self) -> None:
        """Start brokers that an interrupted event has left down."""
        with brokers_that_start_soon():
            self.brokers.start_nodes(self.brokers.nodes)
        wait_whole(self.servers, timeout_s=180)

    def finish(self) -> dict[str, Exactly]:
        """Stop the load, let all lanes catch up, and end them. Returns the pauses, and what the output topics
        contain.
        """
        self._end_writing.set()
        self._writer.join(150)
        written = self._written.value
        assert written > 0, "the producer could not deliver all of its records"
        self._await_end()
        self._end_reading.set()
        seen = self._answer.get(timeout=60)
        for event in self.events:
            for lane, topic in self.topics.items():
                mine = [times for (name, _), times in zip(self._order, seen, strict=True) if name == topic]
                event.pauses_s[lane] = longest_pause_s(mine, event.from_ns, event.to_ns)
        for job in self.jobs:
            job.cluster.terminate(60)
        return {lane: check(self.servers, topic, written) for lane, topic in self.topics.items()}

    def _await_end(self) -> None:
        """Wait until no lane's output grows any more."""
        before: dict[tuple[str, int], int] = {}
        for _ in range(30):
            now = end_offsets(self.servers, list(self.topics.values()), READ_COMMITTED)
            if now == before:
                return
            before = now
            time.sleep(4.0)


# --- the report --------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The machine and the versions that this was measured with."""
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            check=False,
        ).stdout.strip()
    except OSError:
        revision = ""
    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "kafka": kafka_version(),
        "confluent-kafka": confluent_kafka.__version__,
        "librdkafka": confluent_kafka.libversion()[0],
        "fcluster": revision,
        "load average": [round(value, 1) for value in os.getloadavg()],
    }


def report(run: Run, exactly: Mapping[str, Exactly]) -> dict[str, Any]:
    """Print the table and the counts. Returns the same for a file."""
    lanes = [lane for lane in (PLAIN, REGROUPED, FLOOR, STREAMS) if lane in run.topics]
    print(f"\n| {'event':<18} | " + " | ".join(f"{lane:>18}" for lane in lanes) + " |")
    print(f"|{'-' * 20}|" + "|".join("-" * 20 for _ in lanes) + "|")
    for number, event in enumerate(run.events, 1):
        cells = " | ".join(f"{event.pauses_s[lane]:>16.1f} s" for lane in lanes)
        print(f"| {f'{number} {event.kind} {event.broker}':<18} | {cells} |")
    beyond: dict[str, dict[str, dict[str, float]]] = {}
    for kind in ("kill", "restart"):
        events = [event for event in run.events if event.kind == kind]
        if not events:
            continue
        print(f"\npause beyond the floor, {len(events)} times {kind}:")
        for lane in lanes:
            if lane == FLOOR:
                continue
            values = [event.beyond_floor_s(lane) for event in events]
            found = {"median_s": statistics.median(values), "worst_s": max(values)}
            beyond.setdefault(kind, {})[lane] = found
            print(f"  {lane:<20} median {found['median_s']:5.1f} s, worst {found['worst_s']:5.1f} s")
    counted = {}
    print("\nover the whole run:")
    for job in run.jobs:
        errors, warnings = job.lines(ERROR), job.lines(WARNING)
        counted[job.lane] = {
            "ended sessions": job.ended_sessions,
            "ended processes": job.ended_processes,
            "lines of errors": len(errors),
            "lines of warnings": len(warnings),
        }
        print(
            f"  {job.lane:<20} " + ", ".join(f"{count} {what}" for what, count in counted[job.lane].items())
        )
        for line in errors[:5]:
            print(f"      {line[:200]}")
    if STREAMS in lanes:
        counted[STREAMS] = {"ended processes": run.ended_peers, "replaced threads": run.replaced_threads}
        print(f"  {STREAMS:<20} {run.ended_peers} ended processes, {run.replaced_threads} replaced threads")
    for lane, found in exactly.items():
        verdict = "each input exactly once" if found.ok else "NOT each input exactly once"
        print(f"  {lane:<20} {verdict}: {found}")
    return {
        "machine": machine(),
        "settings": {"brokers": BROKER_SETTINGS, **vars(run._arguments)},
        "events": [asdict(event) for event in run.events],
        "beyond the floor": beyond,
        "counted": counted,
        "exactly once": {lane: asdict(found) for lane, found in exactly.items()},
    }


def main() -> int:
    """Run and print. The exit code is 1 if an input doesn't have exactly one output."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--kills", type=int, default=20)
    made.add_argument("--restarts", type=int, default=6, help="Clean ones, each broker in turn.")
    made.add_argument("--rate", type=float, default=1000.0, help="Records a second.")
    made.add_argument("--keys", type=int, default=20_000)
    made.add_argument("--partitions", type=int, default=6)
    made.add_argument("--workers", type=int, default=2, help="Of each fcluster job.")
    made.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    made.add_argument("--peers", action="store_true", help="Kafka Streams too; its jars come by Maven.")
    made.add_argument("--json", metavar="FILE", help="Write all of it there, too.")
    made.add_argument("--keep", action="store_true", help="Keep the directory with logs and data.")
    arguments = made.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="fcluster-bench-"))
    print(json.dumps(machine()), flush=True)
    try:
        with ExitStack() as closing:
            run = Run(arguments, directory, closing)
            run.start()
            print(f"{arguments.kills} kills, {arguments.restarts} restarts", flush=True)
            try:
                for number in range(arguments.kills):
                    run.event("kill", run.brokers.nodes[number % 3])
                for number in range(arguments.restarts):
                    run.event("restart", run.brokers.nodes[number % 3])
            except KeyboardInterrupt:
                print("\ninterrupted: no more of them; once more ends it at once", flush=True)
                run.make_whole()
            exactly = run.finish()
            found = report(run, exactly)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
        return 0 if all(one.ok for one in exactly.values()) else 1
    finally:
        if arguments.keep:
            print(f"kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
