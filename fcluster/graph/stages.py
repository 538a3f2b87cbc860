"""Stages: what one kind of shard does with the records of its topics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from fcluster.common.errors import IncompatibleState, JobError
from fcluster.graph.joins import PairStore
from fcluster.graph.operators import (
    Broadcast,
    JoinStreams,
    KeepTable,
    KeptTable,
    OnError,
    Operator,
    Process,
    Regroup,
    Rekey,
    StatefulOperator,
    Subscribe,
    Subscribers,
    TellChanges,
    TimedOperator,
    TopicSpec,
    Window,
    is_running,
    rules_of,
)
from fcluster.graph.states import StateStore
from fcluster.graph.tables import TableStore
from fcluster.graph.timers import TimerStore
from fcluster.graph.timestamps import Timestamp
from fcluster.graph.watermark import Watermark
from fcluster.graph.windows import WindowStore

AnyStore = str | StateStore | TimerStore | WindowStore | TableStore | PairStore
"""A store as `ShardState` takes it."""


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
    def tables(self) -> tuple[KeptTable, ...]:
        """The tables that it keeps."""
        return tuple(operator for operator in self.operators if isinstance(operator, KeptTable))

    @property
    def sinks(self) -> tuple[TopicSpec, ...]:
        """The topics that its results are written to, apart from those that records name."""
        own: list[TopicSpec] = []
        for step in self.operators:
            if isinstance(step, Subscribe):
                own.append(step.topic)
            elif isinstance(step, Broadcast):
                own += step.topics
        return tuple(own) if self.sink is None else (*own, self.sink)

    @property
    def fills_tables(self) -> bool:
        """Whether its records are only read as rows of tables, here or in other stages. Those of which a
        table is computed are no rows.
        """
        return any(isinstance(step, Broadcast) for step in self.operators) or any(
            not is_running(table) for table in self.tables
        )

    @property
    def follows(self) -> str | None:
        """The name of the kept table whose changes it follows. None: it begins with the records."""
        first = self.operators[0] if self.operators else None
        return first.source if isinstance(first, TellChanges) else None

    @property
    def rules(self) -> tuple[OnError, ...]:
        """The error rules of all its steps that can fail, in order."""
        rules: list[OnError] = [rule for operator in self.operators for rule in rules_of(operator)]
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
        timestamp: where the values of its records have their time. None: Kafka's timestamps are used.
    """

    topic: TopicSpec
    internal: bool = False
    name: str = ""
    on_error: OnError = "stop"
    watermark: Watermark | None = None
    timestamp: Timestamp | None = None


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
        declared: the names of all topics that the job declares: a handler can write to no other one. Empty if
            they aren't known.
    """

    name: str
    inputs: tuple[Input, ...]
    chains: tuple[Chain, ...]
    stores: tuple[str, ...]
    changelog: str | None
    declared: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

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
        expiring = (
            table for table in self.tables if isinstance(table, KeepTable) and table.ttl_ms is not None
        )
        return bool(self.timed_steps) or any(expiring)

    @property
    def precedence(self) -> tuple[int, ...]:
        """The numbers of its inputs, in the order that decides between records with the same timestamp.

        Tables come first, so that a record finds the rows of its own time.
        """
        kept = {chain.input for chain in self.chains if chain.tables}
        return tuple(sorted(range(len(self.inputs)), key=lambda number: number not in kept))

    @property
    def table_inputs(self) -> frozenset[int]:
        """The numbers of the inputs that are only read as tables."""
        streams = {chain.input for chain in self.chains if not chain.fills_tables and chain.follows is None}
        return frozenset(range(len(self.inputs))) - streams

    @property
    def copies(self) -> dict[int, KeepTable]:
        """The copies of global tables, by the number of the input that fills each."""
        return {
            chain.input: table
            for chain in self.chains
            for table in chain.tables
            if isinstance(table, KeepTable) and table.copy_of
        }

    @property
    def broadcasts(self) -> tuple[tuple[int, Broadcast], ...]:
        """The global tables whose rows it writes to other stages, each with the number of its input."""
        return tuple(
            (chain.input, step)
            for chain in self.chains
            for step in chain.operators
            if isinstance(step, Broadcast)
        )

    @property
    def timeless_inputs(self) -> frozenset[int]:
        """The inputs that event time doesn't wait for: those that only fill tables, if there are others.

        A table may get no record for days, and that says nothing about the stream that is joined with it. But
        if its changes are followed, they are records themselves.
        """
        waited_for = {chain.input for chain in self.chains if not chain.fills_tables}
        numbers = frozenset(range(len(self.inputs))) - waited_for
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
        tables = (store for table in self.tables for store in table.stores)
        members = (store for step in self.regroups for store in step.stores)
        links = (store for step in self.foreign_joins for store in step.stores)
        joins = (join.store for join in self.joins)
        return (*self.stores, *self.state_stores, *timers, *windows, *tables, *members, *links, *joins)

    @property
    def timed_steps(self) -> tuple[TimedOperator, ...]:
        """Its operators in which something happens because time has passed, in the order of the job file. Of
        a join, one side.
        """
        named: dict[str, TimedOperator] = {}
        for step in (step for chain in self.chains for step in chain.stateful):
            if _is_timed(step):
                named.setdefault(step.name, step)
        return tuple(named.values())

    @property
    def tables(self) -> tuple[KeptTable, ...]:
        """The tables that it keeps, in the order of the job file."""
        return tuple({table.name: table for chain in self.chains for table in chain.tables}.values())

    @property
    def regroups(self) -> tuple[Regroup, ...]:
        """The steps that group the rows of its tables, in the order of the job file."""
        steps = (step for chain in self.chains for step in chain.stateful)
        return tuple({step.name: step for step in steps if isinstance(step, Regroup)}.values())

    @property
    def foreign_joins(self) -> tuple[Subscribe | Subscribers, ...]:
        """The steps of joins by a foreign key, in the order of the job file."""
        steps = (step for chain in self.chains for step in chain.stateful)
        found = {step.name: step for step in steps if isinstance(step, Subscribe | Subscribers)}
        return tuple(found.values())

    @property
    def windows(self) -> tuple[Window, ...]:
        """Its windows, in the order of the job file."""
        steps = (step for chain in self.chains for step in chain.stateful)
        return tuple({step.name: step for step in steps if isinstance(step, Window)}.values())

    @property
    def joins(self) -> tuple[JoinStreams, ...]:
        """Its joins of streams, one side of each, in the order of the job file."""
        return tuple(step for step in self.timed_steps if isinstance(step, JoinStreams))

    @property
    def results_late_ms(self) -> int:
        """How much earlier than event time the results of its windows and joins may be."""
        late = [window.closes_after_ms for window in self.windows] + [join.late_ms for join in self.joins]
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

    @property
    def dead_letter_names(self) -> tuple[str, ...]:
        """The names of those topics, each once and in order."""
        return tuple(sorted({topic.name for topic in self.dead_letter_topics}))


def _is_timed(step: StatefulOperator) -> TypeGuard[TimedOperator]:
    if isinstance(step, Window):
        return step.is_timed
    return isinstance(step, JoinStreams) or (isinstance(step, Process) and bool(step.timers))


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


def with_timestamps(stages: Sequence[Stage], declared: Mapping[str, Timestamp]) -> list[Stage]:
    """The stages of a job, with where the values of topics have their time.

    Args:
        declared: what the user declared, by topic.

    Raises:
        JobError: one of these topics fills a table.
    """
    stamped: list[Stage] = []
    for stage in stages:
        kept = {stage.inputs[chain.input].topic.name for chain in stage.chains if chain.fills_tables}
        for name in kept & declared.keys():
            raise JobError(
                f"The topic {name!r} is declared with timestamp=, and is read as a table. There, a record "
                "without a value deletes a row, and has no time.",
                remedy="Leave out timestamp=: rows are ordered by Kafka's timestamps.",
            )
        inputs = [replace(source, timestamp=declared.get(source.topic.name)) for source in stage.inputs]
        stamped.append(replace(stage, inputs=tuple(inputs)))
    return stamped


def written_topics(stage: Stage) -> Iterator[TopicSpec]:
    """The sinks, the topics for late records and the dead-letter topics of a stage, including repartition
    topics. May contain repetitions.
    """
    for chain in stage.chains:
        yield from chain.sinks
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
    copies = {stage.topics[number] for number in stage.copies}
    kept = {stage.inputs[chain.input].topic.name for chain in stage.chains if chain.tables} - copies
    others = {count for topic, count in counts.items() if topic not in copies}
    internal = {source.topic.name for source in stage.inputs if source.internal}
    tables = {topic: count for topic, count in counts.items() if topic in kept}
    wanted = next(iter(tables.values() if tables else counts.values()))
    other = next((topic for topic, count in counts.items() if count != wanted), "")
    if len(set(tables.values())) > 1:
        remedy = (
            f"Copy {other!r} to a topic with {wanted} partitions, with job.stream(topic).to(copy), and "
            "declare the table over the copy."
        )
    elif copies and len(others) == 1:
        remedy = (
            "Each shard of the stage has a copy of a global table, and a partition of its own to fill that. "
            "`fcluster reset` deletes the topic of the copies and the stage's state; the next start makes it "
            f"with {others.pop()} partitions."
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


def renamed(stage: Stage, names: Mapping[str, str]) -> Stage:
    def topic(spec: TopicSpec) -> TopicSpec:
        return replace(spec, name=names.get(spec.name, spec.name))

    def operator(step: Operator) -> Operator:
        if isinstance(step, Subscribe):
            return replace(step, topic=topic(step.topic))
        if isinstance(step, Broadcast):
            return replace(step, copies=tuple((reader, topic(copy)) for reader, copy in step.copies))
        return step

    chains = tuple(
        replace(
            chain,
            operators=tuple(map(operator, chain.operators)),
            sink=None if chain.sink is None else topic(chain.sink),
        )
        for chain in stage.chains
    )
    changelog = None if stage.changelog is None else names.get(stage.changelog, stage.changelog)
    inputs = tuple(
        replace(source, topic=topic(source.topic)) if source.internal else source for source in stage.inputs
    )
    return replace(stage, inputs=inputs, chains=chains, changelog=changelog)
