"""`unmask estimate`: its memory is what a run takes, its counts are those of the model, its advice holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from tests.estimate_run import read
from unmask.bases import open_for_training, reference_policy
from unmask.build import Recipe, train_recipe
from unmask.cli import main
from unmask.critic import make_value_model
from unmask.errors import ConfigError, ModelError
from unmask.estimation import costs, estimate_run, skeleton
from unmask.estimation.footprint import Footprint, Lengths, warnings
from unmask.estimation.machines import GIB, MACHINES, UTILISATION, Machine, Setting
from unmask.estimation.memory_model import META, Canvases, Ledger, Rehearsal, adapt
from unmask.models.adapters import LoraConfig, wrap
from unmask.models.llada import LLaDAConfig, LLaDAForMaskedLM
from unmask.models.tiny import character_tokenizer

TOKENS = {"max_sequence_length": 512, "eos_token_id": 1, "pad_token_id": 0, "mask_token_id": 2}
LLADA_8B = {
    "model_type": "llada", "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288,
    "embedding_size": 126464, "vocab_size": 126464, "weight_tying": False, **TOKENS,
}  # fmt: skip


def llada(hidden: int, layers: int, inner: int, vocab: int = 48, heads: int = 4) -> LLaDAConfig:
    return LLaDAConfig(
        d_model=hidden, n_layers=layers, mlp_hidden_size=inner, n_heads=heads, n_kv_heads=heads, vocab_size=vocab,
        embedding_size=vocab, **TOKENS,
    )  # fmt: skip


ESPO = {"type": "espo", "num_iterations": 2, "num_masks": 2, "kl_coef": 0.01}


def tables(
    path: Path, *, micro: int = 16, prompts: int = 2, group: int = 4, lora: int = 0, algorithm: dict | None = None
) -> dict:
    """A run of two updates on prompts and completions of 64 tokens."""
    sampler = {"type": "low_confidence", "gen_length": 64, "num_steps": 4}
    return {
        "model": {"path": str(path), **({"lora": {"rank": lora}} if lora else {})},
        "task": {"type": "sudoku"},
        "algorithm": algorithm or ESPO,
        "sampler": sampler,
        "rollout": {"prompts_per_batch": prompts, "group_size": group, "batch_size": 4},
        "trainer": {"num_batches": 1, "micro_batch_size": micro, "save_every": 0, "monitor_rows": 4},
        "evaluation": {"num_examples": 4, "batch_size": 4, "sampler": sampler},
    }


# ---- against real runs

DGA = {"type": "dga", "num_iterations": 2}
GEOMETRIES = {
    "warm-up": (llada(32, 2, 64), tables(Path(), micro=4, group=2, lora=4)),
    "activations": (llada(128, 3, 384), tables(Path())),
    "activations-lora": (llada(128, 3, 384), tables(Path(), lora=16)),
    "weights": (llada(256, 4, 768), tables(Path(), micro=2, prompts=1, group=2)),
    "weights-lora": (llada(256, 4, 768), tables(Path(), micro=2, prompts=1, group=2, lora=64)),
    # a value model with a copy of the weights, and with an adapter; its passes take as much as the updates
    "energy": (llada(128, 3, 384), tables(Path(), micro=8, prompts=4, algorithm=DGA)),
    "energy-lora": (llada(128, 3, 384), tables(Path(), micro=8, prompts=4, lora=64, algorithm=DGA)),
    "vocabulary": (llada(64, 2, 128, vocab=20_000), tables(Path(), micro=8, group=2)),
}


def check_growth(name: str, place: Path) -> None:
    """Trains in a process of its own; the peak must lie within 15 % of what was measured."""
    files = []
    for geometry in ("warm-up", name):
        config, recipe = GEOMETRIES[geometry]
        LLaDAForMaskedLM(config).save_pretrained(place / geometry)
        character_tokenizer("abcdefghijkl0123456789").save_pretrained(place / geometry)
        recipe = {**recipe, "model": {**recipe["model"], "path": str(place / geometry)}}
        files.append(place / f"{geometry}.json")
        files[-1].write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "tests.estimate_run", *map(str, files), str(place / "runs")]
    # larger tensors get pages of their own: glibc would keep freed ones in its heap, see docs/estimate.md
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    ratio = estimate_run(read(files[-1]), Setting()).peak / int(done.stdout.splitlines()[-1])
    assert abs(ratio - 1) <= 0.15, ratio


needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


@needs_linux
def test_the_peak_is_what_a_real_run_grows_by(tmp_path):
    check_growth("activations", tmp_path)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights", "weights-lora", "activations-lora", "vocabulary", "energy", "energy-lora"])
def test_the_peak_is_what_real_runs_of_other_shapes_grow_by(name, tmp_path):
    pytest.importorskip("peft")
    check_growth(name, tmp_path)


# ---- the ledger


def test_a_ledger_counts_what_is_alive():
    layer = nn.Linear(4, 8, bias=False, device=META)
    x = torch.empty(16, 4, device=META)
    with Ledger([x, layer.weight], vocab=-1) as ledger:
        out = layer(x)  # 16 x 8 float32
        assert ledger.live.total() == 16 * 8 * 4
        other = out * 2
        del out, other
        assert ledger.live.total() == 0
        out = layer(x)
        out.sum().backward()  # the gradient of the weight: 8 x 4
        del out
    assert ledger.live.total() == 8 * 4 * 4
    assert ledger.peak.total() >= 2 * 16 * 8 * 4


def rehearsal(config: LLaDAConfig, lora: int = 0) -> Rehearsal:
    with META:
        module = LLaDAForMaskedLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if lora:
        adapt(module, lora, lambda name: name != "lm_head")
    return Rehearsal(module, is_gpu=True)


def test_adapters_are_rehearsed_as_peft_computes_them():
    pytest.importorskip("peft")
    config = llada(64, 3, 128)
    ours = rehearsal(config, lora=8)
    with META:
        module = LLaDAForMaskedLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    theirs = Rehearsal(wrap(module, LoraConfig(rank=8), seed=0), is_gpu=True)
    assert sum(p.numel() for p in ours.trained) == sum(p.numel() for p in theirs.trained)
    canvases = Canvases(4, 32, 8)
    a, b = (r.update(canvases, num_micro_batches=2) for r in (ours, theirs))
    assert a["gradients"] == b["gradients"]
    assert a.total() == pytest.approx(b.total(), rel=0.01)  # PEFT's own intermediate names and orders
    assert ours.step() == theirs.step()


def test_checkpointed_layers_keep_their_inputs_and_one_layer():
    canvases, activations = Canvases(4, 64, 16), []
    for layers in (4, 8):
        model = rehearsal(llada(64, layers, 256))
        model.checkpoint_layers()
        activations.append(model.update(canvases, num_micro_batches=2)["activations"])
    inputs = 4 * 64 * 64 * 2  # of one layer: b T H in bfloat16
    assert activations[1] - activations[0] == 4 * inputs


def test_logits_of_a_sampler_are_those_of_its_open_slots():
    model = rehearsal(llada(32, 2, 64, vocab=50_000))
    small, large = (model.sample(Canvases(2, 64, wanted), 1.0)["logits"] for wanted in (100, 200))
    assert large - small == pytest.approx(2 * 100 * 50_000 * (2 + 4), rel=0.1)  # in bfloat16 and in float32


def test_adam_keeps_two_numbers_and_needs_one_more_on_a_gpu():
    model = rehearsal(llada(64, 2, 128))
    trained = sum(p.numel() * 2 for p in model.trained)
    kept, peak = model.step()
    assert kept == pytest.approx(2 * trained, rel=0.01)  # and a count for each tensor
    assert peak["gradients"] == trained and peak["buffers"] == pytest.approx(trained, rel=0.1)


# ---- counts


@pytest.fixture(scope="module")
def config_8b(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("llada") / "config.json"
    file.write_text(json.dumps(LLADA_8B))
    return file


def test_parameters_of_llada_8b(config_8b):
    recipe = train_recipe(tables(Path("missing"), lora=128), Path())
    found = skeleton.open_skeleton(recipe.model, config_8b)
    # r (in + out) of q, k, v, o and gate, up, down in 32 layers
    adapters = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 12288))
    assert (found.num_trained, found.num_parameters) == (adapters, 8_015_581_184 + adapters)
    assert found.weight_bytes == 2 * 8_015_581_184 + 4 * adapters
    embedding = 126464 * 4096
    assert found.num_head == embedding
    assert found.num_body == 8_015_581_184 - 2 * embedding - 65 * 4096 + adapters  # without the norms
    assert found.cache_bytes_per_token == 2 * 32 * 4096 * 2


def test_a_base_in_4_bits(config_8b):
    recipe = train_recipe(tables(Path("missing"), lora=8), Path())
    plain = skeleton.open_skeleton(recipe.model, config_8b)
    packed = skeleton.open_skeleton(replace(recipe.model, quantization="nf4"), config_8b)
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    saved = linears * (2 - (0.5 + 1 / 64 + 4 / (64 * 256)))
    assert plain.weight_bytes - packed.weight_bytes == pytest.approx(saved, abs=1)


def test_computed_flops_and_hours_by_hand(tmp_path):
    setting = Setting("h100", num_gpus=2, prompt_tokens=64)
    recipe, lengths = small_recipe(tmp_path), Lengths(64, 64, 64, 4, 4)
    found = {cost.name: cost for cost in costs(Footprint(recipe, setting, lengths), rate=1e9)}
    body, head, width, layers, tokens = 3 * (4 * 128**2 + 3 * 128 * 384), 48 * 128, 128, 3, 128
    # copies come in complementary pairs: half of 64 positions each, on the mean
    forward = 2 * body * tokens + 4 * tokens**2 * width * layers + 2 * head * 32
    sequences = 2 * 8 * 2  # updates, rollouts, masks
    assert found["update"].device_flops == pytest.approx(sequences * 3 * forward)
    num_parameters = body + 2 * head + 7 * 128
    assert found["update"].formula_flops == sequences * 6 * num_parameters * tokens
    seconds = found["update"].device_flops / (1e9 * UTILISATION["update"] * 2)
    assert found["update"].hours == pytest.approx(seconds / 3600)
    # the second draw's old pass, and the reference's for both
    assert found["old policy"].device_flops * 2 == pytest.approx(found["reference"].device_flops)


def small_recipe(place: Path, lora: int = 0, **settings) -> Recipe:
    llada(128, 3, 384).save_pretrained(place)
    return train_recipe(tables(place, lora=lora, **settings), Path())


def test_frozen_weights_have_no_gradients_and_no_copy(tmp_path):
    setting, lengths = Setting("h100"), Lengths(64, 64, 64, 4, 4)
    full = Footprint(small_recipe(tmp_path, micro=4), setting, lengths)  # several: gradients wait for the last
    lora = Footprint(small_recipe(tmp_path, micro=4, lora=4), setting, lengths)
    assert full.resident()["optimizer"] == pytest.approx(2 * full.skeleton.weight_bytes, rel=0.01)
    assert full.resident()["reference"] == full.skeleton.weight_bytes and lora.resident()["reference"] == 0
    assert lora.phase("update")["gradients"] == lora.skeleton.trained_bytes
    assert full.phase("update")["gradients"] == full.skeleton.weight_bytes
    forward = lora.skeleton.forward_flops(128, 128**2, 32)
    assert lora.skeleton.backward_flops(forward, 128, False) < 1.2 * forward
    assert full.skeleton.backward_flops(forward, 128, False) == 2 * forward


@pytest.mark.parametrize(
    ("algorithm", "lora"), [("dga", 0), ("dga", 4), ("embr_e", 4)], ids=["copy", "adapter", "head"]
)
def test_a_value_model_is_counted_as_it_is_built(algorithm, lora, tmp_path):
    recipe = small_recipe(tmp_path, lora=lora, algorithm={"type": algorithm})
    footprint = Footprint(recipe, Setting("h100"), Lengths(64, 64, 64, 4, 4))
    LLaDAForMaskedLM(llada(128, 3, 384)).save_pretrained(tmp_path)
    character_tokenizer("0123456789").save_pretrained(tmp_path)
    policy = open_for_training(tmp_path, recipe.model, seed=0)
    needs = recipe.algorithm.value.needs
    critic = make_value_model(policy, reference_policy(policy), needs, seed=0, micro_batch_size=16)
    rollouts = replace(footprint.sketch, rewards=torch.arange(8.0).double(), groups=torch.zeros(8).long())
    critic.learn(rollouts, lambda values: (values * rollouts.rewards).sum())
    states = [t for state in critic.optimizer.state.values() for t in state.values()]
    sizes = footprint.value_sizes
    assert sizes.num_parameters == sum(p.numel() for p in critic.parameters)
    weights = sum(p.numel() * p.element_size() for p in critic.parameters)
    assert sizes.trunk_bytes + sizes.head_bytes == weights + sum(t.numel() * t.element_size() for t in states)
    kept = critic._seen[1] if algorithm == "embr_e" else torch.zeros(0)
    assert sizes.state_bytes == kept.numel() * kept.element_size()
    peak = footprint.phase("value")
    assert footprint.phases.index("value") == 2 and peak["value model"] == weights + sizes.state_bytes + sum(
        t.numel() * t.element_size() for t in states
    )


def test_the_flops_of_a_value_model_by_hand(tmp_path):
    lengths = Lengths(40, 64, 64, 4, 4)
    body, width, layers = 3 * (4 * 128**2 + 3 * 128 * 384), 128, 3
    for algorithm, tokens, updates in (("dga", 104, 1), ("embr_e", 40, 0)):
        recipe = small_recipe(tmp_path, algorithm={"type": algorithm})
        found = {cost.name: cost for cost in costs(Footprint(recipe, Setting("h100"), lengths), rate=1e9)}
        forward = 2 * body * tokens + 4 * tokens**2 * width * layers  # no output head
        # the numbers of the 8 rows; for an update two forwards and a backward of two more
        assert found["value model"].device_flops == pytest.approx(8 * forward * (1 + 4 * updates))
        assert found["value model"].passes.backward_sequences == 8 * updates


def test_shards_divide_what_ddp_repeats(tmp_path):
    recipe, lengths = small_recipe(tmp_path, micro=2), Lengths(64, 64, 64, 4, 4)
    ddp = Footprint(recipe, Setting("h100", num_gpus=4), lengths).phase("update")
    fsdp = Footprint(recipe, Setting("h100", num_gpus=4, is_sharded=True), lengths).phase("update")
    for part in ("weights", "reference", "gradients"):
        assert fsdp[part] == pytest.approx(ddp[part] / 4, abs=4)
    assert fsdp["activations"] == ddp["activations"]
    assert ddp["buffers"] == ddp["gradients"]  # DDP's buckets
    layer = 4 * (4 * 128**2 + 3 * 128 * 384 + 2 * 128)
    assert fsdp["buffers"] == 3 * layer + 4 * (2 * 48 * 128 + 128)  # two layers and a gradient; embedding, head, norm


def test_the_peak_is_taken_where_a_rising_share_has_masked_everything(tmp_path):
    tree = tables(tmp_path)
    tree["algorithm"] = {"type": "unigrpo", "num_iterations": 2}
    llada(128, 3, 384).save_pretrained(tmp_path)
    footprint = Footprint(train_recipe(tree, Path()), Setting("h100"), Lengths(64, 64, 64, 4, 4))
    # 8 rollouts of one copy; the last pass masks all 64 tokens of each, the first a random share
    assert int(footprint.draw.scored.sum()) == 8 * 64
    assert footprint.canvases == Canvases(8, 128, 64)


# ---- advice


def test_the_advised_batch_fits_and_the_next_larger_one_hardly(tmp_path):
    recipe, lengths = small_recipe(tmp_path, micro=64, prompts=8, group=4), Lengths(64, 64, 64, 4, 4)
    setting = Setting("h100")
    footprint = Footprint(recipe, setting, lengths)
    need = footprint.phase("update").total()
    machine = Machine((0.5 * need / GIB + 0.8) / 0.94, 1e12, 1e12)
    (line,) = warnings(footprint, {"update": footprint.phase("update")}, machine)
    assert line.startswith("update needs ") and "model.gradient_checkpointing = true" in line
    size = int(line.partition("trainer.micro_batch_size = ")[2].partition(";")[0])

    def total(micro: int) -> int:
        trainer = replace(recipe.trainer, micro_batch_size=micro)
        return Footprint(replace(recipe, trainer=trainer), setting, lengths).phase("update").total()

    assert 1 < size < 64 and total(size) <= 0.5 * need < total(size + 8)


def test_eight_billion_weights_do_not_train_on_one_small_gpu(config_8b):
    recipe = train_recipe(tables(Path("missing"), micro=2, prompts=1, group=2), Path())
    setting = Setting("a100-80", prompt_tokens=200, config=config_8b)
    footprint = Footprint(recipe, setting, Lengths(200, 200, 64, 4, 4))
    (line,) = warnings(footprint, {"step": footprint.phase("step")}, MACHINES["a100-80"])
    assert "[model.lora]" in line and "FSDP2 on 4 devices" in line and "micro_batch_size" not in line


def test_what_fits_draws_no_warning(tmp_path):
    assert estimate_run(small_recipe(tmp_path), Setting("h100", prompt_tokens=64)).warnings == []


# ---- the command


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    llada(32, 2, 64).save_pretrained(tmp_path / "model")
    file = tmp_path / "recipe.toml"
    text = """
[model]
path = "model"
[task]
type = "sudoku"
num_train = 8
num_validation = 8
num_test = 8
[algorithm]
type = "espo"
[sampler]
type = "low_confidence"
gen_length = 64
[trainer]
num_batches = 2
"""
    file.write_text(text)
    return file


def test_the_command_shows_and_writes_an_estimate(recipe_file, capsys):
    out = recipe_file.with_suffix(".json")
    assert main(["estimate", str(recipe_file), "--gpu", "l40s", "--num-gpus", "8", "--json", str(out)]) == 0
    shown = capsys.readouterr()
    assert "espo on 8 x l40s, DDP" in shown.out and "activations" in shown.out and shown.err == ""
    assert "prompts of 200 tokens (change with --prompt-tokens), as the model's tokenizer is not at hand" in shown.out
    tree = json.loads(out.read_text())
    assert tree["memory"]["peak_bytes"] == sum(tree["memory"]["phases"][tree["memory"]["peak_phase"]].values())
    assert [item["name"] for item in tree["passes"]] == [
        "rollout", "old", "reference", "monitor", "update", "before and after"
    ]  # fmt: skip
    assert tree["hours"] == pytest.approx(sum(item["hours"] for item in tree["passes"]))


def test_prompts_are_counted_where_the_tokenizer_is_at_hand(recipe_file):
    character_tokenizer("0123456789|").save_pretrained(recipe_file.parent / "model")
    out = recipe_file.with_suffix(".json")
    assert main(["estimate", str(recipe_file), "--gpu", "h100", "--json", str(out), "--utilisation", "0.5"]) == 0
    tree = json.loads(out.read_text())
    assert tree["tokens"]["prompt_mean"] == 17 and set(tree["utilisation"].values()) == {0.5}


def test_missing_task_data_is_said(recipe_file, capsys):
    assert main(["estimate", str(recipe_file), "task.train_data=none.csv", "--gpu", "h100"]) == 0
    assert "none.csv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h101"], "--gpu h101: unknown"),
        (["--gpu", "h100", "--num-gpus", "0"], "--num-gpus 0: must be at least 1"),
        (["--gpu", "h100", "--shard"], "one device has nothing to share"),
        (["--gpu", "h100", "--utilisation", "2"], "--utilisation 2: must be a number above 0"),
        (["--gpu", "h100", "--utilisation", "sleep=0.1"], "rollout, score, update, evaluate"),
        (["--config", "none.json"], "none.json: cannot be read"),
        (["model.path=missing"], "config.json: cannot be read"),
    ],
)
def test_wrong_options_are_refused_on_one_line(arguments, message, recipe_file, capsys):
    assert main(["estimate", str(recipe_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_hub_model_that_cannot_be_had_points_to_config(recipe_file, capsys, monkeypatch):
    def offline(*_):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(skeleton, "hf_hub_download", offline)
    assert main(["estimate", str(recipe_file), "model.path=owner/name"]) == 2
    assert "--config FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"model_type": "llada2_moe", "num_experts": 8}, ModelError),
        ({"model_type": "sdar", "num_hidden_layers": 1}, ConfigError),
    ],
)
def test_models_that_are_not_trained_are_refused(content, error, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    with pytest.raises(error, match=r"mixture of experts|block-causal"):
        estimate_run(train_recipe(tables(tmp_path), Path()), Setting("h100", config=file))
