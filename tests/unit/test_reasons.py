"""No text of a user's keeps a control message from being sent, or from being read at the other end."""

from __future__ import annotations

import pytest

from fcluster.common.errors import LINE_CHARACTERS_MAX, FclusterError, cause_and_remedy, one_line
from fcluster.wire import messages


@pytest.mark.parametrize("reason", ["x" * 10_000_000, "half \ud83d", "\x1b[31m\n" * 100_000])
def test_reason_of_any_size_and_kind_fits_a_frame(reason: str) -> None:
    frame = messages.encode(messages.WorkerFailed(1, reason))
    received = messages.decode_for_coordinator(frame)
    assert isinstance(received, messages.WorkerFailed)
    assert len(received.reason) <= messages.REASON_CHARACTERS_MAX
    assert received.reason.isprintable()
    for message in (messages.Shutdown(1, 1, reason, True), messages.Refused(1, reason, False)):
        assert isinstance(messages.decode_from_coordinator(messages.encode(message)), type(message))


def test_usual_reason_is_sent_as_it_is() -> None:
    message = messages.WorkerFailed(1, "record in/0 at offset 3 failed in 'h'; remedy: mend it")
    assert messages.decode_for_coordinator(messages.encode(message)) == message


def test_line_of_an_error_is_bounded_and_keeps_its_remedy() -> None:
    line = one_line(FclusterError("x" * 1_000_000 + "\ud83d", remedy="Make it\nshorter."))
    assert len(line) <= LINE_CHARACTERS_MAX
    line.encode()
    assert cause_and_remedy(line)[1] == "Make it shorter."
