"""Which names a misspelt one may have meant (pure)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_names(wanted: str, names: Iterable[str], at_most: int = 1) -> list[str]:
    """Up to `at_most` of `names` that `wanted` may have meant, the most likely first. Case doesn't count."""
    by_lower = {name.lower(): name for name in names}
    return [by_lower[name] for name in difflib.get_close_matches(wanted.lower(), by_lower, at_most, 0.6)]
