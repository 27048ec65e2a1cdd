"""Where answers stand and what they are worth: a table of real forms, near misses, and texts made to hurt."""

from __future__ import annotations

import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.tasks.answers import after_hash, boxed, last_answer, last_number, parse_number
from unmask.tasks.tags import soft_format, strict_format, tag_count

NUMBERS = {
    "18": 18, " 18 ": 18, "18.": 18, "18.0": 18, "$18": 18, "\\$18": 18, "$18$": 18, "\\(18\\)": 18, "£18": 18,
    "€ 18": 18,
    "18 dollars": 18, "18 dollars.": 18, "18\\text{ cm}": 18, "18 \\mathrm{kg}": 18, "18%": 18, "18\\%": 18,
    "18 miles": 18,
    "1,234": 1234, "1,234,567": 1234567, "1{,}234": 1234, "2\\,000": 2000, "\\$1,234.50": Fraction(2469, 2),
    "-5": -5, "−5": -5, "+5": 5, "-$5": -5, "- 5": -5, ".5": Fraction(1, 2), "5.": 5, "0.125": Fraction(1, 8),
    "3/4": Fraction(3, 4), "-3/4": Fraction(-3, 4), "3 / 4": Fraction(3, 4), "\\frac{3}{4}": Fraction(3, 4),
    "-\\dfrac{3}{4}": Fraction(-3, 4), "\\frac34": Fraction(3, 4), "\\tfrac{-3}{4}": Fraction(-3, 4), "007": 7,
}  # fmt: skip
NO_NUMBERS = [
    "", " ", ".", "-", "$", "x", "x=3", "3+4", "3-4", "18 or 19", "18, 19", "4 2", "1,23", "12,34", "1,2345", ",123",
    "1,,234",
    "1e5", "1/0", "\\frac{1}{0}", "(18)", "[18]", "{18}", "18 19", "eighteen", "18²", "١٨", "1_000", "0x12", "9" * 31,
    "1/2/3", "--5", "5-", "1.2.3", "\\frac{1}{\\frac{1}{2}}", "nan", "inf", "\\boxed{18}", "5x", "2i", "12 or less",
    "3 and", "5e", "18 million", "18 not", "5 \\text{ or less}", "18cm",
]  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_as_people_write_them(text):
    assert parse_number(text) == NUMBERS[text]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_single_number(text):
    assert parse_number(text) is None


def test_boxes():
    assert boxed("a \\boxed{1} b \\boxed{\\frac{1}{2}} \\boxed{open") == ["1", "\\frac{1}{2}"]
    assert boxed("\\boxed{\\boxed{3}}") == ["\\boxed{3}"] and boxed("\\fbox{4}") == ["4"]
    assert boxed("\\boxed{\\{1, 2\\}}") == ["\\{1, 2\\}"] and boxed("\\boxed{}") == [""]
    assert boxed("\\boxed 5") == [] and boxed("boxed{5}") == []
    assert len(boxed("\\boxed{1}" * 1000)) == 100


def test_hash_tags_and_last_numbers():
    assert after_hash("x #### 5\n#### 1,000 \nmore") == "1,000" and after_hash("5") is None and after_hash("####") == ""
    assert last_number("it is 3 and then 1,250.75.") == "1,250.75" and last_number("none") is None
    assert last_answer("<answer>1</answer> <answer>2") == "1"
    assert last_answer("<answer>a<answer>b</answer>") == "b"
    assert last_answer("<answer>a<answer>b</answer>", outer=True) == "a<answer>b"


SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")
STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")
PIECES = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "x", "\n</reasoning>\n<answer>\n"]


@settings(max_examples=600, deadline=None)
@given(st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.sampled_from(["x", "\n", "", "<answer>", "</answer>", "</reasoning>"]), min_size=7, max_size=7).map(
        lambda p: f"{p[0]}<reasoning>{p[1]}\n{p[2]}\n</reasoning>\n{p[3]}<answer>\n{p[4]}\n{p[5]}</answer>\n{p[6]}"),
))  # fmt: skip
def test_format_rewards_equal_the_patterns_of_the_papers(text):
    """The patterns as oracles: with DOTALL the mended ones, without it the published ones."""
    for published, flags in ((True, 0), (False, re.DOTALL)):
        assert soft_format(text, published=published) == bool(re.match(SOFT.pattern, text, flags))
        assert strict_format(text, published=published) == bool(re.match(STRICT.pattern, text, flags))


def test_tag_counts_by_hand():
    whole = "<reasoning>\nx\n</reasoning>\n<answer>\n5\n</answer>\n"
    assert tag_count(whole) == tag_count(whole, published=True) == 0.5
    assert tag_count(whole + "abc") == pytest.approx(0.5 - 0.003)
    assert tag_count(whole + "abc", published=True) == pytest.approx(0.5 - 0.006)
    unclosed = "<reasoning>\nx\n</reasoning>\n<answer>\n" + "5" * 100
    assert tag_count(unclosed) == pytest.approx(0.375)  # no answer to stop behind
    assert tag_count(unclosed, published=True) == pytest.approx(0.375 - 0.001 * len(unclosed))  # the whole text
    assert tag_count("") == 0 and tag_count(whole * 2) < 0.2


@pytest.mark.parametrize("text", [
    "<reasoning>" + "</reasoning><answer>" * 50_000, "<answer>" * 100_000 + "</answer>", "\\boxed{" * 100_000,
    "{" * 500_000, "1," * 500_000, "\\boxed{1}" * 100_000, "</reasoning> " * 80_000, "#### " * 200_000, "9" * 1_000_000,
    "<reasoning>" + " " * 500_000 + "</reasoning>" + " " * 500_000,
], ids=str.__len__)  # fmt: skip
def test_a_megabyte_takes_no_longer_than_it_is_long(text):
    began = time.process_time()
    for read in (boxed, after_hash, last_answer, last_number, parse_number, soft_format, strict_format, tag_count):
        read(text)
    for read in (soft_format, strict_format, tag_count):
        read(text, published=True)
    assert time.process_time() - began < 5  # quadratic time would be minutes
