"""The student: its description before it is loaded, and its loading with adapters and the patched forward."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..identity.cards import read_model_card
from ..identity.consistency import inherited_teachers, written_for
from ..identity.fingerprint import TeacherFingerprint, is_sharded
from ..identity.stamp import fingerprint_or_none
from ..models import Positions, adapter_config, config_of, load_tokenizer, positions_of, warn_of_altering_kwargs
from ..names import as_name
from ..processes import on_main_process
from ..table.schema import vocab_limits
from .head import add_distillation_head, assert_adapters_are_seen
from .packing import check_architecture

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

    from .config import OfflineOPDConfig


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Student:
    """
    Description of a student without its weights, so that tables are validated before the weights are loaded.

    Attributes:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The `model` argument of the trainer.
        name (`str`): Name of the student in messages.
        config ([`~transformers.PreTrainedConfig`]): Config of the model, or of an adapter's base.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        adapter ([`~peft.PeftConfig`], *optional*): Config of the adapter, if `model` names one.
        card (`dict`): The record in its card.
        fingerprint (`str`, *optional*): Id of its fingerprint; empty if it cannot be fingerprinted, `None` if teacher
            consistency is not checked.
        positions ([`Positions`]): How long a row it can read.
        loaded_revision (`str`, *optional*): Commit on the Hub that a loaded model holds, if it is known.
    """

    model: str | PreTrainedModel | PeftModel
    name: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    adapter: PeftConfig | None
    card: dict[str, Any]
    fingerprint: str | None
    positions: Positions
    loaded_revision: str | None = None

    @classmethod
    def describe(
        cls,
        model: str | Path | PreTrainedModel | PeftModel,
        args: OfflineOPDConfig,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Student:
        """
        Reads everything except the weights. All processes must call this.

        Raises:
            ValueError: If no tokenizer is given and a loaded model does not say where it was loaded from.
        """
        model = as_name(model)
        model_id = model_id_of(model)
        hub_kwargs = _hub_kwargs(model, args)
        config, name = config_of(model, hub_kwargs), model_id or "the student"
        adapter = None
        if isinstance(model, str):
            adapter = adapter_config(model, hub_kwargs["revision"])
        elif is_peft_model(model):
            name += " (the base of this `PeftModel`; pass the adapter's directory as `model` to use its own card)"
        if tokenizer is None:
            if not model_id:
                raise ValueError("The model does not say where it was loaded from: pass its `processing_class`.")
            tokenizer = load_tokenizer(model, **hub_kwargs)

        card = read_model_card(model_id, hub_kwargs["revision"]) if model_id else {}
        fingerprint = loaded_revision = None
        if args.teacher_consistency != "off":
            altered = isinstance(model, str) and warn_of_altering_kwargs(args.model_init_kwargs, model)
            computed = None if altered else _fingerprint(model, tokenizer, args, hub_kwargs)
            fingerprint = computed.id if computed else ""
            loaded_revision = computed.revision if computed and not isinstance(model, str) else None
            if loaded_revision and not written_for(card, fingerprint):
                # The model was loaded from another revision than `main`, which has its own card.
                card = read_model_card(model_id, loaded_revision)
        positions = positions_of(config, trust_remote_code=hub_kwargs["trust_remote_code"])
        return cls(model, name, config, tokenizer, adapter, card, fingerprint, positions, loaded_revision)

    @property
    def is_adapter(self) -> bool:
        """Returns whether the student is an adapter over a base already."""
        return self.adapter is not None if isinstance(self.model, str) else is_peft_model(self.model)

    @property
    def sft_teachers(self) -> list[dict[str, Any]]:
        """Returns the entries of the teachers that wrote its SFT data. Their evidence depends on whether the card is
        bound to the weights."""
        return inherited_teachers(self.card, self.fingerprint)

    @property
    def vocab_limits(self) -> tuple[int | None, int | None]:
        """Returns the limits of token ids, see [`~table.schema.vocab_limits`]."""
        return vocab_limits(self.tokenizer, self.config)

    @property
    def pad_token_id(self) -> int:
        """Returns an id to pad with. Padding is masked everywhere, so any id works."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token_id for token_id in ids if token_id is not None), 0)

    def load(
        self,
        args: OfflineOPDConfig,
        quantization_config: BitsAndBytesConfig | None,
        peft_config: PeftConfig | None,
    ) -> PreTrainedModel | PeftModel:
        """
        Loads the weights, patches the forward for the loss, and wraps the model in adapters.

        Raises:
            ValueError: If options for loading are given with a loaded model, or an adapter would not be trained.
        """
        model = self.model
        if isinstance(model, str):
            model = self._load(args, quantization_config)
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
            self._name_revision_of_base(model, args)
            assert_adapters_are_seen(model)
            if args.activation_checkpointing:
                _checkpoint_through_adapters(model, args)
        return model

    def _name_revision_of_base(self, model: PeftModel, args: OfflineOPDConfig) -> None:
        """Writes the revision of the base into the config of its adapters, which would be loaded over `main`."""
        base = model.get_base_model().config._name_or_path
        if isinstance(self.model, str):
            revision = (args.model_init_kwargs or {}).get("revision") if self.adapter is None else None
        else:
            revision = None if Path(base).is_dir() else self.loaded_revision
        for name, config in model.peft_config.items():
            if config.revision is not None or config.base_model_name_or_path not in (None, base):
                continue
            if revision is not None:
                model.peft_config[name] = copy.copy(config)  # the config may be the caller's, for other models
                model.peft_config[name].revision = revision
            elif not isinstance(self.model, str) and base and not Path(base).is_dir():
                logger.warning(
                    f"Nothing says which revision of {base} the loaded student is: its adapter will be loaded over "
                    "`main`. If it is another one, set `revision` in the config of the adapter."
                )

    def _load(self, args: OfflineOPDConfig, quantization_config: BitsAndBytesConfig | None) -> Any:
        init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        if quantization_config is not None:
            init_kwargs["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            init_kwargs["device_map"] = None
        if self.adapter is None:
            return create_model_from_path(self.model, **init_kwargs)
        from peft import PeftModel

        base_kwargs = {**init_kwargs, "revision": self.adapter.revision}
        base = create_model_from_path(self.adapter.base_model_name_or_path, **base_kwargs)
        return PeftModel.from_pretrained(base, self.model, revision=init_kwargs.get("revision"), is_trainable=True)


def model_id_of(model: str | Path | PreTrainedModel | PeftModel) -> str:
    """Returns the path or Hub id of a model, or the one that it was loaded from; empty if unknown."""
    return str(model) if isinstance(model, str | Path) else get_config_model_id(model.config)


def _hub_kwargs(model: str | PreTrainedModel | PeftModel, args: OfflineOPDConfig) -> dict[str, Any]:
    init_kwargs = args.model_init_kwargs or {}
    return {
        "revision": init_kwargs.get("revision") if isinstance(model, str) else None,
        "trust_remote_code": init_kwargs.get("trust_remote_code", args.trust_remote_code),
    }


def _fingerprint(
    model: str | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    args: OfflineOPDConfig,
    hub_kwargs: dict[str, Any],
) -> TeacherFingerprint | None:
    consequence = (
        "The student cannot be fingerprinted, so what its card says counts as declared, and nothing tells whether it "
        "sampled the rollouts"
    )
    kwargs = hub_kwargs if isinstance(model, str) else {}

    def compute() -> TeacherFingerprint | None:
        return fingerprint_or_none(model, consequence, processing_class=tokenizer, **kwargs)

    if not isinstance(model, str) and is_sharded(model):
        return compute()  # a collective operation, which all processes must take part in
    return on_main_process(args.distributed_state, compute)


def _is_zero3(args: OfflineOPDConfig) -> bool:
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


def _checkpoint_through_adapters(model: PeftModel, args: OfflineOPDConfig) -> None:
    model.enable_input_require_grads()
    if not _is_zero3(args):
        return
    # Otherwise recomputed tensors have other shapes than the saved ones, see TRL issue 2514.
    kwargs = args.activation_checkpointing_kwargs or {}
    if kwargs.get("use_reentrant") is False:
        raise ValueError(
            "Adapters under ZeRO-3 need `activation_checkpointing_kwargs={'use_reentrant': True}`, which is the "
            "default there."
        )
    args.activation_checkpointing_kwargs = {**kwargs, "use_reentrant": True}


def _wrap_in_adapters(model: PreTrainedModel, peft_config: PeftConfig, args: OfflineOPDConfig) -> PeftModel:
    from peft import get_peft_model, prepare_model_for_kbit_training

    if is_peft_model(model):
        raise ValueError(
            "You passed a `PeftModel` together with a `peft_config`. Merge the adapter into the model first, or leave "
            "out `peft_config` to continue training it."
        )
    if str(getattr(peft_config, "init_lora_weights", "")).startswith("pissa_niter_"):
        raise ValueError(
            f"`init_lora_weights={peft_config.init_lora_weights!r}` changes the base by a decomposition that is drawn "
            "at random: the adapter that is saved would be loaded over another base. Use 'pissa'."
        )
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    kwargs = {}
    if _is_zero3(args) and not quantized:
        # ZeRO-3 gathers parameters into buffers of one dtype.
        kwargs["autocast_adapter_dtype"] = False
    return get_peft_model(model, peft_config, **kwargs)
