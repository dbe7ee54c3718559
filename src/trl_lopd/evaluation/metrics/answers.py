"""Whether a completion's answer is the reference's."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)


def grade_exact(completions: Sequence[str], answers: Sequence[str], answer_after: str = "#") -> list[str]:
    """
    Compares what follows the last marker in each completion with the reference, as text, spaces around it aside.

    Args:
        completions, answers (sequences of `str`): One of each.
        answer_after (`str`, *optional*, defaults to `"#"`): The marker.

    Returns:
        `list[str]`: Outcomes: `"right"`, `"wrong"`, or `"none"` where there is no marker.

    Raises:
        ValueError: If the lengths differ or the marker is empty.
    """
    _check_lengths(completions, answers)
    if not answer_after:
        raise ValueError("`answer_after` is empty: every completion would be all answer.")
    outcomes = []
    for completion, answer in zip(completions, answers, strict=True):
        _, marker, given = completion.rpartition(answer_after)
        outcomes.append("none" if not marker else "right" if given.strip() == answer.strip() else "wrong")
    return outcomes


def grade_math(completions: Sequence[str], answers: Sequence[str], hard_limit: float = 60.0) -> list[str]:
    r"""
    Compares each completion's answer with the reference as mathematics, through math-verify.

    The completion's answer is what math-verify extracts: the last `\boxed{}` (boxes close to each other count as one
    set), else other LaTeX, else a number. The reference is LaTeX, with or without `$` or `\boxed{}` around it.

    math-verify limits its time with SIGALRM, which exists in a process's main thread only and stops no computation in
    C. It therefore runs in a process of its own, which is killed and replaced at the hard limit: the function may be
    called in any thread, and leaves the caller's signals alone.

    Args:
        completions, answers (sequences of `str`): One of each.
        hard_limit (`float`, *optional*, defaults to 60): Seconds that one comparison may take; its parts have 5 each.

    Returns:
        `list[str]`: Outcomes: `"right"`, `"wrong"`, `"none"` where there is no answer to read, or `"failed"` where the
        comparison took too long or crashed.

    Raises:
        ImportError: If math-verify is not installed.
        ValueError: If the lengths differ, or an answer of the reference cannot be read.
    """
    _check_lengths(completions, answers)
    check_math_answers(answers)
    with _MathWorker(hard_limit) as worker:
        outcomes = [worker.grade(*pair) for pair in zip(answers, completions, strict=True)]
    if failed := outcomes.count("failed"):
        logger.warning(f"{failed} of {len(outcomes)} answers took too long to compare, and count as not right.")
    return outcomes


def check_math_answers(answers: Sequence[str]) -> None:
    """
    Raises:
        ImportError: If math-verify is not installed.
        ValueError: If math-verify reads no answer in a reference, naming the first.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("`math_accuracy` needs math-verify: `pip install 'trl-lopd[evaluate]'`.")
    distinct = dict.fromkeys(answers)
    with _MathWorker() as worker:
        unread = {answer for answer in distinct if worker.grade(answer) != "right"}
    if unread:
        first = next(i for i, answer in enumerate(answers) if answer in unread)
        raise ValueError(
            f"math-verify reads no answer in {sum(answer in unread for answer in answers)} of {len(answers)} "
            f"references; the first is number {first}, {answers[first]!r:.200}. Give numbers or LaTeX, or compare "
            "texts with `exact_answer`."
        )


class _MathWorker:
    """`math_worker.py` in a process of its own, asked line by line."""

    def __init__(self, hard_limit: float = 60.0):
        self.hard_limit = hard_limit

    def __enter__(self) -> _MathWorker:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("math_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        if self._process.stdout.readline().strip() != "ready":
            raise RuntimeError("math-verify did not start; what it printed above says why.")
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def grade(self, answer: str, completion: str | None = None) -> str:
        """The outcome of a completion; without one, whether the answer can be read."""
        timer = threading.Timer(self.hard_limit, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps([answer, completion]) + "\n")
            self._process.stdin.flush()
            outcome = self._process.stdout.readline().strip()
        finally:
            timer.cancel()
        if not outcome:
            self.__exit__()
            self.__enter__()
        return outcome or "failed"


def _check_lengths(completions: Sequence[str], answers: Sequence[str]) -> None:
    if len(completions) != len(answers):
        raise ValueError(f"There are {len(completions)} completions and {len(answers)} answers: give one of each.")
