"""EvalPlus's native format: inputs and a canonical solution instead of expected values."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unmask.sandbox.literal import tree

Arguments = list[Any]
Restore = Callable[[Arguments], Sequence[Any]]


def evalplus(row: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a row of HumanEval+ or MBPP+; each input is a test. Raises: ValueError for an entry point that the
    canonical solution does not define."""
    name, prompt = row["entry_point"], row["prompt"]
    solution = row["canonical_solution"]
    if not defines(solution, name):
        solution = prompt + solution
        if not defines(solution, name):
            raise ValueError(f"entry_point {name!r} is not defined by canonical_solution, nor by prompt and it")
    inputs = [restored(row["task_id"], arguments) for key in ("base_input", "plus_input") for arguments in row[key]]
    if not inputs:
        raise ValueError("base_input and plus_input are empty, so nothing would be tested")
    reference = f"Reference({solution!r}, {name!r}, {inputs!r}, {float(row['atol'])!r})"
    return {
        "question": prompt,
        "solution": solution,
        "tests": [f"_reference.check({name}, {number})" for number in range(len(inputs))],
        "setup": "",
        "helpers": f"from math import inf, nan\nfrom differential import Reference\n_reference = {reference}\n",
        "names": [name],
        "runs_reference": True,
        "task_id": row["task_id"],
    }


def mended(test: str, task_id: str) -> str:
    """The tests of the original format, without their defects.

    numpy's `allclose` takes an empty list for any number. The helper of HumanEval+ 32 is called with the wrong
    arguments, so that every solution fails.
    """
    if task_id == "HumanEval/32":
        test = test.replace("_poly(*candidate(*inp), inp)", "abs(_poly(*inp, candidate(*inp)))")
    loose = "np.allclose(out, exp, rtol=1e-07, atol=atol)"
    return "from differential import is_close as _is_close\n" + test.replace(loose, "_is_close(out, exp, atol)")


def defines(source: str, name: str) -> bool:
    """Whether a program has a function of that name at its top."""
    try:
        body = tree(source).body
    except SyntaxError:
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in body)


# ---- what JSON has made lists of


def restored(task_id: str, arguments: Arguments) -> Sequence[Any]:
    """The arguments of a call with the types that they had before they were written as JSON."""
    kind, _, number = task_id.partition("/")
    restore = _RESTORE.get(int(number)) if kind == "Mbpp" else None
    return arguments if restore is None else restore(arguments)


def _each(change: Callable[[Any], Any]) -> Restore:
    return lambda arguments: [change(value) for value in arguments]


def _at(place: int, change: Callable[[Any], Any]) -> Restore:
    return lambda arguments: [change(value) if n == place else value for n, value in enumerate(arguments)]


def _list_of_tuples(value: list[Any]) -> list[Any]:
    return [tuple(item) for item in value]


def _tuple_of_tuples(value: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(item) if isinstance(item, list) else item for item in value)


def _all_tuples(value: Any) -> Any:
    return tuple(_all_tuples(item) for item in value) if isinstance(value, list) else value


def _sets(value: list[Any]) -> list[Any]:
    return [set(item) if isinstance(item, list) and item else {} for item in value]  # {}: EvalPlus's empty set


_RULES: list[tuple[Restore, tuple[int, ...]]] = [
    (_each(tuple), (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740,
                    744, 809)),
    (_each(_list_of_tuples), (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780)),
    (_at(0, _list_of_tuples), (75, 413, 444, 753)),
    (_at(0, tuple), (250, 307, 405, 446, 617, 720, 763, 808)),
    (_at(1, tuple), (106, 750)),
    (_each(_tuple_of_tuples), (259, 278, 401, 445)),
    (_each(_all_tuples), (580, 615, 791)),
    (_at(0, _sets), (115,)),
    (_at(0, lambda value: {key: tuple(item) for key, item in value.items()}), (722,)),
    (lambda arguments: [float(arguments[0]), complex(arguments[1])], (124,)),
    (_each(complex), (252,)),
]  # fmt: skip
_RESTORE = {number: restore for restore, numbers in _RULES for number in numbers}
"""By task of MBPP+: which of its arguments are no lists."""
