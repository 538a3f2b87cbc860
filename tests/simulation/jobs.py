"""The jobs in the simulation, declared as any user's job, and for each of their stages a slow obvious model.

Responsible for: the jobs (a counter with a second stage behind a repartition; the same with a third stage
that merges two topics; one that declares values, maps and lists with a TTL; and the first one with event
time), their records, and the models. The engine processes the records; the checks do the same with a model,
which uses plain dicts and knows nothing of epochs, layers or bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

from fcluster import Job, ListState, MapState, ValueState, Watermark
from fcluster.common.ids import ShardId, repartition_topic
from fcluster.common.settings import Settings
from fcluster.engine.ordered_keys import decode_time, group_of_entry, key_of_group, ordered_key
from fcluster.engine.state import STORE_PREFIX_BYTES, store_prefix
from fcluster.engine.values import decode_state
from fcluster.engine.watermarks import WATERMARK_HEADER
from fcluster.graph.codecs import value_codec
from fcluster.graph.partitioner import partition_of
from fcluster.graph.states import StateStore
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
"""Which job a seed plays: from these on the merged one, the one with declared states, and the first one with
event time."""
MAX_DELAY_MS = 3
"""Of the job with event time."""
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
    """The record that an output was made of. Only for the checks."""

    shard: ShardId
    number: int
    offset: int


class Written:
    """A record in a topic. `origin` is None if no handler made it."""

    __slots__ = ("_data", "headers", "key", "origin", "timestamp_ms", "value")

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
    """An output that must be there."""

    topic: str
    key: str
    data: Any


class Model(Protocol):
    """What a stage has to do, in the slowest and most obvious way."""

    def begin(self) -> Any:
        """The state of a shard that has read nothing. It is changed in place."""
        ...

    def process(self, state: Any, read: Read) -> list[Expected]:
        """The outputs for a record, in their order."""
        ...

    def content(self, state: Any, stored: Mapping[str, Any]) -> tuple[Any, Any]:
        """What the state must be, and what the stores make of it (by name, see `SimJob.stored`)."""
        ...

    def seen(self, state: Any) -> dict[str, dict[str, Any]] | None:
        """The dicts of all keys as the handler must see them; None: it has no dicts."""
        ...


class CountModel:
    """Counts by key. Its outputs go to the sink; each record goes on to the other topics, too."""

    def __init__(self, stage: str, store: str, forward: Mapping[str, Callable[[str], str]]) -> None:
        self._stage = stage
        self._store = store
        self._forward = forward

    def begin(self) -> dict[str, dict[str, Any]]:
        return {}

    def process(self, state: dict[str, dict[str, Any]], read: Read) -> list[Expected]:
        key, ident = read.written.name, read.written.data["ident"]
        counted = state.pop(key, {"count": 0, "seen": []})
        count = counted["count"] + 1
        if count < FORGET_AT:
            state[key] = {"count": count, "seen": [*counted["seen"], ident]}
        output = {"stage": self._stage, "ident": ident, "count": count}
        return [Expected(SINK, key, output), *_forwarded(self._forward, key, read)]

    def content(self, state: dict[str, dict[str, Any]], stored: Mapping[str, Any]) -> tuple[Any, Any]:
        return state, stored[self._store]

    def seen(self, state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
        return state


class KindsModel:
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
    return readers


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


_SEEDS_FROM = (0, 0, MERGED_SEEDS_FROM, KINDS_SEEDS_FROM, TIMED_SEEDS_FROM)


def seeds(first: int, count: int) -> Iterator[int]:
    """So many seeds from this number on: two of five are of the first job, the others of the other three."""
    for number in range(first, first + count):
        # Settings and brokers depend on the last digits of a seed: each job shall play with all of them.
        yield number + _SEEDS_FROM[number // 4 % len(_SEEDS_FROM)]


def job_of(seed: int) -> SimJob:
    """The job that a seed plays."""
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
