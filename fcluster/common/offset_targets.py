"""Where a job begins or ends to read: the meaning of `fcluster reset --to` and of `fcluster up --start` and
`--end`, and the resulting offsets.

Responsible for: parsing these options, and choosing an offset for each partition within its present range.
Pure, except for reading the file of ``offsets:FILE``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from fcluster.common.errors import FclusterError

SourcePartition = tuple[str, int]
OFFSETS_NAMED_MAX: Final = 4

_FORMS: Final = (
    "Use {words}, time:2026-01-31T12:00:00+01:00, offsets:FILE with a line "
    "TOPIC/PARTITION=OFFSET for each partition, or TOPIC/PARTITION=OFFSET for each partition."
)
_KINDS: Final[Mapping[str, Mapping[str, Literal["earliest", "latest"]]]] = {
    "--to": {"earliest": "earliest", "latest": "latest"},
    "--start": {"earliest": "earliest", "latest": "latest"},
    "--end": {"end": "latest"},
}
_LINE = re.compile(r"([A-Za-z0-9._-]{1,249})/([0-9]{1,9})=([0-9]{1,18})")


class TargetError(FclusterError):
    """The option isn't valid, or names an offset that doesn't exist."""


@dataclass(frozen=True, slots=True)
class Target:
    """The target of a reset, or the start or end of a run.

    Attributes:
        kind: the kind of target.
        time_ms: for "time": the first record with this timestamp or a later one.
        offsets: for "offsets": the offset of each partition.
    """

    kind: Literal["earliest", "latest", "time", "offsets"]
    time_ms: int = 0
    offsets: Mapping[SourcePartition, int] = field(default_factory=dict[SourcePartition, int])

    def __str__(self) -> str:
        if self.kind == "time":
            return (
                f"the first record at or after {datetime.fromtimestamp(self.time_ms / 1000, UTC).isoformat()}"
            )
        if self.kind == "offsets":
            given = [
                f"{topic}/{partition}={offset}" for (topic, partition), offset in sorted(self.offsets.items())
            ]
            more = ", ..." if len(given) > OFFSETS_NAMED_MAX else ""
            return f"the given offsets, {', '.join(given[:OFFSETS_NAMED_MAX])}{more}"
        return {"earliest": "the earliest record", "latest": "the end"}[self.kind]


def parse_target(given: Sequence[str], option: str = "--to") -> Target:
    """The target that the values of an option describe.

    Args:
        given: its values.
        option: "--to", "--start" or "--end".

    Raises:
        TargetError: they aren't valid.
    """
    kinds = _KINDS.get(option, _KINDS["--to"])
    forms = _FORMS.format(words=", ".join(kinds))
    try:
        return _parsed(given, option, kinds)
    except TargetError as error:
        raise TargetError(error.message, remedy=forms) from error


def _parsed(given: Sequence[str], option: str, kinds: Mapping[str, Literal["earliest", "latest"]]) -> Target:
    offsets: dict[SourcePartition, int] = {}
    for text in given:
        if _LINE.fullmatch(text.strip()):
            _add_line(offsets, text, text)
        elif text.startswith("offsets:"):
            _add_file(offsets, Path(text.removeprefix("offsets:")))
        elif len(given) > 1:
            raise TargetError(f"{option} {text} can't be combined with another {option}")
        elif text in kinds:
            return Target(kinds[text])
        elif text.startswith("time:"):
            return Target("time", _time_ms(text.removeprefix("time:")))
        else:
            raise TargetError(f"{option} {text} isn't valid")
    if not offsets:
        raise TargetError("the target is missing")
    return Target("offsets", offsets=offsets)


def _time_ms(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise TargetError(f"{text!r} is not a time in ISO 8601 format") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


def _add_file(offsets: dict[SourcePartition, int], path: Path) -> None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"can't read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            _add_line(offsets, line, f"{path} line {number}: {line.strip()}")


def _add_line(offsets: dict[SourcePartition, int], line: str, where: str) -> None:
    match = _LINE.fullmatch(line.strip())
    if match is None:
        raise TargetError(f"{where} isn't of the form TOPIC/PARTITION=OFFSET")
    at = (match[1], int(match[2]))
    if at in offsets:
        raise TargetError(f"{where}: the partition is given twice")
    offsets[at] = int(match[3])


def chosen_offsets(
    target: Target,
    begins: Mapping[SourcePartition, int],
    ends: Mapping[SourcePartition, int],
    by_time: Mapping[SourcePartition, int],
    tables: Collection[str] = (),
) -> dict[SourcePartition, int]:
    """The offset of the next record of each partition.

    Args:
        target: the target of the reset.
        begins: the first offset that each partition still has. It has all partitions of the job's sources.
        ends: the offset after each partition's last record.
        by_time: for a time: the offset of the first record at or after it, for each partition. None: there is
            no such record.
        tables: topics that are read from their beginning unless offsets are given: they fill tables that
            begin empty.

    Raises:
        TargetError: a partition is missing, isn't one of the job's sources, or doesn't have that offset.
    """
    if target.kind == "earliest":
        return dict(begins)
    if target.kind == "latest":
        return {at: begins[at] if at[0] in tables else end for at, end in ends.items()}
    if target.kind == "time":
        return {at: begin if at[0] in tables else by_time.get(at, ends[at]) for at, begin in begins.items()}
    unknown = sorted(target.offsets.keys() - begins.keys())
    missing = sorted(begins.keys() - target.offsets.keys())
    if unknown:
        raise TargetError(
            f"{_named(unknown[0])} is not a partition of a source of this job",
            remedy="Correct the name, or leave it out.",
        )
    if missing:
        named = ", ".join(map(_named, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise TargetError(
            f"no offset is given for {named}",
            remedy="Give one for each partition of the job's sources.",
        )
    for at, offset in sorted(target.offsets.items()):
        if not begins[at] <= offset <= ends[at]:
            raise TargetError(
                f"{_named(at)} has no offset {offset}: it has {begins[at]} to {ends[at]}",
                remedy="Choose an offset in that range.",
            )
    return dict(target.offsets)


def _named(at: SourcePartition) -> str:
    return f"{at[0]}/{at[1]}"
