"""Sampled ids: exactly what the model generates, ended where it ends."""

from __future__ import annotations

import json
import logging
import math
import sys

import kills
import numpy as np
import pytest
import torch
import vllm_stub
from datasets import Dataset, load_dataset
from servers import stub_server
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from trl_lopd import (
    ServerError,
    ShardError,
    VLLMServer,
    check_teacher_consistency,
    collect_rollouts,
    fingerprint_teacher,
    generate_sft_data,
    load_table,
    read_dataset_card,
    read_model_card,
    score_rollouts,
)
from trl_lopd.identity.cards import record_of

PROMPTS = ["w5 w6", "w7", "w8 w9 w10 w11", "w12 w13"]


@pytest.fixture(scope="module")
def student():
    return make_model(seed=2, scale=0.5)


def test_greedy_rollouts_equal_generation_one_by_one(student, tokenizer):
    rollouts = collect_rollouts(PROMPTS, student, processing_class=tokenizer, temperature=0, max_completion_length=12)
    assert rollouts["prompt"] == PROMPTS
    for row in rollouts:
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([row["prompt_ids"]])
        alone = student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert row["completion_ids"] == alone[0, ids.shape[1] :].tolist()


def test_end_of_sequence_is_kept_and_nothing_follows(student, tokenizer):
    rollouts = collect_rollouts(
        PROMPTS * 10, student, processing_class=tokenizer, temperature=2.0, max_completion_length=20, batch_size=16
    )
    ended = 0
    for ids in rollouts["completion_ids"]:
        assert 1 <= len(ids) <= 20 and 1 not in ids[:-1]
        assert len(ids) == 20 or ids[-1] == 1
        ended += ids[-1] == 1
    assert ended > 0


@pytest.mark.parametrize("from_path", [False, True])
@pytest.mark.parametrize("of_model", [0, [0], [0, 31]])
def test_the_tokenizer_s_end_of_sequence_always_ends_an_answer(tmp_path, tokenizer, of_model, from_path):
    model = make_model(seed=2, scale=0.5)
    model.generation_config.eos_token_id = of_model
    if from_path:
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        model = str(tmp_path)
    rollouts = collect_rollouts(
        PROMPTS * 10, model, processing_class=tokenizer, temperature=2.0, max_completion_length=20, ref_logprobs=False
    )
    ends = {1, *(of_model if isinstance(of_model, list) else [of_model])}
    seen = set()
    for row in rollouts:
        *before, last = row["completion_ids"]
        assert not ends & set(before) and (last in ends) == (row["finish_reason"] == "stop")
        seen.add(last)
    assert {0, 1} <= seen


def test_several_answers_a_prompt_stay_with_it_and_the_seed_decides_them(student, tokenizer):
    prompts = Dataset.from_dict({"prompt": PROMPTS, "answer": list("abcd")})
    kwargs = dict(processing_class=tokenizer, num_generations=3, temperature=1.0, max_completion_length=8)
    state = torch.get_rng_state()
    a = collect_rollouts(prompts, student, **kwargs)
    assert torch.equal(torch.get_rng_state(), state)
    b, c = collect_rollouts(prompts, student, **kwargs), collect_rollouts(prompts, student, seed=1, **kwargs)
    assert a["answer"] == [x for x in "abcd" for _ in range(3)]
    assert a["prompt"] == [p for p in PROMPTS for _ in range(3)]
    assert a["completion_ids"] == b["completion_ids"] != c["completion_ids"]
    assert str(a.features["completion_ids"].feature.dtype) == "int32"


def test_samples_follow_the_model_s_distribution(student, tokenizer):
    """Temperature and top-p as asked, and no other warper: frequencies against the softmax."""
    temperature, n = 0.8, 4000
    rollouts = collect_rollouts(
        ["w5 w6"], student, processing_class=tokenizer, num_generations=n, temperature=temperature,
        max_completion_length=1, batch_size=1000,
    )  # fmt: skip
    with torch.no_grad():
        p = (student(torch.tensor([tokenizer("w5 w6")["input_ids"]])).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor(rollouts["completion_ids"]).flatten(), minlength=len(p))
    # Pearson's chi-squared over tokens expected at least 5 times; 5 standard deviations above its mean.
    often = n * p >= 5
    chi2 = ((counts - n * p) ** 2 / (n * p))[often].sum()
    assert chi2 < often.sum() + 5 * (2 * often.sum()) ** 0.5


@pytest.mark.parametrize(
    ("engine", "how"),
    [
        ("transformers", {"temperature": 1.0}),
        ("transformers", {"temperature": 0.7, "top_p": 0.8}),
        ("transformers", {"temperature": 0}),
        ("continuous_batching", {"temperature": 0.7, "top_p": 0.8}),
    ],
)
def test_ref_logprobs_are_those_of_the_whole_distribution_at_temperature_1(student, tokenizer, engine, how):
    rollouts = collect_rollouts(
        PROMPTS * 3, student, processing_class=tokenizer, engine=engine, max_completion_length=12, batch_size=5, **how
    )
    assert str(rollouts.features["ref_logprobs"].feature.dtype) == "float32"
    for row in rollouts:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            logprobs = student(ids).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(-1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0]
        np.testing.assert_allclose(row["ref_logprobs"], expected, atol=1e-5)
    without = collect_rollouts(
        PROMPTS, student, processing_class=tokenizer, engine=engine, max_completion_length=3, ref_logprobs=False, **how
    )
    assert "ref_logprobs" not in without.column_names


def test_the_finish_reason_says_how_an_answer_ended(student, tokenizer):
    rollouts = collect_rollouts(
        PROMPTS * 10, student, processing_class=tokenizer, temperature=2.0, max_completion_length=20
    )
    assert set(rollouts["finish_reason"]) == {"stop", "length"}
    for row in rollouts:
        ended = row["completion_ids"][-1] == tokenizer.eos_token_id
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert ended or len(row["completion_ids"]) == 20


def test_stop_texts_end_an_answer_and_their_tokens_are_kept(student, tokenizer):
    # The padding is one of the tokens that end an answer: what follows an end must not be taken for a part of it.
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    free = collect_rollouts(PROMPTS * 5, student, processing_class=tokenizer, temperature=0, max_completion_length=20)
    common = max(range(3, 32), key=lambda id: sum(id in ids[:-1] for ids in free["completion_ids"]))
    word = tokenizer.decode([common])
    stopped = collect_rollouts(
        PROMPTS * 5,
        student,
        processing_class=tokenizer,
        temperature=0,
        max_completion_length=20,
        stop=[word, "nothing"],
    )
    hits = 0
    for before, row in zip(free, stopped, strict=True):
        ids = before["completion_ids"]
        hit = next((i + 1 for i, id in enumerate(ids) if word in tokenizer.decode([id])), None)
        assert row["completion_ids"] == ids[:hit]
        assert len(row["ref_logprobs"]) == len(row["completion_ids"])
        if hit:
            hits += 1
            assert row["finish_reason"] == "stop"
    assert hits > 0


def test_a_stop_text_in_the_prompt_ends_nothing(student, tokenizer):
    rollouts = collect_rollouts(
        ["w5 w6"], student, processing_class=tokenizer, temperature=0, max_completion_length=8, stop="w6"
    )
    free = collect_rollouts(["w5 w6"], student, processing_class=tokenizer, temperature=0, max_completion_length=8)
    assert 6 not in free[0]["completion_ids"] and rollouts["completion_ids"] == free["completion_ids"]


def test_cut_answers_are_kept_or_dropped_and_counted_either_way(student, tokenizer, caplog):
    kwargs = dict(processing_class=tokenizer, temperature=2.0, max_completion_length=20, rows_per_shard=7)
    kept = collect_rollouts(PROMPTS * 10, student, **kwargs)
    cut = kept["finish_reason"].count("length")
    assert 0 < cut < 40 and f"{cut} of 40 answers were cut at 20 tokens and kept" in caplog.text
    dropped = collect_rollouts(PROMPTS * 10, student, truncated="drop", **kwargs)
    assert f"{cut} of 40 answers were cut at 20 tokens and dropped" in caplog.text
    assert dropped.to_list() == [row for row in kept if row["finish_reason"] == "stop"]
    for table in (kept, dropped):
        assert record_of(table)["students"][0]["sampling"]["truncated_answers"] == cut
    with pytest.raises(ValueError, match="All 4 answers were cut at 1 tokens"):
        collect_rollouts(
            PROMPTS, student, processing_class=tokenizer, max_completion_length=1, truncated="drop", seed=1
        )


# ---- Continuous batching ----


def test_continuous_batching_gives_the_same_greedy_answers(student, tokenizer):
    kwargs = dict(processing_class=tokenizer, temperature=0, max_completion_length=12, num_generations=2)
    plain = collect_rollouts(PROMPTS * 3, student, **kwargs)
    state, attention = torch.get_rng_state(), student.config._attn_implementation
    continuous = collect_rollouts(PROMPTS * 3, student, engine="continuous_batching", **kwargs)
    assert torch.equal(torch.get_rng_state(), state) and student.config._attn_implementation == attention
    for column in ("prompt", "completion_ids", "finish_reason"):
        assert continuous[column] == plain[column]


@pytest.mark.slow
def test_continuous_batching_repeats_itself_by_shard(student, tokenizer):
    kwargs = dict(processing_class=tokenizer, temperature=1.0, max_completion_length=8, rows_per_shard=6)
    kwargs["engine"] = "continuous_batching"
    a = collect_rollouts(["w5 w6"] * 12, student, **kwargs)["completion_ids"]
    b = collect_rollouts(["w5 w6"] * 12, student, **kwargs)["completion_ids"]
    c = collect_rollouts(["w5 w6"] * 12, student, seed=1, **kwargs)["completion_ids"]
    assert a == b != c and a[:6] != a[6:] and len({tuple(ids) for ids in a}) > 6


def test_continuous_batching_knows_no_stop_texts(student, tokenizer):
    with pytest.raises(ValueError, match="knows no `stop` texts"):
        collect_rollouts(PROMPTS, student, processing_class=tokenizer, engine="continuous_batching", stop="w5")


# ---- vLLM ----


@pytest.fixture(params=["server", "engine"])
def vllm_engine(request, monkeypatch, student_dir, tokenizer):
    """vLLM in miniature, serving the student or in this process."""
    model = AutoModelForCausalLM.from_pretrained(student_dir)
    if request.param == "server":
        with stub_server("vllm", model) as server:
            yield VLLMServer(server.url)
    else:
        texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
        monkeypatch.setitem(sys.modules, "vllm", vllm_stub.module(model, texts))
        yield "vllm"


def test_vllm_answers_as_transformers_do(student_dir, vllm_engine):
    kwargs = dict(temperature=0, max_completion_length=12, num_generations=2)
    plain = collect_rollouts(PROMPTS, str(student_dir), **kwargs)
    rollouts = collect_rollouts(PROMPTS, str(student_dir), engine=vllm_engine, **kwargs)
    for column in ("prompt", "prompt_ids", "completion_ids", "completion", "finish_reason"):
        assert rollouts[column] == plain[column]
    for a, b in zip(rollouts["ref_logprobs"], plain["ref_logprobs"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_served_student_is_a_person_s_word(student_dir, teacher_dir, vllm_engine):
    rollouts = collect_rollouts(PROMPTS, str(student_dir), engine=vllm_engine, max_completion_length=6)
    evidence = "verified" if vllm_engine == "vllm" else "declared"
    assert record_of(rollouts)["students"][0]["evidence"] == evidence
    id = fingerprint_teacher(student_dir).id
    assert set(rollouts["student_fingerprint"]) == {id if vllm_engine == "vllm" else f"{id}#declared"}
    table = score_rollouts(rollouts, str(teacher_dir), top_k=2)
    verdict = check_teacher_consistency(read_model_card(student_dir), table, student_fingerprint=id)
    assert (verdict.evidence, verdict.off_policy) == ("verified", False)


def test_with_vllm_each_answer_has_its_seed_and_shards_do_not_matter(tmp_path, student_dir, vllm_engine):
    kwargs = dict(engine=vllm_engine, temperature=1.0, num_generations=2, max_completion_length=8)
    a = collect_rollouts(PROMPTS, str(student_dir), **kwargs)
    b = collect_rollouts(PROMPTS, str(student_dir), rows_per_shard=1, output_dir=tmp_path / "rollouts", **kwargs)
    assert a["completion_ids"] == b["completion_ids"]
    assert a["completion_ids"][::2] != a["completion_ids"][1::2]


def test_a_server_of_another_tokenizer_is_refused(student_dir):
    texts = [f"other{token}" for token in range(32)]
    with stub_server("vllm", AutoModelForCausalLM.from_pretrained(student_dir), texts=texts) as server:
        with pytest.raises(ServerError, match="another tokenizer"):
            collect_rollouts(PROMPTS, str(student_dir), engine=VLLMServer(server.url))


# ---- On disk ----


def test_rollouts_on_disk_are_those_in_memory(tmp_path, student_dir, teacher_dir, caplog):
    caplog.set_level(logging.INFO, "trl_lopd")
    prompts = Dataset.from_dict({"prompt": PROMPTS * 3, "answer": list("abcdefghijkl")})
    options = dict(num_generations=2, max_completion_length=6, rows_per_shard=5)
    in_memory = collect_rollouts(prompts, str(student_dir), **options)
    on_disk = collect_rollouts(prompts, str(student_dir), output_dir=tmp_path / "rollouts", **options)
    assert on_disk.features == in_memory.features and on_disk.to_dict() == in_memory.to_dict()
    totals = json.loads(next(line for line in reversed(caplog.messages) if line.startswith("{")))
    tokens, cut = sum(map(len, on_disk["completion_ids"])), on_disk["finish_reason"].count("length")
    counts = {"rows": 24, "answers": 24, "truncated": cut, "dropped": 0, "completion_tokens": tokens}
    assert counts.items() <= totals.items()
    assert totals["run"] == "sampling" and totals["tokens_this_run"] == tokens and totals["tokens_per_second"] > 0

    loaded = load_dataset(str(tmp_path / "rollouts"), split="train")
    assert loaded.features == in_memory.features and loaded.to_dict() == in_memory.to_dict()
    rollouts = load_table(tmp_path / "rollouts", split="train")
    student = fingerprint_teacher(student_dir)
    (about,) = record_of(rollouts)["students"]
    assert about["id"] == student.id and about["sampling"]["num_generations"] == 2
    scored = score_rollouts(rollouts, str(teacher_dir), top_k=2)
    assert record_of(scored)["students"] == record_of(rollouts)["students"]


def test_finished_rollouts_are_given_back_without_loading_a_model(tmp_path, student_dir, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "trl_lopd")
    options = dict(output_dir=tmp_path / "rollouts", max_completion_length=6)
    first = collect_rollouts(PROMPTS, str(student_dir), **options)
    monkeypatch.setattr("trl_lopd.generation.rollouts.load_model", lambda *args: pytest.fail("a model was loaded"))
    again = collect_rollouts(PROMPTS, str(student_dir), **options)
    assert again.to_dict() == first.to_dict() and record_of(again) == record_of(first)
    assert json.loads(next(line for line in reversed(caplog.messages) if line.startswith("{")))["tokens_this_run"] == 0


@pytest.mark.parametrize(
    "change, words",
    [
        ({"temperature": 0.7}, "temperature: 0.8 -> 0.7"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"stop": "w5"}, "stop: not set -> "),
        ({"engine": "continuous_batching"}, 'engine: "transformers" -> "continuous_batching"'),
        ({"prompts": PROMPTS[::-1]}, "prompts: "),
        ({"student": "teacher"}, "student: .*student@1-.* -> .*teacher@1-"),
    ],
)
def test_a_run_that_is_not_the_same_is_refused(tmp_path, student_dir, teacher_dir, change, words):
    collect_rollouts(PROMPTS, str(student_dir), output_dir=tmp_path / "rollouts", max_completion_length=3)
    student = str(teacher_dir if change.pop("student", None) else student_dir)
    prompts = change.pop("prompts", PROMPTS)
    with pytest.raises(ShardError, match=words):
        collect_rollouts(prompts, student, output_dir=tmp_path / "rollouts", max_completion_length=3, **change)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_in_the_same_rollouts(tmp_path, student_dir):
    prompts = [f"w{i % 29 + 3} w{i // 29 + 3}" for i in range(80)]
    Dataset.from_dict({"prompt": prompts}).save_to_disk(tmp_path / "prompts")
    kills.check("sample", 1, tmp_path, str(tmp_path / "prompts"), str(student_dir))


def test_sft_data_on_disk_names_the_teacher(tmp_path, teacher_dir):
    options = dict(max_completion_length=6, rows_per_shard=3, truncated="keep")
    in_memory = generate_sft_data(PROMPTS, str(teacher_dir), **options)
    data = generate_sft_data(PROMPTS, str(teacher_dir), output_dir=tmp_path / "sft", **options)
    assert data.to_dict() == in_memory.to_dict() and record_of(data) == record_of(in_memory)
    assert set(data["teacher_fingerprint"]) == {fingerprint_teacher(teacher_dir).id}
    assert "ref_logprobs" not in data.column_names and "student_fingerprint" not in data.column_names
    card = read_dataset_card(tmp_path / "sft")
    assert card["sft_teachers"] == record_of(data)["sft_teachers"] and card["sft_teachers"][0]["probes"]
    assert "teachers" not in card


# ---- What cannot be done ----


@pytest.mark.parametrize("option", [{"repetition_penalty": 5.0}, {"min_p": 0.5}, {"no_repeat_ngram_size": 1}])
def test_the_model_s_own_generation_config_does_not_change_the_policy(student, tokenizer, option):
    kwargs = dict(processing_class=tokenizer, temperature=1.0, max_completion_length=12)
    plain = collect_rollouts(PROMPTS, student, **kwargs)
    own = student.generation_config
    student.generation_config = GenerationConfig(**own.to_dict() | option)
    try:
        assert collect_rollouts(PROMPTS, student, **kwargs)["completion_ids"] == plain["completion_ids"]
        assert all(getattr(student.generation_config, name) == value for name, value in option.items())
    finally:
        student.generation_config = own


def test_neighbouring_seeds_share_no_batch(student, tokenizer):
    kwargs = dict(processing_class=tokenizer, temperature=1.0, max_completion_length=12, batch_size=4)
    a = collect_rollouts(["w5 w6"] * 8, student, seed=0, **kwargs)["completion_ids"]
    b = collect_rollouts(["w5 w6"] * 8, student, seed=4, **kwargs)["completion_ids"]
    assert a[4:] != b[:4]


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_that_ships_code_samples_and_scores_where_it_is_trusted(tmp_path, tokenizer, adapter):
    path = tmp_path / "base"
    make_model(seed=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "generation_config.json").unlink()
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(REMOTE_CODE)
    if adapter:
        peft = pytest.importorskip("peft")
        base = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
            tmp_path / "adapter"
        )
        path = tmp_path / "adapter"
    trusted = {"trust_remote_code": True}
    rollouts = collect_rollouts(PROMPTS, str(path), max_completion_length=4, model_init_kwargs=trusted)
    assert len(score_rollouts(rollouts, str(path), top_k=2, model_init_kwargs=trusted)) == len(PROMPTS)
    with pytest.raises(ValueError, match="trust_remote_code"):
        collect_rollouts(PROMPTS, str(path), max_completion_length=4)


def test_chat_prompts_go_through_the_template(student):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w30{% endif %}"
    )
    rollouts = collect_rollouts(
        [[{"role": "user", "content": "w5 w6"}]], student, processing_class=tokenizer, max_completion_length=3
    )
    assert rollouts["prompt_ids"] == [[5, 6, 30]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        (["w5", ""], "Prompt 1 is empty"),
        (Dataset.from_dict({"question": ["w5"]}), "no `prompt` column.*question"),
        ({"train": Dataset.from_dict({"prompt": ["w5"]})}, r"dict of splits, \['train'\]: give one"),
        ("w5 w6", "`prompts` is one text"),
        (Dataset.from_dict({"prompt": ["w5"]}).to_iterable_dataset(), "`prompts` is a stream"),
        (["w5", None], "Prompt 1 is neither a text nor a list of messages.*None"),
        (["w5", [{"role": "user", "content": "w6"}]], "Prompt 1 is a list of messages, those before it are not"),
    ],
)
def test_bad_prompts(student, tokenizer, prompts, message):
    with pytest.raises((TypeError, ValueError), match=message):
        collect_rollouts(prompts, student, processing_class=tokenizer)


def test_what_is_not_complete_or_not_whole_is_not_read(tmp_path, student_dir, teacher_dir):
    out = tmp_path / "rollouts"
    whole = collect_rollouts(PROMPTS, str(student_dir), output_dir=out, max_completion_length=3, rows_per_shard=1)
    first, second, *_ = sorted(out.glob("*.parquet"))
    second.write_bytes(second.read_bytes()[:-10])
    with pytest.raises(ShardError, match=rf"{second.name} is truncated or altered \(.*\). Run what writes it again"):
        load_table(out)
    first.unlink()
    with pytest.raises(ShardError, match="not complete: 1 of 4 shards are missing, .*. Run what writes it again"):
        load_table(out)
    again = collect_rollouts(PROMPTS, str(student_dir), output_dir=out, max_completion_length=3, rows_per_shard=1)
    assert load_table(out, split="train").to_dict() == again.to_dict() == whole.to_dict()
    with pytest.raises(ShardError, match="holds answers of a student, not scores"):
        score_rollouts(whole, str(teacher_dir), output_dir=out)


def test_a_run_that_came_to_nothing_does_not_bind_the_next(tmp_path, student_dir, monkeypatch):
    out = tmp_path / "rollouts"
    with monkeypatch.context() as broken:
        broken.setattr("trl_lopd.generation.rollouts.load_model", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collect_rollouts(PROMPTS, str(student_dir), output_dir=out, max_completion_length=3)
    collect_rollouts(PROMPTS, str(student_dir), output_dir=out, max_completion_length=4)
    with pytest.raises(ShardError, match="max_completion_length: 4 -> 3"):
        collect_rollouts(PROMPTS, str(student_dir), output_dir=out, max_completion_length=3)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"engine": "tgi"}, "`engine` is one of 'transformers'.*got 'tgi'"),
        ({"engine": "vllm"}, "loads the model itself"),
        ({"stop": ["w5", ""]}, "An empty text in `stop`"),
        ({"truncated": "maybe"}, '`truncated` is "keep" or "drop"'),
    ],
)
def test_what_cannot_be_done_is_said(student, tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        collect_rollouts(PROMPTS, student, processing_class=tokenizer, **options)


@pytest.mark.parametrize(
    "option",
    [
        *({"temperature": value} for value in (-1, math.nan, math.inf, "hot")),
        *({"top_p": value} for value in (0, 1.1, math.nan)),
        *({"num_generations": 0}, {"batch_size": 0}, {"max_completion_length": 2.5}, {"rows_per_shard": True}),
    ],
)
def test_bad_options(student, tokenizer, option):
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` is"):
        collect_rollouts(PROMPTS, student, processing_class=tokenizer, **option)
