"""Samplers, which answer prompts, with transformers in this process. Those for servers are in `servers`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from accelerate.utils import is_peft_model
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..own_logits import TrialRow, difference, evaluating, not_causal, own_logprobs, reads_ahead, trial_rows
from .options import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """
    One answer.

    Attributes:
        ids (`list[int]`): Its token ids, at least one, with the end-of-sequence token if there is one.
        finish_reason (`str`): `"stop"` if it ended with an end-of-sequence token or a stop text, `"length"` if it was
            truncated.
        logprobs (`list[float]`, *optional*): Log-probabilities of its tokens, in nats, at temperature 1 over the full
            vocabulary.
    """

    ids: list[int]
    finish_reason: str
    logprobs: list[float] | None


class Sampler(Protocol):
    """Protocol of objects that answer prompts."""

    def sample(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        first: int = 0,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> list[Sample]:
        """
        Answers each prompt once, in the order of the call.

        Args:
            prompts (`list[list[int]]`): Token ids; a prompt may occur several times.
            sampling ([`Sampling`]): Arguments of the sampling.
            first (`int`): Number of the first answer in the whole run, which determines the seeds.
            advance (`Callable`, *optional*): Called with the number of tokens of each answer when it is done.
        """
        ...


class TransformersSampler:
    """
    Sampler with a transformers model, in batches of prompts of similar length. Each batch has its own seed.

    The model's own generation config is ignored, because a repetition penalty in it, for instance, would change the
    policy that samples. Before the first batch, a few tokens are sampled and compared with the model's own
    log-probabilities. If padding before the prompt changes them, batches only have prompts of equal length.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, for stop texts.
        batch_size (`int`): Answers generated together.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._pads: bool | None = None

    def sample(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        first: int = 0,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> list[Sample]:
        """
        Answers each prompt once, see [`Sampler`].

        Raises:
            ValueError: If the model is not causal, or log-probabilities of sampled tokens differ from those of a
                forward pass.
        """
        # Batches of prompts of similar length have the least padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        samples: list[Sample | None] = [None] * len(prompts)
        with _set_up(self.model):
            if self._pads is None:
                self._pads = self._may_pad(sampling)
            start = 0
            while start < len(order):
                torch.manual_seed(sampling.seed_of(first + start))
                batch = order[start : start + self.batch_size]
                if not self._pads:
                    batch = [i for i in batch if len(prompts[i]) == len(prompts[batch[0]])]
                for i, sample in zip(batch, self._generate([prompts[i] for i in batch], sampling), strict=True):
                    samples[i] = sample
                    advance(len(sample.ids))
                start += len(batch)
        return samples

    def _may_pad(self, sampling: Sampling) -> bool:
        """Returns whether prompts of different lengths can be answered together."""
        device = self.model.get_input_embeddings().weight.device
        rows = trial_rows(self.model.config)
        prompts = [row.ids.tolist() for row in rows]
        short = replace(sampling, max_completion_length=3, eos_token_ids=(), stop=())

        def problem(prompts: list[list[int]]) -> str | None:
            samples = self._generate(prompts, short)
            expected = [
                own_logprobs(self.model, TrialRow(np.array([*prompt, *sample.ids]), len(sample.ids)), device)
                for prompt, sample in zip(prompts, samples, strict=True)
            ]
            return difference([np.array(sample.logprobs, np.float32) for sample in samples], expected)

        name = type(self.model).__name__
        if ahead := reads_ahead(self.model, rows[0], own_logprobs(self.model, rows[0], device), device):
            raise ValueError(not_causal(name, ahead))
        if not (padded := problem(prompts)):
            return True
        if single := problem(prompts[:1]):
            raise ValueError(
                f"`{name}` does not sample from its own distribution: log-probabilities of sampled tokens differ from "
                f"those of a forward pass over them ({single}). Does its cache work?"
            )
        logger.warning(
            f"Prompts of different lengths are answered in separate batches: padding before the prompt changes the "
            f"log-probabilities of `{name}` ({padded})."
        )
        return False

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Sample]:
        config = _generation_config(sampling, self.tokenizer)
        width = max(map(len, prompts))
        input_ids = torch.tensor([[config.pad_token_id] * (width - len(ids)) + ids for ids in prompts])
        attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        raw = _RawLogits()
        ends = _Ends(raw, width, sampling, self.tokenizer)
        output = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=attention_mask.to(self.model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([raw]),
            stopping_criteria=StoppingCriteriaList([ends]),
        )[:, width:].tolist()
        lengths = torch.where(ends.length > 0, ends.length, len(output[0])).tolist()
        logprobs = torch.stack(ends.logprobs, dim=1).tolist()
        return [
            Sample(ids[:length], "stop" if ended else "length", values[:length])
            for ids, values, length, ended in zip(output, logprobs, lengths, (ends.length > 0).tolist(), strict=True)
        ]


class _RawLogits(LogitsProcessor):
    """Logits processor that keeps the model's logits of a step. It runs before those for temperature and top-p."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits, self.log_z = scores, scores.logsumexp(-1)
        return scores


class _Ends(StoppingCriteria):
    """Stopping criterion that records the log-probability of each sampled token, and where an answer ends."""

    def __init__(self, raw: _RawLogits, width: int, sampling: Sampling, tokenizer: PreTrainedTokenizerBase):
        self.raw, self.width, self.logprobs, self.length = raw, width, [], torch.zeros((), dtype=torch.long)
        self.eos = torch.tensor(sampling.eos_token_ids, dtype=torch.long)
        self.tokenizer, self.stop = tokenizer, sampling.stop
        # Each token has at least one byte, so a stop text has at most as many tokens as bytes. One more token is
        # decoded, because the first one may lose a leading space.
        self.reach = max((len(text.encode()) for text in self.stop), default=0) + 1

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs) -> torch.Tensor:
        tokens = input_ids[:, -1:]
        self.logprobs.append(self.raw.logits.gather(-1, tokens).squeeze(-1) - self.raw.log_z)
        ended = torch.isin(tokens.squeeze(-1), self.eos.to(tokens.device))
        if self.stop:
            # Only decode sampled tokens, because a stop text that began in the prompt does not end the answer.
            tails = input_ids[:, max(self.width, input_ids.shape[1] - self.reach) :]
            texts = self.tokenizer.batch_decode(tails)
            ended |= torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=ended.device)
        new_end = ended & (self.length.to(ended.device) == 0)
        self.length = torch.where(new_end, len(self.logprobs), self.length.to(ended.device))
        return self.length > 0


class ContinuousBatchingSampler:
    """
    Sampler with a transformers model and continuous batching: when an answer ends, the next one starts immediately.

    All prompts of a call share one seed, that of the first answer. The schedule, and therefore the samples, also
    depend on how many sequences fit into memory.

    Args:
        model, tokenizer: As in [`TransformersSampler`].
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        if is_peft_model(model) and any(config.is_prompt_learning for config in model.peft_config.values()):
            raise ValueError(
                "Continuous batching does not see the virtual tokens of prompt tuning, prefix tuning and P-tuning. "
                'Use `engine="transformers"`.'
            )
        self.model, self.tokenizer = model, tokenizer

    def sample(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        first: int = 0,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> list[Sample]:
        """
        Answers each prompt once, see [`Sampler`]. Log-probabilities are only returned at temperature 1 and top-p 1,
        because they are those of the distribution after both were applied.

        Raises:
            ValueError: If there are stop texts, which continuous batching does not support.
            RuntimeError: If a request fails; transformers logs why.
        """
        if sampling.stop:
            raise ValueError('Continuous batching knows no `stop` texts. Use `engine="transformers"` or vLLM.')
        unchanged = sampling.temperature == sampling.top_p == 1
        with _set_up(self.model):
            outputs = self.model.generate_batch(
                prompts,
                generation_config=_generation_config(sampling, self.tokenizer),
                continuous_batching_config=ContinuousBatchingConfig(
                    return_logprobs=unchanged,
                    seed=sampling.seed_of(first),
                    # A share of the free memory. The default of nearly all is too much on a CPU.
                    max_memory_percent=None if self.model.device.type == "cuda" else 0.05,
                ),
                progress_bar=False,
            )
        failed = [output.error for output in outputs.values() if output.error is not None]
        if failed or len(outputs) != len(prompts):
            raise RuntimeError(
                f"Continuous batching lost {len(prompts) - len(outputs) + len(failed)} of {len(prompts)} requests"
                f"{f': {failed[0]}' if failed else '; what transformers logged above says why'}."
            )
        samples = []
        for output in outputs.values():
            ids = output.generated_tokens
            reason = "stop" if ids[-1] in sampling.eos_token_ids else "length"
            samples.append(Sample(ids, reason, output.logprobs if unchanged else None))
            advance(len(ids))
        return samples


def _generation_config(sampling: Sampling, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    eos_ids = list(sampling.eos_token_ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos_ids or [0])[0]
    kwargs = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=sampling.max_completion_length,
        eos_token_id=eos_ids,
        pad_token_id=pad,
        **(kwargs if sampling.temperature > 0 else {"do_sample": False}),
    )


@contextlib.contextmanager
def _set_up(model: PreTrainedModel) -> Iterator[None]:
    """Sets the model to evaluation mode with an empty generation config inside a `with` block. Restores the mode, the
    config and the random state afterwards."""
    generation_config = model.generation_config
    # `generate` would fill values that are not set in our config from the model's config.
    model.generation_config = GenerationConfig()
    try:
        with evaluating(model), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            yield
    finally:
        model.generation_config = generation_config
