"""What a person sees while a command works: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from unmask.ranks import rank
from unmask.run_log import RevealedSample, SilentView, View

HEADLINES = {
    "reward": "reward",
    "accuracy": "accuracy",
    "kl": "KL",
    "elbo_per_token": "ELBO/token",
    "unique_completion_rate": "unique",
    "entropy": "entropy",
    "loss": "loss",
}
"""Numbers shown, and how they are called."""


class Pace:
    """Progress of one stage. The time left follows from the mean pace since the stage began in this process."""

    def __init__(self, title: str, total: int, done: int = 0):
        self.title, self.total, self.done, self.first = title, total, done, done
        self.started = time.monotonic()
        self.facts: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def seconds_left(self) -> float | None:
        """None before the first step."""
        made = self.done - self.first
        return self.seconds / made * (self.total - self.done) if made else None

    def headline(self) -> str:
        """The known numbers on one line."""
        return "  ".join(f"{name} {self.facts[key]:.3f}" for key, name in HEADLINES.items() if key in self.facts)


def clock(seconds: float | None) -> str:
    """12:34, or 1:02:03; --:-- if unknown."""
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class LiveView:
    """A redrawn block: progress with the time left, headline numbers, time by phase, a completion being revealed."""

    def __init__(self, console: Console):
        self.pace: Pace | None = None
        self.spent: dict[str, float] = {}
        self.revealed: RevealedSample | None = None
        self.live = Live(get_renderable=self.render, console=console, refresh_per_second=8, transient=False)
        self.live.start()

    def stage(self, title: str, total: int, done: int = 0) -> None:
        if self.pace is not None:
            self.note(f"{self.pace.title}: done in {clock(self.pace.seconds)}")
        self.pace, self.spent, self.revealed = Pace(title, total, done), {}, None

    def advance(self, amount: int = 1, **facts: float) -> None:
        if self.pace is not None:
            self.pace.done += amount
            self.pace.facts |= facts

    def batch(self, metrics: dict[str, float], sample: RevealedSample) -> None:
        self.advance(0, **metrics)
        self.revealed = sample

    def phases(self, timing: dict[str, float]) -> None:
        for name in ("collect", "score", "update", "evaluate"):
            self.spent[name] = self.spent.get(name, 0.0) + timing.get(name, 0.0)

    def note(self, text: str) -> None:
        self.live.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self.live.stop()

    def render(self) -> RenderableType:
        pace = self.pace
        if pace is None:
            return Text("starting")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            Text(pace.title, style="bold"),
            ProgressBar(total=max(1, pace.total), completed=pace.done, width=30),
            f"{pace.done}/{pace.total}",
            f"{clock(pace.seconds)} gone, {clock(pace.seconds_left)} left",
        )
        lines: list[RenderableType] = [grid]
        if pace.facts:
            lines.append(Text("  " + pace.headline()))
        total = sum(self.spent.values())
        if total:
            shares = "  ".join(f"{name} {100 * value / total:.0f} %" for name, value in self.spent.items() if value)
            lines.append(Text(f"  time: {shares}", style="dim"))
        if self.revealed:
            lines.append(reveal(self.revealed, time.monotonic()))
        return Group(*lines)


def reveal(sample: RevealedSample, now: float, steps_per_second: float = 6.0) -> Text:
    """The completion as it stood some steps into its making; the moment follows from the time."""
    steps = max(sample.reveal_step) + 1
    shown = int(now * steps_per_second) % (steps + 6)  # the finished state stays for six beats
    text = Text("  " + sample.prompt[-40:].replace("\n", "⏎"), style="dim")
    for token, step in zip(sample.tokens[:80], sample.reveal_step, strict=False):
        if step < shown:
            text.append(token.replace("\n", "⏎"), style="bold green" if step == shown - 1 else "green")
        else:
            text.append("·", style="dim")
    if shown >= steps:
        text.append(f"  reward {sample.reward:.2f}", style="dim")
    return text


class LineView:
    """A line at the start of each stage and every `seconds` within it, for logs and pipes."""

    def __init__(self, seconds: float = 10.0):
        self.seconds = seconds
        self.pace = Pace("", 0)
        self.last = time.monotonic()

    def stage(self, title: str, total: int, done: int = 0) -> None:
        self.pace = Pace(title, total, done)
        self.last = time.monotonic()
        print(f"{title}: {total} steps" + (f", {done} done before" if done else ""), flush=True)

    def advance(self, amount: int = 1, **facts: float) -> None:
        self.pace.done += amount
        self.pace.facts |= facts
        if time.monotonic() - self.last < self.seconds:
            return
        self.last = time.monotonic()
        pace = self.pace
        left = clock(pace.seconds_left)
        print(f"{pace.title}: {pace.done}/{pace.total}  left {left}  {pace.headline()}".rstrip(), flush=True)

    def batch(self, metrics: dict[str, float], sample: RevealedSample) -> None:
        self.advance(0, **metrics)

    def phases(self, timing: dict[str, float]) -> None: ...

    def note(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None: ...


@contextmanager
def open_view(quiet: bool = False) -> Iterator[View]:
    """The view that fits standard output; closed on the way out. Only the first process shows anything."""
    console = Console()
    silent = quiet or rank() != 0
    view: View = SilentView() if silent else LiveView(console) if console.is_terminal else LineView()
    try:
        yield view
    finally:
        view.close()


def print_rows(rows: Sequence[tuple[str, Mapping[str, Any]]], title: str) -> None:
    """Evaluation rows as a table."""
    wide = Console() if sys.stdout.isatty() else Console(width=160)
    table = Table(title=Text(title))
    shares = list(dict.fromkeys(key for _, row in rows for key in row if key.endswith("_accuracy")))  # what tasks add
    names = [f"{key.removesuffix('_accuracy')} %" for key in shares]
    for column in ("model", "data", "examples", "steps", "accuracy %", "95 % interval", *names, "nfe"):
        table.add_column(column, justify="left" if column in ("model", "data") else "right")
    for name, row in rows:
        low, high = row["ci95"]
        extra = [f"{100 * row[key]:.1f}" if key in row else "-" for key in shares]
        table.add_row(
            Text(name),
            Text(str(row["data"]).rsplit("/", 1)[-1]),
            str(row["num_examples"]),
            str(row["num_steps"]),
            f"{100 * row['accuracy']:.1f}",
            f"{100 * low:.1f} - {100 * high:.1f}",
            *extra,
            f"{row['nfe_per_completion']:.0f}",
        )
    wide.print(table)
