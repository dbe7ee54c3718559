"""Several teachers of one table: each scores, or answers, the rows that name it."""

from __future__ import annotations

from pkgutil import resolve_name

import kills
import numpy as np
import pytest
from conftest import make_model, make_rollouts, make_tokenizer
from datasets import concatenate_datasets, load_dataset
from servers import stub_server

from trl_lopd import ShardError, TableError, fingerprint_teacher, load_table, read_dataset_card, score_rollouts
from trl_lopd.identity.cards import record_of
from trl_lopd.table.store import HIDDEN

NAMES = ["math", "code", "code", "math", "code"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, teacher_dir):
    other = tmp_path_factory.mktemp("models") / "other"
    make_model(seed=9).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    return {"math": str(teacher_dir), "code": str(other)}


def with_names(rows, column="teacher_id"):
    return rows.add_column(column, [NAMES[i % 5] for i in range(len(rows))])


@pytest.fixture
def rollouts():
    return with_names(make_rollouts(25))


def test_each_row_is_scored_and_signed_by_its_own_teacher_in_the_order_of_the_input(teachers, rollouts, student_dir):
    options = {"top_k": 3, "ref_model": str(student_dir)}
    table = score_rollouts(rollouts, teachers, **options)
    alone = {name: score_rollouts(rollouts, teacher, **options) for name, teacher in teachers.items()}
    assert table["prompt_ids"] == rollouts["prompt_ids"] and table["teacher_id"] == rollouts["teacher_id"]
    assert table.features == alone["math"].features
    for i, row in enumerate(table):
        expected = alone[row["teacher_id"]][i]
        for name in ("teacher_logprobs", "ref_logprobs"):  # read in other batches
            np.testing.assert_allclose(row[name], expected[name], atol=1e-5)
        exact = ("teacher_fingerprint", "teacher_topk_ids")
        assert [row[name] for name in exact] == [expected[name] for name in exact]
    math, code = (fingerprint_teacher(teachers[name]).id for name in ("math", "code"))
    record = record_of(table)
    found = [(t["id"], t["rows"], t["share"], t["teacher_ids"], t["scoring"]) for t in record["teachers"]]
    assert found == [(code, 15, 0.6, {"code": 15}, {"top_k": 3}), (math, 10, 0.4, {"math": 10}, {"top_k": 3})]
    assert all(t["probes"] and t["weights"] for t in record["teachers"]) and record["rows"] == 25


def test_the_table_on_disk_is_the_table_in_memory(tmp_path, teachers, rollouts, monkeypatch):
    shuffled = rollouts.shuffle(seed=3)
    in_memory = score_rollouts(shuffled, teachers, top_k=2, rows_per_shard=4)
    on_disk = score_rollouts(shuffled, teachers, top_k=2, rows_per_shard=4, output_dir=tmp_path / "table")
    loaded = load_table(tmp_path / "table", split="train")
    assert on_disk.to_dict() == in_memory.to_dict() == loaded.to_dict() and loaded.features == in_memory.features
    assert load_dataset(str(tmp_path / "table"), split="train").to_dict() == loaded.to_dict()
    assert record_of(loaded) == record_of(in_memory)
    assert sorted(path.name for path in (tmp_path / "table" / HIDDEN).iterdir()) == ["manifest.json", "process-0.lock"]
    monkeypatch.setattr("trl_lopd.generation.scoring.load_model", lambda *args: pytest.fail("a model was loaded"))
    again = score_rollouts(shuffled, teachers, top_k=2, rows_per_shard=4, output_dir=tmp_path / "table")
    assert again.to_dict() == loaded.to_dict() and record_of(again) == record_of(loaded)


def test_one_teacher_is_in_memory_at_a_time(tmp_path, teachers, rollouts, monkeypatch):
    import weakref

    from trl_lopd.generation import scoring

    loaded, real = [], scoring.load_model

    def load(*args):
        assert not [model for model in loaded if model() is not None]
        model = real(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(scoring, "load_model", load)
    score_rollouts(rollouts, teachers, top_k=2, output_dir=tmp_path / "table")
    assert len(loaded) == 2


def test_a_served_teacher_beside_a_local_one_and_one_of_two_names(teachers, rollouts):
    card = {"teachers": record_of(score_rollouts(rollouts, teachers["code"], top_k=2))["teachers"]}
    rollouts = rollouts.map(lambda row, i: {"teacher_id": "law"} if i == 0 else {}, with_indices=True)
    with stub_server("vllm", make_model(seed=9)) as server:
        given = {"math": teachers["math"], "code": server.url, "law": teachers["math"]}
        table = score_rollouts(rollouts, given, top_k=2, teacher_card={"code": card})
    served = {row["teacher_fingerprint"] for row in table if row["teacher_id"] == "code"}
    assert served == {fingerprint_teacher(teachers["code"]).id + "#probed"}
    entries = [(t["evidence"], t["teacher_ids"]) for t in record_of(table)["teachers"]]
    assert entries == [("probed", {"code": 15}), ("verified", {"law": 1, "math": 9})]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda names: [*names[:3], None, *names[4:]], "Row 3, column 'teacher_id' is null.*one of 'math', 'code'"),
        (lambda names: [*names[:7], "law", *names[8:]], "Row 7, column 'teacher_id' is 'law', which is none of the"),
        (lambda names: ["math"] * 25, "The teacher 'code' has no rows"),
        (lambda names: list(range(25)), "The column 'teacher_id' holds Value.*the name of each row's teacher"),
    ],
)
def test_names_that_are_wrong_are_found_before_anything_is_read(teachers, rollouts, monkeypatch, change, words):
    monkeypatch.setattr("trl_lopd.generation.scoring.fingerprint_teacher", lambda *args: pytest.fail("was read"))
    names = change(list(rollouts["teacher_id"]))
    with pytest.raises(TableError, match=words):
        score_rollouts(rollouts.remove_columns("teacher_id").add_column("teacher_id", names), teachers)


def test_what_is_given_for_one_teacher_is_refused_for_several(teachers, rollouts):
    for option in ({"fingerprint": fingerprint_teacher(teachers["math"])}, {"teacher_card": {"sft_teachers": []}}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}` is a dictionary with what is meant for each"):
            score_rollouts(rollouts, teachers, **option)
    with pytest.raises(ValueError, match="`teacher_column` is for several teachers"):
        score_rollouts(rollouts, teachers["math"], teacher_column="teacher_id")
    with pytest.raises(TableError, match="'teacher_id' is not there"):
        score_rollouts(make_rollouts(3), teachers)
    with pytest.raises(ValueError, match="by their names, which are texts"):
        score_rollouts(rollouts, {1: teachers["math"]})


def test_another_column_with_the_names_is_copied(teachers):
    rollouts = with_names(make_rollouts(5), "domain")
    table = score_rollouts(rollouts, teachers, teacher_column="domain", top_k=1)
    assert table["domain"] == table["teacher_id"] == NAMES
    with pytest.raises(TableError, match="'teacher_id' beside 'domain'"):
        score_rollouts(with_names(rollouts), teachers, teacher_column="domain")


def test_errors_name_the_row_of_the_whole_table(teachers, rollouts):
    bad = rollouts.map(lambda row, i: {"completion_ids": [99]} if i == 13 else {}, with_indices=True)
    with pytest.raises(TableError, match="Row 13: token id 99"):
        score_rollouts(bad, teachers)


def test_other_teachers_are_refused_by_a_finished_and_an_unfinished_run(tmp_path, teachers, rollouts, monkeypatch):
    swapped = {"math": teachers["code"], "code": teachers["math"]}
    score_rollouts(rollouts, teachers, top_k=1, output_dir=tmp_path / "done")
    with pytest.raises(ShardError, match=r"teacher.code: .*other@.* -> .*teacher@"):
        score_rollouts(rollouts, swapped, top_k=1, output_dir=tmp_path / "done")
    with pytest.raises(ShardError, match="teacher"):
        score_rollouts(rollouts, teachers["math"], top_k=1, output_dir=tmp_path / "done")
    with monkeypatch.context() as patch:
        patch.setattr("trl_lopd.generation.scoring.run_parts", dies_after(1))
        with pytest.raises(KeyboardInterrupt):
            score_rollouts(rollouts, teachers, top_k=1, output_dir=tmp_path / "begun")
    with pytest.raises(ShardError, match="teacher-math holds shards of a run with other arguments"):
        score_rollouts(rollouts, swapped, top_k=1, output_dir=tmp_path / "begun")
    # What is shown while it is not complete is nothing.
    with pytest.raises(ShardError, match="not complete"):
        load_table(tmp_path / "begun")
    table = score_rollouts(rollouts, teachers, top_k=1, output_dir=tmp_path / "begun")
    assert table.to_dict() == load_table(tmp_path / "done", split="train").to_dict()


def dies_after(parts):
    from trl_lopd.generation.several import run_parts

    def run(run, rows, compute):
        done = []

        def one(*args):
            if len(done) == parts:
                raise KeyboardInterrupt
            done.append(args)
            return compute(*args)

        return run_parts(run, rows, one)

    return run


def test_a_damaged_shard_of_a_finished_table_is_made_again(tmp_path, teachers, rollouts):
    options = {"top_k": 2, "rows_per_shard": 4, "output_dir": tmp_path / "table"}
    score_rollouts(rollouts, teachers, **options)
    shards = sorted((tmp_path / "table").glob("*.parquet"))
    whole, card = [path.read_bytes() for path in shards], (tmp_path / "table" / "README.md").read_bytes()
    shards[0].write_bytes(whole[0][:-50])
    shards[3].unlink()
    score_rollouts(rollouts, teachers, **options)
    assert [path.read_bytes() for path in shards] == whole
    assert (tmp_path / "table" / "README.md").read_bytes() == card


def test_tables_of_several_teachers_that_are_joined(teachers, rollouts):
    parts = [rollouts.filter(lambda row: row["teacher_id"] == name) for name in teachers]  # noqa: B023
    joined = concatenate_datasets(
        [score_rollouts(rows, teachers[name], top_k=2) for name, rows in zip(teachers, parts, strict=True)]
    )
    assert [t["teacher_ids"] for t in record_of(joined)["teachers"]] == [{"math": 10}, {"code": 15}]


@pytest.mark.parametrize(
    "call, after",
    [("scoring.write_record", 0), ("scoring.write_record", 1), ("scoring.write_record", 2)]
    + [("scoring.remove_parts", 0), ("several.shutil.rmtree", 0), ("several.shutil.rmtree", 1)],
)
def test_a_run_that_ends_while_it_puts_the_parts_together_or_away(
    tmp_path, teachers, rollouts, monkeypatch, call, after
):
    """The card of each part and of the whole, and the two ends of the deletion."""
    whole = score_rollouts(rollouts, teachers, top_k=1, output_dir=tmp_path / "whole")
    count, (module, _, name) = 0, f"trl_lopd.generation.{call}".rpartition(".")
    real = resolve_name(f"{module}.{name}")

    def dies(*args, **kwargs):
        nonlocal count
        if count == after:
            raise KeyboardInterrupt
        count += 1
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{name}", dies)
        with pytest.raises(KeyboardInterrupt):
            score_rollouts(rollouts, teachers, top_k=1, output_dir=tmp_path / "table")
    again = score_rollouts(rollouts, teachers, top_k=1, output_dir=tmp_path / "table")
    assert again.to_dict() == whole.to_dict() and record_of(again) == record_of(whole)
    assert {path.name for path in (tmp_path / "table" / HIDDEN).iterdir()} == {"manifest.json", "process-0.lock"}
    cards = [(tmp_path / name / "README.md").read_text().replace(name, "") for name in ("whole", "table")]
    assert cards[0] == cards[1]


def test_killed_twenty_times_it_ends_in_the_same_table(tmp_path, teachers, student_dir):
    with_names(make_rollouts(120)).save_to_disk(tmp_path / "rollouts")
    args = [str(tmp_path / "rollouts"), teachers["math"], teachers["code"]]
    kills.check("score_several", 1, tmp_path, *args, kills=20)
    for name in ("whole", "killed"):
        assert {path.name for path in (tmp_path / name / HIDDEN).iterdir()} == {"manifest.json", "process-0.lock"}
    cards = [(tmp_path / name / "README.md").read_text().replace(name, "") for name in ("whole", "killed")]
    assert cards[0] == cards[1] and read_dataset_card(tmp_path / "killed")["teachers"][0]["probes"]
