"""What ends training before its time, in one process: losses that are no numbers, memory, SIGTERM."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import concatenate_datasets
from tiny import make_trainer
from transformers import TrainerCallback

from trl_lopd.training.collator import OfflineOPDCollator
from trl_lopd.training.monitoring.failures import rows_with


def spoil(monkeypatch, at, value):
    """Writes a value over the teacher's scores of the first sequence of one batch."""
    collate, batches = OfflineOPDCollator.__call__, 0

    def collate_and_spoil(self, rows):
        nonlocal batches
        batch = collate(self, rows)
        batches += 1
        if batches == at:
            for name in ("teacher_logprobs", "teacher_topk_logprobs"):
                batch[name][batch["sequences"] == 0] = value
        return batch

    monkeypatch.setattr(OfflineOPDCollator, "__call__", collate_and_spoil)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_training_before_the_step(tmp_path, student_dir, table, value, monkeypatch):
    class Weights(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.before = [p.detach().clone() for p in model.parameters()]

    weights = Weights()
    trainer = make_trainer(tmp_path, student_dir, table, callbacks=[weights], gradient_accumulation_steps=3)
    spoil(monkeypatch, 5, value)  # the second of the second step
    with pytest.raises(
        FloatingPointError, match=r"step 2 is (nan|inf|-inf) on process 0.*learning_rate` \(it is 0.001"
    ):
        trainer.train()
    assert trainer.state.global_step == 1
    assert all(torch.equal(p, before) for p, before in zip(trainer.model.parameters(), weights.before, strict=True))
    found = json.loads((tmp_path / "out" / "nonfinite_batch_rank0.json").read_text())
    assert (found["step"], found["rank"], len(found["sequences"])) == (2, 0, 4)  # of one batch of the three
    first, *others = found["sequences"]
    assert first["loss"] in ("nan", "inf", "-inf") and all(isinstance(other["loss"], float) for other in others)
    for sequence in found["sequences"]:
        (row,) = sequence["rows"]
        assert table[row]["prompt_ids"] + table[row]["completion_ids"] == sequence["input_ids"]


def test_of_a_stream_the_tokens_are_written(tmp_path, student_dir, table, monkeypatch):
    trainer = make_trainer(tmp_path, student_dir, table.to_iterable_dataset())
    spoil(monkeypatch, 2, float("nan"))
    with pytest.raises(FloatingPointError, match="step 2"):
        trainer.train()
    found = json.loads((tmp_path / "out" / "nonfinite_batch_rank0.json").read_text())["sequences"]
    assert [s["input_ids"] for s in found] == [
        row["prompt_ids"] + row["completion_ids"] for row in table.select(range(4, 8))
    ]
    assert "rows" not in found[0]


def test_rows_are_found_by_their_tokens(table):
    twice = concatenate_datasets([table, table])
    row = next(i for i, ids in enumerate(table["completion_ids"]) if len(ids) > 6)
    ids = table[row]["prompt_ids"] + table[row]["completion_ids"]
    assert rows_with(twice, ids) == [row, row + len(table)]
    assert rows_with(table, ids[:-3], truncated=True) == [row]
    assert rows_with(table, ids[:-3]) == [] == rows_with(table, ids, truncated=True)


def test_running_out_of_memory_says_what_takes_less(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table)
    mlp = trainer.model.get_decoder().layers[0].mlp
    mlp.forward = lambda *args: torch.empty(1 << 55, dtype=torch.uint8)
    match = r"(?s)can't allocate memory.*4 x \d+ tokens.*per_device_train_batch_size.*padding_free"
    with pytest.raises(RuntimeError, match=match) as e:
        trainer.train()
    # What `auto_find_batch_size` goes by.
    assert should_reduce_batch_size(e.value)


def test_another_error_is_left_alone(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table)

    def fail(*args):
        raise RuntimeError("something else")

    trainer.model.get_decoder().layers[0].mlp.forward = fail
    with pytest.raises(RuntimeError, match="^something else$"):
        trainer.train()


class Sigterm(TrainerCallback):
    """To this process, in the middle of a step."""

    def __init__(self, at):
        self.at = at

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.at - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_a_checkpoint_that_resumes_exactly(tmp_path, student_dir, table):
    def losses(trainer):
        return {x["step"]: x["loss"] for x in trainer.state.log_history if "loss" in x}

    # Dropout, so that the state of the random number generators matters.
    kwargs = dict(
        gradient_accumulation_steps=2,
        per_device_train_batch_size=3,
        save_strategy="steps",
        save_steps=100,
        enable_jit_checkpoint=True,
        model_init_kwargs={"attention_dropout": 0.2},
    )
    handler = signal.getsignal(signal.SIGTERM)
    whole = make_trainer(tmp_path / "whole", student_dir, table, **kwargs)
    whole.train()
    killed = make_trainer(tmp_path, student_dir, table, callbacks=[Sigterm(3)], **kwargs)
    with pytest.raises(SystemExit) as exit:
        killed.train()
    assert exit.value.code == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = make_trainer(tmp_path, student_dir, table, **kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert resumed.args.enable_jit_checkpoint


def fail_in_step(trainer, step, error="DefaultCPUAllocator: can't allocate memory"):
    """Has the forward of a step raise, by default what torch does when memory has run out."""
    forward, errors = trainer.model.get_decoder().layers[0].mlp.forward, [RuntimeError(error)]

    def fail(*args):
        if errors and trainer.state.global_step == step - 1:
            raise errors.pop()
        return forward(*args)

    trainer.model.get_decoder().layers[0].mlp.forward = fail


@pytest.fixture
def received():
    """Which SIGTERM reached the handler that was there before training."""
    signals = []
    before = signal.signal(signal.SIGTERM, lambda *args: signals.append(args))
    yield signals
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("batch_size_found", [False, True])
def test_sigterm_has_its_handler_back_after_an_error(tmp_path, student_dir, table, received, batch_size_found):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(
        tmp_path, student_dir, table, enable_jit_checkpoint=True, auto_find_batch_size=batch_size_found, max_steps=2
    )
    if batch_size_found:
        fail_in_step(trainer, 1)
        trainer.train()
        assert trainer.state.global_step == 2 and trainer._train_batch_size < 4
    else:
        fail_in_step(trainer, 2, error="something else")
        with pytest.raises(RuntimeError, match="something else"):
            trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(received) == 1


def test_sigterm_that_no_checkpoint_answered_is_passed_on(tmp_path, student_dir, table, received):
    """It came in a step that failed: the process would have ended without the option."""

    class AtStart(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(tmp_path, student_dir, table, enable_jit_checkpoint=True, callbacks=[AtStart()])
    fail_in_step(trainer, 2, error="something else")
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()
    assert len(received) == 1


def test_a_batch_size_is_not_found_in_the_middle_of_training(tmp_path, student_dir, table):
    """It would begin again at the first step, with weights that have been trained already."""
    trainer = make_trainer(tmp_path, student_dir, table, auto_find_batch_size=True, logging_steps=2)
    fail_in_step(trainer, 3)
    with pytest.raises(RuntimeError, match="Memory ran out after 2 steps.*`per_device_train_batch_size`"):
        trainer.train()


def test_metrics_of_an_attempt_that_failed_are_not_logged(tmp_path, student_dir, table):
    trainer = make_trainer(
        tmp_path, student_dir, table, auto_find_batch_size=True, gradient_accumulation_steps=2, max_steps=1
    )
    step, calls = trainer.training_step, []

    def fail_in_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return step(*args, **kwargs)

    trainer.training_step = fail_in_second
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    alone = make_trainer(
        tmp_path, student_dir, table, per_device_train_batch_size=trainer._train_batch_size, max_steps=1,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    alone.train()
    expected = alone.state.log_history[0]
    assert {name: log[name] for name in ("loss", "huber", "entropy")} == {
        name: expected[name] for name in ("loss", "huber", "entropy")
    }
