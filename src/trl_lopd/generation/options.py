"""Options of loading, sampling and scoring, defined once for Python, the command line and the documentation."""

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

# Defaults that depend on what is sampled. Those of rollouts are the paper's (Lightning OPD, stage 2).
ROLLOUT_DEFAULTS = {"temperature": 0.8, "top_p": 1.0, "truncated": "keep"}
SFT_DATA_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "truncated": "drop"}
EVALUATION_DEFAULTS = {"temperature": 0.6, "top_p": 0.95}
GREEDY_DEFAULTS = {"temperature": 0.0, "top_p": 1.0}


def takes(options_class: type, **defaults: Any) -> Callable[[Callable], Callable]:
    """
    Adds the fields of a dataclass to the keyword arguments of a function, which gets them as one object, `options`.

    Args:
        options_class (`type`): The dataclass.
        **defaults: Defaults of this function that differ from those of the dataclass.

    Returns:
        `Callable`: A decorator. The signature of the decorated function has every field with its default.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            values = {name: kwargs.pop(name) for name in names if name in kwargs}
            # `None` is the default of an option that has one.
            values = {name: value for name, value in values.items() if value is not None or name not in defaults}
            return function(*args, options=options_class(**{**defaults, **values}), **kwargs)

        def default_of(option: Any) -> Any:
            value = option.default if option.default is not MISSING else option.default_factory()
            return defaults.get(option.name, value)

        options = fields(options_class)
        names = [option.name for option in options]
        signature = inspect.signature(function)
        parameters = [parameter for name, parameter in signature.parameters.items() if name != "options"]
        parameters += [
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=default_of(option), annotation=option.type
            )
            for option in options
        ]
        call.__signature__ = signature.replace(parameters=parameters)
        return call

    return decorate


@dataclass(kw_only=True)
class LoadingOptions:
    """
    Options for loading a model from a directory or the Hub. They are not used for loaded and for served models.

    Parameters:
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub repository.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run the Python code that a model or tokenizer ships.
        dtype (`str`, *optional*):
            Dtype to load the model in, such as `"bfloat16"`. By default the checkpoint's own.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Other keyword arguments of `from_pretrained`, such as `{"device_map": "auto"}`, or of `vllm.LLM` with
            `engine="vllm"`. They take precedence over the options above.
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
        """Returns all options as keyword arguments of `from_pretrained`."""
        named = {"revision": self.revision, "trust_remote_code": self.trust_remote_code, "dtype": self.dtype}
        return {**{name: value for name, value in named.items() if value}, **(self.model_init_kwargs or {})}


@dataclass(kw_only=True)
class DecodingOptions:
    """
    Options for drawing one answer.

    Parameters:
        temperature (`float`, *optional*):
            Sampling temperature. `0` decodes greedily. By default 0.8 for rollouts, 1 for SFT data, and 0.6 in
            evaluation.
        top_p (`float`, *optional*):
            Nucleus sampling. By default 1, and 0.95 in evaluation.
        max_completion_length (`int`, *optional*, defaults to `4096`):
            Maximum length of an answer, in tokens. Longer answers are truncated; their `finish_reason` is `"length"`.
        stop (`str` or sequence of `str`, *optional*):
            Texts that end an answer, in addition to the end-of-sequence tokens. Their tokens are kept.
        batch_size (`int`, *optional*, defaults to `64`):
            Number of answers that `engine="transformers"` generates together. Other engines ignore it.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling. The samples of the transformers engines also depend on `batch_size` and
            `rows_per_shard`. The global random state is not changed.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for the chat template, for instance `{"enable_thinking": False}`.

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
    max_completion_length: int = field(default=4096, metadata={"help": "Maximum length of an answer, in tokens."})
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
        # The comparison is also false for NaN.
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
        """Returns the arguments for a [`~samplers.Sampler`], with the end-of-sequence tokens of the model."""
        kwargs = {name: getattr(self, name) for name in ("temperature", "top_p", "max_completion_length", "seed")}
        return Sampling(eos_token_ids=eos_token_ids, stop=tuple(self.stop), **kwargs)


@dataclass(frozen=True)
class Sampling:
    """
    Arguments with which a [`~samplers.Sampler`] draws answers.

    Attributes:
        temperature (`float`): Sampling temperature; 0 decodes greedily.
        top_p (`float`): Nucleus sampling; 1 keeps the whole distribution.
        max_completion_length (`int`): Maximum length of an answer, in tokens; longer answers are truncated.
        eos_token_ids (`tuple[int]`): Tokens that end an answer, as its last token.
        stop (`tuple[str]`): Texts that end an answer. Their tokens are kept.
        seed (`int`): Seed of the whole run.
    """

    temperature: float
    top_p: float
    max_completion_length: int
    eos_token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    seed: int

    def seed_of(self, answer: int) -> int:
        """Returns the seed, 32 bits, of one answer from its number in the whole run."""
        return int(np.random.SeedSequence([self.seed, answer]).generate_state(1)[0])


@dataclass(kw_only=True)
class SamplingOptions(LoadingOptions, DecodingOptions):
    """
    Options for sampling a model's answers to prompts: [`LoadingOptions`], [`DecodingOptions`], and the engine.

    Parameters:
        engine (`str` or [`Sampler`], *optional*, defaults to `"transformers"`):
            Engine that samples: `"transformers"`, in batches of `batch_size`; `"continuous_batching"`, that of
            transformers, for answers of very different lengths; `"vllm"`, in this process
            (`pip install 'trl-lopd[vllm]'`); or a server of the model, given by its address or as
            `VLLMServer("http://localhost:8000")`. With the last two, each answer has its own seed.
        num_generations (`int`, *optional*, defaults to `1`):
            Number of answers per prompt. They are consecutive rows of the result.
        rows_per_shard (`int`, *optional*):
            Number of prompts whose answers are sampled and written together. By default, a shard has about 1,024
            answers.

    Raises:
        ValueError: If a value is out of range.
    """

    engine: str = field(
        default="transformers",
        metadata={"help": f"{', '.join(ENGINES)}, or the address of a vLLM server, such as http://localhost:8000."},
    )
    num_generations: int = field(default=1, metadata={"help": "Number of answers per prompt."})
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
    Options for sampling rollouts and SFT data: [`SamplingOptions`], and whether truncated answers are kept.

    Parameters:
        truncated (`str`, *optional*):
            Whether to `"keep"` or to `"drop"` truncated answers. They are counted in both cases. By default, those in
            rollouts are kept and those in SFT data dropped.
    """

    truncated: str | None = field(
        default=None,
        metadata={
            "help": 'Whether to "keep" or "drop" truncated answers. By default, those in rollouts are kept and those '
            "in SFT data dropped."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.truncated not in (None, "keep", "drop"):
            raise ValueError(f'`truncated` is "keep" or "drop", not {self.truncated!r}.')


@dataclass(kw_only=True)
class ScoringOptions(LoadingOptions):
    """
    Options for scoring with a teacher.

    Parameters:
        top_k (`int`, *optional*, defaults to `8`):
            Number of the teacher's most likely tokens to store at each position. With `0`, the trainer can only use
            the sampled-token objective.
        max_batch_tokens (`int`, *optional*):
            Number of tokens in a forward pass, padding and cached prompts included. A longer row is scored alone. By
            default 16,384 on a CPU, and on CUDA as many as fit, measured once for a table. Halved when memory runs
            out.
        rows_per_shard (`int`, *optional*, defaults to `4096`):
            Number of rows that are sorted by length and written together.

    Raises:
        ValueError: If a value is out of range.
    """

    top_k: int = field(default=8, metadata={"help": "The teacher's most likely tokens to store at each position."})
    max_batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Number of tokens in a forward pass of a local teacher. By default as many as fit."},
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
    Checks that options are whole numbers of at least `least`.

    Raises:
        ValueError: If an option is not; the message has its name.
    """
    for name, value in options.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` is a whole number, {least} or more, not {value!r}.")


def as_dict(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """
    Converts the value of an option, which is YAML or JSON on the command line, to a dictionary.

    Raises:
        ValueError: If the value is neither a dictionary nor YAML or JSON of one, or a space is missing after a colon.
    """
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)  # JSON too
        except yaml.YAMLError as error:
            raise ValueError(f"`{name}` is no YAML: {' '.join(str(error).split())}") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"`{name}` is a dictionary such as '{{dtype: bfloat16}}', not {value!r}.")
    for key, of in (value or {}).items():
        if of is None and isinstance(key, str) and 0 < key.find(":") < len(key) - 1:
            before, _, after = key.partition(":")
            raise ValueError(
                f"`{name}` has the key {key!r} without a value: a space is missing. YAML needs one after the colon, "
                f"'{{{before}: {after}}}'."
            )
    return value
