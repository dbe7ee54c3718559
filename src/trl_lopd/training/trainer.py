"""The trainer: a Hugging Face `Trainer` whose loss reads the teacher from the table."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import transformers.integrations
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DistributedType, gather_object, is_peft_model, send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import find_adapter_config_file
from trl.trainer.utils import create_model_from_path, generate_model_card, get_config_model_id

from ..effopd.callback import EffOPDCallback
from ..errors import TableError
from ..identity.cards import count_teachers, read_model_card, record_of, stamp_model_card
from ..identity.consistency import Verdict, check_teacher_consistency, inherited_teachers, written_for
from ..identity.fingerprint import TeacherFingerprint, is_id, is_sharded, with_evidence
from ..identity.stamp import checkpoint_fingerprint, fingerprint_or_none
from ..models import check_positions, load_tokenizer, positions_of
from ..names import as_name
from ..processes import on_main_process
from ..table.schema import TRAINED_ROWS, TableRows, column_counts, lengths, row_hashes, validate_table, vocab_limits
from .collator import OfflineOPDCollator, padded_length, too_long
from .config import OfflineOPDConfig
from .head import Targets, TokenOutput, add_distillation_head, assert_adapters_are_seen, check_head
from .monitoring.console import ConsoleCallback
from .monitoring.drift import describe_weights, has_left, remedy
from .monitoring.failures import LossCheck, SaveOnSigterm, out_of_memory_advice
from .objective import (
    mean_loss,
    reverse_kl_topk,
    sampled_loss,
    sequence_totals,
    summarize,
    teacher_support,
    token_weights,
)
from .packing import PackedRows, best_fit_decreasing, check_architecture, check_boundaries
from .streams import FILLER, RowCheck, WholeStream, columns_of

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

_PAPER = {
    "title": "Lightning OPD: Efficient Post-Training for Large Reasoning Models with Offline On-Policy Distillation",
    "id": "2604.13010",
    "citation": """@misc{wu2026lightningopd,
    title         = {{Lightning OPD: Efficient Post-Training for Large Reasoning Models with Offline On-Policy Distillation}},
    author        = {Yecheng Wu and Song Han and Han Cai},
    year          = 2026,
    eprint        = {2604.13010},
    archivePrefix = {arXiv},
}""",  # noqa: E501
}

_NO_TENSOR_PARALLELISM = (
    "Tensor parallelism is not supported: processes that read the same rows would be counted as if they had read "
    "others. Set `tp_size` to 1. For models that do not fit, use ZeRO-3 or FSDP2."
)


class OfflineOPDTrainer(Trainer):
    """
    Trainer for offline on-policy distillation: the student learns from teacher log-probabilities stored with its own
    rollouts; no teacher is loaded. See `trl_lopd.score_rollouts` for making the table.

    Example:

    ```python
    from datasets import load_dataset
    from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer

    trainer = OfflineOPDTrainer(
        model="my-org/student-sft",
        args=OfflineOPDConfig(output_dir="student-opd"),
        train_dataset=load_dataset("my-org/scored-rollouts", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, `Path`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The SFT student: a local directory or Hub id, of a model or of an adapter, which is then trained on; or a
            loaded model.
        args ([`OfflineOPDConfig`], *optional*):
            Configuration. If `None`, the defaults with an `output_dir` named after the model.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Scored rollouts, see `trl_lopd.table_features`. A `Dataset` is validated here, whole; the rows of an
            `IterableDataset` as they arrive.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Held-out scored rollouts.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer. If `None`, loaded from the model's path.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Added to the default ones.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use instead of those of `args`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Used when the model is loaded from a path; with `peft_config`, QLoRA.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Wraps the model in adapters.

    Raises:
        TeacherConsistencyError: the table was scored by a teacher that is not known to have written the student's SFT
            data, and `args.teacher_consistency` is `"strict"`.
        TableError: a row is invalid, or a prompt leaves no room for its completion.
        ValueError: options that contradict each other or the table's columns.
    """

    # `aggregate` divides by a count taken over all accumulation steps.
    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "trl-lopd", "offline-opd"]

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: OfflineOPDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        model = as_name(model)
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = OfflineOPDConfig(f"{Path(model_id).name or 'model'}-OPD")
        if not isinstance(args, OfflineOPDConfig):
            raise TypeError(f"`args` must be an `OfflineOPDConfig`, got `{type(args).__name__}`.")
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: a table of scored rollouts, see `score_rollouts`.")
        if args.packing and isinstance(train_dataset, IterableDataset):
            raise ValueError(
                "`packing` needs the lengths of all rows, which a stream does not have. Set `padding_free=True` "
                "instead, or pass a `Dataset`."
            )
        if args.train_sampling_strategy == "group_by_length" and isinstance(train_dataset, IterableDataset):
            raise ValueError(
                "`train_sampling_strategy='group_by_length'` needs the lengths of all rows, which a stream does not "
                "have. Leave it unset, or pass a `Dataset`."
            )
        # `accelerate launch` gives it in the environment, which is what a default config reads.
        parallelism = args.parallelism_config or ParallelismConfig()
        if parallelism.cp_enabled or parallelism.sp_enabled:
            raise ValueError(
                "Context and sequence parallelism are not supported: trained tokens are found by their place in the "
                "whole sequence, which no process would hold. Set `cp_size` and `sp_size` to 1. For long sequences, "
                "use `activation_checkpointing=True`, with `activation_checkpointing_kwargs={'offload': True}` if it "
                "takes that, `max_tokens_per_device`, a `peft_config`, and ZeRO-3 or FSDP2."
            )
        if parallelism.tp_enabled:
            raise ValueError(_NO_TENSOR_PARALLELISM)
        if args.use_liger_kernel:
            liger = args.liger_kernel_config or {}
            if liger.get("fused_linear_cross_entropy"):
                raise ValueError(
                    "`liger_kernel_config={'fused_linear_cross_entropy': True}` would replace the forward in which "
                    "this trainer computes its loss. Leave it out: Liger's other kernels are used."
                )
            args.liger_kernel_config = {**liger, "fused_linear_cross_entropy": False}

        init_kwargs = dict(args.model_init_kwargs or {})
        init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        is_loaded = not isinstance(model, str)
        revision = None if is_loaded else init_kwargs.get("revision")
        hub_kwargs = {"revision": revision, "trust_remote_code": init_kwargs["trust_remote_code"]}
        adapter, student = None, model_id or "the student"
        if isinstance(model, str) and find_adapter_config_file(model, revision=hub_kwargs["revision"]) is not None:
            from peft import PeftConfig

            adapter = PeftConfig.from_pretrained(model, revision=hub_kwargs["revision"])
            config_of = {**hub_kwargs, "revision": adapter.revision}
            config = AutoConfig.from_pretrained(adapter.base_model_name_or_path, **config_of)
        else:
            config = AutoConfig.from_pretrained(model, **hub_kwargs) if isinstance(model, str) else model.config
            if not isinstance(model, str) and is_peft_model(model):
                student += (
                    " (the base of this `PeftModel`; pass the adapter's directory as `model` to use its own card)"
                )
        if processing_class is None:
            if not model_id:
                raise ValueError("The model does not say where it was loaded from: pass its `processing_class`.")
            processing_class = load_tokenizer(model, **hub_kwargs)

        # Everything that can be wrong with the data is found before a weight is loaded.
        self._student_card = read_model_card(model_id, hub_kwargs["revision"]) if model_id else {}
        own_id = None
        if args.teacher_consistency != "off":
            consequence = (
                "The student cannot be fingerprinted, so what its card says counts as declared, and nothing tells "
                "whether it sampled the rollouts"
            )

            def fingerprint() -> TeacherFingerprint | None:
                found = {} if is_loaded else hub_kwargs
                return fingerprint_or_none(model, consequence, tokenizer=processing_class, **found)

            together = is_loaded and is_sharded(model)
            own = fingerprint() if together else on_main_process(args.distributed_state, fingerprint)
            own_id = own.id if own else ""
            if is_loaded and own and own.revision and not written_for(self._student_card, own_id):
                # It was loaded from another revision than `main`, which has a card of its own.
                self._student_card = read_model_card(model_id, own.revision)
        check_args = {
            "card": self._student_card,
            "student": student,
            "student_fingerprint": own_id,
            "mode": args.teacher_consistency,
            "tokenizer": processing_class,
        }
        # Two, so that the card names the teachers that trained the model and not those that only evaluated it.
        self._check, self._eval_check = _TeacherCheck(**check_args), _TeacherCheck(**check_args)
        # What was prepared: of streams, with what validates their rows.
        self._prepared: WeakKeyDictionary[Dataset | IterableDataset, RowCheck | None] = WeakKeyDictionary()
        self._off_policy = self._left = False
        self._positions = positions_of(config, trust_remote_code=init_kwargs["trust_remote_code"])
        self._table_args = {"tokenizer": processing_class, "model_config": config}
        self.loss_type: str | None = None  # the training columns decide it
        self._prepare(train_dataset, args, "train_dataset", self._check)
        eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        eval_columns = {
            name: self._prepare(dataset, args, name, self._eval_check)
            for name, dataset in eval_datasets.items()
            if dataset is not None
        }
        _choose_best_model_metric(args, self.loss_type, eval_columns, several=isinstance(eval_dataset, dict))

        set_seed(args.seed)  # adapters are initialised at random
        if isinstance(model, str):
            if quantization_config is not None:
                init_kwargs["quantization_config"] = quantization_config
            if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                init_kwargs["device_map"] = None
            if adapter is None:
                model = create_model_from_path(model, **init_kwargs)
            else:
                model = _load_adapter(model, adapter, init_kwargs)
        elif args.model_init_kwargs or quantization_config is not None:
            raise ValueError(
                "`model_init_kwargs` and `quantization_config` are used to load a model from a path; the model passed "
                "is loaded already."
            )
        base = model.get_base_model() if is_peft_model(model) else model
        if args.padding_free:
            check_architecture(base)
        add_distillation_head(base)
        if peft_config is not None:
            model = _wrap_in_adapters(model, peft_config, args)
        if is_peft_model(model):
            assert_adapters_are_seen(model)
            if args.activation_checkpointing:
                model.enable_input_require_grads()
                if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
                    # Otherwise what is recomputed has other shapes than what was saved, see TRL issue 2514.
                    kwargs = args.activation_checkpointing_kwargs or {}
                    if kwargs.get("use_reentrant") is False:
                        raise ValueError(
                            "Adapters under ZeRO-3 need `activation_checkpointing_kwargs={'use_reentrant': True}`, "
                            "which is the default there."
                        )
                    args.activation_checkpointing_kwargs = {**kwargs, "use_reentrant": True}

        collator = OfflineOPDCollator(
            pad_token_id=_pad_token_id(processing_class),
            max_completion_length=args.max_completion_length,
            max_length=args.max_length,
            pad_to_multiple_of=args.pad_to_multiple_of,
            teacher_logprob_floor=args.teacher_logprob_floor,
            padding_free=args.padding_free,
            positions=self._positions,
        )
        # Batches of different lengths cannot be concatenated and dispatched from one process.
        args.accelerator_config.dispatch_batches = False
        # What `Trainer` would do is done by a callback of ours.
        save_on_sigterm, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The last of its own; in notebooks it is another.
        if type(self.callback_handler.callbacks[-1]) in (PrinterCallback, ProgressCallback):
            self.callback_handler.callbacks[-1] = ConsoleCallback()
        if args.n_gpu > 1:
            raise ValueError(
                "`nn.DataParallel` is not supported. Launch with `accelerate launch` or `torchrun`, or make a single "
                "GPU visible with `CUDA_VISIBLE_DEVICES`."
            )
        if self.get_tp_size() > 1:  # as the model was loaded, or by DeepSpeed
            raise ValueError(_NO_TENSOR_PARALLELISM)
        self._window: dict[str, torch.Tensor] = {}
        self._tried = False
        self._check_loss = LossCheck(self)
        self._last_shape: tuple[int, int] | None = None
        self._save_on_sigterm: SaveOnSigterm | None = None
        if save_on_sigterm:
            args.enable_jit_checkpoint = True
            self._save_on_sigterm = SaveOnSigterm(self.accelerator)
            self.add_callback(self._save_on_sigterm)
        self._saved: tuple[str | None, int | None, TeacherFingerprint | None] = (None, None, None)
        self._eval_batches: list[dict[str, torch.Tensor]] = []
        self.model.add_model_tags(self._tag_names)
        if self.pop_callback(transformers.integrations.WandbCallback) is not None:
            from .monitoring.reporters import WandbCallback

            self.add_callback(WandbCallback(self))

    # ---- Data ----

    def _prepare(
        self, dataset: Dataset | IterableDataset, args: OfflineOPDConfig, name: str, check: _TeacherCheck
    ) -> set[str]:
        """Validates a `Dataset` whole, or the head of a stream, against the objective; returns the columns."""
        if isinstance(dataset, IterableDataset):
            row = next(iter(dataset), None)
            if row is None:
                raise TableError(f"`{name}` is an empty stream.")
            columns = columns_of(row)
            limits = vocab_limits(self._table_args["tokenizer"], self._table_args["model_config"])

            def judge() -> tuple[RowCheck, Verdict]:
                rows = RowCheck(args.teacher_logprob_floor, limits, columns)
                rows([row])
                teachers, samplers = ([row.get(column)] for column in ("teacher_fingerprint", "student_fingerprint"))
                return replace(rows, rows=0), check.judge(teachers, "the stream", sampled_by=samplers)

            self._prepared[dataset], check.verdict = on_main_process(args.distributed_state, judge)
            check.first = row.get("teacher_fingerprint")
            self._off_policy |= check is self._check and check.verdict.off_policy and "ref_logprobs" in columns
            self.loss_type = _resolve_loss_type(args, columns, self.loss_type)
            return columns
        if not isinstance(dataset, Dataset):
            raise TypeError(f"`{name}` must be a `Dataset` or an `IterableDataset`, got `{type(dataset).__name__}`.")
        try:
            summary = validate_table(dataset, **self._table_args, teacher_logprob_floor=args.teacher_logprob_floor)
        except TableError as error:
            raise TableError(f"`{name}`: {error}") from None
        check.teachers.update(summary.teacher_fingerprints)
        if args.teacher_consistency != "off":
            check.verdict = on_main_process(args.distributed_state, lambda: check.judge(dataset, name))
        if check is self._check and check.verdict is not None and check.verdict.off_policy:
            self._off_policy = "ref_logprobs" in dataset.column_names
            if not self._off_policy:
                logger.warning(
                    "Without a `ref_logprobs` column nothing can measure how far off-policy the rollouts are. "
                    "`score_rollouts(..., ref_model=...)` writes it."
                )
        columns = set(dataset.column_names)
        self.loss_type = _resolve_loss_type(args, columns, self.loss_type)
        if summary.floored:
            logger.warning(
                f"`{name}`: {summary.floored} teacher log-probabilities are -inf and will be replaced by "
                f"{args.teacher_logprob_floor}."
            )
        if summary.foreign_topk:
            logger.warning(
                f"`{name}`: {summary.foreign_topk} of the teacher's top-k tokens are none that the student has. Their "
                "probability counts with that of all other tokens."
            )
        _report_truncation(dataset, args, name)
        check_positions(
            _row_lengths(dataset, args),
            self._positions,
            "the student (`max_length` truncates completions)",
            f"`{name}`: row",
        )
        if check is self._check and args.max_tokens_per_device is not None:
            row_lengths = _row_lengths(dataset, args)
            row = int(row_lengths.argmax())
            width = padded_length(int(row_lengths[row]), args.pad_to_multiple_of)
            if width > args.max_tokens_per_device:
                raise TableError(f"`{name}`, row {row}: {too_long(width, args.max_tokens_per_device)}")
        self._prepared[dataset] = None
        return columns

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> TableRows | PackedRows:
        rows = TableRows(dataset)
        if not self.args.packing or description != "Training":
            return rows
        row_lengths = _row_lengths(dataset, self.args)
        packs = best_fit_decreasing(row_lengths, self.args.max_length)
        logger.info(
            f"{len(rows)} rows in {len(packs)} packs of at most {self.args.max_length} tokens, which are "
            f"{row_lengths.sum() / (len(packs) * self.args.max_length):.1%} full."
        )
        return PackedRows(rows, packs)

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        training, collator = description == "Training", self.data_collator
        if not isinstance(dataset, Dataset | IterableDataset) or dataset not in self._prepared:  # given later
            name = {"Training": "train_dataset", "Evaluation": "eval_dataset"}.get(description, "test_dataset")
            self._prepare(dataset, self.args, name, self._check if training else self._eval_check)
        # Training alone is read in micro-batches: evaluation has a batch size of its own.
        self.data_collator = replace(collator, max_tokens=self.args.max_tokens_per_device if training else None)
        if isinstance(dataset, IterableDataset):
            self.data_collator.validate = replace(self._prepared[dataset])
            if (processes := self.accelerator.num_processes) > 1:
                dataset = WholeStream(dataset, fill=1 if training else self.args.eval_batch_size * processes)
        # Evaluation reads all rows that it is given, in their order. With persistent workers `Trainer` would keep the
        # dataloader for all later evaluations, whatever their rows.
        evaluation = {"persistent_workers": False, "drop_last": False, "in_order": True}
        changes = {} if training else {f"dataloader_{name}": value for name, value in evaluation.items()}
        before = {name: getattr(self.args, name) for name in changes}
        vars(self.args).update(changes)
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            vars(self.args).update(before)
            self.data_collator = collator

    def _get_collator_with_removed_columns(self, data_collator, description: str | None = None):
        return data_collator  # it reads the columns that it knows

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(self.train_dataset, Dataset):
            return _GroupedByLength(self)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset):
        # In their order, also where training rows are grouped by length: results are told apart by it.
        return None

    def train(self, *args, **kwargs):
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            raise ValueError(
                "This trainer has evaluated or trained with DeepSpeed already, whose engine is made once. Make "
                "another trainer; to evaluate before the first step, set `eval_on_start=True`."
            )
        self._attempts = 0
        try:
            with self._save_on_sigterm or contextlib.nullcontext():
                output = super().train(*args, **kwargs)
        except RuntimeError as error:
            if should_reduce_batch_size(error) and self._last_shape is not None:
                error.args = (f"{error}\n{out_of_memory_advice(self, self._last_shape)}",)
            raise
        if self._save_on_sigterm is not None and self._save_on_sigterm.stopped:
            # What a script does after training is meant for a trained student, and exit status 0 says that it is one.
            sys.exit(128 + signal.SIGTERM)
        return output

    def _inner_training_loop(self, *args, **kwargs):
        self._attempts += 1
        if self._attempts > 1 and (steps := self.state.global_step - self._initial_global_step):
            raise RuntimeError(
                f"Memory ran out after {steps} steps. `auto_find_batch_size` would begin again at the first step with "
                "weights that these steps have changed. Set a smaller `per_device_train_batch_size`, or "
                "`max_tokens_per_device` if only long rows are too large, and start again or from a checkpoint."
            )
        # Of steps that were not finished.
        self._window = {}
        self._check_loss.reset()
        checkpoint = kwargs.get("resume_from_checkpoint")
        if checkpoint is not None and isinstance(self.train_dataset, IterableDataset):
            self._check.resume(checkpoint, len(self._student_card.get("opd_rounds") or []))
        return super()._inner_training_loop(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled and any(Path(checkpoint).glob("global_step*")):
            raise ValueError(
                f"{checkpoint} was saved by DeepSpeed, which alone reads its optimizer: resume under the same engine "
                "and on as many processes."
            )
        super()._load_optimizer_and_scheduler(checkpoint)

    # ---- Micro-batches ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A batch, or, within `max_tokens_per_device`, one after another the micro-batches that the collator made."""
        for part in _parts(inputs):
            self._check.meet(part)
        if isinstance(inputs, list):
            loss = self._train_on_parts(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._count_padding(inputs)
        self._try_once(model)
        return loss

    def _train_on_parts(self, model, parts, num_items_in_batch):
        # Sharded models communicate in every forward, so all processes make as many.
        most = int(self.accelerator.gather(torch.tensor([len(parts)], device=self.args.device)).max())
        state, last_of_step = self.accelerator.gradient_state, self.accelerator.sync_gradients
        loss = 0.0
        for i in range(most):
            last = i == most - 1
            # DeepSpeed takes its optimizer step in the backward that synchronizes.
            state._set_sync_gradients(last_of_step and last)
            with contextlib.nullcontext() if last else self._defer_sync(model, last_of_step):
                if i < len(parts):
                    loss += super().training_step(model, parts[i], num_items_in_batch)
                else:
                    window = dict(self._window)
                    smallest = min(parts, key=lambda part: part["input_ids"].numel())
                    # Read for company only: divided by infinity, its loss and gradient are 0.
                    super().training_step(model, smallest, torch.tensor(math.inf, device=self.args.device))
                    self._window = window
        return loss

    def _defer_sync(self, model, last_of_step: bool) -> contextlib.AbstractContextManager:
        """Keeps gradients local in all micro-batches but the last of an optimizer step, as `Trainer` does in all
        accumulation steps but the last; in those it has seen to it already."""
        if (
            not last_of_step
            or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
            or self.accelerator.distributed_type == DistributedType.DEEPSPEED
        ):
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    def _count_padding(self, batch) -> None:
        for part in _parts(batch):
            tokens = part["input_ids"].new_tensor(part["input_ids"].numel())
            padding = tokens - part["attention_mask"].sum() if "attention_mask" in part else torch.zeros_like(tokens)
            for name, value in (("tokens_read", tokens), ("tokens_padding", padding)):
                self._window[name] = self._window.get(name, 0) + value.to(self.args.device)

    def _try_once(self, model) -> None:
        """Holds what the loss is computed from against the model itself, on a few tokens."""
        if self._tried:
            return
        config = self.model.config
        with self.compute_loss_context_manager():
            check_head(model, config, self.args.device)
            if self.args.padding_free:
                check_boundaries(model, config.get_text_config().vocab_size, self.args.device)
        self._tried = True

    def floating_point_ops(self, inputs):
        return super().floating_point_ops(_together(inputs))

    def _track_num_input_tokens(self, inputs):
        read = _together(inputs)
        # Otherwise tokens with the id of padding are taken for it.
        super()._track_num_input_tokens({"attention_mask": torch.ones_like(read["input_ids"]), **read})

    # ---- Loss ----

    def _prepare_input(self, data):
        # With DeepSpeed, `Trainer` casts floats to the dtype of the weights. Ours are log-probabilities.
        return send_to_device(data, self.args.device)

    def _num_items(self, batch: dict[str, torch.Tensor]) -> int:
        """What the loss is the mean over: the batch's sequences or its trained tokens."""
        return len(batch["truncated"] if self.args.loss_aggregation == "sequence_mean" else batch["labels"])

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        if not batch_samples:
            return None
        parts = [part for batch in batch_samples for part in _parts(batch)]
        count = torch.tensor(sum(self._num_items(part) for part in parts), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def _forward(
        self, model, inputs: dict[str, torch.Tensor], num_items: torch.Tensor | int
    ) -> tuple[TokenOutput, dict[str, torch.Tensor]]:
        """The batch's share of a loss over `num_items`, and the totals behind every metric; see `objective`."""
        self._last_shape = tuple(inputs["input_ids"].shape)
        if not self.is_deepspeed_enabled:  # ZeRO-3 takes the first forward for the order of its modules
            self._try_once(model)
        labels, teacher, ref = inputs["labels"], inputs["teacher_logprobs"], inputs.get("ref_logprobs")
        sequences, num_sequences = inputs["sequences"], len(inputs["truncated"])
        topk_ids, topk_logprobs = inputs.get("teacher_topk_ids"), inputs.get("teacher_topk_logprobs")
        if topk_ids is None:
            topk_ids, topk_logprobs = labels.new_empty((len(labels), 0)), teacher.new_empty((len(labels), 0))
        vocab_size = self.model.config.get_text_config().vocab_size
        ids, support, distinct = teacher_support(topk_ids, topk_logprobs, labels, teacher, vocab_size)

        def loss(logprobs: torch.Tensor, tail: torch.Tensor, rows: slice) -> torch.Tensor:
            if self.loss_type == "topk":
                return reverse_kl_topk(logprobs, tail, support[rows], distinct[rows])
            return sampled_loss(
                logprobs[:, -1],
                teacher[rows],
                advantage_clip=self.args.advantage_clip,
                ref_logprobs=None if ref is None else ref[rows],
                ratio_clip=self.args.ratio_clip,
            )

        weights = token_weights(sequences, num_sequences, self.args.loss_aggregation, num_items)
        read = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        out = model(**read, targets=Targets(inputs["positions"], ids, distinct, weights, loss))
        with torch.no_grad():
            kl = agreement = None
            if "teacher_topk_ids" in inputs:
                kl = reverse_kl_topk(out.support_logprobs, out.tail_logprobs, support, distinct)
                teacher_top1 = topk_ids.gather(-1, topk_logprobs.argmax(-1, keepdim=True)).squeeze(-1)
                agreement = out.top1_ids == teacher_top1
            totals = sequence_totals(
                out.support_logprobs[:, -1],
                teacher,
                sequences,
                num_sequences,
                per_token_loss=out.per_token,
                entropy=out.entropy,
                is_top1=out.top1_ids == labels,
                advantage_clip=self.args.advantage_clip,
                ref_logprobs=ref,
                reverse_kl=kl,
                top1_agreement=agreement,
            )
            totals["truncated"] = inputs["truncated"].float()
        return out, totals

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("The loss is computed without logits, so there are no outputs to return.")
        num_items = self._num_items(inputs) if num_items_in_batch is None else num_items_in_batch
        out, totals = self._forward(model, inputs, num_items)
        for name, values in totals.items():
            value, previous = _combine(name, values), self._window.get(name)
            self._window[name] = value if previous is None else _combine(name, torch.stack([previous, value]))
        loss = out.loss
        # The count is global, and data-parallel engines average gradients over processes.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._check_loss(loss, inputs, totals["sequence_loss"])
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        self._eval_check.meet(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, totals = self._forward(model, inputs, self._num_items(inputs))
        self._try_once(model)
        if FILLER in inputs:
            totals[FILLER] = inputs[FILLER]
        # Gathered a sequence at a time, so that rows repeated to fill the last batch are dropped.
        names, num_sequences = sorted(totals), len(totals["truncated"])
        columns = [totals[name].float().reshape(num_sequences, -1) for name in names]
        gathered = self.accelerator.gather_for_metrics(torch.cat(columns, dim=-1))
        parts = gathered.split([column.shape[1] for column in columns], dim=-1)
        totals = {name: part.squeeze(-1) for name, part in zip(names, parts, strict=True)}
        if FILLER in totals:
            evaluated = totals.pop(FILLER) == 0
            totals = {name: values[evaluated] for name, values in totals.items()}
        self._eval_batches.append(totals)
        # `Trainer` averages losses over batches; `evaluation_loop` adds the exact one.
        return None, None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        if self.is_deepspeed_enabled and self.deepspeed is None and self.accelerator.deepspeed_plugin.zero_stage < 3:
            raise ValueError(
                "DeepSpeed cannot evaluate before training, unless it is ZeRO-3 and no training follows. To evaluate "
                "before the first step, set `eval_on_start=True`."
            )
        self._eval_batches = []
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        totals = {
            name: _number(_combine(name, torch.cat([batch[name] for batch in self._eval_batches]).double().cpu()))
            for name in (self._eval_batches[0] if self._eval_batches else ())
        }
        if totals:
            metrics = {"loss": mean_loss(totals, self.args.loss_aggregation), **_metrics(totals)}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def reverse_kl_of_rows(self, rows: Dataset) -> np.ndarray:
        """
        Reverse KL divergence on the stored top-k, in nats a token, of each row: `(rows,)` float64, on every process.

        Args:
            rows ([`~datasets.Dataset`]): Valid rows with top-k columns.
        """
        self.evaluation_loop(self.get_eval_dataloader(rows), "Reverse KL", prediction_loss_only=True)
        totals = {
            name: torch.cat([batch[name] for batch in self._eval_batches]).double().cpu().numpy()
            for name in ("reverse_kl_topk", "tokens")
        }
        return totals["reverse_kl_topk"] / totals["tokens"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Totals stay on the device until they are wanted: one gather a log, none a step.
        if "loss" in logs and self._window:
            names = sorted(self._window)
            values = [self._window[name].float().reshape(1, -1) for name in names]
            gathered = self.accelerator.gather(torch.cat(values, dim=-1)).double().cpu()
            parts = gathered.split([value.shape[1] for value in values], dim=-1)
            logs.update(
                _metrics({name: _number(_combine(name, part)) for name, part in zip(names, parts, strict=True)})
            )
            self._window = {}
            self._judge_drift(logs)
        super().log(logs, start_time)

    def _judge_drift(self, logs: dict[str, float]) -> None:
        """Warns where the student is, or has gone, too far from the policy that sampled its rollouts; each once."""
        if "importance_weight/ess" not in logs:
            return
        left = has_left(logs) and not self._left
        if (left or self._off_policy) and self.is_world_process_zero():
            message = f"Off-policy rollouts, measured up to step {self.state.global_step}: {describe_weights(logs)}"
            if left:
                known = [self._student_card.get("sft_teachers"), record_of(self.train_dataset).get("teachers")]
                known = [entry for entries in known for entry in entries or ()]
                message += f" {remedy(self.args.output_dir, self._check.teachers, known)}"
            logger.warning(message)
        self._off_policy, self._left = False, self._left or left

    # ---- Saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and not _internal_call and "SHARDED" in str(plugin.state_dict_type):
            # The weights of checkpoints are sharded then; without this, this directory would have none.
            plugin.set_state_dict_type("FULL_STATE_DICT")
            try:
                super().save_model(output_dir)
            finally:
                plugin.set_state_dict_type("SHARDED_STATE_DICT")
        else:
            super().save_model(output_dir, _internal_call)
        output_dir = output_dir or self.args.output_dir
        if isinstance(self.train_dataset, IterableDataset):
            self._check.gather()
        if self.is_world_process_zero():
            os.makedirs(output_dir, exist_ok=True)  # sharded weights are not in there yet
            self._saved = (output_dir, self.state.global_step, checkpoint_fingerprint(output_dir))
            self._write_args(output_dir)
        # After the weights: PEFT writes a card of its own beside them.
        self.create_model_card(output_dir=output_dir)

    def _write_args(self, output_dir: str) -> None:
        """For people and for `trl-lopd report`: `training_args.bin` is a pickle. And which rows are trained on."""
        if isinstance(self.train_dataset, Dataset):
            np.save(Path(output_dir, TRAINED_ROWS), np.unique(row_hashes(self.train_dataset)))
        settings = self.args.to_dict()
        if (run := _wandb_run()) is not None:
            settings["wandb_run"] = {"entity": run.entity, "project": run.project, "id": run.id}
        Path(output_dir, "training_args.json").write_text(json.dumps(settings, indent=2, default=str))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The weights are copied from there, so must the card be.
        card = Path(checkpoint_folder) / "README.md"
        if self.is_world_process_zero() and card.is_file():
            shutil.copy(card, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        output_dir: str | None = None,
    ) -> None:
        """
        Writes a model card that cites the paper and names the teachers: those that wrote the SFT data, inherited from
        the student's card, and those whose scores trained this model.

        Args:
            model_name (`str`, *optional*):
                Name of the model. Defaults to that of the Hub repository or the output directory.
            dataset_name (`str`, *optional*):
                Name of the table.
            tags (`str` or `list[str]`, *optional*):
                Tags beside the trainer's own.
            output_dir (`str`, *optional*):
                Where to write `README.md`. Defaults to `args.output_dir`.
        """
        if not self.is_world_process_zero():
            return
        output_dir = output_dir or self.args.output_dir
        base_model = get_config_model_id(self.model.config) or "an unnamed model"
        is_local = os.path.isdir(base_model)
        base_model = Path(base_model).name if is_local else base_model
        model_name = model_name or Path(self.args.hub_model_id or self.args.output_dir).name
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        card = generate_model_card(
            base_model=base_model,
            model_name=model_name,
            hub_model_id=self.hub_model_id or model_name,
            dataset_name=dataset_name,
            tags=list(dict.fromkeys([*tags, *self._tag_names])),
            wandb_url=(run := _wandb_run()) and run.url,
            trackio_url=None,
            trainer_name="Offline OPD",
            trainer_citation=_PAPER["citation"],
            paper_title=_PAPER["title"],
            paper_id=_PAPER["id"],
        )
        if is_local:
            # A directory is no Hub id: name it, but neither link it nor list it.
            card.data.base_model = None
            card.text = card.text.replace(f"[{base_model}](https://huggingface.co/{base_model})", f"`{base_model}`")
        card.save(os.path.join(output_dir, "README.md"))
        round = self._round()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EffOPDCallback) and callback.history:
                names = ("steps", "equivalent_steps", "searches", "accepted")
                round["effopd"] = {name: callback.summary()[name] for name in names}
        stamp_model_card(
            output_dir,
            sft_teachers=inherited_teachers(self._student_card, self._check.student_fingerprint),
            sft_rows=self._student_card.get("sft_rows"),
            # Weights written there at another step are not those that this card is about.
            checkpoint=self._saved[2] if self._saved[:2] == (output_dir, self.state.global_step) else None,
            opd_rounds=[*(self._student_card.get("opd_rounds") or []), round],
        )

    def _round(self) -> dict[str, Any]:
        """This round of training, as cards keep it."""
        check, table, mode = self._check, self.train_dataset, self.args.teacher_consistency
        round = {
            "student": check.student_fingerprint or Path(get_config_model_id(self.model.config)).name,
            "objective": self.loss_type,
        }
        if isinstance(table, Dataset):
            verdict, teachers, samplers = check.verdict, check.teachers, column_counts(table, "student_fingerprint")
        else:
            teachers, samplers = check.of_all
            verdict = check.judge(teachers, "the stream", samplers, mode="off") if teachers else check.verdict
        round["teacher_consistency"] = "off" if mode == "off" else verdict.evidence or f"overridden ({mode})"
        round |= {"rows": sum(teachers.values()), "teachers": count_teachers(teachers)}
        if sampled_by := count_teachers(samplers):
            round["sampled_by"] = sampled_by
        return round

    def describe_round(self) -> dict[str, Any]:
        """
        Who is trained on whose scores: `student`, `objective`, `teacher_consistency` (the evidence), `teachers` with
        their rows, `sft_teachers`, and more, as the model card will say. Rows of a stream are counted when they are
        trained on; on several processes those of the others when a model is saved.
        """
        sft_teachers = inherited_teachers(self._student_card, self._check.student_fingerprint)
        round = {**self._round(), "sft_teachers": sft_teachers}
        if not round["teachers"]:  # of a stream, before training
            round["teachers"] = count_teachers({self._check.first: 0})
        return round


def _load_adapter(path: str, adapter: PeftConfig, init_kwargs: dict[str, Any]) -> PeftModel:
    from peft import PeftModel

    base = create_model_from_path(adapter.base_model_name_or_path, **{**init_kwargs, "revision": adapter.revision})
    return PeftModel.from_pretrained(base, path, revision=init_kwargs.get("revision"), is_trainable=True)


class _GroupedByLength(LengthGroupedSampler):
    """Draws an order for each epoch that all processes draw, and again if a run is resumed in it."""

    def __init__(self, trainer: OfflineOPDTrainer):
        args = trainer.args
        self.trainer, self.seed = trainer, args.seed if args.data_seed is None else args.data_seed
        super().__init__(
            args.train_batch_size * args.gradient_accumulation_steps,
            lengths=_row_lengths(trainer.train_dataset, args).tolist(),
            generator=torch.Generator(),
        )

    def __iter__(self):
        self.generator.manual_seed(self.seed + int(self.trainer.state.epoch or 0))
        return super().__iter__()


@dataclass
class _TeacherCheck:
    """Whether this student may learn from the rows, and, of a stream, who scored and who sampled those it met."""

    card: dict[str, Any]
    student: str
    student_fingerprint: str | None
    mode: str
    tokenizer: PreTrainedTokenizerBase
    verdict: Verdict | None = None
    first: str | None = None
    teachers: Counter[str] = field(default_factory=Counter)
    samplers: Counter[str | None] = field(default_factory=Counter)
    gathered: tuple[Counter[str], Counter[str | None]] | None = None

    def judge(
        self, table: Dataset | Iterable[str], name: str, sampled_by: Iterable[str] = (), mode: str | None = None
    ) -> Verdict:
        """Applies the consistency rule to a table, or to the teachers and students of some rows."""
        return check_teacher_consistency(
            self.card,
            table,
            sampled_by=sampled_by,
            student_fingerprint=self.student_fingerprint,
            mode=mode or self.mode,
            student=self.student,
            table_name=name,
            tokenizer=self.tokenizer,
        )

    def meet(self, batch: dict[str, Any]) -> None:
        """Judges and counts the rows of a stream's batch, and takes their fingerprints out of it."""
        teachers, samplers = (batch.pop(name, None) for name in ("teacher_fingerprint", "student_fingerprint"))
        if teachers is None:
            return
        if not ({*teachers} <= self.teachers.keys() and {*samplers} <= self.samplers.keys()):
            met = sorted({*self.teachers, *teachers})
            self.verdict = self.judge(met, "the stream", sampled_by={*self.samplers, *samplers})
        self.teachers.update(teachers)
        self.samplers.update(samplers)

    def resume(self, checkpoint: str, earlier: int) -> None:
        """Counts on from the rows that trained a checkpoint, as its card has them after those of `earlier` rounds."""
        self.teachers, self.samplers = Counter(), Counter()
        if not PartialState().is_main_process:
            return  # in the sum of all processes they count once
        rounds = read_model_card(checkpoint).get("opd_rounds") or []
        if len(rounds) <= earlier or "rows" not in rounds[earlier]:
            logger.warning(
                f"{checkpoint} has no card that says which rows of the stream trained it: the card of this run will "
                "only have those of the steps from here on."
            )
            return
        for counts, entries in ((self.teachers, "teachers"), (self.samplers, "sampled_by")):
            for entry in rounds[earlier].get(entries) or []:
                name = with_evidence(entry["id"], entry["evidence"]) if is_id(entry["id"]) else entry["id"]
                counts[name] += entry["rows"]
        self.samplers[None] += self.teachers.total() - self.samplers.total()

    @property
    def of_all(self) -> tuple[Counter[str], Counter[str | None]]:
        """Rows of each teacher and of each student, of all processes as far as they were gathered."""
        return self.gathered or (self.teachers, self.samplers)

    def gather(self) -> None:
        """Called on all processes."""
        if PartialState().num_processes > 1:
            parts = gather_object([(self.teachers, self.samplers)])
            self.gathered = tuple(sum(counts, Counter()) for counts in zip(*parts, strict=True))


def _resolve_loss_type(args: OfflineOPDConfig, columns: set[str], required: str | None = None) -> str:
    has_topk = "teacher_topk_ids" in columns
    loss_type = required or args.loss_type
    if loss_type == "auto":
        loss_type = "topk" if has_topk else "sampled"
    if loss_type == "topk" and not has_topk:
        raise ValueError(
            "`loss_type='topk'` needs the columns `teacher_topk_ids` and `teacher_topk_logprobs` in the training and "
            "the evaluation rows. Score them with `score_rollouts(..., top_k=8)`, or set `loss_type='sampled'`."
        )
    if args.ratio_clip is not None and loss_type == "topk":
        raise ValueError(
            "`ratio_clip` is a trust region of the sampled objective, but the table's top-k columns select "
            "`loss_type='topk'`. Set `loss_type='sampled'`, or leave `ratio_clip` unset."
        )
    if args.ratio_clip is not None and "ref_logprobs" not in columns:
        raise ValueError(
            "`ratio_clip` needs a `ref_logprobs` column: the trust region is around the policy that sampled the "
            "rollouts. Make it with `score_rollouts(..., ref_model=student)`."
        )
    return loss_type


def _choose_best_model_metric(
    args: OfflineOPDConfig, loss_type: str, eval_columns: dict[str, set[str]], several: bool
) -> None:
    """Sets the default criterion, or says what is wrong with the one there is."""
    if several and args.metric_for_best_model_is_default and args.load_best_model_at_end:
        name = next(iter(eval_columns))
        raise ValueError(
            "With several evaluation datasets, `load_best_model_at_end` needs `metric_for_best_model` to say which "
            f"one decides, for instance 'eval_{name}_reverse_kl_topk'."
        )
    has_topk = not several and any("teacher_topk_ids" in columns for columns in eval_columns.values())
    if args.metric_for_best_model_is_default and has_topk:
        args.metric_for_best_model, args.greater_is_better = "eval_reverse_kl_topk", False
    elif args.load_best_model_at_end and loss_type == "sampled" and args.metric_for_best_model.endswith("loss"):
        logger.warning(
            "The best model is chosen by the loss of the sampled objective, the Huber value, which can fall while the "
            "student gets worse. Score the evaluation rows with `top_k=8` and leave `metric_for_best_model` unset."
        )


def _room(prompts: np.ndarray, args: OfflineOPDConfig) -> np.ndarray:
    """Completion tokens that fit behind each prompt: [`collator.completion_room`] of all rows, `(rows,)`."""
    room = np.full(len(prompts), np.iinfo(np.int64).max)
    if args.max_completion_length is not None:
        room = np.minimum(room, args.max_completion_length)
    if args.max_length is not None:
        room = np.minimum(room, args.max_length - prompts)
    return room


def _report_truncation(dataset: Dataset, args: OfflineOPDConfig, name: str) -> None:
    prompts, completions = lengths(dataset)
    room = _room(prompts, args)
    if (room < 1).any():
        row = int((room < 1).argmax())
        raise TableError(
            f"`{name}`, row {row}, column 'prompt_ids': a prompt of {prompts[row]} tokens leaves no room for a "
            f"completion within `max_length={args.max_length}` ({int((room < 1).sum())} such rows). Raise "
            "`max_length`, or filter them out."
        )
    lost = np.maximum(completions - room, 0)
    if "completion_mask" in dataset.column_names:
        cut = np.flatnonzero(lost)
        for row, mask in zip(cut, dataset.select(cut)["completion_mask"], strict=True):
            if not any(mask[: room[row]]):
                raise TableError(
                    f"`{name}`, row {row}, column 'completion_mask': all trainable tokens lie beyond the first "
                    f"{room[row]} of the completion and would be cut. Raise `max_completion_length` or `max_length`, "
                    "or filter such rows out."
                )
    if lost.any():
        logger.warning(
            f"`{name}`: {int((lost > 0).sum())} of {len(dataset)} completions are truncated on the right, "
            f"{int(lost.sum())} of {int(completions.sum())} completion tokens are lost. The limits are "
            f"`max_completion_length={args.max_completion_length}` and `max_length={args.max_length}`."
        )


def _parts(batch: dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """A batch's micro-batches."""
    return batch if isinstance(batch, list) else [batch]


def _together(batch: dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What a batch reads, all of its micro-batches in one row."""
    if not isinstance(batch, list):
        return batch
    names = [name for name in ("input_ids", "attention_mask") if name in batch[0]]
    return {name: torch.cat([part[name].flatten() for part in batch]) for name in names}


def _row_lengths(dataset: Dataset, args: OfflineOPDConfig) -> np.ndarray:
    """Tokens of each row as it is read, truncated: `(rows,)`."""
    prompts, completions = lengths(dataset)
    return prompts + np.minimum(completions, _room(prompts, args))


def _combine(name: str, values: torch.Tensor) -> torch.Tensor:
    return values.amax(0) if name.endswith("max") else values.sum(0)


def _number(values: torch.Tensor) -> float | np.ndarray:
    return values.item() if values.numel() == 1 else values.numpy()


def _metrics(totals: dict[str, float | np.ndarray]) -> dict[str, float]:
    metrics = summarize(totals)
    if totals["truncated"]:
        metrics["truncated_completions"] = totals["truncated"]
    if "tokens_read" in totals:
        metrics["padding"] = totals["tokens_padding"] / totals["tokens_read"]
    return metrics


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Padding is masked everywhere, so any id will do.
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _wrap_in_adapters(model: PreTrainedModel, peft_config: PeftConfig, args: OfflineOPDConfig) -> PeftModel:
    from peft import get_peft_model, prepare_model_for_kbit_training

    if is_peft_model(model):
        raise ValueError(
            "You passed a `PeftModel` together with a `peft_config`. Merge the adapter into the model first, or leave "
            "out `peft_config` to go on training it."
        )
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    kwargs = {}
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3 and not quantized:
        # ZeRO-3 gathers parameters into buffers of one dtype.
        kwargs["autocast_adapter_dtype"] = False
    return get_peft_model(model, peft_config, **kwargs)


def _wandb_run() -> Any:
    """The active one, if there is one."""
    wandb = sys.modules.get("wandb")
    return wandb and wandb.run
