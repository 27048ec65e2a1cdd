"""Masked language models of transformers, tiny and random, behind the same policy."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

import unmask
from unmask.errors import ModelError
from unmask.models import LoraConfig, with_lora
from unmask.noise import Noise
from unmask.samplers import SAMPLERS
from unmask.types import PromptBatch

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = "0123456789|"


def tokenizer():
    core = Tokenizer(token_models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *ALPHABET])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", padding_side="left",
    )  # fmt: skip


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16}
TOKENS = {"max_position_embeddings": 66, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
CLASSES = {
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SIZES, **TOKENS, cls_token_id=2, sep_token_id=3, global_attn_every_n_layers=1)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, **TOKENS)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, **TOKENS)),
}


@pytest.fixture(scope="module", params=list(CLASSES))
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    model = CLASSES[request.param]().eval()
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory, model


IDS = torch.tensor([[5, 6, 4, 8, 4, 10, 4], [0, 0, 5, 4, 7, 8, 4]])
REAL = torch.tensor([[1] * 7, [0, 0] + [1] * 5], dtype=torch.bool)
WANTED = (IDS == 4) & REAL


def test_selected_logits_are_those_of_the_plain_class(saved):
    directory, model = saved
    policy = unmask.load(directory)
    out = policy.token_outputs(IDS, REAL, WANTED, targets=torch.tensor([5, 6, 7, 8, 9]), want=("logits", "logp"))
    with torch.no_grad():
        plain = model(IDS, attention_mask=REAL.long()).logits[WANTED]
    keep = torch.arange(16) != policy.mask_token_id  # the mask token is outside the support here
    # float32: the transform in front of the output embedding runs on rows of another shape
    assert torch.allclose(out.logits[:, keep], plain[:, keep], atol=1e-5)
    expected = plain[:, keep].log_softmax(-1)[torch.arange(5), torch.tensor([5, 6, 7, 8, 9]) - 1]
    assert torch.allclose(out.logp, expected, atol=1e-5)
    assert torch.allclose(policy.module(IDS, REAL).logits, model(IDS, attention_mask=REAL.long()).logits, atol=1e-6)


def test_the_output_embedding_sees_the_wanted_positions_only(saved):
    policy = unmask.load(saved[0])
    seen = []
    handle = policy.module.get_output_embeddings().register_forward_hook(lambda m, i, out: seen.append(out.shape))
    policy.token_outputs(IDS, REAL, WANTED)
    handle.remove()
    assert seen == [(5, 16)]


def test_the_last_token_changes_the_first_positions_logits(saved):
    policy = unmask.load(saved[0])
    first = torch.zeros(1, 7, dtype=torch.bool)
    first[0, 2] = True
    other = IDS[:1].clone()
    other[0, 5] = 7
    a, b = (policy.token_outputs(ids, None, first).logits for ids in (IDS[:1], other))
    assert not torch.allclose(a, b, atol=1e-6)


def test_it_samples_trains_and_saves(saved, tmp_path):
    directory, model = saved
    policy = unmask.load(directory)
    assert policy.mask_token_id == 4 and policy.stop_token_ids == (3,)
    prompts = PromptBatch(IDS[:, :2], REAL[:, :2] | True, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    samples = SAMPLERS["low_confidence"](gen_length=6, num_steps=3).sample(policy, prompts, noise=Noise(0))
    assert samples.completion_ids.shape == (2, 6) and not bool((samples.completion_ids == 4).any())
    assert float(unmask.elbo(policy, ["12|"], ["345"])) < 0
    layer = "Wqkv" if model.config.model_type == "modernbert" else "query"
    adapted = with_lora(policy, LoraConfig(rank=2, alpha=2.0, targets=(layer,)), seed=0)
    out = adapted.token_outputs(IDS, REAL, WANTED, targets=torch.tensor([5, 6, 7, 8, 9]), want=("logp",))
    out.logp.sum().backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in adapted.module.parameters())
    unmask.load(directory).save(tmp_path / "again")
    again = unmask.load(tmp_path / "again").token_outputs(IDS, REAL, WANTED).logits
    assert torch.equal(again, unmask.load(directory).token_outputs(IDS, REAL, WANTED).logits)


def test_a_tokenizer_without_a_mask_token_is_refused(saved, tmp_path):
    saved[1].save_pretrained(tmp_path / "bare")
    bare = tokenizer()
    bare.mask_token = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"mask_token_id = None in config\.json"):
        unmask.load(tmp_path / "bare")
