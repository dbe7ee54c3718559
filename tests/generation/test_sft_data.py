"""What TRL's `SFTTrainer` makes of a teacher's answers, above all of those that were cut."""

from __future__ import annotations

import pytest
from datasets import Dataset
from tiny import make_model, make_tokenizer
from trl import SFTConfig, SFTTrainer

from trl_lopd import TeacherStampCallback, cli, generate_sft_data, load_table

EOS = 1
TEXTS = ["w5 w6", "w7", "w8 w9 w10 w11", "w12 w13"] * 10
MESSAGES = [[{"role": "user", "content": text}] for text in TEXTS]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w3 {{ m['content'] }} w4 {% else %}"
    "{{ m['content'] }} <eos> {% endif %}{% endfor %}"
)
# Half of the answers end by themselves, half are cut.
SAMPLING = {"temperature": 2.0, "max_completion_length": 20}


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def teacher():
    return make_model(seed=2, scale=0.5)


def fine_tuned_on(tmp_path, data, tokenizer):
    """The ids and labels of each row, as they reach the model."""
    args = SFTConfig(
        str(tmp_path / "sft"), use_cpu=True, bf16=False, report_to="none", max_length=None, max_steps=1,
        per_device_train_batch_size=len(data), disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(make_model(seed=5), args, train_dataset=data, processing_class=tokenizer)
    trainer.add_callback(TeacherStampCallback(trainer, data))
    trainer.train()
    rows = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    assert len(rows) == len(data)
    return rows


@pytest.mark.parametrize("prompts", [TEXTS, MESSAGES], ids=["texts", "messages"])
def test_by_default_answers_that_were_cut_are_not_taught(tmp_path, teacher, chat_tokenizer, prompts):
    data = generate_sft_data(prompts, teacher, processing_class=chat_tokenizer, **SAMPLING)
    assert 0 < len(data) < len(prompts) and set(data["finish_reason"]) == {"stop"}
    # Tokenized again by TRL, as texts.
    for _, labels in fine_tuned_on(tmp_path, data, chat_tokenizer):
        assert labels[-1] == EOS and labels.count(EOS) == 1


@pytest.mark.parametrize("prompts", [TEXTS, MESSAGES], ids=["texts", "messages"])
def test_where_they_are_kept_no_end_is_taught_that_the_teacher_did_not_write(
    tmp_path, teacher, chat_tokenizer, prompts
):
    data = generate_sft_data(prompts, teacher, processing_class=chat_tokenizer, truncated="keep", **SAMPLING)
    assert len(data) == len(prompts) and set(data["finish_reason"]) == {"stop", "length"}
    for row, (ids, labels) in zip(data, fine_tuned_on(tmp_path, data, chat_tokenizer), strict=True):
        assert ids == row["prompt_ids"] + row["completion_ids"]
        assert labels == [-100] * len(row["prompt_ids"]) + row["completion_ids"]
        assert (labels[-1] == EOS) == (row["finish_reason"] == "stop")


@pytest.mark.parametrize("truncated", ["keep", "drop"])
def test_an_answer_ended_by_a_stop_text_ends_in_either_case(tmp_path, teacher, tokenizer, truncated):
    options = {"processing_class": tokenizer, "truncated": truncated, "max_completion_length": 40, "seed": 1}
    data = generate_sft_data(TEXTS, teacher, stop=[f"w{i}" for i in range(3, 20)], **options)
    by_text = [i for i, row in enumerate(data) if row["finish_reason"] == "stop" and row["completion_ids"][-1] != EOS]
    rows = fine_tuned_on(tmp_path, data, tokenizer)
    assert len(by_text) > 10
    for i in by_text:
        ids, labels = rows[i]
        assert labels[-1] == EOS and labels.count(EOS) == 1
        if truncated == "keep":
            assert ids == [*data[i]["prompt_ids"], *data[i]["completion_ids"], EOS]


def test_columns_that_would_be_taught_in_the_place_of_the_answers_are_left_out(tmp_path, teacher, tokenizer):
    prompts = Dataset.from_dict(
        {"prompt": TEXTS, "text": ["w30"] * 40, "input_ids": [[30]] * 40, "labels": [[30]] * 40, "answer": [1] * 40}
    )
    data = generate_sft_data(prompts, teacher, processing_class=tokenizer, **SAMPLING)
    assert "answer" in data.column_names
    for ids, labels in fine_tuned_on(tmp_path, data, tokenizer):
        assert len(ids) > 1 and labels[-1] == EOS and labels.count(EOS) == 1


def test_on_the_command_line_too(tmp_path, teacher_dir):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in TEXTS))
    given = ["rollout", "--model_name_or_path", str(teacher_dir), "--dataset_name", str(prompts), "--temperature", "3"]
    given += ["--max_completion_length", "20", "--output_dir"]
    reasons = {}
    for name, flags in {
        "student": [],
        "teacher": ["--role", "teacher"],
        "kept": ["--role", "teacher", "--truncated", "keep"],
    }.items():
        assert cli.main([*given, str(tmp_path / name), *flags]) == 0
        rows = load_table(tmp_path / name, split="train")
        reasons[name] = set(rows["finish_reason"])
        assert ("input_ids" in rows.column_names) == (name == "kept")
    assert reasons == {"student": {"stop", "length"}, "teacher": {"stop"}, "kept": {"stop", "length"}}
