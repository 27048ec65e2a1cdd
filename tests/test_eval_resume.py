"""An evaluation that is killed goes on where it was, and several processes write what one writes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.test_distributed import DDP, ROOT
from tests.test_eval_samples import SIZES
from unmask import evaluation
from unmask.cli import main
from unmask.errors import ConfigError
from unmask.kept import Kept
from unmask.models.tiny import TinyModelConfig, build_tiny

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
NUM_EXAMPLES, NUM_SAMPLES, BATCH_SIZE = 10, 2, 3
OPTIONS = [
    "--limit",
    str(NUM_EXAMPLES),
    "--num-samples",
    str(NUM_SAMPLES),
    "--temperature",
    "1",
    "--gen-length",
    "16,17",
]
OPTIONS += ["--batch-size", str(BATCH_SIZE), "--task", "sudoku", "reward=cells"]
PARTIAL = "completions.jsonl.partial"


def save_models(folder):
    for seed in (0, 1):
        model = build_tiny(TinyModelConfig(**SIZES, init_std=0.3, alphabet="0123456789|"), seed=seed)
        model.save(folder / f"model{seed}")


def command(folder, *options):
    files = ["--completions", str(folder / "completions.jsonl"), "--output", str(folder / "rows.json")]
    models = [str(folder / "model0"), "--baseline", str(folder / "model1")]
    return ["eval", *models, *OPTIONS, *files, *options]


def written(folder):
    """Rows without wall times and the place of the models, and the bytes of the completions."""
    rows = json.loads((folder / "rows.json").read_text())
    for row in rows:
        assert row.pop("seconds") > 0 and row.pop("tokens_per_second") > 0
        row["model"], row["baseline"] = (row[key].rsplit("/", 1)[-1] for key in ("model", "baseline"))
    return rows, (folder / "completions.jsonl").read_bytes()


def lines_of(file):
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder in which an evaluation was killed among the batches of the first length."""
    folder = tmp_path_factory.mktemp("killed")
    save_models(folder)
    child = [sys.executable, "-m", "unmask", *command(folder), "--quiet"]
    process = subprocess.Popen(child, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while lines_of(folder / PARTIAL) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 5 <= lines_of(folder / PARTIAL) < 2 + 2 * 2 * (NUM_EXAMPLES * NUM_SAMPLES // BATCH_SIZE)
    assert not (folder / "completions.jsonl").exists() and not (folder / "rows.json").exists()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an evaluation without a stop writes."""
    folder = tmp_path_factory.mktemp("whole")
    save_models(folder)
    assert main([*command(folder), "--quiet"]) == 0
    return written(folder)


def test_a_killed_evaluation_goes_on_and_writes_what_it_would_have_written(
    killed, whole, tmp_path, capsys, monkeypatch
):
    folder = in_place(killed, tmp_path)
    kept = [json.loads(line) for line in (folder / PARTIAL).read_text().splitlines()]
    headings = sum("settings" in row for row in kept)
    done = sum(len(row["content"]["answers"]) for row in kept if row["name"] == "model 0" and "number" in row)
    with open(folder / PARTIAL, "a") as file:
        file.write('{"name": "model 0", "number": 9, "con')  # a line that a kill cut off
    batches = []
    draw = evaluation.draw_samples
    monkeypatch.setattr(evaluation, "draw_samples", lambda *args, **rest: batches.append(1) or draw(*args, **rest))
    assert main(command(folder)) == 0
    assert len(batches) == 2 * 2 * -(-NUM_EXAMPLES * NUM_SAMPLES // BATCH_SIZE) - len(kept) + headings
    assert f"evaluating, 16 tokens: 20 steps, {done} done before" in capsys.readouterr().out
    rows, completions = written(folder)
    assert rows == whole[0] and completions == whole[1]
    assert completions.count(b"\n") == 2 * NUM_SAMPLES * NUM_EXAMPLES
    assert sorted(file.name for file in folder.iterdir()) == ["completions.jsonl", "model0", "model1", "rows.json"]


def in_place(killed, tmp_path):
    """A copy of the killed evaluation, which says that it was made where it stands."""
    folder = tmp_path / "copy"
    shutil.copytree(killed, folder)
    (folder / PARTIAL).write_text((folder / PARTIAL).read_text().replace(str(killed), str(folder)))
    return folder


@pytest.mark.parametrize(("options", "message"), [
    (["--temperature", "0.5"], "with the command's sampler 1 temperature = 1.0, and this one has 0.5"),
    (["reward=solved"], 'the command\'s task reward = "cells", and this one has "solved"'),
    (["--limit", "9"], "the command's limit = 10, and this one has 9"),
    (["--baseline", "elsewhere"], "the command's baseline ="),
    (["--gen-length", "16"], "the command's lengths = [16, 17], and this one has [16]"),
    (["retrained"], "with model weights ="),
])  # fmt: skip
def test_what_was_made_with_anything_else_is_refused(killed, tmp_path, capsys, options, message):
    folder = in_place(killed, tmp_path)
    before = (folder / PARTIAL).read_bytes()
    if options == ["retrained"]:
        shutil.copytree(folder / "model1", folder / "model0", dirs_exist_ok=True)
        options = []
    assert main([*command(folder, *options), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error and "remove that file to start over" in error and error.count("\n") == 1
    assert (folder / PARTIAL).read_bytes() == before


def test_a_damaged_file_or_one_in_use_is_refused(killed, tmp_path, capsys):
    folder = in_place(killed, tmp_path)
    with open(folder / PARTIAL, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main([*command(folder), "--quiet"]) == 2
    assert f"{PARTIAL}: another evaluation writes it" in capsys.readouterr().err
    with open(folder / PARTIAL, "a") as file:
        file.write("\0\0\0\n")
    for _ in range(2):  # a refusal holds no lock
        assert main([*command(folder), "--quiet"]) == 2
        assert "is no finished part of an evaluation" in capsys.readouterr().err
    kept = Kept(tmp_path / "new.partial")
    (tmp_path / "new.partial").write_text("another's\n")  # begun in the meantime
    with pytest.raises(ConfigError, match="another evaluation writes it"):
        kept.add("model 0", {0: {}})
    assert (tmp_path / "new.partial").read_text() == "another's\n"


def test_two_processes_go_on_where_one_was_killed_and_write_the_same(killed, whole, tmp_path):
    folder = in_place(killed, tmp_path)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *DDP, "--num_processes", "2"]
    child = [*launcher, "--main_process_port", "0", "-m", "unmask", *command(folder)]
    result = subprocess.run(child, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert written(folder) == whole
    assert result.stdout.count("rows written to") == 1  # one process speaks
