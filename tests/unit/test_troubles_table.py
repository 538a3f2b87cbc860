"""The table of troubles: each message in it is one of the product's messages, and a test produces it.

A row of ``docs/troubles.md`` says what the user sees, as `text` in backticks with <names> for the parts that
vary. It ends with the tests that show it.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[2]
TABLE = REPOSITORY / "docs" / "troubles.md"
ANY = "\0"
"""Takes the place of what is filled in."""
PLACEHOLDER = re.compile(r"<[^<>]+>")
TELLING_CHARACTERS = 10
"""Shorter pieces of a message would be found in any test."""


class Row(NamedTuple):
    number: int
    trouble: str
    messages: tuple[str, ...]
    tests: tuple[str, ...]


def rows() -> list[Row]:
    found: list[Row] = []
    for number, line in enumerate(TABLE.read_text(encoding="utf-8").splitlines(), start=1):
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not line.startswith("|") or set(line) <= set("|- ") or cells[-1] == "shown by":
            continue
        assert len(cells) == 4, f"line {number} of the table has {len(cells)} cells: {line}"
        messages = tuple(re.findall(r"`([^`]+)`", cells[1]))
        found.append(Row(number, cells[0], messages, tuple(re.findall(r"`([^`]+)`", cells[3]))))
    return found


ROWS = rows()


def texts_in(tree: ast.AST) -> list[str]:
    """All texts in the code, with `ANY` for what is filled in."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(_piece(value) for value in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"%[sdr]|%\.\df|\{[a-z_]*\}", ANY, node.value))
    return found


def _piece(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ANY


@cache
def product_texts() -> tuple[str, ...]:
    files = sorted((REPOSITORY / "fcluster").rglob("*.py"))
    return tuple(text for file in files for text in texts_in(ast.parse(file.read_text(encoding="utf-8"))))


@cache
def functions_of(path: Path) -> dict[str, list[str]]:
    """The texts of each function of a file, by its name. Texts outside of functions have an empty name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {
        node.name: texts_in(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    return found | {"": [text for node in tree.body for text in texts_in(node)]}


def fragments(message: str) -> list[str]:
    return [part.strip() for part in PLACEHOLDER.split(message) if part.strip()]


def is_made_by(text: str, message: str) -> bool:
    """Whether a message with placeholders is a part of what the text in the code produces."""
    pattern = ".*?".join(re.escape(fragment) for fragment in fragments(message))
    return re.search(pattern, text, re.DOTALL) is not None


def tells(text: str, message: str) -> bool:
    """Whether a text in a test is a part of this message and of no other one."""
    if any(len(part) >= TELLING_CHARACTERS and part in text for part in fragments(message)):
        return True
    plain = PLACEHOLDER.sub(ANY, message)
    text = re.sub(r"\d+(\.\d+)?", ANY, text)
    pieces = re.split(rf"{ANY}|\\.|\.\*|[\[\]()?+^$]", text)
    return any(len(piece.strip()) >= TELLING_CHARACTERS and piece.strip() in plain for piece in pieces)


def test_table_has_rows() -> None:
    assert len(ROWS) >= 15


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"line {row.number}")
def test_every_message_in_the_table_is_one_of_the_products(row: Row) -> None:
    assert row.messages, f"{row.trouble}: it doesn't say what is seen"
    for message in row.messages:
        assert any(is_made_by(text, message) for text in product_texts()), f"nothing says {message!r}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"line {row.number}")
def test_every_message_in_the_table_is_produced_by_a_test(row: Row) -> None:
    assert row.tests, f"{row.trouble}: it names no test"
    texts: list[str] = []
    for name in row.tests:
        file, _, function = name.partition("::")
        path = REPOSITORY / "tests" / file
        assert path.is_file(), f"there is no {path}"
        assert function in functions_of(path), f"there is no test {function} in {path}"
        texts += functions_of(path)[function]
    for message in row.messages:
        assert any(tells(text, message) for text in texts), f"no test named there looks for {message!r}"


def test_check_finds_unknown_messages_and_tests_that_do_not_look_for_them() -> None:
    assert is_made_by(f"The topic {ANY} holds records of two jobs", "The topic <name> holds records of")
    assert not is_made_by(f"The topic {ANY} is empty", "The topic <name> holds records")
    assert tells("holds records of two jobs", "The topic <name> holds records of two jobs")
    assert not tells("a topic", "The topic <name> holds records of two jobs")
