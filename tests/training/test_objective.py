"""Losses against independent derivations: plain full-logits autograd, closed forms, averages by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from trl_lopd.training.objective import (
    TokenValues,
    advantage,
    divergence_topk,
    huber,
    mean_loss,
    reverse_kl_topk,
    sampled_loss,
    sequence_totals,
    summarize,
    teacher_support,
    token_weights,
)

BATCH, TIME, VOCAB = 3, 7, 11


@pytest.fixture
def case():
    """Ragged rows; teacher and student far enough apart that the advantage clip binds on some tokens."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(BATCH, TIME, VOCAB, generator=g)
    teacher = log_softmax(3 * torch.randn(BATCH, TIME, VOCAB, generator=g), -1)
    sampled = torch.randint(VOCAB, (BATCH, TIME), generator=g)
    mask = torch.arange(TIME) < torch.tensor([[7], [4], [1]])
    mask[0, 2] = False  # a hole, as tool output makes
    return logits, teacher, sampled, mask


def flat(values, mask):
    """The trained tokens of all rows, and which row each is of."""
    return values[mask], mask.nonzero()[:, 0]


def mean(values, mask, aggregation):
    values, sequences = flat(values, mask)
    num_items = BATCH if aggregation == "sequence_mean" else len(values)
    return values @ token_weights(sequences, BATCH, aggregation, num_items)


def at(logprobs, ids):
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def support_of(logits, teacher, sampled, k):
    """Student and teacher on the teacher's top-k, the sampled token and the tail, from full logits."""
    top = teacher.topk(k, -1)
    ids, teacher_logprobs, distinct = teacher_support(top.indices, top.values, sampled, at(teacher, sampled), VOCAB)
    student = log_softmax(logits, -1)
    tail = student.scatter(-1, ids, -math.inf).logsumexp(-1)
    return student.gather(-1, ids), tail, teacher_logprobs, distinct, ids


def coarsened_kl(student, teacher, ids):
    """Reverse KL of one state over the distinct support and the tail, written out in float64."""
    support = sorted(set(ids.tolist()))
    rest = [v for v in range(VOCAB) if v not in support]
    buckets = [[v] for v in support] + ([rest] if rest else [])
    p, t = student.double().exp(), teacher.double().exp()
    return sum(p[b].sum() * (p[b].sum().log() - t[b].sum().log()) for b in buckets)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("clip", [10.0, 1.5])
def test_sampled_gradient_is_the_paper_s_update(case, aggregation, clip):
    logits, teacher, sampled, mask = case
    teacher = at(teacher, sampled)
    assert ((teacher - at(log_softmax(logits, -1), sampled)).abs() > clip).any() == (clip < 10)

    def gradient(per_token):
        x = logits.clone().requires_grad_()
        loss = mean(per_token(at(log_softmax(x, -1), sampled)), mask, aggregation)
        return torch.autograd.grad(loss, x)[0]

    ours = gradient(lambda lp: sampled_loss(lp, teacher, advantage_clip=clip))
    surrogate = gradient(lambda lp: -(teacher - lp.detach()).clamp(-clip, clip) * lp)

    def huber_by_hand(lp):
        r = (teacher - lp).abs()
        return torch.where(r <= clip, r**2 / 2, clip * r - clip**2 / 2)

    torch.testing.assert_close(ours, surrogate, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours, gradient(huber_by_hand), atol=1e-6, rtol=1e-5)
    # METHOD: -A * (1[v = a] - p_v)
    a = advantage(at(log_softmax(logits, -1), sampled), teacher, clip)
    one_hot = torch.nn.functional.one_hot(sampled, VOCAB)
    weight = mask / (mask.sum(-1, keepdim=True) * BATCH if aggregation == "sequence_mean" else mask.sum())
    closed = -(a * weight).unsqueeze(-1) * (one_hot - logits.softmax(-1))
    torch.testing.assert_close(ours, closed, atol=1e-6, rtol=1e-5)


def test_trust_region_stops_tokens_that_left_it():
    ref = torch.tensor([[-1.0, -1.0, -1.0, -1.0]])
    teacher = torch.tensor([[0.0, 0.0, -5.0, -5.0]])
    # ratio 1.35 upwards (clipped), 1.1 upwards, 0.7 downwards (clipped), 1.35 downwards (pulls back: not clipped)
    logprobs = torch.tensor([[-0.7, -0.9, -1.35, -0.7]], requires_grad=True)
    loss = sampled_loss(logprobs, teacher, ref_logprobs=ref, ratio_clip=0.2)
    torch.testing.assert_close(loss.detach(), huber(logprobs.detach(), teacher))
    (grad,) = torch.autograd.grad(loss.sum(), logprobs)
    ratio, a = (logprobs - ref).exp().detach(), advantage(logprobs, teacher)
    expected = -ratio * a * torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    torch.testing.assert_close(grad, expected)
    with pytest.raises(ValueError, match="ref_logprobs"):
        sampled_loss(logprobs, teacher, ratio_clip=0.2)


def test_a_weight_beyond_float32_gives_no_nan():
    logprobs = torch.tensor([[-0.1]], requires_grad=True)
    loss = sampled_loss(logprobs, torch.tensor([[-0.05]]), ref_logprobs=torch.tensor([[-95.0]]), ratio_clip=0.2)
    assert torch.isfinite(torch.autograd.grad(loss.sum(), logprobs)[0]).all()


@pytest.mark.parametrize("k", [1, 4, VOCAB - 1, VOCAB])
def test_topk_is_the_coarsened_reverse_kl(case, k):
    logits, teacher, sampled, _ = case
    student, tail, teacher_logprobs, distinct, ids = support_of(logits, teacher, sampled, k)
    ours = reverse_kl_topk(student, tail, teacher_logprobs, distinct)
    full = log_softmax(logits, -1)
    expected = torch.stack(
        [coarsened_kl(*states) for states in zip(*(x.flatten(0, 1) for x in (full, teacher, ids)), strict=True)]
    )
    # The teacher's tail is 1 - sum of float32 numbers, good to about 1e-6 of the whole, not of itself.
    teacher_tail = teacher.double().scatter(-1, ids, -math.inf).exp().sum(-1)
    slack = 1e-5 + torch.where(tail == -math.inf, 0.0, tail.exp() * 1e-6 / teacher_tail)
    assert ((ours - expected.view(BATCH, TIME)).abs() <= slack).all()
    whole = (full.exp() * (full - teacher)).sum(-1)
    assert (ours <= whole + slack).all()
    if k == VOCAB:
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


def coarsened_divergence(student, teacher, ids, beta):
    """The generalised JSD of one state over the distinct support and the tail, written out, in float64."""
    support = sorted(set(ids.tolist()))
    rest = [v for v in range(VOCAB) if v not in support]
    buckets = [[v] for v in support] + ([rest] if rest else [])
    p, q = (torch.stack([x[bucket].sum() for bucket in buckets]) for x in (student.exp(), teacher.exp()))
    if beta in (0, 1):
        return (q * (q / p).log()).sum() if beta == 0 else (p * (p / q).log()).sum()
    mixture = beta * q + (1 - beta) * p
    return beta * (q * (q / mixture).log()).sum() + (1 - beta) * (p * (p / mixture).log()).sum()


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("k", [1, 4, VOCAB])
def test_divergence_and_gradient_are_those_of_full_logits(case, k, beta):
    logits, teacher, sampled, _ = case
    x = logits.clone().requires_grad_()
    ours = divergence_topk(*(support := support_of(x, teacher, sampled, k))[:4], beta)
    (grad,) = torch.autograd.grad(ours.sum(), x)
    y = logits.double().requires_grad_()
    states = (z.flatten(0, 1) for z in (log_softmax(y, -1), teacher.double(), support[4]))
    expected = torch.stack([coarsened_divergence(*state, beta) for state in zip(*states, strict=True)])
    (expected_grad,) = torch.autograd.grad(expected.sum(), y)
    # The teacher's tail is 1 - sum of float32 numbers: 1e-7 of the whole, of which it may be a thousandth.
    torch.testing.assert_close(ours.double().flatten(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grad.double(), expected_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_divergence_over_the_vocabulary_is_trl_s(case, beta):
    """Identity matrices as heads make hidden states of logits."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    logits, teacher, sampled, _ = case
    x, eye = logits.flatten(0, 1).clone().requires_grad_(), torch.eye(VOCAB)
    theirs, _ = ChunkedDivergenceFunction.apply(x, eye, None, teacher.flatten(0, 1), eye, None, beta)
    (their_grad,) = torch.autograd.grad(theirs.sum(), x)
    ours = divergence_topk(*support_of(x, teacher.flatten(0, 1), sampled.flatten(), VOCAB)[:4], beta)
    (grad,) = torch.autograd.grad(ours.sum(), x)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(grad, their_grad, atol=2e-6, rtol=1e-5)


def test_small_and_large_beta_approach_the_divergences_at_the_ends(case):
    """Near its ends the generalised JSD vanishes as beta or 1 - beta does: divided by it, it is one of the two."""
    logits, teacher, sampled, _ = case
    student, tail, teacher, distinct, _ = support_of(logits.double(), teacher, sampled, 4)
    support = (student, tail, teacher.double(), distinct)
    for beta, end, share in ((1e-8, 0.0, 1e-8), (1 - 1e-8, 1.0, 1e-8)):
        torch.testing.assert_close(
            divergence_topk(*support, beta) / share, divergence_topk(*support, end), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    ("student_tail", "teacher_covered"),
    [(-math.inf, 0.0), (-math.inf, -0.5), (-1e-6, -30.0), (-60.0, 0.0), (-3.0, 0.0), (-60.0, -1e-3), (-1e-6, -1e-6)],
)
def test_divergence_is_finite_where_the_tail_is_empty_or_everything(student_tail, teacher_covered, beta):
    tail = torch.tensor([student_tail], requires_grad=True)
    covered = math.log(-math.expm1(student_tail)) if student_tail < 0 else -math.inf
    support = torch.tensor([[covered, -50.0]], requires_grad=True)
    teacher = torch.tensor([[teacher_covered, -50.0]])
    loss = divergence_topk(support, tail, teacher, torch.ones(1, 2, dtype=torch.bool), beta)
    grads = torch.autograd.grad(loss.sum(), (support, tail))
    assert torch.isfinite(loss).all() and all(torch.isfinite(g).all() for g in grads)
    assert loss.item() >= -1e-6 or student_tail == -math.inf


@pytest.mark.parametrize("k", [1, 4, VOCAB])
def test_topk_gradient_is_the_closed_form(case, k):
    """METHOD section 2: the gradient with respect to logit z_v is p_v * (a_b(v) - L)."""
    logits, teacher, sampled, _ = case
    x = logits.clone().requires_grad_()
    student, tail, teacher_logprobs, distinct, ids = support_of(x, teacher, sampled, k)
    loss = reverse_kl_topk(student, tail, teacher_logprobs, distinct)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    p = logits.softmax(-1)
    a_tail = tail - torch.log1p(-teacher_logprobs.exp().masked_fill(~distinct, 0).sum(-1))
    a = a_tail.unsqueeze(-1).expand_as(p).scatter(-1, ids, student - teacher_logprobs).detach()
    a = torch.where(p.new_ones(p.shape).scatter(-1, ids, 0.0).bool() & (k == VOCAB), 0.0, a)
    torch.testing.assert_close(grad, p * (a - loss.detach().unsqueeze(-1)), atol=1e-5, rtol=1e-4)


def test_topk_stays_a_divergence_when_float16_makes_the_teacher_exceed_one(case):
    logits, teacher, sampled, _ = case
    student, tail, teacher_logprobs, distinct, _ = support_of(logits, teacher, sampled, VOCAB - 1)
    for shift in (1e-3, -1e-3):
        assert (reverse_kl_topk(student, tail, teacher_logprobs + shift, distinct) >= 0).all()


def test_a_sampled_token_among_the_topk_counts_once():
    ids, logprobs, distinct = teacher_support(
        torch.tensor([[[5, 3], [5, 3]]]),
        torch.tensor([[[-0.1, -3.0], [-0.1, -3.0]]]),
        torch.tensor([[3, 7]]),
        torch.tensor([[-3.0, -9.0]]),
        vocab_size=8,
    )
    assert ids.tolist() == [[[5, 3, 3], [5, 3, 7]]]
    assert distinct.tolist() == [[[True, True, False], [True, True, True]]]
    assert logprobs.dtype == torch.float32


def test_teacher_tokens_that_the_student_lacks_are_part_of_the_tail(case):
    logits, _, sampled, mask = case
    g = torch.Generator().manual_seed(1)
    teacher = log_softmax(3 * torch.randn(BATCH, TIME, VOCAB + 3, generator=g), -1)
    top = teacher.topk(5, -1)
    assert (top.indices >= VOCAB).any() and (top.indices[..., 0] >= VOCAB).any()
    ids, teacher_logprobs, distinct = teacher_support(
        top.indices, top.values, sampled, at(teacher, sampled), vocab_size=VOCAB
    )
    student = log_softmax(logits, -1)
    tail = student.scatter(-1, ids, -math.inf).logsumexp(-1)
    kl = reverse_kl_topk(student.gather(-1, ids), tail, teacher_logprobs, distinct)
    for b, t in mask.nonzero().tolist():
        support = sorted({*top.indices[b, t].tolist(), int(sampled[b, t])} & set(range(VOCAB)))
        p, q = student[b, t].double().exp(), teacher[b, t].double().exp()
        p = torch.cat([p[support], 1 - p[support].sum().reshape(1)])
        q = torch.cat([q[support], 1 - q[support].sum().reshape(1)])
        torch.testing.assert_close(kl[b, t].double(), (p * (p / q).log()).sum(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_shares_of_micro_batches_add_up_to_the_whole(case, aggregation):
    _, _, _, mask = case
    values = torch.randn(BATCH, TIME)
    rows = [[values[b, t].item() for t in range(TIME) if mask[b, t]] for b in range(BATCH)]
    expected = np.mean([np.mean(r) for r in rows]) if aggregation == "sequence_mean" else np.mean(sum(rows, []))
    torch.testing.assert_close(mean(values, mask, aggregation), torch.tensor(expected, dtype=torch.float32))
    n = BATCH if aggregation == "sequence_mean" else int(mask.sum())
    parts = 0.0
    for b in range(BATCH):
        row, sequences = flat(values[b : b + 1], mask[b : b + 1])
        parts += row @ token_weights(sequences, 1, aggregation, n)
    torch.testing.assert_close(parts, mean(values, mask, aggregation))


def test_metrics_are_token_weighted_means_of_their_definitions(case):
    logits, teacher, sampled, mask = case
    logprobs, teacher = at(log_softmax(logits, -1), sampled), at(teacher, sampled)
    ref = logprobs - 0.3 * torch.randn(BATCH, TIME, generator=torch.Generator().manual_seed(1))
    entropy, kl = torch.rand(BATCH, TIME), torch.rand(BATCH, TIME)
    top1, agree = torch.rand(BATCH, TIME) > 0.5, torch.rand(BATCH, TIME) > 0.5
    per_token = sampled_loss(logprobs, teacher, advantage_clip=3.0)
    start, totals = 0, []
    for part, count in zip((mask[:1], mask[1:]), (1, BATCH - 1), strict=True):
        rows, sequences = slice(start, start + count), flat(part, part)[1]
        start += count
        logprobs_, teacher_, per_token_, entropy_, top1_, ref_, kl_, agree_ = (
            x[rows][part] for x in (logprobs, teacher, per_token, entropy, top1, ref, kl, agree)
        )
        totals.append(
            sequence_totals(
                TokenValues(
                    logprobs=logprobs_,
                    teacher_logprobs=teacher_,
                    per_token_loss=per_token_,
                    entropy=entropy_,
                    is_top1=top1_,
                    ref_logprobs=ref_,
                    reverse_kl=kl_,
                    top1_agreement=agree_,
                ),
                sequences,
                count,
                advantage_clip=3.0,
            )
        )
    totals = [
        {name: (values.amax(0) if name.endswith("max") else values.sum(0)) for name, values in t.items()}
        for t in totals
    ]
    combined = {name: (max if name.endswith("max") else sum)(t[name].numpy() for t in totals) for name in totals[0]}
    metrics = summarize(combined)

    def kept(x):
        return x[mask].double().numpy()

    r, w = kept(teacher - logprobs), kept((logprobs - ref).exp())
    a = np.clip(r, -3, 3)
    expected = {
        "huber": kept(per_token).mean(),
        "advantage/mean": a.mean(),
        "advantage/std": a.std(),
        "advantage/clip_fraction": (np.abs(r) > 3).mean(),
        "frozen_log_ratio": -r.mean(),
        "k3": (np.exp(r) - 1 - r).mean(),
        "entropy": kept(entropy).mean(),
        "mean_token_accuracy": kept(top1).mean(),
        "reverse_kl_topk": kept(kl).mean(),
        "top1_agreement": kept(agree).mean(),
        "importance_weight/mean": w.mean(),
        "importance_weight/std": w.std(),
        "importance_weight/max": w.max(),
        "importance_weight/ess": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "reverse_kl_weighted": (-w * r).mean(),
    }
    # Half the distance of two points of the grid.
    quantiles = {f"importance_weight/p{q:02}": np.quantile(w, q / 100, method="inverted_cdf") for q in (1, 50, 99)}
    assert {name: metrics.pop(name) for name in quantiles} == pytest.approx(quantiles, rel=math.expm1(0.0101))
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert 0 < expected["advantage/clip_fraction"] < 1
    for aggregation in ("sequence_mean", "token_mean"):
        assert mean_loss(combined, aggregation) == pytest.approx(mean(per_token, mask, aggregation).item())
