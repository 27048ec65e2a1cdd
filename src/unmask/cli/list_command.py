"""Names that recipes and options accept, with what stands behind them.

unmask list algorithms
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from unmask.config import describe
from unmask.models import MODELS
from unmask.objectives import ALGORITHMS
from unmask.samplers import SAMPLERS
from unmask.strategies import STRATEGIES
from unmask.tasks import TASKS

REGISTRIES: dict[str, Mapping[str, Any]] = {
    "algorithms": ALGORITHMS,
    "tasks": TASKS,
    "samplers": SAMPLERS,
    "models": MODELS,
    "strategies": STRATEGIES,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=list(REGISTRIES))
    parser.add_argument("--keys", action="store_true", help="also every configuration key with its default and meaning")


def run(args: argparse.Namespace) -> None:
    registry = REGISTRIES[args.what]
    width = max(map(len, registry)) + 2
    for name, entry in sorted(registry.items()):
        about = getattr(entry, "about", None) or (entry.__doc__ or "").strip().splitlines()[0]
        source = getattr(entry, "source", None) if isinstance(entry, type) else None
        is_cited = isinstance(source, str) and source not in about
        print(f"{name:{width}s}{about}{f' {source}' if is_cited else ''}")
        if args.keys and isinstance(entry, type):
            for key, kind, default, text in describe(entry):
                print(f"    {key} = {default}   ({kind})  {' '.join(text.split())}")
