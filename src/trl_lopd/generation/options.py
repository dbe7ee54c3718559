"""Options of loading, sampling and scoring, each written once: for Python, for the command line and for the pages."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
import yaml

ENGINES = ("transformers", "continuous_batching", "vllm")


def takes(options_class: type, **defaults: Any) -> Callable[[Callable], Callable]:
    """
    Gives a function the fields of a dataclass as keyword arguments; it gets them as one object, `options`.

    Args:
        options_class (`type`): The dataclass.
        **defaults: Of this function, where they differ from those of the dataclass.

    Returns:
        `Callable`: A decorator. The function's signature names every field, with its default.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = {name: kwargs.pop(name) for name in names if name in kwargs}
            return function(*args, options=options_class(**{**defaults, **given}), **kwargs)

        def default_of(of: Any) -> Any:
            value = of.default if of.default is not MISSING else of.default_factory()
            return defaults.get(of.name, value)

        names = [of.name for of in fields(options_class)]
        signature = inspect.signature(function)
        own = [parameter for name, parameter in signature.parameters.items() if name != "options"]
        added = [
            inspect.Parameter(of.name, inspect.Parameter.KEYWORD_ONLY, default=default_of(of), annotation=of.type)
            for of in fields(options_class)
        ]
        call.__signature__ = signature.replace(parameters=[*own, *added])
        return call

    return decorate


@dataclass(kw_only=True)
class LoadingOptions:
    """
    How a model is loaded from a directory or the Hub. A loaded model, or one on a server, needs none of them.

    Parameters:
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub repository.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run the Python code that a model or tokenizer ships.
        dtype (`str`, *optional*):
            Such as `"bfloat16"`. By default the checkpoint's own.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Other keyword arguments of `from_pretrained`, such as `{"device_map": "auto"}`, or of `vllm.LLM` with
            `engine="vllm"`. They come before the options above.
    """

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model on the Hub."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Whether to run the Python code that a model or tokenizer ships."},
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "Dtype to load the model in, such as bfloat16. By default the checkpoint's own."},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Other arguments for loading the model, as YAML or JSON, such as {device_map: auto}; with "
            "`engine: vllm`, of `vllm.LLM`."
        },
    )

    def __post_init__(self) -> None:
        self.model_init_kwargs = as_dict("model_init_kwargs", self.model_init_kwargs)

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """All of them, as keyword arguments of `from_pretrained`."""
        named = {"revision": self.revision, "trust_remote_code": self.trust_remote_code, "dtype": self.dtype}
        return {**{name: value for name, value in named.items() if value}, **(self.model_init_kwargs or {})}


@dataclass(kw_only=True)
class DecodingOptions:
    """
    How one answer is drawn.

    Parameters:
        temperature (`float`, *optional*):
            Sampling temperature. `0` decodes greedily. By default 0.8 for rollouts, 1 for SFT data, and 0.6 in
            evaluation.
        top_p (`float`, *optional*):
            Nucleus sampling. By default 1, and 0.95 in evaluation.
        max_completion_length (`int`, *optional*, defaults to `4096`):
            In tokens. Longer answers are cut; their `finish_reason` is `"length"`.
        stop (`str` or sequence of `str`, *optional*):
            Texts that end an answer, beside the end-of-sequence tokens. The tokens that write them are kept.
        batch_size (`int`, *optional*, defaults to `64`):
            Answers generated together by `engine="transformers"`; other engines decide for themselves.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling. The transformers engines give other samples with another `batch_size` or
            `rows_per_shard`. The caller's random state is left as it was.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            For the chat template, for instance `{"enable_thinking": False}`.

    Raises:
        ValueError: If a value is out of range.
    """

    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Sampling temperature; 0 decodes greedily. By default 0.8 for rollouts, 1 for SFT data, and 0.6 "
            "in evaluation."
        },
    )
    top_p: float | None = field(
        default=None, metadata={"help": "Nucleus sampling. By default 1, and 0.95 in evaluation."}
    )
    max_completion_length: int = field(default=4096, metadata={"help": "Tokens an answer may have."})
    stop: list[str] = field(default_factory=list, metadata={"help": "Texts that end an answer."})
    batch_size: int = field(default=64, metadata={"help": "Answers that the transformers engine generates together."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "For the chat template, as YAML or JSON, such as {enable_thinking: false}."},
    )

    def __post_init__(self) -> None:
        self.chat_template_kwargs = as_dict("chat_template_kwargs", self.chat_template_kwargs)
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop)
        # Also false of NaN, which compares with nothing.
        if self.temperature is not None and not (
            isinstance(self.temperature, Real) and 0 <= self.temperature < math.inf
        ):
            raise ValueError(f"`temperature` is a number, 0 or more, not {self.temperature!r}.")
        if self.top_p is not None and not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise ValueError(f"`top_p` is a number above 0 and at most 1, not {self.top_p!r}.")
        check_whole_numbers(1, max_completion_length=self.max_completion_length, batch_size=self.batch_size)
        check_whole_numbers(0, seed=self.seed)
        if "" in self.stop:
            raise ValueError("An empty text in `stop` would end every answer at its first token.")

    def sampling(self, eos_token_ids: tuple[int, ...]) -> Sampling:
        """What a [`~samplers.Sampler`] is told; the end-of-sequence tokens are the model's."""
        drawn = {name: getattr(self, name) for name in ("temperature", "top_p", "max_completion_length", "seed")}
        return Sampling(eos_token_ids=eos_token_ids, stop=tuple(self.stop), **drawn)


@dataclass(frozen=True)
class Sampling:
    """
    How a [`~samplers.Sampler`] draws answers.

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


@dataclass(kw_only=True)
class SamplingOptions(LoadingOptions, DecodingOptions):
    """
    How a model's answers to prompts are sampled: [`LoadingOptions`], [`DecodingOptions`], and what samples.

    Parameters:
        engine (`str` or [`Sampler`], *optional*, defaults to `"transformers"`):
            What samples: `"transformers"`, in batches of `batch_size`; `"continuous_batching"`, transformers' own, for
            answers of very different lengths; `"vllm"`, in this process (`pip install 'trl-lopd[vllm]'`); or a server
            that serves the model, its address or `VLLMServer("http://localhost:8000")`. With the last two, each answer
            has a seed of its own.
        num_generations (`int`, *optional*, defaults to `1`):
            Answers a prompt; they follow one another in the result.
        rows_per_shard (`int`, *optional*):
            Prompts whose answers are sampled, and written, together. By default those of about 1,024 answers.

    Raises:
        ValueError: If a value is out of range.
    """

    engine: str = field(
        default="transformers",
        metadata={"help": f"{', '.join(ENGINES)}, or the address of a vLLM server, such as http://localhost:8000."},
    )
    num_generations: int = field(default=1, metadata={"help": "Answers a prompt."})
    rows_per_shard: int | None = field(
        default=None,
        metadata={
            "help": "Prompts that are answered and written together; a kill loses one shard. By default those of "
            "about 1,024 answers."
        },
    )

    def __post_init__(self) -> None:
        LoadingOptions.__post_init__(self)
        DecodingOptions.__post_init__(self)
        check_whole_numbers(1, num_generations=self.num_generations)
        if self.rows_per_shard is None:
            self.rows_per_shard = max(1, 1024 // self.num_generations)
        check_whole_numbers(1, rows_per_shard=self.rows_per_shard)


@dataclass(kw_only=True)
class RolloutOptions(SamplingOptions):
    """
    How rollouts and SFT data are sampled: [`SamplingOptions`], and what becomes of an answer.

    Parameters:
        truncated (`str`, *optional*):
            Whether to `"keep"` answers that were cut, or to `"drop"` them. They are counted either way. By default
            rollouts are kept and SFT data dropped.
    """

    truncated: str | None = field(
        default=None,
        metadata={
            "help": 'Whether to "keep" or "drop" answers that were cut. By default rollouts are kept and SFT data is '
            "dropped."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.truncated not in (None, "keep", "drop"):
            raise ValueError(f'`truncated` is "keep" or "drop", not {self.truncated!r}.')


@dataclass(kw_only=True)
class ScoringOptions(LoadingOptions):
    """
    How a teacher scores.

    Parameters:
        top_k (`int`, *optional*, defaults to `8`):
            Also store the teacher's most likely tokens at each position. `0` stores none; the trainer then has only
            the sampled-token objective.
        max_batch_tokens (`int`, *optional*):
            Tokens of a forward pass, padding and cached prompts included. A longer row is scored alone. By default
            16,384 on a CPU, and on CUDA as many as fit, measured once for a table. Halved when memory runs out.
        rows_per_shard (`int`, *optional*, defaults to `4096`):
            Rows that are sorted by length together, and written together.

    Raises:
        ValueError: If a value is out of range.
    """

    top_k: int = field(default=8, metadata={"help": "The teacher's most likely tokens to store at each position."})
    max_batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of a forward pass of a local teacher. By default what fits."},
    )
    rows_per_shard: int = field(
        default=4096,
        metadata={"help": "Rows that are scored and written together. A kill loses one shard."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_numbers(0, top_k=self.top_k)
        check_whole_numbers(1, rows_per_shard=self.rows_per_shard)
        if self.max_batch_tokens is not None:
            check_whole_numbers(1, max_batch_tokens=self.max_batch_tokens)


def check_whole_numbers(least: int, **options: Any) -> None:
    """
    Raises:
        ValueError: If an option, given by its name, is no whole number of at least `least`.
    """
    for name, value in options.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` is a whole number, {least} or more, not {value!r}.")


def as_dict(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """
    A dictionary from the value of an option, which is YAML or JSON on the command line.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)  # JSON too
        except yaml.YAMLError as error:
            raise ValueError(f"`{name}` is no YAML: {' '.join(str(error).split())}") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"`{name}` is a dictionary such as '{{dtype: bfloat16}}', not {value!r}.")
    return value
