"""`fcluster new`: what it writes is valid and passes its own tests; nothing is overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from fcluster.api.loader import load_job
from fcluster.cli.ending import Session
from fcluster.cli.main import commands
from fcluster.cli.scaffold import create_scaffold
from fcluster.common.errors import FclusterError
from fcluster.common.settings import Settings

pytestmark = pytest.mark.usefixtures("forgets_jobs")
REPOSITORY = Path(__file__).parents[3]
NAMES = {"spending": "spending", "Daily.Spend-2": "daily_spend_2", "2fast": "job_2fast", "a" * 100: "a" * 100}


def new(*arguments: str) -> Result:
    return CliRunner().invoke(commands, ["new", *arguments], obj=Session())


def run_tool(directory: Path, *arguments: str) -> None:
    """Run a Python tool in a new job's directory. It has to succeed."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_new_jobs_pass_their_own_tests(tmp_path: Path) -> None:
    for name in ("spending", "two"):
        create_scaffold(tmp_path / name)
    run_tool(tmp_path / "spending", "pytest", "-q", "-p", "no:cacheprovider")
    # From outside, and with the other way of importing tests.
    run_tool(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "two")


@pytest.mark.parametrize(("name", "module"), NAMES.items(), ids=NAMES.values())
def test_job_has_the_name_of_the_directory_and_its_module_one_that_python_takes(
    tmp_path: Path, name: str, module: str
) -> None:
    create_scaffold(tmp_path / name)
    job = load_job(str(tmp_path / name / f"{module}.py"))
    assert job.name == name
    assert [topic.name for topic in job.build(Settings()).sources] == [f"{name}-orders"]


def test_new_job_passes_strict_type_checks_and_lint(tmp_path: Path) -> None:
    directory = create_scaffold(tmp_path / "Daily.Spend-2").directory
    project = {"typeCheckingMode": "strict", "extraPaths": [str(REPOSITORY)], "pythonVersion": "3.11"}
    (directory / "pyrightconfig.json").write_text(json.dumps(project))
    run_tool(directory, "pyright", "--warnings", "--pythonpath", sys.executable)
    config = ("--config", str(REPOSITORY / "pyproject.toml"), "--no-cache")
    run_tool(directory, "ruff", "check", *config, ".")
    run_tool(directory, "ruff", "format", "--check", *config, ".")


def test_what_to_do_next_is_told_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = new("spending")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "created spending:"
    files = {line.split()[0] for line in lines[1 : lines.index("next:")]}
    assert files == {path.name for path in (tmp_path / "spending").iterdir()}
    steps = [line.strip() for line in lines[lines.index("next:") + 1 :]]
    assert steps[0] == "cd spending"
    assert steps[1].startswith("python -m pip install pytest ")
    assert steps[2].startswith("python -m pytest ")
    assert "\n".join(steps[1:]) in (tmp_path / "spending" / "README.md").read_text()


def test_path_is_where_it_is_created_and_its_last_part_the_name(tmp_path: Path) -> None:
    result = new(str(tmp_path / "jobs" / "spending"))
    assert result.exit_code == 0, result.output
    assert f"cd {tmp_path / 'jobs' / 'spending'}" in result.output
    assert load_job(str(tmp_path / "jobs" / "spending" / "spending.py")).name == "spending"


@pytest.mark.parametrize("existing", ["file", "directory", "link"])
def test_nothing_is_overwritten(tmp_path: Path, existing: str) -> None:
    place = tmp_path / "spending"
    if existing == "file":
        place.write_text("mine")
    elif existing == "directory":
        place.mkdir()
    else:
        place.symlink_to(tmp_path / "nowhere")
    result = new(str(place))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {place} exists already; nothing was changed\nremedy: ")
    assert [path.name for path in tmp_path.rglob("*")] == ["spending"]


@pytest.mark.parametrize(
    "name", ["json", "fcluster", "pytest", "class", "a job", "spënd", "..", ".", "x" * 245]
)
def test_name_that_a_job_or_module_cannot_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = new(name)
    assert result.exit_code == 1, result.output
    assert "remedy: " in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FclusterError, match=r"file/spending: Not a directory"):
        create_scaffold(tmp_path / "file" / "spending")


def test_compose_file_fits_its_new_place(tmp_path: Path) -> None:
    create_scaffold(tmp_path / "spending")
    text = (tmp_path / "spending" / "compose.yaml").read_text()
    ours = yaml.safe_load((REPOSITORY / "deploy" / "compose.yaml").read_text())
    assert yaml.safe_load(text) == {part: value for part, value in ours.items() if part != "name"}
    assert "deploy/" not in text
    assert "fcluster up spending.py" in text
    assert "flights" not in text
