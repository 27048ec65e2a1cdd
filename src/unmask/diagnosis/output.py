"""A diagnosis as tables and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.figures import load_pyplot, save_figure
from unmask.tables import markdown_table

Table = tuple[str, list[str], list[list[str]]]
"""Title, column names and rows of text; the first column names the row."""


def tables(found: dict[str, Any]) -> list[Table]:
    """All tables of a diagnosis, in reading order."""
    made = [
        estimator_table(found),
        gap_table(found, "gap_by_length", "length"),
        gap_table(found, "gap_by_reward", "reward"),
    ]
    if found["reference"]:
        made.insert(1, difference_table(found))
    return made


def headline(found: dict[str, Any]) -> str:
    """What was measured, in one sentence."""
    exact = found["exact"]
    against = f", reference {found['reference']}" if found["reference"] else ""
    return (
        f"{found['model']} on {found['task']} ({found['data']}){against}: {found['num_completions']} completions by "
        f"{found['sampler']} at temperature {found['temperature']:g}, {found['length']} open tokens each, seed "
        f"{found['seed']}. Exact log p {exact['log_p']['mean']:.3f} nats, ELBO gap {exact['elbo_gap']['mean']:.3f} "
        f"± {exact['elbo_gap']['standard_error']:.3f}."
    )


def estimator_table(found: dict[str, Any]) -> Table:
    """Bias and spread of estimates of log p."""
    columns = [
        "estimator",
        "used by",
        "forwards",
        "mean - log p",
        "its sd",
        "mean - ELBO",
        "below log p %",
        "sd a draw",
        f"sd at {found['budget']} forwards",
        "rank corr.",
        "rank corr. of a draw",
        "draws: z",
    ]
    rows = [
        [
            row["name"],
            row["used_by"],
            str(row["forwards"]),
            signed(row["bias"]) + ("" if row["moments"] == "exact" else f" ± {row['draws']['standard_error']:.3f}"),
            number(row["bias_sd"]),
            signed(row["bias_elbo"]),
            f"{100 * row['below_log_p']:.0f}",
            number(row["sd"]),
            number(row["sd_equal_cost"]),
            number(row["spearman"]),
            number(row["spearman_one_draw"]),
            signed(row["draws"]["z"], 1) if "z" in row["draws"] else "-",
        ]
        for row in found["estimators"]
    ]
    return "Estimates of log p, nats per completion", columns, rows


def difference_table(found: dict[str, Any]) -> Table:
    """Bias and spread of estimates of the log-ratio of two models on shared copies."""
    columns = [
        "estimator",
        "forwards",
        "mean - log-ratio",
        "its sd",
        "sd a draw",
        "sd, separate draws",
        f"sd at {found['budget']} forwards",
        "rank corr.",
        "rank corr. of a draw",
        "right sign of a draw %",
    ]
    rows = []
    for row in found["estimators"]:
        apart = row["difference"]
        rows.append(
            [
                row["name"],
                str(row["forwards"]),
                signed(apart["bias"]),
                number(apart["bias_sd"]),
                number(apart["sd"]),
                number(apart["sd_separate_draws"]),
                number(apart["sd_equal_cost"]),
                number(apart["spearman"]),
                number(apart["spearman_one_draw"]),
                f"{100 * apart['right_sign_one_draw']:.0f}",
            ]
        )
    mean = found["exact"]["log_ratio"]["mean"]
    return f"Estimates of log p - log p of the reference (exact mean {mean:.3f} nats)", columns, rows


def gap_table(found: dict[str, Any], key: str, by: str) -> Table:
    """How far bounds and the one-step likelihood lie from log p."""
    gammas = list(found[key][0]["eubo"])
    columns = [by, "completions", "log p", "log p - ELBO", "largest", "mean field - log p"]
    columns += [f"EUBO {gamma} - log p (below %)" for gamma in gammas]
    rows = [
        [
            str(row[by]),
            str(row.get("completions", found["num_completions"])),
            f"{row['log_p']['mean']:.3f}",
            with_error(row["elbo_gap"]),
            number(row["elbo_gap"]["largest"]),
            with_error(row["mean_field"]),
            *[f"{with_error(row['eubo'][g])} ({100 * row['eubo'][g]['below_log_p']:.0f})" for g in gammas],
        ]
        for row in found[key]
    ]
    return f"Exact distance from log p by {by}, nats per completion ± standard error over completions", columns, rows


def number(value: float) -> str:
    """Three decimals; "-" where undefined."""
    return "-" if value != value else f"{value:.3f}"


def signed(value: float, digits: int = 3) -> str:
    """With its sign; zero has none."""
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text


def with_error(values: dict[str, float]) -> str:
    """Mean ± standard error."""
    error = values["standard_error"]
    return signed(values["mean"]) + ("" if error != error else f" ± {error:.3f}")


def markdown(found: dict[str, Any]) -> str:
    """The whole diagnosis as Markdown."""
    parts = ["# Likelihood estimators against enumeration", headline(found)]
    for title, columns, rows in tables(found):
        parts += [f"## {title}", markdown_table(columns, *rows)]
    return "\n\n".join(parts) + "\n"


def draw_figure(found: dict[str, Any], file: Path) -> None:
    """Four panels: bias with spread, spread of the difference (or spread), gap by length, gap by reward."""
    figure, axes = load_pyplot().subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    _draw_biases(axes[0, 0], found)
    _draw_spreads(axes[0, 1], found)
    _draw_by_length(axes[1, 0], found)
    _draw_by_reward(axes[1, 1], found)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    save_figure(figure, file)


def _draw_biases(axis: Any, found: dict[str, Any]) -> None:
    rows = found["estimators"][::-1]
    spread = [row["sd_equal_cost"] for row in rows]
    axis.errorbar([row["bias"] for row in rows], range(len(rows)), xerr=spread, fmt="o", markersize=4, capsize=2)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvline(-found["exact"]["elbo_gap"]["mean"], color="grey", linestyle="--", linewidth=0.8)
    _name_rows(axis, rows)
    axis.set_title(f"mean - log p, bars: sd at {found['budget']} forwards; dashed: ELBO", fontsize=10)
    axis.set_xlabel("nats per completion")


def _draw_spreads(axis: Any, found: dict[str, Any]) -> None:
    rows = found["estimators"][::-1]
    if found["reference"]:
        shared = [row["difference"]["sd_equal_cost"] for row in rows]
        separate = [row["difference"]["sd_separate_draws"] * (row["forwards"] / found["budget"]) ** 0.5 for row in rows]
        axis.plot(separate, range(len(rows)), "x", color="grey", label="separate draws")
        axis.plot(shared, range(len(rows)), "o", markersize=4, label="shared draws")
        axis.legend(fontsize=8)
        axis.set_title(f"sd of the estimated log-ratio at {found['budget']} forwards", fontsize=10)
    else:
        axis.plot([row["sd_equal_cost"] for row in rows], range(len(rows)), "o", markersize=4)
        axis.set_title(f"sd at {found['budget']} forwards", fontsize=10)
    _name_rows(axis, rows)
    axis.set_xlabel("nats per completion")


def _name_rows(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)


def _draw_by_length(axis: Any, found: dict[str, Any]) -> None:
    rows = found["gap_by_length"]
    lengths = [row["length"] for row in rows]

    def line(label: str, cells: list[dict[str, float]], sign: int = 1) -> None:
        means = [sign * cell["mean"] for cell in cells]
        axis.errorbar(
            lengths, means, yerr=[cell["standard_error"] for cell in cells], marker="o", markersize=3, label=label
        )

    line("ELBO", [row["elbo_gap"] for row in rows], -1)
    line("mean field", [row["mean_field"] for row in rows])
    for gamma in rows[0]["eubo"]:
        line(f"EUBO {gamma}", [row["eubo"][gamma] for row in rows])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.legend(fontsize=8)
    axis.set_title("distance from log p by number of open tokens", fontsize=10)
    axis.set_xlabel("open tokens")
    axis.set_ylabel("nats per completion")


def _draw_by_reward(axis: Any, found: dict[str, Any]) -> None:
    rows = found["completions"]
    axis.plot([row["reward"] for row in rows], [row["log_p"] - row["elbo"] for row in rows], ".", alpha=0.5)
    axis.set_title(f"log p - ELBO by reward, {found['length']} open tokens", fontsize=10)
    axis.set_xlabel("reward")
    axis.set_ylabel("nats per completion")
