"""DeepSpeed's ZeRO-2 and ZeRO-3 on two gloo processes: the same numbers as one process, also saved and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import unmask
from tests.helpers import tiny_policy
from tests.test_distributed import ROOT, launch
from tests.test_resume import assert_same_run
from tests.test_sharding import STEP_BOUND, at_step, registered, tables, train_args
from unmask.build import train_recipe
from unmask.checkpoint import list_checkpoints
from unmask.errors import ConfigError
from unmask.launch import run_recipe
from unmask.run_log import SilentView
from unmask.sharding import check_launcher, zero

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

ACCELERATE = ROOT / "recipes" / "accelerate"
STAGES = (2, 3)
NAMES = ("espo", "lora")  # every weight and a frozen second model; adapters with their norm clipped
# gradients of several micro-batches in one update; the stage-3 hooks of a tiny PEFT model cost seconds a batch
TRAINER = {"espo": {"micro_batch_size": 8, "eval_every": 0}, "lora": {"num_batches": 1}}
NUM_UPDATES = {"espo": 4, "lora": 2}

__all__ = ["registered"]  # a fixture


@pytest.fixture(scope="module")
def runs(registered, tmp_path_factory) -> Path:
    """Runs of two processes at both stages: through, and stopped in the third update and resumed."""
    folder = tmp_path_factory.mktemp("zero")
    tiny_policy(dtype=torch.float32).save(folder / "base")
    args: list[str] = []
    changes = {name: [f"trainer.{key}={value}" for key, value in TRAINER[name].items()] for name in NAMES}
    for stage in STAGES:
        setting = f"ACCELERATE_DEEPSPEED_ZERO_STAGE={stage}"  # as the launcher sets it
        for name in NAMES:
            args += [*train_args(folder, name, f"{name}-{stage}", *changes[name], setting), "then"]
        args += [*train_args(folder, "espo", f"stopped-{stage}", *changes["espo"], "kill=3"), "then"]
        args += ["train", "--quiet", "--resume", str(folder / f"stopped-{stage}"), "then"]
    result = launch(2, folder / "started", args[:-1], ["--config_file", str(ACCELERATE / "zero2.yaml")])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    for name in NAMES:
        run_recipe(single(folder, name), folder / f"{name}-1", SilentView())
    return folder


def single(folder: Path, name: str, sampler: str = "roar"):
    """The recipe for one process."""
    found = tables(folder / "base", name, sampler)
    found["trainer"] |= TRAINER[name]
    return train_recipe(found, folder)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_one_update_equals_that_of_one_process(runs, name, stage):
    two, one = (at_step(runs / f"{name}-{n}", 1) for n in (stage, 1))
    last = at_step(runs / f"{name}-1", 2)
    assert two.keys() == one.keys()
    assert max(float((last[key] - one[key]).abs().max()) for key in one if key.startswith("model.")) > 5e-4  # lr / 2
    assert max(float(one[key].abs().max()) for key in one if key.endswith("exp_avg")) > 1e-4  # a gradient was there
    for key in one:
        assert torch.allclose(two[key], one[key], rtol=0, atol=STEP_BOUND), key


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_norm_and_kl_are_those_of_one_process(runs, name, stage):
    two, one = ((runs / f"{name}-{n}" / "metrics.jsonl").read_text().splitlines() for n in (stage, 1))
    pairs = [(json.loads(a), json.loads(b)) for a, b in zip(two, one, strict=True)]
    assert len(pairs) == NUM_UPDATES[name]
    assert name == "lora" or abs(pairs[-1][1]["kl"]) > 1e-4  # the policy has left its reference
    bound = 1e3 if name == "espo" else 0.2
    assert all((a["grad_norm"] > bound) == (name == "lora") for a, _ in pairs)  # clipped for adapters alone
    for a, b in pairs:
        # float32 sums of 4 rows x 16 tokens of about 3 nats; four updates apart
        assert a["kl"] == pytest.approx(b["kl"], abs=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_sampling_equals_that_of_one_process_though_a_process_makes_more_forwards(runs, stage):
    two, one = ((runs / f"espo-{n}" / "rollouts.jsonl").read_text().splitlines() for n in (stage, 1))
    assert len(two) == len(one) == 24
    assert two[:12] == one[:12]  # the later ones come from weights that differ by rounding


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_ends_with_the_bytes_of_one_that_went_through(runs, stage):
    assert_same_run(runs / f"stopped-{stage}", runs / f"espo-{stage}")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_an_ordinary_model_or_adapter(runs, name, stage):
    run = runs / f"{name}-{stage}"
    parameters = dict(unmask.load(run / "model").module.named_parameters())
    last = at_step(run, NUM_UPDATES[name])
    trained = {key.removeprefix("model."): t for key, t in last.items() if key.startswith("model.")}
    assert name == "lora" or trained.keys() == parameters.keys()
    for key, value in trained.items():
        assert torch.equal(parameters[key], value), key
    suffixes = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".toml", ".jinja"}  # nothing is pickled


def test_slices_of_a_parameter_that_processes_cannot_share_evenly(monkeypatch):
    value = torch.arange(1.0, 6.0)
    parameter = torch.nn.Parameter(torch.zeros(0))
    parameter.ds_tensor = torch.zeros(3)
    monkeypatch.setattr(zero, "num_ranks", lambda: 2)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(zero, "rank", lambda rank=rank: rank)
        found.append(zero._share(parameter, value).tolist())
    assert found == [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on_from_a_checkpoint(runs, stage, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(runs / f"espo-{stage}", run)
    (run / "summary.json").unlink()
    for path in list_checkpoints(run / "checkpoints"):
        if path.name > "step-00000003":
            shutil.rmtree(path)
    run_recipe(single(runs, "espo", "uneven"), run, SilentView(), resume=True)
    two, one = at_step(runs / f"espo-{stage}", 4), at_step(run, 4)
    for name in one:
        assert torch.allclose(two[name], one[name], rtol=0, atol=STEP_BOUND), name


def test_the_two_configurations_differ_in_the_stage_alone():
    two, three = (yaml.safe_load((ACCELERATE / name).read_text()) for name in ("zero2.yaml", "zero3.yaml"))
    assert (two["deepspeed_config"].pop("zero_stage"), three["deepspeed_config"].pop("zero_stage")) == STAGES
    assert two == three


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1", "zero_stage = 1: with DeepSpeed it must be 2 or 3"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device = cpu"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "offload_param_device = cpu"),
        ("ACCELERATE_DEEPSPEED_ZERO3_INIT", "true", "zero3_init_flag = True"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "deepspeed_config_file = ds.json"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "optimizer.max_grad_norm does that"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", "gradient_accumulation_steps = 2"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision = bf16"),
    ],
)
def test_what_cannot_be_kept_of_the_launchers_settings_is_refused(variable, value, message, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false")
    check_launcher()
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message) as caught:
        check_launcher()
    assert "\n" not in str(caught.value)
