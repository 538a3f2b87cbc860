from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fcluster.api.loader import load_job
from fcluster.common.errors import JobError

JOB = "from fcluster import Job\njob = Job('carriers')\n"

WriteFile = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteFile]:
    """Returns a function that writes a file into an empty working directory. Imports are forgotten
    afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    yield write_file
    for name in set(sys.modules) - known:
        del sys.modules[name]


def failure(target: str) -> JobError:
    with pytest.raises(JobError) as caught:
        load_job(target)
    assert caught.value.remedy
    return caught.value


def test_file_with_one_job_is_loaded(write: WriteFile) -> None:
    path = write("flights.py", JOB)
    assert load_job("flights.py").name == "carriers"
    assert load_job(str(path)).name == "carriers"
    assert load_job("flights.py:job").name == "carriers"
    assert load_job(f"{path}:job").name == "carriers"


def test_module_with_one_job_is_loaded(write: WriteFile) -> None:
    write("jobs_of_a_test/__init__.py", "")
    write("jobs_of_a_test/flights.py", JOB)
    assert load_job("jobs_of_a_test.flights:job").name == "carriers"
    assert load_job("jobs_of_a_test.flights").name == "carriers"


def test_changed_file_is_loaded_again(write: WriteFile) -> None:
    write("flights.py", JOB)
    first = load_job("flights.py")
    write("flights.py", JOB.replace("carriers", "carriers-of-today"))
    assert (first.name, load_job("flights.py").name) == ("carriers", "carriers-of-today")


def test_file_named_like_an_imported_module_is_loaded(write: WriteFile) -> None:
    write("json.py", JOB)
    assert load_job("json.py").name == "carriers"


def test_file_that_imports_its_neighbour_is_loaded_from_another_directory(
    write: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("there/neighbour_of_flights.py", "NAME = 'carriers'")
    write(
        "there/flights.py",
        "from fcluster import Job\nfrom neighbour_of_flights import NAME\njob = Job(NAME)\n",
    )
    monkeypatch.chdir(tmp_path.parent)
    assert load_job(str(tmp_path / "there" / "flights.py")).name == "carriers"


def test_missing_file_is_reported_with_a_similar_name(write: WriteFile) -> None:
    write("flights.py", JOB)
    error = failure("flihgts.py")
    assert "'flihgts.py' doesn't exist" in error.message
    assert "flights.py" in error.remedy


def test_file_in_a_missing_directory_says_where_it_looked(write: WriteFile, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in failure("nowhere/flights.py").message


def test_missing_module_is_named(write: WriteFile) -> None:
    assert "'no_such_module_here.job'" in failure("no_such_module_here.job:job").message


def test_missing_module_with_the_name_of_a_file_suggests_the_file(write: WriteFile) -> None:
    write("flights_of_a_test.py", JOB)
    assert "flights_of_a_test.py" in failure("flight_of_a_test").remedy
    assert load_job("flights_of_a_test").name == "carriers"


def test_unknown_target_is_reported_with_how_to_name_a_job(write: WriteFile) -> None:
    for target in ("", ":job", ".job"):
        assert "flights.py:job" in failure(target).remedy


def test_file_that_raises_shows_the_users_line(write: WriteFile) -> None:
    path = write(
        "flights.py", "from fcluster import Job\n\ndef helper():\n    return undefined\n\nhelper()\n"
    )
    message = failure("flights.py").message
    assert "NameError: name 'undefined' is not defined" in message
    assert f"{path.name}:4: return undefined" in message


def test_file_with_a_syntax_error_shows_the_line(write: WriteFile) -> None:
    write("flights.py", "a = 1\nb = = 2\n")
    message = failure("flights.py").message
    assert "SyntaxError" in message
    assert "flights.py:2: b = = 2" in message


def test_file_that_lacks_a_package_says_where_to_install_it(write: WriteFile) -> None:
    write("flights.py", "import no_such_package_here\n")
    error = failure("flights.py")
    assert "no_such_package_here" in error.message
    assert sys.executable in error.remedy


def test_module_that_lacks_a_package_is_not_reported_as_missing(write: WriteFile) -> None:
    write("job_lacking_a_package.py", "import no_such_package_here\n")
    message = failure("job_lacking_a_package").message
    assert "Can't load job_lacking_a_package" in message
    assert "no_such_package_here" in message


def test_file_that_exits_is_refused(write: WriteFile) -> None:
    write("flights.py", "raise SystemExit(0)\n")
    assert "__main__" in failure("flights.py").remedy


def test_job_error_in_the_file_keeps_its_remedy_and_shows_the_line(write: WriteFile) -> None:
    write("flights.py", "from fcluster import Job\njob = Job('carrier delays')\n")
    error = failure("flights.py")
    assert "'carrier delays' isn't valid" in error.message
    assert "flights.py:2: job = Job('carrier delays')" in error.message
    assert "letters" in error.remedy


def test_file_without_a_job_says_how_to_declare_one(write: WriteFile) -> None:
    write("flights.py", "a = 1\n")
    error = failure("flights.py")
    assert "has no job" in error.message
    assert "Job(" in error.remedy


def test_file_with_two_jobs_names_both_and_asks_which(write: WriteFile) -> None:
    write("flights.py", "from fcluster import Job\na = Job('one')\nb = Job('two')\n")
    error = failure("flights.py")
    assert "a (one), b (two)" in error.message
    assert "flights.py:a" in error.remedy
    assert load_job("flights.py:b").name == "two"


def test_one_job_under_two_names_is_one_job(write: WriteFile) -> None:
    write("flights.py", JOB + "app = job\n")
    assert load_job("flights.py").name == "carriers"


def test_variable_that_is_missing_or_not_a_job_is_refused(write: WriteFile) -> None:
    write("flights.py", JOB + "number = 1\n")
    missing = failure("flights.py:jobb")
    assert "nothing named 'jobb'" in missing.message
    assert "job (carriers)" in missing.remedy
    assert "of type int" in failure("flights.py:number").message


def test_function_of_a_job_file_is_found_by_a_spawned_process(write: WriteFile) -> None:
    write("json.py", JOB + "def double(number):\n    return 2 * number\n")
    known = set(sys.modules)
    load_job("json.py")
    (module,) = (name for name in set(sys.modules) - known if name.startswith("fcluster.api.job_files."))
    # Like `multiprocessing` there: without the file's folder on the path.
    text = f"import importlib; print(importlib.import_module({module!r}).double(21))"
    done = subprocess.run([sys.executable, "-P", "-c", text], capture_output=True, check=True)
    assert done.stdout == b"42\n"
