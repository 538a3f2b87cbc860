"""How many dead letters a shard has written since the start of the job, as it is committed with its offsets.

Responsible for: that text, which workers write and the coordinator reads. Pure.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Final

LETTER_COUNTS_CHARACTERS_MAX: Final = 250
"""Enough for more topics than a stage has; see `clock.ENCODED_CHARACTERS_MAX`."""


def encode_counts(job_start: int, topics: Sequence[str], counts: Mapping[str, int]) -> str:
    """The text: ``<start>.<digest of the topics>.<count>.<count>``. Empty if there are no dead letters.

    Args:
        job_start: the number of the job's start.
        topics: the dead-letter topics of the shard's stage, in order.
        counts: how many dead letters were written to each.
    """
    numbers = [counts.get(topic, 0) for topic in topics]
    if not any(numbers):
        return ""
    return ".".join([str(job_start), _digest(topics), *map(str, numbers)])


def decode_counts(text: str, job_start: int, topics: Sequence[str]) -> dict[str, int]:
    """The counts by topic. Empty if they are of another start, or if the stage had other topics then."""
    start, digest, *numbers = text.split(".") if text.count(".") > 1 else ("", "")
    if start != str(job_start) or digest != _digest(topics) or len(numbers) != len(topics):
        return {}
    return {topic: int(number) for topic, number in zip(topics, numbers, strict=True) if number.isdecimal()}


def _digest(topics: Sequence[str]) -> str:
    return f"{zlib.crc32('/'.join(topics).encode()) & 0xFFFF:04x}"
