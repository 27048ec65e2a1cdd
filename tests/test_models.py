"""The embedded model: attention, padding, selected positions, directories that are good or broken, import orders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmask
from tests.helpers import SMALL, tiny_policy
from unmask.errors import ConfigError, DataError, ModelError
from unmask.models import TinyModelConfig, build_tiny, load

T = 9
DIGITS = torch.randint(8, 18, (4, T), generator=torch.Generator().manual_seed(0))


def padded(ids: torch.Tensor, pads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows behind `pads` left pads, and their attention mask."""
    mask = torch.ones(len(ids), pads + ids.shape[1], dtype=torch.bool)
    mask[:, :pads] = False
    return torch.nn.functional.pad(ids, (pads, 0)), mask


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


# ---- the forward


def test_attention_is_bidirectional():
    policy = tiny_policy()
    changed = DIGITS.clone()
    changed[:, -1] = (DIGITS[:, -1] - 7) % 10 + 8  # the next digit
    assert largest(policy.module(DIGITS).logits[:, 0], policy.module(changed).logits[:, 0]) > 1e-3


def test_places_are_told_apart():
    policy = tiny_policy()
    same = torch.full((1, T), 8)
    logits = policy.module(same).logits[0]
    assert largest(logits[0], logits[1]) > 1e-3


@pytest.mark.parametrize("pads", [1, 7])
def test_left_padding_changes_nothing(pads):
    policy = tiny_policy()
    plain = policy.module(DIGITS).logits
    assert largest(policy.module(*padded(DIGITS, pads)).logits[:, pads:], plain) < 1e-12
    positions = torch.arange(T).expand(4, T) % 3 == 1
    selected = policy.token_outputs(DIGITS, None, positions, want=("logits",)).logits
    ids, mask = padded(DIGITS, pads)
    wanted = torch.nn.functional.pad(positions, (pads, 0))
    ordinary = torch.arange(plain.shape[-1]) != policy.mask_token_id
    padded_logits = policy.token_outputs(ids, mask, wanted, want=("logits",)).logits
    assert largest(padded_logits[:, ordinary], selected[:, ordinary]) < 1e-12


def test_the_token_under_a_pad_is_never_read():
    policy = tiny_policy()
    ids, mask = padded(DIGITS, 3)
    other = ids.clone()
    other[:, :3] = 15
    assert torch.equal(policy.module(ids, mask).logits[:, 3:], policy.module(other, mask).logits[:, 3:])


@pytest.mark.parametrize("pads", [0, 2])
def test_selected_positions_equal_the_plain_forward(pads):
    policy = tiny_policy()
    ids, mask = padded(DIGITS, pads)
    generator = torch.Generator().manual_seed(1)
    positions = (torch.rand(ids.shape, generator=generator) < 0.4) & mask
    positions[2] = False  # a row of which nothing is wanted
    targets = ids[positions]
    values = torch.rand(len(targets), generator=generator, dtype=torch.float64)

    out = policy.token_outputs(ids, mask, positions, targets=targets, want=("logits", "logp", "entropy"))
    (out.logp * values).sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.module.named_parameters()}
    policy.module.zero_grad()

    logits = policy.module(ids, mask).logits[positions].clone()
    logits[:, policy.mask_token_id] = -torch.inf
    logps = logits.log_softmax(-1)
    assert torch.allclose(out.logits, logits, rtol=0, atol=1e-12)
    logp = logps.gather(-1, targets[:, None]).squeeze(-1)
    assert largest(out.logp, logp) < 1e-12
    entropy = torch.distributions.Categorical(logits=logits[:, torch.arange(logits.shape[1]) != policy.mask_token_id])
    assert largest(out.entropy, entropy.entropy()) < 1e-12
    assert not out.entropy.requires_grad
    (logp * values).sum().backward()
    for name, parameter in policy.module.named_parameters():
        assert largest(parameter.grad, gradients[name]) < 1e-12, name
    assert any(g.abs().max() > 1e-3 for g in gradients.values())


def test_the_mask_token_has_no_probability():
    policy = tiny_policy()
    everywhere = torch.ones_like(DIGITS, dtype=torch.bool)
    with torch.no_grad():
        policy.module.lm_head.weight[policy.mask_token_id] *= 100
    out = policy.token_outputs(DIGITS, None, everywhere, targets=DIGITS.flatten(), want=("logits", "logp"))
    assert (out.logits[:, policy.mask_token_id] == -torch.inf).all()
    total = out.logits.softmax(-1).gather(-1, DIGITS.flatten()[:, None]).squeeze(-1)
    assert largest(out.logp.exp(), total) < 1e-12


def test_unknown_outputs_and_missing_targets_are_refused():
    policy, everywhere = tiny_policy(), torch.ones_like(DIGITS, dtype=torch.bool)
    with pytest.raises(ValueError, match="unknown token outputs"):
        policy.token_outputs(DIGITS, None, everywhere, want=("logit",))
    with pytest.raises(ValueError, match="needs targets"):
        policy.token_outputs(DIGITS, None, everywhere, want=("logp",))


def test_labels_give_the_mean_cross_entropy():
    policy = tiny_policy()
    labels = DIGITS.clone()
    labels[:, ::2] = -100
    out = policy.module(DIGITS, labels=labels)
    logps = out.logits.log_softmax(-1).gather(-1, DIGITS[..., None]).squeeze(-1)
    assert float(out.loss.detach()) == pytest.approx(-float(logps[:, 1::2].mean().detach()), abs=1e-6)


# ---- building


def test_building_depends_on_the_seed_alone_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_tiny(SMALL, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    same, other = build_tiny(SMALL, seed=3), build_tiny(SMALL, seed=4)
    pairs = list(zip(first.module.parameters(), same.module.parameters(), other.module.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3, "hidden_size": 16}, "must divide model.tiny.hidden_size = 16"),
        ({"num_layers": 0}, "must be at least 1"),
        ({"alphabet": ""}, "must name the characters"),
    ],
)
def test_impossible_shapes_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TinyModelConfig(**fields)


# ---- text


@pytest.mark.parametrize("text", ["0123|", "a b\nc\n", "  two  spaces ", "."])
def test_tokenizer_gives_back_the_text(text):
    tokenizer = build_tiny(TinyModelConfig(alphabet="0123|abc \n.twospe"), seed=0).tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text)  # one token per character
    assert min(ids) >= 8  # behind the special tokens
    assert tokenizer.decode(ids) == text


def test_unknown_characters_become_one_token_each():
    tokenizer = tiny_policy().tokenizer
    ids = tokenizer.encode("1é漢\n2", add_special_tokens=False)
    assert [i == tokenizer.unk_token_id for i in ids] == [False, True, True, True, False]


def test_special_tokens_are_the_ids_of_the_config():
    policy = tiny_policy()
    tokenizer, config = policy.tokenizer, policy.module.config
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id)
    assert ids == (config.pad_token_id, config.eos_token_id, config.mask_token_id) == (0, 1, 2)
    assert len(tokenizer) == config.vocab_size


def test_messages_go_through_the_template():
    text = tiny_policy().render([{"role": "user", "content": "12"}])
    assert text == "<|user|>12<|eot|><|assistant|>"
    assert tiny_policy().render("12") == "12"


def test_a_last_turn_of_the_assistant_begins_the_answer():
    turns = [{"role": "user", "content": "12"}, {"role": "assistant", "content": "34"}]
    assert tiny_policy().render(turns) == tiny_policy().render(turns[:1]) + "34"
    between = tiny_policy().render([*turns, turns[0]])
    assert between == "<|user|>12<|eot|><|assistant|>34<|eot|><|user|>12<|eot|><|assistant|>"


def test_completions_end_with_stop_tokens_and_decode_to_their_text():
    policy = tiny_policy()
    ids = policy.encode_completions(["12", "", "1234"], 4)
    stop = policy.stop_token_ids[0]
    assert ids.tolist() == [[9, 10, stop, stop], [stop] * 4, [9, 10, 11, 12]]
    assert policy.completion_lengths(ids).tolist() == [3, 1, 4]
    assert policy.decode(ids) == ["12", "", "1234"]
    with pytest.raises(DataError, match="a completion of 5 tokens exceeds gen_length = 4"):
        policy.encode_completions(["12345"], 4)


def test_prompts_are_padded_on_the_left_and_must_fit():
    policy = tiny_policy()
    ids, mask = policy.encode_prompts(["1", "123"], 4)
    assert ids.tolist() == [[0, 0, 9], [9, 10, 11]]
    assert mask.tolist() == [[False, False, True], [True, True, True]]
    policy.encode_prompts(["1" * 36], 4)  # 40 positions
    with pytest.raises(DataError, match="a prompt of 37 tokens plus gen_length = 4 exceeds the 40 positions"):
        policy.encode_prompts(["1" * 37], 4)
    with pytest.raises(DataError, match="a prompt has no tokens"):
        policy.encode_prompts([""], 4)


# ---- directories


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_policy(dtype=torch.float32).save(path)
    return path


def test_save_and_load_give_the_same_bits(directory):
    policy, loaded = tiny_policy(dtype=torch.float32), unmask.load(directory)
    for (name, a), (other, b) in zip(
        policy.module.state_dict().items(), loaded.module.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    assert torch.equal(policy.module(DIGITS).logits, loaded.module(DIGITS).logits)
    assert not loaded.module.training
    assert loaded.tokenizer.encode("1|x") == policy.tokenizer.encode("1|x")
    assert loaded.render([{"role": "user", "content": "1"}]) == policy.render([{"role": "user", "content": "1"}])
    assert (loaded.max_length, loaded.stop_token_ids) == (policy.max_length, policy.stop_token_ids)


def test_a_directory_is_an_ordinary_one(directory):
    names = {file.name for file in directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".py"))]
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "unmask_tiny" and config["mask_token_id"] == 2
    assert "auto_map" not in config


ORDERS = {
    "unmask first": "import unmask\nfrom transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer",
    "transformers first": "from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer\nimport unmask",
    "only AutoConfig": "import unmask\nfrom transformers import AutoConfig",
}
CHECK = {
    "config": "assert AutoConfig.from_pretrained(path).vocab_size == 19",
    "model": """
model = AutoModelForMaskedLM.from_pretrained(path).eval()
tokenizer = AutoTokenizer.from_pretrained(path)
import torch
from safetensors.torch import load_file
for name, value in load_file(path + "/model.safetensors").items():
    assert torch.equal(model.state_dict()[name], value), name
assert tokenizer.decode(tokenizer.encode("12|")) == "12|"
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_the_family_whatever_is_imported_first(order, directory):
    code = f"path = {str(directory)!r}\n{ORDERS[order]}\n{CHECK['config']}\n"
    code += CHECK["model"] if order != "only AutoConfig" else ""
    run_python(code)


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_import_unmask_do_without_torch():
    code = """
import contextlib, io, sys
import unmask
from unmask.cli import main
out = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
    main(["--help"])
assert "train" in out.getvalue() and unmask.__version__
print(sorted({"torch", "transformers", "accelerate", "numpy"} & set(sys.modules)))
"""
    assert run_python(code) == "[]\n"


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def set_config(**values: object):
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **values}))

    return edit


def drop_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def add_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "extra": torch.zeros(1)}, path / "model.safetensors", metadata={"format": "pt"})


def only_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


BROKEN = {
    "truncated weights": (truncate, "cannot be loaded"),
    "no config": (lambda path: (path / "config.json").unlink(), "no config.json there"),
    "config is no JSON": (lambda path: (path / "config.json").write_text("{"), "not a JSON object"),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), "not a JSON object"),
    "config is not UTF-8": (lambda path: (path / "config.json").write_bytes(b"\xff{}"), "not a JSON object"),
    "other model type": (
        set_config(model_type="llama"),
        "model_type = 'llama' is unknown. Known: Dream, llada, llada2_moe",
    ),
    "model type is a list": (set_config(model_type=["llama"]), "is unknown"),
    "no model type": (set_config(model_type=None), "model_type = None is unknown"),
    "other width": (set_config(hidden_size=32, intermediate_size=64), "weights do not fit|cannot be loaded"),
    "missing tensor": (drop_tensor, "do not fit config.json, first at model.norm.weight"),
    "extra tensor": (add_tensor, "do not fit config.json, first at extra"),
    "only pickled weights": (only_pickle, "no .*safetensors file"),
    "no tokenizer": (lambda path: [f.unlink() for f in path.glob("tokenizer*")], "cannot be loaded"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_directories_are_refused_in_one_line(name, directory, tmp_path):
    damage, message = BROKEN[name]
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    damage(broken)
    with pytest.raises(ModelError, match=message) as error:
        load(broken)
    assert "\n" not in str(error.value) and "broken" in str(error.value)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json there"):
        load(tmp_path / "nowhere")
