"""Training on what `residualize_table` leaves of another teacher's scores."""

from __future__ import annotations

import logging

import pytest
from datasets import IterableDataset
from test_trainer import check_gradient, plain_loss
from tiny import make_args, make_model, make_rollouts, make_trainer

from trl_lopd import (
    OfflineOPDTrainer,
    TableError,
    TeacherConsistencyError,
    check_teacher_consistency,
    load_table,
    read_model_card,
    residualize_table,
    score_rollouts,
    stamp_dataset_card,
)


@pytest.fixture(scope="module")
def foreign(tokenizer, student_dir):
    """Rows that another teacher scored."""
    return score_rollouts(
        make_rollouts(24, seed=5), make_model(seed=9), processing_class=tokenizer, top_k=4, ref_model=str(student_dir)
    )


@pytest.fixture(scope="module")
def residual(foreign):
    return residualize_table(foreign)


def test_the_gradient_is_that_of_the_residual_scores(tmp_path, student_dir, residual):
    rows = residual.select(range(6))
    trainer = make_trainer(tmp_path, student_dir, rows, per_device_train_batch_size=6)
    scores = rows.rename_column("residual_logprobs", "teacher_logprobs")
    assert trainer.loss_type == "sampled"
    check_gradient(trainer, plain_loss(trainer.model, scores, "sampled", "sequence_mean"))


@pytest.mark.parametrize("streamed", [False, True])
def test_log_and_cards_say_residual(tmp_path, student_dir, foreign, residual, streamed, caplog):
    with pytest.raises(TeacherConsistencyError, match="Teacher mismatch"):
        make_trainer(tmp_path, student_dir, foreign)
    rows = residual
    if streamed:
        (tmp_path / "table").mkdir()
        residual.to_parquet(tmp_path / "table" / "train.parquet")
        stamp_dataset_card(tmp_path / "table", residual)
        rows = load_table(tmp_path / "table", split="train", streaming=True)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, student_dir, rows, max_steps=2)
    assert "which are not those of the teacher that wrote the SFT data" in caplog.text
    trainer.train()
    trainer.save_model()
    card = read_model_card(tmp_path / "out")
    (round,) = card["opd_rounds"]
    assert (round["teacher_consistency"], round["objective"]) == ("residual", "sampled")
    (scored_by,) = foreign.unique("teacher_fingerprint")
    assert [teacher["id"] for teacher in round["teachers"]] == [scored_by]
    assert round["residual"][0]["folds"] == 5
    assert [entry["id"] for entry in card["sft_teachers"]] != [entry["id"] for entry in round["teachers"]]

    # A later round is told.
    later = check_teacher_consistency(card, [card["sft_teachers"][0]["id"]], student=str(tmp_path / "out"))
    assert any("Round 1" in warning and "on residual scores" in warning for warning in later.warnings)


def test_the_card_says_residual_with_the_check_off(tmp_path, student_dir, residual):
    trainer = make_trainer(tmp_path, student_dir, residual, max_steps=1, teacher_consistency="off")
    round = trainer.describe_round()
    assert round["teacher_consistency"] == "off" and round["residual"][0]["rows"] == 24


def test_metrics_that_need_a_probability_are_left_out(tmp_path, student_dir, foreign, residual):
    logs = {}
    for name, rows in {"scores": foreign, "residual": residual}.items():
        trainer = make_trainer(
            tmp_path, student_dir, rows, eval_dataset=rows, loss_type="sampled", teacher_consistency="off", max_steps=1
        )
        trainer.train()
        logs[name] = {key for log in [*trainer.state.log_history, trainer.evaluate()] for key in log}
    of_probabilities = {"frozen_log_ratio", "k3", "reverse_kl_weighted", "reverse_kl_topk", "top1_agreement"}
    expected = of_probabilities | {f"eval_{name}" for name in of_probabilities}
    assert logs["scores"] - logs["residual"] == expected and not logs["residual"] - logs["scores"]
    assert {"eval_huber", "advantage/std", "importance_weight/mean"} <= logs["residual"]


def test_a_residual_has_no_topk_objective(tmp_path, student_dir, residual):
    with pytest.raises(ValueError, match="a residual table has none.*loss_type='sampled'"):
        make_trainer(tmp_path, student_dir, residual, loss_type="topk")


def test_a_stream_does_not_mix_residuals_and_scores(tmp_path, student_dir, foreign, residual):
    rows = [*residual.to_list()[:4], *foreign.remove_columns(["teacher_topk_ids", "teacher_topk_logprobs"]).to_list()]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path), stream)
    with pytest.raises(TableError, match="column `teacher_logprobs`: present, but the first row of the stream lacks"):
        trainer.train()


def test_a_checkpoint_is_resumed_on_the_same_fit(tmp_path, student_dir, foreign, residual):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, loss_type="sampled")
    make_trainer(tmp_path, student_dir, residual, **options).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    for rows in (residualize_table(foreign, folds=3), foreign):
        trainer = make_trainer(tmp_path, student_dir, rows, **options, teacher_consistency="off")
        with pytest.raises(ValueError, match="`residual` was "):
            trainer.train(resume_from_checkpoint=checkpoint)
    make_trainer(tmp_path, student_dir, residual, **options).train(resume_from_checkpoint=checkpoint)
