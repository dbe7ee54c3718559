"""Accuracy of answers that follow a marker, compared as text, with one or several samples a problem."""

import functools

import datasets
import evaluate

from trl_lopd.evaluation.metrics import grade_exact, summarize_completions

_DESCRIPTION = """Share of completions in which the text after the last marker is the answer, with one or several
samples a problem: mean over samples, unbiased pass@k, truncation rate, mean response tokens; intervals by bootstrap
over problems."""

_INPUTS = """
Args:
    predictions (list of str, or list of lists of str): completions; a list a problem if it has several.
    references (list of str): answers.
    answer_after (str, optional): the marker; by default `#`.
    truncated (list of bool or list of lists of bool, optional): whether each completion was cut.
    num_tokens (list of int or list of lists of int, optional): length of each completion.
    k (list of int, optional): which pass@k; by default the powers of two up to the samples a problem.
    confidence, resamples, seed (optional): of the bootstrap; by default 0.95, 10000 and 0.
Returns:
    exact_answer, pass@k, no_answer_rate, truncation_rate, response_tokens, each with `_ci_low` and `_ci_high`.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ExactAnswer(evaluate.Metric):
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

    def _compute(self, predictions, references, answer_after="#", **options):
        grade = functools.partial(grade_exact, answer_after=answer_after)
        return summarize_completions("exact_answer", grade, predictions, references, **options)
