"""The mathematics: losses and diagnostics as pure functions on tensors. No trainer, no I/O.

Shapes: `(n,)` tensors hold one value per trained token, with all sequences concatenated; `(n, support)` tensors hold
one value per stored teacher token. `sequences (n,)` holds the index of each token's sequence, 0 to s - 1, ascending;
each sequence has one token or more. Log-probabilities are natural, at temperature 1, over the full vocabulary, in
float32.

There are two objectives. Each is returned as a loss per token whose value is that of the objective and whose gradient
is the update:

- *sampled* (Lightning OPD, arXiv 2604.13010): ascend `A * grad log pi(a|s)` with the constant advantage
  `A = clip(log pi_T(a|s) - log pi(a|s), -tau, tau)`. That is gradient descent on the Huber loss of the log-ratio.
- *topk*: a generalised Jensen-Shannon divergence from the teacher, `beta` as in TRL (0 is the forward KL divergence, 1
  the reverse). Both distributions are coarsened to the teacher's stored top-k tokens, the sampled token, and a bucket
  for all other tokens. It is a lower bound of the full divergence, exact where the support is the vocabulary. Top-k
  log-probabilities are stored in float16: where the teacher's tail is below their rounding, it may exceed the bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# The teacher's tail is 1 minus the stored probabilities, so it includes their rounding (float16: up to about 2e-4). A
# tail below float32 resolution, or below 0, is only rounding.
_TAIL_FLOOR = torch.finfo(torch.float32).eps
# exp of a larger log-ratio would dominate a mean over tokens, and an overflow becomes NaN in a gradient.
_MAX_LOG_RATIO = 20.0
# Quantiles of importance weights are read from counts on a grid of log-weights, because counts can be added up over
# windows and quantiles cannot. Spacing of the grid and its ends, plus and minus, in nats.
_GRID, _GRID_END = 0.02, 4.0
_GRID_POINTS = 2 * round(_GRID_END / _GRID) + 1
# Totals that mean what they are called only where the scores are a teacher's log-probabilities, not a residual.
OF_PROBABILITIES = ("frozen_log_ratio", "k3", "weighted_log_ratio")


def advantage(logprobs: Tensor, teacher_logprobs: Tensor, clip: float = 10.0) -> Tensor:
    """Computes the paper's advantage `clip(teacher_logprobs - logprobs, -clip, clip)` in nats, without gradient.

    Lightning OPD, eq. of the offline update; `clip` is its tau. All shapes `(n,)`.
    """
    return (teacher_logprobs - logprobs.detach()).clamp(-clip, clip)


def huber(logprobs: Tensor, teacher_logprobs: Tensor, clip: float = 10.0) -> Tensor:
    """Computes the Huber loss of the log-ratio, `r^2/2` if `|r| <= clip` else `clip*|r| - clip^2/2`. Shapes `(n,)`."""
    return torch.nn.functional.huber_loss(logprobs, teacher_logprobs, reduction="none", delta=clip)


def sampled_loss(
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    advantage_clip: float = 10.0,
    ref_logprobs: Tensor | None = None,
    ratio_clip: float | None = None,
) -> Tensor:
    """Computes the loss per token of the sampled-token objective, `(n,)` in nats squared.

    Its value is always the Huber loss. Without `ratio_clip`, its gradient is the Huber gradient, which is the paper's
    update `-A * grad log pi`. With `ratio_clip`, its gradient is that of the PPO surrogate
    `-min(w*A, clip(w, 1-ratio_clip, 1+ratio_clip)*A)`, `w = pi / pi_ref`: tokens that have left the trust region
    around the rollout policy in the direction of their advantage get no gradient.

    Raises:
        ValueError: `ratio_clip` is set without `ref_logprobs`.
    """
    loss = huber(logprobs, teacher_logprobs, advantage_clip)
    if ratio_clip is None:
        return loss
    if ref_logprobs is None:
        raise ValueError("`ratio_clip` needs `ref_logprobs`: the trust region is around the policy that sampled.")
    weight = (logprobs - ref_logprobs).clamp(max=_MAX_LOG_RATIO).exp()
    a = advantage(logprobs, teacher_logprobs, advantage_clip)
    surrogate = -torch.minimum(weight * a, weight.clamp(1 - ratio_clip, 1 + ratio_clip) * a)
    # The value of the surrogate has no meaning, so only its gradient is used.
    return loss.detach() + surrogate - surrogate.detach()


def teacher_support(
    topk_ids: Tensor, topk_logprobs: Tensor, sampled_ids: Tensor, sampled_logprobs: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the tokens on which the two distributions are compared: the teacher's top-k and the sampled token.

    Args:
        topk_ids, topk_logprobs: `(n, k)`.
        sampled_ids, sampled_logprobs: `(n,)`.
        vocab_size: vocabulary size of the student. Top-k ids outside it are left out and count as part of the
            teacher's tail.

    Returns:
        `ids`, `logprobs` (float32) and `distinct` (bool), each `(n, k + 1)`. `distinct` is false on the last
        entry if the sampled token is already among the top-k, and on ids that were left out.
    """
    sampled_ids = sampled_ids.unsqueeze(-1)
    known = topk_ids < vocab_size
    ids = torch.cat([torch.where(known, topk_ids, sampled_ids), sampled_ids], dim=-1)
    logprobs = torch.cat([topk_logprobs.float(), sampled_logprobs.float().unsqueeze(-1)], dim=-1)
    distinct = torch.cat([known, (topk_ids != sampled_ids).all(-1, keepdim=True)], dim=-1)
    return ids, logprobs, distinct


def divergence_topk(
    support_logprobs: Tensor, tail_logprobs: Tensor, teacher_logprobs: Tensor, distinct: Tensor, beta: float = 1.0
) -> Tensor:
    """Computes the generalised Jensen-Shannon divergence per token between coarsened distributions, `(n,)`, in nats.

    With the mixture `M = beta * teacher + (1 - beta) * student`, it is `beta * KL(teacher || M) + (1 - beta) *
    KL(student || M)` for `0 < beta < 1`, `KL(teacher || student)` for 0 and `KL(student || teacher)` for 1: TRL's
    `DistillationConfig.beta`. It is never negative, but for rounding.

    The teacher's tail is 1 minus its stored probabilities. Float16 rounding can make these sum to more than 1; the
    buckets are then renormalised, so that the value stays a divergence. A tail in which the student has no mass
    contributes 0, whatever the teacher's tail is.

    Args:
        support_logprobs: student, `(n, support)`, differentiable.
        tail_logprobs: student's log-probability of all other tokens together, `(n,)`, `-inf` if there are
            none, differentiable.
        teacher_logprobs: teacher on the same support, `(n, support)`, finite.
        distinct: false on repeated entries of the support, which count once.
        beta: between 0 and 1.
    """
    teacher = teacher_logprobs.masked_fill(~distinct, -math.inf)
    log_covered = teacher.logsumexp(-1)
    teacher_tail = (-torch.expm1(log_covered)).clamp(min=_TAIL_FLOOR).log()
    log_total = torch.logaddexp(log_covered, teacher_tail)

    # Buckets that do not count are filled before exp: a masked infinity would still turn the gradient into NaN.
    empty = ~torch.cat([distinct, (tail_logprobs > -math.inf).unsqueeze(-1)], dim=-1)
    s = torch.cat([support_logprobs, tail_logprobs.unsqueeze(-1)], dim=-1).masked_fill(empty, 0.0)
    t = torch.cat([teacher, teacher_tail.unsqueeze(-1)], dim=-1) - log_total.unsqueeze(-1)
    t = t.masked_fill(empty, 0.0)
    if beta == 1.0:
        return (s.exp() * (s - t)).sum(-1)
    if beta == 0.0:
        return (t.exp() * (t - s)).sum(-1)
    mixture = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
    return (beta * t.exp() * (t - mixture) + (1 - beta) * s.exp() * (s - mixture)).sum(-1)


def reverse_kl_topk(
    support_logprobs: Tensor, tail_logprobs: Tensor, teacher_logprobs: Tensor, distinct: Tensor
) -> Tensor:
    """Computes the reverse KL divergence per token between the coarsened distributions, [`divergence_topk`] with
    `beta=1`."""
    return divergence_topk(support_logprobs, tail_logprobs, teacher_logprobs, distinct, beta=1.0)


def token_weights(sequences: Tensor, num_sequences: int, aggregation: str, num_items: Tensor | int) -> Tensor:
    """Computes the share of each token's loss in the global loss, `(n,)` float32; the shares of all micro-batches and
    processes sum to 1.

    Args:
        sequences: `(n,)`.
        num_sequences: s.
        aggregation: `"sequence_mean"`, the mean over each sequence's tokens, then over sequences (as in the paper), or
            `"token_mean"`, the mean over all tokens.
        num_items: number of sequences or tokens that the last mean is over, in the global batch (all accumulation
            steps and processes).
    """
    weights = torch.ones_like(sequences, dtype=torch.float32)
    if aggregation == "sequence_mean":
        weights /= weights.new_zeros(num_sequences).index_add_(0, sequences, weights)[sequences]
    return weights / num_items


@dataclass(frozen=True)
class TokenValues:
    """What is known of each trained token, `(n,)` each, without gradient.

    Attributes:
        logprobs, teacher_logprobs: of the sampled token, nats.
        per_token_loss: the objective.
        entropy: of the student, nats.
        is_top1: bool, whether the sampled token is the student's most likely.
        ref_logprobs: of the sampled token, under the policy that sampled it.
        reverse_kl: [`reverse_kl_topk`].
        top1_agreement: bool, whether the student's most likely token is the teacher's.
    """

    logprobs: Tensor
    teacher_logprobs: Tensor
    per_token_loss: Tensor
    entropy: Tensor
    is_top1: Tensor
    ref_logprobs: Tensor | None = None
    reverse_kl: Tensor | None = None
    top1_agreement: Tensor | None = None


def sequence_totals(
    tokens: TokenValues, sequences: Tensor, num_sequences: int, advantage_clip: float = 10.0
) -> dict[str, Tensor]:
    """Computes the inputs of [`summarize`], summed over each sequence's trained tokens. Each value is `(s,)`, except
    `weight_counts` `(s, points)`, counts of importance weights on a grid.

    Totals of batches, windows and processes combine by addition (keys that end in `max` by maximum), so any average
    made of them is weighted by tokens. `sequences` is `(n,)`.
    """
    logprobs, teacher_logprobs, ref_logprobs = tokens.logprobs, tokens.teacher_logprobs, tokens.ref_logprobs
    log_ratio = teacher_logprobs - logprobs
    a = advantage(logprobs, teacher_logprobs, advantage_clip)
    bounded = log_ratio.clamp(max=_MAX_LOG_RATIO)
    values = {
        "tokens": torch.ones_like(logprobs),
        "loss": tokens.per_token_loss,
        "huber": huber(logprobs, teacher_logprobs, advantage_clip),
        "advantage": a,
        "advantage_sq": a * a,
        "advantage_clipped": log_ratio.abs() > advantage_clip,
        "frozen_log_ratio": -log_ratio,
        "k3": bounded.exp() - 1 - bounded,
        "entropy": tokens.entropy,
        "mean_token_accuracy": tokens.is_top1,
    }
    if tokens.reverse_kl is not None:
        values["reverse_kl_topk"] = tokens.reverse_kl
    if tokens.top1_agreement is not None:
        values["top1_agreement"] = tokens.top1_agreement
    if ref_logprobs is not None:
        # Use weights minus 1, because rounding would lose a small spread around 1 in the squares of the weights.
        change = (logprobs - ref_logprobs).clamp(max=_MAX_LOG_RATIO).expm1()
        weight = 1 + change
        values |= {"change": change, "change_sq": change * change, "weighted_log_ratio": -weight * log_ratio}

    sums = torch.zeros((num_sequences, len(values)), dtype=torch.float32, device=sequences.device)
    sums.index_add_(0, sequences, torch.stack([value.float() for value in values.values()], dim=-1))
    totals = dict(zip(values, sums.unbind(-1), strict=True))
    if ref_logprobs is not None:
        totals["weight_max"] = weight.new_zeros(num_sequences).scatter_reduce_(0, sequences, weight, "amax")
        # NaN shows up in the mean; here it would be an index out of range.
        log_weight = (logprobs - ref_logprobs).nan_to_num(nan=_GRID_END).clamp(-_GRID_END, _GRID_END)
        point = (log_weight / _GRID).round().long() + _GRID_POINTS // 2
        counts = torch.zeros(num_sequences * _GRID_POINTS, device=sequences.device)
        counts.index_add_(0, sequences * _GRID_POINTS + point, torch.ones_like(counts[:1]).expand(len(point)))
        totals["weight_counts"] = counts.view(num_sequences, _GRID_POINTS)
    totals["sequences"] = torch.ones_like(totals["tokens"])
    totals["sequence_loss"] = totals["loss"] / totals["tokens"]
    return totals


def summarize(totals: dict[str, float | np.ndarray]) -> dict[str, float]:
    """Computes metrics from combined [`sequence_totals`], each a mean over trained tokens unless stated otherwise.

    - `reverse_kl_topk`: nats per token; on held-out rows, the metric to select models by. It grows with the stored k,
      so compare it on the same rows only.
    - `huber`: nats squared per token. It can fall while the student gets worse; never select by it.
    - `advantage/mean`, `advantage/std`: nats, after clipping. `advantage/clip_fraction`: tokens that were clipped.
    - `frozen_log_ratio`: mean of `log pi - log pi_T` on the frozen rollouts. Not a divergence: it can be driven down
      without bound by lowering `log pi`. Never select by it.
    - `k3`: `pi_T/pi - 1 - log(pi_T/pi)`, the log-ratio bounded by 20 nats.
    - Of residual scores (`residualize_table`), `huber` and `advantage` are of the residual, and the metrics of
      [`OF_PROBABILITIES`] (`frozen_log_ratio`, `k3`, `reverse_kl_weighted`) are left out.
    - `entropy`: of the student, nats. `mean_token_accuracy`: the student's most likely token is the rollout's.
    - `top1_agreement`: the student's most likely token is the teacher's.
    - `importance_weight/mean|std|max`: of `w = pi/pi_ref` per token. `importance_weight/ess`: effective sample size
      `(sum w)^2 / (n * sum w^2)`, 1 if the student has not changed. `importance_weight/p01|p50|p99`: quantiles,
      within 1 %, and between exp(-4) and exp(4). `reverse_kl_weighted`: mean of
      `w * (log pi - log pi_T)`, the reverse KL estimated from tokens sampled from `pi_ref`. If rollouts were
      sampled at another temperature than 1, `pi_ref` at temperature 1 is not quite the policy that sampled them.
    """
    n = totals["tokens"]
    mean = {name: value / n for name, value in totals.items()}

    def std(first: str, second: str) -> float:
        return math.sqrt(max(mean[second] - mean[first] ** 2, 0.0))

    metrics = {
        "huber": mean["huber"],
        "advantage/mean": mean["advantage"],
        "advantage/std": std("advantage", "advantage_sq"),
        "advantage/clip_fraction": mean["advantage_clipped"],
        "entropy": mean["entropy"],
        "mean_token_accuracy": mean["mean_token_accuracy"],
    }
    optional = ("frozen_log_ratio", "k3", "reverse_kl_topk", "top1_agreement")
    metrics |= {name: mean[name] for name in optional if name in mean}
    if "change" in mean:
        mean_weight, mean_sq = 1 + mean["change"], 1 + 2 * mean["change"] + mean["change_sq"]
        metrics |= {
            "importance_weight/mean": mean_weight,
            "importance_weight/std": std("change", "change_sq"),
            "importance_weight/max": totals["weight_max"],
            "importance_weight/ess": mean_weight**2 / mean_sq if mean_sq > 0 else 0.0,
        }
        if "weighted_log_ratio" in mean:
            metrics["reverse_kl_weighted"] = mean["weighted_log_ratio"]
        ranks = totals["weight_counts"].cumsum()
        for percent in (1, 50, 99):
            point = int(np.searchsorted(ranks, percent / 100 * n))
            metrics[f"importance_weight/p{percent:02}"] = math.exp((point - _GRID_POINTS // 2) * _GRID)
    return metrics


def mean_loss(totals: dict[str, float], aggregation: str) -> float:
    """Computes the objective over everything that was combined into `totals`, with the trainer's `aggregation`."""
    if aggregation == "sequence_mean":
        return totals["sequence_loss"] / totals["sequences"]
    return totals["loss"] / totals["tokens"]
