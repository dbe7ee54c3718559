"""The chain of stamps: SFT data, SFT checkpoint, rollouts, table, trained model, second round."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from datasets import Dataset
from hub import Hub
from tiny import make_model
from transformers import Trainer, TrainingArguments

from trl_lopd import (
    OfflineOPDTrainer,
    TeacherStampCallback,
    collect_rollouts,
    fingerprint_teacher,
    generate_sft_data,
    read_model_card,
    score_rollouts,
    stamp_model_card,
)
from trl_lopd.identity.cards import record_of
from trl_lopd.identity.consistency import TeacherConsistencyError
from trl_lopd.identity.fingerprint import same_teacher

SCRIPT = Path(__file__).parent / "chain_script.py"


@pytest.fixture(scope="module")
def answers(teacher_dir):
    return generate_sft_data(["w5 w6", "w7", "w8"] * 4, str(teacher_dir), max_completion_length=5, truncated="keep")


def test_the_chain_survives_the_hub(tmp_path, teacher_dir, tokenizer):
    """Pushed and loaded by the ordinary clients through a server that speaks the Hub's protocol."""
    make_model(seed=5).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with Hub() as hub:
        words = (SCRIPT, teacher_dir, tmp_path / "base", tmp_path)
        done = ranks.launch(*words, processes=None, env=hub.env(tmp_path / "home"))
        assert done.returncode == 0, done.stderr[-3000:]
        assert "round 1: verified intact" in done.stdout and "round 2: verified intact" in done.stdout
        assert not hub.unknown
        cards, pushes = {}, {}
        for name in ("student-sft", "student-opd-1", "student-opd-2"):
            for commit in hub.repos["model", f"tester/{name}"].commits:
                directory = tmp_path / "pulled" / name / commit
                for file, content in hub.files("model", f"tester/{name}", commit).items():
                    (directory / file).parent.mkdir(parents=True, exist_ok=True)
                    (directory / file).write_bytes(content)
                if not (directory / "model.safetensors").exists():
                    continue
                cards[name] = read_model_card(directory)
                # At every push, while training too, the card is about the weights beside it.
                assert same_teacher(cards[name]["model"]["id"], fingerprint_teacher(directory)), (name, commit)
                pushes.setdefault(name, set()).add(cards[name]["model"]["weights"])
        assert {name: len(weights) for name, weights in pushes.items()} == dict.fromkeys(pushes, 2)
    assert [t["evidence"] for t in cards["student-opd-2"]["sft_teachers"]] == ["declared"]  # on the Hub, by `stamp`
    cards["student-opd-2"]["sft_teachers"] = cards["student-opd-1"]["sft_teachers"]
    teacher = fingerprint_teacher(teacher_dir)
    for card in cards.values():
        (sft,) = card["sft_teachers"]
        assert (sft["id"], sft["evidence"], sft["rows"], sft["share"]) == (teacher.id, "verified", 16, 1.0)
    assert "opd_rounds" not in cards["student-sft"]
    first, second = cards["student-opd-2"]["opd_rounds"]
    assert cards["student-opd-1"]["opd_rounds"] == [first]
    for round in (first, second):
        assert round["teacher_consistency"] == "verified" and round["teachers"][0]["id"] == teacher.id


def test_sft_data_is_signed_and_says_how_it_was_made(answers, teacher_dir):
    teacher = fingerprint_teacher(teacher_dir)
    assert set(answers["teacher_fingerprint"]) == {teacher.id} and "student_fingerprint" not in answers.column_names
    (about,) = record_of(answers)["sft_teachers"]
    assert {**teacher.to_dict(), "evidence": "verified", "rows": 12, "share": 1.0}.items() <= about.items()
    assert about["sampling"]["temperature"] == 1.0 and about["probes"]["version"] == 1


def test_conversational_sft_data_is_what_trl_reads(teacher_dir, tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    prompts = [[{"role": "user", "content": "w5 w6"}]]
    (row,) = generate_sft_data(
        prompts, str(teacher_dir), processing_class=tokenizer, max_completion_length=4, seed=1, truncated="keep"
    )
    text = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
    assert text and row["completion"] == [{"role": "assistant", "content": text}]


def make_trainer(tmp_path, rows, model=None):
    args = TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2, save_steps=1,
        per_device_train_batch_size=2, remove_unused_columns=False,
    )  # fmt: skip

    def collate(batch):
        import torch

        ids = torch.tensor([row["prompt_ids"][:1] + row["completion_ids"][:1] for row in batch])
        return {"input_ids": ids, "labels": ids}

    return Trainer(model or make_model(seed=6), args, collate, rows)


def test_any_trainer_stamps_every_checkpoint_with_its_own_weights(tmp_path, answers, teacher_dir, tokenizer):
    trainer = make_trainer(tmp_path, answers)
    trainer.processing_class = tokenizer
    trainer.add_callback(TeacherStampCallback(trainer))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    directories = [tmp_path / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-2", tmp_path / "final"]
    bound = [read_model_card(directory)["model"] for directory in directories]
    assert [record["id"] for record in bound] == [fingerprint_teacher(directory).id for directory in directories]
    assert bound[0]["weights"] != bound[1]["weights"] == bound[2]["weights"]
    for directory in directories:
        (sft,) = read_model_card(directory)["sft_teachers"]
        assert sft["id"] == fingerprint_teacher(teacher_dir).id and sft["evidence"] == "verified" and sft["probes"]
    table = score_rollouts(
        collect_rollouts(["w5"] * 4, str(tmp_path / "final"), max_completion_length=4), str(teacher_dir), top_k=2
    )
    from tiny import make_args

    OfflineOPDTrainer(str(tmp_path / "final"), make_args(tmp_path / "opd"), table)


def test_shares_count_all_rows_and_earlier_sft_data(tmp_path, tokenizer, caplog):
    a, b = (f"{name}@1-{i:012x}-{i:08x}-{i:08x}" for i, name in enumerate("ab", start=1))
    base = tmp_path / "base"
    make_model(seed=5).save_pretrained(base)
    tokenizer.save_pretrained(base)
    stamp_model_card(
        base,
        sft_teachers=[{"id": a, "evidence": "probed", "rows": 2}],
        sft_rows=3,
        checkpoint=fingerprint_teacher(base),
        opd_rounds=[{"student": a}],
    )
    answers = [[5, 6]] * 7
    rows = {"input_ids": answers, "completion_ids": answers, "teacher_fingerprint": [b] * 4 + [a] + [None, ""]}
    rows = Dataset.from_dict(rows)
    model = make_model(seed=5).from_pretrained(base)
    with caplog.at_level(logging.WARNING):
        callback = TeacherStampCallback(make_trainer(tmp_path, rows, model))
    assert "3 of 10 SFT rows do not name a teacher" in caplog.text
    assert callback.sft_rows == 10 and callback.opd_rounds == [{"student": a}]
    assert [(t["id"], t["evidence"], t["rows"], t["share"]) for t in callback.sft_teachers] == [
        (b, "verified", 4, 0.4), (a, "probed", 2, 0.2), (a, "verified", 1, 0.1),
    ]  # fmt: skip


def test_what_was_not_verified_stays_so_through_training(
    tmp_path, teacher_dir, student_dir, tokenizer, table, answers
):
    """Neither a round that was let pass nor SFT on top of it makes a claim stronger than it was."""
    from tiny import make_args

    copied = tmp_path / "copied"
    make_model(seed=8).save_pretrained(copied)
    tokenizer.save_pretrained(copied)
    shutil.copy(student_dir / "README.md", copied)
    for mode in ("declared_ok", "warn", "off"):
        trainer = OfflineOPDTrainer(str(copied), make_args(tmp_path / mode, teacher_consistency=mode), table)
        trainer.save_model(str(tmp_path / mode))
        assert [t["evidence"] for t in read_model_card(tmp_path / mode)["sft_teachers"]] == ["declared"]
        with pytest.raises(TeacherConsistencyError):
            OfflineOPDTrainer(str(tmp_path / mode), make_args(tmp_path), table)
    callback = TeacherStampCallback(make_trainer(tmp_path, answers, make_model().from_pretrained(copied)))
    assert {t["evidence"] for t in callback.sft_teachers} == {"declared", "verified"}


def test_an_adapter_s_history_is_that_of_its_directory(tmp_path, student_dir, teacher_dir, answers):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(seed=2).from_pretrained(student_dir), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = make_trainer(tmp_path, answers, model)
    trainer.add_callback(TeacherStampCallback(trainer))
    trainer.save_model(str(tmp_path / "adapter"))
    callback = TeacherStampCallback(make_trainer(tmp_path, answers, model), parent=tmp_path / "adapter")
    assert callback.sft_rows == 24 and {t["evidence"] for t in callback.sft_teachers} == {"verified"}


@pytest.mark.parametrize("mode", ["warn", "off"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_fingerprint_is_recorded_as_somebody_s_word(tmp_path, student_dir, table, mode, stream):
    from tiny import make_args

    rows = table.map(lambda row: {"teacher_fingerprint": "gpt-4", "student_fingerprint": "mine"})
    rows = rows.to_iterable_dataset() if stream else rows
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path, teacher_consistency=mode, max_steps=1), rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    (round,) = read_model_card(tmp_path / "out")["opd_rounds"]
    assert [(t["id"], t["evidence"]) for t in round["teachers"]] == [("gpt-4", "declared")]
    with pytest.raises(TeacherConsistencyError, match="gpt-4"):
        OfflineOPDTrainer(str(student_dir), make_args(tmp_path), rows)


def test_the_students_of_a_stream_are_looked_at_too(tmp_path, student_dir, table):
    from tiny import make_args

    own = fingerprint_teacher(student_dir).id
    other = own.replace("-908ed06d-", "-00000000-")
    assert other != own
    rows = table.map(lambda row, i: {"student_fingerprint": own if i < 9 else other}, with_indices=True)
    for data in (rows, rows.to_iterable_dataset()):
        with pytest.raises(TeacherConsistencyError, match="with another tokenizer than that of"):
            OfflineOPDTrainer(str(student_dir), make_args(tmp_path, max_steps=12), data).train()


@pytest.mark.parametrize(
    "rows, error, words",
    [
        (
            Dataset.from_dict({"x": [1]}),
            ValueError,
            r"no `teacher_fingerprint` column, only \['x'\].*generate_sft_data",
        ),
        (Dataset.from_dict({"teacher_fingerprint": ["gpt-4"]}), ValueError, "'gpt-4' in its `teacher_fingerprint`"),
        (Dataset.from_dict({"teacher_fingerprint": [None, ""]}), ValueError, "No row of the training data names"),
        (Dataset.from_dict({"x": [1]}).to_iterable_dataset(), TypeError, "`IterableDataset` cannot be counted"),
    ],
)
def test_sft_data_that_names_nobody(tmp_path, answers, rows, error, words):
    with pytest.raises(error, match=words):
        TeacherStampCallback(make_trainer(tmp_path, answers), rows)


def test_rollouts_inherit_the_students_stamp_and_are_signed(student_dir, teacher_dir):
    rollouts = collect_rollouts(["w5", "w6"], str(student_dir), max_completion_length=4, seed=3)
    student = fingerprint_teacher(student_dir)
    assert set(rollouts["student_fingerprint"]) == {student.id}
    (about,) = record_of(rollouts)["students"]
    assert {**student.to_dict(), "evidence": "verified", "rows": 2}.items() <= about.items()
    assert about["sft_teachers"] == [fingerprint_teacher(teacher_dir).id]
    cut = rollouts["finish_reason"].count("length")
    sampling = {"num_generations": 1, "temperature": 0.8, "top_p": 1.0, "max_completion_length": 4, "seed": 3}
    how = {"engine": "transformers", "batch_size": 64, "rows_per_shard": 1024, "truncated": "keep"}
    assert about["sampling"] == {**sampling, **how, "truncated_answers": cut}
    # Sampled again by somebody else, the old signature goes.
    again = collect_rollouts(rollouts, str(teacher_dir), max_completion_length=4)
    assert set(again["student_fingerprint"]) == {fingerprint_teacher(teacher_dir).id}


def test_off_policy_rollouts_are_a_warning_with_the_measured_weights(
    tmp_path, teacher_dir, student_dir, tokenizer, caplog
):
    from tiny import make_args, save_student

    other = tmp_path / "other"
    save_student(other, make_model(seed=8), tokenizer, teacher_dir)
    rollouts = collect_rollouts(["w5", "w6"] * 4, str(student_dir), max_completion_length=4)
    table = score_rollouts(rollouts, str(teacher_dir), top_k=2)
    with caplog.at_level(logging.WARNING):
        trainer = OfflineOPDTrainer(str(other), make_args(tmp_path, max_steps=2, logging_steps=1), table)
        trainer.train()
    text = caplog.text
    assert text.count("Off-policy rollouts: train_dataset was sampled by 1 checkpoint (student@1-") == 1
    assert text.count("Off-policy rollouts, measured up to step 1: importance weights of mean") == 1
    logged = trainer.state.log_history[0]
    assert f"mean {logged['importance_weight/mean']:.3f}" in text and logged["importance_weight/std"] > 0.1
    caplog.clear()
    OfflineOPDTrainer(str(other), make_args(tmp_path), table.remove_columns("ref_logprobs"))
    assert "Without a `ref_logprobs` column" in caplog.text


def test_what_a_model_learnt_before_is_no_more_than_declared_if_it_was_changed_since(tmp_path, student_dir, answers):
    for change, evidence in ((0.0, {"verified"}), (0.5, {"declared", "verified"})):
        model = make_model(seed=2).from_pretrained(student_dir)
        with torch.no_grad():
            model.model.norm.weight += change
        callback = TeacherStampCallback(make_trainer(tmp_path, answers, model))
        assert {t["evidence"] for t in callback.sft_teachers} == evidence
