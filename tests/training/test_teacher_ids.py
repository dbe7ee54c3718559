"""Tables of several teachers: weights of their rows, and metrics of each."""

from __future__ import annotations

import re

import numpy as np
import pytest
from test_trainer import check_gradient, plain_loss
from tiny import make_args, make_trainer, without_topk

from trl_lopd import EffOPDCallback, OfflineOPDTrainer, TableError, read_model_card
from trl_lopd.identity.cards import signatures
from trl_lopd.table.schema import teacher_counts

WEIGHTS = {"math": 1.5, "code": 0.25}


@pytest.fixture(scope="module")
def two(table):
    return table.add_column("teacher_id", ["math" if i % 3 else "code" for i in range(len(table))])


def of(table, teacher):
    return table.select(np.flatnonzero(np.array(table["teacher_id"]) == teacher))


@pytest.mark.parametrize("loss_type", ["topk", "sampled"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"max_tokens_per_device": 40}], ids=str)
def test_weights_multiply_the_gradient_of_their_rows(tmp_path, student_dir, two, loss_type, options):
    rows, accumulation = two.select(range(6)), options.get("gradient_accumulation_steps", 1)
    size = 6 // accumulation
    trainer = make_trainer(
        tmp_path, student_dir, rows, loss_type=loss_type, teacher_weights=WEIGHTS, per_device_train_batch_size=size,
        **options,
    )  # fmt: skip
    model = trainer.model
    parts = {teacher: of(rows, teacher) for teacher in WEIGHTS}
    assert all(len(part) > 1 for part in parts.values())
    expected = sum(
        WEIGHTS[t] * len(part) / 6 * plain_loss(model, part, loss_type, "sequence_mean") for t, part in parts.items()
    )
    check_gradient(trainer, expected)


def test_each_teacher_has_the_metrics_of_its_rows(tmp_path, student_dir, two):
    trainer = make_trainer(
        tmp_path, student_dir, two, eval_dataset=two, teacher_weights=WEIGHTS, per_device_eval_batch_size=5
    )
    plain = make_trainer(tmp_path, student_dir, two)
    metrics = trainer.evaluate()
    expected = {"": plain.evaluate(two.remove_columns("teacher_id"))}
    expected |= {f"{teacher}/": plain.evaluate(of(two, teacher).remove_columns("teacher_id")) for teacher in WEIGHTS}
    for teacher, values in expected.items():
        names = [name.removeprefix("eval_") for name in values if not re.search("second|time|epoch", name)]
        assert "reverse_kl_topk" in names and "loss" in names
        for name in names:
            assert metrics[f"eval_{teacher}{name}"] == pytest.approx(values[f"eval_{name}"], rel=1e-5, abs=1e-6), name
    # One teacher is what all rows have.
    assert not any("/reverse" in name for name in plain.evaluate(of(two, "math")))


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_a_stream_have_the_metrics_of_their_teachers(tmp_path, student_dir, two, workers):
    trainer = make_trainer(tmp_path, student_dir, two, per_device_eval_batch_size=5, dataloader_num_workers=workers)
    expected = trainer.evaluate(two)
    streamed = trainer.evaluate(two.to_iterable_dataset(num_shards=2))
    names = [name for name in expected if not re.search("second|time|epoch", name)]
    assert {"eval_math/reverse_kl_topk", "eval_code/loss"} <= {*names}
    for name in names:
        assert streamed[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    one = trainer.evaluate(of(two, "math").to_iterable_dataset())
    assert not any("/reverse" in name for name in one)


def test_the_best_model_can_be_that_of_one_teacher(tmp_path, student_dir, two):
    trainer = make_trainer(
        tmp_path, student_dir, two, eval_dataset=two, metric_for_best_model="eval_code/reverse_kl_topk",
        eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2, max_steps=4,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    seen = [log["eval_code/reverse_kl_topk"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.state.best_metric == min(seen) and len(set(seen)) == 2


EVALUATED = dict(eval_strategy="steps", eval_steps=2, max_steps=4)


@pytest.mark.parametrize(
    ("metric", "near"),
    [
        pytest.param("eval_mth/reverse_kl_topk", "eval_math/reverse_kl_topk", marks=pytest.mark.slow),
        ("mth/top1_agreement", "eval_math/top1_agreement"),
        ("eval_code_loss", "eval_code/loss"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused_at_once(tmp_path, student_dir, two, metric, near):
    def build(rows, evaluated, metric=metric):
        make_trainer(tmp_path, student_dir, rows, eval_dataset=evaluated, metric_for_best_model=metric, **EVALUATED)

    with pytest.raises(ValueError, match=f"`metric_for_best_model` is '(eval_)?{metric}'.*Did you mean '{near}'"):
        build(two, two)
    with pytest.raises(ValueError, match="Did you mean 'eval_held_loss'"):
        build(two, {"held": two, "other": of(two, "code")}, "eval_hold_loss")
    build(two, two, near)
    build(two, {"held": two}, "eval_held_math/loss")
    # Of a stream it is not known which teachers come.
    build(two, two.to_iterable_dataset(), "eval_mth/reverse_kl_topk")
    # Rows without top-k, of one teacher: only the loss.
    alone = without_topk(of(two, "math"))
    build(alone, alone, "eval_loss")
    for absent in ("eval_reverse_kl_topk", "eval_math/loss"):
        with pytest.raises(ValueError, match="an evaluation here gives only 'eval_loss'\\."):
            build(alone, alone, absent)


def test_a_metric_of_ones_own_evaluation_is_not_refused(tmp_path, student_dir, two):
    class Fresh(OfflineOPDTrainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_fresh_loss": 1.0}

    args = make_args(tmp_path, metric_for_best_model="eval_fresh_loss", **EVALUATED)
    Fresh(str(student_dir), args, two, eval_dataset=two).train()
    with pytest.raises(ValueError, match="'eval_fresh_loss'"):
        OfflineOPDTrainer(str(student_dir), args, two, eval_dataset=two)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_card_of_the_round_says_who_scored_which_rows(tmp_path, student_dir, two, streamed):
    rows = two.to_iterable_dataset() if streamed else two
    trainer = make_trainer(tmp_path, student_dir, rows)  # 6 steps of 4 rows: all of them
    trainer.train()
    trainer.save_model()
    (opd_round,) = read_model_card(tmp_path / "out")["opd_rounds"]
    (teacher,) = opd_round["teachers"]
    assert teacher["teacher_ids"] == {name: len(of(two, name)) for name in ("code", "math")}
    assert opd_round["rows"] == teacher["rows"] == len(two)
    # What a check by row reads.
    assert signatures(opd_round["teachers"]) == teacher_counts(two)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"math": 1.0}, "row 0: its `teacher_id` is 'code'"),
        (WEIGHTS | {"law": 1.0}, "no row of `train_dataset` has that `teacher_id`"),
    ],
)
def test_rows_and_weights_belong_together(tmp_path, student_dir, two, weights, match):
    with pytest.raises(TableError, match=match):
        make_trainer(tmp_path, student_dir, two, teacher_weights=weights)
    with pytest.raises(TableError, match="weighs rows by their column `teacher_id`"):
        make_trainer(tmp_path, student_dir, two.remove_columns("teacher_id"), teacher_weights=weights)


def test_a_row_of_a_stream_without_a_weight_is_named(tmp_path, student_dir, two):
    trainer = make_trainer(tmp_path, student_dir, two.to_iterable_dataset(), teacher_weights={"code": 1.0})
    with pytest.raises(TableError, match="its `teacher_id` is 'math'"):
        trainer.train()


@pytest.mark.parametrize(
    "weights", [{}, {"math": -1.0}, {"math": float("nan")}, {"math": True}, {"math": 0.0}], ids=str
)
def test_what_is_no_weight(tmp_path, weights):
    with pytest.raises(ValueError, match="`teacher_weights`"):
        make_args(tmp_path, teacher_weights=weights)


class Gate:
    """Candidates gain much on one teacher's rows, and lose a little on the other's."""

    greater_is_better = False

    def __init__(self, rows, loss):
        self.teacher_ids, self.loss, self.calls = np.array(rows["teacher_id"], dtype=object), loss, 0
        self.teacher_ids[0] = None  # not known

    def __call__(self, model):
        self.calls += 1
        noise = np.random.default_rng(self.calls).normal(0, 0.01, len(self.teacher_ids))
        change = np.where(self.teacher_ids == "math", -1.0, self.loss)
        return 5.0 + noise + (self.calls > 1) * change


@pytest.mark.parametrize(
    ("loss", "each_teacher", "accepted"), [(0.2, True, 1), (0.2, False, 3), (-0.2, True, 3), (0.0, True, 3)]
)
def test_effopd_gains_on_no_teacher_at_the_cost_of_another(
    tmp_path, student_dir, two, loss, each_teacher, accepted
):  # fmt: skip
    trainer = make_trainer(tmp_path, student_dir, two, max_steps=2)
    callback = EffOPDCallback(trainer, Gate(two, loss), schedule=[1], scales=(3,), each_teacher=each_teacher)
    trainer.add_callback(callback)
    trainer.train()
    (search,) = callback.history
    assert search["accepted"] == accepted
    assert search["worse_on"] == (["code"] if accepted == 1 else [])
