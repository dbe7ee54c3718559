"""Several teachers of one table: each scores, or answers, the rows that name it."""

from __future__ import annotations

import logging
from pkgutil import resolve_name

import kills
import numpy as np
import pytest
import yaml
from datasets import Dataset, concatenate_datasets, load_dataset
from servers import stub_server
from tiny import make_args, make_model, make_rollouts, make_tokenizer
from trl import SFTConfig, SFTTrainer

from trl_lopd import (
    OfflineOPDTrainer,
    ShardError,
    TableError,
    TeacherConsistencyError,
    TeacherStampCallback,
    cli,
    collect_rollouts,
    fingerprint_teacher,
    generate_sft_data,
    load_table,
    read_dataset_card,
    read_model_card,
    score_rollouts,
)
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
    with pytest.raises(TableError, match=r"Row 13: token id 99 \(`completion_ids`"):
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
    with pytest.raises(
        ShardError, match="Teacher 'math': .*/begun holds shards of a run with other arguments"
    ) as info:
        score_rollouts(rollouts, swapped, top_k=1, output_dir=tmp_path / "begun")
    assert HIDDEN not in str(info.value)
    # What is shown while it is not complete is nothing.
    with pytest.raises(ShardError, match="not complete"):
        load_table(tmp_path / "begun")
    table = score_rollouts(rollouts, teachers, top_k=1, output_dir=tmp_path / "begun")
    assert table.to_dict() == load_table(tmp_path / "done", split="train").to_dict()


@pytest.mark.parametrize("missing", ["./teachr", "../teachr", "/nowhere/teachr", "models/teachers/teachr"])
def test_a_mistyped_path_is_named_with_its_teacher(teachers, rollouts, missing):
    prompts = with_names(Dataset.from_dict({"prompt": ["w3 w4"] * 5}))
    for job in (lambda given: score_rollouts(rollouts, given), lambda given: generate_sft_data(prompts, given)):
        with pytest.raises(FileNotFoundError, match=f"^Teacher 'code': {missing} is not there"):
            job(teachers | {"code": missing})
    for job in (lambda: score_rollouts(rollouts, missing), lambda: collect_rollouts(prompts, missing)):
        with pytest.raises(FileNotFoundError, match=f"^{missing} is not there"):
            job()


def dies_after(parts):
    from trl_lopd.generation.several import run_parts

    def run(run, rows, compute, key):
        done = []

        def one(*args):
            if len(done) == parts:
                raise KeyboardInterrupt
            done.append(args)
            return compute(*args)

        return run_parts(run, rows, one, key)

    return run


@pytest.mark.slow
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
    [("several.write_record", 1)]
    + [pytest.param("several.write_record", n, marks=pytest.mark.slow) for n in (0, 2)]
    + [pytest.param("several.shutil.rmtree", n, marks=pytest.mark.slow) for n in (0, 1)]
    + [pytest.param("scoring.remove_parts", 0, marks=pytest.mark.slow)],
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


@pytest.mark.slow
def test_killed_twenty_times_it_ends_in_the_same_table(tmp_path, teachers, student_dir):
    with_names(make_rollouts(120)).save_to_disk(tmp_path / "rollouts")
    args = [str(tmp_path / "rollouts"), teachers["math"], teachers["code"]]
    kills.check("score_several", 2, tmp_path, *args, kills=20)
    assert {path.suffix for path in (tmp_path / "killed" / HIDDEN).iterdir()} == {".json", ".lock"}
    cards = [(tmp_path / name / "README.md").read_text().replace(name, "") for name in ("whole", "killed")]
    assert cards[0] == cards[1] and read_dataset_card(tmp_path / "killed")["teachers"][0]["probes"]


# ---- SFT data ----


PROMPTS = [f"w{3 + i % 25} w{5 + i % 7}" for i in range(25)]
SAMPLING = {"temperature": 2.0, "max_completion_length": 12, "seed": 1}


@pytest.mark.parametrize("truncated", ["drop", pytest.param("keep", marks=pytest.mark.slow)])
def test_each_prompt_is_answered_by_its_own_teacher(tmp_path, teachers, truncated):
    prompts = with_names(Dataset.from_dict({"prompt": PROMPTS}))
    options = SAMPLING | {"truncated": truncated, "num_generations": 2, "rows_per_shard": 4}
    in_memory = generate_sft_data(prompts, teachers, **options)
    data = generate_sft_data(prompts, teachers, output_dir=tmp_path / "data", **options)
    assert data.to_dict() == in_memory.to_dict() and record_of(data) == record_of(in_memory)
    assert record_of(load_table(tmp_path / "data", split="train")) == record_of(data)
    again = generate_sft_data(prompts, teachers, output_dir=tmp_path / "data", **options)
    assert again.to_dict() == data.to_dict() and record_of(again) == record_of(data)
    ids = {name: fingerprint_teacher(teachers[name]).id for name in teachers}
    place = -1
    for row in data:  # in the order of the prompts
        assert row["teacher_fingerprint"] == ids[row["teacher_id"]]
        place = next(
            i for i in range(max(place, 0), 25) if prompts[i] == {k: row[k] for k in ("prompt", "teacher_id")}
        )
    assert set(data["teacher_id"]) == {"math", "code"} and ("input_ids" in data.column_names) == (truncated == "keep")
    entries = record_of(data)["sft_teachers"]
    assert {t["id"]: t["teacher_ids"] for t in entries} == {
        id: {name: data["teacher_id"][:].count(name)} for name, id in ids.items()
    }
    cut = sum(t["sampling"]["truncated_answers"] for t in entries)
    assert 0 < cut < 50 and len(data) == (50 if truncated == "keep" else 50 - cut)
    assert all(t["probes"] for t in entries)


def test_prompts_without_a_teacher_are_named(teachers):
    prompts = with_names(Dataset.from_dict({"prompt": PROMPTS}))
    wrong = prompts.map(lambda row, i: {"teacher_id": None} if i == 6 else {}, with_indices=True)
    with pytest.raises(TableError, match="Row 6, column 'teacher_id' is null"):
        generate_sft_data(wrong, teachers)
    empty = prompts.map(lambda row, i: {"prompt": ""} if i == 6 else {}, with_indices=True)
    with pytest.raises(ValueError, match="Prompt 6 is empty"):
        generate_sft_data(empty, teachers)
    with pytest.raises(TypeError, match="a list of rows"):
        generate_sft_data(PROMPTS, teachers)


# ---- The command line, and the way to a student ----


@pytest.mark.parametrize("config", [pytest.param(False, marks=pytest.mark.slow), True])
def test_on_the_command_line_and_in_yaml(tmp_path, teachers, config):
    with_names(Dataset.from_dict({"prompt": PROMPTS})).to_parquet(tmp_path / "prompts.parquet")
    with_names(make_rollouts(10), "domain").to_parquet(tmp_path / "rollouts.parquet")
    jobs = {
        "rollout": {"model_name_or_path": teachers, "dataset_name": str(tmp_path / "prompts.parquet"),
                    "role": "teacher", "max_completion_length": 6, "truncated": "keep"},
        "score": {"teacher": teachers, "teacher_column": "domain", "dataset_name": str(tmp_path / "rollouts.parquet")},
    }  # fmt: skip
    for job, options in jobs.items():
        options |= {"output_dir": str(tmp_path / job)}
        if config:
            (tmp_path / "job.yaml").write_text(yaml.safe_dump(options))
            flags = ["--config", str(tmp_path / "job.yaml")]
        else:
            flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        assert cli.main([job, *flags]) == 0
        table = load_table(tmp_path / job, split="train")
        assert table["teacher_id"] == [NAMES[i % 5] for i in range(len(table))]
        assert len(set(zip(table["teacher_fingerprint"], table["teacher_id"], strict=True))) == 2


def test_a_server_beside_a_local_teacher_on_the_command_line(tmp_path, teachers, capsys):
    with_names(make_rollouts(5)).to_parquet(tmp_path / "rollouts.parquet")
    flags = ["score", "--dataset_name", str(tmp_path / "rollouts.parquet"), "--top_k", "1", "--output_dir"]
    with stub_server("vllm", make_model(seed=9)) as server:
        given = [str(tmp_path / "out"), "--teacher", f"{{math: {teachers['math']}, code: '{server.url}'}}"]
        assert cli.main([*flags, *given]) == 2 and "Nothing says which teacher" in capsys.readouterr().err
        assert cli.main([*flags, *given, "--fingerprint", teachers["code"]]) == 2
        assert "`fingerprint` is a dictionary with what is meant for each" in capsys.readouterr().err
        assert cli.main([*flags, *given, "--fingerprint", f"{{code: {teachers['code']}}}"]) == 0
    table = load_table(tmp_path / "out", split="train")
    code = fingerprint_teacher(teachers["code"]).id + "#declared"
    signed = {"math": fingerprint_teacher(teachers["math"]).id, "code": code}
    assert table["teacher_fingerprint"] == [signed[name] for name in NAMES]
    for words in (["score", "--teacher", "{math: [x}"], ["rollout", "--model_name_or_path", "{a: b}"]):
        assert cli.main([*words, *flags[1:3], "--output_dir", str(tmp_path / "no")]) == 2
    printed = capsys.readouterr().err
    assert "`teacher` is no YAML" in printed and "are for teachers: give `--role teacher`" in printed


def test_from_the_prompts_to_a_student_of_two_teachers(tmp_path, teachers, tokenizer, caplog):
    data = generate_sft_data(
        with_names(Dataset.from_dict({"prompt": PROMPTS})), teachers, truncated="keep", **SAMPLING
    )
    args = SFTConfig(
        str(tmp_path / "sft"), use_cpu=True, bf16=False, report_to="none", max_steps=2, save_steps=1,
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(make_model(seed=5), args, train_dataset=data, processing_class=tokenizer)
    trainer.add_callback(TeacherStampCallback(trainer, data))
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    wrote = {t["id"]: t["teacher_ids"] for t in read_model_card(tmp_path / "student")["sft_teachers"]}
    assert wrote == {t["id"]: t["teacher_ids"] for t in record_of(data)["sft_teachers"]} and len(wrote) == 2

    prompts = with_names(Dataset.from_dict({"prompt": PROMPTS}))
    rollouts = collect_rollouts(prompts, str(tmp_path / "student"), max_completion_length=6)
    table = score_rollouts(rollouts, teachers, top_k=2)
    with caplog.at_level(logging.WARNING):
        trainer = OfflineOPDTrainer(str(tmp_path / "student"), make_args(tmp_path / "opd"), table)
    assert "teacher_id" not in caplog.text and "SFT data" not in caplog.text
    trainer.train()
    trainer.save_model(str(tmp_path / "round-1"))
    card = read_model_card(tmp_path / "round-1")
    assert {t["id"]: t["teacher_ids"] for t in card["sft_teachers"]} == wrote
    assert (card["opd_rounds"][0]["teacher_consistency"], card["opd_rounds"][0]["rows"]) == ("verified", 25)

    swapped = score_rollouts(rollouts, {"math": teachers["code"], "code": teachers["math"]}, top_k=2)
    one_for_both = score_rollouts(rollouts, teachers["math"], top_k=2)
    for wrong in (swapped, one_for_both):
        with pytest.raises(TeacherConsistencyError, match="column `teacher_id`.*those of 'code' by teacher@"):
            OfflineOPDTrainer(str(tmp_path / "student"), make_args(tmp_path / "opd"), wrong)
    # Of several tables, each of its own teacher.
    joined = concatenate_datasets([table.filter(lambda row: row["teacher_id"] == name) for name in teachers])  # noqa: B023
    OfflineOPDTrainer(str(tmp_path / "student"), make_args(tmp_path / "opd-2"), joined).train()
    # The second round begins with what the first one says.
    with pytest.raises(TeacherConsistencyError, match="those of 'code' by teacher@"):
        OfflineOPDTrainer(str(tmp_path / "round-1"), make_args(tmp_path / "opd-3"), swapped)


def test_teachers_without_names(rollouts):
    for work in (lambda: score_rollouts(rollouts, ["a", "b"]), lambda: generate_sft_data(["text"], ["a", "b"])):
        with pytest.raises(TypeError, match="a dictionary of several.*not a list"):
            work()
