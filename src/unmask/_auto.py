"""Makes other packages know what we have for them as soon as both are imported.

transformers' Auto classes learn of our model families. `unmask.models` registers them when it is imported, but it needs
transformers and torch, which take seconds. So it is imported at once only if the Auto classes are there already; else
right after they appear. In the same way lm-evaluation-harness learns where its model `unmask` is to be found.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_CONFIG = "transformers.models.auto.configuration_auto"
_MODEL = "transformers.models.auto.modeling_auto"
_HARNESS = "lm_eval.models"


class _LoaderThenRegister(importlib.abc.Loader):
    """Loads the module, then registers what is ours with it."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__name__ == _HARNESS:
            _register_with_harness()
        # the configuration module may be loading on behalf of the model module, whose turn then comes
        elif module.__name__ == _MODEL or _MODEL not in sys.modules:
            importlib.import_module("unmask.models")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that others register with, through the other finders."""

    def __init__(self) -> None:
        self.waiting = {_CONFIG, _MODEL, _HARNESS}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.waiting:
            return None
        self.waiting.remove(name)  # so that the search below passes us by
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenRegister(spec.loader)
        return spec


def _register_with_harness() -> None:
    """A name for the harness to import when the model is asked for. Releases without such a registry are left alone."""
    registry = getattr(importlib.import_module("lm_eval.api.registry"), "model_registry", None)
    if registry is not None and "unmask" not in registry:
        registry.register("unmask", target="unmask.harness:UnmaskLM")


def register_when_imported() -> None:
    """Register now with what is loaded, and with the rest when it will be."""
    if _HARNESS in sys.modules:
        _register_with_harness()
    if _CONFIG in sys.modules:
        importlib.import_module("unmask.models")
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
