"""Tables that are streamed: what the card claims of them, and rows that are not alike."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from tiny import make_args, make_model, make_rollouts, without_topk

from trl_lopd import (
    OfflineOPDTrainer,
    TableError,
    TeacherConsistencyError,
    fingerprint_teacher,
    read_model_card,
    score_rollouts,
    stamp_model_card,
)


@pytest.fixture(scope="module")
def foreign(tokenizer, student_dir):
    """Rows that another teacher scored."""
    return score_rollouts(
        make_rollouts(24, seed=5), make_model(seed=9), processing_class=tokenizer, top_k=4, ref_model=str(student_dir)
    )


def train_on(stream, tmp_path, student_dir, resume=None, **options):
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path, **options), stream)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    (card,) = read_model_card(tmp_path / "out")["opd_rounds"]
    return card, trainer


def rows_of(card):
    return {teacher["id"]: teacher["rows"] for teacher in card["teachers"]}


@pytest.mark.parametrize(
    ("workers", "max_tokens_per_device"),
    [(0, None), pytest.param(1, 64, marks=pytest.mark.slow), pytest.param(2, None, marks=pytest.mark.slow), (2, 64)],
)
def test_the_card_names_the_teachers_of_the_rows_trained_on_whoever_read_them(
    tmp_path, student_dir, table, foreign, workers, max_tokens_per_device, caplog
):
    """With two workers, each reads one of two shards: a batch of the table, one of the other teacher, and so on."""
    (own,), (other,) = table.unique("teacher_fingerprint"), foreign.unique("teacher_fingerprint")
    stream = concatenate_datasets([table, foreign]).to_iterable_dataset(num_shards=2)
    options = {"dataloader_num_workers": workers, "max_tokens_per_device": max_tokens_per_device}
    with caplog.at_level(logging.WARNING):
        card, _ = train_on(stream, tmp_path, student_dir, max_steps=7, teacher_consistency="warn", **options)
    assert "Teacher mismatch" in caplog.text
    rows = {own: 16, other: 12} if workers == 2 else {own: 24, other: 4}
    assert rows_of(card) == rows and card["rows"] == 28
    assert card["teacher_consistency"] == "overridden (warn)"


def test_rows_that_were_read_ahead_or_only_evaluated_are_not_in_the_card(tmp_path, student_dir, table, foreign):
    """Batches are read one ahead of training, and workers read further."""
    rows = concatenate_datasets([table.select(range(8)), foreign])
    for workers in (0, 1):
        args = make_args(
            tmp_path / str(workers), max_steps=2, dataloader_num_workers=workers, eval_strategy="steps", eval_steps=1,
            teacher_consistency="warn",
        )  # fmt: skip
        trainer = OfflineOPDTrainer(
            str(student_dir), args, rows.to_iterable_dataset(), eval_dataset=foreign.to_iterable_dataset()
        )
        trainer.train()
        trainer.save_model()
        (card,) = read_model_card(args.output_dir)["opd_rounds"]
        assert rows_of(card) == {table[0]["teacher_fingerprint"]: 8}
        assert (card["rows"], card["teacher_consistency"]) == (8, "verified")


def test_a_row_counts_each_time_that_it_is_trained_on(tmp_path, student_dir, table):
    stream = table.map(lambda row, i: {"student_fingerprint": "mine@1" if i % 2 else None}, with_indices=True)
    card, _ = train_on(
        stream.to_iterable_dataset(), tmp_path, student_dir, max_steps=8, gradient_accumulation_steps=2,
        teacher_consistency="off",
    )  # fmt: skip
    assert card["rows"] == 64  # of 24
    assert [(s["id"], s["rows"], s["share"]) for s in card["sampled_by"]] == [("mine@1", 32, 0.5)]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_resumed_run_claims_what_was_trained_on_before_it_was_interrupted(
    tmp_path, student_dir, table, foreign, workers
):
    (own,), (other,) = table.unique("teacher_fingerprint"), foreign.unique("teacher_fingerprint")
    stream = concatenate_datasets([foreign.select(range(8)), table]).to_iterable_dataset()
    options = dict(max_steps=6, save_strategy="steps", save_steps=4, dataloader_num_workers=workers)
    whole, _ = train_on(stream, tmp_path / "a", student_dir, teacher_consistency="warn", **options)
    checkpoint = tmp_path / "a" / "out" / "checkpoint-4"
    resumed, _ = train_on(
        stream, tmp_path / "b", student_dir, resume=str(checkpoint), teacher_consistency="warn", **options
    )
    assert whole == resumed and rows_of(whole) == {other: 8, own: 16}
    assert whole["teacher_consistency"] == "overridden (warn)"


def test_a_checkpoint_without_its_card_is_resumed_with_a_warning(tmp_path, student_dir, table, caplog):
    options = dict(max_steps=6, save_strategy="steps", save_steps=4)
    train_on(table.to_iterable_dataset(), tmp_path, student_dir, **options)
    checkpoint = tmp_path / "out" / "checkpoint-4"
    (checkpoint / "README.md").unlink()
    with caplog.at_level(logging.WARNING):
        card, _ = train_on(table.to_iterable_dataset(), tmp_path, student_dir, resume=str(checkpoint), **options)
    assert "has no card that says which rows" in caplog.text and card["rows"] == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_a_foreign_row_stops_training_and_evaluation(tmp_path, student_dir, table, foreign, workers):
    mixed = concatenate_datasets([table.select(range(8)), foreign]).to_iterable_dataset()
    args = make_args(tmp_path, dataloader_num_workers=workers)
    with pytest.raises(TeacherConsistencyError, match="Teacher mismatch"):
        OfflineOPDTrainer(str(student_dir), args, mixed).train()
    trainer = OfflineOPDTrainer(str(student_dir), args, table, eval_dataset=mixed)
    with pytest.raises(TeacherConsistencyError, match="Teacher mismatch"):
        trainer.evaluate()


@pytest.fixture
def two_domains(tmp_path, tokenizer, student_dir, table, foreign):
    """A student that learnt math from one teacher and code from another, and rows of both, rightly scored."""
    student = tmp_path / "student"
    make_model(seed=2).save_pretrained(student)
    tokenizer.save_pretrained(student)
    teachers = [rows[0]["teacher_fingerprint"] for rows in (table, foreign)]
    entries = [{"id": id, "evidence": "verified", "rows": 5, "teacher_ids": {name: 5}}
               for id, name in zip(teachers, ("math", "code"), strict=True)]  # fmt: skip
    stamp_model_card(student, sft_teachers=entries, checkpoint=fingerprint_teacher(student))
    return student, table.add_column("teacher_id", ["math"] * 24), foreign.add_column("teacher_id", ["code"] * 24)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_domains_of_a_stream_are_looked_at_row_by_row(tmp_path, two_domains, workers, caplog):
    student, math, code = two_domains
    (own,), (other,) = math.unique("teacher_fingerprint"), code.unique("teacher_fingerprint")
    stream = concatenate_datasets([math.select(range(8)), code]).to_iterable_dataset()
    options = dict(max_steps=6, save_strategy="steps", save_steps=4, dataloader_num_workers=workers)
    with caplog.at_level(logging.WARNING):
        card, _ = train_on(stream, tmp_path / "right", student, **options)
    assert "domain" not in caplog.text and card["teacher_consistency"] == "verified"
    assert [(t["id"], t["teacher_ids"]) for t in card["teachers"]] == [(other, {"code": 16}), (own, {"math": 8})]
    # Both teachers are known; only their domains are exchanged in some rows.
    wrong = code.select(range(8)).map(lambda row: {"teacher_id": "math"})
    swapped = concatenate_datasets([math.select(range(8)), wrong, code.select(range(8, 24))]).to_iterable_dataset()
    with pytest.raises(TeacherConsistencyError, match=f"those of 'math' by {other}, while 1 teacher .{own}. wrote"):
        train_on(swapped, tmp_path / "wrong", student, dataloader_num_workers=workers)
    whole, _ = train_on(swapped, tmp_path / "a", student, teacher_consistency="warn", **options)
    checkpoint = str(tmp_path / "a" / "out" / "checkpoint-4")
    resumed, _ = train_on(swapped, tmp_path / "b", student, checkpoint, teacher_consistency="warn", **options)
    assert whole == resumed and whole["teacher_consistency"] == "overridden (warn)"
    # As a table.
    table = concatenate_datasets([math, wrong])
    with pytest.raises(TeacherConsistencyError, match="those of 'math' by"):
        OfflineOPDTrainer(str(student), make_args(tmp_path), table)


# ---- Rows that are not alike ----


def stream_of(*tables):
    """Rows with the columns of their table only, as from JSON lines."""

    def rows():
        for rows in tables:
            yield from rows

    return IterableDataset.from_generator(rows)


@pytest.mark.parametrize(
    ("column", "where", "workers"),
    [
        ("ref_logprobs", "first", 0),
        ("teacher_topk_ids", "later", 0),
        pytest.param("ref_logprobs", "later", 1, marks=pytest.mark.slow),
        pytest.param("teacher_topk_ids", "first", 1, marks=pytest.mark.slow),
    ],
)
def test_a_column_is_in_every_row_of_a_stream_or_in_none(tmp_path, student_dir, table, column, where, workers):
    """In the same batch, or in another one."""
    columns = [name for name in table.column_names if name.startswith("teacher_topk")]
    some = table.remove_columns(columns if column in columns else [column])
    for rows in (2, 8):
        parts = [some.select(range(rows)), table] if where == "first" else [table.select(range(rows)), some]
        trainer = OfflineOPDTrainer(
            str(student_dir), make_args(tmp_path, dataloader_num_workers=workers), stream_of(*parts)
        )
        with pytest.raises(TableError, match=rf"[Rr]ow {rows}\b, column `{column}`"):
            trainer.train()
        with pytest.raises(TableError, match=rf"[Rr]ow {rows}\b, column `{column}`"):
            trainer.evaluate(stream_of(*parts))


def test_workers_that_read_different_k_are_found_out(tmp_path, student_dir, teacher_dir, table):
    """Each worker reads one shard, in which k is the same."""
    wide = score_rollouts(make_rollouts(24), str(teacher_dir), top_k=6, ref_model=str(student_dir))

    def rows(tables):
        for rows in tables:
            yield from rows

    stream = IterableDataset.from_generator(rows, gen_kwargs={"tables": [list(table), list(wide)]})
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path, dataloader_num_workers=2), stream)
    with pytest.raises(TableError, match="6 top-k values, where 4 are needed"):
        trainer.train()


@pytest.mark.slow
def test_several_streams_may_have_different_columns(tmp_path, student_dir, table):
    """Each is held against its own first row."""
    bare = table.remove_columns("ref_logprobs")
    streams = {"a": table.to_iterable_dataset(), "b": bare.to_iterable_dataset()}
    args = make_args(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=2)
    trainer = OfflineOPDTrainer(str(student_dir), args, bare.to_iterable_dataset(), eval_dataset=streams)
    metrics = trainer.evaluate()
    assert "eval_a_importance_weight/ess" in metrics and "eval_b_importance_weight/ess" not in metrics
    assert trainer.evaluate(without_topk(table).to_iterable_dataset() if trainer.loss_type == "sampled" else bare)
    trainer.train()


def test_a_table_that_is_streamed_as_it_is_stays_valid(tmp_path, student_dir, table):
    rows = Dataset.from_list(table.to_list(), features=table.features)
    assert OfflineOPDTrainer(str(student_dir), make_args(tmp_path), rows.to_iterable_dataset()).train()


# ---- Ways in which a stream is read ----


def generated(table):
    return IterableDataset.from_generator(lambda: iter(table.to_list()))


STREAMS = {
    "arrow": lambda table, path: table.to_iterable_dataset(num_shards=3),
    "parquet": lambda table, path: load_dataset("parquet", data_files=path, split="train", streaming=True),
    "generator": lambda table, path: generated(table),
    "torch": lambda table, path: table.to_iterable_dataset().with_format("torch"),
    "mapped": lambda table, path: table.to_iterable_dataset().map(lambda row: {**row}),
    "mapped as torch": lambda table, path: table.to_iterable_dataset().with_format("torch").map(lambda row: {**row}),
    "mapped as numpy": lambda table, path: table.to_iterable_dataset().with_format("numpy").map(lambda row: {**row}),
    "generated as torch": lambda table, path: generated(table).with_format("torch"),
    "filtered": lambda table, path: table.to_iterable_dataset().filter(lambda row: len(row["prompt_ids"]) > 0),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_gives_the_batches_of_its_table(tmp_path, student_dir, table, kind):
    mask = [[True] * (len(ids) - 1) + [False] if len(ids) > 1 else [True] for ids in table["completion_ids"]]
    table = table.add_column("completion_mask", mask)
    table.to_parquet(tmp_path / "table.parquet")
    stream = STREAMS[kind](table, str(tmp_path / "table.parquet"))
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path), table, eval_dataset=stream)
    expected, found = (list(trainer.get_eval_dataloader(rows)) for rows in (table, stream))
    assert len(found) == len(expected) > 1
    for batch, of_table in zip(found, expected, strict=True):
        assert set(batch) - set(of_table) == {"teacher_fingerprint", "teacher_id", "student_fingerprint", "is_filler"}
        for name, values in of_table.items():
            assert batch[name].dtype == values.dtype and torch.equal(batch[name], values), name


def test_a_shuffled_stream_has_each_row_once(tmp_path, student_dir, table):
    stream = table.to_iterable_dataset().shuffle(seed=1, buffer_size=10)
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path), table, eval_dataset=stream)
    expected, found = (
        [batch["labels"][batch["sequences"] == row].tolist() for batch in trainer.get_eval_dataloader(rows)
         for row in range(len(batch["truncated"]))]
        for rows in (table, stream)
    )  # fmt: skip
    assert found != expected and sorted(found) == sorted(expected)


@pytest.mark.parametrize("kind", ["arrow", "generator", "torch", "generated as torch"])
def test_a_stream_that_was_moved_begins_there(tmp_path, student_dir, table, kind):
    stream = STREAMS[kind](table, None)
    rows = iter(stream)
    for _ in range(10):
        next(rows)
    stream.load_state_dict(stream.state_dict())
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path), table, eval_dataset=stream)
    found = [batch["labels"].tolist() for batch in trainer.get_eval_dataloader(stream)]
    expected = [batch["labels"].tolist() for batch in trainer.get_eval_dataloader(table.select(range(10, 24)))]
    assert found == expected


def test_a_row_of_other_types_is_named(tmp_path, student_dir, table):
    rows = table.to_list()
    rows[6]["completion_ids"] = [str(id) for id in rows[6]["completion_ids"]]
    trainer = OfflineOPDTrainer(str(student_dir), make_args(tmp_path), stream_of(rows))
    with pytest.raises(TableError, match=r"Row 6: its types are not those of the rows before it: .*completion_ids"):
        trainer.train()


# ---- Ends of a pass ----


def test_a_pass_that_ends_inside_a_step_adds_nothing_to_the_next(tmp_path, student_dir, table, caplog):
    """5 rows in steps of 3: the table's second step has 2 rows, the stream's begins again at its first."""
    rows = table.select(range(5))
    options = dict(
        per_device_train_batch_size=1, gradient_accumulation_steps=3, train_sampling_strategy="sequential",
        max_steps=2, logging_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        _, stream = train_on(rows.to_iterable_dataset(), tmp_path / "stream", student_dir, **options)
    assert caplog.text.count("The stream ended 2 of 3 batches into a step") == 1
    _, table_of_three = train_on(rows.select(range(3)), tmp_path / "table", student_dir, **options)
    losses, expected = (
        [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
        for trainer in (stream, table_of_three)
    )
    assert losses == expected and len(losses) == 2


def test_a_later_pass_over_a_stream_is_not_resumed(tmp_path, student_dir, table):
    """`Trainer` would skip all of the stream, and go on with other rows than an uninterrupted run."""
    stream = table.select(range(12)).to_iterable_dataset()
    options = dict(max_steps=6, save_strategy="steps", save_steps=1)  # a pass is three steps
    whole, _ = train_on(stream, tmp_path, student_dir, **options)
    for step in (1, 3):
        checkpoint = str(tmp_path / "out" / f"checkpoint-{step}")
        resumed, _ = train_on(stream, tmp_path / "again", student_dir, resume=checkpoint, **options)
        assert resumed == whole
    checkpoint = str(tmp_path / "out" / "checkpoint-4")
    with pytest.raises(ValueError, match="pass 2 over a stream"):
        train_on(stream, tmp_path / "again", student_dir, resume=checkpoint, **options)
