"""`unmask data check`: every kind of row, lengths and repetitions by hand, and what a run would refuse."""

from __future__ import annotations

import json

import pytest

from unmask.cli import main
from unmask.data_check import Lengths, check_rows, kind_of, repeated
from unmask.errors import DataError
from unmask.models.tiny import TinyModelConfig, build_tiny

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "max_length": 24}


def rows_of(*rows):
    return [(f"file line {n}", row) for n, row in enumerate(rows, start=1)]


def test_prompts_are_counted_and_bad_rows_named():
    report = check_rows(
        rows_of({"prompt": "ab", "k": 1}, {"prompt": "abcd", "k": "x"}, {"prompt": "ab", "k": 1}, {"k": 2}, 5)
    )
    assert (report.kind, report.num_rows) == ("prompts", 5)
    assert report.columns == {"prompt": "str, in 75 % of the rows", "k": "int or str"}
    assert report.lengths == [Lengths("prompt", "characters", (2, 2, 4, 4))]
    assert (report.num_repeated_rows, report.num_repeated_prompts, report.rendered) == (1, 1, "ab")
    assert [problem.split(":")[0] for problem in report.problems] == ["file line 4", "file line 5"]


def test_kinds_of_rows():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]
    kinds = {
        "preference pairs": {"prompt": "p", "chosen": "good", "rejected": "bad"},
        "prompts with completions": {"messages": turns},
        "prompts": {"prompt": turns[:1]},
    }
    for kind, row in kinds.items():
        assert kind_of(row)[0] == kind
        report = check_rows(rows_of(row))
        assert not report.problems and report.rendered in ("p", "user: q")
    names = [of.name for of in check_rows(rows_of(kinds["preference pairs"])).lengths]
    assert names == ["prompt", "chosen", "rejected"]
    mixed = check_rows(
        rows_of({"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": 5}, {"prompt": "p", "completion": ""})
    )
    assert len(mixed.problems) == 2
    equal = check_rows(rows_of({"prompt": "p", "chosen": "a", "rejected": "a"}))
    assert "file line 1" in equal.problems[0] and not equal.lengths
    with pytest.raises(DataError, match="no rows"):
        check_rows([])


def test_numbers_by_hand():
    assert Lengths.of("x", "tokens", list(range(1, 101)), 90).numbers == (1, 50, 95, 100)
    assert Lengths.of("x", "tokens", list(range(1, 101)), 90).too_long == 10
    assert repeated("aabbbc") == 3


def test_the_command_with_and_without_a_model(tmp_path, capsys, data_dir):
    build_tiny(TinyModelConfig(**SIZES, alphabet="0123456789|"), seed=0).save(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("12|", "1|", "123456789012|")))
    assert main(["data", "check", str(file)]) == 0
    assert "every row can be used" in capsys.readouterr().out
    assert main(["data", "check", str(file), "--model", str(tmp_path / "model"), "--gen-length", "16"]) == 2
    out = capsys.readouterr().out
    assert (
        "prompt     2 to 13 tokens, median 3, 95 % up to 13; 1 do not fit" in out
        and "1 rows or texts would be refused" in out
    )
    assert main(["data", "check", str(file), "--gen-length", "16"]) == 2
    assert "Name a model with --model" in capsys.readouterr().err
    assert main(["data", "check", str(data_dir / "preference" / "dpo_en_demo.json")]) == 0
    out = capsys.readouterr().out
    assert "rows       300 of preference pairs" in out and "repeated   5 rows" in out
