"""Rows longer than a model's positions: an error where it would fail, a warning where it goes on."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from datasets import Dataset
from tiny import VOCAB, make_model, make_rollouts, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer, TableError, collect_rollouts, score_rollouts
from trl_lopd.table.schema import lengths

POSITIONS = 64


@pytest.fixture(params=["absolute", "rotary"])
def model(request, tmp_path):
    if request.param == "rotary":
        model = make_model(seed=2)
        model.config.max_position_embeddings = POSITIONS
    else:
        config = GPT2Config(vocab_size=VOCAB, n_positions=POSITIONS, n_embd=16, n_layer=2, n_head=2, eos_token_id=1)
        model = GPT2LMHeadModel(config).eval()
    model.kind = request.param
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")
    return model


@pytest.fixture
def rollouts():
    rows = make_rollouts(24).to_dict()
    for row in (3, 9, 20):
        rows["completion_ids"][row] = [5 + i % 20 for i in range(70)]
    rollouts = Dataset.from_dict(rows)
    assert sum(np.add(*lengths(rollouts)) > POSITIONS) == 3
    return rollouts


@pytest.mark.parametrize("saved", [True, False])
def test_scoring(model, rollouts, saved, caplog):
    teacher = model.config._name_or_path if saved else model
    if model.kind == "absolute":
        with pytest.raises(TableError, match=r"Row 3 has 7\d tokens, more than the 64 positions of the teacher \(3"):
            score_rollouts(rollouts, teacher)
    else:
        score_rollouts(rollouts, teacher)
        assert caplog.text.count("more than the 64 positions of the teacher (3 such rows)") == 1
    caplog.clear()
    short = rollouts.filter(lambda row: len(row["prompt_ids"]) + len(row["completion_ids"]) <= POSITIONS)
    score_rollouts(short, teacher)
    assert "positions" not in caplog.text


def test_sampling(model, caplog):
    prompts, options = ["w3 w4 w5", "w6"], {"processing_class": make_tokenizer(), "temperature": 3.0}
    if model.kind == "absolute":
        with pytest.raises(TableError, match="`max_completion_length`, prompt 0 has 66 tokens, more than the 64"):
            collect_rollouts(prompts, model, max_completion_length=63, **options)
    else:
        collect_rollouts(prompts * 20, model, max_completion_length=80, **options)
        assert "more than the 64 positions of the model" in caplog.text
    caplog.clear()
    rows = collect_rollouts(prompts, model, max_completion_length=61, **options)
    assert len(rows) == 2 and "positions" not in caplog.text


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training(model, rollouts, teacher_dir, tmp_path, stream, caplog):
    def train(rows, **options):
        options = {"max_steps": 3, "per_device_train_batch_size": 8, **options}
        args = OfflineOPDConfig(tmp_path, use_cpu=True, report_to="none", teacher_consistency="off", **options)
        rows = rows.to_iterable_dataset() if stream else rows
        OfflineOPDTrainer(model, args, rows, processing_class=make_tokenizer()).train()

    rows = score_rollouts(rollouts, str(teacher_dir), top_k=0)
    caplog.set_level(logging.WARNING, "trl_lopd")
    if model.kind == "absolute":
        expected = r"A row has 7\d tokens, more than the 64" if stream else r"row 3 has 7\d tokens, more than the 64"
        with pytest.raises(TableError, match=expected):
            train(rows)
    else:
        train(rows)
        assert caplog.text.count("the 64 positions of the student") == 1
    caplog.clear()
    train(rows, max_length=POSITIONS)
    assert "positions" not in caplog.text
