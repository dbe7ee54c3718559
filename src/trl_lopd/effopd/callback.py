"""
EffOPD (arXiv 2605.11739): fewer training steps by extrapolating the weights along the direction of training.

A search moves the weights along their change since the last one, `W_base + m * D`, and keeps what a gate confirms;
docs/effopd.md has its steps. Optimizer and scheduler are not changed. Every process moves the part of the weights that
it owns, and no weights are gathered.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..own_logits import evaluating
from ..table.schema import rows_of_each
from ..table.store import write_text
from .gates import paired_p_value, resolve_gate

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

HISTORY = "effopd_history.json"
# Directory of EffOPD's state in a checkpoint.
DIRECTORY = "effopd"

# The number of a layer in the name of a parameter.
_LAYER = re.compile(r"\.\d+\.")
# The first factors of LoRA, which do not move by default.
_FIRST_FACTORS = re.compile(r"\blora_(embedding_)?A\b")

# Entries of the last direction that each process keeps, to compute the cosine with the next one.
_DIRECTION_SAMPLES = 2**20
# Steps between searches of the default schedule, after the first few searches.
_SHORT = 8
# Number of failed searches after which a warning is logged.
_PATIENCE = 3


class EffOPDCallback(TrainerCallback):
    """
    Callback that extrapolates the weights along the direction of training at a few steps, and keeps the result if a
    gate confirms that it is better.

    ```python
    trainer = OfflineOPDTrainer(model, args, train_dataset=table["train"], eval_dataset=table["test"])
    trainer.add_callback(EffOPDCallback(trainer))
    trainer.train()
    ```

    Works with any `transformers.Trainer`, in one process, with DDP, DeepSpeed ZeRO 1, 2 and 3, and `fully_shard`.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that the callback is added to. Its `train` is wrapped, to know the checkpoint to resume from.
        gate (`str` or `Callable`, *optional*):
            Measure of how good a candidate is. By default the reverse KL divergence on the teacher's stored top-k, on
            `gate_rows` held-out rows, which needs no teacher and no generation. Otherwise a key of
            `trainer.evaluate()`, such as `"eval_loss"`; or a function of the model, in evaluation mode, that returns a
            value or one value per row and is called on every process. [`RewardGate`] is that of the paper: it samples
            and grades answers.
        gate_dataset ([`~datasets.Dataset`], *optional*):
            Held-out rows for a gate that reads rows. Defaults to the trainer's `eval_dataset`.
        gate_rows (`int`, *optional*, defaults to `256`):
            Number of rows, from the first one on, that the default gate reads.
        schedule (`Sequence[int]`, *optional*):
            Optimizer steps at which to search. Powers of two, `[2**i for i in range(20)]`, are the published schedule.
            The default depends on the searches: steps 1, 2, 4, 8, then eight steps after a search that succeeded, or
            twice as many steps as the last time after one that failed.
        scales (`Sequence[float]`, *optional*, defaults to `(3, 5, 7, 9, 11)`):
            Ascending multiples `m` of the direction, all above 1.
        search (`str`, *optional*, defaults to `"first_fail"`):
            `"first_fail"` stops at the first scale that is no better than the one before, `"best"` tries all.
        parameters (`str`, *optional*):
            Which parameters move: a regular expression searched in their names, or `"all"`. By default all of
            the layers (attention, or what stands for it, and MLP) except norms, and neither embeddings nor the head;
            with PEFT all trained parameters except the first factors (`lora_A`).
        min_improvement (`float`, *optional*, defaults to `0.0`):
            Improvement over `W` that a candidate must exceed, in units of the gate.
        significance (`float`, *optional*, defaults to `0.2`):
            For a gate with one value per row: largest chance of accepting a candidate that is no better than `W`; see
            [`paired_p_value`].
        each_teacher (`bool`, *optional*, defaults to `True`):
            Whether the default gate, on rows of several `teacher_id`s, also refuses a candidate that is worse on those
            of one of them, by as little chance: what one domain gains is not to be another's loss.
        greater_is_better (`bool`, *optional*):
            Whether higher values of the gate are better. Known for the gates here and the metrics of
            [`OfflineOPDTrainer`]; required for your own functions and metrics.
        base_device (`str`, *optional*, defaults to `"cpu"`):
            Device of `W_base` between searches: one copy of this process's part of the weights, in its dtype; in
            pinned memory if weights are on a GPU. During a search there is a second copy, of `W`.

    Attributes:
        history (`list[dict]`): For each search: `step`, `scores` by scale (that of `W` under 1), `accepted` (scale, 1
            if none), `p_value`, `worse_on` (teachers whose rows forbade it), `delta_norm`, `delta_cosine` with the
            direction of the previous search, `seconds`.

    Raises:
        ValueError: If an option is out of range, no parameter matches, or there are no rows for the gate.
    """

    def __init__(
        self,
        trainer: Trainer,
        gate: str | Callable[[nn.Module], Any] | None = None,
        *,
        gate_dataset: Dataset | None = None,
        gate_rows: int = 256,
        schedule: Sequence[int] | None = None,
        scales: Sequence[float] = (3, 5, 7, 9, 11),
        search: str = "first_fail",
        parameters: str | None = None,
        min_improvement: float = 0.0,
        significance: float = 0.2,
        each_teacher: bool = True,
        greater_is_better: bool | None = None,
        base_device: str = "cpu",
    ):
        if isinstance(scales, int | float) or not scales or list(scales) != sorted(set(scales)) or scales[0] <= 1:
            raise ValueError(f"`scales` are ascending and above 1; got {scales}.")
        if search not in ("first_fail", "best"):
            raise ValueError(f'`search` is "first_fail" or "best", not {search!r}.')
        if min_improvement < 0 or not 0 < significance <= 1 or gate_rows < 2:
            raise ValueError(
                "`min_improvement` is 0 or more, `significance` above 0 and at most 1, `gate_rows` 2 or more; got "
                f"{min_improvement}, {significance} and {gate_rows}."
            )
        is_list = isinstance(schedule, Sequence) and not isinstance(schedule, str)
        if schedule is not None and not (
            is_list and schedule and all(isinstance(step, Integral) and step >= 1 for step in schedule)
        ):
            raise ValueError(f"`schedule` is a list of steps, each a whole number of 1 or more; got {schedule!r}.")
        if parameters not in (None, "all"):
            try:
                re.compile(parameters)
            except re.error as error:
                raise ValueError(f"`parameters={parameters!r}` is no regular expression: {error}.") from None
        self.trainer, self.scales, self.search, self.schedule = trainer, tuple(scales), search, schedule
        self.min_improvement, self.significance, self.base_device = min_improvement, significance, base_device
        self.parameters, self.each_teacher = parameters, each_teacher
        self.gate = resolve_gate(trainer, gate, gate_dataset, gate_rows, greater_is_better)
        direction = getattr(self.gate, "greater_is_better", None)
        if None not in (direction, greater_is_better) and direction is not greater_is_better:
            raise ValueError(
                f"`greater_is_better={greater_is_better}` contradicts the gate, {type(self.gate).__name__}, of which "
                f"{'more' if direction else 'less'} is better. Leave it unset."
            )
        greater_is_better = direction if greater_is_better is None else greater_is_better
        if greater_is_better is None:
            raise ValueError("Say whether higher values of your gate are better: `greater_is_better`.")
        self.sign = -1.0 if greater_is_better else 1.0
        self.history: list[dict[str, Any]] = []
        self._base: dict[str, Tensor] = {}
        self._direction: np.ndarray | None = None
        self._resume_from: str | None = None
        train = trainer.train

        @functools.wraps(train)
        def train_and_record(resume_from_checkpoint=None, *args, **kwargs):
            last = get_last_checkpoint(trainer.args.output_dir) if resume_from_checkpoint is True else None
            self._resume_from = last or resume_from_checkpoint or None
            return train(resume_from_checkpoint, *args, **kwargs)

        trainer.train = train_and_record

    # ---- Events ----

    def on_train_begin(self, args, state, control, **kwargs):
        self.shards = Shards(self.trainer, self.parameters)
        self.history, self._direction = [], None
        if state.global_step:
            self._load(self._resume_from, state.global_step)
        else:
            self._base = self._copy()

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step == self._next_search() if self.schedule is None else step in self.schedule:
            # The search evaluates and logs, which resets these flags of the control. They are restored, so that this
            # step still evaluates and logs if it is due.
            flags = copy.copy(control)
            self._search(step)
            vars(control).update(vars(flags))

    def on_save(self, args, state, control, **kwargs):
        self._save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        summary = self.summary()
        if self.trainer.is_world_process_zero():
            path = Path(args.output_dir, HISTORY)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"summary": summary, "searches": self.history}, indent=1))
            tqdm.write(
                f"EffOPD: {summary['steps']} steps that went as far as {summary['equivalent_steps']:g}; "
                f"{summary['accepted']} of {summary['searches']} searches accepted, {summary['search_seconds']:.1f} s "
                "spent in them."
            )
        self._base, self._direction = {}, None

    def summary(self) -> dict[str, Any]:
        """
        Summarizes the searches: `steps`, `equivalent_steps` (each step counted with the scale of its direction, a
        distance and not a quality), `searches`, `accepted` and `search_seconds`.
        """
        steps = self.trainer.state.global_step
        equivalent, before = float(steps), 0
        for search in self.history:
            equivalent += (search["accepted"] - 1) * (search["step"] - before)
            before = search["step"]
        return {
            "steps": steps,
            "equivalent_steps": equivalent,
            "searches": len(self.history),
            "accepted": sum(search["accepted"] > 1 for search in self.history),
            "search_seconds": round(sum(search["seconds"] for search in self.history), 3),
        }

    def card_record(self) -> dict[str, Any]:
        """Returns the entry for the model card, in the record of the training."""
        names = ("steps", "equivalent_steps", "searches", "accepted")
        return {"effopd": {name: self.summary()[name] for name in names}} if self.history else {}

    # ---- Search ----

    def _next_search(self) -> int:
        """Returns the step of the next search in the default schedule.

        While successive directions agree, short ones extrapolate far. Later, only longer directions stand out from the
        noise, and fewer searches that fail cost less.
        """
        last, interval = 0, 1
        for search in self.history:
            last = search["step"]
            if last <= _SHORT:
                interval = last
            else:
                interval = _SHORT if search["accepted"] > 1 else 2 * interval
        return last + interval

    def _search(self, step: int) -> None:
        start = time.perf_counter()
        base, current = self._base, self._copy()
        norm, cosine = self._measure(base, current)
        scores = {1: self._ask()}
        best, best_scale, last = scores[1], 1, scores[1].mean()
        progress = tqdm(
            self.scales,
            desc=f"EffOPD, step {step}",
            unit="candidate",
            leave=False,
            # `None` disables the bar if the output is not a terminal.
            disable=not self.trainer.is_local_process_zero() or self.trainer.args.disable_tqdm or None,
        )
        try:
            for scale in progress:
                self._move(base, current, scale)
                scores[scale] = values = self._ask()
                # Values that are not finite count as no improvement.
                improves = np.isfinite(values).all() and values.mean() < last
                if improves and values.mean() < best.mean():
                    best, best_scale = values, scale
                if not improves and self.search == "first_fail":
                    break
                last = values.mean() if self.search == "first_fail" else last
            gains = scores[1] - best
            p_value = paired_p_value(gains) if len(gains) > 1 and best_scale > 1 else None
            accepted = best_scale > 1 and np.isfinite(scores[1]).all() and gains.mean() > self.min_improvement
            # No correction for several candidates, because candidates on one line gain and lose together.
            accepted = accepted and (p_value is None or p_value <= self.significance)
            worse = self._worse(gains) if accepted else []
            accepted = accepted and not worse
            if accepted and best_scale != scale:
                self._move(base, current, best_scale)
        except BaseException:
            self._put_back(current)
            raise
        finally:
            progress.close()
        if accepted:
            for name, value in base.items():
                value.copy_(self.shards.read(name))
        else:
            self._put_back(current)
            self._base = current
        result = {
            "step": step,
            "scores": {str(scale): self.sign * float(values.mean()) for scale, values in scores.items()},
            "accepted": best_scale if accepted else 1,
            "p_value": p_value,
            "worse_on": worse,
            "delta_norm": norm,
            "delta_cosine": cosine,
            "seconds": round(time.perf_counter() - start, 3),
        }
        self.history.append(result)
        self._report(result)

    def _worse(self, gains: np.ndarray) -> list[str]:
        """The teachers on whose rows a candidate is worse, beyond chance."""
        rows = rows_of_each(getattr(self.gate, "teacher_ids", None)) if self.each_teacher else {}
        losses = {teacher: -gains[of] for teacher, of in rows.items() if gains[of].mean() < 0}
        return [teacher for teacher, loss in losses.items() if paired_p_value(loss) <= self.significance]

    def _ask(self) -> np.ndarray:
        """Evaluates the gate for the current weights: `(rows,)`, lower is better, the same on every process."""
        model = self.trainer.model
        devices = [self.trainer.args.device] if self.trainer.args.device.type == "cuda" else []
        with evaluating(model), torch.random.fork_rng(devices), torch.no_grad():
            values = self.gate(model)
            values = values.double().cpu() if isinstance(values, torch.Tensor) else values
            values = np.atleast_1d(np.asarray(values, dtype=np.float64))
        if self.trainer.accelerator.num_processes > 1:
            values = broadcast_object_list([values])[0]
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(f"A gate gives a number, or one a row; yours gave an array of shape {values.shape}.")
        return self.sign * values

    def _report(self, result: dict[str, Any]) -> None:
        logs = {f"effopd/score_{scale}": score for scale, score in result["scores"].items()}
        names = ("accepted", "p_value", "delta_norm", "delta_cosine", "seconds")
        logs |= {f"effopd/{name}": result[name] for name in names if result[name] is not None}
        # Not `self.trainer.log`: TRL's trainers would add and clear the metrics of the next training log.
        Trainer.log(self.trainer, logs)
        failed = len(self.history) == _PATIENCE and all(search["accepted"] == 1 for search in self.history)
        if failed and self.trainer.is_world_process_zero():
            logger.warning(
                f"None of the first {_PATIENCE} searches of EffOPD accepted anything. With a high learning rate, "
                "steps are too large already to gain from extrapolation: lower it. With few or noisy gate rows, a "
                "gain is not significant: raise `gate_rows`. Smaller `scales` are safer: (1.5, 2, 3)."
            )

    # ---- Weights ----

    def _copy(self) -> dict[str, Tensor]:
        copies = {}
        for name in self.shards.names:
            value = self.shards.read(name)
            pinned = self.base_device == "cpu" and value.device.type == "cuda"
            copies[name] = torch.empty_like(value, device=self.base_device, pin_memory=pinned).copy_(value)
        return copies

    @torch.no_grad()
    def _move(self, base: dict[str, Tensor], current: dict[str, Tensor], scale: float) -> None:
        """Moves the weights to `W_base + scale * (W - W_base)`, computed in float32."""
        for name in self.shards.names:
            device = self.shards.read(name).device
            start, end = (values[name].to(device, non_blocking=True) for values in (base, current))
            wide = torch.promote_types(start.dtype, torch.float32)
            self.shards.write(name, torch.lerp(start.to(wide), end.to(wide), float(scale)).to(start.dtype))
        self.shards.publish()

    def _put_back(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.shards.write(name, value)
        self.shards.publish()

    def _measure(self, base: dict[str, Tensor], current: dict[str, Tensor]) -> tuple[float, float | None]:
        """Returns the norm of the direction, and its cosine with the previous one, from a sample of its entries."""
        stride = max(1, sum(value.numel() for value in base.values()) // _DIRECTION_SAMPLES)
        square, parts = 0.0, []
        for name, start in base.items():
            delta = current[name].float() - start.float()
            # Weights that several processes hold must count once in the sum over processes.
            delta /= math.sqrt(self.shards.replicas(name))
            square += float(delta.double().square().sum())
            parts.append(delta.flatten()[::stride].cpu().numpy())
        direction = np.concatenate(parts) if parts else np.empty(0, np.float32)
        before = np.zeros_like(direction) if self._direction is None else self._direction
        sums = [square, *(float(a @ b) for a, b in ((direction, before), (direction, direction), (before, before)))]
        if self.shards.are_parts:
            device = self.trainer.args.device
            sums = self.trainer.accelerator.reduce(torch.tensor(sums, device=device, dtype=torch.float64)).tolist()
        self._direction = direction
        square, dot, square_now, square_before = sums
        norms = square_now * square_before
        return math.sqrt(square), dot / math.sqrt(norms) if norms > 0 else None

    # ---- Checkpoints ----

    def _file(self, directory: Path) -> Path:
        """Returns the file of this process's part of the weights; one file if all processes hold the same weights."""
        state = self.trainer.accelerator
        index, count = (state.process_index, state.num_processes) if self.shards.are_parts else (0, 1)
        return directory / DIRECTORY / f"base-{index:05d}-of-{count:05d}.safetensors"

    def _save(self, checkpoint: Path) -> None:
        path = self._file(checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.shards.are_parts or self.trainer.is_world_process_zero():
            tensors = {name: value.contiguous() for name, value in self._base.items()}
            direction = torch.from_numpy(self._direction if self._direction is not None else np.empty(0, np.float32))
            temporary = path.with_suffix(".tmp")
            save_file(tensors | {"direction": direction}, temporary)
            os.replace(temporary, path)
        self.trainer.accelerator.wait_for_everyone()
        # Written last, so that a checkpoint with this file is complete.
        if self.trainer.is_world_process_zero():
            write_text(path.with_name("history.json"), json.dumps(self.history, indent=1))

    def _load(self, checkpoint: str | None, step: int) -> None:
        path = self._file(Path(checkpoint or ""))
        history = path.parent / "history.json"
        if checkpoint is None or not history.is_file() or not path.is_file():
            raise ValueError(
                f"Training goes on from step {step}, but {checkpoint} has no state of EffOPD for this number of "
                f"processes ({path.name}): it was saved without the callback, by another launcher, or the process was "
                "killed while saving. Resume from another checkpoint, or with the launcher and the number of "
                "processes that saved it."
            )
        stored = load_file(path)
        self._direction = stored.pop("direction").numpy()
        self._base = self._copy()
        if {name: value.shape for name, value in stored.items()} != {n: v.shape for n, v in self._base.items()}:
            raise ValueError(f"{path} holds other parameters than those that move now: was `parameters` changed?")
        for name, value in self._base.items():
            value.copy_(stored[name])
        self.history = json.loads(history.read_text())


class Shards:
    """
    Parameters that move, as this process owns them: whole, the local part of a `DTensor`, or ZeRO's master copy.

    Args:
        trainer ([`~transformers.Trainer`]): A trainer with its model and optimizer prepared.
        parameters (`str`, *optional*): See [`EffOPDCallback`].

    Attributes:
        names (`list[str]`): Names of the parameters that have a part on this process.
        are_parts (`bool`): Whether processes own different parts.

    Raises:
        ValueError: If no parameter matches, or the master copy of the engine is not accessible.
    """

    def __init__(self, trainer: Trainer, parameters: str | None):
        self._model = model = trainer.model
        # An evaluation may have left some parameters gathered.
        self._reshard()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        moving = _moving(model, parameters)
        chosen = {name: p for name, p in trained.items() if name in moving}
        if not chosen:
            raise ValueError(
                f"EffOPD has nothing to move: `parameters={parameters!r}` matches none of the trained parameters, "
                f'which are {", ".join(list(trained)[:5])}, ... Give a regular expression, or "all".'
            )
        self._engine = trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else None
        self._kind = self._kind_of(chosen)
        self.are_parts = self._kind != "whole"
        self._processes = trainer.accelerator.num_processes
        if self._kind == "fragment":
            chosen = {name: p for name, p in chosen.items() if p._hp_mapping is not None}
        self._parameters = chosen
        self.names = list(chosen)

    def _kind_of(self, parameters: dict[str, nn.Parameter]) -> str:
        if any(hasattr(p, "ds_id") for p in parameters.values()):
            if self._engine.swap_optimizer:
                raise ValueError("EffOPD does not move weights that DeepSpeed keeps on NVMe: offload to the CPU.")
            return "partition"
        if hasattr(self._engine, "update_lp_params"):
            return "fragment"
        if self._engine is not None and any(p.dtype != torch.float32 for p in parameters.values()):
            raise ValueError("DeepSpeed without ZeRO keeps a master copy of its own: use ZeRO stage 1, 2 or 3.")
        if any(isinstance(module, FullyShardedDataParallel) for module in self._model.modules()):
            raise ValueError("EffOPD does not move the weights of FSDP 1: use version 2, `fully_shard`.")
        return "local" if any(isinstance(p, DTensor) for p in parameters.values()) else "whole"

    def replicas(self, name: str) -> int:
        """Returns how many processes hold the same part as this one."""
        parameter = self._parameters[name]
        if self._kind != "local":
            return 1
        if not isinstance(parameter, DTensor):
            return self._processes
        sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
        return self._processes // math.prod(size for size, placement in sizes if not placement.is_replicate())

    def read(self, name: str) -> Tensor:
        """Returns this process's part of a parameter: the tensor itself, or a copy of it."""
        parameter = self._parameters[name]
        if self._kind == "partition":
            from deepspeed.utils import safe_get_local_fp32_param

            return safe_get_local_fp32_param(parameter).detach()
        if self._kind == "fragment":
            return parameter._hp_mapping.get_hp_fragment().detach()
        return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()

    def write(self, name: str, value: Tensor) -> None:
        """Writes this process's part of a parameter. Call [`publish`] after the last one."""
        if self._kind == "partition":
            from deepspeed.utils import safe_set_local_fp32_param

            safe_set_local_fp32_param(self._parameters[name], value)
        else:
            self.read(name).copy_(value)

    @torch.no_grad()
    def publish(self) -> None:
        """Updates the weights used in the forward from the written ones, as the engine does after its own steps."""
        if self._kind == "local":
            self._reshard()
        if self._kind == "fragment":
            self._engine.update_lp_params()
        if self._kind == "partition":
            engine = self._engine
            engine._partition_all_parameters()
            for group in range(len(engine.fp16_groups)):
                engine._reassign_or_swap_out_partitioned_parameters(group)
            if engine.persistent_parameters:
                engine.persistent_parameters[0].all_gather(engine.persistent_parameters)
            engine.invalidate_secondary_tensor()

    def _reshard(self) -> None:
        """
        Frees the parameters that `fully_shard` gathered for a forward. For a backward, it keeps those of the root, and
        with `reshard_after_forward=False` those of all layers. After an evaluation there is no backward, and the next
        forward would use the old values.
        """
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _moving(model: nn.Module, parameters: str | None) -> set[str]:
    """Returns the names of the parameters that [`EffOPDCallback`] moves, if they are trained."""
    names = {name for name, _ in model.named_parameters()}
    if parameters is not None:
        return names if parameters == "all" else {name for name in names if re.search(parameters, name)}
    if is_peft_model(model):
        # Extrapolating both factors of `B A` does not extrapolate their product. If only B moves, the product moves
        # along a line. While A has changed little, as in the first steps, where B starts at 0, it is the line of the
        # steps.
        return {name for name in names if not _FIRST_FACTORS.search(name)}
    # Attention and MLP, as in the released code. They have other names in each architecture, so all of a layer counts
    # that is neither a norm nor an embedding.
    return {
        name
        for path, module in model.named_modules()
        if "norm" not in type(module).__name__.lower() and not isinstance(module, torch.nn.Embedding)
        for name, _ in module.named_parameters(prefix=path, recurse=False)
        if _LAYER.search(name)
    }
