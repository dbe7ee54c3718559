"""What a careless or a hostile user does to make a verdict or a card say more than is known."""

from __future__ import annotations

import json
import logging
import re
import shutil

import pytest
import torch
from datasets import concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import make_args, make_model, make_rollouts, make_tokenizer, make_trainer, save_student
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trl_lopd import (
    EffOPDCallback,
    OfflineOPDTrainer,
    ShardError,
    TableError,
    TeacherConsistencyError,
    TeacherStampCallback,
    check_teacher_consistency,
    collect_rollouts,
    fingerprint_teacher,
    generate_sft_data,
    load_table,
    read_model_card,
    score_rollouts,
)
from trl_lopd.identity.cards import read_dataset_card
from trl_lopd.identity.fingerprint import fingerprint_loaded
from trl_lopd.identity.vocabulary import different_tokens


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("other") / "teacher"
    make_model(seed=7).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def other_table(other_dir, student_dir):
    return score_rollouts(make_rollouts(24), str(other_dir), top_k=4, ref_model=str(student_dir))


# ---- Fingerprints ----


def test_options_that_make_another_model_of_a_checkpoint_only_declare_it(teacher_dir, student_dir, tmp_path, caplog):
    cut = {"model_init_kwargs": {"num_hidden_layers": 1}}
    table = score_rollouts(make_rollouts(4), teacher_dir, top_k=2, **cut)
    assert table["teacher_fingerprint"][0].endswith("#declared") and "`num_hidden_layers`" in caplog.text
    data = generate_sft_data(["w5 w6"], teacher_dir, max_completion_length=4, truncated="keep", **cut)
    assert data["teacher_fingerprint"][0].endswith("#declared")
    harmless = {"dtype": "float32", "model_init_kwargs": {"attn_implementation": "eager", "attention_dropout": 0.0}}
    assert "#" not in score_rollouts(make_rollouts(4), teacher_dir, top_k=2, **harmless)["teacher_fingerprint"][0]
    good = score_rollouts(make_rollouts(8), teacher_dir, top_k=2)
    with pytest.raises(TeacherConsistencyError):
        make_trainer(tmp_path, student_dir, good, **cut)


def test_a_fingerprint_that_is_given_is_no_more_than_declared(teacher_dir, other_dir):
    claimed = fingerprint_teacher(teacher_dir)
    for scorer in (teacher_dir, other_dir):
        table = score_rollouts(make_rollouts(4), scorer, top_k=2, fingerprint=claimed)
        assert table["teacher_fingerprint"][0] == f"{claimed.id}#declared"
    data = generate_sft_data(["w5"], other_dir, fingerprint=claimed, max_completion_length=2, truncated="keep")
    assert data["teacher_fingerprint"][0] == f"{claimed.id}#declared"


def test_a_loaded_model_with_fewer_layers_is_not_its_checkpoint(teacher_dir):
    whole = fingerprint_teacher(teacher_dir)
    assert fingerprint_loaded(AutoModelForCausalLM.from_pretrained(teacher_dir)) == whole
    cut = AutoModelForCausalLM.from_pretrained(teacher_dir, num_hidden_layers=1)
    assert fingerprint_loaded(cut).weights != whole.weights


def test_a_head_that_was_tied_and_replaced_is_seen(tmp_path, tokenizer):
    make_model(seed=1, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    whole = fingerprint_teacher(tmp_path / "tied")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert fingerprint_loaded(model) == whole
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    assert fingerprint_loaded(model).weights != whole.weights


def lora(base, **config):
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **config))


def test_a_head_trained_beside_an_adapter_of_zeros_is_seen(teacher_dir):
    whole = fingerprint_teacher(teacher_dir)
    assert fingerprint_loaded(lora(AutoModelForCausalLM.from_pretrained(teacher_dir))) == whole
    model = lora(AutoModelForCausalLM.from_pretrained(teacher_dir), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    assert fingerprint_loaded(model).id != whole.id


def test_an_adapter_that_is_disabled_or_scaled_has_no_fingerprint(teacher_dir, tmp_path):
    model = lora(AutoModelForCausalLM.from_pretrained(teacher_dir), init_lora_weights=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(teacher_dir), tmp_path)
    fingerprint_teacher(loaded)
    with loaded.disable_adapter(), pytest.raises(ValueError, match="adapters of the PeftModel are disabled"):
        score_rollouts(make_rollouts(2), loaded, top_k=2)
    for module in loaded.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 5.0)
    with pytest.raises(ValueError, match="is scaled by"):
        score_rollouts(make_rollouts(2), loaded, top_k=2)


# ---- Tokenizers ----


def wordpieces(*tokens):
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    byte_level = any("Ġ" in token or "Ã" in token for token in tokens)
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=tokens[0])


@pytest.mark.parametrize(
    "first, second, differ",
    [
        (("<u>", "▁cat", "cat"), ("<u>", "cat", "▁cat"), [1, 2]),
        (("<u>", "Ã", "Â", "Ġa"), ("<u>", "Â", "Ã", "Ġa"), [1, 2]),  # bytes C3 and C2, parts of characters
        (("<u>", "▁cat", "cat"), ("<u>", "▁cat", "cat"), []),
    ],
)
def test_tokens_that_decode_alike_alone_are_told_apart(first, second, differ):
    assert sorted(different_tokens(wordpieces(*first), wordpieces(*second), range(1, len(first)))) == differ


# ---- Tables ----


def test_top_k_that_was_added_after_scoring_is_not_intact(teacher_dir, student_dir, other_table):
    rows = make_rollouts(24)
    table = score_rollouts(rows, teacher_dir, top_k=0)
    card = read_model_card(student_dir)
    assert check_teacher_consistency(card, table).rows == "intact"
    for name in ("teacher_topk_ids", "teacher_topk_logprobs"):
        table = table.add_column(name, other_table[name][:])
    verdict = check_teacher_consistency(card, table)
    assert verdict.rows == "unverified" and "does not cover" in verdict.warnings[0]


def test_the_reference_is_the_model_that_sampled(tmp_path, tokenizer, teacher_dir, student_dir):
    """Else training would measure how far it is from rollouts that it never sampled."""
    rollouts = collect_rollouts(["w5 w6", "w7"], student_dir, max_completion_length=4, ref_logprobs=False)
    twin = save_student(tmp_path / "twin", make_model(seed=9), tokenizer, teacher_dir)
    with pytest.raises(TableError, match="Rows were sampled by student@.* and `ref_model` is twin@"):
        score_rollouts(rollouts, teacher_dir, top_k=2, ref_model=twin)
    for model in (student_dir, AutoModelForCausalLM.from_pretrained(student_dir)):
        assert "ref_logprobs" in score_rollouts(rollouts, teacher_dir, top_k=2, ref_model=model).column_names
    cast = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.bfloat16)
    rollouts = collect_rollouts(["w5 w6", "w7"], cast, processing_class=tokenizer, max_completion_length=4)
    rollouts = rollouts.remove_columns("ref_logprobs")
    assert "ref_logprobs" in score_rollouts(rollouts, teacher_dir, top_k=2, ref_model=cast).column_names


def test_probes_are_of_the_teacher_that_they_stand_under(tmp_path, teacher_dir, other_dir):
    """The card of another teacher's table may lie in the directory already, of a repository that was cloned."""
    score_rollouts(make_rollouts(4), teacher_dir, top_k=2, output_dir=tmp_path / "first")
    (tmp_path / "second").mkdir()
    shutil.copy(tmp_path / "first" / "README.md", tmp_path / "second")
    score_rollouts(make_rollouts(4), other_dir, top_k=2, output_dir=tmp_path / "second")
    first, second = (read_dataset_card(tmp_path / name)["teachers"][0] for name in ("first", "second"))
    assert first["probes"]["sequences"] and first["probes"] != second["probes"]


def test_a_store_is_its_own_shards_alone(tmp_path, teacher_dir):
    score_rollouts(make_rollouts(10), teacher_dir, top_k=2, output_dir=tmp_path / "a")
    score_rollouts(make_rollouts(7, seed=4), teacher_dir, top_k=2, output_dir=tmp_path / "a" / "more")
    assert len(load_table(tmp_path / "a")) == 10 and len(load_table(tmp_path / "a" / "more", split="train")) == 7


def test_a_transform_is_refused_where_it_would_be_ignored(tmp_path, teacher_dir, student_dir, table):
    def cut(batch):
        return {name: [ids[:1] for ids in values] for name, values in batch.items()}

    with pytest.raises(ValueError, match="`train_dataset` has a transform.*with_format"):
        make_trainer(tmp_path, student_dir, table.with_transform(cut))
    with pytest.raises(ValueError, match="`dataset` has a transform"):
        score_rollouts(make_rollouts(4).with_transform(cut), teacher_dir)


def test_rows_that_are_answered_again_lose_what_was_about_their_old_answers(student_dir, table):
    masked = table.add_column("completion_mask", [[True] * len(ids) for ids in table["completion_ids"]])
    prompts = masked.add_column("prompt", ["w5 w6"] * len(table)).select(range(4))
    again = collect_rollouts(prompts, student_dir, max_completion_length=3, ref_logprobs=False)
    assert set(again.column_names) == {
        *("prompt", "prompt_ids", "completion_ids", "completion", "finish_reason", "student_fingerprint"),
    }


def test_answers_that_end_elsewhere_are_not_those_of_a_run_before(tmp_path, tokenizer, teacher_dir):
    student = save_student(tmp_path / "student", make_model(seed=9), tokenizer, teacher_dir)
    collect_rollouts(["w5 w6", "w7"], student, max_completion_length=8, output_dir=tmp_path / "rollouts")
    config = GenerationConfig.from_pretrained(student)
    config.eos_token_id = [1, 7]
    config.save_pretrained(student)
    with pytest.raises(ShardError, match="eos_token_ids"):
        collect_rollouts(["w5 w6", "w7"], student, max_completion_length=8, output_dir=tmp_path / "rollouts")


# ---- Cards ----


def test_a_checkpoint_is_not_resumed_on_another_teacher_s_scores(tmp_path, student_dir, table, other_table):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, student_dir, other_table, teacher_consistency="warn", **options).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    good, other = table["teacher_fingerprint"][0], other_table["teacher_fingerprint"][0]
    with pytest.raises(ValueError, match=f"scored by {re.escape(other)}, and these by {re.escape(good)}"):
        make_trainer(tmp_path, student_dir, table, **options).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="`beta` was 0.5 and is 1.0"):
        make_trainer(tmp_path, student_dir, other_table, teacher_consistency="warn", beta=1.0, **options).train(
            resume_from_checkpoint=checkpoint
        )
    again = make_trainer(tmp_path, student_dir, other_table, teacher_consistency="warn", **options)
    again.train(resume_from_checkpoint=checkpoint)
    assert again.state.global_step == 2


def test_a_checkpoint_is_resumed_by_its_own_run_alone(tmp_path, tokenizer, teacher_dir, student_dir, table):
    """Not with another student, another table, another round or another objective, as a script does that always
    passes `resume_from_checkpoint=True`."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, student_dir, table, **options).train()
    twin = save_student(tmp_path / "twin", make_model(seed=9), tokenizer, teacher_dir)
    first = str(tmp_path / "out" / "checkpoint-2")
    for student, rows, changes, message in (
        (twin, table, {}, "`student` was student@.* and is twin@"),
        (student_dir, table.select(range(20)), {}, "other rows than the 20"),
        (student_dir, table, {"loss_aggregation": "token_mean"}, "`loss_aggregation` was sequence_mean"),
        (student_dir, table.select(range(23, -1, -1)), {}, "same rows, in another order or number"),
        (student_dir, concatenate_datasets([table, table]), {}, "same rows, in another order or number"),
        (student_dir, table, {"gradient_accumulation_steps": 2}, "total_train_batch_size` was 4 and is 8"),
        (student_dir, table, {"per_device_train_batch_size": 2}, "total_train_batch_size` was 4 and is 2"),
        (student_dir, table, {"dataloader_drop_last": True}, "`dataloader_drop_last` was False and is True"),
        (student_dir, table, {"max_completion_length": 5}, "`max_completion_length` was 4096 and is 5"),
        (tmp_path / "out" / "checkpoint-4", table, {}, "1 rounds .*, and that of .* of 1 before"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, student, rows, **options, **changes).train(resume_from_checkpoint=first)
    same_batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for changes in ({}, same_batch):
        resumed = make_trainer(tmp_path, student_dir, table, **options, **changes)
        resumed.train(resume_from_checkpoint=first)
        assert resumed.state.global_step == 4


def test_rows_grouped_by_length_are_grouped_by_the_batch_of_a_process(tmp_path, student_dir, table):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    options["train_sampling_strategy"] = "group_by_length"
    make_trainer(tmp_path, student_dir, table, **options).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    settings = json.loads((checkpoint / "training_args.json").read_text())
    # As two processes would have it.
    settings["per_device_train_batch_size"] = 2
    (checkpoint / "training_args.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="groups of .* rows"):
        make_trainer(tmp_path, student_dir, table, **options).train(resume_from_checkpoint=str(checkpoint))


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}w28 {{ m.content }} w29 {% else %}"
    "{{ m.content.split('w26')[-1] }} <eos>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("kind", ["sampled", "reasoning dropped", "other texts"])
def test_sft_that_does_not_learn_what_the_teacher_sampled_is_not_verified(tmp_path, kind, caplog):
    """A template drops the reasoning of earlier turns, as DeepSeek-R1's does; or `map` writes other answers."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE if kind == "reasoning dropped" else TEMPLATE.replace(".split('w26')[-1]", "")
    make_model(seed=1).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    prompts = [[{"role": "user", "content": f"w{i} w{i + 1}"}] for i in range(3, 25)]
    # With `input_ids`, special tokens in the middle of an answer are learnt, too.
    truncated = "keep" if kind == "sampled" else "drop"
    data = generate_sft_data(prompts, tmp_path / "teacher", max_completion_length=60, truncated=truncated)
    if kind == "other texts":
        text = " ".join(f"w{i}" for i in range(20, 3, -1))
        data = data.map(lambda row: {"completion": [{"role": "assistant", "content": text}]})
    args = SFTConfig(str(tmp_path / "sft"), max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    trainer = SFTTrainer(make_model(seed=2), args, train_dataset=data, processing_class=tokenizer)
    with caplog.at_level(logging.WARNING):
        callback = TeacherStampCallback(trainer, data)
    assert ("of what the teacher sampled is trained on" in caplog.text) == (kind != "sampled")
    (teacher,) = callback.sft_teachers
    assert teacher["evidence"] == ("declared" if kind == "other texts" else "verified")


def test_sft_is_not_resumed_from_another_start(tmp_path, tokenizer, teacher_dir, other_dir):
    """The card would name the teacher of a model that the weights never were."""
    data = generate_sft_data(["w5 w6", "w7 w8", "w9"] * 4, teacher_dir, max_completion_length=6, truncated="keep")
    plain = tmp_path / "plain"
    make_model(seed=5).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    taught = save_student(tmp_path / "taught", make_model(seed=6), tokenizer, other_dir)

    def sft(start):
        args = SFTConfig(
            str(tmp_path / "sft"), max_steps=2, save_strategy="steps", save_steps=1, use_cpu=True, bf16=False,
            report_to="none", disable_tqdm=True, per_device_train_batch_size=2,
        )  # fmt: skip
        trainer = SFTTrainer(str(start), args, train_dataset=data, processing_class=tokenizer)
        trainer.add_callback(TeacherStampCallback(trainer, data))
        return trainer

    sft(plain).train()
    with pytest.raises(ValueError, match="what its start had learnt from"):
        sft(taught).train(resume_from_checkpoint=str(tmp_path / "sft" / "checkpoint-1"))


def test_a_model_that_is_saved_untrained_has_no_round(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table)
    trainer.save_model()
    assert not read_model_card(tmp_path / "out").get("opd_rounds")


def test_a_table_is_replaced_before_training_and_not_after(tmp_path, student_dir, table, other_table):
    trainer = make_trainer(tmp_path, student_dir, other_table, teacher_consistency="warn", max_steps=1)
    trainer.train_dataset = table
    trainer.train()
    (teacher,) = trainer.describe_round()["teachers"]
    assert teacher["id"] == table["teacher_fingerprint"][0] and teacher["rows"] == len(table)
    trainer.train_dataset = other_table
    with pytest.raises(ValueError, match="was replaced after training"):
        trainer.train()


# ---- What else was asked for and ignored ----


def test_a_gate_is_not_turned_round(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table, table)
    with pytest.raises(ValueError, match="contradicts the gate, ReverseKLGate, of which less is better"):
        EffOPDCallback(trainer, greater_is_better=True)


def test_rows_that_stretch_rotary_embeddings_are_warned_of_and_rescored(tmp_path, teacher_dir, tokenizer, caplog):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_model(seed=2, rope_parameters=rope)
    model.config.max_position_embeddings = 8
    student = save_student(tmp_path / "student", model, make_tokenizer(), teacher_dir)
    rollouts = collect_rollouts(["w5 w6 w7 w8"], student, temperature=1.0, max_completion_length=12, seed=3)
    row = rollouts[0]
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    assert ids.shape[1] > 8
    own = AutoModelForCausalLM.from_pretrained(student)(ids).logits[0].log_softmax(-1)
    start = len(row["prompt_ids"])
    expected = own[start - 1 : -1].gather(-1, ids[0, start:, None]).squeeze(-1)
    assert row["ref_logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)
    table = score_rollouts(make_rollouts(8), teacher_dir, top_k=2)
    OfflineOPDTrainer(str(student), make_args(tmp_path), table)
    assert "changes the rotary embeddings of all its rows" in caplog.text
