"""Log-probabilities and gradients from the chunked head against the model's own full logits."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import VOCAB, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from trl_lopd import head
from trl_lopd.head import add_distillation_head, score_tokens
from trl_lopd.objective import reverse_kl_topk, teacher_support

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 5.0, "layer_types": ["full_attention", "full_attention"]},
    "granite": {"logits_scaling": 3.0},
}


def build(architecture):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **SMALL, **ARCHITECTURES[architecture]), attn_implementation="eager"
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (3, 9), generator=g)
    attention_mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    labels = ids.masked_fill(attention_mask == 0, -100)
    labels[:, :2] = -100
    teacher = (2 * torch.randn(3, 8, VOCAB, generator=g)).log_softmax(-1)
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}, teacher


def supports(inputs, teacher, k):
    labels = inputs["labels"][:, 1:].clamp(min=0)
    top = teacher.topk(k, -1)
    sampled = teacher.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return teacher_support(top.indices, top.values, labels, sampled)


def plain(model, inputs, ids):
    """The same quantities from the full logits."""
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].float()
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, ids), logprobs.scatter(-1, ids, -math.inf).logsumexp(-1), logprobs


@pytest.mark.parametrize("chunk", [2**25, 3 * VOCAB])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_support_head_equals_full_logits(monkeypatch, batch, architecture, chunk):
    monkeypatch.setattr(head, "_CHUNK_LOGITS", chunk)
    inputs, teacher = batch
    model = build(architecture)
    ids, teacher_logprobs, distinct = supports(inputs, teacher, 4)
    mask = inputs["labels"][:, 1:] != -100
    support, tail, full = plain(model, inputs, ids)
    expected = (reverse_kl_topk(support, tail, teacher_logprobs, distinct) * mask).sum()
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    add_distillation_head(model)
    out = model(**inputs, support_ids=ids, distinct=distinct)
    loss = (reverse_kl_topk(out.support_logprobs, out.tail_logprobs, teacher_logprobs, distinct) * mask).sum()
    loss.backward()
    assert torch.equal(out.label_mask, mask)
    torch.testing.assert_close(out.support_logprobs[mask], support[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.tail_logprobs[mask], tail[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropy[mask], -(full.exp() * full).sum(-1)[mask], atol=1e-5, rtol=1e-5)
    assert torch.equal(out.top1_ids[mask], full.argmax(-1)[mask])
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")

    # TRL's head, which is not its public API, gives the same per-token numbers under the names this library reads.
    fused = model(**inputs, fused_lm_head=True)
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(fused, name), getattr(out, name), atol=1e-5, rtol=1e-5)
    assert torch.equal(fused.is_top1.bool(), out.is_top1) and torch.equal(fused.label_mask, mask)


def test_tail_and_its_gradient_keep_their_precision_when_tiny():
    """A tail of e^-60 cannot be had as 1 - sum in float32."""
    weight = torch.eye(4)
    hidden = torch.tensor([[80.0, 79.0, 20.0, 19.0]], requires_grad=True)
    ids, distinct = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    logprobs, tail, *_ = head.SupportLogProbs.apply(hidden, weight, None, ids, distinct, head.LogitTransform())
    reference = hidden.detach().double().requires_grad_()
    expected = reference.log_softmax(-1)[:, 2:].logsumexp(-1)
    torch.testing.assert_close(tail.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(tail.sum(), hidden)[0].double(),
        torch.autograd.grad(expected.sum(), reference)[0],
        rtol=1e-5,
        atol=1e-7,
    )


def test_bias_and_repeated_ids():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(6, 8), torch.randn(VOCAB, 8), torch.randn(VOCAB)
    ids = torch.rand(6, VOCAB).argsort(-1)[:, :3]
    ids[:, 2] = ids[:, 0]
    distinct = torch.tensor([True, True, False]).expand(6, 3)
    params = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logprobs, tail, *_ = head.SupportLogProbs.apply(*params, ids, distinct, head.LogitTransform())
    plain_params = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    full = torch.nn.functional.linear(*plain_params).log_softmax(-1)
    g = torch.randn(6, 3)
    ours = torch.autograd.grad((logprobs * g).sum() + 0.7 * tail.sum(), params)
    plain_tail = full.scatter(-1, ids, -math.inf).logsumexp(-1)
    theirs = torch.autograd.grad((full.gather(-1, ids) * g).sum() + 0.7 * plain_tail.sum(), plain_params)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_no_tensor_of_tokens_by_vocabulary(batch):
    """The largest float tensor that forward and backward make is a chunk, not [tokens, vocabulary]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    Largest.elements = max(Largest.elements, x.numel())
            return out

    tokens, vocab = 64, 5000
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    ids, distinct = torch.randint(vocab, (tokens, 3)), torch.ones(tokens, 3, dtype=torch.bool)
    old, head._CHUNK_LOGITS = head._CHUNK_LOGITS, 8 * vocab
    try:
        with Largest():
            logprobs, tail, *_ = head.SupportLogProbs.apply(hidden, weight, None, ids, distinct, head.LogitTransform())
            (logprobs.sum() + tail.sum()).backward()
            score_tokens(hidden, weight, None, ids[:, 0], 2, head.LogitTransform())
    finally:
        head._CHUNK_LOGITS = old
    assert Largest.elements <= 8 * vocab < tokens * vocab


def test_bf16_autocast_keeps_losses_in_float32(batch):
    inputs, teacher = batch
    model = make_model()
    add_distillation_head(model)
    ids, teacher_logprobs, distinct = supports(inputs, teacher, 4)
    full = model(**inputs, support_ids=ids, distinct=distinct)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs, support_ids=ids, distinct=distinct)
        loss = reverse_kl_topk(out.support_logprobs, out.tail_logprobs, teacher_logprobs, distinct)[out.label_mask]
    loss.sum().backward()
    assert loss.dtype == torch.float32
    # bfloat16 keeps 8 bits: logits of a few units are good to a few hundredths.
    torch.testing.assert_close(out.log_probs, full.log_probs, atol=0.15, rtol=0.02)


def test_generation_is_unchanged():
    model = make_model()
    ids = torch.tensor([[2, 5, 6]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    add_distillation_head(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)


def test_router_logits_are_refused():
    model = make_model()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        add_distillation_head(model)
