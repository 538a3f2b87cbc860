"""What state and committed offsets depend on, as data for JSON in the journal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from fcluster.common.ids import (
    former_changelog_topic,
    former_repartition_topic,
)
from fcluster.graph.codecs import codec_name
from fcluster.graph.foreign import KeyOf
from fcluster.graph.functions import BYTECODE, function_identity
from fcluster.graph.groups import GroupOf
from fcluster.graph.operators import Broadcast, ForeignTable, KeepTable, KeptTable, Rekey, Subscribe
from fcluster.graph.stages import Input, Stage
from fcluster.graph.timestamps import describe_timestamp

FORMAT_WITHOUT_STATES = 1
"""The format for jobs without declared states, timers, windows and tables. Older versions can read it."""
FORMAT_WITHOUT_VERSIONS = 2
"""The format for jobs none of whose states has a version above 1."""
DESCRIPTION_FORMAT = 3
FORMATS_READ = (FORMAT_WITHOUT_STATES, FORMAT_WITHOUT_VERSIONS, DESCRIPTION_FORMAT)


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
        for further in further_inputs(stage):
            if further.get("key_by") is not None:
                names[f"{name}/{further['name']}/repartition"] = str(further["source"])
        if stage.get("stores"):
            names[f"{name}/changelog"] = str(stage.get("changelog") or former_changelog_topic(job, name))
    return names


def rekey_description(rekey: Rekey) -> str:
    """How a `key_by` is named in descriptions and messages: its field, or its function's name."""
    rekey = _said(rekey)
    if isinstance(rekey, str):
        return f"field {rekey}"
    name = getattr(rekey, "__name__", type(rekey).__name__)
    return f"function {name}"


def rekey_identity(rekey: Rekey, version: str | None = None) -> str:
    """What is compared to tell whether a `key_by` still gives the same keys."""
    rekey = _said(rekey)
    if version is not None:
        return f"{VERSION} {version}"
    return f"field {rekey}" if isinstance(rekey, str) else function_identity(rekey)


def _said(rekey: Rekey) -> Rekey:
    """The field or function that the user gave. The key itself, for what goes back to the key that it had."""
    if isinstance(rekey, KeyOf):
        return "key"
    return rekey.by if isinstance(rekey, GroupOf) else rekey


VERSION = "version"
ALL_ROWS = "all rows of"
"""How the topic of a copy of a global table gets its records, with the table's name."""


def feeds_of(stage: Stage) -> Iterator[tuple[str, dict[str, str]]]:
    for chain in stage.chains:
        for step in chain.operators:
            if isinstance(step, Subscribe):
                yield step.topic.name, _feed(stage, step.by, step.version)
            elif isinstance(step, Broadcast):
                rows = f"{ALL_ROWS} {step.table}"
                feed = {"from": stage.name, "by": rows, "identity": rows}
                for topic in step.topics:
                    yield topic.name, {**feed, "topic": stage.topics[chain.input]}
        if chain.rekey is not None and chain.sink is not None:
            yield chain.sink.name, _feed(stage, chain.rekey, chain.rekey_version)


def _feed(stage: Stage, by: Rekey, version: str | None) -> dict[str, str]:
    return {"from": stage.name, "by": rekey_description(by), "identity": rekey_identity(by, version)}


def describe_stage(stage: Stage, feeds: Mapping[str, dict[str, str]]) -> dict[str, Any]:
    first, *further = stage.inputs
    description = {**_describe_input(first, feeds), "stores": sorted(stage.stores)}
    if stage.state_stores:
        description["states"] = {store.name: store.state.describe() for store in stage.state_stores}
        shapes = {store.name: store.declared.shape for store in stage.state_stores}
        models = {name: shape for name, shape in shapes.items() if shape is not None}
        if models:
            description["models"] = models
    if stage.timed_processes:
        description["timers"] = {
            process.name: sorted(timer.name for timer in process.timers) for process in stage.timed_processes
        }
    if stage.windows:
        description["windows"] = {window.name: window.describe() for window in stage.windows}
    if stage.joins:
        description["joins"] = {join.name: join.describe() for join in stage.joins}
    if stage.regroups:
        description["groupings"] = {step.name: step.table for step in stage.regroups}
    if stage.foreign_joins:
        description["foreign"] = [step.name for step in stage.foreign_joins]
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


def _describe_table(stage: Stage, table: KeptTable) -> dict[str, Any]:
    """What the keys and the bytes of a table depend on."""
    names = (stage.inputs[chain.input] for chain in stage.chains if table in chain.tables)
    sources = list(dict.fromkeys(names))
    described: dict[str, Any] = {
        "sources": [source.name for source in sources],
        "key": codec_name(sources[0].topic.key),
    }
    if isinstance(table, KeepTable):
        history = {} if table.history_ms is None else {"history": True}
        history |= {} if table.ttl_ms is None else {"ttl": True}
        copy_of = {"copy_of": table.copy_of} if table.copy_of else {}
        computes = {} if table.reduce is None else {"computes": "what reduce() makes of all values"}
        return {**described, "value": codec_name(table.value), **history, **copy_of, **computes}
    if isinstance(table, ForeignTable):
        value = codec_name(table.value)
        return {**described, "value": value, "computes": f"the {table.how} join of two tables"}
    return {**described, "computes": [[name, aggregate.name] for name, aggregate in table.fields]}


def _describe_input(source: Input, feeds: Mapping[str, dict[str, str]]) -> dict[str, Any]:
    description: dict[str, Any] = {"source": source.topic.name}
    if source.timestamp is not None:
        description["timestamp"] = describe_timestamp(source.timestamp)
    if source.internal:
        # Records in the repartition topic survive a restart, so their encoding matters too.
        description["key_by"] = dict(feeds.get(source.topic.name, {}))
        description["encoding"] = {
            "key": codec_name(source.topic.key),
            "value": codec_name(source.topic.value),
        }
    return description


def further_inputs(stage: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The part of a stage's description about its inputs after the first."""
    return cast("Sequence[Mapping[str, Any]]", stage.get("merged", ()))


def described_inputs(description: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The topics that each stage of a journalled description reads, by the stage's name."""
    stages = cast("Mapping[str, Mapping[str, Any]]", description.get("stages", {}))
    return {
        name: (str(stage.get("source")), *(str(further["source"]) for further in further_inputs(stage)))
        for name, stage in stages.items()
    }


def essence(description: dict[str, Any]) -> dict[str, Any]:
    """The part of a description that the fingerprint is computed from: without what follows from the rest, or
    depends on the host.
    """
    for name, stage in description["stages"].items():
        stage.pop("changelog", None)
        stage.pop("models", None)  # the bytes are JSON, whatever the model
        for input_name, source in [(name, stage), *((one["name"], one) for one in stage.get("merged", ()))]:
            key_by = source.get("key_by")
            if key_by is not None:
                source["source"] = former_repartition_topic(description["job"], input_name)
                identity = str(key_by.get("identity", ""))
                # Bytecode depends on the version of Python, which may differ between hosts.
                if identity == key_by.get("by") or identity.startswith(BYTECODE):
                    del key_by["identity"]
    return description
