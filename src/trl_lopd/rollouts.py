"""Prompts and a student become rollouts: the token ids exactly as they were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm
from transformers import GenerationConfig
from trl.data_utils import is_conversational

from .cards import attach_record, entry, read_model_card, record_of
from .fingerprint import fingerprint_teacher
from .models import load_model, load_tokenizer
from .probes import probe_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .fingerprint import TeacherFingerprint

Prompt = str | list[dict[str, Any]]


def collect_rollouts(
    prompts: Dataset | Sequence[Prompt],
    student: str | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_generations: int = 1,
    temperature: float = 0.8,
    top_p: float = 1.0,
    max_completion_length: int = 4096,
    batch_size: int = 64,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    fingerprint: TeacherFingerprint | None = None,
) -> Dataset:
    """
    Samples the student's answers with transformers generation (Lightning OPD, stage 2: temperature 0.8, top-p 1, one
    answer a prompt, up to 4096 tokens).

    Args:
        prompts ([`~datasets.Dataset`] or sequence):
            Plain texts or lists of chat messages; or a dataset with such a `prompt` column, whose other columns are
            kept. Messages go through the tokenizer's chat template.
        student (`str` or [`~transformers.PreTrainedModel`]):
            A local directory or Hub id (of an adapter too), or a loaded model. Its own generation config is set aside,
            but for its end-of-sequence tokens: a repetition penalty there would make the samples another policy's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Loaded from the student's path if not given.
        num_generations (`int`, *optional*, defaults to `1`):
            Answers a prompt; they follow one another in the result.
        temperature (`float`, *optional*, defaults to `0.8`):
            Sampling temperature. `0` decodes greedily.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling.
        max_completion_length (`int`, *optional*, defaults to `4096`):
            In tokens. Longer answers are cut; they then do not end with an end-of-sequence token.
        batch_size (`int`, *optional*, defaults to `64`):
            Sequences generated together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling; with another `batch_size` it gives other samples. The caller's random state is left
            as it was.
        chat_template_kwargs (`dict`, *optional*):
            For the chat template, for instance `{"enable_thinking": False}`.
        model_init_kwargs (`dict`, *optional*):
            For loading the student from a path, for instance `{"dtype": "bfloat16"}`.
        fingerprint ([`TeacherFingerprint`], *optional*):
            The student's. Computed if not given: from the checkpoint that a path names, or from a loaded model as it
            is in memory.

    Returns:
        [`~datasets.Dataset`]: One row an answer: the columns of `prompts`, `prompt_ids` and `completion_ids`
        (`list<int32>`, an end-of-sequence token kept), `completion`, the decoded text, and `student_fingerprint`. It
        carries a record of the student, the SFT teachers that its card names, and the sampling: see `cards`.

    Raises:
        ValueError: No prompts, an empty prompt, no `prompt` column, an option out of range, or a loaded model that
            cannot be fingerprinted.
    """
    revision = (model_init_kwargs or {}).get("revision")
    name = student if isinstance(student, str) else student.config._name_or_path
    sft_teachers = (read_model_card(name, revision) if name else {}).get("sft_teachers") or []
    fingerprint = fingerprint or fingerprint_teacher(student, tokenizer, revision=revision)
    sampling = {
        "num_generations": num_generations,
        "temperature": temperature,
        "top_p": top_p,
        "max_completion_length": max_completion_length,
        "batch_size": batch_size,
        "seed": seed,
        "chat_template_kwargs": chat_template_kwargs,
    }
    rollouts = _sample(prompts, student, tokenizer, model_init_kwargs, **sampling)
    about = entry(
        fingerprint,
        rows=len(rollouts),
        sampling={option: value for option, value in sampling.items() if value is not None},
        sft_teachers=[teacher["id"] for teacher in sft_teachers],
    )
    rollouts = rollouts.add_column("student_fingerprint", [fingerprint.id] * len(rollouts), feature=Value("string"))
    attach_record(rollouts, {"students": [about]})
    return rollouts


def generate_sft_data(
    prompts: Dataset | Sequence[Prompt],
    teacher: str | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    temperature: float = 1.0,
    model_init_kwargs: dict[str, Any] | None = None,
    fingerprint: TeacherFingerprint | None = None,
    **sampling,
) -> Dataset:
    """
    Samples the teacher's answers for fine-tuning the student (Lightning OPD, stage 1), each row signed with the
    teacher's fingerprint. `TeacherStampCallback` reads it while TRL's `SFTTrainer` trains on the result.

    Args:
        prompts, teacher, tokenizer, temperature, model_init_kwargs, fingerprint, **sampling:
            As in [`collect_rollouts`], with the teacher in the student's place and the temperature 1 by default.

    Returns:
        [`~datasets.Dataset`]: One row an answer: the columns of `prompts`, `completion` (text; a list with one
        assistant message where the prompt is a list of messages), `prompt_ids` and `completion_ids` (`list<int32>`, an
        end-of-sequence token kept: a completion without one was cut), and `teacher_fingerprint`. It carries a record
        of the teacher, the sampling, and the teacher's answers to the probes: see `cards` and `probes`.

    Raises:
        ValueError: As [`collect_rollouts`].
    """
    if isinstance(teacher, str):
        revision = (model_init_kwargs or {}).get("revision")
        fingerprint = fingerprint or fingerprint_teacher(teacher, tokenizer, revision=revision)
        tokenizer = tokenizer or load_tokenizer(teacher, revision=revision)
        teacher = load_model(teacher, model_init_kwargs)
    tokenizer = tokenizer or load_tokenizer(teacher)
    answers = collect_rollouts(
        prompts, teacher, tokenizer=tokenizer, temperature=temperature, fingerprint=fingerprint, **sampling
    )
    about = record_of(answers)["students"][0]
    del about["sft_teachers"]
    answers = answers.rename_column("student_fingerprint", "teacher_fingerprint")
    if is_conversational({"prompt": answers[0]["prompt"]}):
        messages = [[{"role": "assistant", "content": text}] for text in answers["completion"]]
        answers = answers.remove_columns("completion").add_column("completion", messages)
    attach_record(answers, {"sft_teachers": [{**about, "share": 1.0, "probes": probe_model(teacher, tokenizer)}]})
    return answers


def _sample(
    prompts: Dataset | Sequence[Prompt],
    student: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    model_init_kwargs: dict[str, Any] | None,
    *,
    num_generations: int,
    temperature: float,
    top_p: float,
    max_completion_length: int,
    batch_size: int,
    seed: int,
    chat_template_kwargs: dict[str, Any] | None,
) -> Dataset:
    if temperature < 0 or not 0 < top_p <= 1 or min(num_generations, max_completion_length, batch_size) < 1:
        raise ValueError(
            "`temperature` is 0 or more, `top_p` above 0 and at most 1, `num_generations`, `max_completion_length` "
            f"and `batch_size` at least 1; got {temperature}, {top_p}, {num_generations}, {max_completion_length} "
            f"and {batch_size}."
        )
    if not isinstance(prompts, Dataset):
        prompts = Dataset.from_dict({"prompt": list(prompts)})
    if "prompt" not in prompts.column_names:
        raise ValueError(f"The dataset has no `prompt` column, only {prompts.column_names}. Rename yours to `prompt`.")
    if len(prompts) == 0:
        raise ValueError("There are no prompts to answer.")
    if isinstance(student, str):
        tokenizer = tokenizer or load_tokenizer(student, revision=(model_init_kwargs or {}).get("revision"))
        student = load_model(student, model_init_kwargs)
    tokenizer = tokenizer or load_tokenizer(student)

    prompt_ids = [_encode(row, tokenizer, chat_template_kwargs or {}) for row in prompts.select_columns("prompt")]
    if empty := [i for i, ids in enumerate(prompt_ids) if not ids]:
        raise ValueError(f"Prompt {empty[0]} is empty: the first answer token would have no context.")

    eos_ids = _eos_token_ids(student, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    generation_config = GenerationConfig(
        max_new_tokens=max_completion_length,
        eos_token_id=eos_ids,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos_ids or [0])[0],
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    rows = [i for i in range(len(prompts)) for _ in range(num_generations)]
    # Prompts of like length together waste the least padding.
    jobs = sorted(rows, key=lambda i: len(prompt_ids[i]), reverse=True)
    completions: list[list[list[int]]] = [[] for _ in prompt_ids]
    was_training, own_config = student.training, student.generation_config
    student.eval()
    # `generate` would fill what ours leaves open from the model's.
    student.generation_config = GenerationConfig()
    devices = [student.device] if student.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices),
            tqdm(total=len(jobs), desc="Sampling rollouts", unit="rollout") as progress,
        ):
            for start in range(0, len(jobs), batch_size):
                torch.manual_seed(int(np.random.SeedSequence([seed, start]).generate_state(1)[0]))
                batch = jobs[start : start + batch_size]
                sampled = _generate(student, [prompt_ids[i] for i in batch], generation_config)
                for i, ids in zip(batch, sampled, strict=True):
                    completions[i].append(_until_eos(ids, set(eos_ids)))
                progress.update(len(batch))
    finally:
        student.generation_config = own_config
        student.train(was_training)

    flat = [ids for of_prompt in completions for ids in of_prompt]
    replaced = [*_FEATURES, "student_fingerprint", "teacher_fingerprint"]
    result = prompts.select(rows).remove_columns([c for c in replaced if c in prompts.column_names])
    columns = {
        "prompt_ids": [prompt_ids[i] for i in rows],
        "completion_ids": flat,
        "completion": tokenizer.batch_decode(flat, skip_special_tokens=True),
    }
    for name, values in columns.items():
        result = result.add_column(name, values, feature=_FEATURES[name])
    return result


_FEATURES = Features(
    {"prompt_ids": List(Value("int32")), "completion_ids": List(Value("int32")), "completion": Value("string")}
)


def _encode(row: dict[str, Prompt], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict) -> list[int]:
    if is_conversational(row):
        return tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True, **chat_template_kwargs
        )["input_ids"]
    return tokenizer(row["prompt"], add_special_tokens=True)["input_ids"]


def _eos_token_ids(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    of_model = student.generation_config.eos_token_id if student.generation_config is not None else None
    ids = of_model if isinstance(of_model, list) else [of_model, tokenizer.eos_token_id]
    return list(dict.fromkeys(i for i in ids if i is not None))


@torch.inference_mode()
def _generate(student: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    width = max(map(len, prompts))
    input_ids = torch.tensor([[config.pad_token_id] * (width - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    output = student.generate(
        input_ids=input_ids.to(student.device),
        attention_mask=attention_mask.to(student.device),
        generation_config=config,
    )
    return output[:, width:].tolist()


def _until_eos(ids: list[int], eos_ids: set[int]) -> list[int]:
    """Cuts the padding behind the first end-of-sequence token, which is kept."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids) - 1)
    return ids[: end + 1]
