"""Job files as modules, named ``fcluster.api.job_files.job_NAME``.

Responsible for: importing a job file under a name of our own, since it may have the name of a module that is
already imported; and importing it again in processes that a handler starts. Python's `multiprocessing` names
a function by its module, and a freshly started process (`spawn`, `forkserver`) imports that module. It finds
this module by its name, and the file through an inherited environment variable. Must not look for jobs in the
files: importing a file must not start anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ENVIRONMENT_VARIABLE = "FCLUSTER__JOB_FILES"
"""A JSON object: module names to the paths of their files."""

__path__: list[str] = []  # this makes the module a package, into which job files are imported


class _Finder(MetaPathFinder):
    """Finds job files that this process or its parent has loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        del path, target
        if not fullname.startswith(f"{__name__}."):
            return None
        file = _known().get(fullname)
        return None if file is None else importlib.util.spec_from_file_location(fullname, file)


def _known() -> dict[str, str]:
    return json.loads(os.environ.get(ENVIRONMENT_VARIABLE) or "{}")


def import_file(path: Path) -> ModuleType:
    """Execute a job file again and return its module.

    Raises:
        ImportError: it isn't a Python file.
        BaseException: anything that the file raises.
    """
    # The name becomes an attribute of this module, which already has `json` and `os`: hence the prefix.
    name = f"{__name__}.job_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
    os.environ[ENVIRONMENT_VARIABLE] = json.dumps(_known() | {name: str(path.resolve())})
    importlib.invalidate_caches()
    sys.modules.pop(name, None)
    return importlib.import_module(name)


sys.meta_path.append(_Finder())
