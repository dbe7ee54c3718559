"""Prompts and a model become answers: rollouts of a student, or SFT data of its teacher, as they were sampled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, DatasetInfo, Features, List, Value, concatenate_datasets
from trl.data_utils import is_conversational

from ..identity.cards import attach_record, entry, read_dataset_card, read_model_card, write_record
from ..identity.fingerprint import fingerprint_teacher, with_evidence
from ..identity.probes import probes_of_run
from ..models import (
    Positions,
    check_positions,
    eos_token_ids,
    hub_kwargs,
    load_model,
    load_tokenizer,
    pinned_kwargs,
    positions_of,
)
from ..names import as_name
from ..processes import on_main_process, own_device, processes, wait_for_everyone
from ..table.schema import describe, lengths
from .addresses import is_address, served_model
from .options import ENGINES, RolloutOptions, Sampling, takes
from .prompts import Prompt, as_dataset, continues_answers, encode_prompts, warn_of_texts
from .runs import ShardedRun
from .samplers import ContinuousBatchingSampler, Sample, Sampler, TransformersSampler
from .servers import VLLMServer
from .teachers import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..identity.fingerprint import TeacherFingerprint

logger = logging.getLogger(__name__)

# Columns of the prompts that sampling puts its own in the place of.
WRITTEN_COLUMNS = (
    *("prompt_ids", "completion_ids", "completion", "finish_reason", "ref_logprobs"),
    *("student_fingerprint", "teacher_fingerprint"),
)
# Columns that TRL's `SFTTrainer` would read in the place of `prompt` and `completion`.
SFT_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks", "messages", "text")


@takes(RolloutOptions, temperature=0.8, top_p=1.0, truncated="keep")
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
    Samples the student's answers (Lightning OPD, stage 2: temperature 0.8, top-p 1, one answer a prompt, up to 4096
    tokens).

    With `output_dir`, each shard is on disk when it is done: a run that was killed continues when it is started again
    with the same arguments, and samples the same tokens. `load_dataset(output_dir)` and `load_table(output_dir)` read
    it. Under `accelerate launch`, every process samples its share of the shards.

    Args:
        prompts ([`~datasets.Dataset`] or sequence):
            Plain texts or lists of chat messages; or a dataset with such a `prompt` column, whose other columns are
            kept. Messages go through the tokenizer's chat template, with the columns `tools` and
            `chat_template_kwargs` if there are any, as in TRL; an answer that the last message begins is continued.
        student (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            A local directory or Hub id (of an adapter too), a loaded model, or the address of a vLLM server that
            serves the student from a directory or Hub id that is found here too. Its own generation config is set
            aside, but for its end-of-sequence tokens: a repetition penalty there would make the samples another
            policy's.
        output_dir (`str` or `Path`, *optional*):
            Where to write the rollouts, shard by shard. Without it all is in memory, and lost if the process dies.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. Loaded from the student's path if not given.
        ref_logprobs (`bool`, *optional*, defaults to `True`):
            Whether to add the student's own log-probabilities, at temperature 1 over the full vocabulary. Engines give
            them with the tokens, in their own precision; continuous batching only at temperature 1 and top-p 1, and
            otherwise they are computed afterwards.
        fingerprint ([`TeacherFingerprint`], *optional*):
            The student's. Computed if not given: from the checkpoint that a path names, or from a loaded model as it
            is in memory.
        **options:
            The fields of [`~generation.options.RolloutOptions`]: `temperature` (0.8), `top_p` (1), `engine`,
            `num_generations`, `max_completion_length`, `stop`, `truncated` (`"keep"`), `batch_size`, `rows_per_shard`,
            `seed`, `chat_template_kwargs`, `revision`, `trust_remote_code`, `dtype`, `model_init_kwargs`.

    Returns:
        [`~datasets.Dataset`]: One row an answer: the columns of `prompts` but those of these names, `prompt_ids` and
        `completion_ids` (`list<int32>`, an end-of-sequence token kept), `completion`, the decoded text,
        `finish_reason` (`"stop"` or `"length"`), `ref_logprobs` (`list<float32>`) and `student_fingerprint`, which
        counts as declared if a server sampled. It carries a record of the student, the SFT teachers that its card
        names, and the sampling: see `cards`.

    Raises:
        ValueError: No prompts, an empty prompt, no `prompt` column, an option out of range, an engine that cannot do
            what is asked, several processes without `output_dir`, no answer left, or a loaded model that cannot be
            fingerprinted.
        ShardError: `output_dir` holds something else, another run's rollouts, or is being written to.
        ServerError: A server that cannot be used.
    """
    model = _Model.resolve(student, "student", options, processing_class, fingerprint)
    name = model.source if isinstance(model.source, str) else model.source.config._name_or_path
    card = read_model_card(name, options.init_kwargs.get("revision")) if name else {}
    record = {"sft_teachers": [teacher["id"] for teacher in card.get("sft_teachers") or []]}
    return _collect(prompts, model, output_dir, record, ref_logprobs)


@takes(RolloutOptions, temperature=1.0, top_p=1.0, truncated="drop")
def generate_sft_data(
    prompts: Dataset | Sequence[Prompt],
    teacher: str | Path | PreTrainedModel,
    *,
    output_dir: str | Path | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    fingerprint: TeacherFingerprint | None = None,
    options: RolloutOptions,
) -> Dataset:
    """
    Samples the teacher's answers for fine-tuning the student (Lightning OPD, stage 1), each row signed with the
    teacher's fingerprint. `TeacherStampCallback` reads it while TRL's `SFTTrainer` trains on the result.

    Args:
        prompts, output_dir, processing_class, fingerprint:
            As in [`collect_rollouts`], with the teacher in the student's place.
        teacher (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            A local directory or Hub id, a loaded model, or the address of a vLLM server, as in [`collect_rollouts`].
        **options:
            The fields of [`~generation.options.RolloutOptions`], as in [`collect_rollouts`]; `temperature` is 1 by
            default, and `truncated` is `"drop"`: `SFTTrainer` ends every text with an end-of-sequence token, and of an
            answer that was cut the student would learn to stop in the middle. Rows that are kept all the same have
            the tokens too (`input_ids`), which `SFTTrainer` takes as they are.

    Returns:
        [`~datasets.Dataset`]: One row an answer: the columns of `prompts`, `completion` (text; a list with one
        assistant message where the prompt is a list of messages), `prompt_ids` and `completion_ids` (`list<int32>`, an
        end-of-sequence token kept), `finish_reason`, and `teacher_fingerprint`. Where `SFTTrainer` would make other
        tokens of the texts, also `input_ids`, prompt and answer, which end with an end-of-sequence token if and only
        if the answer was not cut, and `completion_mask`, false on the prompt: with `truncated="keep"`, with
        `chat_template_kwargs`, and if a prompt ends with a turn of the assistant, which the answer continues. Columns
        of `prompts` that `SFTTrainer` would take for these or for the texts (`input_ids`, `labels`, `messages`,
        `text`, ...) are left out. It carries a record of the teacher, the sampling, and, with the transformers
        engines, the teacher's answers to the probes: see `cards` and `probes`.

    Raises:
        ValueError, ShardError, ServerError: As [`collect_rollouts`].
    """
    model = _Model.resolve(teacher, "teacher", options, processing_class, fingerprint)
    return _collect(prompts, model, output_dir, {"share": 1.0}, ref_logprobs=False)


@dataclass
class _Model:
    """
    The model that answers, before it is loaded and after.

    Attributes:
        source (`str` or [`~transformers.PreTrainedModel`]): A directory or Hub id, or a loaded model.
        role (`str`): `"student"` or `"teacher"`.
        engine (`str` or [`Sampler`]): What samples.
        options ([`RolloutOptions`]): How.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        fingerprint ([`TeacherFingerprint`]): What it is.
    """

    source: str | PreTrainedModel
    role: str
    engine: str | Sampler
    options: RolloutOptions
    tokenizer: PreTrainedTokenizerBase
    fingerprint: TeacherFingerprint

    @classmethod
    def resolve(
        cls,
        source: str | Path | PreTrainedModel,
        role: str,
        options: RolloutOptions,
        tokenizer: PreTrainedTokenizerBase | None,
        fingerprint: TeacherFingerprint | None,
    ) -> _Model:
        """Finds a model's tokenizer and fingerprint; all processes call this."""
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
        # Gigabytes are read once, not by every process.
        fingerprint = fingerprint or on_main_process(state, lambda: fingerprint_teacher(source, tokenizer, **kwargs))
        tokenizer = tokenizer or load_tokenizer(source, **kwargs)
        if engine not in ENGINES and hasattr(engine, "self_test"):
            engine.tokenizer = engine.tokenizer or tokenizer
            on_main_process(state, engine.self_test)
        return cls(source, role, engine, options, tokenizer, fingerprint)

    @property
    def is_served(self) -> bool:
        """Whether it is elsewhere, so that what it is counts as declared."""
        return self.engine not in ENGINES

    @property
    def signature(self) -> str:
        """What each of its answers is signed with."""
        return with_evidence(self.fingerprint.id, "declared") if self.is_served else self.fingerprint.id

    @property
    def is_probed(self) -> bool:
        """Whether its answers to the probes belong into the record: those of a teacher that is loaded here."""
        return self.role == "teacher" and not self.is_served and self.engine != "vllm"

    @cached_property
    def sampling(self) -> Sampling:
        """What its sampler is told."""
        kwargs = hub_kwargs(self.options.init_kwargs)
        return self.options.sampling(eos_token_ids(self.source, self.tokenizer, **kwargs))

    @cached_property
    def positions(self) -> Positions:
        """How long a row it reads."""
        return positions_of(self.source, **hub_kwargs(self.options.init_kwargs))

    @cached_property
    def loaded(self) -> PreTrainedModel:
        """The model in this process: loaded once, and not at all if everything is sampled already."""
        return load_model(self.source, own_device(processes(), self.options.init_kwargs))

    @cached_property
    def sampler(self) -> Sampler:
        """What answers."""
        if self.engine == "transformers":
            return TransformersSampler(self.loaded, self.tokenizer, self.options.batch_size)
        if self.engine == "continuous_batching":
            return ContinuousBatchingSampler(self.loaded, self.tokenizer)
        if self.engine == "vllm":
            from .vllm_engine import VLLMEngine

            return VLLMEngine(self.source, **self.options.init_kwargs)
        return self.engine

    def encode(self, rows: Any) -> list[list[int]]:
        """Token ids of prompts."""
        return encode_prompts(rows, self.tokenizer, **(self.options.chat_template_kwargs or {}))

    def settings(self) -> dict[str, Any]:
        """How it samples, for the record: every option that has a say."""
        names = ("num_generations", "temperature", "top_p", "max_completion_length", "stop", "truncated", "batch_size")
        names += ("rows_per_shard", "seed", "chat_template_kwargs")
        settings = {
            "engine": self.engine if isinstance(self.engine, str) else type(self.engine).__name__,
            **{name: getattr(self.options, name) for name in names},
        }
        if self.engine != "transformers":
            del settings["batch_size"]
        return {name: value for name, value in settings.items() if value is not None and value != []}


def _collect(
    prompts: Dataset | Sequence[Prompt],
    model: _Model,
    output_dir: str | Path | None,
    record: dict[str, Any],
    ref_logprobs: bool,
) -> Dataset:
    """Answers of a model; `record` goes into its entry in the record of the result."""
    state, options = processes(), model.options
    prompts = _prepare_prompts(prompts, model)
    as_columns = _AnswerColumns(
        model,
        ref_logprobs,
        as_messages=model.role == "teacher" and is_conversational({"prompt": prompts[0]["prompt"]}),
        # Where `SFTTrainer` would make other tokens of the texts than were sampled.
        with_input_ids=model.role == "teacher"
        and (options.truncated == "keep" or bool(options.chat_template_kwargs) or continues_answers(prompts)),
    )
    pins = {
        "run": "answers of a " + model.role,
        "prompts": on_main_process(state, lambda: describe(prompts)) if output_dir is not None else None,
        model.role: model.signature,
        "ref_logprobs": ref_logprobs,
        "model_init_kwargs": pinned_kwargs(options.init_kwargs),
        **model.settings(),
    }
    sizes = np.full(len(prompts), options.num_generations)
    with ShardedRun("Sampling", "answer", sizes, options.rows_per_shard, output_dir, pins) as run:
        for shard, span in run.pending():
            _answer(run, shard, prompts, span, as_columns)
        if model.is_probed and state.is_main_process:
            card = read_dataset_card(output_dir) if output_dir is not None else {}
            record["probes"] = probes_of_run(card, lambda: model.loaded, model.tokenizer)
        answers = run.dataset()
        counts = run.counts()
        check_positions(np.add(*lengths(answers)), model.positions, "the model")
    _report_cut(counts, len(answers), options)
    sampled = {**model.settings(), "truncated_answers": counts["truncated"]}
    evidence = {"evidence": "declared"} if model.is_served else {}
    entry_of_model = entry(model.fingerprint, rows=len(answers), sampling=sampled, **evidence, **record)
    record = {
        "students" if model.role == "student" else "sft_teachers": [entry_of_model],
        "rows": len(answers),
        "completion_tokens": int(lengths(answers)[1].sum()),
        "skipped_rows": 0,
    }
    attach_record(answers, record)
    if output_dir is not None and state.is_main_process:
        write_record(output_dir, record)
    wait_for_everyone(state)
    return answers


def _prepare_prompts(prompts: Dataset | Sequence[Prompt], model: _Model) -> Dataset:
    """The prompts without columns that the answers bring, checked against the model before it is loaded."""
    prompts = as_dataset(prompts, model.tokenizer, model.options.chat_template_kwargs or {})
    replaced = (*WRITTEN_COLUMNS, *(SFT_COLUMNS if model.role == "teacher" else ()))
    prompts = prompts.remove_columns([name for name in prompts.column_names if name in replaced])
    is_text = isinstance(prompts[0]["prompt"], str)
    if is_text and model.tokenizer.chat_template is not None and processes().is_main_process:
        warn_of_texts(model.tokenizer.name_or_path or "The tokenizer")
    if model.positions.fails:
        # It would fail in the middle of a batch.
        prompt_lengths = np.array([len(ids) for batch in prompts.iter(1000) for ids in model.encode(batch)])
        needed = prompt_lengths + model.options.max_completion_length
        check_positions(needed, model.positions, "the model", "With `max_completion_length`, prompt")
    return prompts


def _answer(run: ShardedRun, shard: int, prompts: Dataset, span: range, as_columns: _AnswerColumns) -> None:
    """Samples the answers to the prompts of a shard, and writes it."""
    model, count = as_columns.model, as_columns.model.options.num_generations
    rows = _take(prompts, [row for row in span for _ in range(count)])
    prompt_ids = [ids for ids in model.encode(prompts[span.start : span.stop]) for _ in range(count)]
    samples = model.sampler.sample(
        prompt_ids, model.sampling, span.start * count, lambda tokens: run.advance(tokens, 1)
    )
    if as_columns.ref_logprobs:
        samples = _with_logprobs(samples, prompt_ids, model)
    part = as_columns(rows, prompt_ids, samples)
    is_cut = [sample.finish_reason == "length" for sample in samples]
    kept = [i for i, cut in enumerate(is_cut) if model.options.truncated == "keep" or not cut]
    run.write(
        shard,
        part if len(kept) == len(samples) else _take(part, kept),
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


def _take(dataset: Dataset, rows: list[int]) -> Dataset:
    """Some rows, copied: without the mapping of indices that `select` leaves, and the progress bar of removing it."""
    return Dataset(dataset.with_format("arrow")[rows], info=DatasetInfo(features=dataset.features))


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
    """The answers with the log-probabilities that the engine did not give."""
    missing = [i for i, sample in enumerate(samples) if sample.logprobs is None]
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
class _AnswerColumns:
    """
    Adds to the rows of prompts the columns of their answers.

    Attributes:
        model ([`_Model`]): The model that answers.
        ref_logprobs (`bool`): Whether its log-probabilities are among them.
        as_messages (`bool`): Whether the text is one assistant message.
        with_input_ids (`bool`): Whether to add the two columns that `SFTTrainer` takes as they are.
    """

    model: _Model
    ref_logprobs: bool
    as_messages: bool
    with_input_ids: bool

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
        """Prompt and answer, ended by an end-of-sequence token if a stop text ended it."""
        eos_token_id = self.model.tokenizer.eos_token_id
        ended_by_text = sample.finish_reason == "stop" and sample.ids[-1] not in self.model.sampling.eos_token_ids
        return [*prompt, *sample.ids, *([eos_token_id] if ended_by_text and eos_token_id is not None else [])]
