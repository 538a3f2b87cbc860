"""What the wheel and the source distribution contain, and whether an installed wheel works."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LINKS = {"common", "coordinator", "worker"}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel, built from the source distribution, and the source distribution."""
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(REPOSITORY)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout.decode()
    return directory


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with only the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--target", str(target), str(wheel)], check=True)
    return target


def run_installed(installed: Path, arguments: list[str], directory: Path) -> str:
    """Run Python with the installed package, without access to the checkout. Returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, cwd=directory, env=environment, check=True
    )
    return done.stdout.decode().strip()


def test_wheel_contains_the_package_once_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fcluster"}
    packaged = Counter(name for name in names if name.endswith(".py"))
    expected = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "fcluster").rglob("*.py")}
    assert packaged == Counter(expected)


def test_wheel_contains_types_marker_deploy_files_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    assert {"fcluster/py.typed", "fcluster/deploy/kafka/pom.xml", "fcluster/deploy/compose.yaml"} <= names
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    declared = archive.read(entry_points).decode()
    assert "fcluster = fcluster.cli.main:main" in declared
    assert "fcluster = fcluster.testing.pytest_plugin" in declared


def test_source_distribution_leaves_the_links_out(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        tops = {name.split("/")[1] for name in archive.getnames()}
    assert {"fcluster", "deploy", "tests", "requirements.lock", "pyproject.toml"} <= tops
    assert tops & LINKS == set()


def test_installed_wheel_finds_its_own_deploy_files(installed: Path, tmp_path: Path) -> None:
    code = "from fcluster.kafka.jars import *; print(deploy_file('kafka/pom.xml'), kafka_version())"
    path, version = run_installed(installed, ["-c", code], tmp_path).split()
    assert Path(path) == installed / "fcluster" / "deploy" / "kafka" / "pom.xml"
    assert version.startswith("4.")


def test_installed_wheel_gives_pytest_its_fixture(installed: Path, tmp_path: Path) -> None:
    fixtures = run_installed(installed, ["-m", "pytest", "--fixtures", "-q", str(tmp_path)], tmp_path)
    assert "fcluster_driver" in fixtures


def test_installed_command_prints_help(installed: Path, tmp_path: Path) -> None:
    helped = run_installed(installed, [str(installed / "bin" / "fcluster"), "--help"], tmp_path)
    for command in ("up", "status", "consume", "produce", "kafka", "coordinator", "worker"):
        assert command in helped
