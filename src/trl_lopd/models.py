"""Loading a model that samples or scores."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file
from trl.trainer.utils import create_model_from_path


def load_model(model: str | PreTrainedModel, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """A model from a local directory or Hub id, in its own dtype; an adapter is merged into its base model.

    A loaded model is returned as it is.
    """
    if not isinstance(model, str):
        return model
    init_kwargs = {"dtype": "auto", **(init_kwargs or {})}
    if find_adapter_config_file(model, revision=init_kwargs.get("revision")) is not None:
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(model, **init_kwargs).merge_and_unload()
    return create_model_from_path(model, **init_kwargs)
