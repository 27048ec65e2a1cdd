"""Several completions per example, and two models on the same examples: pass@k, intervals, files."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from unmask.cli import main
from unmask.errors import ConfigError
from unmask.evaluation import Answer, compare, pass_at, powers_of_two, share, unique_share
from unmask.intervals import wilson
from unmask.models.tiny import TinyModelConfig, build_tiny
from unmask.protocols import LENGTHS, PROTOCOLS, task_options
from unmask.tasks import TASKS

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "max_length": 40}


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one():
    examples = [[1.0, 0.0, 0.0, 1.0, 0.0], [0.0] * 5, [1.0] * 5, [0.0, 0.0, 0.0, 0.0, 1.0]]
    for k in range(1, 6):
        chances = []
        for values in examples:
            subsets = list(itertools.combinations(values, k))
            chances.append(sum(any(subset) for subset in subsets) / len(subsets))
        assert pass_at(examples, k) == pytest.approx(sum(chances) / 4, abs=1e-15)
    assert powers_of_two(1) == [1] and powers_of_two(8) == [1, 2, 4, 8] and powers_of_two(6) == [1, 2, 4, 6]


def answered(*verdicts):
    """Answers with these verdicts, 1 for correct."""
    return [Answer(0, 0, 4, "", "", 0.0, "correct" if verdict else "wrong", 4, {}, 4) for verdict in verdicts]


def test_a_paired_difference_by_hand():
    found = compare(answered(1, 1, 0, 1), answered(0, 1, 1, 0), 1)
    assert (found["difference"], found["won"], found["lost"]) == (0.25, 2, 1)
    half = 3.182446 * math.sqrt((2 * 0.75**2 + 0.25**2 + 1.25**2) / 3) / 2  # t of three degrees of freedom, tabulated
    assert found["difference_ci95"] == pytest.approx([0.25 - half, 0.25 + half], abs=1e-6)
    assert compare(answered(1, 1, 0, 1), answered(0, 1, 1, 1), 2)["difference"] == -0.0
    assert compare(answered(1), answered(0), 1)["difference_ci95"] == [-1.0, 1.0]  # one example says nothing
    assert unique_share(["a", "a", "b", "c"], 2) == 0.75


def test_the_interval_of_several_completions_allows_for_their_dependence():
    # completions that always agree count once, those of examples that do not differ count each
    assert share([0.0, 1.0, 1.0, 0.0], 8)["ci95"] == pytest.approx(wilson(2, 4), abs=1e-12)
    assert share([0.5] * 4, 8)["ci95"] == pytest.approx(wilson(16, 32), abs=1e-12)
    # p = 1/2, s² = 1/16, so 16 independent completions would be as sure: n p (1 - p) / s² = 4 · 1/4 · 16
    assert share([0.25, 0.75, 0.25, 0.75], 8)["ci95"] == pytest.approx(wilson(8, 16), abs=1e-12)
    assert share([0.0] * 4, 8)["ci95"] == list(wilson(0, 4))  # not [0, 0]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    for seed in (0, 1):
        build_tiny(TinyModelConfig(**SIZES, init_std=0.3, alphabet="0123456789|"), seed=seed).save(folder / str(seed))
    return folder


def evaluate(models, tmp_path, *options, name="rows.json"):
    command = ["eval", str(models / "0"), "--task", "sudoku", "--limit", "12", "--quiet", "reward=cells"]
    return main([*command, *options, "--output", str(tmp_path / name)]), tmp_path / name


def test_several_samples_give_pass_at_k_and_their_completions(models, tmp_path, capsys):
    options = ["--num-samples", "4", "--temperature", "1", "--completions", str(tmp_path / "completions.jsonl")]
    status, file = evaluate(models, tmp_path, *options)
    assert status == 0
    (row,) = json.loads(file.read_text())
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 48 and [line["sample"] for line in lines[:5]] == [0, 1, 2, 3, 0]
    assert row["num_samples"] == 4 and row["num_examples"] == 12 and row["accuracy"] == row["pass@1"] <= row["pass@4"]
    assert row["reward"] == pytest.approx(sum(line["reward"] for line in lines) / 48)
    assert row["unique_completion_rate"] > 0.9
    shown = capsys.readouterr().out
    assert "16 tokens: pass@1" in shown and "% not parsed" in shown and "tokens/s" in shown
    again = ["--num-samples", "4", "--temperature", "1", "--batch-size", "5"]
    (other,) = json.loads(evaluate(models, tmp_path, *again, name="again.json")[1].read_text())
    assert other["reward"] == row["reward"]


def test_a_baseline_is_compared_example_by_example(models, tmp_path, capsys):
    status, file = evaluate(models, tmp_path, "--baseline", str(models / "1"), "--gen-length", "16,17")
    assert status == 0
    rows = json.loads(file.read_text())
    assert [row["gen_length"] for row in rows] == [16, 17]
    for row in rows:
        assert row["difference"] == pytest.approx(row["accuracy"] - row["baseline_accuracy"])
        assert row["difference_ci95"][0] <= row["difference"] <= row["difference_ci95"][1]
    assert "examples won" in capsys.readouterr().out
    same = json.loads(evaluate(models, tmp_path, "--baseline", str(models / "0"))[1].read_text())[0]
    assert (same["difference"], same["won"], same["lost"], same["difference_ci95"]) == (0, 0, 0, [0, 0])


def test_rows_as_markdown_and_latex(models, tmp_path):
    text = evaluate(models, tmp_path, "--baseline", str(models / "1"), name="rows.md")[1].read_text()
    heading, rule, line = text.splitlines()
    assert heading.startswith("| model | task | examples | tokens | steps | accuracy, % |") and set(rule) <= set("| -")
    assert line.startswith("| 0 | sudoku | 12 | 16 | 16 |") and line.count("|") == heading.count("|")
    assert heading.endswith("| difference, points | unparsed, % | tokens/s |")
    latex = evaluate(models, tmp_path, name="rows.tex")[1].read_text()
    assert "\\begin{tabular}{ll" in latex and "accuracy, \\%" in latex and latex.rstrip().endswith("\\end{tabular}")
    assert latex.count("\\\\") == 2


@pytest.mark.parametrize(("options", "message"), [
    (["--num-samples", "2"], "at temperature 0"), (["--num-samples", "0"], "num_samples = 0"),
    (["--baseline", "nowhere"], "nowhere: no config.json"), (["--completions",
    "no/file"], "--completions no/file: its directory"),
])  # fmt: skip
def test_bad_options(models, tmp_path, capsys, options, message):
    assert evaluate(models, tmp_path, *options)[0] == 2
    assert message in capsys.readouterr().err
    assert evaluate(models, tmp_path, name="rows.doc")[0] == 2
    assert "must end with .json, .md, .tex" in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "task", "steps"), [
    ("d1", "gsm8k", [64, 128, 256]), ("espo", "gsm8k", [128, 256, 512]), ("espo", "sudoku", [64, 128, 256]),
    ("espo", "countdown", [64, 128, 256]), ("dmpo", "math", [128, 256, 512]), ("dga", "code", [128, 128, 128]),
])  # fmt: skip
def test_presets_follow_the_papers(preset, task, steps):
    protocol = PROTOCOLS[preset]
    assert [protocol.num_steps(task, length) for length in LENGTHS] == steps and protocol.block_length == 32
    settings = task_options(preset, task)
    TASKS[task](**settings)  # the names of prompts and parsers exist
    with pytest.raises(ConfigError, match="says nothing about task 'sudoku_twice'"):
        task_options(preset, "sudoku_twice")


def test_a_preset_in_the_command(models, tmp_path, capsys):
    command = ["eval", str(models / "0"), "--task", "sudoku", "--limit", "2", "--quiet", "--preset"]
    output = ["--output", str(tmp_path / "rows.json")]
    assert main([*command, "d1", "prompt=raw", "--gen-length", "16,20", *output]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["gen_length"], row["num_steps"], row["block_length"]) for row in rows] == [(16, 8, 16), (20, 10, 20)]
    assert main([*command, "d1", "prompt=raw", "--gen-length", "16", "--sampler", "dream", *output]) == 0  # no blocks
    assert [row["num_steps"] for row in json.loads((tmp_path / "rows.json").read_text())] == [8]
    assert main([*command, "d1", "prompt=raw", "--gen-length", "16", "--sampler", "wino", *output]) == 0  # no steps
    assert [row["block_length"] for row in json.loads((tmp_path / "rows.json").read_text())] == [16]
    assert main([*command, "d2"]) == 2
    assert "--preset d2: unknown. Use one of: d1, espo, spg, dmpo, dga." in capsys.readouterr().err
