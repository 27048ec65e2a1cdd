"""The process that compares two mathematical answers with math-verify; started and killed by math_check.py.

Reads lines {"gold": ..., "answer": ...} and writes {"verdict": "correct" | "wrong" | "timeout"} for each. It imports
nothing of the package, so that it may be run as a file. Its memory is limited, its time by whoever waits for it.
"""

from __future__ import annotations

import json
import logging
import resource
import sys

MEMORY = 2 << 30
SECONDS = 5
"""Of math-verify's own limit, within which it ends quietly; the parent kills earlier."""

DECIMALS = 12
"""To which values are compared; by math-verify's own 6, 1.414214 would be the root of 2."""


def verdict(gold: str, answer: str) -> str:
    """math-verify's comparison of two LaTeX expressions."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException

    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    try:
        sides = [
            parse(f"\\boxed{{{text}}}", extraction_config=configs, parsing_timeout=SECONDS, raise_on_error=False)
            for text in (gold, answer)
        ]
        limits = {"float_rounding": DECIMALS, "timeout_seconds": SECONDS, "raise_on_error": False}
        return "correct" if all(sides) and verify(*sides, **limits) else "wrong"
    except TimeoutException:
        return "timeout"
    except (MemoryError, RecursionError):
        return "timeout"


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    print(json.dumps({"verdict": verdict("1", "1")}), flush=True)  # imports sympy before the first question's time runs
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"verdict": verdict(request["gold"], request["answer"])}), flush=True)


if __name__ == "__main__":
    main()
