"""`trl-lopd rollout`, `score` and `evaluate`: options from flags or YAML, as in TRL's scripts, and the functions."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from datasets import Dataset
from trl.data_utils import maybe_convert_to_chatml

from .evaluation.evaluate import evaluate_model, load_benchmark, show
from .evaluation.metrics import flatten
from .generation.addresses import create_client, is_address, served_model, server_at
from .generation.costs import describe, estimate_rollouts, estimate_scoring
from .generation.options import (
    ROLLOUT_DEFAULTS,
    SFT_DATA_DEFAULTS,
    RolloutOptions,
    SamplingOptions,
    ScoringOptions,
    as_dict,
    check_whole_numbers,
)
from .generation.prompts import TEMPLATE_COLUMNS
from .generation.rollouts import SFT_COLUMNS, WRITTEN_COLUMNS, collect_rollouts, generate_sft_data
from .generation.scoring import score_rollouts
from .generation.servers import VLLMServer
from .identity.cards import load_rows, load_table, read_model_card, stamp_dataset_card
from .identity.fingerprint import fingerprint_teacher
from .models import hub_kwargs
from .processes import processes
from .table.schema import TEACHER_ID

_TEACHER_COLUMN_HELP = "With several teachers, the column with the name of each row's teacher. By default teacher_id."

_SPEAKERS = {"human": "user", "gpt": "assistant"}


@dataclass(kw_only=True)
class JobArguments:
    """Options of all three commands."""

    output_dir: str = field(metadata={"help": "Directory for the table. Start again with the same options to resume."})
    server_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "For a server, as YAML or JSON, such as {max_concurrency: 256, timeout: 3600}."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU, also under `accelerate launch`."})
    report_to: str = field(default="none", metadata={"help": 'Where to log speed and totals: "wandb" or "none".'})
    run_name: str | None = field(default=None, metadata={"help": "Name of the wandb run."})

    def __post_init__(self) -> None:
        if self.report_to not in ("none", "wandb"):
            raise ValueError(f'`report_to` is "none" or "wandb", not {self.report_to!r}.')
        self.server_kwargs = as_dict("server_kwargs", self.server_kwargs)


@dataclass(kw_only=True)
class TableArguments(JobArguments):
    """Options of the commands that make a table."""

    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    hub_dataset_id: str | None = field(
        default=None, metadata={"help": "Push the table and its card there when it is complete."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Whether that repository is private."})
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Write nothing: measure a sample for about 20 seconds, and print how many rows and tokens there "
            "are, and how much disk, memory and time they will take."
        },
    )


@dataclass(kw_only=True)
class RolloutArguments(RolloutOptions, TableArguments):
    """Options of `trl-lopd rollout`; see [`collect_rollouts`]."""

    model_name_or_path: dict[str, Any] | str | None = field(  # without `None`, flags would be read as dictionaries
        metadata={
            "help": "The model that answers: directory, Hub id, or address of a vLLM server. Several teachers by "
            "name, as YAML or JSON: {math: my-org/a, code: my-org/b}."
        }
    )
    teacher_column: str | None = field(default=None, metadata={"help": _TEACHER_COLUMN_HELP})
    dataset_name: str = field(metadata={"help": "Prompts: Hub id, directory, or a parquet, JSON lines or CSV file."})
    role: str = field(
        default="student",
        metadata={"help": '"student" samples rollouts; "teacher" writes SFT data, signed as such.'},
    )
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
        default=None, metadata={"help": "Number of prompts, drawn at random with `seed`. All by default."}
    )
    ref_logprobs: bool = field(default=True, metadata={"help": "Whether to store a student's own log-probabilities."})

    def __post_init__(self) -> None:
        TableArguments.__post_init__(self)
        RolloutOptions.__post_init__(self)
        if isinstance(self.keep_columns, str):
            self.keep_columns = [self.keep_columns]
        if self.role not in ("student", "teacher"):
            raise ValueError(f'`role` is "student" or "teacher", not {self.role!r}.')
        self.model_name_or_path = _one_or_several("model_name_or_path", self.model_name_or_path)
        if self.role == "student" and (isinstance(self.model_name_or_path, dict) or self.teacher_column):
            raise ValueError("Several models, and `teacher_column`, are for teachers: give `--role teacher`.")
        _check_server_kwargs(self, self.engine, *_names(self.model_name_or_path))


@dataclass(kw_only=True)
class ScoreArguments(ScoringOptions, TableArguments):
    """Options of `trl-lopd score`; see [`score_rollouts`]."""

    dataset_name: str = field(metadata={"help": "Rollouts: directory, parquet file or Hub id."})
    teacher: dict[str, Any] | str | None = field(  # without `None`, flags would be read as dictionaries
        metadata={
            "help": "The teacher: directory, Hub id, or address of a vLLM or SGLang server that serves it. Several by "
            "name, as YAML or JSON: {math: my-org/a, code: 'http://localhost:8000'}."
        }
    )
    teacher_column: str | None = field(default=None, metadata={"help": _TEACHER_COLUMN_HELP})
    fingerprint: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "The model that the server is declared to serve: directory or Hub id, of `revision`. By name, if "
            "there are several teachers."
        },
    )
    teacher_card: str | None = field(
        default=None,
        metadata={"help": "Student whose model card holds the probes that a served teacher has to answer."},
    )
    ref_model: str | None = field(
        default=None, metadata={"help": "Student to compute `ref_logprobs` with, for rollouts that have none."}
    )

    def __post_init__(self) -> None:
        TableArguments.__post_init__(self)
        ScoringOptions.__post_init__(self)
        self.teacher = _one_or_several("teacher", self.teacher)
        if self.fingerprint is not None:
            self.fingerprint = _one_or_several("fingerprint", self.fingerprint)
        _check_server_kwargs(self, *_names(self.teacher))
        for name in ("fingerprint", "teacher_card"):
            if getattr(self, name) and not any(map(is_address, _names(self.teacher))):
                raise ValueError(f"`{name}` is for a teacher on a server; `teacher` is {self.teacher!r}.")


@dataclass(kw_only=True)
class EvaluateArguments(SamplingOptions, JobArguments):
    """Options of `trl-lopd evaluate`; see [`evaluate_model`]."""

    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Directory for answers and metrics. By default evaluations/BENCHMARK in the model's, if that is "
            "local. Start again with the same options to resume."
        },
    )
    model_name_or_path: str = field(
        metadata={"help": "The model that answers: directory, Hub id, or address of a vLLM server."}
    )
    benchmark: str = field(metadata={"help": "Problems and their answers: a JSON lines file."})
    metric: str = field(default="math_accuracy", metadata={"help": '"math_accuracy" or "exact_answer".'})
    answer_after: str = field(
        default="#", metadata={"help": 'Marker of "exact_answer": the answer is the text after the last one.'}
    )
    teacher: str | None = field(
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

    def __post_init__(self) -> None:
        JobArguments.__post_init__(self)
        SamplingOptions.__post_init__(self)
        _check_server_kwargs(self, self.engine, self.model_name_or_path)
        if self.output_dir is None:
            if not Path(self.model_name_or_path).is_dir():
                raise ValueError(f"{self.model_name_or_path} is no local directory: give `output_dir`.")
            self.output_dir = str(Path(self.model_name_or_path) / "evaluations" / Path(self.benchmark).stem)


def rollout(args: RolloutArguments) -> Dataset | None:
    """
    Samples rollouts or SFT data with these options, and returns the table, which is in `output_dir` too; with
    `dry_run`, prints what that will take.
    """
    with _surroundings(args):
        model, engine = _model_of(args)
        options = _options(args, RolloutOptions) | engine
        if args.dry_run:
            defaults = ROLLOUT_DEFAULTS if args.role == "student" else SFT_DATA_DEFAULTS
            sampling, ref_logprobs = RolloutOptions(**defaults | options), args.role == "student" and args.ref_logprobs
            return _print_estimate(
                estimate_rollouts(load_prompts(args), model, args.role, sampling, args.teacher_column, ref_logprobs)
            )
        if args.role == "student":
            collect, options["ref_logprobs"] = collect_rollouts, args.ref_logprobs
        else:
            collect = generate_sft_data
            if args.teacher_column:
                options["teacher_column"] = args.teacher_column
        return _pushed(collect(load_prompts(args), model, output_dir=args.output_dir, **options), args)


def score(args: ScoreArguments) -> Dataset | None:
    """
    Scores rollouts with these options, and returns the table, which is in `output_dir` too; with `dry_run`, prints
    what that will take.
    """
    with _surroundings(args):
        rollouts = load_table(args.dataset_name, args.dataset_config, split=args.dataset_split)
        options = _options(args, ScoringOptions)
        kwargs = hub_kwargs(args.init_kwargs)
        teacher: Any = _each(
            args.teacher, lambda name: server_at(name, **(args.server_kwargs or {})) if is_address(name) else name
        )
        given: dict[str, Any] = {}
        if args.teacher_card:
            given["teacher_card"] = card = read_model_card(args.teacher_card)
            if isinstance(teacher, dict):
                given["teacher_card"] = {name: card for name, served in args.teacher.items() if is_address(served)}
        if args.fingerprint:
            given["fingerprint"] = _each(args.fingerprint, lambda name: fingerprint_teacher(name, **kwargs))
        given |= {"teacher_column": args.teacher_column, "ref_model": args.ref_model}
        if args.dry_run:
            return _print_estimate(estimate_scoring(rollouts, teacher, ScoringOptions(**options), **given))
        return _pushed(score_rollouts(rollouts, teacher, output_dir=args.output_dir, **given, **options), args)


def _print_estimate(estimate: dict[str, Any]) -> None:
    if processes().is_main_process:
        for line in describe(estimate):
            print(line)
        print(json.dumps(estimate), flush=True)


def evaluate(args: EvaluateArguments) -> dict[str, Any]:
    """Evaluates a model with these options, prints a table, and returns the result, which is in `output_dir` too."""
    with _surroundings(args):
        columns = (args.prompt_column, args.answer_column)
        benchmark = load_benchmark(args.benchmark, *columns, instruction=args.instruction, as_chat=args.as_chat)
        model, engine = _model_of(args)
        result = evaluate_model(
            model,
            benchmark,
            metric=args.metric,
            name=Path(args.benchmark).stem,
            answer_after=args.answer_after,
            teacher=args.teacher,
            output_dir=args.output_dir,
            **_options(args, SamplingOptions) | engine,
        )
        if processes().is_main_process:
            show(result)
            values = flatten(result["metrics"])
            print(json.dumps({"run": "evaluation", "output_dir": args.output_dir, **values}), flush=True)
            if args.report_to == "wandb":
                import wandb

                wandb.run.log({f"evaluation/{name}": value for name, value in values.items()})
        return result


def _options(args: JobArguments, options_class: type) -> dict[str, Any]:
    """Returns the options of a dataclass as keyword arguments. Without those that are `None`, defaults apply."""
    options = {option.name: getattr(args, option.name) for option in fields(options_class)}
    return {name: value for name, value in options.items() if value is not None}


def _one_or_several(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | str:
    """Parses the models of an option by name; the name of one model is returned unchanged."""
    if value is None:
        raise ValueError(f"`{name}` is needed.")
    return as_dict(name, value) if str(value).lstrip().startswith("{") else value


def _names(models: dict[str, Any] | str) -> list[str]:
    return list(models.values()) if isinstance(models, dict) else [models]


def _each(models: dict[str, Any] | str, make: Callable[[str], Any]) -> Any:
    return {name: make(model) for name, model in models.items()} if isinstance(models, dict) else make(models)


def _model_of(args: RolloutArguments | EvaluateArguments) -> tuple[Any, dict[str, Any]]:
    """Returns the model or models that answer, and a client as the `engine` if `server_kwargs` are given."""
    model = args.model_name_or_path
    if not args.server_kwargs:
        return model, {}
    if isinstance(model, dict):
        raise ValueError("`server_kwargs` are for one server. Start the servers of several teachers without.")
    address = model if is_address(model) else args.engine
    engine = create_client(VLLMServer, address, args.server_kwargs)
    return served_model(model) if is_address(model) else model, {"engine": engine}


def load_prompts(args: RolloutArguments) -> Dataset:
    """
    Loads the prompts as [`collect_rollouts`] takes them, with the columns to keep.

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
    template_columns = [name for name in TEMPLATE_COLUMNS if name in prompts.column_names]
    named_by = [args.teacher_column or TEACHER_ID] if isinstance(args.model_name_or_path, dict) else []
    columns = list(dict.fromkeys([args.prompt_column, *args.keep_columns, *named_by, *template_columns]))
    replaced = (*WRITTEN_COLUMNS, *(SFT_COLUMNS if args.role == "teacher" else ()))
    if written := [name for name in args.keep_columns if name in replaced]:
        raise ValueError(
            f"`keep_columns` names {written}, which sampling writes or fine-tuning would read instead of the answers: "
            "rename the column in the prompts."
        )
    given = {"prompt_column": [args.prompt_column], "keep_columns": args.keep_columns, "teacher_column": named_by}
    for option, names in given.items():
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
            problem = "begins with an answer" if prompt else "is empty"
            raise ValueError(f"{args.dataset_name}, prompt {i}: the conversation {problem}.")
        return {"prompt": messages}

    # The new column has other fields than the old one, so the old one is removed instead of overwritten.
    kept = prompts.remove_columns("prompt")
    questions = prompts.map(question, with_indices=True, remove_columns=prompts.column_names, desc="Reading prompts")
    for name in kept.column_names:
        questions = questions.add_column(name, kept[name], feature=kept.features[name])
    return questions


def _are_messages(prompt: Any) -> bool:
    """Returns whether a prompt is a list of messages, with the fields of OpenAI or of ShareGPT."""
    fields = ({"role", "content"}, {"from", "value"})
    return isinstance(prompt, list) and all(
        isinstance(message, dict) and any(names <= message.keys() for names in fields) for message in prompt
    )


def check_config(path: str, arguments: type) -> None:
    """
    Checks a YAML file of options before TRL's parser reads it, because the parser takes values of any type.

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
        if name == "env":  # environment variables, which TRL's parser sets
            continue
        if name not in types:
            near = difflib.get_close_matches(str(name), types, n=1)
            raise ValueError(
                f"{path} has the unknown option `{name}`. "
                + (f"Did you mean `{near[0]}`?" if near else f"The options are {', '.join(types)}.")
            )
        kinds = get_args(types[name]) if isinstance(types[name], UnionType) else [types[name]]
        accepted = tuple(get_origin(kind) or kind for kind in kinds)
        accepted += (str,) + ((int,) if float in accepted else ())  # strings are parsed like flags
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            names = " or ".join(dict.fromkeys(kind.__name__ for kind in accepted if kind is not type(None)))
            raise ValueError(f"{path}: `{name}` is of type {names}, not {value!r:.80}.")


def _check_server_kwargs(args: JobArguments, *names: str) -> None:
    if args.server_kwargs and not any(is_address(name) for name in names):
        raise ValueError(
            f"`server_kwargs` are for a server, but no address is given, only {', '.join(map(str, names))}."
        )


@contextmanager
def _surroundings(args: JobArguments) -> Iterator[None]:
    """Starts the processes, and a wandb run on the main one, which ends with the `with` block."""
    state = processes(cpu=args.use_cpu)
    if args.report_to != "wandb" or getattr(args, "dry_run", False) or not state.is_main_process:
        yield
        return
    import wandb

    # The same default project as in transformers.
    project = os.environ.get("WANDB_PROJECT", "huggingface")
    with wandb.init(project=project, name=args.run_name, config=asdict(args)):
        yield


def _pushed(table: Dataset, args: TableArguments) -> Dataset:
    """Pushes a table and its card to the Hub if `hub_dataset_id` is set, and returns the table."""
    if args.hub_dataset_id and processes().is_main_process:
        table.push_to_hub(args.hub_dataset_id, private=args.hub_private_repo)
        stamp_dataset_card(args.hub_dataset_id, table)
    return table
