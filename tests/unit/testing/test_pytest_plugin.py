"""The fixture for pytest is found through the package's entry point, creates drivers, and closes them."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
TESTS = """
import pytest

from fcluster import Job
from fcluster.testing import JobStopped

job = Job("j")
job.stream(job.topic("in")).map(lambda value: value + 1).to(job.topic("out"))
made = []


def test_values_are_raised(fcluster_driver):
    driver = fcluster_driver(job, partitions=1)
    made.append(driver)
    driver.send("in", 1, key="k")
    assert driver.read_values("out") == [2]


def test_driver_of_the_test_before_is_closed():
    with pytest.raises(JobStopped, match="closed"):
        made[0].send("in", 1, key="k")
"""


def test_entry_point_names_the_module_with_the_fixture() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (module,) = project["entry-points"]["pytest11"].values()
    assert hasattr(importlib.import_module(module), "fcluster_driver")


def test_fixture_makes_drivers_and_closes_them(tmp_path: Path) -> None:
    (tmp_path / "test_job.py").write_text(TESTS, encoding="utf-8")
    # Without the entry point, which an older installation lacks.
    plugins = ["-p", "no:fcluster", "-p", "fcluster.testing.pytest_plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "test_job.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 passed" in ran.stdout
