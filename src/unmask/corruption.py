"""Draws of masked copies. Tensors and keyed noise in, a `Corruption` out; no model is seen here.

Every draw is keyed by (prompt key, rollout index, copy, position), so a row gets the same masks in whatever batch,
order or padding it appears; only `draw_stratified_rows` and `draw_coupled_tokens` look at its neighbours, and say so.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unmask.errors import ConfigError
from unmask.types import Corruption, NoiseLike, Rollouts

COUNT_POSITIONS = ("all", "to_eos")
QUADRATURES = ("gauss_legendre", "simpson")
MASKINGS = ("exact_count", "bernoulli")
SCORED_POSITIONS = ("block", "masked")


def sequence_length(
    length: Tensor,  # (B,) tokens up to and including the stop token
    completion_length: int,  # L
    count_positions: str,
) -> Tensor:  # (B,) int64
    """Number of positions that count in each row: L for "all", the row's own length for "to_eos".

    Raises: ConfigError for any other `count_positions`.
    """
    if count_positions not in COUNT_POSITIONS:
        known = " or ".join(f'"{name}"' for name in COUNT_POSITIONS)
        raise ConfigError(f"count_positions = {count_positions!r}: unknown. Use {known}.")
    return torch.full_like(length, completion_length) if count_positions == "all" else length


def counted_positions(
    sequence_length: Tensor,  # (B,)
    completion_length: int,  # L
) -> Tensor:  # (B, L) bool
    """True at the first `sequence_length` positions of each row."""
    return torch.arange(completion_length, device=sequence_length.device) < sequence_length[:, None]


def draw_uniform_count(
    rollouts: Rollouts,
    num_masks: int,
    *,
    coupled: bool,
    stratify: bool = True,
    count_positions: str = "all",
    noise: NoiseLike,
) -> Corruption:
    """Masked copies whose weighted log-probabilities are an unbiased estimate of the ELBO.

        uncoupled   m ~ U{1..L}, |S| = m:   L/m · Σ_{i∈S} l(i;S)
        coupled     m ~ U{0..L}, |S| = m:   1/2 [ (L+1)/m · Σ_{i∈S} l(i;S) + (L+1)/(L-m) · Σ_{i∉S} l(i;S^c) ]

    averaged over the `num_masks` copies, or over the `num_masks`/2 pairs (copies 2j and 2j+1 are complements). With
    "to_eos" a row's `length` plays the part of L: nothing behind it is masked or weighted. `stratify` spreads the
    levels m of one row's draws evenly round the circle of levels; each level alone stays uniform.

    Raises: ConfigError if `num_masks` < 1, or odd when coupled, or for an unknown `count_positions`.
    Source: LLaDA, arXiv:2502.09992 (uncoupled); ESPO, arXiv:2512.03759, App. (coupled).
    Oracle: tests/test_corruption.py::test_expectation_of_real_draws_is_the_elbo
    """
    _check_num_masks(num_masks)
    if coupled and num_masks % 2:
        raise ConfigError(
            f"num_masks = {num_masks}: coupled masks come in complementary pairs, so it must be even. "
            f"Try {num_masks - 1 or 2} or {num_masks + 1}, or coupled = false."
        )
    length = sequence_length(rollouts.length, rollouts.completion_length, count_positions)
    num_draws = num_masks // 2 if coupled else num_masks
    num_levels = length + 1 if coupled else length  # (B,)
    level = _levels(rollouts, num_draws, num_levels, stratify=stratify, noise=noise)  # (B, D)
    counted = counted_positions(length, rollouts.completion_length)[:, None]  # (B, 1, L)
    chosen = _subsets(rollouts, level if coupled else level + 1, counted, noise=noise)  # (B, D, L)
    if coupled:
        rest = counted & ~chosen
        chosen = torch.stack([chosen, rest], dim=2).flatten(1, 2)  # (B, D, 2, L) -> (B, K, L)
    return _elbo_corruption(rollouts, chosen, num_levels)


def draw_stratified_rows(
    rollouts: Rollouts,
    num_masks: int,
    *,
    noise: NoiseLike,
) -> Corruption:
    """Uncoupled copies whose mask counts are spread evenly over 1..L across the whole batch.

        m_{r,k} = 1 + (m_0 + round((k·B + r)·L / (B·K))) mod L,     m_0 ~ U{0..L-1} once for the batch

    Each count alone is uniform, so the estimate is the ELBO as for `draw_uniform_count`. The batch is one draw: m_0
    is keyed by the first row, and the counts depend on the row order. The subsets are still each row's own.

    Raises: ConfigError if `num_masks` < 1.
    """
    _check_num_masks(num_masks)
    batch, positions = len(rollouts), rollouts.completion_length
    first = noise.stream("batch_level").uniform(rollouts.prompt_key[:1], rollouts.rollout_index[:1])  # (1,)
    start = (first * positions).long()  # below L, see _levels
    copy = torch.arange(num_masks, device=start.device)
    row = torch.arange(batch, device=start.device)
    stratum = copy * batch + row[:, None]  # (B, K)
    level = (start + _spread(stratum, positions, batch * num_masks)) % positions + 1
    length = torch.full_like(rollouts.length, positions)
    everywhere = torch.ones_like(rollouts.completion_ids, dtype=torch.bool)[:, None]
    return _elbo_corruption(rollouts, _subsets(rollouts, level, everywhere, noise=noise), length)


def draw_full_mask(
    rollouts: Rollouts,
    num_masks: int,
    *,
    prompt_mask_ratio: float,
    count_positions: str,
    noise: NoiseLike,
) -> Corruption:
    """Copies whose completion is masked throughout: the one-step, fully factorised likelihood.

        l(i) = log π(y_i | q̃, all masked),   each real prompt token of q̃ masked with probability `prompt_mask_ratio`

    Pads are never masked. All L completion positions are masked in the input; those that count are read, with weight
    1/num_masks. No bound of log p.

    Raises: ConfigError if `num_masks` < 1, the ratio lies outside [0, 1), or `count_positions` is unknown.
    Source: d1, arXiv:2504.12216; its code masks pads too.
    """
    _check_num_masks(num_masks)
    hidden = _hidden_prompt(rollouts, num_masks, prompt_mask_ratio, noise=noise)
    positions = rollouts.completion_length
    length = sequence_length(rollouts.length, positions, count_positions)
    completion = hidden.new_ones(len(rollouts), num_masks, positions)
    scored = completion & counted_positions(length, positions)[:, None]
    return Corruption(torch.cat([hidden, completion], dim=2), scored, scored.double() / num_masks, "mean_field")


def quadrature_rule(
    rule: str,
    num_nodes: int,  # N
) -> tuple[Tensor, Tensor]:  # (N,) float64 nodes in (0, 1], (N,) float64 weights that add up to 1
    """Nodes t and weights ω with Σ ω f(t) ≈ ∫₀¹ f.

    "gauss_legendre" is exact for polynomials of degree up to 2N - 1. "simpson" is Simpson's rule with its first node
    moved from 0, where no token is masked, to 0.1: weights 1/6, 4/6, 1/6 at 0.1, 0.5, 1, exact for constants only.

    Raises: ConfigError for another rule, or a number of nodes it does not have.
    """
    if rule not in QUADRATURES:
        raise ConfigError(f"quadrature = {rule!r}: unknown. Use one of: {', '.join(QUADRATURES)}.")
    if num_nodes < 1 or (rule == "simpson" and num_nodes != 3):
        need = "Simpson's rule has 3 nodes. Use 3" if rule == "simpson" else "at least one is needed. Try 3"
        raise ConfigError(f"num_nodes = {num_nodes}: {need}.")
    if rule == "simpson":
        nodes, weights = [0.1, 0.5, 1.0], [1 / 6, 4 / 6, 1 / 6]
    else:
        x, w = np.polynomial.legendre.leggauss(num_nodes)  # on [-1, 1]
        nodes, weights = ((x + 1) / 2).tolist(), (w / 2).tolist()
    return torch.tensor(nodes, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)


def draw_quadrature(
    rollouts: Rollouts,
    *,
    rule: str,
    num_nodes: int,  # N
    num_masks_per_node: int,
    masking: str,
    count_positions: str,
    noise: NoiseLike,
) -> Corruption:
    """Random subsets at fixed mask ratios: only the integral over the ratio is deterministic.

        Σ_n ω_n (1/K) Σ_k (1/s_n) Σ_{i∈S_nk} l(i;S_nk),     K = num_masks_per_node

        exact_count   |S_nk| = m_n = max(1, round(t_n L)),      s_n = m_n / L
        bernoulli     each position masked with probability t_n,  s_n = t_n

    Copies of a node stand together. With "bernoulli" and Gauss-Legendre the expectation is the ELBO where
    E[(1/t) Σ l] is a polynomial in t of degree up to 2N - 1, as for any model if L <= 2N. With "exact_count" a constant
    l gives exactly L·l, and there is a further error of order 1/L.

    Raises: ConfigError for an unknown name, or a number below 1.
    Source: GDPO, arXiv:2510.08554.
    """
    if masking not in MASKINGS:
        raise ConfigError(f"masking = {masking!r}: unknown. Use one of: {', '.join(MASKINGS)}.")
    _check_num_masks(num_masks_per_node)
    nodes, node_weights = (
        values.to(rollouts.length.device).repeat_interleave(num_masks_per_node)
        for values in quadrature_rule(rule, num_nodes)
    )  # (N K,) each
    positions = rollouts.completion_length
    length = sequence_length(rollouts.length, positions, count_positions)
    counted = counted_positions(length, positions)[:, None]  # (B, 1, L)
    if masking == "exact_count":
        size = (nodes * length[:, None] + 0.5).long().clamp(min=1)  # (B, N K), halves upwards
        scored = _subsets(rollouts, size, counted, noise=noise)
        share = (size / length[:, None].double())[..., None]  # (B, N K, 1)
    else:
        scored = (_position_uniforms(rollouts, len(nodes), "bernoulli", noise=noise) < nodes[:, None]) & counted
        share = nodes[:, None]
    weight = scored * node_weights[:, None] / (share * num_masks_per_node)
    return Corruption(_clean_prompts(rollouts, scored), scored, weight, "quadrature")


def draw_coupled_tokens(
    rollouts: Rollouts,
    *,
    min_mask_ratio: float,
    max_mask_ratio: float,
    count_positions: str,
    noise: NoiseLike,
) -> Corruption:
    """Three copies, with all completion positions masked, with S and with its complement: two reads of each token.

        s(i) = 1/2 [ l(i; all) + 1[i∈S] l(i;S) / t + 1[i∉S] l(i;S^c) / (1-t) ]

    t ~ U[min_mask_ratio, max_mask_ratio] is one number for the batch, keyed by its lowest rollout index; each position
    is in S with probability t. The weights of a token have expectation 3/2: no bound, and no average.

    Raises: ConfigError unless 0 < min_mask_ratio <= max_mask_ratio < 1, or for an unknown `count_positions`.
    Source: coupled-GRPO of DiffuCoder, arXiv:2506.20639.
    """
    if not 0 < min_mask_ratio <= max_mask_ratio < 1:
        raise ConfigError(
            f"min_mask_ratio = {min_mask_ratio}, max_mask_ratio = {max_mask_ratio}: must be increasing and lie "
            "between 0 and 1 without them, as tokens are weighted by 1/t and 1/(1-t). Try 0.2 and 0.8."
        )
    u = noise.stream("ratio").uniform(rollouts.rollout_index.min())  # ()
    ratio = min_mask_ratio + (max_mask_ratio - min_mask_ratio) * u
    chosen = _position_uniforms(rollouts, 1, "bernoulli", noise=noise) < ratio  # (B, 1, L)
    hidden = torch.cat([torch.ones_like(chosen), chosen, ~chosen], dim=1)  # (B, 3, L)
    positions = rollouts.completion_length
    length = sequence_length(rollouts.length, positions, count_positions)
    scored = hidden & counted_positions(length, positions)[:, None]
    weight = torch.stack([torch.ones_like(ratio), 1 / ratio, 1 / (1 - ratio)])[:, None] / 2  # (3, 1)
    return Corruption(_clean_prompts(rollouts, hidden), scored, scored * weight, "coupled_tokens")


def draw_rising_ratio(
    rollouts: Rollouts,
    *,
    iteration: int,
    num_iterations: int,
    num_timesteps: int,
    count_positions: str,
    noise: NoiseLike,
) -> Corruption:
    """One random subset of each completion, larger in every pass and everything in the last.

        t_1 = floor(r T),  r ~ U(0, 1) once for a row and batch;     t_n = t_1 + floor( (n-1)/(μ-1) · (T - t_1) )
        |S| = max(1, round(L t_n / T)),     n = iteration + 1, μ = num_iterations, T = num_timesteps

    A single pass (μ = 1) masks everything. `noise` is that of the batch: the start is common to the passes, the subset
    is each one's own. Weight 1 where masked.

    Source: UniGRPO of MMaDA, arXiv:2505.15809.
    """
    positions = rollouts.completion_length
    length = sequence_length(rollouts.length, positions, count_positions)
    start = (noise.stream("start").uniform(rollouts.prompt_key, rollouts.rollout_index) * num_timesteps).long()  # (B,)
    left = num_timesteps - start
    step = start + (iteration * left // (num_iterations - 1) if num_iterations > 1 else left)
    size = _spread(step, length, num_timesteps).clamp(min=1)
    counted = counted_positions(length, positions)[:, None]
    scored = _subsets(rollouts, size[:, None], counted, noise=noise.stream(str(iteration)))  # (B, 1, L)
    return Corruption(_clean_prompts(rollouts, scored), scored, scored.double(), "random_mask")


def draw_blocks(
    rollouts: Rollouts,
    num_masks: int,
    *,
    block_length: int,
    clean_mask_ratio: float,
    scored_positions: str,
    count_positions: str,
    noise: NoiseLike,
) -> Corruption:
    """Copies as a block-wise sampler meets them: earlier blocks shown, one block partly masked, all behind it masked.

        j ~ U{0..E-1},   block b = j // block_length,   m = 1 + j mod block_length,   S ⊆ block b, |S| = m uniform
        estimate = mean over copies of E/m · Σ_{i∈S} l(i; S, later blocks and all from E on)

    E is the row's length. One uniform names block and count: a block is met as often as it has tokens, so that the
    expectation is the ELBO of the orders that finish a block before the next. The j of one row are evenly spaced.
    Each shown token of prompt and completion is hidden with probability `clean_mask_ratio` and not read. With
    `scored_positions = "masked"` every masked position before E is read, and m counts them: no bound of anything.

    Raises: ConfigError for a number out of range or an unknown name.
    Source: SPG, arXiv:2510.09541.
    """
    _check_num_masks(num_masks)
    if block_length < 1:
        raise ConfigError(f"block_length = {block_length}: a block has at least 1 token. Try 32.")
    if scored_positions not in SCORED_POSITIONS:
        known = ", ".join(SCORED_POSITIONS)
        raise ConfigError(f"scored_positions = {scored_positions!r}: unknown. Use one of: {known}.")
    hidden_prompt = _hidden_prompt(rollouts, num_masks, clean_mask_ratio, noise=noise)
    positions = rollouts.completion_length
    length = sequence_length(rollouts.length, positions, count_positions)
    counted = counted_positions(length, positions)[:, None]  # (B, 1, L)
    level = _levels(rollouts, num_masks, length, stratify=True, noise=noise)[..., None]  # (B, K, 1)
    block_of = torch.arange(positions, device=length.device) // block_length  # (L,)
    block = level // block_length
    chosen = _subsets(rollouts, level[..., 0] % block_length + 1, (block_of == block) & counted, noise=noise)
    slips = _position_uniforms(rollouts, num_masks, "clean", noise=noise) < clean_mask_ratio
    hidden = chosen | (block_of > block) | ~counted | slips
    scored = chosen if scored_positions == "block" else hidden & counted
    weight = scored * length[:, None, None].double() / (scored.sum(-1, keepdim=True) * num_masks)
    return Corruption(torch.cat([hidden_prompt, hidden], dim=2), scored, weight, "block")


def join_halves(first: Corruption, second: Corruption) -> Corruption:
    """The copies of two draws of one kind side by side, each with half of its weight: the mean of their estimates.

    Two independent draws can be told apart again by halving the K axis; stratification and complements stay within
    each.
    """
    masked, scored, weight = (
        torch.cat([getattr(first, name), getattr(second, name)], dim=1) for name in ("masked", "scored", "weight")
    )
    return Corruption(masked, scored, weight / 2, first.kind)


def _check_num_masks(num_masks: int) -> None:
    if num_masks < 1:
        raise ConfigError(f"num_masks = {num_masks}: a likelihood is read from masked copies, so at least 1 is needed.")


def _row_key(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """(B, 1, 1) each: the coordinates that name a row wherever it stands."""
    return rollouts.prompt_key[:, None, None], rollouts.rollout_index[:, None, None]


def _hidden_prompt(
    rollouts: Rollouts,
    num_masks: int,
    ratio: float,
    *,
    noise: NoiseLike,
) -> Tensor:  # (B, K, P) bool
    """Each real prompt token hidden with probability `ratio`, in each copy anew."""
    if not 0 <= ratio < 1:
        raise ConfigError(
            f"prompt_mask_ratio = {ratio}: the share of prompt tokens hidden must lie in [0, 1), "
            "because an answer to a prompt hidden altogether says nothing. Try 0.15, or 0 for none."
        )
    copies = torch.arange(num_masks, device=rollouts.length.device)
    # counted from the prompt's end, so that left padding does not move a token's coordinate
    from_end = torch.arange(rollouts.prompt_ids.shape[1] - 1, -1, -1, device=copies.device)
    u = noise.stream("prompt").uniform(*_row_key(rollouts), copies[:, None], from_end)
    return (u < ratio) & rollouts.prompt_mask[:, None]


def _clean_prompts(
    rollouts: Rollouts,
    hidden: Tensor,  # (B, K, L) bool
) -> Tensor:  # (B, K, T) bool
    """The masks of whole canvases whose prompts are shown."""
    prompt = hidden.new_zeros(*hidden.shape[:2], rollouts.prompt_ids.shape[1])
    return torch.cat([prompt, hidden], dim=2)


def _position_uniforms(
    rollouts: Rollouts,
    num_copies: int,
    stream: str,
    *,
    noise: NoiseLike,
) -> Tensor:  # (B, num_copies, L) float64
    """A keyed uniform for each completion position of each copy."""
    positions = torch.arange(rollouts.completion_length, device=rollouts.length.device)
    copy = torch.arange(num_copies, device=positions.device)
    return noise.stream(stream).uniform(*_row_key(rollouts), copy[:, None], positions)


def _spread(index: Tensor, num_levels: Tensor | int, count: int) -> Tensor:
    """round(index · num_levels / count), halves upwards, in exact integer arithmetic."""
    return (2 * index * num_levels + count) // (2 * count)


def _levels(
    rollouts: Rollouts,
    num_draws: int,  # D
    num_levels: Tensor,  # (B,)
    *,
    stratify: bool,
    noise: NoiseLike,
) -> Tensor:  # (B, D) int64
    """Levels in 0..num_levels-1, each uniform; stratified: one uniform start, the others evenly spaced behind it."""
    draw = torch.arange(num_draws, device=num_levels.device)
    num_levels = num_levels[:, None]  # (B, 1)
    key, index = rollouts.prompt_key[:, None], rollouts.rollout_index[:, None]
    u = noise.stream("level").uniform(key, index, draw[:1] if stratify else draw)  # (B, 1) or (B, D)
    # below n: u <= 1 - 2^-53, and n·2^-53 exceeds half the gap between n and the float64 before it
    level = (u * num_levels).long()
    return (level + _spread(draw, num_levels, num_draws)) % num_levels if stratify else level


def _subsets(
    rollouts: Rollouts,
    size: Tensor,  # (B, D)
    eligible: Tensor,  # (B, 1 or D, L) bool
    *,
    noise: NoiseLike,
) -> Tensor:  # (B, D, L) bool
    """Uniform subsets of the eligible positions with the given sizes: the lowest ranks of keyed uniforms."""
    u = _position_uniforms(rollouts, size.shape[1], "subset", noise=noise)
    u = u.masked_fill(~eligible, torch.inf)  # behind every uniform
    rank = u.argsort(stable=True).argsort()
    return rank < size[..., None]


def _elbo_corruption(
    rollouts: Rollouts,
    scored: Tensor,  # (B, K, L) bool
    num_levels: Tensor,  # (B,): L for m in 1..L, L+1 for m in 0..L
) -> Corruption:
    """Weights num_levels / m, shared among the K copies. An empty copy has no position to weight."""
    size = scored.sum(-1, keepdim=True).clamp(min=1)  # (B, K, 1)
    weight = scored * num_levels[:, None, None].double() / (size * scored.shape[1])
    return Corruption(_clean_prompts(rollouts, scored), scored, weight, "elbo")
