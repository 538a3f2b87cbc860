"""Holds who may import what: dependencies point one way, and pure modules stay pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fcluster"
MODULES = sorted(PACKAGE.rglob("*.py"))
PURE_NAMES = {
    "core",
    "events",
    "model",
    "situation",
    "pieces",
    "holdings",
    "epochs",
    "departure",
    "cluster",
    "outbox",
    "ownership",
    "membership",
    "vigilance",
    "joining",
    "returning",
    "leaving",
    "ending",
    "reports",
    "scaling",
    "office",
    "invariants",
    "assignment",
    "election",
    "copies",
    "naming",
    "agents",
    "topology",
    "failures",
    "offsets",
    "positions",
    "topic_ids",
    "topics",
    "torn",
}
PURE_FOLDERS = {"engine", "testing"}
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
"""Sockets, Kafka, RocksDB, threads, processes, clock and chance."""
CLOCK_CALLS = {"now", "utcnow", "today"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules that the file imports, anywhere in it; not those for the type checker."""
    yield from imported_names(ast.parse(path.read_text(encoding="utf-8")), module_name(path))


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


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def is_pure(path: Path) -> bool:
    is_in_pure_folder = path.relative_to(PACKAGE).parts[0] in PURE_FOLDERS
    return is_in_pure_folder or path.stem in PURE_NAMES or path.stem.endswith("_core")


def local_imports(path: Path) -> set[Path]:
    """The files of fcluster that a file imports."""
    found: set[Path] = set()
    for name in imports(path):
        target = PACKAGE.parent.joinpath(*name.split("."))
        if is_within(name, "fcluster") and target.with_suffix(".py").exists():
            found.add(target.with_suffix(".py"))
    return found


PURE_MODULES = [path for path in MODULES if is_pure(path)]


def test_the_walk_sees_the_package() -> None:
    assert {module_name(path) for path in MODULES} >= {"fcluster.common.ids", "fcluster.common.positions"}
    assert "msgspec" in set(imports(PACKAGE / "common" / "messages.py"))


def test_imports_hidden_in_functions_are_seen() -> None:
    tree = ast.parse("def f():\n    if x:\n        from time import sleep\n    import zmq")
    assert set(imported_names(tree, "m")) == {"time", "time.sleep", "zmq"}


def test_imports_for_the_type_checker_alone_do_not_count() -> None:
    tree = ast.parse("if TYPE_CHECKING:\n    import zmq\nelse:\n    import time")
    assert set(imported_names(tree, "m")) == {"time"}


@pytest.mark.parametrize("path", PURE_MODULES, ids=module_name)
def test_pure_module_imports_nothing_impure(path: Path) -> None:
    seen: set[Path] = set()
    waiting = [path]
    # What a pure module imports of ours has to be pure as well, or its purity is a matter of spelling.
    while waiting:
        module = waiting.pop()
        seen.add(module)
        impure = {name for name in imports(module) if name.partition(".")[0] in IMPURE}
        assert not impure, f"{module_name(path)} reaches {sorted(impure)} through {module_name(module)}"
        waiting += local_imports(module) - seen


@pytest.mark.parametrize("path", PURE_MODULES, ids=module_name)
def test_pure_module_reads_no_clock(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Attribute) and call.attr in CLOCK_CALLS]


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("fcluster.coordinator", "fcluster.worker"),
        ("fcluster.worker", "fcluster.coordinator"),
        ("fcluster.common", "fcluster.coordinator"),
        ("fcluster.common", "fcluster.worker"),
        ("fcluster.common", "fcluster.cli"),
        ("fcluster.common", "fcluster.engine"),
        ("fcluster.engine", "fcluster.worker"),
        ("fcluster.engine", "fcluster.coordinator"),
        ("fcluster.common", "fcluster.testing"),
        ("fcluster.engine", "fcluster.testing"),
        ("fcluster.worker", "fcluster.testing"),
        ("fcluster.testing", "fcluster.worker"),
        ("fcluster.testing", "fcluster.coordinator"),
    ],
)
def test_dependencies_point_one_way(importer: str, imported: str) -> None:
    against = [
        f"{module_name(path)} imports {name}"
        for path in MODULES
        if is_within(module_name(path), importer)
        for name in imports(path)
        if is_within(name, imported)
    ]
    assert against == []


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
