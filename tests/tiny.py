"""Tiny models, tokenizers and tables, made on the spot."""

from __future__ import annotations

import re

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer, stamp_model_card
from trl_lopd.identity.fingerprint import fingerprint_teacher

# What a reader of a training that failed is waited for before it is ended, where one is left behind.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5


VOCAB = 32


def make_tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2} | {f"w{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<pad>"
    )


def make_model(
    seed: int = 0, hidden: int = 16, scale: float = 1.0, vocab: int = VOCAB, layers: int = 2, **config
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
            **config,
        )
    )
    # Fresh weights give a near-uniform softmax, in which most mistakes would not show.
    with torch.no_grad():
        model.lm_head.weight.mul_(20 * scale)
    return model.eval()


def make_experts(kind: str, seed: int = 0, **config) -> PreTrainedModel:
    """A mixture of four experts in each of two layers, of which a token visits two: `kind` is its model type."""
    torch.manual_seed(seed)
    experts = "num_experts" if kind == "qwen3_moe" else "num_local_experts"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, experts: 4, "num_experts_per_tok": 2}
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | ids | config))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        # So that routing is uneven: fresh routers send as much to each expert.
        for name, parameter in model.named_parameters():
            if re.search(r"gate\.weight|router\.weight", name):
                parameter.mul_(20)
    return model.eval()


def make_rollouts(rows: int = 12, seed: int = 0, vocab: int = VOCAB) -> Dataset:
    """Ragged rows of random tokens."""
    rng = np.random.default_rng(seed)
    return Dataset.from_dict(
        {
            "prompt_ids": [rng.integers(2, vocab, rng.integers(1, 6)).tolist() for _ in range(rows)],
            "completion_ids": [rng.integers(1, vocab, rng.integers(1, 12)).tolist() for _ in range(rows)],
        }
    )


def save_student(path, model, tokenizer, teacher_dir):
    """An SFT student whose card names the teacher."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    stamp_model_card(
        path,
        sft_teachers=[fingerprint_teacher(teacher_dir)],
        evidence="verified",
        checkpoint=fingerprint_teacher(path),
    )
    return path


def without_topk(table: Dataset) -> Dataset:
    return table.remove_columns(["teacher_topk_ids", "teacher_topk_logprobs"])


def make_args(tmp_path, **kwargs):
    defaults = dict(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        max_steps=6,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return OfflineOPDConfig(**defaults | kwargs)


def make_trainer(tmp_path, student_dir, table, eval_dataset=None, callbacks=None, peft_config=None, **kwargs):
    return OfflineOPDTrainer(
        model=str(student_dir),
        args=make_args(tmp_path, **kwargs),
        train_dataset=table,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        peft_config=peft_config,
    )
