"""Adapter directories of other tools: what is read, what is refused, and that nothing is half-loaded."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmask
from tests.checkpoints import write_checkpoint
from tests.test_adapters import SMALL, logp, randomise, scalar, with_energy, write_under_authors_names
from unmask.bases import open_base, open_for_training
from unmask.build import ModelConfig
from unmask.cli import main
from unmask.errors import ConfigError, ModelError
from unmask.merging import merge
from unmask.models import LoraConfig, adapter_files, with_adapter, with_lora


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint("llada", tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base, tmp_path):
    policy = randomise(with_lora(unmask.load(base), SMALL, seed=0))
    policy.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(adapter, **keys):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


HARMLESS = {
    "task_type": "CAUSAL_LM",
    "lora_dropout": 0.05,
    "exclude_modules": ["lm_head"],
    "layers_to_transform": [0],
    "fan_in_fan_out": True,
    "init_lora_weights": "gaussian",
    "inference_mode": False,
    "peft_version": "9.9",
    "bias": "none",
    "a_key_of_the_future": None,
}


def test_keys_that_change_no_number_are_read_over_and_written_files_load_again(adapter, tmp_path):
    before = logp(unmask.load(adapter))
    change(adapter, **HARMLESS)
    policy = unmask.load(adapter)
    assert torch.equal(logp(policy), before)
    policy.save(tmp_path / "again")
    assert torch.equal(logp(unmask.load(tmp_path / "again")), before)
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged")]) == 0


REFUSED = {
    "rank zero": ({"r": 0}, "r = 0: must be an integer of at least 1"),
    "rank in words": ({"r": "four"}, "r = 'four'"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha = None"),
    "alpha in words": ({"lora_alpha": "x"}, "lora_alpha = 'x'"),
    "trained biases": ({"bias": "all"}, "bias = 'all' is not supported"),
    "dora": ({"use_dora": True}, "use_dora = True is not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
    "token rows": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "copied layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base model"),
    "its own base": ({"base_model_name_or_path": "."}, "its base model . is not there, or no model"),
    "a base that has moved": ({"base_model_name_or_path": "/nowhere/llada"}, "give the base as model.path and this"),
}


@pytest.mark.parametrize("keys, message", REFUSED.values(), ids=list(REFUSED))
def test_what_is_not_plain_lora_is_refused_in_one_line(adapter, keys, message):
    change(adapter, **keys)
    with pytest.raises(ModelError, match=message) as caught:
        unmask.load(adapter)
    assert "\n" not in str(caught.value)


def test_values_that_are_not_finite_are_refused(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[sorted(tensors)[3]][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="holds values that are not finite"):
        unmask.load(adapter)


@pytest.mark.parametrize("names", ["ours", "authors"])
def test_patterns_of_single_layers_follow_the_names_of_the_file(base, adapter, names):
    """alpha 64 instead of 8 on one projection: the same as eight times its B."""
    expected = unmask.load(adapter)
    with torch.no_grad():
        for key, parameter in expected.module.named_parameters():
            if "o_proj.lora_B" in key:
                parameter.mul_(8.0)
    if names == "authors":
        write_under_authors_names(adapter)
    change(adapter, alpha_pattern={"o_proj" if names == "ours" else "attn_out": 64})
    assert torch.allclose(logp(unmask.load(adapter)), logp(expected), atol=1e-5)  # float32, scaled in another order


def test_a_higher_rank_of_one_layer_is_read(base, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, value in tensors.items():
        if "layers.0.self_attn.q_proj" in key:  # rank 8: the same product, written twice and halved by alpha / rank
            tensors[key] = torch.cat([value, value], 0 if "lora_A" in key else 1).contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")
    change(adapter, rank_pattern={r"model.layers.0.self_attn.q_proj": 8})
    expected = randomise(with_lora(unmask.load(base), SMALL, seed=0))
    assert torch.allclose(logp(unmask.load(adapter)), logp(expected), atol=1e-5)


def test_adapters_are_not_put_on_top_of_adapters(base, adapter):
    policy = unmask.load(adapter)
    for stack in (lambda: with_lora(policy, SMALL, seed=0), lambda: with_adapter(policy, adapter)):
        with pytest.raises(ConfigError, match="has an adapter already, and none goes on top"):
            stack()


@pytest.mark.parametrize("name", ["mlp.x", "default", "", "a b"])
def test_adapter_names_are_new_identifiers(base, name):
    policy = with_lora(unmask.load(base), SMALL, seed=0)
    with pytest.raises(ModelError, match="must be a new name"):
        policy.add_adapter(name, SMALL, seed=1)


def test_an_adapter_named_like_a_layer_does_not_touch_the_others(base):
    policy = randomise(with_lora(unmask.load(base), SMALL, seed=0))
    policy.add_adapter("mlp", LoraConfig(rank=2, alpha=2.0), seed=1, is_trained=False)
    trained = [key for key, parameter in policy.module.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * policy.module.config.num_hidden_layers
    assert all(".default." in key for key in trained)


def test_a_view_has_the_one_adapter_it_was_made_for(base, tmp_path):
    policy = with_energy(unmask.load(base), False)
    view = policy.with_adapter(None)
    with torch.no_grad(), policy.use("energy"):
        expected = logp(policy)
    assert torch.equal(logp(view.with_adapter("energy")), expected)
    for misuse in (lambda: view.use("energy"), lambda: view.save(tmp_path / "x")):
        with pytest.raises(ModelError, match="this is a view of adapter None"):
            misuse()


def test_scalar_heads_stay_with_their_adapter(base, tmp_path):
    policy = with_energy(unmask.load(base), False)
    adapter_files.save(tmp_path / "energy", policy.switch, str(base), name="energy")
    with pytest.raises(ConfigError, match="has a scalar head, which a merged model cannot hold"):
        merge(tmp_path / "energy", tmp_path / "merged")
    adapter_files.save(tmp_path / "energy", policy.switch, str(base))  # another adapter, into the same directory
    again = unmask.load(tmp_path / "energy")
    with pytest.raises(ValueError, match="no scalar head"):
        scalar(again)
    save_file({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, tmp_path / "energy" / "scalar_head.safetensors")
    with pytest.raises(ModelError, match=r"scalar_head\.safetensors: does not fit"):
        unmask.load(tmp_path / "energy")


def test_a_merge_that_overflows_is_refused_and_writes_nothing(tmp_path, capsys):
    base = write_checkpoint("llada", tmp_path / "base", dtype=torch.float16)
    policy = randomise(with_lora(unmask.load(base), SMALL, seed=0), scale=1e-3)
    with torch.no_grad():  # one weight just below float16's end, and a product that takes it over
        for part, value in (("lora_A", 100.0), ("lora_B", 100.0)):
            policy.module.get_parameter(f"base_model.model.model.layers.0.self_attn.k_proj.{part}.default.weight")[
                0, 0
            ] = value
    policy.save(tmp_path / "adapter")
    tensors = {k: v for f in base.glob("*.safetensors") for k, v in load_file(f).items()}
    tensors["model.transformer.blocks.0.k_proj.weight"][0, 0] = 65000.0
    for file in base.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, base / "model.safetensors")
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("start", ["path", "adapter", "lora"])
def test_the_chosen_cross_entropy_is_that_of_the_model_inside_the_adapters(base, adapter, start):
    config = {
        "path": ModelConfig(path=str(adapter), cross_entropy="plain"),
        "adapter": ModelConfig(path=str(base), adapter=str(adapter), cross_entropy="plain"),
        "lora": ModelConfig(path=str(base), lora=SMALL, cross_entropy="plain"),
    }[start]
    policy = open_for_training(config.path, config, seed=0)
    assert policy.switch.module.get_base_model().cross_entropy == "plain"


def test_auto_holds_the_frozen_base_of_an_adapter_as_it_is_stored(tmp_path):
    base = write_checkpoint("llada", tmp_path / "base", dtype=torch.bfloat16)
    with_lora(unmask.load(base), SMALL, seed=0).save(tmp_path / "adapter")
    for path, expected in ((tmp_path / "adapter", torch.bfloat16), (base, torch.float32)):
        policy = open_base(path, ModelConfig(path=str(path)))
        assert policy.module.config.dtype == expected
        assert next(p for n, p in policy.module.named_parameters() if "lora" not in n).dtype == expected
    assert math.isfinite(float(logp(unmask.load(tmp_path / "adapter")).sum()))
