"""The benchmark suite: named scenarios, fcluster and others in turns, results as JSON.

    python -m benchmarks.suite [--scenario 'drain-*'] [--rounds 3] [--scale 0.01] [--out FILE]
    python -m benchmarks.suite --peer kafka-streams # in turns with fcluster
    python -m benchmarks.suite --compare DIR        # the fcluster of another checkout in turns with this one
    python -m benchmarks.plots FILE                 # draws the results

In each round every lane is measured once, in turns forwards and backwards, so what else the machine does hits
all of them. Ratios are of one round's own figures; their median and spread are what to quote. The results are
written after each scenario: Ctrl-C leaves those that are done. docs/performance.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from confluent_kafka import KafkaException

from benchmarks import drain, engine, latency, peers, results
from benchmarks.drain import TUNED, BareLoop
from benchmarks.lanes import (
    BareTransactions,
    Fcluster,
    KafkaStreams,
    Lane,
    PyFlink,
    QuixStreams,
    WrongTreeError,
)
from benchmarks.machine import commit_of, describe_machine, describe_versions
from benchmarks.plots import FIGURES
from benchmarks.results import Round, ScenarioResult, Spread
from benchmarks.scenarios import SCENARIOS, Scenario, UnknownScenarioError, choose
from benchmarks.support import Names, Place, parser, place, settings_of, topics
from benchmarks.svg import show_number
from tests.harness import REPOSITORY

Measure = Callable[[], dict[str, float]]

FLOOR = "floor"
OTHER = "other checkout"
ENGINE_ROUNDS = 5
ENGINE_TIMEOUT_S = 600


@dataclass(frozen=True)
class Lanes:
    """Who takes part.

    Attributes:
        jobs: run the jobs; the first is fcluster of this tree.
        failures: who can't take part, and why.
    """

    jobs: Sequence[Lane]
    failures: Sequence[str]

    def pairs(self, scenario: Scenario) -> list[tuple[str, str]]:
        """Whose ratios are told: this fcluster's to each of the others."""
        ours = self.jobs[0].name
        return [(ours, name) for name in (*[lane.name for lane in self.jobs[1:]], *yardsticks(scenario))]


def yardsticks(scenario: Scenario) -> list[str]:
    """The names of what is measured besides jobs."""
    if not scenario.yardsticks:
        return []
    return [loop.name for loop in BARE_LOOPS] if scenario.kind == "drain" else [BARE.name, FLOOR]


BARE_LOOPS = (BareLoop("bare loop"), BareLoop("tuned bare loop", TUNED))
BARE = BareTransactions()


FAILURES = (
    AssertionError,  # a process has ended
    KafkaException,
    OSError,  # TimeoutError is one
    RuntimeError,
    ValueError,  # nothing was seen
    queue.Empty,  # a probe doesn't answer
    subprocess.SubprocessError,
    peers.NoPeerError,
)
"""What makes one measurement fail; the others go on."""


# --- one scenario -----------------------------------------------------------------------------------------


def run_scenario(scenario: Scenario, lanes: Lanes, at: Place | None, rounds: int) -> ScenarioResult:
    """Measure all lanes in turns.

    Args:
        at: not needed by scenarios without Kafka.
    """
    print(f"{scenario.name}: {scenario.about}", flush=True)
    if scenario.kind == "engine":
        return measure_rounds(scenario, lanes, rounds, engine_measures(lanes))
    assert at is not None
    source = Names.new()
    with topics(at.brokers, source, scenario.task.partitions):
        if scenario.kind == "drain":
            drain.fill(at.brokers, source.source, scenario.input)
        return measure_rounds(scenario, lanes, rounds, job_measures(scenario, lanes, at, source))


def measure_rounds(
    scenario: Scenario, lanes: Lanes, rounds: int, measures: dict[str, Measure]
) -> ScenarioResult:
    """Each measure once a round; one that fails is noted, and the others go on. Round 0 doesn't count."""
    found: list[Round] = []
    failures = list(lanes.failures)
    for number in range(0 if scenario.warms_up else 1, rounds + 1):
        for lane in list(measures) if number % 2 else reversed(list(measures)):
            try:
                figures = measures[lane]()
            except FAILURES as error:
                failures.append(f"{lane}, round {number}: {type(error).__name__}: {error}")
                print(f"  {failures[-1]}", flush=True)
                continue
            if number:
                found.append(Round(number, lane, figures))
                show(scenario.kind, lane, figures)
    spreads, ratios = results.summarise(found, lanes.pairs(scenario))
    result = ScenarioResult(
        scenario.name, scenario.about, scenario.kind, scenario.settings(), found, spreads, ratios, failures
    )
    show_summary(result, rounds)
    return result


def job_measures(scenario: Scenario, lanes: Lanes, at: Place, source: Names) -> dict[str, Measure]:
    """By lane. Drains read the same source; latencies write to one of their own."""
    task = scenario.task

    def drain_by(lane: Lane) -> Measure:
        def measured() -> dict[str, float]:
            names = Names.new(source.source)
            with topics(at.brokers, names, task.partitions):
                return drain.measure(lane, at, names, task, scenario.input.records, scenario.split_at)

        return measured

    def latency_by(lane: Lane | None) -> Measure:
        def measured() -> dict[str, float]:
            names = Names.new()
            with topics(at.brokers, names, task.partitions):
                if lane is None:
                    return latency.measure_floor(at, task.partitions, names, scenario.load)
                return latency.measure(lane, at, names, task, scenario.load)

        return measured

    def bare_by(loop: BareLoop) -> Measure:
        return lambda: drain.measure_bare(loop, at, source, task.partitions, scenario.input.records)

    by = drain_by if scenario.kind == "drain" else latency_by
    found = {lane.name: by(lane) for lane in lanes.jobs}
    if scenario.yardsticks and scenario.kind == "drain":
        found |= {loop.name: bare_by(loop) for loop in BARE_LOOPS}
    elif scenario.yardsticks:
        found |= {BARE.name: latency_by(BARE), FLOOR: latency_by(None)}
    return found


def engine_measures(lanes: Lanes) -> dict[str, Measure]:
    """By lane, of those that are fcluster."""

    def engine_of(lane: Fcluster) -> Measure:
        def measured() -> dict[str, float]:
            # By its path, and without its directory on Python's path: `fcluster` is then the other tree's.
            command = [sys.executable, "-P", engine.__file__, "--json", "--rounds", str(ENGINE_ROUNDS)]
            done = subprocess.run(
                command,
                env=os.environ | lane.environment(),
                capture_output=True,
                text=True,
                timeout=ENGINE_TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-500:])
            figures: dict[str, float] = {}
            for case, (engine_us, reference_us) in json.loads(done.stdout).items():
                name = case.replace(" ", "_")
                figures |= {f"{name}_us": engine_us, f"{name}_ratio": engine_us / reference_us}
            return figures

        return measured

    return {lane.name: engine_of(lane) for lane in lanes.jobs if isinstance(lane, Fcluster)}


# --- what is printed --------------------------------------------------------------------------------------


def show(kind: str, lane: str, figures: dict[str, float]) -> None:
    """One line: a lane in a round."""
    shown = [
        f"{show_number(figures[name])} {text}" for name, text in FIGURES[kind].items() if name in figures
    ]
    print(f"  {lane:<16} " + ", ".join(shown), flush=True)


def show_summary(result: ScenarioResult, rounds: int) -> None:
    """Medians with their spreads, and ratios."""
    if rounds > 1:
        for lane, spreads in result.spreads.items():
            print(f"  {lane}, median of {rounds} rounds [least to most]:")
            for name, text in FIGURES[result.kind].items():
                if name in spreads:
                    print(f"    {show_spread(spreads[name])} {text}")
    for ratio in result.ratios:
        print(f"  {ratio.lane} / {ratio.by}:")
        for name, text in FIGURES[result.kind].items():
            if name in ratio.figures:
                print(f"    {show_spread(ratio.figures[name])} ({text})")
    sys.stdout.flush()


def show_spread(spread: Spread) -> str:
    """A median and how far it varies."""
    least, most = show_number(spread.least), show_number(spread.most)
    return f"{show_number(spread.median)} [{least} to {most}]"


PEERS: dict[str, Callable[[argparse.Namespace], Lane]] = {
    "kafka-streams": lambda arguments: KafkaStreams(
        peers.resolve(), arguments.streams_store, arguments.streams_heap_mb
    ),
    "quix-streams": lambda _arguments: QuixStreams(peers.resolve_quix()),
    "pyflink": lambda arguments: PyFlink(
        peers.resolve_flink(), arguments.flink_mode, arguments.flink_heap_mb
    ),
}
"""What `--peer` takes: each fetches what it needs, or raises `peers.NoPeerError`."""


# --- the whole --------------------------------------------------------------------------------------------


def lanes_of(arguments: argparse.Namespace) -> Lanes:
    """Who takes part, by the options.

    Raises:
        WrongTreeError: there is no fcluster in the other checkout.
    """
    settings, failures = settings_of(arguments), list[str]()
    jobs: list[Lane] = [Fcluster("fcluster", settings)]
    if arguments.compare:
        other = Fcluster(OTHER, settings, arguments.compare.resolve())
        other.check()
        jobs.append(other)
    for peer in arguments.peers:
        try:
            jobs.append(PEERS[peer](arguments))
        except peers.NoPeerError as error:
            failures.append(f"without {peer}: {error}")
            print(failures[-1], flush=True)
    return Lanes(jobs, failures)


def versions_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Of everything, and the commits of the checkouts."""
    found = describe_versions() | {"commit": commit_of(REPOSITORY)}
    if "kafka-streams" in arguments.peers:
        found["Kafka Streams"] = peers.streams_version()
    if "quix-streams" in arguments.peers:
        found["Quix Streams"] = peers.QUIX.partition("==")[2]
    if "pyflink" in arguments.peers:
        found["PyFlink"] = peers.FLINK.partition("==")[2]
    if arguments.compare:
        found[f"commit of {OTHER}"] = commit_of(arguments.compare)
    return found


def new_parser() -> argparse.ArgumentParser:
    """The options."""
    made = parser(__doc__, partitions=None)
    made.add_argument("--list", action="store_true", help="List the scenarios and end.")
    made.add_argument(
        "--scenario",
        dest="scenarios",
        action="append",
        default=[],
        metavar="NAME",
        help="Measure only this one; repeat it for more. A pattern like 'state-*' works, too.",
    )
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument(
        "--scale", type=float, default=1.0, help="A factor for all counts of records: 0.01 is a smoke run."
    )
    made.add_argument(
        "--peer",
        dest="peers",
        action="append",
        choices=PEERS,
        default=[],
        help="Measure another system besides; repeat it for more.",
    )
    made.add_argument("--streams-store", choices=("rocksdb", "memory"), default="rocksdb")
    made.add_argument("--streams-heap-mb", type=int, default=512)
    made.add_argument("--flink-mode", choices=("thread", "process"), default="thread")
    made.add_argument("--flink-heap-mb", type=int, default=512)
    made.add_argument(
        "--compare", type=Path, metavar="DIR", help="Measure the fcluster of another checkout besides."
    )
    made.add_argument("--out", type=Path, default=Path("bench-results.json"), metavar="FILE")
    return made


def main(arguments: argparse.Namespace) -> int:
    """Run and print; 1 if something couldn't be measured, 2 if the options are wrong."""
    if arguments.list:
        for scenario in SCENARIOS:
            print(f"  {scenario.name:<22} {scenario.about}")
        return 0
    try:
        chosen = [scenario.scaled(arguments.scale) for scenario in choose(arguments.scenarios)]
        lanes = lanes_of(arguments)
    except (UnknownScenarioError, WrongTreeError) as error:
        print(error, file=sys.stderr)
        return 2
    began_at = datetime.now(UTC).isoformat(timespec="seconds")
    machine, versions, done = describe_machine(), versions_of(arguments), list[ScenarioResult]()

    def measure(scenarios: Sequence[Scenario], at: Place | None) -> None:
        for scenario in scenarios:
            done.append(run_scenario(scenario, lanes, at, arguments.rounds))
            results.write(
                arguments.out,
                results.Results(
                    results.FORMAT,
                    began_at,
                    sys.argv[1:],
                    arguments.rounds,
                    arguments.scale,
                    machine,
                    versions,
                    settings_of(arguments),
                    done,
                ),
            )

    try:
        measure([scenario for scenario in chosen if scenario.kind == "engine"], None)
        with_kafka = [scenario for scenario in chosen if scenario.kind != "engine"]
        if with_kafka:
            with place(arguments.brokers) as at:
                measure(with_kafka, at)
    except KeyboardInterrupt:
        print("broken off", file=sys.stderr)
    if done:
        print(f"results: {arguments.out}")
    failed = sum(bool(result.failures) for result in done)
    return 1 if failed or len(done) < len(chosen) else 0


if __name__ == "__main__":
    sys.exit(main(new_parser().parse_args()))
