"""The table of several models on the same problems."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from trl_lopd import compare_models
from trl_lopd.evaluation import comparison

PROBLEMS = Dataset.from_list([{"prompt": f"w{i} w7", "answer": "w9"} for i in range(8, 12)])


@pytest.fixture
def evaluated(monkeypatch):
    """The calls of `evaluate_model`."""
    calls = []

    def evaluate_model(model, benchmark, **kwargs):
        kwargs["output_dir"].mkdir(parents=True)
        (kwargs["output_dir"] / "metrics.json").write_text(model)
        calls.append({"model": model, **kwargs})
        return {"metrics": {"exact_answer": {"value": 0.5}}}

    monkeypatch.setattr(comparison, "evaluate_model", evaluate_model)
    return calls


def test_each_model_has_a_directory_of_its_own(tmp_path, evaluated):
    """Labels that differ in signs alone, or have nothing else, would share one, or delete the others'."""
    labels = ["OPD (a)", "opd: a", "opd a 2", "***", "+++", "opd-a"]
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "notes").write_text("mine")
    compare_models({label: f"m{i}" for i, label in enumerate(labels)}, PROBLEMS, tmp_path)
    assert len({call["output_dir"] for call in evaluated}) == len(labels)
    assert sorted(path.read_text() for path in tmp_path.glob("evaluations/*/metrics.json")) == [
        f"m{i}" for i in range(len(labels))
    ]
    assert (tmp_path / "evaluations" / "notes").read_text() == "mine"
    assert [row["model"] for row in json.loads((tmp_path / "report.json").read_text())] == labels


def test_a_revision_is_that_of_its_model(tmp_path, evaluated):
    models = {"SFT student": "org/student", "trained": str(tmp_path)}
    compare_models(models, PROBLEMS, tmp_path, revisions={"SFT student": "v2"}, trust_remote_code=True)
    assert [(call["revision"], call["trust_remote_code"]) for call in evaluated] == [("v2", True), (None, True)]
    with pytest.raises(ValueError, match="`revisions` has 'student'"):
        compare_models(models, PROBLEMS, tmp_path, revisions={"student": "v2"})
