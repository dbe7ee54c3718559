"""Accuracy of mathematical answers, through math-verify, with one or several samples a problem."""

import datasets
import evaluate

from trl_lopd.evaluation.metrics import grade_math, summarize_completions

_DESCRIPTION = """Share of mathematical answers that are right, compared by math-verify, with one or several samples a
problem: mean over samples, unbiased pass@k, truncation rate, mean response tokens; intervals by bootstrap over
problems."""

_INPUTS = r"""
Args:
    predictions (list of str, or list of lists of str): completions; a list a problem if it has several.
    references (list of str): answers, numbers or LaTeX, such as `18` or `\frac{1}{2}`.
    truncated (list of bool or list of lists of bool, optional): whether each completion was cut.
    num_tokens (list of int or list of lists of int, optional): length of each completion.
    k (list of int, optional): which pass@k; by default the powers of two up to the samples a problem.
    confidence, resamples, seed (optional): of the bootstrap; by default 0.95, 10000 and 0.
Returns:
    math_accuracy, pass@k, no_answer_rate, truncation_rate, response_tokens, each with `_ci_low` and `_ci_high`.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class MathAccuracy(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": datasets.Sequence(text), "references": text}),
            ],
        )

    def _compute(self, predictions, references, **options):
        return summarize_completions("math_accuracy", grade_math, predictions, references, **options)
