"""The graph that a job file draws: a node for each step, before it is compiled into stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from fcluster.graph.codecs import kind_title
from fcluster.graph.operators import (
    Branch,
    Filter,
    KeepTable,
    KeyKind,
    OnError,
    Operator,
    Peek,
    Rekey,
    TellChanges,
    TopicSpec,
    ValueKind,
    kept_in,
    step_kind,
)


@dataclass(frozen=True)
class KeyBy:
    by: Rekey
    name: str | None
    key: KeyKind
    value: ValueKind | None
    on_error: OnError
    version: str | None = None


@dataclass(frozen=True)
class Source:
    topic: TopicSpec


@dataclass(frozen=True)
class Sink:
    topic: TopicSpec
    on_error: OnError | None


@dataclass(frozen=True)
class Merge:
    """Joins several streams into one."""


@dataclass(eq=False)
class Node:
    """One step in the graph of streams. Steps without a following step end a chain. A merge has several
    parents. So has a join with a table: its records come from the first parent, and the others keep the rows
    of the table. The parents of `TellChanges` are those that keep the rows.
    """

    step: Source | Sink | KeyBy | Merge | Operator
    parents: tuple[Node, ...] = ()
    children: list[Node] = field(default_factory=list["Node"])

    def add(self, step: Sink | KeyBy | Operator, *further_parents: Node) -> Node:
        child = Node(step, (self, *further_parents))
        self.children.append(child)
        return child


Seed = str | Node
"""The beginning of an input: a user's topic, by name, or a `key_by`."""


def opens_input(node: Node) -> bool:
    """Whether the steps after this `key_by` read a repartition topic. They don't if only `.to(topic)`
    follows.
    """
    if not isinstance(node.step, KeyBy) or not node.children:
        return False
    return not (len(node.children) == 1 and isinstance(node.children[0].step, Sink))


def seeds(node: Node) -> Iterator[Seed]:
    """The inputs whose records reach `node`, in order. An input may occur several times."""
    if isinstance(node.step, Source):
        yield node.step.topic.name
    elif isinstance(node.step, KeyBy):
        yield node
    else:
        for parent in node.parents:
            yield from seeds(parent)


def key_of(node: Node) -> KeyKind:
    """The kind of the keys behind this node."""
    for seed in seeds(node):
        if isinstance(seed, Node):
            return cast("KeyBy", seed.step).key
    while not isinstance(node.step, Source):
        node = node.parents[0]
    return node.step.topic.key


def value_of(node: Node) -> tuple[ValueKind, bool]:
    """The codec in which the values behind this node can be kept, and whether they are those that were
    read.
    """
    step = node.step
    if isinstance(step, Source):
        return step.topic.value, True
    if isinstance(step, KeyBy):
        return step.value or value_of(node.parents[0])[0], True
    if isinstance(step, Filter | Peek | Branch):
        return value_of(node.parents[0])
    if isinstance(step, TellChanges) and step.keeps_bytes:
        kept = kept_in(step.table)[0]
        if isinstance(kept, KeepTable):
            return kept.value, True
    if isinstance(step, Merge):
        found = [value_of(parent) for parent in node.parents]
        if len({kind_title(kind) for kind, _same in found}) == 1:
            return found[0][0], all(same for _kind, same in found)
    return "json", False


def step_name(step: Merge | Operator) -> str:
    """The step's name in a job file."""
    return "merge" if isinstance(step, Merge) else step_kind(step)
