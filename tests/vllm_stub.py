"""The `vllm` module in miniature: its documented Python API over a tiny model."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

import servers


@dataclass
class SamplingParams:
    """Of vLLM 0.11, with the limit of 0.32: a name that is not here is a TypeError there too."""

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    include_stop_str_in_output: bool = False
    bad_words: list[str] = field(default_factory=list)
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list | None
    outputs: list[CompletionOutput]
    finished: bool


def module(model, texts: list[str], end_of: tuple[int, ...] = (1, 7)) -> types.ModuleType:
    """
    A `vllm` whose `LLM` samples from `model`, with the text of each token and end-of-sequence tokens of its own.

    Its list `engines` holds each `LLM` that was made, with its `options` and the parameters of its `calls`; `edit`
    changes an answer, a `CompletionOutput`.
    """

    class LLM:
        def __init__(self, model: str, *, logprobs_mode: str = "raw_logprobs", **options: Any):
            self.options = {"model": model, "logprobs_mode": logprobs_mode, **options}
            self.calls: list[list[SamplingParams]] = []
            vllm.engines.append(self)

        def generate(
            self, prompts: list[dict], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
        ) -> list[RequestOutput]:
            assert not use_tqdm and len(prompts) == len(sampling_params)
            self.calls.append(sampling_params)
            return [self._answer(*request) for request in enumerate(zip(prompts, sampling_params, strict=True))]

        def _answer(self, number: int, request: tuple[dict, SamplingParams]) -> RequestOutput:
            prompt, parameters = request[0]["prompt_token_ids"], request[1]
            answer = servers.vllm_sample(model, prompt, {**vars(parameters), "eos_token_id": list(end_of)}, texts)
            logprobs = None
            if parameters.logprobs is not None:
                # The most likely tokens, as many as asked for, and always the sampled one.
                logprobs = [
                    {
                        token: Logprob(row[token].item(), decoded_token=texts[token])
                        for token in [id, *row.topk(parameters.logprobs).indices.tolist()]
                    }
                    for id, row in zip(answer.ids, answer.raw, strict=True)
                ]
            total = (
                None if logprobs is None else sum(d[id].logprob for id, d in zip(answer.ids, logprobs, strict=True))
            )
            reasons = answer.finish_reason, answer.stop_reason
            output = CompletionOutput(0, answer.text, tuple(answer.ids), total, logprobs, *reasons)
            vllm.edit(output)
            return RequestOutput(str(number), None, prompt, None, [output], True)

    vllm = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams, vllm.engines, vllm.edit = LLM, SamplingParams, [], lambda output: None
    return vllm
