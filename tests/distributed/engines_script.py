"""
Trains on however many processes started it, as each engine does; the tests compare what comes out.

    engines_script.py STUDENT ROWS OUT KIND:CASE ...

Of the KINDS of `effopd_script` and the CASES here. What the tests compare is written to OUT, by kind and case.
"""

from __future__ import annotations

import functools
import sys

from effopd_script import make_trainer, run, save_weights
from peft import LoraConfig
from transformers import LlamaForCausalLM, TrainerCallback


def trained(kind, student, rows, out, resume=None, **options):
    """Evaluates, trains, evaluates, and saves; gives the log and both evaluations."""
    # The last of two batches is padded with rows of others, which must not count.
    options = {"eval_on_start": True, "per_device_eval_batch_size": 24, "max_steps": 4} | options
    trainer = make_trainer(kind, student, rows, out, **options)
    trainer.train(resume_from_checkpoint=resume)
    trainer.evaluate()
    save_weights(trainer, out)
    trainer.save_model(str(out / "model"))
    return trainer.state.log_history


def topk_token(*case):
    return trained(*case, loss_type="topk", loss_aggregation="token_mean", activation_checkpointing=False)


def sampled_sequence(*case):
    return trained(*case, loss_type="sampled", loss_aggregation="sequence_mean")


def sampled_token(*case):
    return trained(*case, loss_type="sampled", loss_aggregation="token_mean", activation_checkpointing=False)


def padding_free(*case):
    return trained(*case, padding_free=True)


def bf16(*case):
    return trained(*case, bf16=True, max_steps=6)


def lora(*case):
    return trained(*case, peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))


def whole(*case, **options):
    """With the top-k objective, its mean over sequences, and activation checkpointing; two checkpoints."""
    return trained(*case, save_strategy="steps", save_steps=3, max_steps=6, **options)


def resumed(kind, student, rows, out):
    return whole(kind, student, rows, out, resume=str(out.parent / "whole" / "checkpoint-3"))


def resumed_alone(kind, student, rows, out):
    """What two processes saved, on one."""
    return resumed(kind, student, rows, out)


class Keep(TrainerCallback):
    """The weights at the first checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            save_weights(self.trainer, self.out)


def best(kind, student, rows, out):
    """Of two checkpoints, the one that is called best is the first: the metric is turned round."""
    trainer = make_trainer(
        *(kind, student, rows, out),
        **{"max_steps": 4, "save_steps": 2, "eval_steps": 2, "save_strategy": "steps", "eval_strategy": "steps"},
        **{"load_best_model_at_end": True, "metric_for_best_model": "reverse_kl_topk"},
    )
    trainer.args.greater_is_better = True
    keep = Keep()
    keep.trainer, keep.out = trainer, out
    trainer.add_callback(keep)
    trainer.train()
    assert trainer.state.best_global_step == 2
    trainer.save_model(str(out / "model"))
    return trainer.evaluate()["eval_reverse_kl_topk"], trainer.state.best_metric


def other_logits(kind, student, rows, out):
    """A model that does something to its logits that its config does not say; what training says of it, and when."""
    plain = LlamaForCausalLM.forward

    @functools.wraps(plain)
    def halved(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = output.logits / 2
        return output

    LlamaForCausalLM.forward = halved
    try:
        trainer = make_trainer(kind, student, rows, out)
        trainer.train()
    except ValueError as error:
        return str(error), trainer.state.global_step
    finally:
        LlamaForCausalLM.forward = plain


if __name__ == "__main__":
    cases = [
        other_logits,
        topk_token,
        sampled_sequence,
        sampled_token,
        padding_free,
        bf16,
        lora,
        whole,
        resumed,
        resumed_alone,
    ]
    run({case.__name__: case for case in [*cases, best]}, *sys.argv[1:])
