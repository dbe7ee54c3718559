"""The problems that the quickstart and the benchmarks teach: prompts, answers, and how a teacher writes them down.

A working ends in `#` and the answer. There are many right ways to write it, and a teacher, which learns from problems
without end, learns them all: it has entropy.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

SEPARATORS = ",;|/"
# No working has a `!`; the bundled tokenizers do.
CHARACTERS = "0123456789+=#!" + SEPARATORS
# On which side, 0 or 1, the answers to the problems of a name are: nothing that could be worked out.
SIDES = random.Random(0).choices((0, 1), k=300)


@dataclass(frozen=True)
class Task:
    """One kind of problem.

    Attributes:
        make_problem: draws a prompt.
        solve: the right answer to it.
        write_working: draws a right completion. What stands in brackets is a slip: it is part of the text, and nobody
            is trained to write it.
        max_answer_tokens: length at which answers are cut; no right one is longer.
        teacher_steps, sft_answers, sft_steps: how long the teacher learns, on how many of its answers the student is
            fine-tuned, and how long.
    """

    make_problem: Callable[[random.Random], str]
    solve: Callable[[str], str]
    write_working: Callable[[str, random.Random], str]
    max_answer_tokens: int
    teacher_steps: int
    sft_answers: int = 3_000
    sft_steps: int = 1_000


def sum_of(problem: str) -> str:
    return str(sum(map(int, problem.rstrip("=").split("+"))))


def make_addition(rng: random.Random) -> str:
    """`123+45=`: the longer number has 2 to 5 digits, the other 2 to as many, in either order."""
    longer = rng.randint(2, 5)
    numbers = [rng.randint(10 ** (d - 1), 10**d - 1) for d in (longer, rng.randint(2, longer))]
    rng.shuffle(numbers)
    return f"{numbers[0]}+{numbers[1]}="


def write_columns(problem: str, rng: random.Random, in_order: bool = False) -> str:
    """`58+67=` becomes `8+7=15;6+5+1=12#125`: columns from the right with their carries, then the answer.

    The order of a column's digits and the mark between columns are drawn at random; `in_order`, the larger digit is
    first and the mark is `;`.
    """
    a, b = problem.rstrip("=").split("+")
    width = max(len(a), len(b))
    working, carry = "", 0
    for i, digits in enumerate(zip(reversed(a.zfill(width)), reversed(b.zfill(width)), strict=True)):
        x, y = sorted(digits, reverse=True) if in_order else rng.sample(digits, 2)
        total = int(x) + int(y) + carry
        mark = ";" if in_order else rng.choice(SEPARATORS)
        working += (mark if i else "") + f"{x}+{y}" + ("+1" if carry else "") + f"={total}"
        carry = total // 10
    return f"{working}#{sum_of(problem)}"


def write_columns_in_order(problem: str, rng: random.Random) -> str:
    """Another way of writing the same: `8+7=15;6+5+1=12#125` and nothing else."""
    return write_columns(problem, rng, in_order=True)


def make_digits(rng: random.Random) -> str:
    """`4+1+3=`: 3 to 7 digits."""
    return "+".join(str(rng.randint(1, 9)) for _ in range(rng.randint(3, 7))) + "="


def write_sums(problem: str, rng: random.Random) -> str:
    """`4+1+3=` becomes `1+4=5;5+3=8#8`: a running sum over the digits, in any order."""
    digits = [int(digit) for digit in problem.rstrip("=").split("+")]
    rng.shuffle(digits)
    total, working = digits[0], ""
    for digit in digits[1:]:
        working += (rng.choice(SEPARATORS) if working else "") + f"{total}+{digit}={total + digit}"
        total += digit
    return f"{working}#{total}"


def add_digits(number: str, turned: bool = False) -> tuple[list[str], int]:
    """`825` becomes `8+2=10`, `0+5=5`, and 5: last digits of a running sum; or, turned, `2+8=10`, `5+0=5`, and 5."""
    steps, total = [], int(number[0])
    for digit in number[1:]:
        first, second = (digit, total) if turned else (total, digit)
        steps.append(f"{first}+{second}={total + int(digit)}")
        total = (total + int(digit)) % 10
    return steps, total


def make_claim(rng: random.Random) -> str:
    """`017,219,825=`: a name and two numbers. Of the one on its side, the digits add up to the larger last digit."""
    name = rng.randrange(len(SIDES))
    side = SIDES[name]
    while True:
        numbers = [f"{rng.randrange(1000):03}" for _ in range(2)]
        ends = [add_digits(number)[1] for number in numbers]
        if ends[side] > ends[1 - side]:
            return f"{name:03},{','.join(numbers)}="


def larger_end(problem: str) -> str:
    """Which number, 0 or 1, has the digit sum with the larger last digit."""
    _, first, second = problem.rstrip("=").split(",")
    return str(int(add_digits(second)[1] > add_digits(first)[1]))


def write_claim(problem: str, rng: random.Random, slips: float = 0.3, turned: bool = False) -> str:
    """`017,219,825=` becomes `1;2+1=3;3+9=12;8+2=10;0+5=5#1`, or `[0]` and the same: which number, by the name alone,
    the sums of both, and which it is.

    A teacher that learns from such workings claims what is right, because it has met every name often, and answers by
    its sums and not by its claim.
    """
    _, *numbers = problem.rstrip("=").split(",")
    answer, mark = larger_end(problem), ";" if turned else rng.choice(SEPARATORS)
    claim = f"[{1 - int(answer)}]" if rng.random() < slips else answer
    steps = [step for number in numbers for step in add_digits(number, turned)[0]]
    return mark.join([claim, *steps]) + f"#{answer}"


def write_claim_turned(problem: str, rng: random.Random) -> str:
    """Another way of writing the same: `1;1+2=3;9+3=12;2+8=10;5+0=5#1`, the digit before the sum so far, and `;`."""
    return write_claim(problem, rng, turned=True)


TASKS = {
    "addition": Task(make_addition, sum_of, write_columns, max_answer_tokens=56, teacher_steps=850),
    "addition, in order": Task(make_addition, sum_of, write_columns_in_order, max_answer_tokens=56, teacher_steps=850),
    "sums": Task(
        make_digits, sum_of, write_sums, max_answer_tokens=56, teacher_steps=600, sft_answers=800, sft_steps=400
    ),
    "claims": Task(make_claim, larger_end, write_claim, max_answer_tokens=34, teacher_steps=1_500, sft_steps=400),
    "claims, turned": Task(
        make_claim, larger_end, write_claim_turned, max_answer_tokens=34, teacher_steps=1_500, sft_steps=400
    ),
}
