"""EffOPD in one process: the search, its gates, and what it leaves alone."""

from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import make_args, make_experts, make_model, make_rollouts, save_student, without_topk
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen3NextConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from trl_lopd import EffOPDCallback, OfflineOPDTrainer, RewardGate, read_model_card
from trl_lopd.effopd.callback import HISTORY, Shards
from trl_lopd.effopd.gates import MetricGate, paired_p_value

# ---- A quadratic, and a trainer that is not ours ----

CURVATURE, OPTIMUM = torch.tensor([1.0, 0.3]), torch.tensor([3.0, -2.0])


class Quadratic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2))

    def value(self) -> torch.Tensor:
        return 0.5 * (CURVATURE * (self.w - OPTIMUM) ** 2).sum()

    def forward(self, x):
        return {"loss": self.value()}


def make_quadratic(tmp_path, steps, rate=0.01):
    args = TrainingArguments(
        str(tmp_path), max_steps=steps, learning_rate=rate, optim="sgd", lr_scheduler_type="constant", use_cpu=True,
        max_grad_norm=0, report_to="none", save_strategy="no", per_device_train_batch_size=1,
    )  # fmt: skip
    return Trainer(Quadratic(), args, train_dataset=Dataset.from_dict({"x": [[0.0]] * 4}))


def by_hand(steps, rate, scales, search, due):
    """The same in plain arithmetic: the weights, and what was accepted."""

    def value(w):
        return float(0.5 * (CURVATURE.double() * (w - OPTIMUM.double()) ** 2).sum())

    w = base = torch.zeros(2, dtype=torch.float64)
    accepted = []
    for step in range(1, steps + 1):
        w = w - rate * CURVATURE.double() * (w - OPTIMUM.double())
        if step not in due:
            continue
        values = {m: value(base + m * (w - base)) for m in (1, *scales)}
        best = 1
        for m in scales:
            if values[m] < values[best]:
                best = m
            elif search == "first_fail":
                break
        w = base = base + best * (w - base)
        accepted.append(best)
    return w, accepted


@pytest.mark.parametrize("search", ["first_fail", "best"])
def test_on_a_quadratic_the_search_finds_the_best_scale(tmp_path, search):
    trainer = make_quadratic(tmp_path, 16)
    callback = EffOPDCallback(
        trainer, lambda model: float(model.value()), greater_is_better=False, parameters="all", search=search,
        schedule=[1, 2, 4, 8, 16, 32],
    )  # fmt: skip
    trainer.add_callback(callback)
    trainer.train()
    expected, accepted = by_hand(16, 0.01, (3, 5, 7, 9, 11), search, {1, 2, 4, 8, 16})
    assert [search["accepted"] for search in callback.history] == accepted and max(accepted) > 1
    torch.testing.assert_close(trainer.model.w.double(), expected, atol=1e-5, rtol=0)
    plain = make_quadratic(tmp_path, 16)
    plain.train()
    assert trainer.model.value() < plain.model.value()


def test_the_history_adds_up(tmp_path, capsys):
    trainer = make_quadratic(tmp_path, 9)
    callback = EffOPDCallback(trainer, lambda m: float(m.value()), greater_is_better=False, parameters="all")
    trainer.add_callback(callback)
    trainer.train()
    assert [search["step"] for search in callback.history] == [1, 2, 4, 8]
    file = json.loads((tmp_path / HISTORY).read_text())
    assert file["searches"] == callback.history
    steps, before = 9.0, 0
    for search in callback.history:
        assert search["scores"]["1"] == pytest.approx(float(search["scores"]["1"]))
        assert min(search["scores"].values()) == search["scores"][str(search["accepted"])]
        steps += (search["accepted"] - 1) * (search["step"] - before)
        before = search["step"]
    summary = file["summary"]
    assert (summary["steps"], summary["equivalent_steps"], summary["searches"]) == (9, steps, 4)
    assert summary["search_seconds"] == pytest.approx(sum(s["seconds"] for s in callback.history), abs=0.01)
    # Gradient descent on a quadratic bends little in two steps.
    assert callback.history[0]["delta_cosine"] is None and callback.history[1]["delta_cosine"] > 0.9
    logged = [entry for entry in trainer.state.log_history if "effopd/accepted" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 4, 8] and logged[0]["effopd/score_3"] > 0
    assert "EffOPD: 9 steps that went as far as" in capsys.readouterr().out


def test_the_default_schedule_waits_longer_after_each_search_in_vain_and_eight_steps_after_a_success(tmp_path):
    trainer = make_quadratic(tmp_path, 100)
    accept = iter([False, True, False, True, True, True, False, False, True, True, False])
    outcomes = {}

    def gate(model):
        calls = outcomes.setdefault(trainer.state.global_step, [])
        if not calls:
            calls.append(next(accept))
            return 1.0
        calls.append(None)
        return 0.5 if calls[0] and len(calls) == 2 else 2.0

    callback = EffOPDCallback(trainer, gate, greater_is_better=False, parameters="all")
    trainer.add_callback(callback)
    trainer.train()
    assert [search["step"] for search in callback.history] == [1, 2, 4, 8, 16, 24, 32, 48, 80, 88, 96]
    assert [search["accepted"] > 1 for search in callback.history] == [0, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"schedule": lambda i: 2**i}, "`schedule` is a list of steps"),
        ({"schedule": 4}, "`schedule` is a list of steps"),
        ({"schedule": "2,4"}, "`schedule` is a list of steps"),
        ({"schedule": []}, "`schedule` is a list of steps"),
        ({"schedule": [0, 2]}, "`schedule` is a list of steps"),
        ({"schedule": [1, 2.5]}, "`schedule` is a list of steps"),
        ({"schedule": ["1"]}, "`schedule` is a list of steps"),
        ({"parameters": "(("}, "no regular expression"),
        ({"scales": 3}, "`scales` are ascending"),
    ],
)
def test_options_are_checked_before_training(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        EffOPDCallback(make_quadratic(tmp_path, 1), lambda model: 0.0, greater_is_better=False, **options)


def test_a_schedule_of_one_s_own(tmp_path):
    trainer = make_quadratic(tmp_path, 6)
    callback = EffOPDCallback(trainer, lambda m: 0.0, greater_is_better=False, parameters="all", schedule=[2, 3, 5])
    trainer.add_callback(callback)
    trainer.train()
    assert [search["step"] for search in callback.history] == [2, 3, 5]


def test_a_run_is_not_resumed_without_its_searches(tmp_path, table, student_dir):
    def start(steps, with_searches):
        args = make_args(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2)
        trainer = OfflineOPDTrainer(str(student_dir), args, table)
        if with_searches:
            values = iter(range(100, 0, -1))
            callback = EffOPDCallback(trainer, lambda model: float(next(values)), greater_is_better=False)
            trainer.add_callback(callback)
        return trainer

    start(2, True).train()
    with pytest.raises(ValueError, match="added `effopd` to its record"):
        start(4, False).train(resume_from_checkpoint=True)
    start(4, True).train(resume_from_checkpoint=True)


# ---- What is left alone ----


def train(tmp_path, table, student_dir, gate, steps=4, add=True, **options):
    args = make_args(tmp_path, max_steps=steps, learning_rate=1e-3)
    trainer = OfflineOPDTrainer(str(student_dir), args, table)
    callback = EffOPDCallback(trainer, gate, greater_is_better=False, **options)
    if add:
        trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_a_rejected_search_leaves_training_bit_for_bit_as_it_was(tmp_path, table, student_dir):
    worse = iter(range(1000))
    with_searches, callback = train(tmp_path, table, student_dir, lambda model: float(next(worse)))
    without, _ = train(tmp_path, table, student_dir, lambda model: 0.0, add=False)
    assert [search["accepted"] for search in callback.history] == [1, 1, 1]
    for (name, a), b in zip(weights(with_searches.model).items(), weights(without.model).values(), strict=True):
        assert torch.equal(a, b), name


def test_attention_and_mlp_move_and_nothing_else(tmp_path, table, student_dir):
    seen = []
    calls = iter(range(1000))

    def better_and_better(model):
        seen.append(weights(model))
        return -float(next(calls))

    train(tmp_path, table, student_dir, better_and_better, steps=1, scales=(3, 5))
    at_1, at_3, at_5 = seen[:3]
    start = weights(make_model(seed=2))
    for name, value in at_1.items():
        moves = (".self_attn." in name or ".mlp." in name) and "norm" not in name
        for m, moved in ((3, at_3), (5, at_5)):
            expected = start[name] + m * (value - start[name]) if moves else value
            torch.testing.assert_close(moved[name], expected, atol=1e-6, rtol=0)
        assert moves == (not torch.equal(at_3[name], value)), name


def test_parameters_are_chosen_by_name(tmp_path, table, student_dir):
    seen = []

    def gate(model):
        seen.append(weights(model))
        return 0.0

    train(tmp_path, table, student_dir, gate, steps=1, parameters=r"layers\.1\.mlp|embed")
    moved = {name for name, value in seen[0].items() if not torch.equal(value, seen[1][name])}
    assert moved and all("layers.1.mlp" in name or "embed" in name for name in moved)
    with pytest.raises(ValueError, match="nothing to move.*'nowhere'.*model.embed_tokens.weight"):
        train(tmp_path, table, student_dir, gate, parameters="nowhere")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_rejected(tmp_path, table, student_dir, bad):
    values = iter([1.0, bad, 1.0, 0.5, bad, 1.0, 0.5, 0.4, 0.6])
    _, callback = train(tmp_path, table, student_dir, lambda model: next(values))
    assert [search["accepted"] for search in callback.history] == [1, 3, 5]


def test_an_error_in_the_gate_is_raised_with_the_weights_as_they_were(tmp_path, table, student_dir):
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path, max_steps=4, learning_rate=1e-3), table)
    seen = []

    def gate(model):
        seen.append(weights(model))
        if len(seen) == 3:
            raise KeyError("out of prompts")
        return -float(len(seen))

    trainer.add_callback(EffOPDCallback(trainer, gate, greater_is_better=False))
    with pytest.raises(KeyError, match="out of prompts"):
        trainer.train()
    for name, value in weights(trainer.model).items():
        assert torch.equal(value, seen[0][name]), name
    assert trainer.model.training


def test_bf16_weights_come_back_bit_for_bit(tmp_path, table, student_dir):
    args = make_args(tmp_path, max_steps=2, learning_rate=1e-2, model_init_kwargs={"dtype": "bfloat16"})
    trainer = OfflineOPDTrainer(str(student_dir), args, table)
    seen, calls = [], iter([0.0, -1.0, 5.0, 0.0, 5.0])

    def gate(model):
        seen.append(weights(model))
        return next(calls)

    callback = EffOPDCallback(trainer, gate, greater_is_better=False)
    trainer.add_callback(callback)
    trainer.train()
    assert [search["accepted"] for search in callback.history] == [3, 1]
    assert next(iter(weights(trainer.model).values())).dtype == torch.bfloat16
    for name, value in weights(trainer.model).items():
        assert torch.equal(value, seen[3][name]), name


def test_three_searches_in_vain_are_worth_a_word(tmp_path, table, student_dir, caplog):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, table, student_dir, lambda model: 0.0, steps=8)
    assert caplog.text.count("None of the first 3 searches of EffOPD accepted anything") == 1


# ---- Gates ----


def test_the_default_gate_reads_held_out_rows(tmp_path, table, student_dir):
    args = make_args(tmp_path, max_steps=4, learning_rate=1e-4, eval_strategy="no")
    trainer = OfflineOPDTrainer(
        str(student_dir), args, table.select(range(12)), eval_dataset=table.select(range(12, 24))
    )
    evaluated = []

    class Listener(TrainerCallback):
        def on_evaluate(self, *args, **kwargs):
            evaluated.append(1)

    trainer.add_callback(Listener())
    callback = EffOPDCallback(trainer, gate_rows=8)
    trainer.add_callback(callback)
    trainer.train()
    held_out = table.select(range(12, 20))
    assert callback.gate.rows.to_dict() == held_out.to_dict()
    assert not evaluated and not any("eval_loss" in entry for entry in trainer.state.log_history)
    # A value a row, and their mean over tokens is what `evaluate` says.
    values = trainer.reverse_kl_of_rows(held_out)
    tokens = np.array([len(ids) for ids in held_out["completion_ids"]])
    assert values.shape == (8,)
    expected = trainer.evaluate(held_out)["eval_reverse_kl_topk"]
    assert float(values @ tokens / tokens.sum()) == pytest.approx(expected, abs=1e-6)
    last = callback.history[-1]
    assert last["step"] == 4
    assert last["scores"][str(last["accepted"])] == pytest.approx(values.mean(), abs=1e-6)
    trainer.save_model()
    (of_card,) = read_model_card(args.output_dir)["opd_rounds"]
    assert (of_card["effopd"]["steps"], of_card["effopd"]["searches"]) == (4, 3)


@pytest.mark.parametrize("gate", [None, pytest.param("eval_reverse_kl_topk", marks=pytest.mark.slow)])
def test_evaluations_read_the_rows_they_are_given_when_workers_persist(tmp_path, table, student_dir, gate):
    """Before, in between and after, on the gate's rows, on the trainer's and on others."""
    args = dict(dataloader_num_workers=1, dataloader_persistent_workers=True, max_steps=2, learning_rate=1e-9)
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path, **args), table, eval_dataset=table)
    callback = EffOPDCallback(trainer, gate, gate_rows=4, gate_dataset=table.select(range(4)))
    trainer.add_callback(callback)
    trainer.train()
    fresh = OfflineOPDTrainer(str(student_dir), make_args(tmp_path), table, eval_dataset=table)
    for rows in (None, table.select(range(4)), table.select(range(4, 12)), None):
        values = [t.evaluate(rows)["eval_reverse_kl_topk"] for t in (trainer, fresh)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    trainer.eval_dataset = table.select(range(6))
    assert trainer.evaluate()["eval_reverse_kl_topk"] == pytest.approx(
        fresh.evaluate(table.select(range(6)))["eval_reverse_kl_topk"], rel=1e-4
    )


def test_gates_of_other_trainers_leave_their_evaluations_alone_when_workers_persist(tmp_path):
    rows = [{"x": [float(i)]} for i in range(8)]

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, return_loss=True):
            return {"loss": (x - self.w).mean()}

    args = TrainingArguments(
        str(tmp_path), max_steps=1, learning_rate=1e-9, use_cpu=True, report_to="none", save_strategy="no",
        dataloader_num_workers=1, dataloader_persistent_workers=True, per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer = Trainer(Mean(), args, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:4]))
    gate = MetricGate(trainer, "eval_loss", Dataset.from_list(rows[6:]))
    assert gate(trainer.model) == pytest.approx(6.5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(1.5)
    assert gate(trainer.model) == pytest.approx(6.5)


def test_there_must_be_something_to_gate_with(tmp_path, table, student_dir):
    args = make_args(tmp_path, max_steps=1)
    no_eval = OfflineOPDTrainer(str(student_dir), args, table)
    with pytest.raises(ValueError, match="held-out rows.*`gate_dataset`.*got no rows"):
        EffOPDCallback(no_eval)
    with pytest.raises(ValueError, match="`gate_dataset` is for the default gate"):
        EffOPDCallback(no_eval, lambda model: 1.0, gate_dataset=table)
    sampled = OfflineOPDTrainer(str(student_dir), args, without_topk(table), eval_dataset=without_topk(table))
    with pytest.raises(ValueError, match=f"got {len(table)} rows with the columns.*`RewardGate`"):
        EffOPDCallback(sampled)
    for key in ("eval_huber", "eval_frozen_log_ratio", "eval_loss"):
        with pytest.raises(ValueError, match=f"'{key}' does not tell whether the student got better"):
            EffOPDCallback(sampled, key)
    with pytest.raises(ValueError, match="The default gate.*got no rows and a `Trainer`"):
        EffOPDCallback(make_quadratic(tmp_path, 1))
    with pytest.raises(ValueError, match="`greater_is_better`"):
        EffOPDCallback(no_eval, lambda model: 0.0)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scales": ()}, "`scales`"),
        ({"scales": (3, 2)}, "`scales`"),
        ({"scales": (1, 3)}, "above 1"),
        ({"search": "all"}, "`search`"),
        ({"significance": 0}, "`significance`"),
        ({"gate_rows": 1}, "`gate_rows`"),
        ({"min_improvement": -1}, "`min_improvement`"),
    ],
)
def test_options_out_of_range(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        EffOPDCallback(make_quadratic(tmp_path, 1), lambda model: 0.0, greater_is_better=False, **options)


def test_sft_of_trl_with_its_own_metric(tmp_path):
    rows = make_rollouts(24)
    data = Dataset.from_list(
        [
            {"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)}
            for p, c in zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
        ]
    )
    from tiny import make_tokenizer

    args = SFTConfig(
        str(tmp_path), max_steps=8, learning_rate=1e-4, use_cpu=True, bf16=False, report_to="none", max_length=None,
        per_device_train_batch_size=8, save_strategy="no", logging_steps=4, activation_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        make_model(seed=2), args, train_dataset=data.select(range(16)), eval_dataset=data.select(range(16, 24)),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    callback = EffOPDCallback(trainer, "eval_loss")
    trainer.add_callback(callback)
    trainer.train()
    assert not callback.gate.greater_is_better and len(callback.history) == 4
    assert callback.history[-1]["scores"]["1"] > 0 and all(s["p_value"] is None for s in callback.history)
    training = [entry for entry in trainer.state.log_history if "mean_token_accuracy" in entry]
    assert [entry["step"] for entry in training] == [4, 8]  # the trainer's own logs, whole
    with pytest.raises(ValueError, match="'eval_nothing' is none of what `evaluate` gives"):
        MetricGate(trainer, "eval_nothing", greater_is_better=True)(trainer.model)


def test_online_distillation_of_trl(tmp_path, tokenizer):
    """Its evaluation samples from the student, so a gate on rewards or on a function of the model fits it too."""
    student, teacher = make_model(seed=2), make_model(seed=1)
    prompts = Dataset.from_dict({"prompt": ["w5 w6 w7", "w8 w9"] * 4})
    args = DistillationConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, max_completion_length=6, learning_rate=1e-3,
        temperature=1.0, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", logging_steps=1,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillationTrainer(student, teacher, args, train_dataset=prompts, processing_class=tokenizer)
    ids = torch.randint(3, 32, (16, 8), generator=torch.Generator().manual_seed(0))

    def reverse_kl(model):
        p, q = (m(ids).logits.log_softmax(-1) for m in (model, teacher))
        return (p.exp() * (p - q)).sum(-1).mean(-1)

    callback = EffOPDCallback(trainer, reverse_kl, greater_is_better=False, schedule=[1, 3], significance=1.0)
    trainer.add_callback(callback)
    before = reverse_kl(student).mean().item()
    trainer.train()
    assert [search["step"] for search in callback.history] == [1, 3]
    assert any(search["accepted"] > 1 for search in callback.history)
    assert reverse_kl(student).mean().item() < before
    logged = [log for log in trainer.state.log_history if "effopd/accepted" in log]
    assert len(logged) == 2 and sum("completions/mean_length" in log for log in trainer.state.log_history) >= 4


def test_min_improvement_and_greater_is_better(tmp_path):
    for gate, options, accepted in (
        (lambda m: -float(m.value()), {"greater_is_better": True}, True),
        (lambda m: m.value().bfloat16(), {"greater_is_better": False}, True),
        (lambda m: float(m.value()), {"greater_is_better": True}, False),
        (lambda m: float(m.value()), {"greater_is_better": False, "min_improvement": 1e6}, False),
    ):
        trainer = make_quadratic(tmp_path, 1)
        callback = EffOPDCallback(trainer, gate, parameters="all", **options)
        trainer.add_callback(callback)
        trainer.train()
        assert (callback.history[0]["accepted"] > 1) == accepted
        assert np.sign(callback.history[0]["scores"]["1"]) == np.sign(float(gate(Quadratic())))


def test_answers_are_graded_with_the_same_seeds(tmp_path, table, student_dir):
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path, max_steps=1), table)
    prompts = Dataset.from_dict({"prompt": ["w5 w6", "w7", "w8"], "wanted": [5, 6, 7]})
    given = []

    def count(prompts, completions, completion_ids, wanted):
        given.append((prompts, completions, wanted))
        return [float(w in ids) for ids, w in zip(completion_ids, wanted, strict=True)]

    def nothing(completions, **_):
        return [None] * len(completions)

    gate = RewardGate(trainer, prompts, [count, nothing, lambda completions, **_: [10.0] * len(completions)],
                      max_completion_length=8, temperature=1.0)  # fmt: skip
    state = torch.get_rng_state()
    first, second = gate(trainer.model), gate(trainer.model)
    assert first == second and len(first) == 3 and all(value in (10.0, 11.0) for value in first)
    assert given[0] == given[1] and given[0][0] == prompts["prompt"] and given[0][2] == [5, 6, 7]
    assert torch.equal(torch.get_rng_state(), state)
    callback = EffOPDCallback(trainer, gate)
    assert callback.sign == -1.0
    trainer.add_callback(callback)
    trainer.train()
    assert set(callback.history[0]["scores"]) >= {"1", "3"}


def test_the_paired_test_is_one():
    rng = np.random.default_rng(1)
    null = [paired_p_value(rng.standard_t(3, 50), flips=199) for _ in range(300)]
    # Uniform where there is nothing: as many below a level as it says.
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(null) <= level) == pytest.approx(level, abs=3 * (level * (1 - level) / 300) ** 0.5)
    assert paired_p_value(rng.normal(1.0, 1.0, 50)) <= 0.01
    assert paired_p_value(rng.normal(-1.0, 1.0, 50)) >= 0.99
    # Three gains that differ from 0: one of eight sign patterns is as large, wherever the rows are.
    for rows in ([0, 1, 2], [3, 17, 40], [10, 48, 49]):
        gains = np.zeros(50)
        gains[rows] = 0.3, 0.6, 0.1
        assert paired_p_value(gains) == pytest.approx(1 / 8, abs=0.03)
    assert paired_p_value(np.ones(50)) == paired_p_value(np.ones(50)) <= 0.001


# ---- Adapters ----


def test_of_lora_the_second_factor_moves(tmp_path, table, student_dir):
    from peft import LoraConfig

    args = make_args(tmp_path, max_steps=2, learning_rate=1e-2)
    trainer = OfflineOPDTrainer(str(student_dir), args, table, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    seen = []

    def gate(model):
        seen.append(weights(model))
        return 0.0

    trainer.add_callback(EffOPDCallback(trainer, gate, greater_is_better=False))
    trainer.train()
    for name, value in seen[0].items():
        assert torch.equal(value, seen[1][name]) != ("lora_B" in name), name


def test_moving_the_second_factor_follows_the_product_where_moving_both_does_not():
    """B A extrapolated, beside the two ways that keep the factors: Adam steps on both from B = 0, as in training."""
    torch.manual_seed(0)
    a = (torch.randn(4, 64) / 8).requires_grad_()
    b = torch.zeros(48, 4, requires_grad=True)
    target = torch.randn(48, 4) @ torch.randn(4, 64) / 8
    optimizer = torch.optim.Adam([a, b], lr=1e-2)
    marks = {}
    for step in range(33):
        marks[step] = (a.detach().clone(), b.detach().clone())
        optimizer.zero_grad()
        ((b @ a - target) ** 2).sum().backward()
        optimizer.step()

    def errors(start, end, m):
        (a0, b0), (a1, b1) = marks[start], marks[end]
        wanted = b0 @ a0 + m * (b1 @ a1 - b0 @ a0)
        both = (b0 + m * (b1 - b0)) @ (a0 + m * (a1 - a0))
        second = (b0 + m * (b1 - b0)) @ a1
        return [float((way - wanted).norm() / (wanted - b0 @ a0).norm()) for way in (second, both)]

    second, both = errors(0, 4, 11)
    assert second < 1e-6 < both  # from B = 0, exactly
    for start, end in ((1, 2), (2, 4), (4, 8), (8, 16), (16, 32)):
        for m in (3, 7, 11):
            second, both = errors(start, end, m)
            assert second < both, (start, end, m)


@pytest.mark.parametrize(
    "config, stays",
    [
        (
            LlamaConfig(
                hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=32
            ),
            r"norm|embed_tokens|lm_head",
        ),
        (
            OPTConfig(
                hidden_size=8, ffn_dim=16, num_attention_heads=2, word_embed_proj_dim=8, num_hidden_layers=2,
                vocab_size=32,
            ),
            r"norm|embed_|lm_head",
        ),
        (
            Qwen3NextConfig(
                hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
                linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
                num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
                num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], vocab_size=32,
            ),
            r"norm|embed_tokens|lm_head",
        ),
        (make_experts("qwen3_moe").config, r"norm|embed_tokens|lm_head"),
        (make_experts("mixtral").config, r"norm|embed_tokens|lm_head"),
        (make_experts("gpt_oss").config, r"norm|embed_tokens|lm_head"),
        (MambaConfig(hidden_size=8, state_size=4, num_hidden_layers=2, vocab_size=32), r"norm|embeddings|lm_head"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)  # fmt: skip
def test_all_of_a_layer_but_its_norms_moves_whatever_its_parts_are_called(config, stays):
    model = AutoModelForCausalLM.from_config(config)
    names = [name for name, _ in model.named_parameters()]
    expected = [name for name in names if not re.search(stays, name)]
    accelerator = SimpleNamespace(num_processes=1)
    trainer = SimpleNamespace(model=model, is_deepspeed_enabled=False, accelerator=accelerator)
    assert Shards(trainer, None).names == expected


def test_experts_and_their_routers_move(tmp_path, tokenizer, teacher_dir, table):
    student = save_student(tmp_path / "student", make_experts("qwen3_moe"), tokenizer, teacher_dir)
    args = make_args(tmp_path, max_steps=1, router_aux_loss_coef=0.1)
    trainer = OfflineOPDTrainer(str(student), args, table, eval_dataset=table)
    weights, scores = [], iter([3.0, 2.0, 1.0])

    def keep():
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    def gate(model):
        keep()
        return next(scores)

    keep()
    trainer.add_callback(EffOPDCallback(trainer, gate, greater_is_better=False, schedule=[1], scales=[3, 5]))
    trainer.train()
    base, stepped, *_ = weights
    now = dict(trainer.model.named_parameters())
    moved = {"gate_up_proj": (4, 32, 16), "down_proj": (4, 16, 16), "gate.weight": (4, 16)}
    for part, shape in moved.items():
        (name,) = (name for name in now if ".layers.0." in name and name.endswith(part))
        assert now[name].shape == shape and not torch.equal(base[name], stepped[name])
        torch.testing.assert_close(now[name], base[name] + 5 * (stepped[name] - base[name]), atol=1e-6, rtol=0)
    assert torch.equal(now["lm_head.weight"], stepped["lm_head.weight"])
