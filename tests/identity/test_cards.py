from __future__ import annotations

import re

import pytest
import yaml
from datasets import concatenate_datasets
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError

from trl_lopd import collect_rollouts, score_rollouts
from trl_lopd.identity.cards import (
    read_dataset_card,
    read_model_card,
    record_of,
    stamp_dataset_card,
    stamp_model_card,
)
from trl_lopd.identity.fingerprint import TeacherFingerprint

A = TeacherFingerprint(weights="1" * 64, tokenizer="2" * 64, chat_template="3" * 64, model_id="org/teacher-a")
B = TeacherFingerprint(weights="4" * 64, tokenizer="5" * 64, chat_template="6" * 64, model_id="org/teacher-b")
OLD = "old@1-000000000000-00000000-00000000"

FRONT = """\
# hand-written: keep
license:   mit   # two spaces more than a dumper writes
tags: [b, a]

title: "trl_lopd: not ours"
text: |
  trl_lopd:
    not: ours either
"""
BODY = "\n# My model\r\n\n---\ntrl_lopd: in the body\n---\n  trailing spaces  \n\n\nno newline at the end"


def write(directory, text):
    (directory / "README.md").write_bytes(text.encode())


def read(directory):
    return (directory / "README.md").read_bytes().decode()


def declared(fingerprint):
    return {**fingerprint.to_dict(), "evidence": "declared"}


def test_minimal_card(tmp_path):
    directory = tmp_path / "my-model"
    directory.mkdir()
    stamp_model_card(directory, sft_teachers=[A])
    assert read_model_card(str(directory)) == {"sft_teachers": [declared(A)]}
    assert ModelCard.load(directory / "README.md").text.strip() == "# my-model"
    assert TeacherFingerprint.from_dict(read_model_card(directory)["sft_teachers"][0]) == A


def test_record_is_what_a_person_expects_to_read(tmp_path):
    stamp_model_card(
        tmp_path,
        sft_teachers=[
            {**A.to_dict(), "evidence": "verified", "rows": 3, "share": 0.75, "probes": {"ids": [[1, 2], [3]]}}
        ],
        sft_rows=4,
        checkpoint=B,
        opd_rounds=[{"student": B.id, "teachers": [{"id": A.id}]}],
    )
    assert read(tmp_path).startswith(
        f"""---
trl_lopd:
  model:
    id: {B.id}
    weights: '{"4" * 64}'
    tokenizer: '{"5" * 64}'
    chat_template: '{"6" * 64}'
    schema: 1
    model_id: org/teacher-b
    evidence: verified
  sft_teachers:
  - id: {A.id}
    weights: '{"1" * 64}'
    tokenizer: '{"2" * 64}'
    chat_template: '{"3" * 64}'
    schema: 1
    model_id: org/teacher-a
    evidence: verified
    rows: 3
    share: 0.75
    probes:
      ids:
      - [1, 2]
      - [3]
  sft_rows: 4
  opd_rounds:
  - student: {B.id}
    teachers:
    - id: {A.id}
---
"""
    )


@pytest.mark.parametrize("evidence", ["verified", "probed", "declared"])
def test_evidence_is_written_and_an_entry_keeps_its_own(tmp_path, evidence):
    stamp_model_card(tmp_path, sft_teachers=[A, {"id": B.id, "evidence": "probed"}], evidence=evidence)
    assert [entry["evidence"] for entry in read_model_card(tmp_path)["sft_teachers"]] == [evidence, "probed"]


def test_what_a_person_stamps_is_declared(tmp_path):
    stamp_model_card(tmp_path, sft_teachers=[A, f"{B.id}"])
    assert {entry["evidence"] for entry in read_model_card(tmp_path)["sft_teachers"]} == {"declared"}


def test_one_teacher_need_not_be_a_list(tmp_path):
    for teacher in (A, A.id, declared(A)):
        stamp_model_card(tmp_path, sft_teachers=teacher)
        assert [entry["id"] for entry in read_model_card(tmp_path)["sft_teachers"]] == [A.id]


@pytest.mark.parametrize("ours", ["", "trl_lopd: {sft_teachers: [{id: " + OLD + "}]}\n", "trl_lopd:\n"])
def test_everything_else_stays(tmp_path, ours):
    """The other keys with their values and in their order, and the text to the byte."""
    write(tmp_path, f"---\n{FRONT}{ours}nan: .nan\nlast: null\n---\n{BODY}")
    stamp_model_card(tmp_path, sft_teachers=[A])
    assert read_model_card(tmp_path) == {"sft_teachers": [declared(A)]}
    assert read(tmp_path).endswith(f"---\n{BODY}")
    metadata = yaml.safe_load(read(tmp_path).split("---", 2)[1])
    expected = yaml.safe_load(f"{FRONT}{ours}nan: .nan\nlast: null\n")
    assert list(metadata) == list(expected) + ([] if ours else ["trl_lopd"])
    del metadata["trl_lopd"]
    expected.pop("trl_lopd", None)
    assert repr(metadata) == repr(expected)


@pytest.mark.parametrize(
    "card, body",
    [
        ("", ""),
        ("# only a body\n", "# only a body\n"),
        ("---\n\n---\n# blank front matter\n", "# blank front matter\n"),
        ("---\nlicense: mit\n---", ""),
        ("\ufeff---\nlicense: mit\n---\nbyte order mark\n", "byte order mark\n"),
        ("\n\n---\nlicense: mit\n---\nblank lines first\n", "blank lines first\n"),
        ("---\r\nlicense: mit\r\n---\r\nends of lines\r\n", "ends of lines\r\n"),
        ("---\na rule, then text\n", "---\na rule, then text\n"),
    ],
)
def test_stamping_is_idempotent_and_keeps_odd_cards(tmp_path, card, body):
    write(tmp_path, card)
    stamp_model_card(tmp_path, sft_teachers=[A, B])
    once = read(tmp_path)
    stamp_model_card(tmp_path, sft_teachers=[A, B])
    assert read(tmp_path) == once
    assert read_model_card(tmp_path) == {"sft_teachers": [declared(A), declared(B)]}
    assert re.fullmatch(r"---\r?\n(license: mit\r?\n)?trl_lopd:.*?\n---\r?\n(.*)", once, flags=re.DOTALL)[2] == body
    assert ("license" in once) == ("license" in card) and ("\r" in once) == ("\r" in card)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_none_leaves_a_list_and_a_list_replaces_it(tmp_path):
    write(tmp_path, f"---\ntrl_lopd:\n  note: by hand\n  sft_teachers:\n  - id: {OLD}\n---\n")
    stamp_model_card(tmp_path, opd_rounds=[])
    assert read_model_card(tmp_path) == {"note": "by hand", "sft_teachers": [{"id": OLD}], "opd_rounds": []}
    stamp_model_card(tmp_path, sft_teachers=[B], sft_rows=7)
    assert read_model_card(tmp_path)["sft_rows"] == 7
    # How many rows the teachers before wrote says nothing of these.
    stamp_model_card(tmp_path, sft_teachers=[A])
    assert read_model_card(tmp_path) == {"note": "by hand", "sft_teachers": [declared(A)], "opd_rounds": []}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({}, "Nothing to stamp"),
        ({"sft_teachers": ["Qwen/Qwen3-32B"]}, "not the id of a model"),
        ({"sft_teachers": ["name@"]}, "not the id of a model"),
        ({"sft_teachers": [A], "evidence": "sworn"}, "Unknown evidence 'sworn'"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        stamp_model_card(tmp_path, **kwargs)
    assert not list(tmp_path.iterdir())


def test_stamping_what_is_not_a_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a directory"):
        stamp_model_card(tmp_path / "nowhere", sft_teachers=[A])


@pytest.mark.parametrize(
    "front, message",
    [
        ("a: [unclosed", "cannot be read"),
        ("- a list", "must be a mapping"),
        ("trl_lopd: 3", "trl_lopd must be a mapping"),
    ],
)
def test_malformed_cards_are_left_alone(tmp_path, front, message):
    card = f"---\n{front}\n---\n"
    write(tmp_path, card)
    with pytest.raises(ValueError, match=f"README.md: .*{message}"):
        stamp_model_card(tmp_path, sft_teachers=[A])
    assert read(tmp_path) == card


def test_an_error_while_writing_leaves_the_card(tmp_path, monkeypatch):
    write(tmp_path, "# Mine\n")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        stamp_model_card(tmp_path, sft_teachers=[A])
    assert read(tmp_path) == "# Mine\n" and [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_card_that_is_not_utf_8(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xe9\n---\n")
    for call in (read_model_card, lambda path: stamp_model_card(path, sft_teachers=[A])):
        with pytest.raises(ValueError, match="README.md is not UTF-8 .*Save it as UTF-8"):
            call(tmp_path)


# Reading


@pytest.mark.parametrize("card", [None, "# no front matter\n", "---\nlicense: mit\n---\n", "---\ntrl_lopd:\n---\n"])
def test_no_record(tmp_path, card):
    if card is not None:
        write(tmp_path, card)
    assert read_model_card(tmp_path) == {}


@pytest.mark.parametrize(
    "record, message",
    [
        ("text", r"README.md: trl_lopd must be a mapping, not 'text'"),
        ({"sft_teachers": OLD}, r"README.md: trl_lopd.sft_teachers must be a list"),
        (
            {"sft_teachers": [{"id": OLD}, OLD]},
            r"trl_lopd.sft_teachers\[1\] must be a mapping, not 'old@",
        ),
        (
            {"teachers": [{"name": "a"}]},
            r"README.md: trl_lopd.teachers\[0\]: None is not the id of a model",
        ),
        ({"sft_teachers": [{"id": 7}]}, r"README.md: trl_lopd.sft_teachers\[0\]: 7 is not the id"),
        ({"sft_teachers": [{"id": "a@1"}]}, r"README.md: trl_lopd.sft_teachers\[0\]: 'a@1' is not the id"),
        (
            {"sft_teachers": [{"id": OLD, "evidence": "sworn"}]},
            r"sft_teachers\[0\]: Unknown evidence 'sworn'",
        ),
        (
            {"sft_teachers": [{"id": OLD, "rows": "lots"}]},
            r"sft_teachers\[0\].rows must be a whole number",
        ),
        ({"sft_teachers": [{"id": OLD, "probes": "yes"}]}, r"sft_teachers\[0\].probes must be a mapping, not 'yes'"),
        ({"sft_rows": "many"}, r"README.md: trl_lopd.sft_rows must be a whole number, not 'many'"),
        ({"opd_rounds": ["first"]}, r"README.md: trl_lopd.opd_rounds\[0\] must be a mapping, not 'first'"),
        ({"model": OLD}, r"README.md: trl_lopd.model must be a mapping, not 'old@"),
        ({"model": {"id": 5}}, r"README.md: trl_lopd.model: 5 is not the id of a model"),
    ],
)
def test_malformed_record(tmp_path, record, message):
    write(tmp_path, f"---\n{yaml.safe_dump({'trl_lopd': record})}---\n")
    with pytest.raises(ValueError, match=message):
        read_model_card(tmp_path)


@pytest.mark.parametrize("front", ["a: [unclosed", "- a list"])
def test_malformed_front_matter(tmp_path, front):
    write(tmp_path, f"---\n{front}\n---\n")
    with pytest.raises(ValueError, match="README.md: the front matter cannot be read"):
        read_model_card(tmp_path)


def test_other_metadata_may_be_malformed(tmp_path):
    write(
        tmp_path,
        f"---\nmodel-index: nonsense\ntrl_lopd:\n  sft_teachers:\n  - id: {OLD}\n---\n",
    )
    assert read_model_card(tmp_path) == {"sft_teachers": [{"id": OLD}]}


def test_hub_id(tmp_path, monkeypatch):
    stamp_model_card(tmp_path, sft_teachers=[A])
    calls = []

    def hf_hub_download(repo_id, filename, repo_type=None, revision=None):
        calls.append((repo_id, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr("trl_lopd.identity.cards.hf_hub_download", hf_hub_download)
    assert read_model_card("org/student", revision="abc") == {"sft_teachers": [declared(A)]}
    assert calls == [("org/student", "README.md", "abc")]


def test_card_out_of_reach_counts_as_none_and_says_so(monkeypatch, caplog):
    def hf_hub_download(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("trl_lopd.identity.cards.hf_hub_download", hf_hub_download)
    assert read_model_card("org/student") == {}
    assert "org/student: no network" in caplog.text


def test_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_model_card("trl-lopd-tests/no-such-model") == {}


# ---- Records of rows that were taken, or put together ----


def rollouts_at(student_dir, temperature, seed=0):
    options = {"max_completion_length": 4, "ref_logprobs": False, "temperature": temperature, "seed": seed}
    return collect_rollouts(["w5 w6", "w7", "w8", "w9"], student_dir, **options)


def test_a_card_counts_the_rows_that_are_there(tmp_path, student_dir, teacher_dir):
    some = rollouts_at(student_dir, 0.8).select([0, 2])
    (student,) = record_of(score_rollouts(some, teacher_dir, top_k=2))["students"]
    assert student["rows"] == 2 and "truncated_answers" not in student["sampling"]
    stamp_dataset_card(tmp_path, some)
    (student,) = read_dataset_card(tmp_path)["students"]
    assert student["rows"] == 2 and "truncated_answers" not in student["sampling"]


def test_rows_without_a_student_have_none_that_was_of_more(student_dir, teacher_dir, caplog):
    rows = rollouts_at(student_dir, 0.8).remove_columns("student_fingerprint")
    assert record_of(score_rollouts(rows, teacher_dir, top_k=2))["students"][0]["rows"] == 4
    assert "`student_fingerprint`" not in caplog.text
    assert "students" not in record_of(score_rollouts(rows.select([1]), teacher_dir, top_k=2))
    assert "`student_fingerprint`" in caplog.text


def test_two_samplings_are_not_one(tmp_path, student_dir, teacher_dir, caplog):
    mixed = concatenate_datasets([rollouts_at(student_dir, 0.8), rollouts_at(student_dir, 1.2)])
    (student,) = record_of(score_rollouts(mixed, teacher_dir, top_k=2))["students"]
    assert student["rows"] == 8 and "sampling" not in student
    assert "several records of `sampling`" in caplog.text
    seeds = concatenate_datasets([rollouts_at(student_dir, 0.8), rollouts_at(student_dir, 0.8)])
    (student,) = record_of(score_rollouts(seeds, teacher_dir, top_k=2))["students"]
    assert student["rows"] == 8 and student["sampling"]["temperature"] == 0.8
