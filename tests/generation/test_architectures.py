"""Every causal language model of transformers: what we say of its tokens is what its own logits say, or is refused."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


# One of each outcome, and what is used most.
@pytest.mark.parametrize(
    "model_type", ["llama", "gemma3_text", "qwen3_moe", "mamba", "bart", "bert", "roberta", "xlnet"]
)
@pytest.mark.filterwarnings("ignore")
def test_what_the_page_says_of_an_architecture(model_type):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    (outcome,) = [row[:3] for row in rows if len(row) == 4 and model_type in row[3].partition(": ")[2].split(", ")]
    assert architectures.attempt(model_type) == outcome


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_architecture_is_right_or_refused():
    # An outcome that is not of its own logits raises.
    table = architectures.table()
    assert table in PAGE.read_text(), f"docs/architectures.md is out of date; it should hold:\n{table}"
