"""Fold the adapter of a run (or of an adapter directory) into its base, and write one ordinary model.

The merged model's logits are compared with those of base and adapter apart before anything is written. The result has
the authors' tensor names and needs neither unmask nor peft to be read by the authors' own code.
"""

from __future__ import annotations

import argparse

from unmask.merging import merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run directory, or an adapter directory (adapter_config.json)")
    parser.add_argument("--output", metavar="DIR", required=True, help="where the merged model goes; must not exist")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="type of the merged weights (default: as the base is stored)",
    )


def run(args: argparse.Namespace) -> None:
    report = merge(args.run, args.output, dtype=args.dtype)
    print(
        f"{report.output}: merged in {report.dtype}; {report.kl:.1e} nats per token from base and adapter apart "
        f"(at most {report.tolerance:.0e}), largest difference of a log-probability {report.largest:.1e}"
    )
