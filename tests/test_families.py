"""LLaDA, Dream, SDAR and LLaDA2.x from directories in the authors' format, held against the plain reference forward."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import dynamic_module_utils
from transformers.core_model_loading import revert_weight_conversion

import unmask
from tests.checkpoints import CONFIGS, PUBLISHED, SPECIAL, tensor_shapes, token_id, write_checkpoint, write_tensors
from tests.reference_forward import reference_logits
from unmask.errors import DataError, ModelError
from unmask.models import MaskedPolicy
from unmask.models.block import LLaDA2Config, LLaDA2ForMaskedLM, SDARConfig, SDARForMaskedLM
from unmask.models.dream import DreamConfig, DreamForMaskedLM
from unmask.models.llada import LLaDAConfig, LLaDAForMaskedLM
from unmask.tasks.sudoku import PROMPTS

# Float32 against a float64 reference: three layers with logits up to 4 are 1e-6 to 6e-6 apart. Mistakes in the
# architecture (another gate, pairing, mask, norm, routing) move them by 0.3 to 7.
TOLERANCE = 1e-5

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llada": ("llada", {}),
    "llada, grouped heads, tied, padded vocabulary": (
        "llada",
        {"n_kv_heads": 2, "weight_tying": True, "vocab_size": 264, "num_shards": 1},
    ),
    "llada, null for the defaults": ("llada", {"n_kv_heads": None, "mlp_hidden_size": None, "embedding_size": None}),
    "Dream": ("Dream", {}),
    "Dream, tied": ("Dream", {"tie_word_embeddings": True, "num_shards": 1}),
    "sdar": ("sdar", {}),
    "llada2_moe": ("llada2_moe", {}),
    "llada2_moe, other groups": (
        "llada2_moe",
        {"n_group": 1, "topk_group": 1, "num_shared_experts": 2, "first_k_dense_replace": 0, "num_shards": 1},
    ),
}
BIDIRECTIONAL, BLOCK = ("llada", "Dream"), ("sdar", "llada2_moe")


@dataclass
class Case:
    """A directory, the policy loaded from it, and what the writer put there."""

    directory: Path
    policy: MaskedPolicy
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def family(self) -> str:
        return self.config["model_type"]

    def tokens(self) -> torch.Tensor:
        """Three rows of ordinary tokens, in blocks with a broken one at the end, (3, T)."""
        width = max(11, (self.policy.block_size or 0) * 11 // 4)
        return torch.randint(0, 256, (3, width), generator=torch.Generator().manual_seed(1))

    def reference(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        return reference_logits(self.config, self.tensors, ids, mask, block_size=self.policy.block_size, **options)


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Callable[[str], Case]:
    """`case(name)`: each is written and loaded once."""
    known: dict[str, Case] = {}

    def build(name: str) -> Case:
        if name not in known:
            family, options = CASES[name]
            directory = write_checkpoint(family, tmp_path_factory.mktemp("checkpoint") / "model", **options)
            config = json.loads((directory / "config.json").read_text())
            known[name] = Case(directory, unmask.load(directory), config, read_tensors(directory))
        return known[name]

    return build


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


def paddings(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask (3, T): no pad in the first row, three on the left in the second, two on the right in the third. And
    what may be compared: the real tokens but the first, whose logits Dream reads from the column before."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3], mask[2, -2:] = False, False
    compared = mask.clone()
    compared[1, 3] = False
    return mask, compared


# ---- the forward


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_reference(name, case):
    it = case(name)
    ids = it.tokens()
    logits, expected = it.policy.module(ids).logits, it.reference(ids)
    assert logits.dtype == torch.float32 and expected.std() > 0.5
    assert largest(logits, expected) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_padded_logits_equal_the_reference(name, case):
    it = case(name)
    ids = it.tokens()
    mask, compared = paddings(ids)
    logits = it.policy.module(ids, mask).logits
    assert logits.isfinite().all()
    assert largest(logits[compared], it.reference(ids, mask)[compared]) < TOLERANCE
    assert largest(logits[compared], it.reference(ids)[compared]) > 0.1  # the mask matters
    assert torch.equal(it.policy.module(ids, mask.long()).logits, logits)  # masks of integers mean the same


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing(name, case):
    it = case(name)
    ids = it.tokens()
    plain = it.policy.module(ids).logits
    for pads in [(5, 0), (0, 3), (2, 2)]:
        padded = torch.nn.functional.pad(ids, pads, value=it.policy.pad_token_id)
        mask = torch.nn.functional.pad(torch.ones_like(ids, dtype=torch.bool), pads)
        inner = slice(pads[0], pads[0] + ids.shape[1])
        logits = it.policy.module(padded, mask).logits[:, inner]
        assert largest(logits[:, 1:], plain[:, 1:]) < TOLERANCE, pads
        other = torch.where(mask, padded, 65)
        assert largest(it.policy.module(other, mask).logits[:, inner][:, 1:], logits[:, 1:]) < 1e-6, pads


@pytest.mark.parametrize("name", CASES)
def test_selected_positions_are_about_their_own_tokens(name, case):
    it = case(name)
    ids = it.tokens()
    mask, compared = paddings(ids)
    positions = compared & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5)
    out = it.policy.token_outputs(ids, mask, positions, targets=ids[positions], want=("logits", "logp"))
    expected = it.reference(ids, mask)[positions]
    ordinary = torch.arange(expected.shape[-1]) != it.policy.mask_token_id
    assert largest(out.logits[:, ordinary], expected[:, ordinary]) < TOLERANCE
    expected[:, ~ordinary] = -torch.inf  # the mask token has no probability
    logps = expected.log_softmax(-1).gather(-1, ids[positions][:, None]).squeeze(-1)
    assert largest(out.logp, logps) < TOLERANCE


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_every_token_is_seen_from_every_position(name, case):
    it = case(name)
    ids = it.tokens()
    assert it.policy.block_size is None
    for place in (0, ids.shape[1] // 2, ids.shape[1] - 1):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] + 7) % 256
        difference = (it.policy.module(changed).logits - it.policy.module(ids).logits).detach().abs().amax(-1)
        assert (difference > 1e-3).all(), place


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("name", BLOCK)
def test_a_token_is_seen_from_its_block_and_later_ones(name, pads, case):
    it = case(name)
    ids, size = it.tokens(), it.policy.block_size
    mask = torch.nn.functional.pad(torch.ones_like(ids, dtype=torch.bool), (pads, 0)) if pads else None
    inputs = torch.nn.functional.pad(ids, (pads, 0))
    block = (torch.arange(ids.shape[1]) // size).tolist()
    for place in (0, size - 1, size, ids.shape[1] - 1):
        changed = inputs.clone()
        changed[:, pads + place] = (ids[:, place] + 7) % 256
        before, after = it.policy.module(inputs, mask).logits, it.policy.module(changed, mask).logits
        difference = (after - before).detach().abs().amax(-1)[:, pads:]
        sees = torch.tensor([b >= block[place] for b in block])
        assert (difference[:, sees] > 1e-3).all(), place
        # other experts may be grouped for the changed token, which moves the last bit of the others
        assert (difference[:, ~sees] < 1e-6).all(), place


def test_block_size_is_the_configs_or_the_published_one(case, tmp_path):
    assert case("sdar").policy.block_size == 4
    assert case("llada2_moe").policy.block_size == 32
    assert unmask.load(write_checkpoint("sdar", tmp_path / "sdar", block_size=8)).block_size == 8


def test_llada_rotates_in_float32_in_bfloat16(tmp_path):
    directory = write_checkpoint("llada", tmp_path / "model", dtype=torch.bfloat16)
    policy = unmask.load(directory, dtype=torch.bfloat16)
    ids = torch.randint(0, 256, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = policy.module(ids).logits

    def reference(rotate_in: torch.dtype) -> torch.Tensor:
        options = {"dtype": torch.bfloat16, "attend": torch.nn.functional.scaled_dot_product_attention}
        return reference_logits(CONFIGS["llada"], read_tensors(directory), ids, rotate_in=rotate_in, **options)

    # the same operations in the same precision: equal bits, where a rotation in bfloat16 is visibly apart
    assert torch.equal(logits, reference(torch.float32))
    assert largest(logits, reference(torch.bfloat16)) > 1e-2


# ---- loading


def test_loading_needs_neither_remote_code_nor_network(tmp_path, monkeypatch):
    calls = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(dynamic_module_utils, "get_class_from_dynamic_module", refuse)
    monkeypatch.setattr(dynamic_module_utils, "get_class_in_module", refuse)
    for family in CONFIGS:
        directory = write_checkpoint(family, tmp_path / family)
        for stem in ("llada", "dream", "sdar", "llada2_moe"):
            for kind in ("configuration", "modeling", "tokenization"):
                (directory / f"{kind}_{stem}.py").write_text("raise RuntimeError('remote code ran')\n")
        policy = unmask.load(directory)
        assert type(policy.module).__module__.startswith("unmask.models.")
        assert type(policy.tokenizer).__module__.startswith("transformers.")
    assert calls == []


def test_loading_works_in_offline_mode(case):
    """HF_HUB_OFFLINE is read when huggingface_hub is imported, hence a process of its own."""
    directories = [str(case(family).directory) for family in CONFIGS]
    code = f"import unmask\nfor directory in {directories!r}: print(unmask.load(directory).mask_token_id)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(case(family).policy.mask_token_id) for family in CONFIGS]


@pytest.mark.parametrize("family", CONFIGS)
def test_one_file_and_shards_hold_the_same_model(family, case, tmp_path):
    single = write_checkpoint(family, tmp_path / "single", num_shards=1, auto_map=...)
    assert [file.name for file in single.glob("*.safetensors")] == ["model.safetensors"]
    assert len(list(case(family).directory.glob("*.safetensors"))) == 3
    assert_same_bits(unmask.load(single), case(family).policy)


def assert_same_bits(policy: MaskedPolicy, other: MaskedPolicy) -> None:
    ours, theirs = policy.module.state_dict(), other.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", CONFIGS)
def test_attention_implementations_agree(family, attention, case):
    it = case(family)
    policy = unmask.load(it.directory, attention=attention)
    ids = it.tokens()
    mask, compared = paddings(ids)
    assert policy.module.config._attn_implementation == attention
    assert largest(policy.module(ids, mask).logits[compared], it.reference(ids, mask)[compared]) < TOLERANCE


def test_the_end_token_of_llada_learns(case):
    """LLaDA pads with its end token; an embedding with a padding_idx would keep that row frozen."""
    policy = unmask.load(case("llada").directory)
    embedding = policy.module.get_input_embeddings()
    assert embedding.padding_idx is None and policy.pad_token_id == policy.stop_token_ids[0]
    ids = torch.tensor([[65, 66, policy.pad_token_id]])
    policy.module(ids).logits.logsumexp(-1).sum().backward()
    assert embedding.weight.grad[policy.pad_token_id].abs().max() > 1e-3


# ---- text

ENDS = {"llada": "<|eot_id|>", "Dream": "<|im_end|>", "sdar": "<|im_end|>", "llada2_moe": "<|role_end|>"}
MASKS = {"llada": "<|mdm_mask|>", "Dream": "<|mask|>", "sdar": "<|MASK|>", "llada2_moe": "<|mask|>"}
RENDERED = {
    "llada": "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi 4?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "Dream": "<|im_start|>user\nHi 4?<|im_end|>\n<|im_start|>assistant\n",
    "sdar": "<|im_start|>user\nHi 4?<|im_end|>\n<|im_start|>assistant\n",
    "llada2_moe": "<role>HUMAN</role>Hi 4?<|role_end|><role>ASSISTANT</role>",
}


@pytest.mark.parametrize("family", CONFIGS)
def test_special_tokens_are_the_familys(family, case):
    policy = case(family).policy
    end = token_id(family, "<|endoftext|>")
    assert policy.stop_token_ids[0] == end and set(policy.stop_token_ids) == {end, token_id(family, ENDS[family])}
    assert policy.pad_token_id == end
    assert policy.mask_token_id == token_id(family, MASKS[family])
    assert policy.max_length == 4096
    for token in set(SPECIAL[family]) - {MASKS[family]}:
        assert policy.encode(token) == [token_id(family, token)]
    with pytest.raises(DataError, match="mask token"):
        policy.encode(f"a{MASKS[family]}b")


@pytest.mark.parametrize("family", CONFIGS)
def test_chats_are_rendered_by_the_familys_template(family, case):
    policy = case(family).policy
    turns = [{"role": "user", "content": "Hi 4?"}]
    assert policy.render(turns) == RENDERED[family]
    assert policy.render([*turns, {"role": "assistant", "content": "<reasoning>"}]) == RENDERED[family] + "<reasoning>"


@pytest.mark.parametrize("family", CONFIGS)
def test_texts_have_one_token_a_character_and_come_back(family, case):
    policy = case(family).policy
    for text in [style.template for style in PROMPTS.values()] + ["<>/|.,:;'-*()\"=?+%#[]{}_ aZ09\n\n  x  "]:
        ids = policy.encode(text)
        assert len(ids) == len(text) and max(ids) < 256
        assert policy.decode(torch.tensor([ids])) == [text]
    row = [*policy.encode("12"), token_id(family, ENDS[family]), *policy.encode("3")]
    assert policy.decode(torch.tensor([row])) == ["12"]  # the end of the turn ends the text


# ---- saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_saving_writes_the_authors_names_and_bytes(name, dtype, tmp_path):
    family, options = CASES[name]
    source = write_checkpoint(family, tmp_path / "source", dtype=dtype, **options)
    policy = unmask.load(source, dtype=dtype)
    policy.save(tmp_path / "saved")
    before, after = read_tensors(source), read_tensors(tmp_path / "saved")
    assert after.keys() == before.keys()
    assert {key: t.dtype for key, t in after.items()} == {key: t.dtype for key, t in before.items()}
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    again = unmask.load(tmp_path / "saved", dtype=dtype)
    assert_same_bits(again, policy)
    assert again.stop_token_ids == policy.stop_token_ids and again.mask_token_id == policy.mask_token_id
    assert again.block_size == policy.block_size
    chat = [{"role": "user", "content": "Hi 4?"}]
    assert again.encode(again.render(chat)) == policy.encode(policy.render(chat))


# transformers writes its own version and the dtype of the weights; the code named by auto_map lies elsewhere now
WRITTEN_ANEW = {"transformers_version", "dtype", "torch_dtype", "auto_map"}
# what transformers adds and the authors' classes leave alone; LLaDA's stumbles over hidden_size and the like
ADDED = {
    "llada": {"bos_token_id"},
    "Dream": {"is_causal", "layer_types", "rope_parameters"},
    "sdar": {"is_causal", "layer_types", "rope_parameters"},
    "llada2_moe": {"is_causal", "rope_parameters", "block_size", "bos_token_id"},
}


@pytest.mark.parametrize("name", CASES)
def test_saved_config_has_the_authors_keys_and_values(name, case, tmp_path):
    it = case(name)
    it.policy.save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.keys() - it.config.keys() - WRITTEN_ANEW - ADDED[it.family] == set()
    # null may be left out, or replaced by what it stands for
    kept = [key for key in it.config.keys() - WRITTEN_ANEW if it.config[key] is not None]
    assert {key: saved.get(key) for key in kept} == {key: it.config[key] for key in kept}


@pytest.mark.parametrize("original", [True, False], ids=["authors' names", "transformers' names"])
@pytest.mark.parametrize("name", CASES)
def test_exports_come_back_bit_by_bit(name, original, case, tmp_path):
    it = case(name)
    it.policy.module.save_pretrained(tmp_path, save_original_format=original, max_shard_size="40KB")
    it.policy.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    names = read_tensors(tmp_path).keys()
    assert (names == it.tensors.keys()) == (original or it.family in ("Dream", "sdar"))
    assert original or any(name.endswith("self_attn.q_proj.weight") for name in names)
    again = unmask.load(tmp_path)
    assert_same_bits(again, it.policy)
    # the bits of the weights are equal; where they lie in memory moves the last bits of a product
    assert largest(again.module(it.tokens()).logits, it.policy.module(it.tokens()).logits) < TOLERANCE


# ---- published shapes

CLASSES = {
    "llada": (LLaDAConfig, LLaDAForMaskedLM),
    "Dream": (DreamConfig, DreamForMaskedLM),
    "sdar": (SDARConfig, SDARForMaskedLM),
    "llada2_moe": (LLaDA2Config, LLaDA2ForMaskedLM),
}
# parameters in billions, tensors of the released index files, mask id (LLaDA2.1-mini's config.json names none)
COUNTS = {
    "LLaDA-8B-Instruct": (8.016, 291, 126_336),
    "Dream-v0-Instruct-7B": (7.616, 339, 151_666),
    "SDAR-4B-Chat": (4.411, 399, 151_669),
    "SDAR-8B-Chat": (8.191, 399, 151_669),
    "LLaDA2.1-mini": (16.256, 14_813, 156_895),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_models_have_the_published_tensors(name, tmp_path):
    fields = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config_class, model_class = CLASSES[fields["model_type"]]
    with torch.device("meta"):
        model = model_class(config_class.from_pretrained(tmp_path))
    shapes = {key: tuple(tensor.shape) for key, tensor in revert_weight_conversion(model, model.state_dict()).items()}
    assert shapes == tensor_shapes(fields)
    billions, count, mask_token_id = COUNTS[name]
    assert len(shapes) == count and model.config.mask_token_id == mask_token_id
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


# ---- what is refused


def drop(suffix: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = read_tensors(directory)
        del tensors[next(name for name in tensors if name.endswith(suffix))]
        rewrite(directory, tensors)

    return damage


def add(name: str) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, {**read_tensors(directory), name: torch.zeros(2)})


def rewrite(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    for file in directory.glob("model*.safetensors*"):
        file.unlink()
    write_tensors(directory, tensors)


def remove_shard(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[1].unlink()


def nothing(directory: Path) -> None:
    pass


REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[Path], None], str]] = {
    **{
        f"llada, {key} = {value}": ("llada", {key: value}, nothing, f"{key} = {value!r}")
        for key, value in {
            "block_type": "sequential",
            "layer_norm_type": "default",
            "activation_type": "swiglu",
            "rope": False,
            "rope_full_precision": False,
            "layer_norm_with_affine": False,
            "block_group_size": 2,
            "alibi": True,
            "attention_layer_norm": True,
            "input_emb_norm": True,
            "scale_logits": True,
            "include_bias": True,
            "include_qkv_bias": True,
            "bias_for_layer_norm": True,
        }.items()
    },
    "llada2, softmax router": ("llada2_moe", {"score_function": "softmax"}, nothing, "score_function = 'softmax'"),
    "llada2, no norm of q, k": ("llada2_moe", {"use_qk_norm": False}, nothing, "use_qk_norm = False"),
    "llada, missing": ("llada", {}, drop("1.attn_norm.weight"), "1.(attn_norm|input_layernorm)"),
    "llada, extra": ("llada", {}, add("model.transformer.wpe.weight"), "wpe"),
    "llada, one shard": ("llada", {}, remove_shard, "model-00002-of-00003.safetensors"),
    "Dream, missing": ("Dream", {}, drop("2.self_attn.k_proj.bias"), "2.self_attn.k_proj.bias"),
    "sdar, extra": ("sdar", {}, add("model.layers.9.mlp.up_proj.weight"), "layers.9.mlp.up_proj"),
    "llada2, an expert": ("llada2_moe", {}, drop("2.mlp.experts.3.up_proj.weight"), "2.mlp.experts"),
    "llada2, fused q, k, v": ("llada2_moe", {}, drop("1.attention.query_key_value.weight"), "1.(attention|self_attn)"),
    "llada2, router bias": ("llada2_moe", {}, drop("1.mlp.gate.expert_bias"), "1.mlp.gate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(name, tmp_path):
    family, options, damage, message = REFUSED[name]
    directory = write_checkpoint(family, tmp_path / "broken", **options)
    damage(directory)
    with pytest.raises(ModelError, match=message) as error:
        unmask.load(directory)
    assert "\n" not in str(error.value) and "broken" in str(error.value)
