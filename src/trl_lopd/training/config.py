"""Training arguments."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from accelerate import ParallelismConfig
from transformers import SchedulerType, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from ..identity.consistency import MODES
from .criteria import direction

_NO_PREDICTIONS = "evaluation makes no predictions, and the trainer takes no `compute_metrics`."
_CASTS = (
    "the first evaluation would cast the model for good, and training would go on in that precision. Set `bf16=True` "
    "for mixed precision, or load a model in half of it: `model_init_kwargs={'dtype': 'bfloat16'}`."
)
# Arguments of `TrainingArguments` that would have no effect here, or an unexpected one, and why.
_NOT_SUPPORTED = {
    "label_smoothing_factor": "the student is trained on the teacher's probabilities, not on one-hot labels.",
    "label_names": "the labels are the `completion_ids` of the table.",
    "length_column_name": "rows are grouped by their lengths after truncation.",
    "save_on_each_node": "transformers writes weights on the first node only: save to a disk that all nodes share.",
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "bf16_full_eval": _CASTS,
    "fp16_full_eval": _CASTS,
}


@dataclass
class OfflineOPDConfig(TrainingArguments):
    r"""
    Configuration class for the [`OfflineOPDTrainer`].

    This class includes only the parameters that are specific to offline on-policy distillation and those whose
    defaults differ from [`~transformers.TrainingArguments`]: the paper's (Lightning OPD, arXiv 2604.13010) for the
    optimizer, TRL's for logging, activation checkpointing (on) and bf16 (on where the
    accelerator has it).

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used when the `model`
            argument of the [`OfflineOPDTrainer`] is provided as a string.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow loading models and tokenizers that ship custom Python code.
        router_aux_loss_coef (`float`, *optional*):
            Coefficient of the load-balancing auxiliary loss of mixtures of experts, added to the training loss with
            this weight. If not set, the value that the model's config declares. `0.0` disables it. Raises an error if
            it is set for a model without that loss.

        > Parameters that control the data

        max_completion_length (`int` or `None`, *optional*, defaults to `4096`):
            Completions longer than this, in tokens, are truncated on the right together with every per-token column.
        max_length (`int` or `None`, *optional*):
            Limit of prompt and completion together, in tokens. The completion is truncated; a prompt that leaves it no
            room is an error.
        pad_to_multiple_of (`int`, *optional*):
            If set, batches are padded to a multiple of this length.
        packing (`bool`, *optional*, defaults to `False`):
            Whether to group the rows of the training table into packs of at most `max_length` tokens, by best-fit
            decreasing. A pack is one training example, so `per_device_train_batch_size` counts packs. Rows of a pack
            do not see each other. Padding-free is enabled, regardless of the value of that parameter. Evaluation rows
            are not packed.
        padding_free (`bool`, *optional*, defaults to `False`):
            Whether to read batches without padding, all rows one after another in a single sequence. Made for
            FlashAttention or FlexAttention; other implementations build a mask of tokens x tokens. Raises an error for
            models in which rows of one sequence would see each other.
        max_tokens_per_device (`int`, *optional*):
            If set, a device's batch is read in as few micro-batches as fit, each of at most this many tokens, padding
            included. Their gradients are added up, so the optimizer sees the same batch; only memory changes.
        teacher_logprob_floor (`float`, *optional*):
            If set, teacher log-probabilities of `-inf` are accepted, counted, and replaced by this value in nats.
            Otherwise they are an error.
        teacher_consistency (`str`, *optional*, defaults to `"strict"`):
            What to do when the teacher that scored the table is not known to be the one that wrote the student's SFT
            data: `"strict"` raises an error, also if that is only declared by the user; `"declared_ok"` raises an
            error if it is not declared either; `"warn"` warns; `"off"` does not check.

        > Parameters that control the objective

        loss_type (`str`, *optional*, defaults to `"auto"`):
            `"topk"`: a divergence (`beta`) on the teacher's stored top-k tokens, the sampled token and a tail bucket.
            `"sampled"`: the paper's update on the sampled token. `"auto"`: `"topk"` if the table has the columns.
        beta (`float`, *optional*, defaults to `0.5`):
            Interpolation coefficient of the generalised Jensen-Shannon divergence of the top-k objective, as in TRL's
            `DistillationConfig`: `0.0` is the forward KL divergence, `0.5` the JSD, `1.0` the reverse KL divergence.
            (TRL's default is `1.0`.) Losses of different `beta` are not on one scale: the JSD is at most ln 2, and
            close to the ends, as at 0.01 or 0.99, it is near 0 and jumps. Held-out rows are measured by the reverse KL
            divergence whatever it is.
        loss_aggregation (`str`, *optional*, defaults to `"sequence_mean"`):
            `"sequence_mean"`: mean over each sequence's tokens, then over sequences. `"token_mean"`: mean over all
            tokens.
        teacher_weights (`dict[str, float]`, *optional*):
            Weight of the rows of each `teacher_id`, a column of a table with several teachers. A row's loss and
            gradient are multiplied by it, and what they are the mean over stays the same: with `{"math": 1.0, "code":
            0.5}`, rows of `"code"` count half. Metrics, and the loss on held-out rows, are not weighted.
        advantage_clip (`float`, *optional*, defaults to `10.0`):
            Advantages of the sampled objective are clipped to plus or minus this many nats.
        ratio_clip (`float`, *optional*):
            Trust region of the sampled objective around the policy that sampled the rollouts, PPO-style, for instance
            `0.2`. Needs `loss_type="sampled"` and a `ref_logprobs` column. `None`, as in the paper, for no trust
            region.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs", "teacher_weights"]

    learning_rate: float = field(default=2e-6, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The scheduler type to use."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay for AdamW."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 for AdamW."})
    logging_steps: float = field(
        default=10,
        metadata={"help": "Log every X update steps. An integer, or a float in [0, 1): a share of the total steps."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Filter NaN and infinite losses out of the log. Here such losses end training first."},
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bf16 mixed precision. Defaults to `True` on accelerators that have it unless `fp16` is set."
        },
    )

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `from_pretrained` when the model is given as a string."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to allow models and tokenizers that ship custom Python code."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Coefficient of the load-balancing loss of mixtures of experts, added to the training loss. "
            "Defaults to the value in the model's config; `0.0` disables it."
        },
    )

    max_completion_length: int | None = field(
        default=4096,
        metadata={"help": "Longer completions are truncated on the right, with every per-token column."},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Limit of prompt and completion together; the completion is truncated."}
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad batches to a multiple of this length."}
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Whether to group training rows into packs of at most `max_length` tokens, each one training "
            "example. Enables padding-free."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Whether to read batches without padding, all rows one after another in a single sequence. Made "
            "for FlashAttention or FlexAttention."
        },
    )
    max_tokens_per_device: int | None = field(
        default=None,
        metadata={
            "help": "Read a device's batch in as few micro-batches of at most this many tokens as fit. The optimizer "
            "sees the same batch."
        },
    )
    teacher_logprob_floor: float | None = field(
        default=None, metadata={"help": "Accept teacher log-probabilities of -inf and replace them by this value."}
    )
    teacher_consistency: str = field(
        default="strict",
        metadata={
            "help": "What to do if the scoring teacher is not known to have written the student's SFT data.",
            "choices": list(MODES),
        },
    )

    loss_type: str = field(
        default="auto",
        metadata={
            "help": "'topk': divergence on stored teacher top-k. 'sampled': the paper's update. 'auto': 'topk' where "
            "the table has the columns.",
            "choices": ["auto", "topk", "sampled"],
        },
    )
    beta: float = field(
        default=0.5,
        metadata={
            "help": "Divergence of the top-k objective: 0.0 = forward KL, 0.5 = JSD, 1.0 = reverse KL, as in TRL's "
            "`DistillationConfig`."
        },
    )
    loss_aggregation: str = field(
        default="sequence_mean",
        metadata={"help": "What the loss is the mean over.", "choices": ["sequence_mean", "token_mean"]},
    )
    teacher_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "Weight of the rows of each `teacher_id`, as {math: 1.0, code: 0.5}."},
    )
    advantage_clip: float = field(
        default=10.0, metadata={"help": "Advantages of the sampled objective are clipped to +-this many nats."}
    )
    ratio_clip: float | None = field(
        default=None,
        metadata={"help": "PPO-style trust region of the sampled objective around `ref_logprobs`, e.g. 0.2."},
    )

    def __post_init__(self):
        for name, choices in (
            ("loss_type", ("auto", "topk", "sampled")),
            ("loss_aggregation", ("sequence_mean", "token_mean")),
            ("teacher_consistency", MODES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        tokens = ("max_completion_length", "max_length", "max_tokens_per_device", "pad_to_multiple_of")
        for name in (*tokens, "advantage_clip", "ratio_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
            if name in tokens and value is not None and not isinstance(value, int):
                raise ValueError(f"`{name}` is a number of tokens, got {value!r}.")
        if self.teacher_logprob_floor is not None and not -float("inf") < self.teacher_logprob_floor < 0:
            raise ValueError(f"`teacher_logprob_floor` must be negative, got {self.teacher_logprob_floor}.")
        if self.router_aux_loss_coef is not None and not 0 <= self.router_aux_loss_coef < float("inf"):
            raise ValueError(f"`router_aux_loss_coef` must be 0 or more, got {self.router_aux_loss_coef}.")
        if self.packing and self.max_length is None:
            raise ValueError("`packing` needs `max_length`: the most tokens in a pack.")
        if self.packing and self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"`train_sampling_strategy={self.train_sampling_strategy!r}` orders rows by length, but with "
                "`packing` all examples are about `max_length` long. Leave one of the two unset."
            )
        self.padding_free |= self.packing
        if self.padding_free and self.pad_to_multiple_of is not None:
            raise ValueError("`pad_to_multiple_of` has no effect without padding: leave it or `padding_free` unset.")
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"`beta` must be in [0.0, 1.0], got {self.beta}.")
        if self.beta != type(self).beta and self.loss_type == "sampled":
            raise ValueError(
                "`beta` chooses the divergence of `loss_type='topk'`; the sampled objective has none: leave it unset."
            )
        if self.ratio_clip is not None and self.loss_type == "topk":
            raise ValueError("`ratio_clip` is a trust region of `loss_type='sampled'`; the top-k objective has none.")

        if self.metric_for_best_model is not None:
            self.greater_is_better = direction(self.metric_for_best_model, self.greater_is_better)
        # The trainer replaces the default if the evaluation rows have top-k columns.
        self.metric_for_best_model_is_default = self.metric_for_best_model is None
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        for unsupported in fields(TrainingArguments):
            reason, value = _NOT_SUPPORTED.get(unsupported.name), getattr(self, unsupported.name)
            if reason is not None and value not in (unsupported.default, []):
                raise ValueError(f"`{unsupported.name}={value!r}` is not supported: {reason}")
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "`train_sampling_strategy='batch_rebalance'` is not supported. 'group_by_length' reduces padding, "
                "`max_tokens_per_device` limits memory."
            )
        super().__post_init__()
        if self.teacher_weights is not None:
            self.teacher_weights = _checked_weights(self.teacher_weights)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch would warn
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("`fp16=True` has no effect on a CPU. Set `bf16=True`, or neither.")
        for name, value, reason in (
            ("dispatch_batches", True, "batches of different lengths cannot be put together and sent to processes"),
            ("even_batches", False, "processes with fewer batches would keep the others waiting"),
            ("use_seedable_sampler", False, "a run that is resumed would read other rows"),
        ):
            if getattr(self.accelerator_config, name) is value:
                raise ValueError(f"`accelerator_config={{{name!r}: {value}}}` is not supported: {reason}.")
        if self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            # These schedulers read the metric, but do not know `greater_is_better`.
            mode = "max" if self.greater_is_better else "min"
            user_mode = (self.lr_scheduler_kwargs or {}).get("mode", mode)
            if user_mode != mode:
                raise ValueError(
                    f"`lr_scheduler_kwargs={{'mode': {user_mode!r}}}` contradicts `metric_for_best_model="
                    f"{self.metric_for_best_model!r}`, of which {'more' if mode == 'max' else 'less'} is better: "
                    "leave the mode out."
                )
            self.lr_scheduler_kwargs = {**(self.lr_scheduler_kwargs or {}), "mode": mode}

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        # Reporters log this dictionary. `TrainingArguments` masks its Hub token, but not a token for loading models.
        kwargs = settings["model_init_kwargs"] or {}
        settings["model_init_kwargs"] = {name: value for name, value in kwargs.items() if name != "token"}
        return settings


def _checked_weights(weights: Any) -> dict[str, float]:
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"`teacher_weights` is a weight for each `teacher_id`, as {{'math': 1.0}}; got {weights!r}.")
    for teacher, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ValueError(f"`teacher_weights`: the weight of {teacher!r} is a number from 0 on, not {weight!r}.")
    if not any(weights.values()):
        raise ValueError("`teacher_weights` are all 0: nothing would be learnt.")
    return {teacher: float(weight) for teacher, weight in weights.items()}


def refuse_unsupported(args: OfflineOPDConfig, streams: bool) -> None:
    """
    Checks that this trainer supports the arguments.

    Args:
        args ([`OfflineOPDConfig`]): The arguments. `liger_kernel_config` is completed.
        streams (`bool`): Whether the training rows are a stream.

    Raises:
        ValueError: If an argument is not supported; the message says what to use instead.
    """
    if args.packing and streams:
        raise ValueError(
            "`packing` needs the lengths of all rows, which a stream does not have. Set `padding_free=True` "
            "instead, or pass a `Dataset`."
        )
    if args.train_sampling_strategy == "group_by_length" and streams:
        raise ValueError(
            "`train_sampling_strategy='group_by_length'` needs the lengths of all rows, which a stream does not "
            "have. Leave it unset, or pass a `Dataset`."
        )
    # `accelerate launch` passes the parallelism in environment variables, which the default config reads.
    parallelism = args.parallelism_config or ParallelismConfig()
    if parallelism.cp_enabled or parallelism.sp_enabled:
        raise ValueError(
            "Context and sequence parallelism are not supported: trained tokens are found by their place in the "
            "whole sequence, which no process would hold. Set `cp_size` and `sp_size` to 1. For long sequences, "
            "use `activation_checkpointing=True`, with `activation_checkpointing_kwargs={'offload': True}` if it "
            "takes that, `max_tokens_per_device`, a `peft_config`, and ZeRO-3 or FSDP2."
        )
    refuse_parallelism(parallelism.tp_size)
    if args.use_liger_kernel:
        liger = args.liger_kernel_config or {}
        if liger.get("fused_linear_cross_entropy"):
            raise ValueError(
                "`liger_kernel_config={'fused_linear_cross_entropy': True}` would replace the forward in which "
                "this trainer computes its loss. Leave it out: Liger's other kernels are used."
            )
        args.liger_kernel_config = {**liger, "fused_linear_cross_entropy": False}


def refuse_parallelism(tp_size: int, n_gpu: int = 1) -> None:
    """
    Refuses to split a model, or a batch within a process.

    Args:
        tp_size (`int`): Processes that a layer is split over.
        n_gpu (`int`, *optional*, defaults to `1`): GPUs of this process.

    Raises:
        ValueError: If either is more than 1.
    """
    if n_gpu > 1:
        raise ValueError(
            "`nn.DataParallel` is not supported. Launch with `accelerate launch` or `torchrun`, or make a single GPU "
            "visible with `CUDA_VISIBLE_DEVICES`."
        )
    if tp_size > 1:
        raise ValueError(
            "Tensor parallelism is not supported: processes that read the same rows would be counted as if they had "
            "read others. Set `tp_size` to 1. For models that do not fit, use ZeRO-3 or FSDP2."
        )
