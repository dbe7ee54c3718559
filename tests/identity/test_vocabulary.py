"""Teacher and student must mean the same by the ids in the rows; all else in their tokenizers may differ."""

from __future__ import annotations

import pytest
from tiny import VOCAB, make_model, make_tokenizer, save_student
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_lopd import (
    OfflineOPDConfig,
    OfflineOPDTrainer,
    TableError,
    TeacherConsistencyError,
    check_teacher_consistency,
    collect_rollouts,
    read_model_card,
    score_rollouts,
)
from trl_lopd.identity.cards import attach_record, record_of
from trl_lopd.identity.fingerprint import fingerprint_teacher


def tokenizer_with(swap=(), added=(), special=()):
    """That of the other tests, with two of its tokens in each other's place, tokens added, or other special roles."""
    vocab = make_tokenizer().get_vocab()
    if swap:
        vocab[swap[0]], vocab[swap[1]] = vocab[swap[1]], vocab[swap[0]]
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<pad>"
    )
    tokenizer.add_tokens(list(added))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


PROMPTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(3, 20)]
UNLIKE = {"swap": ("w7", "w8")}
ALIKE = [{"added": ["<think>", "<tool>"]}, {"special": ["w9"]}]


@pytest.fixture
def pair(tmp_path):
    """A student, its teacher with another tokenizer, and rollouts of the student."""

    def make(**teacher_tokenizer):
        teacher = tmp_path / "teacher"
        # As many models, its vocabulary is padded beyond its tokenizer's.
        make_model(seed=1, vocab=VOCAB + 8).save_pretrained(teacher)
        tokenizer_with(**teacher_tokenizer).save_pretrained(teacher)
        student = save_student(tmp_path / "student", make_model(seed=2), make_tokenizer(), teacher)
        rollouts = collect_rollouts(PROMPTS, str(student), max_completion_length=12, temperature=2.0)
        assert {7, 8} <= {id for ids in rollouts["completion_ids"] for id in ids}
        return str(student), str(teacher), rollouts

    return make


@pytest.mark.parametrize("text", [True, False])
def test_a_teacher_to_whom_the_ids_are_other_text_does_not_score(pair, text, monkeypatch, tmp_path):
    student, teacher, rollouts = pair(**UNLIKE)
    if text:
        with pytest.raises(TableError, match=r"id [78] is 'w[78]' to the teacher, but the text that was sampled"):
            score_rollouts(rollouts, teacher)
        # Found by its name in the record, beside the working directory.
        monkeypatch.chdir(tmp_path)
    else:
        rollouts = rollouts.remove_columns("completion")
    expected = r"id 7 is 'w7' to the student and 'w8' to the teacher; id 8 is 'w8' to the student"
    with pytest.raises(TableError, match=expected):
        score_rollouts(rollouts.remove_columns("ref_logprobs"), teacher, ref_model=student)
    if text:
        with pytest.raises(TableError, match=expected):
            score_rollouts(rollouts, teacher)


@pytest.mark.parametrize("difference", ALIKE)
def test_what_no_row_depends_on_may_differ(pair, difference, tmp_path):
    student, teacher, rollouts = pair(**difference)
    table = score_rollouts(rollouts, teacher, top_k=2)
    args = OfflineOPDConfig(tmp_path / "out", use_cpu=True, report_to="none")
    trainer = OfflineOPDTrainer(student, args, table)
    assert trainer.describe_round()["teacher_consistency"] == "verified"


def scored_unseen(rollouts, teacher):
    """A table as it was scored without anything to compare the tokenizers by."""
    rows = rollouts.remove_columns("completion")
    record = record_of(rows)
    attach_record(rows, {})
    table = score_rollouts(rows, teacher, top_k=2)
    attach_record(table, {**record_of(table), "students": record["students"]})
    return table


@pytest.mark.parametrize("difference", [UNLIKE, *ALIKE])
def test_what_nothing_tells_is_declared(pair, difference, caplog, monkeypatch, tmp_path):
    student, teacher, rollouts = pair(**difference)
    table = scored_unseen(rollouts, teacher)
    assert "nothing tells whether their ids mean the same" in caplog.text
    about = {"student_fingerprint": fingerprint_teacher(student)}
    with pytest.raises(TeacherConsistencyError, match="nothing tells whether both mean the same by the ids"):
        check_teacher_consistency(read_model_card(student), table, **about)
    assert check_teacher_consistency(
        read_model_card(student), table, teacher_consistency="declared_ok", **about
    ).consistent
    assert (
        check_teacher_consistency(read_model_card(student), table, teacher_consistency="warn", **about).evidence
        == "declared"
    )

    # With the teacher's tokenizer at hand, the rows settle it.
    monkeypatch.chdir(tmp_path)
    about["processing_class"] = make_tokenizer()
    verdict = check_teacher_consistency(read_model_card(student), table, teacher_consistency="off", **about)
    assert verdict.consistent == (difference is not UNLIKE)
    if difference is UNLIKE:
        for mode in ("strict", "declared_ok"):
            with pytest.raises(TeacherConsistencyError, match="id 7 is 'w7' to the student and 'w8' to the teacher"):
                check_teacher_consistency(read_model_card(student), table, teacher_consistency=mode, **about)
    else:
        assert verdict.evidence == "verified"


def test_a_stream_of_rows_scored_with_another_tokenizer_is_no_more_than_declared(pair, tmp_path):
    student, teacher, rollouts = pair(**ALIKE[0])
    stream = scored_unseen(rollouts, teacher).to_iterable_dataset()
    args = OfflineOPDConfig(tmp_path / "out", use_cpu=True, report_to="none", max_steps=1)
    with pytest.raises(TeacherConsistencyError, match="nothing tells whether both mean the same"):
        OfflineOPDTrainer(student, args, stream)
