"""Teachers, which score completions, with transformers in this process. Those for servers are in `servers`."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate.utils import is_peft_model
from transformers import DynamicCache
from transformers.utils.generic import is_flash_attention_requested

from ..errors import OfflineOPDError
from ..logits import LogitTransform, backbone, score_logits, score_tokens
from ..models import stretches_from
from ..own_logits import difference, evaluating, not_causal, own_logprobs, reads_ahead, trial_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# A prompt of several completions is read once if that saves this share of all tokens. Attending to a cached prompt has
# a cost too: measured on a CPU, saving 15 % of the tokens saves no time, and 34 % saves a sixth of the time.
_SHARING_PAYS = 0.2


class Scores(NamedTuple):
    """
    Teacher log-probabilities of one completion: natural logarithms, at temperature 1 over the full vocabulary.

    Attributes:
        logprobs (`(completion,)` float32): Log-probabilities of the tokens of the completion.
        topk_ids (`(completion, k)` int32): The most likely tokens at each position, most likely first.
        topk_logprobs (`(completion, k)` float16): Their log-probabilities.
    """

    logprobs: np.ndarray
    topk_ids: np.ndarray
    topk_logprobs: np.ndarray


class Teacher(Protocol):
    """Protocol of objects that score completions."""

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
            completion_lengths (`list[int]`): Number of tokens at the end of each that are scored. At least one token
                before them is not scored.
            top_k (`int`): Number of the most likely tokens to return at each position.
            advance (`Callable`, *optional*): Called with numbers of completion tokens as they are scored.
        """
        ...


class LocalTeacher:
    """
    Teacher with a transformers model. Rows of similar length are scored together; if memory runs out, fewer of them.

    With flash attention, rows are concatenated without padding. A prompt of several completions is read once if that
    saves enough tokens, and its keys and values are kept for all of them. Before the first row, each of these methods
    is tested on a few short rows. One that does not compute the model's own log-probabilities is not used, with a
    warning.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, on any devices, quantized or not.
        max_batch_tokens (`int`, *optional*): Number of tokens in a forward pass, padding and cached prompts included.
            A longer row is scored alone. If not given, it is as many as fit on CUDA devices, measured at the first
            call, and 16,384 elsewhere.
        num_tokens (`int`, *optional*): Number of ids that are tokens, if the vocabulary is padded. The most likely
            tokens are chosen among these first ids. By default the whole vocabulary.
    """

    def __init__(self, model: PreTrainedModel, max_batch_tokens: int | None = None, num_tokens: int | None = None):
        self.model, self.max_batch_tokens, self.num_tokens = model, max_batch_tokens, num_tokens
        self._reading: _Reading | None = None

    def find_budget(self) -> int:
        """Returns `max_batch_tokens`, which is measured if it was not given."""
        self.max_batch_tokens = self.max_batch_tokens or _measured_budget(self.model)
        return self.max_batch_tokens

    def score(
        self,
        sequences: list[np.ndarray],
        completion_lengths: list[int],
        top_k: int,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> list[Scores]:
        """
        Scores the last tokens of each sequence, see [`Teacher`].

        Raises:
            RowError: If a sequence has ids outside the vocabulary, or its log-probabilities are NaN.
            ValueError: If `top_k` is more than the vocabulary, or the model is not causal.
            OutOfMemoryError: If a single row does not fit.
        """
        vocab = self.model.config.get_text_config().vocab_size
        if top_k > (tokens := min(vocab, self.num_tokens or vocab)):
            raise ValueError(f"`top_k={top_k}` is more than the teacher's vocabulary of {tokens} tokens.")
        for row, (sequence, length) in enumerate(zip(sequences, completion_lengths, strict=True)):
            if sequence.min() < 0 or sequence.max() >= vocab:
                place = int(((sequence < 0) | (sequence >= vocab)).argmax())
                bad, first = sequence[place], len(sequence) - length
                column, place = ("prompt_ids", place) if place < first else ("completion_ids", place - first)
                raise RowError(
                    f"token id {bad} (`{column}`, token {place}) is not in the vocabulary of {vocab} tokens of "
                    "the model that scores. Teacher and student must share a tokenizer.",
                    row,
                )
        results: list[Scores | None] = [None] * len(sequences)
        with evaluating(self.model):
            self.find_budget()
            self._reading = self._reading or _find_reading(self.model)
            batches = self._plan(np.arange(len(sequences)), sequences, completion_lengths)
            while batches:
                rows, shared = batches.pop()
                ran_out = False
                try:
                    for done, scores in self._passes(rows, shared, sequences, completion_lengths, top_k):
                        for row, result in zip(done, scores, strict=True):
                            if np.isnan(result.logprobs).any():
                                raise RowError(
                                    "the model answers with NaN. Load it in another dtype, float32 or bfloat16.",
                                    int(row),
                                )
                            results[row] = result
                        advance(sum(completion_lengths[row] for row in done))
                except torch.OutOfMemoryError:
                    if len(rows) == 1:
                        raise
                    ran_out = True
                # This is outside the handler, where the exception would keep the tensors in its frames alive.
                if ran_out:
                    torch.cuda.empty_cache()
                    self.max_batch_tokens = max(1, self.max_batch_tokens // 2)
                    logger.warning(f"Out of memory: from here on {self.max_batch_tokens} tokens are scored at a time.")
                    remaining = np.array([row for row, result in enumerate(results) if result is None])
                    batches = self._plan(remaining, sequences, completion_lengths)
        return results

    def _plan(self, rows: np.ndarray, sequences: list[np.ndarray], counts: list[int]) -> list[tuple[np.ndarray, bool]]:
        """Returns batches of rows to score together, and whether they share prompts, in reverse order."""
        row_lengths = np.array([len(sequences[row]) for row in rows])
        if not self._reading.together:
            return [(rows[[row]], False) for row in range(len(rows))][::-1]
        prompt_lengths = row_lengths - np.array([counts[row] for row in rows])
        shared, plan = np.zeros(len(rows), dtype=bool), []
        if self._reading.shares_prompts:
            first, group, size = _groups(
                [sequences[row][:prompt] for row, prompt in zip(rows, prompt_lengths, strict=True)]
            )
            tokens = np.bincount(group, row_lengths)
            longest = np.zeros_like(first)
            np.maximum.at(longest, group, row_lengths)
            pays = (size - 1) * prompt_lengths[first] >= _SHARING_PAYS * tokens
            # A row longer than the budget is scored alone, without a cache.
            sharing = np.flatnonzero(pays & (longest <= self.max_batch_tokens))
            # Use half of the tokens for prompts, which stay in memory until all of their completions are scored.
            for batch in batches_of_like_length(prompt_lengths[first[sharing]], self.max_batch_tokens // 2):
                members = np.isin(group, sharing[batch])
                shared |= members
                plan.append((rows[members], True))
        stretched = row_lengths >= stretches_from(self.model.config)
        others, budget = np.flatnonzero(~shared & ~stretched), self.max_batch_tokens
        if not self._reading.from_hidden:
            budget = min(budget, _MOST_LOGITS // self.model.config.get_text_config().vocab_size)
        batches = batches_of_like_length(row_lengths[others], budget, _packs(_unwrapped(self.model)))
        plan += [(rows[others[batch]], False) for batch in batches]
        # Shortest first, after all others. A model keeps stretched rotations until it reads a longer row, or one that
        # does not need them.
        plan += [(rows[[row]], False) for row in np.argsort(row_lengths, kind="stable") if stretched[row]]
        return plan[::-1]

    def _passes(
        self, rows: np.ndarray, shared: bool, sequences: list[np.ndarray], counts: list[int], top_k: int
    ) -> Iterator[tuple[np.ndarray, list[Scores]]]:
        """Yields the rows of each forward pass and their scores."""
        sequences, counts = [sequences[row] for row in rows], [counts[row] for row in rows]
        if not shared:
            yield rows, _score_batch(self.model, sequences, counts, top_k, self._reading.from_hidden, self.num_tokens)
            return
        prompts = [sequence[: len(sequence) - count] for sequence, count in zip(sequences, counts, strict=True)]
        first, group, _ = _groups(prompts)
        prefix = _read_prompts(self.model, [prompts[row] for row in first])
        width = prefix.attention_mask.shape[1]
        room = self.max_batch_tokens - width * len(first)
        for batch in batches_of_like_length(width + np.array(counts), room):
            completions = [sequences[row][len(prompts[row]) :] for row in batch]
            yield (
                rows[batch],
                _score_completions(self.model, prefix, group[batch], completions, top_k, self.num_tokens),
            )


class RowError(OfflineOPDError, ValueError):
    """
    A sequence that cannot be scored.

    Attributes:
        row (`int`): Its index in the call of `score`.
    """

    def __init__(self, message: str, row: int):
        super().__init__(message)
        self.row = row


def batches_of_like_length(row_lengths: np.ndarray, max_tokens: int, packed: bool = False) -> Iterator[np.ndarray]:
    """
    Yields batches of rows of similar length, longest first, so that memory runs out in the first batch or never. A
    batch has at most `max_tokens` tokens, with padding, or without it if `packed`; a longer row is a batch by itself.
    """
    order = np.argsort(-row_lengths, kind="stable")
    ends = np.cumsum(row_lengths[order])
    start = 0
    while start < len(order):
        if packed:
            before = ends[start] - row_lengths[order[start]]
            size = int(np.searchsorted(ends, before + max_tokens, side="right")) - start
        else:
            size = max_tokens // int(row_lengths[order[start]])
        yield order[start : start + max(1, size)]
        start += max(1, size)


def _groups(prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups equal prompts. Returns the index of the first prompt of each group `(groups,)`, the group of each prompt
    `(prompts,)`, and the size of each group `(groups,)`."""
    seen: dict[bytes, int] = {}
    group = np.array([seen.setdefault(prompt.astype(np.int64).tobytes(), len(seen)) for prompt in prompts], dtype=int)
    first = np.unique(group, return_index=True)[1]
    return first, group, np.bincount(group)


# ---- Architectures ----


def _unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model that PEFT wraps, which has the adapters in its layers."""
    return model.get_base_model() if is_peft_model(model) else model


def only_attends(model: PreTrainedModel) -> bool:
    """Returns whether a sequence can be packed, or read after a cached prompt, instead of as a row from position 0."""
    config = model.config
    return (
        # Positions and sequence boundaries must reach the attention function, as keyword arguments of the forward.
        model._supports_attention_backend
        # State-space, linear-attention and convolution layers ignore the boundaries between sequences. Most
        # architectures with such layers set `_is_stateful`; the others list them in `layer_types`.
        and not model._is_stateful
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        # Some layers use the keys and values of another layer, or windows at fixed positions (chunks).
        and not any(
            getattr(config, n, None) for n in ("kv_sharing_modes", "num_kv_shared_layers", "attention_chunk_size")
        )
        # The positions of a multimodal model are not those of its tokens.
        and config.get_text_config() is config
        # With rotations that depend on the length, those of a prompt and its completions would differ.
        and stretches_from(model.config) == math.inf
    )


def _packs(model: PreTrainedModel) -> bool:
    """Returns whether sequences are concatenated. Attention implementations other than flash attention would need a
    mask of tokens x tokens for that."""
    return is_flash_attention_requested(model.config) and only_attends(model)


class _Reading(NamedTuple):
    """
    Methods that compute a model's own log-probabilities.

    Attributes:
        from_hidden (`bool`): Whether to compute logits from hidden states and the LM head, instead of with the model.
        together (`bool`): Whether to read several rows in one forward pass.
        shares_prompts (`bool`): Whether to read a prompt once for all its completions.
    """

    from_hidden: bool
    together: bool
    shares_prompts: bool


# Maximum number of the model's own logits in memory: 1 GiB in float32.
_MOST_LOGITS = 2**28


def _find_reading(model: PreTrainedModel) -> _Reading:
    """Returns the fastest methods that compute the model's own log-probabilities on a few short rows."""
    rows = trial_rows(model.config)
    device = model.get_input_embeddings().weight.device
    expected = [own_logprobs(model, row, device) for row in rows]
    name = type(_unwrapped(model)).__name__
    if ahead := reads_ahead(model, rows[0], expected[0], device):
        raise ValueError(not_causal(name, ahead))
    sequences, counts = [row.ids for row in rows], [row.completion_length for row in rows]

    def problem(score: Callable[[], list[Scores]]) -> str | None:
        try:
            return difference([scores.logprobs for scores in score()], expected)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an architecture without the attributes that scoring needs can raise anything
            return f"{type(error).__name__}: {error}"

    def alone(from_hidden: bool) -> list[Scores]:
        return [
            _score_batch(model, [sequence], [count], 0, from_hidden)[0]
            for sequence, count in zip(sequences, counts, strict=True)
        ]

    def shared() -> list[Scores]:
        prompts = [sequence[:-count] for sequence, count in zip(sequences, counts, strict=True)]
        first, group, _ = _groups(prompts)
        prefix = _read_prompts(model, [prompts[row] for row in first])
        completions = [sequence[-count:] for sequence, count in zip(sequences, counts, strict=True)]
        return _score_completions(model, prefix, group, completions, 0)

    from_hidden, batch_problem = True, problem(lambda: _score_batch(model, sequences, counts, 0))
    if batch_problem and (head_problem := problem(lambda: alone(True))):
        logger.warning(
            f"`{name}` is scored from its own logits, which takes more time and memory: log-probabilities rebuilt "
            f"from its hidden states are not its own ({head_problem})."
        )
        from_hidden = False
        batch_problem = problem(lambda: _score_batch(model, sequences, counts, 0, from_hidden=False))
    if batch_problem:
        if not from_hidden and (row_problem := problem(lambda: alone(False))):
            raise ValueError(f"The log-probabilities of `{name}` depend on more than the row it reads: {row_problem}.")
        logger.warning(
            f"`{name}` is scored a row at a time: other rows in a batch change its scores ({batch_problem})."
        )
    shares = not batch_problem and from_hidden and only_attends(_unwrapped(model))
    if shares and (cache_problem := problem(shared)):
        logger.warning(
            "Prompts of several completions are read again for each of them, because sharing them changes the "
            f"log-probabilities of `{name}` ({cache_problem})."
        )
        shares = False
    return _Reading(from_hidden, not batch_problem, shares)


# ---- Tokens in a forward pass ----

DEFAULT_BUDGET = 16384  # on devices whose free memory is not known
_MOST_TOKENS = 65536  # more tokens are no faster
_PROBE_TOKENS = 2048  # for the measurement of memory


def _fitting_tokens(used: int, tokens: int, free: int) -> int:
    """Returns how many tokens, a power of two, fit in 70 % of `free` bytes if `tokens` of them took `used` bytes."""
    fitting = max(1, int(0.7 * free * tokens / max(1, used)))
    return min(_MOST_TOKENS, 2 ** (fitting.bit_length() - 1))


@torch.inference_mode()
def _measured_budget(model: PreTrainedModel) -> int:
    """Returns how many tokens of a forward pass fit into the remaining memory of each of the model's CUDA devices."""
    model = _unwrapped(model)
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    if not devices:
        return DEFAULT_BUDGET
    tokens = min(_PROBE_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", _PROBE_TOKENS))
    before = {}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
        before[device] = torch.cuda.memory_allocated(device)
    input_ids = torch.zeros(1, tokens, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    try:
        # Include the cache that is needed to share prompts.
        backbone(model)(input_ids=input_ids, use_cache=only_attends(model))
    except torch.OutOfMemoryError:
        return max(1, tokens // 2)
    budgets = []
    for device in devices:
        used = torch.cuda.max_memory_allocated(device) - before[device]
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budgets.append(_fitting_tokens(used, tokens, torch.cuda.mem_get_info(device)[0] + idle))
    logger.info(f"{min(budgets)} tokens are scored at a time.")
    return min(budgets)


# ---- Forward passes ----


@torch.inference_mode()
def _score_batch(
    model: PreTrainedModel,
    sequences: list[np.ndarray],
    counts: list[int],
    top_k: int,
    from_hidden: bool = True,
    num_tokens: int | None = None,
) -> list[Scores]:
    """Scores the last tokens of each sequence in one forward pass."""
    inputs, ends = _inputs(_unwrapped(model), sequences)
    # A token is predicted at the preceding position.
    places = np.concatenate([np.arange(end - count, end) - 1 for end, count in zip(ends, counts, strict=True)])
    completions = [sequence[len(sequence) - count :] for sequence, count in zip(sequences, counts, strict=True)]
    if from_hidden:
        model = _unwrapped(model)
        hidden = backbone(model)(**inputs, use_cache=False).last_hidden_state
        return _scores_at(model, hidden.flatten(0, 1)[_to(hidden.device, places)], completions, top_k, num_tokens)
    # Prompt tuning puts virtual tokens before the rows, so positions are counted from the end.
    logits = model(**inputs).logits[:, -inputs["input_ids"].shape[1] :].flatten(0, 1)
    ids = _to(logits.device, np.concatenate(completions))
    return _split(score_logits(logits[_to(logits.device, places)], ids, top_k, num_tokens), completions)


def _inputs(model: PreTrainedModel, sequences: list[np.ndarray]) -> tuple[dict[str, Any], np.ndarray]:
    """Returns the inputs of the model for sequences, and the end of each sequence in the flattened batch."""
    device = model.get_input_embeddings().weight.device
    lengths = np.array([len(sequence) for sequence in sequences])
    if not _packs(model):
        input_ids, attention_mask = padded(sequences)
        ends = np.arange(len(lengths)) * lengths.max() + lengths
        return {"input_ids": _to(device, input_ids), "attention_mask": _to(device, attention_mask)}, ends
    ends = np.cumsum(lengths)
    boundaries = torch.from_numpy(np.concatenate([[0], ends])).to(device, torch.int32)
    return {
        "input_ids": _to(device, np.concatenate(sequences)[None]),
        "position_ids": _to(device, np.concatenate([np.arange(length) for length in lengths])[None]),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }, ends


class _Prefix(NamedTuple):
    """
    Prompts that have been read. They are padded on the left, because sliding windows reach back from the completions.

    Attributes:
        cache (`DynamicCache`): Their keys and values.
        attention_mask (`(prompts, width)` int64): Attention mask of the prompts.
        last_hidden (`(prompts, hidden)`): Hidden state of the last token of each prompt.
    """

    cache: DynamicCache
    attention_mask: np.ndarray
    last_hidden: torch.Tensor


@torch.inference_mode()
def _read_prompts(model: PreTrainedModel, prompts: list[np.ndarray]) -> _Prefix:
    """Reads prompts in one forward pass, and keeps their keys and values."""
    model = _unwrapped(model)
    device = model.get_input_embeddings().weight.device
    input_ids, attention_mask = padded(prompts, left=True)
    output = backbone(model)(
        input_ids=_to(device, input_ids),
        attention_mask=_to(device, attention_mask),
        position_ids=_to(device, np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)),
        past_key_values=DynamicCache(config=model.config),
        use_cache=True,
    )
    # Clone the last hidden states, because a view would keep those of all positions in memory.
    return _Prefix(output.past_key_values, attention_mask, output.last_hidden_state[:, -1].clone())


@torch.inference_mode()
def _score_completions(
    model: PreTrainedModel,
    prefix: _Prefix,
    prompt_of: np.ndarray,
    completions: list[np.ndarray],
    top_k: int,
    num_tokens: int | None = None,
) -> list[Scores]:
    """Scores completions in one forward pass; `prompt_of` has the index of the prompt of each."""
    model = _unwrapped(model)
    device = model.get_input_embeddings().weight.device
    hidden = prefix.last_hidden[_to(prefix.last_hidden.device, prompt_of)].unsqueeze(1)
    # The last token of a completion is not an input, and the first one is predicted by the prompt.
    input_ids, attention_mask = padded([completion[:-1] for completion in completions])
    width = input_ids.shape[1]
    if width:
        cache = copy.copy(prefix.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(torch.from_numpy(prompt_of))
        prompt_mask = prefix.attention_mask[prompt_of]
        completion_hidden = backbone(model)(
            input_ids=_to(device, input_ids),
            attention_mask=_to(device, np.concatenate([prompt_mask, attention_mask], axis=1)),
            position_ids=_to(device, prompt_mask.sum(1, keepdims=True) + np.arange(width)),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        hidden = torch.cat([hidden.to(completion_hidden.device), completion_hidden], dim=1)
    starts = np.arange(len(completions)) * (width + 1)
    places = np.concatenate([start + np.arange(len(c)) for start, c in zip(starts, completions, strict=True)])
    return _scores_at(model, hidden.flatten(0, 1)[_to(hidden.device, places)], completions, top_k, num_tokens)


def _scores_at(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    completions: list[np.ndarray],
    top_k: int,
    num_tokens: int | None = None,
) -> list[Scores]:
    """Scores completions from `hidden (tokens, hidden)`, the hidden states that predict their tokens."""
    head = model.get_output_embeddings()
    scores = score_tokens(
        hidden.to(head.weight.device),
        head.weight,
        head.bias,
        _to(head.weight.device, np.concatenate(completions)),
        top_k,
        LogitTransform.of(model.config),
        num_tokens,
    )
    return _split(scores, completions)


def _split(scores: tuple[torch.Tensor, torch.Tensor, torch.Tensor], completions: list[np.ndarray]) -> list[Scores]:
    """Splits the scores of all tokens by completion."""
    logprobs, topk_ids, topk_logprobs = scores
    arrays = [values.cpu().numpy() for values in (logprobs, topk_ids.int(), topk_logprobs.half())]
    splits = [np.split(values, np.cumsum([len(c) for c in completions])[:-1]) for values in arrays]
    return [Scores(*row) for row in zip(*splits, strict=True)]


def padded(sequences: list[np.ndarray], left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pads token ids with 0, on the right or with `left` on the left. Returns them and the attention mask, both
    `(rows, longest)` int64."""
    lengths = np.array([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    starts = width - lengths if left else np.zeros_like(lengths)
    input_ids, attention_mask = np.zeros((2, len(sequences), width), dtype=np.int64)
    for i, sequence in enumerate(sequences):
        input_ids[i, starts[i] : starts[i] + lengths[i]] = sequence
        attention_mask[i, starts[i] : starts[i] + lengths[i]] = 1
    return input_ids, attention_mask


def _to(device: torch.device, values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).to(device, torch.long)
