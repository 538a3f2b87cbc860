"""The page of invariants is true: it names what exists, and the code refers only to invariants on the
page."""

from __future__ import annotations

import re
from pathlib import Path

from tests.simulation.mutations import BY_NAME

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "invariants.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^### (?=\d+\. )", PAGE, flags=re.MULTILINE)[1:]


def test_numbers_are_consecutive() -> None:
    assert [int(section.split(".", 1)[0]) for section in SECTIONS] == list(range(1, len(SECTIONS) + 1))


def test_each_invariant_names_existing_code_and_tests() -> None:
    for section in SECTIONS:
        title = section.splitlines()[0]
        kept, caught = section.split("- Kept by:")[1].split("- Caught by:")
        code, tests = re.findall(r"`([\w/.]+\.py)`", kept), re.findall(r"`(tests/[\w/.]+\.py)`", caught)
        assert code, title
        assert tests, title
        missing = [path for path in (*code, *tests) if not (REPOSITORY / path).is_file()]
        assert not missing, title


def test_planted_bugs_that_the_page_names_exist() -> None:
    named = re.findall(r'"([^"]+)"', " ".join(PAGE.split("\n## ", 1)[1].split()))
    assert named
    assert [name for name in named if name not in BY_NAME] == []


def test_code_refers_only_to_invariants_that_exist() -> None:
    referred: set[int] = set()
    for path in REPOSITORY.glob("fcluster/**/*.py"):
        text = " ".join(path.read_text(encoding="utf-8").split())
        for found in re.findall(r"invariants? (\d+(?:(?:, | and )\d+)*)", text, re.IGNORECASE):
            referred |= {int(number) for number in re.findall(r"\d+", found)}
    assert referred
    assert referred <= set(range(1, len(SECTIONS) + 1))
    assert referred == set(range(1, len(SECTIONS) + 1)), "no code refers to some of them"
