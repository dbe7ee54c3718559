"""The problems that the quickstart and the benchmarks teach: prompts, answers, and how a teacher writes them down.

A working ends in `#` and the answer. There are many right ways to write it, and a teacher, which learns from problems
without end, learns them all: it has entropy.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass

SEPARATORS = ",;|/"
CHARACTERS = "0123456789+=#!" + SEPARATORS


@dataclass(frozen=True)
class Task:
    """One kind of problem.

    Attributes:
        make_problem: draws a prompt.
        solve: the right answer to it.
        write_working: draws a right completion. What stands in brackets is a slip: it is part of the text, and nobody
            is trained to write it.
        max_answer_tokens: length at which answers are cut; no right one without slips is longer.
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


def make_chain(rng: random.Random) -> str:
    """`4+1+3+...=`: 4 to 9 digits."""
    return "+".join(str(rng.randint(1, 9)) for _ in range(rng.randint(4, 9))) + "="


def make_slip(total: int, digit: int, digits: list[int], rng: random.Random) -> str:
    """A wrong sum carried on, a wrong digit, or a wrong sum."""
    error = rng.choice([-10, -2, -1, 1, 2, 10])
    match rng.randrange(3):
        case 0:
            total = abs(total + error)
            return f"{total}+{digit}={total + digit}"
        case 1:
            digit = rng.choice(digits)
            return f"{total}+{digit}={total + digit}"
    return f"{total}+{digit}={abs(total + digit + error)}"


def write_chain(problem: str, rng: random.Random, slips: float = 0.15) -> str:
    """`4+7+3=` becomes `4+7=11;[11+3=15]!11+3=14#14`: a running sum from the left, and after a slip a `!` and the step
    again.

    A teacher that learns from such workings knows what to do after a slip and hardly makes any.
    """
    digits = [int(digit) for digit in problem.rstrip("=").split("+")]
    total, working = digits[0], ""
    for i, digit in enumerate(digits[1:]):
        step = f"{total}+{digit}={total + digit}"
        working += rng.choice(SEPARATORS) if i else ""
        while rng.random() < slips:
            slip = make_slip(total, digit, digits, rng)
            # What is right before the first wrong character is learnt.
            same = len(os.path.commonprefix([slip, step]))
            if same < len(slip):
                working += f"{slip[:same]}[{slip[same:]}]!"
        working += step
        total += digit
    return f"{working}#{total}"


def make_walk(rng: random.Random) -> str:
    """`7241/3865=`: from one number of four digits to another, no digit farther than 4 from its goal."""
    start = [rng.randint(0, 9) for _ in range(4)]
    while True:
        goal = [min(9, max(0, digit + rng.randint(-4, 4))) for digit in start]
        if goal != start:
            return f"{''.join(map(str, start))}/{''.join(map(str, goal))}="


def goal_of(problem: str) -> str:
    return problem.rstrip("=").partition("/")[2]


def write_walk(problem: str, rng: random.Random, slips: float = 0.1) -> str:
    """`1873/2875=` becomes `#2873#[27]73#2873#2874#2875`: one digit a step, one nearer to its goal, whichever first.

    After a slip, too, every step leads nearer: the answer is right if the walk ends at the goal.
    """
    state, goal = (list(map(int, part)) for part in problem.rstrip("=").split("/"))
    working = ""
    while True:
        away = [i for i, (digit, wanted) in enumerate(zip(state, goal, strict=True)) if digit != wanted]
        if len(working) < 100 and rng.random() < slips:
            i = rng.randrange(len(state))
            state[i] = rng.choice([digit for digit in range(10) if digit != state[i]])
            text = "".join(map(str, state))
            working += f"[#{text[: i + 1]}]{text[i + 1 :]}"
        elif away:
            i = rng.choice(away)
            state[i] += 1 if goal[i] > state[i] else -1
            working += "#" + "".join(map(str, state))
        else:
            return working


TASKS = {
    "addition": Task(make_addition, sum_of, write_columns, max_answer_tokens=56, teacher_steps=850),
    "addition, in order": Task(make_addition, sum_of, write_columns_in_order, max_answer_tokens=56, teacher_steps=850),
    "sums": Task(
        make_digits, sum_of, write_sums, max_answer_tokens=56, teacher_steps=600, sft_answers=800, sft_steps=400
    ),
    "chains": Task(make_chain, sum_of, write_chain, max_answer_tokens=96, teacher_steps=850),
    "walk": Task(make_walk, goal_of, write_walk, max_answer_tokens=140, teacher_steps=1_200),
}
