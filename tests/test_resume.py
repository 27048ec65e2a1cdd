"""Exact resume: a run that was stopped or killed anywhere ends with the same bytes as one that never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import tiny_policy
from unmask.build import sft_recipe, train_recipe
from unmask.checkpoint import find_fault, list_checkpoints, pack, read_newest, unpack, write_checkpoint
from unmask.cli import main
from unmask.errors import DataError, Stopped
from unmask.launch import run_recipe
from unmask.run_log import SilentView, StopRequest
from unmask.types import Batch, Corruption, Draw

LOGS = ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")
SUDOKU = {"type": "sudoku", "num_train": 48, "num_validation": 16, "num_test": 16}
TRAINER = {"num_batches": 3, "eval_every": 1, "save_every": 1, "monitor_rows": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_policy(dtype=torch.float32).save(path)
    return path


def train_tables(model: Path, algorithm: str, **trainer) -> dict:
    return {
        "model": {"path": str(model)},
        "task": SUDOKU,
        "algorithm": {"type": algorithm, "num_iterations": 2, "kl_coef": 0.01},
        "sampler": {"type": "roar"},
        "rollout": {"prompts_per_batch": 2, "group_size": 4},
        "trainer": TRAINER | trainer,
        "optimizer": {"lr": 1e-3, "schedule": "cosine"},
        "evaluation": {"num_examples": 16},
    }


BUFFER = {"num_batches": 2, "collect_every": 2}
SOURCES = {
    "wd1-buffer": ({"type": "wd1"}, {"buffer": BUFFER}),
    "wd1-mixture": ({"type": "wd1", "ref_coef": 0.5}, {}),
    "dga-buffer": ({"type": "dga"}, {"buffer": BUFFER}),
    "dmpo_wdce-buffer": ({"type": "dmpo_wdce"}, {"buffer": BUFFER}),
    "dmpo_wdce-tempered-buffer": ({"type": "dmpo_wdce", "density": "tempered"}, {"buffer": BUFFER}),
    "sapo-steps": ({"type": "sapo"}, {"type": "steps"}),
    "d_treerpo-tree": ({"type": "d_treerpo"}, {"type": "tree"}),
    "vrpo-pairs": ({"type": "vrpo"}, None),
    "embr_c-pairs-then-buffer": ({"type": "embr_c"}, {"buffer": BUFFER}),
}
"""[algorithm] and [rollout] of runs whose batches come from somewhere else than the last rollouts of groups."""


def source_tables(model: Path, kind: str) -> dict:
    algorithm, rollout = SOURCES[kind]
    tables = train_tables(model, "espo", num_batches=4, eval_every=2)
    tables |= {"algorithm": {"num_iterations": 1, **algorithm}, "optimizer": {"lr": 1e-3}}
    if "tempered" in kind:
        tables["sampler"]["temperature"] = 0.5
    if "pairs" in kind:
        rows = [{"prompt": f"{i}2|", "chosen": "34", "rejected": str(i)} for i in range(5)]
        file = model.parent / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tables["data"] = {"file": str(file), "batch_size": 2, "num_batches": 1 if rollout else 0}
    if rollout:
        tables["rollout"] |= rollout
    return tables


def sft_tables(**trainer) -> dict:
    return {
        "model": {"tiny": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}},
        "task": {**SUDOKU, "num_demonstrations": 48},
        "data": {"batch_size": 8},
        "trainer": TRAINER | trainer,
        "evaluation": {"num_examples": 16},
    }


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimiser state of the last checkpoint, and the weights in model/."""
    newest = load_file(list_checkpoints(run / "checkpoints")[-1] / "tensors.safetensors")
    (final,) = (run / "model").glob("*.safetensors")  # the model's, or the adapter's
    return newest | {f"final.{k}": v for k, v in load_file(final).items()}


def assert_same_run(run: Path, expected: Path) -> None:
    for name in LOGS:
        if (expected / name).exists():
            assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    a, b = final_state(run), final_state(expected)
    assert a.keys() == b.keys()
    assert any(key.startswith("optimizer.") for key in a)
    for key in a:
        assert torch.equal(a[key], b[key]), key


class StopAt(StopRequest):
    """Asks to stop at the first boundary that is later than all before, over all instances."""

    reached = 0
    calls = 0

    def agreed(self) -> int:
        StopAt.calls += 1
        if StopAt.calls > StopAt.reached:
            StopAt.reached += 1
            return signal.SIGTERM
        return 0


QUICK_KINDS = ["espo", "diffu_grpo", "sft", "adapters", "wd1-buffer", "vrpo-pairs"]


@pytest.mark.parametrize(
    "kind", [*QUICK_KINDS, *(pytest.param(k, marks=pytest.mark.slow) for k in SOURCES if k not in QUICK_KINDS)]
)
def test_stopping_at_every_phase_boundary_changes_no_byte(kind, model, tmp_path, monkeypatch):
    if kind == "sft":
        recipe, launch = sft_recipe(sft_tables(), tmp_path), run_recipe
    elif kind == "adapters":
        tables = train_tables(model, "espo")
        tables["model"] |= {"lora": {"rank": 4, "alpha": 8.0}, "gradient_checkpointing": True}
        recipe, launch = train_recipe(tables, tmp_path), run_recipe
    elif kind in SOURCES:
        recipe, launch = train_recipe(source_tables(model, kind), tmp_path), run_recipe
    else:
        recipe, launch = train_recipe(train_tables(model, kind), tmp_path), run_recipe
    launch(recipe, tmp_path / "whole", SilentView())

    monkeypatch.setattr("unmask.launch.StopRequest", StopAt)
    StopAt.reached = 0
    stops, resume = 0, False
    while True:
        # every resume starts at the boundary of the last stop, which is not told again
        StopAt.calls = StopAt.reached
        try:
            launch(recipe, tmp_path / "stopped", SilentView(), resume=resume)
            break
        except Stopped:
            stops, resume = stops + 1, True
    updates = recipe.algorithm.value.num_iterations
    assert stops == recipe.trainer.num_batches * (1 + updates + 1)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def start(args: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "unmask", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_at_random(model: Path, tmp_path: Path, algorithm: str, kills: int) -> None:
    recipe = tmp_path / "recipe.json"
    tables = train_tables(model, algorithm, num_batches=30, save_every=2, eval_every=5)
    overrides = [
        f"{section}.{key}={json.dumps(value)}" for section, table in tables.items() for key, value in table.items()
    ]
    recipe = tmp_path / "empty.toml"
    recipe.write_text("seed = 0\n")
    whole = start(["train", str(recipe), *overrides, "--output", str(tmp_path / "whole")])
    assert whole.wait(240) == 0, whole.stdout.read()

    moments = random.Random(5)
    run = tmp_path / "killed"
    started = time.monotonic()
    args = ["train", str(recipe), *overrides, "--output", str(run)]
    done = 0
    while done < kills:
        process = start(args)
        while not (run / "config.toml").exists() and process.poll() is None:
            time.sleep(0.01)
        first = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else -1
        while process.poll() is None:  # until it has come to write something of its own
            size = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else -1
            if size != first:
                break
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.25))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
        assert process.returncode == -signal.SIGKILL, f"finished after {done} kills: {process.stdout.read()}"
        args = ["train", "--resume", str(run)]
        assert time.monotonic() - started < 900
    last = start(args)
    assert last.wait(240) == 0, last.stdout.read()
    assert_same_run(run, tmp_path / "whole")


def test_kill_minus_nine_at_random_moments(model, tmp_path):
    kill_at_random(model, tmp_path, "espo", kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["espo", "diffu_grpo"])
def test_kill_minus_nine_at_twenty_random_moments(model, tmp_path, algorithm):
    kill_at_random(model, tmp_path, algorithm, kills=20)


def test_sigterm_stops_a_real_process_with_a_checkpoint_and_says_how_to_go_on(model, tmp_path):
    tables = train_tables(model, "espo", num_batches=500, save_every=0, eval_every=0)
    overrides = [f"{s}.{k}={json.dumps(v)}" for s, table in tables.items() for k, v in table.items()]
    (tmp_path / "empty.toml").write_text("seed = 0\n")
    process = start(["train", str(tmp_path / "empty.toml"), *overrides, "--output", str(tmp_path / "run")])
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert f"--resume {tmp_path / 'run'}" in process.stdout.read()
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1


# ---- damaged checkpoints


@pytest.fixture
def stopped(model, tmp_path, monkeypatch) -> Path:
    """A run of four updates with two checkpoints, stopped."""
    recipe = train_recipe(train_tables(model, "espo", num_batches=4, save_total_limit=2), tmp_path)
    calls = iter(range(1000))
    monkeypatch.setattr(StopRequest, "agreed", lambda self: signal.SIGTERM if next(calls) == 9 else 0)
    with pytest.raises(Stopped):
        run_recipe(recipe, tmp_path / "run", SilentView())
    monkeypatch.undo()
    return tmp_path / "run"


DAMAGES = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 7),
    "bit-flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_damaged_file_is_detected_and_the_checkpoint_before_is_used(damage, name, tmp_path):
    parent = tmp_path / "checkpoints"
    for step in (1, 2):
        write_checkpoint(parent, f"{step:08d}", {"x": torch.full((8,), float(step))}, {"step": step}, keep=2)
    DAMAGES[damage](parent / "step-00000002" / name)
    notes: list[str] = []
    tensors, state = read_newest(parent, notes.append)
    assert state["step"] == 1 and float(tensors["x"][0]) == 1.0
    assert len(notes) == 1 and "step-00000002 is damaged" in notes[0]
    shutil.rmtree(parent / "step-00000001")
    with pytest.raises(DataError, match="every checkpoint is damaged"):
        read_newest(parent, notes.append)


def test_a_run_goes_on_from_the_last_good_checkpoint_with_equal_bytes(stopped, model, tmp_path):
    recipe = train_recipe(train_tables(model, "espo", num_batches=4, save_total_limit=2), tmp_path)
    run_recipe(recipe, tmp_path / "whole", SilentView())
    newest = list_checkpoints(stopped / "checkpoints")[-1]
    DAMAGES["bit-flipped"](newest / "tensors.safetensors")
    assert find_fault(newest) == "tensors.safetensors has changed since it was written"
    run_recipe(recipe, stopped, SilentView(), resume=True)
    assert_same_run(stopped, tmp_path / "whole")


def test_the_save_limit_is_kept_and_no_temporary_directory_stays(stopped):
    names = sorted(p.name for p in (stopped / "checkpoints").iterdir())
    assert len(names) == 2 and all(name.startswith("step-") for name in names)


def test_a_changed_recipe_is_refused_with_its_keys_and_allowed_knowingly(stopped, capsys):
    assert main(["train", "--resume", str(stopped), "optimizer.lr=5e-4", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "optimizer.lr" in error and "--allow optimizer.lr" in error and error.count("\n") == 1
    config = stopped / "config.toml"
    lines = config.read_text().splitlines(keepends=True)
    older = [
        line for line in lines if not line.startswith("count_positions = ")
    ]  # as if the key were newer than the run
    assert len(older) == len(lines) - 1
    config.write_text("".join(older))
    assert main(["train", "--resume", str(stopped), "optimizer.lr=5e-4", "--allow", "optimizer.lr", "--quiet"]) == 0
    assert (stopped / "summary.json").exists()
    assert main(["train", "--resume", str(stopped), "--quiet"]) == 2
    assert "is complete" in capsys.readouterr().err


def test_pack_and_unpack_keep_tensors_and_identities():
    masks = Corruption(
        torch.ones(1, 2, 3, dtype=torch.bool), torch.ones(1, 2, 2).bool(), torch.rand(1, 2, 2).double(), "elbo"
    )
    draw = Draw(masks, old_logps=torch.rand(1, 2, 2))
    tensors: dict[str, torch.Tensor] = {}
    content = json.loads(json.dumps(pack({"draws": [draw, draw], "pair": (1, 2.5)}, "root", tensors)))
    back = unpack(content, tensors)
    assert back["pair"] == [1, 2.5]
    assert back["draws"][0] is back["draws"][1]
    assert torch.equal(back["draws"][0].corruption.weight, masks.weight)
    assert back["draws"][0].ref_logps is None and Batch.__name__ not in json.dumps(content)


def test_a_changed_base_and_a_shortened_log_are_refused(stopped, model, capsys):
    log = stopped / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:10])
    assert main(["train", "--resume", str(stopped), "--quiet"]) == 2
    assert "has 10 bytes where the checkpoint was written after" in capsys.readouterr().err
    log.write_bytes(whole)
    weights = (model / "model.safetensors").read_bytes()
    tiny_policy(seed=5, dtype=torch.float32).save(model)
    assert main(["train", "--resume", str(stopped), "--quiet"]) == 2
    assert "the base model is not the one the run began with" in capsys.readouterr().err
    (model / "model.safetensors").write_bytes(weights)
    assert main(["train", "--resume", str(stopped), "--quiet"]) == 0
