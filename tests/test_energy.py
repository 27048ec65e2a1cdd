"""What a run's energy has learned: statistics by hand, and the command on a real run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.helpers import DigitSum, tiny_policy
from tests.test_resume import train_tables
from unmask.build import train_recipe
from unmask.cli import main
from unmask.energy import NUM_BINS, Scored, pearson, summarise
from unmask.launch import run_recipe
from unmask.run_log import SilentView
from unmask.tasks import TASKS


def scored() -> Scored:
    """Eight completions of two prompts; the lower the energy, the better, up to a number for each prompt."""
    return Scored(
        energies=torch.tensor([-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64),
        rewards=torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64),
        is_correct=torch.tensor([True, True, False, False, True, False, False, False]),
        prompt_id=torch.tensor([1, 1, 1, 1, 2, 2, 2, 2]),
    )


def test_statistics_by_hand():
    found = summarise(scored())
    assert [row["accuracy"] for row in found["quartiles"]] == [1.0, 0.0, 0.5, 0.0]
    assert [row["mean_energy"] for row in found["quartiles"]] == [-3.5, -1.5, 0.5, 2.5]
    assert found["energy_correct"] == pytest.approx(-7 / 3) and found["energy_wrong"] == pytest.approx(0.6)
    # Σ (e - ē)(r - r̄) = -5.5 with ē = -0.5, r̄ = 3/8; Σ (e - ē)² = 42, Σ (r - r̄)² = 15/8
    assert found["pearson_reward"] == pytest.approx(-5.5 / (42 * 15 / 8) ** 0.5, abs=1e-12)
    assert found["pearson_correct"] == found["pearson_reward"]
    # within prompts: Σ = -2 - 1.5, Σ (e - ē)² = 5 + 5, Σ (r - r̄)² = 1 + 3/4
    assert found["pearson_reward_within_prompts"] == pytest.approx(-3.5 / (10 * 1.75) ** 0.5, abs=1e-12)
    histogram = found["histogram"]
    assert sum(histogram["correct"]) == 3 and sum(histogram["wrong"]) == 5 and len(histogram["edges"]) == NUM_BINS + 1
    assert histogram["correct"][0] == 1 and histogram["wrong"][-1] == 1  # both ends are inside


def test_what_does_not_vary_has_no_correlation():
    assert pearson(torch.ones(4), torch.arange(4.0)) is None
    one = Scored(torch.zeros(1).double(), torch.ones(1).double(), torch.tensor([True]), torch.tensor([3]))
    found = summarise(one)
    assert found["pearson_reward"] is None and found["energy_wrong"] is None
    assert [row["rollouts"] for row in found["quartiles"]] == [1, 0, 0, 0] and found["quartiles"][1]["accuracy"] is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny_policy(dtype=torch.float32).save(folder / "base")
    TASKS["digit_sum"] = DigitSum
    try:
        for name, lora in (("copy", {}), ("adapter", {"lora": {"rank": 4, "alpha": 8.0}})):
            tables = train_tables(folder / "base", "dga", eval_every=0, save_every=0)
            tables["model"] |= lora
            tables["task"], tables["evaluation"] = {"type": "digit_sum"}, {"num_examples": 4}
            tables["rollout"] |= {"group_size": 8}
            tables["algorithm"] |= {"energy_lr": 1e-2, "energy_trunk_lr": 1e-3, "energy_updates": 8, "alpha": 0.5}
            run_recipe(train_recipe(tables, folder), folder / name, SilentView())
        yield folder
    finally:
        del TASKS["digit_sum"]


@pytest.mark.parametrize("name", ["copy", "adapter"])
def test_the_command_reads_the_log_of_a_run(runs, name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = {"--output": tmp_path / "energy.json", "--figure": tmp_path / "energy.png"}
    options = [str(part) for pair in files.items() for part in pair]
    assert main(["energy", str(runs / name), "--num-rollouts", "32", *options]) == 0
    assert "lowest quarter" in capsys.readouterr().out
    found = json.loads(files["--output"].read_text())
    rows = [json.loads(line) for line in (runs / name / "rollouts.jsonl").read_text().splitlines()][-32:]
    assert found["rewards"] == [row["reward"] for row in rows] and found["num_rollouts"] == 32
    assert len(set(found["energies"])) > 16
    assert found["pearson_reward_within_prompts"] < 0  # learned from these rewards: lower is better
    assert files["--figure"].read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["copy", "adapter"])
def test_the_command_samples_new_completions(runs, name, tmp_path):
    found = []
    for number in range(2):
        output = tmp_path / f"{number}.json"
        command = ["energy", str(runs / name), "--split", "validation", "--num-rollouts", "24"]
        assert main([*command, "--output", str(output)]) == 0
        found.append(json.loads(output.read_text()))
    assert len(found[0]["energies"]) == 24 and len(set(found[0]["prompt_id"])) == 20
    assert found[0] == found[1]  # keyed noise


def test_what_has_no_energy_is_refused_in_one_line(runs, tmp_path, capsys):
    cases = {"empty": "no config.toml there", "unfinished": "Finish the run", "other": "is a run of 'espo' that learns"}
    (tmp_path / "empty").mkdir()
    shutil.copytree(runs / "copy", tmp_path / "unfinished")
    shutil.rmtree(tmp_path / "unfinished" / "energy")
    (tmp_path / "other").mkdir()
    text = (runs / "copy" / "config.toml").read_text()
    start = text.index("[algorithm]")
    rest = text[text.index("\n[", start + 1) :]
    (tmp_path / "other" / "config.toml").write_text(text[:start] + '[algorithm]\ntype = "espo"\n' + rest)
    for name, message in cases.items():
        assert main(["energy", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["energy", str(runs / "copy"), "--num-rollouts", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert main(["energy", str(tmp_path / "nothing"), "--figure", str(tmp_path / "energy.docx")]) == 2
    assert "energy.docx: no image format ends like this" in capsys.readouterr().err  # before the run is opened
    (runs / "copy" / "energy" / "energy.json").write_text("{}")
    assert main(["energy", str(runs / "copy")]) == 2
    assert "energy.json: says {}" in capsys.readouterr().err
