"""Does to a running cluster what a plan says, and heals it again.

Responsible for: beginning each fault at its time and ending it at its time, without waiting in between, so
that faults overlap; distinguishing the end of a process that a fault explains from one that it doesn't; and
healing everything. Each fault is reported, with its time, when it happens.

What a plan asks for may be impossible when its time has come: another fault has already hit the process, or
the host can't do it. Then it is reported as left out, and isn't counted.
"""

from __future__ import annotations

import errno
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from pathlib import Path

import zmq

from fcluster.common.errors import FclusterError
from fcluster.common.exit_codes import ExitCode
from fcluster.common.failpoints import Arm
from fcluster.common.failures import Failure
from fcluster.common.processes import describe_exit
from fcluster.common.settings import resolve
from fcluster.wire import messages
from fcluster.wire.discovery import Leader, find_leader
from tests.chaos import tally
from tests.chaos.cluster import Mark
from tests.chaos.damage import Snapshots, damage_newest
from tests.chaos.disks import fill, is_full, make_room
from tests.chaos.network import COORDINATOR as WAY_TO_COORDINATOR
from tests.chaos.network import KAFKA, BrokerFor, Island
from tests.chaos.plan import ISLANDER, SLOTS, Planned, Round
from tests.chaos.runner import Chaos
from tests.chaos.trio import STANDBY, NotWholeError, Trio, TwoCoordinators
from tests.harness import COORDINATOR, Slowness, wait_until, worker_name

TICK_S = 0.02
FRAMES_AT_ONCE = 500
HEALED_S = 60.0
"""On a quiet machine; on a slower one it is longer in proportion."""

Heal = Callable[[], None]


class LeftOut(Exception):  # noqa: N818  not an error
    """A fault isn't possible at present. The message says why."""


class SoakCluster(TwoCoordinators):
    """A cluster that sometimes has a second coordinator, and one worker on an island, if there is one."""

    place: Island | None = None

    def prefix_of(self, name: str) -> Sequence[str]:
        return self.place.prefix if self.place is not None and name == worker_name(ISLANDER) else ()

    def running(self, name: str) -> bool:
        """Whether it was started and hasn't ended."""
        return name in self._running and self._running[name].poll() is None

    def ended(self) -> dict[str, int]:
        """The processes that have ended and weren't forgotten, with their exit codes."""
        codes = {name: child.poll() for name, child in self._running.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def drop(self, name: str) -> None:
        """Forget a process that has ended."""
        del self._running[name]

    def names(self, kind: str) -> list[str]:
        """The processes that run and whose names begin with this."""
        return sorted(name for name in self._running if name.startswith(kind) and self.running(name))


class FaultPlayer:
    """Causes the planned faults of one run, and ends them.

    Args:
        run: the run. Its cluster is a SoakCluster.
        kafka: the Kafka that it runs on, which may be disturbed.
        place: the island of one worker. None if there is none.
        disk: a small disk with the snapshots. None if there is none.
        say: called with a line for each fault.
    """

    def __init__(
        self,
        run: Chaos,
        kafka: BrokerFor | Trio,
        place: Island | None,
        disk: Path | None,
        say: Callable[[str], None],
    ) -> None:
        assert isinstance(run.cluster, SoakCluster)
        self._run = run
        self._cluster = run.cluster
        self._kafka = kafka
        self._place = place
        self._disk = disk
        self._say = say
        self._size = run.workers
        self._draw = random.Random(0)
        self._snapshots = Snapshots(run.data_dir / "snapshots" / run.job / run.stage)
        self._began_s = time.monotonic()
        self._disturbed: set[str] = set()
        self._allowed: dict[str, set[int]] = {}
        self._broker_away = False
        self._broker_was_away = False
        self._broker_disturbed = False
        self._heals: list[tuple[float, Planned, Heal]] = []

    @property
    def workers(self) -> int:
        """How many workers there are when everything is healed."""
        return self._size

    def play(self, planned_round: Round) -> None:
        """Do all of it, heal, and demand progress.

        Raises:
            AssertionError: a process ended and no fault explains it.
            TimeoutError: the cluster doesn't continue completely.
        """
        try:
            self._play(planned_round)
        except BaseException:
            for _, _, heal in self._heals:  # some faults are threads, which would never end
                with suppress(Exception):
                    heal()
            raise

    def _play(self, planned_round: Round) -> None:
        self._draw = random.Random(planned_round.number)
        self._broker_was_away = False
        began_s = time.monotonic()
        if planned_round.standby_coordinator:
            self._cluster.start_coordinator(STANDBY if self._cluster.running(COORDINATOR) else COORDINATOR)
        todo = list(planned_round.faults)
        while todo or time.monotonic() < began_s + planned_round.lasts_s:
            now_s = time.monotonic() - began_s
            while todo and todo[0].at_s <= now_s:
                self._begin(todo.pop(0))
            self._heal_due(time.monotonic())
            self._look()
            time.sleep(TICK_S)
        self._heal_due(float("inf"))
        self._kafka.wait_whole()
        self._await_progress()
        self._end_standby()
        for name in self._cluster.ended():
            self._cluster.drop(name)  # the worker has left the cluster
        self._allowed.clear()

    def _await_progress(self) -> None:
        """Start what has ended, and wait until all workers run, all shards run on them, and committed output
        flows.
        """
        since_ns = time.time_ns()
        for name in self._cluster.names(""):
            self._cluster.resume(name)  # a process that stopped itself while its arm was being removed

        def goes_on() -> bool:
            self._look()
            for slot in range(self._size):
                self._restart(worker_name(slot))
            if not self._coordinators():
                self._cluster.start_coordinator()
            return all(
                newest_ns > since_ns for newest_ns in self._run.newest_ns().values()
            ) and self._cluster.shards_running(self._size)

        what = f"{self._size} workers run all shards, and output flows"
        began_s = time.monotonic()
        with Slowness() as machine:
            wait_until(goes_on, what, HEALED_S * Slowness.MOST, 0.1)
        took_s, most_s = time.monotonic() - began_s, HEALED_S * machine.leeway
        assert took_s <= most_s, f"{what}: took {took_s:.0f} s, and the limit is {most_s:.0f} s"

    # --- turns -----------------------------------------------------------------------------------------

    def _begin(self, planned: Planned) -> None:
        at_s = time.monotonic() - self._began_s
        try:
            heal = self._faults()[planned.kind](planned)
        except LeftOut as why:
            self._say(f"{at_s:7.1f} s  {planned}: left out, {why}")
            return
        self._say(f"{at_s:7.1f} s  {planned}")
        if heal is not None:
            self._heals.append((time.monotonic() + planned.lasts_s, planned, heal))
            self._heals.sort(key=lambda entry: entry[0])

    def _heal_due(self, now_s: float) -> None:
        while self._heals and self._heals[0][0] <= now_s:
            _, _, heal = self._heals.pop(0)
            heal()

    def _look(self) -> None:
        """Whether a process has ended that should not have.

        If a process found no broker when it was started, it is started again, as a supervisor would do.
        """
        for name, code in self._cluster.ended().items():
            if code == ExitCode.TEMPORARY and self._broker_was_away:
                self._say(f"           {name} found no broker: started again")
                self._restart(name)
                continue
            if code not in self._allowed.get(name, set()):
                raise AssertionError(f"{name} ended: {describe_exit(code)}\n{self._cluster.log(name)}")

    def _faults(self) -> dict[str, Callable[[Planned], Heal | None]]:
        return {
            tally.WORKER_KILLED: self._kill_worker,
            tally.KILLED_IN_MOVE: self._kill_worker,
            tally.ALL_KILLED: self._kill_all,
            tally.COORDINATOR_KILLED: self._kill_coordinator,
            tally.COORDINATOR_STOPPED: self._stop_coordinators,
            tally.TRANSACTION_EXPIRED: self._stop_coordinators,
            tally.WORKER_STOPPED: self._stop_worker,
            tally.WORKER_SLOWED: self._slow_worker,
            tally.NETWORK_CUT: self._cut,
            tally.BROKER_AWAY: self._disturb_broker,
            tally.BROKER_KILLED: self._disturb_broker,
            tally.BROKER_STOPPED: self._disturb_broker,
            tally.BROKER_HUNG: self._disturb_broker,
            tally.BROKER_CUT: self._disturb_broker,
            tally.LEADERS_MOVED: self._disturb_broker,
            tally.STATE_LOST: self._lose_state,
            tally.SNAPSHOT_DAMAGED: self._damage_snapshot,
            tally.IO_ERRORS: self._io_errors,
            tally.DISK_FULL: self._fill_disk,
            tally.FRAMES: self._send_frames,
            tally.RESCALED: self._rescale,
        }

    def _note(self, planned: Planned, detail: str = "", time_ns: int | None = None, shown: str = "") -> None:
        self._run.note(planned.kind, f"{planned}{detail}", time_ns, shown=shown)

    # --- processes -------------------------------------------------------------------------------------

    def _worker(self, planned: Planned) -> str:
        """The name of the worker, if it can be disturbed."""
        name = worker_name(planned.slot)
        if planned.slot >= self._size or not self._cluster.running(name) or name in self._disturbed:
            raise LeftOut("it isn't running, or is disturbed already")
        return name

    def _disturbs(self, name: str, *codes: int) -> None:
        """It is disturbed until `_undisturbed`. In this round it may end with one of these codes."""
        self._disturbed.add(name)
        self._allowed.setdefault(name, set()).update(codes)

    def _undisturbed(self, name: str) -> None:
        """It is no longer disturbed. If it has ended, it is started again."""
        self._disturbed.discard(name)
        self._restart(name)

    def _restart(self, name: str) -> None:
        """Start it again if it has ended and still belongs to the cluster."""
        if self._cluster.running(name):
            return
        if not name.startswith("worker"):
            self._cluster.start_coordinator(name)
        elif int(name.rpartition("-")[2]) < self._size:
            self._cluster.start_worker(int(name.rpartition("-")[2]))
        else:
            self._cluster.drop(name)

    def _kill(self, name: str) -> None:
        """`kill -9`, even if the process is stopped."""
        self._disturbs(name, -signal.SIGKILL)
        self._cluster.child(name).kill()

    def _kill_worker(self, planned: Planned) -> Heal:
        name = self._worker(planned)
        if not planned.how:
            self._note(planned)
            self._kill(name)
            return lambda: self._undisturbed(name)
        return self._kill_at(planned, name)

    def _kill_at(self, planned: Planned, name: str) -> Heal:
        """Kill it at a failpoint, if it gets there in time."""
        point = planned.how
        self._disturbs(name, -signal.SIGKILL)
        in_commit = point == "worker.commit"
        self._cluster.arm(name, point, Arm("kill", after_ms=int(in_commit), in_background=in_commit))

        def heal() -> None:
            mark = self._take_mark(name, point)
            if mark is None:
                self._say(f"           {planned}: it didn't get there")
            else:
                self._cluster.child(name).wait(10)
                self._note(planned, time_ns=mark.time_ns, shown=f"at the step, {mark.detail}")
            self._undisturbed(name)

        return heal

    def _take_mark(self, name: str, point: str) -> Mark | None:
        """Disarm the point. Returns what the process left there, if it was there."""
        self._cluster.disarm(name, point, keep_mark=True)
        time.sleep(0.05)  # it may have read the arm just before that
        mark = self._cluster.mark(name, point)
        self._cluster.disarm(name, point)
        return mark

    def _kill_all(self, planned: Planned) -> Heal:
        names = self._cluster.names("worker")
        self._note(planned)
        for name in names:
            self._kill(name)
        return lambda: self._all_undisturbed(names)

    def _all_undisturbed(self, names: Sequence[str]) -> None:
        for name in names:
            self._undisturbed(name)

    def _kill_coordinator(self, planned: Planned) -> Heal:
        name = self._leader()
        if planned.how:
            return self._kill_at(planned, name)
        self._note(planned, shown=self._open_epoch())
        self._kill(name)
        return lambda: self._undisturbed(name)

    def _leader(self) -> str:
        """The coordinator that leads, if it can be disturbed."""
        leader = self._find_leader()
        names = {self._cluster.child(name).pid: name for name in self._coordinators()}
        if leader is None or leader.pid not in names:
            raise LeftOut("no coordinator leads")
        name = names[leader.pid]
        if name in self._disturbed:
            raise LeftOut("it is disturbed already")
        return name

    def _coordinators(self) -> list[str]:
        return [name for name in (COORDINATOR, STANDBY) if self._cluster.running(name)]

    def _stop(self, names: Sequence[str], *codes: int) -> Heal:
        """Send SIGSTOP, and later SIGCONT."""
        for name in names:
            self._disturbs(name, *codes)
            self._cluster.child(name).send_signal(signal.SIGSTOP)

        def go_on() -> None:
            for name in names:
                self._cluster.child(name).send_signal(signal.SIGCONT)
                self._undisturbed(name)

        return go_on

    def _stop_coordinators(self, planned: Planned) -> Heal:
        names = self._coordinators()
        if not names or any(name in self._disturbed for name in names):
            raise LeftOut("the coordinator is disturbed already")
        self._note(planned, shown="" if planned.kind == tally.TRANSACTION_EXPIRED else self._open_epoch())
        return self._stop(names)

    def _stop_worker(self, planned: Planned) -> Heal:
        name, point = self._worker(planned), planned.how
        # When it continues, its own watchdog may find that it hung.
        if not point:
            self._note(planned, shown=self._open_epoch())
            return self._stop([name], ExitCode.CRASHED)
        self._disturbs(name, ExitCode.CRASHED)
        self._cluster.arm(name, point, Arm("stop"))

        def go_on() -> None:
            mark = self._take_mark(name, point)
            if mark is None:
                self._say(f"           {planned}: it didn't get there")
            else:
                self._note(planned, time_ns=mark.time_ns, shown=f"at the step, {mark.detail}")
            self._cluster.child(name).send_signal(signal.SIGCONT)
            self._undisturbed(name)

        return go_on

    def _slow_worker(self, planned: Planned) -> Heal:
        name = self._worker(planned)
        self._disturbs(name, ExitCode.CRASHED)
        return self._while(self._cluster.slowed(name, times=10), planned, name)

    def _while(self, fault: AbstractContextManager[None], planned: Planned, name: str) -> Heal:
        """Enter `fault` now, and leave it when it is healed."""
        stack = ExitStack()
        stack.enter_context(fault)
        self._note(planned, shown=self._open_epoch())

        def leave() -> None:
            stack.close()
            self._undisturbed(name)

        return leave

    def _rescale(self, planned: Planned) -> None:
        names = [worker_name(slot) for slot in range(SLOTS)]
        leaving = [name for name in names[self._size :] if self._cluster.running(name)]
        if leaving or self._disturbed.intersection(names):
            raise LeftOut("a worker is disturbed already, or still leaving")
        former, self._size = self._size, planned.number
        for name in names[former : planned.number]:
            self._restart(name)
        for name in names[planned.number : former]:
            # One that has just been started doesn't handle the signal yet.
            self._allowed.setdefault(name, set()).update({0, -signal.SIGTERM})
            self._cluster.child(name).terminate()
        self._note(planned, f" from {former}", shown=self._open_epoch())

    # --- what is around them ---------------------------------------------------------------------------

    def _cut(self, planned: Planned) -> Heal:
        place = self._place
        if place is None:
            raise LeftOut("no worker has a network of its own here")
        name = self._worker(planned)
        self._disturbs(name, ExitCode.CRASHED)
        cut = {
            "cut off from the coordinator": partial(place.cut, WAY_TO_COORDINATOR),
            "not heard by the coordinator": partial(place.drop_outgoing, WAY_TO_COORDINATOR),
            "deaf to the coordinator": partial(place.drop_incoming, WAY_TO_COORDINATOR),
            "no Kafka": partial(place.cut, KAFKA),
        }[planned.how]
        return self._while(cut(), planned, name)

    def _disturb_broker(self, planned: Planned) -> Heal:
        shown = self._open_epoch()
        try:
            which, heal = self._kafka.take_away(planned.how, self._draw)
        except NotWholeError as why:
            raise LeftOut(str(why)) from None
        self._note(planned, f", {which}", shown=shown)
        self._broker_was_away = self._broker_disturbed = True
        self._broker_away = self._kafka.alone

        def bring_back() -> None:
            heal()
            self._broker_away = self._broker_disturbed = False

        return bring_back

    def _lose_state(self, planned: Planned) -> Heal:
        name = self._worker(planned)
        self._note(planned)
        self._kill(name)
        self._cluster.child(name).wait(10)
        shutil.rmtree(
            self._run.data_dir / "state" / self._run.job / f"slot-{planned.slot}", ignore_errors=True
        )
        return lambda: self._undisturbed(name)

    def _damage_snapshot(self, planned: Planned) -> None:
        why = damage_newest(self._snapshots, planned.number, planned.how)
        if why:
            raise LeftOut(why)
        self._note(planned, shown=self._open_epoch())

    def _io_errors(self, planned: Planned) -> Heal:
        name = self._worker(planned)
        if planned.how == "of its state":
            self._disturbs(name, ExitCode.MISTAKE, ExitCode.CRASHED)
            child = self._cluster.child(name)
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            self._note(planned, shown=self._open_epoch())

            def replace() -> None:
                self._kill(name)  # if it has not left by itself
                child.wait(10)
                self._undisturbed(name)

            return replace
        point = "worker.mid-snapshot"
        self._disturbs(name)
        self._cluster.arm(name, point, Arm("raise", errno=errno.EIO, every=True))
        self._note(planned, shown=self._open_epoch())

        def mend() -> None:
            self._cluster.disarm(name, point)
            self._undisturbed(name)

        return mend

    def _fill_disk(self, planned: Planned) -> Heal:
        disk = self._disk
        if disk is None:
            raise LeftOut("small file systems can't be mounted here")
        if is_full(disk):
            raise LeftOut("it is full already")
        fill(disk)
        self._note(planned, " (snapshots)", shown=self._open_epoch())
        return lambda: make_room(disk)

    def _send_frames(self, planned: Planned) -> None:
        """Send garbage, and forged messages in the name of sessions that are active."""
        status = None if self._broker_away else self._cluster.status()
        leader = self._find_leader()
        if status is None or leader is None:
            raise LeftOut("no coordinator answers")
        sessions = [worker["session"] for worker in status["workers"]] or [1]
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 200)
            socket.setsockopt(zmq.SNDTIMEO, 1000)
            socket.connect(leader.address)
            with suppress(zmq.Again):
                for _ in range(FRAMES_AT_ONCE):
                    socket.send(self._frame(sessions))
        finally:
            context.destroy()
        self._note(planned, f", {FRAMES_AT_ONCE} of them", shown=self._open_epoch())

    def _frame(self, sessions: list[int]) -> bytes:
        draw = self._draw
        session = draw.choice(sessions)
        good = messages.encode(
            draw.choice(
                [
                    messages.Goodbye(session),
                    messages.Drained(session),
                    messages.Committed(session, draw.randrange(2**40), 0.0, True, []),
                    messages.Prepared(session, draw.randrange(2**40), 1, 1.0, True),
                    messages.WorkerFailed(session, Failure.of_text("forged")),
                ]
            )
        )
        at = draw.randrange(len(good))
        return draw.choice(
            [good, good[:at], good + draw.randbytes(3), draw.randbytes(draw.randrange(1, 20_000))]
        )

    # --- looking ---------------------------------------------------------------------------------------

    def _open_epoch(self) -> str:
        """Evidence that an epoch is open. Empty if some leader can't be asked, or if none is open for a
        moment.
        """
        if self._broker_disturbed:
            return ""
        try:
            return self._run.open_epoch(1.0)
        except Exception:  # noqa: BLE001  another fault keeps Kafka from answering, so there is no evidence
            return ""

    def _find_leader(self) -> Leader | None:
        if self._broker_away:
            return None
        try:
            return find_leader(resolve({}, None, {}, {"brokers": self._run.brokers}), self._run.job, 3.0)
        except FclusterError:
            return None

    def _end_standby(self) -> None:
        """The next round may need to have no standby, so the one that stands by is killed. The other one
        leads.
        """
        leader, names = self._find_leader(), self._coordinators()
        if len(names) > 1 and leader is not None:
            for name in names:
                if self._cluster.child(name).pid != leader.pid:
                    self._cluster.kill(name)
