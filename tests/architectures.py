"""
A tiny model of every causal language model of the installed transformers, with random weights.

    python tests/architectures.py

prints docs/architectures.md: how each of them is sampled, scored and trained.
"""

from __future__ import annotations

import inspect
import logging
import warnings

import numpy as np
import torch
import transformers
from tiny import make_tokenizer
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trl_lopd.generation.samplers import Sampling, TransformersSampler
from trl_lopd.generation.teachers import LocalTeacher
from trl_lopd.training.experts import load_balancing
from trl_lopd.training.head import Targets, add_distillation_head, check_head

VOCAB = 96
POSITIONS = 64
# Models with more parameters than this, though made small, are not built.
MOST_PARAMETERS = 8e6

_SIZES = {
    VOCAB: ("vocab_size", "vocab_size_per_layer_input"),
    POSITIONS: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    32: ("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "embedding_dim", "attention_hidden_size"),
    48: (
        *("intermediate_size", "ffn_dim", "d_ff", "dff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"),
        *("feed_forward_size", "shared_intermediate_size"),
    ),
    24: ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size"),
    16: ("q_lora_rank", "kv_lora_rank", "sliding_window", "attention_window", "window_size"),
    8: (
        *("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size", "linear_key_head_dim"),
        *("linear_value_head_dim", "linear_head_dim", "index_head_dim", "mamba_d_state", "mamba_d_head"),
        *("mamba_n_heads", "hidden_size_per_layer_input", "lru_width_per_head", "attention_head_size"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
        *("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"),
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads"),
        *("linear_num_heads", "index_n_heads", "rotary_dim", "time_step_rank", "mamba_dt_rank", "laurel_rank"),
    ),
    2: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
        *("num_encoder_layers", "num_decoder_layers", "num_key_value_heads", "num_experts_per_tok"),
        *("num_experts_per_token", "moe_k", "linear_num_key_heads", "eos_token_id", "num_blocks"),
    ),
    1: (
        *("n_group", "topk_group", "num_expert_group", "n_shared_experts", "first_k_dense_replace", "bos_token_id"),
        *("decoder_start_token_id", "mamba_n_groups", "num_dense_layers"),
    ),
    0: ("pad_token_id",),
}
SIZES = {name: size for size, names in _SIZES.items() for name in names} | {"is_decoder": True}

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
# What the sizes above leave inconsistent, by model type. Where an option changes logits, it is set to do so.
OVERRIDES = {
    "bailing_hybrid": _HYBRID | {"mlp_layer_types": ["dense", "sparse"]},
    "bamba": {"attn_layer_indices": [1]},
    "bert-generation": {"position_embedding_type": "absolute"},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots3_note_text": {"rope_parameters": None, "layer_types": ["indexed_attention", "sliding_attention"]},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "gemma2": {"final_logit_softcapping": 4.0},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": None, "final_logit_softcapping": 4.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0},
    "granitemoehybrid": _HYBRID | {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 4.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _HYBRID | {"mlp_layer_types": ["dense", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "sliding_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mpt": {"logit_scale": 0.5},
    "recurrent_gemma": {"num_hidden_layers": 3, "logits_soft_cap": 4.0, "lru_width": 32},
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local", "local"]},
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp_text": _HYBRID,
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2, "output_logit_soft_cap": 4.0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attention_hidden_size": 64, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str):
    """A small config of a model type, its parts small too."""
    kind = CONFIG_MAPPING[model_type]
    sizes = _sizes(kind) | OVERRIDES.get(model_type, {})
    for name, part in kind.sub_configs.items():
        if part is AutoConfig:  # which kind it is, only a config says
            part = type(getattr(kind(), name))
        if part is not type(None):
            sizes[name] = _sizes(part) | OVERRIDES.get(part.model_type, {})
            if sizes[name] and part.model_type in CONFIG_MAPPING:
                sizes[name]["model_type"] = part.model_type
    return kind(**sizes)


def _sizes(kind) -> dict:
    known = set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    sizes = {name: size for name, size in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention: all heads have keys of their own
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    return sizes


def build(model_type: str) -> PreTrainedModel:
    """
    Raises:
        Exception: whatever the config or the model finds wrong with the sizes.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights: with fresh ones the softmax is near uniform, and mistakes hardly show."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        if getattr(head, "weight", None) is not None:
            head.weight.mul_(5)
    return model


def own_logprobs(model: PreTrainedModel, ids: np.ndarray, count: int) -> np.ndarray:
    """Of the last tokens of a row that the model reads alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, -count - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.from_numpy(ids[-count:, None]))[:, 0].numpy()


def _sampled(model: PreTrainedModel, warnings: list[str]) -> str:
    prompts = [[5, 6, 7], [8, 9], [4, 3, 17, 30, 12, 11, 10]]
    samples = TransformersSampler(model, make_tokenizer(VOCAB)).sample(prompts, Sampling(1.0, 1.0, 6, (2,), (), 0))
    for prompt, sample in zip(prompts, samples, strict=True):
        own = own_logprobs(model, np.array(prompt + sample.ids), len(sample.ids))
        np.testing.assert_allclose(sample.logprobs, own, atol=1e-3)
    return "prompts of one length together" if any("separate batches" in text for text in warnings) else "yes"


def _scored(model: PreTrainedModel, warnings: list[str]) -> str:
    rng = np.random.default_rng(1)
    shared = rng.integers(3, VOCAB, 12)
    rows = [(shared, 3), (shared, 9), (shared, 1), (rng.integers(3, VOCAB, 4), 20)]
    sequences = [np.concatenate([prompt, rng.integers(3, VOCAB, count)]) for prompt, count in rows]
    counts = [count for _, count in rows]
    for sequence, count, scores in zip(
        sequences, counts, LocalTeacher(model).score(sequences, counts, top_k=3), strict=True
    ):
        np.testing.assert_allclose(scores.logprobs, own_logprobs(model, sequence, count), atol=1e-3)
    if any("a row at a time" in text for text in warnings):
        return "a row at a time"
    return "from its own logits" if any("own logits" in text for text in warnings) else "yes"


def _trained(model: PreTrainedModel, warnings: list[str]) -> str:
    add_distillation_head(model)
    check_head(model, model.config, torch.device("cpu"))
    # The loss of two rows and its gradient, against full logits.
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    positions = torch.tensor([3, 4, 5, 6, 7, 12, 13])
    labels = ids.flatten()[positions + 1]
    shape = labels.unsqueeze(-1)
    targets = Targets(
        positions, shape, torch.ones_like(shape).bool(), torch.ones(7), lambda logprobs, tail, rows: -logprobs[:, 0]
    )

    # Mixtures of experts: with the load-balancing loss, where their layers have routers that have one.
    asked = {} if load_balancing(model) is None else {"output_router_logits": True}
    with torch.no_grad():
        if asked and model(input_ids=ids, attention_mask=mask, targets=targets, **asked).aux_loss is None:
            asked = {}

    def gradients_of(loss: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    try:
        plain = model(input_ids=ids, attention_mask=mask, **asked)
        logits = plain.logits.flatten(0, 1)[positions]
        own = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        own = own + plain.aux_loss if asked else own
        own_gradients = gradients_of(own)
    except (AssertionError, RuntimeError):
        return "yes; gradients not compared, as the plain model gives none in evaluation mode"
    found = model(input_ids=ids, attention_mask=mask, targets=targets, **asked)
    ours = found.loss + found.aux_loss if asked else found.loss
    gradients = gradients_of(ours)
    torch.testing.assert_close(ours, own, atol=1e-3, rtol=1e-5)
    assert len(gradients) == len(own_gradients)
    largest = max(gradient.abs().max().item() for gradient in own_gradients)
    for gradient, expected in zip(gradients, own_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-4 * largest, rtol=1e-3)
    return "yes"


class _Texts(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def attempt(model_type: str) -> list[str]:
    """
    How a model of this type is sampled, scored and trained, or why not; in few words.

    Raises:
        AssertionError: if one of them gives other log-probabilities, or gradients, than the model's own logits.
    """
    try:
        model = sharpen(build(model_type))
    except Exception as error:
        return [f"not built here: {type(error).__name__}"] * 3
    results = []
    for use in (_sampled, _scored, _trained):
        texts = _Texts()
        logging.getLogger("trl_lopd").addHandler(texts)
        try:
            results.append(use(model, texts.texts))
        except ValueError as error:
            reasons = ("not causal", "does not sample from its own", "cannot be trained here")
            results.append(next(f"refused: {reason}" for reason in reasons if reason in str(error)))
        finally:
            logging.getLogger("trl_lopd").removeHandler(texts)
    return results


def table() -> str:
    """docs/architectures.md's table: architectures with the same outcome in one row."""
    outcomes: dict[tuple[str, ...], list[str]] = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        outcomes.setdefault(tuple(attempt(model_type)), []).append(model_type)
    lines = ["| sampled | scored | trained | model types |", "|---|---|---|---|"]
    for outcome, model_types in sorted(outcomes.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {' | '.join(outcome)} | {len(model_types)}: {', '.join(model_types)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if sys.argv[1:]:
        for model_type in sys.argv[1:]:
            print(model_type, attempt(model_type))
    else:
        print(table())
