"""Mistakes of newcomers, in `tests/data/bad_jobs.txt`: the message of each says what is wrong, where, and
what to do.

A mistake begins with "## " and its title. Then comes what follows `JOB` in a job file (or the whole file, if
it begins with "# alone"). The line of the mistake is marked with "# here" where there is one: the message
names file and line. "%% " says how many partitions topics have, "<< " sends a record, and what follows ">> "
has to be in the message. The last such line says what to do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fcluster
from fcluster import FclusterError
from fcluster.api.loader import load_job
from fcluster.testing import Driver
from tests.harness import REPOSITORY

TABLE = REPOSITORY / "tests" / "data" / "bad_jobs.txt"
JOB = """\
import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from fcluster import *
job = Job("shop")
orders = job.topic("orders")
totals = job.topic("totals")
minute = timedelta(minutes=1)
"""
HERE = "# here"
PACKAGE = str(Path(fcluster.__file__).parent)
CHARACTERS_MAX = 900
"""A longer message isn't read."""


@dataclass
class Mistake:
    """A job or a record that is wrong.

    Attributes:
        title: what is wrong, in words.
        code: what follows `JOB`, or the whole file.
        partitions: of topics.
        sent: calls of the driver.
        says: parts of the message.
    """

    title: str
    code: list[str] = field(default_factory=list[str])
    partitions: dict[str, int] = field(default_factory=dict[str, int])
    sent: list[str] = field(default_factory=list[str])
    says: list[str] = field(default_factory=list[str])

    @property
    def text(self) -> str:
        """The job file."""
        code = "\n".join(self.code)
        return code if code.startswith("# alone") else JOB + code


def read_table() -> Iterator[Mistake]:
    mistake = Mistake("")
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "##":
            mistake = Mistake(rest)
            yield mistake
        elif mark == "%%":
            mistake.partitions = eval(rest)
        elif mark == "<<":
            mistake.sent.append(rest)
        elif mark == ">>":
            mistake.says.append(rest)
        elif line and mark != "####":
            mistake.code.append(line)


MISTAKES = list(read_table())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the job files are. What they import is forgotten afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path_factory.mktemp("bad_jobs")
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def run(mistake: Mistake, file: Path) -> None:
    driver: Any = Driver(load_job(str(file)), partitions=mistake.partitions or 4)
    for call in mistake.sent:
        eval(call, {"driver": driver})
    driver.finish()


def message_of(mistake: Mistake, file: Path) -> str:
    """What the author sees."""
    file.write_text(mistake.text)
    with pytest.raises(FclusterError) as caught:
        run(mistake, file)
    return str(caught.value)


def places_in(mistake: Mistake, file: Path) -> list[str]:
    """What the message has to name: the lines of the mistake, and the record or timer."""
    lines = enumerate(mistake.text.splitlines(), start=1)
    places = [f"{file.name}:{number}" for number, line in lines if line.endswith(HERE)]
    of_timer = any(part.startswith("timer ") for part in mistake.says)
    return [*places, "at offset"] if mistake.sent and not of_timer else places


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.title)
def test_message_says_what_is_wrong_and_where_and_what_to_do(mistake: Mistake, folder: Path) -> None:
    file = folder / f"shop_{MISTAKES.index(mistake)}.py"
    message = message_of(mistake, file)
    missing = [part for part in (*mistake.says, *places_in(mistake, file)) if part not in message]
    assert not missing, f"{missing} in: {message}"
    assert len(mistake.says) >= 2
    assert len(message) <= CHARACTERS_MAX
    assert PACKAGE not in message, "a place in fcluster's own code tells the author nothing"


def test_there_are_more_than_a_hundred_mistakes_and_each_is_another_one() -> None:
    assert len({mistake.title for mistake in MISTAKES}) == len(MISTAKES)
    assert len({(mistake.text, *mistake.sent) for mistake in MISTAKES}) == len(MISTAKES) > 250
