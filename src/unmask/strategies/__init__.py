"""Rollout strategies: how a training batch comes about. One entry per kind; its fields are keys of [rollout].

"pairs" are read from a file, and its fields are those of [data].
"""

from __future__ import annotations

from unmask.rollout import RolloutConfig
from unmask.strategies.pairs import OfflineConfig
from unmask.strategies.steps import StepsConfig
from unmask.strategies.trees import TreeConfig

STRATEGIES: dict[str, type[RolloutConfig | OfflineConfig]] = {
    "groups": RolloutConfig,
    "tree": TreeConfig,
    "steps": StepsConfig,
    "pairs": OfflineConfig,
}

ONLINE: dict[str, type[RolloutConfig]] = {"groups": RolloutConfig, "tree": TreeConfig, "steps": StepsConfig}
"""Those that the policy writes itself: values of rollout.type."""
