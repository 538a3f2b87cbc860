"""A job as a reader sees it: its topics, stages, chains and steps, with their names.

Responsible for: `outline`, which describes a built job as plain data for `fcluster check`, and what becomes
of existing state if the job is started (`changes_to_state`). Invariant: each topic that the job reads or
writes is in the outline, once. Must not format anything: `fcluster.cli` does that. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from fcluster.common.ids import journal_topic
from fcluster.graph.codecs import kind_title
from fcluster.graph.compatibility import incompatibilities, unverified_keys
from fcluster.graph.description import described_inputs, rekey_description
from fcluster.graph.operators import (
    AnswerAgain,
    AnyTable,
    Branch,
    Broadcast,
    ForeignTable,
    GroupTable,
    JoinStreams,
    JoinTable,
    KeepTable,
    MapAsync,
    OnError,
    Operator,
    Process,
    Regroup,
    Subscribe,
    Subscribers,
    TellChanges,
    TopicSpec,
    Window,
    names_of_table,
    rules_of,
    step_kind,
)
from fcluster.graph.signatures import takes_context
from fcluster.graph.stages import Chain, Input, Stage
from fcluster.graph.timestamps import timestamp_text
from fcluster.graph.topology import Topology
from fcluster.graph.watermark import Watermark


@dataclass(frozen=True, slots=True)
class Flow:
    """A topic that a step writes.

    Attributes:
        topic: its name.
        what: "results", "late records", "failures" (dead letters), or "changes" of state.
    """

    topic: str
    what: str


@dataclass(frozen=True, slots=True)
class StepOutline:
    """One step of a chain.

    Attributes:
        kind: the name of the step in a job file, such as "filter", "process", "window", "key_by" or "to".
        name: for a step with state: the name of step and state, which has to stay. Otherwise that of its
            function or field. Empty if it has none.
        details: what it was given, by name, in words.
        state: the names of its states.
        writes: topics that it writes by itself.
    """

    kind: str
    name: str
    details: Mapping[str, str]
    state: tuple[str, ...] = ()
    writes: tuple[Flow, ...] = ()


@dataclass(frozen=True, slots=True)
class ChainOutline:
    """A path of records from one topic.

    Attributes:
        name: its name in messages.
        topic: the topic that it reads.
        steps: in order; the last one may write the results.
    """

    name: str
    topic: str
    steps: tuple[StepOutline, ...]


@dataclass(frozen=True, slots=True)
class InputOutline:
    """A topic that a stage reads.

    Attributes:
        topic: its name.
        internal: whether it is a repartition topic of the cluster.
        watermark: see `Input`.
        timestamp: where its records' timestamps come from, in words.
        on_error: what happens to records that can't be decoded: "stop", "skip" or "dead letter".
        writes: where their dead letters go.
    """

    topic: str
    internal: bool
    watermark: Watermark | None
    timestamp: str
    on_error: str
    writes: tuple[Flow, ...]


@dataclass(frozen=True, slots=True)
class StageOutline:
    """A stage.

    Attributes:
        name: its name, which has to stay if it has state.
        inputs: what it reads.
        changelog: the topic that keeps its state. None: it has no state.
        chains: in the order in which they process a record.
    """

    name: str
    inputs: tuple[InputOutline, ...]
    changelog: str | None
    chains: tuple[ChainOutline, ...]


@dataclass(frozen=True, slots=True)
class TopicOutline:
    """A topic of the job.

    Attributes:
        name: its name.
        roles: what it is to the job: "source", "output", "late records", "dead letters", "repartition",
            "changelog", "journal", or "declared" (written only by records that name it). One topic may have
            several.
        key: how keys are encoded. None: fcluster's own records.
        value: the same for values.
        isolation: how it is read. None: it isn't.
    """

    name: str
    roles: tuple[str, ...]
    key: str | None
    value: str | None
    isolation: str | None


@dataclass(frozen=True, slots=True)
class JobOutline:
    """A job. See `Topology`."""

    job: str
    fingerprint: str
    topics: tuple[TopicOutline, ...]
    stages: tuple[StageOutline, ...]


def outline(topology: Topology) -> JobOutline:
    """The outline of a built job."""
    stages = tuple(_stage(stage) for stage in topology.stages)
    return JobOutline(topology.job, topology.fingerprint, tuple(_topics(topology, stages)), stages)


_WITH_CONTEXT: Final = {"called_with": "context, value"}
"""Said of steps whose function gets more than the value."""

# --- stages --------------------------------------------------------------------------------------------


def _stage(stage: Stage) -> StageOutline:
    return StageOutline(
        stage.name,
        tuple(map(_input, stage.inputs)),
        stage.changelog,
        tuple(_chain(stage, chain) for chain in stage.chains),
    )


def _input(source: Input) -> InputOutline:
    timestamp = timestamp_text(source.timestamp)
    return InputOutline(
        source.topic.name, source.internal, source.watermark, timestamp, *_rule(source.on_error)
    )


def _chain(stage: Stage, chain: Chain) -> ChainOutline:
    steps = [_step(operator) for operator in chain.operators]
    if chain.rekey is not None:
        by, details = rekey_description(chain.rekey), dict[str, str]()
        if chain.rekey_version is not None:
            details["version"] = chain.rekey_version
        if not isinstance(chain.rekey, str) and takes_context(chain.rekey):
            details |= _WITH_CONTEXT
        rule, failures = _rule(chain.rekey_on_error)
        steps.append(StepOutline("key_by", by, {**details, **_unless_stop(rule)}, writes=failures))
    if chain.sink is not None:
        rule, failures = _rule(chain.sink_on_error)
        results = Flow(chain.sink.name, "results")
        steps.append(StepOutline("to", chain.sink.name, _unless_stop(rule), writes=(results, *failures)))
    return ChainOutline(chain.name, stage.inputs[chain.input].topic.name, tuple(steps))


def _step(step: Operator) -> StepOutline:
    rule, writes = _rule(step.on_error)
    kind = step_kind(step)
    details, state = dict[str, str](), tuple[str, ...]()
    if isinstance(step, Process):
        name = step.name
        state = (name, *(store.name for store in step.stores if store.store_names))
        if step.timers:
            details["timers"] = ", ".join(timer.name for timer in step.timers)
    elif isinstance(step, Window):
        name, state = step.name, (step.name,)
        described = step.windows.describe()
        sizes = ", ".join(f"{part}={value}" for part, value in described.items() if part != "kind")
        details["windows"] = f"{described['kind']} ({sizes})"
        if step.clock == "processing":
            details["clock"] = "processing time"
        if step.keyless:
            details["of"] = "all records, whatever their keys are"
        if step.windows.grace_ms:
            details["grace_ms"] = str(step.windows.grace_ms)
        details["computes"] = ", ".join(f"{field}={aggregate.name}" for field, aggregate in step.fields)
        details["emits"] = {
            "update": "each update",
            "interval": f"every {step.interval_ms} ms, and when a window closes",
        }.get(step.emit, "when a window closes")
        if step.late is not None:
            writes = (Flow(step.late.name, "late records"), *writes)
    elif isinstance(step, Branch) and step.is_rest:
        name = "others"
    elif isinstance(step, JoinStreams):
        name, state = step.name, (step.name,)
        details |= {"side": step.side, "how": step.how}
        details["within"] = f"{step.before_ms} ms earlier, {step.after_ms} ms later"
        if step.grace_ms:
            details["grace_ms"] = str(step.grace_ms)
        if step.late is not None:
            writes = (Flow(step.late.name, "late records"), *writes)
    elif isinstance(step, KeepTable):
        name, state = step.name, (step.name,)
        if step.copy_of:
            details["copy_of"] = step.copy_of
        if step.ttl_ms is not None:
            details["ttl_ms"] = str(step.ttl_ms)
        if step.reduce is not None:
            details["computes"] = f"reduce={getattr(step.reduce, '__name__', type(step.reduce).__name__)}"
    elif isinstance(step, Broadcast):
        name = step.table
        details["to"] = f"all shards of {', '.join(reader for reader, _topic in step.copies)}"
        writes = (*(Flow(topic.name, "results") for topic in step.topics), *writes)
    elif isinstance(step, Regroup):
        name, state = step.name, (step.name,)
        details["by"] = rekey_description(step.by)
    elif isinstance(step, GroupTable):
        name, state = step.name, (step.name,)
        details["computes"] = ", ".join(f"{field}={aggregate.name}" for field, aggregate in step.fields)
    elif isinstance(step, ForeignTable):
        name, state = step.name, (step.name,)
        details["how"] = step.how
    elif isinstance(step, Subscribe):
        name, state = step.name, (step.name,)
        details["by"] = rekey_description(step.by)
        writes = (Flow(step.topic.name, "results"), *writes)
    elif isinstance(step, Subscribers):
        name, state = step.name, (step.name,)
        details["table"] = _named(step.table)
    elif isinstance(step, AnswerAgain):
        name = step.subscribers.name
    elif isinstance(step, TellChanges):
        name = _named(step.table)
        of_table = [_rule(one) for one in dict.fromkeys(rules_of(step)) if one != "stop"]
        rule = ", ".join(dict.fromkeys(said for said, _flows in of_table)) or "stop"
        writes = tuple(flow for _said, flows in of_table for flow in flows)
    else:
        if isinstance(step, MapAsync):
            details |= _calls(step)
        elif not isinstance(step, JoinTable) and takes_context(step.function):
            details |= _WITH_CONTEXT
        if isinstance(step, JoinTable):
            details |= {"table": _named(step.table), "how": step.how}
            if step.by is not None:
                details["on"] = rekey_description(step.by)
        name = str(getattr(step.function, "__name__", type(step.function).__name__))
    return StepOutline(kind, name, {**details, **_unless_stop(rule)}, state, writes)


def _calls(step: MapAsync) -> dict[str, str]:
    """How the step makes its calls, in words."""
    said = {"concurrency": str(step.concurrency), "timeout_ms": str(step.timeout_ms)}
    if step.retry.attempts > 1:
        said["attempts"] = str(step.retry.attempts)
    if step.circuit is not None:
        said["circuit"] = f"opens after {step.circuit.failures} failures, then {step.circuit.when_open}s"
    return said


def _named(table: AnyTable) -> str:
    """The names of the kept tables that a table is computed of."""
    return ", ".join(names_of_table(table))


def _rule(on_error: OnError) -> tuple[str, tuple[Flow, ...]]:
    if isinstance(on_error, TopicSpec):
        return "dead letter", (Flow(on_error.name, "failures"),)
    return on_error, ()


def _unless_stop(rule: str) -> dict[str, str]:
    return {} if rule == "stop" else {"on_error": rule}


# --- topics --------------------------------------------------------------------------------------------

_ROLE_OF = {"results": "output", "late records": "late records", "failures": "dead letters"}


def _topics(topology: Topology, stages: Sequence[StageOutline]) -> Iterator[TopicOutline]:
    specs = {topic.name: topic for topic in topology.topics}
    specs |= {source.topic.name: source.topic for source in topology.inputs}
    roles: dict[str, dict[str, None]] = {}
    read = set[str]()
    for source in topology.inputs:
        roles.setdefault(source.topic.name, {})["repartition" if source.internal else "source"] = None
        read.add(source.topic.name)
    for flow in (flow for stage in stages for flow in flows_of(stage)):
        if "repartition" not in roles.get(flow.topic, ()):
            roles.setdefault(flow.topic, {})[_ROLE_OF[flow.what]] = None
    for topic in topology.topics:
        roles.setdefault(topic.name, {"declared": None})
    for name, own in roles.items():
        isolation = specs[name].isolation if name in read else None
        key, value = kind_title(specs[name].key), kind_title(specs[name].value)
        yield TopicOutline(name, tuple(own), key, value, isolation)
    for stage in topology.stages:
        if stage.changelog is not None:
            yield TopicOutline(stage.changelog, ("changelog",), None, None, None)
    yield TopicOutline(journal_topic(topology.job), ("journal",), None, None, None)


def flows_of(stage: StageOutline) -> Iterator[Flow]:
    """What its inputs and steps write. May contain repetitions."""
    for source in stage.inputs:
        yield from source.writes
    for chain in stage.chains:
        for step in chain.steps:
            yield from step.writes


# --- what becomes of state -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StateChanges:
    """What becomes of a job's existing state and offsets if it is started.

    Attributes:
        reasons: why it doesn't start: what no longer fits. Empty: it does.
        remarks: what can't be told, and is assumed.
        kept: names of steps whose state goes on.
        begun: names of steps that begin with empty state.
        read_anew: topics that were not read before.
        left: topics that are no longer read.
    """

    reasons: tuple[str, ...]
    remarks: tuple[str, ...]
    kept: tuple[str, ...]
    begun: tuple[str, ...]
    read_anew: tuple[str, ...]
    left: tuple[str, ...]


def changes_to_state(old_description: Mapping[str, Any], topology: Topology) -> StateChanges:
    """Compare a job with what it was when its state was written.

    Args:
        old_description: see `Topology.describe`.
        topology: the job as it is now, with the actual names of its internal topics.
    """
    stages = cast("Mapping[str, Mapping[str, Any]]", old_description.get("stages", {}))
    former = {str(store) for stage in stages.values() for store in stage.get("stores", ())}
    stores = [store for stage in topology.stages for store in stage.stores]
    before = {topic for topics in described_inputs(old_description).values() for topic in topics}
    now = [source.topic.name for source in topology.inputs]
    return StateChanges(
        tuple(incompatibilities(old_description, topology)),
        tuple(unverified_keys(old_description, topology)),
        tuple(store for store in stores if store in former),
        tuple(store for store in stores if store not in former),
        tuple(topic for topic in now if topic not in before),
        tuple(sorted(before.difference(now))),
    )
