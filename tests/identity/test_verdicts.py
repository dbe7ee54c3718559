"""What the check says of real models and tables, after everything that happens to them by accident."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, concatenate_datasets, load_dataset
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_lopd import (
    check_teacher_consistency,
    collect_rollouts,
    fingerprint_teacher,
    load_table,
    read_dataset_card,
    read_model_card,
    residualize_table,
    score_rollouts,
    stamp_dataset_card,
    stamp_model_card,
)
from trl_lopd.identity.cards import attach_record, record_of

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def save(directory: Path, seed: int, dtype=torch.bfloat16, tokenizer=None) -> Path:
    make_model(seed=seed).to(dtype).save_pretrained(directory)
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def stamp(student: Path, *teachers: Path) -> Path:
    """As `TeacherStampCallback` does."""
    fingerprints = [fingerprint_teacher(teacher) for teacher in teachers]
    stamp_model_card(student, sft_teachers=fingerprints, evidence="verified", checkpoint=fingerprint_teacher(student))
    return student


@dataclass
class Case:
    """A teacher, the student that learnt from its answers, that student's rollouts, and room to do harm."""

    teacher: Path
    student: Path
    rollouts: Dataset
    made: dict[object, Dataset]
    tmp: Path

    def once(self, key, make) -> Dataset:
        """What was made by an earlier case, which did its harm to a copy."""
        if key not in self.made:
            self.made[key] = make()
        return copy.deepcopy(self.made[key])

    def score(self, teacher: Path | None = None) -> Dataset:
        if teacher is None:
            return self.once("teacher", lambda: self.score(self.teacher))
        return score_rollouts(self.rollouts, str(teacher), top_k=2)

    def copy(self, directory: Path) -> Path:
        return Path(shutil.copytree(directory, self.tmp / "elsewhere" / directory.name, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    path = tmp_path_factory.mktemp("originals")
    teacher = save(path / "teacher", seed=1)
    student = stamp(save(path / "student", seed=2), teacher)
    rollouts = collect_rollouts(["w5 w6", "w7", "w8 w9 w10", "w11"] * 3, str(student), max_completion_length=6)
    return teacher, student, rollouts, {}


@pytest.fixture
def case(originals, tmp_path):
    return Case(*originals, tmp_path)


def rewrite(directory: Path, change, file="model.safetensors") -> Path:
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})
    return directory


def flip_a_bit(tensors):
    tensors["model.norm.weight"].view(torch.uint8)[0] ^= 1


def edit_card(directory: Path, change) -> None:
    path = directory / "README.md"
    _, front, body = path.read_text().split("---\n", 2)
    data = yaml.safe_load(front)
    change(data["trl_lopd"])
    path.write_text(f"---\n{yaml.safe_dump(data)}---\n{body}")


# ---- What happens to a teacher, between its SFT answers and its scores ----


def untouched(case):
    return case.student, case.score()


def resharded(case):
    model = AutoModelForCausalLM.from_pretrained(case.teacher)
    model.save_pretrained(case.tmp / "shards", max_shard_size="4KB")
    shutil.copy(case.teacher / "tokenizer.json", case.tmp / "shards")
    shutil.copy(case.teacher / "tokenizer_config.json", case.tmp / "shards")
    shutil.copy(case.teacher / "chat_template.jinja", case.tmp / "shards")
    assert len(list((case.tmp / "shards").glob("*.safetensors"))) > 1
    return case.student, case.score(case.tmp / "shards")


def renamed_files(case):
    student, table = resharded(case)
    directory = (case.tmp / "shards").rename(case.tmp / "another-name")
    index = directory / "model.safetensors.index.json"
    names = sorted(file.name for file in directory.glob("*.safetensors"))
    text = index.read_text()
    for i, name in enumerate(names):
        (directory / name).rename(directory / f"part{i}.safetensors")
        text = text.replace(name, f"part{i}.safetensors")
    index.write_text(text)
    return case.student, case.score(directory)


def saved_again_by_transformers(case):
    AutoModelForCausalLM.from_pretrained(case.teacher).save_pretrained(case.tmp / "again")
    AutoTokenizer.from_pretrained(case.teacher).save_pretrained(case.tmp / "again")
    return case.student, case.score(case.tmp / "again")


def cast_to_float16(case):
    model = AutoModelForCausalLM.from_pretrained(case.teacher, dtype=torch.float16)
    directory = case.copy(case.teacher)
    model.save_pretrained(directory)
    return case.student, case.score(directory)


def loaded_in_float16(case):
    """The checkpoint is the same; only this scoring is less exact."""
    kwargs = {"model_init_kwargs": {"dtype": "float16"}}
    return case.student, score_rollouts(case.rollouts, str(case.teacher), top_k=2, **kwargs)


def one_bit_flipped(case):
    return case.student, case.score(rewrite(case.copy(case.teacher), flip_a_bit))


def another_tokenizer(case):
    directory = case.copy(case.teacher)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["w999"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return case.student, case.score(directory)


def another_chat_template(case):
    directory = case.copy(case.teacher)
    (directory / "chat_template.jinja").write_text(TEMPLATE + "!")
    return case.student, case.score(directory)


def another_pad_token(case):
    """Training scripts choose it freely; it decides no token id."""
    directory = case.copy(case.teacher)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(directory)
    return case.student, case.score(directory)


def swapped(case):
    return case.student, case.score(save(case.tmp / "other", seed=9))


# ---- Tables ----


def two_teachers_of_which_one_is_a_stranger(case):
    tables = [case.score(), case.score(save(case.tmp / "other", seed=9))]
    return case.student, concatenate_datasets([table.select(range(6)) for table in tables])


def two_teachers_that_both_wrote_sft_data(case):
    student, table = two_teachers_of_which_one_is_a_stranger(case)
    return stamp(case.copy(student), case.teacher, case.tmp / "other"), table


def two_teachers_of_which_one_table_has_no_record(case):
    student, _ = two_teachers_of_which_one_is_a_stranger(case)
    without = case.score(case.tmp / "other")
    without.info.description = ""
    table = concatenate_datasets([case.score().select(range(6)), without.select(range(6))])
    return stamp(case.copy(student), case.teacher, case.tmp / "other"), table


def teacher_called_otherwise(case):
    """Names are for people."""
    directory = case.copy(case.student)
    edit_card(directory, lambda record: record["sft_teachers"][0].update(model_id="org/Better-Name"))
    called = lambda row: {"teacher_fingerprint": "mine@" + row["teacher_fingerprint"].partition("@")[2]}  # noqa: E731
    return directory, case.score().map(called)


def fingerprint_column_lost(case):
    table = case.score()
    return case.student, table.select_columns([c for c in table.column_names if c != "teacher_fingerprint"])


def fingerprint_column_partly_empty(case):
    table = case.score()
    return case.student, table.map(lambda row, i: {"teacher_fingerprint": row["teacher_fingerprint"] * (i != 3)},
                                   with_indices=True)  # fmt: skip


def topk_columns_lost(case):
    return case.student, case.score().select_columns(
        ["prompt_ids", "completion_ids", "teacher_logprobs", "teacher_fingerprint"]
    )


def a_column_added(case):
    return case.student, case.score().map(lambda row: {"difficulty": len(row["prompt_ids"])})


def shuffled(case):
    return case.student, case.score().shuffle(seed=1)


def filtered(case):
    return case.student, case.score().filter(lambda row: len(row["prompt_ids"]) > 1)


def altered_and_selected(case):
    student, table = one_score_changed(case)
    return student, table.select(range(6))


def split_and_joined(case):
    parts = case.score().train_test_split(0.3, seed=1)
    return case.student, concatenate_datasets([parts["test"], parts["train"]])


def one_score_changed(case):
    def change(row, i):
        row["teacher_logprobs"][0] -= 0.01 * (i == 5)
        return row

    return case.student, case.score().map(change, with_indices=True)


def saved_to_disk(case):
    case.score().save_to_disk(case.tmp / "table")
    return case.student, load_table(case.tmp / "table")


def parquet_with_its_card(case):
    (case.tmp / "table").mkdir()
    table = case.score()
    table.to_parquet(case.tmp / "table" / "train.parquet")
    stamp_dataset_card(case.tmp / "table", table)
    return case.student, load_table(case.tmp / "table", split="train")


def parquet_without_its_card(case):
    student, _ = parquet_with_its_card(case)
    return student, load_dataset("parquet", data_files=str(case.tmp / "table" / "train.parquet"), split="train")


def parquet_whose_rows_were_changed(case):
    student, table = parquet_with_its_card(case)
    rows = table.to_list()
    rows[2]["teacher_logprobs"][0] = -9.0
    Dataset.from_list(rows, features=table.features).to_parquet(case.tmp / "table" / "train.parquet")
    return student, load_table(case.tmp / "table", split="train")


def table_card_of_another_teacher(case):
    student, _ = parquet_with_its_card(case)
    other = fingerprint_teacher(save(case.tmp / "other", seed=9))
    edit_card(case.tmp / "table", lambda record: record["teachers"][0].update(other.to_dict()))
    return student, load_table(case.tmp / "table", split="train")


def table_card_that_contradicts_itself(case):
    table = case.score()
    record = record_of(table)
    record["teachers"][0]["weights"] = "0" * 64
    attach_record(table, record)
    return case.student, table


# ---- Several teachers, each of its domain ----

DOMAINS = ["math", "code", "code"] * 4


def wrote(case, **domains):
    """The student, with a card that says how many rows of which domain each of two teachers wrote."""
    student = case.copy(case.student)
    entries = [
        fingerprint_teacher(teacher).to_dict() | {"evidence": "verified", "rows": 50}
        for teacher in (case.teacher, other(case))
    ]
    for entry, name in zip(entries, ("first", "second"), strict=True):
        entry |= {"teacher_ids": domains[name]} if domains.get(name) else {}
    stamp_model_card(student, sft_teachers=entries, sft_rows=100, checkpoint=fingerprint_teacher(student))
    return student


def other(case):
    directory = case.tmp / "other"
    return directory if directory.exists() else save(directory, seed=9)


def scored(case, domains=DOMAINS, **teachers):
    """By `case.teacher` and `other(case)` alone, which are the same in all cases."""
    teachers = teachers or {"math": case.teacher, "code": other(case)}
    rows = case.rollouts.add_column("teacher_id", domains)
    key = (*domains, *((name, path.name) for name, path in teachers.items()))
    return case.once(key, lambda: score_rollouts(rows, teachers, top_k=2))


def each_by_its_own(case):
    return wrote(case, first={"math": 50}, second={"code": 50}), scored(case)


def each_by_its_own_from_disk_and_parquet(case):
    student, table = each_by_its_own(case)
    (case.tmp / "table").mkdir()
    table.to_parquet(case.tmp / "table" / "train.parquet")
    stamp_dataset_card(case.tmp / "table", table)
    return student, load_table(case.tmp / "table", split="train")


def each_by_its_own_in_another_order(case):
    student, table = each_by_its_own(case)
    return student, table.shuffle(seed=1)


def tables_of_each_joined(case):
    student, table = each_by_its_own(case)
    return student, concatenate_datasets([table.filter(lambda row: row["teacher_id"] == n) for n in ("code", "math")])  # noqa: B023


def swapped_domains(case):
    table = scored(case, math=other(case), code=case.teacher)
    return wrote(case, first={"math": 50}, second={"code": 50}), table


def swapped_domains_of_a_selection(case):
    student, table = swapped_domains(case)
    return student, table.select(range(1))


def one_teacher_for_both(case):
    table = score_rollouts(case.rollouts.add_column("teacher_id", DOMAINS), str(case.teacher), top_k=2)
    return wrote(case, first={"math": 50}, second={"code": 50}), table


def one_teacher_that_wrote_both(case):
    table = score_rollouts(case.rollouts.add_column("teacher_id", DOMAINS), str(case.teacher), top_k=2)
    return wrote(case, first={"math": 25, "code": 25}, second={"code": 50}), table


def swapped_domains_on_weights_that_the_card_is_not_of(case):
    student, table = swapped_domains(case)
    return rewrite(student, flip_a_bit), table


def a_domain_that_the_sft_data_did_not_have(case):
    table = scored(case, ["math", "law", "law"] * 4, math=case.teacher, law=other(case))
    return wrote(case, first={"math": 50}, second={"code": 50}), table


def the_names_of_domains_lost(case):
    student, table = swapped_domains(case)
    return student, table.remove_columns("teacher_id")


def names_of_domains_that_are_numbers(case):
    student, table = the_names_of_domains_lost(case)
    return student, table.add_column("teacher_id", [0, 1, 1] * 4)


def a_card_without_domains(case):
    _, table = swapped_domains(case)
    return wrote(case), table


def a_card_with_the_domain_of_one_part(case):
    _, table = one_teacher_for_both(case)
    return wrote(case, first={"math": 40}, second={"code": 50}), table


def a_card_with_more_rows_of_a_domain_than_rows(case):
    """Changed by hand, to let another teacher's rows pass."""
    student, table = one_teacher_for_both(case)
    edit_card(student, lambda record: record["sft_teachers"][0]["teacher_ids"].update(code=50))
    return student, table


def a_table_whose_domains_were_changed_by_hand(case):
    student, table = swapped_domains(case)
    exchanged = {"math": "code", "code": "math"}
    return student, table.map(lambda row: {"teacher_id": exchanged[row["teacher_id"]]})


# ---- Residual scores ----


def residual_of_another_teacher(case):
    return case.student, residualize_table(case.score(other(case)))


def residual_of_the_sft_teacher(case):
    return case.student, residualize_table(case.score())


def residual_joined_with_one_of_the_sft_teacher(case):
    parts = [residualize_table(case.score(teacher)).select(range(6)) for teacher in (case.teacher, other(case))]
    return case.student, concatenate_datasets(parts)


def residual_of_another_domain_s_teacher(case):
    table = swapped_domains(case)[1]
    parts = [table.filter(lambda row: row["teacher_id"] == n) for n in ("math", "code")]  # noqa: B023
    student = wrote(case, first={"math": 50}, second={"code": 50})
    return student, concatenate_datasets([residualize_table(part) for part in parts])


def residual_for_a_student_without_a_card(case):
    student, table = residual_of_another_teacher(case)
    directory = case.copy(student)
    (directory / "README.md").unlink()
    return directory, table


def residual_without_its_record(case):
    student, table = residual_of_another_teacher(case)
    table.info.description = ""
    return student, table


def residual_that_was_altered(case):
    student, table = residual_of_another_teacher(case)
    return student, table.map(lambda row: {"residual_logprobs": [value + 1 for value in row["residual_logprobs"]]})


def residual_without_fingerprints(case):
    student, table = residual_of_another_teacher(case)
    return student, table.remove_columns("teacher_fingerprint")


def residual_for_a_student_with_another_tokenizer(case):
    directory, _ = student_with_another_tokenizer(case)
    return directory, residualize_table(case.score(other(case)))


# ---- Students and their cards ----


def student_card_stripped(case):
    directory = case.copy(case.student)
    (directory / "README.md").unlink()
    return directory, case.score()


def student_card_with_another_teacher_s_id(case):
    """The claim is changed to fit the table, but not the digests behind it."""
    directory, table = case.copy(case.student), case.score(save(case.tmp / "other", seed=9))
    edit_card(directory, lambda record: record["sft_teachers"][0].update(id=table[0]["teacher_fingerprint"]))
    return directory, table


def student_card_copied_to_other_weights(case):
    directory = save(case.tmp / "impostor", seed=8)
    shutil.copy(case.student / "README.md", directory)
    return directory, case.score()


def student_card_that_does_not_say_for_which_weights(case):
    directory = case.copy(case.student)
    edit_card(directory, lambda record: record.pop("model"))
    return directory, case.score()


def student_declared_by_a_person(case):
    directory = case.copy(case.student)
    stamp_model_card(directory, sft_teachers=[fingerprint_teacher(case.teacher)])
    return directory, case.score()


def student_saved_again(case):
    directory = case.copy(case.student)
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="4KB")
    (directory / "model.safetensors").unlink()
    return directory, case.score()


def student_that_did_not_sample(case):
    return stamp(rewrite(case.copy(case.student), flip_a_bit), case.teacher), case.score()


def student_with_another_tokenizer(case):
    directory = case.copy(case.student)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["w999"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory, case.score()


def student_with_another_chat_template(case):
    directory = case.copy(case.student)
    (directory / "chat_template.jinja").write_text(TEMPLATE + "!")
    return directory, case.score()


REFUSED = None
PART = "has 6 rows, and its digest is that of 12 (a split or a selection has none of its own): whether values were"


@pytest.mark.parametrize(
    "happened, evidence, rows, words",
    [
        (untouched, "verified", "intact", "Teachers agree (verified)"),
        # The teacher is the same, however it is kept.
        (resharded, "verified", "intact", "Teachers agree"),
        (renamed_files, "verified", "intact", "Teachers agree"),
        (saved_again_by_transformers, "verified", "intact", "Teachers agree"),
        (loaded_in_float16, "verified", "intact", "Teachers agree"),
        (another_pad_token, "verified", "intact", "Teachers agree"),
        # It is another.
        (cast_to_float16, REFUSED, None, ": the weights differ)"),
        (one_bit_flipped, REFUSED, None, ": the weights differ)"),
        (another_tokenizer, REFUSED, None, ": the tokenizer differs)"),
        (another_chat_template, REFUSED, None, ": the chat template differs)"),
        (swapped, REFUSED, None, "Teacher mismatch"),
        (two_teachers_of_which_one_is_a_stranger, REFUSED, None, "(and by others that did write it)"),
        (two_teachers_that_both_wrote_sft_data, "verified", "unverified", "scored by 2 teachers"),
        (two_teachers_of_which_one_table_has_no_record, "verified", "unverified", "does not name: whether values"),
        (teacher_called_otherwise, "verified", "intact", "Teachers agree"),
        # Rows: the column decides, the digest says whether they are still what was scored.
        (fingerprint_column_lost, REFUSED, None, "(column `teacher_fingerprint`, which is missing)"),
        (fingerprint_column_partly_empty, REFUSED, None, "does not say which teacher scored some of its rows"),
        (topk_columns_lost, "verified", "unverified", "has lost columns that the digest of its rows covers ("),
        (a_column_added, "verified", "intact", "Teachers agree"),
        (shuffled, "verified", "intact", "Teachers agree"),
        (filtered, "verified", "unverified", PART),
        (altered_and_selected, "verified", "unverified", PART),
        (split_and_joined, "verified", "intact", "Teachers agree"),
        (one_score_changed, "verified", "altered", "values changed in prompt_ids"),
        (saved_to_disk, "verified", "intact", "Teachers agree"),
        (parquet_with_its_card, "verified", "intact", "Teachers agree"),
        (parquet_without_its_card, "verified", "unverified", "The table comes without digests of its rows"),
        (parquet_whose_rows_were_changed, "verified", "altered", "as many rows as were scored (12)"),
        (table_card_of_another_teacher, REFUSED, None, "one of the two was changed by hand"),
        (table_card_that_contradicts_itself, REFUSED, None, "The card of the table contradicts itself"),
        # Each row is held against the teachers of its domain.
        (each_by_its_own, "verified", "intact", "Teachers agree (verified)"),
        (each_by_its_own_from_disk_and_parquet, "verified", "intact", "Teachers agree"),
        (each_by_its_own_in_another_order, "verified", "intact", "Teachers agree"),
        (tables_of_each_joined, "verified", "intact", "Teachers agree"),
        (swapped_domains, REFUSED, None, "those of 'math' by other@1-"),
        (swapped_domains_of_a_selection, REFUSED, None, "those of 'math' by other@1-"),
        (swapped_domains_on_weights_that_the_card_is_not_of, REFUSED, None, "those of 'code' by teacher@1-"),
        (one_teacher_for_both, REFUSED, None, "those of 'code' by teacher@1-"),
        (one_teacher_that_wrote_both, "verified", "intact", "Teachers agree"),
        (a_domain_that_the_sft_data_did_not_have, "verified", "intact", "names no SFT data of that domain"),
        (the_names_of_domains_lost, "verified", "unverified", "has rows without a `teacher_id`, their domain"),
        (names_of_domains_that_are_numbers, "verified", None, "has rows without a `teacher_id`, their domain"),
        (a_card_without_domains, "verified", "intact", "its card does not say of all of it of which domain it is"),
        (a_card_with_the_domain_of_one_part, "verified", "intact", "does not say of all of it of which domain"),
        (a_card_with_more_rows_of_a_domain_than_rows, REFUSED, None, "It counts 50 rows of teacher@1-"),
        (a_table_whose_domains_were_changed_by_hand, "verified", "altered", "values changed in prompt_ids"),
        # A residual is another teacher's, and says so.
        (residual_of_another_teacher, "residual", "intact", "which are not those of the teacher that wrote the SFT"),
        (residual_of_the_sft_teacher, "residual", "intact", "they need no correction"),
        (residual_joined_with_one_of_the_sft_teacher, "residual", "unverified", "they need no correction"),
        (residual_joined_with_one_of_the_sft_teacher, "residual", "unverified", "which are not those of the teacher"),
        (residual_of_another_domain_s_teacher, "residual", None, "they need no correction"),
        (residual_for_a_student_without_a_card, "residual", "intact", "is of unknown teachers"),
        (residual_without_its_record, "residual", "unverified", "which are not those of the teacher"),
        (residual_that_was_altered, "residual", "altered", "values changed in prompt_ids"),
        (residual_without_fingerprints, REFUSED, None, "does not say which teacher scored"),
        (residual_for_a_student_with_another_tokenizer, REFUSED, None, "with another tokenizer than that of the"),
        # The student and its card.
        (student_card_stripped, REFUSED, None, "names no SFT teacher"),
        (student_card_with_another_teacher_s_id, REFUSED, None, "The card of the student contradicts itself"),
        (student_card_copied_to_other_weights, "declared", "intact", "and these are impostor@1-"),
        (student_card_that_does_not_say_for_which_weights, "declared", "intact", "does not say for which weights"),
        (student_declared_by_a_person, "declared", "intact", "a person's word stands for teacher@1-"),
        (student_saved_again, "verified", "intact", "Teachers agree"),
        (
            student_that_did_not_sample,
            "verified",
            "intact",
            "Off-policy rollouts: the table was sampled by",
        ),
        (student_with_another_tokenizer, REFUSED, None, "with another tokenizer than that of the student"),
        (student_with_another_chat_template, "verified", "intact", "under another chat template"),
    ],
)
def test_verdict(case, happened, evidence, rows, words):
    student, table = happened(case)
    verdict = check_teacher_consistency(
        read_model_card(student), table, student_fingerprint=fingerprint_teacher(student), teacher_consistency="off"
    )
    assert verdict.consistent is (evidence is not REFUSED) and verdict.evidence == evidence
    assert verdict.accepted("strict") is (evidence in ("verified", "residual"))
    assert words in " ".join((verdict.reason, *verdict.warnings))
    if rows is not None:
        assert verdict.rows == rows
    expected_warnings = {
        one_score_changed, parquet_whose_rows_were_changed, student_that_did_not_sample,
        student_card_copied_to_other_weights, student_with_another_chat_template,
        a_domain_that_the_sft_data_did_not_have, the_names_of_domains_lost, names_of_domains_that_are_numbers,
        a_card_without_domains, a_card_with_the_domain_of_one_part, a_table_whose_domains_were_changed_by_hand,
    }  # fmt: skip
    is_warned = happened in expected_warnings or rows == "unverified" or evidence == "residual"
    assert bool(verdict.warnings) is is_warned
    assert verdict.off_policy is (happened in {student_that_did_not_sample, student_card_copied_to_other_weights})


def test_the_dataset_card_holds_the_full_record(case):
    parquet_with_its_card(case)
    text = (case.tmp / "table" / "README.md").read_text()
    record = yaml.safe_load(text.split("---\n")[1])["trl_lopd"]
    teacher, student = fingerprint_teacher(case.teacher), fingerprint_teacher(case.student)
    (scored,), (sampled,) = record["teachers"], record["students"]
    assert {**teacher.to_dict(), "evidence": "verified", "rows": 12, "share": 1.0}.items() <= scored.items()
    assert scored["scoring"] == {"top_k": 2} and scored["probes"]["version"] == 1
    assert {**student.to_dict(), "evidence": "verified", "rows": 12}.items() <= sampled.items()
    assert sampled["sampling"]["temperature"] == 0.8 and sampled["sft_teachers"] == [teacher.id]
    tokens = sum(len(ids) for ids in case.rollouts["completion_ids"])
    assert (record["rows"], record["completion_tokens"]) == (12, tokens)


def test_a_card_is_not_given_digests_of_rows_that_are_not_what_was_scored(case, caplog):
    for student_and_table in (one_score_changed, filtered):
        _, table = student_and_table(case)
        directory = case.tmp / student_and_table.__name__
        directory.mkdir()
        stamp_dataset_card(directory, table)
        record = yaml.safe_load((directory / "README.md").read_text().split("---\n")[1])["trl_lopd"]
        assert "digests" not in record and record["teachers"][0]["rows"] == len(table)
        assert f"The card of {directory} gets no digest of its rows" in caplog.text


def test_stamping_a_table_again_leaves_nothing_of_the_old_record(case):
    parquet_with_its_card(case)
    other = case.score(save(case.tmp / "other", seed=9)).select(range(5))
    stamp_dataset_card(case.tmp / "table", other)
    record = read_dataset_card(case.tmp / "table")
    assert [t["id"] for t in record["teachers"]] == [fingerprint_teacher(case.tmp / "other").id]
    assert record["rows"] == 5 and "digests" not in record and "columns" not in record


def test_a_split_that_is_not_there(case):
    case.score().save_to_disk(case.tmp / "saved")
    with pytest.raises(ValueError, match="has no split 'test'"):
        load_table(case.tmp / "saved", split="test")


def test_splits_of_one_table_each_get_their_digest(case):
    splits = case.score().train_test_split(0.25, seed=3)
    directory = case.tmp / "splits"
    directory.mkdir()
    for name, rows in splits.items():
        rows.to_parquet(directory / f"{name}.parquet")
    stamp_dataset_card(directory, splits)
    for rows in load_table(directory).values():
        assert check_teacher_consistency(read_model_card(case.student), rows).rows == "intact"


def test_stamping_a_dataset_card_keeps_the_rest_of_it(case):
    directory = case.tmp / "table"
    directory.mkdir()
    head, tail = "---\nlicense: mit\n", "---\n\n# Mine\n\ntext   \n"
    (directory / "README.md").write_text(head + tail)
    stamp_dataset_card(directory, case.score())
    text = (directory / "README.md").read_text()
    assert text.startswith(head + "trl_lopd:\n") and text.endswith(tail)


def test_the_record_is_json_in_the_description_beside_what_a_person_wrote(case):
    table = case.score()
    table.info.description = "By hand.\n" + table.info.description
    joined = concatenate_datasets([table, case.rollouts.select_columns(["prompt_ids"])])
    assert joined.info.description.startswith("By hand.") and record_of(joined)["teachers"]
    attach_record(table, {"rows": 1})
    assert table.info.description.startswith("By hand.") and record_of(table) == {"rows": 1}
    json.dumps(record_of(table))
