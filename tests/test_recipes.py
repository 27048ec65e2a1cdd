"""Every recipe in the repository builds, and the headers of the full-size ones say what the recipe is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from unmask.build import Recipe, sft_recipe, train_recipe
from unmask.config import apply_overrides, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
PARENTS = sorted(RECIPES.glob("*/base.toml"))  # name no algorithm, and are not for the command
FILES = [file for file in sorted(RECIPES.rglob("*.toml")) if file not in PARENTS]
FULL_SIZE = [file for file in FILES if file.parent.name in ("llada", "dream")]
NAMES = {"ids": lambda file: str(file.relative_to(RECIPES))}

# ESPO, arXiv:2512.03759, Table 1, Sudoku at 128, 256 and 512 tokens; before training, and the optimiser updates
TARGETS = {
    "llada/sudoku-espo.toml": ("92.7 / 84.7 / 80.5", "24.8 / 16.2 / 6.0", 10_000),
    "llada/sudoku-diffu-grpo.toml": ("26.7 / 24.1 / 15.9", "24.8 / 16.2 / 6.0", 3_800),
    "dream/sudoku-espo.toml": ("71.7 / 72.3 / 71.3", "9.3 / 2.1 / 14.0", 8_000),
    "dream/sudoku-diffu-grpo.toml": ("64.4 / 69.7 / 51.1", "9.3 / 2.1 / 14.0", 8_000),
}


def header(file: Path) -> str:
    """The comment lines before the first key, without their marks."""
    lines = file.read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.lstrip("# ") for line in lines[:count])


def labelled(text: str, label: str) -> str:
    """The first line behind a label of the header."""
    (line,) = re.findall(rf"^{label} +(.+)$", text, re.MULTILINE)
    return str(line)


def look_up(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def build(file: Path, *overrides: str) -> Recipe:
    tree = apply_overrides(read_recipe(file), overrides)
    return (train_recipe if "sampler" in tree else sft_recipe)(tree, file.parent)


@pytest.mark.parametrize("file", FILES, **NAMES)
def test_every_recipe_builds(file):
    recipe = build(file)
    assert recipe.task is not None and recipe.task.name in ("sudoku", "sudoku_twice")
    assert recipe.evaluation_sampler is not None


def test_every_parent_has_a_child_beside_it_and_no_full_size_recipe_is_left_out():
    for parent in PARENTS:
        assert any(tomllib.loads(file.read_text())["extends"] == parent.name for file in parent.parent.glob("sudoku*"))
    assert {str(file.relative_to(RECIPES)) for file in FULL_SIZE} == set(TARGETS)


@pytest.mark.parametrize("file", FULL_SIZE, **NAMES)
def test_a_header_states_target_metric_shots_and_launch_line(file):
    name = str(file.relative_to(RECIPES))
    text, (target, before, updates) = header(file), TARGETS[name]
    assert labelled(text, "Target").startswith(f"{target} % at 128 / 256 / 512 canvas tokens")
    assert before in text
    assert labelled(text, "Metric").startswith("cell_accuracy")
    assert labelled(text, "Shots").startswith("1")
    assert labelled(text, "Measured")
    launch = labelled(text, "Launch").split()
    assert launch[:2] == ["accelerate", "launch"] and launch[4:8] == ["-m", "unmask", "train", f"recipes/{name}"]
    recipe = build(file)
    assert recipe.trainer.num_batches * recipe.algorithm.value.num_iterations == updates
    assert f"{updates:,} updates" in text


@pytest.mark.parametrize("file", FULL_SIZE, **NAMES)
def test_the_settings_in_a_header_are_the_recipes_and_its_switches_exist(file):
    text, tree = header(file), build(file).tree()
    stated = re.findall(r"\b([a-z]+(?:\.[a-z_]+)+) = ([\w.\"-]*\w\"?)", text)
    assert len(stated) >= 12
    for key, value in stated:
        assert look_up(tree, key) == tomllib.loads(f"x = {value}")["x"], key
    for line in text.splitlines():  # switches of a line go together
        switches = re.findall(r"\b[a-z]+(?:\.[a-z_]+)+=[\w.-]*\w", line)
        changed = build(file, *switches).tree()
        for key, value in (switch.split("=") for switch in switches):
            assert str(look_up(changed, key)) == value


@pytest.mark.parametrize("file", FULL_SIZE, **NAMES)
def test_full_size_recipes_keep_the_published_decoding(file):
    recipe = build(file)
    assert recipe.sampler is not None and recipe.evaluation_sampler is not None and recipe.model.lora is not None
    training, evaluation = recipe.sampler.value, recipe.evaluation_sampler.value
    is_dream = file.parent.name == "dream"
    assert recipe.sampler.name == recipe.evaluation_sampler.name == ("dream" if is_dream else "low_confidence")
    for sampler, temperature in ((training, 0.9), (evaluation, 0.1 if is_dream else 0.0)):
        assert (sampler.gen_length, sampler.num_steps, sampler.temperature) == (256, 128, temperature)
        assert (sampler.alg, sampler.top_p) == ("entropy", 0.95) if is_dream else sampler.block_length == 32
    assert recipe.model.path == ("Dream-org/Dream-v0-Instruct-7B" if is_dream else "GSAI-ML/LLaDA-8B-Instruct")
    assert recipe.model.dtype == "bfloat16"
