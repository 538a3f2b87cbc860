"""No text from a user prevents a control message from being sent, or from being read at the other end."""

from __future__ import annotations

import msgspec
import pytest

from fcluster.common.errors import FclusterError, failure_of
from fcluster.common.failures import (
    MESSAGE_CHARACTERS_MAX,
    REMEDY_CHARACTERS_MAX,
    WHERE_CHARACTERS_MAX,
    Ended,
    Failure,
    FailureKind,
)
from fcluster.common.ids import ShardId
from fcluster.wire import messages

HOSTILE = ["x" * 10_000_000, "half \ud83d", "\x1b[31m\n" * 100_000]
MENDABLE = Failure(FailureKind.RECORD, "record in/0 at offset 3 failed in 'h'", "mend it", "in/0@3")


def fits(failure: Failure) -> bool:
    texts = (failure.message, failure.remedy, failure.where)
    bounds = (MESSAGE_CHARACTERS_MAX, REMEDY_CHARACTERS_MAX, WHERE_CHARACTERS_MAX)
    return all(len(text) <= most and text.isprintable() for text, most in zip(texts, bounds, strict=True))


@pytest.mark.parametrize("text", HOSTILE)
def test_failure_of_any_size_fits_a_frame(text: str) -> None:
    failure = Failure(FailureKind.OTHER, text, text, text)
    for message in (
        messages.WorkerFailed(1, failure),
        messages.TornTransaction(1, ShardId("s", 0), True, failure),
    ):
        received = messages.decode_for_coordinator(messages.encode(message))
        assert isinstance(received, type(message))
        assert fits(received.failure)
    ended = messages.decode_from_coordinator(messages.encode(messages.Shutdown(1, 1, text, failure)))
    assert isinstance(ended, messages.Shutdown)
    assert ended.failure is not None
    assert fits(ended.failure)
    refused = messages.decode_from_coordinator(messages.encode(messages.Refused(1, text, False)))
    assert isinstance(refused, messages.Refused)


@pytest.mark.parametrize(
    "text", ["\x1b[2Jcleared", "one\nERROR fcluster: a line that looks like another", "\u2028"]
)
def test_text_from_a_faulty_peer_moves_no_cursor_and_starts_no_line(text: str) -> None:
    tag = "WorkerFailed"
    document = {"type": tag, "session": 1, "failure": {"kind": "other", "message": text, "where": text}}
    frame = bytes([messages.PROTOCOL_VERSION]) + msgspec.msgpack.encode(document)
    received = messages.decode_for_coordinator(frame)
    assert isinstance(received, messages.WorkerFailed)
    assert fits(received.failure)


@pytest.mark.parametrize(
    "changes",
    [{"kind": "nothing"}, {"message": 7}, {"message": "x" * (MESSAGE_CHARACTERS_MAX + 1)}, {"kind": 1}],
)
def test_frame_with_anything_but_a_failure_is_malformed(changes: dict[str, object]) -> None:
    document = {"type": "WorkerFailed", "session": 1, "failure": {"kind": "other", "message": "m"} | changes}
    frame = bytes([messages.PROTOCOL_VERSION]) + msgspec.msgpack.encode(document)
    with pytest.raises(messages.MalformedMessageError):
        messages.decode_for_coordinator(frame)


def test_usual_failure_is_sent_unchanged() -> None:
    message = messages.WorkerFailed(1, MENDABLE)
    assert messages.decode_for_coordinator(messages.encode(message)) == message


def test_failure_of_an_error_is_bounded_and_keeps_its_remedy() -> None:
    failure = failure_of(FclusterError("x" * 1_000_000 + "\ud83d", remedy="Make it\nshorter."))
    assert fits(failure)
    str(failure).encode()
    assert failure.remedy == "Make it shorter."


# --- journals -------------------------------------------------------------------------------------------


def test_end_is_read_back_from_a_journal_unchanged() -> None:
    ended = Ended(3, str(MENDABLE), MENDABLE)
    assert Ended.of_document(msgspec.json.decode(msgspec.json.encode(ended.document()))) == ended
    assert Ended.of_document(Ended(0, "asked to stop").document()) == Ended(0, "asked to stop")


def test_end_from_an_older_version_has_the_two_parts_of_its_text() -> None:
    ended = Ended.of_document({"term": 3, "exit_code": 3, "reason": "record in/0 is bad; remedy: mend it"})
    assert ended.failure == Failure(FailureKind.OTHER, "record in/0 is bad", "mend it")
    assert Ended.of_document({"exit_code": 0, "reason": "asked; remedy: none"}).failure is None


@pytest.mark.parametrize("document", [{}, {"kind": "of a later version", "message": "m", "more": 1}, 7, None])
def test_unknown_kind_of_failure_can_be_read(document: object) -> None:
    failure = Failure.of_document(document)
    assert failure.kind is FailureKind.OTHER
    assert fits(failure)
