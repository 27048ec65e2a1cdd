"""Models by hub id, from the local cache alone."""

from __future__ import annotations

import shutil

import huggingface_hub.constants as hub
import pytest
import torch

import unmask
from tests.checkpoints import write_checkpoint
from unmask.build import train_recipe
from unmask.errors import ModelError
from unmask.places import is_hub_id


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An offline hub cache with one repository, as a download leaves it."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--tiny-llada"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = write_checkpoint("llada", repository / "snapshots" / ("0" * 40))
    (snapshot / "modeling_llada.py").write_text("raise SystemExit('remote code ran')\n")
    return snapshot


def test_a_hub_id_loads_from_the_cache_without_running_its_code(cache, tmp_path):
    policy = unmask.load("owner/tiny-llada")
    assert policy.name == "owner/tiny-llada"
    ids = torch.arange(12)[None]
    assert torch.equal(policy.module(ids).logits, unmask.load(cache).module(ids).logits)
    policy.save(tmp_path / "saved")
    assert '"owner/tiny-llada--modeling_llada.LLaDAModelLM"' in (tmp_path / "saved" / "config.json").read_text()
    unmask.load(cache).save(tmp_path / "local")  # a directory's own files are not copied, so nothing refers to them
    assert "auto_map" not in (tmp_path / "local" / "config.json").read_text()


def test_what_is_not_in_the_cache_is_refused_with_the_way_out(cache):
    with pytest.raises(ModelError, match="owner/other: no such directory, and not in the local hub cache") as caught:
        unmask.load("owner/other")
    assert "\n" not in str(caught.value) and "HF_HUB_OFFLINE" in str(caught.value)


def test_a_snapshot_without_weights_is_refused(cache):
    for file in cache.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        unmask.load("owner/tiny-llada")


def test_directories_win_over_hub_ids_and_recipes_keep_ids_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        is_hub_id("owner/tiny-llada") and not is_hub_id("a/b/c") and not is_hub_id("./model") and not is_hub_id("model")
    )
    tables = {"model": {"path": "owner/tiny-llada"}, "task": {"type": "sudoku"}, "algorithm": {"type": "espo"}}
    assert train_recipe(tables, tmp_path).model.path == "owner/tiny-llada"
    (tmp_path / "recipes" / "owner" / "tiny-llada").mkdir(parents=True)
    beside = train_recipe(tables, tmp_path / "recipes").model.path
    assert beside == str(tmp_path / "recipes" / "owner" / "tiny-llada")
    shutil.copytree(tmp_path / "recipes" / "owner", tmp_path / "owner")
    assert not is_hub_id("owner/tiny-llada")
