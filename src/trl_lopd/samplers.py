"""Samplers: what answers prompts. Those in this process are here, the one behind a server is in `served`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """
    How answers are drawn.

    Attributes:
        temperature (`float`): 0 decodes greedily.
        top_p (`float`): Nucleus sampling; 1 leaves the distribution whole.
        max_completion_length (`int`): In tokens; longer answers are cut.
        eos_token_ids (`tuple[int]`): Tokens that end an answer, and are its last.
        stop (`tuple[str]`): Texts that end an answer; the tokens that write them are kept.
        seed (`int`): Of the whole run.
    """

    temperature: float
    top_p: float
    max_completion_length: int
    eos_token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    seed: int

    def seed_of(self, answer: int) -> int:
        """Seed of one answer, by its number in the whole run: 32 bits."""
        return int(np.random.SeedSequence([self.seed, answer]).generate_state(1)[0])


class Sample(NamedTuple):
    """
    One answer.

    Attributes:
        ids (`list[int]`): Its tokens, at least one, with the end-of-sequence token if there is one.
        finish_reason (`str`): `"stop"` if it ended by itself or by a stop text, `"length"` if it was cut.
        logprobs (`list[float]`, *optional*): Of its tokens, in nats, at temperature 1 over the full vocabulary.
    """

    ids: list[int]
    finish_reason: str
    logprobs: list[float] | None


class Sampler(Protocol):
    """Anything that answers prompts."""

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
            sampling ([`Sampling`]): How.
            first (`int`): Number of the first answer in the whole run, on which the seeds depend.
            advance (`Callable`, *optional*): Called with the number of tokens of each answer when it is done.
        """
        ...
