"""A loaded student is what is in memory, not what its directory holds."""

from __future__ import annotations

import pytest
import ranks
import torch
from hub import Hub
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import make_model, save_student
from transformers import AutoModelForCausalLM

from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer, TeacherConsistencyError, read_model_card, score_rollouts

LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": "auto", **options})


def make_trainer(tmp_path, model, table, **options):
    options = {"report_to": "none", "use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 4, **options}
    return OfflineOPDTrainer(model, OfflineOPDConfig(tmp_path / "out", **options), table)


def evidence(tmp_path, model, table):
    """What a run says of its teacher consistency, and its card of the SFT teachers."""
    trainer = make_trainer(tmp_path, model, table, teacher_consistency="warn")
    trainer.train()
    trainer.save_model()
    card = read_model_card(tmp_path / "out")
    (round,), (teacher,) = card["opd_rounds"], card["sft_teachers"]
    return round["teacher_consistency"], teacher["evidence"]


def changed(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 0.5
    return model


def merged(model):
    model = get_peft_model(model, LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.merge_and_unload()


def test_what_it_was_loaded_as_is_verified(tmp_path, student_dir, table):
    assert evidence(tmp_path, load(student_dir), table) == ("verified", "verified")


@pytest.mark.parametrize("change", [changed, merged])
def test_what_was_changed_since_is_declared(tmp_path, student_dir, table, change):
    with pytest.raises(TeacherConsistencyError, match="weights merged, cast or trained on since"):
        make_trainer(tmp_path, change(load(student_dir)), table)
    assert evidence(tmp_path, change(load(student_dir)), table) == ("declared", "declared")


@pytest.mark.parametrize(
    ("saved", "loaded", "tied"),
    [
        *((saved, torch.bfloat16, False) for saved in (torch.bfloat16, torch.float16, torch.float32)),
        (torch.bfloat16, torch.float32, False),
        pytest.param(torch.float16, torch.float32, False, marks=pytest.mark.slow),
        pytest.param(torch.float32, torch.float32, False, marks=pytest.mark.slow),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
    ],
)
def test_a_cast_is_no_change(tmp_path, tokenizer, teacher_dir, table, saved, loaded, tied):
    student = make_model(seed=5, tie_word_embeddings=tied).to(saved)
    student = save_student(tmp_path / "student", student, tokenizer, teacher_dir)
    rows = score_rollouts(
        table.select_columns(["prompt_ids", "completion_ids"]), str(teacher_dir), top_k=2, ref_model=str(student)
    )
    make_trainer(tmp_path, load(student, dtype=loaded), rows)
    with pytest.raises(TeacherConsistencyError):
        make_trainer(tmp_path, changed(load(student, dtype=loaded)), rows)


def test_an_adapter_that_has_learnt_nothing_is_none_and_another_is_another_student(tmp_path, student_dir, table):
    fresh = get_peft_model(load(student_dir), LORA)
    make_trainer(tmp_path, fresh, table)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if "lora_B" in name:
                parameter[0, 0] = 0.1
    fresh.save_pretrained(tmp_path / "adapter")
    with pytest.raises(TeacherConsistencyError, match="weights merged, cast or trained on since"):
        make_trainer(tmp_path, fresh, table)
    learnt = PeftModel.from_pretrained(load(student_dir), tmp_path / "adapter", is_trainable=True)
    with pytest.raises(TeacherConsistencyError, match="weights merged, cast or trained on since"):
        make_trainer(tmp_path, learnt, table)


def test_what_cannot_be_fingerprinted_is_declared(tmp_path, student_dir, table, caplog):
    student = load(student_dir)
    student.is_quantized = True
    with pytest.raises(TeacherConsistencyError, match="nothing says which these are"):
        make_trainer(tmp_path, student, table)
    assert "The student cannot be fingerprinted, so what its card says counts as declared" in caplog.text


def test_a_model_whose_directory_is_gone_is_what_it_holds(tmp_path, student_dir, table, tokenizer):
    student = load(student_dir)
    student.config._name_or_path = ""
    args = OfflineOPDConfig(tmp_path / "out", report_to="none", use_cpu=True, teacher_consistency="warn")
    trainer = OfflineOPDTrainer(student, args, table, processing_class=tokenizer)
    round = trainer.describe_round()
    assert round["teacher_consistency"] == "overridden (warn)" and round["student"].split("@")[1]


REVISIONS = """
import json, sys
from pathlib import Path
from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer, TeacherConsistencyError, read_model_card

first, table, out = sys.argv[1], load_from_disk(sys.argv[2]), sys.argv[3]
args = OfflineOPDConfig(out, report_to="none", use_cpu=True)
for revision in (first, "main"):
    model = AutoModelForCausalLM.from_pretrained("tester/student", revision=revision, dtype="float32")
    try:
        print(OfflineOPDTrainer(model, args, table).describe_round()["teacher_consistency"])
    except TeacherConsistencyError as error:
        print("names no SFT teacher" in str(error))
lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
for is_wrapped in (False, True):
    model = AutoModelForCausalLM.from_pretrained("tester/student", revision=first, dtype="float32")
    if is_wrapped:
        trainer = OfflineOPDTrainer(get_peft_model(model, lora), args, table)
    else:
        trainer = OfflineOPDTrainer(model, args, table, peft_config=lora)
    trainer.save_model()
    named = json.loads(Path(out, "adapter_config.json").read_text())
    print(named["base_model_name_or_path"], named["revision"] == first, "model" in read_model_card(out))
"""


def test_a_revision_is_judged_by_its_own_card_and_weights(tmp_path, student_dir, table):
    table.save_to_disk(tmp_path / "table")
    later = tmp_path / "later"
    changed(load(student_dir)).save_pretrained(later)
    (tmp_path / "revisions.py").write_text(REVISIONS)
    with Hub() as hub:
        first = hub.put("model", "tester/student", {path.name: path.read_bytes() for path in student_dir.iterdir()})
        files = {path.name: path.read_bytes() for path in later.iterdir()}
        hub.put("model", "tester/student", files | {"README.md": b"# Trained on\n"})
        words = (tmp_path / "revisions.py", first, tmp_path / "table", tmp_path / "out")
        done = ranks.launch(*words, processes=None, env=hub.env(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-5:-1] == ["verified", "True", *["tester/student True True"] * 2]


def test_an_adapter_whose_base_is_not_what_it_names_is_warned_of(tmp_path, student_dir, table, caplog):
    """It would be loaded over other weights than it was trained on."""
    for change, is_other in ((lambda model: model, False), (changed, True)):
        args = OfflineOPDConfig(tmp_path / "out", report_to="none", use_cpu=True, teacher_consistency="warn")
        trainer = OfflineOPDTrainer(change(load(student_dir)), args, table, peft_config=LORA)
        caplog.clear()
        trainer.save_model()
        assert ("was not trained over the base that it names" in caplog.text) == is_other
        assert ("model" in read_model_card(tmp_path / "out")) != is_other
