"""Objectives, one file for each algorithm, and the registry of those trained with rewards.

`SFT` learns from a dataset instead of rewards and is reached by its own command, so it is not listed.
"""

from unmask.objectives.coupled_grpo import CoupledGRPO
from unmask.objectives.diffu_grpo import DiffuGRPO
from unmask.objectives.espo import ESPO
from unmask.objectives.gdpo import GDPO
from unmask.objectives.sft import SFT
from unmask.objectives.spg import SPG
from unmask.objectives.unigrpo import UniGRPO
from unmask.objectives.wd1 import WD1

ALGORITHMS: dict[str, type] = {
    "coupled_grpo": CoupledGRPO,
    "diffu_grpo": DiffuGRPO,
    "espo": ESPO,
    "gdpo": GDPO,
    "spg": SPG,
    "unigrpo": UniGRPO,
    "wd1": WD1,
}

__all__ = ["ALGORITHMS", "ESPO", "GDPO", "SFT", "SPG", "WD1", "CoupledGRPO", "DiffuGRPO", "UniGRPO"]
