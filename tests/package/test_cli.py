"""`trl-lopd` as a person or a script calls it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_model, make_rollouts

from trl_lopd import fingerprint_teacher, read_model_card, score_rollouts, stamp_dataset_card
from trl_lopd.cli import main


@pytest.fixture
def call(capsys):
    def call(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def tables(tmp_path_factory, table, tokenizer):
    path = tmp_path_factory.mktemp("tables")
    table.save_to_disk(path / "right")
    score_rollouts(make_rollouts(6), make_model(seed=9), processing_class=tokenizer, top_k=2).save_to_disk(
        path / "wrong"
    )
    (path / "parquet").mkdir()
    parts = table.train_test_split(0.25, seed=0)
    for name, rows in parts.items():
        rows.to_parquet(path / "parquet" / f"{name}.parquet")
    stamp_dataset_card(path / "parquet", parts)
    return path


@pytest.fixture
def bare(tmp_path, student_dir):
    path = Path(shutil.copytree(student_dir, tmp_path / "bare"))
    (path / "README.md").unlink()
    return path


def test_installed():
    command = Path(sys.executable).with_name("trl-lopd")
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(word in done.stdout for word in ("fingerprint", "stamp", "inspect"))


def test_fingerprint(call, teacher_dir):
    expected = fingerprint_teacher(teacher_dir)
    code, out, _ = call("fingerprint", teacher_dir)
    assert code == 0 and expected.id in out and expected.weights in out
    code, out, _ = call("fingerprint", teacher_dir, "--json", "--probes")
    record = json.loads(out)
    assert record.pop("probes")["version"] == 1 and record == expected.to_dict()


@pytest.mark.parametrize("by_id", [False, True])
def test_stamp_declares_and_inspect_then_accepts_it_only_as_declared(call, bare, teacher_dir, tables, by_id):
    teacher = fingerprint_teacher(teacher_dir)
    assert call("inspect", bare, tables / "right")[0] == 1
    code, out, _ = call("stamp", bare, "--sft_teacher", teacher.id if by_id else teacher_dir)
    assert code == 0 and teacher.id in out and 'teacher_consistency="declared_ok"' in out
    record = read_model_card(bare)
    assert [(t["id"], t["evidence"]) for t in record["sft_teachers"]] == [(teacher.id, "declared")]
    assert record["model"]["id"] == fingerprint_teacher(bare).id
    code, out, _ = call("inspect", bare, tables / "right")
    assert code == 1 and "consistent (declared), not enough for mode strict" in out
    assert call("inspect", bare, tables / "right", "--teacher_consistency", "declared_ok")[0] == 0
    assert call("inspect", bare, tables / "wrong", "--teacher_consistency", "declared_ok")[0] == 1


def test_domains_are_declared_and_inspected(call, tmp_path, bare, student_dir, teacher_dir):
    teacher, other = fingerprint_teacher(teacher_dir).id, fingerprint_teacher(student_dir).id
    given = ["--sft_teacher", f"math={teacher_dir}", "--sft_teacher", f"code={other}"]
    code, out, _ = call("stamp", bare, *given, "--replace")
    assert code == 0 and f"{teacher} (math), {other} (code)." in out
    entries = read_model_card(bare)["sft_teachers"]
    assert [(t["id"], t["teacher_ids"]) for t in entries] == [(teacher, {"math": None}), (other, {"code": None})]
    code, out, _ = call("inspect", bare)
    assert (
        code == 0 and f"{teacher}  declared\n" in out and re.search(r"^ +math +rows not counted$", out, re.MULTILINE)
    )

    rows = make_rollouts(5).add_column("teacher_id", ["math", "code", "math", "math", "law"])
    score_rollouts(rows, str(teacher_dir), top_k=1, output_dir=tmp_path / "one")
    code, out, _ = call("inspect", tmp_path / "one", "--json")
    assert json.loads(out)["table"]["splits"]["all rows"]["domains"] == {teacher: {"math": 3, "code": 1, "law": 1}}
    code, out, _ = call("inspect", tmp_path / "one")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    at = lines.index(f"scored by {teacher} 5 rows")
    assert lines[at + 1 : at + 4] == ["math 3 rows (60.0%)", "code 1 rows (20.0%)", "law 1 rows (20.0%)"]
    code, out, _ = call("inspect", bare, tmp_path / "one", "--teacher_consistency", "declared_ok")
    assert code == 1 and f"those of 'code' by {teacher}, while 1 teacher ({other}) wrote the SFT data of 'code'" in out


def test_stamp_does_not_put_a_declaration_in_the_place_of_what_is_known(call, tmp_path, student_dir, teacher_dir):
    path = Path(shutil.copytree(student_dir, tmp_path / "student"))
    before = read_model_card(path)
    code, _, err = call("stamp", path, "--sft_teacher", teacher_dir)
    assert code == 2 and "names SFT teachers already" in err and "--replace" in err and read_model_card(path) == before
    assert call("stamp", path, "--sft_teacher", teacher_dir, "--replace")[0] == 0
    assert read_model_card(path)["sft_teachers"][0]["evidence"] == "declared"


def test_inspect_a_model(call, student_dir, teacher_dir):
    code, out, _ = call("inspect", student_dir)
    assert code == 0
    assert fingerprint_teacher(student_dir).id in out and fingerprint_teacher(teacher_dir).id in out
    code, out, _ = call("inspect", student_dir, "--no_content", "--json")
    assert code == 0 and json.loads(out)["model"]["fingerprint"] is None


def test_inspect_a_model_whose_card_is_another_s(call, tmp_path, bare, teacher_dir, tokenizer):
    call("stamp", bare, "--sft_teacher", teacher_dir)
    make_model(seed=8).save_pretrained(tmp_path / "impostor")
    tokenizer.save_pretrained(tmp_path / "impostor")
    shutil.copy(bare / "README.md", tmp_path / "impostor")
    code, out, _ = call("inspect", tmp_path / "impostor")
    assert code == 1 and "The card was written for other weights" in out


def test_inspect_a_table(call, tables, table, teacher_dir):
    code, out, _ = call("inspect", tables / "right")
    assert code == 0 and "24, of" in out and "as they were scored" in out
    assert fingerprint_teacher(teacher_dir).id in out and "not named" in out  # these rollouts are not signed
    code, out, _ = call("inspect", tables / "parquet", "--json")
    splits = json.loads(out)["table"]["splits"]
    assert code == 0 and {name: (s["rows"], s["integrity"]) for name, s in splits.items()} == {
        "train": (18, "intact"), "test": (6, "intact"),
    }  # fmt: skip


def test_inspect_shows_what_is_in_a_table(call, tables, table, teacher_dir):
    code, out, _ = call("inspect", tables / "right", "--rows", 1, "--tokenizer", teacher_dir)
    assert code == 0 and "\x1b" not in out and f"decoded with {teacher_dir}" in out
    for part in ("median", "nats a token at the start", "k = 4", "distinct", "answer       w", "▸w"):
        assert part in out
    code, out, _ = call("inspect", tables / "parquet", "--rows", 2, "--json")
    splits = json.loads(out, parse_constant=pytest.fail)["table"]["splits"]
    held = [about["statistics"] for about in splits.values()]
    assert sum(found["completion_tokens"] for found in held) == sum(map(len, table["completion_ids"]))
    assert all(found["advantage"]["p1"] <= found["advantage"]["median"] <= found["advantage"]["p99"] for found in held)
    assert [len(about["worst_rows"]) for about in splits.values()] == [2, 2]


def test_inspect_a_table_whose_rows_were_changed(call, tmp_path, student_dir, table):
    def change(row, i):
        row["teacher_logprobs"][0] -= 0.5 * (i == 3)
        return row

    table.map(change, with_indices=True).save_to_disk(tmp_path / "table")
    code, out, _ = call("inspect", tmp_path / "table")
    assert code == 1 and "NOT as they were scored" in out and "values changed in" in out
    assert call("inspect", student_dir, tmp_path / "table")[0] == 1


@pytest.mark.slow
def test_json_is_all_there_is_on_the_standard_output(teacher_dir):
    command = [Path(sys.executable).with_name("trl-lopd"), "fingerprint", teacher_dir, "--probes", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(done.stdout)["probes"]["version"] == 1


def test_a_local_folder_named_datasets_is_local(call, tmp_path, tables, monkeypatch):
    shutil.copytree(tables / "right", tmp_path / "datasets" / "mine")
    monkeypatch.chdir(tmp_path)
    assert call("inspect", "datasets/mine")[0] == 0


def test_inspect_a_pair(call, student_dir, tables):
    code, out, _ = call("inspect", student_dir, tables / "right")
    assert code == 0 and "Verdict, all rows: consistent (verified)" in out
    code, out, _ = call("inspect", student_dir, tables / "wrong")
    assert code == 1 and "INCONSISTENT" in out and "Teacher mismatch" in out
    code, out, _ = call("inspect", student_dir, tables / "wrong", "--json")
    verdict = json.loads(out)["verdict"]
    assert code == 1 and verdict["accepted"] is False and "Teacher mismatch" in verdict["splits"]["all rows"]["reason"]
    code, out, _ = call("inspect", student_dir, tables / "parquet", "--json")
    assert code == 0 and set(json.loads(out)["verdict"]["splits"]) == {"train", "test"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["fingerprint", "{tmp}/nowhere"], "is not there"),
        (["fingerprint", "{table}"], "safetensors"),
        (["inspect", "{tmp}/nowhere"], "is not there"),
        (["inspect", "{table}", "{table}"], "is a table. Name the model first"),
        (["inspect", "{student}", "{student}"], "the second is the table"),
        (["stamp", "{student}", "--sft_teacher", "{table}", "--replace"], "safetensors"),
        (["stamp", "{table}", "--sft_teacher", "{student}"], "is no model"),
        (["inspect", "{student}/README.md"], "is a file"),
        (["inspect", "{table}", "--rows", "-1"], "0 or more"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_exits_with_2(call, tmp_path, student_dir, tables, words, message):
    places = {"tmp": tmp_path, "student": student_dir, "table": tables / "right"}
    code, _, err = call(*(word.format(**places) for word in words))
    assert code == 2 and message in err and err.startswith("trl-lopd: ") and "Traceback" not in err
