"""What runs came to: their rows before and after, and learning curves with --figure.

unmask report runs/mine
unmask report runs/seed0 runs/seed1 --figure curves.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from unmask.cli.eval_command import check_output
from unmask.cli.view import print_rows
from unmask.figures import check_figure
from unmask.report import draw_curves, load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--figure", metavar="FILE", help="draw accuracy, reward, ELBO and KL over updates")


def run(args: argparse.Namespace) -> None:
    if args.figure:
        check_figure(Path(args.figure))
        check_output(Path(args.figure), "--figure")
    runs = [load_run(Path(path)) for path in args.runs]
    rows = [
        (f"{r['name']} {name}", row) for r in runs for name in ("base", "final") for row in r["summary"].get(name, [])
    ]
    if rows:
        print_rows(rows, "before and after")
    for entry in runs:
        if not entry["summary"]:
            print(f"{entry['name']}: not finished; {len(entry['metrics'])} batches so far")
    if args.figure:
        draw_curves([Path(path) for path in args.runs], Path(args.figure))
        print(f"curves drawn in {args.figure}")
