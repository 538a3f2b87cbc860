"""Text in a log can't move the cursor of the reader's terminal."""

from __future__ import annotations

import io
import logging

from fcluster.common.logs import LogFormatter


def test_control_characters_from_others_are_escaped() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter())
    record = logging.LogRecord("n", logging.INFO, "f", 1, "%s", ("\x1b[2Jgone\r\x9b\0 Zürich\n\ttwo",), None)
    handler.emit(record)
    assert stream.getvalue().endswith("\\x1b[2Jgone\\x0d\\x9b\\x00 Zürich\n\ttwo\n")
