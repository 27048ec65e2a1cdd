"""Objectives, one file for each algorithm, and the registry of those trained with rewards.

`SFT` learns from a dataset instead of rewards and is reached by its own command, so it is not listed.
"""

from unmask.objectives.coupled_grpo import CoupledGRPO
from unmask.objectives.d_treerpo import DTreeRPO
from unmask.objectives.dga import DGA
from unmask.objectives.diffu_grpo import DiffuGRPO
from unmask.objectives.dmpo import DmpoWDCE, DmpoWDDO
from unmask.objectives.embr import EmbrC, EmbrE
from unmask.objectives.embr_u import EmbrU
from unmask.objectives.espo import ESPO
from unmask.objectives.gdpo import GDPO
from unmask.objectives.preference import VRPO, DPOElbo
from unmask.objectives.sapo import SAPO
from unmask.objectives.sft import SFT
from unmask.objectives.spg import SPG
from unmask.objectives.unigrpo import UniGRPO
from unmask.objectives.wd1 import WD1

ALGORITHMS: dict[str, type] = {
    "coupled_grpo": CoupledGRPO,
    "d_treerpo": DTreeRPO,
    "dga": DGA,
    "diffu_grpo": DiffuGRPO,
    "dmpo_wdce": DmpoWDCE,
    "dmpo_wddo": DmpoWDDO,
    "dpo_elbo": DPOElbo,
    "embr_c": EmbrC,
    "embr_e": EmbrE,
    "embr_u": EmbrU,
    "espo": ESPO,
    "gdpo": GDPO,
    "sapo": SAPO,
    "spg": SPG,
    "unigrpo": UniGRPO,
    "vrpo": VRPO,
    "wd1": WD1,
}

__all__ = [
    "ALGORITHMS",
    "DGA",
    "ESPO",
    "GDPO",
    "SAPO",
    "SFT",
    "SPG",
    "VRPO",
    "WD1",
    "CoupledGRPO",
    "DPOElbo",
    "DTreeRPO",
    "DiffuGRPO",
    "DmpoWDCE",
    "DmpoWDDO",
    "EmbrC",
    "EmbrE",
    "EmbrU",
    "UniGRPO",
]
