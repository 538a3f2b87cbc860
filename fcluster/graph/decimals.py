"""Sums, means and variances of Decimals that don't depend on the order of the numbers.

Responsible for: arithmetic without rounding. Python rounds the sum of two Decimals to 28 digits, or whatever
the context of the thread says. Here sums have all digits; what is divided is rounded once, at the end. Pure.

For groups of a table's rows, from which numbers are taken away again, a sum is plain data:

    5                                   a sum of ints
    {"int": 5, "-2": [330, 3]}          5 + 330 * 10**-2, the latter of three Decimals with two places
"""

from __future__ import annotations

from datetime import timedelta
from decimal import (
    MAX_EMAX,
    MIN_EMIN,
    ROUND_HALF_EVEN,
    Clamped,
    Context,
    Decimal,
    DecimalException,
    Inexact,
    InvalidOperation,
    Overflow,
    Rounded,
    Subnormal,
)
from typing import Any, Final, cast

from fcluster.common.failures import bounded_repr, type_of

DIGITS: Final = 28
"""How many digits means and variances have; means have more if the sum has."""
_SIZE_MAX: Final = 1_000
"""Decimals have at most so many digits, before the point or behind the zeros that follow it. So any sum of
them, and of their squares, is exact in the context below.
"""
_EXACT: Final = Context(
    prec=10_000, Emax=MAX_EMAX, Emin=MIN_EMIN, clamp=0, traps=[InvalidOperation, Inexact, Overflow]
)
_TAKEN: Final = Context(
    prec=_SIZE_MAX,
    Emax=_SIZE_MAX,
    Emin=-_SIZE_MAX,
    clamp=0,
    traps=[InvalidOperation, Inexact, Rounded, Overflow, Subnormal, Clamped],
)
_INTS: Final = "int"


def plus(total: Any, number: Any) -> Any:
    """The sum of what was added up so far and a number. Like `total + number`, but exact if one of them is a
    Decimal, and 0 can be added to any timedelta.

    Raises:
        TypeError: they can't be added.
        ValueError: it isn't a number, or has too many digits.
    """
    if isinstance(number, Decimal):
        _check(number)
        if type(total) is Decimal:
            return _EXACT.add(total, number)
    return joined(total, number)


def joined(total: Any, other: Any) -> Any:
    """Like `plus`, for two sums."""
    if isinstance(total, Decimal) or isinstance(other, Decimal):
        return _exactly_joined(total, other)
    if isinstance(other, timedelta) and _is_nothing(total):
        return other
    if isinstance(total, timedelta) and _is_nothing(other):
        return total
    return total + other


def divided(total: Any, number: int) -> Any:
    """The mean of that many numbers with this sum. Of Decimals it is a Decimal: rounded once, half to even,
    to `DIGITS` digits, or those of the sum if it has more.
    """
    if not isinstance(total, Decimal):
        return total / number
    digits = max(DIGITS, len(total.as_tuple().digits))
    return _rounding(digits).divide(total, number)


def spread(number: int, total: Decimal, squares: Decimal, divisor: int) -> Decimal:
    """The squared distances of numbers from their mean, added up and divided; rounded once, as in `divided`.

    Args:
        number: how many numbers there are.
        total: their sum.
        squares: the sum of their squares.
        divisor: what they are divided by.
    """
    distances = _EXACT.subtract(_EXACT.multiply(squares, number), _EXACT.multiply(total, total))
    return _rounding(DIGITS).divide(distances, number * divisor)


def square(number: Decimal) -> Decimal:
    """The square, exactly.

    Raises:
        ValueError: see `plus`.
    """
    _check(number)
    return _EXACT.multiply(number, number)


def mixed(other: str) -> TypeError:
    """Why a Decimal and something of another type aren't computed with together."""
    hint = "; of a float, take Decimal(str(number))" if other == "float" else ""
    return TypeError(
        f"Decimals and {other} values can't be computed with together: let the function return Decimals of "
        f"all of them{hint}"
    )


# --- groups -----------------------------------------------------------------------------------------------


def shifted(total: Any, number: Any, sign: int, *, squares: bool = False) -> Any:
    """The sum with a number added, or taken away if `sign` is -1. One of them is a Decimal, or has some.

    Args:
        squares: whether the number's square is added.

    Raises:
        TypeError, ValueError: see `plus`.
    """
    kept: dict[str, Any] = dict(cast("dict[str, Any]", total)) if isinstance(total, dict) else {_INTS: total}
    for one in (kept[_INTS], number):
        if not isinstance(one, int | Decimal):
            raise mixed("float" if isinstance(one, list) else type_of(one))  # a list: see `exact`
    if isinstance(number, Decimal):
        _check(number)
        exponent = cast("int", number.as_tuple().exponent)
        whole = int(number.scaleb(-exponent, _EXACT))
        if squares:
            exponent, whole = 2 * exponent, whole * whole
        above, count = kept.pop(str(exponent), (0, 0))
        above, count = above + sign * whole, count + sign
        if above or count:
            kept[str(exponent)] = [above, count]
    else:
        kept[_INTS] += sign * (number * number if squares else number)
    ints = kept.pop(_INTS)
    if not kept:
        return ints
    return {_INTS: ints, **dict(sorted(kept.items(), key=lambda scale: int(scale[0])))}


def sum_of(total: dict[str, Any]) -> Decimal:
    """The sum of a group with Decimals. It has as many places as the Decimal with the most."""
    scales = [(int(exponent), scale[0]) for exponent, scale in total.items() if exponent != _INTS]
    places = max(0, *(-exponent for exponent, _above in scales))
    whole = total[_INTS] * 10**places + sum(above * 10 ** (exponent + places) for exponent, above in scales)
    return Decimal(whole).scaleb(-places, _EXACT)


# --- helpers ----------------------------------------------------------------------------------------------


def _rounding(digits: int) -> Context:
    return Context(
        prec=digits,
        rounding=ROUND_HALF_EVEN,
        Emax=MAX_EMAX,
        Emin=MIN_EMIN,
        clamp=0,
        traps=[InvalidOperation, Overflow],
    )


def _check(number: Decimal) -> None:
    if not number.is_finite():
        raise ValueError(f"{number} can't be added up: filter such values out before")
    try:
        _TAKEN.plus(number)
    except DecimalException:
        raise ValueError(
            f"{bounded_repr(number, 60)} is too long to be added up exactly: it has digits more than "
            f"{_SIZE_MAX:,} places from the point, or more than {_SIZE_MAX:,} of them; round it before"
        ) from None


def _exactly_joined(total: Any, other: Any) -> Decimal:
    for one in (total, other):
        if not isinstance(one, int | Decimal):
            raise mixed("float" if isinstance(one, list) else type_of(one))  # a list: see `exact`
    return _EXACT.add(total, other)


def _is_nothing(total: Any) -> bool:
    return type(total) is int and total == 0
