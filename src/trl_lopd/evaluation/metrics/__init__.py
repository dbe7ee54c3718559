"""What a student is worth: right answers, and its reverse KL divergence from its teacher.

The functions need no `evaluate`; the folders beside them are its modules, `evaluate.load(".../metrics/reverse_kl")`.
"""

from .answers import check_math_answers, grade_exact, grade_math
from .estimates import estimate_reverse_kl, flatten, pass_at_k, summarize_completions, summarize_samples

__all__ = [
    "check_math_answers",
    "estimate_reverse_kl",
    "flatten",
    "grade_exact",
    "grade_math",
    "pass_at_k",
    "summarize_completions",
    "summarize_samples",
]
