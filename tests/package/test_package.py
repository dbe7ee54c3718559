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
from transformers import AutoConfig, AutoTokenizer

import trl_lopd
from trl_lopd import check_teacher_consistency, fingerprint_teacher, load_table, read_model_card, validate_table
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


@pytest.mark.parametrize("name", ["addition", "addition, in order", "sums", "chains"])
def test_the_workings_of_the_tasks_are_right(build, name):
    task, rng, tokenizer, slips = build.TASKS[name], random.Random(0), build.make_tokenizer(), 0
    for problem in build.make_problems(task, rng, 300, set()):
        text = task.write_working(problem, rng)
        answer = str(sum(map(int, problem.rstrip("=").split("+"))))
        assert task.solve(problem) == answer
        # A slip is undone by the `!` behind it: what stays is a right working.
        slips += text.count("!")
        assert text.count("[") == text.count("]") == text.count("!")
        working, _, last = re.sub(r"[^,;|/#!]*\[[^]]*\]!", "", text).partition("#")
        assert last == answer
        for step in re.split("[,;|/]", working):
            digits, _, total = step.partition("=")
            assert sum(map(int, digits.split("+"))) == int(total)
        row = build.write_gold(task, problem, rng, tokenizer)
        written = tokenizer.decode(row["completion_ids"])
        assert written.endswith(f"#{answer}<eos>") and tokenizer.pad_token_id not in row["completion_ids"]
        assert len(row["learnt"]) == len(row["completion_ids"])
        assert name == "chains" or all(row["learnt"])
        assert len(tokenizer(working)["input_ids"]) + len(answer) + 2 <= task.max_answer_tokens
    assert bool(slips) == (name == "chains")


def test_nobody_learns_to_write_a_slip(build):
    """In gold data only what is wrong is left out: the right beginning of a slip and the `!` are learnt."""
    task, rng, tokenizer, found = build.TASKS["chains"], random.Random(0), build.make_tokenizer(), 0
    for _ in range(200):
        row = build.write_gold(task, task.make_problem(rng), rng, tokenizer)
        text = tokenizer.decode(row["completion_ids"][:-1])
        learnt = "".join(c if learns else " " for c, learns in zip(text, row["learnt"], strict=False))
        for i, character in enumerate(text):
            if character == "!":
                assert learnt[i] == "!" and learnt[i - 1] == " "
                found += 1
        for step in re.split("[,;|/#!]", learnt)[:-1]:
            digits, equals, total = step.partition("=")
            assert " " in step or sum(map(int, digits.split("+"))) == int(total)
    assert found > 100


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
    assert 0.5 <= student["accuracy"] <= 0.85 < teacher["accuracy"] < 1
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
    ],
)  # fmt: skip
def test_the_main_job_says_what_is_wrong_with_its_flags(flags, message, tmp_path):
    done = ranks.launch(ROOT / "examples" / "train.py", *flags, "--output_dir", tmp_path, processes=None)
    assert done.returncode != 0 and re.search(message, done.stderr)


def test_the_readme_s_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(import random.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    code = code.replace("runs/readme", str(tmp_path / "out")).replace("max_steps=100", "max_steps=1")
    code = code.replace("range(2000)", "range(64)")
    (tmp_path / "readme.py").write_text(code)
    done = ranks.launch(tmp_path / "readme.py", processes=None, cwd=ROOT, env={"WANDB_MODE": "disabled"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "before" in done.stdout and "after" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
