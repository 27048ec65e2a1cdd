"""What the families refuse rather than compute something else."""

from __future__ import annotations

import pytest
import torch

import unmask
from tests.checkpoints import write_checkpoint
from unmask.cli import main
from unmask.errors import ModelError

SCALED = {"rope_type": "linear", "factor": 2.0}
VARIANTS = [
    ("llada", {"rope_scaling": SCALED}, "rope_scaling"),
    ("Dream", {"rope_scaling": SCALED}, "rope_"),
    ("Dream", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("sdar", {"rope_scaling": SCALED}, "rope_"),
    ("sdar", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("sdar", {"block_size": 0}, "block_size = 0: must be at least 1"),
    ("llada2_moe", {"rope_scaling": SCALED}, "rope_scaling"),
    ("llada2_moe", {"norm_head": True}, "norm_head = True"),
]


@pytest.mark.parametrize("family, keys, message", VARIANTS)
def test_variants_that_no_checkpoint_uses_are_refused_by_name(family, keys, message, tmp_path):
    write_checkpoint(family, tmp_path, **keys)
    with pytest.raises(ModelError, match=message) as caught:
        unmask.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def sdar(tmp_path_factory):
    return write_checkpoint("sdar", tmp_path_factory.mktemp("sdar"))


def test_an_attention_that_cannot_express_blocks_is_refused(sdar):
    policy = unmask.load(sdar)
    policy.module.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot express a block-causal mask"):
        policy.module(torch.arange(8)[None])


def test_a_full_mask_beside_a_cache_changes_nothing(sdar):
    policy = unmask.load(sdar)
    ids = torch.arange(8)[None]
    everything = torch.ones(1, 4, dtype=torch.bool)
    found = []
    for mask in (None, everything):
        cache = policy.new_cache()
        policy.token_outputs(ids[:, :4], None, everything, cache=cache)
        found.append(policy.token_outputs(ids[:, 4:], mask, everything, cache=cache).logits)
    assert torch.equal(found[0], found[1])
    with pytest.raises(ValueError, match="span several blocks"):
        policy.token_outputs(torch.arange(8)[None], None, torch.ones(1, 8, dtype=torch.bool), cache=cache)
    padded = torch.tensor([[False, True, True, True]])
    with pytest.raises(ValueError, match="rows of equal length"):
        policy.token_outputs(ids[:, :4], padded, padded, cache=policy.new_cache())


def test_supervised_training_of_a_block_causal_model_is_refused_before_anything_is_written(sdar, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 4)
    (tmp_path / "sft.toml").write_text(
        f'[model]\npath = "{sdar}"\n[data]\nfile = "{tmp_path}/pairs.jsonl"\ngen_length = 4\nbatch_size = 2\n'
    )
    assert main(["sft", str(tmp_path / "sft.toml"), "--output", str(tmp_path / "run"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "block-causal" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
