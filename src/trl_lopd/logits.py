"""Logits and log-probabilities of chosen tokens, computed from hidden states one chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def backbone(model) -> torch.nn.Module:
    """Returns the part of a causal language model that computes hidden states."""
    # `base_model` is the model itself where the prefix names another attribute: Llama 4 and Mllama as text models.
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


@dataclass(frozen=True)
class LogitTransform:
    """Transform that an architecture applies to `z = hidden @ weight.T`: `softcap * tanh(scale * z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config) -> LogitTransform:
        """Reads the transform from a model config. Cohere, Gemma 2, Granite, Falcon-H1 and others name it differently.

        A config does not prove what a model computes, so [`check_head`] and `LocalTeacher` compare the resulting
        log-probabilities with the model's own.
        """
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
        softcaps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        softcap = next((cap for name in softcaps if (cap := getattr(config, name, None)) is not None), None)
        return cls(1.0 if scale is None else scale, softcap)

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale if self.scale != 1.0 else z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def backward(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Computes the gradient with respect to the input from the gradient of the output and the output itself."""
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad


# Number of float32 logits in a chunk. On a CPU, more than 128 MiB is no faster. A GPU updates the gradient of the
# whole head once per chunk; with 512 MiB (a thousand tokens of a large vocabulary), the matrix products dominate.
CHUNK_LOGITS = {"cpu": 2**25, "accelerator": 2**27}


def chunks(num_tokens: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Returns slices of the tokens, each with at most [`CHUNK_LOGITS`] logits."""
    size = max(1, CHUNK_LOGITS["cpu" if device.type == "cpu" else "accelerator"] // vocab)
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """Computes logits `(n, vocab)` in float32 from `hidden (n, hidden)`."""
    return transform(torch.nn.functional.linear(hidden, weight, bias).float())


@torch.no_grad()
def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    top_k: int,
    transform: LogitTransform,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes log-probabilities of `ids (n,)` and of the `top_k` most likely of the first `num_tokens` ids.

    Returns `logprobs (n,)` float32, `topk_ids (n, top_k)` int64 and `topk_logprobs (n, top_k)` float32, most likely
    first.
    """
    return _scores(
        lambda rows: logits_of(hidden[rows], weight, bias, transform), ids, top_k, weight.shape[0], num_tokens
    )


@torch.no_grad()
def score_logits(
    logits: Tensor, ids: Tensor, top_k: int, num_tokens: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the same as [`score_tokens`], from `logits (n, vocab)`."""
    return _scores(lambda rows: logits[rows].float(), ids, top_k, logits.shape[-1], num_tokens)


def _scores(
    compute: Callable[[slice], Tensor], ids: Tensor, top_k: int, vocab: int, num_tokens: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    topk_logprobs = logprobs.new_empty((len(ids), top_k))
    topk_ids = torch.empty((len(ids), top_k), dtype=torch.long, device=ids.device)
    for rows in chunks(len(ids), vocab, ids.device):
        z = compute(rows)
        log_z = z.logsumexp(-1, keepdim=True)
        logprobs[rows] = (z.gather(-1, ids[rows].unsqueeze(-1)) - log_z).squeeze(-1)
        if top_k:
            top = z[:, :num_tokens].topk(top_k)
            topk_logprobs[rows], topk_ids[rows] = top.values - log_z, top.indices
    return logprobs, topk_ids, topk_logprobs
