"""FSDP2 on two gloo processes: the same numbers as one process, whatever is sampled, saved or resumed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import unmask
from tests.checkpoints import write_checkpoint
from tests.distributed_run import Uneven
from tests.helpers import DigitSum, tiny_policy
from tests.test_distributed import ROOT, launch
from tests.test_resume import assert_same_run, train_tables
from unmask.build import sft_recipe, train_recipe
from unmask.checkpoint import list_checkpoints
from unmask.config import dump_toml
from unmask.errors import ConfigError
from unmask.launch import run_recipe
from unmask.run_log import SilentView
from unmask.samplers import SAMPLERS
from unmask.sharding import check_launcher
from unmask.tasks import TASKS

FSDP2 = ["--config_file", str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")]
ZERO2 = ["--config_file", str(ROOT / "recipes" / "accelerate" / "fsdp2-zero2.yaml")]
NAMES = ("espo", "diffu_grpo", "lora")
FAMILIES = ("llada", "Dream")
STEP_BOUND = 1e-6  # float32 sums in another order; the bound for one step


def tables(model: Path, name: str, sampler: str) -> dict:
    """The recipe of a run; "lora" is ESPO on adapters."""
    algorithm = "espo" if name == "lora" else name
    found = train_tables(model, algorithm, num_batches=2, eval_every=1, save_every=1, save_total_limit=9)
    found |= {"task": {"type": "digit_sum"}, "sampler": {"type": sampler}}
    if name == "espo":
        found["optimizer"] |= {"max_grad_norm": 1e3}  # the others are clipped
    if name == "lora":
        found["model"] |= {"lora": {"rank": 4, "alpha": 8}}
    # groups of four among three prompts: rows 0-5 and 6-11 split the second group
    return found | {"rollout": {"prompts_per_batch": 3, "group_size": 4}}


def supervised_tables(folder: Path, family: str) -> dict:
    """Float32 adapters on a bfloat16 base with layers computed again, as a large model is trained."""
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lora = {"rank": 4, "alpha": 8.0}
    return {
        "seed": 1,
        "model": {"path": str(folder / family), "gradient_checkpointing": True, "lora": lora},
        "data": {"file": str(folder / "pairs.jsonl"), "gen_length": 6, "batch_size": 8},
        "trainer": {"num_batches": 2, "save_every": 1, "save_total_limit": 9},
        "optimizer": {"lr": 1e-2, "max_grad_norm": 1.0},
    }


def train_args(folder: Path, name: str, output: str, *extra: str) -> list[str]:
    recipe = folder / f"{name}.toml"
    recipe.write_text(dump_toml(tables(folder / "base", name, "uneven")))
    return ["train", str(recipe), "--quiet", "--output", str(folder / output), *extra]


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    """The names that distributed_run.py registers, in this process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "digit_sum", DigitSum)
        patch.setitem(SAMPLERS, "uneven", Uneven)
        yield


@pytest.fixture(scope="module")
def runs(registered, tmp_path_factory) -> Path:
    """Runs of two processes, sharded: one of each algorithm, one that is stopped in its third update and resumed."""
    folder = tmp_path_factory.mktemp("sharding")
    tiny_policy(dtype=torch.float32).save(folder / "base")
    commands = [
        train_args(folder, "espo", "espo"),
        ["then", *train_args(folder, "diffu_grpo", "diffu_grpo")],
        ["then", *train_args(folder, "lora", "lora")],
        ["then", *train_args(folder, "espo", "stopped", "kill=3")],
        ["then", "train", "--quiet", "--resume", str(folder / "stopped")],
        ["then", *train_args(folder, "espo", "zero2", "FSDP_RESHARD_AFTER_FORWARD=false")],  # as the launcher sets it
    ]
    for family in FAMILIES:
        write_checkpoint(family, folder / family, dtype=torch.bfloat16)
        (folder / f"{family}.toml").write_text(dump_toml(supervised_tables(folder, family)))
        output = str(folder / f"sft-{family}")
        commands.append(["then", "sft", str(folder / f"{family}.toml"), "--quiet", "--output", output])
    result = launch(2, folder / "started", [arg for command in commands for arg in command], FSDP2)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    for name in NAMES:
        recipe = train_recipe(tables(folder / "base", name, "roar"), folder)
        run_recipe(recipe, folder / f"single-{name}", SilentView())
    for family in FAMILIES:
        recipe = sft_recipe(supervised_tables(folder, family), folder)
        run_recipe(recipe, folder / f"single-sft-{family}", SilentView())
    return folder


def at_step(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimiser state right after an update."""
    path = next(p for p in list_checkpoints(run / "checkpoints") if p.name.startswith(f"step-{step:08d}-"))
    tensors = load_file(path / "tensors.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(("model.", "optimizer."))}


@pytest.mark.parametrize("name", NAMES)
def test_one_sharded_step_equals_the_step_of_one_process(runs, name):
    two, one = at_step(runs / name, 1), at_step(runs / f"single-{name}", 1)
    assert two.keys() == one.keys()
    last = at_step(runs / f"single-{name}", 2)
    assert max(float((last[key] - one[key]).abs().max()) for key in one if key.startswith("model.")) > 5e-4  # lr / 2
    assert max(float(one[key].abs().max()) for key in one if key.endswith("exp_avg")) > 1e-4  # a gradient was there
    for key in one:
        assert torch.allclose(two[key], one[key], rtol=0, atol=STEP_BOUND), key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_step_of_adapters_on_a_half_precision_base_equals_that_of_one_process(runs, family):
    two, one = at_step(runs / f"sft-{family}", 1), at_step(runs / f"single-sft-{family}", 1)
    assert two.keys() == one.keys() and all("lora_" in key for key in one if key.startswith("model."))
    assert max(float(one[key].abs().max()) for key in one if "lora_B" in key) > 5e-3  # lr / 2; zero before
    for key in one:
        assert torch.allclose(two[key], one[key], rtol=0, atol=STEP_BOUND), key
    final = load_file(runs / f"sft-{family}" / "model" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in final.values())
    assert unmask.load(runs / f"sft-{family}" / "model").adapters == ("default",)


@pytest.mark.parametrize("name", NAMES)
def test_sharded_sampling_equals_that_of_one_process_though_a_process_makes_more_forwards(runs, name):
    two, one = ((runs / run / "rollouts.jsonl").read_text().splitlines() for run in (name, f"single-{name}"))
    assert len(two) == len(one) == 24
    assert two[:12] == one[:12]  # the later ones come from weights that differ by rounding
    two, one = (json.loads((runs / run / "summary.json").read_text())["base"] for run in (name, f"single-{name}"))
    for row in (*two, *one):
        del row["seconds"], row["tokens_per_second"]
    assert two == one


def test_a_sharded_run_has_the_kl_to_a_sharded_reference(runs):
    two, one = ((runs / run / "metrics.jsonl").read_text().splitlines() for run in ("espo", "single-espo"))
    pairs = [(json.loads(a), json.loads(b)) for a, b in zip(two, one, strict=True)]
    assert abs(pairs[-1][1]["kl"]) > 1e-4  # the policy has left its reference
    for a, b in pairs:
        # float32 sums of 4 rows x 16 tokens of about 3 nats; four updates apart
        assert a["kl"] == pytest.approx(b["kl"], abs=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_stopped_sharded_run_ends_with_the_bytes_of_one_that_went_through(runs):
    assert_same_run(runs / "stopped", runs / "espo")


@pytest.mark.parametrize("name", ["espo", "lora"])
def test_what_a_sharded_run_saves_is_an_ordinary_model_or_adapter(runs, name):
    config = "config.json" if name == "espo" else "adapter_config.json"
    two, one = (json.loads((runs / run / "model" / config).read_text()) for run in (name, f"single-{name}"))
    for content in (two, one):
        content["target_modules"] = set(content.get("target_modules", ()))  # PEFT writes a set, in any order
    assert two == one
    parameters = dict(unmask.load(runs / name / "model").module.named_parameters())
    trained = {key.removeprefix("model."): t for key, t in at_step(runs / name, 4).items() if key.startswith("model.")}
    assert name == "lora" or trained.keys() == parameters.keys()
    for key, value in trained.items():
        assert torch.equal(parameters[key], value), key


def test_parameters_that_stay_whole_from_forward_to_backward_follow_the_updates(runs):
    sliced, whole = at_step(runs / "espo", 4), at_step(runs / "zero2", 4)
    for key in sliced:
        assert torch.equal(whole[key], sliced[key]), key


def test_the_two_configurations_differ_in_that_alone():
    sliced, whole = (yaml.safe_load(Path(file).read_text()) for _, file in (FSDP2, ZERO2))
    assert whole["fsdp_config"].pop("fsdp_reshard_after_forward") is False
    assert sliced["fsdp_config"].pop("fsdp_reshard_after_forward") is True
    assert sliced == whole


def test_one_process_goes_on_from_a_sharded_checkpoint(runs, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(runs / "espo", run)
    (run / "summary.json").unlink()
    for path in list_checkpoints(run / "checkpoints"):
        if path.name > "step-00000003":
            shutil.rmtree(path)
    run_recipe(train_recipe(tables(runs / "base", "espo", "uneven"), run), run, SilentView(), resume=True)
    two, one = at_step(runs / "espo", 4), at_step(run, 4)
    for name in one:
        assert torch.allclose(two[name], one[name], rtol=0, atol=STEP_BOUND), name


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version = 1: must be 2 here"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params = true: must be false here"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading = true: must be false here"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "model.gradient_checkpointing = true does that"),
    ],
)
def test_what_cannot_be_kept_of_the_launchers_settings_is_refused(variable, value, message, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message) as caught:
        check_launcher()
    assert "\n" not in str(caught.value)


def test_deepspeed_is_an_extra(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'unmask\[deepspeed\]'"):
        check_launcher()
