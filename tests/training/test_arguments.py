"""Every field of `TrainingArguments`: honoured, refused or of no consequence, and judged by somebody."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from tiny import make_args, make_model, make_trainer, save_student, without_topk
from transformers import TrainerCallback, TrainingArguments

from trl_lopd import OfflineOPDConfig
from trl_lopd.table.schema import lengths
from trl_lopd.training.packing import best_fit_decreasing

# `Trainer` does what they say, and nothing here is in its way.
AS_IS = {
    *("output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps"),
    *("learning_rate", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "optim_target_modules", "max_grad_norm", "bf16", "tf32", "neftune_noise_alpha", "use_cache"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "report_to", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start"),
    *("save_only_model", "save_strategy", "save_steps", "save_total_limit"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "load_best_model_at_end", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
    *("full_determinism", "seed", "data_seed", "use_cpu", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "ddp_find_unused_parameters", "ddp_bucket_cap_mb"),
    *("ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed"),
    *("debug", "skip_memory_metrics"),
}
# Code of ours does, or keeps to them.
BY_OUR_CODE = {
    "gradient_accumulation_steps": "losses are divided by a count over all accumulated batches",
    "average_tokens_across_devices": "the count is of all processes, or of each alone",
    "activation_checkpointing": "on by default",
    "use_liger_kernel": "but for the kernel that replaces the forward",
    "liger_kernel_config": "the same",
    "auto_find_batch_size": "before the first step",
    "include_num_input_tokens_seen": "of all micro-batches, without padding too",
    "disable_tqdm": "the console shows what the bar would",
    "enable_jit_checkpoint": "`SaveOnSigterm`",
    "lr_scheduler_type": "those that read a metric read it in its direction",
    "lr_scheduler_kwargs": "the same",
    "metric_for_best_model": "`criteria.direction`",
    "greater_is_better": "the same",
    "dataloader_num_workers": "who scored the rows comes with the batch",
    "dataloader_drop_last": "in training; evaluation reads all rows",
    "dataloader_persistent_workers": "the same; evaluation reads the rows it is given",
    "dataloader_in_order": "the same; evaluation goes by the order of rows",
    "train_sampling_strategy": "but for `batch_rebalance`; lengths are those of the rows as they are read",
}
# With a value that raises, and words of the error. Other values of the first four are honoured.
REFUSED = {
    "accelerator_config": [
        ({"dispatch_batches": True}, "dispatch_batches"),
        ({"even_batches": False}, "even_batches"),
        ({"use_seedable_sampler": False}, "use_seedable_sampler"),
    ],
    "parallelism_config": [],  # below: it needs processes
    "fp16": [(True, "`fp16=True`.*`bf16=True`")],  # on a CPU
    "train_sampling_strategy": [("batch_rebalance", "batch_rebalance.*group_by_length")],
    "label_smoothing_factor": [(0.1, "`label_smoothing_factor=0.1` is not supported.*teacher")],
    "label_names": [(["labels"], "`completion_ids`")],
    "bf16_full_eval": [(True, "precision.*`bf16=True`")],
    "fp16_full_eval": [(True, "precision.*`bf16=True`")],
    "save_on_each_node": [(True, "first node only")],
    "include_for_metrics": [(["loss"], "compute_metrics")],
    "batch_eval_metrics": [(True, "compute_metrics")],
    "length_column_name": [("size", "lengths")],
}
# They change nothing here, or nothing in any trainer.
IRRELEVANT = {
    "prediction_loss_only": "evaluation makes no predictions, only totals of each sequence",
    "eval_do_concat_batches": "the same",
    "eval_use_gather_object": "the same",
    "eval_accumulation_steps": "the same",
    "remove_unused_columns": "the columns of a table are read by name",
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "resume_from_checkpoint"), "read by scripts"),
    "local_rank": "read from the environment",
}


def test_every_field_is_judged():
    """A new version of transformers may add some: try what each does here, and put it where it belongs."""
    judged = [*AS_IS, *BY_OUR_CODE, *(name for name in REFUSED if name not in BY_OUR_CODE), *IRRELEVANT]
    assert sorted(judged) == sorted(field.name for field in fields(TrainingArguments))


@pytest.mark.parametrize(("name", "value", "words"), [(n, *case) for n, cases in REFUSED.items() for case in cases])
def test_what_cannot_be_honoured_is_refused(tmp_path, name, value, words):
    with pytest.raises(ValueError, match=words):
        make_args(tmp_path, **{name: value})


def test_tensor_parallelism_is_refused(tmp_path, student_dir, table, monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    with pytest.raises(ValueError, match="tp_size"):
        make_trainer(tmp_path, student_dir, table)


def test_the_defaults_are_accepted(tmp_path):
    default = TrainingArguments(str(tmp_path), use_cpu=True)
    ours = OfflineOPDConfig(str(tmp_path), use_cpu=True)
    assert {
        name: getattr(ours, name) for name in REFUSED if name not in ("accelerator_config", "parallelism_config")
    } == {name: getattr(default, name) for name in REFUSED if name not in ("accelerator_config", "parallelism_config")}


def losses(trainer, after=0):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log and log["step"] > after]


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_loss_only": True},
        {"eval_do_concat_batches": False},
        {"eval_use_gather_object": True},
        {"eval_accumulation_steps": 1},
        {"remove_unused_columns": False},
        # Which rows are evaluated, and in which order, they do not decide.
        {"dataloader_drop_last": True},
        {"dataloader_num_workers": 2, "dataloader_in_order": False},
    ],
)
def test_what_changes_no_evaluation(tmp_path, student_dir, table, options):
    rows = table.select(range(9))
    plain = make_trainer(tmp_path, student_dir, table, eval_dataset=rows)
    other = make_trainer(tmp_path, student_dir, table, eval_dataset=rows, **options)
    before = dict(vars(other.args))
    found = other.evaluate()
    for name, value in plain.evaluate().items():
        if "per_second" not in name and "runtime" not in name and "time" not in name:
            assert found[name] == pytest.approx(value, rel=1e-6), name
    assert plain.reverse_kl_of_rows(rows).tolist() == other.reverse_kl_of_rows(rows).tolist()
    assert {**vars(other.args), "_n_gpu": 0} == {**before, "_n_gpu": 0}


@pytest.mark.parametrize(
    ("strategy", "resumed_at"),
    [
        ("random", [6]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("random", [4, 8]), ("sequential", [8]), ("group_by_length", [6, 8])]
        ),
    ],
)
def test_the_order_of_rows_goes_on_where_it_was(tmp_path, student_dir, table, strategy, resumed_at):
    """In the first epoch of six steps, between two, and in the second."""
    options = dict(max_steps=14, train_sampling_strategy=strategy, dataloader_num_workers=1)
    whole = make_trainer(tmp_path, student_dir, table, save_strategy="steps", save_steps=2, **options)
    whole.train()
    for at in resumed_at:
        resumed = make_trainer(tmp_path / "resumed", student_dir, table, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{at}"))
        assert losses(resumed, at) == losses(whole, at) and len(losses(whole, at)) == 14 - at


def test_all_processes_group_rows_alike(tmp_path, student_dir, table):
    """Their random states may differ; each epoch has an order of its own, and so has each seed."""
    orders = []
    for seed, data_seed in ((1, None), (1, None), (2, None), (1, 2)):
        trainer = make_trainer(
            tmp_path, student_dir, table, train_sampling_strategy="group_by_length", seed=seed, data_seed=data_seed
        )
        for epoch in (0.0, 1.0, 1.5):
            torch.manual_seed(len(orders))
            trainer.state.epoch = epoch
            orders.append(list(trainer._get_train_sampler()))
    first, second, other, data = (orders[i : i + 3] for i in range(0, 12, 3))
    assert first == second and first[1] == first[2] and other == data
    assert len({tuple(order) for order in (*first, *other)}) == 3  # the second of one seed is the first of the next
    assert all(sorted(order) == list(range(len(table))) for order in orders)


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"max_tokens_per_device": 32}])
def test_tokens_seen_are_counted_without_padding(tmp_path, student_dir, tokenizer, table, options):
    """Also where the padding token is one that ends every completion."""
    rows = table.map(lambda row: {"completion_ids": [*row["completion_ids"][:-1], 0]})
    rows = rows.remove_columns(["teacher_topk_ids", "teacher_topk_logprobs"])
    trainer = make_trainer(
        tmp_path, student_dir, rows, max_steps=6, include_num_input_tokens_seen="non_padding", **options
    )
    trainer.train()
    assert trainer.processing_class.pad_token_id == 0
    assert trainer.state.num_input_tokens_seen == sum(map(len, rows["prompt_ids"])) + sum(
        map(len, rows["completion_ids"])
    )


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_losses(tmp_path, teacher_dir, tokenizer, table):
    # Each layer is compiled, for each kind of shape.
    student_dir = save_student(tmp_path / "student", make_model(seed=2, layers=1), tokenizer, teacher_dir)
    kwargs = dict(eval_dataset=table.select(range(5)), eval_strategy="steps", eval_steps=2, max_steps=2)
    kwargs |= {"padding_free": True, "activation_checkpointing": True}
    plain = make_trainer(tmp_path / "plain", student_dir, table, **kwargs)
    compiled = make_trainer(
        tmp_path, student_dir, table, torch_compile=True, torch_compile_backend="aot_eager", **kwargs
    )
    for trainer in (plain, compiled):
        trainer.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    evaluated = [[log["eval_loss"] for log in t.state.log_history if "eval_loss" in log] for t in (plain, compiled)]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-4)


def test_noise_in_embeddings_is_in_training_only(tmp_path, student_dir, table):
    plain, noisy = (
        make_trainer(tmp_path, student_dir, table, eval_dataset=table, max_steps=1, **options)
        for options in ({}, {"neftune_noise_alpha": 20.0})
    )
    assert plain.evaluate()["eval_loss"] == noisy.evaluate()["eval_loss"]
    plain.train(), noisy.train()
    assert losses(plain) != losses(noisy)


def test_data_may_begin_anew_when_a_run_is_resumed(tmp_path, student_dir, table):
    class Batches(TrainerCallback):
        def __init__(self):
            self.read = []

    options = dict(max_steps=6, train_sampling_strategy="sequential")
    make_trainer(tmp_path, student_dir, table, save_strategy="steps", save_steps=2, **options).train()
    firsts = []
    for skip in (False, True):
        trainer = make_trainer(tmp_path / "resumed", student_dir, table, ignore_data_skip=skip, **options)
        step, read = trainer.training_step, []

        def watched(model, inputs, num_items=None, step=step, read=read):
            read.append(inputs["input_ids"][0].tolist())
            return step(model, inputs, num_items)

        trainer.training_step = watched
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        firsts.append(read[0])
    rows = [table[i]["prompt_ids"] + table[i]["completion_ids"] for i in (8, 0)]
    assert [first[: len(row)] for first, row in zip(firsts, rows, strict=True)] == rows


def test_what_does_not_pay_is_said_before_training(tmp_path, student_dir, table, caplog):
    def warnings(**options):
        caplog.clear()
        make_trainer(tmp_path, student_dir, table, **options)
        return [record.getMessage() for record in caplog.records if "docs/evidence.md" in record.getMessage()]

    # 24 rows, 4 a step.
    assert warnings(max_steps=120) == []
    assert len(passes := warnings(max_steps=130)) == 1 and "24 training rows will be read 22 times" in passes[0]
    assert len(warnings(max_steps=65, gradient_accumulation_steps=2)) == 1
    assert len(warnings(max_steps=-1, num_train_epochs=21)) == 1
    packs = len(best_fit_decreasing(np.add(*lengths(table)), 32))
    packing = {"packing": True, "max_length": 32, "per_device_train_batch_size": 1}
    assert packs < 12 and warnings(max_steps=19 * packs, **packing) == []
    assert "will be read 22 times" in warnings(max_steps=22 * packs, **packing)[0]
    assert warnings(loss_type="sampled") == []  # advantages of random models spread over more than 1 nat
    refs = [[value + 0.5 * (i % 2) for i, value in enumerate(row)] for row in table["teacher_logprobs"]]
    table = close = table.remove_columns("ref_logprobs").add_column("ref_logprobs", refs)
    assert len(sampled := warnings(loss_type="sampled", teacher_consistency="off")) == 1
    assert "standard deviation of 0.2" in sampled[0] and "leave `loss_type` unset" in sampled[0]
    table = without_topk(close)
    assert "score with `top_k=8`" in warnings(teacher_consistency="off")[0]
