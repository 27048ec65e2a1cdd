"""An exact KL and value models under FSDP2 on two gloo processes: the numbers of one process, saved and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import tiny_policy
from tests.test_distributed import launch
from tests.test_resume import assert_same_run
from tests.test_sharding import FSDP2, STEP_BOUND, registered, tables
from unmask.build import train_recipe
from unmask.checkpoint import list_checkpoints
from unmask.config import dump_toml
from unmask.energy import logged_rollouts, open_energy, open_recipe
from unmask.launch import run_recipe
from unmask.run_log import SilentView

NAMES = ("copy", "adapter", "head")
"""What is learned beside the policy: all weights of a copy, a second adapter, a head on the reference's states."""
UPDATES = (1, 2)
"""Of one batch. The policy is its reference in the first, where the KL and its gradient are zero."""

__all__ = ["registered"]  # a fixture


def recipe_tables(model: Path, name: str, num_batches: int = 1) -> dict:
    """Batches of 12 rows in micro-batches of 4, so that gradients add up, with two updates on each."""
    found = tables(model, "espo" if name == "copy" else "lora", "roar")
    found["trainer"] |= {"micro_batch_size": 4, "num_batches": num_batches, "eval_every": 0, "monitor_rows": 0}
    if name == "head":
        found["algorithm"] = {"type": "embr_e", "num_iterations": 2, "head_lr": 1e-2}
    else:
        rates = {"energy_lr": 1e-2, "energy_trunk_lr": 1e-3, "energy_updates": 2}
        found["algorithm"] = {"type": "dga", "mode": "sum", "num_iterations": 2, "alpha": 0.5, "kl_coef": 10.0, **rates}
    return found


def train_args(folder: Path, name: str, output: str, num_batches: int = 1) -> list[str]:
    recipe = folder / f"{name}-{num_batches}.toml"
    recipe.write_text(dump_toml(recipe_tables(folder / "base", name, num_batches)))
    return ["train", str(recipe), "--quiet", "--output", str(folder / output)]


def launch_all(folder: Path, commands: list[list[str]]) -> None:
    """Sharded runs of two processes, one after the other."""
    args = [word for command in commands for word in ("then", *command)][1:]
    result = launch(2, folder / "started", args, FSDP2)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(registered, tmp_path_factory) -> Path:
    """Of each kind a run of two processes and one of a single process."""
    folder = tmp_path_factory.mktemp("values")
    tiny_policy(dtype=torch.float32).save(folder / "base")
    launch_all(folder, [train_args(folder, name, name) for name in NAMES])
    for name in NAMES:
        recipe = train_recipe(recipe_tables(folder / "base", name), folder)
        run_recipe(recipe, folder / f"single-{name}", SilentView())
    return folder


def at_step(run: Path, step: int, *prefixes: str) -> dict[str, torch.Tensor]:
    """Tensors of the checkpoint right after an update."""
    path = next(p for p in list_checkpoints(run / "checkpoints") if p.name.startswith(f"step-{step:08d}-"))
    return {name: t for name, t in load_file(path / "tensors.safetensors").items() if name.startswith(prefixes)}


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_sharded_updates_equal_those_of_one_process(runs, name):
    """The policy's, whose loss holds the exact KL and weights made from values."""
    for step in UPDATES:
        two, one = (at_step(runs / run, step, "model.", "optimizer.") for run in (name, f"single-{name}"))
        assert two.keys() == one.keys()
        assert max(float(one[key].abs().max()) for key in one if key.endswith("exp_avg")) > 1e-4  # a gradient was there
        for key in one:
            assert torch.allclose(two[key], one[key], rtol=0, atol=STEP_BOUND), key


@pytest.mark.parametrize("name", ["copy", "adapter"])
def test_the_sharded_kl_is_that_of_one_process(runs, name):
    """With a second model the reference's head is put together; adapters have the policy's own."""
    (first, two), (_, one) = rows(runs / name), rows(runs / f"single-{name}")
    assert first["kl_penalty"] == 0.0 and one["kl_penalty"] > 1e-4
    assert two["kl_penalty"] == pytest.approx(one["kl_penalty"], abs=STEP_BOUND)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_value_model_learns_as_on_one_process(runs, name):
    two, one = (at_step(runs / run, 2, "value_model.") for run in (name, f"single-{name}"))
    assert two.keys() == one.keys()
    moved = [key for key in one if key.endswith("exp_avg") and bool((one[key] != 0).any())]
    # all but the last norm's and layer's unused halves; B of seven linears in two layers; and the head's three or four
    assert len(moved) >= {"copy": 20, "adapter": 2 * 7 + 3, "head": 4}[name]
    for key in one:
        assert torch.allclose(two[key], one[key], rtol=0, atol=STEP_BOUND), key
    for a, b in zip(rows(runs / name), rows(runs / f"single-{name}"), strict=True):
        assert a["value_loss"] == pytest.approx(b["value_loss"], rel=1e-5)
        assert a["value_grad_norm"] == pytest.approx(b["value_grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_value_model_is_saved_whole(runs, name):
    saved = load_file(runs / name / "energy" / "weights.safetensors")
    kept = at_step(runs / name, 2, "value_model.weights.")
    assert {f"value_model.weights.{key}" for key in saved} == kept.keys()
    assert all(torch.equal(value, kept[f"value_model.weights.{key}"]) for key, value in saved.items())
    if name != "head":
        recipe = open_recipe(runs / name)
        policy, critic = open_energy(runs / name, recipe, micro_batch_size=8)
        rollouts, _ = logged_rollouts(runs / name, recipe, policy, 12)
        assert float(critic.values(rollouts).std()) > 0  # `unmask energy` reads it as any other


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_sharded_run_ends_with_the_bytes_of_one_that_went_through(name, registered, tmp_path):
    """Stopped between the two updates of the first batch; the second batch goes on with what was restored."""
    tiny_policy(dtype=torch.float32).save(tmp_path / "base")
    through = train_args(tmp_path, name, "through", num_batches=2)
    stopped = [*train_args(tmp_path, name, "stopped", num_batches=2), "kill=1"]
    commands = [through, stopped, ["train", "--quiet", "--resume", str(tmp_path / "stopped")]]
    others = ["stopped"]
    if name == "adapter":  # with parameters whole from a forward to its backward
        commands.append([*train_args(tmp_path, name, "whole", num_batches=2), "FSDP_RESHARD_AFTER_FORWARD=false"])
        others.append("whole")
    launch_all(tmp_path, commands)
    assert_same_run(tmp_path / "stopped", tmp_path / "through")
    for other in others:
        one, two = (load_file(tmp_path / run / "energy" / "weights.safetensors") for run in ("through", other))
        assert all(torch.equal(one[key], two[key]) for key in one), other
        assert rows(tmp_path / other) == rows(tmp_path / "through")
