"""Two processes on gloo equal one, and fail together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import tiny_policy
from tests.test_resume import train_tables

ROOT = Path(__file__).resolve().parent.parent


DDP = ["--config_file", str(ROOT / "recipes" / "accelerate" / "ddp.yaml")]


def launch(processes: int, started: Path, args: list[str], config: Sequence[str] = DDP) -> subprocess.CompletedProcess:
    """The command on some processes, through accelerate."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, "--num_processes", str(processes)]
    command += ["--main_process_port", "0", "-m", "tests.distributed_run", str(started), *args]
    # no GPU, where there is one: gloo is what is tested, and bytes are compared with runs on CPU
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("distributed")
    tiny_policy(dtype=torch.float32).save(folder / "model")
    tables = train_tables(folder / "model", "espo", num_batches=3, save_every=0)
    # groups of four among two prompts: with three prompts of four, rows 0-5 and 6-11 split the second group
    tables["rollout"] = {"prompts_per_batch": 3, "group_size": 4}
    (folder / "empty.toml").write_text("seed = 0\n")
    return folder, [f"{s}.{k}={json.dumps(v)}" for s, table in tables.items() for k, v in table.items()]


def test_two_processes_equal_one_with_a_group_that_spans_both(recipe, tmp_path):
    folder, overrides = recipe
    for processes in (1, 2):
        args = ["train", str(folder / "empty.toml"), *overrides, "--output", str(tmp_path / str(processes))]
        result = launch(processes, tmp_path / "started", args)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("1", "2"))
    base = load_file(folder / "model" / "model.safetensors")
    assert max(float((one[k] - base[k]).abs().max()) for k in base) > 1e-4  # six updates moved it
    for key in one:
        # float32 sums in another order; the bound
        assert torch.allclose(one[key], two[key], rtol=0, atol=1e-6), key
    rows = [(tmp_path / name / "rollouts.jsonl").read_text().splitlines() for name in ("1", "2")]
    assert rows[0][:12] == rows[1][:12] and len(rows[0]) == len(rows[1]) == 36


def test_a_reward_that_raises_on_one_process_ends_both_with_its_message(recipe, tmp_path):
    folder, overrides = recipe
    args = ["train", str(folder / "empty.toml"), *overrides, 'task.type="failing"', "--output", str(tmp_path / "run")]
    result = launch(2, tmp_path / "started", args)
    seconds = time.time() - (tmp_path / "started").stat().st_mtime
    assert result.returncode != 0
    assert "is broken" in result.stderr
    assert seconds < 30  # start-up included


def test_rows_that_cannot_be_shared_are_refused(recipe, tmp_path):
    folder, overrides = recipe
    args = ["train", str(folder / "empty.toml"), *overrides, "rollout.prompts_per_batch=1", "rollout.group_size=3"]
    result = launch(2, tmp_path / "started", [*args, "--output", str(tmp_path / "run")])
    assert result.returncode != 0 and "cannot be shared evenly by 2 processes" in result.stderr
    assert not (tmp_path / "run").exists()
