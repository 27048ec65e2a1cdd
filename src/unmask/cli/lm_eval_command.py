"""lm-evaluation-harness with the model `unmask` in its registry; every argument is the harness's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unmask.optional import optional


def run(args: Sequence[str]) -> None:
    """The harness's command in this process. Raises: ConfigError if it is not installed; whatever it raises."""
    command = optional("lm_eval.__main__", "lm-eval").cli_evaluate
    before = sys.argv
    sys.argv = ["lm_eval", *args]  # where it looks for its arguments
    try:
        command()
    finally:
        sys.argv = before
