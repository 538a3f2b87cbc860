"""The identity of a function in a job file. It stays the same from one process to the next.

Responsible for: `function_identity`, which shows whether `key_by` still routes by the same key. State is
stored by the keys that such a function returns, so a different function must be noticed, and an unchanged one
must never be refused. Invariants: the identity depends only on the job file, not on the process, the host,
the file's location or the version of Python (except in the last resort, which says so); no user code runs.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, cast

BYTECODE: Final = "bytecode"
"""The beginning of an identity that is valid for one version of Python only."""

_SIMPLE: Final = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis))
_NAMED: Final = (type, types.BuiltinFunctionType, types.MethodDescriptorType, types.ModuleType)
_DIGEST_CHARACTERS: Final = 12
_DEPTH_MAX: Final = 4
_CHARACTERS_MAX: Final = 300
"""Longer texts are replaced by their digest."""
_OPERATORS: Final = (operator.itemgetter, operator.attrgetter, operator.methodcaller)


def function_identity(function: Callable[..., Any]) -> str:
    """A text that is the same for the same function in every run, and different for different functions.

    The identity of a named function is its qualified name, and the simple values (numbers, texts, tuples,
    other functions) in its closure and its defaults. The identity of a lambda is its syntax, whatever its
    parameters are called and however it is formatted, and the same kinds of values, including its module's
    constants. Without source code, the bytecode is used, and the text begins with `BYTECODE` and the version
    of Python.
    """
    text = _of(function, 0)
    return text if len(text) <= _CHARACTERS_MAX else f"{text[:100]}... {_digest(text)}"


def comparable(identity: str, other: str) -> bool:
    """Whether these two identities show if the functions are the same. Bytecode can only be compared with
    bytecode of the same version.
    """
    kinds = [text.split("/", 1)[0] if text.startswith(BYTECODE) else "" for text in (identity, other)]
    return kinds[0] == kinds[1]


def _of(value: Any, depth: int) -> str:
    """The identity of a function, or of what it refers to."""
    if depth > _DEPTH_MAX:
        return f"a {type(value).__name__}"
    if isinstance(value, _SIMPLE):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, tuple | list):
        return f"{type(cast(Any, value)).__name__}({_all(cast('Any', value), depth)})"
    if isinstance(value, set | frozenset):
        return f"set({', '.join(sorted(_of(item, depth + 1) for item in cast('set[Any]', value)))})"
    if isinstance(value, dict):
        return f"dict({_named(cast('dict[Any, Any]', value), depth)})"
    if isinstance(value, functools.partial):
        partial = cast("functools.partial[Any]", value)
        return (
            f"partial {_of(partial.func, depth + 1)} ({_all(partial.args, depth)}; "
            f"{_named(partial.keywords, depth)})"
        )
    if isinstance(value, _OPERATORS):
        kind, arguments = cast("tuple[Any, Any]", value.__reduce__()[:2])
        return f"{_qualified_name(kind)}({_all(arguments, depth)})"
    if isinstance(value, types.MethodType):
        return f"method {_of(value.__func__, depth + 1)} of {_of(value.__self__, depth + 1)}"
    if isinstance(value, types.FunctionType):
        return _of_function(value, depth)
    if isinstance(value, _NAMED):
        return f"{type(value).__name__} {_qualified_name(value)}"
    return _of_object(value, depth)


def _all(values: Any, depth: int) -> str:
    return ", ".join(_of(value, depth + 1) for value in values)


def _named(values: Mapping[Any, Any], depth: int) -> str:
    return ", ".join(sorted(f"{name}={_of(value, depth + 1)}" for name, value in values.items()))


def _qualified_name(value: Any) -> str:
    # Not the module's name: a job file may be renamed, or be imported in another way.
    return str(getattr(value, "__qualname__", getattr(value, "__name__", type(value).__qualname__)))


def _of_object(value: Any, depth: int) -> str:
    """An object that is callable or that a function refers to: its class and its own values."""
    values: dict[str, Any] = dict(getattr(value, "__dict__", {}))
    kind = cast("type[Any]", type(value))
    for slot in getattr(kind, "__slots__", ()):
        values[slot] = inspect.getattr_static(value, slot, None)
        if isinstance(values[slot], types.MemberDescriptorType):
            values[slot] = getattr(value, slot, None)
    values = {
        name: item for name, item in values.items() if name == "__wrapped__" or not name.startswith("__")
    }
    name = f"object {_qualified_name(kind)}"
    return f"{name}({_named(values, depth)})" if values else name


def _of_function(function: types.FunctionType, depth: int) -> str:
    around = _surroundings(function, depth)
    if function.__name__ != "<lambda>":
        return f"function {function.__qualname__}" + (f" with {around}" if around else "")
    node = _lambda_node(function.__code__)
    if node is None:
        version = f"{sys.implementation.name}-{sys.version_info[0]}.{sys.version_info[1]}"
        return f"{BYTECODE}-{version}/{_digest(_code_text(function.__code__), around)}"
    constants = _constants(function, depth)
    return f"lambda {_digest(_canonical(node, {}), around, constants)}"


def _surroundings(function: types.FunctionType, depth: int) -> str:
    """The function's defaults, and the values in its closure."""
    parts: list[str] = []
    if function.__defaults__:
        parts.append(f"defaults ({_all(function.__defaults__, depth)})")
    if function.__kwdefaults__:
        parts.append(f"defaults ({_named(function.__kwdefaults__, depth)})")
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            content = cell.cell_contents
        except ValueError:  # it is still empty
            continue
        parts.append(f"{name}={_of(content, depth + 1) if content is not function else 'itself'}")
    return ", ".join(parts)


def _constants(function: types.FunctionType, depth: int) -> str:
    """The simple values among the globals that a lambda names."""
    found: dict[str, str] = {}
    for name in _names_of(function.__code__):
        value = function.__globals__.get(name)
        if name in function.__globals__ and isinstance(value, (*_SIMPLE, tuple, frozenset)):
            found[name] = _of(value, depth + 1)
    return ", ".join(f"{name}={value}" for name, value in sorted(found.items()))


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)


def _lambda_node(code: types.CodeType) -> ast.Lambda | None:
    """The lambda's node in the syntax tree of its file. None if there is no source, or if the node is
    ambiguous.
    """
    text = "".join(linecache.getlines(code.co_filename)) or _source_of(code)
    lambdas = [node for node in _lambdas_in(text) if node.lineno == code.co_firstlineno]
    if not lambdas:
        return None
    # Some instructions have no source position: they have no columns, or only 0.
    places = [place for place in code.co_positions() if place[3]]
    inside = [node for node in lambdas if _spans(node.body, places)]
    # All lambdas around a nested one match too; the innermost is the right one.
    inside.sort(key=lambda node: (node.body.lineno, node.body.col_offset), reverse=True)
    if places:
        return inside[0] if inside else None
    return lambdas[0] if len(lambdas) == 1 else None


@functools.lru_cache(maxsize=4)  # a job's lambdas are in few files, and tests build the job again and again
def _lambdas_in(text: str) -> tuple[ast.Lambda, ...]:
    try:
        return tuple(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Lambda))
    except (SyntaxError, ValueError, RecursionError):
        return ()


def _source_of(code: types.CodeType) -> str:
    try:
        return "".join(inspect.findsource(code)[0])
    except (OSError, TypeError, IndexError):
        return ""


def _spans(body: ast.expr, places: list[tuple[int | None, int | None, int | None, int | None]]) -> bool:
    begin = (body.lineno, body.col_offset)
    end = (body.end_lineno or body.lineno, body.end_col_offset or body.col_offset)
    for line, end_line, column, end_column in places:
        if line is None or end_line is None or column is None or end_column is None:
            continue
        if (line, column) < begin or (end_line, end_column) > end:
            return False
    return True


def _canonical(node: ast.AST, names: Mapping[str, str]) -> str:
    """The syntax in one line: without positions, parentheses and spellings, and with parameters by number.

    `ast.dump` isn't used because its output changes between versions of Python. Empty fields are left out,
    since new versions add such fields.
    """
    if isinstance(node, ast.Lambda):
        names = {**names, **_numbered(node.args, len(names))}
    if isinstance(node, ast.Constant):
        return f"{type(node.value).__name__}:{node.value!r}"
    if isinstance(node, ast.Name):
        return f"Name:{names.get(node.id, node.id)}"
    if isinstance(node, ast.arg):
        return f"arg:{names.get(node.arg, node.arg)}"
    fields = (
        f"{field}={_canonical_field(getattr(node, field, None), names)}"
        for field in sorted(node._fields)
        if field not in ("ctx", "kind", "type_comment") and getattr(node, field, None) not in (None, [])
    )
    return f"{type(node).__name__}({','.join(fields)})"


def _canonical_field(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, ast.AST):
        return _canonical(value, names)
    if isinstance(value, list):
        return f"[{','.join(_canonical_field(item, names) for item in cast('list[Any]', value))}]"
    return repr(value)


def _numbered(arguments: ast.arguments, first: int) -> dict[str, str]:
    # Only positional parameters may be renamed: nothing else refers to their names.
    named = [*arguments.posonlyargs, *arguments.args]
    return {argument.arg: f"_{first + index}" for index, argument in enumerate(named)}


def _code_text(code: types.CodeType) -> str:
    constants = [
        _code_text(constant) if isinstance(constant, types.CodeType) else repr(constant)
        for constant in code.co_consts
    ]
    return repr((code.co_code.hex(), constants, code.co_names, code.co_freevars))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_CHARACTERS]
