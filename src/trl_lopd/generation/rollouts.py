"""Sampling of answers to prompts: rollouts of a student, or SFT data of its teacher."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from trl.data_utils import is_conversational

from ..identity.cards import count_teachers, entry, read_dataset_card, read_model_card
from ..identity.fingerprint import fingerprint_teacher, with_evidence
from ..identity.probes import probes_of_run
from ..models import (
    Positions,
    check_positions,
    eos_token_ids,
    free_memory,
    hub_kwargs,
    load_model,
    load_tokenizer,
    pinned_kwargs,
    positions_of,
    stretches_from,
    warn_of_altering_kwargs,
)
from ..names import as_name
from ..processes import on_main_process, own_device, processes
from ..table.schema import TOKEN_COLUMNS, describe, lengths, refuse_no_dataset, teacher_counts
from .addresses import is_address, served_model
from .options import ENGINES, ROLLOUT_DEFAULTS, SFT_DATA_DEFAULTS, RolloutOptions, Sampling, takes
from .prompts import Prompt, as_dataset, continues_answers, encode_prompts, warn_of_texts
from .runs import ShardedRun, take
from .samplers import ContinuousBatchingSampler, Sample, Sampler, TransformersSampler
from .servers import VLLMServer
from .several import naming, of_each, recorded, refuse_list, remove_parts, row_numbers, run_parts, split_rows
from .teachers import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..identity.fingerprint import TeacherFingerprint

logger = logging.getLogger(__name__)

# Columns that sampling writes. If the prompts have them, they are replaced.
WRITTEN_COLUMNS = (
    *("prompt_ids", "completion_ids", "completion", "finish_reason", "student_fingerprint", "teacher_fingerprint"),
    *TOKEN_COLUMNS,  # per-token columns of a table that is answered again are about its old answers
)
# Columns that TRL's `SFTTrainer` would read instead of `prompt` and `completion`.
SFT_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks", "messages", "text")


@takes(RolloutOptions, **ROLLOUT_DEFAULTS)
def collect_rollouts(
    prompts: Dataset | Sequence[Prompt],
    student: str | Path | PreTrainedModel,
    *,
    output_dir: str | Path | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    ref_logprobs: bool = True,
    fingerprint: TeacherFingerprint | None = None,
    options: RolloutOptions,
) -> Dataset:
    """
    Samples the student's answers (Lightning OPD, stage 2: temperature 0.8, top-p 1, one answer per prompt, up to 4096
    tokens).

    With `output_dir`, each shard is written to disk when it is done. A run that was killed continues when it is
    started again with the same arguments, and samples the same tokens. `load_dataset(output_dir)` and
    `load_table(output_dir)` read the result. Under `accelerate launch`, every process samples its share of the shards.

    Args:
        prompts ([`~datasets.Dataset`] or sequence):
            Plain texts or lists of chat messages; or a dataset with such a `prompt` column, whose other columns are
            kept. The tokenizer's chat template is applied to messages, with the columns `tools` and
            `chat_template_kwargs` if there are any, as in TRL. If the last message is the assistant's, the answer
            continues it.
        student (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            A local directory or Hub id, also of an adapter; a loaded model; or the address of a vLLM server that
            serves the student from a directory or Hub id that this process can read too. Its own generation config is
            ignored, except for the end-of-sequence tokens, because a repetition penalty in it, for instance, would
            change the policy that samples.
        output_dir (`str` or `Path`, *optional*):
            Directory to write the rollouts to, shard by shard. Without it, they are only in memory, and lost if the
            process dies.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. Loaded from the student's path if not given.
        ref_logprobs (`bool`, *optional*, defaults to `True`):
            Whether to add the student's own log-probabilities, at temperature 1 over the full vocabulary. Engines
            return them with the tokens, in their own precision. Continuous batching does so only at temperature 1 and
            top-p 1; otherwise they are computed afterwards.
        fingerprint ([`TeacherFingerprint`], *optional*):
            The student's fingerprint. If not given, it is computed from the checkpoint of a path, or from the weights
            of a loaded model. A given one counts as declared.
        **options:
            The fields of [`~generation.options.RolloutOptions`]: `temperature` (0.8), `top_p` (1), `engine`,
            `num_generations`, `max_completion_length`, `stop`, `truncated` (`"keep"`), `batch_size`, `rows_per_shard`,
            `seed`, `chat_template_kwargs`, `revision`, `trust_remote_code`, `dtype`, `model_init_kwargs`.

    Returns:
        [`~datasets.Dataset`]: One row per answer: the columns of `prompts`, and, replacing columns of the same names,
        `prompt_ids` and `completion_ids` (`list<int32>`, with an end-of-sequence token if there is one), `completion`
        (the decoded text), `finish_reason` (`"stop"` or `"length"`), `ref_logprobs` (`list<float32>`) and
        `student_fingerprint`, which counts as declared if a server sampled. It carries a record of the student, the
        SFT teachers that its card names, and the sampling: see `cards`.

    Raises:
        ValueError: No prompts, an empty prompt, no `prompt` column, an option out of range, an option that the engine
            does not support, several processes without `output_dir`, no answer left, or a loaded model that cannot be
            fingerprinted.
        ShardError: `output_dir` has other content or another run's rollouts, or another process writes to it.
        ServerError: A server cannot be used.
    """
    given = {"processing_class": processing_class, "fingerprint": fingerprint}
    prompts, answerers = answerers_of(prompts, student, "student", options, ref_logprobs=ref_logprobs, **given)
    columns = answerers[None][1]
    model = columns.model
    name = model.source if isinstance(model.source, str) else model.source.config._name_or_path
    card = read_model_card(name, options.init_kwargs.get("revision")) if name else {}
    sft_teachers = [teacher["id"] for teacher in card.get("sft_teachers") or []]
    answers, about, _ = _run(prompts, columns, output_dir)
    return recorded(answers, {"students": [about | {"sft_teachers": sft_teachers}]}, output_dir)


@takes(RolloutOptions, **SFT_DATA_DEFAULTS)
def generate_sft_data(
    prompts: Dataset | Sequence[Prompt],
    teacher: str | Path | PreTrainedModel | dict[str, str | Path | PreTrainedModel],
    *,
    teacher_column: str | None = None,
    output_dir: str | Path | None = None,
    processing_class: PreTrainedTokenizerBase | dict[str, PreTrainedTokenizerBase] | None = None,
    fingerprint: TeacherFingerprint | dict[str, TeacherFingerprint] | None = None,
    options: RolloutOptions,
) -> Dataset:
    """
    Samples the teacher's answers for fine-tuning the student (Lightning OPD, stage 1). Each row has the teacher's
    fingerprint, which `TeacherStampCallback` reads when TRL's `SFTTrainer` trains on the result.

    Args:
        prompts, output_dir, processing_class, fingerprint:
            As in [`collect_rollouts`], for the teacher instead of the student.
        teacher (`str`, `Path`, [`~transformers.PreTrainedModel`] or `dict`):
            A local directory or Hub id, a loaded model, or the address of a vLLM server, as in [`collect_rollouts`].
            Several teachers are a `dict` of such by name, `{"math": ..., "code": ...}`: each answers the prompts that
            name it, one teacher after the other. `processing_class` and `fingerprint` are then `dict`s by name, too.
        teacher_column (`str`, *optional*):
            With several teachers, the column with the name of each prompt's teacher. Defaults to `"teacher_id"`, as in
            TRL; the names in another column are copied to `teacher_id`.
        **options:
            The fields of [`~generation.options.RolloutOptions`], as in [`collect_rollouts`], with the defaults 1 for
            `temperature` and `"drop"` for `truncated`: `SFTTrainer` ends every text with an end-of-sequence token, so
            the student would learn from truncated answers to stop in the middle. With `"keep"`, rows also have
            `input_ids`, which `SFTTrainer` uses unchanged.

    Returns:
        [`~datasets.Dataset`]: One row per answer: the columns of `prompts`, `completion` (text; a list with one
        assistant message if the prompt is a list of messages), `prompt_ids` and `completion_ids` (`list<int32>`, with
        an end-of-sequence token if there is one), `finish_reason`, and `teacher_fingerprint`. If `SFTTrainer` could
        tokenize the texts differently, it also has `input_ids`, prompt and answer, which end with an end-of-sequence
        token if and only if the answer was not truncated, and `completion_mask`, false on the prompt, which is used
        while `prompt` and `completion` stay beside it. That is the case with `truncated="keep"`, with
        `chat_template_kwargs`, and if a prompt ends with a turn of the assistant, which the answer continues. Columns
        of `prompts` that `SFTTrainer` would read instead (`input_ids`, `labels`, `messages`, `text`, ...) are removed.
        It carries a record of the teacher, the sampling, and, with the
        transformers engines, the teacher's answers to the probes: see `cards` and `probes`.

    Raises:
        ValueError, ShardError, ServerError: As in [`collect_rollouts`].
        TableError: A prompt names none of several teachers, or a teacher has no prompts.
    """
    given = {"processing_class": processing_class, "fingerprint": fingerprint}
    prompts, answerers = answerers_of(prompts, teacher, "teacher", options, teacher_column, **given)
    if isinstance(teacher, dict):
        return _collect_parts(prompts, answerers, output_dir)
    answers, about, _ = _run(*answerers[None], output_dir)
    return recorded(answers, {"sft_teachers": count_teachers(teacher_counts(answers), [about])}, output_dir)


def answerers_of(
    prompts: Dataset | Sequence[Prompt],
    model: Any,
    role: str,
    options: RolloutOptions,
    teacher_column: str | None = None,
    ref_logprobs: bool = False,
    **given: Any,
) -> tuple[Dataset, dict[str | None, tuple[Dataset, AnswerColumns]]]:
    """
    Finds who answers which prompts, and whether they can, before anything is sampled; for the arguments see
    [`collect_rollouts`] and [`generate_sft_data`].

    Returns:
        `tuple[Dataset, dict]`: The prompts; and those of each model with its [`AnswerColumns`], by its name, or `None`
        if there is one.
    """
    if role == "teacher":
        refuse_list(model, role)
    if role == "student" or not isinstance(model, dict):
        if teacher_column is not None:
            raise ValueError("`teacher_column` is for several teachers, a dictionary of them by name.")
        one = _Model.resolve(model, role, options, **given)
        prompts = _prepare_prompts(prompts, one)
        return prompts, {None: (prompts, AnswerColumns.of(prompts, one, ref_logprobs))}
    refuse_no_dataset(prompts, "prompts")
    prompts, parts = split_rows(prompts, model, teacher_column)
    given_each = of_each(model, **given)
    models = {}
    for name, source in model.items():
        with naming(name):
            models[name] = _Model.resolve(source, role, options, **given_each[name])
    # All prompts first, for errors that name the prompt of all.
    first = next(iter(models.values()))
    as_dataset(prompts, first.tokenizer, options.chat_template_kwargs or {})
    with_input_ids, answerers = _need_input_ids(prompts, first), {}
    for name, rows in parts.items():
        rows = _prepare_prompts(rows, models[name])
        answerers[name] = rows, replace(AnswerColumns.of(rows, models[name]), with_input_ids=with_input_ids)
    return prompts, answerers


@dataclass
class _Model:
    """
    Model that answers. It is loaded when it is first needed.

    Attributes:
        source (`str` or [`~transformers.PreTrainedModel`]): A directory or Hub id, or a loaded model.
        role (`str`): `"student"` or `"teacher"`.
        engine (`str` or [`Sampler`]): Engine that samples.
        options ([`RolloutOptions`]): Options of the sampling.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        fingerprint ([`TeacherFingerprint`]): Its fingerprint.
        is_declared (`bool`): Whether only the user says that the fingerprint is the model's: it was given, the model
            is on a server, or it is loaded with options that may make it another than its checkpoint.
    """

    source: str | PreTrainedModel
    role: str
    engine: str | Sampler
    options: RolloutOptions
    tokenizer: PreTrainedTokenizerBase
    fingerprint: TeacherFingerprint
    is_declared: bool

    @classmethod
    def resolve(
        cls,
        source: str | Path | PreTrainedModel,
        role: str,
        options: RolloutOptions,
        processing_class: PreTrainedTokenizerBase | None = None,
        fingerprint: TeacherFingerprint | None = None,
    ) -> _Model:
        """Finds a model's tokenizer and fingerprint. All processes must call this."""
        state, engine = processes(), options.engine
        if is_address(source):
            if engine != "transformers":
                raise ValueError(f"{source} is a server, which samples itself: leave `engine` out.")
            engine, source = source, on_main_process(state, lambda: served_model(source))
        source = as_name(source)
        if is_address(engine):
            engine = VLLMServer(engine)
        _check_engine(engine, source)
        kwargs = hub_kwargs(options.init_kwargs)
        is_declared = engine not in ENGINES or fingerprint is not None
        is_declared |= isinstance(source, str) and warn_of_altering_kwargs(options.init_kwargs, source)
        # Only one process reads the gigabytes of a checkpoint.
        fingerprint = fingerprint or on_main_process(
            state, lambda: fingerprint_teacher(source, processing_class, **kwargs)
        )
        tokenizer = processing_class or load_tokenizer(source, **kwargs)
        if engine not in ENGINES and hasattr(engine, "self_test"):
            engine.processing_class = engine.processing_class or tokenizer
            on_main_process(state, engine.self_test)
        return cls(source, role, engine, options, tokenizer, fingerprint, is_declared)

    @property
    def is_served(self) -> bool:
        """Returns whether the model is on a server."""
        return self.engine not in ENGINES

    @property
    def signature(self) -> str:
        """Returns the fingerprint with its evidence, which each answer is signed with."""
        return with_evidence(self.fingerprint.id, "declared") if self.is_declared else self.fingerprint.id

    @property
    def is_probed(self) -> bool:
        """Returns whether its answers to the probes go into the record, as for a teacher loaded in this process."""
        return self.role == "teacher" and not self.is_served and self.engine != "vllm"

    @cached_property
    def sampling(self) -> Sampling:
        """Returns the arguments for its sampler."""
        kwargs = hub_kwargs(self.options.init_kwargs)
        return self.options.sampling(eos_token_ids(self.source, self.tokenizer, **kwargs))

    @cached_property
    def positions(self) -> Positions:
        """Returns how long a row it can read."""
        return positions_of(self.source, **hub_kwargs(self.options.init_kwargs))

    @cached_property
    def loaded(self) -> PreTrainedModel:
        """Loads the model in this process. It is loaded once, and not at all if everything is sampled already."""
        return load_model(self.source, own_device(processes(), self.options.init_kwargs))

    @cached_property
    def sampler(self) -> Sampler:
        """Returns the sampler for the engine."""
        if self.engine == "transformers":
            return TransformersSampler(self.loaded, self.tokenizer, self.options.batch_size)
        if self.engine == "continuous_batching":
            return ContinuousBatchingSampler(self.loaded, self.tokenizer)
        if self.engine == "vllm":
            from .vllm_engine import VLLMEngine

            return VLLMEngine(self.source, **self.options.init_kwargs)
        return self.engine

    def encode(self, rows: Any) -> list[list[int]]:
        """Encodes prompts."""
        return encode_prompts(rows, self.tokenizer, **(self.options.chat_template_kwargs or {}))

    def settings(self) -> dict[str, Any]:
        """Returns all options that change the samples, for the record."""
        names = ("num_generations", "temperature", "top_p", "max_completion_length", "stop", "truncated", "batch_size")
        names += ("rows_per_shard", "seed", "chat_template_kwargs")
        settings = {
            "engine": self.engine if isinstance(self.engine, str) else type(self.engine).__name__,
            **{name: getattr(self.options, name) for name in names},
        }
        if self.engine != "transformers":
            del settings["batch_size"]
        return {name: value for name, value in settings.items() if value is not None and value != []}

    def pins(self) -> dict[str, Any]:
        """Returns all that its answers depend on, beside the prompts."""
        return {
            self.role: self.signature,
            "model_init_kwargs": pinned_kwargs(self.options.init_kwargs),
            # Of the generation config, which is no part of the fingerprint.
            "eos_token_ids": sorted(self.sampling.eos_token_ids),
            **self.settings(),
        }

    def unload(self) -> None:
        """Lets go of the model, for the next one."""
        for name in ("loaded", "sampler"):
            self.__dict__.pop(name, None)
        free_memory()


def _run(
    prompts: Dataset, columns: AnswerColumns, output_dir: str | Path | None, whole: ShardedRun | None = None
) -> tuple[Dataset, dict[str, Any], dict[str, int]]:
    """Samples the answers of a model: the answers, the model's entry, and the counts of the run."""
    state, model, options = processes(), columns.model, columns.model.options
    pins = {
        "run": "answers of a " + model.role,
        "prompts": on_main_process(state, lambda: describe(prompts)) if output_dir is not None else None,
        "ref_logprobs": columns.ref_logprobs,
        **model.pins(),
    }
    sizes, about = np.full(len(prompts), options.num_generations), {}
    with ShardedRun("Sampling", "answer", sizes, options.rows_per_shard, output_dir, pins, whole) as run:
        for shard, span in run.pending():
            _answer(run, shard, prompts, span, columns)
        if model.is_probed and state.is_main_process:
            card = read_dataset_card(output_dir) if output_dir is not None else {}
            about["probes"] = probes_of_run(card, model.fingerprint.id, lambda: model.loaded, model.tokenizer)
        answers = run.dataset()
        counts = run.counts()
        check_positions(np.add(*lengths(answers)), model.positions, "the model")
    if whole is not None:
        model.unload()
    _report_cut(counts, len(answers), options)
    sampled = {**model.settings(), "truncated_answers": counts["truncated"]}
    evidence = {"evidence": "declared"} if model.is_declared else {}
    return answers, entry(model.fingerprint, rows=len(answers), sampling=sampled, **evidence, **about), counts


def _collect_parts(
    prompts: Dataset, parts: dict[str, tuple[Dataset, AnswerColumns]], output_dir: str | Path | None
) -> Dataset:
    """Samples the answers of each of several teachers to its prompts, and puts them together."""
    models = {name: columns.model for name, (_, columns) in parts.items()}
    options = next(iter(models.values())).options
    pins = {
        "run": "answers of several teachers",
        "prompts": on_main_process(processes(), lambda: describe(prompts)) if output_dir is not None else None,
        "teachers": {name: model.pins() for name, model in models.items()},
    }

    sizes = np.full(len(prompts), options.num_generations)
    with ShardedRun("Sampling", "answer", sizes, options.rows_per_shard, output_dir, pins) as run:
        entries = [entry(model.fingerprint) for model in models.values()]
        entries += run_parts(run, parts, _run, "sft_teachers")
        answers = run.dataset()
        record = {"sft_teachers": count_teachers(teacher_counts(answers), entries)}
        answers = recorded(answers, record, output_dir)
        remove_parts(run)
        return answers


def _need_input_ids(prompts: Dataset, model: _Model) -> bool:
    """Returns whether `SFTTrainer` could tokenize the texts differently from the tokens that are sampled."""
    options = model.options
    return model.role == "teacher" and (
        options.truncated == "keep" or bool(options.chat_template_kwargs) or continues_answers(prompts)
    )


def _prepare_prompts(prompts: Dataset | Sequence[Prompt], model: _Model) -> Dataset:
    """Removes columns that sampling writes from the prompts, and checks them before the model is loaded."""
    prompts = as_dataset(prompts, model.tokenizer, model.options.chat_template_kwargs or {})
    replaced = (*WRITTEN_COLUMNS, *(SFT_COLUMNS if model.role == "teacher" else ()))
    prompts = prompts.remove_columns([name for name in prompts.column_names if name in replaced])
    is_text = isinstance(prompts[0]["prompt"], str)
    if is_text and model.tokenizer.chat_template is not None and processes().is_main_process:
        warn_of_texts(model.tokenizer.name_or_path or "The tokenizer")
    if model.positions.fails:
        # Otherwise the model would fail in the middle of a batch.
        prompt_lengths = np.array([len(ids) for batch in prompts.iter(1000) for ids in model.encode(batch)])
        numbers = row_numbers(prompts)
        needed = np.zeros(numbers.max() + 1, np.int64)
        needed[numbers] = prompt_lengths + model.options.max_completion_length
        check_positions(needed, model.positions, "the model", "With `max_completion_length`, prompt")
    return prompts


def _answer(run: ShardedRun, shard: int, prompts: Dataset, span: range, columns: AnswerColumns) -> None:
    """Samples the answers to the prompts of a shard, and writes the shard."""
    model, count = columns.model, columns.model.options.num_generations
    rows = take(prompts, [row for row in span for _ in range(count)])
    prompt_ids = [ids for ids in model.encode(prompts[span.start : span.stop]) for _ in range(count)]
    samples = columns.sample(prompt_ids, model.sampling, span.start * count, lambda tokens: run.advance(tokens, 1))
    part = columns(rows, prompt_ids, samples)
    is_cut = [sample.finish_reason == "length" for sample in samples]
    kept = [i for i, cut in enumerate(is_cut) if model.options.truncated == "keep" or not cut]
    run.write(
        shard,
        part if len(kept) == len(samples) else take(part, kept),
        answers=len(samples),
        truncated=sum(is_cut),
        dropped=len(samples) - len(kept),
        sampled_tokens=sum(len(sample.ids) for sample in samples),
        completion_tokens=sum(len(samples[i].ids) for i in kept),
    )


def _report_cut(counts: dict[str, int], rows: int, options: RolloutOptions) -> None:
    limit = options.max_completion_length
    if rows == 0:
        raise ValueError(
            f"All {counts['answers']} answers were cut at {limit} tokens and dropped. Raise "
            '`max_completion_length`, or keep them with `truncated="keep"`; with another `output_dir`, or none.'
        )
    if counts["truncated"] and processes().is_main_process:
        logger.warning(
            f"{counts['truncated']} of {counts['answers']} answers were cut at {limit} tokens and "
            f"{'dropped' if options.truncated == 'drop' else 'kept'}."
        )


def _check_engine(engine: str | Sampler, model: str | PreTrainedModel) -> None:
    if engine not in ENGINES and not hasattr(engine, "sample"):
        raise ValueError(
            f"`engine` is one of {', '.join(map(repr, ENGINES))}, or a server, `VLLMServer(url)`, or the address of "
            f"one, such as http://localhost:8000; got {engine!r}."
        )
    if engine == "vllm":
        if not isinstance(model, str):
            raise ValueError('`engine="vllm"` loads the model itself: give its directory or Hub id.')
        if processes().num_processes > 1:
            raise ValueError(
                "vLLM uses several GPUs from one process: start one, with "
                '`model_init_kwargs={"tensor_parallel_size": N}`, or serve the model with `vllm serve` and pass '
                "`VLLMServer(url)` as the engine."
            )


def _with_logprobs(samples: list[Sample], prompt_ids: list[list[int]], model: _Model) -> list[Sample]:
    """Adds log-probabilities to the answers for which the engine did not return any."""
    # While an answer grows past the length from which rotary embeddings stretch, they change.
    limit = (
        stretches_from(model.loaded.config) if model.engine in ("transformers", "continuous_batching") else math.inf
    )
    missing = [
        i
        for i, (sample, prompt) in enumerate(zip(samples, prompt_ids, strict=True))
        if sample.logprobs is None or len(prompt) + len(sample.ids) >= limit
    ]
    if not missing:
        return samples
    sequences = [np.array([*prompt_ids[i], *samples[i].ids]) for i in missing]
    scores = LocalTeacher(model.loaded).score(sequences, [len(samples[i].ids) for i in missing], 0)
    computed = dict(zip(missing, scores, strict=True))
    return [
        sample._replace(logprobs=computed[i].logprobs.tolist()) if i in computed else sample
        for i, sample in enumerate(samples)
    ]


@dataclass(frozen=True)
class AnswerColumns:
    """
    Columns of answers, which a call adds to the rows of their prompts.

    Attributes:
        model ([`_Model`]): The model that answers.
        ref_logprobs (`bool`): Whether to add its log-probabilities.
        as_messages (`bool`): Whether the completion is a list with one assistant message instead of a text.
        with_input_ids (`bool`): Whether to add `input_ids` and `completion_mask`, which `SFTTrainer` uses unchanged.
    """

    model: _Model
    ref_logprobs: bool
    as_messages: bool
    with_input_ids: bool

    @classmethod
    def of(cls, prompts: Dataset, model: _Model, ref_logprobs: bool = False) -> AnswerColumns:
        """Finds the columns that the answers to these prompts have."""
        as_messages = model.role == "teacher" and is_conversational({"prompt": prompts[0]["prompt"]})
        return cls(model, ref_logprobs, as_messages, _need_input_ids(prompts, model))

    def sample(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        first: int = 0,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> list[Sample]:
        """Answers each prompt once, see [`Sampler`], with log-probabilities if the columns have them."""
        samples = self.model.sampler.sample(prompt_ids, sampling, first, advance)
        return _with_logprobs(samples, prompt_ids, self.model) if self.ref_logprobs else samples

    def __call__(self, rows: Dataset, prompt_ids: list[list[int]], samples: list[Sample]) -> Dataset:
        ids = [sample.ids for sample in samples]
        texts = self.model.tokenizer.batch_decode(ids, skip_special_tokens=True)
        message = List({"role": Value("string"), "content": Value("string")})
        int_list = List(Value("int32"))
        columns = {
            "prompt_ids": (prompt_ids, int_list),
            "completion_ids": (ids, int_list),
            "completion": ([[{"role": "assistant", "content": text}] for text in texts], message)
            if self.as_messages
            else (texts, Value("string")),
            "finish_reason": ([sample.finish_reason for sample in samples], Value("string")),
        }
        if self.ref_logprobs:
            columns["ref_logprobs"] = ([sample.logprobs for sample in samples], List(Value("float32")))
        columns[f"{self.model.role}_fingerprint"] = ([self.model.signature] * len(samples), Value("string"))
        if self.with_input_ids:
            joined = [self._input_ids(prompt, sample) for prompt, sample in zip(prompt_ids, samples, strict=True)]
            columns["input_ids"] = (joined, int_list)
            masks = [[i >= len(p) for i in range(len(j))] for p, j in zip(prompt_ids, joined, strict=True)]
            columns["completion_mask"] = (masks, List(Value("bool")))
        answers = Dataset.from_dict(
            {name: values for name, (values, _) in columns.items()},
            features=Features({name: feature for name, (_, feature) in columns.items()}),
        )
        return concatenate_datasets([rows, answers], axis=1)

    def _input_ids(self, prompt: list[int], sample: Sample) -> list[int]:
        """Concatenates prompt and answer, and adds an end-of-sequence token if a stop text ended the answer."""
        eos_token_id = self.model.tokenizer.eos_token_id
        ended_by_text = sample.finish_reason == "stop" and sample.ids[-1] not in self.model.sampling.eos_token_ids
        return [*prompt, *sample.ids, *([eos_token_id] if ended_by_text and eos_token_id is not None else [])]
