"""The language-model head: per-token log-probabilities without a `[tokens, vocabulary]` tensor.

Where only the sampled token's log-probability is wanted, TRL's fused head computes it. Where stored teacher top-k
tokens come with it, [`SupportLogProbs`] computes all of them, the rest bucket and the entropy from the same logits,
chunk by chunk. This module is the only place that touches TRL's fused head, which is not its public API.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput
from trl.trainer.utils import add_fused_lm_head, maybe_gather_lm_head_ctx

# Logits held at once. 2**25 float32 values are 128 MiB; smaller chunks lose speed, larger ones only cost memory.
_CHUNK_LOGITS = 2**25


@dataclass
class SupportOutput(ModelOutput):
    """What a forward gives at every next-token position; entries where `label_mask` is false are 0.

    Attributes:
        log_probs: `(batch, time)`, of the label.
        entropy: `(batch, time)`, nats, without gradient.
        is_top1: `(batch, time)`, whether the label is the most likely token.
        label_mask: `(batch, time)`, positions that have a label.
        support_logprobs: `(batch, time, support)`, or `None` if no `support_ids` were given.
        tail_logprobs: `(batch, time)`, log-probability of all tokens outside the support together.
        top1_ids: `(batch, time)`, the most likely token.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    support_logprobs: Tensor | None = None
    tail_logprobs: Tensor | None = None
    top1_ids: Tensor | None = None


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does to `hidden @ weight.T` before the softmax: `softcap * tanh(scale * z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config) -> LogitTransform:
        """Read from a model config: Cohere, Gemma 2, Granite, Falcon-H1 and their kin name it differently."""
        config = config.get_text_config()
        scale = next(
            (
                getattr(config, name)
                for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
                if getattr(config, name, None) is not None
            ),
            None,
        )
        divisor = getattr(config, "logits_scaling", None)
        if scale is None and divisor is not None:
            scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
        return cls(1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale if self.scale != 1.0 else z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def backward(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient with respect to the input, from that of the output and the output itself."""
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad


def _chunks(num_tokens: int, vocab: int) -> Iterator[slice]:
    size = max(1, _CHUNK_LOGITS // vocab)
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    return transform(torch.nn.functional.linear(hidden, weight, bias).float())


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class SupportLogProbs(torch.autograd.Function):
    """Log-probabilities of a few tokens at each position, and of all others together.

    Forward: `hidden (n, hidden)`, `weight (vocab, hidden)`, `bias (vocab,) | None`, `ids (n, support)`, `distinct
    (n, support)` bool (false on a repeated id), [`LogitTransform`] -> `logprobs (n, support)`, `tail (n,)`, `entropy
    (n,)`, `top1 (n,)`, in float32; the last two carry no gradient. The tail is summed from the logits outside the
    support, not taken as `1 - sum`, so it keeps its relative precision however small it is.

    Backward recomputes each chunk's logits: with `g` the gradient of the log-probabilities and `g_tail` that of the
    tail, a logit `z_v` gets `g_v - p_v * G` on the support and `p_v * (g_tail / p_tail - G)` off it, where `G = sum g
    + g_tail`. Weight and bias gradients are accumulated in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, distinct, transform):
        dtype = _compute_dtype(hidden)
        n, vocab = hidden.shape[0], weight.shape[0]
        logprobs = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
        tail, entropy, log_z = logprobs.new_empty(n), logprobs.new_empty(n), logprobs.new_empty(n)
        top1 = torch.empty(n, dtype=torch.long, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            for rows in _chunks(n, vocab):
                z = _logits(hidden[rows].to(dtype), w, b, transform)
                largest, top1[rows] = z.max(-1)
                logprobs[rows] = z.gather(-1, ids[rows])
                e = torch.exp(z - largest.unsqueeze(-1))
                total = e.sum(-1)
                log_z[rows] = largest + total.log()
                entropy[rows] = log_z[rows] - torch.linalg.vecdot(e, z) / total
                tail[rows] = e.scatter_(-1, ids[rows], 0.0).sum(-1).log() - total.log()
        logprobs -= log_z.unsqueeze(-1)
        ctx.save_for_backward(hidden, weight, bias, ids, distinct, log_z, logprobs, tail)
        ctx.dtype, ctx.transform = dtype, transform
        ctx.mark_non_differentiable(entropy, top1)
        return logprobs, tail, entropy, top1

    @staticmethod
    def backward(ctx, grad_logprobs, grad_tail, *_):
        hidden, weight, bias, ids, distinct, log_z, logprobs, tail = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total = grad_logprobs.sum(-1) + grad_tail
        # A tail with no mass has no logits to move, and 0 * inf would be NaN.
        off_support = torch.where(tail > -80, grad_tail * torch.exp(-tail.clamp(min=-80)), 0.0) - total
        on_support = grad_logprobs - torch.where(distinct, logprobs.exp() * total.unsqueeze(-1), 0.0)
        with maybe_gather_lm_head_ctx(weight, bias), torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=w.device) if needs_weight else None
            grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=w.device) if needs_bias else None
            for rows in _chunks(hidden.shape[0], weight.shape[0]):
                h = hidden[rows].to(ctx.dtype)
                z = _logits(h, w, b, ctx.transform)
                grad = torch.exp(z - log_z[rows].unsqueeze(-1)).mul_(off_support[rows].unsqueeze(-1))
                grad.scatter_(-1, ids[rows], 0.0).scatter_add_(-1, ids[rows], on_support[rows])
                grad = ctx.transform.backward(grad, z)
                if needs_bias:
                    grad_bias += grad.sum(0)
                grad = grad.to(ctx.dtype)
                if needs_hidden:
                    grad_hidden[rows] = (grad @ w).to(hidden.dtype)
                if needs_weight:
                    if ctx.dtype == torch.float32:
                        grad_weight.addmm_(grad.T, h)
                    else:
                        grad_weight += grad.T @ h
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(bias.dtype) if needs_bias else None,
            None,
            None,
            None,
        )


@torch.no_grad()
def score_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, top_k: int, transform: LogitTransform
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of `ids (n,)` and of the `top_k` most likely tokens, for scoring.

    Returns `logprobs (n,)` float32, `topk_ids (n, top_k)` int64 and `topk_logprobs (n, top_k)` float32, most likely
    first.
    """
    logprobs = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
    topk_logprobs = logprobs.new_empty((len(ids), top_k))
    topk_ids = torch.empty((len(ids), top_k), dtype=torch.long, device=hidden.device)
    for rows in _chunks(len(ids), weight.shape[0]):
        z = _logits(hidden[rows], weight, bias, transform)
        log_z = z.logsumexp(-1, keepdim=True)
        logprobs[rows] = (z.gather(-1, ids[rows].unsqueeze(-1)) - log_z).squeeze(-1)
        if top_k:
            top = z.topk(top_k)
            topk_logprobs[rows], topk_ids[rows] = top.values - log_z, top.indices
    return logprobs, topk_ids, topk_logprobs


def add_distillation_head(model) -> None:
    """Patch `model.forward` so that it gives per-token log-probabilities inside the model's own forward.

    `model(..., labels=labels, fused_lm_head=True)` is TRL's fused head. `model(..., labels=labels, support_ids=ids,
    distinct=distinct)` returns a [`SupportOutput`] with the whole support: `ids` and `distinct` are `(batch, time,
    support)`, aligned with `labels[:, 1:]`, and their last entry is the label. Other calls are unchanged. Running
    inside the forward is what lets ZeRO-3, FSDP2 and DDP see the head's parameters used. Call it before wrapping with
    PEFT.

    Raises:
        ValueError: a mixture-of-experts model set to return its router logits: their auxiliary loss is not computed.
    """
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            "The model's config sets `output_router_logits=True`, but the load-balancing loss of mixture-of-experts "
            "models is not part of this objective. Set `model.config.output_router_logits = False`."
        )
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    fused_forward = model.forward
    transform = LogitTransform.of(model.config)

    # The original signature stays visible: `generate` validates its keyword arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, support_ids=None, distinct=None, **kwargs):
        if support_ids is None:
            return fused_forward(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        # Looked up at each call: FSDP and PEFT replace the head after it was patched.
        head = self.get_output_embeddings()
        weight, bias = head.weight, head.bias
        hidden = hidden.to(weight.device)
        if isinstance(weight, DTensor):
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        mask = (labels != -100).to(weight.device)
        with maybe_gather_lm_head_ctx(weight, bias):
            logprobs, tail, entropy, top1 = SupportLogProbs.apply(
                hidden[mask], weight, bias, support_ids[mask], distinct[mask], transform
            )

        def unflatten(values: Tensor) -> Tensor:
            full = mask if values.ndim == 1 else mask.unsqueeze(-1).expand(*mask.shape, values.shape[-1])
            return values.new_zeros(full.shape).masked_scatter(full, values)

        support_logprobs = unflatten(logprobs)
        return SupportOutput(
            log_probs=support_logprobs[..., -1],
            entropy=unflatten(entropy),
            is_top1=unflatten(top1 == support_ids[mask][..., -1]),
            label_mask=mask,
            support_logprobs=support_logprobs,
            tail_logprobs=unflatten(tail),
            top1_ids=unflatten(top1),
        )

    model.forward = types.MethodType(forward, model)


def assert_head_is_plain(model) -> None:
    """Raises `ValueError` if a PEFT adapter sits on the LM head, whose weight is read directly, past the module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "A PEFT adapter on `lm_head` would never be trained: log-probabilities are computed from `lm_head.weight` "
            "directly. Remove 'lm_head' from `target_modules` of your `peft_config`."
        )
