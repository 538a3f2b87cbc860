"""How the functions of a job file are distinguished."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest

from fcluster.graph.functions import BYTECODE, comparable, function_identity

FIELD = "a"
TEMPLATE = """
import functools, operator
FIELD = {field!r}
class Field:
    def __init__(self, name):
        self.name = name
    def __call__(self, value):
        return value[self.name]
def by(name):
    def key(value):
        return value[name]
    return key
function = {text}
"""


def identity(tmp_path: Any, text: str, field: str = "a", file: str = "job.py") -> str:
    """The identity of a function in its own file, like in a job file."""
    path = tmp_path / file
    source = TEMPLATE.format(text=text, field=field)
    path.write_text(source)
    namespace: dict[str, Any] = {"__name__": file}
    exec(compile(source, str(path), "exec"), namespace)
    import linecache

    linecache.checkcache(str(path))
    return function_identity(namespace["function"])


DIFFERENT = [
    'lambda v: v["a"]',
    'lambda v: v["b"]',
    'lambda v: v["a"] or 1',
    'lambda v: str(v["a"])',
    "lambda v: v['a'] + v['b']",
    "lambda v: v['b'] + v['a']",
    "lambda v: f\"{v['a']}-{v['b']}\"",
    "lambda v: f\"{v['a']}:{v['b']}\"",
    "lambda v: 1",
    "lambda v: 1.0",
    "lambda v: True",
    "lambda v: '1'",
    "lambda v: b'1'",
    "lambda v: v",
    "lambda v, w=1: v",
    "lambda v, w=2: v",
    "(lambda name: lambda v: v[name])('a')",
    "(lambda name: lambda v: v[name])('b')",
    "operator.itemgetter('a')",
    "operator.itemgetter('b')",
    "operator.itemgetter('a', 'b')",
    "operator.attrgetter('a')",
    "operator.methodcaller('get', 'a')",
    "operator.methodcaller('get', 'b')",
    "functools.partial(by, 'a')",
    "functools.partial(by, name='a')",
    "functools.partial(lambda name, v: v[name], 'a')",
    "functools.partial(lambda name, v: v[name], 'b')",
    "by('a')",
    "by('b')",
    "by",
    "Field('a')",
    "Field('b')",
    "Field('a').__call__",
    "str",
    "str.lower",
    "len",
]


def test_different_functions_have_different_identities(tmp_path: Any) -> None:
    found: dict[str, str] = {}
    for text in DIFFERENT:
        known = found.setdefault(identity(tmp_path, text), text)
        assert known == text, f"{known} and {text} can't be told apart"


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ('lambda v: v["a"]', "lambda v: v['a']"),
        ('lambda v: v["a"]', "lambda value: value['a']"),
        ('lambda v: v["a"]', "(lambda v: (\n    v['a']  # the key\n))"),
        ("lambda v: v['a'] + 1", "lambda v: (v['a'])+1"),
        ("lambda v: [w for w in v]", "lambda x: [w for w in x]"),
        ("lambda v: (lambda w: w + v)(1)", "lambda a: (lambda b: b + a)(1)"),
        ("by('a')", "by(name='a')"),
    ],
)
def test_same_function_in_another_notation_keeps_its_identity(tmp_path: Any, text: str, other: str) -> None:
    assert identity(tmp_path, text) == identity(tmp_path, f"None\n\n\nfunction = {other}", file="moved.py")


def test_a_constant_that_a_lambda_names_is_part_of_its_identity(tmp_path: Any) -> None:
    one, other = (identity(tmp_path, "lambda v: v[FIELD]", field=field) for field in "ab")
    assert one != other


def test_lambdas_in_one_line_are_distinguished() -> None:
    one, other = (lambda v: v["a"]), (lambda v: v["b"])
    assert function_identity(one) != function_identity(other)
    assert function_identity(one) == function_identity(lambda v: v["a"])


def test_identity_of_a_lambda_stays_the_same() -> None:
    # It is written to journals: if it changes, unchanged jobs are refused.
    assert function_identity(lambda v: (v["a"], f"{v['b']!r:>3}", -1, v.c[1:2])) == "lambda 52ad51cd0a97"


def test_function_without_source_is_identified_by_its_bytecode_and_marked() -> None:
    one, other = eval('lambda v: v["a"]'), eval('lambda v: v["b"]')
    assert function_identity(one).startswith(BYTECODE)
    assert function_identity(one) != function_identity(other)
    assert not comparable(function_identity(one), function_identity(lambda v: v["a"]))
    assert not comparable(function_identity(one), function_identity(one).replace("-3.", "-2."))
    assert comparable(function_identity(one), function_identity(other))


def test_identity_is_bounded_and_contains_no_address(tmp_path: Any) -> None:
    def around(big: Any) -> Callable[[Any], Any]:
        def key(value: Any) -> Any:
            return big

        return key

    for big in ("x" * 100_000, list(range(100_000)), {"a": object()}, object(), [[[[[[1]]]]]]):
        text = function_identity(around(big))
        assert len(text) < 500
        assert "0x" not in text


def test_function_that_refers_to_itself_has_an_identity() -> None:
    def key(value: Any) -> Any:
        return key if value else loop

    loop: list[Any] = []
    loop.append(loop)
    assert function_identity(key).startswith("function ")


def test_no_code_of_the_user_is_called() -> None:
    class Odd:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for")

        def __repr__(self) -> str:
            raise AssertionError("repr was called")

        def __call__(self, value: Any) -> Any:
            raise AssertionError("it was called")

    assert "Odd" in function_identity(Odd())
    assert "Odd" in function_identity(functools.partial(Odd(), Odd()))
    assert "Odd" in function_identity(operator.itemgetter(Odd()))
