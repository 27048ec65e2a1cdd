"""Where an answer stands in a completion, and what number it is. Bounded, linear in the text, and nothing is executed.

Three places: `\\boxed{...}`, behind `####`, and between <answer> and </answer>. Numbers are exact fractions.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_DIGITS = 30
"""Of a number that is read; a longer one is no number here."""

_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|[-+]?\.[0-9]+", re.ASCII)
_PLAIN = re.compile(r"([-+]?)([0-9]*)(?:\.([0-9]*))?", re.ASCII)
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?", re.ASCII)
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac(?:\{([^{}]*)\}\{([^{}]*)\}|([0-9])([0-9]))", re.ASCII)
_UNIT = re.compile(r"(?:\\text|\\mathrm|\\mbox)\{([^{}]*)\}$|(?<=[0-9.}])\s+([A-Za-z]{2}[A-Za-z. ]*)$", re.ASCII)
_NO_UNITS = frozenset(
    ("or", "and", "not", "no", "than", "less", "more", "half", "dozen", "hundred", "thousand", "million", "billion")
)
_CURRENCY = ("\\$", "$", "£", "€")


# ---- where


def last_answer(text: str, *, outer: bool = False) -> str | None:
    """What stands between the last <answer> that is closed later and the first </answer> behind it.

    `outer` starts at the first <answer> since the </answer> before, as the pattern <answer>(.*?)</answer> does. That
    pattern takes quadratic time on a text full of <answer>; a fixed number of searches does not.
    """
    opening, closing = "<answer>", "</answer>"
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    if start < 0:
        return None
    end = text.find(closing, start)
    if outer:
        start = text.find(opening, max(text.rfind(closing, 0, start), 0))
    return text[start + len(opening) : end]


def boxed(text: str, limit: int = 100) -> list[str]:
    """Contents of the outermost `\\boxed{...}` and `\\fbox{...}`, braces balanced, in their order; at most `limit`.

    An unclosed box is none. Linear in the text.
    """
    found: list[str] = []
    place = 0
    while len(found) < limit:
        starts = [s for s in (text.find("\\boxed{", place), text.find("\\fbox{", place)) if s >= 0]
        if not starts:
            break
        begin = text.find("{", min(starts)) + 1
        end = _closing(text, begin)
        if end < 0:
            break
        found.append(text[begin:end])
        place = end + 1
    return found


def _closing(text: str, begin: int) -> int:
    """Place of the brace that closes the one before `begin`; -1 if there is none. Escaped braces do not count."""
    depth, place = 1, begin
    while place < len(text):
        sign = text[place]
        if sign == "\\":
            place += 1
        elif sign == "{":
            depth += 1
        elif sign == "}":
            depth -= 1
            if not depth:
                return place
        place += 1
    return -1


def after_hash(text: str) -> str | None:
    """The rest of the line behind the last `####`."""
    _, mark, rest = text.rpartition("####")
    return rest.split("\n", 1)[0].strip() if mark else None


def last_number(text: str) -> str | None:
    """The last thing in the text that is written like a number."""
    found = None
    for match in _NUMBER.finditer(text):
        found = match[0]
    return found


# ---- which number


def parse_number(text: str, *, has_units: bool = True) -> Fraction | None:
    """The exact value of a number as people and models write it, or None.

    Read: sign, thousands commas (well placed), decimals, a/b, \\frac{a}{b}; around it white space, $...$, a currency
    sign, a percent sign (a unit, not a factor), a word for the unit, \\text{...} and a full stop. Not read: two
    numbers, an equation, a sum, an interval, scientific notation.
    """
    text = _bare(text, has_units)
    match = _FRACTION.fullmatch(text)
    if match:
        sign, above, below = match[1], match[2] or match[4] or "", match[3] or match[5] or ""
        return _ratio(_decimal(above.strip()), _decimal(below.strip()), -1 if sign == "-" else 1)
    above, slash, below = text.partition("/")
    if slash:
        return _ratio(_decimal(above.strip()), _decimal(below.strip()), 1)
    return _decimal(text)


def _bare(text: str, has_units: bool) -> str:
    """Without what may stand around a number."""
    if len(text) > 20 * MAX_DIGITS:
        return ""
    text = text.strip()
    for left, right in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
            text = text[len(left) : -len(right)].strip()
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "").replace("\\ ", " ").replace("−", "-")
    text = text.removesuffix(".").rstrip()
    unit = _UNIT.search(text) if has_units else None
    if unit and not _NO_UNITS & set((unit[1] or unit[2] or "").lower().replace(".", " ").split()):
        text = text[: unit.start()].rstrip()
    for mark in ("\\%", "%"):
        text = text.removesuffix(mark).rstrip()
    sign = text[:1] if text[:1] in ("-", "+") else ""
    text = text[len(sign) :].lstrip()
    for mark in _CURRENCY:
        if text.startswith(mark):
            text = text[len(mark) :].lstrip()
            break
    return sign + text


def _decimal(text: str) -> Fraction | None:
    if "," in text:
        if not _THOUSANDS.fullmatch(text):
            return None
        text = text.replace(",", "")
    match = _PLAIN.fullmatch(text)
    if match is None or not (match[2] or match[3]) or len(match[2] + (match[3] or "")) > MAX_DIGITS:
        return None
    whole, part = match[2] or "0", match[3] or ""
    value = Fraction(int(whole + part), 10 ** len(part))
    return -value if match[1] == "-" else value


def _ratio(above: Fraction | None, below: Fraction | None, sign: int) -> Fraction | None:
    return None if above is None or not below else sign * above / below
