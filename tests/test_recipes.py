"""Every recipe in the repository builds, and the headers of the full-size ones say what the recipe is."""

from __future__ import annotations

import argparse
import csv
import re
import socket
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from unmask.api import decoding, evaluation_task
from unmask.build import Recipe, sft_recipe, train_recipe
from unmask.cli import eval_command
from unmask.config import apply_overrides, read_recipe
from unmask.errors import ConfigError
from unmask.objectives import ALGORITHMS
from unmask.protocols import LENGTHS, task_options

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
CHECKPOINTS = {
    "llada": "GSAI-ML/LLaDA-8B-Instruct",
    "llada-1.5": "GSAI-ML/LLaDA-1.5",
    "dream": "Dream-org/Dream-v0-Instruct-7B",
}
TASKS = ("sudoku", "sudoku24", "gsm8k", "math", "countdown", "code")
PARENTS = [RECIPES / model / f"{name}.toml" for model in ("dream", "llada") for name in ("base", *TASKS)]
PARENTS = sorted(file for file in PARENTS if file.is_file())  # name no algorithm, and are not for the command
FILES = [file for file in sorted(RECIPES.rglob("*.toml")) if file not in PARENTS]
FULL_SIZE = [file for file in FILES if file.parent.name in CHECKPOINTS]
NAMES = {"ids": lambda file: str(file.relative_to(RECIPES))}

with open(Path(__file__).parent / "published_results.csv", newline="", encoding="utf-8") as lines:
    PUBLISHED = list(csv.DictReader(lines))  # per cent; the papers' tables, one row a cell

# what the papers and their scripts state for all tasks, and for one
SETTINGS: dict[str, dict[str, Any]] = {
    "espo": {"algorithm.num_masks": 4, "algorithm.num_iterations": 8, "sampler.temperature": 0.9},
    "espo gsm8k": {
        "algorithm.kl_coef": 1e-3,
        "optimizer.weight_decay": 0.01,
        "algorithm.clip_low": 0.2,
        "rollout.group_size": 6,
    },
    "espo math": {"algorithm.kl_coef": 1e-3, "rollout.group_size": 16, "sampler.num_steps": 256, "updates": 3000},
    "espo countdown": {"algorithm.kl_coef": 3e-3, "algorithm.clip_low": 0.0, "sampler.num_steps": 128},
    "espo sudoku": {"algorithm.kl_coef": 1e-2, "algorithm.clip_high": 0.2, "rollout.group_size": 6},
    "espo code": {"algorithm.kl_coef": 1e-2, "rollout.group_size": 10, "optimizer.lr": 1e-6, "updates": 2000},
    "diffu_grpo": {"optimizer.lr": 3e-6, "optimizer.weight_decay": 0.1, "rollout.group_size": 6},
    "diffu_grpo math": {"algorithm.num_iterations": 12},
    "diffu_grpo countdown": {"algorithm.num_iterations": 8},
    "wd1": {"optimizer.lr": 3e-6, "rollout.group_size": 6, "rollout.prompts_per_batch": 8},
    "coupled_grpo": {"optimizer.lr": 1e-6, "rollout.group_size": 10, "sampler.temperature": 1.0},
    "vrpo": {"optimizer.lr": 5e-7, "optimizer.warmup_steps": 15, "data.batch_size": 64, "algorithm.beta": 0.2},
    "dpo_elbo": {"optimizer.lr": 5e-7, "algorithm.num_masks": 1, "algorithm.sft_coef": 0.0},
    "sapo": {"optimizer.lr": 3e-6, "rollout.group_size": 6, "algorithm.kl_coef": 0.04},
    "d_treerpo": {"optimizer.lr": 3e-5, "rollout.group_size": 16, "task.reward": "solved", "updates": 30_000},
    "spg": {"optimizer.lr": 3e-6, "rollout.group_size": 6, "algorithm.num_iterations": 4},
    "spg gsm8k": {"algorithm.gamma": 1.5, "updates": 6000},
    "spg math": {"algorithm.gamma": 1.5, "updates": 4000},
    "spg countdown": {"algorithm.gamma": 1.5, "updates": 6000},
    "spg sudoku": {"algorithm.gamma": 1.0, "sampler.temperature": 0.3, "updates": 2500, "task.prompt": "spg"},
    "gdpo": {"algorithm.num_nodes": 3, "optimizer.lr": 1e-6},
    "dga": {"model.lora.rank": 128, "sampler.num_steps": 128, "rollout.group_size": 8},
    "dga gsm8k": {"updates": 27_000},
    "embr_e": {"optimizer.lr": 3e-6, "rollout.group_size": 6, "sampler.temperature": 0.9},
    "dmpo_wdce": {"optimizer.lr": 1e-6, "rollout.group_size": 16, "sampler.temperature": 0.2},
    "dmpo_wddo": {"optimizer.lr": 1e-6, "algorithm.discriminator_scale": 1.0, "algorithm.negative_coef": 1.0},
}


@cache
def header(file: Path) -> str:
    """The comment lines before the first key, without their marks."""
    lines = file.read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:count])


@cache
def labelled(file: Path, label: str) -> str:
    """What a label of the header says, its indented lines joined; "" if it is not there."""
    found = re.findall(rf"^{label} {{2,}}(.+(?:\n {{10,}}.+)*)$", header(file), re.MULTILINE)
    assert len(found) <= 1, label
    return " ".join(found[0].split()) if found else ""


def look_up(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def build(file: Path, *overrides: str) -> Recipe:
    tree = apply_overrides(read_recipe(file), overrides)
    return (train_recipe if "sampler" in tree else sft_recipe)(tree, file.parent)


@cache
def built(file: Path) -> tuple[Recipe, dict[str, Any]]:
    """A recipe as it stands, and its tree."""
    recipe = build(file)
    return recipe, recipe.tree()


def cell(file: Path) -> tuple[str, str, str]:
    """Model, task and algorithm, as the file is called."""
    task, _, algorithm = file.stem.partition("-")
    return file.parent.name, task, algorithm.replace("-", "_")


def updates(recipe: Recipe) -> int:
    return recipe.trainer.num_batches * int(recipe.algorithm.value.num_iterations)


@pytest.mark.parametrize("file", FILES, **NAMES)
def test_every_recipe_builds_without_network(file, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a recipe was checked through the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    recipe, _ = built(file)
    assert recipe.task is not None and recipe.evaluation_sampler is not None
    if file not in FULL_SIZE:
        assert recipe.task.name in ("sudoku", "sudoku_twice")
        return
    model, task, algorithm = cell(file)
    assert (recipe.model.path, recipe.algorithm.name) == (CHECKPOINTS[model], algorithm)
    assert recipe.task.name == task.removesuffix("24")


def test_few_files_stand_behind_a_recipe():
    for file in FILES:
        count, at = 0, file
        while (parent := tomllib.loads(at.read_text(encoding="utf-8")).get("extends")) is not None:
            count, at = count + 1, at.parent / parent
        assert count <= 4, file
        assert file not in FULL_SIZE or at.resolve() == RECIPES / "llada" / "base.toml", file


def test_every_parent_is_extended_beside_it():
    for parent in PARENTS:
        assert "algorithm" not in read_recipe(parent)
        files = [file for file in parent.parent.glob("*.toml") if file != parent]
        assert any(tomllib.loads(file.read_text(encoding="utf-8")).get("extends") == parent.name for file in files)


def test_every_algorithm_has_full_size_recipes():
    assert {cell(file)[2] for file in FULL_SIZE} == set(ALGORITHMS)


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+\.\d+", text)


def test_every_published_number_stands_in_the_header_of_its_recipe():
    for row in PUBLISHED:
        if row["algorithm"] == "base":
            continue
        task = "code" if row["test_set"].startswith(("humaneval", "mbpp")) else row["test_set"]
        file = RECIPES / row["model"] / f"{task}-{row['algorithm'].replace('_', '-')}.toml"
        text = f"{labelled(file, 'Target')}; {labelled(file, 'Also')}"
        assert re.search(rf"(?<![\d/] ){row['values'].replace('/', ' / ')}(?! /)", text), (row, text)


def test_a_header_has_no_other_numbers():
    for file in FULL_SIZE:
        model, task, algorithm = cell(file)
        tests = ("humaneval", "humaneval+", "mbpp", "mbpp+") if task == "code" else (task,)
        rows = [row for row in PUBLISHED if row["model"] == model and row["test_set"] in tests]
        own = {number for row in rows if row["algorithm"] == algorithm for number in numbers(row["values"])}
        before = {number for row in rows if row["algorithm"] == "base" for number in numbers(row["values"])}
        target, _, start = labelled(file, "Target").partition("before training")
        stated = re.sub(r"LLaDA 1\.5|[a-z_.]+=[\d.]+", "", f"{target} {labelled(file, 'Also')}")
        assert set(numbers(stated)) <= own and set(numbers(start)) <= before, file
        assert bool(own) == (target != "No published number."), file


def test_a_header_states_method_target_metric_shots_and_launch_line():
    for file in FULL_SIZE:
        model, task, algorithm = cell(file)
        first, name = header(file).split("\n")[0], str(file.relative_to(RECIPES))
        assert f"on {CHECKPOINTS[model].split('/')[1]}, " in first, file
        assert getattr(ALGORITHMS[algorithm], "source", "").split(" (")[0] in first, file
        form = r"No published number\.$|[\w+./, ]+\d %( at [\d /]+ canvas tokens)? \(.+\)"
        assert re.match(form, labelled(file, "Target")), file
        metric = "cell_accuracy " if task == "sudoku" else "accuracy"
        assert labelled(file, "Metric").startswith(metric), file
        assert re.match(r"\d", labelled(file, "Shots")) and labelled(file, "Measured"), file
        launch = labelled(file, "Launch").split()
        assert launch[:3] == ["accelerate", "launch", "--config_file"] and (ROOT / launch[3]).is_file(), file
        assert launch[4:9] == ["-m", "unmask", "train", f"recipes/{name}", "--output"], file
        assert launch[9] == labelled(file, "Evaluate").split()[2], file


def test_the_settings_in_a_header_are_the_recipes_and_its_switches_exist():
    for file in FULL_SIZE:
        text, (recipe, tree) = header(file), built(file)
        stated = re.findall(r"\b([a-z]+(?:\.[a-z_]+)+) = ([\w.\"-]*\w\"?)", text)
        assert len(stated) >= 5, file
        for key, value in stated:
            assert look_up(tree, key) == tomllib.loads(f"x = {value}")["x"], (file, key)
        for found in re.findall(r"\(([\d,]+) updates", text):
            assert int(found.replace(",", "")) == updates(recipe), file
        for line in text.splitlines():  # switches of a line go together
            switches = re.findall(r"\b[a-z]+(?:\.[a-z_]+)+=[\w.-]*\w", line)
            changed = build(file, *switches).tree() if switches else {}
            for key, value in (switch.split("=") for switch in switches):
                assert str(look_up(changed, key)).rpartition("/")[2] == value, file


@pytest.mark.parametrize("name", SETTINGS)
def test_published_settings_are_those_of_the_recipes(name):
    wanted, (algorithm, _, task) = SETTINGS[name], name.partition(" ")
    files = [file for file in FULL_SIZE if cell(file)[2] == algorithm and task in ("", cell(file)[1])]
    assert files
    for file in files:
        recipe, tree = built(file)
        found = {key: updates(recipe) if key == "updates" else look_up(tree, key) for key in wanted}
        assert found == wanted, file


def test_full_size_recipes_keep_the_published_decoding():
    for file in FULL_SIZE:
        recipe, (model, task, algorithm) = built(file)[0], cell(file)
        evaluation = recipe.evaluation_sampler
        assert evaluation is not None, file
        is_dream, length = model == "dream", 24 if task == "sudoku24" else 256
        assert evaluation.name == ("dream" if is_dream else "low_confidence"), file
        assert (evaluation.value.gen_length, evaluation.value.temperature) == (length, 0.1 if is_dream else 0.0), file
        assert evaluation.value.num_steps in ((24,) if length == 24 else (128, 256)), file
        decoders = [evaluation] if recipe.sampler is None else [recipe.sampler, evaluation]
        for name, sampler in decoders:
            assert (sampler.alg, sampler.top_p) == ("entropy", 0.95) if is_dream else sampler.block_length == 32, file
            assert (name == "roar") == (algorithm.startswith("dmpo") and sampler is not evaluation.value), file
            assert sampler.gen_length == length, file
        assert (recipe.model.lora is None) == (task == "code" and algorithm in ("espo", "coupled_grpo")), file
        assert recipe.model.dtype == ("auto" if recipe.model.lora is None else "bfloat16"), file


def test_dmpo_recipes_name_the_other_published_sampler_and_it_builds():
    files = [file for file in FULL_SIZE if cell(file)[2].startswith("dmpo")]
    for file in files:
        (line,) = (found for found in header(file).splitlines() if "sampler.type=" in found)
        recipe = build(file, *line.split())
        assert recipe.sampler is not None and recipe.sampler.name == "low_confidence", file
        assert (recipe.sampler.value.threshold, recipe.sampler.value.cache) == (0.9, "prefix"), file
        assert recipe.sampler.value.temperature == 0.2 and recipe.algorithm.value.likelihood == "elbo", file
        with pytest.raises(ConfigError, match="approximation"):  # with the order's likelihood a cache is refused
            build(file, *line.split()[:-1])
    assert len(files) >= 8


def test_the_line_that_evaluates_is_accepted():
    for file in FULL_SIZE:
        line = labelled(file, "Evaluate").partition(" MBPP:")[0].split()
        parser = argparse.ArgumentParser()
        eval_command.add_arguments(parser)
        args = parser.parse_intermixed_args(line[2:])
        options = task_options(args.preset, args.task) if args.preset else {}
        task = evaluation_task(args.task, args.data, args.split, apply_overrides(options, args.options))
        assert task.name == built(file)[0].task.name, file
        for length in LENGTHS if args.preset else eval_command.lengths(args.gen_length):
            fields = {"gen_length": length, "temperature": args.temperature, **eval_command.pace(args, length)}
            sampler = decoding(task, args.sampler, **fields)
            if length == 256:  # the lengths of a run's own evaluations
                assert sampler == built(file)[0].evaluation_sampler, file


def test_the_line_for_mbpp_asks_with_the_published_examples():
    for file in FULL_SIZE:
        line, _, words = labelled(file, "Evaluate").partition(" MBPP: ")
        assert bool(words) == ("3 for MBPP" in labelled(file, "Shots")), file
        if not words:
            continue
        parser = argparse.ArgumentParser()
        eval_command.add_arguments(parser)
        args = parser.parse_intermixed_args([*line.split()[2:], *words.split()])
        options = task_options(args.preset, args.task) if args.preset else {}
        task = evaluation_task(args.task, args.data, args.split, apply_overrides(options, args.options)).value
        assert (task.prompt, task.num_shots, task.data) == ("mbpp", 3, "google-research-datasets/mbpp"), file


def row(file: Path) -> str:
    """A line of the table of recipes."""
    model, task, algorithm = cell(file)
    target = re.match(r"(.+?) %(?: at ([\d /]+) canvas tokens)? \((.+?)\)", labelled(file, "Target"))
    values, lengths, source = target.groups() if target else ("none", None, None)
    metric = labelled(file, "Metric").replace(",", " ").split()[0]
    columns = [
        f"[{algorithm}](algorithms/{algorithm}.md)",
        task,
        CHECKPOINTS[model].split("/")[1],
        values,
        f"{metric}, {lengths}" if lengths else metric,
        (source or "").removesuffix(", length not stated"),
        f"[{model}/{file.stem}](../recipes/{model}/{file.name})",
    ]
    return f"| {' | '.join(columns)} |"


def test_the_table_of_recipes_is_that_of_the_headers():
    page = (ROOT / "docs" / "full-size.md").read_text(encoding="utf-8").splitlines()
    order = {name: place for place, name in enumerate(TASKS)}
    files = sorted(FULL_SIZE, key=lambda file: (order[cell(file)[1]], cell(file)[0] != "llada", file))
    assert [line for line in page if line.startswith("| [")] == [row(file) for file in files]
