"""How a cluster looks on a terminal: the live view of `fcluster up`, and the tables of `fcluster status`.

Responsible for: displaying the coordinator's status document and the processes' log lines. On a terminal they
are redrawn in place; elsewhere they are plain lines. Fields that are missing in a document show as unknown: a
view never fails because of missing fields. Must not ask the coordinator, and must not decide anything.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TextIO, cast

from fcluster.common.failures import bounded_text

Document = Mapping[str, Any]

REFRESH_INTERVAL_S = 0.25
SUMMARY_INTERVAL_S = 5.0
SILENCE_S = 2.0
"""A coordinator without a status for this long is shown as silent."""
LONG_RECORD_MS = 2_000
"""A handler that has been processing one record for this long is named."""
SHARDS_SHOWN_MAX = 32
EPOCH_WORKERS_SHOWN_MAX = 8
WORKERS_SHOWN_MAX = 16
AGENTS_SHOWN_MAX = 8
STOPPED_SHOWN_MAX = 3
STAGES_SHOWN_MAX = 8
AHEAD_SHOWN_MAX = 3
IDLE_SHOWN_MAX = 4
KAFKA_LINES_MAX = 8
KAFKA_CHARACTERS_MAX = 400
REASON_CHARACTERS_MAX = 1_200
LOG_LINES_SHOWN_MAX = 12
LOG_LINES_SHOWN_MIN = 3
NAME_WIDTH = 11
WORKER_NUMBERS = ("shards", "in/s", "out/s", "commit p50", "p99")
WIDE_TERMINAL = 100
SHARD_NUMBERS_WIDTH = 38

COLOURS = ("cyan", "green", "magenta", "blue", "yellow", "bright_cyan", "bright_green", "bright_magenta")
_TROUBLE = re.compile(r"\b(ERROR|CRITICAL)\b|^error:")
_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT(\d\d:\d\d:\d\d)\.\d{3}Z ([A-Z]+) +\S+: ")
_WARNING = re.compile(r"\bWARNING\b")


@dataclass(frozen=True)
class Totals:
    """A status document in one line. Rates are records per second; -1 means unknown."""

    job: str
    epoch: int
    phase: str
    interval_ms: float
    records_in_per_second: float
    records_out_per_second: float
    lag: int
    commit_ms_p50: float
    commit_ms_p99: float
    workers_running: int
    workers: int
    shards_running: int
    shards: int
    held_back: str

    @property
    def caught_up(self) -> bool:
        """Whether every shard is known to have reached the end of its source."""
        return self.lag == 0


def totals_of(document: Document) -> Totals:
    """Combine the document's data about workers and shards."""
    workers = list(_list(document, "workers"))
    shards = list(_list(document, "shards"))
    lags = [_number(shard, "lag", -1) for shard in shards]
    p50 = sorted(value for w in workers if (value := _number(w, "commit_latency_ms_p50", 0)) > 0)
    return Totals(
        job=str(document.get("job", "?")),
        # A new coordinator hasn't declared an epoch yet, but its shards have positions.
        epoch=int(max([_number(document, "epoch", 0), *(_number(shard, "epoch", 0) for shard in shards)])),
        phase=str(document.get("phase", "?")),
        interval_ms=_number(document, "interval_ms", -1),
        records_in_per_second=sum(_number(w, "records_in_per_second", 0) for w in workers),
        records_out_per_second=sum(_number(w, "records_out_per_second", 0) for w in workers),
        lag=int(sum(lags)) if lags and min(lags) >= 0 else -1,
        commit_ms_p50=p50[len(p50) // 2] if p50 else -1,
        commit_ms_p99=max((_number(w, "commit_latency_ms_p99", 0) for w in workers), default=0) or -1,
        workers_running=sum(1 for w in workers if _is_running(w)),
        workers=len(workers),
        shards_running=sum(1 for s in shards if _is_running(s)),
        shards=len(shards),
        held_back=_held_back(document),
    )


def summary_line(document: Document, restarts: int) -> str:
    """The document in one plain line."""
    t = totals_of(document)
    parts = [
        f"epoch {t.epoch:,}",
        f"in {t.records_in_per_second:,.0f}/s",
        f"out {t.records_out_per_second:,.0f}/s",
        f"lag {_count(t.lag)}",
        f"commit p50 {_ms(t.commit_ms_p50)} p99 {_ms(t.commit_ms_p99)}",
        f"workers {t.workers_running}/{t.workers}",
        f"shards {t.shards_running}/{t.shards}",
    ]
    if restarts:
        parts.append(f"restarts {restarts}")
    if stopped := sum(1 for shard in _list(document, "shards") if shard.get("phase") == "stopped"):
        parts.append(f"stopped {stopped}")
    if t.held_back:
        parts.append(t.held_back)
    return "  ".join([*parts, *kafka_lines(document)])


class ShardRates:
    """Records per second for each shard, computed from the change of its position between documents."""

    WINDOW_S = 2.0

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], deque[tuple[float, int]]] = {}

    def update(self, document: Document, now_s: float) -> None:
        """Record the positions in `document`, which was received at `now_s`."""
        current: dict[tuple[str, int], deque[tuple[float, int]]] = {}
        for shard in _list(document, "shards"):
            key = (str(shard.get("stage")), int(_number(shard, "partition", 0)))
            points = self._seen.get(key, deque())
            position = int(_number(shard, "position", -1))
            if position >= 0:
                if points and position < points[-1][1]:
                    points.clear()  # it went back to its committed offset, so the rate would be negative
                points.append((now_s, position))
            while len(points) > 2 and points[0][0] < now_s - self.WINDOW_S:
                points.popleft()
            current[key] = points
        self._seen = current

    def rate(self, stage: str, partition: int) -> float:
        """Records per second over the last two seconds, or -1 if unknown."""
        points = self._seen.get((stage, partition))
        if not points or len(points) < 2 or points[-1][0] <= points[0][0]:
            return -1.0
        return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])


# --- tables ----------------------------------------------------------------------------------------


def header(document: Document, restarts: int | None = None) -> Any:
    """An overview of the job, as a rich renderable."""
    from rich.text import Text

    t = totals_of(document)
    text = Text()
    text.append(t.job, "bold")
    text.append(f"  {t.phase}", "green" if t.phase == "running" else "yellow")
    text.append(f"  epoch {t.epoch:,}  interval {_ms(t.interval_ms)}")
    text.append(f"  in {t.records_in_per_second:,.0f}/s  out {t.records_out_per_second:,.0f}/s", "bold cyan")
    text.append(f"  lag {_count(t.lag)}", "bold green" if t.caught_up else "bold yellow")
    text.append(f"  commit p50 {_ms(t.commit_ms_p50)} p99 {_ms(t.commit_ms_p99)}")
    if restarts is not None:
        text.append(f"  restarts {restarts}", "red" if restarts else "dim")
    if t.held_back:
        text.append(f"\n{t.held_back}", "yellow")
    if line := end_line(document):
        text.append(f"\n{line}", "bold cyan")
    for line in kafka_lines(document):
        text.append(f"\n{line}", "bold yellow")
    for line in stopped_lines(document):
        text.append(f"\n{line}", "bold red")
    for line in table_lines(document):
        text.append(f"\n{line}", "yellow")
    for line in time_lines(document):
        text.append(f"\n{line}", "dim")
    for notice in _items(document.get("notices")):
        text.append(f"\n{notice}", "red")
    if agents := agents_line(document):
        text.append(f"\n{agents}", "dim")
    return text


def end_line(document: Document) -> str:
    """How far a bounded run is. Empty if the run isn't bounded."""
    value = document.get("run_end")
    if not isinstance(value, Mapping):
        return ""
    run_end = cast("Document", value)
    left, inputs = int(_number(run_end, "inputs_left", 0)), int(_number(run_end, "inputs", 0))
    offsets = int(_number(run_end, "records_left", 0))
    done = f"{inputs - left} of {inputs} partitions done, {offsets:,} offsets left"
    return f"runs to {_text(run_end.get('end'))}: {done}"


def kafka_lines(document: Document) -> list[str]:
    """What the job is waiting for in Kafka, one sentence each. Empty if nothing."""
    said = [text for text in _items(document.get("kafka_troubles")) if isinstance(text, str)]
    return [bounded_text(text, KAFKA_CHARACTERS_MAX) for text in said[:KAFKA_LINES_MAX]]


def table_lines(document: Document) -> list[str]:
    """Which stages wait for which global tables, and how far these are. Empty if none does."""
    lines: list[str] = []
    for stage in _list(document, "table_waits"):
        waiting, shards = int(_number(stage, "shards_waiting", 0)), int(_number(stage, "shards", 0))
        begin = f"{waiting} of {shards} shards of {_text(stage.get('stage'))} wait for the global table"
        for table in _list(stage, "tables"):
            topic = _text(table.get("topic"))
            left = _count(int(_number(table, "records_left", -1)))
            copies = _count(int(_number(table, "copies_left", -1)))
            line = f"{begin} {_text(table.get('table'))}: {left} left to read in {topic}, {copies} to copy"
            readers, running = int(_number(table, "shards", 0)), int(_number(table, "shards_running", 0))
            if running < readers:
                line += f"; {running} of {readers} shards that read {topic} are running"
            lines.append(line)
    more = [f"and {len(lines) - STAGES_SHOWN_MAX} more"] if len(lines) > STAGES_SHOWN_MAX else []
    return lines[:STAGES_SHOWN_MAX] + more


def stopped_lines(document: Document) -> list[str]:
    """A line for each shard that waits for a person, with the reason. Empty if there is none."""
    stopped = [shard for shard in _list(document, "shards") if shard.get("stopped_reason")]
    lines = [
        f"{_text(shard.get('stage'))}/{_text(shard.get('partition'))} is stopped: "
        + bounded_text(str(shard["stopped_reason"]), REASON_CHARACTERS_MAX)
        for shard in stopped[:STOPPED_SHOWN_MAX]
    ]
    more = [f"and {len(stopped) - STOPPED_SHOWN_MAX} more"] if len(stopped) > STOPPED_SHOWN_MAX else []
    return lines + more


def time_lines(document: Document) -> list[str]:
    """A line for each stage: its event time, what holds it back, what it doesn't wait for, and its timers.
    None if the job doesn't use event time.
    """
    lines: list[str] = []
    stages = list(_list(document, "event_times"))
    for stage in stages[:STAGES_SHOWN_MAX]:
        parts = [f"event time of {_text(stage.get('stage'))}: {_date(_number(stage, 'time_ms', -1))}"]
        behind_ms = _number(stage, "behind_ms", -1)
        if behind_ms >= 0:
            parts[0] += f", {_duration(behind_ms)} behind"
        held: Any = stage.get("held_back_by")
        if isinstance(held, Mapping):
            held = cast("Document", held)
            upstream = int(_number(held, "upstream", -1))
            behind = f" (shard {upstream} upstream)" if upstream >= 0 else ""
            parts.append(f"waits for {_text(held.get('topic'))}/{_text(held.get('partition'))}{behind}")
        parts += _ahead_parts(stage)
        if idle := list(_list(stage, "idle")):
            named = [
                f"{_text(one.get('topic'))}/{_text(one.get('partition'))}" for one in idle[:IDLE_SHOWN_MAX]
            ]
            more = int(_number(stage, "idle_inputs", 0)) - len(named)
            parts.append(f"idle: {', '.join(named)}" + (f" and {more} more" if more > 0 else ""))
        if upstream_idle := int(_number(stage, "idle_upstream", 0)):
            parts.append(f"idle upstream: {upstream_idle}")
        timers = int(_number(stage, "timers", -1))
        if timers >= 0:
            parts.append(f"{timers:,} timer{'' if timers == 1 else 's'} set")
        lines.append("; ".join(parts))
    more = [f"and {len(stages) - STAGES_SHOWN_MAX} more"] if len(stages) > STAGES_SHOWN_MAX else []
    return lines + more


def _ahead_parts(stage: Document) -> list[str]:
    """Which partitions aren't read on, because they are too far ahead of others."""
    ahead = list(_list(stage, "ahead"))
    if not ahead:
        return []
    named: list[str] = []
    for one in ahead[:AHEAD_SHOWN_MAX]:
        ahead_ms, other = _number(one, "ahead_ms", 0), _text(one.get("ahead_of"))
        why = f"{_duration(ahead_ms)} ahead of {other}" if ahead_ms > 0 else f"waits until {other} has begun"
        named.append(f"{_text(one.get('topic'))}/{_text(one.get('partition'))} ({why})")
    more = int(_number(stage, "ahead_inputs", 0)) - len(named)
    return [f"held back: {', '.join(named)}" + (f" and {more} more" if more > 0 else "")]


def _date(time_ms: float) -> str:
    if not 0 <= time_ms < 1e14:
        return "none yet" if time_ms < 0 else f"{time_ms:.0f} ms"
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _duration(duration_ms: float) -> str:
    """A duration in a fitting unit: 1.5 s, 12 min, 3 days."""
    for name, unit_ms in (("days", 86_400_000), ("h", 3_600_000), ("min", 60_000)):
        if duration_ms >= 2 * unit_ms:
            return f"{duration_ms / unit_ms:,.0f} {name}"
    return f"{duration_ms / 1000:.1f} s"


def agents_line(document: Document) -> str:
    """The agents, with their running and wanted numbers of workers. Empty if there are none."""
    agents = list(_list(document, "agents"))
    shown = [
        f"{_text(agent.get('host'))}:{_text(agent.get('pid'))} "
        f"{_count(int(_number(agent, 'running', -1)))}/{_count(int(_target(agent)))}"
        for agent in agents[:AGENTS_SHOWN_MAX]
    ]
    more = [f"and {len(agents) - AGENTS_SHOWN_MAX} more"] if len(agents) > AGENTS_SHOWN_MAX else []
    return "agents (workers running/wanted)  " + "  ".join(shown + more) if agents else ""


def _target(agent: Document) -> float:
    wanted = _number(agent, "wanted", -1)
    return wanted if wanted >= 0 else _number(agent, "target", -1)


def workers_table(document: Document, width: int) -> Any:
    """One row for each worker. A narrow terminal (`width`) shows only the most important columns."""
    from rich.markup import escape

    wide = width >= WIDE_TERMINAL
    more_names = ("heard", "memory", "pid", "worker") if wide else ()
    table = _table(
        "slot",
        "phase",
        *WORKER_NUMBERS,
        *more_names,
        right=("slot", *WORKER_NUMBERS, "heard", "memory", "pid"),
    )
    workers = list(_list(document, "workers"))
    for worker in workers[:WORKERS_SHOWN_MAX]:
        phase = str(worker.get("phase", "?"))
        more = (
            _ms(_number(worker, "last_heard_ms", -1)),
            _megabytes(_number(worker, "resident_bytes", -1)),
            _text(worker.get("pid")),
            escape(f"{_text(worker.get('worker'))[:8]}@{_text(worker.get('host'))[:24]}"),
        )
        table.add_row(
            _text(worker.get("slot")),
            f"[{_phase_colour(phase)}]{escape(phase + _restore_progress(worker))}",
            _text(_length(worker.get("shards"))),
            _rate(_number(worker, "records_in_per_second", -1)),
            _rate(_number(worker, "records_out_per_second", -1)),
            _ms(_number(worker, "commit_latency_ms_p50", 0) or -1),
            _ms(_number(worker, "commit_latency_ms_p99", 0) or -1),
            *(more if wide else ()),
        )
    if len(workers) > WORKERS_SHOWN_MAX:
        table.add_row("", f"... {len(workers) - WORKERS_SHOWN_MAX} more")
    return table


def epochs_table(document: Document) -> Any:
    """Where the time of the newest epochs went: a row for each phase, a column for each worker. None if no
    epoch was committed yet.
    """
    columns: dict[str, Document] = {}
    for worker in _list(document, "workers"):
        phases = worker.get("epoch_phases")
        if isinstance(phases, Mapping) and phases and len(columns) < EPOCH_WORKERS_SHOWN_MAX:
            columns[f"slot {_text(worker.get('slot'))}"] = cast("Document", phases)
    if not columns:
        return None
    table = _table("epoch: ms p50/p99", *columns, right=list(columns))
    for phase in dict.fromkeys(phase for phases in columns.values() for phase in phases):
        table.add_row(_text(phase), *(_phase_times(phases.get(phase)) for phases in columns.values()))
    return table


def _phase_times(figures: Any) -> str:
    if not isinstance(figures, Mapping):
        return "-"
    p50, p99 = (_number(cast("Document", figures), name, 0) for name in ("ms_p50", "ms_p99"))
    return f"{p50:.1f}/{p99:.1f}"


def shards_table(document: Document, rates: ShardRates | None, columns: int, rows_max: int) -> Any:
    """The shards, `columns` of them side by side. If not all fit, those with the largest lag."""
    names = (
        ("shard", "slot", "rate/s", "lag", "epoch")
        if rates
        else ("shard", "slot", "position", "lag", "epoch")
    )
    table = _table(*(names * columns), right=("slot", "rate/s", "position", "lag", "epoch"))
    shards = list(_list(document, "shards"))
    room = min(SHARDS_SHOWN_MAX, max(1, rows_max) * columns)
    hidden = len(shards) - room
    if hidden > 0:
        shards = sorted(shards, key=lambda s: -_number(s, "lag", 0))[:room]
    cells = [_shard_cells(shard, rates) for shard in shards]
    rows = -(-len(cells) // columns)
    for row in range(rows):
        # Down the first column, then down the next: partitions of a stage stay together.
        side_by_side = [
            cells[row + rows * column] for column in range(columns) if row + rows * column < len(cells)
        ]
        table.add_row(*(cell for group in side_by_side for cell in group))
    if hidden > 0:
        table.add_row(f"[dim]... and {hidden} more")
    return table


def _shard_cells(shard: Document, rates: ShardRates | None) -> tuple[str, ...]:
    from rich.markup import escape

    stage, partition = str(shard.get("stage", "?")), int(_number(shard, "partition", 0))
    phase = str(shard.get("phase", "?"))
    colour = _phase_colour(phase)
    name = escape(f"{stage}/{partition}")
    if colour != "green":
        name = f"[{colour}]{name} {escape(phase)}"
    slot = _number(shard, "slot", -1)
    if rates:
        movement = _rate(rates.rate(stage, partition))
    else:
        movement = _count(int(_number(shard, "position", -1)))
    lag = int(_number(shard, "lag", -1))
    return (
        name,
        f"{slot:.0f}" if slot >= 0 else "-",
        movement,
        f"[yellow]{lag:,}" if lag > 0 else _count(lag),
        _count(int(_number(shard, "epoch", -1))),
    )


def shard_columns(document: Document, width: int) -> int:
    """How many shards fit next to each other into `width` characters."""
    names = [
        len(f"{shard.get('stage')}/{shard.get('partition')}")
        + (0 if _is_running(shard) else 1 + len(str(shard.get("phase"))))
        for shard in _list(document, "shards")
    ]
    return max(1, min(3, width // (max(names, default=12) + SHARD_NUMBERS_WIDTH)))


def status_tables(document: Document, width: int) -> Any:
    """Everything `fcluster status` prints."""
    from rich.console import Group

    return Group(
        header(document),
        workers_table(document, width),
        shards_table(document, None, shard_columns(document, width), SHARDS_SHOWN_MAX),
        *([epochs] if (epochs := epochs_table(document)) is not None else []),
    )


def print_status(document: Document, stream: TextIO | None = None) -> None:
    """Print the tables once, in colour only on a terminal."""
    from rich.console import Console

    target = stream if stream is not None else sys.stdout
    # Piped output isn't cut at 80 columns.
    console = Console(file=target, highlight=False, width=None if target.isatty() else 140)
    console.print(status_tables(document, console.width))


def _table(*names: str, right: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=True)
    return table


# --- views -----------------------------------------------------------------------------------------


def _terminal_may_be_gone() -> contextlib.suppress:
    """Closing the terminal doesn't stop the cluster, and neither does the exit of a reader (`| head`)."""
    return contextlib.suppress(OSError, ValueError)


class View(Protocol):
    """Where the supervisor shows what happens. Any thread may call all methods except `document`."""

    def line(self, name: str, text: str) -> None:
        """A log line of the process `name`."""
        ...

    def document(self, document: Document, restarts: int) -> None:
        """The coordinator's newest status."""
        ...

    def close(self) -> None:
        """There will be no more output."""
        ...


class PlainView:
    """Log lines as they come, and a summary every few seconds while something changes."""

    def __init__(self, stream: TextIO | None = None, summary_interval_s: float = SUMMARY_INTERVAL_S) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._interval_s = summary_interval_s
        self._lock = threading.Lock()
        self._summarised_s = float("-inf")
        self._shown: object = None
        self._coloured = self._stream.isatty() and not os.environ.get("NO_COLOR")

    def line(self, name: str, text: str) -> None:
        """Print the line after the process's name."""
        prefix = f"{name:<{NAME_WIDTH}} |"
        if self._coloured:
            prefix = f"\x1b[{_ansi_colour_of(name)}m{prefix}\x1b[0m"
        self._write(f"{prefix} {text}\n")

    def document(self, document: Document, restarts: int) -> None:
        """Print a summary if it is time for one and something changed since the last."""
        now = time.monotonic()
        if now - self._summarised_s < self._interval_s:
            return
        state = progress_of(document, restarts)
        if state == self._shown:
            return
        self._shown, self._summarised_s = state, now
        self.line("cluster", summary_line(document, restarts))

    def close(self) -> None:
        """Nothing is buffered, so there is nothing to do."""

    def _write(self, text: str) -> None:
        with self._lock, _terminal_may_be_gone():
            self._stream.write(text)
            self._stream.flush()


class LiveView:
    """Header, workers, shards and the last log lines, redrawn in place.

    Lines with errors are also printed above the tables, where they stay.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream if stream is not None else sys.stderr, highlight=False)
        self._lock = threading.Lock()
        self._lines: deque[tuple[str, str]] = deque(maxlen=LOG_LINES_SHOWN_MAX * 4)
        self._rates = ShardRates()
        self._document: Document | None = None
        self._heard_s = 0.0
        self._restarts = 0
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._live = Live(
            console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()
        self._thread = threading.Thread(target=self._redraw, name="live-view", daemon=True)
        self._thread.start()

    def line(self, name: str, text: str) -> None:
        """Show the line below the tables. A line with an error also stays above."""
        with self._lock:
            self._lines.append((name, text))
        if is_trouble(text):
            with _terminal_may_be_gone():
                self._console.print(styled_line(name, text, whole=True))
        self._changed.set()

    def document(self, document: Document, restarts: int) -> None:
        """Show the coordinator's newest status."""
        with self._lock:
            self._document, self._restarts, self._heard_s = document, restarts, time.monotonic()
            self._rates.update(document, self._heard_s)
        self._changed.set()

    def close(self) -> None:
        """Draw the last state and leave it on the screen."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._changed.set()
        self._thread.join()
        with _terminal_may_be_gone():
            self._live.update(self._renderable(), refresh=True)
            self._live.stop()

    def _redraw(self) -> None:
        while not self._closing.is_set():
            self._changed.wait(SILENCE_S)
            self._changed.clear()
            with _terminal_may_be_gone():
                self._live.update(self._renderable(), refresh=True)
            self._closing.wait(REFRESH_INTERVAL_S)

    def _renderable(self) -> Any:
        from rich.console import Group

        with self._lock:
            parts = list(self._tables())
            lines = list(self._lines)
        height = max(10, self._console.height - 1)
        used = sum(len(self._console.render_lines(part, pad=False)) for part in parts)
        room = min(LOG_LINES_SHOWN_MAX, max(LOG_LINES_SHOWN_MIN, height - used - 1))
        return Group(*parts, *(styled_line(name, text) for name, text in lines[-room:]))

    def _tables(self) -> Iterator[Any]:
        from rich.rule import Rule
        from rich.text import Text

        document = self._document
        if document is None:
            return
        yield Rule(style="dim")
        yield header(document, self._restarts)
        silence_s = time.monotonic() - self._heard_s
        if silence_s >= SILENCE_S and not self._closing.is_set():
            yield Text(
                f"the coordinator hasn't answered for {silence_s:.0f} s; this is its last status", "yellow"
            )
        yield workers_table(document, self._console.width)
        used = 7 + min(WORKERS_SHOWN_MAX, _length(document.get("workers"))) + LOG_LINES_SHOWN_MIN
        rows = max(2, self._console.height - used - 3)
        yield shards_table(document, self._rates, shard_columns(document, self._console.width), rows)
        yield Rule(style="dim")


def make_view(live: bool, stream: TextIO | None = None) -> View:
    """The live view if `live`, otherwise plain lines."""
    return LiveView(stream) if live else PlainView(stream)


def styled_line(name: str, text: str, *, whole: bool = False) -> Any:
    """A log line after its process's name, in colour; cut at the terminal's edge unless `whole`."""
    from rich.text import Text

    styled = Text(no_wrap=not whole, overflow="fold" if whole else "ellipsis")
    styled.append(f"{name:<{NAME_WIDTH}} ", _colour_of(name))
    styled.append("| ", "dim")
    # This is text, not markup, because a handler may log brackets. Control characters would move the cursor.
    shown = text if whole else shortened(text)
    clean = "".join(c if c.isprintable() else " " for c in shown)
    styled.append(clean, "red" if is_trouble(text) else "yellow" if _WARNING.search(text) else "")
    return styled


def shortened(text: str) -> str:
    """A log line without the parts for which the live view has no room: the date, an ordinary level, the
    logger's name.
    """
    match = _LOG_LINE.match(text)
    if match is None:
        return text
    time_of_day, level = match.groups()
    return f"{time_of_day} {'' if level == 'INFO' else level + ' '}{text[match.end() :]}"


def is_trouble(text: str) -> bool:
    """Whether a log line reports an error."""
    return _TROUBLE.search(text[:80]) is not None


def _ansi_colour_of(name: str) -> int:
    digits = re.sub(r"\D", "", name)
    return 31 + (int(digits) + 1) % 6 if digits else 1


def _colour_of(name: str) -> str:
    digits = re.sub(r"\D", "", name)
    if digits:
        return COLOURS[int(digits) % len(COLOURS)]
    return {"coordinator": "bold", "kafka": "dim"}.get(name, "bold blue")


# --- reading documents -------------------------------------------------------------------------------


def progress_of(document: Document, restarts: int) -> object:
    """The part of a document that has to change for a new summary line."""
    shards = tuple(
        (
            s.get("stage"),
            s.get("partition"),
            s.get("position"),
            s.get("committed"),
            s.get("phase"),
            s.get("slot"),
        )
        for s in _list(document, "shards")
    )
    workers = tuple((w.get("slot"), w.get("pid"), w.get("phase")) for w in _list(document, "workers"))
    return document.get("phase"), shards, workers, restarts


def _held_back(document: Document) -> str:
    return _long_record(document) or _calls_wait(document) or _open_epoch(document)


def _calls_wait(document: Document) -> str:
    """Which calls to other services hold records up."""
    for worker in _list(document, "workers"):
        wait = worker.get("calls_wait")
        if isinstance(wait, str) and wait:
            return f"slot {worker.get('slot')}: {wait}"
    return ""


def _long_record(document: Document) -> str:
    value = document.get("longest_record")
    if not isinstance(value, Mapping):
        return ""
    record = cast("Document", value)
    running_ms = _number(record, "running_ms", 0)
    if running_ms < LONG_RECORD_MS:
        return ""
    where = f"{record.get('topic')}/{record.get('partition')} at offset {record.get('offset')}"
    return f"slot {record.get('slot')} has been processing record {where} for {running_ms / 1000:.1f} s"


def _open_epoch(document: Document) -> str:
    value = document.get("oldest_open_epoch")
    if not isinstance(value, Mapping):
        return ""
    oldest = cast("Document", value)
    age_ms = _number(oldest, "age_ms", 0)
    if age_ms < 1_000:  # ordinary epochs aren't shown
        return ""
    waiting: Any = oldest.get("waiting_for")
    names = ", ".join(map(str, _items(waiting) or [waiting]))
    return f"an epoch has been open for {age_ms / 1000:.1f} s, held back by {names or '?'}"


def _list(document: Document, name: str) -> Iterator[Document]:
    for item in _items(document.get(name)):
        if isinstance(item, Mapping):
            yield cast("Document", item)


def _items(value: Any) -> Sequence[Any]:
    return cast("Sequence[Any]", value) if isinstance(value, list | tuple) else ()


def _number(document: Document, name: str, default: float) -> float:
    value = document.get(name)
    return value if isinstance(value, int | float) else default


def _length(value: Any) -> int:
    return value if isinstance(value, int) else len(_items(value))


def _is_running(item: Document) -> bool:
    # A shard that is being warmed elsewhere still runs where it is.
    return item.get("phase") in ("running", "live", "warming")


def _restore_progress(worker: Document) -> str:
    """The progress of a worker's restore: " 120 MB, 340 MB (4 s) to go". Empty if it isn't restoring."""
    if worker.get("phase") != "restoring":
        return ""
    read, left = _number(worker, "restore_bytes", 0), _number(worker, "restore_bytes_left", -1)
    if left < 0:
        return f" {_megabytes(read)}" if read > 0 else ""
    left_ms = _number(worker, "restore_ms_left", -1)
    time_left = f" ({left_ms / 1000:.0f} s)" if left_ms >= 0 else ""
    return f" {_megabytes(read)}, {_megabytes(left)}{time_left} to go"


def _phase_colour(phase: str) -> str:
    if phase in ("running", "live"):
        return "green"
    return "red" if phase in ("free", "dead", "fencing", "gone", "stopped") else "yellow"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _count(value: int) -> str:
    return f"{value:,}" if value >= 0 else "?"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 0 else "-"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB" if value > 0 else "-"


def _ms(value: float) -> str:
    if value < 0:
        return "-"
    return f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.0f} s"
