"""`unmask reward`: sample completions judged, and a run's rollouts judged again in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from unmask.cli import main
from unmask.models.tiny import TinyModelConfig, build_tiny

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "max_length": 40}
RECIPE = """
[model]
path = "{model}"
[task]
type = "sudoku"
num_train = 64
num_validation = 8
num_test = 8
[algorithm]
type = "espo"
num_iterations = 1
[sampler]
type = "roar"
[rollout]
prompts_per_batch = 4
group_size = 4
[trainer]
num_batches = 2
eval_every = 0
[evaluation]
num_examples = 4
final_num_steps = [4]
"""


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    build_tiny(TinyModelConfig(**SIZES, init_std=0.3, alphabet="0123456789|"), seed=0).save(folder / "model")
    (folder / "recipe.toml").write_text(RECIPE.format(model=folder / "model"))
    assert main(["train", str(folder / "recipe.toml"), "--output", str(folder / "run"), "--quiet"]) == 0
    return folder


def test_sample_completions_are_judged(run_directory, capsys):
    assert main(["reward", "test", str(run_directory / "recipe.toml"), "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("correct") == 2 and out.count("unparsed") == 4 and out.count("1.0000") == 2
    recipe = [str(run_directory / "recipe.toml"), "task.reward=solved"]
    assert main(["reward", "test", *recipe, "--completion", "1" * 16, "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert "wrong" in out and "0.0000" in out and "cell_accuracy" in out


def test_a_runs_rollouts_are_judged_alike_in_a_fresh_process(run_directory):
    command = [sys.executable, "-m", "unmask", "reward", "rescore", str(run_directory / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "32 completions judged again, 32 with the same reward and status" in done.stdout


def test_another_verdict_is_told(run_directory, tmp_path, capsys):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.toml").write_text((run_directory / "run" / "config.toml").read_text())
    rows = [json.loads(line) for line in (run_directory / "run" / "rollouts.jsonl").read_text().splitlines()]
    rows[4]["reward"] += 0.5
    (copy / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["reward", "rescore", str(copy)]) == 2
    assert "1 of 32 are judged otherwise, at first row 5" in capsys.readouterr().err
    rows[7]["prompt_id"] = 999_999
    (copy / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["reward", "rescore", str(copy)]) == 2
    assert "prompt 999999 is no example of the task" in capsys.readouterr().err


def test_bad_input_is_one_line(run_directory, tmp_path, capsys):
    for words, message in (
        (["rescore", str(tmp_path)], "no rollouts.jsonl"), (["test", str(tmp_path / "no.toml")], "no.toml"),
        (["test", str(run_directory / "recipe.toml"), "--limit", "0"], "--limit 0"),
    ):  # fmt: skip
        assert main(["reward", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
