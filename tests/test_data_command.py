"""`unmask data pairs`: pairs of a run's own rollouts, within a group and of unequal reward, that training reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_policy
from unmask.build import train_recipe
from unmask.cli import main
from unmask.launch import run_recipe
from unmask.noise import Noise
from unmask.preferences import pairs_of_rollouts, read_preferences, read_rollouts
from unmask.run_log import SilentView


def rollout(iteration: int, prompt: int, completion: str, reward: float) -> dict:
    return {
        "iteration": iteration,
        "prompt_id": prompt,
        "prompt": f"{prompt}|",
        "completion": completion,
        "reward": reward,
        "status": "wrong",
        "advantage": None,
        "length": 3,
    }


ROWS = [
    *(rollout(0, 1, f"a{i}", i / 4) for i in range(4)),
    *(rollout(0, 2, f"b{i}", 0.5) for i in range(4)),  # nothing to compare
    *(rollout(1, 1, f"c{i}", float(i > 0)) for i in range(4)),
    rollout(2, 3, "", 0.0),
    rollout(2, 3, "d", 1.0),  # the other answer is empty
]


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "run"


def pairs(run: Path, count: int = 1, last: int | None = None, seed: int = 0):
    return pairs_of_rollouts(read_rollouts(run), pairs_per_prompt=count, last=last, noise=Noise(seed))


def test_pairs_are_of_one_group_and_of_unequal_reward(run):
    found = pairs(run, 100)
    assert found.num_groups == 4 and found.num_paired == 2
    assert len(found.rows) == 6 + 3  # 4·3/2 of different rewards, and three above one
    for row in found.rows:
        letter = row["chosen"][0]
        assert row["rejected"][0] == letter and row["chosen_score"] > row["rejected_score"]
        assert (row["iteration"], row["prompt_id"], row["prompt"]) == (int(letter == "c"), 1, "1|")
    assert len({(row["chosen"], row["rejected"]) for row in found.rows}) == 9
    assert found.mean_margin == pytest.approx((3 * 0.25 + 2 * 0.5 + 0.75 + 3 * 1.0) / 9, abs=1e-12)


def test_one_pair_of_a_group_is_drawn_at_random_and_by_the_seed(run):
    assert pairs(run).rows == pairs(run).rows and len(pairs(run).rows) == 2
    drawn = [pairs(run, seed=seed).rows[0] for seed in range(300)]
    kinds = {(row["chosen"], row["rejected"]) for row in drawn}
    assert len(kinds) == 6  # each of six, and in 300 draws all: the chance of missing one is 6 · (5/6)^300 < 1e-22
    assert len(pairs(run, 2).rows) == 4 and len(pairs(run, 1, last=2).rows) == 1


def test_the_command_writes_what_training_reads(run, capsys):
    out = run.parent / "pairs.jsonl"
    assert main(["data", "pairs", str(run), "--output", str(out), "--pairs-per-prompt", "9"]) == 0
    text = capsys.readouterr().out
    assert "groups       4, of which 2" in text and "pairs        9, mean margin 0.6111" in text
    read = read_preferences(str(out))
    assert sorted((p.chosen, p.rejected, p.chosen_score) for p in read) == sorted(
        (row["chosen"], row["rejected"], row["chosen_score"]) for row in pairs(run, 9).rows
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--last", "1"], "nothing to pair: none of 1 groups"),
        (["RUN", "--last", "0"], "--last 0: must be at least 1"),
        (["RUN", "--pairs-per-prompt", "0"], "--pairs-per-prompt 0: must be at least 1"),
        (["none"], "none: no rollouts.jsonl there"),
        (["RUN", "--output", "no/such/place.jsonl"], "its directory does not exist"),
        (["RUN", "--wrong"], "unrecognized arguments"),
        ([], "the following arguments are required"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    words = [str(run) if word == "RUN" else word for word in arguments]
    if "--output" not in words:
        words += ["--output", "pairs.jsonl"]
    assert main(["data", "pairs", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("pairs.jsonl").exists()


def test_a_missing_output_and_a_broken_log_are_named(run, capsys):
    assert main(["data", "pairs", str(run)]) == 2
    assert "--output is missing" in capsys.readouterr().err
    with open(run / "rollouts.jsonl", "a") as file:
        file.write('{"iteration": 3}\n')
    assert main(["data", "pairs", str(run), "--output", str(run / "x.jsonl")]) == 2
    assert "rollouts.jsonl line 15: has not iteration, prompt_id" in capsys.readouterr().err


def test_pairs_of_a_real_run(tmp_path):
    tiny_policy(dtype=torch.float32).save(tmp_path / "model")
    tables = {
        "model": {"path": str(tmp_path / "model")},
        "task": {"type": "sudoku", "num_train": 16, "num_validation": 8, "num_test": 8, "parser": "d1"},
        "algorithm": {"type": "wd1", "num_iterations": 1},
        "sampler": {"type": "roar"},
        "rollout": {"prompts_per_batch": 2, "group_size": 4, "buffer": {"num_batches": 2}},
        "trainer": {"num_batches": 2, "save_every": 0, "monitor_rows": 0},
        "evaluation": {"num_examples": 8},
    }
    run_recipe(train_recipe(tables, tmp_path), tmp_path / "run", SilentView())
    rows = read_rollouts(tmp_path / "run")
    assert len(rows) == 16
    out = tmp_path / "pairs.jsonl"
    assert main(["data", "pairs", str(tmp_path / "run"), "--output", str(out)]) == 0
    logged = {(row["prompt"], row["completion"], row["reward"]) for row in rows}
    for pair in read_preferences(str(out)):
        assert (pair.example.prompt, pair.chosen, pair.chosen_score) in logged
        assert (pair.example.prompt, pair.rejected, pair.rejected_score) in logged
