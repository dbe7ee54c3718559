"""When the student has left its rollouts: the rule, the warning, and the command that it names."""

from __future__ import annotations

import logging
import math
import re
import shlex

import numpy as np
import pytest
import torch
from tiny import make_trainer

from trl_lopd.commands import RolloutArguments, ScoreArguments
from trl_lopd.training.monitoring.drift import MIN_ESS, has_left
from trl_lopd.training.objective import TokenValues, sequence_totals, summarize


def metrics_of(log_weights, windows=3):
    """As the trainer gets them: totals of batches, added up."""
    combined: dict = {}
    for part in np.array_split(log_weights, windows):
        ref = torch.zeros(len(part))
        logprobs = torch.tensor(part, dtype=torch.float32)
        tokens = TokenValues(logprobs, ref, per_token_loss=ref, entropy=ref, is_top1=ref, ref_logprobs=ref)
        totals = sequence_totals(tokens, torch.arange(len(part)) // 5, -(-len(part) // 5))
        for name, values in totals.items():
            value = values.amax(0) if name.endswith("max") else values.sum(0)
            value = value.double().numpy() if value.ndim else value.item()
            combined[name] = (
                value if name not in combined else (max if name.endswith("max") else np.add)(value, combined[name])
            )
    return summarize(combined)


def test_quantiles_of_windows_are_those_of_all_their_tokens():
    log_weights = np.random.default_rng(0).normal(-0.06, 0.3, 3001)
    metrics = metrics_of(log_weights)
    for percent in (1, 50, 99):
        exact = np.quantile(np.exp(log_weights), percent / 100, method="inverted_cdf")
        # Half the distance between two points of the grid, and float32.
        assert metrics[f"importance_weight/p{percent:02}"] == pytest.approx(exact, rel=math.expm1(0.01) + 1e-5)


def test_a_student_that_has_not_moved_has_weights_of_exactly_one():
    metrics = metrics_of(np.zeros(40))
    assert {metrics[f"importance_weight/{name}"] for name in ("mean", "max", "ess", "p01", "p50", "p99")} == {1.0}
    assert metrics["importance_weight/std"] == 0 and not has_left(metrics)


def test_weights_beyond_the_grid_are_at_its_ends_and_nan_is_no_index():
    metrics = metrics_of(np.array([-30.0, 0.0, 30.0] * 20))
    assert metrics["importance_weight/p01"] == pytest.approx(math.exp(-4))
    assert metrics["importance_weight/p99"] == pytest.approx(math.exp(4))
    broken = metrics_of(np.array([0.0, math.nan] * 20))
    assert math.isnan(broken["importance_weight/mean"]) and has_left(broken)


def test_the_threshold_is_where_chi_squared_is_one():
    """Of log-normal weights of mean 1, `E[w^2] - 1 = exp(s^2) - 1`."""
    rng, at = np.random.default_rng(1), math.sqrt(math.log(2))
    for factor, left in ((0.8, False), (1.2, True)):
        s = factor * at
        metrics = metrics_of(rng.normal(-(s**2) / 2, s, 40_000))
        # The standard error of the mean of w^2 is below 3 % at both.
        assert 1 / metrics["importance_weight/ess"] - 1 == pytest.approx(math.expm1(s**2), rel=0.15)
        assert has_left(metrics) is left
    # The paper's figures, with room to spare.
    assert 1 / (1 + (0.1 / 0.94) ** 2) > 0.98 > MIN_ESS


def command_of(caplog):
    """The commands of the warning, parsed by the command line, and the warning."""
    from trl import TrlParser

    (message,) = [record.message for record in caplog.records if "left its rollouts" in record.message]
    command = re.search(r"^trl-lopd rollout.*$", message, re.MULTILINE).group()
    rollout, score = (shlex.split(part) for part in command.split("&&"))
    (rollout,) = TrlParser(RolloutArguments).parse_args_and_config(rollout[2:])
    (score,) = TrlParser(ScoreArguments).parse_args_and_config(score[2:])
    return rollout, score, message


def test_warned_once_with_the_figures_and_a_command_that_parses(tmp_path, student_dir, table, caplog):
    near = make_trainer(tmp_path, student_dir, table, learning_rate=1e-6, max_steps=2)
    with caplog.at_level(logging.WARNING):
        near.train()
    assert "left its rollouts" not in caplog.text
    assert near.state.log_history[0]["importance_weight/p50"] == 1.0

    far = make_trainer(tmp_path, student_dir, table, learning_rate=0.1, max_steps=6)
    with caplog.at_level(logging.WARNING):
        far.train()
    logs = [log for log in far.state.log_history if "importance_weight/ess" in log]
    left = [log for log in logs if log["importance_weight/ess"] < MIN_ESS]
    assert len(left) > 1
    (message,) = [record.message for record in caplog.records if "left its rollouts" in record.message]
    assert f"measured up to step {left[0]['step']}:" in message
    assert f"effective sample size {left[0]['importance_weight/ess']:.1%}" in message
    assert f"98% of them between {left[0]['importance_weight/p01']:.2f}" in message

    rollout, score, message = command_of(caplog)
    assert rollout.model_name_or_path == far.args.output_dir and score.dataset_name == rollout.output_dir
    assert score.teacher == "TEACHER" and f"TEACHER is {table[0]['teacher_fingerprint']}" in message


def test_held_out_rows_have_their_weights(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table, table.select(range(7)))
    metrics = trainer.evaluate()
    assert metrics["eval_importance_weight/p01"] == metrics["eval_importance_weight/p99"] == 1.0
