"""What a person sees of a run: six numbers, and no more lines than there are logs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ranks
from conftest import make_trainer, without_topk
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
    assert len(out.splitlines()) == 4 and re.fullmatch(r"4 steps in [\d.]+ s", out.splitlines()[-1])
    assert "it/s" not in err
    for log in (logs.logs[0], trainer.state.log_history[0]):
        assert len(log) > 20 and "importance_weight/p99" in log


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
    assert re.match(r"step 1: effopd/score_1 [\d.]+, effopd/score_3 [\d.]+", lines[2])


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
