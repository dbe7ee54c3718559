"""Failures that end training early: a loss that is NaN or infinite, out of memory, SIGTERM."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from ...table.schema import TableRows, lengths


class LossCheck:
    """
    Check that losses are finite. If a loss is NaN or infinite on any process, it raises `FloatingPointError` on all of
    them before the optimizer step, and writes the batches to `output_dir/nonfinite_batch_rank{rank}.json`.

    It costs a gather of one number per batch and a synchronization with the device per optimizer step. Gradients are
    not checked: under fp16 loss scaling some overflow, and the scaler skips those steps.

    Args:
        trainer ([`OfflineOPDTrainer`]): The trainer.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.reset()

    def reset(self) -> None:
        """Discards the batches of an unfinished optimizer step."""
        self.batches: list[tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]] = []

    def __call__(self, loss: torch.Tensor, inputs: dict[str, torch.Tensor], sequence_loss: torch.Tensor) -> None:
        """Records a loss, and checks those of an optimizer step. Call it before each backward pass, because that of
        DeepSpeed may include the optimizer step.

        Args:
            loss: scalar, the loss of the batch.
            inputs: the batch.
            sequence_loss: `(sequences,)`, the loss of each sequence.
        """
        self.batches.append((loss.detach().float(), inputs, sequence_loss))
        accelerator = self.trainer.accelerator
        if not accelerator.sync_gradients:
            return
        batches = self.batches
        self.reset()
        losses = accelerator.gather(torch.stack([loss for loss, _, _ in batches]).unsqueeze(0)).cpu()
        if losses.isfinite().all():
            return
        args, step, problems = self.trainer.args, self.trainer.state.global_step + 1, []
        for rank, values in enumerate(losses):
            bad = ~values.isfinite()
            if bad.any():
                path = os.path.join(args.output_dir, f"nonfinite_batch_rank{rank}.json")
                problems.append(f"{values[bad][0].item()} on process {rank}, whose batch is in {path}")
                if rank == accelerator.process_index:
                    sequences = self._sequences([batch for batch, is_bad in zip(batches, bad, strict=True) if is_bad])
                    os.makedirs(args.output_dir, exist_ok=True)
                    with open(path, "w") as file:
                        json.dump({"step": step, "rank": rank, "sequences": sequences}, file)
        # A launcher ends all processes when the first one ends, so wait until all files are written.
        accelerator.wait_for_everyone()
        raise FloatingPointError(
            f"The loss of step {step} is {'; '.join(problems)}. The step was not taken. If losses rose before it, "
            f"lower `learning_rate` (it is {args.learning_rate:g}) or warm up, and resume from a checkpoint before "
            "it. If it stays with the same rows, look at their teacher scores with `trl-lopd inspect`: drop rows that "
            "are far off the others, or raise `teacher_logprob_floor`. In fp16, try bf16."
        )

    def _sequences(self, batches: list[tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]]) -> list[dict]:
        entries = []
        for _, inputs, sequence_loss in batches:
            losses = sequence_loss.tolist()
            for ids, cut, loss in zip(_split(inputs), inputs["truncated"].tolist(), losses, strict=True):
                entries.append({"loss": loss if np.isfinite(loss) else str(loss), "input_ids": ids.tolist()})
                if isinstance(self.trainer.train_dataset, Dataset):
                    entries[-1]["rows"] = rows_with(self.trainer.train_dataset, ids, truncated=cut)
        return entries


def _split(inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """Returns the token ids of each sequence of a batch."""
    ids = inputs["input_ids"].cpu().numpy()
    if "position_ids" in inputs:
        starts = np.flatnonzero(inputs["position_ids"].cpu().numpy()[0] == 0)
        return np.split(ids[0], starts[1:])
    return [row[:length] for row, length in zip(ids, inputs["attention_mask"].sum(1).tolist(), strict=True)]


def rows_with(dataset: Dataset, ids: np.ndarray, truncated: bool = False) -> list[int]:
    """
    Finds the rows of a table that consist of these tokens, and returns their indices.

    Args:
        dataset ([`~datasets.Dataset`]): A valid table.
        ids (`np.ndarray`): Token ids of prompt and completion, `(tokens,)`.
        truncated (`bool`, *optional*, defaults to `False`): Find the longer rows that begin with these tokens instead.
    """
    total = np.add(*lengths(dataset))
    rows, matches = TableRows(dataset.select_columns(["prompt_ids", "completion_ids"])), []
    for index in np.flatnonzero(total > len(ids) if truncated else total == len(ids)).tolist():
        row = rows[index]
        if np.array_equal(np.concatenate([row["prompt_ids"], row["completion_ids"]])[: len(ids)], ids):
            matches.append(index)
    return matches


def out_of_memory_advice(trainer: Trainer, shape: tuple[int, int]) -> str:
    """Returns the size of the last batch before memory ran out, and the options that reduce memory.

    Args:
        trainer ([`OfflineOPDTrainer`]): The trainer.
        shape: `(batch, time)`, shape of the last `input_ids`.
    """
    args = trainer.args
    kind = "train" if trainer.model.training else "eval"
    option = f"per_device_{kind}_batch_size"
    return (
        f"(Process {args.process_index}, after {trainer.state.global_step} steps; the last batch had "
        f"{shape[0]} x {shape[1]} tokens, padding included. What takes less memory: a smaller `{option}` (it is "
        f"{getattr(args, option)}), with more `gradient_accumulation_steps` if it is for training; "
        "`max_tokens_per_device` and `padding_free=True`; a smaller `max_completion_length`; "
        f"`activation_checkpointing=True` (it is {bool(args.activation_checkpointing)}); a `peft_config`; ZeRO-3 or "
        "FSDP2 on several processes.)"
    )


class SaveOnSigterm(TrainerCallback):
    """
    Callback that saves a checkpoint and ends training at the end of the step in which SIGTERM reached any process.

    It replaces transformers' own callback for `enable_jit_checkpoint`. There, each process decides by itself, so
    processes may stop at different steps. It also saves in the middle of a step, when DeepSpeed may have taken the
    step but the trainer has not counted it.

    The signal is handled inside `with callback:`, also if training starts several times there. If an error ends
    training before the signal is acted on, the signal goes to the previous handler.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The processes, which decide together.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = self.stopped = False

    def __enter__(self) -> None:
        self.received = self.stopped = False
        self._handler = signal.signal(signal.SIGTERM, self._receive)

    def __exit__(self, error: type[BaseException] | None, *args: object) -> None:
        # `None` stands for a handler that was not installed from Python, which `signal` does not accept.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._handler is None else self._handler)
        if error is not None and self.received:
            signal.raise_signal(signal.SIGTERM)

    def _receive(self, signum, frame) -> None:
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor([self.received], device=self.accelerator.device)
        if self.accelerator.gather(received).any():
            self.stopped = control.should_training_stop = control.should_save = True
            # An evaluation would use up the time that is left until SIGKILL.
            control.should_evaluate = False
