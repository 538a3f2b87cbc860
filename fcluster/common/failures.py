"""The value that describes a failure, and printable texts for messages, logs and headers.

Responsible for: `Failure`, the value that carries every failure from where it is found to the user's
terminal; `Ended`, how a process or a job ended; one bounded, printable line for any exception, text or value.
Rules: nothing here raises, even if an exception or a value fails when it is inspected; such a line can be
encoded as UTF-8 and has no control characters; a failure's text is never parsed again, except for failures
that older versions wrote (invariant 20). Pure.
"""

from __future__ import annotations

import reprlib
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final, cast

import msgspec

DESCRIPTION_CHARACTERS_MAX = 2_000
"""The most characters that `describe_exception` returns."""
_MEMBERS_SHOWN = 3
_DEPTH_MAX = 3
MESSAGE_CHARACTERS_MAX = 6_000
REMEDY_CHARACTERS_MAX = 3_000
WHERE_CHARACTERS_MAX = 1_000
_REMEDY_MARK = "; remedy: "
OUR_FILES: Final = __file__.removesuffix("common/failures.py")
"""What the paths of this package's files begin with."""
_LIBRARIES: Final = ("/site-packages/", "/dist-packages/", f"{sysconfig.get_path('stdlib')}/")
_LINE_BREAKS = dict.fromkeys(map(ord, "\t\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"), " ")


class FailureKind(StrEnum):
    """What a failure is about, for programs. No decision depends on it."""

    RECORD = "record"
    """A record can't be decoded or processed, or its output or state can't be written."""
    OUTPUT = "output"
    """Kafka refuses what the job writes."""
    SOURCE = "source"
    """A topic of the job, its partitions, its records or its committed offsets aren't what they were."""
    STATE = "state"
    """State can't be restored to exactly the committed epoch, or doesn't fit the job."""
    JOB = "job"
    """The job or its settings are wrong."""
    KAFKA = "kafka"
    """The brokers can't be reached, reject the client, or don't do what is needed."""
    CLUSTER = "cluster"
    """Another cluster is in the way, or this one refuses the process."""
    HOST = "host"
    """A problem on one host: a disk, a directory, a process."""
    BUG = "bug"
    """An error in fcluster."""
    OTHER = "other"
    """Unknown. Also a failure that an older version wrote as text only."""


class Failure(msgspec.Struct, frozen=True):
    """Why something can't go on. Plain data: it is sent, journalled, and shown in logs and status.

    Attributes:
        kind: what it is about.
        message: what happened and why, with the names involved.
        remedy: what to do about it. Empty if the message says it all.
        where: what it happened to, in a short form for programs: ``TOPIC/PARTITION@OFFSET`` of a record, a
            shard, or a topic. Otherwise empty.
    """

    kind: FailureKind
    message: Annotated[str, msgspec.Meta(max_length=MESSAGE_CHARACTERS_MAX)]
    remedy: Annotated[str, msgspec.Meta(max_length=REMEDY_CHARACTERS_MAX)] = ""
    where: Annotated[str, msgspec.Meta(max_length=WHERE_CHARACTERS_MAX)] = ""

    def __str__(self) -> str:
        """Message and remedy in one line, for logs."""
        if not self.remedy:
            return self.message
        return f"{self.message.rstrip('.')}{_REMEDY_MARK}{self.remedy}"

    @staticmethod
    def of_record(message: str, remedy: str = "", where: str = "") -> Failure:
        """A failure of kind RECORD, with texts made printable and bounded (see `fitted`)."""
        return Failure(FailureKind.RECORD, message, remedy, where).fitted()

    @staticmethod
    def of_text(text: str) -> Failure:
        """A failure of which an older version left only the line that `str` returns."""
        message, _, remedy = text.partition(_REMEDY_MARK)
        return Failure(FailureKind.OTHER, message, remedy).fitted()

    @staticmethod
    def of_document(document: object) -> Failure:
        """A failure from a journal, written by any version: `Failure` as a mapping, or only a text."""
        if not isinstance(document, Mapping):
            return Failure.of_text(str(document))
        parts = cast("Mapping[str, object]", document)
        kind = next((one for one in FailureKind if one == parts.get("kind")), FailureKind.OTHER)
        message, remedy, where = (str(parts.get(name, "")) for name in ("message", "remedy", "where"))
        return Failure(kind, message, remedy, where).fitted()

    def document(self) -> dict[str, str]:
        """This failure as a mapping, for JSON."""
        return {
            "kind": self.kind.value,
            "message": self.message,
            "remedy": self.remedy,
            "where": self.where,
        }

    def fitted(self) -> Failure:
        """The same failure with printable texts of bounded length. Call it for every failure that comes from
        another process.
        """
        message = _line(self.message, MESSAGE_CHARACTERS_MAX)
        remedy = _line(self.remedy, REMEDY_CHARACTERS_MAX)
        where = _line(self.where, WHERE_CHARACTERS_MAX)
        if (message, remedy, where) == (self.message, self.remedy, self.where):
            return self
        return Failure(self.kind, message, remedy, where)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process or the job has ended.

    Attributes:
        exit_code: see `exit_codes.ExitCode`.
        reason: one line for the log.
        failure: why it didn't end as intended. None if it did.
    """

    exit_code: int
    reason: str = ""
    failure: Failure | None = None

    @staticmethod
    def of_document(document: Mapping[str, Any]) -> Ended:
        """An end from a journal, written by any version. Older versions left no failure, only a text."""
        exit_code, reason = int(document.get("exit_code", 0)), str(document.get("reason", ""))
        if not exit_code:
            return Ended(0, reason)
        return Ended(exit_code, reason, Failure.of_document(document.get("failure") or reason))

    def document(self) -> dict[str, Any]:
        """This end as a mapping, for the journal."""
        failure = None if self.failure is None else self.failure.document()
        return {"exit_code": int(self.exit_code), "reason": self.reason, "failure": failure}


def _line(text: str, characters_max: int) -> str:
    if len(text) <= characters_max and text.isprintable():
        return text
    return bounded_text(" ".join(bounded_text(text, 2 * characters_max).split()), characters_max)


def bounded_text(text: str, characters_max: int) -> str:
    """`text` as one printable line of at most `characters_max` characters that can be encoded as UTF-8.

    Line breaks and tabs become spaces; other characters that can't be shown are escaped as Python writes them
    (``\\x07``, ``\\ud83d``). A longer text is cut and ends in "…".
    """
    # str's own methods: a subclass might override them.
    is_cut = str.__len__(text) > characters_max
    line = str.__getitem__(text, slice(characters_max + 1))
    if not line.isprintable():
        line = "".join(map(_shown, line.translate(_LINE_BREAKS)))
        is_cut = is_cut or len(line) > characters_max
    return f"{line[: max(characters_max - 1, 0)]}…"[:characters_max] if is_cut else line


def bounded_repr(value: object, characters_max: int = 80) -> str:
    """`repr(value)` as `bounded_text` shows it. Only the type, if `repr` fails.

    Long strings, bytes, lists and dicts are cut before they are shown, so megabytes are cheap.
    """
    try:
        shown = _bounded_repr.repr(value)
    except BaseException:  # noqa: BLE001  a __repr__ may raise anything
        shown = f"<{type_name(type(value))} that can't be shown>"
    return bounded_text(shown, characters_max)


def describe_exception(error: BaseException) -> str:
    """The exception's type and text in one printable line of at most `DESCRIPTION_CHARACTERS_MAX`.

    It never raises, whatever the exception is: one whose ``__str__`` fails, one whose text has half a
    surrogate pair or is megabytes long, or a RecursionError. The first members of an exception group are
    described too.
    """
    return bounded_text(_describe(error, _DEPTH_MAX), DESCRIPTION_CHARACTERS_MAX)


def place_of(error: BaseException) -> str:
    """``file:line`` of the user's code where the exception was raised: of the innermost frame that is neither
    fcluster's nor a library's. If there are only libraries besides fcluster, of theirs. Empty if nothing but
    fcluster ran.
    """
    places = [place for place in _frames_of(error) if not place.startswith(OUR_FILES)]
    own = [place for place in places if not any(library in place for library in _LIBRARIES)]
    return bounded_text((own or places)[-1], 300) if places else ""


def frame_of(error: BaseException) -> str:
    """``file:line`` of the innermost frame where the exception was raised. Empty if there is none."""
    return bounded_text(["", *_frames_of(error)][-1], 300)


def _frames_of(error: BaseException) -> list[str]:
    found: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        found.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    return found


def type_of(value: object) -> str:
    """The name of the value's class."""
    return type_name(type(value))


def type_name(kind: type) -> str:
    """The name of a class, even if its metaclass hides or changes the name."""
    return bounded_text(type.__dict__["__name__"].__get__(kind), 100)


def _describe(error: BaseException, depth: int) -> str:
    name = type_name(type(error))
    try:
        text = bounded_text(str(error), DESCRIPTION_CHARACTERS_MAX)
    except BaseException as trouble:  # noqa: BLE001  a __str__ may raise anything
        text = f"(its text can't be shown: {type_name(type(trouble))})"
    described = f"{name}: {text}" if text else name
    if depth and isinstance(error, BaseExceptionGroup):
        # BaseExceptionGroup's own attribute: a subclass might hide it.
        members = cast("tuple[BaseException, ...]", cast(Any, BaseExceptionGroup).exceptions.__get__(error))
        shown = [_describe(member, depth - 1) for member in members[:_MEMBERS_SHOWN]]
        if len(members) > _MEMBERS_SHOWN:
            shown.append(f"and {len(members) - _MEMBERS_SHOWN} more")
        described = f"{described} [{'; '.join(shown)}]"
    return described


def _shown(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


class _BoundedRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxarray = 20
        self.maxstring = self.maxlong = self.maxother = 2 * DESCRIPTION_CHARACTERS_MAX

    def repr_bytes(self, value: bytes, _level: int) -> str:
        return repr(value[: self.maxother])


_bounded_repr = _BoundedRepr()
