"""An error of the main process is the same error on every process, and is heard once."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
from errors_script import CASES

SCRIPT = Path(__file__).parent / "errors_script.py"

# The class, whether it is this library's, and how its message begins.
EXPECTED = {
    "missing_weights": ("FileNotFoundError", False, ""),
    "no_server": ("ServerError", True, "The self-test of http://127.0.0.1:9 fails."),
    "used_directory": ("ShardError", True, ""),
    "invalid_stream": ("TableError", True, "Row 0, column `teacher_logprobs`, token 0: 0.5"),
    "hub": ("HfHubHTTPError", False, "500 Server Error"),
    "undecodable": ("UnicodeDecodeError", False, "'utf-8' codec"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, student_dir):
    path = tmp_path_factory.mktemp("errors")
    (path / "student").symlink_to(student_dir)
    (path / "empty").mkdir()
    return path


@pytest.fixture(scope="module")
def caught(directory):
    done = ranks.launch(SCRIPT, directory, "catch", *CASES)
    assert done.returncode == 0, done.stderr[-5000:]
    lines = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 4]
    return {(case, int(rank)): rest for case, rank, *rest in lines}


@pytest.mark.parametrize("case", EXPECTED)
def test_every_process_raises_what_the_main_process_raises(caught, case):
    assert caught[case, 0] == caught[case, 1]
    name, is_ours, message = EXPECTED[case]
    kind, ours, text = caught[case, 1]
    assert (kind, ours) == (name, str(is_ours)) and text[1:].startswith(message)


def test_an_error_that_cannot_be_pickled_is_a_runtime_error_with_its_class_and_message_on_the_others(caught):
    assert caught["of_a_library", 0] == ["Unheard", "False", repr("'what'")]
    assert caught["of_a_library", 1] == ["RuntimeError", "False", repr("Unheard: 'what'")]


@pytest.mark.parametrize("case", ["no_server", "hub", "undecodable"])
def test_uncaught_it_is_printed_once_and_every_process_ends_with_1(directory, case):
    done = ranks.launch(SCRIPT, directory, "raise", case)
    assert done.returncode == 1
    kind, _, message = EXPECTED[case]
    assert done.stderr.count(f"{kind}: {message}") == 1, done.stderr[-5000:]
    assert "[rank0]: Traceback" in done.stderr and "[rank1]" not in done.stderr
