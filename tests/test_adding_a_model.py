"""docs/adding-a-model.md: the file it shows is a family that loads, scores and saves."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import torch

import unmask
from unmask.models import MODELS
from unmask.models.tiny import character_tokenizer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adding-a-model.md"


def test_the_family_of_the_page_loads_scores_and_saves(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mistral_diffusion.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        family = importlib.import_module("mistral_diffusion")
        tokenizer = character_tokenizer("0123456789|")
        config = family.MistralDiffusionConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=0,
            eos_token_id=1, mask_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        family.MistralDiffusion(config).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        policy = unmask.load(tmp_path / "model")
        ids = torch.tensor([[8, 9, 2, 10, 2, 11]])
        other = ids.clone()
        other[0, -1] = 12
        first = torch.tensor([[True] + [False] * 5])
        a, b = (policy.token_outputs(x, None, first).logits for x in (ids, other))
        assert not torch.allclose(a, b, atol=1e-6)  # the last token is seen from the first
        assert float(unmask.elbo(policy, ["12|"], ["345"])) < 0
        policy.save(tmp_path / "again")
        assert torch.equal(unmask.load(tmp_path / "again").token_outputs(ids, None, first).logits, a)
    finally:
        MODELS.pop("mistral_diffusion", None)
