"""
Trains mixtures of experts on however many processes started it, on rows whose tokens visit other experts on each.

    experts_script.py STUDENTS ROWS OUT KIND:CASE ...

Of the KINDS of `effopd_script` and the CASES here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from effopd_script import make_trainer, run, save_weights
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from trl_lopd.training.head import backbone

LAYERS = {"qwen3_moe": "Qwen3MoeDecoderLayer", "mixtral": "MixtralDecoderLayer", "gpt_oss": "GptOssDecoderLayer"}


def trained(kind, students, rows, out, model="qwen3_moe", loaded=None, **options):
    """Evaluates, trains, and saves; gives the log, the experts that tokens of this process visited, and its passes."""
    trainer = make_trainer(
        *(kind, loaded or Path(students, model), rows, out),
        **{"layer": LAYERS[model], "max_steps": 4, "router_aux_loss_coef": 0.1, "eval_on_start": True},
        **{"train_sampling_strategy": "sequential", "per_device_eval_batch_size": 4} | options,
    )
    visited, passes, forward = set(), [], backbone(trainer.model).forward

    def watched(*args, **kwargs):
        output = forward(*args, **kwargs)
        if kwargs.get("output_router_logits"):
            tokens = kwargs["attention_mask"].bool().flatten() if "attention_mask" in kwargs else slice(None)
            passes.append(len(output.last_hidden_state))
            visited.update(output.router_logits[0][tokens].topk(2).indices.flatten().tolist())
        return output

    backbone(trainer.model).forward = watched
    trainer.train()
    save_weights(trainer, out)
    if loaded is None:
        trainer.save_model(str(out / "model"))
    return {"log": trainer.state.log_history, "visited": sorted(visited), "passes": len(passes)}


class Listed(torch.nn.Module):
    """Experts that are modules of their own, as in transformers before version 5 and in code from the Hub."""

    def __init__(self, experts):
        super().__init__()
        self.act_fn = experts.act_fn
        self.experts = torch.nn.ModuleList()
        for up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            expert = torch.nn.ModuleDict(
                {name: torch.nn.Linear(*weight.T.shape, bias=False) for name, weight in (("up", up), ("down", down))}
            )
            expert["up"].weight.data.copy_(up)
            expert["down"].weight.data.copy_(down)
            self.experts.append(expert)

    def forward(self, hidden, indices, weights):
        output = torch.zeros_like(hidden)
        for i, expert in enumerate(self.experts):
            tokens, places = (indices == i).nonzero(as_tuple=True)
            if len(tokens):
                gate, up = expert["up"](hidden[tokens]).chunk(2, -1)
                part = expert["down"](self.act_fn(gate) * up) * weights[tokens, places, None]
                output = output.index_add(0, tokens, part)
        return output


def listed(kind, students, rows, out):
    if kind == "zero3":
        from deepspeed.runtime.zero import leaf_module_config

        # DeepSpeed knows this architecture, but none from the Hub.
        leaf_module_config.DEFAULT_LEAF_MODULE_CLASSES.clear()
        # That of an earlier case would have the model loaded in parts.
        unset_hf_deepspeed_config()
    model = AutoModelForCausalLM.from_pretrained(f"{students}/qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.experts = Listed(layer.mlp.experts)
    return trained(kind, students, rows, out, loaded=model, teacher_consistency="off")


def whole(*case):
    return trained(*case)


def budget(*case):
    """Batches of two rows in one micro-batch or in two; a process with one repeats it where the other has two."""
    return trained(*case, max_tokens_per_device=24)


def mixtral(*case):
    return trained(*case, model="mixtral", loss_aggregation="token_mean", activation_checkpointing=False)


def gpt_oss(*case):
    return trained(*case, model="gpt_oss")


if __name__ == "__main__":
    cases = (whole, budget, mixtral, gpt_oss, listed)
    run({case.__name__: case for case in cases}, *sys.argv[1:])
