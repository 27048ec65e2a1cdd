"""What a run would need and cost: parameters, peak memory by part, FLOPs and hours by phase. Nothing is loaded.

  unmask estimate recipes/sudoku-espo.toml
  unmask estimate recipes/llada/sudoku-espo.toml --gpu h100 --num-gpus 8
  unmask estimate my.toml model.lora.rank=32 --gpu a100-40 --num-gpus 4 --shard --json estimate.json
  unmask estimate my.toml --config LLaDA-8B/config.json --prompt-tokens 300 --gpu h200

The model's config.json is read, not its weights; with --config FILE any config.json stands in for it. Prompts are
counted where the task's data and the model's tokenizer are at hand. A warning names each phase that does not fit, and
every single setting that would make it fit. docs/estimate.md has the formulas. --dry-run of train and sft measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unmask.api import recipe_tables
from unmask.build import any_recipe
from unmask.cli.eval_command import check_output
from unmask.errors import ConfigError
from unmask.estimation import LABELS, Estimate, estimate_run
from unmask.estimation.footprint import PARTS
from unmask.estimation.machines import GIB, MACHINES, UTILISATION, Setting
from unmask.plan import size
from unmask.runs import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a TOML recipe, such as recipes/sudoku-espo.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as model.lora.rank=32")
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"{', '.join(MACHINES)}, or cpu: this computer (default: the GPU here, or cpu)"
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="devices that share the run (default: 1)")
    parser.add_argument(
        "--shard", action="store_true", help="FSDP2: weights, gradients and optimiser are divided (default: DDP)"
    )
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="length of a prompt (default: counted, or 200)")
    parser.add_argument("--config", metavar="FILE", help="a config.json in place of the model's")
    parser.add_argument(
        "--utilisation",
        metavar="X",
        help="share of the peak rate reached: 0.4, or by phase (rollout=0.3,score=0.45,update=0.4,evaluate=0.3)",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")


def run(args: argparse.Namespace) -> None:
    if args.json:
        check_output(Path(args.json))
    setting = Setting(
        machine=args.gpu or machine_here(),
        num_gpus=args.num_gpus,
        is_sharded=args.shard,
        prompt_tokens=args.prompt_tokens,
        utilisation=utilisation(args.utilisation),
        config=Path(args.config) if args.config else None,
    )
    estimate = estimate_run(any_recipe(*recipe_tables(args.recipe, args.overrides)), setting)
    show(estimate)
    if args.json:
        write_atomic(Path(args.json), json.dumps(estimate.tree(), indent=2) + "\n")
        print(f"estimate written to {args.json}")


def machine_here() -> str:
    """The entry that this computer's GPU is named after; "cpu" if it has none."""
    if not torch.cuda.is_available():
        return "cpu"
    found = torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties(0).total_memory
    name = found.lower().replace(" ", "").replace("geforce", "")
    close = [key for key in MACHINES if key.partition("-")[0] in name]
    if not close:
        raise ConfigError(f"--gpu: {found} is not in the table. Name the nearest of: {', '.join(MACHINES)}.")
    return min(close, key=lambda key: abs(MACHINES[key].memory * GIB - memory))


def utilisation(text: str | None) -> dict[str, float]:
    """Of every phase. Raises: ConfigError."""
    if text is None:
        return dict(UTILISATION)
    phases = {LABELS.get(key, key): key for key in UTILISATION}  # as they are shown
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0 < share <= 1 or (name and name not in phases):
            raise ConfigError(
                f"--utilisation {text}: must be a number above 0 and at most 1, or phase=number with phases "
                f"{', '.join(phases)}. Try 0.4, or rollout=0.3,update=0.4."
            )
        found |= {phases[name]: share} if name else dict.fromkeys(UTILISATION, share)
    return UTILISATION | found


def show(estimate: Estimate) -> None:
    """Tables on standard output, assumptions below, warnings on standard error."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    recipe, setting, lengths = estimate.recipe, estimate.setting, estimate.lengths
    share = 100 * estimate.num_trained / estimate.num_parameters
    kind = "FSDP2" if setting.is_sharded else "DDP"
    device = f"{setting.num_gpus} x {setting.machine}" + (f", {kind}" if setting.num_gpus > 1 else "")
    print(f"{'supervised training' if recipe.is_supervised else recipe.algorithm.name} on {device}")
    print(f"parameters  {estimate.num_parameters:,}, trained {estimate.num_trained:,} ({share:.3g} %)")
    if estimate.num_value:
        print(f"value model {estimate.num_value:,} parameters more, all trained")
    print(
        f"canvas      {lengths.mean_prompt:.1f} prompt tokens (longest {lengths.longest_prompt}) and "
        f"{lengths.completion} of completion; {estimate.num_masks} masked copies of each"
    )
    console.print(memory_table(estimate))
    print(f"peak        {size(estimate.peak)} in {estimate.peak_phase}, of {estimate.machine.usable:.1f} GiB usable")
    console.print(cost_table(estimate))
    for text in estimate.assumptions:
        print(f"assumed: {text}")
    for text in estimate.warnings:
        print(f"warning: {text}", file=sys.stderr)


def memory_table(estimate: Estimate) -> Table:
    """Parts by phase, for one device."""
    table = Table(title=Text("memory of one device at the peak of each phase"))
    table.add_column("part")
    for name in estimate.phases:
        table.add_column(name, justify="right")
    for part in PARTS:
        sizes = [parts[part] for parts in estimate.phases.values()]
        if any(sizes):
            table.add_row(part, *(size(n) if n else "-" for n in sizes))
    table.add_section()
    table.add_row("all", *(size(parts.total()) for parts in estimate.phases.values()))
    return table


def cost_table(estimate: Estimate) -> Table:
    """Passes of the whole run, all devices together."""
    table = Table(title=Text("passes of the whole run"))
    columns = ("pass", "forwards", "sequences", "backwards", "FLOPs by 2ND + 4ND", "FLOPs computed", "hours")
    for column in columns:
        table.add_column(column, justify="left" if column == "pass" else "right")
    for cost in estimate.costs:
        p = cost.passes
        numbers = (f"{p.forwards:,}", f"{p.sequences:,}", f"{p.backwards:,}")
        flops = (f"{cost.formula_flops:.2e}", f"{cost.device_flops:.2e}", f"{cost.hours:.3g}")
        table.add_row(LABELS.get(cost.name, cost.name), *numbers, *flops)
    table.add_section()
    totals = [sum(getattr(c, key) for c in estimate.costs) for key in ("formula_flops", "device_flops", "hours")]
    table.add_row("all", "", "", "", f"{totals[0]:.2e}", f"{totals[1]:.2e}", f"{totals[2]:.3g}")
    return table
