"""A model's own logits on a few short rows, the reference for log-probabilities that are computed in another way.

Scoring and training rebuild logits from hidden states, read rows in padded batches, share prompts and bypass wrappers.
Each of these shortcuts is right for most architectures and wrong for some, so it is tested once on the given model
before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

# Prompt and completion lengths of the trial rows, in tokens. The first two rows share their prompt.
_LENGTHS = ((6, 5), (6, 4), (1, 3))


class TrialRow(NamedTuple):
    """A row to test a model on.

    Attributes:
        ids (`(prompt + completion,)` int64): Token ids.
        completion_length (`int`): Number of tokens at the end that are scored.
    """

    ids: np.ndarray
    completion_length: int


def trial_rows(config: PreTrainedConfig) -> list[TrialRow]:
    """Returns fixed rows of different lengths, with tokens spread over the vocabulary of a model."""
    rng = np.random.default_rng(0)
    vocab_size, pad = config.get_text_config().vocab_size, getattr(config, "pad_token_id", None)

    def draw(size: int) -> np.ndarray:
        ids = rng.integers(vocab_size, size=size)
        # Some models compute positions by counting the tokens that are not padding, so no token is the padding token.
        return np.where(ids == pad, (ids + 1) % vocab_size, ids)

    prompts = {length: draw(length) for length, _ in _LENGTHS}
    return [TrialRow(np.concatenate([prompts[prompt], draw(size)]), size) for prompt, size in _LENGTHS]


class OwnLogprobs(NamedTuple):
    """
    A model's own log-probabilities of the completion tokens of a row that it reads alone.

    Attributes:
        logprobs (`(completion,)` float32): At temperature 1 over the full vocabulary, in nats.
        rounding (`float`): How much the rounding of one logit may change them, in nats.
    """

    logprobs: np.ndarray
    rounding: float


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode inside a `with` block, and afterwards each of its modules in its own mode."""
    # Frozen parts of a model in training may be in evaluation mode.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def own_logprobs(model: nn.Module, row: TrialRow, device: torch.device) -> OwnLogprobs:
    """Computes `log_softmax(model(row).logits)` in float32, with the wrappers and adapters of the model."""
    with _dtypes_of_logits(model) as dtypes:
        logits = model(input_ids=torch.from_numpy(row.ids)[None].to(device)).logits
    # Prompt tuning puts virtual tokens before the row, so the row is counted from the end.
    logits = logits[0, -len(row.ids) :][-row.completion_length - 1 : -1].float()
    ids = torch.from_numpy(row.ids[-row.completion_length :, None]).to(logits.device)
    logprobs = logits.log_softmax(-1).gather(-1, ids).squeeze(-1)
    # Masked tokens have the lowest possible logit. They are left out, because rounding is relative to other logits.
    largest = logits[logits > -1e4].abs().max().item() if (logits > -1e4).any() else 0.0
    return OwnLogprobs(logprobs.cpu().numpy(), _rounding(model, dtypes) * max(1.0, largest))


@contextmanager
def _dtypes_of_logits(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Collects the dtypes in which the LM head computes logits: accelerate puts mixed precision inside the forward and
    casts its outputs back to float32, so that neither parameters nor outputs show it."""
    dtypes: set[torch.dtype] = set()
    head = extract_model_from_parallel(model).get_output_embeddings()
    hook = None
    if isinstance(head, torch.nn.Module):
        hook = head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    try:
        yield dtypes
    finally:
        if hook is not None:
            hook.remove()


def _rounding(model: nn.Module, dtypes: set[torch.dtype]) -> float:
    """Returns the relative rounding error of a model's computations: that of the coarsest dtype of its parameters and
    its logits."""
    dtypes = dtypes | {parameter.dtype for parameter in model.parameters()}
    # Models with quantized weights compute in bfloat16 or float16.
    dtypes = {dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16 for dtype in dtypes}
    # A sum of thousands of float32 products is rounded more than once, so its error exceeds the epsilon of float32.
    return max([3e-6, *(torch.finfo(dtype).eps for dtype in dtypes)])


def difference(found: list[np.ndarray], own: list[OwnLogprobs]) -> str | None:
    """
    Describes how log-probabilities of the same completions differ from the model's own.

    Args:
        found (`list` of `(completion,)` arrays): Log-probabilities that were computed in another way.
        own (`list[OwnLogprobs]`): The model's own.

    Returns:
        `str`, *optional*: The mean and the largest difference; `None` if rounding may explain them.
    """
    computed, expected = np.concatenate(found), np.concatenate([row.logprobs for row in own])
    with np.errstate(invalid="ignore"):
        # Equal infinities count as no difference. NaN in the model's own values is reported when its rows are scored.
        errors = np.where((computed == expected) | np.isnan(expected), 0.0, np.abs(computed - expected))
    rounding = max(row.rounding for row in own)
    if errors.max() <= 8 * rounding and errors.mean() <= 2 * rounding:
        return None
    return f"{errors.mean():.3g} nats a token on average, {errors.max():.3g} at most"


def reads_ahead(model: nn.Module, row: TrialRow, own: OwnLogprobs, device: torch.device) -> str | None:
    """
    Describes how the model's log-probabilities of the first completion tokens change when the last ones are removed.
    Returns `None` if they do not change, as in a causal model.
    """
    dropped = row.completion_length // 2
    shorter = own_logprobs(model, TrialRow(row.ids[:-dropped], row.completion_length - dropped), device)
    return difference([shorter.logprobs], [own._replace(logprobs=own.logprobs[:-dropped])])


def not_causal(name: str, difference: str) -> str:
    """Returns the error message for a model that [`reads_ahead`]."""
    return (
        f"`{name}` is not causal: its log-probabilities of the first tokens of a row change with the tokens that come "
        f"after them ({difference}). Load it as a decoder (`is_decoder=True` in its config), or use a causal model."
    )
