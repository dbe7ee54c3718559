"""Run as a script by `grade_math`: reads `[answer, completion]` as JSON, a line each, and prints an outcome each."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import time

from math_verify import parse, verify

SECONDS = 5
BYTES = 4 * 2**30

# What math-verify looks for mathematics in; a bare answer such as `\frac12` or `[0, 1)` has none of it.
_ANCHOR = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")


@functools.lru_cache(maxsize=64)
def reference(answer: str) -> list:
    return parse(answer if _ANCHOR.search(answer) else f"\\boxed{{{answer}}}", parsing_timeout=SECONDS)


def grade(answer: str, completion: str | None) -> str:
    gold = reference(answer)
    if completion is None:
        return "right" if gold else "none"
    start = time.monotonic()
    given = parse(completion, parsing_timeout=SECONDS)
    # The order matters: to `verify`, an interval may answer for a relation, not the other way around.
    right = bool(given) and verify(gold, given, timeout_seconds=SECONDS)
    if right:
        return "right"
    # math-verify only logs that its time was up.
    return "failed" if time.monotonic() - start >= SECONDS else "wrong" if given else "none"


if __name__ == "__main__":
    # Each warning would repeat the completion, and a whole number can have gigabytes of digits.
    logging.disable()
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        print(grade(*json.loads(line)), flush=True)
