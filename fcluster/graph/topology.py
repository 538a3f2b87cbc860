"""What a job is once it is built: stages, chains and stores, and what may change between two runs.

Responsible for: the frozen description that every process of the cluster derives from the same job file, its
fingerprint, and the decision whether it is compatible with state written under an older description.
Invariants: stages come upstream first; a topic is read by one stage only; the topics of a stage have the same
number of partitions and the same kind of key; a store's name is unique in the job; nothing here depends on
the run (names and order come from the job file alone, because they name state). Must not do I/O. Must not
validate a user's job: `job.py` does that.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, cast

from fcluster.common.errors import IncompatibleState
from fcluster.common.ids import (
    ShardId,
    changelog_topic,
    former_changelog_topic,
    former_repartition_topic,
    repartition_topic,
)
from fcluster.common.isolation import Isolation
from fcluster.graph.aggregates import Aggregate
from fcluster.graph.codecs import Kind, codec_name
from fcluster.graph.functions import BYTECODE, comparable, function_identity
from fcluster.graph.generics import K, V
from fcluster.graph.joins import How, PairStore, Side
from fcluster.graph.states import StateStore
from fcluster.graph.tables import TableStore
from fcluster.graph.timers import TimerFunction, TimerStore
from fcluster.graph.watermark import Watermark
from fcluster.graph.windows import Session, Windows, WindowStore

KeyKind = Kind
ValueKind = Kind
AnyStore = str | StateStore | TimerStore | WindowStore | TableStore | PairStore
"""A store as `ShardState` takes it."""

_FORMAT_WITHOUT_STATES = 1
"""The format for jobs without declared states, timers, windows and tables. Older versions can read it."""
_DESCRIPTION_FORMAT = 2
_FORMATS_READ = (_FORMAT_WITHOUT_STATES, _DESCRIPTION_FORMAT)


@dataclass(frozen=True, slots=True)
class TopicSpec(Generic[K, V]):
    """A Kafka topic and how its records are read and written. For type checkers, it has the types of its keys
    and values.

    Attributes:
        name: the topic's name.
        key: how keys are decoded for `ctx.key` and encoded on the way out.
        value: how values are decoded and encoded.
        isolation: whether records of open and aborted transactions are read. Comparisons ignore it, because a
            topic's default is known only when the job's settings are.
    """

    name: str
    key: KeyKind = "text"
    value: ValueKind = "json"
    isolation: Isolation = field(default="read-committed", compare=False)


OnError = Literal["stop", "skip"] | TopicSpec
"""What to do with a record that can't be processed. A topic here receives it as a dead letter."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Passes on the values for which `function(value)` is true. `on_error` says what to do if it fails."""

    function: Callable[[Any], Any]
    on_error: OnError = "stop"


@dataclass(frozen=True, slots=True)
class Map:
    """Replaces each value by `function(value)`; key, timestamp and headers stay. `on_error` says what to do
    if it fails.
    """

    function: Callable[[Any], Any]
    on_error: OnError = "stop"


@dataclass(frozen=True, slots=True)
class FlatMap:
    """Replaces each value by the values in the iterable that `function(value)` returns; there may be none.
    Key, timestamp and headers stay. `on_error` says what to do if it fails.
    """

    function: Callable[[Any], Any]
    on_error: OnError = "stop"


@dataclass(frozen=True, slots=True)
class Peek:
    """Calls `function(value)` for each value and passes the value on. `on_error` says what to do if it
    fails.
    """

    function: Callable[[Any], Any]
    on_error: OnError = "stop"


@dataclass(frozen=True, slots=True)
class Branch:
    """One of several ways that records may go: passes on the values for which this function, and none before
    it, returns something true.

    Attributes:
        functions: of all branches, in order.
        number: which of them this is. If it is the number of functions: the values for which none is true.
        on_error: what to do if its own function fails.
    """

    functions: tuple[Callable[[Any], Any], ...]
    number: int
    on_error: OnError = "stop"

    @property
    def is_rest(self) -> bool:
        """Whether it gets what no function wants."""
        return self.number == len(self.functions)

    @property
    def function(self) -> Callable[[Any], Any]:
        """Its own function. For the rest: the last one."""
        return self.functions[min(self.number, len(self.functions) - 1)]


@dataclass(frozen=True, slots=True)
class Process:
    """A handler with keyed state.

    Attributes:
        name: the name of the operator and of its store; unique in the job.
        function: called as `function(ctx, value)`.
        on_error: "stop", "skip", or the dead-letter topic.
        stores: the states that it declares besides `ctx.state`.
        returns: "many" if the call returns an iterable of outputs (a generator), "one" if it returns one
            output, or None for no output.
        timers: the functions that its timers call.
    """

    name: str
    function: Callable[[Any, Any], Any]
    on_error: OnError = "stop"
    returns: Literal["many", "one"] = "one"
    stores: tuple[StateStore, ...] = ()
    timers: tuple[TimerFunction, ...] = ()

    @property
    def timer_store(self) -> TimerStore | None:
        """The store of its timers, or None if it has none."""
        return TimerStore(self.name) if self.timers else None


@dataclass(frozen=True, slots=True)
class Window:
    """Windows of each key, and what is computed of their records.

    Attributes:
        name: of the operator and of its store; unique in the job.
        windows: which stretches of time they are.
        fields: of a result: the aggregates by name, in order.
        late: gets the records whose windows have closed; None: they are only counted.
        emit: whether a result goes on when its window closes, or after each record in it.
        on_error: what a record leads to that fails in it, and a window whose result does.
    """

    name: str
    windows: Windows
    fields: tuple[tuple[str, Aggregate[Any]], ...]
    late: TopicSpec | None = None
    on_error: OnError = "stop"
    emit: Literal["close", "update"] = "close"

    @property
    def store(self) -> WindowStore:
        """Where its open windows are kept."""
        return WindowStore(self.name, isinstance(self.windows, Session))

    def describe(self) -> dict[str, Any]:
        """What the bytes of its store depend on."""
        aggregates = [[name, aggregate.name] for name, aggregate in self.fields]
        return {"windows": self.windows.describe(), "aggregates": aggregates}


@dataclass(frozen=True, slots=True)
class KeepTable:
    """Keeps the newest value of each key, for joins. A tombstone deletes the key.

    Attributes:
        name: of the table and of its store; unique in the job.
        value: the codec of the values that it keeps.
        on_error: what to do with a record that has no key.
    """

    name: str
    value: ValueKind
    on_error: OnError = "stop"

    @property
    def store(self) -> TableStore:
        """Where its rows are kept."""
        return TableStore(self.name)


@dataclass(frozen=True, slots=True)
class JoinTable:
    """Replaces each value by `function(value, row)`, with the present row of its key in a table.

    Attributes:
        table: the table, which is kept in the same stage.
        function: called with the value, and the row's value.
        how: "inner" drops values whose key has no row; "left" calls the function with None for the row.
        on_error: what to do if the function fails.
    """

    table: KeepTable
    function: Callable[[Any, Any], Any]
    how: Literal["inner", "left"] = "inner"
    on_error: OnError = "stop"


@dataclass(frozen=True, slots=True)
class JoinStreams:
    """One side of a join of two streams: pairs of records of a key that are not too far apart.

    A right record is the partner of a left one if it is at most `before_ms` earlier and at most `after_ms`
    later.

    Attributes:
        name: of the join and of its stores; unique in the job. Both sides have it.
        side: which side the records of this chain are on.
        function: called with the values of a pair, left first.
        before_ms, after_ms: see above.
        left, right: the codecs in which the values of both sides are kept.
        is_unchanged: the values of this side are those that were read, so their bytes can be kept.
        how: "inner" passes on pairs. "left" and "outer" also pass on left records, or records of both sides,
            that have found no partner until the grace is over; the function gets None for the other one.
        grace_ms: how late a record may be and still find its partners.
        late: gets the records that are later; None: they are only counted.
        on_error: what to do with a record that fails in it.
    """

    name: str
    side: Side
    function: Callable[[Any, Any], Any]
    before_ms: int
    after_ms: int
    left: ValueKind
    right: ValueKind
    is_unchanged: bool
    how: How = "inner"
    grace_ms: int = 0
    late: TopicSpec | None = None
    on_error: OnError = "stop"

    @property
    def store(self) -> PairStore:
        """Where the records that may find a partner are kept."""
        return PairStore(self.name)

    @property
    def stretch_ms(self) -> int:
        """How long the stretches of time are in which records are kept."""
        return self.before_ms + self.after_ms + 1

    @property
    def passes_on(self) -> tuple[Side, ...]:
        """The sides whose records are passed on without a partner."""
        sides: dict[How, tuple[Side, ...]] = {"inner": (), "left": ("left",), "outer": ("left", "right")}
        return sides[self.how]

    @property
    def late_ms(self) -> int:
        """How much earlier than event time its results may be."""
        return max(self.before_ms, self.after_ms) + self.grace_ms + 1

    def open_ms(self, side: Side) -> int:
        """How much later than a record of that side its partners may be."""
        return self.after_ms if side == "left" else self.before_ms

    def describe(self) -> dict[str, Any]:
        """What the bytes of its stores, and what is due, depend on."""
        return {
            "before_ms": self.before_ms,
            "after_ms": self.after_ms,
            "how": self.how,
            "left": codec_name(self.left),
            "right": codec_name(self.right),
        }


Operator = Filter | Map | FlatMap | Peek | Branch | Process | Window | KeepTable | JoinTable | JoinStreams
StatefulOperator = Process | Window | KeepTable | JoinStreams
TimedOperator = Process | Window | JoinStreams
"""Those in which something may happen because time has passed."""
"""Those that have state, and a name that identifies it."""


def step_kind(step: Operator) -> str:
    """The name of the step in a job file, such as "flat_map"."""
    if isinstance(step, KeepTable):
        return "table"
    if isinstance(step, JoinTable | JoinStreams):
        return "join"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(step).__name__).lower()


Rekey = str | Callable[[Any], Any]
"""How the new key is found: a field of the value (which is an object then), or a function of the value."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Operators that a record of one topic runs through within one call.

    Attributes:
        name: a name for logs and metrics; unique in the job.
        operators: the operators, in the order in which they apply.
        rekey: gives the new key of records that leave the chain. None: keys stay the same. `sink` is then the
            repartition topic of the next stage, or an output topic if `key_by` is followed only by
            `.to(topic)`.
        rekey_version: compared instead of `rekey` to find out whether keys are still the same. None: `rekey`
            is compared.
        sink: the topic to which records that leave the chain are written. None: none; records that name a
            topic of their own are still written there.
        input: the number of the stage's input that the chain reads.
        rekey_on_error: what to do with a record for which no key can be found.
        sink_on_error: what to do with a record whose output can't be written to the sink.
    """

    name: str
    operators: tuple[Operator, ...]
    rekey: Rekey | None = None
    sink: TopicSpec | None = None
    rekey_version: str | None = None
    rekey_on_error: OnError = "stop"
    sink_on_error: OnError = "stop"
    input: int = 0

    @property
    def processes(self) -> tuple[Process, ...]:
        """Its handlers."""
        return tuple(operator for operator in self.operators if isinstance(operator, Process))

    @property
    def stateful(self) -> tuple[StatefulOperator, ...]:
        """The operators that have state, and a name that identifies it."""
        return tuple(operator for operator in self.operators if isinstance(operator, StatefulOperator))

    @property
    def tables(self) -> tuple[KeepTable, ...]:
        """The tables that it keeps."""
        return tuple(operator for operator in self.operators if isinstance(operator, KeepTable))

    @property
    def rules(self) -> tuple[OnError, ...]:
        """The error rules of all its steps that can fail, in order."""
        rules: list[OnError] = [operator.on_error for operator in self.operators]
        if self.rekey is not None:
            rules.append(self.rekey_on_error)
        if self.sink is not None:
            rules.append(self.sink_on_error)
        return tuple(rules)


@dataclass(frozen=True, slots=True)
class Input:
    """A topic that a stage reads.

    Attributes:
        topic: the topic, and how its records are read.
        internal: whether it is a repartition topic of the cluster.
        name: the topic's name. For a repartition topic: the name of its `key_by`, from which the topic's name
            is made.
        on_error: what to do with a record that can't be decoded.
        watermark: how event time follows from its timestamps. None: the job doesn't use event time. The event
            time of a repartition topic follows from its watermark records.
    """

    topic: TopicSpec
    internal: bool = False
    name: str = ""
    on_error: OnError = "stop"
    watermark: Watermark | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """All chains that read the same topics.

    Attributes:
        name: the name of its first input.
        inputs: the topics that it reads, usually one. Several are co-partitioned: partition n of each belongs
            to the stage's shard n.
        chains: its chains. Each record runs through all chains of its input, in this order.
        stores: the names of its operators with state, in the order of the job file.
        changelog: the topic of the stage's deltas; None when there are no stores.
    """

    name: str
    inputs: tuple[Input, ...]
    chains: tuple[Chain, ...]
    stores: tuple[str, ...]
    changelog: str | None

    @property
    def topics(self) -> tuple[str, ...]:
        """The names of the topics that it reads."""
        return tuple(source.topic.name for source in self.inputs)

    @property
    def keeps_time(self) -> bool:
        """Whether its shards have an event time. Either all stages of a job have it, or none."""
        return self.inputs[0].watermark is not None

    @property
    def needs_time(self) -> bool:
        """Whether something in it may depend on event time."""
        return bool(self.timed_steps)

    @property
    def precedence(self) -> tuple[int, ...]:
        """The numbers of its inputs, in the order that decides between records with the same timestamp.

        Tables come first, so that a record finds the rows of its own time.
        """
        kept = {chain.input for chain in self.chains if chain.tables}
        return tuple(sorted(range(len(self.inputs)), key=lambda number: number not in kept))

    @property
    def table_inputs(self) -> frozenset[int]:
        """The numbers of the inputs that only fill tables."""
        streams = {chain.input for chain in self.chains if not chain.tables}
        return frozenset(range(len(self.inputs))) - streams

    @property
    def timeless_inputs(self) -> frozenset[int]:
        """The inputs that event time doesn't wait for: those that only fill tables, if there are others.

        A table may get no record for days, and that says nothing about the stream that is joined with it.
        """
        numbers = self.table_inputs
        return numbers if len(numbers) < len(self.inputs) else frozenset()

    def chains_of(self, number: int) -> tuple[Chain, ...]:
        """The chains through which records of this input run."""
        return tuple(chain for chain in self.chains if chain.input == number)

    def input_of(self, topic: str) -> int:
        """The number of the input that reads this topic; ValueError if none does."""
        return self.topics.index(topic)

    @property
    def all_stores(self) -> tuple[AnyStore, ...]:
        """The stores that `ShardState` is created with."""
        timers = (one for process in self.timed_processes if (one := process.timer_store) is not None)
        windows = (window.store for window in self.windows)
        tables = (table.store for table in self.tables)
        joins = (join.store for join in self.joins)
        return (*self.stores, *self.state_stores, *timers, *windows, *tables, *joins)

    @property
    def timed_steps(self) -> tuple[TimedOperator, ...]:
        """Its operators in which something happens because time has passed, in the order of the job file. Of
        a join, one side.
        """
        named: dict[str, TimedOperator] = {}
        for step in (step for chain in self.chains for step in chain.stateful):
            if isinstance(step, Window | JoinStreams) or (isinstance(step, Process) and step.timers):
                named.setdefault(step.name, step)
        return tuple(named.values())

    @property
    def tables(self) -> tuple[KeepTable, ...]:
        """The tables that it keeps, in the order of the job file."""
        return tuple({table.name: table for chain in self.chains for table in chain.tables}.values())

    @property
    def windows(self) -> tuple[Window, ...]:
        """Its windows, in the order of the job file."""
        return tuple(step for step in self.timed_steps if isinstance(step, Window))

    @property
    def joins(self) -> tuple[JoinStreams, ...]:
        """Its joins of streams, one side of each, in the order of the job file."""
        return tuple(step for step in self.timed_steps if isinstance(step, JoinStreams))

    @property
    def results_late_ms(self) -> int:
        """How much earlier than event time the results of its windows and joins may be."""
        late = [window.windows.grace_ms for window in self.windows] + [join.late_ms for join in self.joins]
        return max(late, default=0)

    @property
    def timed_processes(self) -> tuple[Process, ...]:
        """Its handlers that set timers, in the order of the job file."""
        return tuple(step for step in self.timed_steps if isinstance(step, Process))

    @property
    def state_stores(self) -> tuple[StateStore, ...]:
        """The states that its handlers declare besides `ctx.state`, in the order of the job file."""
        processes = (process for chain in self.chains for process in chain.processes)
        return tuple({store.name: store for process in processes for store in process.stores}.values())

    @property
    def dead_letter_topics(self) -> tuple[TopicSpec, ...]:
        """The topics that receive records that failed in it. May contain repetitions."""
        rules = [source.on_error for source in self.inputs]
        rules += [rule for chain in self.chains for rule in chain.rules]
        return tuple(rule for rule in rules if isinstance(rule, TopicSpec))


@dataclass(frozen=True)
class Topology:
    """A validated job.

    Attributes:
        job: its name, which is also the consumer group.
        stages: upstream first.
        fingerprint: 12 hex digits, computed from everything that state and committed offsets depend on
            (`describe`). It also differs after compatible changes; `incompatibility` tells which changes
            those are.
        topics: all topics that the job file declares, including those that only `Record(topic=...)` writes
            to.
    """

    job: str
    stages: tuple[Stage, ...]
    fingerprint: str = ""
    topics: tuple[TopicSpec, ...] = ()

    def __post_init__(self) -> None:
        if not self.fingerprint:
            text = json.dumps(_essence(self.describe()), sort_keys=True, separators=(",", ":"))
            object.__setattr__(self, "fingerprint", hashlib.sha256(text.encode()).hexdigest()[:12])

    def shards(self, partitions: Mapping[str, int]) -> list[ShardId]:
        """All shards, upstream stages first.

        Args:
            partitions: partition count of each topic that a stage reads, by topic name.
        """
        return [
            ShardId(stage.name, partition)
            for stage in self.stages
            for partition in range(partitions[stage.topics[0]])
        ]

    def stage(self, name: str) -> Stage:
        """The stage of that name; KeyError if there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def feeders(self, topic: str) -> tuple[Stage, ...]:
        """The stages that write to this topic, as far as the job file shows: records may name topics."""
        return tuple(
            stage for stage in self.stages if any(spec.name == topic for spec in written_topics(stage))
        )

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All topics that the job reads, upstream first."""
        return tuple(source for stage in self.stages for source in stage.inputs)

    @property
    def sources(self) -> tuple[TopicSpec, ...]:
        """The topics that the job reads and that aren't the cluster's own, upstream first."""
        return tuple(source.topic for source in self.inputs if not source.internal)

    @property
    def table_topics(self) -> frozenset[str]:
        """The topics of the user that only fill tables."""
        found = (stage.inputs[number] for stage in self.stages for number in stage.table_inputs)
        return frozenset(source.topic.name for source in found if not source.internal)

    @property
    def stages_by_topic(self) -> dict[str, Stage]:
        """The stage that reads each topic, by the topic's name."""
        return {topic: stage for stage in self.stages for topic in stage.topics}

    @property
    def outputs(self) -> tuple[TopicSpec, ...]:
        """The topics of the user to which the job may write: sinks, dead letters, and declared topics that it
        doesn't read.
        """
        internal = {source.topic.name for source in self.inputs if source.internal}
        sources = {topic.name for topic in self.sources}
        candidates = [topic for stage in self.stages for topic in written_topics(stage)]
        candidates += [topic for topic in self.topics if topic.name not in sources]
        return tuple({topic.name: topic for topic in candidates if topic.name not in internal}.values())

    @property
    def keeps_time(self) -> bool:
        """Whether the job uses event time."""
        return any(stage.keeps_time for stage in self.stages)

    def told_topics(self, stage: Stage) -> dict[str, Stage]:
        """The repartition topics to which a stage's event time is written, with the stages that read them."""
        if not stage.keeps_time:
            return {}
        internal = {source.topic.name for source in self.inputs if source.internal}
        sinks = {chain.sink.name for chain in stage.chains if chain.sink is not None}
        return {name: self.stages_by_topic[name] for name in sorted(sinks & internal)}

    def time_is_needed(self, stage: Stage) -> bool:
        """Whether something in `stage` or downstream of it depends on event time."""
        return stage.needs_time or any(map(self.time_is_needed, self.told_topics(stage).values()))

    @property
    def internal_topics(self) -> tuple[str, ...]:
        """The changelogs and repartition topics, upstream first. (The journal is `ids.journal_topic`.)"""
        names: list[str] = []
        for stage in self.stages:
            names += [source.topic.name for source in stage.inputs if source.internal]
            names += [stage.changelog] if stage.changelog is not None else []
        return tuple(names)

    @property
    def renamed_topics(self) -> dict[str, str]:
        """The internal topics whose names differ from what `build` would choose, by the names that it would
        choose.
        """
        names: dict[str, str] = {}
        for stage in self.stages:
            for source in stage.inputs:
                if source.internal:
                    names[repartition_topic(self.job, source.name)] = source.topic.name
            if stage.changelog is not None:
                names[changelog_topic(self.job, stage.name)] = stage.changelog
        return {built: actual for built, actual in names.items() if built != actual}

    def with_internal_topics(self, names: Mapping[str, str]) -> Topology:
        """The same job with other names for some internal topics. The fingerprint doesn't change.

        Args:
            names: new names, by the present ones (see `former_names`).
        """
        if not names:
            return self
        return replace(self, stages=tuple(_renamed(stage, names) for stage in self.stages))

    def describe(self) -> dict[str, Any]:
        """Everything that state and committed offsets depend on, as data for JSON in the journal.

        It names the internal topics too, which identifies them as this job's.

        It leaves out steps without state, the code of handlers, output topics, isolation and error handling.
        They may change freely between runs.
        """
        feeds = {topic: fed for stage in self.stages for topic, fed in _feeds(stage)}
        declares_states = any(
            stage.state_stores or stage.timed_steps or stage.tables for stage in self.stages
        )
        return {
            "format": _DESCRIPTION_FORMAT if declares_states else _FORMAT_WITHOUT_STATES,
            "job": self.job,
            "stages": {stage.name: _describe_stage(stage, feeds) for stage in self.stages},
        }


def with_event_time(stages: Sequence[Stage], declared: Mapping[str, Watermark]) -> list[Stage]:
    """The stages of a job, all with event time if one of them uses it.

    Args:
        declared: the watermarks that the user declared, by topic. Other topics get the default.
    """
    if not declared and not any(stage.needs_time for stage in stages):
        return list(stages)
    timed: list[Stage] = []
    for stage in stages:
        inputs = [
            replace(source, watermark=declared.get(source.topic.name, Watermark())) for source in stage.inputs
        ]
        timed.append(replace(stage, inputs=tuple(inputs)))
    return timed


def written_topics(stage: Stage) -> Iterator[TopicSpec]:
    """The sinks, the topics for late records and the dead-letter topics of a stage, including repartition
    topics. May contain repetitions.
    """
    for chain in stage.chains:
        if chain.sink is not None:
            yield chain.sink
    for step in (*stage.windows, *stage.joins):
        if step.late is not None:
            yield step.late
    yield from stage.dead_letter_topics


def check_copartitioned(stage: Stage, counts: Mapping[str, int]) -> None:
    """Check that the topics that a stage reads have the same number of partitions.

    Raises IncompatibleState if they don't.

    Args:
        stage: the stage to check.
        counts: partition counts, by topic. Topics without one are ignored.
    """
    known = {topic: counts[topic] for topic in stage.topics if topic in counts}
    if len(set(known.values())) <= 1:
        return
    if stage.tables or stage.joins:
        raise _not_copartitioned_join(stage, known)
    most = max(known.values())
    named = _with_counts(known)
    fewer = next(topic for topic, count in known.items() if count < most)
    raise IncompatibleState(
        f"The stage {stage.name!r} merges topics with different numbers of partitions: {named}. Records of "
        "one key would be in shards with different numbers.",
        remedy="Put .key_by(...) in front of one of them: the cluster makes a topic for it with as many "
        f"partitions as the others have. Or give {fewer!r} {most} partitions too, if nothing depends on "
        "where its keys are: they move.",
    )


def _not_copartitioned_join(stage: Stage, counts: Mapping[str, int]) -> IncompatibleState:
    """The error for streams and tables that are joined, but don't have equally many partitions."""
    kept = {stage.inputs[chain.input].topic.name for chain in stage.chains if chain.tables}
    internal = {source.topic.name for source in stage.inputs if source.internal}
    tables = {topic: count for topic, count in counts.items() if topic in kept}
    wanted = next(iter(tables.values() if tables else counts.values()))
    other = next((topic for topic, count in counts.items() if count != wanted), "")
    if len(set(tables.values())) > 1:
        remedy = (
            f"Copy {other!r} to a topic with {wanted} partitions, with job.stream(topic).to(copy), and "
            "declare the table over the copy."
        )
    elif other in internal:
        remedy = (
            "That topic was made by key_by before there was a join. `fcluster reset` deletes it and the "
            f"stage's state; the next start makes it with {wanted} partitions."
        )
    else:
        remedy = (
            f"Put .key_by(...) between the stream of {other!r} and the join: the cluster makes a topic for "
            f"it with {wanted} partitions, as the others have."
        )
    return IncompatibleState(
        f"The stage {stage.name!r} joins topics with different numbers of partitions: "
        f"{_with_counts(counts)}. What belongs together would be in shards with different numbers.",
        remedy=remedy,
    )


def _with_counts(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{topic!r} ({count} partitions)" for topic, count in counts.items())


def _renamed(stage: Stage, names: Mapping[str, str]) -> Stage:
    def topic(spec: TopicSpec) -> TopicSpec:
        return replace(spec, name=names.get(spec.name, spec.name))

    chains = tuple(
        replace(chain, sink=topic(chain.sink)) if chain.sink is not None else chain for chain in stage.chains
    )
    changelog = None if stage.changelog is None else names.get(stage.changelog, stage.changelog)
    inputs = tuple(
        replace(source, topic=topic(source.topic)) if source.internal else source for source in stage.inputs
    )
    return replace(stage, inputs=inputs, chains=chains, changelog=changelog)


def former_names(topology: Topology) -> dict[str, str]:
    """The name that each internal topic had in older versions, where names were ambiguous, by its present
    name.

    Inputs after a stage's first are newer than that, so they have no such name.
    """
    names: dict[str, str] = {}
    for stage in topology.stages:
        first = stage.inputs[0]
        if first.internal:
            names[first.topic.name] = former_repartition_topic(topology.job, stage.name)
        if stage.changelog is not None:
            names[stage.changelog] = former_changelog_topic(topology.job, stage.name)
    return names


def described_topics(description: Mapping[str, Any]) -> dict[str, str]:
    """The internal topics of the job according to a journalled description: ``stage/changelog`` or
    ``stage/repartition`` to the topic's name, and ``stage/name/repartition`` for inputs after the first. An
    old description doesn't name changelogs; they have their older names then.
    """
    names: dict[str, str] = {}
    job = str(description.get("job", ""))
    for name, stage in cast("Mapping[str, Mapping[str, Any]]", description.get("stages", {})).items():
        if stage.get("key_by") is not None:
            names[f"{name}/repartition"] = str(stage.get("source"))
        for further in _further_inputs(stage):
            if further.get("key_by") is not None:
                names[f"{name}/{further['name']}/repartition"] = str(further["source"])
        if stage.get("stores"):
            names[f"{name}/changelog"] = str(stage.get("changelog") or former_changelog_topic(job, name))
    return names


def rekey_description(rekey: Rekey) -> str:
    """How a `key_by` is named in descriptions and messages: its field, or its function's name."""
    if isinstance(rekey, str):
        return f"field {rekey}"
    name = getattr(rekey, "__name__", type(rekey).__name__)
    return f"function {name}"


def rekey_identity(rekey: Rekey, version: str | None = None) -> str:
    """What is compared to tell whether a `key_by` still gives the same keys."""
    if version is not None:
        return f"{_VERSION} {version}"
    return f"field {rekey}" if isinstance(rekey, str) else function_identity(rekey)


_VERSION = "version"


def _feeds(stage: Stage) -> Iterator[tuple[str, dict[str, str]]]:
    for chain in stage.chains:
        if chain.rekey is not None and chain.sink is not None:
            yield (
                chain.sink.name,
                {
                    "from": stage.name,
                    "by": rekey_description(chain.rekey),
                    "identity": rekey_identity(chain.rekey, chain.rekey_version),
                },
            )


def _describe_stage(stage: Stage, feeds: Mapping[str, dict[str, str]]) -> dict[str, Any]:
    first, *further = stage.inputs
    description = {**_describe_input(first, feeds), "stores": sorted(stage.stores)}
    if stage.state_stores:
        description["states"] = {store.name: store.state.describe() for store in stage.state_stores}
    if stage.timed_processes:
        description["timers"] = {
            process.name: sorted(timer.name for timer in process.timers) for process in stage.timed_processes
        }
    if stage.windows:
        description["windows"] = {window.name: window.describe() for window in stage.windows}
    if stage.joins:
        description["joins"] = {join.name: join.describe() for join in stage.joins}
    if stage.tables:
        description["tables"] = {table.name: _describe_table(stage, table) for table in stage.tables}
    if stage.changelog is not None:
        description["changelog"] = stage.changelog
    if further:
        # Separate from the first one, which stays where it always was: a job may get more inputs and keep its
        # state.
        description["merged"] = [
            {"name": source.name, **_describe_input(source, feeds)} for source in further
        ]
    return description


def _describe_table(stage: Stage, table: KeepTable) -> dict[str, Any]:
    """What the keys and the bytes of a table depend on."""
    sources = [stage.inputs[chain.input] for chain in stage.chains if table in chain.tables]
    return {
        "sources": [source.name for source in sources],
        "key": codec_name(sources[0].topic.key),
        "value": codec_name(table.value),
    }


def _describe_input(source: Input, feeds: Mapping[str, dict[str, str]]) -> dict[str, Any]:
    description: dict[str, Any] = {"source": source.topic.name}
    if source.internal:
        # Records in the repartition topic survive a restart, so their encoding matters too.
        description["key_by"] = dict(feeds.get(source.topic.name, {}))
        description["encoding"] = {
            "key": codec_name(source.topic.key),
            "value": codec_name(source.topic.value),
        }
    return description


def _further_inputs(stage: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The part of a stage's description about its inputs after the first."""
    return cast("Sequence[Mapping[str, Any]]", stage.get("merged", ()))


def described_inputs(description: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The topics that each stage of a journalled description reads, by the stage's name."""
    stages = cast("Mapping[str, Mapping[str, Any]]", description.get("stages", {}))
    return {
        name: (str(stage.get("source")), *(str(further["source"]) for further in _further_inputs(stage)))
        for name, stage in stages.items()
    }


def _essence(description: dict[str, Any]) -> dict[str, Any]:
    """The part of a description that the fingerprint is computed from: without what follows from the rest, or
    depends on the host.
    """
    for name, stage in description["stages"].items():
        stage.pop("changelog", None)
        for input_name, source in [(name, stage), *((one["name"], one) for one in stage.get("merged", ()))]:
            key_by = source.get("key_by")
            if key_by is not None:
                source["source"] = former_repartition_topic(description["job"], input_name)
                identity = str(key_by.get("identity", ""))
                # Bytecode depends on the version of Python, which may differ between hosts.
                if identity == key_by.get("by") or identity.startswith(BYTECODE):
                    del key_by["identity"]
    return description


def incompatibility(old_description: Mapping[str, Any], new_topology: Topology) -> str | None:
    """Why state and offsets written under `old_description` don't fit `new_topology`.

    New stages and new stores are compatible: they begin empty. So is the removal of a stage that had no state
    and read a topic of the user. A stage may get more inputs, and lose inputs that are topics of the user.

    Args:
        old_description: what `Topology.describe` returned when they were written.

    Returns:
        One sentence that names what is incompatible, None if nothing is.
    """
    return next(incompatibilities(old_description, new_topology), None)


def incompatibilities(old_description: Mapping[str, Any], new_topology: Topology) -> Iterator[str]:
    """Like `incompatibility`, with the first reason of each stage for which there is one."""
    if old_description.get("format") not in _FORMATS_READ:
        yield (
            "The state was written by another version of fcluster, in a format that this version can't read."
        )
        return
    if old_description.get("job") != new_topology.job:
        yield f"The state belongs to the job {old_description.get('job')!r}, not to {new_topology.job!r}."
        return
    old_stages = cast(Mapping[str, Mapping[str, Any]], old_description.get("stages", {}))
    new_stages = cast(dict[str, dict[str, Any]], new_topology.describe()["stages"])
    new_homes: dict[str, str] = {
        store: name for name, stage in new_stages.items() for store in stage["stores"]
    }
    old_stores = {store for stage in old_stages.values() for store in stage.get("stores", ())}
    added: list[str] = [store for store in new_homes if store not in old_stores]
    for name, old in old_stages.items():
        reason = (
            _lost_store(name, old, new_homes, added)
            or _changed_states(old, new_stages.get(name, {}))
            or _lost_timer(old, new_stages.get(name, {}))
            or _changed_windows(old, new_stages.get(name, {}))
            or _changed_tables(old, new_stages.get(name, {}))
            or _changed_joins(old, new_stages.get(name, {}))
            or _changed_stage(name, old, new_stages)
            or _changed_inputs(name, old, new_stages)
        )
        if reason:
            yield reason


def _lost_store(stage: str, old: Mapping[str, Any], homes: Mapping[str, str], added: list[str]) -> str | None:
    for store in old.get("stores", ()):
        kind = "table" if store in old.get("tables", ()) else "handler"
        if store not in homes:
            near = _nearest(store, added)
            hint = f" (renamed to {near!r}?)" if near else ""
            return f"The {kind} {store!r} of stage {stage!r} has state, but is no longer in the job{hint}."
        if homes[store] != stage:
            return f"The {kind} {store!r} has state in stage {stage!r}, but is now in {homes[store]!r}."
    return None


def _changed_states(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why a declared state of a stage is incompatible with its present declaration."""
    declared = cast("Mapping[str, Mapping[str, Any]]", new.get("states", {}))
    for name, before in cast("Mapping[str, Mapping[str, Any]]", old.get("states", {})).items():
        now = declared.get(name)
        handler, _, state = name.partition("/")
        what = f"The state {state!r} of the handler {handler!r}"
        if now is None:
            near = _nearest(name, [other for other in declared if other not in old.get("states", {})])
            hint = f" (renamed to {near.partition('/')[2]!r}?)" if near else ""
            return f"{what} has entries, but is no longer declared{hint}."
        if before != now:
            return (
                f"{what} was declared as {_state_text(before)}, and is now declared as {_state_text(now)}: "
                "its entries can't be read that way. (To change it, keep the old declaration, declare "
                "another state under a new name, and let the handler copy each key's entries when a "
                "record of that key comes.)"
            )
    return None


def _lost_timer(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The timer of a stage that may be set, but no longer has a function."""
    declared = cast("Mapping[str, Sequence[str]]", new.get("timers", {}))
    for handler, before in cast("Mapping[str, Sequence[str]]", old.get("timers", {})).items():
        now = declared.get(handler, ())
        for name in before:
            if name not in now:
                near = _nearest(name, [other for other in now if other not in before])
                hint = f" (renamed to {near!r}?)" if near else ""
                return (
                    f"The timer {name!r} of the handler {handler!r} may be set, but no longer has an "
                    f"on_timer function{hint}."
                )
    return None


def _changed_windows(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why the open windows of a stage don't fit what they are declared as now."""
    declared = cast("Mapping[str, Mapping[str, Any]]", new.get("windows", {}))
    former = cast("Mapping[str, Mapping[str, Any]]", old.get("windows", {}))
    for name in (*former, *(name for name in declared if name in old.get("stores", ()))):
        before, now = former.get(name), declared.get(name)
        if before is None or now is None:
            was, is_now = ("a handler", "a window") if before is None else ("a window", "a handler")
            return f"The step {name!r} has state as {was}, and is now {is_now}."
        for part, what in (("windows", "are"), ("aggregates", "compute")):
            if before.get(part) != now.get(part):
                texts = [_windows_text(described[part]) for described in (before, now)]
                return (
                    f"The windows of {name!r} used to {what.replace('are', 'be')} {texts[0]}, and now {what} "
                    f"{texts[1]}: those that are open don't fit. (Keep them, and declare the new ones beside "
                    "them under another name.)"
                )
    return None


def _changed_tables(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why the rows of a stage's tables don't fit what they are declared as now."""
    declared = cast("Mapping[str, Mapping[str, Any]]", new.get("tables", {}))
    former = cast("Mapping[str, Mapping[str, Any]]", old.get("tables", {}))
    for name in (*former, *(name for name in declared if name in old.get("stores", ()))):
        before, now = former.get(name), declared.get(name)
        if before is None or now is None:
            was, is_now = ("a handler", "a table") if before is None else ("a table", "a handler")
            return f"The step {name!r} has state as {was}, and is now {is_now}."
        if before.get("sources") != now["sources"]:
            return (
                f"The table {name!r} used to be filled from {_listed(before.get('sources', ()))}, and is now "
                f"filled from {_listed(now['sources'])}: the rows that it has are of the former topic. "
                "(Declare a table of another name.)"
            )
        if before != now:
            return (
                f"The table {name!r} has {before.get('key')} keys and {before.get('value')} values, and is "
                f"now declared with {now['key']} keys and {now['value']} values: its rows can't be read that "
                "way. (Declare a table of another name, over another topic declaration.)"
            )
    return None


def _changed_joins(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why the records that a stage's joins keep don't fit what they are declared as now."""
    declared = cast("Mapping[str, Mapping[str, Any]]", new.get("joins", {}))
    former = cast("Mapping[str, Mapping[str, Any]]", old.get("joins", {}))
    for name in (*former, *(name for name in declared if name in old.get("stores", ()))):
        before, now = former.get(name), declared.get(name)
        if before is None or now is None:
            was, is_now = ("a handler", "a join") if before is None else ("a join", "a handler")
            return f"The step {name!r} has state as {was}, and is now {is_now}."
        if before != now:
            return (
                f"The join {name!r} was declared as {_join_text(before)}, and is now declared as "
                f"{_join_text(now)}: the records that it keeps don't fit. (Keep it, and declare the new one "
                "beside it under another name.)"
            )
    return None


def _join_text(described: Mapping[str, Any]) -> str:
    return (
        f"{described.get('how')} (before_ms={described.get('before_ms')}, "
        f"after_ms={described.get('after_ms')}, {described.get('left')} with {described.get('right')} values)"
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))


def _windows_text(described: Any) -> str:
    if isinstance(described, list):
        pairs = cast("list[list[str]]", described)
        return ", ".join(f"{name}={aggregate}" for name, aggregate in pairs)
    parts = cast("Mapping[str, Any]", described)
    rest = ", ".join(f"{name}={value}" for name, value in parts.items() if name != "kind")
    return f"{parts.get('kind')} ({rest})"


def _state_text(described: Mapping[str, Any]) -> str:
    key = described.get("key")
    parts = [str(described.get("kind"))]
    if key is not None:
        parts.append(f"with {', '.join(key) if isinstance(key, list) else key} keys")  # pyright: ignore[reportUnknownArgumentType]
    parts.append(f"of {described.get('value')} values")
    parts.append("with a TTL" if described.get("ttl") else "without a TTL")
    return " ".join(parts)


def _nearest(store: str, added: list[str]) -> str | None:
    near: list[str] = difflib.get_close_matches(store, added, 1, 0.5)
    if len(added) == 1:
        return added[0]
    return near[0] if near else None


def _changed_stage(name: str, old: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> str | None:
    old_key_by = cast(Mapping[str, str] | None, old.get("key_by"))
    new = stages.get(name)
    if new is None:
        if old_key_by is None:
            return None
        return (
            f"The stage {name!r} after key_by is gone, but its repartition topic may still have "
            "unprocessed records."
        )
    if old_key_by is None and new.get("key_by") is None and new["source"] != old.get("source"):
        return f"The stage {name!r} used to read {old.get('source')!r}, but now reads {new['source']!r}."
    new_key_by = new.get("key_by")
    if old_key_by is None or new_key_by is None:
        return (
            None
            if old_key_by == new_key_by
            else f"The stage {name!r} used to get its records in another way."
        )
    if new_key_by.get("from") != old_key_by.get("from"):
        return (
            f"The stage {name!r} used to get its records from the stage {old_key_by.get('from')!r}, and "
            f"now gets them from {new_key_by['from']!r}."
        )
    reason = _changed_key(name, old_key_by, new_key_by)
    if reason:
        return reason
    if new["encoding"] != old.get("encoding"):
        return (
            f"The key_by before {name!r} used to write keys and values as "
            f"{_encoding(old.get('encoding'))}, and now writes {_encoding(new['encoding'])}."
        )
    return None


def _changed_inputs(name: str, old: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> str | None:
    homes = {
        str(source["source"]): home
        for home, stage in stages.items()
        for source in (stage, *_further_inputs(stage))
        if source.get("key_by") is None
    }
    further = {str(source["name"]): source for source in _further_inputs(stages.get(name, {}))}
    for source in (old, *_further_inputs(old)):
        topic = str(source.get("source"))
        if source.get("key_by") is None and homes.get(topic, name) != name:
            # Their offsets are committed with the epochs of the stage's state.
            return f"The topic {topic!r} was read in the stage {name!r}, but is now read in {homes[topic]!r}."
        if source is not old and source.get("key_by") is not None:
            reason = _changed_stage(str(source["name"]), source, further)
            if reason:
                return reason
    return None


def _changed_key(stage: str, old: Mapping[str, str], new: Mapping[str, str]) -> str | None:
    if _keys_compared(old, new) == "same":
        return None
    vouched = any(_vouched(key_by) for key_by in (old, new))
    if old.get("by") != new.get("by") and not vouched:
        return (
            f"The key_by before {stage!r} used the {old.get('by')}, and now uses the {new['by']}, but the "
            "state is keyed by the old one."
        )
    if _keys_compared(old, new) == "unknown":
        return None
    if vouched:
        return (
            f"The key_by before {stage!r} says version={_version(new)}, but said version={_version(old)} "
            "when the state was written."
        )
    return (
        f"The key_by before {stage!r} uses another {new['by']} than the one that the state is keyed by. "
        "(If both return the same key for every value, say so with key_by(..., version=1): from then on "
        "the version is compared instead of the function.)"
    )


def _keys_compared(old: Mapping[str, str], new: Mapping[str, str]) -> Literal["same", "other", "unknown"]:
    """Whether two `key_by` return the same keys, as far as their descriptions show."""
    before, now = old.get("identity"), new.get("identity")
    if before is None or now is None:  # written by a version without identities
        return "unknown"
    if before == now:
        return "same"
    if _vouched(old) != _vouched(new) or not comparable(before, now):
        return "unknown"
    return "other"


def _vouched(key_by: Mapping[str, str]) -> bool:
    return key_by.get("identity", "").startswith(f"{_VERSION} ")


def _version(key_by: Mapping[str, str]) -> str:
    return key_by.get("identity", "").removeprefix(f"{_VERSION} ")


def unverified_keys(old_description: Mapping[str, Any], new_topology: Topology) -> list[str]:
    """One sentence for each `key_by` for which it is unknown whether it still returns the same keys."""
    remarks: list[str] = []
    former = _described_key_bys(old_description)
    for name, new in _described_key_bys(new_topology.describe()).items():
        old = former.get(name)
        if old is not None and _keys_compared(old, new) == "unknown":
            remarks.append(
                f"The key_by before {name!r} ({new['by']}) is assumed to return the same keys as when the "
                "state was written: the function recorded then can't be compared with it. From now on it "
                "can."
            )
    return remarks


def _described_key_bys(description: Mapping[str, Any]) -> dict[str, Mapping[str, str]]:
    """The description of each `key_by`, by its name."""
    found: dict[str, Mapping[str, str]] = {}
    stages = cast("Mapping[str, Mapping[str, Any]]", description.get("stages", {}))
    for name, stage in stages.items():
        for source in ({**stage, "name": name}, *_further_inputs(stage)):
            if source.get("key_by") is not None:
                found[str(source["name"])] = cast("Mapping[str, str]", source["key_by"])
    return found


def _encoding(encoding: Mapping[str, str] | None) -> str:
    return f"{encoding.get('key')} and {encoding.get('value')}" if encoding else "something else"
