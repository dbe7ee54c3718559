"""Adapters: trained, saved, pushed, loaded back, merged; on quantized models; and the options that save memory."""

from __future__ import annotations

import json

import pytest
import ranks
import torch
from accelerate import ParallelismConfig
from hub import Hub
from peft import AutoPeftModelForCausalLM, LoraConfig
from tiny import make_args, make_experts, make_model, make_trainer, save_student
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_lopd import OfflineOPDTrainer, fingerprint_teacher, read_model_card
from trl_lopd.identity.fingerprint import content_id

IDS = torch.tensor([[5, 9, 14, 3, 22, 7], [6, 30, 12, 2, 11, 8]])


def lora(**kwargs):
    return LoraConfig(**dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM") | kwargs)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "whole head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in ("dora", "rank-stabilised") else ()) for kind in ADAPTERS],
)
def test_adapters_train_and_come_back_and_merge(tmp_path, student_dir, table, kind):
    trainer = make_trainer(
        tmp_path, student_dir, table, eval_dataset=table, peft_config=lora(**ADAPTERS[kind]), max_steps=15,
        learning_rate=1e-2,
    )  # fmt: skip
    before = trainer.evaluate()["eval_reverse_kl_topk"]
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.evaluate()["eval_reverse_kl_topk"] < 0.9 * before
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, start[name]) != p.requires_grad, name
    if kind == "whole head":
        trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad and "lora" not in name}
        assert trained == {"base_model.model.lm_head.modules_to_save.default.weight"}
    trainer.save_model()
    assert not (tmp_path / "out" / "model.safetensors").exists()

    expected = logits(trainer.model)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), expected)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # W + BA against Wx + BAx in float32: logits of a size of 10, sums over at most 32 products in each of two layers.
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(student_dir))).abs().max() > 0.1


PUSH = """
import sys

import torch
from datasets import load_from_disk
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM

from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer, read_model_card

student, table, out = sys.argv[1:]
args = OfflineOPDConfig(
    out, hub_model_id="tester/adapter", push_to_hub=True, use_cpu=True, bf16=False, report_to="none", max_steps=2,
    learning_rate=1e-2, save_strategy="no", activation_checkpointing=True, per_device_train_batch_size=4,
)
lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = OfflineOPDTrainer(student, args, load_from_disk(table), peft_config=lora)
trainer.train()
trainer.push_to_hub()
ids = torch.tensor([[5, 9, 14, 3]])
pulled = AutoPeftModelForCausalLM.from_pretrained("tester/adapter").eval()
with torch.no_grad():
    assert torch.equal(pulled(ids).logits, trainer.model.eval()(ids).logits)
    assert not torch.equal(pulled(ids).logits, AutoModelForCausalLM.from_pretrained(student).eval()(ids).logits)
assert read_model_card("tester/adapter")["opd_rounds"]
"""


@pytest.mark.parametrize("kind", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_adapters_on_experts_train_and_come_back_and_merge(tmp_path, tokenizer, teacher_dir, table, kind):
    student = save_student(tmp_path / "student", make_experts(kind), tokenizer, teacher_dir)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    peft_config = lora(target_modules=[], target_parameters=targets)
    trainer = make_trainer(tmp_path, student, table, peft_config=peft_config, learning_rate=1e-2, max_steps=3)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trained = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert len(trained) == 8 and all("experts" in name and "lora" in name for name in trained)
    trainer.save_model()
    out = tmp_path / "out"
    id_in_memory, expected = fingerprint_teacher(trainer.model, tokenizer).id, logits(trainer.model)
    assert content_id(fingerprint_teacher(out).id) == content_id(id_in_memory)
    # PEFT writes them in the order of a set.
    config = json.loads((out / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == sorted(targets)
    config["target_parameters"].reverse()
    (out / "adapter_config.json").write_text(json.dumps(config))
    assert content_id(fingerprint_teacher(out).id) == content_id(id_in_memory)
    loaded = AutoPeftModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(loaded), expected)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_an_adapter_is_pushed_and_pulled(tmp_path, student_dir, table):
    table.save_to_disk(tmp_path / "table")
    (tmp_path / "push.py").write_text(PUSH)
    words = (tmp_path / "push.py", student_dir, tmp_path / "table", tmp_path / "out")
    with Hub() as hub:
        done = ranks.launch(*words, processes=None, env=hub.env(tmp_path / "home"))
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.files("model", "tester/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files)
    assert "model.safetensors" not in files


def quantized(bits):
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def wide_student(tmp_path_factory, tokenizer, teacher_dir):
    """On a CPU, bitsandbytes packs rows of 4-bit weights by 32."""
    path = tmp_path_factory.mktemp("models") / "wide"
    return save_student(path, make_model(seed=2, hidden=64), tokenizer, teacher_dir)


@pytest.mark.parametrize(
    ("bits", "options"),
    [(4, {}), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(4, {"use_dora": True}), (8, {})])],
)
def test_adapters_train_on_quantized_weights(tmp_path, wide_student, table, bits, options):
    pytest.importorskip("bitsandbytes")

    def make(student, **kwargs):
        args = make_args(tmp_path, max_steps=20, learning_rate=2e-3, activation_checkpointing=True)
        return OfflineOPDTrainer(str(student), args, table, table, quantization_config=quantized(bits), **kwargs)

    trainer = make(wide_student, peft_config=lora(**options))
    layers = [m for m in trainer.model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
    assert len(layers) >= 14  # seven in each of two layers
    before = trainer.evaluate()["eval_reverse_kl_topk"]
    packed = [layer.weight.detach().clone() for layer in layers]
    trainer.train()
    after = trainer.evaluate()["eval_reverse_kl_topk"]
    assert after < 0.95 * before
    assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, packed, strict=True))
    trainer.save_model()
    # The adapter's directory is a student like any other, over a base that is quantized again.
    again = make(tmp_path / "out")
    assert again.evaluate()["eval_reverse_kl_topk"] == pytest.approx(after, rel=1e-5)
    assert read_model_card(str(tmp_path / "out"))["opd_rounds"]


def test_quantized_weights_alone_cannot_be_trained(tmp_path, student_dir, table):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="purely quantized"):
        OfflineOPDTrainer(str(student_dir), make_args(tmp_path), table, quantization_config=quantized(4))


# ---- Options that save memory ----


@pytest.mark.parametrize(
    ("kwargs", "adapters"),
    [
        ({"every_n_layers": 2}, False),
        ({}, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [({}, False), ({"use_reentrant": True}, True)]),
    ],
)
def test_activation_checkpointing_changes_no_loss(tmp_path, student_dir, table, kwargs, adapters):
    losses = []
    for options in ({}, {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs}):
        config = lora() if adapters else None
        trainer = make_trainer(tmp_path, student_dir, table, peft_config=config, max_steps=3, **options)
        trainer.train()
        losses.append([x["loss"] for x in trainer.state.log_history if "loss" in x])
    assert trainer.model.is_activation_checkpointing
    # What is recomputed is computed by the same operations.
    assert losses[0] == losses[1] and losses[0][0] > losses[0][2]


@pytest.mark.parametrize("given", ["in the arguments", "by the launcher"])
@pytest.mark.parametrize("size", ["cp_size", "sp_size"])
def test_split_sequences_are_refused_before_a_model_is_loaded(tmp_path, student_dir, table, monkeypatch, given, size):
    options = {}
    if given == "by the launcher":
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{size.upper()}", "2")
    else:
        options["parallelism_config"] = ParallelismConfig(**{size: 2})
    monkeypatch.setattr("trl_lopd.training.student.create_model_from_path", None)
    with pytest.raises(ValueError, match="`cp_size` and `sp_size` to 1.*activation_checkpointing.*max_tokens_per_dev"):
        make_trainer(tmp_path, student_dir, table, **options)


def test_of_liger_all_but_the_loss_is_used(tmp_path, student_dir, table):
    with pytest.raises(ValueError, match="fused_linear_cross_entropy.*Leave it out"):
        make_trainer(
            tmp_path, student_dir, table, use_liger_kernel=True,
            liger_kernel_config={"fused_linear_cross_entropy": True},
        )  # fmt: skip
    pytest.importorskip("liger_kernel")
    # Triton kernels need a GPU.
    gpu_only = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy"), False)
    trainer = make_trainer(
        tmp_path, student_dir, table, use_liger_kernel=True, liger_kernel_config=gpu_only, max_steps=1
    )
    forward = trainer.model.forward
    trainer.train()
    assert trainer.model.forward == forward
