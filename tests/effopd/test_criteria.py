"""What may select a model, and in which direction: one list for the config's best model and for gates."""

from __future__ import annotations

import pytest
from test_effopd import make_quadratic
from tiny import make_args, make_trainer

from trl_lopd import EffOPDCallback, OfflineOPDTrainer
from trl_lopd.effopd.gates import MetricGate

SELECT = {"loss": False, "reverse_kl_topk": False, "top1_agreement": True}


def test_every_metric_selects_in_its_direction_or_is_refused(tmp_path, student_dir, table):
    """Of one held-out table and of several, with their names."""
    trainer = make_trainer(tmp_path, student_dir, table, eval_dataset={"math": table}, max_completion_length=6)
    keys = [*trainer.evaluate(), *trainer.evaluate(table)]
    assert {f"eval_{name}" for name in SELECT} | {f"eval_math_{name}" for name in SELECT} <= {*keys}
    assert {"eval_k3", "eval_truncated_completions", "eval_math_importance_weight/ess", "eval_runtime"} <= {*keys}
    for key in keys:
        name = key.removeprefix("eval_").removeprefix("math_")
        if name in SELECT:
            assert make_args(tmp_path, metric_for_best_model=key).greater_is_better is SELECT[name]
            assert (
                make_args(tmp_path, metric_for_best_model=key.removeprefix("eval_")).greater_is_better is SELECT[name]
            )
            assert EffOPDCallback(trainer, key, gate_dataset=table).sign == (-1.0 if SELECT[name] else 1.0)
        else:
            for options in ({}, {"greater_is_better": True}, {"greater_is_better": False}):
                with pytest.raises(ValueError, match=f"'{key}' .*does not tell whether the student got better"):
                    make_args(tmp_path, metric_for_best_model=key, **options)
                with pytest.raises(ValueError, match=f"'{key}' .*does not tell whether the student got better"):
                    EffOPDCallback(trainer, key, gate_dataset=table, **options)


def test_a_direction_that_contradicts_the_metric_is_refused(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table, eval_dataset=table)
    for name, greater_is_better in SELECT.items():
        words = f"'eval_{name}' is better if {'greater' if greater_is_better else 'lower'}"
        with pytest.raises(ValueError, match=words):
            make_args(tmp_path, metric_for_best_model=f"eval_{name}", greater_is_better=not greater_is_better)
        with pytest.raises(ValueError, match=words):
            EffOPDCallback(trainer, f"eval_{name}", greater_is_better=not greater_is_better)


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_a_metric_of_one_s_own_takes_a_direction(tmp_path, student_dir, table, greater_is_better):
    class Graded(OfflineOPDTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs) | {"eval_solved": 0.5}
            self.log(metrics)
            return metrics

    best = {"metric_for_best_model": "solved", "load_best_model_at_end": True}
    options = dict(eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2, max_steps=2) | best
    with pytest.raises(ValueError, match="'solved'.*`greater_is_better`"):
        make_args(tmp_path, **options)
    args = make_args(tmp_path, greater_is_better=greater_is_better, **options)
    trainer = Graded(str(student_dir), args, table, eval_dataset=table)
    with pytest.raises(ValueError, match="'eval_solved'.*`greater_is_better`"):
        EffOPDCallback(trainer, "eval_solved")
    trainer.add_callback(EffOPDCallback(trainer, "eval_solved", greater_is_better=greater_is_better))
    trainer.train()
    assert trainer.state.best_metric == 0.5


def test_metrics_of_other_trainers(tmp_path):
    """What is no quality of a model is refused there too; of the others only the loss is known."""
    trainer = make_quadratic(tmp_path, 1)
    assert MetricGate(trainer, "eval_loss").greater_is_better is False
    for key in ("eval_runtime", "eval_samples_per_second", "eval_math_steps_per_second", "epoch"):
        with pytest.raises(ValueError, match="does not tell"):
            MetricGate(trainer, key, greater_is_better=True)
    for key in ("eval_mean_token_accuracy", "eval_kl", "eval_perplexity"):
        with pytest.raises(ValueError, match="`greater_is_better`"):
            EffOPDCallback(trainer, key)
        assert EffOPDCallback(trainer, key, greater_is_better=True).sign == -1.0


def test_schedulers_that_read_the_metric_read_it_in_its_direction(tmp_path, student_dir, table):
    for metric, mode in (("eval_reverse_kl_topk", "min"), ("eval_top1_agreement", "max")):
        for scheduler in ("reduce_lr_on_plateau", "greedy"):
            trainer = make_trainer(
                tmp_path, student_dir, table, eval_dataset=table, eval_strategy="steps", lr_scheduler_type=scheduler,
                metric_for_best_model=metric,
            )  # fmt: skip
            trainer.create_optimizer_and_scheduler(4)
            assert trainer.lr_scheduler.mode == mode
    with pytest.raises(ValueError, match="mode"):
        make_args(
            tmp_path, eval_strategy="steps", lr_scheduler_type="reduce_lr_on_plateau",
            lr_scheduler_kwargs={"mode": "max"}, metric_for_best_model="eval_loss",
        )  # fmt: skip


def test_a_mistyped_metric_is_told_its_near_name(tmp_path):
    with pytest.raises(ValueError, match="no metric that is known here. Did you mean 'reverse_kl_topk'"):
        make_args(tmp_path, metric_for_best_model="eval_small/reverse_kl_topkk")
