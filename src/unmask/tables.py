"""Rows of text as Markdown and as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown_table(heading: Sequence[str], *rows: Sequence[str]) -> str:
    """A Markdown table, without a line's end behind it."""
    shown = [[text.replace("|", "\\|") for text in row] for row in (heading, ["---"] * len(heading), *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in shown)


def latex_table(heading: Sequence[str], *rows: Sequence[str], notes: Sequence[str] = ()) -> str:
    """A `tabular` in the style of booktabs, its first two columns to the left; notes stand above it as comments."""
    head, *lines = (" & ".join(map(escape, row)) + " \\\\" for row in (heading, *rows))
    return "\n".join(
        [
            "% \\usepackage{booktabs}",
            *(f"% {line}" for line in notes),
            f"\\begin{{tabular}}{{ll{'r' * (len(heading) - 2)}}}",
            "\\toprule",
            head,
            "\\midrule",
            *lines,
            "\\bottomrule",
            "\\end{tabular}",
        ]
    )


def escape(text: str) -> str:
    """Plain text as LaTeX; the minus of a number is a minus."""
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    written = "".join(special.get(character, character) for character in text)
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", written)
