"""The trainer: its gradient, its evaluation, resuming, streaming, adapters, cards, and what it refuses."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from tiny import make_args, make_model, make_rollouts, make_tokenizer, make_trainer, without_topk
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_lopd import (
    OfflineOPDConfig,
    OfflineOPDTrainer,
    TableError,
    TeacherConsistencyError,
    collect_rollouts,
    fingerprint_teacher,
    load_table,
    read_model_card,
    score_rollouts,
)

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def plain_losses(model, row, loss_type, clip=10.0, beta=OfflineOPDConfig.beta):
    """Loss of each trained token of one row from full logits, by the definitions of METHOD sections 1 and 2."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    start = len(row["prompt_ids"])
    logprobs = model(ids).logits[0, start - 1 : -1].float().log_softmax(-1)
    teacher = torch.tensor(row["teacher_logprobs"])
    sampled = torch.tensor(row["completion_ids"])
    if loss_type == "sampled":
        r = teacher - logprobs.gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
        losses = torch.where(r.abs() <= clip, r**2 / 2, clip * r.abs() - clip**2 / 2)
    else:
        losses = []
        for t, (top, top_logprobs) in enumerate(
            zip(row["teacher_topk_ids"], row["teacher_topk_logprobs"], strict=True)
        ):
            known = dict(zip(top, top_logprobs, strict=True)) | {}
            known.setdefault(row["completion_ids"][t], row["teacher_logprobs"][t])
            support = torch.tensor(list(known))
            log_t = torch.tensor(list(known.values()), dtype=torch.float64)
            log_p = logprobs[t].double()
            rest = torch.ones(len(log_p), dtype=torch.bool).scatter(0, support, False)
            tail_t = math.log(max(1 - log_t.exp().sum().item(), 1e-7))
            tail_p = log_p[rest].logsumexp(0)
            p = torch.cat([log_p[support], tail_p[None]]).exp()
            q = torch.cat([log_t, torch.tensor([tail_t])]).exp()
            mixture = beta * q + (1 - beta) * p
            if beta == 1.0:
                losses.append((p * (p / q).log()).sum())
            else:
                losses.append((beta * q * (q / mixture).log() + (1 - beta) * p * (p / mixture).log()).sum())
        losses = torch.stack(losses)
    trained = row.get("completion_mask") or [True] * len(sampled)
    return losses[torch.tensor(trained)]


def plain_loss(model, rows, loss_type, aggregation, **options):
    losses = [plain_losses(model, row, loss_type, **options) for row in rows]
    return (
        torch.stack([x.mean() for x in losses]).mean() if aggregation == "sequence_mean" else torch.cat(losses).mean()
    )


def check_gradient(trainer, expected):
    """Holds the loss and the gradients of one optimizer step, all accumulation steps, against a plain loss."""
    model, accumulation = trainer.model, trainer.args.gradient_accumulation_steps
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    model.train()
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), accumulation, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = accumulation
    loss = sum(trainer.training_step(model, batch, count) for batch in batches)
    torch.testing.assert_close(loss, expected.detach().float(), atol=1e-5, rtol=2e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def masked_table(table):
    masks = [
        [(i + j) % 3 > 0 or len(ids) < 3 for j in range(len(ids))] for i, ids in enumerate(table["completion_ids"])
    ]
    return table.add_column("completion_mask", masks)


@pytest.mark.parametrize(
    ("loss_type", "topk_columns", "aggregation", "accumulation"),
    [
        *(("topk", True, "sequence_mean", accumulation) for accumulation in (1, 3)),
        ("topk", True, "token_mean", 3),
        ("sampled", True, "sequence_mean", 3),
        ("sampled", True, "token_mean", 3),
        ("sampled", False, "token_mean", 1),
    ],
)
def test_gradient_equals_the_plain_implementation(
    tmp_path, student_dir, masked_table, loss_type, aggregation, accumulation, topk_columns
):
    rows = masked_table.select(range(6))
    trainer = make_trainer(
        tmp_path,
        student_dir,
        rows if topk_columns else without_topk(rows),
        loss_type=loss_type,
        loss_aggregation=aggregation,
        per_device_train_batch_size=6 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    expected = plain_loss(trainer.model, rows, loss_type, aggregation)
    check_gradient(trainer, expected)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_beta_is_the_trainer_s_whichever_end_it_is_near(tmp_path, student_dir, masked_table, beta):
    """The default is in the middle, where a divergence that is turned round is the same."""
    rows = masked_table.select(range(4))
    trainer = make_trainer(tmp_path, student_dir, rows, loss_type="topk", beta=beta, per_device_train_batch_size=4)
    check_gradient(trainer, plain_loss(trainer.model, rows, "topk", "sequence_mean", beta=beta))


def test_scores_keep_their_precision_where_deepspeed_trains_in_half_of_it(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.is_deepspeed_enabled = True
    prepared = trainer._prepare_inputs(batch)
    assert all(prepared[name].dtype == values.dtype for name, values in batch.items())
    assert prepared["teacher_topk_logprobs"].dtype == torch.float32


@pytest.mark.parametrize("loss_type", ["sampled", "topk"])
def test_training_moves_the_student_to_the_teacher(tmp_path, student_dir, table, loss_type):
    trainer = make_trainer(
        tmp_path, student_dir, table, eval_dataset=table, loss_type=loss_type, max_steps=60, learning_rate=1e-2
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] / 2
    assert after["eval_huber"] < before["eval_huber"]
    if loss_type == "topk":
        assert after["eval_reverse_kl_topk"] < before["eval_reverse_kl_topk"] / 2
        assert after["eval_top1_agreement"] > before["eval_top1_agreement"]


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("batch_size", [5, 24])
def test_evaluation_is_exact_whatever_the_batches(tmp_path, student_dir, masked_table, aggregation, batch_size):
    trainer = make_trainer(
        tmp_path,
        student_dir,
        masked_table,
        eval_dataset=masked_table,
        per_device_eval_batch_size=batch_size,
        loss_aggregation=aggregation,
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        rows = list(masked_table)
        assert metrics["eval_loss"] == pytest.approx(
            plain_loss(trainer.model, rows, "topk", aggregation).item(), rel=1e-4
        )
        kl = torch.cat([plain_losses(trainer.model, row, "topk", beta=1.0) for row in rows])
        huber = torch.cat([plain_losses(trainer.model, row, "sampled") for row in rows])
    assert metrics["eval_reverse_kl_topk"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert metrics["eval_huber"] == pytest.approx(huber.mean().item(), rel=1e-4)
    # The student scored its own rollouts into `ref_logprobs` and has not moved.
    assert metrics["eval_importance_weight/mean"] == pytest.approx(1, abs=1e-4)
    assert metrics["eval_importance_weight/ess"] == pytest.approx(1, abs=1e-4)


def test_metrics_reach_the_reporters_averaged_over_the_window(tmp_path, student_dir, table):
    class Logs(TrainerCallback):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(dict(logs))

    every, window = Logs(), Logs()
    kwargs = dict(learning_rate=1e-9, max_steps=4, max_completion_length=6)
    make_trainer(tmp_path, student_dir, table, callbacks=[every], **kwargs).train()
    make_trainer(tmp_path, student_dir, table, callbacks=[window], logging_steps=4, **kwargs).train()
    steps, whole = [x for x in every.logs if "loss" in x], next(x for x in window.logs if "loss" in x)
    assert len(steps) == 4
    assert whole["importance_weight/max"] == pytest.approx(max(x["importance_weight/max"] for x in steps))
    assert min(x["huber"] for x in steps) < whole["huber"] < max(x["huber"] for x in steps)
    assert whole["truncated_completions"] == sum(x.get("truncated_completions", 0) for x in steps) > 0
    assert {"reverse_kl_topk", "advantage/std", "frozen_log_ratio", "k3", "entropy", "top1_agreement"} <= set(whole)


def test_resuming_continues_the_loss_sequence_exactly(tmp_path, student_dir, table):
    kwargs = dict(max_steps=8, save_strategy="steps", save_steps=4, per_device_train_batch_size=5)
    whole = make_trainer(tmp_path / "a", student_dir, table, **kwargs)
    whole.train()
    resumed = make_trainer(tmp_path / "b", student_dir, table, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-4"))

    def losses(trainer):
        return [(x["step"], x["loss"], x["huber"]) for x in trainer.state.log_history if "loss" in x and x["step"] > 4]

    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "epochs",
    [
        {"max_steps": 4},
        pytest.param({"max_steps": 6}, marks=pytest.mark.slow),
        pytest.param({"max_steps": -1, "num_train_epochs": 1.5}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_had_ended_is_not_trained_further(tmp_path, student_dir, table, epochs, caplog):
    """The command that started it, with `resume_from_checkpoint=True`, gives the same model again."""
    options = dict(save_strategy="steps", save_steps=1, **epochs)
    trainer = make_trainer(tmp_path, student_dir, table, **options)
    trainer.train()
    again = make_trainer(tmp_path, student_dir, table, **options)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == trainer.state.global_step == trainer.state.max_steps
    assert caplog.text.count("there is nothing to resume") == 1
    for before, after in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_a_checkpoint_without_its_optimizer_is_not_resumed(tmp_path, student_dir, table):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, save_only_model=True)
    make_trainer(tmp_path, student_dir, table, **options).train()
    with pytest.raises(ValueError, match="no state of the optimizer"):
        make_trainer(tmp_path, student_dir, table, **options).train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1")
        )


def test_a_stream_gives_the_same_losses_as_the_table(tmp_path, student_dir, table):
    class InOrder(OfflineOPDTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    args = dict(max_steps=5)
    a = InOrder(str(student_dir), make_args(tmp_path, **args), table)
    b = OfflineOPDTrainer(str(student_dir), make_args(tmp_path, **args), table.to_iterable_dataset(num_shards=3))
    a.train(), b.train()
    losses = [[x["loss"] for x in t.state.log_history if "loss" in x] for t in (a, b)]
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_a_bad_row_of_a_stream_is_named(tmp_path, student_dir, table):
    rows = table.to_list()
    rows[9]["teacher_logprobs"][0] = float("nan")
    stream = Dataset.from_list(rows, features=table.features).to_iterable_dataset()
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path), stream)
    with pytest.raises(TableError, match=r"(?s)[Rr]ow 9\b.*teacher_logprobs"):
        trainer.train()


def test_another_teacher_s_row_in_a_stream_is_refused(tmp_path, student_dir, table):
    rows = table.to_list()
    rows[9]["teacher_fingerprint"] = "impostor@0123456789abcdef"
    stream = Dataset.from_list(rows, features=table.features).to_iterable_dataset()
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path), stream)
    with pytest.raises(TeacherConsistencyError, match="impostor"):
        trainer.train()


# ---- The best model ----


def test_the_best_model_is_chosen_by_held_out_reverse_kl(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table, eval_dataset=table)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("eval_reverse_kl_topk", False)
    kwargs = dict(
        loss_type="sampled", load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", eval_steps=2,
        save_steps=2,
    )  # fmt: skip
    trainer = make_trainer(tmp_path, student_dir, table, eval_dataset=table, **kwargs)
    trainer.train()
    values = [x["eval_reverse_kl_topk"] for x in trainer.state.log_history if "eval_reverse_kl_topk" in x]
    assert trainer.state.best_metric == min(values)


def test_without_topk_columns_the_choice_is_warned_about(tmp_path, student_dir, table, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            tmp_path, student_dir, without_topk(table), eval_dataset=without_topk(table), load_best_model_at_end=True,
            eval_strategy="steps", save_strategy="steps",
        )  # fmt: skip
    assert trainer.loss_type == "sampled" and trainer.args.metric_for_best_model == "loss"
    assert "top_k=8" in caplog.text


# ---- Adapters ----


def test_held_out_rows_that_are_trained_on_are_counted(tmp_path, student_dir, table, caplog):
    """By their prompts: another answer to a prompt that is trained on is no held-out row either."""
    prompts = [tuple(row) for row in table["prompt_ids"]]
    train = table.select(range(6))
    own = [i for i in range(6, len(table)) if prompts[i] not in prompts[:6]]
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, student_dir, train, eval_dataset=table.select(own))
    assert "prompts that are trained on" not in caplog.text
    backwards = [
        name for name in table.column_names if name not in ("prompt_ids", "teacher_fingerprint", "student_fingerprint")
    ]
    other_answers = train.map(lambda row: {name: row[name][::-1] for name in backwards})
    assert list(other_answers["completion_ids"]) != list(train["completion_ids"])
    held_out = concatenate_datasets([table.select(own), other_answers])
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, student_dir, train, eval_dataset=held_out)
    assert f"`eval_dataset`: 6 of {len(own) + 6} rows answer prompts that are trained on" in caplog.text


@pytest.mark.slow
def test_lora_trains_and_saves_the_adapter_alone(tmp_path, student_dir, table):
    from peft import LoraConfig, PeftModel

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        tmp_path, student_dir, table, eval_dataset=table, peft_config=lora, max_steps=40, learning_rate=1e-2,
        activation_checkpointing=True,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    record = read_model_card(str(tmp_path / "adapter"))
    assert record["opd_rounds"] and record["model"]["id"] == fingerprint_teacher(tmp_path / "adapter").id
    base = AutoModelForCausalLM.from_pretrained(student_dir)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    # An adapter's directory has its own card and weights, so a second round can start from it; of a loaded one that
    # has learnt something, only the base's card is known, which says nothing of that.
    with pytest.raises(TeacherConsistencyError, match="pass the adapter's directory as `model`"):
        OfflineOPDTrainer(loaded, make_args(tmp_path), table, table)
    for model, mode in ((loaded, "declared_ok"), (str(tmp_path / "adapter"), "strict")):
        again = OfflineOPDTrainer(model, make_args(tmp_path, teacher_consistency=mode), table, table)
        assert again.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-5)
    again.train()
    again.save_model(str(tmp_path / "second"))
    assert len(read_model_card(str(tmp_path / "second"))["opd_rounds"]) == 2
    assert all("lora" in name for name, p in again.model.named_parameters() if p.requires_grad)


def test_an_adapter_names_the_revision_of_its_base(tmp_path, student_dir, table):
    from peft import LoraConfig

    options = {"model_init_kwargs": {"revision": "v1"}, "peft_config": LoraConfig(r=2)}
    make_trainer(tmp_path, student_dir, table, **options).save_model()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == "v1"
    assert options["peft_config"].revision is None


def test_an_adapter_without_a_stamp_is_refused_and_so_is_a_loaded_one_over_a_bare_base(tmp_path, tokenizer, table):
    from peft import LoraConfig, get_peft_model

    make_model(seed=2).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(TeacherConsistencyError, match="card of .*adapter names no SFT teacher"):
        make_trainer(tmp_path, tmp_path / "adapter", table)
    with pytest.raises(TeacherConsistencyError, match="pass the adapter's directory as `model`"):
        OfflineOPDTrainer(model, make_args(tmp_path), table)


def test_adapters_that_the_loss_would_not_see_are_refused(tmp_path, student_dir, table):
    from peft import LoraConfig, PromptTuningConfig

    with pytest.raises(ValueError, match="lm_head.*target_modules"):
        make_trainer(tmp_path, student_dir, table, peft_config=LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="virtual tokens.*LoRA"):
        virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        make_trainer(tmp_path, student_dir, table, peft_config=virtual)
    with pytest.raises(ValueError, match="drawn at random.*'pissa'"):
        make_trainer(tmp_path, student_dir, table, peft_config=LoraConfig(r=2, init_lora_weights="pissa_niter_2"))


def test_a_checkpoint_of_deepspeed_is_not_resumed_without_it(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / "global_step1").mkdir()
    again = make_trainer(tmp_path, student_dir, table, max_steps=2)
    with pytest.raises(ValueError, match="was saved by DeepSpeed"):
        again.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    "option, words",
    [
        ({"pad_to_multiple_of": -8}, "`pad_to_multiple_of` must be positive"),
        ({"max_tokens_per_device": 512.5}, "is a number of tokens"),
        ({"advantage_clip": float("nan")}, "`advantage_clip` must be positive"),
    ],
)
def test_numbers_out_of_range(tmp_path, option, words):
    with pytest.raises(ValueError, match=words):
        make_args(tmp_path, **option)


# ---- Teachers and cards ----


def test_the_card_cites_and_names_the_teachers_so_that_a_second_round_can_start(
    tmp_path, student_dir, teacher_dir, table
):
    trainer = make_trainer(tmp_path, student_dir, table)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2604.13010" in card and "Yecheng Wu" in card and "trl-lopd" in card
    record = read_model_card(str(tmp_path / "out"))
    assert record["sft_teachers"] == read_model_card(str(student_dir))["sft_teachers"]
    (first,) = record["opd_rounds"]
    assert [t["id"] for t in first["teachers"]] == table.unique("teacher_fingerprint")
    assert (first["student"], first["rows"]) == (fingerprint_teacher(student_dir).id, len(table))
    assert (first["objective"], first["teacher_consistency"]) == ("topk", "verified")
    assert record["model"]["id"] == fingerprint_teacher(tmp_path / "out").id

    rollouts = collect_rollouts(["w5 w6", "w7"], str(tmp_path / "out"), max_completion_length=5)
    second = score_rollouts(rollouts, str(teacher_dir), top_k=2)
    trainer = OfflineOPDTrainer(str(tmp_path / "out"), make_args(tmp_path / "second", max_steps=1), second)
    trainer.train()
    trainer.save_model()
    rounds = read_model_card(tmp_path / "second" / "out")["opd_rounds"]
    assert rounds[0] == first and rounds[1]["student"] == record["model"]["id"]
    assert [s["id"] for s in rounds[1]["sampled_by"]] == [record["model"]["id"]]


def test_the_card_names_all_teachers_that_trained_the_model_and_no_other(tmp_path, student_dir, tokenizer, table):
    other = score_rollouts(make_rollouts(4), make_model(seed=9), processing_class=tokenizer, top_k=4)
    (first,), (second,) = table.unique("teacher_fingerprint"), other.unique("teacher_fingerprint")
    kwargs = dict(teacher_consistency="off", max_steps=1)
    trainer = make_trainer(tmp_path, student_dir, table, eval_dataset=other, **kwargs)
    trainer.train()
    trainer.save_model()
    (round,) = read_model_card(str(tmp_path / "out"))["opd_rounds"]
    assert [t["id"] for t in round["teachers"]] == [first] and round["teacher_consistency"] == "off"
    trainer = make_trainer(tmp_path / "second", tmp_path / "out", other, **kwargs)
    trainer.train()
    trainer.save_model()
    rounds = read_model_card(str(tmp_path / "second" / "out"))["opd_rounds"]
    assert [[t["id"] for t in round["teachers"]] for round in rounds] == [[first], [second]]
    assert "[None]" not in (tmp_path / "out" / "README.md").read_text()


def test_another_teacher_is_refused_before_the_model_is_loaded(tmp_path, student_dir, tokenizer, table, monkeypatch):
    other = score_rollouts(make_rollouts(4), make_model(seed=9), processing_class=tokenizer)

    def fail(*args, **kwargs):
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as m:
        m.setattr("trl_lopd.training.student.create_model_from_path", fail)
        with pytest.raises(TeacherConsistencyError) as error:
            make_trainer(tmp_path, student_dir, other)
    for teacher in (table["teacher_fingerprint"][0], other["teacher_fingerprint"][0]):
        assert teacher in str(error.value)
    make_trainer(tmp_path, student_dir, other, teacher_consistency="off")


def test_a_student_without_a_stamp_is_refused_unless_told(tmp_path, tokenizer, table, caplog):
    make_model(seed=2).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(TeacherConsistencyError, match="trl-lopd stamp"):
        make_trainer(tmp_path, tmp_path / "bare", table)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, tmp_path / "bare", table, teacher_consistency="warn")
    assert "trl-lopd stamp" in caplog.text


# ---- What is refused ----


def rejects(error, match, tmp_path, student_dir, table, **kwargs):
    with pytest.raises(error, match=match):
        make_trainer(tmp_path, student_dir, table, **kwargs)


def test_contradictions(tmp_path, student_dir, table):
    bare = without_topk(table)
    no_ref = table.remove_columns("ref_logprobs")
    rejects(ValueError, r"loss_type='topk'.*score_rollouts", tmp_path, student_dir, bare, loss_type="topk")
    rejects(ValueError, "ratio_clip.*loss_type='sampled'", tmp_path, student_dir, table, ratio_clip=0.2)
    rejects(ValueError, "ref_logprobs.*ref_model", tmp_path, student_dir, no_ref, ratio_clip=0.2, loss_type="sampled")
    rejects(ValueError, "topk", tmp_path, student_dir, table, eval_dataset=bare)
    rejects(ValueError, "train_dataset", tmp_path, student_dir, None)
    rejects(TypeError, "`train_dataset` is a list of rows.*Dataset.from_list", tmp_path, student_dir, table.to_list())
    rejects(TypeError, r"give one of them.*train_dataset\['train'\]", tmp_path, student_dir, {"train": table})
    with pytest.raises(TypeError, match="OfflineOPDConfig"):
        OfflineOPDTrainer(str(student_dir), {"learning_rate": 1}, table)
    with pytest.raises(ValueError, match="processing_class"):
        OfflineOPDTrainer(make_model(), make_args(tmp_path), table)


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("loss_type", "kl", "loss_type.*topk"),
        ("loss_aggregation", "mean", "sequence_mean"),
        ("teacher_consistency", "maybe", "strict"),
        ("max_length", 0, "max_length.*positive"),
        ("advantage_clip", -1.0, "advantage_clip.*positive"),
        ("teacher_logprob_floor", 1.0, "floor.*negative"),
        ("metric_for_best_model", "eval_huber", "huber.*reverse_kl_topk"),
        ("metric_for_best_model", "frozen_log_ratio", "reverse_kl_topk"),
    ],
)
def test_bad_options(tmp_path, option, value, match):
    with pytest.raises(ValueError, match=match):
        make_args(tmp_path, **{option: value})


def test_lengths(tmp_path, student_dir, table, caplog):
    longest = max(map(len, table["prompt_ids"]))
    row = next(i for i, ids in enumerate(table["prompt_ids"]) if len(ids) == longest)
    rejects(TableError, f"row {row},.*prompt of {longest} tokens.*max_length", tmp_path, student_dir, table,
            max_length=longest)  # fmt: skip
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, student_dir, table, max_completion_length=5)
    over = [len(ids) - 5 for ids in table["completion_ids"] if len(ids) > 5]
    assert f"{len(over)} of 24 completions are truncated" in caplog.text and f"{sum(over)} of" in caplog.text


def test_a_bad_row_stops_the_trainer_and_a_floor_admits_minus_infinity(tmp_path, student_dir, table, caplog):
    rows = without_topk(table).to_list()
    rows[3]["teacher_logprobs"][0] = float("-inf")
    bad = Dataset.from_list(rows, features=without_topk(table).features)
    rejects(TableError, r"(?s)[Rr]ow 3\b.*floor", tmp_path, student_dir, bad)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, student_dir, bad, teacher_logprob_floor=-30.0, eval_dataset=bad)
    assert "1 teacher log-probabilities are -inf" in caplog.text
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    with pytest.raises(TableError, match="token ids are 0 to 15"):
        OfflineOPDTrainer(make_model(vocab=16), make_args(tmp_path), table, processing_class=make_tokenizer())


def test_rows_given_later_are_checked_too(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table)
    with pytest.raises(ValueError, match="loss_type='topk'"):
        trainer.evaluate(without_topk(table))
    rows = table.to_list()
    rows[2]["teacher_logprobs"].pop()
    with pytest.raises(TableError, match="`test_dataset`: Row 2"):
        trainer.predict(Dataset.from_list(rows, features=table.features))
    assert trainer.predict(table).metrics["test_loss"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_data_that_is_exchanged_is_checked_too(tmp_path, student_dir, table, stream):
    rows = table.to_list()
    rows[2]["teacher_logprobs"].pop()
    bad = Dataset.from_list(rows, features=table.features)
    for name in ("eval_dataset", "train_dataset"):
        trainer = make_trainer(tmp_path, student_dir, table, eval_dataset=table, eval_strategy="steps", eval_steps=1)
        kept = getattr(trainer, name)
        setattr(trainer, name, bad.to_iterable_dataset() if stream else bad)
        with pytest.raises(TableError, match="Row 2"):
            trainer.train()
        setattr(trainer, name, kept)
    with pytest.raises(TableError, match="Row 2"):
        trainer.reverse_kl_of_rows(bad)
    trainer.train()


def test_a_stream_is_described_before_it_is_trained_on(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table.to_iterable_dataset())
    described = trainer.describe_round()
    assert [t["id"] for t in described["teachers"]] == table.unique("teacher_fingerprint") and described["rows"] == 0


def test_a_bad_row_says_which_dataset_it_is_in(tmp_path, student_dir, table):
    rows = table.to_list()
    rows[2]["ref_logprobs"].pop()
    bad = Dataset.from_list(rows, features=table.features)
    rejects(TableError, "`eval_dataset`: Row 2", tmp_path, student_dir, table, eval_dataset=bad)


def test_a_mask_that_truncation_leaves_empty_is_found_before_training(tmp_path, student_dir, table):
    row = next(i for i, ids in enumerate(table["completion_ids"]) if len(ids) > 6)
    masks = [[i != row or j >= 6 for j in range(len(ids))] for i, ids in enumerate(table["completion_ids"])]
    late = table.add_column("completion_mask", masks)
    rejects(TableError, f"row {row}, column 'completion_mask'.*max_completion_length", tmp_path, student_dir, late,
            max_completion_length=6)  # fmt: skip
    make_trainer(tmp_path, student_dir, late, max_completion_length=7)


def test_several_evaluation_sets_need_a_criterion(tmp_path, student_dir, table):
    rejects(ValueError, "eval_a_reverse_kl_topk", tmp_path, student_dir, table, eval_dataset={"a": table, "b": table},
            load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")  # fmt: skip


def test_rows_can_be_grouped_by_length(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table, train_sampling_strategy="group_by_length", max_steps=1)
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(len(table)))
    trainer.train()


def test_a_second_training_starts_a_new_window(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table, max_steps=3, logging_steps=2)
    trainer.train()
    assert trainer.window.totals
    trainer.train()
    log = next(x for x in trainer.state.log_history if "loss" in x)
    fresh = make_trainer(tmp_path, student_dir, table, max_steps=3, logging_steps=2, learning_rate=1e-12)
    fresh.train()
    assert log["importance_weight/max"] > 1.0 + 1e-3 > fresh.state.log_history[0]["importance_weight/max"]


def test_config_survives_json(tmp_path):
    args = make_args(tmp_path, model_init_kwargs={"dtype": "float32"})
    assert json.loads(args.to_json_string())["loss_type"] == "auto"
    assert (args.learning_rate, args.weight_decay, args.adam_beta2, args.advantage_clip) == (1e-3, 0.1, 0.98, 10.0)
    defaults = OfflineOPDConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (defaults.learning_rate, defaults.lr_scheduler_type, defaults.max_completion_length) == (
        2e-6, "constant", 4096,
    )  # fmt: skip


def test_mixed_precision_is_not_taken_for_a_model_with_other_logits(tmp_path):
    """Hidden states of 96 numbers in bfloat16: a padded batch rounds otherwise than a row alone."""
    table = load_table(QUICKSTART / "table")["train"].select(range(8))
    trainer = make_trainer(tmp_path, QUICKSTART / "student", table, bf16=True, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
