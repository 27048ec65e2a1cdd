"""Masked language models of transformers, tiny and random, behind the same policy."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from torch import nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.models.bart.modeling_bart import BartEncoderLayer

import unmask
from unmask.errors import DataError, ModelError
from unmask.models import LoraConfig, with_lora
from unmask.models.masked_lm import _places, _remove_dropout, masked_lm_classes
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


def rows():
    return zip(IDS, REAL, WANTED, strict=True)


def test_selected_logits_are_those_of_the_plain_class(saved):
    directory, model = saved
    policy = unmask.load(directory)
    out = policy.token_outputs(IDS, REAL, WANTED, targets=torch.tensor([5, 6, 7, 8, 9]), want=("logits", "logp"))
    with torch.no_grad():
        # row by row and without pads, which BERT's own code would give positions
        plain = torch.cat([model(ids[real][None]).logits[0, wanted[real]] for ids, real, wanted in rows()])
    keep = torch.arange(16) != policy.mask_token_id  # the mask token is outside the support here
    # float32: the transform in front of the output embedding runs on rows of another shape
    assert torch.allclose(out.logits[:, keep], plain[:, keep], atol=1e-5)
    expected = plain[:, keep].log_softmax(-1)[torch.arange(5), torch.tensor([5, 6, 7, 8, 9]) - 1]
    assert torch.allclose(out.logp, expected, atol=1e-5)
    assert torch.allclose(policy.module(IDS[:1]).logits, model(IDS[:1]).logits, atol=1e-6)


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


# weights so large that a wrong position changes logits by about 1
BUILD = {**SIZES, **TOKENS, "initializer_range": 0.3, "embedding_size": 8}
OTHERS = {
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    "mobilebert": {"true_hidden_size": 16, "intra_bottleneck_size": 16},
    "xmod": {"languages": ["a"], "default_language": "a"},
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
}


def written(directory, model_type, **options):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**BUILD, **OTHERS.get(model_type, {}), **options})
    model = AutoModelForMaskedLM.from_config(config).eval()
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return model


INVARIANT = ["bert", "distilbert", "roberta", "modernbert", "albert", "electra", "mobilebert", "big_bird", "rembert"]


@pytest.mark.parametrize("model_type", [*INVARIANT, "roc_bert", "xmod", "deberta-v2", "ultrabert"])
def test_padding_on_either_side_changes_nothing(model_type, tmp_path):
    model = written(tmp_path, model_type)
    policy = unmask.load(tmp_path)
    ids = IDS[:1]
    keep = torch.arange(16) != 4
    with torch.no_grad():
        plain = model(ids).logits[ids == 4][:, keep]
    for sides in ((0, 0), (3, 0), (0, 3)):
        canvas, real = F.pad(ids, sides), F.pad(torch.ones_like(ids), sides).bool()
        logits = policy.token_outputs(canvas, real, F.pad(ids == 4, sides)).logits[:, keep]
        assert torch.allclose(logits, plain, atol=1e-4)  # rounding: 1e-5 in MobileBERT; a wrong position: above 0.3


def test_positions_begin_where_the_class_has_them_begin():
    for model_type, expected in (
        ("bert", (0, 66)),
        ("yoso", (2, 66)),
        ("roberta", (None, 65)),
        ("roformer", (None, 66)),
    ):
        config_class, model_class = masked_lm_classes(model_type)
        assert _places(model_class(config_class(**BUILD))) == expected


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("fnet", {}, "takes no attention mask"),
        ("bart", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}, "no bidirectional masked language model"),
        ("bert", {"is_decoder": True}, "no bidirectional masked language model"),
        ("xlm", {"causal": True, "mask_token_id": 4, "pad_index": 0, "n_layers": 1}, "later tokens do not change"),
        ("convbert", {}, "padding changes the logits"),
        ("esm", {"token_dropout": True, "position_embedding_type": "rotary", "mask_token_id": 4}, "not finite"),
    ],
)
def test_a_class_that_cannot_work_is_refused_in_one_line(model_type, options, reason, tmp_path):
    written(tmp_path, model_type, **options)
    with pytest.raises(ModelError, match=reason) as error:
        unmask.load(tmp_path)
    assert f"model_type = {model_type!r}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "electra"])
def test_checkpointed_layers_drop_nothing(model_type, tmp_path):
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "mlp_dropout")
    written(tmp_path, model_type, **dict.fromkeys(rates, 0.5))
    plain, saving = unmask.load(tmp_path), unmask.load(tmp_path)
    saving.enable_gradient_checkpointing()
    targets = torch.tensor([5, 6, 7, 8, 9])
    first, second, third = (
        policy.token_outputs(IDS, REAL, WANTED, targets=targets, want=("logp",)).logp
        for policy in (plain, saving, saving)
    )
    assert torch.equal(first, second) and torch.equal(second, third)
    for module in saving.module.modules():
        assert not any("drop" in key and isinstance(value, float) and value for key, value in vars(module).items())
        assert not isinstance(module, nn.Dropout) or module.p == 0


def test_a_layer_that_calls_dropout_itself_drops_nothing_in_training_mode():
    config = CONFIG_MAPPING["bart"](d_model=16, encoder_attention_heads=2, encoder_ffn_dim=32, dropout=0.5)
    config._attn_implementation = "eager"
    layer = BartEncoderLayer(config).eval()
    x = torch.randn(1, 4, 16)
    expected = layer(x, None)
    layer.training = True  # as gradient checkpointing sets it
    assert not torch.equal(layer(x, None), expected)
    _remove_dropout(layer)
    assert torch.equal(layer(x, None), expected)


def test_heads_of_the_pretraining_are_left_out_and_layers_too_many_are_not(tmp_path):
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**BUILD))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    out = unmask.load(tmp_path).module(IDS[:1]).logits
    assert torch.allclose(out, model.eval()(IDS[:1]).prediction_logits, atol=1e-5)
    BertConfig(**{**BUILD, "num_hidden_layers": 1}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"first at bert\.encoder\.layer\.1\."):
        unmask.load(tmp_path)


def test_a_prompt_fills_the_positions_and_one_token_more_is_refused(tmp_path):
    """RoBERTa's table of 66 has one row for pads, padding_idx = 0."""
    written(tmp_path, "roberta")
    policy = unmask.load(tmp_path)
    assert policy.max_length == 65
    ids, mask = policy.encode_prompts(["1" * 59], 6)
    canvas = F.pad(ids, (0, 6), value=4)
    assert policy.token_outputs(canvas, F.pad(mask, (0, 6), value=True), canvas == 4).logits.isfinite().any()
    with pytest.raises(DataError, match="exceeds the 65 positions"):
        policy.encode_prompts(["1" * 60], 6)
    adapted = with_lora(policy, LoraConfig(rank=2, alpha=2.0, targets=("query",)), seed=0)
    assert adapted.max_length == 65


def test_a_class_without_sdpa_gets_eager_attention(tmp_path):
    written(tmp_path, "rembert")
    assert unmask.load(tmp_path).module.config._attn_implementation == "eager"


def test_half_precision_passes_the_probe(tmp_path):
    written(tmp_path, "bert", num_hidden_layers=12)
    assert unmask.load(tmp_path, dtype=torch.bfloat16).module.dtype == torch.bfloat16
