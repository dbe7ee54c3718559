"""Every causal language model of transformers: what we say of its tokens is what its own logits say, or is refused."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


@pytest.mark.filterwarnings("ignore")
def test_every_architecture_is_right_or_refused():
    # An outcome that is not of its own logits raises.
    table = architectures.table()
    assert table in PAGE.read_text(), f"docs/architectures.md is out of date; it should hold:\n{table}"
