"""A server's address in the place of a model."""

from __future__ import annotations

import pytest
from datasets import Dataset
from servers import stub_server
from tiny import make_model, make_rollouts

from trl_lopd import (
    ServerError,
    collect_rollouts,
    evaluate_model,
    fingerprint_teacher,
    generate_sft_data,
    score_rollouts,
)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_teacher_is_scored_at_its_address_whatever_serves_it(teacher_dir, kind):
    rows = make_rollouts(4)
    local = score_rollouts(rows, teacher_dir, top_k=2)
    with stub_server(kind, make_model(seed=1)) as server:
        served = score_rollouts(rows, server.url, top_k=2, fingerprint=fingerprint_teacher(teacher_dir))
    assert served["teacher_topk_ids"] == local["teacher_topk_ids"]
    for a, b in zip(served["teacher_logprobs"], local["teacher_logprobs"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert served["teacher_fingerprint"][0] == f"{local['teacher_fingerprint'][0]}#declared"


@pytest.mark.parametrize("collect, column", [(collect_rollouts, "student"), (generate_sft_data, "teacher")])
def test_a_model_that_samples_is_what_its_server_was_started_with(student_dir, collect, column):
    options = {"temperature": 1.0, "max_completion_length": 6, "truncated": "keep", "num_generations": 2}
    with stub_server("vllm", make_model(seed=2), roots={"served": str(student_dir)}) as server:
        by_address = collect(["w5 w6", "w7"], server.url, **options)
        by_engine = collect(["w5 w6", "w7"], student_dir, engine=server.url, **options)
        with pytest.raises(ValueError, match="samples itself: leave `engine` out"):
            collect(["w5"], server.url, engine="vllm")
    assert by_address.to_dict() == by_engine.to_dict()
    assert by_address[f"{column}_fingerprint"][0] == f"{fingerprint_teacher(student_dir).id}#declared"


def test_a_teacher_to_evaluate_against_is_named_by_its_server(student_dir, teacher_dir):
    problems = Dataset.from_dict({"prompt": ["w5", "w6"], "answer": ["1", "2"]})
    options = {"metric": "exact_answer", "max_completion_length": 4, "seed": 3}
    local = evaluate_model(student_dir, problems, teacher=teacher_dir, **options)
    with stub_server("vllm", make_model(seed=1), roots={"served": str(teacher_dir)}) as server:
        served = evaluate_model(student_dir, problems, teacher=server.url, **options)
    assert served["settings"]["teacher"] == f"{local['settings']['teacher']}#declared"
    assert served["metrics"]["reverse_kl"]["value"] == pytest.approx(local["metrics"]["reverse_kl"]["value"], abs=1e-4)


def test_where_nothing_answers_it_is_said_before_any_work(student_dir):
    with pytest.raises(ServerError, match="http://127.0.0.1:9: no answer.*Is the server up"):
        score_rollouts(make_rollouts(2), "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="`ref_model` is loaded here"):
        score_rollouts(make_rollouts(2), student_dir, ref_model="http://127.0.0.1:9")
    with (
        stub_server("vllm", make_model(seed=2), names=("base", "adapter")) as server,
        pytest.raises(ServerError, match=r"serves \['base', 'adapter'\]. Give the model by its directory"),
    ):
        collect_rollouts(["w5"], server.url)
