"""The guides and the pages for people from other systems: all their code runs or is at least valid."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fcluster import Job
from fcluster.common.settings import Settings, resolve

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = sorted(DOCS.glob("guides/*.md"))
COMPARISONS = sorted(path for path in DOCS.glob("coming-from/*.md") if path.name != "README.md")
PAGES = [*GUIDES, *COMPARISONS]


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def pages_with(language: str) -> list[Any]:
    return [pytest.param(page, id=page.stem) for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", pages_with("python"))
def test_code_of_a_page_runs_and_its_tests_pass(page: Path) -> None:
    names: dict[str, Any] = {"__name__": page.stem}
    source = "\n".join(blocks(page, "python"))
    exec(compile(source, page.name, "exec", dont_inherit=True), names)  # without the annotations of this file
    jobs = [value for value in names.values() if isinstance(value, Job)]
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert jobs, "the page has no job"
    assert tests, "the page has no test"
    for job in jobs:
        job.build(Settings())
    for test in tests:
        test()


@pytest.mark.parametrize("page", pages_with("toml"))
def test_settings_of_a_page_exist(page: Path) -> None:
    for block in blocks(page, "toml"):
        settings = _flat(tomllib.loads(block))
        assert settings
        resolve(settings, None, {}, {})


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a TOML file by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize("page", COMPARISONS, ids=lambda page: page.stem)
def test_comparison_has_both_jobs(page: Path) -> None:
    theirs = [*blocks(page, "py"), *blocks(page, "java")]
    assert theirs
    assert blocks(page, "python")
    for block in blocks(page, "py"):
        ast.parse(block)


def test_every_guide_has_something_to_run() -> None:
    assert len(GUIDES) >= 10
    for guide in GUIDES:
        assert blocks(guide, "python") or blocks(guide, ""), f"{guide.name} has no code and no commands"


def test_every_fence_has_a_language_that_is_checked() -> None:
    for page in PAGES:
        found = set(re.findall(r"^```(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert found <= {"python", "py", "java", "toml"}, f"{page.name} has {found}"
