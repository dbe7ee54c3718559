"""Prompts and a student become rollouts: the token ids exactly as they were sampled."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, DatasetInfo, Features, List, Value, concatenate_datasets
from trl.data_utils import is_conversational

from ..identity.cards import attach_record, entry, read_dataset_card, read_model_card, write_record
from ..identity.fingerprint import fingerprint_teacher, with_evidence
from ..identity.probes import probes_of_run
from ..models import (
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
from ..table.schema import describe, lengths, refuse_no_dataset
from .runs import ShardedRun, check_whole_numbers
from .samplers import ContinuousBatchingSampler, Sample, Sampler, Sampling, TransformersSampler
from .teachers import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..identity.fingerprint import TeacherFingerprint

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, Any]]

ENGINES = ("transformers", "continuous_batching", "vllm")
# Columns of the prompts that sampling puts its own in the place of.
WRITTEN_COLUMNS = (
    *("prompt_ids", "completion_ids", "completion", "finish_reason", "ref_logprobs"),
    *("student_fingerprint", "teacher_fingerprint"),
)
# Columns of the prompts that the chat template reads, as in TRL.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Columns that TRL's `SFTTrainer` would read in the place of `prompt` and `completion`.
SFT_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks", "messages", "text")


def collect_rollouts(
    prompts: Dataset | Sequence[Prompt],
    student: str | Path | PreTrainedModel,
    *,
    engine: str | Sampler = "transformers",
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_generations: int = 1,
    temperature: float = 0.8,
    top_p: float = 1.0,
    max_completion_length: int = 4096,
    stop: str | Sequence[str] = (),
    truncated: str = "keep",
    ref_logprobs: bool = True,
    batch_size: int = 64,
    rows_per_shard: int = 1024,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    fingerprint: TeacherFingerprint | None = None,
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
            A local directory or Hub id (of an adapter too), or a loaded model. Its own generation config is set aside,
            but for its end-of-sequence tokens: a repetition penalty there would make the samples another policy's.
        engine (`str` or [`Sampler`], *optional*, defaults to `"transformers"`):
            What samples: `"transformers"`, in batches of `batch_size`; `"continuous_batching"`, transformers' own, for
            answers of very different lengths; `"vllm"`, in this process (`pip install 'trl-lopd[vllm]'`); or a server
            that serves the student, `VLLMServer("http://localhost:8000")` or its address. With the last two, each
            answer has a seed of its own.
        output_dir (`str` or `Path`, *optional*):
            Where to write the rollouts, shard by shard. Without it all is in memory, and lost if the process dies.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Loaded from the student's path if not given.
        num_generations (`int`, *optional*, defaults to `1`):
            Answers a prompt; they follow one another in the result.
        temperature (`float`, *optional*, defaults to `0.8`):
            Sampling temperature. `0` decodes greedily.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling.
        max_completion_length (`int`, *optional*, defaults to `4096`):
            In tokens. Longer answers are cut; their `finish_reason` is `"length"`.
        stop (`str` or sequence of `str`, *optional*):
            Texts that end an answer, beside the end-of-sequence tokens. The tokens that write them are kept.
        truncated (`str`, *optional*, defaults to `"keep"`):
            Whether to `"keep"` answers that were cut, or to `"drop"` them. They are counted either way.
        ref_logprobs (`bool`, *optional*, defaults to `True`):
            Whether to add the student's own log-probabilities, at temperature 1 over the full vocabulary. Engines give
            them with the tokens, in their own precision; continuous batching only at temperature 1 and top-p 1, and
            otherwise they are computed afterwards.
        batch_size (`int`, *optional*, defaults to `64`):
            Answers generated together by `"transformers"`; other engines decide for themselves.
        rows_per_shard (`int`, *optional*, defaults to `1024`):
            Prompts whose answers are sampled, and written, together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling. The transformers engines give other samples with another `batch_size` or
            `rows_per_shard`. The caller's random state is left as it was.
        chat_template_kwargs (`dict`, *optional*):
            For the chat template, for instance `{"enable_thinking": False}`.
        model_init_kwargs (`dict`, *optional*):
            For loading the student from a path, for instance `{"dtype": "bfloat16"}`; arguments of `vllm.LLM` with
            `engine="vllm"`, for instance `{"tensor_parallel_size": 2}`.
        fingerprint ([`TeacherFingerprint`], *optional*):
            The student's. Computed if not given: from the checkpoint that a path names, or from a loaded model as it
            is in memory.

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
    student = as_name(student)
    revision = (model_init_kwargs or {}).get("revision")
    name = student if isinstance(student, str) else student.config._name_or_path
    sft_teachers = (read_model_card(name, revision) if name else {}).get("sft_teachers") or []
    return _collect(
        prompts,
        student,
        role="student",
        about={"sft_teachers": [teacher["id"] for teacher in sft_teachers]},
        engine=engine,
        output_dir=output_dir,
        tokenizer=tokenizer,
        num_generations=num_generations,
        temperature=temperature,
        top_p=top_p,
        max_completion_length=max_completion_length,
        stop=stop,
        truncated=truncated,
        ref_logprobs=ref_logprobs,
        batch_size=batch_size,
        rows_per_shard=rows_per_shard,
        seed=seed,
        chat_template_kwargs=chat_template_kwargs,
        model_init_kwargs=model_init_kwargs,
        fingerprint=fingerprint,
    )


def generate_sft_data(
    prompts: Dataset | Sequence[Prompt],
    teacher: str | Path | PreTrainedModel,
    *,
    engine: str | Sampler = "transformers",
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_generations: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_completion_length: int = 4096,
    stop: str | Sequence[str] = (),
    truncated: str = "drop",
    batch_size: int = 64,
    rows_per_shard: int = 1024,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    fingerprint: TeacherFingerprint | None = None,
) -> Dataset:
    """
    Samples the teacher's answers for fine-tuning the student (Lightning OPD, stage 1), each row signed with the
    teacher's fingerprint. `TeacherStampCallback` reads it while TRL's `SFTTrainer` trains on the result.

    Args:
        prompts, engine, output_dir, tokenizer, num_generations, temperature, top_p, max_completion_length, stop,
        batch_size, rows_per_shard, seed, chat_template_kwargs, model_init_kwargs, fingerprint:
            As in [`collect_rollouts`], with the teacher in the student's place and the temperature 1 by default.
        teacher (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            A local directory or Hub id, or a loaded model.
        truncated (`str`, *optional*, defaults to `"drop"`):
            Whether to `"drop"` answers that were cut, or to `"keep"` them. `SFTTrainer` ends every text with an
            end-of-sequence token, and of an answer that was cut the student would learn to stop in the middle. Kept
            rows therefore have the tokens too (`input_ids`), which `SFTTrainer` takes as they are.

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
    return _collect(
        prompts,
        as_name(teacher),
        role="teacher",
        about={"share": 1.0},
        engine=engine,
        output_dir=output_dir,
        tokenizer=tokenizer,
        num_generations=num_generations,
        temperature=temperature,
        top_p=top_p,
        max_completion_length=max_completion_length,
        stop=stop,
        truncated=truncated,
        ref_logprobs=False,
        batch_size=batch_size,
        rows_per_shard=rows_per_shard,
        seed=seed,
        chat_template_kwargs=chat_template_kwargs,
        model_init_kwargs=model_init_kwargs,
        fingerprint=fingerprint,
    )


def _collect(
    prompts: Dataset | Sequence[Prompt],
    model: str | PreTrainedModel,
    *,
    role: str,
    about: dict[str, Any],
    engine: str | Sampler,
    output_dir: str | Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    num_generations: int,
    temperature: float,
    top_p: float,
    max_completion_length: int,
    stop: str | Sequence[str],
    truncated: str,
    ref_logprobs: bool,
    batch_size: int,
    rows_per_shard: int,
    seed: int,
    chat_template_kwargs: dict[str, Any] | None,
    model_init_kwargs: dict[str, Any] | None,
    fingerprint: TeacherFingerprint | None,
) -> Dataset:
    """Answers of a model in its role, `"student"` or `"teacher"`; `about` goes into its entry in the record."""
    # All options are checked before anything is loaded.
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        max_completion_length=max_completion_length,
        eos_token_ids=(),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        seed=seed,
    )
    check_whole_numbers(1, num_generations=num_generations, batch_size=batch_size, rows_per_shard=rows_per_shard)
    if truncated not in ("keep", "drop"):
        raise ValueError(f'`truncated` is "keep" or "drop", not {truncated!r}.')
    if isinstance(engine, str) and engine.startswith(("http://", "https://")):
        from .servers import VLLMServer

        engine = VLLMServer(engine)
    _check_engine(engine, model)
    state = processes()
    kwargs = dict(model_init_kwargs or {})
    found = hub_kwargs(kwargs)
    # Gigabytes are read once, not by every process.
    fingerprint = fingerprint or on_main_process(state, lambda: fingerprint_teacher(model, tokenizer, **found))
    tokenizer = tokenizer or load_tokenizer(model, **found)
    prompts = _as_dataset(prompts, tokenizer, chat_template_kwargs or {})
    replaced = (*WRITTEN_COLUMNS, *(SFT_COLUMNS if role == "teacher" else ()))
    prompts = prompts.remove_columns([name for name in prompts.column_names if name in replaced])
    if state.is_main_process and isinstance(prompts[0]["prompt"], str) and tokenizer.chat_template is not None:
        _warn_of_texts(tokenizer.name_or_path or "The tokenizer")
    as_messages = role == "teacher" and is_conversational({"prompt": prompts[0]["prompt"]})
    # Where `SFTTrainer` would make other tokens of the texts than were sampled.
    exact = role == "teacher" and (truncated == "keep" or bool(chat_template_kwargs) or _go_on(prompts))
    if engine in ENGINES:
        signature = fingerprint.id
    else:
        # What a server serves is somebody's word.
        signature = with_evidence(fingerprint.id, "declared")
        about = {"evidence": "declared", **about}
        if hasattr(engine, "self_test"):
            engine.tokenizer = engine.tokenizer or tokenizer
            on_main_process(state, engine.self_test)
    sampling = replace(sampling, eos_token_ids=eos_token_ids(model, tokenizer, **found))
    options = {
        "engine": engine if isinstance(engine, str) else type(engine).__name__,
        "num_generations": num_generations,
        "temperature": temperature,
        "top_p": top_p,
        "max_completion_length": max_completion_length,
        "stop": list(sampling.stop) or None,
        "truncated": truncated,
        "batch_size": batch_size if engine == "transformers" else None,
        "rows_per_shard": rows_per_shard,
        "seed": seed,
        "chat_template_kwargs": chat_template_kwargs,
    }
    options = {option: value for option, value in options.items() if value is not None}
    pins = {
        "run": "answers of a " + role,
        "prompts": on_main_process(state, lambda: describe(prompts)) if output_dir is not None else None,
        role: signature,
        "ref_logprobs": ref_logprobs,
        "model_init_kwargs": pinned_kwargs(kwargs),
        **options,
    }

    @functools.cache  # once, and not at all if everything is sampled already
    def load() -> PreTrainedModel:
        return load_model(model, own_device(state, kwargs))

    @functools.cache
    def sampler() -> Sampler:
        if engine == "transformers":
            return TransformersSampler(load(), tokenizer, batch_size)
        if engine == "continuous_batching":
            return ContinuousBatchingSampler(load(), tokenizer)
        if engine == "vllm":
            from .vllm_engine import VLLMEngine

            return VLLMEngine(model, **kwargs)
        return engine

    positions = positions_of(model, **found)
    if positions.fails:
        # It would fail in the middle of a batch.
        batches = (encode_prompts(batch, tokenizer, **(chat_template_kwargs or {})) for batch in prompts.iter(1000))
        needed = np.array([len(ids) for batch in batches for ids in batch]) + max_completion_length
        check_positions(needed, positions, "the model", "With `max_completion_length`, prompt")
    sizes = np.full(len(prompts), num_generations)
    with ShardedRun("Sampling", "answer", sizes, rows_per_shard, output_dir, pins) as run:
        for shard, span in run.pending():
            rows = _take(prompts, [row for row in span for _ in range(num_generations)])
            encoded = encode_prompts(prompts[span.start : span.stop], tokenizer, **(chat_template_kwargs or {}))
            prompt_ids = [ids for ids in encoded for _ in range(num_generations)]
            samples = sampler().sample(
                prompt_ids, sampling, span.start * num_generations, lambda tokens: run.advance(tokens, 1)
            )
            if ref_logprobs:
                samples = _with_logprobs(samples, prompt_ids, load)
            part = _with_answers(
                rows, prompt_ids, samples, tokenizer, f"{role}_fingerprint", signature, as_messages, ref_logprobs
            )
            if exact:
                part = _with_input_ids(part, sampling.eos_token_ids, tokenizer.eos_token_id)
            cut = [sample.finish_reason == "length" for sample in samples]
            kept = [i for i, is_cut in enumerate(cut) if truncated == "keep" or not is_cut]
            run.write(
                shard,
                part if len(kept) == len(samples) else _take(part, kept),
                answers=len(samples),
                truncated=sum(cut),
                dropped=len(samples) - len(kept),
                sampled_tokens=sum(len(sample.ids) for sample in samples),
                completion_tokens=sum(len(samples[i].ids) for i in kept),
            )
        if role == "teacher" and state.is_main_process and engine in ENGINES and engine != "vllm":
            card = read_dataset_card(output_dir) if output_dir is not None else {}
            about["probes"] = probes_of_run(card, load, tokenizer)
        rollouts = run.dataset()
        counts = run.counts()
        check_positions(np.add(*lengths(rollouts)), positions, "the model")
    if len(rollouts) == 0:
        raise ValueError(
            f"All {counts['answers']} answers were cut at {max_completion_length} tokens and dropped. Raise "
            '`max_completion_length`, or keep them with `truncated="keep"`; with another `output_dir`, or none.'
        )
    if counts["truncated"] and state.is_main_process:
        logger.warning(
            f"{counts['truncated']} of {counts['answers']} answers were cut at {max_completion_length} tokens and "
            f"{'dropped' if truncated == 'drop' else 'kept'}."
        )
    sampled = {**options, "truncated_answers": counts["truncated"]}
    about = entry(fingerprint, rows=len(rollouts), sampling=sampled, **about)
    record = {
        "students" if role == "student" else "sft_teachers": [about],
        "rows": len(rollouts),
        "completion_tokens": int(lengths(rollouts)[1].sum()),
        "skipped_rows": 0,
    }
    attach_record(rollouts, record)
    if output_dir is not None and state.is_main_process:
        write_record(output_dir, record)
    wait_for_everyone(state)
    return rollouts


@functools.cache  # once for each model
def _warn_of_texts(name: str) -> None:
    logger.warning(
        f"{name} has a chat template, and the prompts are texts, which are not put through it: the model gets them as "
        'they stand. If it is a chat model, give each prompt as messages, `[{"role": "user", "content": text}]`; '
        "`--as_chat` does that on the command line, and `as_chat=True` in `load_benchmark`."
    )


def _as_dataset(
    prompts: Dataset | Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]
) -> Dataset:
    """The prompts, each of them something that can be answered: what is wrong shows before hours are spent."""
    if not isinstance(prompts, list | tuple):
        refuse_no_dataset(prompts, "prompts")
    elif prompts and isinstance(prompts[0], dict):
        raise TypeError(
            "`prompts` is one conversation: give a list of such lists."
            if "role" in prompts[0]
            else "`prompts` is a list of rows: give a `Dataset`, such as `Dataset.from_list(prompts)`."
        )
    if isinstance(prompts, Dataset):
        if "prompt" not in prompts.column_names:
            raise ValueError(
                f"The dataset has no `prompt` column, only {prompts.column_names}. Rename yours to `prompt`."
            )
        values: Iterable[Any] = prompts.select_columns("prompt")["prompt"]
    else:
        values = prompts = list(prompts)
    if len(prompts) == 0:
        raise ValueError("There are no prompts to answer.")
    kinds = set()
    for i, prompt in enumerate(values):
        messages = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
        if not isinstance(prompt, str) and not messages:
            raise ValueError(
                f"Prompt {i} is neither a text nor a list of messages with `role` and `content`: {prompt!r:.200}."
            )
        kinds.add(type(prompt))
        if len(kinds) > 1:
            raise ValueError(
                f"Prompt {i} is {'a text' if not messages else 'a list of messages'}, the others are not."
            )
        if messages and any(m.get("content") is None and m["role"] != "assistant" for m in prompt):
            raise ValueError(f"Prompt {i} has a message without `content`: {prompt!r:.200}.")
        # Long ones have tokens in any tokenizer.
        if i == 0 or len(prompt) == 0 or (not messages and not prompt.strip()):
            if len(prompt) == 0 or not encode_prompt(prompt, tokenizer, **chat_template_kwargs):
                raise ValueError(f"Prompt {i} is empty: the first answer token would have no context.")
    if not isinstance(prompts, Dataset):
        return Dataset.from_dict({"prompt": prompts})
    if messages and "tools" in prompts.column_names:
        _check_tools(prompts, tokenizer, chat_template_kwargs)
    return prompts


def _go_on(prompts: Dataset) -> bool:
    """Whether some of the prompts end with a turn of the assistant, which the answer continues."""
    messages = (prompt for prompt in prompts.select_columns("prompt")["prompt"] if not isinstance(prompt, str))
    return any(prompt[-1]["role"] == "assistant" for prompt in messages)


def _check_tools(prompts: Dataset, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]) -> None:
    rendered = False
    for i, row in enumerate(prompts.select_columns(["prompt", "tools"])):
        try:
            tools = read_tools(row["tools"])
        except ValueError as error:
            raise ValueError(f"Prompt {i}: {error}.") from None
        if tools and not rendered:
            given = (row["prompt"], tokenizer)
            rendered = encode_prompt(*given, tools, **chat_template_kwargs) != encode_prompt(
                *given, **chat_template_kwargs
            )
            if not rendered:
                raise ValueError(
                    f"Prompt {i} has `tools`, which the chat template does not render: the model would not see them. "
                    "Remove the column, or give a tokenizer whose chat template has tools."
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


def _with_logprobs(
    samples: list[Sample], prompt_ids: list[list[int]], load: Callable[[], PreTrainedModel]
) -> list[Sample]:
    """The answers with the log-probabilities that the engine did not give."""
    missing = [i for i, sample in enumerate(samples) if sample.logprobs is None]
    if not missing:
        return samples
    sequences = [np.array([*prompt_ids[i], *samples[i].ids]) for i in missing]
    scores = LocalTeacher(load()).score(sequences, [len(samples[i].ids) for i in missing], 0)
    computed = dict(zip(missing, scores, strict=True))
    return [
        sample._replace(logprobs=computed[i].logprobs.tolist()) if i in computed else sample
        for i, sample in enumerate(samples)
    ]


def _with_answers(
    rows: Dataset,
    prompt_ids: list[list[int]],
    samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    signature_column: str,
    signature: str,
    as_messages: bool,
    ref_logprobs: bool,
) -> Dataset:
    """The prompts' rows with the columns that sampling adds, in the place of columns of these names."""
    ids = [sample.ids for sample in samples]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    columns = {
        "prompt_ids": prompt_ids,
        "completion_ids": ids,
        "completion": [[{"role": "assistant", "content": text}] for text in texts] if as_messages else texts,
        "finish_reason": [sample.finish_reason for sample in samples],
        "ref_logprobs": [sample.logprobs for sample in samples],
        signature_column: [signature] * len(samples),
    }
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features(
        {
            "prompt_ids": List(Value("int32")),
            "completion_ids": List(Value("int32")),
            "completion": message if as_messages else Value("string"),
            "finish_reason": Value("string"),
            "ref_logprobs": List(Value("float32")),
            signature_column: Value("string"),
        }
    )
    if not ref_logprobs:
        del columns["ref_logprobs"], features["ref_logprobs"]
    return concatenate_datasets([rows, Dataset.from_dict(columns, features=features)], axis=1)


def _with_input_ids(rows: Dataset, eos_token_ids: tuple[int, ...], eos_token_id: int | None) -> Dataset:
    """The answers with the two columns that `SFTTrainer` takes as they are."""
    input_ids, masks = [], []
    for row in rows.select_columns(["prompt_ids", "completion_ids", "finish_reason"]):
        completion = row["completion_ids"]
        if row["finish_reason"] == "stop" and completion[-1] not in eos_token_ids and eos_token_id is not None:
            completion = [*completion, eos_token_id]  # a stop text ended it
        input_ids.append([*row["prompt_ids"], *completion])
        masks.append([False] * len(row["prompt_ids"]) + [True] * len(completion))
    features = Features({"input_ids": List(Value("int32")), "completion_mask": List(Value("bool"))})
    columns = Dataset.from_dict({"input_ids": input_ids, "completion_mask": masks}, features=features)
    return concatenate_datasets([rows, columns], axis=1)


def encode_prompts(
    rows: Mapping[str, Sequence], tokenizer: PreTrainedTokenizerBase, **chat_template_kwargs: Any
) -> list[list[int]]:
    """
    Token ids of prompts up to where the answer begins.

    Args:
        rows (`dict` of columns): `prompt`, texts or lists of messages, and, for the chat template, as TRL's trainers
            read them, `tools` (a list of schemas or its JSON) and `chat_template_kwargs`, if there are such columns.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        **chat_template_kwargs: For the chat template of every prompt; they come before those of a row.
    """
    prompts = rows["prompt"]
    tools, kwargs = (rows.get(name) or [None] * len(prompts) for name in TEMPLATE_COLUMNS)
    return [
        encode_prompt(prompt, tokenizer, read_tools(of_row), **{**(of_template or {}), **chat_template_kwargs})
        for prompt, of_row, of_template in zip(prompts, tools, kwargs, strict=True)
    ]


def encode_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]] | None = None,
    **chat_template_kwargs: Any,
) -> list[int]:
    """Token ids of a text, or of messages through the chat template up to where the answer begins, or goes on if the
    last message is the assistant's."""
    if not is_conversational({"prompt": prompt}):
        return tokenizer(prompt, add_special_tokens=True)["input_ids"]
    goes_on = prompt[-1]["role"] == "assistant"
    kwargs = {"tools": tools, "add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    return tokenizer.apply_chat_template(
        prompt, tokenize=True, return_dict=True, **{**kwargs, **chat_template_kwargs}
    )["input_ids"]


def read_tools(value: list[dict[str, Any]] | str | None) -> list[dict[str, Any]] | None:
    """
    The tools of a prompt, from the value of a `tools` column; `None` if there are none.

    Raises:
        ValueError: If it is no list of schemas, nor its JSON.
    """
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        tools = value
    if not (tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))):
        raise ValueError(f"`tools` is a list of JSON schemas, or its JSON, not {value!r:.80}")
    # Some templates announce tools for an empty list.
    return tools or None
