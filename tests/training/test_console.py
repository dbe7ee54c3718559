"""What a person sees of a run: six numbers, and no more lines than there are logs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ranks
from peft import LoraConfig
from tiny import make_model, make_trainer, save_student, without_topk
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from trl_lopd import EffOPDCallback, OfflineOPDTrainer

ROOT = Path(__file__).parents[2]
SIX = r"loss [\d.e-]+, reverse KL [\d.e-]+, entropy [\d.e-]+, importance ESS [\d.e-]+"
TRAINED = rf"step (\d+)/4: {SIX}, learning rate [\d.e-]+, gradient norm [\d.e-]+"
EVALUATED = rf"step (\d+), eval: {SIX}"


class Logs(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_log_is_a_line_of_six_numbers(tmp_path, student_dir, table, capfd, disable_tqdm):
    """Where nobody sees a bar move; reporters and the history get all."""
    logs = Logs()
    trainer = make_trainer(
        tmp_path, student_dir, table, eval_dataset=table, callbacks=[logs], max_steps=4, logging_steps=2,
        eval_strategy="steps", eval_steps=4, disable_tqdm=disable_tqdm,
    )  # fmt: skip
    capfd.readouterr()
    trainer.train()
    out, err = capfd.readouterr()
    assert [re.fullmatch(TRAINED, line)[1] for line in out.splitlines() if "/4: " in line] == ["2", "4"]
    assert [re.fullmatch(EVALUATED, line)[1] for line in out.splitlines() if "eval" in line] == ["4"]
    assert len(out.splitlines()) == 5 and re.fullmatch(r"4 steps in [\d.]+ s", out.splitlines()[-1])
    assert "it/s" not in err
    for log in (logs.logs[0], trainer.state.log_history[0]):
        assert len(log) > 20 and "importance_weight/p99" in log


def first_line(capsys, trainer):
    capsys.readouterr()
    trainer.train()
    return capsys.readouterr().out.splitlines()[0]


def test_the_first_line_says_what_the_training_takes(tmp_path, tokenizer, teacher_dir, table, capsys):
    # In the file of the optimizer each parameter has a kilobyte of its own.
    student_dir = save_student(tmp_path / "student", make_model(seed=2, hidden=128), tokenizer, teacher_dir)
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, student_dir, table, max_completion_length=4, **changes)
    line = first_line(capsys, trainer)
    tokens = [len(row["prompt_ids"]) + min(4, len(row["completion_ids"])) for row in table]
    assert line.startswith(
        f"24 rows of {sum(tokens)} tokens, at most {max(tokens)} a row; 8 optimizer steps, 2.67 passes."
    )
    # Weights, gradients and two of Adam; weights and Adam on disk.
    size = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    assert line.endswith(
        f"Weights, gradients and Adam: {4 * size / 1e9:.3g} GB in each process; checkpoints on disk: 3 x "
        f"{3 * size / 1e9:.3g} GB."
    )
    saved = sorted((tmp_path / "out").glob("checkpoint-*"))
    on_disk = [sum((path / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")) for path in saved]
    assert len(saved) == 3 and on_disk == pytest.approx([3 * size] * 3, rel=0.05)


def test_the_first_line_counts_what_adapters_take(tmp_path, student_dir, table, capsys):
    peft_config = LoraConfig(r=2, target_modules="all-linear")
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(tmp_path, student_dir, table, peft_config=peft_config, save_only_model=True, **changes)
    line = first_line(capsys, trainer)
    trained = 4 * sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    memory = 4 * sum(parameter.numel() for parameter in trainer.model.parameters()) + 3 * trained
    assert line.endswith(f"{memory / 1e9:.3g} GB in each process; checkpoints on disk: 1 x {trained / 1e9:.3g} GB.")


def test_the_first_line_says_what_is_not_known_of_a_stream(tmp_path, student_dir, table, capsys):
    trainer = make_trainer(tmp_path, student_dir, table.to_iterable_dataset(), max_steps=1, optim="sgd")
    line = first_line(capsys, trainer)
    assert line.startswith(
        "A stream, whose rows and tokens are not known beforehand; 1 optimizer step. Weights and gradients: "
    )


def test_what_a_table_lacks_is_left_out(tmp_path, student_dir, table, capsys):
    rows = without_topk(table).remove_columns("ref_logprobs")
    make_trainer(tmp_path, student_dir, rows, eval_dataset={"math": rows}).evaluate()
    assert re.fullmatch(r"step 0, eval_math: loss [\d.]+, entropy [\d.]+", capsys.readouterr().out.strip())


def test_metrics_of_one_s_own_and_searches_are_shown(tmp_path, student_dir, table, capsys):
    class Graded(OfflineOPDTrainer):
        def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            output.metrics[f"{metric_key_prefix}_solved"] = 0.25
            return output

    plain = make_trainer(tmp_path, student_dir, table, eval_dataset=table, max_steps=1, learning_rate=1e-5)
    trainer = Graded(str(student_dir), plain.args, table, eval_dataset=table)
    trainer.add_callback(EffOPDCallback(trainer))
    trainer.evaluate()
    trainer.log({"mine": 1.5, "of": "words"})
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"step 0, eval: {SIX}, eval_solved 0.25", lines[0])
    assert lines[1] == "step 0: mine 1.5, of words"
    assert re.match(r"step 1: effopd/score_1 [\d.]+, effopd/score_3 [\d.]+", lines[3])


def test_a_printer_of_one_s_own_is_left_alone(tmp_path, student_dir, table, capsys):
    make_trainer(tmp_path, student_dir, table, callbacks=[PrinterCallback()], max_steps=1).train()
    assert "'huber'" in capsys.readouterr().out


def test_in_a_terminal_a_bar_has_the_numbers(tmp_path, student_dir, table):
    table.save_to_disk(tmp_path / "table")
    script = Path(__file__).parent / "terminal_script.py"
    done = ranks.launch(
        script, student_dir, tmp_path / "table", tmp_path / "out", processes=None, env={"TERM": "xterm"}
    )
    written = done.stdout
    assert done.returncode == 0, written[-3000:]
    shown = re.split(r"[\r\n]+", written)
    bar = next(line for line in reversed(shown) if "4/4" in line)
    words = ("loss", "KL", "entropy", "ESS", "lr", "grad")
    assert re.search(", ".join(rf"{word} [\d.e-]+" for word in words), bar), shown
    assert [line for line in shown if "eval: " in line and re.search(EVALUATED, line)] and "'loss'" not in written


def lines_of(done):
    return [line for line in re.split(r"[\r\n]+", done.stdout + done.stderr) if line.strip()]


def train_example(tmp_path, *flags):
    words = (ROOT / "examples" / "train.py", "--max_steps", 2, "--output_dir", tmp_path / "run", *flags)
    done = ranks.launch(*words, processes=None, cwd=tmp_path, timeout=600, env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_main_job_prints_its_table_and_little_else(tmp_path):
    """Into a file: a line for each log and each evaluation."""
    prompts = (ROOT / "examples" / "quickstart" / "prompts.jsonl").read_text().splitlines(keepends=True)[:32]
    (tmp_path / "prompts.jsonl").write_text("".join(prompts))
    done = train_example(tmp_path, "--eval_prompts", tmp_path / "prompts.jsonl")
    lines = lines_of(done)
    assert len(lines) < 30, lines
    assert not [line for line in lines if re.search(r"^{|it/s|pin_memory|accelerator", line)], lines
    assert sum("eval: loss" in line for line in lines) == 2
    for model in ("SFT student", "offline OPD", "teacher"):
        assert sum(model in line for line in lines) == 2  # it is evaluated, and in the table


def test_the_main_job_can_say_more(tmp_path):
    quickstart = ROOT / "examples" / "quickstart"
    flags = ("--model_name_or_path", quickstart / "student", "--dataset_name", quickstart / "table", "--use_cpu")
    done = train_example(tmp_path, *map(str, flags), "-v")
    assert "Loading weights" in done.stderr
