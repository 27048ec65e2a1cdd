"""Curves and tables from run directories."""

from __future__ import annotations

import json

import pytest

from unmask.cli import main
from unmask.runs import write_atomic


@pytest.fixture
def run_directory(tmp_path):
    run = tmp_path / "mine"
    run.mkdir()
    rows = [{"step": i, "iteration": i // 2, "reward": 0.1 * i, "elbo_per_token": -0.3, "kl": 0.0} for i in range(4)]
    write_atomic(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    evaluations = [{"step": i, "accuracy": 0.2 * i, "ci95": [0.1 * i, 0.3 * i]} for i in (2, 4)]
    write_atomic(run / "evaluations.jsonl", "".join(json.dumps(row) + "\n" for row in evaluations))
    return run


def test_a_figure_is_drawn(run_directory, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(run_directory), "--figure", str(tmp_path / "c.png")]) == 0
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert "not finished; 2 batches" in capsys.readouterr().out


@pytest.mark.parametrize("figure", ["c.xyz", "c.jpeg.zip", "c"])
def test_an_unknown_image_format_is_refused_and_leaves_nothing(run_directory, tmp_path, figure, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(run_directory), "--figure", str(tmp_path / figure)]) == 2
    assert "Use an ending such as .png" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_directory_that_is_no_run_and_a_damaged_log_are_refused(run_directory, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    (run_directory / "metrics.jsonl").write_text("{half a row")
    assert main(["report", str(run_directory)]) == 2
    assert "damaged" in capsys.readouterr().err
