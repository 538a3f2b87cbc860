"""The jobs in the simulation, declared like any user's job, and a slow and obvious model of each stage.

Responsible for: the jobs (`docs/simulation.md` lists them), their records, and the models. The engine
processes the records. The checks do the same with a model, which uses plain dicts and lists, and knows
nothing of epochs, layers or bytes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, cached_property
from typing import Any, NamedTuple

import msgspec

from fcluster import (
    Hopping,
    Job,
    ListState,
    MapState,
    Session,
    Tumbling,
    ValueState,
    Watermark,
    collect,
    count,
    last,
    reduce,
    sum_,
)
from fcluster.common.ids import ShardId, repartition_topic
from fcluster.common.settings import Settings
from fcluster.engine.loading import LOADED_HEADER
from fcluster.engine.ordered_keys import (
    decode_time,
    group_of_entry,
    key_of_group,
    ordered_key,
    take_ended,
)
from fcluster.engine.state import STORE_PREFIX_BYTES, store_prefix
from fcluster.engine.values import decode_state
from fcluster.engine.watermarks import WATERMARK_HEADER
from fcluster.graph.codecs import value_codec
from fcluster.graph.groups import parts_of_contribution
from fcluster.graph.partitioner import partition_of
from fcluster.graph.stages import Stage, written_topics
from fcluster.graph.states import StateStore
from fcluster.graph.tables import TableStore
from fcluster.graph.timers import TimerStore
from fcluster.graph.topology import Topology
from fcluster.graph.windows import Gathered

JOB = "sim"
SOURCE, SINK = "in", "out"
MORE = "more"
"""The other source of the jobs that merge."""
LATE = "late"
"""Gets the records that are too late for their windows."""
COUNT, TOTALS, BOTH = "count", "totals", "both"
"""The names of the handlers."""
AGAIN = "again"
"""The name of a second window in a stage."""
MAX_DELAY_MS = 3
"""The delay of the watermarks in all jobs with event time."""
IDLE_MS = 150
"""In jobs with inputs that become idle, an input is idle after so long without a record."""
MAX_DRIFT_MS = 6
"""In jobs with partitions that wait for each other, one may be so far ahead."""
RING_EVERY_MS = 30
"""The timer in processing time that record n sets is due n times so many milliseconds after the start."""
FORGET_AT = 6
"""A key's state is deleted when its count gets there, so that deletions occur as well."""
BEGIN_MS = 1_700_000_000_000
TTL_MS = 12
"""The TTL of all states that have one. The numbers of records rise with time, and are their timestamps."""
REPARTITION = repartition_topic(JOB, TOTALS)
CROSSING = repartition_topic(JOB, BOTH)


def _names(letter: str, count: int) -> list[str]:
    """Keys, of which the n-th goes to partition n, modulo the number of partitions (1, 2, or 3)."""
    return [
        next(
            name
            for name in (f"{letter}{number}{last}" for last in "abcdefghijklmnopqrstuvwxyz")
            if partition_of(name.encode(), 6) == number
        )
        for number in range(count)
    ]


KEYS = _names("k", 5)
GROUPS = _names("g", 3)
GROUP_OF = {key: GROUPS[number % len(GROUPS)] for number, key in enumerate(KEYS)}


# --- records --------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """Where an output comes from. Only the checks use it.

    Attributes:
        shard: the shard that made it.
        number, offset: the input and offset of the record that it was made from. For a timer's or a window's
            output, the first input, and the offset of its next record.
        made: the number of what has happened, in the order of the run.
        wall_ms: when it was made, by the clock of the worker's host.
        of_timer: whether a timer or a window that closes made it.
    """

    shard: ShardId
    number: int
    offset: int
    made: int = 0
    wall_ms: int = 0
    of_timer: bool = False


class Written:
    """A record in a topic.

    Attributes:
        origin: where it comes from. None if no handler made it.
        put_at_ms: when it was written, if it is in a source.
    """

    __slots__ = ("_data", "headers", "key", "origin", "put_at_ms", "timestamp_ms", "value")

    def __init__(
        self,
        key: bytes | None,
        value: bytes | None,
        timestamp_ms: int,
        headers: Sequence[tuple[str, bytes | None]] | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.key = key
        self.value = value
        self.timestamp_ms = timestamp_ms
        self.headers = headers
        self.origin = origin
        self.put_at_ms = 0
        self._data: Any = None

    @property
    def data(self) -> Any:
        """The decoded value. What a group of a table's rows loses and gains is a list of both."""
        if self._data is None and self.value is not None:
            halves = self.value[:1] == _PAIR
            self._data = _read_halves(self.value) if halves else json.loads(self.value)
        return self._data

    @property
    def time_ms(self) -> int:
        """Its time: the one in its value, if it has one there."""
        at_ms = self.data.get("at") if isinstance(self.data, dict) else None
        return self.timestamp_ms if at_ms is None else at_ms

    @property
    def is_watermark(self) -> bool:
        """Whether it reports event time and holds no data."""
        return self.key is None and bool(self.headers) and self.headers[0][0] == WATERMARK_HEADER

    @property
    def name(self) -> str:
        """The key as text."""
        return (self.key or b"").decode()

    @property
    def is_mark(self) -> bool:
        """Whether it says that a shard has read a global table, and holds no data."""
        return self.key is None and bool(self.headers) and self.headers[0][0] == LOADED_HEADER

    def __str__(self) -> str:
        if self.is_watermark or self.is_mark:
            return "watermark" if self.is_watermark else "mark"
        return f"{self.name}={self.data.get('ident') if isinstance(self.data, dict) else self.value}"


class Read:
    """A record that a shard has read. It has the methods of a consumed Kafka message.

    Attributes:
        number: the number of the input.
        made: see `Origin`. -1 if it isn't known: the offsets say in which order the records were read.
    """

    __slots__ = ("_at", "_partition", "made", "number", "written")

    def __init__(
        self, number: int, partition: tuple[str, int], offset: int, written: Written, made: int = -1
    ) -> None:
        self.number = number
        self.written = written
        self.made = made
        self._partition = partition
        self._at = offset

    def topic(self) -> str:
        """The topic of the input."""
        return self._partition[0]

    def partition(self) -> int:
        """The partition of the topic."""
        return self._partition[1]

    def offset(self) -> int:
        """The offset in the partition."""
        return self._at

    def key(self) -> bytes | None:
        """The key's bytes."""
        return self.written.key

    def value(self) -> bytes | None:
        """The value's bytes."""
        return self.written.value

    def timestamp(self) -> tuple[int, int]:
        """The type and the time, as Kafka's clients return them."""
        return 1, self.written.timestamp_ms

    def headers(self) -> Any:
        """Pairs of name and value."""
        return self.written.headers


def source_record(key: str, ident: int) -> Written:
    """A record of a source."""
    return Written(key.encode(), as_json({"key": key, "ident": ident}), BEGIN_MS + ident)


def as_json(value: Any) -> bytes:
    """The value as JSON, as jobs write it."""
    return json.dumps(value, separators=(",", ":")).encode()


_PAIR = b"\x92"
"""What a list of two begins with in msgpack. Nothing in JSON begins with it."""


def _read_halves(value: bytes) -> list[Any]:
    halves: list[bytes | None] = msgspec.msgpack.decode(value)
    return [None if half is None else json.loads(half) for half in halves]


# --- models -----------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Something that a shard with several inputs has done, in the order of the run. Its worker reports it,
    because the inputs don't tell in which order they were read.

    Attributes:
        made: see `Origin`.
        number: the input's number.
        offset: the offset of the record that was processed. None: the input has become idle.
    """

    made: int
    number: int
    offset: int | None


class Expected(NamedTuple):
    """An output that must be there. Without a time, it has that of the record that it was made from."""

    topic: str
    key: str
    data: Any
    timestamp_ms: int | None = None


class SetTimer(NamedTuple):
    """A timer that is set, or a window that is open. They are ordered as those of a clock fire.

    Attributes:
        name: of a window: "".
        part: the number of its model, see `StageModel`.
    """

    at_ms: int
    key: str
    name: str
    part: int = 0


class Model(ABC):
    """What a stage has to do, in the slowest and most obvious way.

    Attributes:
        has_timers: whether it has timers, or windows that close.
        may_wait: whether what is due in event time may fire later than the next record.
        may_be_late: whether records may be too late for its windows.
        shows_closing: whether an output shows when a window closes.
        closes_after_ms: how long after their ends its windows close, at most. None: it has no windows.
    """

    has_timers = False
    may_wait = True
    may_be_late = True
    shows_closing = True
    closes_after_ms: int | None = None

    @abstractmethod
    def begin(self) -> Any:
        """The state of a shard that has read nothing. It is changed in place."""

    @abstractmethod
    def process(self, state: Any, read: Read, now_ms: int | None) -> list[Expected]:
        """The outputs for a record, in order. `now_ms` is the shard's event time before it."""

    @abstractmethod
    def content(self, state: Any, stored: Mapping[str, Any], now_ms: int | None) -> tuple[Any, Any]:
        """What the state must be, and what the stores (by name, see `SimJob.stored`) make of it."""

    def seen(self, state: Any) -> dict[str, dict[str, Any]] | None:
        """The dicts of all keys as the handler must see them. None if it has no dicts."""
        return None

    def timers(self, state: Any, clock: str) -> list[SetTimer]:
        """All timers that are set in this clock, the next one first. In event time, also the windows whose
        results are still to come.
        """
        return []

    def fire(self, state: Any, timer: SetTimer, event_ms: int | None) -> list[Expected]:
        """What a timer leads to, or a window that closes: at least one output."""
        raise NotImplementedError

    def first_ms(self, state: Any) -> int | None:
        """When the next timer or window is due in event time."""
        return next((timer.at_ms for timer in self.timers(state, "event")), None)

    def reported_ms(self, state: Any, now_ms: int | None) -> int | None:
        """The event time that the stages behind are told."""
        if now_ms is None or self.closes_after_ms is None:
            return now_ms
        first_ms = self.first_ms(state)
        return (now_ms if first_ms is None or first_ms > now_ms else first_ms - 1) - self.closes_after_ms


class StageModel(Model):
    """Several models, each of one chain of a stage, in the order of the chains."""

    def __init__(self, *parts: Model, may_be_late: bool = True) -> None:
        self._parts = parts
        self.has_timers = any(part.has_timers for part in parts)
        self.may_wait = all(part.may_wait for part in parts)
        self.may_be_late = may_be_late
        self.shows_closing = all(part.shows_closing for part in parts)
        late = [part.closes_after_ms for part in parts if part.closes_after_ms is not None]
        self.closes_after_ms = max(late, default=None)

    def begin(self) -> list[Any]:
        return [part.begin() for part in self._parts]

    def process(self, state: list[Any], read: Read, now_ms: int | None) -> list[Expected]:
        parts = zip(self._parts, state, strict=True)
        return [output for part, own in parts for output in part.process(own, read, now_ms)]

    def content(self, state: list[Any], stored: Mapping[str, Any], now_ms: int | None) -> tuple[Any, Any]:
        parts = zip(self._parts, state, strict=True)
        pairs = [part.content(own, stored, now_ms) for part, own in parts]
        return [wanted for wanted, _ in pairs], [found for _, found in pairs]

    def seen(self, state: list[Any]) -> dict[str, dict[str, Any]] | None:
        parts = zip(self._parts, state, strict=True)
        return next((seen for part, own in parts if (seen := part.seen(own)) is not None), None)

    def timers(self, state: list[Any], clock: str) -> list[SetTimer]:
        return sorted(
            timer._replace(part=number)
            for number, part in enumerate(self._parts)
            for timer in part.timers(state[number], clock)
        )

    def fire(self, state: list[Any], timer: SetTimer, event_ms: int | None) -> list[Expected]:
        return self._parts[timer.part].fire(state[timer.part], timer, event_ms)

    def first_ms(self, state: list[Any]) -> int | None:
        parts = zip(self._parts, state, strict=True)
        times_ms = [part.first_ms(own) for part, own in parts]
        return min((at_ms for at_ms in times_ms if at_ms is not None), default=None)


class ForwardModel(Model):
    """A chain that passes records on with another key."""

    def __init__(self, topic: str, by: Callable[[str], str]) -> None:
        self._forward = {topic: by}

    def begin(self) -> None:
        return None

    def process(self, state: None, read: Read, now_ms: int | None) -> list[Expected]:
        return _forwarded(self._forward, read.written.name, read)

    def content(self, state: None, stored: Mapping[str, Any], now_ms: int | None) -> tuple[Any, Any]:
        return None, None


class CountModel(Model):
    """Counts by key. Its outputs go to the sink. Each record is also passed on to the other topics."""

    def __init__(self, stage: str, store: str, forward: Mapping[str, Callable[[str], str]]) -> None:
        self._stage = stage
        self._store = store
        self._forward = forward

    def begin(self) -> dict[str, dict[str, Any]]:
        return {}

    def process(self, state: dict[str, dict[str, Any]], read: Read, now_ms: int | None) -> list[Expected]:
        key, ident = read.written.name, read.written.data["ident"]
        before = state.pop(key, {})
        count = before.get("count", 0) + 1
        if count < FORGET_AT:
            state[key] = {**before, "count": count, "seen": [*before.get("seen", []), ident]}
        output = {"stage": self._stage, "ident": ident, "count": count}
        return [Expected(SINK, key, output), *_forwarded(self._forward, key, read)]

    def content(
        self, state: dict[str, dict[str, Any]], stored: Mapping[str, Any], now_ms: int | None
    ) -> tuple[Any, Any]:
        return state, stored[self._store]

    def seen(self, state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
        return state


@dataclass
class _Timers:
    """The state of a shard that sets timers: its counts, and by key and name the clock and time of each."""

    counts: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    set: dict[tuple[str, str], tuple[str, int]] = field(
        default_factory=dict[tuple[str, str], tuple[str, int]]
    )


class TimersModel(CountModel):
    """What `_count_and_set_timers_into` and the functions of its timers do."""

    has_timers = True
    may_wait = False

    def begin(self) -> Any:
        return _Timers()

    def process(self, state: Any, read: Read, now_ms: int | None) -> list[Expected]:
        outputs = super().process(state.counts, read, now_ms)
        key, ident, at_ms = read.written.name, read.written.data["ident"], read.written.timestamp_ms
        if ident % 3 == 0:
            state.set[key, "soon"] = ("event", at_ms + ident % 8)
        elif ident % 5 == 2:
            state.set.pop((key, "soon"), None)
        if ident % 4 == 1:
            state.set[key, "late"] = ("event", at_ms - 5)
        if ident % 10 == 4:
            state.set[key, "ring"] = ("event", at_ms + 2)
        elif ident % 2 == 0:
            state.set[key, "ring"] = ("processing", BEGIN_MS + ident * RING_EVERY_MS)
        elif ident % 7 == 3:
            state.set.pop((key, "ring"), None)
        return outputs

    def timers(self, state: Any, clock: str) -> list[SetTimer]:
        return sorted(
            SetTimer(at_ms, key, name) for (key, name), (of, at_ms) in state.set.items() if of == clock
        )

    def fire(self, state: Any, timer: SetTimer, event_ms: int | None) -> list[Expected]:
        at_ms, key, name, _ = timer
        of, _ = state.set.pop((key, name))
        own = state.counts.setdefault(key, {})
        own["fired"] = fired = own.get("fired", 0) + 1
        if name == "soon" and fired % 3 == 1:
            state.set[key, "late"] = ("event", at_ms + 2)
        elif name == "late" and at_ms % 2:
            state.set.pop((key, "ring"), None)
        elif name == "ring":
            soon_ms = BEGIN_MS + (at_ms - BEGIN_MS) // RING_EVERY_MS
            if event_ms is not None and soon_ms <= (at_ms if of == "event" else event_ms):
                soon_ms = event_ms + 1  # no progress, so it waits until event time moves on
            state.set[key, "soon"] = ("event", soon_ms)
        data = {"stage": self._stage, "timer": name, "ident": at_ms - BEGIN_MS, "fired": fired}
        return [Expected(SINK, key, data, at_ms)]

    def content(self, state: Any, stored: Mapping[str, Any], now_ms: int | None) -> tuple[Any, Any]:
        due = {(clock, at_ms, key, name): None for (key, name), (clock, at_ms) in state.set.items()}
        kept = TimerStore(self._store)
        found = stored[self._store], stored[kept.name], stored[kept.due_name]
        counted = {**state.set, _COUNT: len(state.set)} if state.set else {}
        return (state.counts, counted, due), found

    def seen(self, state: Any) -> dict[str, dict[str, Any]] | None:
        return state.counts


class KindsModel(Model):
    """What `_remember` does. `last`, `seen` and `recent` hold pairs of time and value. Expired ones are
    removed when a record comes, and before the state is compared.
    """

    def __init__(self, stage: str, forward: Mapping[str, Callable[[str], str]]) -> None:
        self._stage = stage
        self._forward = forward

    def begin(self) -> dict[str, Any]:
        return {"clock": 0, "last": {}, "seen": {}, "recent": {}}

    def process(self, state: dict[str, Any], read: Read, now_ms: int | None) -> list[Expected]:
        key, ident = read.written.name, read.written.data["ident"]
        now = state["clock"] = max(state["clock"], read.written.timestamp_ms)
        self._expire(state)
        last, seen, recent = state["last"], state["seen"], state["recent"]
        before = last[key][1] if key in last else -1
        if ident % 3:
            last[key] = (now, ident)
        seen[key, ident % 4] = (now, ident)
        if ident % 5 == 4:
            seen.pop((key, (ident + 1) % 4), None)
        recent[key] = [*recent.get(key, []), (now, ident)][-3:]
        output = {
            "stage": self._stage,
            "ident": ident,
            "before": before,
            "seen": [[number, value] for (of, number), (_, value) in sorted(seen.items()) if of == key],
            "recent": [value for _, value in recent[key]],
        }
        return [Expected(SINK, key, output), *_forwarded(self._forward, key, read)]

    def content(
        self, state: dict[str, Any], stored: Mapping[str, Any], now_ms: int | None
    ) -> tuple[Any, Any]:
        self._expire(state)
        found = {name.removeprefix(f"{COUNT}/"): entries for name, entries in stored.items()}
        lists: dict[str, list[tuple[int, int]]] = {}
        for (key, _place), element in sorted(found["recent"].items()):
            lists.setdefault(key, []).append(element)
        names = ("last", "seen", "recent", "clock")
        return [state[name] for name in names], [
            found["last"],
            found["seen"],
            lists,
            found["/clock"].get("", 0),
        ]

    def _expire(self, state: dict[str, Any]) -> None:
        over = state["clock"] - TTL_MS
        for name in ("last", "seen"):
            state[name] = {key: pair for key, pair in state[name].items() if pair[0] > over}
        recent = {key: [pair for pair in pairs if pair[0] > over] for key, pairs in state["recent"].items()}
        state["recent"] = {key: pairs for key, pairs in recent.items() if pairs}


class WindowsModel(Model):
    """Windows of one size. The state holds, by end and key of each open window, the times and values of its
    records in the order in which they were processed.

    Args:
        stage: the stage's name.
        step: the name of the window.
        size, every, grace: as in the job, in milliseconds.
        updates: whether it emits a result for each record. Nobody sees then when such a window closes.
    """

    def __init__(
        self, stage: str, step: str, size: int, every: int, grace: int, *, updates: bool = False
    ) -> None:
        self._stage = stage
        self._step = step
        self._size = size
        self._every = every
        self._updates = updates
        self.shows_closing = not updates
        self.closes_after_ms: int = grace
        self.has_timers = True

    def begin(self) -> dict[tuple[int, str], list[tuple[int, Any]]]:
        return {}

    def process(self, state: Any, read: Read, now_ms: int | None) -> list[Expected]:
        key, value, at_ms = read.written.name, read.written.data, read.written.time_ms
        taking = [end for end in self._ends(at_ms) if now_ms is None or now_ms < end + self.closes_after_ms]
        if not taking:
            return [Expected(LATE, key, value)]
        outputs: list[Expected] = []
        for end in taking:
            state.setdefault((end, key), []).append((at_ms, value))
            if self._updates:
                outputs.append(self._result(state, end, key)._replace(timestamp_ms=at_ms))
        return outputs

    def timers(self, state: Any, clock: str) -> list[SetTimer]:
        if clock != "event" or self._updates:
            return []
        return sorted(SetTimer(end + self.closes_after_ms, key, "") for end, key in state)

    def first_ms(self, state: Any) -> int | None:
        return min((end + self.closes_after_ms for end, _ in state), default=None)

    def fire(self, state: Any, timer: SetTimer, event_ms: int | None) -> list[Expected]:
        end = timer.at_ms - self.closes_after_ms
        result = self._result(state, end, timer.key)
        del state[end, timer.key]
        return [result]

    def _ends(self, at_ms: int) -> list[int]:
        """The ends of the windows that a time is in."""
        starts = [start for start in range(at_ms - self._size + 1, at_ms + 1) if start % self._every == 0]
        return [start + self._size for start in starts]

    def _start(self, end: int) -> int:
        """When the window with that end begins."""
        return end - self._size

    def _result(self, state: Any, end: int, key: str) -> Expected:
        return result_of(self._stage, self._step, key, self._start(end), end, state[end, key])

    def content(self, state: Any, stored: Mapping[str, Any], now_ms: int | None) -> tuple[Any, Any]:
        found = stored[f"{self._step}//windows"]
        if self._updates and now_ms is not None:
            # They close in the order of their ends. Nothing else is known of when.
            due = sorted(window for window in state if window[0] + self.closes_after_ms <= now_ms)
            while due and due[0] not in found:
                del state[due.pop(0)]
        return {window: kept_of(rows) for window, rows in state.items()}, found


@dataclass
class _Sessions:
    """The records of sessions, as pairs of time and value.

    Attributes:
        open: by key, of all sessions that take further records.
        due: by end and key, of the sessions that are due.
    """

    open: dict[str, list[tuple[int, Any]]] = field(default_factory=dict[str, list[tuple[int, Any]]])
    due: dict[tuple[int, str], list[tuple[int, Any]]] = field(
        default_factory=dict[tuple[int, str], list[tuple[int, Any]]]
    )


class SessionsModel(Model):
    """Sessions. It sorts the records of a key and cuts them into sessions anew each time.

    Args:
        stage: the stage's name.
        step: the name of the window.
        gap, grace: as in the job, in milliseconds.
        forward: the topic to which results are passed on, and their new key. None: they go to the sink.
    """

    def __init__(
        self,
        stage: str,
        step: str,
        gap: int,
        grace: int,
        forward: tuple[str, Callable[[str], str]] | None = None,
    ) -> None:
        self._stage = stage
        self._step = step
        self._gap = gap
        self._forward = forward
        self.closes_after_ms: int = grace + 1  # a record exactly at its end belongs to a session
        self.has_timers = True

    def begin(self) -> _Sessions:
        return _Sessions()

    def process(self, state: _Sessions, read: Read, now_ms: int | None) -> list[Expected]:
        key, value, at_ms = read.written.name, read.written.data, read.written.time_ms
        self._part(state, now_ms)
        row, rows = (at_ms, value), state.open.get(key, [])
        session = next(one for one in self._cut([*rows, row]) if row in one)
        if now_ms is not None and session[-1][0] + self._gap + self.closes_after_ms <= now_ms:
            return [Expected(LATE, key, value)]
        state.open[key] = [*rows, row]
        return []

    def timers(self, state: _Sessions, clock: str) -> list[SetTimer]:
        if clock != "event":
            return []
        return sorted(SetTimer(end + self.closes_after_ms, key, "") for end, key in self._all(state))

    def fire(self, state: _Sessions, timer: SetTimer, event_ms: int | None) -> list[Expected]:
        self._part(state, event_ms)
        end, key = timer.at_ms - self.closes_after_ms, timer.key
        rows = state.due.pop((end, key))
        result = result_of(self._stage, self._step, key, rows[0][0], end, rows)
        if self._forward is None:
            return [result]
        topic, by = self._forward
        return [result._replace(topic=topic, key=by(key))]

    def content(self, state: _Sessions, stored: Mapping[str, Any], now_ms: int | None) -> tuple[Any, Any]:
        self._part(state, now_ms)
        wanted: dict[str, list[Any]] = {}
        for (end, key), rows in sorted(self._all(state).items()):
            wanted.setdefault(key, []).append([rows[0][0], end, kept_of(rows)])
        found = stored[f"{self._step}//sessions"]
        ordered = {
            key: [[start, end, [kept[0], sorted(kept[1]), kept[2]]] for start, end, kept in sessions]
            for key, sessions in found.items()
        }
        notes: dict[str, list[int]] = {}
        for end, key in stored[f"{self._step}//due"]:
            notes.setdefault(key, []).append(end)
        # There may be notes besides that of the first session. A note that is too early is moved later.
        wrong = [
            key
            for key in sorted({*wanted, *notes})
            if key not in wanted
            or key not in notes
            or not min(notes[key]) <= wanted[key][0][1]
            or not max(notes[key]) <= wanted[key][-1][1]
        ]
        return (wanted, []), (ordered, wrong)

    def _part(self, state: _Sessions, now_ms: int | None) -> None:
        """Sessions that are due take no more records."""
        for key, rows in list(state.open.items()):
            for session in self._cut(rows):
                end = session[-1][0] + self._gap
                if now_ms is not None and end + self.closes_after_ms <= now_ms:
                    state.due[end, key] = session
                    state.open[key] = [row for row in state.open[key] if row not in session]

    def _all(self, state: _Sessions) -> dict[tuple[int, str], list[tuple[int, Any]]]:
        open_ones = {
            (session[-1][0] + self._gap, key): session
            for key, rows in state.open.items()
            for session in self._cut(rows)
        }
        return {**state.due, **open_ones}

    def _cut(self, rows: list[tuple[int, Any]]) -> list[list[tuple[int, Any]]]:
        sessions: list[list[tuple[int, Any]]] = []
        for row in sorted(rows, key=lambda row: row[0]):
            if sessions and row[0] - sessions[-1][-1][0] <= self._gap:
                sessions[-1].append(row)
            else:
                sessions.append([row])
        return sessions


def kept_of(rows: list[tuple[int, Any]]) -> list[Any]:
    """What the aggregates keep of these records: see `AGGREGATES`."""
    if "idents" in rows[0][1]:
        idents = [ident for _, value in rows for ident in value["idents"]]
        return [sum(value["n"] for _, value in rows), [sorted(idents)], len(rows)]
    newest_ms, newest = max((at_ms, value["ident"]) for at_ms, value in rows)
    return [len(rows), [value["ident"] for _, value in rows], [newest_ms, newest]]


def result_of(stage: str, step: str, key: str, start: int, end: int, rows: list[tuple[int, Any]]) -> Expected:
    """The result of a window with these records."""
    if "idents" in rows[0][1]:
        idents = [ident for _, value in rows for ident in value["idents"]]
        n, newest = sum(value["n"] for _, value in rows), len(rows)
    else:
        idents = [value["ident"] for _, value in rows]
        n, newest = len(rows), max(rows, key=lambda row: row[0])[1]["ident"]
    data = {
        "stage": stage,
        "window": step,
        "key": key,
        "ident": end - BEGIN_MS,
        "start": start - BEGIN_MS,
        "n": n,
        "idents": sorted(idents),
        "last": newest,
    }
    return Expected(SINK, key, data, end - 1)


def _forwarded(forward: Mapping[str, Callable[[str], str]], key: str, read: Read) -> list[Expected]:
    return [Expected(topic, by(key), read.written.data) for topic, by in forward.items()]


# --- jobs -------------------------------------------------------------------------------------------------


def _count_into(stage: str) -> Callable[[Any, Any], dict[str, Any]]:
    def count(ctx: Any, record: Any) -> dict[str, Any]:
        state = ctx.state
        so_far = state.get("count", 0) + 1
        if so_far == FORGET_AT:
            state.clear()
        else:
            state["count"] = so_far
            state.setdefault("seen", []).append(record["ident"])
        return {"stage": stage, "ident": record["ident"], "count": so_far}

    return count


def _count_and_set_timers_into(stage: str) -> Callable[[Any, Any], dict[str, Any]]:
    count = _count_into(stage)

    def count_and_set_timers(ctx: Any, record: Any) -> dict[str, Any]:
        ident = record["ident"]
        if ident % 3 == 0:
            ctx.timer("soon", at=ctx.timestamp + ident % 8)
        elif ident % 5 == 2:
            ctx.cancel_timer("soon")
        if ident % 4 == 1:
            ctx.timer("late", at=ctx.timestamp - 5)
        if ident % 10 == 4:
            ctx.timer("ring", at=ctx.timestamp + 2)
        elif ident % 2 == 0:
            ctx.timer("ring", at=BEGIN_MS + ident * RING_EVERY_MS, clock="processing")
        elif ident % 7 == 3:
            ctx.cancel_timer("ring")
        return count(ctx, record)

    return count_and_set_timers


def _timers_of(stage: str) -> dict[str, Callable[[Any, Any], dict[str, Any]]]:
    """Each writes one output. So the checks know where among the outputs it has fired."""

    def fired(ctx: Any, name: str) -> dict[str, Any]:
        ctx.state["fired"] = number = ctx.state.get("fired", 0) + 1
        return {"stage": stage, "timer": name, "ident": ctx.timestamp - BEGIN_MS, "fired": number}

    def soon(_key: str, ctx: Any) -> dict[str, Any]:
        told = fired(ctx, "soon")
        if told["fired"] % 3 == 1:
            ctx.timer("late", at=ctx.timestamp + 2)
        return told

    def late(_key: str, ctx: Any) -> dict[str, Any]:
        if ctx.timestamp % 2:
            ctx.cancel_timer("ring")
        return fired(ctx, "late")

    def ring(_key: str, ctx: Any) -> dict[str, Any]:
        ctx.timer("soon", at=BEGIN_MS + (ctx.timestamp - BEGIN_MS) // RING_EVERY_MS)
        return fired(ctx, "ring")

    return {"soon": soon, "late": late, "ring": ring}


_TTL = timedelta(milliseconds=TTL_MS)
_LAST: ValueState[int] = ValueState("last", "int", ttl=_TTL)
_SEEN: MapState[int, int] = MapState("seen", key="int", value="int", ttl=_TTL)
_RECENT: ListState[int] = ListState("recent", "int", ttl=_TTL)


def _remember(ctx: Any, record: Any) -> dict[str, Any]:
    last, seen, recent = ctx.value(_LAST), ctx.map(_SEEN), ctx.list(_RECENT)
    ident, before = record["ident"], last.get(-1)
    if ident % 3:
        last.set(ident)
    seen[ident % 4] = ident
    if ident % 5 == 4:
        seen.pop((ident + 1) % 4, None)
    recent.append(ident)
    if len(recent) > 3:
        recent.popleft()
    return {
        "stage": SOURCE,
        "ident": ident,
        "before": before,
        "seen": [list(pair) for pair in seen.scan()],
        "recent": list(recent),
    }


AGGREGATES: dict[str, Any] = {
    "n": count(),
    "idents": collect(lambda record: record["ident"]),
    "last": last(lambda record: record["ident"]),
}
"""What windows compute of records."""
_OF_RESULTS: dict[str, Any] = {
    "n": sum_(lambda result: result["n"]),
    "idents": reduce(lambda one, other: sorted(one + other), lambda result: result["idents"]),
    "last": count(),
}
"""What windows compute of the results of others."""


def told_by(stage: str, step: str) -> Callable[[Any], dict[str, Any]]:
    """Makes the output of a result."""

    def told(result: Any) -> dict[str, Any]:
        return {
            "stage": stage,
            "window": step,
            "key": result["key"],
            "ident": result["end"] - BEGIN_MS,
            "start": result["start"] - BEGIN_MS,
            "n": result["n"],
            "idents": sorted(result["idents"]),
            "last": result["last"],
        }

    return told


def group_of(record: Any) -> str:
    """The group of a record's key."""
    return GROUP_OF[record["key"]]


@dataclass(frozen=True)
class SimJob:
    """A job in the simulation.

    Attributes:
        topology: the job, built.
        models: of its stages, by name. Empty: whoever runs it compares the outputs with something else.
        given: what its sources get, as pairs of topic and record, in order. None: records are drawn.
        there: how many of those that are given are there before the first process starts.
        outage: what its sources get, in order, at a moment at which all processes die. Empty: they don't.
        partitions: the number of partitions of all topics. None: the seed decides.
        has_results: whether what crosses the repartition is results, and not records as they are.
        comes_in_order: whether most records are written in the order of their timestamps.
        stamped: the sources whose records have their time in the value.
        tables: the sources that are read as tables.
        dead_letters_max: the limit on dead letters, which isn't reached. 0: they aren't counted. Otherwise
            the coordinator has to know how many there are.
        awaits_timers: whether a run goes on until all timers in processing time have fired. Jobs with models
            always do.
        clock_error_ms_max: how wrong the clocks of hosts may be.
        judge: looks at the records in `SOURCE`, by partition, and at what a read_committed reader finds in
            the topics that the job writes. Returns what is wrong. It knows nothing of models.
    """

    topology: Topology
    models: Mapping[str, Model] = field(default_factory=dict[str, Model])
    given: Sequence[tuple[str, Written]] | None = None
    there: int = 0
    outage: Sequence[tuple[str, Written]] = ()
    partitions: int | None = None
    has_results: bool = False
    comes_in_order: bool = False
    stamped: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()
    awaits_timers: bool = False
    dead_letters_max: int = 0
    clock_error_ms_max: int = 20
    judge: Callable[[Sequence[Sequence[Written]], Mapping[str, list[list[Written]]]], str] | None = None

    def as_in(self, topic: str, record: Written) -> Written:
        """A record that was drawn, as that source has it."""
        ident = record.data["ident"]
        if topic in self.stamped:
            value = as_json({**record.data, "at": record.timestamp_ms})
            return Written(record.key, value, BEGIN_MS + ident * 7 % 50)
        if topic in self.tables and ident % 5 == 4:
            return Written(record.key, None, record.timestamp_ms)  # a tombstone
        return record

    @cached_property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """The topics that each stage reads."""
        return {stage.name: stage.topics for stage in self.topology.stages}

    @cached_property
    def stages_reading(self) -> dict[str, str]:
        """The stage that reads a topic."""
        return {topic: stage for stage, topics in self.inputs.items() for topic in topics}

    @cached_property
    def changelogs(self) -> dict[str, str]:
        """The stage that a changelog belongs to."""
        return {stage.changelog: stage.name for stage in self.topology.stages if stage.changelog is not None}

    @cached_property
    def sources(self) -> list[str]:
        """The topics that others write to."""
        return [source.name for source in self.topology.sources]

    @cached_property
    def repartitions(self) -> list[str]:
        """The topics that one stage writes and another one reads."""
        return [topic for topic in self.stages_reading if topic not in self.sources]

    @cached_property
    def outputs(self) -> list[str]:
        """The topics that its stages write."""
        return list({spec.name: None for stage in self.topology.stages for spec in written_topics(stage)})

    @cached_property
    def has_idle_inputs(self) -> bool:
        """Whether its sources become idle."""
        watermarks = (source.watermark for stage in self.topology.stages for source in stage.inputs)
        return any(watermark is not None and watermark.idle_ms is not None for watermark in watermarks)

    def timers_set(self, stage: str, encoded: Mapping[bytes, bytes]) -> Iterator[tuple[str, int, str, str]]:
        """The timers, open windows and results at intervals in encoded entries: clock, time, key and name of
        each.
        """
        declared = self.topology.stage(stage)
        if not (declared.timed_processes or declared.windows):
            return
        stored = self.stored(stage, encoded)
        for process in declared.timed_processes:
            yield from stored[TimerStore(process.name).due_name]
        for window in declared.windows:
            if window.store.at_intervals:
                noted = stored[window.store.notes_name]
                is_gathered = isinstance(window.windows, Gathered)
                early_ms = window.windows.windows.grace_ms if is_gathered else 0
                yield from ((window.clock, at_ms - early_ms, key, window.name) for at_ms, key in noted)
            if window.store.kind == "counted":
                continue
            entries = stored[window.store.name]
            if window.store.kind == "sliding":
                ends = list(stored[window.store.due_name])
            elif window.store.kind == "sessions":
                ends = [(session[1], key) for key, sessions in entries.items() for session in sessions]
            else:
                ends = list(entries)
            yield from ((window.clock, end + window.closes_after_ms, key, window.name) for end, key in ends)

    def changelog(self, shard: ShardId) -> tuple[str, int]:
        """The partition with the shard's deltas."""
        return f"{self.topology.stage(shard.stage).changelog}", shard.partition

    def stored(self, stage: str, encoded: Mapping[bytes, bytes]) -> dict[str, Any]:
        """The content of encoded entries, by store: dicts and values by key, maps by key and key of the
        entry, lists by key and place, windows by end and key, sessions by key. With a TTL, each value is a
        pair with its time.
        """
        readers = _readers(self.topology.stage(stage))
        found: dict[str, Any] = {name: {} for name, _ in readers.values()}
        for key, raw in encoded.items():
            if raw:
                name, read = readers[key[:STORE_PREFIX_BYTES]]
                at, value = read(key[STORE_PREFIX_BYTES:], raw)
                found[name][at] = value
        return found


_ReadEntry = Callable[[bytes, bytes], tuple[Any, Any]]


def _readers(stage: Stage) -> dict[bytes, tuple[str, _ReadEntry]]:
    """By the prefix of its keys: the name of a store, and the function that decodes one of its entries."""
    readers: dict[bytes, tuple[str, _ReadEntry]] = {}
    time_of = value_codec("int")[0]
    for name in stage.stores:
        readers[store_prefix(name)] = (
            name,
            lambda key, raw: (key.decode(errors="replace"), decode_state(raw)),
        )
    for store in stage.state_stores:
        for name in store.store_names:
            readers[store_prefix(name)] = (name, lambda key, raw: (key, raw))
        readers[store_prefix(store.clock_name)] = (
            store.clock_name,
            lambda _key, raw: ("", time_of(raw[1:])),
        )
        readers[store_prefix(store.name)] = (store.name, _reader_of(store))
    for process in stage.timed_processes:
        kept = TimerStore(process.name)
        readers[store_prefix(kept.name)] = (kept.name, _read_timer)
        readers[store_prefix(kept.due_name)] = (kept.due_name, _read_due)
    of_kind = {"sessions": _read_by_key, "counted": _read_by_key, "sliding": _read_sliding}
    for window in stage.windows:
        store = window.store
        readers[store_prefix(store.name)] = store.name, of_kind.get(store.kind, _read_window)
        if window.is_timed:
            readers[store_prefix(store.grace_name)] = (store.grace_name, _read_by_key)
        if store.has_notes:
            readers[store_prefix(store.due_name)] = (store.due_name, _read_window_at)
        if store.at_intervals:
            read = _read_window if store.kind == "windows" else _read_window_at
            readers[store_prefix(store.notes_name)] = (store.notes_name, read)
        if store.in_processing_time:
            readers[store_prefix(store.clock_name)] = (
                store.clock_name,
                lambda _key, raw: ("", time_of(raw[1:])),
            )
    for kept in stage.all_stores:
        if isinstance(kept, TableStore):
            readers[store_prefix(kept.name)] = (kept.name, _READ_TABLE[kept.of])
    return readers


_COUNT = "how many"
_CLOCKS = {b"e": "event", b"p": "processing"}


def _read_timer(key: bytes, raw: bytes) -> tuple[Any, Any]:
    """By key and name: the clock and time of a timer. And how many there are."""
    if not key:
        return _COUNT, decode_time(raw[1:])
    group, when = group_of_entry(key), raw[1:]
    at = key_of_group(group).decode(errors="replace"), key[len(group) :].decode()
    return at, (_CLOCKS[when[:1]], decode_time(when[1:]))


def _read_due(key: bytes, _raw: bytes) -> tuple[Any, Any]:
    """By clock, time, key and name: nothing."""
    of, name_at = take_ended(key, 9)
    name = key[name_at:].decode()
    return (_CLOCKS[key[:1]], decode_time(key[1:9]), of.decode(errors="replace"), name), None


def _read_window_at(key: bytes, _raw: bytes) -> tuple[Any, Any]:
    """By end and key: nothing."""
    return (decode_time(key[:8]), key[8:].decode(errors="replace")), None


def _read_window(key: bytes, raw: bytes) -> tuple[Any, Any]:
    """By end and key: what the aggregates keep."""
    return _read_window_at(key, raw)[0], json.loads(raw[1:])


def _read_by_key(key: bytes, raw: bytes) -> tuple[Any, Any]:
    """By key: start, end and what the aggregates keep, of each session. Or counted windows, or a group."""
    return key.decode(errors="replace"), json.loads(raw[1:])


def _read_sliding(key: bytes, raw: bytes) -> tuple[Any, Any]:
    """By key: time and value of each record. At intervals, a pair of them and of the results that are noted:
    end and time, and if they are set apart, the records.
    """
    _closed, _noted, records, *noted = msgspec.msgpack.decode(raw[1:])
    rows = _rows_of(records)
    if noted:
        results = [(end, at_ms, *map(_rows_of, former)) for end, at_ms, *former in noted[0]]
        return key.decode(errors="replace"), (rows, results)
    return key.decode(errors="replace"), rows


def _rows_of(records: list[Any]) -> list[tuple[int, Any]]:
    return [(at_ms, json.loads(value)) for at_ms, _came, value, *_ in records]


def _read_row(key: bytes, raw: bytes) -> tuple[Any, Any]:
    """By key: the time and the value of a row."""
    return key.decode(errors="replace"), (decode_time(raw[1:9]), json.loads(raw[9:]))


def _read_member(key: bytes, raw: bytes) -> tuple[Any, Any]:
    """By key: the group of a row, and what it contributes."""
    group, value = parts_of_contribution(raw[1:])
    return key.decode(errors="replace"), (group.decode(), json.loads(value))


_READ_TABLE: dict[str, _ReadEntry] = {"rows": _read_row, "members": _read_member, "groups": _read_by_key}


def _reader_of(store: StateStore) -> _ReadEntry:
    decode = value_codec(store.state.value_kind)[0]

    def read(key: bytes, raw: bytes) -> tuple[Any, Any]:
        at: Any
        if store.state.kind == "value":
            at = key.decode()
        else:
            group = group_of_entry(key) if isinstance(store.state, MapState) else key[:-8]
            rest = key[len(group) :]
            place = ordered_key(store.state.key)[1](rest) if isinstance(store.state, MapState) else rest
            at = (key_of_group(group).decode(), place)
        if raw[:1] == b"\x01":
            return at, (decode_time(raw[1:9]), decode(raw[9:]))
        return at, decode(raw[1:])

    return read


@cache
def counting_job(*, merged: bool, timed: bool = False) -> SimJob:
    """`in` counts by key and feeds `totals`, which counts by group.

    If `merged`, there is a third stage: `more` counts by key what comes from another source, and from `in`
    through a repartition of its own. If `timed`, the job uses event time.
    """
    job = Job(JOB)
    watermark = {"watermark": Watermark(MAX_DELAY_MS)} if timed else {}
    source, sink = job.topic(SOURCE, **watermark), job.topic(SINK)
    job.stream(source).process(_count_into(SOURCE), name=COUNT).to(sink)
    job.stream(source).key_by(group_of).process(_count_into(TOTALS), name=TOTALS).to(sink)
    forward: dict[str, Callable[[str], str]] = {REPARTITION: GROUP_OF.__getitem__}
    models: dict[str, Model] = {TOTALS: CountModel(TOTALS, TOTALS, {})}
    if merged:
        crossing = job.stream(source).key_by("key", name=BOTH)
        job.merge(job.topic(MORE), crossing).process(_count_into(MORE), name=BOTH).to(sink)
        forward[CROSSING] = str
        models[MORE] = CountModel(MORE, BOTH, {})
    models[SOURCE] = CountModel(SOURCE, COUNT, forward)
    return SimJob(job.build(Settings()), models)


@cache
def kinds_job() -> SimJob:
    """`in` remembers a value, a map and a list for each key, all with a TTL. `totals` is as in the others."""
    job = Job(JOB)
    source, sink = job.topic(SOURCE), job.topic(SINK)
    job.stream(source).process(_remember, name=COUNT, states=[_LAST, _SEEN, _RECENT]).to(sink)
    job.stream(source).key_by(group_of).process(_count_into(TOTALS), name=TOTALS).to(sink)
    models: dict[str, Model] = {
        SOURCE: KindsModel(SOURCE, {REPARTITION: GROUP_OF.__getitem__}),
        TOTALS: CountModel(TOTALS, TOTALS, {}),
    }
    return SimJob(job.build(Settings()), models)


@cache
def timers_job(*, behind: bool) -> SimJob:
    """`in` counts by key and sets timers, and its inputs become idle. `totals` is as in the others. If
    `behind`, it sets timers as well, so it is told of event time in each epoch.
    """
    return _timers_job(Watermark(MAX_DELAY_MS, idle_ms=IDLE_MS), behind=behind)


def _timers_job(watermark: Watermark, *, behind: bool) -> SimJob:
    job = Job(JOB)
    source, sink = job.topic(SOURCE, watermark=watermark), job.topic(SINK)
    job.stream(source).process(_count_and_set_timers_into(SOURCE), name=COUNT, timers=_timers_of(SOURCE)).to(
        sink
    )
    grouped = job.stream(source).key_by(group_of)
    models: dict[str, Model] = {SOURCE: TimersModel(SOURCE, COUNT, {REPARTITION: GROUP_OF.__getitem__})}
    if behind:
        grouped.process(_count_and_set_timers_into(TOTALS), name=TOTALS, timers=_timers_of(TOTALS)).to(sink)
        models[TOTALS] = TimersModel(TOTALS, TOTALS, {})
    else:
        grouped.process(_count_into(TOTALS), name=TOTALS).to(sink)
        models[TOTALS] = CountModel(TOTALS, TOTALS, {})
    return SimJob(job.build(Settings()), models)


@cache
def drifting_job() -> SimJob:
    """The one with timers in both stages. A partition of `in` that is far ahead of others isn't read on."""
    return _timers_job(Watermark(MAX_DELAY_MS, idle_ms=IDLE_MS, max_drift_ms=MAX_DRIFT_MS), behind=True)


# --- jobs with windows --------------------------------------------------------------------------------------

_MS = timedelta(milliseconds=1)
_WATERMARK = Watermark(MAX_DELAY_MS)


@cache
def tumbling_job() -> SimJob:
    """`in` has tumbling and hopping windows. `totals`, behind a repartition, has sessions."""
    job = Job(JOB)
    source, sink, late = job.topic(SOURCE, watermark=_WATERMARK), job.topic(SINK), job.topic(LATE)
    stream = job.stream(source)
    stream.window(Tumbling(8 * _MS, grace=5 * _MS), late=late, name=COUNT).aggregate(**AGGREGATES).map(
        told_by(SOURCE, COUNT)
    ).to(sink)
    stream.window(Hopping(12 * _MS, 4 * _MS, grace=2 * _MS), late=late, name=AGAIN).aggregate(
        **AGGREGATES
    ).map(told_by(SOURCE, AGAIN)).to(sink)
    stream.key_by(group_of).window(Session(3 * _MS, grace=4 * _MS), late=late, name=TOTALS).aggregate(
        **AGGREGATES
    ).map(told_by(TOTALS, TOTALS)).to(sink)
    models: dict[str, Model] = {
        SOURCE: StageModel(
            WindowsModel(SOURCE, COUNT, 8, 8, 5),
            WindowsModel(SOURCE, AGAIN, 12, 4, 2),
            ForwardModel(REPARTITION, GROUP_OF.__getitem__),
        ),
        TOTALS: SessionsModel(TOTALS, TOTALS, 3, 4),
    }
    return SimJob(job.build(Settings()), models, comes_in_order=True)


@cache
def sessions_job() -> SimJob:
    """`in` has sessions. Their results cross the repartition, and are in tumbling windows of `totals`. No
    result may be too late for them.
    """
    job = Job(JOB)
    source, sink, late = job.topic(SOURCE, watermark=_WATERMARK), job.topic(SINK), job.topic(LATE)
    job.stream(source).window(Session(4 * _MS, grace=6 * _MS), late=late, name=COUNT).aggregate(
        **AGGREGATES
    ).map(told_by(SOURCE, COUNT)).key_by(group_of).window(
        Tumbling(15 * _MS), late=late, name=TOTALS
    ).aggregate(**_OF_RESULTS).map(told_by(TOTALS, TOTALS)).to(sink)
    models: dict[str, Model] = {
        SOURCE: SessionsModel(SOURCE, COUNT, 4, 6, (REPARTITION, GROUP_OF.__getitem__)),
        TOTALS: StageModel(WindowsModel(TOTALS, TOTALS, 15, 15, 0), may_be_late=False),
    }
    return SimJob(job.build(Settings()), models, has_results=True, comes_in_order=True)


@cache
def updates_job() -> SimJob:
    """`in` has hopping windows and `totals` has tumbling ones. Both emit a result for each record."""
    job = Job(JOB)
    source, sink, late = job.topic(SOURCE, watermark=_WATERMARK), job.topic(SINK), job.topic(LATE)
    stream = job.stream(source)
    stream.window(Hopping(12 * _MS, 4 * _MS, grace=6 * _MS), late=late, name=COUNT, emit="update").aggregate(
        **AGGREGATES
    ).map(told_by(SOURCE, COUNT)).to(sink)
    stream.key_by(group_of).window(
        Tumbling(10 * _MS, grace=3 * _MS), late=late, name=TOTALS, emit="update"
    ).aggregate(**AGGREGATES).map(told_by(TOTALS, TOTALS)).to(sink)
    models: dict[str, Model] = {
        SOURCE: StageModel(
            WindowsModel(SOURCE, COUNT, 12, 4, 6, updates=True),
            ForwardModel(REPARTITION, GROUP_OF.__getitem__),
        ),
        TOTALS: WindowsModel(TOTALS, TOTALS, 10, 10, 3, updates=True),
    }
    return SimJob(job.build(Settings()), models, comes_in_order=True)


@cache
def merged_windows_job(max_drift_ms: int | None = None) -> SimJob:
    """`more` merges another source with a repartition of `in`. It sets timers in both clocks and has tumbling
    windows and sessions. The inputs of both sources become idle.
    """
    job = Job(JOB)
    watermark = Watermark(MAX_DELAY_MS, idle_ms=IDLE_MS, max_drift_ms=max_drift_ms)
    source, more = job.topic(SOURCE, watermark=watermark), job.topic(MORE, watermark=watermark)
    sink, late = job.topic(SINK), job.topic(LATE)
    job.stream(source).process(_count_into(SOURCE), name=COUNT).to(sink)
    merged = job.merge(more, job.stream(source).key_by("key", name=BOTH))
    merged.process(_count_and_set_timers_into(MORE), name=BOTH, timers=_timers_of(MORE)).to(sink)
    merged.window(Tumbling(9 * _MS, grace=3 * _MS), late=late, name=AGAIN).aggregate(**AGGREGATES).map(
        told_by(MORE, AGAIN)
    ).to(sink)
    merged.window(Session(4 * _MS, grace=5 * _MS), late=late, name=TOTALS).aggregate(**AGGREGATES).map(
        told_by(MORE, TOTALS)
    ).to(sink)
    models: dict[str, Model] = {
        SOURCE: CountModel(SOURCE, COUNT, {CROSSING: str}),
        MORE: StageModel(
            TimersModel(MORE, BOTH, {}),
            WindowsModel(MORE, AGAIN, 9, 9, 3),
            SessionsModel(MORE, TOTALS, 4, 5),
        ),
    }
    return SimJob(job.build(Settings()), models, comes_in_order=True)
