"""`unmask bench`: sampler settings by speed and accuracy on the same examples."""

from __future__ import annotations

import json

import pytest

import unmask
from tests.helpers import tiny_policy
from unmask import pareto
from unmask.cli import main
from unmask.noise import Noise
from unmask.pareto import Measured, dominates, fastest, rows, words
from unmask.samplers import LowConfidence
from unmask.tasks.sudoku import Sudoku

SAMPLERS = {
    "16 steps": LowConfidence(16),
    "threshold 0.2": LowConfidence(16, threshold=0.2),
    "16 steps, prefix": LowConfidence(16, cache="prefix"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "model"
    tiny_policy().save(path)
    return path


def made(name: str, seconds: float, *correct: float, forwards: int = 4) -> Measured:
    return Measured(name, SAMPLERS.get(name, LowConfidence(16)), list(correct), [forwards] * len(correct), seconds)


def test_settings_are_measured_on_the_same_examples_as_eval_measures_them(folder):
    policy, task = unmask.load(folder), Sudoku(num_blanks=2)
    examples, told = task.examples("test")[:20], []
    found = pareto.measure(
        policy, task, examples, SAMPLERS, noise=Noise(0).stream("evaluation"), batch_size=8, on_rows=told.append
    )
    assert [m.name for m in found] == list(SAMPLERS) and sum(told) == 60
    for measured, options in zip(found, [{}, {"threshold": 0.2}, {"cache": "prefix"}], strict=True):
        row = unmask.evaluate(policy, "sudoku", limit=20, num_blanks=2, batch_size=8, sampler_options=options)
        assert measured.accuracy == row["accuracy"]
        assert measured.forwards_per_completion == row["nfe_per_completion"]
        assert measured.seconds > 0
    assert found[1].forwards_per_completion < 16 == found[0].forwards_per_completion


def test_the_front_is_what_nothing_dominates():
    found = [
        made("16 steps", 8.0, 1, 1, 0, 1),
        made("fast", 2.0, 1, 0, 0, 1),
        made("slow and no better", 9.0, 1, 1, 0, 0),
        made("as fast and better", 2.0, 1, 1, 0, 0),
    ]
    table = rows(found)
    assert [row["is_on_front"] for row in table] == [True, True, False, True]
    assert dominates(found[0], found[2]) and not dominates(found[1], found[1])
    assert [row["speedup"] for row in table] == [1.0, 4.0, 8 / 9, 4.0]
    assert table[0]["difference"] == 0 and table[1]["difference"] == -0.25
    low, high = table[1]["difference_ci95"]
    assert low < -0.25 < high


def test_the_fastest_within_the_margin_is_named_and_caches_that_do_not_help():
    found = [
        made("16 steps", 8.0, *[1] * 200, forwards=16),
        made("threshold 0.9", 4.0, *[1] * 199, 0, forwards=8),
        made("threshold 0.7", 2.0, *[1] * 190, *[0] * 10),
        made("16 steps, prefix", 10.0, *[1] * 200, forwards=16),
    ]
    table = rows(found)
    assert fastest(table)["name"] == "threshold 0.9" and fastest(table, 0.1)["name"] == "threshold 0.7"
    assert fastest(table, 0.0)["name"] == "16 steps"
    assert fastest(table, 0.7 / 140)["name"] == "threshold 0.9"  # just the margin
    assert words(table, found) == [
        "fastest within 1 points of 16 steps: threshold 0.9, 2.00 times as fast, 2.00 times fewer forwards, "
        "-0.50 points",
        "the prefix cache does not help 16 steps here: 1.25 times its time",
    ]


def test_caches_and_shadows_are_compared_where_the_model_has_them():
    def found(**model):
        return pareto.settings(16, 16, **dict.fromkeys(["has_windows", "has_shadows", "has_blocks"], False) | model)

    names = found(has_windows=True)
    assert "16 steps, prefix" in names and not any("dual" in name for name in names)
    assert {"8 steps", "4 steps"} <= set(names)
    assert not any("cache" in fields or "type" in fields for fields in found(has_blocks=True).values())
    assert {"threshold": 0.9, "cache": "dual"} in found(has_windows=True, has_blocks=True).values()
    assert {"type": "wino", "threshold": 0.6, "verify_threshold": 0.9} in found(has_shadows=True).values()


def test_the_command_writes_table_numbers_and_figure(folder, tmp_path, capsys):
    options = ["--task", "sudoku", "--limit", "6", "--block-length", "8", "--quiet", "num_blanks=2"]
    assert main(["bench", str(folder), *options, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "fastest within 1 points of 16 steps:" in printed
    tree = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {"threshold 0.9, dual", "wino 0.6, 0.9"} <= {row["name"] for row in tree["rows"]}
    assert tree["words"][0] in printed and len(tree["rows"]) == len({row["name"] for row in tree["rows"]}) > 20
    markdown = (tmp_path / "out" / "bench.md").read_text()
    assert all(f"| {row['name']} |" in markdown for row in tree["rows"])
    assert (tmp_path / "out" / "bench.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "sudoku", "--margin", "-1"], "--margin from 0 to 100 points"),
        (["--task", "sudoku", "--limit", "0"], "--limit of at least 1"),
        (["--task", "sudoku", "--block-length", "7"], "sampler.block_length = 7: must divide"),
        (["--task", "sudoku", "sampler.guidence=1"], "guidence"),
        (["--task", "sudoku", "sampler.threshold=0.9"], "sampler.threshold: is what the settings differ in"),
        (["--task", "no_such"], "no_such"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, options, message):
    assert main(["bench", str(folder), *options, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
