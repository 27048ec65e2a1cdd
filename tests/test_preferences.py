"""Preference files: read in every published form, refused row by row, and learned from by the loop that rolls out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_policy
from unmask.build import DataConfig, sft_recipe, train_recipe
from unmask.cli import main
from unmask.config import dump_toml
from unmask.errors import ConfigError, DataError
from unmask.launch import open_source, run_recipe
from unmask.models import TinyModelConfig
from unmask.noise import Noise
from unmask.objectives import ALGORITHMS
from unmask.objectives.wd1 import WD1
from unmask.places import data_directory
from unmask.plan import plan_run, plan_text
from unmask.preferences import read_preferences
from unmask.run_log import SilentView
from unmask.strategies.pairs import PairSource

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "1"), ("assistant", "2"), ("assistant", "3")))
ROW = {"prompt": "1", "chosen": "2", "rejected": "3"}
FORMS = {
    "text": ROW,
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "prompt repeated": {"prompt": "1", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "conversations": {
        "conversations": [{"from": "human", "value": "1"}],
        "chosen": {"from": "gpt", "value": "2"},
        "rejected": {"from": "gpt", "value": "3"},
    },
}


def write(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form, tmp_path):
    (pair,) = read_preferences(write(tmp_path / "p.jsonl", FORMS[form]))
    assert (pair.chosen, pair.rejected) == ("2", "3")
    assert pair.example.prompt == ("1" if form == "text" else [USER])
    assert (pair.chosen_score, pair.rejected_score) == (1.0, 0.0)


def test_arrays_scores_and_blank_lines(tmp_path):
    scored = [ROW | {"chosen_score": 0.75, "rejected_score": -1}, ROW | {"score_chosen": 2, "score_rejected": 2}]
    (tmp_path / "p.json").write_text(json.dumps([*scored, ROW | {"chosen_score": None, "other": 1}]))
    pairs = read_preferences(str(tmp_path / "p.json"))
    assert [(p.chosen_score, p.rejected_score) for p in pairs] == [(0.75, -1.0), (2.0, 2.0), (1.0, 0.0)]
    assert [p.where.rpartition(" ")[2] for p in pairs] == ["1", "2", "3"]
    (tmp_path / "p.jsonl").write_text("\n" + json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n")
    assert [p.where.rpartition(" ")[2] for p in read_preferences(str(tmp_path / "p.jsonl"))] == ["2", "4"]


BAD_ROWS = [
    ("{", "line 2: is not JSON"),
    ("[]", "line 2: is not a JSON object"),
    ({"prompt": "1", "chosen": "2"}, "line 2: no 'rejected'"),
    (ROW | {"rejected": None}, "line 2: no 'rejected'"),
    ({"chosen": "2", "rejected": "3"}, "line 2: no 'prompt'"),
    (ROW | {"rejected": "2"}, "line 2: chosen equals rejected"),
    (ROW | {"chosen": " "}, "line 2: chosen is empty"),
    (ROW | {"prompt": ""}, "line 2: prompt is empty"),
    (ROW | {"prompt": [GOOD]}, "line 2: the prompt ends with a turn of 'assistant'"),
    (ROW | {"chosen": [USER]}, "line 2: chosen: ends with a turn of 'user'"),
    (ROW | {"chosen": 5}, "line 2: chosen: must be a string or a list of messages"),
    (ROW | {"chosen": []}, "line 2: chosen: must be a string or a list of messages"),
    (ROW | {"prompt": "9", "chosen": [USER, GOOD]}, "line 2: the turns before an answer are not the prompt"),
    ({"chosen": [USER, GOOD], "rejected": [GOOD, USER, BAD]}, "line 2: the turns before an answer"),
    (ROW | {"chosen_score": 1}, "line 2: chosen_score and rejected_score must both be finite numbers"),
    (ROW | {"chosen_score": True, "rejected_score": 0}, "must both be finite numbers"),
    (ROW | {"score_chosen": 1e999, "score_rejected": 0}, "must both be finite numbers"),
    (ROW | {"chosen_score": 0, "rejected_score": 1}, "chosen_score = 0 is below rejected_score = 1"),
    (FORMS["conversations"] | {"conversations": [{"from": "tool", "value": "1"}]}, "turns are not of one of"),
    (FORMS["conversations"] | {"conversations": [{"from": "human"}]}, "conversations: must be"),
    (FORMS["conversations"] | {"conversations": [{"from": ["human"], "value": "1"}]}, "turns are not of one of"),
    (ROW | {"chosen_score": 10**400, "rejected_score": 0}, "must both be finite numbers"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_rows_of_another_form_are_refused_with_their_line(row, message, tmp_path):
    text = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "p.jsonl").write_text(json.dumps(ROW) + "\n" + text + "\n")
    with pytest.raises(DataError, match=message) as error:
        read_preferences(str(tmp_path / "p.jsonl"))
    assert "\n" not in str(error.value) and "p.jsonl" in str(error.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    for name, content, message in (
        ("none.jsonl", None, "cannot be read"),
        ("latin.jsonl", b"\xe9", "is not UTF-8"),
        ("empty.jsonl", b"\n", "holds no rows"),
        ("array.json", b"[1", "is not JSON"),
        ("table.parquet", b"no parquet", "cannot be read by datasets"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        if name.endswith("parquet"):
            pytest.importorskip("datasets")
        with pytest.raises(DataError, match=message):
            read_preferences(str(tmp_path / name))


def test_tables_are_read_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_list([ROW | {"chosen_score": 0.5, "rejected_score": 0.25}] * 2)
    table.to_parquet(str(tmp_path / "p.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for source in ("p.parquet", "saved"):
        pairs = read_preferences(str(tmp_path / source))
        assert [(p.chosen, p.chosen_score) for p in pairs] == [("2", 0.5)] * 2
        assert pairs[1].where.endswith("row 2")


def test_the_published_preference_file_is_read():
    folder = data_directory()
    if folder is None:
        pytest.skip("UNMASK_DATA is not set")
    file = folder / "preference" / "dpo_en_demo.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    pairs = read_preferences(str(file))
    assert len(pairs) == 300
    roles = [[turn["role"] for turn in pair.example.prompt] for pair in pairs]
    assert sum(r[0] == "system" for r in roles) == 80
    assert all(r[-1] == "user" and len(set(r)) <= 3 for r in roles)
    assert all(pair.chosen != pair.rejected and pair.chosen_score == 1 for pair in pairs)


# ---- as batches

POLICY = tiny_policy()
POLICY_CONFIG = TinyModelConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)


def some_pairs(tmp_path, count: int = 5):
    rows = [
        {"prompt": f"{i}2|", "chosen": f"{i}34", "rejected": "5", "chosen_score": i + 1, "rejected_score": 0.5}
        for i in range(count)
    ]
    return write(tmp_path / "p.jsonl", *rows)


def test_rows_are_groups_of_two_the_chosen_first_with_scores_as_rewards(tmp_path):
    source = PairSource(read_preferences(some_pairs(tmp_path)), 4, 3, Noise(0))
    rollouts = source.collect(POLICY, 1, slice(0, 6))
    assert rollouts.groups.tolist() == [0, 0, 1, 1, 2, 2] and rollouts.sampled_at is None
    assert rollouts.completions[1::2] == ["5"] * 3 and rollouts.rewards[1::2].tolist() == [0.5] * 3
    for row in (0, 2, 4):
        place = int(rollouts.prompt_key[row]) - 1
        assert rollouts.completions[row] == f"{place}34" and float(rollouts.rewards[row]) == place + 1
        assert rollouts.prompts[row] == rollouts.prompts[row + 1] == f"{place}2|"
    assert rollouts.rollout_index.tolist() == list(range(6, 12))
    parts = [source.collect(POLICY, 1, slice(i, i + 2)) for i in (0, 2, 4)]
    assert torch.equal(torch.cat([part.completion_ids for part in parts]), rollouts.completion_ids)


def test_every_pair_comes_once_an_epoch_in_a_new_order(tmp_path):
    source = PairSource(read_preferences(some_pairs(tmp_path)), 4, 3, Noise(0))
    places = [place for i in range(10) for place in source.places(i)]
    epochs = [places[i : i + 5] for i in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(PairSource(source.pairs, 4, 13, Noise(0)).places(0)) == 13  # a batch of more than an epoch


class Learner(WD1):
    """An objective that learns from pairs and from groups."""

    strategies = ("groups", "pairs")


@pytest.fixture
def tables(tmp_path, monkeypatch) -> dict:
    monkeypatch.setitem(ALGORITHMS, "learner", Learner)
    tiny_policy(dtype=torch.float32).save(tmp_path / "model")
    return {
        "model": {"path": str(tmp_path / "model")},
        "algorithm": {"type": "learner", "num_iterations": 1},
        "data": {"file": some_pairs(tmp_path), "batch_size": 2, "gen_length": 4},
        "trainer": {"num_batches": 3, "save_every": 0, "monitor_rows": 2},
    }


ONLINE = {
    "task": {"type": "sudoku", "num_train": 16, "num_validation": 8, "num_test": 8},
    "sampler": {"type": "roar", "gen_length": 4},
    "rollout": {"prompts_per_batch": 2, "group_size": 3},
    "evaluation": {"num_examples": 8},
}


def test_offline_training_without_a_task(tables, tmp_path):
    recipe = train_recipe(tables, tmp_path)
    assert recipe.rollout is None and recipe.sampler is None and not recipe.is_supervised
    assert recipe.num_offline_batches == 3 and train_recipe(recipe.tree(), tmp_path) == recipe
    summary = run_recipe(recipe, tmp_path / "run", SilentView())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2] and all("kl" in row for row in rows)
    assert rows[0]["kl"] == 0.0  # there is a reference, and it is the start
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()
    assert summary["base"] == [] and summary["task"].endswith("p.jsonl")


def test_offline_then_online(tables, tmp_path):
    tables |= ONLINE | {"data": tables["data"] | {"num_batches": 2}}
    tables["rollout"] = ONLINE["rollout"] | {"buffer": {"num_batches": 2}}
    tables["trainer"] |= {"num_batches": 4}
    recipe = train_recipe(tables, tmp_path)
    assert recipe.num_offline_batches == 2 and train_recipe(recipe.tree(), tmp_path) == recipe
    summary = run_recipe(recipe, tmp_path / "run", SilentView())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["buffer/size" in row for row in rows] == [False, False, True, True]
    logged = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in logged] == [2] * 6 + [3] * 6
    assert len(summary["base"]) == 1


def test_shares_of_offline_batches_follow_those_of_the_online_ones(tables, tmp_path):
    tables |= ONLINE | {"data": tables["data"] | {"num_batches": 2}}
    source = open_source(train_recipe(tables, tmp_path))
    assert source.batch_rows == 6
    whole = source.collect(POLICY, 0, slice(0, 6))
    parts = [source.collect(POLICY, 0, rows) for rows in (slice(0, 3), slice(3, 6))]  # two processes
    assert len(whole) == 4 and [len(part) for part in parts] == [2, 2]
    assert torch.equal(torch.cat([part.completion_ids for part in parts]), whole.completion_ids)


def test_all_offline_ignores_how_one_would_roll_out(tables, tmp_path):
    recipe = train_recipe(tables | ONLINE, tmp_path)
    assert recipe.rollout is None and recipe.sampler is None and recipe.task
    del tables["data"]["gen_length"]
    assert train_recipe(tables | ONLINE, tmp_path).data.gen_length == 4  # that of [sampler]


def test_a_plan_of_an_offline_run(tables, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(dump_toml(tables))
    assert main(["train", str(tmp_path / "recipe.toml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "completions (pairs x 2, of p.jsonl)" in out and "completions  12" in out
    tables |= ONLINE | {"data": tables["data"] | {"num_batches": 2}}
    text = plan_text(plan_run(train_recipe(tables, tmp_path)))
    assert "1 of 6 completions (2 prompts x 3)" in text and "2 of 4 completions (pairs" in text
    assert main(["estimate", str(tmp_path / "recipe.toml"), "--gpu", "h100"]) == 0


def test_pairs_that_do_not_fit_are_named_before_anything_is_written(tables, tmp_path, capsys):
    rows = [ROW | {"prompt": "12|"}, ROW | {"rejected": "12345"}]
    tables["data"]["file"] = write(tmp_path / "long.jsonl", *rows)
    (tmp_path / "recipe.toml").write_text(dump_toml(tables))
    assert main(["train", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "run"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "long.jsonl line 2: a completion of 5 tokens exceeds gen_length = 4" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    tables["data"]["file"] = write(tmp_path / "unknown.jsonl", ROW | {"prompt": "letters"})
    with pytest.raises(DataError, match=r"unknown.jsonl line 1: a text has characters"):
        run_recipe(train_recipe(tables, tmp_path), tmp_path / "run", SilentView())


def test_messages_go_through_the_chat_template(tmp_path):
    policy = tiny_policy(config=POLICY_CONFIG)
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}|"
    pairs = read_preferences(write(tmp_path / "p.jsonl", FORMS["conversations"]))
    rollouts = PairSource(pairs, 4, 1, Noise(0)).collect(policy, 0, slice(0, 2))
    assert rollouts.prompts == ["1|", "1|"] and rollouts.completions == ["2", "3"]


REFUSED = [
    ({"algorithm": {"type": "espo"}}, "espo does not learn from preference pairs"),
    ({"data": {"file": "p.jsonl"}}, "data.gen_length is missing"),
    ({"data": {"batch_size": 2}}, "data.file is missing"),
    ({"data": {"file": "p.jsonl", "batch_size": 0}}, "data.batch_size = 0"),
    ({"data": {"file": "p.jsonl", "num_batches": 1}}, r"\[task\] is missing"),
    (ONLINE | {"data": {"file": "p.jsonl", "num_batches": 3}}, "leaves none of trainer.num_batches = 3"),
    ({"data": {"file": "p.jsonl"}, "sampler": {"gen_length": "x"}}, "sampler.gen_length = 'x'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_impossible_recipes_are_refused_while_building(changes, message, tables, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        train_recipe(tables | changes, tmp_path)
    assert "\n" not in str(error.value)


def test_an_algorithm_of_pairs_alone_is_not_rolled_out_for(tables, tmp_path, monkeypatch):
    class PairsOnly(Learner):
        strategies = ("pairs",)

    monkeypatch.setitem(ALGORITHMS, "learner", PairsOnly)
    del tables["data"]
    with pytest.raises(ConfigError, match="learns from preference pairs of a file alone"):
        train_recipe(tables | ONLINE, tmp_path)


def test_supervised_recipes_are_told_from_offline_ones(tables, tmp_path):
    tree = {"model": {"tiny": {}}, "data": {"file": "x.jsonl", "gen_length": 4}}
    recipe = sft_recipe(tree, tmp_path)
    assert recipe.is_supervised and isinstance(recipe.data, DataConfig)
    assert recipe.num_offline_batches == recipe.trainer.num_batches
    assert "type" not in recipe.tree()["algorithm"]
    assert train_recipe(tables, tmp_path).tree()["algorithm"]["type"] == "learner"
