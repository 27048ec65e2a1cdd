"""The `unmask` command: one small module per sub-command, imported when it is asked for.

`unmask --help` answers without importing torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from unmask import __version__
from unmask.errors import ConfigError, Stopped, UnmaskError

# OpenMP threads that spin while they wait cost a factor of 30 as soon as anything else uses a core: on two cores shared
# by two processes an update took 2.1 s instead of 0.065 s. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = {
    "train": "reinforcement learning from a recipe",
    "sft": "supervised training on demonstrations",
    "eval": "accuracy of a model on a task, with intervals",
    "sample": "one completion, shown as it is revealed",
    "generate": "completions for a file of prompts",
    "reward": "what a recipe's reward says about completions; a run's rollouts judged again",
    "lm_eval": "lm-evaluation-harness, with --model unmask",
    "merge": "one ordinary model out of an adapter and its base",
    "estimate": "memory, FLOPs and hours of a recipe on a machine that need not be here",
    "bench": "sampler settings by speed and accuracy, the fastest within a point named",
    "diagnose": "bias, variance and cost of likelihood estimators, against exact enumeration",
    "compare": "several algorithms with equal rollouts: one table over seeds, one figure",
    "data": "a look at a data file; preference pairs out of a run's rollouts",
    "report": "tables and learning curves of runs",
    "energy": "what the energy model of a dga run has learned",
    "replay": "look into the batch that broke an update",
    "doctor": "what this machine has and lacks, and what mends it",
    "sandbox": "judges programs for trainers on other machines, over HTTP",
    "list": "the registered algorithms, tasks, samplers and models",
}

PASSED_ON = ("lm_eval",)
"""Commands of other packages, which read their arguments themselves."""

_EPILOG = """examples:
  unmask train recipes/sudoku-espo.toml                     the demo: base, RL, evaluation
  unmask train recipes/sudoku-espo.toml seed=1 algorithm.num_masks=2 --output runs/mine
  unmask eval runs/mine --task sudoku --num-steps 16
  unmask list algorithms

`unmask COMMAND --help` explains a command. Documentation: README.md and docs/."""


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option as any other bad input, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.rstrip('.')}. See `{self.prog} --help`.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 with one line on standard error for anything the user can mend."""
    args = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(
        prog="unmask",
        description="Reinforcement learning for masked diffusion language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"unmask {__version__}")
    commands = "\n".join(f"{name:10s}{about}" for name, about in COMMANDS.items())
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help=commands.replace("\n", "; "))
    try:
        return run(parser.parse_args(args[:1]).command, args[1:])
    except UnmaskError as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 1
    except OSError as error:
        print(f"OSError: {' '.join(str(error).split())}. Check the path and the disk.", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run(name: str, args: Sequence[str]) -> int:
    """The sub-command with its own arguments; options and key=value arguments may stand in any order."""
    command = importlib.import_module(f"unmask.cli.{name}_command")
    if name in PASSED_ON:
        return int(command.run(args) or 0)
    parser = OneLineParser(
        prog=f"unmask {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    return int(command.run(parser.parse_intermixed_args(args)) or 0)
