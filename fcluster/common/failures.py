"""Makes texts about failures in users' code and data fit for messages, logs and headers.

Responsible for: one bounded, printable line for any exception, text or value. Rules: nothing here raises,
whatever an exception or a value does when it is inspected; the result can be encoded as UTF-8 and has no
control characters. Pure.
"""

from __future__ import annotations

import reprlib
from typing import Any, cast

DESCRIPTION_CHARACTERS_MAX = 2_000
"""The longest `describe_exception`."""
_MEMBERS_SHOWN = 3
_DEPTH_MAX = 3
_LINE_BREAKS = dict.fromkeys(map(ord, "\t\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"), " ")


def bounded_text(text: str, characters_max: int) -> str:
    """`text` as one printable line of at most `characters_max` characters that can be encoded as UTF-8.

    Line breaks and tabs become spaces; other characters that can't be shown are escaped as Python writes them
    (``\\x07``, ``\\ud83d``). What is too long is cut, and ends in "…".
    """
    # str's own methods: a subclass may override them.
    is_cut = str.__len__(text) > characters_max
    line = str.__getitem__(text, slice(characters_max + 1))
    if not line.isprintable():
        line = "".join(map(_shown, line.translate(_LINE_BREAKS)))
        is_cut = is_cut or len(line) > characters_max
    return f"{line[: max(characters_max - 1, 0)]}…"[:characters_max] if is_cut else line


def bounded_repr(value: object, characters_max: int = 80) -> str:
    """`repr(value)` as `bounded_text` shows it. Only the type, if `repr` fails.

    Long strings, bytes, lists and dicts are cut before they are shown, so megabytes cost nothing.
    """
    try:
        shown = _bounded_repr.repr(value)
    except BaseException:  # noqa: BLE001  whatever a __repr__ may raise
        shown = f"<{type_name(type(value))} that can't be shown>"
    return bounded_text(shown, characters_max)


def describe_exception(error: BaseException) -> str:
    """The exception's type and text in one printable line of at most `DESCRIPTION_CHARACTERS_MAX`.

    It raises nothing, whatever the exception is: one whose ``__str__`` fails, one whose text has half an
    emoji or megabytes, or a RecursionError. The first members of an exception group are described too.
    """
    return bounded_text(_describe(error, _DEPTH_MAX), DESCRIPTION_CHARACTERS_MAX)


def place_of(error: BaseException) -> str:
    """``file:line`` of the innermost frame where the exception was raised, empty if there is none."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return bounded_text(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}", 300)


def type_of(value: object) -> str:
    """The name of the value's class."""
    return type_name(type(value))


def type_name(kind: type) -> str:
    """The name of a class, even if its metaclass returns another name, or none."""
    return bounded_text(type.__dict__["__name__"].__get__(kind), 100)


def _describe(error: BaseException, depth: int) -> str:
    name = type_name(type(error))
    try:
        text = bounded_text(str(error), DESCRIPTION_CHARACTERS_MAX)
    except BaseException as trouble:  # noqa: BLE001  whatever a __str__ may raise
        text = f"(its text can't be shown: {type_name(type(trouble))})"
    described = f"{name}: {text}" if text else name
    if depth and isinstance(error, BaseExceptionGroup):
        # BaseExceptionGroup's own attribute: a subclass may hide it.
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
