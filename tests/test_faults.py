"""A broken update stops the run with a place and a file, and the file can be replayed."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers import FixedSource, fake_rollouts, make_trainer, tiny_policy
from tests.test_resume import model, train_tables  # noqa: F401  (a fixture)
from unmask.build import train_recipe
from unmask.cli import main
from unmask.errors import TrainingError
from unmask.launch import run_recipe
from unmask.objectives.dga import DGA
from unmask.objectives.espo import ESPO
from unmask.run_log import SilentView
from unmask.types import LossOutput


@pytest.fixture(params=["espo", "dga"])  # dga: with a KL that needs the reference, and a value model
def fault(request, model, tmp_path, monkeypatch):  # noqa: F811
    """The file left by a run whose third update has no finite loss."""
    algorithm = {"espo": ESPO, "dga": DGA}[request.param]
    whole, calls = algorithm.loss, iter(range(10_000))

    def broken(self, x):
        out = whole(self, x)
        # two evaluations an update: one slice and the one for the log
        return LossOutput(out.loss * math.nan, out.metrics) if next(calls) >= 4 else out

    monkeypatch.setattr(algorithm, "loss", broken)
    recipe = train_recipe(train_tables(model, request.param), tmp_path)
    with pytest.raises(TrainingError, match=r"loss is nan at step 3 \(batch 1\)\. Nothing was updated\."):
        run_recipe(recipe, tmp_path / "run", SilentView())
    monkeypatch.undo()
    return tmp_path / "run" / "fault-000003.safetensors"


def test_the_batch_of_a_broken_update_is_saved_and_replayed(fault, capsys):
    assert fault.exists()
    assert len((fault.parent / "metrics.jsonl").read_text().splitlines()) == 2
    assert main(["replay", str(fault)]) == 0
    out = capsys.readouterr().out
    assert "loss is nan at step 3" in out and out.count("prompt ") == 8
    loss = float(out.split("loss now: ")[1].split()[0])
    assert math.isfinite(loss)  # the fault was in the objective, which is mended now
    assert main(["replay", str(fault), "--float64"]) == 0
    assert float(capsys.readouterr().out.split("loss now: ")[1].split()[0]) == pytest.approx(loss, abs=1e-5)


def test_a_file_that_is_no_fault_is_refused(fault, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    for file in (tmp_path / "x.safetensors", tmp_path / "absent", fault.parent / "config.toml"):
        assert main(["replay", str(file)]) == 2
        assert "is not a fault file" in capsys.readouterr().err


def test_non_finite_log_probabilities_are_named_by_prompt_and_position():
    policy = tiny_policy()
    trainer = make_trainer(policy, ESPO(num_iterations=1, kl_coef=0.0), FixedSource(fake_rollouts()))
    batch = trainer.prepare(0)
    logps = torch.zeros_like(batch.draws[0].corruption.weight)
    row, copy, position = batch.draws[0].corruption.scored.nonzero()[20].tolist()
    logps[row, copy, position] = -math.inf
    prompt = int(batch.rollouts.prompt_key[row])
    with pytest.raises(TrainingError, match=f"1 of 12 rollouts .* first at prompt {prompt}, position {position}"):
        trainer.check_finite(batch, 0, logps, 0.0, 1.0)
    logps[row, copy, position] = 0.0
    trainer.check_finite(batch, 0, logps, 0.0, 1.0)
