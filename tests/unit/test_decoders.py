"""Decoders of structs are created when their module is imported, not at the first use (decision 0086)."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fcluster"
PREPARED = {"schema_registry/formats.py"}
"""Files that create a decoder of the type first, when it is declared: there is none for `msgspec.convert`."""


def test_no_struct_is_first_decoded_in_a_thread() -> None:
    """msgspec crashes the process if two threads are the first to decode a type. A `type=` at the call allows
    that, a decoder in the module doesn't."""
    lazy = re.compile(r"msgspec\.(json|msgpack)\.decode\([^#]*\btype=|msgspec\.convert\(")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if str(path.relative_to(PACKAGE)) not in PREPARED
        for line in path.read_text(encoding="utf-8").splitlines()
        if lazy.search(line)
    ]
    assert found == []
