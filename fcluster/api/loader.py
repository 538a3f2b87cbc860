"""Finds the job that a command line names.

Responsible for: turning `flights.py`, `flights.py:job` or `package.module:job` into a `Job`. Invariant:
anything that goes wrong in a user's file becomes one `JobError` that names the file and the line. Must not
build or run the job.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from fcluster.api import job_files
from fcluster.api.hints import hint
from fcluster.api.job import Job
from fcluster.common.errors import FclusterError, JobError
from fcluster.common.spelling import near_names

_OUR_PATH = re.compile(r" \(\S*fcluster[\\/]__init__\.py\)$")
"""At the end of Python's message about a name that fcluster doesn't have."""
_PACKAGE = f"{Path(__file__).resolve().parent.parent}{os.sep}"


def load_job(target: str) -> Job:
    """The job that `target` names.

    A file's directory is put first in the import path, so that the job can import modules next to it. For a
    module, the working directory is put first.

    Args:
        target: a path that ends in ``.py``, or an importable module. If there are several jobs in it, a colon
            and the variable's name follow.

    Raises:
        JobError: the file or module doesn't exist, raises on import, or has no job, or several.
    """
    place, _, variable = target.rpartition(":") if _names_variable(target) else (target, "", "")
    module = _load_file(Path(place)) if _is_path(place) else _load_module(place)
    return _named_job(module, place, variable) if variable else _only_job(module, place)


def _names_variable(target: str) -> bool:
    # The colon of a Windows drive is followed by a separator.
    _, colon, last = target.rpartition(":")
    return bool(colon) and "/" not in last and "\\" not in last


def _is_path(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent
        names = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
        raise JobError(
            f"The job file {str(path)!r} doesn't exist (looked in {folder.resolve()}).",
            remedy=_did_you_mean(path.name, names) or "Check the path.",
        )
    _import_from(path.resolve().parent)
    if path.suffix != ".py":
        raise JobError(f"The job file {str(path)!r} isn't a Python file.", remedy="Rename it to end in .py.")
    try:
        return job_files.import_file(path)
    except (Exception, SystemExit) as error:
        raise _failed(str(path), error) from error


def _load_module(name: str) -> ModuleType:
    _import_from(Path.cwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (name == missing or name.startswith(f"{missing}.")):
            near = _did_you_mean(f"{name}.py", sorted(p.name for p in Path.cwd().glob("*.py")))
            raise JobError(
                f"There is no module {name!r}.",
                remedy=near or "Check its name, or give the path of a file.",
            ) from error
        if isinstance(error, TypeError | ValueError) and not _user_frames(error):
            raise JobError(
                f"{name!r} is neither a file nor a module.",
                remedy="Write the job as flights.py, flights.py:job or package.module:job.",
            ) from error
        raise _failed(name, error) from error


def _import_from(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _failed(place: str, error: BaseException) -> JobError:
    where = _where(error)
    if isinstance(error, FclusterError):
        return JobError(f"{place}: {error.message}{where}", remedy=error.remedy)
    remedy = hint(error) or "Correct the file so that it can be imported."
    if isinstance(error, ModuleNotFoundError):
        remedy = f"Install it for {sys.executable}, or correct the import."
    elif isinstance(error, SystemExit):
        remedy = 'Put the code that exits under `if __name__ == "__main__":`.'
    what = error.msg if isinstance(error, SyntaxError) else _OUR_PATH.sub("", str(error))
    return JobError(f"Can't load {place}: {type(error).__name__}: {what}{where}", remedy=remedy)


def _where(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"\n  {error.filename}:{error.lineno}: {(error.text or '').strip()}"
    frames = _user_frames(error)
    return f"\n  {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _user_frames(error: BaseException) -> Sequence[traceback.FrameSummary]:
    """The stack frames that lead to the error, without those of fcluster, of the import system, and of code
    without a file, such as the constructors of dataclasses.
    """
    return [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_PACKAGE, "<", importlib.__file__))
    ]


def _named_job(module: ModuleType, place: str, variable: str) -> Job:
    found = getattr(module, variable, None)
    if isinstance(found, Job):
        return found
    jobs = _jobs(module)
    if found is None:
        message = f"{place} has nothing named {variable!r}."
    else:
        message = f"{variable!r} in {place} is of type {type(found).__name__}, not a Job."
    remedy = f"It has {_listed(jobs)}." if jobs else 'Write job = Job("name") at its top level.'
    raise JobError(message, remedy=remedy)


def _only_job(module: ModuleType, place: str) -> Job:
    jobs = _jobs(module)
    if not jobs:
        raise JobError(
            f"{place} has no job.",
            remedy='Write job = Job("name") at its top level (not in a function).',
        )
    if len({id(job) for job in jobs.values()}) > 1:
        raise JobError(
            f"{place} has {len(jobs)} jobs: {_listed(jobs)}.",
            remedy=f"Choose one, as in {place}:{next(iter(jobs))}.",
        )
    return next(iter(jobs.values()))


def _jobs(module: ModuleType) -> dict[str, Job]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Job)}


def _listed(jobs: dict[str, Job]) -> str:
    return ", ".join(f"{variable} ({job.name})" for variable, job in jobs.items())


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    near = near_names(name, names)
    return f"Did you mean {near[0]}?" if near else ""
