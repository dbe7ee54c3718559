"""
Trains mixtures of experts on however many processes started it, on rows whose tokens visit other experts on each.

    experts_script.py STUDENTS ROWS OUT KIND:CASE ...

Of the KINDS of `effopd_script` and the CASES here.
"""

from __future__ import annotations

import sys

from effopd_script import make_trainer, run, save_weights

from trl_lopd.training.head import backbone

LAYERS = {"qwen3_moe": "Qwen3MoeDecoderLayer", "mixtral": "MixtralDecoderLayer", "gpt_oss": "GptOssDecoderLayer"}


def trained(kind, students, rows, out, model="qwen3_moe", **options):
    """Evaluates, trains, and saves; gives the log, and the experts that tokens of this process visited."""
    trainer = make_trainer(
        *(kind, f"{students}/{model}", rows, out),
        **{"layer": LAYERS[model], "max_steps": 4, "router_aux_loss_coef": 0.1, "eval_on_start": True},
        **{"train_sampling_strategy": "sequential", "per_device_eval_batch_size": 4} | options,
    )
    visited, forward = set(), backbone(trainer.model).forward

    def watched(*args, **kwargs):
        output = forward(*args, **kwargs)
        if kwargs.get("output_router_logits"):
            tokens = kwargs["attention_mask"].bool().flatten() if "attention_mask" in kwargs else slice(None)
            visited.update(output.router_logits[0][tokens].topk(2).indices.flatten().tolist())
        return output

    backbone(trainer.model).forward = watched
    trainer.train()
    save_weights(trainer, out)
    trainer.save_model(str(out / "model"))
    return {"log": trainer.state.log_history, "visited": sorted(visited)}


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
    cases = (whole, budget, mixtral, gpt_oss)
    run({case.__name__: case for case in cases}, *sys.argv[1:])
