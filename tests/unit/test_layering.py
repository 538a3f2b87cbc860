"""Checks who may import what: dependencies point in one direction, and pure modules stay pure."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fcluster"
MODULES = sorted(PACKAGE.rglob("*.py"))
PURE_FOLDERS = {"graph", "engine", "testing", "coordinator/core", "worker/core"}
PURE_CLAIM = re.compile(r"\bPure\b")
"""If the docstring of a module outside those folders says "Pure", the module is checked too."""
BELOW: dict[str, tuple[str, ...]] = {
    "common": (),
    "graph": ("common",),
    "engine": ("graph", "common"),
    "api": ("graph", "common"),
    "kafka": ("graph", "common"),
    "schema_registry": ("graph", "common"),
    "testing": ("api", "engine", "graph", "common"),
    "wire": ("kafka", "graph", "common"),
    "storage": ("wire", "kafka", "engine", "graph", "common"),
    "worker": ("storage", "wire", "kafka", "api", "engine", "graph", "common"),
    "coordinator": ("storage", "wire", "kafka", "api", "engine", "graph", "common"),
    "host": ("wire", "kafka", "common"),
    "cli": ("host", "coordinator", "worker", "storage", "wire", "kafka", "api", "engine", "graph", "common"),
}
"""The folders of ours from which each folder may import, besides itself."""
LIBRARIES: dict[str, set[str]] = {
    "graph": {"msgspec", "orjson"},
    "engine": {"msgspec", "orjson"},
    "testing": {"pytest"},
}
"""What pure folders may use besides the standard library: codecs, and pytest's fixtures."""
IMPURE = {
    "asyncio",
    "concurrent",
    "confluent_kafka",
    "multiprocessing",
    "os",
    "queue",
    "random",
    "rocksdict",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
    "uuid",
    "zmq",
}
"""Sockets, Kafka, RocksDB, threads, processes, clocks and random numbers."""
ALLOWED = {"fcluster.testing.event_loop": {"asyncio"}, "fcluster.graph.typed": {"uuid"}}
"""The driver awaits the job's async functions, which takes an event loop. State keeps UUIDs, and makes
none.
"""
CLOCK_CALLS = {"now", "utcnow", "today"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Full names of all modules that the file imports, wherever it does. Those for the type checker don't
    count."""
    return tuple(imported_names(ast.parse(path.read_text(encoding="utf-8")), module_name(path)))


def imported_names(tree: ast.AST, module: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from imported_names(ast.Module(body=node.orelse, type_ignores=[]), module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported_names(node, module)


def is_of_ours(name: str) -> bool:
    return name.startswith(f"{PACKAGE.name}.")


def is_pure(path: Path) -> bool:
    folder = path.parent.relative_to(PACKAGE).as_posix()
    if any(folder == pure or folder.startswith(f"{pure}/") for pure in PURE_FOLDERS):
        return True
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return PURE_CLAIM.search(docstring) is not None


@functools.cache
def local_imports(path: Path) -> set[Path]:
    """The files of fcluster that run when the file is imported: modules, their packages, and the enclosing
    packages."""
    found: set[Path] = set()
    for name in [module_name(path), *imports(path)]:
        parts = name.split(".")
        if parts[0] != PACKAGE.name:
            continue
        for length in range(1, len(parts) + 1):
            target = PACKAGE.parent.joinpath(*parts[:length])
            found |= {one for one in (target.with_suffix(".py"), target / "__init__.py") if one.is_file()}
    return found - {path}


PURE_MODULES = [path for path in MODULES if is_pure(path)]


def test_all_modules_are_found() -> None:
    assert {module_name(path) for path in MODULES} >= {"fcluster.common.ids", "fcluster.common.positions"}
    assert "msgspec" in set(imports(PACKAGE / "wire" / "messages.py"))


def test_imports_in_functions_are_found() -> None:
    tree = ast.parse("def f():\n    if x:\n        from time import sleep\n    import zmq")
    assert set(imported_names(tree, "m")) == {"time", "time.sleep", "zmq"}


def test_imports_only_for_the_type_checker_do_not_count() -> None:
    tree = ast.parse("if TYPE_CHECKING:\n    import zmq\nelse:\n    import time")
    assert set(imported_names(tree, "m")) == {"time"}


def test_enclosing_packages_of_a_module_are_found() -> None:
    around = {PACKAGE / "__init__.py", PACKAGE / "engine" / "__init__.py", PACKAGE / "common" / "__init__.py"}
    assert local_imports(PACKAGE / "engine" / "runner.py") >= around


@pytest.mark.parametrize("path", PURE_MODULES, ids=module_name)
def test_pure_module_imports_nothing_impure(path: Path) -> None:
    seen: set[Path] = set()
    waiting = [path]
    # The modules of ours that a pure module imports have to be pure as well. Otherwise its purity means
    # nothing.
    while waiting:
        module = waiting.pop()
        seen.add(module)
        banned = IMPURE - ALLOWED.get(module_name(module), set())
        impure = {name for name in imports(module) if name.partition(".")[0] in banned}
        assert not impure, f"{module_name(path)} reaches {sorted(impure)} through {module_name(module)}"
        waiting += local_imports(module) - seen


@pytest.mark.parametrize("path", PURE_MODULES, ids=module_name)
def test_pure_module_reads_no_clock(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Attribute) and call.attr in CLOCK_CALLS]


@pytest.mark.parametrize("folder", BELOW)
def test_folder_imports_only_what_is_below_it(folder: str) -> None:
    allowed = {folder, *BELOW[folder], "__version__"}
    against = [
        f"{module_name(path)} imports {name}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for name in imports(path)
        if is_of_ours(name) and name.split(".")[1] not in allowed
    ]
    assert against == []


@pytest.mark.parametrize("folder", LIBRARIES)
def test_pure_folder_uses_few_libraries(folder: str) -> None:
    used = {name.partition(".")[0] for path in (PACKAGE / folder).rglob("*.py") for name in imports(path)}
    assert used - {"fcluster", *sys.stdlib_module_names} == LIBRARIES[folder]


def test_nothing_is_imported_through_the_top_level_links() -> None:
    roots = {"common", "coordinator", "worker"}
    against = [
        f"{path.name} imports {name}"
        for path in MODULES
        for name in imports(path)
        if name.partition(".")[0] in roots
    ]
    assert against == []


def test_every_module_says_what_it_is_for() -> None:
    without = [
        module_name(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert without == []
