"""Completions for a file of prompts, written as JSON lines.

  unmask generate runs/mine prompts.jsonl --output completions.jsonl --gen-length 128
  unmask generate owner/model prompts.jsonl --output completions.jsonl --num-samples 4 --temperature 0.9
  unmask generate owner/model prompts.jsonl --output fast.jsonl sampler.threshold=0.9 sampler.cache=dual

A row of FILE has `prompt`, a text or a list of messages; its other columns are kept. Each row of the output adds
`completion`, and `sample` (0, 1, ...) with --num-samples. Noise depends on the seed, the row and the sample alone, so
the same command writes the same file at any --batch-size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from unmask.api import open_model
from unmask.cli.decoding import add_sampler_arguments, check_temperature, chosen_sampler
from unmask.cli.eval_command import check_output
from unmask.cli.view import open_view
from unmask.errors import ConfigError, DataError
from unmask.noise import Noise
from unmask.rollout import draw_samples
from unmask.rows import prompt_of, read_rows
from unmask.runs import write_atomic
from unmask.types import PromptBatch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model directory, a run directory or a hub id")
    parser.add_argument("file", metavar="FILE", help="JSON lines, a JSON array, Parquet, CSV or a hub data set")
    parser.add_argument("--output", metavar="FILE", required=True, help="JSON lines file to write")
    parser.add_argument("--split", default="train", help="of a hub data set (default: train)")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="completions per prompt (default: 1)")
    add_sampler_arguments(parser)
    parser.add_argument("--gen-length", type=int, default=128, metavar="N", help="canvas tokens (default: 128)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="completions at a time (default: 32)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("options", nargs="*", metavar="sampler.KEY=VALUE", help="further settings of the sampler")


def run(args: argparse.Namespace) -> None:
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1. Try 1.")
    check_output(Path(args.output))
    rows = prompts(args.file, args.split)
    named = chosen_sampler(args, args.options, args.gen_length)
    check_temperature(args.num_samples, named)
    sampler = named.value
    policy = open_model(args.model)
    texts = [policy.render(row["prompt"]) for row in rows for _ in range(args.num_samples)]
    ids, mask = policy.encode_prompts(texts, sampler.gen_length)
    numbers = torch.arange(len(texts), device=policy.device)
    batch = PromptBatch(ids, mask, numbers // args.num_samples, numbers % args.num_samples)
    with open_view(args.quiet) as view:
        view.stage("generating", len(texts))
        noise = Noise(args.seed).stream("generate")
        options: dict[str, Any] = {"noise": noise, "batch_size": args.batch_size, "on_rows": view.advance}
        (samples,) = draw_samples(policy, sampler, [(batch, None)], ids[:1], **options)
        completions = policy.decode(samples.completion_ids)
    lines = []
    for number, completion in enumerate(completions):
        extra = {"sample": number % args.num_samples} if args.num_samples > 1 else {}
        row = {**rows[number // args.num_samples], "completion": completion, **extra}
        lines.append(json.dumps(row, ensure_ascii=False))
    write_atomic(Path(args.output), "\n".join(lines) + "\n")
    print(f"{len(completions):,} completions of {len(rows):,} prompts written to {args.output}")


def prompts(source: str, split: str) -> list[dict]:
    """Rows with a prompt. Raises: DataError with the place of the first row without one."""
    found = []
    for where, row in read_rows(source, split, "FILE"):
        prompt_of(row, where)
        found.append(dict(row))
    if not found:
        raise DataError(f"{source}: holds no rows. Give one JSON object per line with a prompt.")
    return found
