"""Known offsets: a client's answer is checked once, where it arrives.

Responsible for: distinguishing values from sentinels. librdkafka answers with a negative number (-1001,
"invalid") for an offset that it doesn't know yet: nothing was fetched so far, a leader is moving, or one of
several brokers didn't answer. Code could compare such a number with other offsets as if it were one. So it
becomes `None` or a `NotKnownYetError` before that can happen, and an `Offset` is never negative.

Pure.
"""

from __future__ import annotations

from typing import NewType

Offset = NewType("Offset", int)
"""A position in a partition, 0 or more. Created only by `known_offset` and `offset_or_none`."""


class NotKnownYetError(Exception):
    """A client answered, but not with a value. Ask again. The answer says nothing about the partition."""


def known_offset(answer: int | None, where: str) -> Offset:
    """The offset that a client answered.

    Args:
        answer: what the client returned.
        where: the partition, for the message.

    Raises:
        NotKnownYetError: the client doesn't know it yet.
    """
    if answer is None or answer < 0:
        raise NotKnownYetError(f"the offset of {where} is not known yet ({answer})")
    return Offset(answer)


def offset_or_none(answer: int | None) -> Offset | None:
    """The offset that a client answered. None if it doesn't know it yet."""
    return None if answer is None or answer < 0 else Offset(answer)
