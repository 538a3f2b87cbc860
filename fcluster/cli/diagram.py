"""The diagram of a job: what is drawn, and what leads where.

Responsible for: `diagram_of`, which makes nodes, boxes and arrows of a job's outline. `job_views` writes them
in Mermaid's language, `svg` draws them. Must not format anything. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fcluster.graph.outline import ChainOutline, JobOutline, StageOutline

Shape = Literal["topic", "step", "step with state"]


@dataclass(frozen=True, slots=True)
class Node:
    """A topic or a step.

    Attributes:
        name: made of a letter and numbers, and different for each node: a user's names may mean something in
            the language of a diagram.
        label: what is written in it.
        shape: what it is.
    """

    name: str
    label: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Box:
    """A stage.

    Attributes:
        name: see `Node`.
        label: what is written above it.
        chains: the steps of each chain, in order; those that several chains share are in the first one only.
        reads: the names of the topics that it reads.
    """

    name: str
    label: str
    chains: tuple[tuple[Node, ...], ...]
    reads: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Arrow:
    """What goes from `begin` to `end`: the names of nodes, or of a box.

    Attributes:
        label: what is said about it. Empty: it is the way that records take.
    """

    begin: str
    end: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Diagram:
    """Topics that aren't at either end of an arrow (the journal, for example) aren't in it."""

    topics: tuple[Node, ...]
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


def diagram_of(job: JobOutline) -> Diagram:
    """The diagram of a job."""
    return _Drawing(job).diagram


class _Drawing:
    def __init__(self, job: JobOutline) -> None:
        self._topics = {topic.name: f"t{number}" for number, topic in enumerate(job.topics)}
        self._arrows: dict[Arrow, None] = {}
        """In order. A dict, because several steps may write to the same dead-letter topic."""
        self._behind_merges: dict[tuple[str, int], str] = {}
        """The nodes from a step with state onwards, by its name and how many steps after it. Where streams
        are merged, several chains run through the same nodes.
        """
        boxes = tuple(self._stage(f"s{number}", stage) for number, stage in enumerate(job.stages))
        ends = {end for arrow in self._arrows for end in (arrow.begin, arrow.end)}
        topics = tuple(Node(node, name, "topic") for name, node in self._topics.items() if node in ends)
        self.diagram = Diagram(topics, boxes, tuple(self._arrows))

    def _stage(self, name: str, stage: StageOutline) -> Box:
        chains = tuple(self._chain(f"{name}c{number}", chain) for number, chain in enumerate(stage.chains))
        for source in stage.inputs:
            for flow in source.writes:
                self._arrow(self._topics[source.topic], self._topics[flow.topic], flow.what)
        if stage.changelog is not None:
            self._arrow(name, self._topics[stage.changelog], "state")
        reads = tuple(self._topics[source.topic] for source in stage.inputs)
        return Box(name, f"stage {stage.name}", chains, reads)

    def _chain(self, name: str, chain: ChainOutline) -> tuple[Node, ...]:
        """Its nodes, except those that another chain has drawn already."""
        nodes: list[Node] = []
        before, stateful, behind = self._topics[chain.topic], "", 0
        for number, step in enumerate(chain.steps):
            own = here = f"{name}n{number}"
            if step.state and not stateful:
                stateful, behind = step.name, number
            if stateful:
                here = self._behind_merges.setdefault((stateful, number - behind), own)
            if step.kind != "to":
                if here == own:
                    shape: Shape = "step with state" if step.state else "step"
                    nodes.append(Node(here, f"{step.kind} {step.name}", shape))
                self._arrow(before, here)
                before = here
            for flow in step.writes:
                # Results are drawn as the way that records take, all else as a way aside.
                self._arrow(before, self._topics[flow.topic], "" if flow.what == "results" else flow.what)
        return tuple(nodes)

    def _arrow(self, begin: str, end: str, label: str = "") -> None:
        self._arrows[Arrow(begin, end, label)] = None
