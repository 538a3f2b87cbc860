"""README and docs: their code runs, their commands parse, their links have a target."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from fcluster import Job
from fcluster.cli.main import commands
from fcluster.common.settings import Settings

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted({*REPOSITORY.glob("[A-Z]*.md"), *REPOSITORY.glob("docs/**/*.md")})
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def code_blocks(text: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for found, block in blocks if found == language]


def command_lines() -> Iterator[tuple[str, str]]:
    """Each `fcluster ...` line of a code block, with its document's name."""
    for document in DOCUMENTS:
        for block in code_blocks(document.read_text(encoding="utf-8"), ""):
            for line in block.splitlines():
                if re.match(r"fcluster [a-z]", line):
                    yield document.name, line


COMMAND_LINES = list(command_lines())


def parse(arguments: list[str]) -> None:
    """Parse a command line as fcluster does, without running it."""
    group: click.Command = commands
    with click.Context(commands) as parent:
        while isinstance(group, click.Group):
            found = group.get_command(parent, arguments[0])
            assert found is not None, f"there is no command {arguments[0]!r}"
            group, arguments = found, arguments[1:]
        group.make_context(group.name, arguments, parent=parent)


def test_readmes_job_builds() -> None:
    names: dict[str, object] = {}
    exec("\n".join(code_blocks(README, "python")), names)
    job = names["job"]
    assert isinstance(job, Job)
    assert [stage.name for stage in job.build(Settings()).stages] == ["flights", "by_aircraft"]


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/bounded-runs.md",
        "docs/event-time.md",
        "docs/formats.md",
        "docs/joins.md",
        "docs/tables.md",
        "docs/streams.md",
        "docs/testing.md",
        "docs/windows.md",
    ],
)
def test_tests_in_documents_pass(document: str) -> None:
    names: dict[str, Any] = {}
    code = "\n".join(code_blocks((REPOSITORY / document).read_text(encoding="utf-8"), "python"))
    exec(compile(code, document, "exec", dont_inherit=True), names)  # annotations are objects there
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_readmes_make_targets_exist() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = set(
        re.findall(r"\bmake ([a-z-]+)", "\n".join([*code_blocks(README, ""), *re.findall("`[^`]+`", README)]))
    )
    assert {"demo", "test"} <= named <= targets


def test_readme_shows_commands() -> None:
    assert sum(document == "README.md" for document, _ in COMMAND_LINES) >= 10


@pytest.mark.parametrize(("document", "line"), COMMAND_LINES, ids=[line[:60] for _, line in COMMAND_LINES])
def test_command_parses(document: str, line: str) -> None:
    arguments = shlex.split(line.partition("<")[0], comments=True)[1:]
    try:
        parse(arguments)
    except click.ClickException as error:
        pytest.fail(f"{document}: {line}: {error.format_message()}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_have_a_target(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_index_of_decisions_lists_each_with_its_title() -> None:
    decisions = REPOSITORY / "docs" / "decisions"
    index = (decisions / "README.md").read_text(encoding="utf-8")
    for page in sorted(decisions.glob("[0-9]*.md")):
        number, _, title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").partition(": ")
        entry = f"- [{number}]({page.name}): {title}\n"
        assert entry in index, f"docs/decisions/README.md lacks {entry}"


def test_commands_named_in_the_text_exist() -> None:
    for document in (document for document in DOCUMENTS if document.parent.name != "decisions"):
        for words in re.findall(
            r"`fcluster ([a-z]+(?: [a-z]+)?)[^`]*`", document.read_text(encoding="utf-8")
        ):
            first, _, second = words.partition(" ")
            found = commands.commands.get(first)
            assert found is not None, f"{document.name} names `fcluster {first}`"
            if isinstance(found, click.Group) and second:
                assert second in found.commands, f"{document.name} names `fcluster {words}`"
