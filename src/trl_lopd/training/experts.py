"""Mixtures of experts: the load-balancing loss of their routers, and processes whose tokens visit different experts.

transformers computes the loss (Switch Transformer, arXiv 2101.03961) in the forward of the whole model, which the head
takes the place of. So the model's own function is called here on what the routers of its backbone return.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import torch
from accelerate.utils import DistributedType, is_peft_model
from torch import Tensor
from transformers import Trainer

from .config import OfflineOPDConfig

# Arguments of transformers' function; Doge's, for instance, has others.
_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def load_balancing(model) -> Callable[[tuple[Tensor, ...], Tensor | None], Tensor] | None:
    """
    Returns the load-balancing loss of a causal language model, `E * sum_e f_e * p_e` over its `E` experts: `f_e`, the
    assignments of tokens to an expert, by `p_e`, the mean probability that routers give to it, over the tokens of all
    layers. It is as many as the experts of a token where the load is even.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, not wrapped by an engine.

    Returns:
        `Callable`, *optional*: A function of the router logits of each layer `(tokens, experts)` and the attention
        mask `(batch, length)`, without which all tokens count, to a scalar; `None` if the model has no such loss.
    """
    modules = (sys.modules.get(kind.__module__) for kind in type(model).__mro__)
    function = next((f for module in modules if (f := getattr(module, "load_balancing_loss_func", None))), None)
    if function is None or list(inspect.signature(function).parameters) != _ARGUMENTS:
        return None
    if not hasattr(model.config.get_text_config(), "output_router_logits"):
        return None
    return lambda router_logits, mask: function(router_logits, model.num_experts, model.num_experts_per_tok, mask)


def aux_loss_coef(args: OfflineOPDConfig, model) -> float:
    """
    Returns the weight of the load-balancing loss: `args.router_aux_loss_coef`, or if it is not set the one that the
    model's config declares; 0 for a model without that loss.

    Args:
        args ([`OfflineOPDConfig`]): Arguments.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model, not wrapped by an engine.

    Raises:
        ValueError: If a weight is set and the model has no such loss.
    """
    base, coef = model.get_base_model() if is_peft_model(model) else model, args.router_aux_loss_coef
    if load_balancing(base) is None:
        if coef:
            raise ValueError(
                f"`router_aux_loss_coef` is {coef}, but {type(base).__name__} has no load-balancing loss: it is not a "
                "mixture of experts, or one that transformers balances in another way. Leave it unset."
            )
        return 0.0
    return getattr(base.config.get_text_config(), "router_aux_loss_coef", 0.0) if coef is None else coef


def check_gradient(aux_loss: Tensor) -> None:
    """
    Checks that the load-balancing loss has a gradient where one is needed.

    Raises:
        ValueError: If it has none.
    """
    if torch.is_grad_enabled() and not aux_loss.requires_grad:
        raise ValueError(
            "The load-balancing loss has no gradient. Either activations are checkpointed with `use_reentrant=True`, "
            "the default for adapters under ZeRO-3, which hides the routers: set `activation_checkpointing=False`, or "
            "where it is your setting `activation_checkpointing_kwargs={'use_reentrant': False}`. Or no trained "
            "weight comes before a router. To train without this loss, set `router_aux_loss_coef=0.0`."
        )


def keep_in_step(trainer: Trainer) -> None:
    """
    Has processes communicate alike whose tokens visit different experts, where an expert is a module of its own, as in
    code from the Hub. In the models of transformers, the experts of a layer are one tensor.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, before its model is prepared.

    Raises:
        ValueError: If the engine waits for the gradient of every expert on every process.
    """
    state = trainer.accelerator.state
    layers = [
        module
        for module in trainer.model.modules()
        if any("expert" in name and isinstance(child, torch.nn.ModuleList) for name, child in module.named_children())
    ]
    if not layers or trainer.accelerator.num_processes == 1:
        return
    plugin = state.deepspeed_plugin if state.distributed_type == DistributedType.DEEPSPEED else None
    if plugin is not None and plugin.zero_stage == 3:
        from deepspeed.utils import set_z3_leaf_module

        for layer in layers:  # gathered as a whole
            set_z3_leaf_module(layer, True)
    elif plugin is not None or trainer.is_fsdp_enabled:
        raise ValueError(
            f"Each expert of `{type(layers[0]).__name__}` is a module of its own. With this engine, processes whose "
            "tokens visit different experts would wait for each other for ever. Use ZeRO-3 or DDP, or an architecture "
            "of transformers, where the experts of a layer are one tensor."
        )
    elif trainer.args.ddp_find_unused_parameters is None:
        trainer.accelerator.ddp_handler.find_unused_parameters = True
