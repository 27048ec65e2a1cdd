"""Adapters on checkpoints in the authors' format: what learns, what is refused, files, merging, whole runs."""

from __future__ import annotations

import json
from dataclasses import dataclass

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import unmask
from tests.checkpoints import write_checkpoint
from tests.helpers import tiny_policy
from unmask import launch
from unmask.bases import reference_policy
from unmask.cli import main
from unmask.errors import ConfigError, ModelError
from unmask.merging import merge
from unmask.models import LoraConfig, with_adapter, with_lora
from unmask.models.adapters import adapter_parameters
from unmask.objectives import ALGORITHMS
from unmask.tasks import TASKS
from unmask.tasks.sudoku import Sudoku
from unmask.types import Example, Score, Status

SMALL = LoraConfig(rank=4, alpha=8.0)
FAMILIES = ("llada", "Dream")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: write_checkpoint(family, folder / family) for family in FAMILIES}


def randomise(policy, name="default", seed=3, scale=0.2):
    """Values in B, which is zero at first, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(policy.module, name):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


def canvas_of(policy, rows=3, length=12, seed=5):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, min(200, len(policy.tokenizer)), (rows, length), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.5
    return ids.masked_fill(masked, policy.mask_token_id), masked, ids[masked]


def logp(policy):
    canvas, masked, targets = canvas_of(policy)
    return policy.token_outputs(canvas, None, masked, targets=targets, want=("logp",)).logp


def scalar(policy):
    canvas, masked, _ = canvas_of(policy)
    return policy.token_outputs(canvas, None, masked, want=("scalar",)).scalar


def gradients(policy, name):
    return {key: p.grad for key, p in adapter_parameters(policy.module, name)}


def with_energy(policy, is_checkpointed):
    policy = randomise(with_lora(policy, SMALL, seed=0))
    policy.add_adapter("energy", LoraConfig(rank=2, alpha=2.0), seed=1, has_scalar_head=True)
    randomise(policy, "energy", seed=4)
    if is_checkpointed:
        policy.enable_gradient_checkpointing()
    return policy


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "unmask_tiny"])
def test_gradient_reaches_only_the_active_adapter(checkpoints, family, is_checkpointed):
    base = unmask.load(checkpoints[family]) if family in checkpoints else tiny_policy(dtype=torch.float32)
    policy = with_energy(base, is_checkpointed)
    logp(policy).sum().backward()
    assert all(bool(grad.abs().sum() > 0) for grad in gradients(policy, "default").values())
    assert all(grad is None for grad in gradients(policy, "energy").values())
    policy.module.zero_grad()
    with policy.use("energy"):
        scalar(policy).sum().backward()
    assert all(grad is None for grad in gradients(policy, "default").values())
    assert all(bool(grad.abs().sum() > 0) for grad in gradients(policy, "energy").values())
    frozen = [n for n, p in policy.module.named_parameters() if "lora_" not in n and "scalar_heads" not in n]
    assert frozen and all(policy.module.get_parameter(n).grad is None for n in frozen)


def test_checkpointing_gives_the_same_bits(checkpoints):
    plain, saving = (with_energy(unmask.load(checkpoints["llada"]), is_on) for is_on in (False, True))
    saved: list[int] = []
    for policy in (plain, saving):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            value = logp(policy)
        saved.append(-1)
        value.sum().backward()
    first, second = saved[: saved.index(-1)], saved[saved.index(-1) + 1 : -1]
    assert sum(second) < sum(first) / 3  # one input per layer instead of all that is in it
    for key, grad in gradients(plain, "default").items():
        assert torch.equal(grad, gradients(saving, "default")[key]), key


def test_a_switched_off_adapter_is_the_base_bit_for_bit(checkpoints):
    base = logp(unmask.load(checkpoints["Dream"]))
    policy = randomise(with_lora(unmask.load(checkpoints["Dream"]), SMALL, seed=0))
    assert not torch.allclose(logp(policy), base, atol=1e-2)
    assert torch.equal(logp(reference_policy(policy)), base)
    assert not logp(reference_policy(policy)).requires_grad
    with policy.use(None):
        assert torch.equal(logp(policy), base)
    assert policy.switch.active == "default" and logp(policy).requires_grad


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_reference_may_be_scored_between_forward_and_backward(checkpoints, is_checkpointed):
    grads = []
    for with_reference in (False, True):
        policy = with_energy(unmask.load(checkpoints["llada"]), is_checkpointed)
        value = logp(policy)
        if with_reference:
            logp(reference_policy(policy))
        value.sum().backward()
        grads.append(gradients(policy, "default"))
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])


class TestWrongOrders:
    """The sequences that give wrong gradients in PEFT without a word."""

    @pytest.fixture(params=[False, True], ids=["plain", "checkpointed"])
    def policy(self, request, checkpoints):
        return with_energy(unmask.load(checkpoints["llada"]), request.param)

    def test_switching_to_another_trained_adapter_with_a_backward_to_come(self, policy):
        value = logp(policy)
        with pytest.raises(ModelError, match="cannot switch to adapter 'energy' while the backward of adapter"):
            policy.use("energy").__enter__()
        value.sum().backward()  # still right
        with policy.use("energy"):
            scalar(policy).sum().backward()

    def test_leaving_an_adapter_with_its_backward_to_come(self, policy):
        kept = []
        block = policy.use("energy")
        block.__enter__()
        kept.append(scalar(policy).sum())
        with pytest.raises(ModelError, match="left adapter 'energy' while the backward of adapter 'energy'"):
            block.__exit__(None, None, None)
        with pytest.raises(ModelError, match="backward through adapter 'energy' while 'default' is active"):
            kept[0].backward()

    def test_a_backward_inside_the_block_of_another_adapter(self, policy):
        value = logp(policy).sum()
        with torch.no_grad(), policy.use("energy"):
            scalar(policy)
            with pytest.raises(ModelError, match="backward through adapter 'default' while 'energy' is active"):
                value.backward()

    def test_a_graph_that_is_thrown_away_is_not_pending(self, policy):
        logp(policy)
        with policy.use("energy"):
            scalar(policy)
            scalar(policy).sum().backward()
        assert all(bool(grad.abs().sum() > 0) for grad in gradients(policy, "energy").values())

    def test_an_unknown_adapter(self, policy):
        with pytest.raises(ModelError, match=r"no adapter 'enrgy' on this model\. It has: default, energy"):
            policy.use("enrgy").__enter__()


def test_full_fine_tuning_has_no_adapters_to_use():
    policy = tiny_policy()
    with policy.use(None):
        pass
    with pytest.raises(ModelError, match="no adapter 'default'; the model has none"):
        policy.use("default")


def test_the_default_adapter_is_on_all_seven_projections_and_d1s_on_four(checkpoints):
    for targets, expected in (("all", 7), ("d1_compat", 4), (("q_proj",), 1)):
        policy = with_lora(unmask.load(checkpoints["llada"]), LoraConfig(rank=2, alpha=1.0, targets=targets), seed=0)
        layers = policy.module.config.num_hidden_layers
        assert len(list(adapter_parameters(policy.module, "default"))) == 2 * expected * layers
    config = policy.module.peft_config["default"]
    assert LoraConfig().rank == 128 and LoraConfig().alpha == 64 and config.lora_dropout == 0.0
    with pytest.raises(ConfigError, match="no linear layer 'ff_proj' in this model"):
        with_lora(unmask.load(checkpoints["llada"]), LoraConfig(targets=("ff_proj",)), seed=0)


def test_initial_adapters_depend_on_the_seed_alone_and_leave_the_global_generator_alone(checkpoints):
    values = []
    for seed, outside in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        policy = with_lora(unmask.load(checkpoints["llada"]), SMALL, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        values.append(next(p.clone() for n, p in adapter_parameters(policy.module, "default") if "lora_A" in n))
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_directories_give_the_same_bits_and_peft_reads_them(checkpoints, family, tmp_path):
    policy = randomise(with_lora(unmask.load(checkpoints[family]), SMALL, seed=0))
    policy.save(tmp_path / "adapter")
    again = unmask.load(tmp_path / "adapter")
    assert again.adapters == ("default",) and again.stop_token_ids == policy.stop_token_ids
    assert torch.equal(logp(again), logp(policy))
    outside = peft.PeftModel.from_pretrained(unmask.load(checkpoints[family]).module, tmp_path / "adapter")
    canvas, _, _ = canvas_of(policy)
    ours = policy.module(canvas).logits
    assert torch.equal(outside(canvas).logits, ours)


def test_a_scalar_head_is_saved_and_loaded_with_its_adapter(checkpoints, tmp_path):
    from unmask.models import adapter_files

    policy = with_energy(unmask.load(checkpoints["llada"]), False)
    with torch.no_grad(), policy.use("energy"):
        before = scalar(policy)
    adapter_files.save(tmp_path / "energy", policy.switch, str(checkpoints["llada"]), name="energy")
    again = unmask.load(tmp_path / "energy")
    assert torch.equal(scalar(again), before) and float(before.abs().min()) > 0


OFFICIAL = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def write_under_authors_names(adapter):
    """An adapter as PEFT saves it on the authors' own LLaDA class."""
    tensors = {}
    for key, value in load_file(adapter / "adapter_model.safetensors").items():
        for ours, theirs in OFFICIAL.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        tensors[key.replace(".model.layers.", ".model.transformer.blocks.")] = value
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = sorted(set(OFFICIAL.values()))
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def test_adapters_under_the_authors_names_are_mapped(checkpoints, tmp_path):
    policy = randomise(with_lora(unmask.load(checkpoints["llada"]), SMALL, seed=0))
    policy.save(tmp_path / "adapter")
    write_under_authors_names(tmp_path / "adapter")
    assert "model.transformer.blocks.0.attn_out" in " ".join(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    assert torch.equal(logp(unmask.load(tmp_path / "adapter")), logp(policy))


def change_tensors(change):
    def damage(adapter):
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    return damage


def change_config(**keys):
    def damage(adapter):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return damage


BROKEN = {
    "half of a layer is missing": (change_tensors(lambda t: t.pop(sorted(t)[0])), "missing in the file"),
    "a layer of another model": (
        change_tensors(lambda t: t.update({"base_model.model.encoder.0.q.lora_A.weight": torch.ones(4, 8)})),
        "no layer encoder.0.q in this model",
    ),
    "another rank": (change_config(r=2), "has shape .*, the model needs"),
    "no LoRA": (change_config(peft_type="IA3"), "peft_type = 'IA3': only 'LORA'"),
    "no base": (change_config(base_model_name_or_path=None), "must name the model"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "cannot be read"),
    "damaged weights": (lambda a: (a / "adapter_model.safetensors").write_bytes(b"xxxxxxxxxx"), "cannot be read"),
}


@pytest.mark.parametrize("damage, message", BROKEN.values(), ids=list(BROKEN))
def test_broken_adapters_are_refused_in_one_line(checkpoints, tmp_path, damage, message):
    policy = randomise(with_lora(unmask.load(checkpoints["llada"]), SMALL, seed=0))
    policy.save(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(ModelError, match=message) as caught:
        unmask.load(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "family, dtype", [("llada", torch.float32), ("Dream", torch.float32), ("llada", torch.bfloat16)]
)
def test_merged_models_are_ordinary_directories_with_equal_logits(tmp_path, family, dtype, capsys):
    base = write_checkpoint(family, tmp_path / "base", dtype=dtype)
    policy = randomise(with_lora(unmask.load(base), SMALL, seed=0), scale=0.1)
    policy.save(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    assert "nats per token from base and adapter apart" in capsys.readouterr().out
    merged = unmask.load(tmp_path / "merged")
    assert merged.adapters == ()
    original = {key: tensor.shape for f in base.glob("*.safetensors") for key, tensor in load_file(f).items()}
    written = {key: t for f in (tmp_path / "merged").glob("*.safetensors") for key, t in load_file(f).items()}
    assert {key: tensor.shape for key, tensor in written.items()} == original
    assert all(tensor.dtype == dtype for tensor in written.values())
    # W + B A is rounded once to the weights' type: 24 or 8 bits
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    assert torch.allclose(logp(merged), logp(policy), atol=tolerance)
    assert not torch.allclose(logp(merged), logp(unmask.load(base)), atol=tolerance)


def test_merge_refuses_what_it_cannot_do(checkpoints, tmp_path):
    with pytest.raises(ConfigError, match="has no adapter"):
        merge(checkpoints["llada"], tmp_path / "merged")
    with pytest.raises(ConfigError, match="exists already"):
        merge(checkpoints["llada"], tmp_path)


@dataclass(frozen=True)
class Letters(Sudoku):
    """Sudoku prompts with a reward that random models get now and then: text differs, so rewards do."""

    def score(self, example: Example, completion: str) -> Score:
        value = sum(map(ord, completion)) % 7 / 6
        return Score(value, Status.CORRECT if value == 1 else Status.WRONG, super().score(example, completion).facts)


def recipe_text(path, algorithm, extra=""):
    return f"""
seed = 1
[model]
path = "{path}"
{extra}
[model.lora]
rank = 4
alpha = 8.0
[task]
type = "letters"
prompt = "raw"
num_train = 50
num_validation = 4
num_test = 4
[algorithm]
type = "{algorithm}"
[sampler]
type = "low_confidence"
gen_length = 8
num_steps = 4
temperature = 1.0
[rollout]
prompts_per_batch = 2
group_size = 4
[trainer]
num_batches = 2
save_every = 0
monitor_rows = 2
[optimizer]
lr = 1e-2
[evaluation.sampler]
type = "low_confidence"
num_steps = 2
"""


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_algorithm_trains_adapters_and_leaves_the_base_alone(
    checkpoints, family, algorithm, tmp_path, monkeypatch
):
    monkeypatch.setitem(TASKS, "letters", Letters)
    made = []
    build = launch.base_policy
    monkeypatch.setattr(launch, "base_policy", lambda *args: made.append(build(*args)) or made[-1])
    (tmp_path / "recipe.toml").write_text(recipe_text(checkpoints[family], algorithm))
    # those that learn from preferences as published, too
    online = ["rollout.type=groups"] if ALGORITHMS[algorithm].strategies[0] == "pairs" else []
    assert main(["train", str(tmp_path / "recipe.toml"), *online, "--output", str(tmp_path / "run"), "--quiet"]) == 0
    (policy,) = made
    stored = dict(unmask.load(checkpoints[family]).module.named_parameters())
    held = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in policy.module.named_parameters()
        if "lora_" not in name
    }
    assert held.keys() == stored.keys() and all(torch.equal(held[name], stored[name]) for name in stored)
    trained = unmask.load(tmp_path / "run" / "model")
    moved = [p for n, p in adapter_parameters(trained.module, "default") if "lora_B" in n]
    assert moved and all(bool(p.abs().max() > 1e-3) for p in moved)
    assert torch.equal(logp(trained), logp(policy))


def test_a_run_starts_from_an_adapter_which_stays_its_reference(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "letters", Letters)
    first = randomise(with_lora(unmask.load(checkpoints["llada"]), SMALL, seed=0), scale=0.05)
    first.save(tmp_path / "adapter")
    text = recipe_text(checkpoints["llada"], "espo", f'adapter = "{tmp_path / "adapter"}"')
    text = text.replace("[model.lora]\nrank = 4\nalpha = 8.0\n", "")
    (tmp_path / "recipe.toml").write_text(text)
    made = []
    build = launch.base_policy
    monkeypatch.setattr(launch, "base_policy", lambda *args: made.append(build(*args)) or made[-1])
    assert main(["train", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "run"), "--quiet"]) == 0
    (policy,) = made
    assert policy.adapters == ("default", "reference")
    assert torch.equal(logp(reference_policy(policy)), logp(first))
    assert not torch.equal(logp(policy), logp(first))
    again = with_adapter(unmask.load(checkpoints["llada"]), tmp_path / "run" / "model")
    assert torch.equal(logp(again), logp(policy))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] == 0.0  # before the first update policy and reference are the same


def test_settings_that_exclude_each_other_are_refused_in_one_line(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(TASKS, "letters", Letters)
    sdar = write_checkpoint("sdar", tmp_path / "sdar")
    cases = {
        (checkpoints["llada"], 'quantization = "int3"'): 'must be one of "none", "nf4"',
        (checkpoints["llada"], 'cross_entropy = "chunkd"'): "Did you mean 'chunked'",
        (checkpoints["llada"], 'dtype = "float8"'): "model.dtype",
        (checkpoints["llada"], 'attention = "flash"'): "cannot be loaded",
        (checkpoints["llada"], 'adapter = "nowhere"'): "adapter_config.json: cannot be read",
        (sdar, ""): "a block-causal model (blocks of 4), whose ELBO is not implemented",
    }
    for (path, line), message in cases.items():
        (tmp_path / "recipe.toml").write_text(recipe_text(path, "espo", line))
        assert main(["train", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "run"), "--quiet"]) == 2, line
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not (tmp_path / "run").exists()


def test_the_reference_of_full_fine_tuning_is_a_copy(checkpoints):
    policy = unmask.load(checkpoints["llada"])
    reference = reference_policy(policy)
    before = logp(reference)
    with torch.no_grad():
        next(policy.module.parameters()).add_(0.1)
    assert torch.equal(logp(reference), before) and not torch.equal(logp(policy), before)


def test_a_base_in_four_bits_trains_an_adapter(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'unmask[quantization]'")
    # 64: the number of weights that share a constant
    base = write_checkpoint("llada", tmp_path / "base", d_model=64, n_heads=4, n_kv_heads=4, mlp_hidden_size=128)
    policy = randomise(with_lora(unmask.load(base, quantization="nf4"), SMALL, seed=0))
    packed = policy.module.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    assert packed.dtype == torch.uint8 and packed.numel() == 64 * 64 // 2
    before = packed.clone()
    logp(policy).sum().backward()
    assert all(bool(grad.abs().sum() > 0) for grad in gradients(policy, "default").values())
    assert torch.equal(packed, before)
    policy.save(tmp_path / "adapter")
    assert torch.equal(logp(unmask.load(tmp_path / "adapter", quantization="nf4")), logp(policy))
    with torch.no_grad():
        plain, coarse = logp(unmask.load(base)), logp(reference_policy(policy))
    assert 1e-3 < float((plain - coarse).abs().mean()) < 1.0  # 4 bits are not 32, and still the same model
