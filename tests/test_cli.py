"""The commands from end to end on a model of a few thousand weights: training, evaluation, sampling, bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unmask
from tests.helpers import DigitSum, tiny_policy
from unmask.cli import main
from unmask.runs import read_rows
from unmask.tasks import TASKS

RECIPE = """
[model]
path = "model"
[task]
type = "sudoku"
parser = "d1"
num_train = 8
num_validation = 4
num_test = 4
[algorithm]
type = "espo"
num_iterations = 2
[sampler]
type = "roar"
[rollout]
prompts_per_batch = 2
group_size = 4
[trainer]
num_batches = 2
eval_every = 1
[optimizer]
lr = 1e-3
[evaluation]
num_examples = 4
[evaluation.sampler]
type = "low_confidence"
num_steps = 4
"""

SFT_RECIPE = """
[model]
path = "model"
[data]
file = "rows.jsonl"
batch_size = 4
gen_length = 8
[trainer]
num_batches = 3
[optimizer]
lr = 1e-3
"""

ROW_KEYS = """task data num_examples accuracy ci95 parse_failures gen_length num_steps block_length temperature sampler
prompt nfe_per_completion seconds tokens_per_second model seed"""
METRICS = """reward reward_std frac_reward_zero_std kl entropy clip_ratio/low_mean clip_ratio/high_mean
clip_ratio/region_mean completions/mean_length grad_norm learning_rate elbo elbo_per_token ratio_max
unique_completion_rate step iteration loss"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and recipes; tests work in it and write to folders of their own."""
    place = tmp_path_factory.mktemp("cli")
    tiny_policy(dtype=torch.float32).save(place / "model")
    (place / "recipe.toml").write_text(RECIPE)
    (place / "sft.toml").write_text(SFT_RECIPE)
    (place / "rows.jsonl").write_text('{"prompt": "12|", "completion": "34"}\n{"prompt": "1|", "completion": "2"}\n')
    (place / "bad.toml").write_text("[model\n")
    (place / "short.csv").write_text("Puzzle,Solution\n31022000021003,3142243142131324\n")
    (place / "contradiction.csv").write_text("Puzzle,Solution\n4102200002100320,3142243142131324\n")
    (place / "long.jsonl").write_text(json.dumps({"prompt": "1" * 40, "completion": "2"}))
    return place


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch):
    monkeypatch.chdir(place)
    yield
    shutil.rmtree(place / "out", ignore_errors=True)  # what a failing test may have left


def run(*args: object) -> None:
    assert main([str(arg) for arg in args]) == 0


def train(output: Path, *overrides: str) -> Path:
    run("train", "recipe.toml", *overrides, "--output", output, "--quiet")
    return output


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory) -> Path:
    """A finished run."""
    before = Path.cwd()
    os.chdir(place)
    try:
        return train(tmp_path_factory.mktemp("runs") / "espo")
    finally:
        os.chdir(before)


# ---- train


def test_a_run_directory_holds_what_a_person_wants_to_read(finished):
    names = {file.name for file in finished.iterdir()}
    logs = {"metrics.jsonl", "timing.jsonl", "evaluations.jsonl", "rollouts.jsonl"}
    assert {"config.toml", "model", "best", "summary.json", *logs} <= names
    assert not [name for name in names if name.endswith((".tmp", ".old"))]
    metrics = read_rows(finished / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert all(set(METRICS.split()) <= set(row) for row in metrics)
    assert not {"seconds", "time"} & set(metrics[0])  # comparable byte by byte
    timing = read_rows(finished / "timing.jsonl")
    assert [row["step"] for row in timing] == [1, 2, 3, 4] and timing[0]["step_seconds"] > 0


def test_rollouts_are_readable(finished):
    rows = read_rows(finished / "rollouts.jsonl")
    assert len(rows) == 2 * 8
    assert {"iteration", "prompt", "completion", "reward", "status", "advantage"} <= set(rows[0])
    assert rows[0]["prompt"].endswith("|") and len(rows[0]["prompt"]) == 17
    for first in range(0, 16, 4):  # advantages compare the completions of one prompt
        group = rows[first : first + 4]
        assert len({row["prompt"] for row in group}) == 1
        mean = sum(row["reward"] for row in group) / 4
        for row in group:
            assert row["advantage"] == pytest.approx((row["reward"] - mean) * 4 / 3, abs=1e-6)


def test_evaluations_are_periodic_and_without_wall_times(finished):
    rows = read_rows(finished / "evaluations.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1]
    assert set(ROW_KEYS.split()) - {"seconds", "tokens_per_second"} <= set(rows[0])
    assert "seconds" not in rows[0] and rows[0]["data"] == "generated:validation"


def test_the_summary_has_rows_before_and_after(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert [row["model"] for row in summary["base"] + summary["final"]] == ["base", "final"]
    for row in summary["base"] + summary["final"]:
        assert set(ROW_KEYS.split()) <= set(row)
        assert row["data"] == "generated:test" and row["num_examples"] == 4
    assert (summary["algorithm"], summary["task"], summary["seed"]) == ("espo", "sudoku", 0)


def test_the_config_is_complete_and_repeats_the_run(finished, tmp_path):
    config = tomllib.loads((finished / "config.toml").read_text())
    assert config["algorithm"]["num_masks"] == 4  # a default, written out
    assert config["trainer"]["num_batches"] == 2
    run("train", finished / "config.toml", "--output", tmp_path / "again", "--quiet")
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl", "config.toml"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name
    weights = [load_file(path / "model" / "model.safetensors") for path in (finished, tmp_path / "again")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_trained_model_loads(finished):
    trained, base = unmask.load(finished / "model"), unmask.load("model")
    assert not torch.equal(trained.module.lm_head.weight, base.module.lm_head.weight)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.level=token"],
        ["algorithm.likelihood=mean_field"],
        ["algorithm.likelihood=mean_field", "algorithm.level=token"],
        ["algorithm.kl=k1", "algorithm.kl_coef=0.1"],
        ["algorithm.kl=k3", "algorithm.kl_coef=0.1"],
        ["algorithm.type=diffu_grpo", "algorithm.num_iterations=2"],
        ["sampler.type=low_confidence", "sampler.temperature=0.9", "sampler.num_steps=8", "sampler.block_length=8"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_ablations_train_from_config_alone(overrides, tmp_path):
    cheap = ("trainer.num_batches=1", "trainer.eval_every=0", "task.num_test=2")
    output = train(tmp_path / "run", *overrides, *cheap)
    rows = read_rows(output / "metrics.jsonl")
    assert len(rows) == 2 and set(METRICS.split()) <= set(rows[0])
    assert rows[0]["grad_norm"] > 1e-6 and rows[0]["ratio_max"] == pytest.approx(1)
    assert rows[1]["ratio_max"] != 1  # the policy has moved
    config = tomllib.loads((output / "config.toml").read_text())
    for override in overrides:
        key, value = override.split("=")
        section, field = key.split(".")
        assert str(config[section][field]) == value


def test_the_seed_changes_the_rollouts(finished, tmp_path):
    other = train(tmp_path / "run", "seed=1", "trainer.num_batches=1", "trainer.eval_every=0", "task.num_test=2")
    texts = [[row["completion"] for row in read_rows(path / "rollouts.jsonl")][:8] for path in (finished, other)]
    assert texts[0] != texts[1]


def test_train_says_where_everything_is(tmp_path, capsys):
    train(tmp_path / "run", "trainer.num_batches=1", "trainer.eval_every=0", "task.num_test=2")
    out = capsys.readouterr().out
    assert str(tmp_path / "run") in out and "base" in out and "final" in out


# ---- sft


def test_sft_on_prompts_and_completions(tmp_path):
    run("sft", "sft.toml", "--output", tmp_path / "run", "--quiet")
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"config.toml", "metrics.jsonl", "timing.jsonl", "model", "summary.json"} <= names
    assert "rollouts.jsonl" not in names
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 3 and {"loss", "elbo", "elbo_per_token", "grad_norm"} <= set(rows[0])
    unmask.load(tmp_path / "run" / "model")


def test_sft_on_messages_teaches_them(tmp_path):
    rows = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "5"}, {"role": "assistant", "content": "77"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    settings = ["trainer.num_batches=60", "optimizer.lr=1e-2", "optimizer.max_grad_norm=1", "data.gen_length=4"]
    run("sft", "sft.toml", f"data.file={rows}", *settings, "--output", tmp_path / "run", "--quiet")
    assert unmask.sample(tmp_path / "run", turns[:1], gen_length=4) == "77"


def test_sft_on_a_teacher_evaluates_when_asked(tmp_path):
    task = ["task.type=sudoku", "task.num_train=8", "task.num_test=2", "task.num_validation=2"]
    overrides = ["data.file=none", "data.gen_length=16", *task, "trainer.eval_every=2"]
    run("sft", "sft.toml", *overrides, "--output", tmp_path / "run", "--quiet")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["base"] == [] and summary["final"][0]["num_examples"] == 2
    assert len(read_rows(tmp_path / "run" / "evaluations.jsonl")) >= 1


# ---- eval, sample, list


def evaluated(tmp_path: Path, *args: object) -> list[dict]:
    output = tmp_path / "rows.json"
    run("eval", *args, "--quiet", "--output", output)
    return json.loads(output.read_text())


def test_eval_writes_one_row_for_each_length(finished, tmp_path, capsys):
    rows = evaluated(
        tmp_path, finished, "--task", "sudoku", "--gen-length", "16,20", "--num-steps", 4, "--limit", 3, "num_test=6"
    )
    assert [row["gen_length"] for row in rows] == [16, 20]
    for row in rows:
        assert set(ROW_KEYS.split()) <= set(row)
        assert (row["num_examples"], row["num_steps"], row["nfe_per_completion"]) == (3, 4, 4.0)
        assert row["model"] == str(finished) and row["data"] == "generated:test"
    out = capsys.readouterr().out
    assert "accuracy %" in out and "rows written to" in out


def test_eval_accepts_run_and_model_directories_alike(finished, tmp_path):
    options = ("--task", "sudoku", "num_test=4", "--num-steps", 4)
    first = evaluated(tmp_path, finished, *options)[0]
    second = evaluated(tmp_path, finished / "model", *options)[0]
    assert {**first, "model": 0, "seconds": 0, "tokens_per_second": 0} == {
        **second, "model": 0, "seconds": 0, "tokens_per_second": 0,
    }  # fmt: skip
    summary = json.loads((finished / "summary.json").read_text())["final"][0]
    assert evaluated(tmp_path, finished, *options, "parser=d1")[0]["reward"] == summary["reward"]


def test_eval_at_a_temperature_depends_on_the_seed_alone(finished, tmp_path):
    options = (finished, "--task", "sudoku", "num_test=4", "parser=d1", "--temperature", 1, "--num-steps", 8)
    rewards = [evaluated(tmp_path, *options, "--seed", seed)[0]["reward"] for seed in (0, 0, 1, 2, 3)]
    assert rewards[0] == rewards[1] and len(set(rewards)) > 1


def test_eval_reads_the_published_files(finished, tmp_path, data_dir):
    d1 = data_dir / "sudoku" / "d1_4x4_test_sudoku.csv"
    (row,) = evaluated(tmp_path, finished, "--task", "sudoku", "--data", d1, "--num-steps", 2)
    assert row["num_examples"] == len(d1.read_text().split()) - 1
    assert row["seen_grids"]["num_examples"] + row["unseen_grids"]["num_examples"] == row["num_examples"]
    assert row["data"] == str(d1) and {"match_accuracy", "cell_accuracy"} <= set(row)
    for blanks in (6, 8, 10):
        dream = data_dir / "sudoku" / f"dream_sudoku_4x4_{blanks}.jsonl"
        (row,) = evaluated(tmp_path, finished, "--task", "sudoku", "--data", dream, "--num-steps", 2)
        assert row["num_examples"] == len(dream.read_text().splitlines()) - 8  # behind the few-shot examples


def test_sample_prints_the_canvas_and_then_the_text(capsys):
    run("sample", "model", "3102200002100320|", "--num-steps", 4)
    *steps, text = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in steps] == [["step", str(i)] for i in (1, 2, 3, 4)]
    assert [line.count(".") for line in steps] == [12, 8, 4, 0]
    assert text == unmask.sample("model", "3102200002100320|", num_steps=4)


def test_sampler_settings_follow_as_words(tmp_path, finished, capsys):
    run("sample", "model", "3102200002100320|", "sampler.threshold=0.0")
    *steps, text = capsys.readouterr().out.splitlines()
    assert len(steps) == 1 and text == unmask.sample("model", "3102200002100320|", threshold=0.0)
    options = ("--task", "sudoku", "--limit", 3, "sampler.threshold=0.0", "sampler.cache=prefix")
    (row,) = evaluated(tmp_path, finished, *options)
    assert row["nfe_per_completion"] == 1 and row["sampler_options"] == {"threshold": 0.0, "cache": "prefix"}
    same = unmask.evaluate(finished, "sudoku", limit=3, sampler_options={"threshold": 0.0, "cache": "prefix"})
    assert same["accuracy"] == row["accuracy"]
    for words, message in [
        (["sampler.treshold=0.9"], "treshold"),
        (["threshold=0.9"], r"threshold=0.9: only settings of the sampler go here"),
    ]:
        assert main(["sample", "model", "31|", *words]) == 2
        assert message in capsys.readouterr().err


def test_sample_in_a_chat(capsys):
    run("sample", "model", "12", "--chat", "--gen-length", 4)
    text = capsys.readouterr().out.splitlines()[-1]
    assert text == unmask.sample("model", [{"role": "user", "content": "12"}], gen_length=4)


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("algorithms", ["espo", "arXiv:2512.03759", "diffu_grpo", "arXiv:2504.12216"]),
        ("tasks", ["sudoku"]),
        ("samplers", ["roar", "low_confidence", "random_remasking"]),
        ("models", ["unmask_tiny"]),
        ("strategies", ["groups", "tree", "steps", "pairs"]),
    ],
)
def test_list_names_what_is_registered(what, wanted, capsys):
    run("list", what)
    out = capsys.readouterr().out
    assert all(word in out for word in wanted)
    run("list", what, "--keys")
    assert len(capsys.readouterr().out) >= len(out)


# ---- bad input

TRAIN = {
    "unknown key": (["algorithm.num_maskz=2"], "unknown key algorithm.num_maskz"),
    "unknown section": (["trainr.lr=2"], "unknown section or key 'trainr'"),
    "odd masks": (["algorithm.num_masks=3"], "must be even"),
    "unknown algorithm": (["algorithm.type=esp0"], "unknown algorithm 'esp0'"),
    "unknown task": (["task.type=sudok"], "unknown task 'sudok'"),
    "unknown sampler": (["sampler.type=beam"], "unknown sampler 'beam'"),
    "unknown split": (["evaluation.split=tost"], "unknown split 'tost'"),
    "unknown final split": (["evaluation.final_split=tost"], "unknown split 'tost'"),
    "wrong type": (["optimizer.lr=fast"], "optimizer.lr"),
    "no number": (["sampler.temperature=nan"], "sampler.temperature"),
    "seed": (["seed=x"], "seed"),
    "no override": (["nonsense"], "must be dotted.key=value"),
    "group of one": (["rollout.group_size=1"], "rollout.group_size = 1"),
    "block length": (["sampler.block_length=5"], "must divide sampler.gen_length = 16"),
    "evaluation block": (["evaluation.sampler.block_length=5"], "must divide"),
    "final steps": (["evaluation.final_num_steps=[17]"], "num_steps = 17"),
    "prompt too long": (["task.prompt=" + "1" * 50 + "{puzzle}", "sampler.gen_length=16"], "exceeds the 40 positions"),
    "canvas too long": (["sampler.gen_length=30"], "exceeds the 40 positions"),
    "missing model": (["model.path=nowhere"], "no config.json there"),
    "two models": (["model.recipe=sft.toml"], "exactly one of"),
    "missing data": (["task.data=nowhere.csv"], "nowhere.csv: cannot be read"),
    "missing training data": (["task.train_data=nowhere.csv"], "nowhere.csv: cannot be read"),
    "short puzzle": (["task.data=short.csv"], "short.csv line 2: puzzle '31022000021003' has 14 characters"),
    "contradictory puzzle": (["task.train_data=contradiction.csv"], "contradiction.csv line 2"),
    "final steps of roar": (["evaluation.sampler.type=roar", "evaluation.final_num_steps=[8]"], "num_steps"),
}

BAD = {
    **{f"train, {name}": (["train", "recipe.toml", *args], text) for name, (args, text) in TRAIN.items()},
    "train, missing recipe": (["train", "nowhere.toml"], "nowhere.toml: no such file"),
    "train, broken recipe": (["train", "bad.toml"], "bad.toml: not valid TOML"),
    "train, folder": (["train", "model"], "is a directory"),
    "train, nothing": (["train"], "recipe"),
    "train, no folder": (["train", "recipe.toml", "--output", "bad.toml"], "bad.toml"),
    "train, full folder": (["train", "recipe.toml", "--output", "model"], "model: exists and is not empty"),
    "sft, missing file": (["sft", "sft.toml", "data.file=nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    "sft, long prompt": (["sft", "sft.toml", "data.file=long.jsonl"], "exceeds the 40 positions"),
    "sft, long completion": (["sft", "sft.toml", "data.gen_length=1"], "exceeds gen_length = 1"),
    "sft, negative length": (["sft", "sft.toml", "data.gen_length=-1"], "data.gen_length = -1"),
    "sft, reward section": (["sft", "sft.toml", "rollout.group_size=8"], "unknown section or key 'rollout'"),
    "eval, missing model": (["eval", "nowhere", "--task", "sudoku"], "nowhere: no config.json there"),
    "eval, missing data": (["eval", "model", "--task", "sudoku", "--data", "nowhere.csv"], "cannot be read"),
    "eval, short puzzle": (["eval", "model", "--task", "sudoku", "--data", "short.csv"], "short.csv line 2"),
    "eval, data of another split": (
        ["eval", "model", "--task", "sudoku", "--data", "short.csv", "--split", "validation"],
        "takes the place of the test split",
    ),
    "eval, unknown task": (["eval", "model", "--task", "sudok"], "unknown task 'sudok'"),
    "eval, no task": (["eval", "model"], "--task"),
    "eval, unknown option": (["eval", "model", "--task", "sudoku", "blanks=3"], "unknown key task.blanks"),
    "eval, lengths": (["eval", "model", "--task", "sudoku", "--gen-length", "16;32"], "--gen-length 16;32"),
    "eval, block length": (["eval", "model", "--task", "sudoku", "--block-length", "5"], "must divide"),
    "eval, too long": (["eval", "model", "--task", "sudoku", "--gen-length", "30"], "exceeds the 40 positions"),
    "eval, no examples": (["eval", "model", "--task", "sudoku", "--limit", "0"], "limit = 0"),
    "eval, no folder": (["eval", "model", "--task", "sudoku", "--output", "no/rows.json"], "does not exist"),
    "eval, folder as file": (["eval", "model", "--task", "sudoku", "--output", "model"], "is a directory"),
    "sample, empty prompt": (["sample", "model", ""], "a prompt has no tokens"),
    "sample, long prompt": (["sample", "model", "1" * 40], "exceeds the 40 positions"),
    "sample, no tokens": (["sample", "model", "1", "--gen-length", "0"], "must be at least 1 token"),
    "list, unknown": (["list", "colours"], "colours"),
    "unknown command": (["fly"], "fly"),
    "no command": ([], "COMMAND"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_behind(name, place, capsys):
    args, message = BAD[name]
    if args[:1] in (["train"], ["sft"]) and "--output" not in args:
        args = [*args, "--output", "out"]
    before = sorted(place.rglob("*"))
    assert main([*args]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n"), captured.err
    assert message in captured.err and "Error: " in captured.err
    assert sorted(place.rglob("*")) == before


def test_a_stop_rule_on_an_unknown_column_is_one_line(tmp_path, capsys):
    rule = ["trainer.stop.metric=accurracy", "trainer.stop.at_least=0.5", "trainer.stop.window=1"]
    assert main(["train", "recipe.toml", *rule, "--output", str(tmp_path / "run"), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "trainer.stop.metric" in err and "accurracy" in err


def test_a_reward_that_is_no_number_ends_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(TASKS, "digits", DigitSum)
    options = ["task.type=digits", "task.broken=true", "--output", str(tmp_path / "run"), "--quiet"]
    assert main(["train", "recipe.toml", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "RewardError: the reward of prompt" in err
    assert not (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / "model").exists()


def test_a_task_without_a_row_in_any_registry_needs_no_more_than_its_class(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "digits", DigitSum)
    output = train(tmp_path / "run", "task.type=digits", "trainer.num_batches=1", "trainer.eval_every=0")
    assert json.loads((output / "summary.json").read_text())["task"] == "digits"


def test_a_real_process_reports_in_one_line_with_code_2():
    done = subprocess.run([sys.executable, "-m", "unmask", "fly"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("ConfigError: ") and "'fly'" in done.stderr
