"""Keeps processes running, and shuts them down cleanly: those of `fcluster up`, and those of an agent.

Responsible for: starting processes, restarting those that die (with back-off), running the target number of
workers, ending all of them on a signal (the first one ends them cleanly, the second one kills them), and the
result. `Keeper` is the common part. `Supervisor` has a coordinator among its processes, and ends with it.
`Crew` has only workers, whose coordinator may be anywhere. Rules: no process outlives its keeper (children
die with it, see `processes`); every wait is bounded; every restart is logged. Must not parse options, draw,
or know what the processes do: it knows only their exit codes.

`common/exit_codes` says what the exit codes of the children mean. Every other code, and death by a signal,
counts as a crash.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fcluster.common.errors import FclusterError
from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Ended, Failure, FailureKind
from fcluster.common.processes import RestartBackoff, describe_exit

FAILURES_IN_A_ROW_MAX = 4
"""If a process has exited with an error this often in a row, without ever living for `LIFE_S_GOOD`, it won't
recover.
"""
LIFE_S_GOOD = 20.0
EXIT_GRACE_S = 5.0
"""How long to wait after asking a process to exit, before the next stronger measure."""
DRAIN_NEWS_INTERVAL_S = 5.0
COORDINATOR_SILENT_S_MAX = 10.0
"""If a coordinator doesn't answer a drain request for this long (because it hangs, or brokers are down), it
is told to exit.
"""
LEAVE_TIMEOUT_S = 55.0

LEFT_GRACE_S = 3.0
"""A worker that left cleanly is restarted if the coordinator hasn't exited within this time."""

COORDINATOR = "coordinator"
SUPERVISOR = "cluster"


class Child(Protocol):
    """A running process."""

    @property
    def pid(self) -> int: ...
    def wait(self) -> int:
        """Block until it has exited. Returns its exit code, or the negative number of the signal that killed
        it.
        """
        ...

    def failure(self) -> Failure | None:
        """Why it has exited, if it has reported that. Call it once, after `wait`."""
        ...

    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True)
class ProcessSpec:
    """A process to keep running."""

    name: str
    argv: tuple[str, ...]


Spawn = Callable[[ProcessSpec, Callable[[str], None]], Child]
"""Starts a process. The callback is called with each line that it writes, from any thread."""


MakeWorker = Callable[[int, int], ProcessSpec]
"""Returns the process of a worker, given its number here and the slot that it should get again (-1: none
yet).
"""


class Shower(Protocol):
    """Takes lines of output."""

    def line(self, name: str, text: str) -> None: ...


@dataclass(frozen=True)
class _Exited:
    name: str
    pid: int
    code: int
    failure: Failure | None


@dataclass(frozen=True)
class _Signalled:
    number: int


@dataclass(frozen=True)
class _Resized:
    target: int


@dataclass(frozen=True)
class _SlotsLearnt:
    slots: Mapping[int, int]


@dataclass(frozen=True)
class _JobEnded:
    ended: Ended


_Event = _Exited | _Signalled | _Resized | _SlotsLearnt | _JobEnded


@dataclass
class _Member:
    """A process that is kept running.

    Attributes:
        number: the number of a worker. -1: it isn't a worker.
        slot: the worker's slot, as far as is known.
        retiring: it was asked to exit and is no longer wanted. It is killed at `kill_at_s` if it hasn't
            exited.
        hopeless: it failed so often in a row that it won't recover by itself.
        failure: what its last process reported when it exited.
    """

    spec: ProcessSpec
    number: int = -1
    slot: int = -1
    retiring: bool = False
    kill_at_s: float | None = None
    child: Child | None = None
    starts: int = 0
    started_s: float = 0.0
    backoff: RestartBackoff = field(
        default_factory=lambda: RestartBackoff(first_ms=100, healthy_after_ms=int(LIFE_S_GOOD * 1000))
    )
    failures_in_a_row: int = 0
    hopeless: bool = False
    restart_at_s: float | None = None
    failure: Failure | None = None


class Keeper:
    """Keeps processes running until one of them, a signal or the caller ends it.

    Args:
        members: the processes, by name.
        spawn: starts a process.
        view: gets the processes' lines and the keeper's own.
        make_worker: returns the processes of additional workers, and of workers that are restarted with their
            slots. None: `resize` can't be used.
        on_change: called with the processes' ids by name whenever they change.
        exit_grace_s: how long to wait after asking a process to exit before the next stronger measure.
        leave_timeout_s: a worker that was asked to leave is killed after this time. Nothing is lost by that.
    """

    def __init__(
        self,
        members: dict[str, _Member],
        *,
        spawn: Spawn,
        view: Shower,
        make_worker: MakeWorker | None,
        on_change: Callable[[dict[str, int]], None],
        exit_grace_s: float,
        leave_timeout_s: float,
    ) -> None:
        self._members = members
        self._spawn = spawn
        self._view = view
        self._make_worker = make_worker
        self._on_change = on_change
        self._exit_grace_s = exit_grace_s
        self._leave_timeout_s = leave_timeout_s
        # A signal handler may put into a SimpleQueue while the same thread is inside `get`.
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._restarts = 0
        self._draining_since_s: float | None = None
        self._drain_news_s = 0.0
        self._drain_deadline_s: float | None = None
        self._ended = threading.Event()
        self._target = len(self._staying())

    @property
    def restarts(self) -> int:
        """How often processes were restarted."""
        return self._restarts

    @property
    def target(self) -> int:
        """The target number of workers. Workers that are being restarted count; those that are leaving
        don't.
        """
        return self._target

    def run(self) -> Ended:
        """Start everything, run until the end, and leave nothing running. Called by the main thread."""
        with self._signals_as_events():
            try:
                for member in self._members.values():
                    self._start(member)
                outcome = self._watch()
                return outcome if outcome.exit_code == ExitCode.INTERRUPTED else self._end_others(outcome)
            finally:
                self._ended.set()
                self._kill_all()

    def signal(self, number: int) -> None:
        """React to that signal: the first one ends all processes cleanly, the second one kills them. May be
        called from any thread.
        """
        self._events.put(_Signalled(number))

    def resize(self, target: int) -> None:
        """Run this many workers: start some, or let the newest ones leave. May be called from any thread."""
        self._events.put(_Resized(target))

    def learn_slots(self, slots: Mapping[int, int]) -> None:
        """Note workers' slots by process id, for use after a restart. May be called from any thread."""
        self._events.put(_SlotsLearnt(slots))

    # --- for subclasses ----------------------------------------------------------------------------

    def _judge_exit(self, member: _Member, code: int) -> Ended | None:
        """Decide about a wanted process that has exited."""
        raise NotImplementedError

    def _begin_drain(self) -> None:
        """React to the first signal."""
        raise NotImplementedError

    def _overdue(self) -> Ended:
        """The drain isn't over at `_drain_deadline_s`."""
        raise NotImplementedError

    def _is_over(self) -> Ended | None:
        """Called after each event."""
        return None

    def _gives_up(self) -> bool:
        """Whether to end everything because one process fails again and again."""
        return True

    # --- the loop ----------------------------------------------------------------------------------

    def _watch(self) -> Ended:
        while True:
            outcome = self._take(self._next_event()) or self._is_over()
            if outcome is not None:
                return outcome

    def _take(self, event: _Event | None) -> Ended | None:
        match event:
            case _Exited():
                return self._exited(event)
            case _Signalled():
                return self._signalled()
            case _Resized(target):
                self._resize(target)
            case _SlotsLearnt(slots):
                self._learn_slots(slots)
            case _JobEnded(ended):
                return replace(
                    ended, exit_code=ExitCode.DONE if ended.failure is None else ExitCode.JOB_FAILED
                )
            case None:
                return self._look_at_clock()
        return None

    def _next_event(self) -> _Event | None:
        """The next event. None when it is time to check the deadlines."""
        times = [m.restart_at_s for m in self._members.values() if m.restart_at_s is not None]
        times += [m.kill_at_s for m in self._members.values() if m.kill_at_s is not None]
        if self._draining_since_s is not None:
            times.append(self._drain_news_s)
        if self._drain_deadline_s is not None:
            times.append(self._drain_deadline_s)
        try:
            if not times:
                return self._events.get()
            return self._events.get(timeout=max(0.0, min(times) - time.monotonic()))
        except queue.Empty:
            return None

    def _look_at_clock(self) -> Ended | None:
        now_s = time.monotonic()
        self._kill_overdue(now_s)
        if self._drain_deadline_s is not None and now_s >= self._drain_deadline_s:
            return self._overdue()
        if self._draining_since_s is not None and now_s >= self._drain_news_s:
            self._drain_news_s = now_s + DRAIN_NEWS_INTERVAL_S
            age_s, bound = now_s - self._draining_since_s, ""
            if self._drain_deadline_s is not None:
                bound = f" of at most {self._drain_deadline_s - self._draining_since_s:.0f} s"
            self._say(f"still draining, {age_s:.0f} s{bound}; running: {self._alive()}")
        self._restart_due()
        return None

    def _exited(self, event: _Exited) -> Ended | None:
        member = self._members.get(event.name)
        if member is None or member.child is None or member.child.pid != event.pid:
            return None
        member.child, member.failure = None, event.failure
        if member.number >= 0 and (member.retiring or event.code == ExitCode.DRAINED):
            self._remove(member, event.code)
            return None
        self._changed()
        return self._judge_exit(member, event.code)

    def _died(self, member: _Member, code: int) -> Ended | None:
        life_s = time.monotonic() - member.started_s
        if life_s >= LIFE_S_GOOD:
            member.failures_in_a_row, member.hopeless = 0, False
        delay_s = member.backoff.delay_ms(life_s * 1000) / 1000
        if code > 0 and code not in (ExitCode.TEMPORARY, ExitCode.RECORD_OVERDUE):
            member.failures_in_a_row += 1
            # If a person has to fix something, that shows at the first start. Later it may be a consequence
            # of an accident.
            failures_max = 1 if code == ExitCode.MISTAKE and member.starts == 1 else FAILURES_IN_A_ROW_MAX
            member.hopeless = member.hopeless or member.failures_in_a_row >= failures_max
            if member.hopeless and self._gives_up():
                return self._failure(member, f"{member.spec.name} {death_of(code)}")
        if self._draining_since_s is not None:
            delay_s = min(delay_s, 0.5)
        self._say(f"{member.spec.name} {death_of(code)}; restart in {delay_s:.1f} s")
        member.restart_at_s = time.monotonic() + delay_s
        return None

    def _restart_due(self) -> None:
        now_s = time.monotonic()
        for member in self._members.values():
            if member.restart_at_s is not None and member.restart_at_s <= now_s:
                member.restart_at_s = None
                self._restarts += 1
                self._say(f"restarting {member.spec.name}")
                self._start(member)

    def _start(self, member: _Member) -> None:
        name = member.spec.name

        def on_line(text: str) -> None:
            self._view.line(name, text)

        if member.number >= 0 and self._make_worker is not None:
            member.spec = self._make_worker(member.number, member.slot)
        member.starts += 1
        member.started_s = time.monotonic()
        child = self._spawn(member.spec, on_line)
        member.child = child
        threading.Thread(
            target=self._await_exit, args=(name, child), name=f"wait-{name}", daemon=True
        ).start()
        self._changed()

    def _await_exit(self, name: str, child: Child) -> None:
        code = child.wait()
        self._events.put(_Exited(name, child.pid, code, child.failure()))

    # --- how many workers --------------------------------------------------------------------------

    def _staying(self) -> list[_Member]:
        return [m for m in self._members.values() if m.number >= 0 and not m.retiring]

    def _resize(self, target: int) -> None:
        if self._draining_since_s is not None or self._make_worker is None:
            return
        staying = self._staying()
        if target != len(staying):
            self._say(f"changing the number of workers from {len(staying)} to {target}")
        # Workers that don't even run leave first, then those with the highest slots, then the youngest.
        staying.sort(key=lambda m: (m.child is None, m.slot, m.started_s, m.number), reverse=True)
        for member in staying[: max(0, len(staying) - target)]:
            self._retire(member)
        for _ in range(target - len(staying)):
            number = next(n for n in range(len(self._members) + 1) if worker_name(n) not in self._members)
            member = _Member(self._make_worker(number, -1), number=number)
            self._members[worker_name(number)] = member
            self._start(member)
        self._changed()

    def _retire(self, member: _Member) -> None:
        """Let a worker leave, and not come back."""
        member.retiring, member.restart_at_s = True, None
        if member.child is None:
            del self._members[member.spec.name]
        else:
            member.kill_at_s = time.monotonic() + self._leave_timeout_s
            member.child.terminate()

    def _remove(self, member: _Member, code: int) -> None:
        """A worker that is no longer wanted has exited."""
        del self._members[member.spec.name]
        self._changed()
        name = member.spec.name
        if code == ExitCode.DRAINED:
            self._say(f"{name} was drained and isn't restarted; the target is now {self._target} workers")
        elif code not in (ExitCode.DONE, ExitCode.JOB_ENDED):
            self._say(f"{name} {death_of(code)} while leaving")
        else:
            self._say(f"{name} has left")

    def _kill_overdue(self, now_s: float) -> None:
        for member in self._members.values():
            if member.kill_at_s is not None and member.kill_at_s <= now_s:
                member.kill_at_s = None
                if member.child is not None:
                    self._say(
                        f"killing {member.spec.name}, which didn't leave within {self._leave_timeout_s:.0f} s"
                    )
                    member.child.kill()

    def _learn_slots(self, slots: Mapping[int, int]) -> None:
        for member in self._members.values():
            if member.number >= 0 and member.child is not None:
                member.slot = slots.get(member.child.pid, member.slot)

    # --- ending ------------------------------------------------------------------------------------

    def _signalled(self) -> Ended | None:
        if self._draining_since_s is not None:
            self._say("killed: records that weren't committed yet are processed again at the next start")
            return _failed(ExitCode.INTERRUPTED, "killed before the drain was complete", "Nothing is lost.")
        now_s = time.monotonic()
        self._draining_since_s, self._drain_news_s = now_s, now_s + DRAIN_NEWS_INTERVAL_S
        self._begin_drain()
        return None

    def _end_others(self, outcome: Ended) -> Ended:
        """Wait for the other processes to exit by themselves, then ask them, then kill them."""
        if outcome.exit_code != ExitCode.DONE:
            self._terminate_all()
        if not self._await_all():
            self._terminate_all()
            if not self._await_all():
                self._say(f"killed, because they didn't exit: {self._alive()}")
        return outcome

    def _await_all(self) -> bool:
        """Whether all processes exited within the grace period. A signal ends the wait."""
        deadline_s = time.monotonic() + self._exit_grace_s
        while any(m.child is not None for m in self._members.values()):
            try:
                event = self._events.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                return False
            if isinstance(event, _Signalled):
                return False
            if isinstance(event, _Exited):
                member = self._members.get(event.name)
                if member is not None and member.child is not None and member.child.pid == event.pid:
                    member.child = None
        return True

    def _terminate_all(self) -> None:
        for member in self._members.values():
            if member.child is not None:
                member.child.terminate()

    def _kill_all(self) -> None:
        for member in self._members.values():
            if member.child is not None:
                member.child.kill()

    def _failure(self, member: _Member, what: str) -> Ended:
        """It has reported why it failed. Otherwise its log says it."""
        remedy = f"The log of the {member.spec.name} says why."
        failure = member.failure
        if failure is None:
            return _failed(ExitCode.MISTAKE, what, remedy)
        failure = Failure(failure.kind, failure.message, failure.remedy or remedy, failure.where)
        return Ended(ExitCode.MISTAKE, failure.message, failure)

    # --- small things ------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self._view.line(SUPERVISOR, text)

    def _alive(self) -> str:
        return ", ".join(name for name, m in self._members.items() if m.child is not None)

    def _changed(self) -> None:
        self._target = len(self._staying())
        self._on_change({name: m.child.pid for name, m in self._members.items() if m.child is not None})

    @contextlib.contextmanager
    def _signals_as_events(self) -> Generator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # in a test, which calls `signal`
            return
        former = {
            number: signal.signal(number, lambda received, _frame: self.signal(received))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


class Supervisor(Keeper):
    """Runs `specs` until the coordinator is done, the job failed, or a signal ends it.

    Args:
        specs: the processes. One of them is named `COORDINATOR`, the others are workers.
        spawn: starts a process.
        view: gets the processes' lines and the supervisor's own.
        ask_drain: asks the coordinator to drain. Returns once the coordinator has agreed, and raises
            FclusterError if it doesn't answer. Called in a thread, repeatedly until it succeeds.
        make_worker: see `Keeper`. So are the others.
        drain_timeout_s: if a drain takes longer, the processes are killed. Nothing is lost by that.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        spawn: Spawn,
        view: Shower,
        ask_drain: Callable[[], None],
        make_worker: MakeWorker | None = None,
        on_change: Callable[[dict[str, int]], None] = lambda _pids: None,
        drain_timeout_s: float = 45.0,
        exit_grace_s: float = EXIT_GRACE_S,
        leave_timeout_s: float = LEAVE_TIMEOUT_S,
    ) -> None:
        workers = [spec for spec in specs if spec.name != COORDINATOR]
        if len(workers) == len(specs):
            raise ValueError("no coordinator among the processes")
        members = {spec.name: _Member(spec) for spec in specs if spec.name == COORDINATOR}
        members |= {spec.name: _Member(spec, number=number) for number, spec in enumerate(workers)}
        super().__init__(
            members,
            spawn=spawn,
            view=view,
            make_worker=make_worker,
            on_change=on_change,
            exit_grace_s=exit_grace_s,
            leave_timeout_s=leave_timeout_s,
        )
        self._ask_drain = ask_drain
        self._drain_timeout_s = drain_timeout_s
        self._drain_wanted = threading.Event()
        self._coordinator_given_up = False

    def _judge_exit(self, member: _Member, code: int) -> Ended | None:
        is_coordinator = member.number < 0
        if is_coordinator and code == ExitCode.DONE:
            return Ended(ExitCode.DONE)
        if is_coordinator and code == ExitCode.JOB_FAILED:
            return self._failure(member, "the job failed")
        if is_coordinator and self._coordinator_given_up:
            return _failed(
                ExitCode.MISTAKE,
                "the coordinator didn't answer, so the cluster stopped without a last epoch",
                "Nothing is lost: records that weren't committed are processed again at the next start.",
            )
        if self._draining_since_s is not None and not is_coordinator:
            # A worker that has drained leaves. If one died while draining, its records are replayed at the
            # next start.
            if code not in (ExitCode.DONE, ExitCode.JOB_ENDED):
                self._say(f"{member.spec.name} {death_of(code)} while draining")
            return None
        if not is_coordinator and code in (ExitCode.DONE, ExitCode.JOB_FAILED, ExitCode.JOB_ENDED):
            # It was told to exit. Usually the coordinator ends next, so there is nothing to report.
            member.restart_at_s = time.monotonic() + LEFT_GRACE_S
            return None
        return self._died(member, code)

    def _start(self, member: _Member) -> None:
        super()._start(member)
        if member.number < 0 and self._draining_since_s is not None:
            self._drain_wanted.set()  # the previous one received the request and took it with it

    def _begin_drain(self) -> None:
        self._say("draining: committing the last epoch, then stopping (Ctrl-C again to kill)")
        now_s = time.monotonic()
        self._drain_deadline_s = now_s + self._drain_timeout_s
        for member in self._members.values():
            # The coordinator is needed to drain. Dead workers have nothing to commit.
            if member.restart_at_s is not None:
                member.restart_at_s = now_s if member.number < 0 else None
        self._drain_wanted.set()
        threading.Thread(target=self._keep_asking, name="drain", daemon=True).start()

    def _keep_asking(self) -> None:
        """Ask for the drain until the coordinator agrees, and ask each new coordinator again."""
        silent_since_s = time.monotonic()
        while not self._ended.is_set():
            if not self._drain_wanted.wait(0.2):
                silent_since_s = time.monotonic()
                continue
            self._drain_wanted.clear()
            try:
                self._ask_drain()
            except FclusterError:
                self._drain_wanted.set()
                self._ended.wait(0.1)
                if time.monotonic() - silent_since_s > COORDINATOR_SILENT_S_MAX:
                    self._give_up_coordinator()
                    return

    def _give_up_coordinator(self) -> None:
        child = self._members[COORDINATOR].child
        if child is not None:
            self._coordinator_given_up = True
            child.terminate()

    def _overdue(self) -> Ended:
        return _failed(
            ExitCode.MISTAKE,
            f"the drain didn't finish within {self._drain_timeout_s:.0f} s, so the remaining processes "
            "were killed",
            "Nothing is lost: records that weren't committed are processed again at the next start. See "
            "the logs.",
        )


class Crew(Keeper):
    """Runs workers until the job ends or fails, or until a signal makes them leave.

    Args:
        workers: how many workers to start with.
        make_worker: returns their processes.
        spawn: starts a process.
        view: gets the processes' lines and the crew's own.
        on_change: see `Keeper`. So are the others.
    """

    def __init__(
        self,
        workers: int,
        make_worker: MakeWorker,
        *,
        spawn: Spawn,
        view: Shower,
        on_change: Callable[[dict[str, int]], None] = lambda _pids: None,
        exit_grace_s: float = EXIT_GRACE_S,
        leave_timeout_s: float = LEAVE_TIMEOUT_S,
    ) -> None:
        super().__init__(
            {worker_name(n): _Member(make_worker(n, -1), number=n) for n in range(workers)},
            spawn=spawn,
            view=view,
            make_worker=make_worker,
            on_change=on_change,
            exit_grace_s=exit_grace_s,
            leave_timeout_s=leave_timeout_s,
        )
        self._job_is_over = False

    def end(self, ended: Ended) -> None:
        """The job has ended, so the workers end, and `run` returns. May be called from any thread."""
        self._events.put(_JobEnded(ended))

    def _judge_exit(self, member: _Member, code: int) -> Ended | None:
        if code == ExitCode.JOB_FAILED:
            if member.failure is None:
                return _failed(ExitCode.JOB_FAILED, "the job failed", "The coordinator's log says why.")
            return Ended(ExitCode.JOB_FAILED, member.failure.message, member.failure)
        if code == ExitCode.JOB_ENDED:
            # The worker was told so, or has read it in the journal. The agent's own connection may have come
            # too late to hear it. Other workers may still have to commit their last epoch, after which they
            # end in the same way.
            self._job_is_over = True
            for other in self._members.values():
                other.restart_at_s = None
        if self._job_is_over:
            return None
        if code == ExitCode.DONE:
            # Somebody asked this worker to leave.
            member.restart_at_s = time.monotonic() + LEFT_GRACE_S
            return None
        return self._died(member, code)

    def _gives_up(self) -> bool:
        """A problem of one worker alone is no reason to end the others."""
        now_s = time.monotonic()
        return all(
            m.hopeless and (m.child is None or now_s - m.started_s < LIFE_S_GOOD) for m in self._staying()
        )

    def _begin_drain(self) -> None:
        self._say(
            "leaving: moving shards to other workers if there are any, then stopping (Ctrl-C again to kill)"
        )
        for member in self._staying():
            self._retire(member)
        self._changed()

    def _resize(self, target: int) -> None:
        if not self._job_is_over:
            super()._resize(target)

    def _is_over(self) -> Ended | None:
        if self._job_is_over and all(member.child is None for member in self._members.values()):
            return Ended(ExitCode.DONE)
        return Ended(ExitCode.DONE) if self._draining_since_s is not None and not self._members else None


def worker_name(number: int) -> str:
    """The name of the worker with that number."""
    return f"worker-{number}"


def death_of(code: int) -> str:
    """An exit code in words."""
    if code == -signal.SIGPROF:
        return "gave up a handler that held the interpreter's lock (see the stacks above)"
    if code < 0:
        return f"was {describe_exit(code)}"
    if code == ExitCode.DONE:
        return "ended"
    if code == ExitCode.RECORD_OVERDUE:
        return "gave up a record that took too long"
    if code == ExitCode.CRASHED:
        return f"crashed (exit code {code})"
    return f"exited with an error (exit code {code})"


def _failed(exit_code: int, message: str, remedy: str) -> Ended:
    return Ended(exit_code, message, Failure(FailureKind.HOST, message, remedy))
