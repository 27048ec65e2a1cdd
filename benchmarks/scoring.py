"""ESPO's loss and gradient through the selected-position head against the same loss through full logits.

Half of every completion is masked: each rollout has coupled pairs of copies at level L/2, so that every position is
scored once in a pair. Both variants use the same weights, masks, old and reference log-probabilities and the same
objective; they differ in how policy log-probabilities are computed. Loss and gradients must agree, which is asserted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import full_size
import torch
from common import (
    Geometry,
    Seconds,
    Stopwatch,
    device_of,
    geometry_of,
    geometry_parser,
    machine,
    markdown_table,
    random_policy,
    random_text,
)
from torch import Tensor

from unmask.errors import ConfigError
from unmask.models import MaskedPolicy
from unmask.models.adapters import LoraConfig, wrap
from unmask.models.cross_entropy import CROSS_ENTROPIES, check_cross_entropy
from unmask.noise import Noise
from unmask.objectives.espo import ESPO
from unmask.scoring import score, score_copies
from unmask.types import Corruption, LossInputs, Rollouts

LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
"""Largest difference as a share of the largest entry of a tensor's gradient (of 1 for the loss). float32 carries 1e-7;
sums over thousands of rows in another order and several layers of backward leave a few 1e-6."""

Scorer = Callable[[MaskedPolicy, Rollouts, Corruption], Tensor]  # -> (B, K, L) nats, differentiable


@dataclass(frozen=True)
class Problem:
    """One update's worth of work."""

    policy: MaskedPolicy
    algorithm: ESPO
    inputs: LossInputs  # its `logps` are those of the old policy
    rollouts: Rollouts


def full_logits_scores(policy: MaskedPolicy, rollouts: Rollouts, corruption: Corruption) -> Tensor:
    """Logits and log_softmax of every position of every copy, then the text's tokens gathered from them."""
    canvas, text = masked_canvas(policy, rollouts, corruption)
    log_softmax = policy.module(canvas).logits.float().log_softmax(-1)  # (B·K, T, V)
    # The mask token is out of the support: p / (1 - p_mask). Setting its logit to -inf would cost one more copy.
    wanted = torch.stack([text, torch.full_like(text, policy.mask_token_id)], -1)  # (B·K, T, 2)
    token_logps, mask_logps = log_softmax.gather(-1, wanted).unbind(-1)
    token_logps = (token_logps - torch.log1p(-mask_logps.exp()))[:, -corruption.scored.shape[-1] :]
    return token_logps.reshape(corruption.scored.shape).masked_fill(~corruption.scored, 0.0)


def masked_canvas(policy: MaskedPolicy, rollouts: Rollouts, corruption: Corruption) -> tuple[Tensor, Tensor]:
    """The copies as the model sees them and the text behind them, (B·K, T) each."""
    text = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)[:, None].expand_as(corruption.masked)
    return text.masked_fill(corruption.masked, policy.mask_token_id).flatten(0, 1), text.flatten(0, 1)


def selected_scores(policy: MaskedPolicy, rollouts: Rollouts, corruption: Corruption) -> Tensor:
    """The library's scoring, all copies in one micro-batch, as the trainer calls it."""
    copies = torch.arange(corruption.scored.shape[:2].numel(), device=policy.device)
    return score_copies(policy, rollouts, corruption, copies).logps.view_as(corruption.scored)


VARIANTS: dict[str, Scorer] = {"full logits": full_logits_scores, "unmask": selected_scores}


def build_problem(geometry: Geometry, *, copies: int, seed: int, device: torch.device) -> Problem:
    """Random rollouts with masks; old and reference scores lie near the policy's, so that no ratio is clipped."""
    policy = random_policy(geometry, seed=seed, device=device)
    rollouts = random_rollouts(geometry, seed=seed, device=device)
    corruption = half_masks(rollouts, copies, seed=seed)
    logps = score(policy, rollouts, corruption, micro_batch_size=1).logps
    u = Noise(seed).stream("drift").uniform(torch.arange(logps.numel(), device=device)).view_as(logps).to(logps)
    algorithm = ESPO(num_masks=copies)
    inputs = LossInputs(
        logps=logps,
        corruption=corruption,
        advantages=algorithm.advantages(rollouts.rewards, rollouts.groups),
        rewards=rollouts.rewards,
        groups=rollouts.groups,
        length=rollouts.length,
        old_logps=logps - 0.1 * u * corruption.scored,
        ref_logps=logps - 0.3 * u * corruption.scored,
    )
    return Problem(policy, algorithm, inputs, rollouts)


def random_rollouts(geometry: Geometry, *, seed: int, device: torch.device) -> Rollouts:
    """One group of B rollouts with unequal rewards."""
    batch, tokens = geometry.batch, geometry.tokens
    row = torch.arange(batch, device=device)
    prompts = random_text(geometry, batch, geometry.prompt, seed=seed + 1, device=device)
    completions = random_text(geometry, batch, tokens, seed=seed + 2, device=device)
    return Rollouts(
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
        completion_ids=completions,
        prompt_key=torch.zeros_like(row),
        rollout_index=row,
        groups=torch.zeros_like(row),
        rewards=(row % 2).double() + row.double() / batch,
        length=torch.full_like(row, tokens),
        reveal_step=torch.zeros_like(completions),
        sample_logps=torch.zeros(batch, tokens, dtype=torch.float64, device=device),
        nfe=torch.full_like(row, tokens),
    )


def half_masks(rollouts: Rollouts, copies: int, *, seed: int) -> Corruption:
    """Coupled pairs at level L/2: exactly half of the completion masked in every copy."""
    batch, length = rollouts.completion_ids.shape
    row, slot = torch.arange(batch * copies // 2, device=rollouts.length.device), torch.arange(length)
    u = Noise(seed).stream("half").uniform(row[:, None], slot.to(row))  # (B·K/2, L)
    half = u.argsort(1).argsort(1) < length // 2
    scored = torch.stack([half, ~half], 1).view(batch, copies, length)
    weight = scored.double() * (length + 1) / (scored.sum(-1, keepdim=True) * copies)
    prompt = scored.new_zeros(batch, copies, rollouts.prompt_ids.shape[1])
    return Corruption(torch.cat([prompt, scored], 2), scored, weight, "elbo")


def update(problem: Problem, scorer: Scorer) -> float:
    """score, loss, backward; returns the loss and leaves gradients behind."""
    inputs = problem.inputs
    logps = scorer(problem.policy, problem.rollouts, inputs.corruption)
    loss = problem.algorithm.loss(LossInputs(**{**vars(inputs), "logps": logps})).loss
    loss.backward()
    return float(loss.detach())


def gradients(policy: MaskedPolicy) -> dict[str, Tensor]:
    """Takes the gradients out of the model."""
    taken = {name: p.grad for name, p in policy.module.named_parameters() if p.grad is not None}
    policy.module.zero_grad()
    return taken


def check_same(
    loss: float, reference_loss: float, ours: dict[str, Tensor], reference: dict[str, Tensor]
) -> tuple[float, float]:
    """Largest relative differences of loss and gradients. Raises: AssertionError beyond the tolerances above."""
    loss_error = abs(loss - reference_loss)
    assert loss_error <= LOSS_TOLERANCE, f"losses differ: {loss} and {reference_loss} with full logits"
    assert ours.keys() == reference.keys(), "not the same parameters have gradients"
    worst = 0.0
    for name, expected in reference.items():
        error = float((ours[name] - expected).abs().max() / expected.abs().max())
        assert error <= GRADIENT_TOLERANCE, f"gradients of {name} differ by {error:.1e} of the largest entry"
        worst = max(worst, error)
    return loss_error, worst


@dataclass(frozen=True)
class Comparison:
    """Everything the report says; times are the medians over repeats."""

    seconds: dict[str, list[Seconds]]
    loss_error: float
    gradient_error: float


def compare(problem: Problem, *, repeats: int, reference: Scorer = full_logits_scores) -> Comparison:
    """Loss and gradients of both, then the times in turns. Raises: AssertionError if the first differ."""
    variants = {"full logits": reference, "unmask": selected_scores}
    seconds: dict[str, list[Seconds]] = {name: [] for name in variants}
    losses, grads = {}, {}
    for repeat in range(repeats):
        for name, scorer in variants.items():
            watch = Stopwatch(problem.policy.device)
            losses[name] = watch.time(partial(update, problem, scorer))
            seconds[name].append(watch.total)
            grads[name] = gradients(problem.policy)
        if repeat == 0:
            pairs = losses["unmask"], losses["full logits"], grads["unmask"], grads["full logits"]
            loss_error, gradient_error = check_same(*pairs)
        grads.clear()
    return Comparison(seconds, loss_error, gradient_error)


def peak_bytes(problem: Problem, scorer: Scorer) -> int:
    """Most memory during one update beyond weights and gradients, which are there before it starts.

    CUDA: the allocator's peak. Otherwise the peak of the resident set, reset through /proc/self/clear_refs (Linux):
    pages really touched, whoever allocated them.
    """
    for p in problem.policy.module.parameters():
        p.grad = torch.ones_like(p)  # ones: a page of zeros need not be resident
    device = problem.policy.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        update(problem, scorer)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_bytes("VmRSS")
    update(problem, scorer)
    return status_bytes("VmHWM") - before


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def peak_in_fresh_process(variant: str, geometry: Geometry, options: argparse.Namespace) -> int:
    """`peak_bytes` of a process that has done nothing else, so that no freed memory is reused unseen."""
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(geometry).items()]
    rest = [f"--copies={options.copies}", f"--seed={options.seed}", f"--threads={options.threads}"]
    command = [sys.executable, __file__, *sizes, *rest, *(["--gpu"] if options.gpu else []), f"--peak-of={variant}"]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["bytes"])


def report(result: Comparison, peaks: dict[str, int]) -> str:
    """Markdown: times and peaks of both variants, and how well they agree."""
    medians = {
        name: Seconds(*(sorted(getattr(s, kind) for s in runs)[len(runs) // 2] for kind in ("wall", "cpu")))
        for name, runs in result.seconds.items()
    }
    base = medians["full logits"]
    rows = []
    for name, seconds in medians.items():
        runs = [s.wall for s in result.seconds[name]]
        cells = [name, f"{seconds.wall:.2f} ({min(runs):.2f} to {max(runs):.2f})", f"{seconds.cpu:.2f}"]
        cells += [f"{seconds.wall / base.wall:.2f}", f"{seconds.cpu / base.cpu:.2f}"]
        rows.append([*cells, f"{peaks[name] / 2**20:.0f}", f"{peaks[name] / peaks['full logits']:.2f}"])
    head = ["head", "wall, s", "CPU, s", "wall ratio", "CPU ratio", "peak, MiB", "peak ratio"]
    facts = (
        f"Medians of {len(result.seconds['unmask'])} updates in turns. Losses differ by {result.loss_error:.1e}, "
        f"gradients by at most {result.gradient_error:.1e} of a tensor's largest entry."
    )
    return f"{markdown_table(head, rows)}\n\n{facts}"


@dataclass(frozen=True)
class Pass:
    """One row of the second section."""

    has_backward: bool
    is_checkpointed: bool
    cross_entropy: str

    def labels(self, weights: str) -> list[str]:
        checkpointed = ("on" if self.is_checkpointed else "off") if self.has_backward else "-"
        direction = "forward and backward" if self.has_backward else "forward, no gradient"
        return [direction, weights, checkpointed, self.cross_entropy]


def passes(ways: list[str]) -> list[Pass]:
    """Checkpointing last: it stays on."""
    kinds = ((False, False), (True, False), (True, True))
    return [Pass(backward, checkpointed, way) for backward, checkpointed in kinds for way in ways]


def full_size_report(name: str, *, seed: int, repeats: int) -> str:
    """Markdown: one micro-batch of masked copies, half of each completion scored, by every way this machine has.

    Tokens are all positions of the copies. Trained are adapters on all seven projections, or all weights without peft.
    """
    shape, device = full_size.SHAPES[name], full_size.shape_device(name)
    labels = ("pass", "trained", "checkpointing", "cross-entropy")
    has_peft = importlib.util.find_spec("peft") is not None
    weights = f"LoRA, rank {shape.lora_rank}" if has_peft else "all weights"
    if device is None:
        rows = [row.labels(weights) for row in passes(list(CROSS_ENTROPIES))]
        return f"{full_size.heading(name, None, None)}\n\n{full_size.table(labels, rows)}"
    ceiling = full_size.matmul_ceiling(shape, device)
    policy = full_size.build_policy(shape, device, seed=seed)
    base = policy.module
    if has_peft:
        policy = MaskedPolicy(wrap(base, LoraConfig(rank=shape.lora_rank), seed=seed), tokenizer=None)
    geometry = dataclasses.replace(shape.geometry, batch=shape.copies // 2)
    rollouts = random_rollouts(geometry, seed=seed, device=device)
    corruption = half_masks(rollouts, 2, seed=seed)
    length = geometry.prompt + geometry.tokens
    work = full_size.Work(shape.copies * length, length, int(corruption.scored.sum()))
    ways, missing = ways_here()
    rows = []
    for row in passes(ways):
        base.cross_entropy = row.cross_entropy  # type: ignore[assignment]
        if row.is_checkpointed:
            policy.enable_gradient_checkpointing()
        run = partial(one_pass, policy, rollouts, corruption, has_backward=row.has_backward)
        measured = full_size.measure(run, device, repeats=repeats)
        policy.module.zero_grad()
        flops = (work.with_backward if row.has_backward else work.forward)(policy.module)
        rows.append([*row.labels(weights), *full_size.cells(measured, work.positions, flops, ceiling)])
    return "\n\n".join([full_size.heading(name, device, ceiling), full_size.table(labels, rows), *missing])


def one_pass(policy: MaskedPolicy, rollouts: Rollouts, corruption: Corruption, *, has_backward: bool) -> None:
    policy.module.zero_grad()
    with torch.set_grad_enabled(has_backward):
        logps = selected_scores(policy, rollouts, corruption)
    if has_backward:
        logps.sum().backward()


def ways_here() -> tuple[list[str], list[str]]:
    """Names of the cross-entropies that can run on this machine, and why the others cannot."""
    names, missing = [], []
    for name in CROSS_ENTROPIES:
        try:
            check_cross_entropy(name)
            names.append(name)
        except ConfigError as error:
            missing.append(f"Not measured: {error}")
    return names, missing


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = geometry_parser(__doc__.splitlines()[0])
    full_size.add_options(parser)
    parser.add_argument("--copies", type=int, default=2, help="masked copies per rollout, even")
    parser.add_argument("--repeats", type=int, default=3, help="timed updates of each variant")
    parser.add_argument("--peak-of", choices=list(VARIANTS), help="only print the peak memory of one variant, as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    geometry, device = geometry_of(options), device_of(options)
    if options.section != "shape" or options.peak_of:
        problem = build_problem(geometry, copies=options.copies, seed=options.seed, device=device)
        if options.peak_of:
            print(json.dumps({"bytes": peak_bytes(problem, VARIANTS[options.peak_of])}))
            return
        result = compare(problem, repeats=options.repeats)
        peaks = {name: peak_in_fresh_process(name, geometry, options) for name in VARIANTS}
        print(f"{machine(device)}\n\n{geometry}, {options.copies} copies\n\n{report(result, peaks)}\n")
        del problem
    if options.section != "comparison":
        print(full_size_report(options.shape, seed=options.seed, repeats=options.shape_repeats))


if __name__ == "__main__":
    main()
