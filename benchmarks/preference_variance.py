"""Noise of the preference score and of its gradient, by how the masks are drawn: VRPO against plain DPO on an ELBO.

    unmask train recipes/sudoku-espo.toml --output runs/espo
    unmask data pairs runs/espo --output pairs.jsonl
    python benchmarks/preference_variance.py runs/espo/model BASE pairs.jsonl

The model after training is compared with the one before it (BASE: a model directory) on the first pairs of the file.
Every row draws masks anew, many times, and holds pairs and weights fixed. The score is (B - B^ref) of the chosen answer
less that of the rejected one, nats; its deviation is over draws, averaged over pairs as a root mean square. The
gradient is that of the mean loss of all pairs with respect to all weights; its noise is

    E |g - E g|² / |E g|²,     |E g|² from the mean over draws, less what the noise adds to it
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from unmask.models import MaskedPolicy, load
from unmask.noise import Noise
from unmask.objectives.preference import VRPO
from unmask.preferences import read_preferences
from unmask.scoring import score, score_copies
from unmask.strategies.pairs import PairSource
from unmask.types import LossInputs, Rollouts

PLAIN = VRPO(sft_coef=0.0, num_masks=1, stratify=False, share_masks=False)
VARIANTS = {
    "1 mask, the reference's own (`dpo_elbo`)": PLAIN,
    "8 masks, the reference's own": replace(PLAIN, num_masks=8),
    "1 mask, shared": replace(PLAIN, share_masks=True),
    "8 masks, shared": replace(PLAIN, num_masks=8, share_masks=True),
    "8 masks, shared, levels spread (`vrpo`)": VRPO(sft_coef=0.0),
}


@dataclass(frozen=True)
class Moments:
    """What many draws came to."""

    score_deviation: float  # nats
    gradient_noise: float


def measure(
    algorithm: VRPO, policy: MaskedPolicy, reference: MaskedPolicy, rollouts: Rollouts, num_draws: int
) -> Moments:
    """Moments of score and gradient over `num_draws` draws."""
    weights = [p for p in policy.module.parameters() if p.requires_grad]
    scores: list[Tensor] = []
    total, squares = [torch.zeros_like(p, dtype=torch.float64) for p in weights], 0.0
    for number in range(num_draws):
        noise = Noise(number)
        corruption = algorithm.draw(rollouts, noise=noise.stream("masks"))
        ref = corruption if algorithm.share_masks else algorithm.draw(rollouts, noise=noise.stream("ref"))
        copies = torch.arange(len(rollouts) * algorithm.num_masks)
        logps = score_copies(policy, rollouts, corruption, copies).logps.view(corruption.scored.shape)
        ref_logps = score(reference, rollouts, ref, micro_batch_size=512).logps
        x = LossInputs(
            logps=logps,
            corruption=corruption,
            advantages=rollouts.rewards,
            rewards=rollouts.rewards,
            groups=rollouts.groups,
            length=rollouts.length,
            ref_logps=ref_logps,
            ref_corruption=ref,
        )
        gradient = torch.autograd.grad(algorithm.loss(x).loss, weights)
        for sum_, part in zip(total, gradient, strict=True):
            sum_ += part
        squares += float(sum(part.double().square().sum() for part in gradient))
        ratio = (corruption.weight * logps.detach()).sum((1, 2)) - (ref.weight * ref_logps).sum((1, 2))
        scores.append(ratio[0::2] - ratio[1::2])
    mean_square = squares / num_draws
    square_of_mean = float(sum((part / num_draws).square().sum() for part in total))
    variance = (mean_square - square_of_mean) * num_draws / (num_draws - 1)
    deviation = float(torch.stack(scores).var(0).mean().sqrt())
    return Moments(deviation, variance / (square_of_mean - variance / num_draws))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--gen-length", type=int, default=16, help="canvas tokens of an answer")
    parser.add_argument("--num-pairs", type=int, default=32)
    parser.add_argument("--num-draws", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy, reference = load(args.model), load(args.base)
    pairs = read_preferences(str(args.pairs), "train")[: args.num_pairs]
    source = PairSource(pairs, args.gen_length, len(pairs), Noise(0))
    rollouts = source.collect(policy, 0, slice(0, source.batch_rows))
    print("| masks | deviation of the score, nats | gradient noise | of `vrpo` |")
    print("|---|---:|---:|---:|")
    found = {name: measure(a, policy, reference, rollouts, args.num_draws) for name, a in VARIANTS.items()}
    least = list(found.values())[-1].gradient_noise
    for name, m in found.items():
        print(f"| {name} | {m.score_deviation:.2f} | {m.gradient_noise:.2f} | {m.gradient_noise / least:.1f}x |")


if __name__ == "__main__":
    main()
