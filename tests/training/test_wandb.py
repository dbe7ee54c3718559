"""What reporters get: wandb, offline, its run files read back; tensorboard, its event files."""

from __future__ import annotations

import json
import struct

import pytest
import wandb
from tiny import make_trainer
from wandb.proto import wandb_internal_pb2

from trl_lopd import EffOPDCallback, fingerprint_teacher
from trl_lopd.cli import main
from trl_lopd.training.monitoring.reporters import WORST_ROWS


def records(path):
    """The records of a `.wandb` file: LevelDB's log format, after a header of 7 bytes, each a protobuf message."""
    data, position, message = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too little is left of a block for a header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole message, or the last part of one
            yield wandb_internal_pb2.Record.FromString(message)
            message = b""


def read_run(directory):
    """Config, logged rows, artifacts and tables of the only run below a directory."""
    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    config, logged, artifacts, ids = {}, [], [], set()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            updates = record.run.config.update if kind == "run" else record.config.update
            config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
        if kind == "run":
            ids.add(record.run.run_id)
        elif kind == "history":
            items = record.history.item
            logged.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif kind == "artifact":
            artifacts.append(record.artifact)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            artifacts.append(record.request.log_artifact.artifact)
    assert len(ids) == 1
    return {
        "id": ids.pop(),
        "config": config,
        "logged": logged,
        "artifacts": artifacts,
        "files": path.parent / "files",
    }


def finish():
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()  # it would write the runs of other tests into this one's directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student_dir, table):
    directory = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(directory))
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(directory / "events"))
        trainer = make_trainer(
            directory, student_dir, table, table, report_to=["wandb", "tensorboard"], max_steps=4,
            eval_strategy="steps", eval_steps=2,
            model_init_kwargs={"token": "hf_secret"},
        )  # fmt: skip
        trainer.add_callback(EffOPDCallback(trainer, gate_rows=12))
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        finish()
        yield trainer, directory, read_run(directory)


def test_metrics_are_grouped(trained):
    names = {name for row in trained[2]["logged"] for name in row if not name.startswith("_")}
    assert {name.partition("/")[0] for name in names} == {"train", "eval", "effopd"}
    assert {"train/loss", "train/importance_weight/p01", "eval/reverse_kl_topk", "effopd/score_1"} <= names
    assert not [name for name in names if "effopd" in name.partition("/")[2]]
    searches = [row for row in trained[2]["logged"] if "effopd/score_1" in row]
    assert [row["train/global_step"] for row in searches] == [1, 2, 4]
    logged = [log["effopd/score_1"] for log in trained[0].state.log_history if "effopd/score_1" in log]
    assert [row["effopd/score_1"] for row in searches] == pytest.approx(logged)


def test_config_says_who_is_trained_on_whose_scores(trained, student_dir, teacher_dir):
    config = trained[2]["config"]
    assert config["loss_type"] == "topk" and config["learning_rate"] == 1e-3
    said = config["offline_opd"]
    assert said["student"] == fingerprint_teacher(student_dir).id and said["objective"] == "topk"
    teacher = fingerprint_teacher(teacher_dir).id
    assert [entry["id"] for entry in said["teachers"]] == [entry["id"] for entry in said["sft_teachers"]] == [teacher]
    assert said["teacher_consistency"] == "verified" and said["rows"] == 24
    assert "hf_secret" not in json.dumps(config)


def test_worst_rows_are_a_table(trained, table):
    trainer, _, run = trained
    (path,) = run["files"].glob("media/table/eval/worst_rows*.json")
    found = json.loads(path.read_text())
    assert found["columns"] == ["row", "reverse_kl_topk", "prompt", "completion"] and len(found["data"]) == WORST_ROWS
    values = trainer.reverse_kl_of_rows(table)
    worst = (-values).argsort(kind="stable")[:WORST_ROWS]
    assert [line[0] for line in found["data"]] == worst.tolist()
    assert [line[1] for line in found["data"]] == pytest.approx(values[worst], rel=1e-5)
    assert found["data"][0][3] == trainer.processing_class.decode(table[int(worst[0])]["completion_ids"])


def test_the_report_is_an_artifact_of_the_run_that_trained(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer, _, run = trained
    assert main(["report", trainer.args.output_dir, "--report_to", "wandb"]) == 0
    finish()
    again = read_run(tmp_path)
    (artifact,) = again["artifacts"]
    assert again["id"] == run["id"] and artifact.type == "report" and artifact.name == f"report-{run['id']}"
    assert [entry.path for entry in artifact.manifest.contents] == ["report.html"]
    assert f"report-{run['id']}" in capsys.readouterr().out


def test_another_reporter_gets_the_scalars(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer, directory, _ = trained
    files = [path.parent for path in directory.rglob("events.out.tfevents*")]
    events = accumulator.EventAccumulator(str(files[0]))
    events.Reload()
    names = set(events.Tags()["scalars"])
    wanted = {"train/loss", "train/importance_weight/p99", "eval/reverse_kl_topk", "train/effopd/score_1"}
    assert wanted <= names
    logged = [log["importance_weight/p99"] for log in trainer.state.log_history if "importance_weight/p99" in log]
    # Event files hold float32.
    assert [event.value for event in events.Scalars("train/importance_weight/p99")] == pytest.approx(logged, rel=1e-6)
