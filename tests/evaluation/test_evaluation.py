"""Benchmarks answered and graded, as functions and as `trl-lopd evaluate`."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import ranks
import wandb
from servers import stub_server
from tiny import make_model

from trl_lopd import (
    ShardError,
    cli,
    collect_rollouts,
    evaluate_model,
    fingerprint_teacher,
    load_benchmark,
    score_rollouts,
)
from trl_lopd.evaluation.metrics import estimate_reverse_kl

FAULTS = Path(__file__).parents[1] / "faults"
# A small model talks in words of a letter and a number; its answer is the last.
PROBLEMS = [{"question": f"w{i} w7", "answer": f"so 3 + 4\n#### w{6 + i % 3}"} for i in range(8, 20)]
SMALL = {"metric": "exact_answer", "answer_after": " ", "max_completion_length": 12}


@pytest.fixture(scope="module")
def benchmark_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return path


@pytest.fixture(scope="module")
def flags(benchmark_file, student_dir, teacher_dir) -> list[str]:
    """Of a run with several shards of everything."""
    given = {**SMALL, "benchmark": benchmark_file, "model_name_or_path": student_dir, "num_generations": 4}
    given |= {"teacher": teacher_dir, "rows_per_shard": 1, "temperature": 1.5, "top_p": 1.0}
    return ["evaluate", "--use_cpu", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


# ---- Benchmarks ----


@pytest.mark.parametrize("field", ["prompt", "problem", "question"])
def test_a_benchmark_s_fields_are_found(tmp_path, field):
    path = tmp_path / "b.jsonl"
    rows = [{field: "p", "answer": 25}, {field: "q", "answer": "1 + 1 = 2\n#### 1,002 "}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    expected = [{"prompt": "p", "answer": "25"}, {"prompt": "q", "answer": "1,002"}]
    assert load_benchmark(path).to_list() == expected


def test_numbers_are_answers_as_they_are_written(tmp_path):
    path = tmp_path / "b.jsonl"
    numbers = ["0.00001", "0.50", "1e400", "-7", "100000000000000000000000"]
    path.write_text("".join(f'{{"prompt": "p", "answer": {number}}}\n' for number in numbers))
    assert load_benchmark(path)["answer"][:] == numbers


def test_tools_are_read_by_the_template_or_refused(tmp_path):
    path = tmp_path / "b.jsonl"
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    chat = [{"role": "user", "content": "p"}]
    path.write_text(
        json.dumps({"prompt": chat, "answer": "1", "tools": tools, "chat_template_kwargs": {"thinks": False}})
        + "\n"
        + json.dumps({"prompt": chat, "answer": "2"})
    )
    benchmark = load_benchmark(path)
    assert [tools and json.loads(tools) for tools in benchmark["tools"]] == [tools, None]
    assert benchmark["chat_template_kwargs"][:] == [{"thinks": False}, None]
    path.write_text(json.dumps({"prompt": "p", "answer": "1", "tools": tools}))
    assert "tools" in load_benchmark(path, as_chat=True).column_names
    with pytest.raises(ValueError, match="line 1: `tools` are for the chat template.*`as_chat`"):
        load_benchmark(path)


def test_other_fields_conversations_and_instructions(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({"Problem": "p", "Answer": "1", "prompt": "other"}))
    instructed = load_benchmark(path, "Problem", "Answer", instruction=r"Use \boxed{}.", as_chat=True)
    assert instructed.to_list() == [
        {"prompt": [{"role": "user", "content": "p\n\nUse \\boxed{}."}], "answer": "1"},
    ]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    path.write_text(json.dumps({"prompt": messages, "answer": "1"}))
    assert load_benchmark(path)["prompt"][0] == messages
    assert [m["content"] for m in load_benchmark(path, instruction="i")["prompt"][0]] == ["s", "p\n\ni"]


@pytest.mark.parametrize(
    "lines, words",
    [
        ([], "is empty"),
        (["", " "], "is empty"),
        (['{"prompt": "p", "answer": "1"}', "{"], "line 2 is not JSON"),
        (["3"], "line 1 is no JSON object with fields, but '3'"),
        (['{"text": "p", "answer": "1"}'], r"line 1 has none of the fields prompt, problem, .*\['answer', 'text'\]"),
        (['{"prompt": "p"}'], r"line 1 has no 'answer'; its fields are \['prompt'\].*`answer_column`"),
        (['{"prompt": "p", "answer": "1"}', '{"prompt": null, "answer": "1"}'], "line 2: 'prompt' is a text"),
        (['{"prompt": 5, "answer": "1"}'], "line 1: 'prompt' is a text or a list of messages, not 5"),
        (['{"prompt": "p", "answer": ["2"]}'], r"line 1: 'answer' is a text or a number, not \['2'\]"),
        (['{"prompt": "p", "answer": NaN}'], "line 1: 'answer' is a text or a number, not nan"),
    ],
)
def test_what_is_no_benchmark(tmp_path, capsys, lines, words):
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=words):
        load_benchmark(path)
    # On the command line, as one line.
    assert cli.main(["evaluate", "--model_name_or_path", str(tmp_path), "--benchmark", str(path)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("trl-lopd: ") == 1 and "Traceback" not in printed and re.search(words, printed)


# ---- Evaluating ----


def test_the_figures_are_those_of_the_rollouts(benchmark_file, student_dir, teacher_dir):
    benchmark = load_benchmark(benchmark_file)
    options = {"batch_size": 16, "seed": 3, "max_completion_length": 12}
    drawn = {"temperature": 1.5, "top_p": 0.9, "rows_per_shard": 256, "ref_logprobs": False, **options}
    samples = collect_rollouts(benchmark, str(student_dir), num_generations=4, **drawn)
    # What the model says first is right, so that its other answers are so at times.
    said = [text.split()[-1] if " " in text else "w9" for text in samples["completion"]]
    benchmark = benchmark.remove_columns("answer").add_column("answer", said[::4])

    result = evaluate_model(
        str(student_dir),
        benchmark,
        name="small",
        metric="exact_answer",
        answer_after=" ",
        num_generations=4,
        temperature=1.5,
        top_p=0.9,
        teacher=str(teacher_dir),
        **options,
    )
    # The answers to a problem differ, and stay together.
    assert all(len(set(samples["completion"][i : i + 4])) > 1 for i in range(0, 48, 4))
    right = [
        " " in text and word == said[i // 4 * 4]
        for i, (text, word) in enumerate(zip(samples["completion"], said, strict=True))
    ]
    metrics = result["metrics"]
    assert 8 < sum(right) < 40  # else little is shown
    assert metrics["exact_answer"]["value"] == pytest.approx(sum(right) / len(right))
    by_problem = [right[i : i + 4] for i in range(0, len(right), 4)]
    assert metrics["pass@4"]["value"] == pytest.approx(sum(map(any, by_problem)) / len(by_problem))
    assert metrics["truncation_rate"]["value"] == pytest.approx(
        samples["finish_reason"][:].count("length") / len(right)
    )
    tokens = sum(map(len, samples["completion_ids"]))
    assert metrics["response_tokens"]["value"] == pytest.approx(tokens / len(right))

    fresh = collect_rollouts(benchmark, str(student_dir), temperature=1.0, top_p=1.0, **options)
    scored = score_rollouts(fresh, str(teacher_dir), top_k=0)
    expected = estimate_reverse_kl(scored["ref_logprobs"], scored["teacher_logprobs"])
    assert {name: metrics[name] for name in expected} == expected

    assert list(result) == ["benchmark", "model", "fingerprint", "settings", "metrics", "versions"]
    assert (result["benchmark"], result["model"]) == ("small", str(student_dir))
    assert result["fingerprint"] == fingerprint_teacher(student_dir).id
    settings = {"problems": 12, "num_generations": 4, "seed": 3, "metric": "exact_answer", "batch_size": 16}
    settings |= {"teacher": fingerprint_teacher(teacher_dir).id, "engine": "transformers"}
    assert settings.items() <= result["settings"].items()
    assert {"trl-lopd", "transformers", "torch"} == set(result["versions"])


def test_mathematics_is_graded_on_what_a_model_wrote(tmp_path, capsys):
    """Greedily, from a model whose words are numbers: the reference is what it says, written otherwise."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, 32)}, unk_token="<pad>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        tmp_path / "m"
    )
    make_model(seed=2).save_pretrained(tmp_path / "m")
    prompts = [f"{i}" for i in range(2, 12)]
    said = collect_rollouts(prompts, str(tmp_path / "m"), temperature=0, max_completion_length=3)["completion"]
    path = tmp_path / "numbers.jsonl"
    gold = [text.split()[-1] if text else "0" for text in said]
    gold = [rf"\frac{{{2 * int(number)}}}{{2}}" if i % 2 else "77" for i, number in enumerate(gold)]
    rows = [{"problem": prompt, "answer": answer} for prompt, answer in zip(prompts, gold, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model_name_or_path", str(tmp_path / "m"), "--benchmark", str(path), "--use_cpu"]
    assert cli.main(["evaluate", *flags, "--temperature", "0", "--max_completion_length", "3"]) == 0
    # By default the figures are with the model, under the benchmark's name.
    directory = tmp_path / "m" / "evaluations" / "numbers"
    result = json.loads((directory / "metrics.json").read_text())
    assert result["metrics"]["math_accuracy"]["value"] == 0.5 and "math-verify" in result["versions"]
    outcomes = [json.loads(line)["outcome"] for line in (directory / "outcomes.jsonl").read_text().splitlines()]
    assert outcomes == ["wrong", "right"] * 5
    printed = capsys.readouterr().out
    assert "math_accuracy" in printed and "greedy" in printed
    last = json.loads(printed.splitlines()[-1])
    assert last["run"] == "evaluation" and last["math_accuracy"] == 0.5 and last["output_dir"] == str(directory)


def files(directory: Path) -> dict[str, bytes]:
    kept = (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    directory = tmp_path_factory.mktemp("whole")
    assert cli.main([*flags, "--output_dir", str(directory)]) == 0
    return directory


@pytest.mark.slow
def test_killed_and_continued_by_two_processes_it_ends_in_the_same_files(tmp_path, flags, whole):
    job = ["trl_lopd.cli", *flags, "--output_dir", tmp_path]
    died = ranks.launch(FAULTS / "dies.py", tmp_path / "fresh", 3, *job, processes=None)
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    # In the middle: the second part is begun, nothing is concluded.
    assert len(list((tmp_path / "fresh").glob("*.parquet"))) < len(PROBLEMS)
    assert not (tmp_path / "metrics.json").exists()

    done = ranks.launch("-m", *job)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"run": "evaluation"') == 1
    expected = files(whole)
    assert files(tmp_path) == expected
    assert {"metrics.json", "outcomes.jsonl"} < set(expected) and len(expected) > 2 * len(PROBLEMS)


def test_finished_it_is_graded_again_without_a_model(tmp_path, flags, whole, monkeypatch):
    directory = Path(shutil.copytree(whole, tmp_path / "copy"))
    before, flags = files(directory), [*flags, "--output_dir", str(directory)]
    for module in ("rollouts", "scoring"):
        monkeypatch.setattr(
            f"trl_lopd.generation.{module}.load_model", lambda *args: pytest.fail("a model was loaded")
        )
    (directory / "metrics.json").unlink()
    assert cli.main(flags) == 0 and files(directory) == before
    # Another marker needs no other answers; another temperature does.
    assert cli.main([*flags, "--answer_after", "w9"]) == 0
    assert json.loads((directory / "metrics.json").read_text())["settings"]["answer_after"] == "w9"
    assert cli.main([*flags, "--temperature", "1"]) == 2


def test_wandb_gets_the_figures(tmp_path, flags, whole, monkeypatch):
    logged, real = [], wandb.Run.log
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(wandb.Run, "log", lambda run, values: (logged.append(values), real(run, values)))
    directory = shutil.copytree(whole, tmp_path / "copy")
    assert cli.main([*flags, "--output_dir", str(directory), "--report_to", "wandb"]) == 0
    figures = json.loads((directory / "metrics.json").read_text())["metrics"]
    assert {f"evaluation/{name}": figure["value"] for name, figure in figures.items()}.items() <= logged[-1].items()
    assert wandb.run is None
    wandb.teardown()  # it would write the runs of other tests into this one's directory


def test_completions_without_any_answer_are_worth_a_warning(student_dir, benchmark_file, caplog):
    result = evaluate_model(str(student_dir), load_benchmark(benchmark_file), **SMALL | {"answer_after": "####"})
    assert result["metrics"]["no_answer_rate"]["value"] == 1
    assert "None of the 12 completions has an answer that can be read. `answer_after` is '####'." in caplog.text


def test_a_served_model_is_evaluated(tmp_path, benchmark_file, student_dir):
    with stub_server("vllm", make_model(seed=2)) as server:
        result = evaluate_model(str(student_dir), load_benchmark(benchmark_file), engine=server.url, **SMALL)
    assert result["fingerprint"].endswith("#declared") and result["settings"]["engine"] == "VLLMServer"


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"metric": "bleu"}, ValueError, "`metric` is one of math_accuracy, exact_answer"),
        ({"temperature": 0, "num_generations": 2}, ValueError, "At temperature 0 all 2 answers"),
        ({"metric": "math_accuracy", "answers": ["1", r"\boxed{}"]}, ValueError, "no answer in 1 of 2 references"),
        ({"num_generations": 0}, ValueError, "`num_generations` is a whole number, 1 or more"),
        ({"temperature": math.nan}, ValueError, "`temperature` is a number, 0 or more, not nan"),
        ({"temperature": -0.5}, ValueError, "`temperature` is a number, 0 or more, not -0.5"),
        ({"top_p": math.nan}, ValueError, "`top_p` is a number above 0 and at most 1, not nan"),
        # What would take answers away from problems, or give them to others.
        ({"truncated": "drop", "num_generations": 2}, TypeError, "'truncated'"),
        ({"ref_logprobs": True}, TypeError, "'ref_logprobs'"),
        ({"batchsize": 2}, TypeError, "'batchsize'"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_a_model_is_loaded(student_dir, monkeypatch, changes, error, words):
    monkeypatch.setattr("trl_lopd.generation.rollouts.load_model", lambda *args: pytest.fail("a model was loaded"))
    from datasets import Dataset

    answers = changes.pop("answers", ["1", "2"])
    benchmark = Dataset.from_dict({"prompt": ["w5", "w6"], "answer": answers})
    with pytest.raises(error, match=words):
        evaluate_model(str(student_dir), benchmark, **{"metric": "exact_answer", **changes})


def test_a_benchmark_needs_its_columns(student_dir, benchmark_file):
    benchmark = load_benchmark(benchmark_file).remove_columns("answer")
    with pytest.raises(ValueError, match=r"no column 'answer', only \['prompt'\]"):
        evaluate_model(str(student_dir), benchmark, **SMALL)


def test_what_is_wrong_with_the_options_is_said_in_one_line(tmp_path, benchmark_file, student_dir, capsys):
    model = Path(shutil.copytree(student_dir, tmp_path / "model"))
    for given, words in [
        (["--model_name_or_path", "my-org/student"], "my-org/student is no local directory: give `output_dir`"),
        (["--model_name_or_path", str(model), "--benchmark", str(tmp_path / "no.jsonl")], "No such file"),
        (["--model_name_or_path", str(model), "--server_kwargs", "{timeout: 1}"], "`server_kwargs` are for a server"),
        (["--model_name_or_path", str(model), "--metric", "bleu"], "`metric` is one of"),
    ]:
        assert cli.main(["evaluate", "--use_cpu", "--benchmark", str(benchmark_file), *given]) == 2
        printed = capsys.readouterr().err
        assert printed.count("trl-lopd: ") == 1 and "Traceback" not in printed and words in printed


def test_another_model_in_its_place_is_refused(tmp_path, student_dir, teacher_dir, benchmark_file):
    benchmark = load_benchmark(benchmark_file)
    evaluate_model(str(student_dir), benchmark, output_dir=tmp_path, **SMALL)
    with pytest.raises(ShardError, match="student: "):
        evaluate_model(str(teacher_dir), benchmark, output_dir=tmp_path, **SMALL)
