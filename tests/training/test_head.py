"""Loss and gradients of the chunked head against the model's own full logits."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import VOCAB, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from trl_lopd import logits
from trl_lopd.logits import score_tokens
from trl_lopd.training import head
from trl_lopd.training.head import Targets, add_distillation_head
from trl_lopd.training.objective import divergence_topk, sampled_loss, teacher_support

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
    """Ragged sequences; the trained tokens begin at the third and skip one, as tool output makes."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (3, 9), generator=g)
    attention_mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    trained = attention_mask.bool()
    trained[:, :2] = trained[0, 5] = False
    teacher = (2 * torch.randn(3, 9, VOCAB, generator=g)).log_softmax(-1)
    return {"input_ids": ids, "attention_mask": attention_mask}, trained, teacher


def make_targets(inputs, trained, teacher, k, loss_type="topk", beta=1.0):
    labels, teacher = inputs["input_ids"][trained], teacher[trained]
    top = teacher.topk(k, -1)
    sampled = teacher.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    ids, support, distinct = teacher_support(top.indices, top.values, labels, sampled, VOCAB)

    def loss(logprobs, tail, rows):
        if loss_type == "topk":
            return divergence_topk(logprobs, tail, support[rows], distinct[rows], beta)
        return sampled_loss(logprobs[:, -1], sampled[rows])

    weights = torch.linspace(0.5, 2, len(labels))
    return Targets(trained.flatten().nonzero()[:, 0] - 1, ids, distinct, weights, loss)


def plain(model, inputs, targets):
    """The same quantities from the full logits."""
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()
    full = logits.flatten(0, 1)[targets.positions].log_softmax(-1)
    support, tail = full.gather(-1, targets.ids), full.scatter(-1, targets.ids, -math.inf).logsumexp(-1)
    per_token = targets.loss(support, tail, slice(None))
    return per_token @ targets.weights, per_token, support, tail, full


CASES = [(architecture, "topk", 4, 1.0) for architecture in ARCHITECTURES]
CASES += [("gemma2", "topk", 4, beta) for beta in (0.0, 0.1, 0.5, 0.9)]
CASES += [("cohere", "sampled", k, 1.0) for k in (4, 0)]


@pytest.mark.parametrize("chunk", [1000, 3])
@pytest.mark.parametrize(("architecture", "loss_type", "k", "beta"), CASES)
def test_loss_and_gradient_equal_those_of_full_logits(monkeypatch, batch, architecture, chunk, loss_type, k, beta):
    monkeypatch.setattr(logits, "CHUNK_LOGITS", dict.fromkeys(logits.CHUNK_LOGITS, chunk * VOCAB))
    inputs, trained, teacher = batch
    model = build(architecture)
    targets = make_targets(inputs, trained, teacher, k, loss_type, beta)
    expected, per_token, support, tail, full = plain(model, inputs, targets)
    (3 * expected).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    add_distillation_head(model)
    out = model(**inputs, targets=targets)
    (3 * out.loss).backward()
    torch.testing.assert_close(out.loss, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.per_token, per_token.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.support_logprobs, support.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.tail_logprobs, tail.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropy, -(full.exp() * full).sum(-1).detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(out.top1_ids, full.argmax(-1))
    for name, p in model.named_parameters():
        # Where terms cancel, float32 rounding (6e-8) is of the terms, not of the sum.
        atol = 2e-6 * grads[name].abs().max().item()
        torch.testing.assert_close(p.grad, grads[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")

    with torch.no_grad():
        again = model(**inputs, targets=targets)
    assert torch.equal(again.loss, out.loss) and again.loss.grad_fn is None


def test_a_second_backward_says_so(batch):
    inputs, trained, teacher = batch
    model = make_model()
    add_distillation_head(model)
    loss = model(**inputs, targets=make_targets(inputs, trained, teacher, 2)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()


def test_gradients_of_two_batches_add_up(batch):
    inputs, trained, teacher = batch
    model = make_model()
    add_distillation_head(model)
    targets = make_targets(inputs, trained, teacher, 2)
    for _ in range(2):
        model(**inputs, targets=targets).loss.backward()
    twice = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (2 * model(**inputs, targets=targets).loss).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, twice[name], atol=1e-6, rtol=1e-5)


def apply(hidden, weight, bias, ids, distinct, loss):
    targets = Targets(torch.arange(len(ids)), ids, distinct, torch.ones(len(ids)), loss)
    return head.TokenLoss.apply(hidden, weight, bias, targets, logits.LogitTransform(), True)


def test_tail_and_its_gradient_keep_their_precision_when_tiny():
    """A tail of e^-60 cannot be had as 1 - sum in float32."""
    weight = torch.eye(4)
    hidden = torch.tensor([[80.0, 79.0, 20.0, 19.0]], requires_grad=True)
    ids, distinct = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    loss, *_ = apply(hidden, weight, None, ids, distinct, lambda logprobs, tail, rows: tail)
    reference = hidden.detach().double().requires_grad_()
    expected = reference.log_softmax(-1)[:, 2:].logsumexp(-1).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, hidden)[0].double(),
        torch.autograd.grad(expected, reference)[0],
        rtol=1e-5,
        atol=1e-7,
    )


def test_bias_and_repeated_ids():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(6, 8), torch.randn(VOCAB, 8), torch.randn(VOCAB)
    ids = torch.rand(6, VOCAB).argsort(-1)[:, :3]
    ids[:, 2] = ids[:, 0]
    distinct = torch.tensor([True, True, False]).expand(6, 3)
    g = torch.randn(6, 3)

    def loss(logprobs, tail, rows):
        return (logprobs * g[rows]).sum(-1) + 0.7 * tail

    params = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    ours = torch.autograd.grad(apply(*params, ids, distinct, loss)[0], params)
    plain_params = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    full = torch.nn.functional.linear(*plain_params).log_softmax(-1)
    plain_tail = full.scatter(-1, ids, -math.inf).logsumexp(-1)
    theirs = torch.autograd.grad(loss(full.gather(-1, ids), plain_tail, slice(None)).sum(), plain_params)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_do_not_vanish(monkeypatch, dtype, chunk):
    """A token's share of a large batch times a small probability is below what float16 can hold; what a loss scaler
    multiplies must not have been lost before."""
    monkeypatch.setattr(logits, "CHUNK_LOGITS", dict.fromkeys(logits.CHUNK_LOGITS, chunk * VOCAB))
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 8), torch.randn(VOCAB, 8)
    ids, distinct = torch.arange(4).unsqueeze(-1), torch.ones(4, 1, dtype=torch.bool)

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        targets = Targets(torch.arange(4), ids, distinct, torch.full((4,), 1e-7), lambda lp, tail, rows: -lp[:, 0])
        loss = head.TokenLoss.apply(leaves[0], leaves[1], None, targets, logits.LogitTransform(), True)[0]
        return torch.autograd.grad(loss * 65536, leaves)

    for half, full in zip(gradients(dtype), gradients(torch.float32), strict=True):
        assert half.dtype == dtype
        # Logits of a few units in 8 or 11 bits.
        torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05 * full.abs().max().item())


def test_no_tensor_of_tokens_by_vocabulary(monkeypatch):
    """The largest tensor that forward and backward make is a chunk, not [tokens, vocabulary]."""
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
    monkeypatch.setattr(logits, "CHUNK_LOGITS", dict.fromkeys(logits.CHUNK_LOGITS, 8 * vocab))
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    ids, distinct = torch.randint(vocab, (tokens, 3)), torch.ones(tokens, 3, dtype=torch.bool)
    with Largest():
        apply(hidden, weight, None, ids, distinct, lambda logprobs, tail, rows: logprobs.sum(-1) + tail)[0].backward()
        score_tokens(hidden, weight, None, ids[:, 0], 2, logits.LogitTransform())
    assert Largest.elements <= 8 * vocab < tokens * vocab


def test_bf16_autocast_keeps_losses_in_float32(batch):
    inputs, trained, teacher = batch
    model = make_model()
    add_distillation_head(model)
    targets = make_targets(inputs, trained, teacher, 4)
    full = model(**inputs, targets=targets)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs, targets=targets)
    out.loss.backward()
    assert out.loss.dtype == out.per_token.dtype == torch.float32
    # bfloat16 keeps 8 bits: logits of a few units are good to a few hundredths.
    torch.testing.assert_close(out.support_logprobs, full.support_logprobs, atol=0.15, rtol=0.02)


def test_generation_is_unchanged():
    model = make_model()
    ids = torch.tensor([[2, 5, 6]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    add_distillation_head(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)
