"""The trainer: a Hugging Face `Trainer` that reads the teacher's log-probabilities from the table."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers.integrations
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..identity.cards import count_teachers
from ..processes import on_main_process
from ..table.schema import TEACHER_ID, TableRows
from .card import SavedCheckpoint, check_resumed, describe_round, fingerprint_saved, write_arguments, write_card
from .collator import FILLER
from .config import OfflineOPDConfig, refuse_parallelism, refuse_unsupported
from .criteria import choose_best_model_metric, refuse_absent_metric
from .experts import keep_in_step
from .head import check_head
from .loss import Objective
from .micro_batches import flattened, micro_batches, train_on
from .monitoring.console import ConsoleCallback
from .monitoring.drift import DriftMonitor, remedy
from .monitoring.failures import LossCheck, SaveOnSigterm, out_of_memory_advice
from .monitoring.metrics import EvaluationTotals, Window
from .packing import PackedRows, check_boundaries
from .rows import GroupedByLength, TrainingRows, WholeStream, in_arrow
from .student import Student, model_id_of

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)


class OfflineOPDTrainer(Trainer):
    """
    Trainer for offline on-policy distillation. The student learns from teacher log-probabilities that are stored with
    its own rollouts, so no teacher is loaded. `trl_lopd.score_rollouts` makes the table.

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
            The SFT student: a local directory or Hub id of a model or of an adapter, whose training is continued; or a
            loaded model.
        args ([`OfflineOPDConfig`], *optional*):
            Configuration. If `None`, the defaults with an `output_dir` named after the model.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Scored rollouts, see `trl_lopd.table_features`. A `Dataset` is validated here as a whole, an
            `IterableDataset` row by row as it is read.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Held-out scored rollouts.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer. If `None`, loaded from the model's path.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks to add to the default ones.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use instead of those of `args`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization for loading the model from a path. Use it with `peft_config` for QLoRA.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model in adapters.

    Raises:
        TeacherConsistencyError: If the table was scored by a teacher that is not known to have written the student's
            SFT data, and `args.teacher_consistency` is `"strict"`.
        TableError: If a row is invalid, or a prompt leaves no room for its completion.
        ValueError: If options contradict each other or the table's columns, or no evaluation gives
            `metric_for_best_model`.
    """

    # The loss is divided by a number of items that is counted over all accumulation steps.
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
        if args is None:
            args = OfflineOPDConfig(f"{Path(model_id_of(model)).name or 'model'}-OPD")
        if not isinstance(args, OfflineOPDConfig):
            raise TypeError(f"`args` must be an `OfflineOPDConfig`, got `{type(args).__name__}`.")
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: a table of scored rollouts, see `score_rollouts`.")
        refuse_unsupported(args, streams=isinstance(train_dataset, IterableDataset))

        # Validate the data before any weights are loaded.
        self.student = Student.describe(model, args, processing_class)
        self.rows = TrainingRows(self.student, args)
        self.rows.prepare(train_dataset, "train_dataset", training=True)
        eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        eval_columns = {
            name: self.rows.prepare(dataset, name) for name, dataset in eval_datasets.items() if dataset is not None
        }
        several = isinstance(eval_dataset, dict)
        choose_best_model_metric(args, self.loss_type, eval_columns, several)
        if type(self) is OfflineOPDTrainer:  # a subclass may add metrics of its own
            refuse_absent_metric(args, eval_datasets, eval_columns, several)

        set_seed(args.seed)  # adapters are initialised at random
        model = self.student.load(args, quantization_config, peft_config)
        # Batches of different lengths cannot be concatenated and dispatched from one process.
        args.accelerator_config.dispatch_batches = False
        # `SaveOnSigterm` replaces the callback that `Trainer` would add.
        save_on_sigterm, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        super().__init__(
            model=model,
            args=args,
            data_collator=self.rows.collator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.student.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Replace the console callback of `Trainer`, which is the last one, but not the one for notebooks.
        if type(self.callback_handler.callbacks[-1]) in (PrinterCallback, ProgressCallback):
            self.callback_handler.callbacks[-1] = ConsoleCallback(self)
        # The model may have been loaded with tensor parallelism, or DeepSpeed uses it.
        refuse_parallelism(self.get_tp_size(), args.n_gpu)
        keep_in_step(self)
        self.objective = Objective.of(self.model, self.loss_type, args)
        self.window = Window(self.accelerator)
        self.drift = DriftMonitor(self.rows.measures_off_policy)
        self.saved: SavedCheckpoint | None = None
        self._evaluated = EvaluationTotals(self.accelerator)
        self._check_loss = LossCheck(self)
        self._is_tried, self._attempts = False, 0
        self._last_shape: tuple[int, int] | None = None
        self._save_on_sigterm: SaveOnSigterm | None = None
        if save_on_sigterm:
            args.enable_jit_checkpoint = True
            self._save_on_sigterm = SaveOnSigterm(self.accelerator)
            self.add_callback(self._save_on_sigterm)
        self.model.add_model_tags(self._tag_names)
        if self.pop_callback(transformers.integrations.WandbCallback) is not None:
            from .monitoring.reporters import WandbCallback

            self.add_callback(WandbCallback(self))

    @property
    def loss_type(self) -> str:
        """Returns the objective, `"topk"` or `"sampled"`, which depends on the columns of the training rows."""
        return self.rows.loss_type

    # ---- Training ----

    def train(self, *args, **kwargs):
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            raise ValueError(
                "This trainer has evaluated or trained with DeepSpeed already, whose engine is created once. Create "
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
            # Exit here, because the rest of a script expects a student that is fully trained. The exit status tells a
            # scheduler that training is not complete.
            sys.exit(128 + signal.SIGTERM)
        return output

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Only the end of a stream gives fewer batches than were asked for. `Trainer` would take no step with them, and
        # add their gradient to that of the next.
        if len(batches) < num_batches and batches:
            self.rows.cut_pass(len(batches), num_batches)
            return [], None
        return batches, num_items

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Trains on a batch, or with `max_tokens_per_device` on its micro-batches one after another."""
        parts = micro_batches(inputs)
        self.rows.has_trained = True
        for part in parts:
            self.rows.trained.meet(part)
        if isinstance(inputs, list):
            loss = train_on(
                parts,
                lambda part, num_items: super(OfflineOPDTrainer, self).training_step(model, part, num_items),
                num_items_in_batch,
                self.accelerator,
                model,
                self.window,
            )
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        for part in parts:
            self.window.add_padding(part)
        self._try_once(model)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("The loss is computed without logits, so there are no outputs to return.")
        num_items = self.objective.num_items(inputs) if num_items_in_batch is None else num_items_in_batch
        out, totals = self._forward(model, inputs, num_items)
        self.window.add(totals)
        loss = out.loss
        # `num_items` is a global count, but data-parallel engines average gradients over processes.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._check_loss(loss, inputs, totals["sequence_loss"])
        return loss

    def _forward(self, model, inputs, num_items):
        self._last_shape = tuple(inputs["input_ids"].shape)
        if not self.is_deepspeed_enabled:  # ZeRO-3 records the order of modules in the first forward
            self._try_once(model)
        return self.objective(model, inputs, num_items)

    def _try_once(self, model) -> None:
        """Checks, once, that the log-probabilities in the loss are the model's own, on a few tokens."""
        if self._is_tried:
            return
        config = self.model.config
        with self.compute_loss_context_manager():
            check_head(model, config, self.args.device)
            if self.args.padding_free:
                check_boundaries(model, config.get_text_config().vocab_size, self.args.device)
        self._is_tried = True

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        teacher_ids = self.rows.evaluated.meet(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, totals = self._forward(model, inputs, self.objective.num_items(inputs))
        self._try_once(model)
        if FILLER in inputs:
            totals[FILLER] = inputs[FILLER]
        self._evaluated.add(totals, teacher_ids)
        # No loss is returned, because `Trainer` would average it over batches. `evaluation_loop` adds the exact one.
        return None, None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        if self.is_deepspeed_enabled and self.deepspeed is None and self.accelerator.deepspeed_plugin.zero_stage < 3:
            raise ValueError(
                "DeepSpeed cannot evaluate before training, unless it is ZeRO-3 and no training follows. To evaluate "
                "before the first step, set `eval_on_start=True`."
            )
        self._evaluated = EvaluationTotals(self.accelerator)
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._evaluated.metrics(self.args.loss_aggregation, getattr(dataloader.dataset, "teacher_ids", None))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def reverse_kl_of_rows(self, rows: Dataset) -> np.ndarray:
        """
        Computes the reverse KL divergence of each row on the stored top-k, in nats per token: `(rows,)` float64, on
        every process.

        Args:
            rows ([`~datasets.Dataset`]): Valid rows with top-k columns.
        """
        self.evaluation_loop(self.get_eval_dataloader(rows), "Reverse KL", prediction_loss_only=True)
        return self._evaluated.of_sequences("reverse_kl_topk") / self._evaluated.of_sequences("tokens")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(metrics := self.window.close())
            message = self.drift.message(metrics, self.state.global_step, self._advise_fresh_rollouts)
            if message is not None and self.is_world_process_zero():
                logger.warning(message)
        super().log(logs, start_time)

    def _advise_fresh_rollouts(self) -> str:
        return remedy(self.args.output_dir, [teacher["id"] for teacher in self.describe_round()["teachers"]])

    # ---- Saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and not _internal_call and "SHARDED" in str(plugin.state_dict_type):
            # The weights in checkpoints are sharded. Without this, `output_dir` would not get any weights.
            plugin.set_state_dict_type("FULL_STATE_DICT")
            try:
                super().save_model(output_dir)
            finally:
                plugin.set_state_dict_type("SHARDED_STATE_DICT")
        else:
            super().save_model(output_dir, _internal_call)
        output_dir = output_dir or self.args.output_dir
        if isinstance(self.train_dataset, IterableDataset):
            self.rows.trained.gather()
        if self.is_world_process_zero():
            os.makedirs(output_dir, exist_ok=True)  # with sharded weights the directory may not exist yet
            self.saved = SavedCheckpoint(output_dir, self.state.global_step, fingerprint_saved(self, output_dir))
            write_arguments(self, output_dir)
        # After saving the weights, because PEFT writes its own card with them.
        self.create_model_card(output_dir=output_dir)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        output_dir: str | None = None,
    ) -> None:
        """
        Writes a model card that cites the paper and names the teachers: those that wrote the SFT data, inherited from
        the student's card, and those that scored the training rows.

        Args:
            model_name (`str`, *optional*):
                Name of the model. Defaults to that of the Hub repository or the output directory.
            dataset_name (`str`, *optional*):
                Name of the table.
            tags (`str` or `list[str]`, *optional*):
                Tags to add to the trainer's own.
            output_dir (`str`, *optional*):
                Directory to write `README.md` to. Defaults to `args.output_dir`.
        """
        if not self.is_world_process_zero():
            return
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        write_card(
            self,
            output_dir or self.args.output_dir,
            model_name=model_name,
            dataset_name=dataset_name,
            tags=list(dict.fromkeys([*tags, *self._tag_names])),
        )

    def describe_round(self) -> dict[str, Any]:
        """
        Returns the record of this training as in the model card: `student`, `objective`, `teacher_consistency` (the
        evidence), `teachers` with their rows, `sft_teachers`, and more. Rows of a stream are counted when they are
        trained on; those of other processes are added when a model is saved.
        """
        record = {**describe_round(self), "sft_teachers": self.student.sft_teachers}
        if not record["teachers"]:  # a stream before training
            record["teachers"] = count_teachers({self.rows.trained.first: 0})
        return record

    # ---- Private methods of `Trainer`: tests/training/test_hooks.py checks them for the installed version ----

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        training, collator = description == "Training", self.data_collator
        if training:
            self.rows.use_for_training(dataset)
        elif not self.rows.is_prepared(dataset):  # passed after the initialization
            self.rows.prepare(dataset, "eval_dataset" if description == "Evaluation" else "test_dataset")
        # Only training uses weights, and micro-batches: evaluation has its own batch size.
        self.data_collator = replace(collator, **({} if training else {"max_tokens": None, "teacher_weights": None}))
        if isinstance(dataset, IterableDataset):
            self.data_collator.read = self.rows.check_of(dataset)
            dataset = in_arrow(dataset)
            if (processes := self.accelerator.num_processes) > 1:
                dataset = WholeStream(dataset, fill=1 if training else self.args.eval_batch_size * processes)
        # Evaluation reads all rows in their order. With persistent workers, `Trainer` would use this dataloader for
        # all later evaluations, also on other rows.
        evaluation = {"persistent_workers": False, "drop_last": False, "in_order": True}
        changes = {} if training else {f"dataloader_{name}": value for name, value in evaluation.items()}
        before = {name: getattr(self.args, name) for name in changes}
        vars(self.args).update(changes)
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            vars(self.args).update(before)
            self.data_collator = collator

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> TableRows | PackedRows:
        rows = TableRows(dataset, (TEACHER_ID,) if self.args.teacher_weights else ())
        if not self.args.packing or description != "Training":
            return rows
        return PackedRows(rows, self.rows.packs)

    def _get_collator_with_removed_columns(self, data_collator, description: str | None = None):
        return data_collator  # the collator ignores unused columns

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(self.train_dataset, Dataset):
            return GroupedByLength(self)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset):
        # Keep the order of rows, also if training rows are grouped by length, because results are returned in it.
        return None

    def _inner_training_loop(self, *args, **kwargs):
        self._attempts += 1
        if self._attempts > 1 and (steps := self.state.global_step - self._initial_global_step):
            raise RuntimeError(
                f"Memory ran out after {steps} steps. `auto_find_batch_size` would start again at the first step with "
                "weights that these steps have changed. Set a smaller `per_device_train_batch_size`, or "
                "`max_tokens_per_device` if only long rows are too large, and start again or from a checkpoint."
            )
        # Discard the state of unfinished steps.
        self.window.reset()
        self._check_loss.reset()
        checkpoint, begun_at = kwargs.get("resume_from_checkpoint"), None
        if checkpoint is not None:
            begun_at = on_main_process(self.accelerator.state, lambda: check_resumed(self, checkpoint))
            if isinstance(self.train_dataset, IterableDataset):
                self.rows.trained.resume(checkpoint)
        output = super()._inner_training_loop(*args, **kwargs)
        if begun_at is not None and begun_at == self.state.global_step >= self.state.max_steps:
            logger.warning(f"Training had reached its end, step {begun_at}: there is nothing to resume.")
        return output

    def _run_epoch(self, *args, **kwargs):
        # `Trainer` would take another step from the checkpoint of a run that had reached its end.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled and any(Path(checkpoint).glob("global_step*")):
            raise ValueError(
                f"{checkpoint} was saved by DeepSpeed, and only DeepSpeed reads its optimizer state: resume with the "
                "same engine and the same number of processes."
            )
        if checkpoint is not None and not any(Path(checkpoint).glob("optimizer*")) and not self.is_deepspeed_enabled:
            raise ValueError(
                f"{checkpoint} has no state of the optimizer (`save_only_model=True`), so a resumed run would not be "
                "the same. Train on from it in a new round: give it as `model`, with another `output_dir`."
            )
        super()._load_optimizer_and_scheduler(checkpoint)

    def _prepare_input(self, data):
        # With DeepSpeed, `Trainer` would cast floats to the dtype of the weights. Log-probabilities stay float32.
        return send_to_device(data, self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        if not batch_samples:
            return None
        parts = [part for batch in batch_samples for part in micro_batches(batch)]
        count = torch.tensor(sum(self.objective.num_items(part) for part in parts), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def floating_point_ops(self, inputs):
        return super().floating_point_ops(flattened(inputs))

    def _track_num_input_tokens(self, inputs):
        batch = flattened(inputs)
        # Without an attention mask, `Trainer` would not count tokens that have the id of the padding token.
        super()._track_num_input_tokens({"attention_mask": torch.ones_like(batch["input_ids"]), **batch})

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The weights are copied from the checkpoint, so the card must be as well.
        card = Path(checkpoint_folder) / "README.md"
        if self.is_world_process_zero() and card.is_file():
            shutil.copy(card, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)
