"""Reverse KL divergence of a student from its teacher, from sequences that the student sampled."""

import datasets
import evaluate

from trl_lopd.evaluation.metrics import estimate_reverse_kl, flatten

_DESCRIPTION = """Reverse KL divergence of a student from its teacher, a sequence and a token, with standard errors:
Monte-Carlo means of log student - log teacher over sequences that the student sampled at temperature 1."""

_INPUTS = """
Args:
    predictions (list of lists of float): log-probabilities that the student gave the tokens it sampled, in nats, one
        list a sequence.
    references (list of lists of float): log-probabilities that the teacher gives the same tokens.
Returns:
    reverse_kl, reverse_kl_se: nats a sequence.
    reverse_kl_per_token, reverse_kl_per_token_se: nats a token.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ReverseKL(evaluate.Metric):
    def _info(self):
        logprobs = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": logprobs, "references": logprobs}),
        )

    def _compute(self, predictions, references):
        return flatten(estimate_reverse_kl(predictions, references))
