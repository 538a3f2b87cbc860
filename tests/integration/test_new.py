"""`fcluster new`: the job that it writes runs on a broker, with the commands that it names."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fcluster.cli.scaffold import create_scaffold
from tests.harness import REPOSITORY

pytestmark = pytest.mark.timeout(180)
MORE = {"up": ("--until-caught-up", "--workers", "2"), "consume": ("--max", "1")}
"""What lets these commands end by themselves."""


def test_commands_that_are_named_lead_to_the_first_total(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    scaffold = create_scaffold(tmp_path / f"{topic_prefix}spending")
    said = ""
    for command, _ in scaffold.commands:
        source, pipe, line = command.partition(" | ")
        words = shlex.split(line if pipe else source)
        if words[0] != "fcluster" or words[1] == "kafka":
            continue
        done = subprocess.run(
            [sys.executable, "-m", *words, *MORE.get(words[1], ()), "--brokers", kafka],
            cwd=scaffold.directory,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            input=shlex.split(source)[1] if pipe else None,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said = done.stdout
    assert json.loads(said)["value"] == {"account": "ann", "orders": 1, "cents": 250}
