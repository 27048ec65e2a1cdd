"""What the commands that sample have in common: the sampler and its settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from unmask.api import decoding
from unmask.build import Named
from unmask.config import apply_overrides
from unmask.errors import ConfigError

PREFIX = "sampler."


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """--sampler, --num-steps, --block-length, --temperature and --seed."""
    parser.add_argument(
        "--sampler",
        default="low_confidence",
        help="sampler name (default: low_confidence; block-causal models need block_diffusion)",
    )
    parser.add_argument("--num-steps", type=int, metavar="N", help="denoising steps (default: one token per step)")
    parser.add_argument("--block-length", type=int, metavar="N", help="semi-autoregressive block (default: one block)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="noise at temperature above 0 (default: 0)")


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --task, --data, --split and --limit."""
    parser.add_argument("model", metavar="MODEL", help="a model, adapter or run directory, or a hub id")
    parser.add_argument("--task", required=True, help="task name; see `unmask list tasks`")
    parser.add_argument("--data", metavar="FILE", help="a data file of the task (default: its generated test split)")
    parser.add_argument("--split", default="test", help="split whose examples are taken (default: test)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples")


def split_options(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(words for the task, settings of the sampler from those that begin with "sampler.")."""
    own = [word for word in words if word.startswith(PREFIX)]
    settings = apply_overrides({}, [word.removeprefix(PREFIX) for word in own])
    return [word for word in words if word not in own], settings


def chosen_sampler(args: argparse.Namespace, words: Sequence[str], gen_length: int) -> Named:
    """The sampler of a command without a task. Raises: ConfigError for words that are no settings of a sampler."""
    others, settings = split_options(words)
    if others:
        raise ConfigError(f"{others[0]}: only settings of the sampler go here, such as {PREFIX}threshold=0.9.")
    return decoding(None, args.sampler, **sampler_fields(args) | {"gen_length": gen_length} | settings)


def check_temperature(num_samples: int, sampler: Named) -> None:
    """Raises: ConfigError for several samples that would all be the same."""
    if num_samples > 1 and getattr(sampler.value, "temperature", 1.0) == 0 and sampler.name != "random_remasking":
        raise ConfigError("--num-samples above 1 at temperature 0 writes the same again. Try --temperature 0.9.")


def sampler_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Settings that have an option of their own."""
    return {name: getattr(args, name) for name in ("num_steps", "block_length", "temperature")}
