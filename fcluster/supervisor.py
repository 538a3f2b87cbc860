"""Keeps the processes of `fcluster up` running, and ends them in good order.

Responsible for: starting the coordinator and the workers, restarting what dies (with back-off), draining on
the first Ctrl-C and killing on the second, and the outcome of it all. Keeps the rules that no process
outlives the supervisor (its children die with it, see `processes`), that every wait is bounded, and that
every restart is said. Must not parse options, draw, or know what the processes do: it knows their exit codes.

Exit codes of the children: 0 the work is done; `EXIT_JOB_FAILED` the job can't go on, wherever it runs;
`EXIT_TEMPORARY` trouble that may pass by itself, such as brokers that are down; `EXIT_MISTAKE` an error a
person has to repair; anything else, and death by a signal, is an accident.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fcluster.common.errors import FclusterError
from fcluster.common.processes import RestartBackoff, describe_exit

EXIT_DONE = 0
EXIT_MISTAKE = 1
EXIT_JOB_FAILED = 3
EXIT_BUG = 70
EXIT_TEMPORARY = 75
EXIT_KILLED = 130

FAILURES_IN_A_ROW_MAX = 4
"""A process that ended itself with an error so often in a row, never living `LIFE_S_GOOD`, won't recover."""
LIFE_S_GOOD = 20.0
EXIT_GRACE_S = 5.0
"""Between asking a process to end and the next stronger means."""
DRAIN_NEWS_INTERVAL_S = 5.0
COORDINATOR_SILENT_S_MAX = 10.0
"""A coordinator that doesn't answer a drain for so long (brokers down, or hung) is told to end."""
LINES_REMEMBERED = 20

LEFT_GRACE_S = 3.0
"""A worker that left in good order is started again when the coordinator hasn't ended within so long."""

COORDINATOR = "coordinator"
SUPERVISOR = "cluster"


class Child(Protocol):
    """A running process."""

    @property
    def pid(self) -> int: ...
    def wait(self) -> int:
        """Block until it ended; its exit code, or minus the signal that ended it."""
        ...

    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True)
class ProcessSpec:
    """A process to keep running; one of them is named `COORDINATOR`."""

    name: str
    argv: tuple[str, ...]


Spawn = Callable[[ProcessSpec, Callable[[str], None]], Child]
"""Starts a process; the callback gets each line it writes, from any thread."""


@dataclass(frozen=True)
class Outcome:
    """How it ended. `reason` and `remedy` say why, when `exit_code` is not 0."""

    exit_code: int
    reason: str = ""
    remedy: str = ""


class Shower(Protocol):
    """Where lines go."""

    def line(self, name: str, text: str) -> None: ...


@dataclass(frozen=True)
class _Exited:
    name: str
    pid: int
    code: int


@dataclass(frozen=True)
class _Signalled:
    number: int


@dataclass
class _Member:
    spec: ProcessSpec
    child: Child | None = None
    starts: int = 0
    started_s: float = 0.0
    backoff: RestartBackoff = field(
        default_factory=lambda: RestartBackoff(first_ms=100, healthy_after_ms=int(LIFE_S_GOOD * 1000))
    )
    failures_in_a_row: int = 0
    restart_at_s: float | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LINES_REMEMBERED))


class Supervisor:
    """Runs `specs` until the coordinator is done, the job failed, or a signal ends it.

    Args:
        spawn: starts a process.
        view: gets the processes' lines and the supervisor's own.
        ask_drain: asks the coordinator to drain; returns once it agreed; raises FclusterError if it doesn't
            answer. Called in a thread, again and again until it succeeds.
        on_change: called with the processes' ids by name whenever they change.
        drain_timeout_s: a drain that takes longer ends in a kill; nothing is lost by that.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        spawn: Spawn,
        view: Shower,
        ask_drain: Callable[[], None],
        on_change: Callable[[dict[str, int]], None] = lambda _pids: None,
        drain_timeout_s: float = 45.0,
        exit_grace_s: float = EXIT_GRACE_S,
    ) -> None:
        self._members = {spec.name: _Member(spec) for spec in specs}
        if COORDINATOR not in self._members:
            raise ValueError("no coordinator among the processes")
        self._spawn = spawn
        self._view = view
        self._ask_drain = ask_drain
        self._on_change = on_change
        self._drain_timeout_s = drain_timeout_s
        self._exit_grace_s = exit_grace_s
        # A SimpleQueue may be put to by a signal handler while the same thread is inside `get`.
        self._events: queue.SimpleQueue[_Exited | _Signalled] = queue.SimpleQueue()
        self._restarts = 0
        self._draining_since_s: float | None = None
        self._drain_news_s = 0.0
        self._ended = threading.Event()
        self._drain_wanted = threading.Event()
        self._coordinator_given_up = False

    @property
    def restarts(self) -> int:
        """How often a process was started again."""
        return self._restarts

    def run(self) -> Outcome:
        """Start everything, stay until the end, leave nothing running. For the main thread."""
        with self._signals_as_events():
            try:
                for member in self._members.values():
                    self._start(member)
                outcome = self._watch()
                return outcome if outcome.exit_code == EXIT_KILLED else self._end_others(outcome)
            finally:
                self._ended.set()
                self._kill_all()

    def signal(self, number: int) -> None:
        """Act as on that signal: the first drains, the second kills."""
        self._events.put(_Signalled(number))

    # --- the loop ----------------------------------------------------------------------------------

    def _watch(self) -> Outcome:
        while True:
            event = self._next_event()
            if isinstance(event, _Exited):
                outcome = self._exited(event)
            elif isinstance(event, _Signalled):
                outcome = self._signalled()
            else:
                outcome = self._drain_overdue()
                self._restart_due()
            if outcome is not None:
                return outcome

    def _next_event(self) -> _Exited | _Signalled | None:
        """The next event, None when it is time to look at the clock."""
        times = [m.restart_at_s for m in self._members.values() if m.restart_at_s is not None]
        if self._draining_since_s is not None:
            times += [self._draining_since_s + self._drain_timeout_s, self._drain_news_s]
        try:
            if not times:
                return self._events.get()
            return self._events.get(timeout=max(0.0, min(times) - time.monotonic()))
        except queue.Empty:
            return None

    def _exited(self, event: _Exited) -> Outcome | None:
        member = self._members[event.name]
        if member.child is None or member.child.pid != event.pid:
            return None
        member.child = None
        self._changed()
        is_coordinator = event.name == COORDINATOR
        if is_coordinator and event.code == EXIT_DONE:
            return Outcome(EXIT_DONE)
        if is_coordinator and event.code == EXIT_JOB_FAILED:
            return self._failure(member, "the job failed")
        if is_coordinator and self._coordinator_given_up:
            return Outcome(
                EXIT_MISTAKE,
                "the coordinator didn't answer, so everything ended without a last epoch",
                "Nothing is lost: what wasn't committed is processed at the next start.",
            )
        if self._draining_since_s is not None and not is_coordinator:
            # A worker that drained leaves; one that died while draining is replayed at the next start.
            if event.code != EXIT_DONE:
                self._say(f"{event.name} {death_of(event.code)} while draining")
            return None
        if not is_coordinator and event.code in (EXIT_DONE, EXIT_JOB_FAILED):
            # It was told to leave: as a rule the coordinator ends next, and there is nothing to say.
            member.restart_at_s = time.monotonic() + LEFT_GRACE_S
            return None
        return self._died(member, event.code)

    def _died(self, member: _Member, code: int) -> Outcome | None:
        life_s = time.monotonic() - member.started_s
        if life_s >= LIFE_S_GOOD:
            member.failures_in_a_row = 0
        delay_s = member.backoff.delay_ms(life_s * 1000) / 1000
        if code > 0 and code != EXIT_TEMPORARY:
            member.failures_in_a_row += 1
            # What a person has to repair shows at the first start; later it may be the rest of an accident.
            failures_max = 1 if code == EXIT_MISTAKE and member.starts == 1 else FAILURES_IN_A_ROW_MAX
            if member.failures_in_a_row >= failures_max:
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
                self._say(f"{member.spec.name} is started again")
                self._start(member)

    def _start(self, member: _Member) -> None:
        name = member.spec.name

        def on_line(text: str) -> None:
            member.lines.append(text)
            self._view.line(name, text)

        member.starts += 1
        member.started_s = time.monotonic()
        child = self._spawn(member.spec, on_line)
        member.child = child
        threading.Thread(
            target=self._await_exit, args=(name, child), name=f"wait-{name}", daemon=True
        ).start()
        if name == COORDINATOR and self._draining_since_s is not None:
            self._drain_wanted.set()  # the one before took the request with it
        self._changed()

    def _await_exit(self, name: str, child: Child) -> None:
        code = child.wait()
        self._events.put(_Exited(name, child.pid, code))

    # --- ending ------------------------------------------------------------------------------------

    def _signalled(self) -> Outcome | None:
        if self._draining_since_s is not None:
            self._say("killed: what wasn't committed yet is processed at the next start")
            return Outcome(EXIT_KILLED, "killed before the drain was over", "Nothing is lost.")
        self._say("draining: the last epoch is committed, then everything ends (again to kill)")
        now_s = time.monotonic()
        self._draining_since_s, self._drain_news_s = now_s, now_s + DRAIN_NEWS_INTERVAL_S
        for member in self._members.values():
            # The coordinator is needed to drain; workers that are dead have nothing to commit.
            if member.restart_at_s is not None:
                member.restart_at_s = now_s if member.spec.name == COORDINATOR else None
        self._drain_wanted.set()
        threading.Thread(target=self._keep_asking, name="drain", daemon=True).start()
        return None

    def _keep_asking(self) -> None:
        """Ask for the drain until the coordinator agrees, and each new coordinator again."""
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

    def _drain_overdue(self) -> Outcome | None:
        if self._draining_since_s is None:
            return None
        now_s = time.monotonic()
        age_s = now_s - self._draining_since_s
        if age_s >= self._drain_timeout_s:
            return Outcome(
                EXIT_MISTAKE,
                f"the drain wasn't over within {self._drain_timeout_s:.0f} s, so the rest was killed",
                "Nothing is lost: what wasn't committed is processed at the next start. See the logs.",
            )
        if now_s >= self._drain_news_s:
            self._drain_news_s = now_s + DRAIN_NEWS_INTERVAL_S
            alive = ", ".join(name for name, m in self._members.items() if m.child is not None)
            self._say(
                f"still draining, {age_s:.0f} s of at most {self._drain_timeout_s:.0f} s; running: {alive}"
            )
        return None

    def _end_others(self, outcome: Outcome) -> Outcome:
        """Wait for the rest to end by itself, then ask, then insist."""
        if outcome.exit_code != EXIT_DONE:
            self._terminate_all()
        if not self._await_all():
            self._terminate_all()
            if not self._await_all():
                alive = ", ".join(name for name, m in self._members.items() if m.child is not None)
                self._say(f"killed, since it didn't end: {alive}")
        return outcome

    def _await_all(self) -> bool:
        """Whether all processes ended within the grace; a signal makes an end of waiting."""
        deadline_s = time.monotonic() + self._exit_grace_s
        while any(m.child is not None for m in self._members.values()):
            try:
                event = self._events.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                return False
            if isinstance(event, _Signalled):
                return False
            member = self._members[event.name]
            if member.child is not None and member.child.pid == event.pid:
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

    def _failure(self, member: _Member, what: str) -> Outcome:
        reason, remedy = reported_error(list(member.lines))
        name = member.spec.name
        return Outcome(EXIT_MISTAKE, reason or what, remedy or f"The log of the {name} says why.")

    # --- small things ------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self._view.line(SUPERVISOR, text)

    def _changed(self) -> None:
        self._on_change({name: m.child.pid for name, m in self._members.items() if m.child is not None})

    @contextlib.contextmanager
    def _signals_as_events(self) -> Generator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # a test's; it calls `signal`
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


def death_of(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        return f"was {describe_exit(code)}"
    if code == EXIT_DONE:
        return "ended"
    if code == EXIT_BUG:
        return f"crashed (exit code {code})"
    return f"ended with an error (exit code {code})"


def reported_error(lines: Sequence[str]) -> tuple[str, str]:
    """Message and remedy of the last error that a process reported in its last lines, empty if it did not.

    Processes report as `cli.report` writes it: ``error: ...`` and ``remedy: ...``.
    """
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if not starts:
        return "", ""
    first, *following = lines[starts[-1] :]
    reason = [first.removeprefix("error: ")]
    for line in following:
        if line.startswith("remedy: "):
            return "\n".join(reason), line.removeprefix("remedy: ")
        if not line.startswith("  "):  # a message's further lines are indented
            break
        reason.append(line)
    return "\n".join(reason), ""
