"""The stamp of SFT teachers goes by the rows that are trained on, however TRL's trainer prepared them."""

from __future__ import annotations

import logging
import shutil

import pytest
from datasets import Dataset, concatenate_datasets
from tiny import make_model
from trl import SFTConfig, SFTTrainer

from trl_lopd import TeacherStampCallback, read_model_card

A, B = (f"{name}@1-{i:012x}-{i:08x}-{i:08x}" for i, name in enumerate("ab", start=1))


def make_rows(teacher, count=16, start=3):
    """As `generate_sft_data` writes them, with prompts of one token and longer completions."""
    answers = [[start + (i + j * j) % 17 for j in range(i % 9 + 1)] for i in range(count)]
    return Dataset.from_dict(
        {
            "prompt": [f"w{start + i % 20}" for i in range(count)],
            "completion": ["".join(f" w{id}" for id in answer) for answer in answers],
            "prompt_ids": [[start + i % 20] for i in range(count)],
            "completion_ids": [[*answer, 1] for answer in answers],
            "teacher_fingerprint": [teacher] * count,
        }
    )


def with_other_texts(rows):
    return rows.map(lambda row: {"completion": " w30 w29" * len(row["completion_ids"])})


def make_trainer(tmp_path, tokenizer, rows, formatting_func=None, model=None, **options):
    args = SFTConfig(
        str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=2, **{"max_length": 64, "max_steps": 1, "save_strategy": "no"} | options,
    )  # fmt: skip
    return SFTTrainer(
        model or make_model(seed=6), args, train_dataset=rows, eval_dataset=rows.select(range(2)),
        processing_class=tokenizer, formatting_func=formatting_func,
    )  # fmt: skip


def stamped(tmp_path, trainer, *given):
    trainer.add_callback(TeacherStampCallback(trainer, *given))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    record = read_model_card(tmp_path / "final")
    return {t["id"]: (t["rows"], t["share"], t["evidence"]) for t in record["sft_teachers"]}, record["sft_rows"]


def as_text(row):
    return row["prompt"] + row["completion"]


OPTIONS = [
    {},
    {"max_length": None},
    {"packing": True},
    {"packing": True, "max_length": 8},  # sequences are cut
    {"packing": True, "packing_strategy": "wrapped"},
    {"packing": True, "packing_strategy": "bfd_split", "max_length": 9},
    {"formatting_func": as_text, "completion_only_loss": False},
    {"formatting_func": as_text, "completion_only_loss": False, "packing": True},
    {"shuffle_dataset": True},
]


@pytest.mark.parametrize(
    ("options", "column"), [(options, False) for options in OPTIONS] + [(OPTIONS[0], True), (OPTIONS[2], True)]
)
def test_what_trl_does_to_the_rows_is_no_other_data(tmp_path, tokenizer, options, column, caplog):
    rows = make_rows(A)
    trainer = make_trainer(
        tmp_path, tokenizer, rows if column else rows.remove_columns("teacher_fingerprint"), **options
    )
    with caplog.at_level(logging.WARNING, logger="trl_lopd"):
        assert stamped(tmp_path, trainer, rows) == ({A: (16, 1.0, "verified")}, 16)
    compared = options.get("packing_strategy") is None
    assert ("cannot be compared" in caplog.text) is not compared


@pytest.mark.parametrize(
    "column", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["with the column", "without"]
)
@pytest.mark.parametrize("options", OPTIONS[:5] + OPTIONS[6:], ids=lambda options: "-".join(options))
def test_other_texts_than_were_sampled_are_declared(tmp_path, tokenizer, options, column, caplog):
    """Whatever the tokenizers' fingerprints are: that of `A` is not the trainer's."""
    rows = with_other_texts(make_rows(A))
    trained = rows if column else rows.remove_columns(["teacher_fingerprint", "completion_ids"])
    trainer = make_trainer(tmp_path, tokenizer, trained, **options)
    with caplog.at_level(logging.WARNING, logger="trl_lopd"):
        assert stamped(tmp_path, trainer, rows) == ({A: (16, 1.0, "declared")}, 16)
    assert caplog.text.count("only declares") == 1 and A in caplog.text


@pytest.mark.parametrize("kind", ["late", "of one token"])
def test_all_rows_of_a_teacher_may_be_compared(tmp_path, tokenizer, kind):
    rows = make_rows(A)
    if kind == "late":
        rows = concatenate_datasets([make_rows("", 520), rows])
    else:
        rows = rows.map(lambda row: {"completion_ids": row["completion_ids"][:1]})
    callback = TeacherStampCallback(make_trainer(tmp_path, tokenizer, with_other_texts(rows)))
    assert [t["evidence"] for t in callback.sft_teachers] == ["declared"]


def test_each_teacher_is_compared_by_itself(tmp_path, tokenizer):
    rows = concatenate_datasets([make_rows(A), with_other_texts(make_rows(B))])
    callback = TeacherStampCallback(make_trainer(tmp_path, tokenizer, rows))
    assert {t["id"]: t["evidence"] for t in callback.sft_teachers} == {A: "verified", B: "declared"}


@pytest.mark.parametrize("column", ["completion_ids", "input_ids"])
def test_what_cannot_be_compared_is_declared(tmp_path, tokenizer, column, caplog):
    rows = make_rows(A)
    trainer = make_trainer(tmp_path, tokenizer, rows)
    if column == "input_ids":
        trainer.train_dataset = rows  # a collator tokenizes
    else:
        trainer.train_dataset, rows = (data.remove_columns(column) for data in (trainer.train_dataset, rows))
    with caplog.at_level(logging.WARNING, logger="trl_lopd"):
        callback = TeacherStampCallback(trainer, rows)
    assert [t["evidence"] for t in callback.sft_teachers] == ["declared"]
    assert caplog.text.count("only declares") == 1 and f"`{column}`" in caplog.text


def test_rows_that_truncation_leaves_nothing_of_are_not_counted(tmp_path, tokenizer):
    """TRL drops those whose prompt alone fills `max_length`."""
    rows = make_rows(A).map(
        lambda row, i: {"prompt": " ".join([row["prompt"]] * (9 if i < 3 else 1))}, with_indices=True
    )
    rows = concatenate_datasets([rows, make_rows(B, 13)])
    trainer = make_trainer(tmp_path, tokenizer, rows, max_length=6)
    assert stamped(tmp_path, trainer, rows) == ({A: (13, 0.5, "verified"), B: (13, 0.5, "verified")}, 26)


@pytest.mark.parametrize("packing", [False, True])
def test_other_rows_than_are_trained_on_are_refused(tmp_path, tokenizer, packing):
    trained = make_rows(B, 40).remove_columns("teacher_fingerprint")
    trainer = make_trainer(tmp_path, tokenizer, trained, packing=packing)
    with pytest.raises(ValueError, match="trains on 40 rows.*has 16.*`teacher_fingerprint`"):
        TeacherStampCallback(trainer, make_rows(A))


def test_rows_that_name_their_teacher_speak_for_themselves(tmp_path, tokenizer, caplog):
    """The data given may be other data, or a part of a mixture."""
    for trained, expected in (
        (make_rows(B), {B: (16, 1.0, "verified")}),
        (
            concatenate_datasets([make_rows(A), make_rows(B, 48)]),
            {B: (48, 0.75, "verified"), A: (16, 0.25, "verified")},
        ),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="trl_lopd"):
            found, rows = stamped(tmp_path, make_trainer(tmp_path, tokenizer, trained), make_rows(A))
        assert found == expected and rows == len(trained)
        assert "not those of the data given" in caplog.text


def test_data_that_is_exchanged_before_training_is_looked_at_again(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, make_rows(A))
    other = make_trainer(tmp_path, tokenizer, make_rows(B)).train_dataset
    trainer.add_callback(TeacherStampCallback(trainer, make_rows(A)))
    trainer.train_dataset = other
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert [t["id"] for t in read_model_card(tmp_path / "final")["sft_teachers"]] == [B]
    again = make_trainer(tmp_path, tokenizer, make_rows(A))
    again.add_callback(TeacherStampCallback(again, make_rows(A)))
    again.train_dataset = other.remove_columns("teacher_fingerprint").select(range(4))
    with pytest.raises(ValueError, match="trains on 4 rows"):
        again.train()


def test_a_stream_cannot_be_compared(tmp_path, tokenizer, caplog):
    rows = make_rows(A)
    args = SFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=1)
    trainer = SFTTrainer(
        make_model(seed=6), args, train_dataset=rows.to_iterable_dataset(), processing_class=tokenizer
    )
    with caplog.at_level(logging.WARNING, logger="trl_lopd"):
        TeacherStampCallback(trainer, rows)
    assert "cannot be compared" in caplog.text


def test_a_stamp_is_about_all_that_was_trained_on(tmp_path, tokenizer):
    """Neither a checkpoint that is resumed on other data nor a second training names the second teacher alone."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, tokenizer, make_rows(B), **options)
    stamped(tmp_path, trainer)
    trainer.train_dataset = make_trainer(tmp_path, tokenizer, make_rows(A), **options).train_dataset
    with pytest.raises(ValueError, match="was replaced after training"):
        trainer.train()
    again = make_trainer(tmp_path, tokenizer, make_rows(A), **options)
    again.add_callback(TeacherStampCallback(again))
    with pytest.raises(ValueError, match=f"trained on data of {B}, .* and this run's is of {A}"):
        again.train(resume_from_checkpoint=True)


def domains_of(callback):
    return {t["id"]: (t["rows"], t.get("teacher_ids")) for t in callback.sft_teachers}


def test_the_domains_that_each_teacher_wrote_are_counted(tmp_path, tokenizer):
    rows = concatenate_datasets(
        [
            make_rows(A, 8).add_column("teacher_id", ["math"] * 6 + [None] * 2),
            make_rows(B, 4).add_column("teacher_id", ["code"] * 3 + ["math"]),
        ]
    )
    whole = {A: (8, {"math": 6}), B: (4, {"code": 3, "math": 1})}
    for number, (data, expected) in enumerate(
        [
            (rows, whole),
            (rows.shuffle(seed=1), whole),
            (rows.select(range(7)), {A: (7, {"math": 6})}),
            (rows.filter(lambda row: row["teacher_id"] == "math"), {A: (6, {"math": 6}), B: (1, {"math": 1})}),
            (rows.remove_columns("teacher_id"), {A: (8, None), B: (4, None)}),
        ]
    ):
        trainer = make_trainer(tmp_path / str(number), tokenizer, data)
        assert domains_of(TeacherStampCallback(trainer, data)) == expected
    packed = make_trainer(tmp_path / "packed", tokenizer, rows, packing=True)
    assert domains_of(TeacherStampCallback(packed, rows)) == whole


def test_domains_are_added_to_those_before_and_resumed_with_the_same(tmp_path, tokenizer):
    first = make_rows(A).add_column("teacher_id", ["math"] * 16)
    stamped(tmp_path / "one", make_trainer(tmp_path / "one", tokenizer, first))
    shutil.copytree(tmp_path / "one" / "final", tmp_path / "copy")
    second = concatenate_datasets([make_rows(A), make_rows(B, start=5)])
    second = second.add_column("teacher_id", ["math"] * 16 + ["code"] * 16)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "model": str(tmp_path / "copy")}

    def trained(name, data, resume=None):
        trainer = make_trainer(tmp_path / name, tokenizer, data, **options)
        callback = TeacherStampCallback(trainer, data)
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return callback

    expected = {A: (32, {"math": 32}), B: (16, {"code": 16})}
    assert domains_of(trained("two", second)) == expected
    checkpoint = str(tmp_path / "two" / "out" / "checkpoint-1")
    assert {t["id"]: t["teacher_ids"] for t in read_model_card(checkpoint)["sft_teachers"]} == {
        id: domains for id, (_, domains) in expected.items()
    }
    assert domains_of(trained("two", second, resume=checkpoint)) == expected
    exchanged = second.map(lambda row: {"teacher_id": {"math": "code", "code": "math"}[row["teacher_id"]]})
    with pytest.raises(ValueError, match=r"data of a@.* .math., b@.* .code., with what .* and this run's"):
        trained("two", exchanged, resume=checkpoint)


def as_tokens(row):
    return {
        "input_ids": row["prompt_ids"] + row["completion_ids"],
        "completion_mask": [False] * len(row["prompt_ids"]) + [True] * len(row["completion_ids"]),
    }


@pytest.mark.parametrize("completion_only_loss", [None, True, False])
def test_a_mask_that_the_trainer_ignores_is_told_of(tmp_path, tokenizer, caplog, completion_only_loss):
    """Rows of tokens alone: TRL learns their prompts, too, where it is not told."""
    rows = make_rows(A)
    tokens = rows.map(as_tokens, remove_columns=["prompt", "completion"])
    trainer = make_trainer(tmp_path, tokenizer, tokens, completion_only_loss=completion_only_loss)
    learns_prompts = [row["labels"][0] != -100 for row in trainer.train_dataset]
    assert learns_prompts == [not completion_only_loss] * len(rows)
    with caplog.at_level(logging.WARNING, logger="trl_lopd"):
        TeacherStampCallback(trainer, rows)
    assert ("is trained on, too" in caplog.text) == (completion_only_loss is None)
    # An answer is compared whole, also where it begins as its prompt does.
    assert "of what the teacher sampled is trained on" not in caplog.text


@pytest.mark.parametrize("mask", [lambda mask: [True] * len(mask), lambda mask: None], ids=["all", "none"])
@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
def test_a_mask_that_leaves_nothing_out_is_not(tmp_path, tokenizer, caplog, mask, truncation_mode):
    """Its length is that of the row before it was cut."""
    rows = make_rows(A).map(as_tokens, remove_columns=["prompt", "completion"])
    rows = rows.map(lambda row: {"completion_mask": mask(row["completion_mask"])})
    trainer = make_trainer(tmp_path, tokenizer, rows, max_length=4, truncation_mode=truncation_mode)
    with caplog.at_level(logging.WARNING, logger="trl_lopd"):
        TeacherStampCallback(trainer, rows)
    assert "is trained on, too" not in caplog.text
