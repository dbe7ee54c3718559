"""What is sampled, scored and trained is the model's own log-softmax, adapters included, or is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import VOCAB, make_model, make_rollouts, make_tokenizer, without_topk
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM

from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer, collect_rollouts, score_rollouts
from trl_lopd.identity.fingerprint import fingerprint_teacher


class ScaledLogits(LlamaForCausalLM):
    """An architecture that does something to its logits that no config says."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out


def scaled(**options):
    model = make_model(**options)
    model.__class__ = ScaledLogits
    return model


def own_logprobs(model, prompt, completion):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, -len(completion) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0].numpy()


def assert_scored(model, teacher, **options):
    """That the rows are scored as the model scores them, read one at a time."""
    table = score_rollouts(make_rollouts(9), teacher, processing_class=make_tokenizer(), top_k=2, **options)
    spread = 0.0
    for row in table:
        own = own_logprobs(model, row["prompt_ids"], row["completion_ids"])
        np.testing.assert_allclose(row["teacher_logprobs"], own, atol=1e-5)
        spread = max(spread, np.ptp(own))
    assert spread > 1


def test_logits_that_no_config_tells_of_are_scored_as_they_are(caplog):
    model = scaled()
    assert_scored(model, model)
    assert "`ScaledLogits` is scored from its own logits" in caplog.text


def test_logits_that_no_config_tells_of_are_not_trained(table, tmp_path):
    args = OfflineOPDConfig(tmp_path, use_cpu=True, report_to="none", max_steps=1, teacher_consistency="off")
    trainer = OfflineOPDTrainer(scaled(seed=2), args, without_topk(table), processing_class=make_tokenizer())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="`ScaledLogits` cannot be trained here"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    with pytest.raises(ValueError, match="`ScaledLogits` cannot be trained here"):
        trainer.evaluate(table)


@pytest.fixture
def bidirectional():
    options = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    return BertLMHeadModel(BertConfig(vocab_size=VOCAB, max_position_embeddings=64, **options)).eval()


def test_a_model_that_reads_ahead_is_refused(bidirectional, table, tmp_path):
    with pytest.raises(ValueError, match="`BertLMHeadModel` is not causal"):
        score_rollouts(make_rollouts(4), bidirectional, processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="`BertLMHeadModel` is not causal"):
        collect_rollouts(["w3 w4"], bidirectional, processing_class=make_tokenizer(), max_completion_length=4)
    args = OfflineOPDConfig(tmp_path, use_cpu=True, report_to="none", max_steps=1, teacher_consistency="off")
    trainer = OfflineOPDTrainer(bidirectional, args, table, processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="`BertLMHeadModel` is not causal"):
        trainer.train()


ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "lora on lm_head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def adapted(adapter, **options):
    torch.manual_seed(7)
    model = get_peft_model(make_model(**options), copy.deepcopy(ADAPTERS[adapter])).eval()
    # An adapter that has learnt something: fresh ones change nothing.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "prompt" in name:
                parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_loaded_adapter_is_scored_with(adapter):
    model = adapted(adapter)
    assert_scored(model, model)


# Tying matters to an adapter of the head alone.
@pytest.mark.parametrize(
    ("adapter", "tied"),
    [
        pytest.param(adapter, tied, marks=pytest.mark.slow if tied and adapter != "lora on lm_head" else ())
        for adapter in ADAPTERS
        for tied in (False, True)
    ],
)
def test_a_saved_adapter_is_scored_and_sampled_with(adapter, tied, tmp_path):
    base = make_model(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = adapted(adapter, tie_word_embeddings=tied)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert_scored(model, str(tmp_path / "adapter"))
    rows = collect_rollouts(
        ["w3 w4 w5", "w6", "w7 w8"] * 3, str(tmp_path / "adapter"), temperature=0.7, max_completion_length=6
    )
    for row in rows:
        own = own_logprobs(model, row["prompt_ids"], row["completion_ids"])
        np.testing.assert_allclose(row["ref_logprobs"], own, atol=1e-4)
    assert rows["student_fingerprint"][0] == fingerprint_teacher(tmp_path / "adapter").id


def test_continuous_batching_refuses_virtual_tokens():
    model = adapted("prompt tuning")
    with pytest.raises(ValueError, match="Continuous batching does not see the virtual tokens"):
        collect_rollouts(["w3"], model, engine="continuous_batching", processing_class=make_tokenizer())
