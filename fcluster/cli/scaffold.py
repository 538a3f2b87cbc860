"""`fcluster new`: a directory with a job to begin with, its test, and a Kafka broker for it.

Responsible for: the files and what is in them. Rules: nothing is overwritten; the job that is written is
valid, and its tests pass as they are. Must not print.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from fcluster.api.job import Job
from fcluster.common.errors import FclusterError, JobError
from fcluster.kafka.jars import deploy_file

_JOB = '''\
"""The job $name: how many orders each account has placed, and what it has spent.

Run it with `fcluster up $module.py`.
"""

from __future__ import annotations

from typing import Any

from fcluster import Context, Job

job = Job("$name")
orders = job.topic("$name-orders")
totals = job.topic("$name-totals")
refused = job.topic("$name-refused", value="bytes")


@job.process(orders, to=totals, on_error=refused)
def total(ctx: Context, order: dict[str, Any]) -> dict[str, Any]:
    """Called for each order. `ctx.state` is kept for each key, which is the account here.

    An order that makes this function fail changes nothing, and is written to the topic `refused`.
    """
    ctx.state["orders"] = ctx.state.get("orders", 0) + 1
    ctx.state["cents"] = ctx.state.get("cents", 0) + order["cents"]
    return {"account": ctx.key, **ctx.state}
'''

_TEST = '''\
"""Tests of the job $name. They need no Kafka: the driver runs the engine that workers run."""

from __future__ import annotations

from fcluster.testing import Driver

from $module import job, orders, totals


def test_orders_are_added_up_for_each_account() -> None:
    with Driver(job) as driver:
        driver.send(orders, {"cents": 250}, key="ann")
        driver.send(orders, {"cents": 100}, key="bob")
        driver.send(orders, {"cents": 50}, key="ann")
        assert driver.read_values(totals) == [
            {"account": "ann", "orders": 1, "cents": 250},
            {"account": "bob", "orders": 1, "cents": 100},
            {"account": "ann", "orders": 2, "cents": 300},
        ]


def test_broken_order_is_refused_and_changes_nothing() -> None:
    with Driver(job) as driver:
        driver.send(orders, {"euros": 2}, key="ann")
        (letter,) = driver.dead_letters()
        assert letter.error == "KeyError: 'cents'"
        assert driver.state("total", "ann") == {}


def test_order_counts_once_even_if_its_worker_dies() -> None:
    with Driver(job, auto_barrier=False) as driver:
        driver.send(orders, {"cents": 250}, key="ann")  # processed, but not committed
        driver.crash()
        driver.settle()
        assert driver.read_values(totals) == [{"account": "ann", "orders": 1, "cents": 250}]
'''

_README = """\
# $name
The fcluster job `$module.py`, with its tests in `test_$module.py`.

```
$commands
```

For a broker in Docker instead, run `docker compose up --detach --wait` and give each command
`--brokers 127.0.0.1:9092`.
"""

_PYTEST = """\
[pytest]
pythonpath = .
"""

_FIRST_ORDER = """echo '{"account": "ann", "cents": 250}'"""
_COMMANDS = (
    ("python -m pip install pytest", "once, for the tests"),
    ("python -m pytest", "run the tests, without Kafka"),
    ("fcluster check $module.py --offline", "what the job does"),
    ("fcluster kafka start", "an embedded broker, if you have none"),
    (f"{_FIRST_ORDER} | fcluster produce $name-orders --partitions 4 --key-field account", ""),
    ("fcluster up $module.py", "Ctrl-C drains the job"),
    ("fcluster consume $name-totals --from-beginning", "in another terminal"),
)
_COMMENT_COLUMN = 51


@dataclass(frozen=True)
class Scaffold:
    """A new job's directory.

    Attributes:
        directory: where it is.
        files: the files in it by name, each with what it is for.
        commands: what to do next: command lines to be run there, each with a remark, which may be empty.
    """

    directory: Path
    files: dict[str, str]
    commands: tuple[tuple[str, str], ...]

    def describe(self) -> list[str]:
        """What was created and what to do next, in lines."""
        width = max(map(len, self.files))
        lines = [f"created {self.directory}:"]
        lines += [f"  {name:{width}}  {purpose}" for name, purpose in self.files.items()]
        return [*lines, "next:", *(f"  {line}" for line in _command_lines(self.commands))]


def create_scaffold(directory: Path) -> Scaffold:
    """Create a directory with a job. The job has the directory's name.

    Args:
        directory: it must not exist.

    Raises:
        JobError: a job can't have that name.
        FclusterError: the directory exists, or can't be written.
    """
    name = directory.name
    _check_name(name)
    module = _module_name(name)
    commands = tuple((Template(line).substitute(name=name, module=module), note) for line, note in _COMMANDS)
    names = {"name": name, "module": module, "commands": "\n".join(_command_lines(commands))}
    purposes_and_texts = {
        f"{module}.py": ("the job", Template(_JOB).substitute(names)),
        f"test_{module}.py": ("its tests", Template(_TEST).substitute(names)),
        "pytest.ini": ("tells pytest where the job is", _PYTEST),
        "compose.yaml": ("a Kafka broker in Docker", _compose(module)),
        "README.md": ("the commands below", Template(_README).substitute(names)),
        ".gitignore": ("the data directory stays out", ".fcluster/\n"),
    }
    try:
        directory.mkdir(parents=True)
        for file, (_, text) in purposes_and_texts.items():
            (directory / file).write_text(text, encoding="utf-8")
    except FileExistsError:
        raise FclusterError(
            f"{directory} exists already; nothing was changed", remedy="Choose another name, or remove it."
        ) from None
    except OSError as error:
        raise FclusterError(
            f"can't write the new job to {directory}: {error.strerror or error}",
            remedy="Choose a directory that this user may write.",
        ) from error
    purposes = {file: purpose for file, (purpose, _) in purposes_and_texts.items()}
    return Scaffold(directory, purposes, ((f"cd {shlex.quote(str(directory))}", ""), *commands))


def _check_name(name: str) -> None:
    job = Job(name)
    for topic in ("orders", "totals", "refused"):
        job.topic(f"{name}-{topic}")  # raises JobError if it would be too long


def _module_name(name: str) -> str:
    """The name of the job's module. No other module may have it: the test would import that one."""
    module = re.sub(r"[^a-z0-9_]", "_", name.lower())
    if module[0].isdigit():
        module = f"job_{module}"
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or _is_installed(module):
        raise JobError(
            f"The job's file can't be called {module}.py, because Python uses that name.",
            remedy=f"Choose another name, such as {name}-job.",
        )
    return module


def _is_installed(module: str) -> bool:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: imported, but made by hand
        return True
    # A directory without Python files is found, too, but has no origin.
    return found is not None and found.origin is not None


def _compose(module: str) -> str:
    """Our compose file for development, in words that fit the new directory."""
    text = deploy_file("compose.yaml").read_text(encoding="utf-8")
    for ours, theirs in (
        ("docker compose -f deploy/compose.yaml up", "docker compose up"),
        ("fcluster up flights.py", f"fcluster up {module}.py"),
        ("name: fcluster\n\n", ""),  # then it is the directory's name
    ):
        text = text.replace(ours, theirs)
    return text


def _command_lines(commands: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{line:{_COMMENT_COLUMN}}# {remark}" if remark else line for line, remark in commands]
