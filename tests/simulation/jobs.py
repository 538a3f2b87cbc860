"""The jobs in the simulation, declared as any user's job, and for each of their stages a slow obvious model.

Responsible for: the jobs (a counter with a second stage behind a repartition; the same with a third stage
that merges two topics; one that declares values, maps and lists with a TTL; the first one with event time;
and that one with timers and inputs that become idle), their records, and the models. The engine processes the
records; the checks do the same with a model, which uses plain dicts and knows nothing of epochs, layers or
bytes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, cached_property
from typing import Any, NamedTuple

from fcluster import Job, ListState, MapState, ValueState, Watermark
from fcluster.common.ids import ShardId, repartition_topic
from fcluster.common.settings import Settings
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
from fcluster.graph.partitioner import partition_of
from fcluster.graph.states import StateStore
from fcluster.graph.timers import TimerStore
from fcluster.graph.topology import Stage, Topology, written_topics

JOB = "sim"
SOURCE, SINK = "in", "out"
MORE = "more"
"""The other source of the merged job."""
COUNT, TOTALS, BOTH = "count", "totals", "both"
"""The names of the handlers."""
SEEDS_OF_A_JOB = 1_000_000
MERGED_SEEDS_FROM = SEEDS_OF_A_JOB
KINDS_SEEDS_FROM = 2 * SEEDS_OF_A_JOB
TIMED_SEEDS_FROM = 3 * SEEDS_OF_A_JOB
TIMERS_SEEDS_FROM = 4 * SEEDS_OF_A_JOB
"""Which job a seed plays: from these on the merged one, the one with declared states, the first one with
event time, and the one with timers."""
MAX_DELAY_MS = 3
"""Of the jobs with event time."""
IDLE_MS = 150
"""After so long without a record, an input of the job with timers is idle."""
RING_EVERY_MS = 30
"""Of the timers in processing time: that of record n is due n times so many milliseconds after the start."""
FORGET_AT = 6
"""A key's state is deleted when its count gets there, so that deletions are part of the story."""
BEGIN_MS = 1_700_000_000_000
TTL_MS = 12
"""Of all states that have one. Idents rise with time and are timestamps as well."""
REPARTITION = repartition_topic(JOB, TOTALS)
CROSSING = repartition_topic(JOB, BOTH)


def _names(letter: str, count: int) -> list[str]:
    """So many keys, of which the n-th goes to partition n, modulo the number of partitions (1, 2, or 3)."""
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
_GROUP_OF = {key: GROUPS[number % len(GROUPS)] for number, key in enumerate(KEYS)}


# --- records --------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """Where an output comes from. Only for the checks.

    Attributes:
        number, offset: of the record that it was made of; of a timer's output, of the next record.
        made: counts all outputs of a run.
        wall_ms: when it was made, by the clock of the worker's host.
    """

    shard: ShardId
    number: int
    offset: int
    made: int = 0
    wall_ms: int = 0


class Written:
    """A record in a topic. `origin` is None if no handler made it; `put_at_ms` says when it was put into a
    source."""

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
        """The decoded value."""
        if self._data is None and self.value is not None:
            self._data = json.loads(self.value)
        return self._data

    @property
    def is_watermark(self) -> bool:
        """Whether it tells of event time and holds no data."""
        return self.key is None and bool(self.headers) and self.headers[0][0] == WATERMARK_HEADER

    @property
    def name(self) -> str:
        """The key as text."""
        return (self.key or b"").decode()

    def __str__(self) -> str:
        if self.is_watermark:
            return "watermark"
        return f"{self.name}={self.data.get('ident') if isinstance(self.data, dict) else self.value}"


class Read:
    """A record as a shard gets it from its input of that number; has the methods of a consumed message."""

    __slots__ = ("_at", "_partition", "number", "written")

    def __init__(self, number: int, partition: tuple[str, int], offset: int, written: Written) -> None:
        self.number = number
        self.written = written
        self._partition = partition
        self._at = offset

    def topic(self) -> str:
        """Of the input."""
        return self._partition[0]

    def partition(self) -> int:
        """Of the topic."""
        return self._partition[1]

    def offset(self) -> int:
        """In the partition."""
        return self._at

    def key(self) -> bytes | None:
        """The key's bytes."""
        return self.written.key

    def value(self) -> bytes | None:
        """The value's bytes."""
        return self.written.value

    def timestamp(self) -> tuple[int, int]:
        """As of a consumed Kafka message."""
        return 1, self.written.timestamp_ms

    def headers(self) -> Any:
        """Pairs of a name and a value."""
        return self.written.headers


def source_record(key: str, ident: int) -> Written:
    """A record of a source."""
    value = json.dumps({"key": key, "ident": ident}, separators=(",", ":")).encode()
    return Written(key.encode(), value, BEGIN_MS + ident)


# --- models -----------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """An output that must be there. Without a time it has that of the record that it was made of."""

    topic: str
    key: str
    data: Any
    timestamp_ms: int | None = None


class SetTimer(NamedTuple):
    """A timer that is set. In the order in which those of a clock fire."""

    at_ms: int
    key: str
    name: str


class Model(ABC):
    """What a stage has to do, in the slowest and most obvious way."""

    has_timers = False

    @abstractmethod
    def begin(self) -> Any:
        """The state of a shard that has read nothing. It is changed in place."""

    @abstractmethod
    def process(self, state: Any, read: Read) -> list[Expected]:
        """The outputs for a record, in their order."""

    @abstractmethod
    def content(self, state: Any, stored: Mapping[str, Any]) -> tuple[Any, Any]:
        """What the state must be, and what the stores make of it (by name, see `SimJob.stored`)."""

    @abstractmethod
    def seen(self, state: Any) -> dict[str, dict[str, Any]] | None:
        """The dicts of all keys as the handler must see them; None: it has no dicts."""

    def timers(self, state: Any, clock: str) -> list[SetTimer]:
        """All timers that are set in this clock, the next one first."""
        return []

    def fire(self, state: Any, timer: SetTimer, event_ms: int | None) -> Expected:
        """What a timer leads to: one output."""
        raise NotImplementedError


class CountModel(Model):
    """Counts by key. Its outputs go to the sink; each record goes on to the other topics, too."""

    def __init__(self, stage: str, store: str, forward: Mapping[str, Callable[[str], str]]) -> None:
        self._stage = stage
        self._store = store
        self._forward = forward

    def begin(self) -> dict[str, dict[str, Any]]:
        return {}

    def process(self, state: dict[str, dict[str, Any]], read: Read) -> list[Expected]:
        key, ident = read.written.name, read.written.data["ident"]
        before = state.pop(key, {})
        count = before.get("count", 0) + 1
        if count < FORGET_AT:
            state[key] = {**before, "count": count, "seen": [*before.get("seen", []), ident]}
        output = {"stage": self._stage, "ident": ident, "count": count}
        return [Expected(SINK, key, output), *_forwarded(self._forward, key, read)]

    def content(self, state: dict[str, dict[str, Any]], stored: Mapping[str, Any]) -> tuple[Any, Any]:
        return state, stored[self._store]

    def seen(self, state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
        return state


@dataclass
class _Timers:
    """What a shard knows that sets timers: its counts, and by key and name the clock and time of each."""

    counts: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    set: dict[tuple[str, str], tuple[str, int]] = field(
        default_factory=dict[tuple[str, str], tuple[str, int]]
    )


class TimersModel(CountModel):
    """What `_count_and_set_timers_into` does, and the functions of its timers."""

    has_timers = True

    def begin(self) -> Any:
        return _Timers()

    def process(self, state: Any, read: Read) -> list[Expected]:
        outputs = super().process(state.counts, read)
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

    def fire(self, state: Any, timer: SetTimer, event_ms: int | None) -> Expected:
        at_ms, key, name = timer
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
                soon_ms = event_ms + 1  # no progress: it waits until event time moves on
            state.set[key, "soon"] = ("event", soon_ms)
        data = {"stage": self._stage, "timer": name, "ident": at_ms - BEGIN_MS, "fired": fired}
        return Expected(SINK, key, data, at_ms)

    def content(self, state: Any, stored: Mapping[str, Any]) -> tuple[Any, Any]:
        due = {(clock, at_ms, key, name): None for (key, name), (clock, at_ms) in state.set.items()}
        kept = TimerStore(self._store)
        found = stored[self._store], stored[kept.name], stored[kept.due_name]
        counted = {**state.set, _COUNT: len(state.set)} if state.set else {}
        return (state.counts, counted, due), found

    def seen(self, state: Any) -> dict[str, dict[str, Any]] | None:
        return state.counts


class KindsModel(Model):
    """What `_remember` does: `last`, `seen` and `recent` hold pairs of time and value; nothing is removed
    when its time is over, only looked past, until it can't be in a store any more."""

    def __init__(self, stage: str, forward: Mapping[str, Callable[[str], str]]) -> None:
        self._stage = stage
        self._forward = forward

    def begin(self) -> dict[str, Any]:
        return {"clock": 0, "last": {}, "seen": {}, "recent": {}}

    def process(self, state: dict[str, Any], read: Read) -> list[Expected]:
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

    def content(self, state: dict[str, Any], stored: Mapping[str, Any]) -> tuple[Any, Any]:
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

    def seen(self, state: dict[str, Any]) -> None:
        return None

    def _expire(self, state: dict[str, Any]) -> None:
        over = state["clock"] - TTL_MS
        for name in ("last", "seen"):
            state[name] = {key: pair for key, pair in state[name].items() if pair[0] > over}
        recent = {key: [pair for pair in pairs if pair[0] > over] for key, pairs in state["recent"].items()}
        state["recent"] = {key: pairs for key, pairs in recent.items() if pairs}


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
    """Each tells itself by one output: so the checks know where among the outputs it has fired."""

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


def _group(record: Any) -> str:
    return _GROUP_OF[record["key"]]


@dataclass(frozen=True)
class SimJob:
    """A job in the simulation.

    Attributes:
        topology: the job, built.
        models: of its stages, by name. Empty: whoever runs it compares the outputs with something else.
        given: what its sources get, as (topic, record) in order; None: records are drawn.
        partitions: of all topics; None: the seed decides.
    """

    topology: Topology
    models: Mapping[str, Model] = field(default_factory=dict[str, Model])
    given: Sequence[tuple[str, Written]] | None = None
    partitions: int | None = None

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
        """The stage whose changelog it is."""
        return {stage.changelog: stage.name for stage in self.topology.stages if stage.changelog is not None}

    @cached_property
    def sources(self) -> list[str]:
        """What others write to."""
        return [source.name for source in self.topology.sources]

    @cached_property
    def repartitions(self) -> list[str]:
        """What one stage writes and another one reads."""
        return [topic for topic in self.stages_reading if topic not in self.sources]

    @cached_property
    def outputs(self) -> list[str]:
        """What its stages write."""
        return list({spec.name: None for stage in self.topology.stages for spec in written_topics(stage)})

    @cached_property
    def has_idle_inputs(self) -> bool:
        """Whether its sources become idle."""
        watermarks = (source.watermark for stage in self.topology.stages for source in stage.inputs)
        return any(watermark is not None and watermark.idle_ms is not None for watermark in watermarks)

    def timers_set(self, stage: str, encoded: Mapping[bytes, bytes]) -> Iterator[tuple[str, int, str, str]]:
        """Which timers encoded entries set: clock, time, key and name."""
        processes = self.topology.stage(stage).timed_processes
        if processes:
            stored = self.stored(stage, encoded)
            for process in processes:
                yield from stored[TimerStore(process.name).due_name]

    def changelog(self, shard: ShardId) -> tuple[str, int]:
        """The partition with the shard's deltas."""
        return f"{self.topology.stage(shard.stage).changelog}", shard.partition

    def stored(self, stage: str, encoded: Mapping[bytes, bytes]) -> dict[str, Any]:
        """What encoded entries say, by store: of dicts by key, of values by key, of maps by key and key of
        the entry, of lists by key and place. With a TTL each value is a pair with its time."""
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
    """By the prefix of its keys: the name of a store, and what reads one of its entries."""
    readers: dict[bytes, tuple[str, _ReadEntry]] = {}
    time_of = value_codec("int")[0]
    for name in stage.stores:
        readers[store_prefix(name)] = (name, lambda key, raw: (key.decode(), decode_state(raw)))
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
    return readers


_COUNT = "how many"
_CLOCKS = {b"e": "event", b"p": "processing"}


def _read_timer(key: bytes, raw: bytes) -> tuple[Any, Any]:
    """By key and name: the clock and time of a timer. And how many there are."""
    if not key:
        return _COUNT, decode_time(raw[1:])
    group, when = group_of_entry(key), raw[1:]
    at = key_of_group(group).decode(), key[len(group) :].decode()
    return at, (_CLOCKS[when[:1]], decode_time(when[1:]))


def _read_due(key: bytes, _raw: bytes) -> tuple[Any, Any]:
    """By clock, time, key and name: nothing."""
    of, name_at = take_ended(key, 9)
    return (_CLOCKS[key[:1]], decode_time(key[1:9]), of.decode(), key[name_at:].decode()), None


def _reader_of(store: StateStore) -> _ReadEntry:
    decode = value_codec(store.state.value)[0]

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


_SEEDS_FROM = (0, 0, MERGED_SEEDS_FROM, KINDS_SEEDS_FROM, TIMED_SEEDS_FROM, TIMERS_SEEDS_FROM)


def seeds(first: int, count: int) -> Iterator[int]:
    """So many seeds from this number on: two of six are of the first job, the others of the other four."""
    for number in range(first, first + count):
        # Settings and brokers depend on the last digits of a seed: each job shall play with all of them.
        yield number + _SEEDS_FROM[number // 4 % len(_SEEDS_FROM)]


def job_of(seed: int) -> SimJob:
    """The job that a seed plays."""
    if seed >= TIMERS_SEEDS_FROM:
        return _timers_job(behind=seed % 2 == 0)
    if seed >= TIMED_SEEDS_FROM:
        return _counting_job(merged=False, timed=True)
    if seed >= KINDS_SEEDS_FROM:
        return _kinds_job()
    return _counting_job(merged=seed >= MERGED_SEEDS_FROM)


@cache
def _counting_job(*, merged: bool, timed: bool = False) -> SimJob:
    """`in` counts by key and feeds `totals`, which counts by group.

    A third stage if `merged`: `more` counts by key what comes from another source, and from `in` through a
    repartition of its own. `timed`: with event time.
    """
    job = Job(JOB)
    watermark = {"watermark": Watermark(MAX_DELAY_MS)} if timed else {}
    source, sink = job.topic(SOURCE, **watermark), job.topic(SINK)
    job.stream(source).process(_count_into(SOURCE), name=COUNT).to(sink)
    job.stream(source).key_by(_group).process(_count_into(TOTALS), name=TOTALS).to(sink)
    forward: dict[str, Callable[[str], str]] = {REPARTITION: _GROUP_OF.__getitem__}
    models: dict[str, Model] = {TOTALS: CountModel(TOTALS, TOTALS, {})}
    if merged:
        crossing = job.stream(source).key_by("key", name=BOTH)
        job.merge(job.topic(MORE), crossing).process(_count_into(MORE), name=BOTH).to(sink)
        forward[CROSSING] = str
        models[MORE] = CountModel(MORE, BOTH, {})
    models[SOURCE] = CountModel(SOURCE, COUNT, forward)
    return SimJob(job.build(Settings()), models)


@cache
def _kinds_job() -> SimJob:
    """`in` remembers values, a map and a list for each key, all with a TTL; `totals` as in the others."""
    job = Job(JOB)
    source, sink = job.topic(SOURCE), job.topic(SINK)
    job.stream(source).process(_remember, name=COUNT, states=[_LAST, _SEEN, _RECENT]).to(sink)
    job.stream(source).key_by(_group).process(_count_into(TOTALS), name=TOTALS).to(sink)
    models: dict[str, Model] = {
        SOURCE: KindsModel(SOURCE, {REPARTITION: _GROUP_OF.__getitem__}),
        TOTALS: CountModel(TOTALS, TOTALS, {}),
    }
    return SimJob(job.build(Settings()), models)


@cache
def _timers_job(*, behind: bool) -> SimJob:
    """`in` counts by key and sets timers; its inputs become idle. `totals` as in the others; if `behind`, it
    sets timers, too, so that it is told of event time in each epoch."""
    job = Job(JOB)
    source, sink = job.topic(SOURCE, watermark=Watermark(MAX_DELAY_MS, idle_ms=IDLE_MS)), job.topic(SINK)
    job.stream(source).process(_count_and_set_timers_into(SOURCE), name=COUNT, timers=_timers_of(SOURCE)).to(
        sink
    )
    grouped = job.stream(source).key_by(_group)
    models: dict[str, Model] = {SOURCE: TimersModel(SOURCE, COUNT, {REPARTITION: _GROUP_OF.__getitem__})}
    if behind:
        grouped.process(_count_and_set_timers_into(TOTALS), name=TOTALS, timers=_timers_of(TOTALS)).to(sink)
        models[TOTALS] = TimersModel(TOTALS, TOTALS, {})
    else:
        grouped.process(_count_into(TOTALS), name=TOTALS).to(sink)
        models[TOTALS] = CountModel(TOTALS, TOTALS, {})
    return SimJob(job.build(Settings()), models)
