"""Really sharded models have the fingerprint of the directory they were loaded from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from trl_lopd.identity.fingerprint import TeacherFingerprint, fingerprint_teacher

SCRIPT = Path(__file__).parent / "fingerprint_script.py"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "teacher"
    make_model(seed=1, tie_word_embeddings=True).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, teacher):
    path = tmp_path_factory.mktemp("sharded") / "adapter"
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(teacher), config).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_sharded_over_two_processes(tmp_path, teacher, adapter, kind):
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    done = ranks.launch(SCRIPT, kind, teacher, adapter, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {"model": fingerprint_teacher(teacher), "adapter": fingerprint_teacher(adapter)}
    if kind == "zero3":
        expected["engine"] = expected["model"]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == expected.keys()
        for case, fingerprint in expected.items():
            assert TeacherFingerprint.from_dict(found[case]) == fingerprint, (rank, case)
            assert found[case]["parameters"] == fingerprint.parameters
