"""Exit codes are defined in one place, and the documentation agrees with it."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from fcluster.common import bound_exec, exit_codes
from fcluster.common.exit_codes import ExitCode

REPOSITORY = Path(__file__).parents[3]


def meanings() -> dict[ExitCode, str]:
    """The text below each member, as one line."""
    (members,) = (
        node for node in ast.parse(inspect.getsource(exit_codes)).body if isinstance(node, ast.ClassDef)
    )
    found: dict[ExitCode, str] = {}
    for member, text in zip(members.body, members.body[1:], strict=False):
        if isinstance(member, ast.Assign) and isinstance(text, ast.Expr):
            assert isinstance(member.targets[0], ast.Name)
            assert isinstance(text.value, ast.Constant)
            found[ExitCode[member.targets[0].id]] = " ".join(str(text.value.value).split())
    return found


def test_documentation_lists_all_codes_with_their_meaning() -> None:
    page = (REPOSITORY / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| (.+) \|$", page, re.MULTILINE)
    expected = [(str(int(c)), c.name.lower().replace("_", " "), text) for c, text in meanings().items()]
    assert len(expected) == len(ExitCode)
    assert rows == expected


def test_program_that_imports_nothing_from_fcluster_has_the_same_numbers() -> None:
    assert bound_exec.EXIT_ORPHANED == ExitCode.ORPHANED
    assert bound_exec.EXIT_NOT_STARTED == ExitCode.NOT_STARTED


def test_no_other_module_has_its_own_numbers() -> None:
    exempt = {"exit_codes.py", "bound_exec.py"}
    own = re.compile(
        r"^\s*(EXIT_\w+|exit_code) = \d+$|(?:exit|_exit|Exit)\((?:code=)?[1-9]\d*\b", re.MULTILINE
    )
    for path in REPOSITORY.glob("fcluster/**/*.py"):
        if path.name not in exempt:
            assert own.search(path.read_text(encoding="utf-8")) is None, path
