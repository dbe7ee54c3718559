"""The package as a user meets it: its import, its names, the bundled quickstart, the examples."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import trl
from transformers import AutoConfig, AutoTokenizer

import trl_lopd
from trl_lopd import (
    check_teacher_consistency,
    fingerprint_teacher,
    generate_sft_data,
    load_table,
    read_model_card,
    validate_table,
)
from trl_lopd.identity.fingerprint import same_teacher

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


def test_import_loads_no_torch():
    code = "import sys, trl_lopd; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_exists_and_no_other_does():
    for name in trl_lopd.__all__:
        assert getattr(trl_lopd, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = trl_lopd.nonsense


def test_the_bundled_quickstart_is_consistent_and_small():
    teacher = fingerprint_teacher(str(QUICKSTART / "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "student")
    config = AutoConfig.from_pretrained(QUICKSTART / "student")
    student, card = fingerprint_teacher(QUICKSTART / "student"), read_model_card(QUICKSTART / "student")
    for split in load_table(QUICKSTART / "table").values():
        verdict = check_teacher_consistency(card, split, student_fingerprint=student)
        assert (verdict.evidence, verdict.rows, verdict.warnings) == ("verified", "intact", ())
        summary = validate_table(split, tokenizer, config)
        assert summary.top_k == 4
        (scored_by,) = summary.teacher_fingerprints
        assert same_teacher(scored_by, teacher)
    (wrote_the_sft_data,) = card["sft_teachers"]
    assert same_teacher(wrote_the_sft_data["id"], teacher)
    assert sum(f.stat().st_size for f in QUICKSTART.rglob("*") if f.is_file() and f.suffix != ".pyc") <= 5_000_000


@pytest.fixture
def build(monkeypatch):
    monkeypatch.syspath_prepend(QUICKSTART)
    return importlib.import_module("build")


@pytest.mark.parametrize("name", ["addition", "addition, in order", "sums", "claims", "claims, turned"])
def test_the_workings_of_the_tasks_are_right(build, name):
    task, rng, tokenizer, slips = build.TASKS[name], random.Random(0), build.make_tokenizer(), 0
    for problem in build.make_problems(task, rng, 300, set()):
        text = task.write_working(problem, rng)
        slips += text.count("[")
        working, _, answer = text.partition("#")
        assert task.solve(problem) == answer
        steps = re.split("[,;|/]", working)
        if "claims" in name:
            claim, *steps = steps
            _, *numbers = problem.rstrip("=").split(",")
            assert claim in (answer, f"[{1 - int(answer)}]")
            ends = [sum(map(int, number)) % 10 for number in numbers]
            assert [int(steps[i][-1]) for i in (1, 3)] == ends
            assert int(answer) == ends.index(max(ends)) and ends[0] != ends[1]
        else:
            assert answer == str(sum(map(int, problem.rstrip("=").split("+"))))
        for step in steps:
            digits, _, total = step.partition("=")
            assert sum(map(int, digits.split("+"))) == int(total)
        row = build.write_gold(task, problem, rng, tokenizer)
        written = tokenizer.decode(row["completion_ids"])
        assert written.endswith(f"#{answer}<eos>") and tokenizer.pad_token_id not in row["completion_ids"]
        assert len(row["completion_ids"]) <= task.max_answer_tokens
        # What is wrong is in the text, and nobody learns to write it.
        assert row["learnt"][1:] == [1] * (len(row["learnt"]) - 1)
        assert row["learnt"][0] == ("claims" not in name or written[0] == answer)
    assert bool(slips) == ("claims" in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"other_task": "addition, in order"}, "not about the problems of 'claims'"),
        ({"rollouts": 500}, "cannot score 600 of 500 rollouts"),
    ],
)
def test_another_teacher_has_rollouts_to_score(build, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        build.main(build.Arguments(output_dir=str(tmp_path), **options))


class RecordingSFT(trl.SFTTrainer):
    """Keeps what it would train on, and does not train."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        RecordingSFT.rows = [(row["input_ids"], row["labels"]) for row in self.train_dataset]

    def train(self, *args, **kwargs):
        pass


def test_the_trainer_of_the_tasks_learns_prompts_and_no_slip(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SFTTrainer", RecordingSFT)
    task, rng, tokenizer = build.TASKS["claims"], random.Random(0), build.make_tokenizer()
    rows = [build.write_gold(task, task.make_problem(rng), rng, tokenizer) for _ in range(40)]
    build.fine_tune(build.make_model(tokenizer, seed=0, hidden=16, layers=1), tokenizer, rows, tmp_path, 1, seed=0)
    left_out = 0
    for row, (ids, labels) in zip(rows, RecordingSFT.rows, strict=True):
        learnt = [1] * len(row["prompt_ids"]) + row["learnt"]
        assert ids == row["prompt_ids"] + row["completion_ids"]
        assert labels == [id if learns else -100 for id, learns in zip(ids, learnt, strict=True)]
        left_out += labels.count(-100)
    assert 0 < left_out < len(rows)


@pytest.mark.parametrize("length, rows", [(2, 4), (16, 3)])
def test_the_example_of_sft_learns_answers_alone(tmp_path, teacher_dir, student_dir, monkeypatch, length, rows):
    # The last prompt fills `max_length`, so TRL leaves its row out.
    prompts, options = ["w3 w4", "w5 w6", "w7 w8", "w9 " * length], {"max_completion_length": 4, "truncated": "keep"}
    generate_sft_data(prompts, str(teacher_dir), output_dir=tmp_path / "sft", **options)
    spec = importlib.util.spec_from_file_location("sft", ROOT / "examples" / "sft.py")
    sft = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sft)
    monkeypatch.setattr(sft, "SFTTrainer", RecordingSFT)
    args = trl.SFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_length=16)
    sft.main(
        trl.ScriptArguments(dataset_name=str(tmp_path / "sft")),
        args,
        trl.ModelConfig(model_name_or_path=str(student_dir)),
    )
    data = load_table(tmp_path / "sft", split="train").select(range(rows))
    for row, (ids, labels) in zip(data, RecordingSFT.rows, strict=True):
        assert ids == row["prompt_ids"] + row["completion_ids"]
        assert labels == [-100] * len(row["prompt_ids"]) + row["completion_ids"]
    assert read_model_card(tmp_path / "out")["sft_rows"] == len(data)


@pytest.mark.slow
def test_the_main_job_runs(tmp_path):
    """`accelerate launch examples/train.py --compare`, two steps of each kind, on the bundled data and a sixth of the
    prompts."""
    prompts = (QUICKSTART / "prompts.jsonl").read_text().splitlines(keepends=True)[:64]
    (tmp_path / "prompts.jsonl").write_text("".join(prompts))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(ROOT / "examples" / "train.py")),
        *("--compare", "--max_steps", "2", "--output_dir", str(tmp_path / "run")),
        *("--eval_prompts", str(tmp_path / "prompts.jsonl")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["model"] for row in rows] == [
        "SFT student",
        "offline OPD",
        "offline OPD, reverse KL (beta=1)",
        "offline OPD, sampled, as in the paper",
        "offline OPD, another teacher's scores",
        "teacher",
    ]
    student, *_, teacher = rows
    assert 0.5 <= student["accuracy"] <= 0.85 < teacher["accuracy"]
    assert student["fresh"] > 0 and "fresh" not in teacher
    for row in rows[:-1]:
        assert row["model"] in done.stdout and row["held_out"] > 0
    evaluations = [json.loads(path.read_text()) for path in (tmp_path / "run" / "evaluations").glob("*/metrics.json")]
    assert {evaluation["metrics"]["exact_answer"]["value"] for evaluation in evaluations} == {
        row["accuracy"] for row in rows
    }
    assert read_model_card(str(tmp_path / "run"))["opd_rounds"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "x"], "Give both"),
        (["--lora_r", "8"], "`lora_r` is for adapters.*--use_peft"),
        (["--model_name_or_path", "m", "--dataset_name", str(QUICKSTART / "table"), "--dataset_train_split", "trian"],
         "no split 'trian'.*test.*train"),
        (["--model_name_or_path", "m", "--dataset_name", str(QUICKSTART / "table" / "train.parquet"),
          "--dataset_train_split", "trian"], "no split 'trian', only .'train'."),
        # Before the model is loaded: there is none.
        (["--model_name_or_path", "m", "--dataset_name", str(QUICKSTART / "table"), "--eval_prompts", "nope.jsonl"],
         "No such file.*nope.jsonl"),
        (["--model_name_or_path", "m", "--dataset_name", str(QUICKSTART / "table"), "--teacher", "no-teacher",
          "--eval_prompts", str(QUICKSTART / "prompts.jsonl")], "no-teacher"),
    ],
)  # fmt: skip
def test_the_main_job_says_what_is_wrong_with_its_flags(flags, message, tmp_path):
    done = ranks.launch(ROOT / "examples" / "train.py", *flags, "--output_dir", tmp_path, processes=None)
    assert done.returncode != 0 and re.search(message, done.stderr)


def test_the_readme_s_example_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (code,) = [block for block in blocks if "score_rollouts(" in block]
    code = code.replace("runs/readme", str(tmp_path / "out")).replace("max_steps=100", "max_steps=1")
    code = code.replace("[:2000]", "[:64]")
    (tmp_path / "readme.py").write_text(code)
    done = ranks.launch(tmp_path / "readme.py", processes=None, cwd=ROOT, env={"WANDB_MODE": "disabled"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "before" in done.stdout and "after" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
