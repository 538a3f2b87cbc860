"""Any exception, text or value becomes one bounded, printable line, and nothing raises on the way."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.common.failures import (
    DESCRIPTION_CHARACTERS_MAX,
    bounded_repr,
    bounded_text,
    describe_exception,
    place_of,
    type_name,
)

HALF_AN_EMOJI = "\ud83d"


class OddStr(str):
    """A str whose methods can't be relied on."""

    def __len__(self) -> int:
        raise ValueError("no length")

    def __getitem__(self, _index: Any) -> str:
        raise ValueError("no items")

    def __str__(self) -> str:
        raise ValueError("no text")


class OddMeta(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise ValueError("no name")


class UnnamedError(Exception, metaclass=OddMeta):
    pass


class HiddenGroup(ExceptionGroup[Exception]):
    @property
    def exceptions(self) -> Any:
        raise ValueError("no members")


def error_whose_text(raises: BaseException) -> Exception:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise raises

    return BrokenError()


def raised(function: Callable[[], Any]) -> BaseException:
    try:
        function()
    except BaseException as error:  # noqa: BLE001
        return error
    raise AssertionError("nothing was raised")


def recursive() -> Any:
    return recursive()


class RecursiveTextError(Exception):
    def __str__(self) -> str:
        return str(self)


def assert_fit(line: str, characters_max: int = DESCRIPTION_CHARACTERS_MAX) -> None:
    assert type(line) is str
    assert len(line) <= characters_max
    assert line.isprintable()
    line.encode()


@pytest.mark.parametrize(
    ("error", "described"),
    [
        (ValueError("a bad value"), "ValueError: a bad value"),
        (ValueError(), "ValueError"),
        (KeyError("tail"), "KeyError: 'tail'"),
        (SystemExit(3), "SystemExit: 3"),
        (GeneratorExit(), "GeneratorExit"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ValueError(f"half {HALF_AN_EMOJI}"), r"ValueError: half \ud83d"),
        (ValueError("two\nlines\tand \x1b[31mred\0"), r"ValueError: two lines and \x1b[31mred\x00"),
        (ValueError("turned \u202e round"), r"ValueError: turned \u202e round"),
        (ValueError("paragraph\u2029next"), "ValueError: paragraph next"),
        (ValueError("naïve ✈ 😀"), "ValueError: naïve ✈ 😀"),
        (ValueError(OddStr("odd")), "ValueError: (its text can't be shown: ValueError)"),
        (
            error_whose_text(ZeroDivisionError("x")),
            "BrokenError: (its text can't be shown: ZeroDivisionError)",
        ),
        (error_whose_text(SystemExit(1)), "BrokenError: (its text can't be shown: SystemExit)"),
        (RecursiveTextError(), "RecursiveTextError: (its text can't be shown: RecursionError)"),
        (UnnamedError("x"), "UnnamedError: x"),
        (
            ExceptionGroup("several", [ValueError("a"), ExceptionGroup("inner", [KeyError("b")])]),
            (
                "ExceptionGroup: several (2 sub-exceptions) [ValueError: a; ExceptionGroup: inner "
                "(1 sub-exception) [KeyError: 'b']]"
            ),
        ),
        (
            BaseExceptionGroup("exits", [SystemExit(number) for number in range(5)]),
            (
                "BaseExceptionGroup: exits (5 sub-exceptions) [SystemExit: 0; SystemExit: 1; SystemExit: 2; "
                "and 2 more]"
            ),
        ),
        (HiddenGroup("h", [ValueError("a")]), "HiddenGroup: h (1 sub-exception) [ValueError: a]"),
    ],
    ids=itertools.count(),
)
def test_exception_is_described_in_one_printable_line(error: BaseException, described: str) -> None:
    line = describe_exception(error)
    assert line == described
    assert_fit(line)


def test_text_of_megabytes_is_truncated() -> None:
    line = describe_exception(ValueError("x" * 50_000_000))
    assert_fit(line)
    assert line.startswith("ValueError: xxx")
    assert line.endswith("x…")
    assert len(line) == DESCRIPTION_CHARACTERS_MAX


def test_group_of_large_and_nested_members_is_truncated() -> None:
    group: Any = ValueError("y" * 10_000)
    for _ in range(50):
        group = ExceptionGroup("g" * 10_000, [group] * 100)
    assert_fit(describe_exception(group))


def test_recursion_error_is_described() -> None:
    limit = sys.getrecursionlimit()
    line = describe_exception(raised(recursive))
    assert line.startswith("RecursionError: maximum recursion depth")
    assert sys.getrecursionlimit() == limit


def test_place_is_the_innermost_frame() -> None:
    assert place_of(raised(lambda: int("x"))).rpartition(":")[0] == __file__
    assert place_of(ValueError("never raised")) == ""


def test_type_name_ignores_the_metaclass() -> None:
    assert type_name(UnnamedError) == "UnnamedError"
    assert_fit(type_name(type("Long\n" * 1000, (), {})), 100)


@given(st.text(st.characters(), max_size=60), st.integers(0, 50))
def test_any_text_becomes_one_bounded_printable_line(text: str, characters_max: int) -> None:
    line = bounded_text(text, characters_max)
    assert_fit(line, characters_max)
    if text.isprintable() and len(text) <= characters_max:
        assert line == text


def test_text_that_grows_when_it_is_escaped_is_truncated_too() -> None:
    line = bounded_text("\0" * 10, 10)
    assert line == r"\x00\x00\…"


def test_str_of_another_class_is_handled_as_a_str() -> None:
    assert bounded_text(OddStr("a\nb"), 10) == "a b"


class Unshowable:
    def __repr__(self) -> str:
        raise SystemExit(1)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": [1, None]}, "{'a': [1, None]}"),
        (b"\xff\0", r"b'\xff\x00'"),
        (HALF_AN_EMOJI, r"'\ud83d'"),
        (Unshowable(), "<Unshowable that can't be shown>"),
        (10**5_000, "<int that can't be shown>"),
    ],
    ids=["dict", "bytes", "half-an-emoji", "unshowable", "long-int"],
)
def test_value_is_shown(value: object, shown: str) -> None:
    assert bounded_repr(value) == shown


LARGE_VALUES: list[object] = ["x" * 10**7, b"x" * 10**7, ["y" * 10**6] * 1000, [[[[[[[0]]]]]]] * 10**6]


@pytest.mark.parametrize("value", LARGE_VALUES, ids=["str", "bytes", "list", "nested"])
def test_value_of_megabytes_is_truncated(value: object) -> None:
    assert_fit(bounded_repr(value, 120), 120)


def test_value_that_contains_itself_is_shown() -> None:
    value: list[Any] = []
    value.append(value)
    assert_fit(bounded_repr(value))
