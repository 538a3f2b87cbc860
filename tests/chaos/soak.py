"""A random mixture of all faults for a given time: `python -m tests.chaos.soak --minutes 30 --seed 7`.

Responsible for: one run on its own broker, in rounds. In each round faults happen (`plan`, `fault_player`),
then everything is healed and progress is demanded. Records are judged as they come (`checker.stream`), so a
long run needs no more memory than a short one. At the end everything is judged as in every chaos test, and a
table shows what was done. The seed determines job, copies and schedule. It is printed, and gives the same
run again.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos import leftovers, plan, tally
from tests.chaos.damage import Snapshots
from tests.chaos.disks import small_disk
from tests.chaos.fault_player import FaultPlayer, SoakCluster
from tests.chaos.network import COORDINATOR as WAY_TO_COORDINATOR
from tests.chaos.network import BrokerFor, Island, NoIslandError, island
from tests.chaos.runner import (
    CATCH_UP_S,
    FAULT_AFTER_S,
    FAULT_BEFORE_S,
    GROUPS,
    PLAIN,
    RECOVERY_S,
    REGROUPED,
    Chaos,
    Complaints,
)
from tests.chaos.state import check_state
from tests.chaos.trio import Trio
from tests.checker.check import check_no_open_transactions, wait_until_committed
from tests.checker.stream import StreamCheck
from tests.checker.verdict import Verdict
from tests.harness import memory_bytes, wait_until

WORKERS = 3
SNAPSHOT_DISK_KB = 400_000
SETTINGS = {
    "snapshot.interval.ms": 2000,
    # Without a coordinator that could commit or fence, only the broker can end them.
    "transaction.timeout.ms": 6000,
}
TRIO_SETTINGS = {
    "snapshot.interval.ms": 2000,
    # A broker's session may end within an epoch, and other brokers have to take over.
    "checkpoint.timeout.ms": 30_000,
    "session.timeout.ms": 3000,
}


@dataclass(frozen=True)
class Choice:
    """What the seed chose for the whole run."""

    job_file: str
    replicas: int

    @staticmethod
    def of(seed: int) -> Choice:
        """Every combination in turn, from one seed to the next."""
        return Choice((PLAIN, REGROUPED)[seed % 2], (1, 0)[seed // 2 % 2])


class SoakRun(Chaos):
    """A run whose records are judged as they come, and aren't kept."""

    reads_all_markers = False
    stream: StreamCheck = None  # type: ignore[assignment]  # set as soon as the run is entered

    def _start_readers(self) -> None:
        groups = GROUPS if self.job_file == REGROUPED else 0
        self.stream = StreamCheck(self.brokers, self.source, self.output, groups).start()

    def _read_between(self) -> None:
        pass

    def _stop_readers(self) -> None:
        if self.stream is not None:
            self.stream.stop()

    def newest_ns(self) -> dict[int, int]:
        self.stream.check()
        return self.stream.newest_ns

    def finish(self, title: str) -> Verdict:
        """As in every run, from what was judged during the run."""
        assert self._generator is not None
        complaints = Complaints()
        snapshots = Snapshots(self.data_dir / "snapshots" / self.job / self.stage)
        wait_until(snapshots.all_whole, "damaged snapshots are replaced", RECOVERY_S, 0.2)
        written = self._generator.stop()
        wait_until_committed(self.brokers, self.job, self.topics_read, CATCH_UP_S)
        self.cluster.assert_alive()
        with complaints:
            self._descriptors.judge()
        with complaints:
            codes = self.cluster.terminate()
            assert set(codes.values()) == {0}, f"exit codes {codes}"
        verdict = self.stream.finish()
        verdict.title = title
        verdict.merge(check_no_open_transactions(self.brokers, self.job, self.output))
        expected = self.stream.fold.state()
        verdict.merge(
            check_state(
                self.brokers, self.job, self.stage, self.topics_read[-1], "totals", expected, self.data_dir
            )
        )
        self._read_markers(verdict, complaints)
        for fault in self.faults:
            fault.aborted = self.stream.aborted.between(
                fault.time_ns - FAULT_BEFORE_S * 1e9, fault.time_ns + FAULT_AFTER_S * 1e9
            )
        with complaints:
            assert verdict.ok, verdict.report()
        with complaints:
            inputs = verdict.inputs - verdict.repeated_inputs
            assert inputs == written, f"{inputs} of {written} records were committed"
        self._judge_leftovers(complaints)
        complaints.finish()
        tally.SESSION.extend(self.faults)
        return verdict


@dataclass
class Report:
    """How a soak went. `epochs`: counted by the coordinators that led at the ends of rounds."""

    seed: int
    seconds: float
    faults: list[tally.Fault]
    verdict: Verdict
    epochs: int
    aborted: int
    memory_before_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        before, after = self.memory_before_bytes / 2**20, self.memory_bytes / 2**20
        return "\n".join(
            [
                tally.table(self.faults),
                f"seed {self.seed}, {self.seconds:.0f} s, {self.epochs} epochs at least",
                f"{self.verdict.inputs} records, {self.aborted} outputs aborted",
                f"memory of the checker: {before:.0f} MB when the faults began, {after:.0f} MB at its peak",
                self.verdict.report(),
            ]
        )


def soak(
    kafka: BrokerFor | Trio,
    place: Island | None,
    name: str,
    data_dir: Path,
    *,
    seed: int,
    seconds: float,
    say: Callable[[str], None] = print,
) -> Report:
    """Run it.

    Args:
        kafka: the brokers, which may be disturbed.
        place: a place that can reach them. None if there are no network namespaces here.
        name: the prefix of all names in Kafka.
        data_dir: the cluster's data directory.
        seed: the seed of everything that is drawn.
        seconds: how long faults happen, without the healing.
        say: called with what is done, line by line.

    Raises:
        AssertionError, TimeoutError: something is wrong. The message says what; the seed was printed before.
    """
    choice = Choice.of(seed)
    say(f"soak with SEED={seed}: {choice.job_file}, {choice.replicas} warm copies, {seconds:.0f} s of faults")
    trio = isinstance(kafka, Trio)
    settings: dict[str, object] = {
        **(TRIO_SETTINGS if trio else SETTINGS),
        "num.standby.replicas": choice.replicas,
    }
    if place is not None:
        settings |= {
            "coordinator.bind": f"tcp://{place.ways[WAY_TO_COORDINATOR].service}:0",
            "insecure": True,
        }
    with ExitStack() as stack:
        disk = _disk(stack, data_dir / "snapshots", say)
        cluster_type = type("IslandCluster", (SoakCluster,), {"place": place})
        run = SoakRun(
            kafka.servers,
            name,
            data_dir,
            job_file=choice.job_file,
            workers=WORKERS,
            slots=plan.SLOTS,
            settings=settings,
            cluster_type=cluster_type,
            kafka_dir=kafka.cluster.data_dir if isinstance(kafka, Trio) else None,
        )
        stack.enter_context(run)
        player = FaultPlayer(run, kafka, place, disk, say)
        began_s, memory_before = time.monotonic(), memory_bytes("self")
        epochs: dict[int, int] = {}
        for one in plan.rounds(seed, seconds, WORKERS, plan.TRIO_WEIGHTS if trio else plan.WEIGHTS):
            say(
                f"round {one.number}: {len(one.faults)} faults in {one.lasts_s:.0f} s"
                + (", with a standby coordinator" if one.standby_coordinator else "")
            )
            player.play(one)
            run.stream.check()
            leftovers.await_snapshots_collected(data_dir / "snapshots")
            verdict, status = run.stream.fold.verdict, run.cluster.status()
            if status is not None:
                epochs[status["term"]] = status["counters"]["epochs"]
            left = run.stream.fold.under_way
            say(f"           healed, going on: {verdict.inputs} records, {left} of them under way")
        verdict = run.finish(f"soak of seed {seed}")
        return Report(
            seed,
            time.monotonic() - began_s,
            run.faults,
            verdict,
            sum(epochs.values()),
            len(run.stream.aborted.times_ns),
            memory_before,
            memory_bytes("self", "VmHWM"),
        )


def _disk(stack: ExitStack, path: Path, say: Callable[[str], None]) -> Path | None:
    try:
        return stack.enter_context(small_disk(path, SNAPSHOT_DISK_KB))
    except pytest.skip.Exception as why:
        say(f"disk full is left out: {why}")
        return None


def main() -> int:
    """Run one soak. Returns 0 if all was well."""
    arguments = _parse()
    seed = random.SystemRandom().randrange(100_000) if arguments.seed is None else arguments.seed
    folder = Path(tempfile.mkdtemp(prefix="fcluster-soak-"))
    again = f"make soak MINUTES={arguments.minutes:g} SEED={seed} BROKERS={arguments.brokers}"
    say = _saying
    say(f"the same again: {again}; logs are in {folder}")
    with ExitStack() as stack:
        place, kafka = _kafka(stack, folder / "kafka", arguments.brokers, say)
        try:
            report = soak(
                kafka, place, "soak-", folder / "data", seed=seed, seconds=arguments.minutes * 60, say=say
            )
        except BaseException as error:
            traceback.print_exception(error)  # some have no message
            first = error.__context__ or error  # ending everything may fail too
            say(f"FAILED: {type(first).__name__}: {first}\nthe same again: {again}; logs are in {folder}")
            if isinstance(error, AssertionError | TimeoutError):
                return 1
            raise
        say(str(report))
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _kafka(
    stack: ExitStack, directory: Path, count: int, say: Callable[[str], None]
) -> tuple[Island | None, BrokerFor | Trio]:
    """The brokers, and a network for one worker that can reach them. With three brokers, one of them has such
    a network instead.
    """
    if count == 3:
        trio = stack.enter_context(Trio(directory))
        if trio.island is None:
            say(f"cuts of a broker are left out: {trio.why_no_island}")
        return None, trio
    try:
        place = stack.enter_context(island())
    except NoIslandError as why:
        place = None
        say(f"network cuts are left out: {why}")
    return place, stack.enter_context(BrokerFor(directory, place))


def _saying(line: str) -> None:
    print(line, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="of faults; healing and judging come on top"
    )
    parser.add_argument(
        "--brokers", type=int, choices=(1, 3), default=1, help="3: they get faults of their own"
    )
    parser.add_argument("--seed", type=int, help="of an earlier run: the same schedule again")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
