"""docs/adding-an-algorithm.md: the file it shows is wd1, and needs nothing but its line in the registry."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from tests.objective_inputs import inputs
from unmask.build import train_recipe
from unmask.objectives import ALGORITHMS, WD1

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adding-an-algorithm.md"


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """The class of the page."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "shown_algorithm.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("shown_algorithm").WD1


def test_the_algorithm_of_the_page_is_the_registered_one(shown):
    found = []
    for algorithm in (shown(), WD1()):
        x = inputs(algorithm)
        loss = algorithm.loss(x).loss
        found.append((x.logps, loss, torch.autograd.grad(loss, x.logps)[0]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert found[0][2].abs().max() > 0


def test_a_line_in_the_registry_makes_it_a_recipes_choice(shown, monkeypatch, tmp_path):
    monkeypatch.setitem(ALGORITHMS, "shown", shown)
    tables = {
        "model": {"path": str(tmp_path)},
        "task": {"type": "sudoku"},
        "algorithm": {"type": "shown", "psi": 0.5},
    }
    assert train_recipe(tables, tmp_path).algorithm.value == shown(psi=0.5)
