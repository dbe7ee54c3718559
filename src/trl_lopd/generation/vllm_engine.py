"""Sampler with vLLM in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers.utils import find_adapter_config_file

from .samplers import Sample, Sampling
from .servers import Failure, checked_sample, sampling_parameters


class VLLMEngine:
    """
    [`Sampler`] with `vllm.LLM` in this process. It holds the accelerator's memory until it is deleted.

    Args:
        model (`str`): A local directory or Hub id of a whole model.
        **llm_kwargs: Arguments of `vllm.LLM`, such as `tensor_parallel_size`, `max_model_len`, `dtype` or `revision`.

    Raises:
        ImportError: If vLLM is not installed.
        ValueError: If the model is an adapter, or `logprobs_mode` is not `"raw_logprobs"`, vLLM's name for
            log-probabilities at temperature 1 over the full vocabulary.
    """

    def __init__(self, model: str, **llm_kwargs: Any):
        if find_adapter_config_file(model, revision=llm_kwargs.get("revision")) is not None:
            raise ValueError(
                f"{model} is an adapter, and vLLM loads whole models. Merge it into its base first: "
                f"`AutoPeftModelForCausalLM.from_pretrained({model!r}).merge_and_unload().save_pretrained(...)`, and "
                "save its tokenizer to the same directory."
            )
        if (mode := llm_kwargs.setdefault("logprobs_mode", "raw_logprobs")) != "raw_logprobs":
            raise ValueError(
                f"`logprobs_mode` is {mode!r}: the log-probabilities of samples are to be those at temperature 1 over "
                "the full vocabulary, `raw_logprobs`. Leave the option out."
            )
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                f"vLLM cannot be imported ({error}). Install it with `pip install 'trl-lopd[vllm]'`, sample through a "
                "server with `VLLMServer`, or with transformers."
            ) from error
        self.model = model
        self._parameters, self._llm = vllm.SamplingParams, vllm.LLM(model=model, **llm_kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r})"

    def sample(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        first: int = 0,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> list[Sample]:
        """
        Answers each prompt once, see [`Sampler`]. vLLM gets all prompts at once and schedules them itself; `advance`
        is called when all are answered. The model's generation config, with its end-of-sequence tokens, is not used.

        Raises:
            RuntimeError: If an answer is wrong: it lacks a log-probability, was aborted, was truncated before
                `max_completion_length` because the context is full, or ends with a token that is not an
                end-of-sequence token.
            ValueError: If a prompt is empty or longer than the context (raised by vLLM).
        """
        if not prompts:
            return []
        # With `logprobs=0`, vLLM returns the log-probability of the sampled token only.
        parameters = [
            self._parameters(**sampling_parameters(sampling, first + row), logprobs=0) for row in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": np.asarray(prompt).tolist()} for prompt in prompts]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        samples = []
        for number, request in enumerate(outputs, first):
            (answer,) = request.outputs
            ids = list(answer.token_ids)
            positions = zip(ids, answer.logprobs or [], strict=False)
            logprobs = [position[token_id].logprob for token_id, position in positions]
            try:
                sample = checked_sample(ids, logprobs, answer.finish_reason, answer.stop_reason, sampling)
            except Failure as failure:
                raise RuntimeError(f"Answer {number}, {self.model}: {failure.what}. {failure.remedy}") from None
            samples.append(sample)
            advance(len(ids))
        return samples
