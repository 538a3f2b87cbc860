"""Offsets that are known: what a client answers is checked once, where it comes in.

Responsible for: telling a value from a sentinel. librdkafka answers with a negative number (-1001, "invalid")
for an offset that it doesn't know yet: nothing was fetched so far, a leader is moving, or one of several
brokers didn't answer. Such a number compares with other offsets like a fact. So it becomes `None`, or
`NotKnownYetError`, before anybody can compare it, and an `Offset` is never negative.

Pure.
"""

from __future__ import annotations

from typing import NewType

Offset = NewType("Offset", int)
"""A position in a partition, 0 or more. Made by `known_offset` and `offset_or_none` only."""


class NotKnownYetError(Exception):
    """A client answered, but not with a value. To be asked again; it is no fact about the partition."""


def known_offset(answer: int | None, where: str) -> Offset:
    """The offset that a client answered.

    Args:
        answer: as the client gave it.
        where: whose offset it is, for the message.

    Raises:
        NotKnownYetError: it doesn't know yet.
    """
    if answer is None or answer < 0:
        raise NotKnownYetError(f"the offset of {where} is not known yet ({answer})")
    return Offset(answer)


def offset_or_none(answer: int | None) -> Offset | None:
    """The offset that a client answered, None if it doesn't know yet."""
    return None if answer is None or answer < 0 else Offset(answer)
