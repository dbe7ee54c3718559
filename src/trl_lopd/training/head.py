"""The language-model head: the loss of the trained tokens and its gradient, without a `[tokens, vocabulary]` tensor.

The loss of a token depends on the student only through the log-probabilities of a few tokens and of all others
together. Its gradient with respect to the logits is therefore known as soon as the logits are: a scaled softmax row
with a correction on each of the few tokens. So [`TokenLoss`] computes the loss, its gradients and all metrics in one
pass over chunks of tokens, and backward recomputes nothing.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..generation.teachers import padded
from ..logits import LogitTransform, backbone, chunks, logits_of
from ..own_logits import TrialRow, difference, evaluating, not_causal, own_logprobs, reads_ahead, trial_rows
from .experts import load_balancing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, eq=False)
class Targets:
    """The `n` trained tokens of all sequences of a batch, and the loss on them.

    It is not a container that wrappers of a model look into, because mixed precision would cast its tensors.

    Attributes:
        positions: `(n,)` int64, index, in the flattened `input_ids`, of the hidden state that predicts each token.
        ids: `(n, support)` int64, the tokens whose log-probabilities are computed.
        distinct: `(n, support)` bool, false where an id is repeated in its row.
        weights: `(n,)` float32, the share of each token's loss in the total loss.
        loss: function of `support_logprobs (rows, support)`, `tail_logprobs (rows,)` and the slice of tokens that they
            belong to; returns a loss per token `(rows,)`, differentiable in the first two.
    """

    positions: Tensor
    ids: Tensor
    distinct: Tensor
    weights: Tensor
    loss: Callable[[Tensor, Tensor, slice], Tensor]


@dataclass
class TokenOutput(ModelOutput):
    """Output of a forward pass for [`Targets`]; only `loss` and `aux_loss` have a gradient.

    Attributes:
        loss: scalar, the weighted sum of `per_token`.
        per_token: `(n,)`.
        support_logprobs: `(n, support)`.
        tail_logprobs: `(n,)`, log-probability of all tokens outside the support together.
        entropy: `(n,)`, nats.
        top1_ids: `(n,)`, the most likely token.
        aux_loss: scalar, [`~experts.load_balancing`] of the batch, if the model has routers and the forward was given
            `output_router_logits=True`. It is no part of `loss`.
    """

    loss: Tensor | None = None
    per_token: Tensor | None = None
    support_logprobs: Tensor | None = None
    tail_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    top1_ids: Tensor | None = None
    aux_loss: Tensor | None = None


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class TokenLoss(torch.autograd.Function):
    """Autograd function from `hidden (n, hidden)`, `weight (vocab, hidden)`, `bias (vocab,) | None`, [`Targets`],
    [`LogitTransform`] and whether a gradient is needed, to the fields of [`TokenOutput`], in float32.
    Log-probabilities are at temperature 1.

    Let `g` be the gradient of the loss with respect to the log-probabilities of the support, `g_tail` that of the
    tail, and `G = sum g + g_tail`. The gradient of a logit `z_v` is `g_v - p_v * G` on the support and
    `p_v * (g_tail / p_tail - G)` off it. The tail is summed from the logits outside the support instead of computed as
    `1 - sum`, so its relative precision does not depend on its size. The gradients of weight and bias are accumulated
    in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, with_grad):
        dtype, device = _compute_dtype(hidden), hidden.device
        n, vocab = hidden.shape[0], weight.shape[0]
        ids = targets.ids
        support = torch.empty(ids.shape, dtype=torch.float32, device=device)
        per_token, tail, entropy = support.new_empty(n), support.new_empty(n), support.new_empty(n)
        top1 = torch.empty(n, dtype=torch.long, device=device)
        needs_hidden, needs_weight, needs_bias = (with_grad and needed for needed in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=device) if needs_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=device) if needs_bias else None
        # The loss is scaled so that its weights are at most 1. Otherwise its gradients would underflow in float16.
        ctx.scale = targets.weights.amax().clamp(min=torch.finfo(torch.float32).tiny)
        with torch.autocast(device.type, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            for rows in chunks(n, vocab, device):
                h = hidden[rows].to(dtype)
                z = logits_of(h, w, b, transform)
                largest, top1[rows] = z.max(-1)
                exp = torch.exp(z - largest.unsqueeze(-1))
                total = exp.sum(-1)
                log_z = largest + total.log()
                entropy[rows] = log_z - torch.linalg.vecdot(exp, z) / total
                support[rows] = z.gather(-1, ids[rows]) - log_z.unsqueeze(-1)
                exp.scatter_(-1, ids[rows], 0.0)
                off = exp.sum(-1)
                tail[rows] = off.log() - total.log()
                if not with_grad:
                    per_token[rows] = targets.loss(support[rows], tail[rows], rows)
                    continue
                with torch.enable_grad():
                    leaves = support[rows].requires_grad_(), tail[rows].requires_grad_()
                    losses = targets.loss(*leaves, rows)
                    g, g_tail = torch.autograd.grad(
                        losses, leaves, targets.weights[rows] / ctx.scale, materialize_grads=True
                    )
                per_token[rows] = losses.detach()
                g_all = g.sum(-1) + g_tail
                # A tail without mass has no gradient, and 0 * inf would be NaN.
                has_mass = off >= torch.finfo(torch.float32).tiny
                off_support = torch.where(has_mass, g_tail / torch.where(has_mass, off, 1.0), 0.0)
                on_support = g - torch.where(targets.distinct[rows], support[rows].exp() * g_all.unsqueeze(-1), 0.0)
                grad = exp.mul_((off_support - g_all / total).unsqueeze(-1))
                grad.scatter_add_(-1, ids[rows], on_support)
                grad = transform.backward(grad, z)
                if needs_bias:
                    grad_bias += grad.sum(0)
                grad = grad.to(dtype)
                if needs_hidden:
                    grad_hidden[rows] = (grad @ w).to(hidden.dtype)
                if needs_weight and dtype == torch.float32:
                    grad_weight.addmm_(grad.T, h)
                elif needs_weight:
                    grad_weight += grad.T @ h
        # Not `save_for_backward`, because backward scales the gradients in place.
        ctx.grads = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(per_token, support, tail, entropy, top1)
        # Not a matrix product, because autocast would round it.
        return (per_token * targets.weights).sum(), per_token, support, tail, entropy, top1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError("The gradient of this loss was used up by an earlier backward.")
        scale, grads = grad_loss * ctx.scale, ctx.grads
        ctx.grads = None
        hidden, weight, bias = (
            None if grad is None else (grad.mul_(scale) if grad.dtype == torch.float32 else grad * scale).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return hidden, weight, bias, None, None, None


def add_distillation_head(model) -> None:
    """Patches `model.forward` so that `model(..., targets=targets)` returns the loss of the trained tokens.

    `targets` is a [`Targets`], the result a [`TokenOutput`]. Other calls are unchanged. The loss is computed inside
    the model's own forward, so that ZeRO-3, FSDP2 and DDP see that the head's parameters are used. Call this before
    wrapping the model with PEFT or an engine.
    """
    plain_forward, balance = model.forward, load_balancing(model)
    transform = LogitTransform.of(model.config)

    # Keep the original signature visible, because `generate` validates its keyword arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, targets: Targets | None = None, **kwargs):
        if targets is None:
            return plain_forward(*args, **kwargs)
        kwargs.pop("labels", None)
        kwargs["use_cache"] = False
        if balance is not None:
            # Otherwise the config decides whether router logits are kept.
            kwargs.setdefault("output_router_logits", False)
        outputs = backbone(self)(*args, **kwargs)
        hidden, aux_loss = outputs.last_hidden_state.flatten(0, 1), None
        # There are none if no layer has such a router: DeepSeek-V4's first layers, for instance, route by token id.
        if balance is not None and kwargs["output_router_logits"] and outputs.router_logits:
            aux_loss = balance(outputs.router_logits, kwargs.get("attention_mask"))
        # Look up the head at each call, because FSDP and PEFT replace it after the patch.
        head = self.get_output_embeddings()
        weight, bias = head.weight, head.bias
        hidden = hidden.index_select(0, targets.positions.to(hidden.device)).to(weight.device)
        if isinstance(weight, DTensor):
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        with maybe_gather_lm_head_ctx(weight, bias):
            # Read it here, because gradients are always disabled inside an autograd function.
            with_grad = torch.is_grad_enabled()
            out = TokenLoss.apply(hidden, weight, bias, targets, transform, with_grad)
            return TokenOutput(*out, aux_loss=aux_loss)

    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def check_head(model: torch.nn.Module, config: PreTrainedConfig, device: torch.device) -> None:
    """
    Checks that the log-probabilities that the loss is computed from are the model's own.

    It makes five forward passes of a few tokens. All processes must call it together, so it works on sharded models.

    Args:
        model ([`~torch.nn.Module`]): The model as it is trained, wrapped by its engine, patched by
            [`add_distillation_head`].
        config ([`~transformers.PreTrainedConfig`]): Its config.
        device ([`torch.device`]): Device of its inputs.

    Raises:
        ValueError: If they differ, or if the model is not causal.
    """
    rows = trial_rows(config)
    with evaluating(model):
        own = [own_logprobs(model, row, device) for row in rows]
        ahead = reads_ahead(model, rows[0], own[0], device)
        try:
            apart = difference(_trained_logprobs(model, rows, device), own)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an architecture without the attributes that the head needs can raise anything
            apart = f"{type(error).__name__}: {error}"
    name = type(extract_model_from_parallel(model)).__name__
    if ahead:
        raise ValueError(not_causal(name, ahead))
    if apart:
        raise ValueError(
            f"`{name}` cannot be trained here: log-probabilities that are rebuilt from its hidden states and LM head, "
            f"in a padded batch, are not its own ({apart}). It may change hidden states before its head, or logits "
            "after it, in a way that is not known here, or read padding."
        )


def _trained_logprobs(model: torch.nn.Module, rows: list[TrialRow], device: torch.device) -> list[np.ndarray]:
    """Computes log-probabilities of completion tokens as in the loss, in one padded batch: `(completion,)` each."""
    input_ids, attention_mask = map(torch.from_numpy, padded([row.ids for row in rows]))
    counts = [row.completion_length for row in rows]
    # A token is predicted at the preceding position.
    ends = [i * input_ids.shape[1] + len(row.ids) - 1 for i, row in enumerate(rows)]
    positions = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    ids = input_ids.flatten()[positions + 1].unsqueeze(-1).to(device)
    targets = Targets(
        positions.to(device),
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        torch.ones(len(ids), device=device),
        lambda logprobs, tail, tokens: logprobs.sum(-1),
    )
    out = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), targets=targets)
    return [logprobs.squeeze(-1).cpu().numpy() for logprobs in out.support_logprobs.split(counts)]


def assert_adapters_are_seen(model) -> None:
    """Checks that the loss sees the PEFT adapters of a model.

    Raises:
        ValueError: An adapter is on the LM head, whose weight is read directly instead of through its module, or it
            puts virtual tokens before the prompt, which shift all positions.
    """
    from peft import PromptLearningConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "A PEFT adapter on `lm_head` would never be trained: log-probabilities are computed from `lm_head.weight` "
            "directly. Remove 'lm_head' from `target_modules` of your `peft_config`."
        )
    if any(isinstance(config, PromptLearningConfig) for config in model.peft_config.values()):
        raise ValueError(
            "Prompt tuning, prefix tuning and P-tuning put virtual tokens before the prompt, where the loss does not "
            "look for them. Use adapters on the weights, such as LoRA."
        )
