"""`unmask generate`: completions for a file of prompts, the same at any batch size."""

from __future__ import annotations

import json

import pytest

from unmask.cli import main
from unmask.models.tiny import TinyModelConfig, build_tiny

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "max_length": 24}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    build_tiny(TinyModelConfig(**SIZES, init_std=0.3, alphabet="0123456789|"), seed=0).save(folder / "model")
    return folder / "model"


def generate(model, tmp_path, rows, *options):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    status = main(
        ["generate", str(model), str(tmp_path / "prompts.jsonl"), "--output", str(output), "--quiet", *options]
    )
    return status, output


def test_rows_keep_their_columns_and_gain_completions(model, tmp_path, capsys):
    rows = [{"prompt": f"{n}|", "id": n} for n in range(5)]
    options = ["--gen-length", "8", "--temperature", "1", "--num-samples", "3"]
    found = {}
    for size in ("1", "4", "64"):
        status, output = generate(model, tmp_path, rows, *options, "--batch-size", size)
        assert status == 0
        found[size] = output.read_text()
    assert found["1"] == found["4"] == found["64"]
    lines = [json.loads(line) for line in found["1"].splitlines()]
    assert [(line["id"], line["sample"]) for line in lines] == [(n, s) for n in range(5) for s in range(3)]
    assert all(set(line["completion"]) <= set("0123456789|") and len(line["completion"]) <= 8 for line in lines)
    assert len({line["completion"] for line in lines}) > 5
    assert "15 completions of 5 prompts" in capsys.readouterr().out
    _, output = generate(model, tmp_path, rows[:1], "--gen-length", "8")
    assert "sample" not in json.loads(output.read_text())


@pytest.mark.parametrize(("rows", "options", "message"), [
    ([{"text": "1|"}], [], "line 1: has no prompt"), ([{"prompt": "1|"}, {"prompt": ""}], [], "line 2: has no prompt"),
    ([], [], "holds no rows"), ([{"prompt": "1|"}], ["--num-samples", "0"], "--num-samples 0: must be at least 1"),
    ([{"prompt": "1|"}], ["--gen-length", "99"], "exceeds the 24 positions"),
    ([{"prompt": "a|"}], [], "not in the model's vocabulary"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(model, tmp_path, capsys, rows, options, message):
    status, output = generate(model, tmp_path, rows, "--gen-length", "8", *options)
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1 and not output.exists()
