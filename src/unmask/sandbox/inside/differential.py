"""Judging by comparison with a reference: for tests that give inputs and a right program instead of expected values.

Used by the helper code of such tasks, in the judge; the reference is trusted and runs there. It has a namespace of its
own, so that no name of the program, and no function of it that is named like one of Python's, is called by mistake.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

RELATIVE = 1e-7
"""Added to the absolute tolerance, times the expected number; EvalPlus's value."""
FLOATS = 1e-6
"""Absolute tolerance for expected floats where a task names none; EvalPlus's value."""


def is_close(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether two numbers, or lists or tuples of them of the same sizes, differ by the tolerance at most."""
    if isinstance(expected, list | tuple):
        is_same = isinstance(found, list | tuple) and len(found) == len(expected)
        return is_same and all(is_close(f, e, tolerance) for f, e in zip(found, expected, strict=True))
    kinds = int | float | complex
    if not isinstance(expected, kinds) or not isinstance(found, kinds):
        return bool(found == expected)
    if found == expected or (found != found and expected != expected):
        return True
    distance = abs(found - expected)  # of infinities: inf or nan
    return math.isfinite(distance) and distance <= tolerance + RELATIVE * abs(expected)


def agrees(found: Any, expected: Any, tolerance: float) -> bool:
    """EvalPlus's comparison: equal, or of the same type and close if the task has a tolerance or a float or only floats
    are expected."""
    items = expected if isinstance(expected, list | tuple) else [expected]
    if not tolerance and items and all(isinstance(item, float) for item in items):
        tolerance = FLOATS
    may_differ = bool(tolerance) and type(found) is type(expected)
    return bool(found == expected) or (may_differ and is_close(found, expected, tolerance))


# ---- tasks whose answers are not unique


def same_set(found: Any, expected: Any, arguments: Sequence[Any], tolerance: float) -> bool:
    return set(found) == set(expected)


def both_none(found: Any, expected: Any, arguments: Sequence[Any], tolerance: float) -> bool:
    """Something or nothing: what the reference returns cannot be compared. A truth value says the same."""
    there = expected if isinstance(expected, bool) else expected is not None
    return there == (found if isinstance(found, bool) else found is not None)


def root(found: Any, expected: Any, arguments: Sequence[Any], tolerance: float) -> bool:
    """Of the polynomial whose coefficients are the argument, lowest power first; any root will do."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        return False
    (coefficients,) = arguments
    return abs(sum(c * math.pow(found, power) for power, c in enumerate(coefficients))) <= tolerance


def padded_digits(found: Any, expected: Any, arguments: Sequence[Any], tolerance: float) -> bool:
    """Sum of the digits' distances: the reference's, or with the shorter number filled up by zeros."""
    first, second = map(str, arguments)
    width = max(len(first), len(second))
    pairs = zip(first.zfill(width), second.zfill(width), strict=True)
    return bool(found == expected) or found == sum(abs(int(a) - int(b)) for a, b in pairs)


def upright_pyramid(found: Any, expected: Any, arguments: Sequence[Any], tolerance: float) -> bool:
    """Surface of a square pyramid, its height taken along the slope (the reference's) or upright."""
    base, height = arguments
    upright = round(base**2 + 2 * base * math.sqrt((base / 2) ** 2 + height**2))
    return bool(found == expected) or is_close(found, upright, tolerance)


def anything(found: Any, expected: Any, arguments: Sequence[Any], tolerance: float) -> bool:
    """Mbpp/164: whatever is returned."""
    return True


def or_zero(found: Any, expected: Any, arguments: Sequence[Any], tolerance: float) -> bool:
    """Mbpp/295: the reference's value, or 0."""
    return bool(found == expected) or bool(found == 0)


SPECIAL: dict[str, Callable[[Any, Any, Sequence[Any], float], bool]] = {
    "find_zero": root, "digit_distance_nums": padded_digits, "surface_Area": upright_pyramid,
    "are_equivalent": anything, "sum_div": or_zero,
    **dict.fromkeys(("check_str", "text_match_three", "text_starta_endb"), both_none),
    **dict.fromkeys(
        (
            "similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
            "intersection_array", "find_dissimilar", "Diff",
        ),
        same_set,
    ),
}  # fmt: skip
"""By entry point: EvalPlus compares these otherwise."""


class Reference:
    """A right program, the inputs on which others are compared with it, and how."""

    def __init__(self, source: str, entry_point: str, inputs: Sequence[Sequence[Any]], tolerance: float):
        names: dict[str, Any] = {"__name__": "reference"}
        exec(compile(source, "<reference>", "exec", dont_inherit=True), names)
        self.function, self.inputs, self.tolerance = names[entry_point], inputs, tolerance
        self.special = SPECIAL.get(entry_point)

    def check(self, function: Callable[..., Any], number: int) -> None:
        """Raises: AssertionError if the function does not do with an input what the reference does."""
        arguments = self.inputs[number]
        expected = self.function(*copy.deepcopy(arguments))
        found = function(*copy.deepcopy(arguments))  # whose edits may come back
        if self.special is None:
            assert agrees(found, expected, self.tolerance), f"input {number}: another value"
        else:
            assert self.special(found, expected, arguments, self.tolerance), f"input {number}: another value"
