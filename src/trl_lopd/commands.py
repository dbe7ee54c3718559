"""What `trl-lopd rollout`, `score` and `evaluate` do: options from flags or YAML, as in TRL's scripts, into a call."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from datasets import Dataset
from trl.data_utils import maybe_convert_to_chatml

from .evaluation.evaluate import evaluate_model, load_benchmark, show
from .evaluation.metrics import flatten
from .generation.rollouts import (
    ENGINES,
    SFT_COLUMNS,
    TEMPLATE_COLUMNS,
    WRITTEN_COLUMNS,
    collect_rollouts,
    generate_sft_data,
)
from .generation.runs import check_whole_numbers
from .generation.scoring import score_rollouts
from .identity.cards import load_rows, load_table, read_model_card, stamp_dataset_card
from .identity.fingerprint import fingerprint_teacher
from .processes import processes

_SPEAKERS = {"human": "user", "gpt": "assistant"}


@dataclass
class JobArguments:
    """What all jobs take."""

    output_dir: str = field(metadata={"help": "Directory for the table. Start again with the same options to resume."})
    rows_per_shard: int | None = field(
        default=None, metadata={"help": "Input rows that are computed and written together. A kill loses one shard."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "For loading the model, as YAML or JSON, such as {dtype: bfloat16, device_map: auto}."},
    )
    server_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "For a server, as YAML or JSON, such as {max_concurrency: 256, timeout: 3600}."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU, also under `accelerate launch`."})
    report_to: str = field(default="none", metadata={"help": 'Where to log speed and totals: "wandb" or "none".'})
    run_name: str | None = field(default=None, metadata={"help": "Name of the run there."})

    def __post_init__(self) -> None:
        if self.report_to not in ("none", "wandb"):
            raise ValueError(f'`report_to` is "none" or "wandb", not {self.report_to!r}.')
        self.model_init_kwargs = _dict("model_init_kwargs", self.model_init_kwargs)
        self.server_kwargs = _dict("server_kwargs", self.server_kwargs)


@dataclass
class TableArguments(JobArguments):
    """What the jobs take that make a table."""

    hub_dataset_id: str | None = field(
        default=None, metadata={"help": "Push the table and its card there when it is complete."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Whether that repository is private."})


@dataclass
class RolloutArguments(TableArguments):
    """Options of `trl-lopd rollout`; those of the sampling are those of [`collect_rollouts`]."""

    model_name_or_path: str = field(kw_only=True, metadata={"help": "Who answers: directory or Hub id."})
    dataset_name: str = field(
        kw_only=True, metadata={"help": "Prompts: Hub id, directory, or a parquet, JSON lines or CSV file."}
    )
    role: str = field(
        default="student",
        metadata={"help": '"student" samples rollouts; "teacher" writes SFT data, signed as such.'},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Which split."})
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "Column of texts, or of lists of messages, taken up to the first answer."},
    )
    as_chat: bool = field(
        default=False, metadata={"help": "Put prompts that are texts through the chat template, as a user's message."}
    )
    keep_columns: list[str] = field(
        default_factory=list, metadata={"help": "Columns to keep beside the prompt, such as the reference answer."}
    )
    num_prompts: int | None = field(
        default=None, metadata={"help": "How many prompts, drawn at random with `seed`. All by default."}
    )
    engine: str = field(
        default="transformers",
        metadata={"help": f"{', '.join(ENGINES)}, or the address of a vLLM server, such as http://localhost:8000."},
    )
    num_generations: int = field(default=1, metadata={"help": "Answers a prompt."})
    temperature: float | None = field(
        default=None, metadata={"help": "Sampling temperature. By default 0.8 for a student and 1 for a teacher."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling."})
    max_completion_length: int = field(default=4096, metadata={"help": "Tokens an answer may have."})
    stop: list[str] = field(default_factory=list, metadata={"help": "Texts that end an answer."})
    truncated: str | None = field(
        default=None,
        metadata={
            "help": 'Whether to "keep" or "drop" answers that were cut. By default those of a student are kept, those '
            "of a teacher dropped."
        },
    )
    ref_logprobs: bool = field(default=True, metadata={"help": "Whether to store a student's own log-probabilities."})
    batch_size: int = field(default=64, metadata={"help": "Answers that the transformers engine generates together."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling, and of the draw of prompts."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For the chat template, as YAML or JSON, such as {enable_thinking: false}."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep_columns, str):
            self.keep_columns = [self.keep_columns]
        if self.role not in ("student", "teacher"):
            raise ValueError(f'`role` is "student" or "teacher", not {self.role!r}.')
        _check_engine_options(self)


@dataclass
class ScoreArguments(TableArguments):
    """Options of `trl-lopd score`; see [`score_rollouts`]."""

    dataset_name: str = field(kw_only=True, metadata={"help": "Rollouts: directory, parquet file or Hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Which split."})
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The teacher: directory or Hub id. With `teacher_url`, it is declared to be served there."},
    )
    teacher_url: str | None = field(
        default=None, metadata={"help": "Score on a server instead of loading the teacher, as http://localhost:8000."}
    )
    teacher_server: str = field(default="vllm", metadata={"help": 'What runs there: "vllm" or "sglang".'})
    student_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Student whose model card holds the probes that a served teacher has to answer."},
    )
    top_k: int = field(default=8, metadata={"help": "The teacher's most likely tokens to store at each position."})
    ref_model: str | None = field(
        default=None, metadata={"help": "Student to compute `ref_logprobs` with, for rollouts that have none."}
    )
    max_batch_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a forward pass of a local teacher. By default what fits."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_server not in ("vllm", "sglang"):
            raise ValueError(f'`teacher_server` is "vllm" or "sglang", not {self.teacher_server!r}.')
        if not (self.teacher_name_or_path or self.teacher_url):
            raise ValueError("Who scores? Give `teacher_name_or_path`, `teacher_url`, or both.")
        for name in ("server_kwargs", "student_name_or_path"):
            if getattr(self, name) and not self.teacher_url:
                raise ValueError(f"`{name}` is for a teacher on a server: give `teacher_url`, or leave it out.")


@dataclass
class EvaluateArguments(JobArguments):
    """Options of `trl-lopd evaluate`; see [`evaluate_model`]."""

    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Directory for answers and metrics. By default evaluations/BENCHMARK in the model's, if that is "
            "local. Start again with the same options to resume."
        },
    )
    model_name_or_path: str = field(kw_only=True, metadata={"help": "Who answers: directory or Hub id."})
    benchmark: str = field(kw_only=True, metadata={"help": "Problems and their answers: a JSON lines file."})
    metric: str = field(default="math_accuracy", metadata={"help": '"math_accuracy" or "exact_answer".'})
    answer_after: str = field(
        default="#", metadata={"help": 'For "exact_answer": the answer is what follows the last of these.'}
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Teacher to measure the reverse KL divergence from, on answers sampled afresh."},
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Field of the problem. By default prompt, problem or question."}
    )
    answer_column: str = field(default="answer", metadata={"help": "Field of the reference answer."})
    instruction: str | None = field(
        default=None, metadata={"help": "Put after each problem, such as where to write the answer."}
    )
    as_chat: bool = field(
        default=False, metadata={"help": "Put problems that are texts through the chat template, as a user's message."}
    )
    engine: str = field(
        default="transformers",
        metadata={"help": f"{', '.join(ENGINES)}, or the address of a vLLM server, such as http://localhost:8000."},
    )
    num_samples: int = field(default=1, metadata={"help": "Answers a problem."})
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature. 0 decodes greedily."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus sampling."})
    max_completion_length: int = field(default=4096, metadata={"help": "Tokens an answer may have."})
    stop: list[str] = field(default_factory=list, metadata={"help": "Texts that end an answer."})
    batch_size: int = field(default=64, metadata={"help": "Answers that the transformers engine generates together."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For the chat template, as YAML or JSON, such as {enable_thinking: false}."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_engine_options(self)
        if self.output_dir is None:
            if not Path(self.model_name_or_path).is_dir():
                raise ValueError(f"{self.model_name_or_path} is no local directory: give `output_dir`.")
            self.output_dir = str(Path(self.model_name_or_path) / "evaluations" / Path(self.benchmark).stem)


def rollout(args: RolloutArguments) -> Dataset:
    """Samples as the options say; the table, which is in `output_dir` too."""
    with _surroundings(args):
        prompts = load_prompts(args)
        options = {
            name: value
            for name, value in asdict(args).items()
            if name in _SAMPLING and value is not None and (name != "ref_logprobs" or args.role == "student")
        }
        collect = collect_rollouts if args.role == "student" else generate_sft_data
        return _pushed(collect(prompts, args.model_name_or_path, engine=_engine(args), **options), args)


_SAMPLING = {
    *("output_dir", "rows_per_shard", "model_init_kwargs", "num_generations", "temperature", "top_p"),
    *("max_completion_length", "stop", "truncated", "ref_logprobs", "batch_size", "seed", "chat_template_kwargs"),
}


def score(args: ScoreArguments) -> Dataset:
    """Scores as the options say; the table, which is in `output_dir` too."""
    with _surroundings(args):
        rollouts = load_table(args.dataset_name, args.dataset_config, split=args.dataset_split)
        names = ("output_dir", "top_k", "ref_model", "max_batch_tokens", "rows_per_shard", "model_init_kwargs")
        options = {name: value for name in names if (value := getattr(args, name)) is not None}
        teacher: Any = args.teacher_name_or_path
        if args.teacher_url:
            from .generation.servers import SGLangServer, VLLMServer

            server = {"vllm": VLLMServer, "sglang": SGLangServer}[args.teacher_server]
            teacher = _server(server, args.teacher_url, args.server_kwargs)
            if args.student_name_or_path:
                options["teacher_card"] = read_model_card(args.student_name_or_path)
            if args.teacher_name_or_path:
                options["fingerprint"] = fingerprint_teacher(args.teacher_name_or_path)
        return _pushed(score_rollouts(rollouts, teacher, **options), args)


def evaluate(args: EvaluateArguments) -> dict[str, Any]:
    """Evaluates as the options say, and prints a table; the figures, which are in `output_dir` too."""
    with _surroundings(args):
        columns = (args.prompt_column, args.answer_column)
        benchmark = load_benchmark(args.benchmark, *columns, instruction=args.instruction, as_chat=args.as_chat)
        names = ("metric", "answer_after", "output_dir", "num_samples", "temperature", "top_p", "seed", "stop")
        names += ("max_completion_length", "batch_size", "rows_per_shard", "chat_template_kwargs", "model_init_kwargs")
        result = evaluate_model(
            args.model_name_or_path,
            benchmark,
            name=Path(args.benchmark).stem,
            teacher=args.teacher_name_or_path,
            engine=_engine(args),
            **{name: getattr(args, name) for name in names},
        )
        if processes().is_main_process:
            show(result)
            values = flatten(result["metrics"])
            print(json.dumps({"run": "evaluation", "output_dir": args.output_dir, **values}), flush=True)
            if args.report_to == "wandb":
                import wandb

                wandb.run.log({f"evaluation/{name}": value for name, value in values.items()})
        return result


def load_prompts(args: RolloutArguments) -> Dataset:
    """
    The prompts as [`collect_rollouts`] takes them, and the columns to keep.

    Raises:
        ValueError: If a column is missing, or a conversation begins with an answer.
    """
    path = Path(args.dataset_name)
    if path.is_file() and path.suffix != ".parquet":
        if args.dataset_split != "train":
            raise ValueError(f"{path} is a file without splits: leave `dataset_split` out.")
        if args.dataset_config is not None:
            raise ValueError(f"{path} is a file without configurations: leave `dataset_config` out.")
        kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
        if path.suffix not in kinds:
            raise ValueError(f"{path} is none of the files that can be read: {', '.join(kinds)}.")
        prompts = load_rows(str(path), kinds[path.suffix], data_files=str(path), split="train")
    else:
        prompts = load_table(args.dataset_name, args.dataset_config, split=args.dataset_split)
    read = [name for name in TEMPLATE_COLUMNS if name in prompts.column_names]
    columns = list(dict.fromkeys([args.prompt_column, *args.keep_columns, *read]))
    replaced = (*WRITTEN_COLUMNS, *(SFT_COLUMNS if args.role == "teacher" else ()))
    if written := [name for name in args.keep_columns if name in replaced]:
        raise ValueError(
            f"`keep_columns` names {written}, which sampling writes or fine-tuning would read in the place of the "
            "answers: rename the column in the prompts."
        )
    for option, names in (("prompt_column", [args.prompt_column]), ("keep_columns", args.keep_columns)):
        if missing := [name for name in names if name not in prompts.column_names]:
            raise ValueError(
                f"{args.dataset_name} has no column {missing[0]!r}, only {prompts.column_names}: set `{option}`."
            )
    prompts = prompts.select_columns(columns)
    if args.num_prompts is not None:
        check_whole_numbers(1, num_prompts=args.num_prompts)
        if args.num_prompts > len(prompts):
            raise ValueError(
                f"{args.dataset_name} has {len(prompts)} prompts; `num_prompts` asks for {args.num_prompts}."
            )
        prompts = prompts.shuffle(seed=args.seed).select(range(args.num_prompts)).flatten_indices()
    if args.prompt_column != "prompt":
        if "prompt" in args.keep_columns:
            raise ValueError("`keep_columns` cannot have a column `prompt` beside another `prompt_column`.")
        prompts = prompts.rename_column(args.prompt_column, "prompt")
    is_text = isinstance(prompts[0]["prompt"], str) if len(prompts) else True
    if is_text and not args.as_chat:
        return prompts

    def question(row: dict[str, Any], i: int) -> dict[str, Any]:
        prompt = row["prompt"]
        if is_text and isinstance(prompt, str):
            return {"prompt": [{"role": "user", "content": prompt}]}
        if prompt == []:
            raise ValueError(f"{args.dataset_name}, prompt {i}: the conversation is empty.")
        if not _are_messages(prompt):
            raise ValueError(
                f"{args.dataset_name}, prompt {i}: {args.prompt_column!r} is neither a text nor a list of messages "
                f"with `role` and `content`: {prompt!r:.200}."
            )
        messages = []
        for message in maybe_convert_to_chatml({"prompt": row["prompt"]})["prompt"]:
            role = _SPEAKERS.get(message["role"], message["role"])
            if role == "assistant":
                break
            messages.append({"role": role, "content": message["content"]})
        if not messages:
            raise ValueError(f"{args.dataset_name}, prompt {i}: the conversation begins with an answer.")
        return {"prompt": messages}

    # A column of messages with other fields than these two would not fit in the place of the old one.
    kept = prompts.remove_columns("prompt")
    questions = prompts.map(question, with_indices=True, remove_columns=prompts.column_names, desc="Reading prompts")
    for name in kept.column_names:
        questions = questions.add_column(name, kept[name], feature=kept.features[name])
    return questions


def _are_messages(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, with the fields of OpenAI or of ShareGPT."""
    fields = ({"role", "content"}, {"from", "value"})
    return isinstance(prompt, list) and all(
        isinstance(message, dict) and any(names <= message.keys() for names in fields) for message in prompt
    )


def check_config(path: str, arguments: type) -> None:
    """
    Checks a YAML file of options before TRL's parser reads it, which takes values of any type.

    Args:
        path (`str`): The file.
        arguments (`type`): The dataclass of the options.

    Raises:
        ValueError: If it is no YAML mapping, or has an unknown option or a value of another type.
        OSError: If it cannot be read.
    """
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no YAML mapping, such as `temperature: 0.8` on a line, but {config!r:.80}.")
    types = get_type_hints(arguments)
    for name, value in config.items():
        if name == "env":  # variables that TRL's parser sets
            continue
        if name not in types:
            near = difflib.get_close_matches(str(name), types, n=1)
            raise ValueError(
                f"{path} has the unknown option `{name}`. "
                + (f"Is `{near[0]}` meant?" if near else f"The options are {', '.join(types)}.")
            )
        kinds = get_args(types[name]) if isinstance(types[name], UnionType) else [types[name]]
        taken = tuple(get_origin(kind) or kind for kind in kinds)
        taken += (str,) + ((int,) if float in taken else ())  # texts are parsed as flags are
        if not isinstance(value, taken) or (isinstance(value, bool) and bool not in taken):
            names = " or ".join(dict.fromkeys(kind.__name__ for kind in taken if kind is not type(None)))
            raise ValueError(f"{path}: `{name}` is of type {names}, not {value!r:.80}.")


def _check_engine_options(args: RolloutArguments | EvaluateArguments) -> None:
    if args.server_kwargs and not args.engine.startswith("http"):
        raise ValueError(f"`server_kwargs` are for a server; `engine` is {args.engine!r}.")
    args.chat_template_kwargs = _dict("chat_template_kwargs", args.chat_template_kwargs)


def _engine(args: RolloutArguments | EvaluateArguments) -> Any:
    if not args.server_kwargs:
        return args.engine
    from .generation.servers import VLLMServer

    return _server(VLLMServer, args.engine, args.server_kwargs)


def _server(kind: type, url: str, kwargs: dict[str, Any] | None) -> Any:
    try:
        return kind(url, **(kwargs or {}))
    except TypeError as error:
        raise ValueError(f"`server_kwargs`: {error}") from error


@contextmanager
def _surroundings(args: JobArguments) -> Iterator[None]:
    """The processes, and a wandb run on the main one."""
    state = processes(cpu=args.use_cpu)
    if args.report_to != "wandb" or not state.is_main_process:
        yield
        return
    import wandb

    # As transformers names the project.
    project = os.environ.get("WANDB_PROJECT", "huggingface")
    with wandb.init(project=project, name=args.run_name, config=asdict(args)):
        yield


def _pushed(table: Dataset, args: TableArguments) -> Dataset:
    if args.hub_dataset_id and processes().is_main_process:
        table.push_to_hub(args.hub_dataset_id, private=args.hub_private_repo)
        stamp_dataset_card(args.hub_dataset_id, table)
    return table


def _dict(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)  # JSON too
        except yaml.YAMLError as error:
            raise ValueError(f"`{name}` is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(value, dict):
            raise ValueError(f"`{name}` is a dictionary such as '{{dtype: bfloat16}}', not {value!r}.")
    return value
