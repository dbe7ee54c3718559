"""Estimates from samples, each with its uncertainty: `{name: {"value": ..., "ci": [low, high]}}`, or `"se"`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Estimates = dict[str, dict[str, Any]]


def estimate_reverse_kl(
    student_logprobs: Sequence[Sequence[float]], teacher_logprobs: Sequence[Sequence[float]]
) -> Estimates:
    """
    Reverse KL divergence of a student from its teacher, from sequences that the student sampled.

    With S the sum over a sequence's tokens of log student - log teacher, and T their number, the divergence a sequence
    is E[S] and the divergence a token E[S] / E[T]; sample means stand for the expectations. The first is unbiased, the
    second a ratio of means, whose standard error is that of S - ratio * T over the mean length. Of sequences cut at
    some length it is the divergence of the distributions cut there. The standard errors take sequences as independent:
    sample one a prompt.

    Args:
        student_logprobs, teacher_logprobs (sequences of `(completion,)` floats):
            Of the sampled tokens, in nats, at temperature 1 over the full vocabulary. The sequences must have been
            sampled from that very distribution: temperature 1, top-p 1.

    Returns:
        `dict`: `reverse_kl` (nats a sequence) and `reverse_kl_per_token` (nats a token), each `{"value", "se"}`.

    Raises:
        ValueError: If there are fewer than two sequences, the two differ in shape, a sequence is empty, or a
            log-probability is not finite.
    """
    if len(student_logprobs) != len(teacher_logprobs):
        raise ValueError(
            f"There are log-probabilities of {len(student_logprobs)} sequences by the student and of "
            f"{len(teacher_logprobs)} by the teacher: give both of the same sequences."
        )
    if len(student_logprobs) < 2:
        raise ValueError(f"A standard error takes two sequences or more; got {len(student_logprobs)}.")
    sums, lengths = np.zeros((2, len(student_logprobs)))
    for i, both in enumerate(zip(student_logprobs, teacher_logprobs, strict=True)):
        student, teacher = (np.asarray(logprobs, dtype=np.float64) for logprobs in both)
        if student.shape != teacher.shape or student.size == 0:
            raise ValueError(
                f"Sequence {i} has {student.size} log-probabilities by the student and {teacher.size} by the teacher: "
                "give one of each a token, and at least one token."
            )
        for who, logprobs in (("student", student), ("teacher", teacher)):
            if not np.isfinite(logprobs).all():
                token = int(np.flatnonzero(~np.isfinite(logprobs))[0])
                raise ValueError(
                    f"Sequence {i}, token {token}: the {who}'s log-probability is {logprobs[token]}, so there is no "
                    "finite divergence to estimate."
                )
        sums[i], lengths[i] = (student - teacher).sum(), student.size
    ratio = sums.sum() / lengths.sum()
    return {
        "reverse_kl": {"value": float(sums.mean()), "se": _standard_error(sums)},
        "reverse_kl_per_token": {
            "value": float(ratio),
            "se": _standard_error(sums - ratio * lengths) / float(lengths.mean()),
        },
    }


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def pass_at_k(n: int, right: int, k: int) -> float:
    """
    Probability that one of `k` samples is right, from `n` samples of which `right` are: 1 - C(n - right, k) / C(n, k),
    which is unbiased (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        ValueError: If not 0 <= right <= n and 1 <= k <= n.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass@k takes 0 <= right <= n and 1 <= k <= n; got right={right}, n={n}, k={k}.")
    return float(1 - np.prod(1 - k / np.arange(n - right + 1, n + 1)))


def summarize_samples(
    name: str,
    outcomes: Sequence[Sequence[str]],
    truncated: Sequence[Sequence[bool]] | None = None,
    num_tokens: Sequence[Sequence[int]] | None = None,
    *,
    k: Sequence[int] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimates:
    """
    What several samples a problem say: each figure is a mean over problems, of the mean over a problem's samples or
    its pass@k.

    Intervals are percentiles of the bootstrap over problems: what other problems of the kind would give. They say
    nothing where all problems agree: 30 of 30 wrong gives [0, 0].

    Args:
        name (`str`):
            What to call the share of right answers, which is pass@1.
        outcomes (sequence of sequences of `str`):
            One sequence a problem, one outcome a sample: see [`grade_math`]. All but `"right"` count as not right.
        truncated, num_tokens (sequences of the same shape, *optional*):
            Whether each sample was cut, and its length in tokens.
        k (sequence of `int`, *optional*):
            Which pass@k; by default the powers of two up to the fewest samples that a problem has. 1 is `name`.
        confidence, resamples, seed (*optional*, default to 0.95, 10,000 and 0):
            Of the bootstrap.

    Returns:
        `dict`: `name`, `pass@k`, `no_answer_rate`, and, if given, `truncation_rate` and `response_tokens`, each
        `{"value", "ci": [low, high]}`.

    Raises:
        ValueError: If there is no problem or one without samples, shapes differ, or a k, `resamples` or `confidence`
            is out of range.
    """
    sizes = [len(of_problem) for of_problem in outcomes]
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"`resamples` is 1 or more, `confidence` between 0 and 1; got {resamples} and {confidence}.")
    if not sizes or min(sizes) == 0:
        raise ValueError("Every problem has at least one sample, and there is at least one problem.")
    ks = [2**i for i in range(1, min(sizes).bit_length())] if k is None else [each for each in k if each != 1]
    if any(not 1 <= each <= min(sizes) for each in ks):
        raise ValueError(f"pass@k takes 1 <= k <= samples a problem ({min(sizes)}); got k={list(k)}.")
    right = [sum(outcome == "right" for outcome in of_problem) for of_problem in outcomes]
    columns = {name: np.divide(right, sizes)}
    for each in ks:
        columns[f"pass@{each}"] = [pass_at_k(n, of_problem, each) for n, of_problem in zip(sizes, right, strict=True)]
    columns["no_answer_rate"] = [of_problem.count("none") / len(of_problem) for of_problem in map(list, outcomes)]
    given = (("truncated", "truncation_rate", truncated), ("num_tokens", "response_tokens", num_tokens))
    for argument, column, values in given:
        if values is not None:
            if [len(of_problem) for of_problem in values] != sizes:
                raise ValueError(f"`{argument}` takes one value a sample, in the shape of the outcomes.")
            columns[column] = [float(np.mean(of_problem)) for of_problem in values]

    table = np.stack([np.asarray(values, dtype=np.float64) for values in columns.values()], axis=1)
    rng = np.random.default_rng(seed)
    # As many resamples at once as take a few megabytes.
    chunks = [len(part) for part in np.array_split(range(resamples), -(-resamples * len(table) // 2**18))]
    means = np.concatenate([table[rng.integers(len(table), size=(chunk, len(table)))].mean(1) for chunk in chunks])
    tail = (1 - confidence) / 2
    bounds = np.quantile(means, [tail, 1 - tail], axis=0)
    return {
        column: {"value": float(value), "ci": [float(low), float(high)]}
        for column, value, low, high in zip(columns, table.mean(0), *bounds, strict=True)
    }


def summarize_completions(
    name: str,
    grade: Callable[[list[str], list[str]], list[str]],
    predictions: Sequence[str] | Sequence[Sequence[str]],
    references: Sequence[str],
    truncated: Sequence | None = None,
    num_tokens: Sequence | None = None,
    **options: Any,
) -> dict[str, float]:
    """[`summarize_samples`] of completions, one a problem or a list of them, as modules of `evaluate` get and give it.

    Args:
        grade: From completions and as many answers to outcomes.
        predictions, truncated, num_tokens: One a problem, or a list a problem.
        references: The answers, one a problem.
        options: Of [`summarize_samples`].
    """

    def nested(values):
        if values is None or all(isinstance(of_problem, list | tuple) for of_problem in values):
            return values
        return [[value] for value in values]

    samples = nested(predictions)
    answers = [answer for answer, of_problem in zip(references, samples, strict=True) for _ in of_problem]
    outcomes = iter(grade([text for of_problem in samples for text in of_problem], answers))
    outcomes = [[next(outcomes) for _ in of_problem] for of_problem in samples]
    return flatten(summarize_samples(name, outcomes, nested(truncated), nested(num_tokens), **options))


def flatten(estimates: Estimates) -> dict[str, float]:
    """One number a key, as `evaluate` and the reporters of `Trainer` have it: `name`, `name_se`, `name_ci_low`, ..."""
    flat = {}
    for name, estimate in estimates.items():
        flat[name] = estimate["value"]
        if "se" in estimate:
            flat[f"{name}_se"] = estimate["se"]
        if "ci" in estimate:
            flat[f"{name}_ci_low"], flat[f"{name}_ci_high"] = estimate["ci"]
    return flat
