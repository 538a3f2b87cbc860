"""The error for a topic that doesn't exist."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from fcluster.common.errors import MissingTopic
from fcluster.common.spelling import near_names

TOPICS_NAMED_MAX: Final = 8


def missing_topic(topic: str, existing: Iterable[str], advice: str = "") -> MissingTopic:
    """The error for a missing topic. Its remedy names similar topics, or else what there is.

    Args:
        topic: its name.
        existing: all topics of the cluster.
        advice: a sentence on what else helps, such as how to create it.
    """
    visible = sorted(name for name in existing if not name.startswith("__"))
    near = near_names(topic, visible, 3)
    if near:
        remedy = f"Did you mean {' or '.join(map(repr, near))}?"
    elif visible:
        more = " and more" if len(visible) > TOPICS_NAMED_MAX else ""
        remedy = f"Topics there: {', '.join(visible[:TOPICS_NAMED_MAX])}{more}."
    else:
        remedy = "The cluster has no topics yet."
    return MissingTopic(f"The topic {topic!r} doesn't exist.", remedy=f"{remedy} {advice}".rstrip())
