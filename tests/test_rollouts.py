"""Sampled ids: exactly what the model generates, ended where it ends."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from transformers import GenerationConfig

from trl_lopd import collect_rollouts

PROMPTS = ["w5 w6", "w7", "w8 w9 w10 w11", "w12 w13"]


@pytest.fixture(scope="module")
def student():
    return make_model(seed=2, scale=0.5)


def test_greedy_rollouts_equal_generation_one_by_one(student, tokenizer):
    rollouts = collect_rollouts(PROMPTS, student, tokenizer=tokenizer, temperature=0, max_completion_length=12)
    assert rollouts["prompt"] == PROMPTS
    for row in rollouts:
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([row["prompt_ids"]])
        alone = student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert row["completion_ids"] == alone[0, ids.shape[1] :].tolist()


def test_end_of_sequence_is_kept_and_nothing_follows(student, tokenizer):
    rollouts = collect_rollouts(
        PROMPTS * 10, student, tokenizer=tokenizer, temperature=2.0, max_completion_length=20, batch_size=16
    )
    ended = 0
    for ids in rollouts["completion_ids"]:
        assert 1 <= len(ids) <= 20 and 1 not in ids[:-1]
        assert len(ids) == 20 or ids[-1] == 1
        ended += ids[-1] == 1
    assert ended > 0


def test_several_answers_a_prompt_stay_with_it_and_the_seed_decides_them(student, tokenizer):
    prompts = Dataset.from_dict({"prompt": PROMPTS, "answer": list("abcd")})
    kwargs = dict(tokenizer=tokenizer, num_generations=3, temperature=1.0, max_completion_length=8)
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
        ["w5 w6"], student, tokenizer=tokenizer, num_generations=n, temperature=temperature, max_completion_length=1,
        batch_size=1000,
    )  # fmt: skip
    with torch.no_grad():
        p = (student(torch.tensor([tokenizer("w5 w6")["input_ids"]])).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor(rollouts["completion_ids"]).flatten(), minlength=len(p))
    # Pearson's chi-squared over tokens expected at least 5 times; 5 standard deviations above its mean.
    often = n * p >= 5
    chi2 = ((counts - n * p) ** 2 / (n * p))[often].sum()
    assert chi2 < often.sum() + 5 * (2 * often.sum()) ** 0.5


@pytest.mark.parametrize("option", [{"repetition_penalty": 5.0}, {"min_p": 0.5}, {"no_repeat_ngram_size": 1}])
def test_the_model_s_own_generation_config_does_not_change_the_policy(student, tokenizer, option):
    kwargs = dict(tokenizer=tokenizer, temperature=1.0, max_completion_length=12)
    plain = collect_rollouts(PROMPTS, student, **kwargs)
    own = student.generation_config
    student.generation_config = GenerationConfig(**own.to_dict() | option)
    try:
        assert collect_rollouts(PROMPTS, student, **kwargs)["completion_ids"] == plain["completion_ids"]
        assert all(getattr(student.generation_config, name) == value for name, value in option.items())
    finally:
        student.generation_config = own


def test_neighbouring_seeds_share_no_batch(student, tokenizer):
    kwargs = dict(tokenizer=tokenizer, temperature=1.0, max_completion_length=12, batch_size=4)
    a = collect_rollouts(["w5 w6"] * 8, student, seed=0, **kwargs)["completion_ids"]
    b = collect_rollouts(["w5 w6"] * 8, student, seed=4, **kwargs)["completion_ids"]
    assert a[4:] != b[:4]


def test_chat_prompts_go_through_the_template(student):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w30{% endif %}"
    )
    rollouts = collect_rollouts(
        [[{"role": "user", "content": "w5 w6"}]], student, tokenizer=tokenizer, max_completion_length=3
    )
    assert rollouts["prompt_ids"] == [[5, 6, 30]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        (["w5", ""], "Prompt 1 is empty"),
        (Dataset.from_dict({"question": ["w5"]}), "no `prompt` column.*question"),
    ],
)
def test_bad_prompts(student, tokenizer, prompts, message):
    with pytest.raises(ValueError, match=message):
        collect_rollouts(prompts, student, tokenizer=tokenizer)


@pytest.mark.parametrize("option", [{"temperature": -1}, {"top_p": 0}, {"num_generations": 0}, {"batch_size": 0}])
def test_bad_options(student, tokenizer, option):
    with pytest.raises(ValueError, match=f"`{next(iter(option))}`"):
        collect_rollouts(PROMPTS, student, tokenizer=tokenizer, **option)
