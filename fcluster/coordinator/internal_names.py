"""Which internal topics belong to the job. They are found, and proven to be the job's own, before any is
used.

Responsible for: the names of internal topics. A topic that the journal lists keeps its name. State that an
older version wrote under an ambiguous name is found there, if it is proven to be this job's. All other topics
get the names that `ids` gives them. Rule: a topic with records of another program is never written to. Must
not create or delete anything, or ask Kafka: the caller does that, and answers questions. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fcluster.common.errors import IncompatibleState
from fcluster.common.ids import journal_topic
from fcluster.common.positions import CommittedPosition
from fcluster.graph.description import described_topics
from fcluster.graph.topology import Topology, former_names

Positions = Callable[[str, str], list[CommittedPosition]]
"""Returns what the group of a job (first argument) has committed for a topic (second argument)."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Another job's claim that a topic is its own and holds its state.

    Attributes:
        job: the other job's name.
        stage: the stage of that job.
    """

    job: str
    stage: str


def internal_names(
    topology: Topology,
    description: Mapping[str, Any] | None,
    existing: Collection[str],
    positions: Positions,
) -> dict[str, str]:
    """The internal topics whose names differ from those in `topology`: from the name in `topology` to the
    actual name.

    Args:
        topology: the job, as it was built.
        description: of the job's last run, from its journal. None if there is none.
        existing: names of all topics.
        positions: called only if state may be under an old name.
    """
    described = described_topics(description) if description is not None else {}
    former = former_names(topology)
    names: dict[str, str] = {}
    for stage in topology.stages:
        source = stage.topics[0]
        if stage.inputs[0].internal:
            actual = described.get(f"{stage.name}/repartition", former[source])
            if _is_kept(topology, actual, source, former[source], existing, positions):
                names[source] = actual
            source = names.get(source, source)
        for further in stage.inputs[1:]:
            actual = described.get(f"{stage.name}/{further.name}/repartition", further.topic.name)
            if further.internal and actual != further.topic.name:
                names[further.topic.name] = actual
        if stage.changelog is not None:
            actual = described.get(f"{stage.name}/changelog", former[stage.changelog])
            if actual == former[stage.changelog]:
                written = any(position.state_epoch for position in positions(topology.job, source))
                actual = actual if written and actual in existing else stage.changelog
            if actual != stage.changelog:
                names[stage.changelog] = actual
    return names


def _is_kept(
    topology: Topology,
    actual: str,
    present: str,
    former: str,
    existing: Collection[str],
    positions: Positions,
) -> bool:
    """Whether a repartition topic is still used under a name that differs from its present one."""
    if actual == present:
        return False
    if actual != former:
        return True
    # It may contain records that its reader hasn't processed yet. If the job has committed offsets of its
    # sources, it has written some of them.
    sources = (topic.name for topic in topology.sources)
    return actual in existing and any(positions(topology.job, topic) for topic in (actual, *sources))


def possible_claims(topic: str, job: str, existing: Collection[str]) -> Iterator[str]:
    """Other jobs that may have had the same old name for a topic: those that have a journal."""
    stem, _, _ = topic.rpartition("-")
    parts = stem.split("-")
    for count in range(1, len(parts)):
        other = "-".join(parts[:count])
        if other and other != job and journal_topic(other) in existing:
            yield other


def claim_of(job: str, topic: str, description: Mapping[str, Any], positions: Positions) -> Claim | None:
    """The claim on `topic` from another job's description, if that job has written to it."""
    for place, name in described_topics(description).items():
        if name != topic:
            continue
        stage, _, kind = place.rpartition("/")
        source = str(description.get("stages", {}).get(stage, {}).get("source"))
        committed = positions(job, source)
        if committed if kind == "repartition" else any(position.state_epoch for position in committed):
            return Claim(job, stage)
    return None


def shared(topic: str, job: str, claim: Claim) -> IncompatibleState:
    """The error for a topic that two jobs have written to."""
    return IncompatibleState(
        f"The topic {topic!r} contains records of two jobs, {job!r} and {claim.job!r} (its stage "
        f"{claim.stage!r}): an older version of fcluster gave both jobs the same topic name, and the "
        "records can no longer be told apart.",
        remedy=f"Reset both jobs (`fcluster reset {job}`, `fcluster reset {claim.job}`): each then gets its "
        "own topic. Or run this job under another name, which leaves the topic as it is.",
    )


def unowned_topics(
    topology: Topology, description: Mapping[str, Any] | None, existing: Collection[str]
) -> list[tuple[str, str]]:
    """Internal topics that exist although the journal doesn't list them, each with the source of its stage.
    They may be used if they are empty, or if it is proven that the job has written to them.
    """
    described = set(described_topics(description).values()) if description is not None else set[str]()
    found: list[tuple[str, str]] = []
    for stage in topology.stages:
        for source in stage.inputs:
            topic = source.topic.name
            if source.internal and topic in existing and topic not in described:
                found.append((topic, topic))
        if stage.changelog is not None and stage.changelog in existing and stage.changelog not in described:
            found.append((stage.changelog, stage.topics[0]))
    return found


def not_ours(topic: str, job: str) -> IncompatibleState:
    """The error for an internal topic that has records of another program."""
    return IncompatibleState(
        f"The job {job!r} needs the topic {topic!r} for itself, but the topic contains records, and "
        "nothing shows that this job wrote them: its journal doesn't name the topic, and it has no "
        "committed offsets that belong to it.",
        remedy=f"If this job wrote them earlier, start again with `fcluster reset {job}`; otherwise give the "
        "job another name.",
    )
