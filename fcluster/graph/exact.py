"""Sums of numbers without rounding, as plain data: for what is added and taken away again.

Responsible for: sums from which a number can be taken away as if it had never been there. A float is a whole
number divided by a power of two, and so is any sum of floats. Pure.

    5          a sum of ints
    [11, 2]    a sum with floats: 11 / 2**2
    2.75       a sum with floats, of an older version

A sum with Decimals is that of `decimals`.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, cast

from fcluster.graph import decimals

Exact = tuple[int, int]
"""A number: a whole number, and the power of two by which it is divided."""


def exact(number: Any) -> Exact:
    """An int, a float or a sum.

    Raises:
        TypeError: it is something else.
        ValueError, OverflowError: it isn't finite.
    """
    if isinstance(number, int):
        return number, 0
    if isinstance(number, float):
        above, below = number.as_integer_ratio()
        return above, below.bit_length() - 1
    if isinstance(number, list):
        above, power = cast("list[int]", number)
        return above, power
    raise TypeError(f"{number!r} is neither an int nor a float")


def shifted(total: Any, number: Any, sign: int) -> Any:
    """The sum `total` with `number` added, or taken away if `sign` is -1.

    What isn't a number is added as Python does it.

    Raises:
        TypeError: the number can't be added.
        ValueError, OverflowError: it isn't finite.
    """
    if isinstance(number, int) and isinstance(total, int):
        return total + sign * number
    if not isinstance(number, int | float) or not isinstance(total, int | float | list):
        if isinstance(number, Decimal) or isinstance(total, dict):
            return decimals.shifted(total, number, sign)
        return decimals.plus(total, number if sign > 0 else -number)
    return _kept(_added(exact(total), exact(number), sign))


def squared(total: Any, number: Any, sign: int) -> Any:
    """Like `shifted`, with the square of the number."""
    if isinstance(number, int) and isinstance(total, int):
        return total + sign * number * number
    if isinstance(number, Decimal) or isinstance(total, dict):
        return decimals.shifted(total, number, sign, squares=True)
    above, power = exact(number)
    return _kept(_added(exact(total), (above * above, 2 * power), sign))


def rounded(total: Any) -> Any:
    """The sum as a number: an int if all numbers were ints, a Decimal if there are some, otherwise the
    nearest float.

    Raises:
        OverflowError: it is too large for a float.
    """
    if isinstance(total, dict):
        return decimals.sum_of(cast("dict[str, Any]", total))
    return quotient(exact(total), 1) if isinstance(total, list) else total


def mean_of(total: Any, number: int) -> Any:
    """The mean of that many numbers with this sum: a Decimal of Decimals, otherwise a float.

    Raises:
        OverflowError: it is too large for a float.
    """
    if isinstance(total, int | float | list):
        return quotient(exact(total), number)
    return decimals.divided(rounded(total), number)


def variance_of(number: int, total: Any, squares: Any, divisor: int) -> Any:
    """The variance of that many numbers: a Decimal of Decimals, otherwise a float.

    Args:
        total: their sum.
        squares: the sum of their squares.
        divisor: by which the sum of their squared distances from their mean is divided.

    Raises:
        OverflowError: it is too large for a float.
    """
    if isinstance(total, dict) or isinstance(squares, dict):
        return decimals.spread(number, rounded(total), rounded(squares), divisor)
    return quotient(sum_of_squared_distances(number, total, squares), number * divisor)


def quotient(total: Exact, divisor: int) -> float:
    """The sum divided by an int, rounded once.

    Raises:
        OverflowError: it is too large for a float.
    """
    above, power = total
    return above / (divisor << power)


def sum_of_squared_distances(number: int, total: Any, squares: Any) -> Exact:
    """`number` times the sum of the squared distances of that many numbers from their mean.

    Args:
        total: their sum.
        squares: the sum of their squares.
    """
    (above, power), (above_squares, power_squares) = exact(total), exact(squares)
    return _added((number * above_squares, power_squares), (above * above, 2 * power), -1)


def _added(one: Exact, other: Exact, sign: int) -> Exact:
    (above, power), (other_above, other_power) = one, other
    common = max(power, other_power)
    return (above << common - power) + sign * (other_above << common - other_power), common


def _kept(total: Exact) -> list[int]:
    """In its shortest form, so that it doesn't depend on what was there before."""
    above, power = total
    if not above:
        return [0, 0]
    zeros = min(power, (above & -above).bit_length() - 1)
    return [above >> zeros, power - zeros]
