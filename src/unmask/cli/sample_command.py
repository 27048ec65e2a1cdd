"""One completion, printed as its tokens are revealed; masked places are shown as dots.

unmask sample runs/mine "3102200002100320|"
unmask sample runs/mine "3102200002100320|" sampler.threshold=0.9
"""

from __future__ import annotations

import argparse
import sys

from torch import Tensor

from unmask.api import complete, open_model
from unmask.cli.decoding import add_sampler_arguments, chosen_sampler
from unmask.models import MaskedPolicy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model directory or a run directory")
    parser.add_argument("prompt", metavar="PROMPT", help="text of the prompt; with --chat, of one user message")
    parser.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    add_sampler_arguments(parser)
    parser.add_argument("--gen-length", type=int, default=16, metavar="N", help="canvas tokens (default: 16)")
    parser.add_argument("options", nargs="*", metavar="sampler.KEY=VALUE", help="further settings of the sampler")


def run(args: argparse.Namespace) -> None:
    sampler = chosen_sampler(args, args.options, args.gen_length).value
    policy = open_model(args.model)
    prompt = [{"role": "user", "content": args.prompt}] if args.chat else args.prompt
    show = CanvasPrinter(policy, args.gen_length)
    (text,) = complete(policy, [prompt], sampler, seed=args.seed, on_step=show)
    show.end()
    print(text)


class CanvasPrinter:
    """Prints each state of the completion: over the last one on a terminal, line by line elsewhere."""

    def __init__(self, policy: MaskedPolicy, gen_length: int):
        self.policy, self.gen_length, self.step = policy, gen_length, 0
        self.over = sys.stdout.isatty()

    def __call__(self, canvas: Tensor) -> None:
        self.step += 1
        ids = canvas[0, -self.gen_length :].tolist()
        tokens = ["." if i == self.policy.mask_token_id else self.policy.tokenizer.decode([i]) for i in ids]
        line = f"step {self.step:3d}  " + "".join(tokens).replace("\n", "⏎")
        print(line, end="\r" if self.over else "\n", flush=True)

    def end(self) -> None:
        if self.over:
            print()
