"""Metrics against what they stand for: enumeration, closed forms, and answers that are easily misread."""

from __future__ import annotations

import itertools
import json
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from tiny import make_model, make_tokenizer

import trl_lopd.evaluation.metrics
from trl_lopd import collect_rollouts, score_rollouts
from trl_lopd.evaluation.metrics import (
    check_math_answers,
    estimate_reverse_kl,
    flatten,
    grade_exact,
    grade_math,
    math_worker,
    pass_at_k,
    summarize_samples,
)

MODULES = Path(trl_lopd.evaluation.metrics.__file__).parent
VOCAB, LENGTH, EOS = 6, 4, 1

# ---- Reverse KL ----


@pytest.fixture(scope="module")
def pair():
    """A student and a teacher over six tokens, different enough for a divergence of about a nat a token."""
    return (make_model(seed=seed, vocab=VOCAB, scale=0.5) for seed in (3, 4))


@pytest.fixture(scope="module")
def enumerated(pair):
    """Every completion of one prompt up to four tokens: its log-probability by student and teacher, its length."""
    prompt, (student, teacher) = [2, 3], pair
    free = [token for token in range(VOCAB) if token != EOS]
    completions = [[*head, EOS] for n in range(LENGTH) for head in itertools.product(free, repeat=n)]
    completions += [list(tokens) for tokens in itertools.product(free, repeat=LENGTH)]
    ids = torch.tensor([[*prompt, *tokens, *[0] * (LENGTH - len(tokens))] for tokens in completions])
    scores = []
    for model in (student, teacher):
        with torch.no_grad():
            logprobs = model(ids).logits.double().log_softmax(-1)[:, len(prompt) - 1 : -1]
        scores.append(logprobs.gather(-1, ids[:, len(prompt) :, None]).squeeze(-1).numpy())
    return student, teacher, completions, *scores


def test_reverse_kl_agrees_with_enumeration(enumerated):
    student, teacher, completions, by_student, by_teacher = enumerated
    lengths = np.array([len(tokens) for tokens in completions])
    held = np.arange(LENGTH) < lengths[:, None]
    probability = np.exp((by_student * held).sum(1))
    assert probability.sum() == pytest.approx(1, abs=1e-6)  # nothing is missing; models compute in float32
    sums = ((by_student - by_teacher) * held).sum(1)
    exact = {"reverse_kl": probability @ sums, "reverse_kl_per_token": (probability @ sums) / (probability @ lengths)}
    assert exact["reverse_kl"] > 0.5

    # The real way: rollouts of the student, scored by the teacher.
    tokenizer = make_tokenizer(VOCAB)
    rollouts = collect_rollouts(
        ["<bos> w3"] * 2000,
        student,
        processing_class=tokenizer,
        temperature=1.0,
        max_completion_length=LENGTH,
        batch_size=2000,
        rows_per_shard=2000,
    )
    assert rollouts["prompt_ids"][0] == [2, 3]
    scored = score_rollouts(rollouts, teacher, processing_class=tokenizer, top_k=0)
    estimates = estimate_reverse_kl(scored["ref_logprobs"], scored["teacher_logprobs"])
    for name, value in exact.items():
        # One seed of a fixed test: four standard errors are exceeded by one in 16,000.
        assert abs(estimates[name]["value"] - value) < 4 * estimates[name]["se"]
        assert estimates[name]["se"] < 0.1 * value  # else the above would show little

    # The stated errors are the true ones: over many estimates, those divided by it have a standard deviation of 1.
    rng = np.random.default_rng(0)
    z = {name: [] for name in exact}
    for _ in range(200):
        drawn = rng.choice(len(completions), size=300, p=probability / probability.sum())
        ragged = [[row[i, : lengths[i]] for i in drawn] for row in (by_student, by_teacher)]
        for name, estimate in estimate_reverse_kl(*ragged).items():
            z[name].append((estimate["value"] - exact[name]) / estimate["se"])
    for values in z.values():
        # The standard deviation of 200 such values has a standard error of 0.05, their mean one of 0.071.
        assert abs(np.std(values) - 1) < 4 * 0.05 and abs(np.mean(values)) < 4 * 0.071


@pytest.mark.parametrize(
    "student, teacher, words",
    [
        ([[-1.0]], [[-1.0]], "two sequences or more; got 1"),
        ([[-1.0], [-1.0]], [[-1.0]], "of 2 sequences by the student and of 1 by the teacher"),
        ([[-1.0], [-1.0]], [[-1.0], [-1.0, -2.0]], "Sequence 1 has 1 log-probabilities by the student and 2"),
        ([[-1.0], []], [[-1.0], []], "Sequence 1 has 0"),
        ([[-1.0], [-1.0, -1.0]], [[-1.0], [-1.0, -math.inf]], "Sequence 1, token 1: the teacher's .* is -inf"),
        ([[math.nan], [-1.0]], [[-1.0], [-1.0]], "Sequence 0, token 0: the student's .* is nan"),
    ],
)
def test_what_reverse_kl_refuses(student, teacher, words):
    with pytest.raises(ValueError, match=words):
        estimate_reverse_kl(student, teacher)


# ---- Samples ----


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
                assert pass_at_k(n, right, k) == pytest.approx(np.mean([any(draw) for draw in draws]), abs=1e-12)
                closed = 1 - math.comb(n - right, k) / math.comb(n, k)
                assert pass_at_k(n, right, k) == pytest.approx(closed, abs=1e-12)
    # Where the binomials no longer fit a float.
    n, right, k = 4096, 3, 1024
    closed = 1 - math.comb(n - right, k) / math.comb(n, k)
    assert pass_at_k(n, right, k) == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize("n, right, k", [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_what_pass_at_k_refuses(n, right, k):
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(n, right, k)


def test_samples_are_summarized_by_problem():
    outcomes = [["right", "wrong", "none", "right"], ["failed", "none"], ["right", "right"]]
    cut = [[False, True, True, False], [False, True], [False, False]]
    tokens = [[1, 2, 3, 4], [10, 20], [5, 5]]
    found = summarize_samples("accuracy", outcomes, cut, tokens)
    assert {name: estimate["value"] for name, estimate in found.items()} == pytest.approx(
        {
            "accuracy": (2 / 4 + 0 + 1) / 3,
            "pass@2": (1 - 1 / 6 + 0 + 1) / 3,
            "no_answer_rate": (1 / 4 + 1 / 2 + 0) / 3,
            "truncation_rate": (1 / 2 + 1 / 2 + 0) / 3,
            "response_tokens": (2.5 + 15 + 5) / 3,
        }
    )
    for estimate in found.values():
        assert estimate["ci"][0] <= estimate["value"] <= estimate["ci"][1]
    assert list(summarize_samples("accuracy", [["right"] * 3] * 2, k=[1, 3])) == [
        "accuracy",
        "pass@3",
        "no_answer_rate",
    ]


def test_the_bootstrap_interval_is_that_of_the_binomial():
    rng = np.random.default_rng(1)
    outcomes = [["right" if right else "wrong"] for right in rng.random(400) < 0.7]
    first, again = (summarize_samples("accuracy", outcomes, seed=5)["accuracy"] for _ in range(2))
    assert first == again
    p = first["value"]
    half = 1.96 * math.sqrt(p * (1 - p) / 400)
    # Percentiles of 10,000 resamples move in the third digit, and steps are 1/400.
    assert first["ci"] == pytest.approx([p - half, p + half], abs=0.006)
    wide = summarize_samples("accuracy", outcomes, confidence=0.99)["accuracy"]["ci"]
    assert wide[0] < first["ci"][0] and first["ci"][1] < wide[1]


@pytest.mark.parametrize(
    "outcomes, options, words",
    [
        ([], {}, "at least one problem"),
        ([["right"], []], {}, "at least one sample"),
        ([["right"]], {"k": [2]}, r"samples a problem \(1\); got k=\[2\]"),
        ([["right"]], {"truncated": [[True, False]]}, "`truncated` takes one value a sample"),
    ],
)
def test_what_samples_cannot_be_summarized(outcomes, options, words):
    with pytest.raises(ValueError, match=words):
        summarize_samples("accuracy", outcomes, **options)


# ---- Answers ----


def test_exact_answers_follow_the_last_marker():
    completions = ["1#2#3", "3", "# 3 \n", "3#", "a #### 3"]
    assert grade_exact(completions, ["3"] * 5) == ["right", "none", "right", "wrong", "right"]
    assert grade_exact(["so #### 3", "so # 3"], ["3", "3"], "####") == ["right", "none"]
    with pytest.raises(ValueError, match="`answer_after` is empty"):
        grade_exact(["3"], ["3"], "")
    with pytest.raises(ValueError, match="1 completions and 2 answers"):
        grade_exact(["3"], ["3", "4"])


RIGHT, WRONG, NONE = "right", "wrong", "none"
TRICKY = [
    # Numbers, as they stand in GSM8K and AIME
    ("18", "She makes 18 dollars.", RIGHT),
    ("18", "The answer is $18.", RIGHT),
    ("18", r"\boxed{\$18}", RIGHT),
    ("18", "9 * 2 = $<<9*2=18>>18 every day.\n#### 18", RIGHT),
    ("18", "18 eggs, so the answer is 17.", WRONG),
    ("025", r"\boxed{25}", RIGHT),
    ("1,234", r"\boxed{1234}", RIGHT),
    ("1234", "It is 1,234.", RIGHT),
    ("-3", r"\boxed{3}", WRONG),
    # Fractions and decimals
    ("1/2", r"\boxed{\frac12}", RIGHT),
    (r"\frac{1}{2}", "The answer is 0.5", RIGHT),
    (r"\dfrac{2}{4}", "so $1/2$", RIGHT),
    (r"\frac{1}{2}", r"\boxed{2}", WRONG),
    (r"\frac{1}{3}", r"\boxed{0.333}", WRONG),
    (r"2\frac{1}{2}", r"\boxed{2.5}", RIGHT),
    # Units and percentages
    (r"5 \text{ cm}", r"\boxed{5}", RIGHT),
    ("5", r"\boxed{5\ \mathrm{cm}^2}", RIGHT),
    ("10", r"\boxed{10^{\circ}}", RIGHT),
    (r"50\%", r"\boxed{0.5}", RIGHT),
    ("50", r"\boxed{50\%}", RIGHT),
    # Intervals, points and sets
    ("[0,1)", r"\boxed{[0, 1)}", RIGHT),
    ("[0,1)", r"\boxed{(0, 1)}", WRONG),
    (r"(-\infty,3]", r"$(-\infty, 3]$", RIGHT),
    ("(1,2)", "The point is $(1, 2)$.", RIGHT),
    ("(1,2)", r"\boxed{(2, 1)}", WRONG),
    (r"\{1,2,3\}", r"\boxed{\{3, 2, 1\}}", RIGHT),
    (r"\{1,2,3\}", r"\boxed{1, 2, 3}", RIGHT),
    (r"\{1,2,3\}", r"\boxed{\{1, 2\}}", WRONG),
    # LaTeX
    ("$x^2+2x+1$", r"\boxed{(x+1)^2}", RIGHT),
    (r"\boxed{2\sqrt{2}}", r"\(\sqrt 8\)", RIGHT),
    (r"3\pi", r"\boxed{3}", WRONG),
    ("3", r"\boxed{x = 3}", RIGHT),
    (r"\text{Tuesday}", r"\boxed{\text{Tuesday}}", RIGHT),
    ("A", r"\boxed{B}", WRONG),
    # Several boxes: those close together are one set, otherwise the last
    ("1,2", r"\boxed{1} and \boxed{2}", RIGHT),
    ("2", r"At first \boxed{1}. But that forgets half of the cases. So the answer is \boxed{2}.", RIGHT),
    ("1", r"At first \boxed{1}. But that forgets half of the cases. So the answer is \boxed{2}.", WRONG),
    ("7", r"\boxed{7}. A check: 3 + 5 = 8.", RIGHT),
    ("3", r"<think>Is it \boxed{4}?</think> The answer is \boxed{3}.", RIGHT),
    # None
    ("7", "I do not know.", NONE),
    ("7", "", NONE),
    ("7", r"\boxed{}", NONE),
    ("3", r"so \boxed{3", NONE),
    # The order matters: an interval may answer for a relation, not the other way around
    ("1<x<2", r"\boxed{(1,2)}", RIGHT),
    ("(1,2)", r"\boxed{1<x<2}", WRONG),
]


def test_tricky_mathematical_answers():
    answers, completions, expected = zip(*TRICKY, strict=True)
    outcomes = grade_math(completions, answers)
    wrong = [case for case, outcome in zip(TRICKY, outcomes, strict=True) if outcome != case[2]]
    assert not wrong


def test_answers_that_never_end_are_given_up_in_any_thread():
    # The last ones show that a worker that was killed was replaced, and that it was not the first to answer.
    completions = [r"\boxed{10000000!}", r"\boxed{7}", r"\boxed{8}"]
    with ThreadPoolExecutor(1) as other:
        graded = other.submit(lambda: (threading.current_thread(), grade_math(completions, ["7"] * 3, hard_limit=1.5)))
        thread, outcomes = graded.result()
    assert thread is not threading.main_thread() and outcomes == ["failed", "right", "wrong"]


def test_math_verify_s_own_limit_is_told_from_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(math_worker, "SECONDS", 1)
    assert math_worker.grade("7", r"\boxed{9^{9^{9^9}}}") == "failed"


def test_references_without_an_answer_are_refused():
    with pytest.raises(ValueError, match="no answer in 2 of 4 references; the first is number 1, ''"):
        check_math_answers(["1", "", "2", ""])
    with pytest.raises(ValueError, match="no answer in 1 of 1"):
        grade_math(["3"], [r"\boxed{}"])


def test_a_missing_math_verify_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-lopd\[evaluate\]'"):
        grade_math(["3"], ["3"])


# ---- Modules of `evaluate` ----


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return lambda name: evaluate.load(str(MODULES / name), cache_dir=str(tmp_path_factory.mktemp("evaluate")))


def test_the_modules_give_what_the_functions_give(load):
    student, teacher = [[-0.1, -1.2], [-0.7]], [[-0.3, -1.0], [-1.9]]
    found = load("reverse_kl").compute(predictions=student, references=teacher)
    assert found == flatten(estimate_reverse_kl(student, teacher))
    assert found["reverse_kl"] == pytest.approx(0.6) and found["reverse_kl_per_token"] == pytest.approx(0.4)

    samples = [[r"\boxed{\frac12}", "I think 2"], [r"\boxed{18}", "18 dollars"]]
    cut = [[True, False], [False, False]]
    found = load("math_accuracy").compute(predictions=samples, references=["1/2", "18"], truncated=cut, k=[2])
    outcomes = [["right", "wrong"], ["right", "right"]]
    assert found == flatten(summarize_samples("math_accuracy", outcomes, cut, k=[2]))
    assert found["math_accuracy"] == 0.75 and found["truncation_rate"] == 0.25 and found["pass@2"] == 1

    found = load("exact_answer").compute(
        predictions=["a ## 1", "b 2"], references=["1", "2"], answer_after="##", num_tokens=[3, 5], seed=1
    )
    expected = summarize_samples("exact_answer", [["right"], ["none"]], num_tokens=[[3], [5]], seed=1)
    assert found == flatten(expected) and found["response_tokens"] == 4


@pytest.mark.parametrize("name", ["reverse_kl", "math_accuracy", "exact_answer"])
def test_the_modules_describe_themselves(load, name):
    module = load(name)
    assert module.description and "Returns" in module.inputs_description
    card = (MODULES / name / "README.md").read_text()
    (code,) = (block.split("```")[0] for block in card.split("```python\n")[1:])
    scope = {}
    exec(code.replace("path/to", str(MODULES)).replace("metric.compute", "found = metric.compute"), scope)
    # Its card names every result.
    for key in scope["found"]:
        assert key.removesuffix("_ci_low").removesuffix("_ci_high").split("@")[0] in card
    assert json.dumps(scope["found"])
