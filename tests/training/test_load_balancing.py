"""Mixtures of experts: the load-balancing loss of their routers, against one computed from its definition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from tiny import make_args, make_experts, make_rollouts, make_tokenizer, make_trainer, save_student
from transformers import AutoModelForCausalLM

from trl_lopd import OfflineOPDTrainer, read_model_card, score_rollouts
from trl_lopd.training.experts import keep_in_step
from trl_lopd.training.micro_batches import micro_batches

KINDS = ["qwen3_moe", "mixtral", "gpt_oss"]
EXPERTS, PER_TOKEN = 4, 2


@pytest.fixture(scope="module")
def students(tmp_path_factory, tokenizer, teacher_dir):
    path = tmp_path_factory.mktemp("students")
    return {kind: save_student(path / kind, make_experts(kind), tokenizer, teacher_dir) for kind in KINDS}


@pytest.fixture(scope="module")
def rows(teacher_dir):
    return score_rollouts(make_rollouts(12), str(teacher_dir), top_k=4)


def sequences(batch):
    """The token ids of each sequence, without padding."""
    ids = batch["input_ids"]
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        return list(ids[0].tensor_split(starts[1:]))
    return [row[:length] for row, length in zip(ids, batch["attention_mask"].sum(1), strict=True)]


def plain_aux_loss(model, sequences):
    """`E * sum_e f_e * p_e` over the tokens of all layers, of sequences that are read one at a time."""
    logits = [torch.cat(model(ids[None], output_router_logits=True).router_logits) for ids in sequences]
    probabilities = torch.cat(logits).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(PER_TOKEN).indices, 1.0)
    return EXPERTS * (chosen.mean(0) * probabilities.mean(0)).sum()


def plain_huber(model, batch):
    """The sampled objective of each sequence, its tokens one after another."""
    losses, teacher = [], iter(batch["teacher_logprobs"].split(batch["sequences"].bincount().tolist()))
    for ids, teacher_logprobs in zip(sequences(batch), teacher, strict=True):
        start = len(ids) - len(teacher_logprobs)
        logprobs = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1).gather(-1, ids[start:, None])[:, 0]
        losses.append((teacher_logprobs - logprobs) ** 2 / 2)
    return losses


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mixtral", {}),
        ("gpt_oss", {}),
        ("qwen3_moe", {"activation_checkpointing": True, "loss_aggregation": "token_mean"}),
        ("qwen3_moe", {"max_tokens_per_device": 24, "padding_free": True}),
        pytest.param("qwen3_moe", {}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {"padding_free": True}, marks=pytest.mark.slow),
        pytest.param("mixtral", {"max_tokens_per_device": 24}, marks=pytest.mark.slow),
        pytest.param(
            "qwen3_moe", {"max_tokens_per_device": 24, "loss_aggregation": "token_mean"}, marks=pytest.mark.slow
        ),
    ],
)
def test_gradient_equals_the_plain_implementation(tmp_path, students, rows, kind, options):
    """Two accumulation steps of six rows: the loss over all items, and the load-balancing loss of each forward pass
    times its share of the items."""
    trainer = make_trainer(
        tmp_path, students[kind], rows, loss_type="sampled", advantage_clip=1e3, router_aux_loss_coef=0.5,
        per_device_train_batch_size=6, gradient_accumulation_steps=2, **options,
    )  # fmt: skip
    model = trainer.model.train()
    if trainer.args.activation_checkpointing:
        model.gradient_checkpointing_enable()
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 2
    parts = [part for batch in batches for part in micro_batches(batch)]
    assert (len(parts) > 2) == ("max_tokens_per_device" in options)
    loss = sum(trainer.training_step(model, batch, count) for batch in batches)

    plain = AutoModelForCausalLM.from_pretrained(students[kind])
    by_tokens = options.get("loss_aggregation") == "token_mean"
    hubers = [plain_huber(plain, part) for part in parts]
    items = [sum(map(len, losses)) if by_tokens else len(losses) for losses in hubers]
    shares = torch.tensor(items) / sum(items)
    aux = torch.stack([plain_aux_loss(plain, sequences(part)) for part in parts])
    hubers = [losses if by_tokens else losses.mean()[None] for losses in sum(hubers, [])]
    expected = torch.cat(hubers).mean() + 0.5 * (shares * aux).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=2e-5)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n} {m}")
    assert trainer.window.close()["aux_loss"] == pytest.approx((shares * aux).sum().item(), rel=1e-5)


def test_it_is_logged_apart_and_is_part_of_the_trained_loss_alone(tmp_path, students, rows):
    def logs_of(coef):
        trainer = make_trainer(
            tmp_path, students["qwen3_moe"], rows, eval_dataset=rows, router_aux_loss_coef=coef, max_steps=1,
            eval_on_start=True,
        )  # fmt: skip
        trainer.train()
        evaluated, trained, _ = trainer.state.log_history
        return trainer, evaluated, trained

    _, plain_evaluated, plain = logs_of(0.0)
    trainer, evaluated, balanced = logs_of(0.5)
    assert "aux_loss" not in plain and 2 < balanced["aux_loss"] < 4
    assert balanced["loss"] == pytest.approx(plain["loss"] + 0.5 * balanced["aux_loss"], rel=1e-6)
    assert balanced["reverse_kl_topk"] == plain["reverse_kl_topk"]
    assert not any("aux_loss" in name for name in evaluated) and evaluated["eval_loss"] == plain_evaluated["eval_loss"]
    assert trainer.describe_round()["router_aux_loss_coef"] == 0.5


@pytest.mark.parametrize("declared", [True, False])
def test_the_config_of_the_model_says_how_much_where_the_arguments_do_not(tmp_path, rows, declared):
    # TRL's SFT sets `output_router_logits` in the config that it saves.
    model = make_experts("mixtral", router_aux_loss_coef=0.3, output_router_logits=declared)
    loaded = {"teacher_consistency": "off", "max_steps": 1}

    def aux_loss(coef):
        args = make_args(tmp_path, router_aux_loss_coef=coef, **loaded)
        trainer = OfflineOPDTrainer(model, args, rows, processing_class=make_tokenizer())
        trainer.train()
        return trainer.objective.aux_loss_coef, "aux_loss" in trainer.state.log_history[0]

    assert aux_loss(None) == (0.3, True)
    assert aux_loss(0.0) == (0.0, False)


def test_a_model_without_experts_has_none(tmp_path, student_dir, rows):
    with pytest.raises(ValueError, match="`router_aux_loss_coef` is 0.1, but LlamaForCausalLM has no load-balancing"):
        make_trainer(tmp_path, student_dir, rows, router_aux_loss_coef=0.1)
    assert make_trainer(tmp_path, student_dir, rows, router_aux_loss_coef=0.0).objective.aux_loss_coef == 0.0
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        make_trainer(tmp_path, student_dir, rows, router_aux_loss_coef=-1.0)


def test_layers_without_experts_have_none(tmp_path, tokenizer, teacher_dir, rows):
    dense = make_experts("qwen3_moe", mlp_only_layers=[0, 1])
    student = save_student(tmp_path / "student", dense, tokenizer, teacher_dir)
    trainer = make_trainer(tmp_path, student, rows, max_steps=1)
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]
    with pytest.raises(ValueError, match="no layer of the model has a router"):
        make_trainer(tmp_path, student, rows, router_aux_loss_coef=0.1).train()


def test_routers_that_checkpoints_hide_are_refused(tmp_path, students, rows):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="no gradient.*use_reentrant"):
        make_trainer(tmp_path, students["qwen3_moe"], rows, **options).train()
    trainer = make_trainer(tmp_path, students["qwen3_moe"], rows, router_aux_loss_coef=0.0, max_steps=1, **options)
    assert trainer.train().global_step == 1


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_experts_apart_are_refused_where_processes_would_wait_for_ever(engine):
    block = torch.nn.Module()
    block.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    plugin = SimpleNamespace(zero_stage=2)
    kind = DistributedType.DEEPSPEED if engine == "zero2" else DistributedType.FSDP
    state = SimpleNamespace(distributed_type=kind, deepspeed_plugin=plugin)
    trainer = SimpleNamespace(
        model=block, accelerator=SimpleNamespace(state=state, num_processes=2), is_fsdp_enabled=engine == "fsdp"
    )
    with pytest.raises(ValueError, match="Each expert of `Module` is a module of its own"):
        keep_in_step(trainer)
    trainer.accelerator.num_processes = 1
    keep_in_step(trainer)
    trainer.accelerator.num_processes, trainer.model = 2, make_experts("mixtral")
    keep_in_step(trainer)


def test_a_checkpoint_is_resumed_with_the_same_coefficient(tmp_path, students, rows):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, students["qwen3_moe"], rows, **options).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    assert read_model_card(checkpoint)["opd_rounds"][0]["router_aux_loss_coef"] == 0.001
    with pytest.raises(ValueError, match="`router_aux_loss_coef` was 0.001 and is 0.1"):
        make_trainer(tmp_path, students["qwen3_moe"], rows, router_aux_loss_coef=0.1, **options).train(
            resume_from_checkpoint=checkpoint
        )
    # What the config of the model says.
    make_trainer(tmp_path, students["qwen3_moe"], rows, router_aux_loss_coef=0.001, **options).train(
        resume_from_checkpoint=checkpoint
    )
