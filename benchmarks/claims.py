"""Every online algorithm on the embedded tasks, and the papers' claims about them, by `unmask compare`.

    python benchmarks/claims.py search  --output runs/search                 learning rates, alike for every algorithm
    python benchmarks/claims.py compare --output runs/compare                all online algorithms, 4,096 rollouts each
    python benchmarks/claims.py claims  --task sudoku --output runs/claims   what the claims compare
    python benchmarks/claims.py rates runs/search                            the search as a table
    python benchmarks/claims.py judge runs/claims runs/compare               the claims with their intervals

The first three run for minutes to hours on a CPU and go on where they were stopped. A claim that A is better than B is
judged by the difference A - B of test accuracy, paired by seed, with its 95 % interval over seeds (docs/compare.md):
reproduced if all of the interval is above zero, not reproduced if all of it is below, else inconclusive. A claim that A
is no better than B is reproduced if the interval ends below +2 points, not reproduced if it begins above zero.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unmask.intervals import Interval, paired_difference

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TASKS = {"sudoku": RECIPES / "sudoku.toml", "sudoku_twice": RECIPES / "sudoku-twice.toml"}
GRID = "3e-4,1e-3,3e-3"
"""Learning rates of the search; where an end is the best, one beyond it is tried (--algorithms A,B --rates 1e-4)."""

RATES = {
    "espo": "1e-3",
    "diffu_grpo": "1e-3",
    "dga": "3e-4",
    "embr_e": "1e-3",
    "embr_c": "1e-3",
    "embr_u": "1e-3",
    "dmpo_wdce": "3e-4",
    "dmpo_wddo": "1e-3",
    "wd1": "3e-4",
    "unigrpo": "1e-3",
    "coupled_grpo": "1e-3",
    "sapo": "1e-3",
    "d_treerpo": "1e-3",
    "spg": "3e-4",
    "gdpo": "1e-3",
}
"""Learning rate of every online algorithm: the best of the search, on validation puzzles."""

RATE = ":optimizer.lr="

VALUE_RATES = {"dga": {"energy_lr": 1e-4 / 3e-6, "energy_trunk_lr": 1.0}, "embr_e": {"head_lr": 1e-4 / 3e-6}}
"""Learning rates of value models as multiples of the policy's: the ratio of the defaults, which are for 3e-6."""

MARGIN = 0.02
"""Share of accuracy below which "no better" counts as shown."""


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, as two arms: `arm` is claimed to be better than `other`, or no better."""

    text: str
    source: str
    arm: str
    other: str
    is_better: bool = True

    def verdict(self, difference: Interval | None) -> str:
        """By the interval of `arm` less `other`."""
        if difference is None or difference.low is None or difference.high is None:
            return "inconclusive"
        if self.is_better:
            return "reproduced" if difference.low > 0 else "not reproduced" if difference.high < 0 else "inconclusive"
        return "reproduced" if difference.high < MARGIN else "not reproduced" if difference.low > 0 else "inconclusive"


ESPO, DGA, EMBR, DMPO = "arXiv:2512.03759", "Diffusion-Gibbs Alignment", "EMBR", "arXiv:2510.08233"
KL = "espo:kl_coef=0.1"
UPDATES = "espo:num_iterations="
BUFFER = "dmpo_wdce:rollout.buffer.num_batches=4:rollout.buffer.collect_every=2"
CLAIMS = (
    Claim("a sequence-level ratio beats a token-level one", ESPO, "espo", "espo:level=token"),
    Claim("the ELBO beats the mean-field likelihood", ESPO, "espo", "espo:likelihood=mean_field"),
    Claim("k2 beats k1 (coefficient 0.1)", ESPO, KL, f"{KL}:kl=k1"),
    Claim("k2 beats k3 (coefficient 0.1)", ESPO, KL, f"{KL}:kl=k3"),
    Claim("diffu-GRPO is no better with k2 than with k3", ESPO, "diffu_grpo:kl=k2", "diffu_grpo", is_better=False),
    Claim("M = 2 draws beat M = 1", ESPO, "espo", "espo:num_masks=2"),
    Claim("M = 4 draws beat M = 2", ESPO, "espo:num_masks=8", "espo"),
    Claim("μ = 16 updates a batch are no better than 8", ESPO, f"{UPDATES}16", f"{UPDATES}8", is_better=False),
    Claim("μ = 2 updates a batch are no better than 8", ESPO, f"{UPDATES}2", f"{UPDATES}8", is_better=False),
    Claim("the ratio has to be divided by L", ESPO, "espo", "espo:ratio_scale=none"),
    Claim("a learned energy beats the raw reward", DGA, "dga", "dga:use_energy=false"),
    Claim("clipping the weights helps", DGA, "dga", "dga:weight_clip=inf"),
    Claim("the masked KL helps", DGA, "dga", "dga:kl_coef=0"),
    Claim("EMBR-U beats EMBR-C", EMBR, "embr_u", "embr_c"),
    Claim("EMBR-C beats EMBR-E", EMBR, "embr_c", "embr_e"),
    Claim("a baseline of the opposite reward beats none", DMPO, "dmpo_wdce", "dmpo_wdce:baseline=none"),
    Claim("a baseline of the opposite reward beats the mean", DMPO, "dmpo_wdce", "dmpo_wdce:baseline=group_mean"),
    Claim("WDCE beats WDDO", DMPO, "dmpo_wdce", "dmpo_wddo"),
    Claim("batches of a buffer between new ones help", DMPO, BUFFER, "dmpo_wdce"),
)

OWN = {"sudoku": {f"{UPDATES}8": "espo"}, "sudoku_twice": {f"{UPDATES}2": "espo"}}
"""What a task's recipe says anyway, so that the arm goes by the shorter name."""


def with_rate(arm: str, rate: float) -> str:
    """The arm with its policy's learning rate, and those of its value model in the published ratio to it."""
    values = VALUE_RATES.get(arm.split(":")[0], {})
    return ":".join([f"{arm}{RATE}{rate:g}", *(f"{key}={factor * rate:.3g}" for key, factor in values.items())])


def tuned(arm: str, task: str) -> str:
    """The arm with the rate of the search; on sudoku_twice lower by the ratio of ESPO's recipes for the two tasks."""
    return with_rate(arm, float(RATES[arm.split(":")[0]]) * (0.4 if task == "sudoku_twice" else 1.0))


def claim_arms(task: str) -> list[str]:
    """Every arm of a claim; on sudoku not those that `compare` has side by side already."""
    claims = [c for c in CLAIMS if task != "sudoku" or ":" in c.arm + c.other]
    return list(dict.fromkeys(OWN[task].get(arm, arm) for claim in claims for arm in (claim.arm, claim.other)))


def plan(args: argparse.Namespace) -> list[str]:
    """Words for `unmask compare`, without its output."""
    if args.step == "search":
        arms = [with_rate(name, float(rate)) for name in args.algorithms.split(",") for rate in args.rates.split(",")]
        settings = ["trainer.eval_every=0", "evaluation.final_split=validation", "evaluation.final_num_steps=[16]"]
        return [str(TASKS["sudoku"]), *settings, "--arms", ",".join(arms), "--seeds", "3", "--budget", "2048"]
    names = args.algorithms.split(",") if args.step == "compare" else claim_arms(args.task)
    words = [str(TASKS[args.task]), "--arms", ",".join(tuned(name, args.task) for name in names)]
    if args.step == "compare":
        return [*words, "--seeds", "0,1,2", "--budget", "4096"]
    steps = {"sudoku": 16, "sudoku_twice": 33}[args.task]
    settings = ["trainer.eval_every=0", f"evaluation.final_num_steps=[{steps}]"]
    return [*words, *settings, "--seeds", args.seeds, "--budget", str(args.budget)]


@dataclass(frozen=True)
class Table:
    """A table.json of `unmask compare`: {arm's label: {column: {seed: value}}}."""

    columns: dict[str, dict[str, dict[int, float]]]
    task: str
    budget: int
    accuracy: str

    @classmethod
    def read(cls, directory: Path) -> Table:
        tree: dict[str, Any] = json.loads((directory / "table.json").read_text(encoding="utf-8"))
        columns: dict[str, dict[str, dict[int, float]]] = {}
        for arm in tree["arms"]:
            of_arm = columns.setdefault(arm["label"], {})
            for seed, run in arm["runs"].items():
                for key, value in run["values"].items():
                    of_arm.setdefault(key, {})[int(seed)] = value
        recipe = Path(tree["recipe"])
        task = next((name for name, file in TASKS.items() if file.name == recipe.name), str(recipe))
        return cls(columns, task, tree["budget"], tree["accuracies"][0])

    def values(self, arm: str, column: str) -> Mapping[int, float]:
        """By seed, of the arm at whatever learning rate; empty if it is not there."""
        arm = OWN.get(self.task, {}).get(arm, arm)
        found = (columns for label, columns in self.columns.items() if arm_of(label) == arm)
        return next(found, {}).get(column, {})

    def difference(self, claim: Claim, column: str) -> Interval | None:
        """Of the claim's arms, paired by seed; None where one is missing."""
        return paired_difference(self.values(claim.arm, column), self.values(claim.other, column))


def pooled(tables: Sequence[Table]) -> list[Table]:
    """Tables of one task and budget as one: a comparison that was begun with other seeds or arms goes on in it.

    Raises: SystemExit for a seed of an arm that is there twice, and for an arm at two learning rates.
    """
    found: dict[tuple[str, int, str], Table] = {}
    for table in tables:
        first = found.setdefault((table.task, table.budget, table.accuracy), replace(table, columns={}))
        for label, columns in table.columns.items():
            seeds = columns.get(table.accuracy, {}).keys()
            if twice := first.columns.get(label, {}).get(table.accuracy, {}).keys() & seeds:
                raise SystemExit(f"{label}: seed {min(twice)} is in two of the directories. Leave one of them out.")
            other = next((own for own in first.columns if own != label and arm_of(own) == arm_of(label)), None)
            if other:
                raise SystemExit(f"{label} and {other}: one arm at two rates. Judge their directories one by one.")
            for key, values in columns.items():
                first.columns.setdefault(label, {}).setdefault(key, {}).update(values)
    return list(found.values())


def arm_of(label: str) -> str:
    """Without its learning rate."""
    return label.split(RATE)[0]


def judge(tables: Sequence[Table]) -> str:
    """The claims as Markdown, each by the first task and budget that has both of its arms."""
    tables = pooled(tables)
    lines = [
        "| claim | source | arms | accuracy, points | reward deviation | ESS | rollouts × seeds | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        table = next((t for t in tables if t.difference(claim, t.accuracy)), None)
        if table is None:
            continue
        found = table.difference(claim, table.accuracy)
        cells = (
            claim.text,
            claim.source,
            f"`{claim.arm}` less `{claim.other}`",
            shown(found, 100, 1),
            shown(table.difference(claim, "reward_std"), 1, 3),
            shown(table.difference(claim, "ess"), 1, 3),
            f"{table.budget:,} × {found.count if found else 0}",
            claim.verdict(found),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(found: Interval | None, factor: float, digits: int) -> str:
    """`+1.2 (-0.5 to +2.9)`, or a dash."""
    if found is None or found.low is None or found.high is None:
        return "-"
    mean, low, high = (f"{factor * value:+.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})"


def rates(tables: Sequence[Table]) -> str:
    """The search as Markdown: accuracy by learning rate, the best in bold, of equal ones the lowest rate."""
    found: dict[str, dict[float, float]] = {}
    for table in tables:
        for label, columns in table.columns.items():
            arm, _, rest = label.partition(RATE)
            (accuracy,) = columns[table.accuracy].values()  # of the one seed
            found.setdefault(arm, {})[float(rest.split(":")[0])] = accuracy
    tried = sorted({rate for by_rate in found.values() for rate in by_rate})
    lines = ["| algorithm | " + " | ".join(f"{rate:.0e}" for rate in tried) + " |", "|---|" + "---|" * len(tried)]
    for arm, by_rate in found.items():
        best = max(sorted(by_rate), key=lambda rate: by_rate[rate])
        cells = [f"{100 * by_rate[rate]:.1f}" if rate in by_rate else "-" for rate in tried]
        cells[tried.index(best)] = f"**{cells[tried.index(best)]}**"
        lines.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("search", "compare", "claims"):
        step = steps.add_parser(name)
        step.add_argument("--output", required=True)
        step.add_argument("--task", choices=TASKS, default="sudoku")
        step.add_argument("--algorithms", default=",".join(RATES), help="of the search and the comparison")
        step.add_argument("--rates", default=GRID, help="of the search")
        step.add_argument("--seeds", default="0,1,2,3,4", help="of claims")
        step.add_argument("--budget", type=int, default=1536, help="rollouts of an arm of claims")
        step.add_argument("--dry-run", action="store_true", help="print the command only")
    for name in ("rates", "judge"):
        steps.add_parser(name).add_argument("directories", nargs="+", type=Path)
    args = parser.parse_args(arguments)
    if args.step in ("rates", "judge"):
        tables = [Table.read(directory) for directory in args.directories]
        print(rates(tables) if args.step == "rates" else judge(tables))
        return 0
    command = [sys.executable, "-m", "unmask", "compare", *plan(args), "--output", args.output]
    print(" ".join(command), flush=True)
    return 0 if args.dry_run else subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
