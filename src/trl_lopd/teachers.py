"""Teachers: what scores completions. The one in this process is here, those behind a server are in `served`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from accelerate.utils import is_peft_model

from .head import LogitTransform, score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Scores(NamedTuple):
    """
    What a teacher says of one completion: natural logarithms, at temperature 1 over the full vocabulary.

    Attributes:
        logprobs (`(completion,)` float32): Of the tokens of the completion.
        topk_ids (`(completion, k)` int32): The most likely tokens at each position, most likely first.
        topk_logprobs (`(completion, k)` float16): Theirs.
    """

    logprobs: np.ndarray
    topk_ids: np.ndarray
    topk_logprobs: np.ndarray


class Teacher(Protocol):
    """Anything that scores completions."""

    def score(
        self,
        sequences: list[np.ndarray],
        completion_lengths: list[int],
        top_k: int,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> list[Scores]:
        """
        Scores the last tokens of each sequence, in the order of the call.

        Args:
            sequences (`list` of `(prompt + completion,)` int arrays): Token ids.
            completion_lengths (`list[int]`): How many tokens at the end of each are scored; at least one is not.
            top_k (`int`): Also the most likely tokens at each position; `0` for none.
            advance (`Callable`, *optional*): Called with numbers of completion tokens as they are scored.
        """
        ...


class LocalTeacher:
    """
    A transformers model that scores. Rows of like length are scored together; when memory runs out, fewer of them.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, on whatever devices, quantized or not.
        max_batch_tokens (`int`): Tokens of a forward pass, padding included. A longer row is scored alone.
    """

    def __init__(self, model: PreTrainedModel, max_batch_tokens: int = 16384):
        self.model, self.max_batch_tokens = model, max_batch_tokens

    def score(
        self,
        sequences: list[np.ndarray],
        completion_lengths: list[int],
        top_k: int,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> list[Scores]:
        """
        See [`Teacher`].

        Raises:
            RowError: for a sequence with ids outside the vocabulary, or that the model answers with NaN.
            ValueError: if `top_k` is more than the vocabulary.
        """
        vocab = self.model.config.get_text_config().vocab_size
        if top_k > vocab:
            raise ValueError(f"`top_k={top_k}` is more than the teacher's vocabulary of {vocab} tokens.")
        for row, sequence in enumerate(sequences):
            if sequence.min() < 0 or sequence.max() >= vocab:
                bad = sequence.min() if sequence.min() < 0 else sequence.max()
                raise RowError(
                    f"token id {bad} is not in the vocabulary of {vocab} tokens of the model that scores. Teacher and "
                    "student must share a tokenizer.",
                    row,
                )
        results: list[Scores | None] = [None] * len(sequences)
        todo = list(_batches(np.array([len(sequence) for sequence in sequences]), self.max_batch_tokens))[::-1]
        was_training = self.model.training
        self.model.eval()
        try:
            while todo:
                rows = todo.pop()
                try:
                    scores = _score_batch(
                        self.model, [sequences[row] for row in rows], [completion_lengths[row] for row in rows], top_k
                    )
                except torch.OutOfMemoryError:
                    if len(rows) == 1:
                        raise
                    torch.cuda.empty_cache()
                    self.max_batch_tokens = max(1, self.max_batch_tokens // 2)
                    logger.warning(f"Out of memory: from here on {self.max_batch_tokens} tokens are scored at a time.")
                    longest = np.array([len(sequence) for sequence in sequences])
                    left = np.concatenate([rows, *todo[::-1]])
                    todo = [left[batch] for batch in _batches(longest[left], self.max_batch_tokens)][::-1]
                    continue
                for row, result in zip(rows, scores, strict=True):
                    if np.isnan(result.logprobs).any():
                        raise RowError(
                            "the model answers with NaN. Load it in another dtype, float32 or bfloat16.", int(row)
                        )
                    results[row] = result
                advance(sum(completion_lengths[row] for row in rows))
        finally:
            self.model.train(was_training)
        return results


class RowError(ValueError):
    """
    A sequence that cannot be scored.

    Attributes:
        row (`int`): Its position in the call of `score`.
    """

    def __init__(self, message: str, row: int):
        super().__init__(message)
        self.row = row


def _batches(row_lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Rows of like length, longest first so that memory runs out at once or never; padded size within `max_tokens`."""
    order = np.argsort(-row_lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, max_tokens // int(row_lengths[order[start]]))
        yield order[start : start + size]
        start += size


@torch.inference_mode()
def _score_batch(model: PreTrainedModel, sequences: list[np.ndarray], counts: list[int], top_k: int) -> list[Scores]:
    """Scores of the last tokens of each sequence, all read in one forward pass."""
    width = max(map(len, sequences))
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    attention_mask, scored = torch.zeros_like(input_ids), torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        input_ids[i, : len(sequence)] = torch.from_numpy(sequence)
        attention_mask[i, : len(sequence)] = 1
        scored[i, len(sequence) - count : len(sequence)] = True
    # Adapters live in the layers of the model that PEFT wraps.
    model = model.get_base_model() if is_peft_model(model) else model
    device = model.get_input_embeddings().weight.device
    hidden = model.base_model(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
    ).last_hidden_state[:, :-1]
    head = model.get_output_embeddings()
    scored = scored[:, 1:]
    logprobs, topk_ids, topk_logprobs = score_tokens(
        hidden[scored.to(hidden.device)].to(head.weight.device),
        head.weight,
        head.bias,
        input_ids[:, 1:][scored].to(head.weight.device),
        top_k,
        LogitTransform.of(model.config),
    )
    arrays = [values.cpu().numpy() for values in (logprobs, topk_ids.int(), topk_logprobs.half())]
    splits = [np.split(values, np.cumsum(counts)[:-1]) for values in arrays]
    return [Scores(*row) for row in zip(*splits, strict=True)]
