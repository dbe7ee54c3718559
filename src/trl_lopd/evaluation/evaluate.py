"""Evaluation of a model on a benchmark: accuracy of sampled answers, and reverse KL divergence from a teacher."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..generation.addresses import is_address, served_model
from ..generation.options import EVALUATION_DEFAULTS, SamplingOptions, takes
from ..generation.prompts import TEMPLATE_COLUMNS
from ..generation.rollouts import collect_rollouts
from ..generation.scoring import score_rollouts
from ..identity.cards import record_of
from ..identity.fingerprint import fingerprint_teacher
from ..models import hub_kwargs, load_tokenizer, pinned_kwargs
from ..names import as_name
from ..processes import on_main_process, processes
from ..table.schema import describe, lengths, refuse_no_dataset
from ..table.store import write_text
from .metrics import check_math_answers, estimate_reverse_kl, grade_exact, grade_math, summarize_samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..generation.teachers import Teacher

logger = logging.getLogger(__name__)

METRICS = ("math_accuracy", "exact_answer")
PROMPT_COLUMNS = ("prompt", "problem", "question")

# Entries in the record of the sampling that are not settings of an evaluation: an option of rollouts, and a count.
_NO_SETTINGS = ("truncated", "truncated_answers")


def load_benchmark(
    path: str | Path,
    prompt_column: str | None = None,
    answer_column: str = "answer",
    instruction: str | None = None,
    as_chat: bool = False,
) -> Dataset:
    """
    Reads a benchmark, such as AIME or GSM8K, from JSON lines.

    Args:
        path (`str` or `Path`):
            The file. If a reference answer contains `####`, as in GSM8K, only the text after the last one is used.
            `tools` and `chat_template_kwargs` of a conversation are kept for the chat template.
        prompt_column (`str`, *optional*):
            The field of the problem, a text or a list of messages; by default `prompt`, `problem` or `question`.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            The field of the reference answer, a text or a number, whose digits are kept as they are written. (In a
            `Dataset` of your own, answers are texts: a column of floats does not tell 0.5 from 0.50.)
        instruction (`str`, *optional*):
            Text to add after each problem and an empty line; in a conversation, to its last message.
        as_chat (`bool`, *optional*, defaults to `False`):
            Whether to convert problems that are texts to a user message.

    Returns:
        [`~datasets.Dataset`]: `prompt` and `answer`, one row per problem, and what there is for the chat template.

    Raises:
        ValueError: If the file is empty or not UTF-8, or a line is not a JSON object, lacks a field, or has `tools`
            beside a text.
        OSError: If the file does not exist.
    """
    rows: list[dict[str, Any]] = []
    given: dict[str, list] = {name: [] for name in TEMPLATE_COLUMNS}
    for number, line, row in _json_lines(path):
        if not rows and prompt_column is None:
            prompt_column = next((name for name in PROMPT_COLUMNS if name in row), None)
            if prompt_column is None:
                raise ValueError(
                    f"{path}, line {number} has none of the fields {', '.join(PROMPT_COLUMNS)}, only "
                    f"{sorted(row)}: set `prompt_column`."
                )
        for option, name in (("prompt_column", prompt_column), ("answer_column", answer_column)):
            if name not in row:
                raise ValueError(
                    f"{path}, line {number} has no {name!r}; its fields are {sorted(row)}. Add it, or set `{option}`."
                )
        problem, answer = row[prompt_column], row[answer_column]
        is_chat = isinstance(problem, list) and problem and all(isinstance(turn, dict) for turn in problem)
        if not (is_chat or (isinstance(problem, str) and problem)):
            raise ValueError(
                f"{path}, line {number}: {prompt_column!r} is a text or a list of messages, not {problem!r:.80}."
            )
        if is_chat and not all(isinstance(turn.get("content"), str) for turn in problem):
            raise ValueError(f"{path}, line {number}: a message has no text as `content`: {problem!r:.200}.")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "" or answer != answer:
            raise ValueError(f"{path}, line {number}: {answer_column!r} is a text or a number, not {answer!r:.80}.")
        if not isinstance(answer, str):  # `str` of a float would write 0.00001 as 1e-05
            answer = json.loads(line, parse_float=str, parse_int=str, parse_constant=str)[answer_column]
        answer = answer.rpartition("####")[2].strip()
        rows.append({"prompt": _prompt(problem, instruction, as_chat), "answer": answer})
        for name in TEMPLATE_COLUMNS:
            if row.get(name) and isinstance(rows[-1]["prompt"], str):
                raise ValueError(
                    f"{path}, line {number}: `{name}` are for the chat template, which reads no text. Give the "
                    "problem as a list of messages, or set `as_chat`."
                )
            given[name].append(row.get(name) or None)
    if not rows:
        raise ValueError(f"{path} is empty: give JSON lines with a problem and its answer.")
    benchmark = Dataset.from_list(rows)
    # As JSON, because a column of schemas would give each of them the fields of all others.
    given["tools"] = [tools if isinstance(tools, str | None) else json.dumps(tools) for tools in given["tools"]]
    for name, values in given.items():
        if any(values):
            benchmark = benchmark.add_column(name, values)
    return benchmark


def _json_lines(path: str | Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yields the number, the text and the content of each line that is not blank."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Give JSON lines.") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}). Give JSON lines.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is no JSON object with fields, but {line.strip()!r:.80}.")
        yield number, line, row


def _prompt(problem: Any, instruction: str | None, as_chat: bool) -> str | list[dict[str, Any]]:
    def instructed(text: str) -> str:
        return f"{text}\n\n{instruction}" if instruction else text

    if isinstance(problem, str):
        return [{"role": "user", "content": instructed(problem)}] if as_chat else instructed(problem)
    *before, last = problem
    return [*before, {**last, "content": instructed(last["content"])}]


@takes(SamplingOptions, **EVALUATION_DEFAULTS)
def evaluate_model(
    model: str | Path | PreTrainedModel,
    benchmark: Dataset,
    *,
    metric: str = "math_accuracy",
    name: str = "benchmark",
    answer_after: str = "#",
    teacher: str | Path | PreTrainedModel | Teacher | None = None,
    output_dir: str | Path | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    options: SamplingOptions,
) -> dict[str, Any]:
    """
    Samples answers to a benchmark's problems and grades them; with a teacher, also estimates the reverse KL divergence
    from it on fresh answers, one per problem, at temperature 1 and top-p 1.

    With `output_dir`, a run that was killed continues when it is started again with the same arguments, and writes the
    same files: see [`collect_rollouts`]. Under `accelerate launch`, every process takes its share.

    Args:
        model (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            A local directory or Hub id, a loaded model, or the address of a vLLM server: see [`collect_rollouts`].
        benchmark ([`~datasets.Dataset`]):
            `prompt` and `answer`, as [`load_benchmark`] gives them.
        metric (`str`, *optional*, defaults to `"math_accuracy"`):
            `"math_accuracy"`, see [`~metrics.grade_math`], or `"exact_answer"`, see [`~metrics.grade_exact`].
        name (`str`, *optional*, defaults to `"benchmark"`):
            Name of the benchmark in the result.
        answer_after (`str`, *optional*, defaults to `"#"`):
            Marker of `"exact_answer"`.
        teacher (`str`, `Path`, [`~transformers.PreTrainedModel`] or [`Teacher`], *optional*):
            The model to measure the divergence from: a local directory or Hub id, a loaded model, or a served one as
            in [`score_rollouts`], which is declared to be the model that its server reports.
        output_dir (`str` or `Path`, *optional*):
            Directory for the answers, `outcomes.jsonl` and `metrics.json`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The model's tokenizer. Loaded from its path if not given.
        **options:
            The fields of [`~generation.options.SamplingOptions`]: `num_generations`, answers per problem (1),
            `temperature` (0.6) and `top_p` (0.95) of the graded answers, `engine`, `max_completion_length`, `stop`,
            `batch_size`, `rows_per_shard`, `seed`, `chat_template_kwargs`, `revision`, `trust_remote_code`, `dtype`,
            `model_init_kwargs`. The teacher is loaded with the same options except the revision.

    Returns:
        `dict`: Content of `metrics.json`: `benchmark`, `model`, `fingerprint`, `settings`, `metrics` and `versions`.

    Raises:
        ValueError: An unknown metric, several greedy answers per problem, a reference answer that cannot be parsed, or
            as in [`collect_rollouts`] and [`score_rollouts`].
        ImportError: `metric` is `"math_accuracy"` and math-verify is not installed.
        ShardError, ServerError: As [`collect_rollouts`].
    """
    model, teacher = as_name(model), as_name(teacher)
    state = processes()
    _check_benchmark(benchmark, metric, answer_after, options)
    teacher_fingerprint = None
    loading = {"trust_remote_code": options.trust_remote_code, "dtype": options.dtype}
    loading["model_init_kwargs"] = {
        name: value for name, value in (options.model_init_kwargs or {}).items() if name != "revision"
    }
    if teacher is not None:
        # A missing teacher raises an error before answers are sampled.
        address = getattr(teacher, "base_url", teacher)
        kwargs = hub_kwargs({"trust_remote_code": options.trust_remote_code} | loading["model_init_kwargs"])
        if is_address(address):
            teacher_fingerprint = on_main_process(state, lambda: fingerprint_teacher(served_model(address), **kwargs))
        else:
            load_tokenizer(teacher, **kwargs)
    sampling = {option.name: getattr(options, option.name) for option in fields(options)}
    sampling["processing_class"] = processing_class

    def directory(part: str) -> Path | None:
        return Path(output_dir) / part if output_dir is not None else None

    samples = collect_rollouts(benchmark, model, output_dir=directory("samples"), ref_logprobs=False, **sampling)
    scored = None
    if teacher is not None:
        fresh_sampling = sampling | {"num_generations": 1, "temperature": 1.0, "top_p": 1.0}
        fresh = collect_rollouts(benchmark, model, output_dir=directory("fresh"), **fresh_sampling)
        scored = score_rollouts(
            fresh, teacher, output_dir=directory("fresh-scored"), top_k=0, fingerprint=teacher_fingerprint, **loading
        )

    def conclude() -> dict[str, Any]:
        outcomes, metrics = _grade(samples, metric, answer_after, options.num_generations)
        settings = {
            "metric": metric,
            "answer_after": answer_after if metric == "exact_answer" else None,
            "problems": len(benchmark),
            "benchmark_digest": describe(benchmark),
            **record_of(samples)["students"][0]["sampling"],
            "model_init_kwargs": pinned_kwargs(options.init_kwargs),
            "teacher": scored["teacher_fingerprint"][0] if scored is not None else None,
        }
        if scored is not None:
            metrics |= estimate_reverse_kl(scored["ref_logprobs"], scored["teacher_logprobs"])
        packages = ["transformers", "torch"]
        packages += ["math-verify"] if metric == "math_accuracy" else []
        packages += ["vllm"] if options.engine == "vllm" else []
        result = {
            "benchmark": name,
            "model": model if isinstance(model, str) else model.config._name_or_path,
            "fingerprint": samples["student_fingerprint"][0],
            "settings": {
                option: value for option, value in settings.items() if value is not None and option not in _NO_SETTINGS
            },
            "metrics": metrics,
            "versions": {"trl-lopd": __version__, **{package: version(package) for package in packages}},
        }
        if output_dir is not None:
            write_text(Path(output_dir) / "outcomes.jsonl", "".join(json.dumps(row) + "\n" for row in outcomes))
            write_text(Path(output_dir) / "metrics.json", json.dumps(result, indent=2) + "\n")
        return result

    return on_main_process(state, conclude)


def _check_benchmark(benchmark: Dataset, metric: str, answer_after: str, options: SamplingOptions) -> None:
    """Checks that answers can be graded, before they are sampled."""
    refuse_no_dataset(benchmark, "benchmark")
    if metric not in METRICS:
        raise ValueError(f"`metric` is one of {', '.join(METRICS)}, not {metric!r}.")
    if options.temperature == 0 and options.num_generations > 1:
        raise ValueError(
            f"At temperature 0 all {options.num_generations} answers to a problem are the same: set "
            "`num_generations` to 1, or a temperature."
        )
    if missing := [column for column in ("prompt", "answer") if column not in benchmark.column_names]:
        raise ValueError(f"The benchmark has no column {missing[0]!r}, only {benchmark.column_names}.")
    for row, answer in enumerate(benchmark["answer"]):
        if not isinstance(answer, str):
            raise ValueError(f"Row {row} of the benchmark: `answer` is a text, not {answer!r:.80}.")
    if metric == "math_accuracy":
        on_main_process(processes(), lambda: check_math_answers(benchmark["answer"]))
    else:
        grade_exact([], [], answer_after)


def _grade(
    samples: Dataset, metric: str, answer_after: str, num_generations: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the outcome of each answer, and the metrics."""
    pairs = samples["completion"][:], samples["answer"][:]
    graded = grade_math(*pairs) if metric == "math_accuracy" else grade_exact(*pairs, answer_after)
    if set(graded) == {"none"}:
        logger.warning(
            f"None of the {len(graded)} completions has an answer that can be read. "
            + (
                "Ask for one (`instruction`), or raise `max_completion_length`."
                if metric == "math_accuracy"
                else f"`answer_after` is {answer_after!r}."
            )
        )
    outcomes = [
        {"problem": row // num_generations, "sample": row % num_generations, "answer": answer, "outcome": outcome}
        for row, (answer, outcome) in enumerate(zip(pairs[1], graded, strict=True))
    ]

    def by_problem(values: list) -> list[list]:
        return [values[start : start + num_generations] for start in range(0, len(values), num_generations)]

    cut = [reason == "length" for reason in samples["finish_reason"]]
    tokens = lengths(samples)[1].tolist()
    return outcomes, summarize_samples(metric, by_problem(graded), by_problem(cut), by_problem(tokens))


def show(result: dict[str, Any]) -> None:
    """Prints the result of [`evaluate_model`] as a table."""
    settings = result["settings"]
    decoding = "temperature {temperature}, top-p {top_p}" if settings["temperature"] else "greedy"
    caption = f"problems: {{problems}}, answers to each: {{num_generations}}, {decoding}".format(**settings)
    title = f"{result['model']} on {result['benchmark']}"
    table = Table("metric", "value", "uncertainty", title=title, caption=caption, min_width=72)
    for name, estimate in result["metrics"].items():
        digits = 1 if name == "response_tokens" else 3
        if "ci" in estimate:
            uncertainty = "95% [{:.{d}f}, {:.{d}f}]".format(*estimate["ci"], d=digits)
        else:
            uncertainty = f"± {estimate['se']:.{digits}f}"
        table.add_row(name, f"{estimate['value']:.{digits}f}", uncertainty)
    Console(width=100).print(table)
