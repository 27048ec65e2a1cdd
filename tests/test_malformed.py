"""Bad input: every command ends with exit code 2 and one line that names the fault, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import tiny_policy
from unmask.cli import main
from unmask.config import dump_toml
from unmask.demonstrations import read_demonstrations
from unmask.errors import DataError

PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_policy(dtype=torch.float32).save(path)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch, saved_model) -> Path:
    """A working directory with a model, good recipes, and a cache that does not exist yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    shutil.copytree(saved_model, tmp_path / "model")
    (tmp_path / "rl.toml").write_text(dump_toml(RL))
    (tmp_path / "sft.toml").write_text(dump_toml(SFT))
    (tmp_path / "good.csv").write_text(f"Puzzle,Solution\n{PUZZLE},{SOLUTION}\n")
    return tmp_path


SUDOKU = {
    "type": "sudoku",
    "num_blanks": 2,
    "num_train": 8,
    "num_validation": 4,
    "num_test": 4,
    "num_demonstrations": 4,
}
RL = {
    "model": {"path": "model"},
    "task": SUDOKU,
    "algorithm": {"type": "espo", "num_iterations": 1},
    "sampler": {"type": "roar"},
    "rollout": {"prompts_per_batch": 2, "group_size": 2},
    "trainer": {"num_batches": 1, "monitor_rows": 2},
}
SFT = {
    "model": {"tiny": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}},
    "task": SUDOKU,
    "data": {"batch_size": 2},
    "trainer": {"num_batches": 1},
}


def snapshot(path: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() and os.access(p, os.R_OK) else None for p in path.rglob("*")}


@pytest.fixture
def refuse(place, capsys, caplog) -> Callable[..., None]:
    """Runs a command that must be refused with a line that has `message` in it, and must leave nothing behind."""

    def run(arguments: list[str], message: str) -> None:
        before = snapshot(place)
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.endswith("\n"), error
        assert message in error, error
        assert "Traceback" not in error
        assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []
        after = snapshot(place)
        assert {name for name in before | after if before.get(name, 0) != after.get(name, 0)} == set()

    return run


def test_what_the_corpus_breaks_is_sound(place):
    assert main(["train", "rl.toml", "--output", "run", "--quiet"]) == 0
    assert main(["sft", "sft.toml", "--output", "base", "--quiet"]) == 0
    assert main(["eval", "model", "--task", "sudoku", "--data", "good.csv", "--quiet"]) == 0


# ---- recipes: text of the file (bytes for what is no text), and what the line must say

RECIPES: dict[str, tuple[str | bytes, str]] = {
    "not TOML": ("model = [", "not valid TOML"),
    "two values for a key": ("seed = 1\nseed = 2", "not valid TOML"),
    "not UTF-8": (b"seed = 1 # \xff", "not UTF-8"),
    "zero bytes": (b"\0\0\0", "not valid TOML"),
    "nested too deeply": ("x = " + "[" * 5000, "not valid TOML"),
    "empty": ("", "[task] is missing"),
    "a list": ('task = ["sudoku"]', "task = ['sudoku']: must be a table"),
    "extends nothing": ('extends = "none.toml"', "none.toml: no such file"),
    "extends itself": ('extends = "bad.toml"', "extends leads in a circle"),
    "extends in a circle": ('extends = "loop.toml"', "extends leads in a circle"),
    "extends a directory": ('extends = "model"', "is a directory"),
    "extends a number": ("extends = 3", "extends = 3: must be the path"),
    "extends a name with a zero byte": ('extends = "a\\u0000b"', "not valid TOML"),
    "unknown section": ('[modle]\npath = "model"', "unknown section or key 'modle'"),
    "no model": ('[task]\ntype = "sudoku"', "no key of [model] given"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_files(name, place, refuse):
    text, message = RECIPES[name]
    (place / "bad.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    (place / "loop.toml").write_text('extends = "bad.toml"')
    refuse(["train", "bad.toml", "--output", "run", "--quiet"], message)


# ---- overrides of a good recipe

GREEDY = "evaluation.sampler.type=low_confidence"

TRAIN_OVERRIDES: dict[str, tuple[list[str], str]] = {
    "no equals sign": (["seed"], "must be dotted.key=value"),
    "empty key": (["=3"], "must be dotted.key=value"),
    "empty part of a key": (["trainer..num_batches=3"], "must be dotted.key=value"),
    "a table and a value": (["trainer.stop.window=3", "trainer.stop=1"], "another override set trainer.stop"),
    "a recipe given twice": (["rl.toml"], "must be dotted.key=value"),
    "seed is a word": (["seed=abc"], "seed = 'abc'"),
    "seed is a truth value": (["seed=true"], "seed = True"),
    "unknown section": (["rollouts.group_size=4"], "unknown section or key 'rollouts'"),
    "preferences without a file": (["data.batch_size=4"], "data.file is missing"),
    "unknown key": (["trainer.num_bathces=4"], "Did you mean 'num_batches'?"),
    "wrong type": (['trainer.num_batches="4"'], 'trainer.num_batches = "4": must be an integer'),
    "a fraction of a batch": (["trainer.num_batches=1.5"], "trainer.num_batches = 1.5"),
    "unknown algorithm": (["algorithm.type=esp0"], "Did you mean 'espo'?"),
    "unknown task": (["task.type=sudokku"], "Did you mean 'sudoku'?"),
    "unknown sampler": (["sampler.type=raor"], "unknown sampler 'raor'"),
    "type is a number": (["sampler.type=3"], "sampler.type = 3: must be a string"),
    "no batches": (["trainer.num_batches=0"], "trainer.num_batches = 0: must be at least 1"),
    "negative batches": (["trainer.num_batches=-1"], "trainer.num_batches = -1"),
    "negative evaluation rhythm": (["trainer.eval_every=-1"], "trainer.eval_every = -1"),
    "no checkpoints kept": (["trainer.save_total_limit=0"], "trainer.save_total_limit = 0"),
    "window of a stop rule": (["trainer.stop.window=0"], "trainer.stop.window = 0"),
    "metric of a stop rule": (["trainer.stop.metric=acuracy", "trainer.stop.at_least=0.9"], "trainer.stop.metric"),
    "rate of zero": (["optimizer.lr=0"], "optimizer.lr = 0"),
    "rate that is no number": (["optimizer.lr=nan"], "optimizer.lr = nan"),
    "rate without end": (["optimizer.lr=inf"], "optimizer.lr = inf"),
    "negative norm": (["optimizer.max_grad_norm=-1.0"], "optimizer.max_grad_norm = -1.0"),
    "negative decay": (["optimizer.weight_decay=-0.1"], "optimizer.weight_decay = -0.1"),
    "moments beyond 1": (["optimizer.betas=[0.9,1.5]"], "optimizer.betas"),
    "three moments": (["optimizer.betas=[0.9,0.9,0.9]"], "optimizer.betas"),
    "unknown schedule": (["optimizer.schedule=linear"], "optimizer.schedule = 'linear'"),
    "negative warm-up": (["optimizer.warmup_steps=-3"], "optimizer.warmup_steps = -3"),
    "group of one": (["rollout.group_size=1"], "rollout.group_size = 1"),
    "no prompts": (["rollout.prompts_per_batch=0"], "rollout.prompts_per_batch = 0"),
    "negative forward": (["rollout.batch_size=-8"], "rollout.batch_size = -8"),
    "odd masks": (["algorithm.num_masks=3"], "algorithm.num_masks = 3"),
    "no masks": (["algorithm.num_masks=0"], "algorithm.num_masks = 0"),
    "no inner updates": (["algorithm.num_iterations=0"], "algorithm.num_iterations = 0"),
    "negative penalty": (["algorithm.kl_coef=-0.1"], "algorithm.kl_coef = -0.1"),
    "penalty that is no number": (["algorithm.kl_coef=nan"], "algorithm.kl_coef = nan"),
    "unknown estimator": (["algorithm.kl=k4"], "algorithm.kl = 'k4'"),
    "clip range": (["algorithm.clip_low=1.5"], "algorithm.clip_low = 1.5"),
    "prompt masks": (
        ["algorithm.type=diffu_grpo", "algorithm.prompt_mask_ratio=1"],
        "algorithm.prompt_mask_ratio = 1.0",
    ),
    "block length": (["sampler.block_length=5"], "sampler.block_length = 5: must divide"),
    "negative block": (["sampler.block_length=-4"], "sampler.block_length = -4"),
    "negative length": (["sampler.gen_length=-16"], "sampler.gen_length = -16"),
    "no length": (["sampler.gen_length=0"], "sampler.gen_length = 0"),
    "negative temperature": (["sampler.temperature=-1"], "sampler.temperature = -1.0"),
    "endless temperature": (["sampler.temperature=inf"], "sampler.temperature = inf"),
    "steps of a sampler without steps": (["sampler.num_steps=4"], "unknown key sampler.num_steps"),
    "steps beyond the length": ([GREEDY, "evaluation.sampler.num_steps=17"], "num_steps = 17"),
    "steps that do not fit the blocks": (
        [GREEDY, "evaluation.sampler.block_length=4", "evaluation.sampler.num_steps=6"],
        "= 6",
    ),
    "final steps of zero": (["evaluation.final_num_steps=[16,0]"], "num_steps = 0"),
    "final steps beyond the length": (["evaluation.final_num_steps=[99]"], "num_steps = 99"),
    "final steps of a sampler without": (
        ["evaluation.sampler.type=roar", "evaluation.final_num_steps=[8]"],
        "evaluation.final_num_steps",
    ),
    "no examples": (["evaluation.num_examples=0"], "evaluation.num_examples = 0"),
    "unknown split": (["evaluation.split=dev"], "unknown split 'dev'"),
    "unknown final split": (["evaluation.final_split=tset"], "unknown split 'tset'"),
    "unknown prompt": (["task.prompt=riddle"], "riddle"),
    "unknown reward": (["task.reward=praise"], "praise"),
    "blanks": (["task.num_blanks=13"], "task.num_blanks = 13"),
    "more puzzles than there are": (["task.num_train=99999999999"], "task.num_train = 99999999999"),
    "evaluation data that is missing": (["task.data=none.csv"], "none.csv: cannot be read"),
    "training data that is missing": (["task.train_data=none.csv"], "none.csv: cannot be read"),
    "excluded data that is missing": (['task.exclude=["none.csv"]'], "none.csv: cannot be read"),
    "data in a directory's place": (["task.data=model"], "model: cannot be read"),
    "data with a zero byte in its name": (['task.data="a\\u0000b"'], "cannot be read"),
    "prompt too long": (["task.prompt=" + "1" * 50 + "{puzzle}", "sampler.gen_length=16"], "exceeds the 40 positions"),
    "completion too long": (["sampler.gen_length=64"], "exceeds the 40 positions"),
    "chat prompt of other characters": (["task.prompt=d1", "sampler.gen_length=16"], "not in the model's vocabulary"),
    "no length for a prompt of words": (["task.prompt=d1"], "sampler.gen_length is missing"),
    "new model": (["model.path=none", "model.tiny.hidden_size=16"], "model.tiny: an untrained model"),
    "two models": (['model.recipe="sft.toml"'], "model.path and model.recipe given"),
    "model that is missing": (["model.path=nothing"], "nothing: no config.json there"),
    "model with an endless name": (["model.path=" + "a" * 5000], "no config.json there"),
    "base recipe that is missing": (["model.path=none", "model.recipe=nothing.toml"], "nothing.toml: no such file"),
    "base recipe for reinforcement": (["model.path=none", "model.recipe=rl.toml"], "unknown section or key"),
    "unknown tracker": (['tracking.trackers=["mlflow"]'], "unknown tracker 'mlflow'"),
}


@pytest.mark.parametrize("name", TRAIN_OVERRIDES)
def test_recipe_overrides(name, place, refuse):
    overrides, message = TRAIN_OVERRIDES[name]
    refuse(["train", "rl.toml", *overrides, "--output", "run", "--quiet"], message)


SFT_OVERRIDES: dict[str, tuple[list[str], str]] = {
    "negative length": (["data.gen_length=-4"], "data.gen_length = -4"),
    "no length": (["data.gen_length=0"], "data.gen_length = 0"),
    "no rows": (["data.batch_size=0"], "data.batch_size = 0"),
    "section of another command": (["rollout.group_size=4"], "unknown section or key 'rollout'"),
    "width of zero": (["model.tiny.hidden_size=0"], "model.tiny.hidden_size = 0"),
    "heads that do not divide": (["model.tiny.num_heads=3"], "model.tiny.num_heads = 3"),
    "no alphabet": (["model.tiny.alphabet="], "model.tiny.alphabet"),
    "an alphabet of other characters": (["model.tiny.alphabet=abc"], "not in the model's vocabulary"),
    "negative spread of weights": (["model.tiny.init_std=-1"], "model.tiny.init_std = -1.0"),
    "endless spread of weights": (["model.tiny.init_std=inf"], "model.tiny.init_std = inf"),
    "positions": (["model.tiny.max_length=20"], "exceeds the 20 positions"),
    "no copies": (["algorithm.num_masks=0"], "algorithm.num_masks = 0"),
    "type of the only algorithm": (["algorithm.type=espo"], "unknown key algorithm.type"),
    "unknown teacher": (["task.teacher=me"], "me"),
    "file that is missing": (["data.file=none.jsonl"], "none.jsonl: cannot be read"),
    "file that is a directory": (["data.file=model"], "model: cannot be read"),
    "completion that does not fit": (["data.gen_length=3"], "exceeds gen_length = 3"),
}


@pytest.mark.parametrize("name", SFT_OVERRIDES)
def test_supervised_overrides(name, place, refuse):
    overrides, message = SFT_OVERRIDES[name]
    refuse(["sft", "sft.toml", *overrides, "--output", "run", "--quiet"], message)


# ---- data files


def csv_row(puzzle: str = PUZZLE, solution: str = SOLUTION) -> str:
    return f"Puzzle,Solution\n{puzzle},{solution}\n"


def json_row(**changes) -> str:
    return json.dumps({"input": PUZZLE, "output": SOLUTION} | changes) + "\n"


PUZZLES: dict[str, tuple[str, str | bytes, str]] = {
    "empty CSV": ("a.csv", "", "no column 'Puzzle'"),
    "header alone": ("a.csv", "Puzzle,Solution\n", "no puzzles in this file"),
    "CSV without header": ("a.csv", f"{PUZZLE},{SOLUTION}\n", "no column 'Puzzle'"),
    "CSV without solutions": ("a.csv", f"Puzzle\n{PUZZLE}\n", "no column 'Solution'"),
    "too many fields": ("a.csv", csv_row() + f"{PUZZLE},{SOLUTION},x\n", "line 3: 3 fields"),
    "puzzle of 15 digits": ("a.csv", csv_row(puzzle=PUZZLE[1:]), "has 15 characters, 16 are required"),
    "letters": ("a.csv", csv_row(puzzle="x" + PUZZLE[1:]), "only the digits 0-4"),
    "digit 5": ("a.csv", csv_row(solution="5" + SOLUTION[1:]), "only the digits 1-4"),
    "no blanks": ("a.csv", csv_row(puzzle=SOLUTION), "has no blank cell"),
    "wrong solution": ("a.csv", csv_row(solution="1" + SOLUTION[1:]), "repeats a digit"),
    "solution of another puzzle": ("a.csv", csv_row(puzzle="0" * 15 + "2"), "but the puzzle gives 2"),
    "open quote": ("a.csv", 'Puzzle,Solution\n"' + PUZZLE, "line 2"),
    "CSV that is not UTF-8": ("a.csv", b"Puzzle,Solution\n\xff", "is not UTF-8"),
    "empty JSON lines": ("a.jsonl", "\n\n", "no puzzles in this file"),
    "JSON lines of examples alone": ("a.jsonl", json_row() * 8, "are few-shot examples"),
    "not JSON": ("a.jsonl", json_row() + "{", "line 2: not a JSON object"),
    "a JSON list": ("a.jsonl", "[1]\n", "an object is required"),
    "JSON without a solution": ("a.jsonl", '{"input": "0"}\n', "'output' is missing"),
    "a number as the puzzle": ("a.jsonl", json_row(input=123), "'input' is a int"),
    "endless nesting": ("a.jsonl", "[" * 100_000, "not a JSON object"),
}


@pytest.mark.parametrize("name", PUZZLES)
def test_puzzle_files(name, place, refuse):
    file, content, message = PUZZLES[name]
    (place / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    command = ["eval", "model", "--task", "sudoku", "--data", file, "--output", "rows.json", "--quiet"]
    refuse(command, message)


GOOD_ROW = {"prompt": "12|", "completion": "34"}
DEMONSTRATIONS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "holds no rows"),
    "not UTF-8": (b"\xff\xfe", "is not UTF-8"),
    "not JSON": (json.dumps(GOOD_ROW) + "\nhello\n", "line 2: is not JSON"),
    "a list": ("[]\n", "line 1: is not a JSON object"),
    "endless nesting": ("[" * 100_000, "line 1: is not JSON"),
    "no completion": ('{"prompt": "12|"}', "no 'completion'"),
    "prompt is a number": ('{"prompt": 12, "completion": "34"}', "prompt: must be a string or a list"),
    "no messages": ('{"messages": []}', "messages: must be"),
    "one message": ('{"messages": [{"role": "user", "content": "1"}]}', "has a single turn"),
    "no answer": (json.dumps({"messages": [{"role": "user", "content": "1"}] * 2}), "must be one assistant turn"),
    "message without text": ('{"messages": [{"role": "user"}, 3]}', "messages: must be"),
    "empty prompt": ('{"prompt": "", "completion": "34"}', "a prompt has no tokens"),
    "completion too long": (json.dumps(GOOD_ROW | {"completion": "1" * 9}), "exceeds gen_length = 4"),
    "prompt too long": (json.dumps(GOOD_ROW | {"prompt": "1" * 90}), "exceeds the 64 positions"),
    "unknown role": (
        json.dumps({"messages": [{"role": "<x", "content": "1"}, {"role": "assistant", "content": "2"}]}),
        "vocabulary",
    ),
}


def test_a_line_separator_inside_a_string_and_a_byte_order_mark_are_no_fault(tmp_path):
    row = json.dumps(GOOD_ROW | {"prompt": "1\u2028|"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"\ufeff{row}\n{row}\n", encoding="utf-8")
    assert [example.prompt for example, _ in read_demonstrations(tmp_path / "a.jsonl")] == ["1\u2028|"] * 2


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstration_files(name, place, refuse):
    content, message = DEMONSTRATIONS[name]
    (place / "a.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    tables = {key: value for key, value in SFT.items() if key != "task"} | {
        "data": {"file": "a.jsonl", "gen_length": 4}
    }
    (place / "file.toml").write_text(dump_toml(tables))
    refuse(["sft", "file.toml", "--output", "run", "--quiet"], message)


# ---- model directories


def change_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "dropped"}))


def change_weights(model: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True)
class Damage:
    """What is done to a good model directory, and what the line must say."""

    do: Callable[[Path], object]
    message: str


def config(**changes) -> Callable[[Path], None]:
    return lambda model: change_json(model / "config.json", **changes)


def without_token(name: str) -> Callable[[Path], None]:
    """Neither config.json nor the tokenizer knows a special token; one of them would do."""

    def do(model: Path) -> None:
        change_json(model / "config.json", **{f"{name}_token_id": None})
        change_json(model / "tokenizer_config.json", **{f"{name}_token": None})

    return do


MODELS: dict[str, Damage] = {
    "no directory": Damage(shutil.rmtree, "no config.json there"),
    "a file": Damage(lambda m: (shutil.rmtree(m), m.write_text("x")), "no config.json there"),
    "no config": Damage(lambda m: (m / "config.json").unlink(), "no config.json there"),
    "config is a directory": Damage(
        lambda m: ((m / "config.json").unlink(), (m / "config.json").mkdir()), "no config.json"
    ),
    "config is empty": Damage(lambda m: (m / "config.json").write_text(""), "config.json: not a JSON object"),
    "config is not JSON": Damage(lambda m: (m / "config.json").write_text("{"), "config.json: not a JSON object"),
    "config is a list": Damage(lambda m: (m / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "config is not UTF-8": Damage(lambda m: (m / "config.json").write_bytes(b"\xff"), "config.json: not a JSON object"),
    "config is nested": Damage(
        lambda m: (m / "config.json").write_text("[" * 100_000), "config.json: not a JSON object"
    ),
    "unknown family": Damage(config(model_type="llama"), "model_type = 'llama' is unknown"),
    "no family": Damage(config(model_type="dropped"), "model_type = None is unknown"),
    "family is a list": Damage(config(model_type=["unmask_tiny"]), "is unknown"),
    "width is a word": Damage(config(hidden_size="wide"), "cannot be loaded"),
    "no heads": Damage(config(num_attention_heads=0), "cannot be loaded"),
    "negative layers": Damage(config(num_hidden_layers=-1), "weights do not fit config.json"),
    "more layers than weights": Damage(config(num_hidden_layers=5), "weights do not fit config.json"),
    "another width": Damage(config(hidden_size=32), "weights do not fit config.json"),
    "another vocabulary": Damage(config(vocab_size=7), "weights do not fit config.json"),
    "mask token beyond the vocabulary": Damage(config(mask_token_id=999), "mask_token_id = 999"),
    "no mask token": Damage(without_token("mask"), "mask_token_id = None"),
    "no stop token": Damage(without_token("eos"), "eos_token_id = None"),
    "no weights": Damage(lambda m: (m / "model.safetensors").unlink(), "no *.safetensors file"),
    "empty weights": Damage(lambda m: (m / "model.safetensors").write_bytes(b""), "cannot be loaded"),
    "truncated weights": Damage(lambda m: os.truncate(m / "model.safetensors", 5000), "cannot be loaded"),
    "weights of random bytes": Damage(
        lambda m: (m / "model.safetensors").write_bytes(bytes(range(256))), "cannot be loaded"
    ),
    "weights are a directory": Damage(
        lambda m: ((m / "model.safetensors").unlink(), (m / "model.safetensors").mkdir()), "cannot be loaded"
    ),
    "a lost tensor": Damage(lambda m: change_weights(m, lambda t: t.pop("lm_head.weight")), "first at lm_head.weight"),
    "a tensor too many": Damage(lambda m: change_weights(m, lambda t: t.update(x=torch.ones(1))), "first at x"),
    "weights that are no numbers": Damage(
        lambda m: change_weights(m, lambda t: t["lm_head.weight"].fill_(float("nan"))), "not finite"
    ),
    "no tokenizer": Damage(
        lambda m: [(m / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "cannot be loaded"
    ),
    "garbage as the tokenizer": Damage(lambda m: (m / "tokenizer.json").write_text("garbage"), "cannot be loaded"),
    "a tokenizer of another model": Damage(lambda m: add_tokens(m / "tokenizer.json", 50), "tokenizer"),
}


def add_tokens(file: Path, count: int) -> None:
    """More tokens than the model has rows."""
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"extra{i}": len(vocabulary) + i for i in range(count)}
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", MODELS)
def test_model_directories(name, place, refuse):
    damage = MODELS[name]
    damage.do(place / "model")
    refuse(
        ["eval", "model", "--task", "sudoku", "--data", "good.csv", "--output", "rows.json", "--quiet"], damage.message
    )


@pytest.mark.parametrize("name", ["no config", "truncated weights", "weights that are no numbers", "no mask token"])
def test_model_directories_of_recipes(name, place, refuse):
    MODELS[name].do(place / "model")
    refuse(["train", "rl.toml", "--output", "run", "--quiet"], MODELS[name].message)


# ---- options of the commands

COMMANDS: dict[str, tuple[list[str], str]] = {
    "unknown command": (["trian", "rl.toml"], "trian"),
    "no command": ([], "required"),
    "unknown option": (["train", "rl.toml", "--ouput", "run"], "--ouput"),
    "no recipe": (["train"], "no recipe given"),
    "recipe that is missing": (["train", "none.toml"], "none.toml: no such file"),
    "recipe that is a directory": (["train", "model"], "model: is a directory"),
    "output that is not empty": (["train", "rl.toml", "--output", "model"], "exists and is not empty"),
    "output that is a file": (["train", "rl.toml", "--output", "good.csv"], "exists and is not empty"),
    "output below a file": (["train", "rl.toml", "--output", "good.csv/run"], "is not a writable directory"),
    "resuming nothing": (["train", "--resume", "none"], "no config.toml there"),
    "resuming a model": (["train", "--resume", "model"], "no config.toml there"),
    "resuming into another place": (["train", "--resume", "model", "--output", "x"], "--output goes with a new run"),
    "allowing without resuming": (["train", "rl.toml", "--allow", "seed"], "goes with --resume"),
    "evaluating nothing": (["eval", "none", "--task", "sudoku", "num_test=2"], "no config.json there"),
    "evaluating a data file": (["eval", "good.csv", "--task", "sudoku", "num_test=2"], "no config.json there"),
    "evaluating without a task": (["eval", "model"], "--task"),
    "unknown task": (["eval", "model", "--task", "chess"], "unknown task 'chess'"),
    "unknown task option": (["eval", "model", "--task", "sudoku", "blanks=3"], "unknown key task.blanks"),
    "unknown split": (["eval", "model", "--task", "sudoku", "--split", "tset"], "unknown split 'tset'"),
    "unknown sampler": (["eval", "model", "--task", "sudoku", "--sampler", "x"], "unknown sampler 'x'"),
    "lengths that are words": (["eval", "model", "--task", "sudoku", "--gen-length", "16,x"], "--gen-length 16,x"),
    "no lengths": (["eval", "model", "--task", "sudoku", "--gen-length", ","], "--gen-length ,"),
    "limit that is a word": (["eval", "model", "--task", "sudoku", "--limit", "few"], "--limit"),
    "limit of zero": (["eval", "model", "--task", "sudoku", "--limit", "0"], "limit = 0"),
    "data that is missing": (["eval", "model", "--task", "sudoku", "--data", "none.csv"], "none.csv: cannot be read"),
    "rows into a directory": (["eval", "model", "--task", "sudoku", "--output", "model"], "--output model"),
    "rows into no directory": (["eval", "model", "--task", "sudoku", "--output", "a/b.json"], "does not exist"),
    "sampling from nothing": (["sample", "none", "12|"], "no config.json there"),
    "sampling after nothing": (["sample", "model", ""], "a prompt has no tokens"),
    "sampling too much": (["sample", "model", "12|", "--gen-length", "400"], "exceeds the 40 positions"),
    "sampling in wrong blocks": (["sample", "model", "12|", "--block-length", "5"], "sampler.block_length = 5"),
    "listing nothing": (["list", "models-and-more"], "models-and-more"),
    "replaying a data file": (["replay", "good.csv"], "is not a fault file"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_options(name, place, refuse):
    arguments, message = COMMANDS[name]
    refuse(arguments, message)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for the superuser")
def test_an_output_that_is_not_writable(place, refuse):
    (place / "closed").mkdir(mode=0o500)
    refuse(["train", "rl.toml", "--output", "closed/run"], "is not a writable directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for the superuser")
def test_a_cache_that_is_not_writable(place, refuse, monkeypatch):
    (place / "closed").mkdir(mode=0o500)
    monkeypatch.setenv("UNMASK_CACHE", str(place / "closed" / "cache"))
    refuse(["train", "rl.toml", "model.path=none", "model.recipe=sft.toml"], "cannot be written")


def test_a_cache_below_a_file(place, refuse, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(place / "good.csv" / "cache"))
    arguments = ["train", "rl.toml", "model.path=none", "model.recipe=sft.toml", "--output", "run", "--quiet"]
    refuse(arguments, "cannot be written")


def test_the_corpus_is_large():
    assert sum(map(len, (RECIPES, TRAIN_OVERRIDES, SFT_OVERRIDES, PUZZLES, DEMONSTRATIONS, MODELS, COMMANDS))) >= 60


def test_a_tokenizer_that_brings_its_own_code_is_refused_without_asking(tmp_path, capsys):
    """transformers would ask on the terminal whether to run it."""
    tiny_policy(dtype=torch.float32).save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    main(["sample", str(tmp_path / "m"), "3102200002100320|"])
    capsys.readouterr()
    assert not (tmp_path / "ran").exists()


TEXTS = {
    "a mask token": ("31<|mask|>2", "contains the mask token"),
    "a lone surrogate": ("\ud800", "not valid Unicode"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_no_model_can_read_are_refused(name):
    text, message = TEXTS[name]
    with pytest.raises(DataError, match=message):
        tiny_policy().encode_completions([text], 16)


def test_a_seed_beyond_64_bits_and_an_endless_output_name_are_one_line(tmp_path, capsys):
    (tmp_path / "r.toml").write_text('[task]\ntype = "sudoku"\n[model]\npath = "m"\n[algorithm]\ntype = "espo"\n')
    for extra in (["seed=99999999999999999999999"], ["--output", str(tmp_path / ("a" * 300))]):
        assert main(["train", str(tmp_path / "r.toml"), *extra]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Error: " in error
