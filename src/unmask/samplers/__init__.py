"""Samplers: how a masked canvas becomes text. One entry per sampler; fields of the class are its configuration."""

from __future__ import annotations

from unmask.samplers.block_diffusion import BlockDiffusion
from unmask.samplers.dream import Dream
from unmask.samplers.engine import OutsideEngine
from unmask.samplers.llada import LowConfidence, RandomRemasking
from unmask.samplers.roar import Roar
from unmask.samplers.wino import Wino

SAMPLERS: dict[str, type[Roar | LowConfidence | RandomRemasking | Dream | BlockDiffusion | Wino | OutsideEngine]] = {
    "roar": Roar,
    "low_confidence": LowConfidence,
    "random_remasking": RandomRemasking,
    "dream": Dream,
    "block_diffusion": BlockDiffusion,
    "wino": Wino,
    "engine": OutsideEngine,
}
