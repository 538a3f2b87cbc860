"""Schemas as a job file gives them: JSON text, a dict, or a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr, describe_exception, type_of


def parsed_schema(schema: object, what: str) -> Any:
    """The schema as it is after JSON: one text for all ways to write it.

    Args:
        schema: what the job declares.
        what: which schema it is, for messages.

    Raises:
        JobError: it can't be read, or isn't JSON.
    """
    if isinstance(schema, Path):
        try:
            schema = schema.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise JobError(
                f"The {what} schema {str(schema)!r} can't be read: {describe_exception(error)}.",
                remedy="Correct the path. It is relative to the directory in which the command runs: begin "
                "with Path(__file__).parent to stay beside the job file.",
            ) from error
    if not isinstance(schema, str | Mapping | list):
        raise JobError(
            f"The {what} schema is {bounded_repr(schema)}, a {type_of(schema)}.",
            remedy="Give it as JSON text, as a dict, or as a pathlib.Path of a file.",
        )
    try:
        return json.loads(schema if isinstance(schema, str) else json.dumps(schema))
    except (ValueError, TypeError) as error:
        raise bad_schema(f"{what} schema", error) from error


def bad_schema(what: str, error: BaseException) -> JobError:
    """The error for a schema that a library refuses."""
    return JobError(
        f"The {what} isn't valid: {describe_exception(error)}.",
        remedy="Correct it. A file is given as a pathlib.Path, not as text.",
    )
