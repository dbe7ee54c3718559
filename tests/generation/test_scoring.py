"""Teacher scores against plain float32 log_softmax, one row at a time and without padding."""

from __future__ import annotations

import kills
import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, load_dataset
from servers import stub_server
from tiny import VOCAB, make_model, make_rollouts, make_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from trl_lopd import (
    SGLangServer,
    ShardError,
    TableError,
    VLLMServer,
    check_teacher_consistency,
    fingerprint_teacher,
    load_table,
    read_model_card,
    score_rollouts,
    validate_table,
)
from trl_lopd.identity.cards import record_of
from trl_lopd.identity.fingerprint import same_teacher


@pytest.fixture
def rollouts():
    return make_rollouts(12)


def plain_logprobs(model, row):
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].float().log_softmax(-1)
    start = len(row["prompt_ids"])
    return logprobs[start - 1 : -1]


@pytest.fixture(scope="module")
def models():
    return make_model(seed=1), make_model(seed=2)


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 16384])
def test_scores_equal_plain_log_softmax(models, tokenizer, max_batch_tokens):
    teacher, student = models
    rollouts = make_rollouts(20).add_column("answer", [str(i) for i in range(20)])
    table = score_rollouts(
        rollouts, teacher, processing_class=tokenizer, top_k=4, ref_model=student, max_batch_tokens=max_batch_tokens
    )
    assert table["answer"] == rollouts["answer"] and table["completion_ids"] == rollouts["completion_ids"]
    for row in table:
        expected = plain_logprobs(teacher, row)
        sampled = torch.tensor(row["completion_ids"]).unsqueeze(-1)
        np.testing.assert_allclose(row["teacher_logprobs"], expected.gather(-1, sampled).squeeze(-1), atol=1e-5)
        ref = plain_logprobs(student, row).gather(-1, sampled).squeeze(-1)
        np.testing.assert_allclose(row["ref_logprobs"], ref, atol=1e-5)
        top = expected.topk(4)
        assert row["teacher_topk_ids"] == top.indices.tolist()
        np.testing.assert_allclose(row["teacher_topk_logprobs"], top.values, atol=1e-5, rtol=2**-11)
    summary = validate_table(table, tokenizer, teacher.config)
    assert summary.top_k == 4
    assert same_teacher(next(iter(summary.teacher_fingerprints)), fingerprint_teacher(teacher, tokenizer).id)


def test_top_k_zero_stores_none(models, tokenizer):
    table = score_rollouts(make_rollouts(3), models[0], processing_class=tokenizer, top_k=0)
    assert set(table.column_names) == {"prompt_ids", "completion_ids", "teacher_logprobs", "teacher_fingerprint"}


def test_shuffled_rollouts_keep_their_order(models, tokenizer):
    rollouts = make_rollouts(10).shuffle(seed=0)
    table = score_rollouts(rollouts, models[0], processing_class=tokenizer)
    assert table["prompt_ids"] == rollouts["prompt_ids"]
    row = table[3]
    expected = plain_logprobs(models[0], row).gather(-1, torch.tensor(row["completion_ids"]).unsqueeze(-1))
    np.testing.assert_allclose(row["teacher_logprobs"], expected.squeeze(-1), atol=1e-5)


def test_a_path_gives_the_scores_and_the_fingerprint_of_the_module(teacher_dir, tokenizer):
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    a, b = (score_rollouts(make_rollouts(4), t, top_k=2) for t in (str(teacher_dir), teacher))
    assert a["teacher_logprobs"] == b["teacher_logprobs"]
    assert same_teacher(a["teacher_fingerprint"][0], b["teacher_fingerprint"][0])


def nan_model():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    return model


def bad(change):
    return change(make_rollouts(4).to_dict())


@pytest.mark.parametrize(
    ("rollouts", "model", "message"),
    [
        (lambda d: d.pop("completion_ids") and d, make_model, "Missing column `completion_ids`.*collect_rollouts"),
        (lambda d: d | {"teacher_logprobs": [[0.0]] * 4}, make_model, "'teacher_logprobs' already.*remove_columns"),
        (lambda d: {k: [] for k in d}, make_model, "no rollouts"),
        (
            lambda d: d | {"completion_ids": [[5], [5], [], [5]]},
            make_model,
            "Row 2, column `completion_ids`: 0 tokens",
        ),
        (lambda d: d | {"prompt_ids": [[5], [], [5], [5]]}, make_model, "Row 1, column `prompt_ids`: 0 tokens"),
        (
            lambda d: d | {"completion_ids": [[5], [VOCAB], [5], [5]]},
            make_model,
            rf"Row 1: token id {VOCAB} \(`completion_ids`, token 0\).*tokenizer",
        ),
        (
            lambda d: d | {"prompt_ids": [[5], [5], [-1, 5], [5]]},
            make_model,
            r"Row 2: token id -1 \(`prompt_ids`, token 0\)",
        ),
        (lambda d: d, nan_model, r"Row \d: the model answers with NaN"),
    ],
)
def test_bad_rollouts(rollouts, model, message):
    with pytest.raises(TableError, match=message):
        score_rollouts(Dataset.from_dict(bad(rollouts)), model(), processing_class=make_tokenizer())


def test_top_k_beyond_the_vocabulary(models, tokenizer):
    with pytest.raises(ValueError, match=f"`top_k={VOCAB + 1}`"):
        score_rollouts(make_rollouts(2), models[0], processing_class=tokenizer, top_k=VOCAB + 1)


@pytest.mark.parametrize("option", [{"top_k": -1}, {"max_batch_tokens": 0}])
def test_bad_options(models, tokenizer, option):
    with pytest.raises(ValueError, match=f"`{next(iter(option))}`"):
        score_rollouts(make_rollouts(2), models[0], processing_class=tokenizer, **option)


def test_an_adapter_scores_as_its_merged_model(models, tokenizer, student_dir, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(student_dir),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path)
    rollouts = make_rollouts(4)
    loaded, saved = (
        score_rollouts(rollouts, models[0], processing_class=tokenizer, top_k=0, ref_model=m)["ref_logprobs"]
        for m in (adapted, str(tmp_path))
    )
    plain = score_rollouts(rollouts, models[0], processing_class=tokenizer, top_k=0, ref_model=str(student_dir))
    merged = adapted.merge_and_unload()
    for row, a, b in zip(rollouts, loaded, saved, strict=True):
        sampled = torch.tensor(row["completion_ids"]).unsqueeze(-1)
        expected = plain_logprobs(merged, row).gather(-1, sampled).squeeze(-1)
        np.testing.assert_allclose(a, expected, atol=1e-5)
        np.testing.assert_allclose(b, expected, atol=1e-5)
    assert np.abs(np.concatenate(plain["ref_logprobs"]) - np.concatenate(loaded)).max() > 1e-3


def test_tokens_without_any_probability_are_counted_not_fatal(tokenizer, caplog):
    class Masked(torch.nn.Linear):
        def __init__(self, head):
            super().__init__(head.in_features, head.out_features)
            with torch.no_grad():
                self.weight.copy_(head.weight)
                self.bias.zero_()[5] = float("-inf")

    teacher = make_model(seed=1)
    teacher.lm_head = Masked(teacher.lm_head)
    rollouts = Dataset.from_dict({"prompt_ids": [[3]], "completion_ids": [[5, 6]]})
    fingerprint = fingerprint_teacher(make_model(seed=1), tokenizer)
    table = score_rollouts(rollouts, teacher, processing_class=tokenizer, top_k=2, fingerprint=fingerprint)
    assert table["teacher_logprobs"][0][0] == float("-inf")
    assert "1 teacher log-probabilities are -inf" in caplog.text


# ---- On disk ----


def test_the_table_on_disk_is_the_table_in_memory(tmp_path, teacher_dir, student_dir, rollouts):
    options = {"top_k": 3, "ref_model": str(student_dir), "rows_per_shard": 5}
    in_memory = score_rollouts(rollouts, str(teacher_dir), **options)
    on_disk = score_rollouts(rollouts, str(teacher_dir), output_dir=tmp_path / "table", **options)
    assert on_disk.features == in_memory.features and on_disk.to_dict() == in_memory.to_dict()
    loaded = load_dataset(str(tmp_path / "table"), split="train")
    assert loaded.features == in_memory.features and loaded.to_dict() == in_memory.to_dict()
    table = load_table(tmp_path / "table", split="train")
    verdict = check_teacher_consistency(read_model_card(student_dir), table)
    assert (verdict.evidence, verdict.rows) == ("verified", "intact")
    record = record_of(table)
    assert record["rows"] == len(rollouts) and record["teachers"][0]["probes"] and record == record_of(in_memory)


def test_a_finished_table_is_given_back_without_loading_a_model(tmp_path, teacher_dir, rollouts, monkeypatch):
    first = score_rollouts(rollouts, str(teacher_dir), output_dir=tmp_path / "table", top_k=2)
    monkeypatch.setattr("trl_lopd.generation.scoring.load_model", lambda *args: pytest.fail("a model was loaded"))
    again = score_rollouts(rollouts, str(teacher_dir), output_dir=tmp_path / "table", top_k=2)
    assert again.to_dict() == first.to_dict() and record_of(again) == record_of(first)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"top_k": 3}, r"top_k.*2 -> 3"),
        ({"ref_model": "student"}, r"ref_model.*-> .*student@1-"),
        ({"teacher": "student"}, r"teacher.*teacher@1-.* -> .*student@1-"),
        ({"rollouts": 1}, "rollouts"),
    ],
)
def test_a_run_that_is_not_the_same_is_refused(tmp_path, teacher_dir, student_dir, rollouts, change, words):
    score_rollouts(rollouts, str(teacher_dir), output_dir=tmp_path / "table", top_k=2)
    options = {"top_k": 2} | {k: str(student_dir) if v == "student" else v for k, v in change.items()}
    if options.pop("rollouts", None):
        rollouts = rollouts.shuffle(seed=1)
    with pytest.raises(ShardError, match=words):
        score_rollouts(rollouts, options.pop("teacher", str(teacher_dir)), output_dir=tmp_path / "table", **options)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_in_the_same_table(tmp_path, teacher_dir, student_dir):
    make_rollouts(80).save_to_disk(tmp_path / "rollouts")
    kills.check("score", 2, tmp_path, str(tmp_path / "rollouts"), str(teacher_dir), str(student_dir))


# ---- When memory runs out ----


def test_when_memory_runs_out_fewer_rows_are_scored_at_a_time(teacher_dir, rollouts, monkeypatch, caplog):
    expected = score_rollouts(rollouts, str(teacher_dir), top_k=2)
    real, sizes, memory = LlamaModel.forward, [], 42

    def forward(self, input_ids=None, **kwargs):
        sizes.append(input_ids.numel())
        if sizes[-1] > memory:
            raise torch.OutOfMemoryError
        return real(self, input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    table = score_rollouts(rollouts, str(teacher_dir), top_k=2, max_batch_tokens=160)
    assert max(sizes) > 42 and "Out of memory: from here on 40 tokens" in caplog.text
    for a, b in zip(table, expected, strict=True):
        np.testing.assert_allclose(a["teacher_logprobs"], b["teacher_logprobs"], atol=1e-5)
        assert a["teacher_topk_ids"] == b["teacher_topk_ids"]
    memory = 0
    with pytest.raises(torch.OutOfMemoryError):
        score_rollouts(rollouts, str(teacher_dir), top_k=2)


# ---- Served teachers ----


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_served_teacher_scores_as_the_local_one_and_counts_as_probed(
    tmp_path, teacher_dir, student_dir, rollouts, kind
):
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    local = score_rollouts(rollouts, str(teacher_dir), top_k=3)
    with stub_server(kind, model) as server:
        teacher = (VLLMServer if kind == "vllm" else SGLangServer)(server.url)
        with pytest.raises(ValueError, match="Nothing says which teacher"):
            score_rollouts(rollouts, teacher, top_k=3)
        table = score_rollouts(
            rollouts, teacher, top_k=3, teacher_card=record_of(local), output_dir=tmp_path / "table", rows_per_shard=5
        )
        declared = score_rollouts(rollouts, teacher, top_k=0, fingerprint=fingerprint_teacher(teacher_dir))
        both = {"teacher_card": record_of(local), "fingerprint": fingerprint_teacher(student_dir)}
        with pytest.raises(ValueError, match="answers the probes of teacher@.*`fingerprint` says that it is student@"):
            score_rollouts(rollouts, teacher, top_k=0, **both)
    for a, b in zip(table, local, strict=True):
        np.testing.assert_allclose(a["teacher_logprobs"], b["teacher_logprobs"], atol=1e-5)
        assert a["teacher_topk_ids"] == b["teacher_topk_ids"]
    card = read_model_card(student_dir)
    assert check_teacher_consistency(card, table).evidence == "probed"
    assert check_teacher_consistency(card, declared, teacher_consistency="declared_ok").evidence == "declared"


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("rows", [[(1, 1), (3, 9)], [(1, 2), (1, 1)]])
def test_a_served_teacher_is_tested_however_short_the_first_rows_are(models, tokenizer, kind, rows):
    rng = np.random.default_rng(0)
    ids = [[rng.integers(3, VOCAB, length).tolist() for length in row] for row in rows]
    rollouts = Dataset.from_dict({"prompt_ids": [p for p, _ in ids], "completion_ids": [c for _, c in ids]})
    fingerprint = fingerprint_teacher(models[0], tokenizer)
    local = score_rollouts(rollouts, models[0], processing_class=tokenizer, top_k=2)
    with stub_server(kind, models[0]) as server:
        teacher = {"vllm": VLLMServer, "sglang": SGLangServer}[kind](server.url)
        table = score_rollouts(rollouts, teacher, top_k=2, fingerprint=fingerprint)
    for served, expected in zip(table["teacher_logprobs"], local["teacher_logprobs"], strict=True):
        np.testing.assert_allclose(served, expected, atol=1e-4)


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 16384])
@pytest.mark.parametrize("architecture", ["Qwen3", "Llama", "Gemma2"])
def test_architectures(tokenizer, rollouts, architecture, max_batch_tokens):
    """Gemma 2 caps its logits and attends in sliding windows."""
    common = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        "initializer_range": 0.5,
    }  # fmt: skip
    special = {"final_logit_softcapping": 5.0, "sliding_window": 4} if architecture == "Gemma2" else {}
    config = getattr(transformers, f"{architecture}Config")(**common, **special)
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    table = score_rollouts(rollouts, model, processing_class=tokenizer, top_k=4, max_batch_tokens=max_batch_tokens)
    for row in table:
        plain = plain_logprobs(model, row)
        sampled = plain.gather(-1, torch.tensor(row["completion_ids"])[:, None])[:, 0]
        np.testing.assert_allclose(row["teacher_logprobs"], sampled, atol=1e-5)
        np.testing.assert_allclose(row["teacher_topk_logprobs"], plain.topk(4).values.half(), atol=2e-3, rtol=1e-3)
