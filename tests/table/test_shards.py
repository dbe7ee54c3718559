"""The store of shards: what it writes, what it refuses, and that nothing is lost or written twice, killed or not."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ranks
from datasets import load_dataset
from hub import Hub

from trl_lopd import stamp_dataset_card, table_features
from trl_lopd.table import store as shards
from trl_lopd.table.store import ShardError, ShardStore

FAULTS = Path(__file__).parents[1] / "faults"
sys.path.insert(0, str(FAULTS))

import shards_job  # noqa: E402
from shards_job import NUM_SHARDS, ROWS, open_store, output_rows, work  # noqa: E402

EXPECTED_ROWS = [row for row in range(ROWS) for _ in range(output_rows(row))]
EXPECTED_COUNTS = {"inputs": ROWS, "dropped": sum(output_rows(row) == 0 for row in range(ROWS))}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A store that was never interrupted. Read only."""
    directory = tmp_path_factory.mktemp("finished") / "out"
    with open_store(directory) as store:
        work(store)
    return directory


def small(directory, shards=3, pins=None, **options):
    return ShardStore(directory, pins=pins or {"teacher": "a"}, rows=2 * shards, rows_per_shard=2, **options)


def rows(*values):
    return pa.table({"row": pa.array(values, pa.int32())})


def fill(store, limit=None):
    for shard in store.pending[:limit]:
        store.write(shard, rows(*store.span(shard)), rows=2)


def files(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.parquet")}


# ---- Shards, and the table that they are ----


def test_a_run(tmp_path):
    store = ShardStore(tmp_path / "a" / "out", pins={}, rows=7, rows_per_shard=3)
    with store:
        assert (store.pending, store.num_shards) == ([0, 1, 2], 3)
        assert [store.span(shard) for shard in store.pending] == [range(0, 3), range(3, 6), range(6, 7)]
        with pytest.raises(ShardError, match="2 of 3 shards are missing, the first is data-00000-of-00003.parquet"):
            store.write(1, rows(), kept=0, dropped=3)
            store.dataset()
        store.write(0, rows(0, 0, 2), kept=3, dropped=np.int64(1))
        assert store.pending == [2]
        store.write(2, rows(6), kept=1, dropped=0)
        assert store.pending == []
    assert store.counts() == {"kept": 4, "dropped": 4}
    assert store.dataset()["row"][:] == [0, 0, 2, 6]
    assert sorted(path.name for path in (tmp_path / "a" / "out").iterdir()) == [
        ".trl_lopd",
        *(f"data-0000{i}-of-00003.parquet" for i in range(3)),
    ]


def test_a_run_without_a_row(tmp_path):
    with small(tmp_path, shards=1) as store:
        store.write(0, rows())
    assert len(store.dataset()) == 0 and store.dataset().features == datasets.Features(row=datasets.Value("int32"))


def test_pins_that_are_not_json(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        ShardStore(tmp_path, pins={"a": object()}, rows=1, rows_per_shard=1)


def test_other_columns_than_before(tmp_path):
    """In the run that wrote the shards before, and in one that resumes it."""
    other = pa.table({"row": pa.array([1.0]), "more": ["a"]})
    message = r"Shard \d has other columns .* \(row: int32 -> double, more: not there -> string\)"
    with small(tmp_path) as store:
        store.write(0, rows(0))
        with pytest.raises(ShardError, match=message):
            store.write(1, other)
    with small(tmp_path) as store:
        with pytest.raises(ShardError, match=message):
            store.write(1, other)
        fill(store)


@pytest.mark.parametrize("name", ["out", "test", "val[1] *"])
def test_datasets_loads_exactly_the_shards(tmp_path, finished, name):
    """Whatever else is there: a card with our block, left-overs of a killed run, another run's files."""
    directory = tmp_path / name
    with open_store(directory) as store:
        (store.directory / ".trl_lopd" / "data-00000-of-00048.parquet.tmp").write_bytes(b"half a shar")
        work(store)
    dataset = store.dataset()
    assert dataset["row"][:] == EXPECTED_ROWS and store.counts() == EXPECTED_COUNTS
    assert dataset.cache_files
    assert files(directory) == files(finished)
    if name != "out":
        # `load_dataset` itself takes a path for a pattern.
        return
    stamp_dataset_card(directory, datasets.Dataset.from_dict({"row": [1]}))
    assert "trl_lopd:" in (directory / "README.md").read_text()
    (loaded,) = load_dataset(str(directory)).values()
    assert loaded.to_dict() == dataset.to_dict() and loaded.features == dataset.features
    paths = [str(path) for path in sorted(directory.glob("*.parquet"))]
    assert load_dataset("parquet", data_files=paths, split="train").to_dict() == dataset.to_dict()
    with open_store(directory) as store:
        assert store.pending == []


@pytest.mark.slow
def test_on_the_hub(tmp_path, finished):
    """Hidden files go along; `load_dataset` loads the shards all the same."""
    script = """if True:
        import sys
        from datasets import load_dataset
        from huggingface_hub import HfApi
        api = HfApi()
        api.create_repo("tester/table", repo_type="dataset")
        api.upload_folder(repo_id="tester/table", repo_type="dataset", folder_path=sys.argv[1])
        names = api.list_repo_files("tester/table", repo_type="dataset")
        assert ".trl_lopd/manifest.json" in names, names
        for streaming in (False, True):
            (table,) = load_dataset("tester/table", streaming=streaming).values()
            assert [row["row"] for row in table] == eval(sys.argv[2])
    """
    (tmp_path / "upload.py").write_text(script)
    words = (tmp_path / "upload.py", finished, EXPECTED_ROWS)
    with Hub() as hub:
        done = ranks.launch(*words, processes=None, env=hub.env(tmp_path / "home"))
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_type_of_a_scored_table_survives(tmp_path, table):
    """float16 in nested lists and int32 above all, with the features that the table had, -inf and signed zero too."""
    features = table_features(top_k=4, ref_logprobs=True)
    table = table.select_columns(list(features)).cast(features)
    special = {
        "prompt_ids": [1],
        "completion_ids": [2, 3],
        "teacher_logprobs": [-np.inf, -0.0],
        "teacher_fingerprint": "é",
        "ref_logprobs": [-1e-30, -1e30],
        "teacher_topk_ids": [[0, 1, 2, 2**31 - 1]] * 2,
        "teacher_topk_logprobs": [[-0.0, -6e-8, -65504.0, -np.inf]] * 2,
    }
    special = datasets.Dataset.from_list([special]).cast(features)
    arrow = pa.concat_tables([table.data.table, special.data.table])
    with ShardStore(tmp_path / "out", pins={}, rows=len(arrow), rows_per_shard=10) as store:
        for shard in store.pending:
            span = store.span(shard)
            store.write(shard, arrow.slice(span.start, len(span)))
    for loaded in (store.dataset(), load_dataset(str(tmp_path / "out"), split="train")):
        assert loaded.features == features
        assert loaded.data.table.combine_chunks().equals(arrow.combine_chunks())
    metadata = pq.read_metadata(tmp_path / "out" / "data-00000-of-00003.parquet")
    assert {metadata.row_group(0).column(i).compression for i in range(metadata.num_columns)} == {"ZSTD"}


def test_features_that_arrow_does_not_know(tmp_path):
    features = datasets.Features(label=datasets.ClassLabel(names=["no", "yes"]))
    data = datasets.Dataset.from_dict({"label": [0, 1]}, features=features)
    with small(tmp_path, shards=1) as store:
        store.write(0, data.with_format("arrow")[:].replace_schema_metadata(features.arrow_schema.metadata))
    assert store.dataset().features == features


def test_the_same_table_gives_the_same_bytes(tmp_path, monkeypatch):
    """However it is chunked and sliced; in row groups of bounded size."""
    monkeypatch.setattr(shards, "_ROW_GROUP_BYTES", 10_000)
    whole = shards_job.compute(range(0, 100))
    pieces = pa.concat_tables([whole.slice(0, 3), whole.slice(3, 50), whole.slice(53)])
    sliced = pa.concat_tables([whole, whole]).slice(len(whole))
    for name, table in {"whole": whole, "pieces": pieces, "sliced": sliced}.items():
        with small(tmp_path / name, shards=1) as store:
            store.write(0, table)
    first, *others = (files(tmp_path / name) for name in ("whole", "pieces", "sliced"))
    assert others == [first, first]
    metadata = pq.read_metadata(tmp_path / "whole" / "data-00000-of-00001.parquet")
    groups = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    assert len(groups) > 3 and max(groups) < 20_000


# ---- What is refused, and what is done again ----


def test_other_arguments_are_refused(tmp_path):
    pins = {"teacher": "a" * 200, "settings": {"top_k": 8, "stop": ("x",)}, "seed": 1}
    with small(tmp_path, pins=pins) as store:
        fill(store, limit=1)
    with small(tmp_path, pins=pins) as store:
        assert store.pending == [1, 2]
    changed = {"teacher": "b" * 200, "settings": {"top_k": 4, "stop": ("x",)}, "extra": None}
    with pytest.raises(ShardError) as caught, small(tmp_path, shards=4, pins=changed):
        pass
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path} holds shards of a run with other arguments. What changed:"
    assert lines[1:6] == [
        "  rows: 6 -> 8",
        f'  teacher: "{"a" * 49} … {"a" * 19}" -> "{"b" * 49} … {"b" * 19}"',
        "  settings.top_k: 8 -> 4",
        "  seed: 1 -> not set",
        "  extra: not set -> null",
    ]
    assert "same arguments" in lines[6] and "another output directory, or delete this one" in lines[6]
    # Nothing was touched, and the lock is free.
    with small(tmp_path, pins=pins) as store:
        assert store.pending == [1, 2]


def test_a_manifest_of_another_version_or_broken(tmp_path):
    with small(tmp_path):
        pass
    manifest = tmp_path / ".trl_lopd" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    with pytest.raises(ShardError, match="another version of trl-lopd"), small(tmp_path):
        pass
    manifest.write_text("{")
    with pytest.raises(ShardError, match="manifest.json cannot be read"), small(tmp_path):
        pass


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ShardError, match=r"is not empty, .*thesis.tex"), small(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "README.md").write_text("# Mine")
    with small(tmp_path / "clone") as store:
        fill(store)
    with small(tmp_path / "clone") as store:
        assert store.pending == []


def test_damaged_shards_are_said_and_done_again(tmp_path, caplog):
    with small(tmp_path, shards=6) as store:
        fill(store)
    before = files(tmp_path)
    missing, truncated, altered = (tmp_path / f"data-0000{i}-of-00006.parquet" for i in range(3))
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-1])
    content = bytearray(altered.read_bytes())
    column = pq.read_metadata(altered).row_group(0).column(0)
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    altered.write_bytes(content)
    with caplog.at_level(logging.WARNING), small(tmp_path, shards=6) as store:
        assert store.pending == [0, 1, 2] and store.counts() == {"rows": 6}
        with pytest.raises(ShardError, match="3 of 6 shards are missing"):
            store.dataset()
        fill(store)
    assert len(caplog.messages) == 2
    for path, message in zip((truncated, altered), caplog.messages, strict=True):
        assert message.startswith(f"{path} is truncated or altered")
        assert message.endswith("Its rows are computed again.")
    assert files(tmp_path) == before and store.counts() == {"rows": 12}


def test_left_overs_are_removed(tmp_path):
    with small(tmp_path):
        pass
    (tmp_path / ".trl_lopd" / "data-00000-of-00003.parquet.tmp").write_bytes(b"half")
    with small(tmp_path):
        assert not list(tmp_path.rglob("*.tmp"))


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    with small(tmp_path) as store:
        fill(store, limit=1)

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(ShardError, match=r"is full \(No space.*\); 1 of 3 shards are safe .* same command"):
                fill(store)
        with monkeypatch.context() as patch:
            patch.setattr(shards, "write_parquet", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                fill(store)
        assert store.pending == [1, 2] and not list(tmp_path.rglob("*.tmp"))
        fill(store)
    assert store.dataset()["row"][:] == list(range(6))


def test_a_disk_that_is_really_full(tmp_path):
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=900k tmpfs '{tmp_path}'"
    try:
        subprocess.run([*enter, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs leave to mount a file system in a namespace")
    command = f"{mount} && exec '{sys.executable}' '{FAULTS / 'shards_full_disk.py'}' '{tmp_path}'"
    done = subprocess.run([*enter, command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- Several processes ----


def test_two_runs_on_one_output(tmp_path):
    with small(tmp_path) as store:
        with pytest.raises(ShardError, match=r"Another run is writing to .* \(process-0\)") as caught:
            small(tmp_path).__enter__()
        assert str(tmp_path) in str(caught.value)
        fill(store)
    with small(tmp_path) as store:
        assert store.pending == []


def test_processes_share_the_work(tmp_path):
    first, second = (small(tmp_path, shards=5, process_index=i, num_processes=2) for i in range(2))
    with pytest.raises(ShardError, match="process 0 of this run has not entered"), second:
        pass
    with first, second:
        assert (first.pending, second.pending) == ([0, 2, 4], [1, 3])
        fill(second)
        fill(first, limit=1)
        # Another run's second process, whose first one was refused.
        with (
            pytest.raises(ShardError, match=r"\(process-1\)"),
            small(tmp_path, shards=5, process_index=1, num_processes=2),
        ):
            pass
    with small(tmp_path, shards=5) as store:
        assert store.pending == [2, 4]
        fill(store)
    assert store.dataset()["row"][:] == list(range(10)) and store.counts() == {"rows": 10}


def test_a_process_that_outlives_process_0_is_noticed(tmp_path):
    first, second = (small(tmp_path, process_index=i, num_processes=2) for i in range(2))
    first.__enter__()
    with second:
        first.__exit__()
        with pytest.raises(ShardError, match=r"Another run is writing to .* \(process-1\)"), small(tmp_path):
            pass
    with small(tmp_path) as store:
        assert store.pending == [0, 1, 2]


# ---- Kills ----


def start(directory, processes, pause):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, FAULTS / "shards_job.py", directory]
    jobs = [
        subprocess.Popen([*command, str(index), str(processes), str(pause)], text=True, **pipes)
        for index in range(processes)
    ]
    for job in jobs:
        expect(job, "ready")
    return jobs


def expect(job, word):
    assert job.stdout.readline() == f"{word}\n", job.communicate()[1]


def enter(job):
    print(file=job.stdin, flush=True)
    expect(job, "entered")


def test_the_job_loads_only_what_it_needs():
    """Or the kill test would kill imports."""
    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, trl_lopd.table.store; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, finished):
    """By SIGKILL at random moments, entering included: the table is that of a run that was left alone."""
    processes, rng, directory, kills = 2, random.Random(2), tmp_path / "out", 0
    while kills < 10:
        jobs = start(directory, processes, pause=0.01)
        if rng.random() < 0.2:
            # Process 0 is killed somewhere on its way in.
            print(file=jobs[0].stdin, flush=True)
        else:
            for job in jobs:
                enter(job)
        end = time.monotonic() + rng.uniform(0, 0.05)
        # Progress is held back, lest all be done before the last kill.
        while time.monotonic() < end and len(list(directory.glob("*.parquet"))) < 1.5 * kills:
            time.sleep(0.001)
        for job in rng.sample(jobs, processes):
            job.kill()
            time.sleep(rng.uniform(0, 0.005))
        for job in jobs:
            _, said = job.communicate()
            assert (job.returncode, said) == (-signal.SIGKILL, "")
        kills += processes
    assert 0 < len(files(directory)) < NUM_SHARDS
    jobs = start(directory, processes, pause=0)
    for job in jobs:
        enter(job)
    for job in jobs:
        _, said = job.communicate()
        assert job.returncode == 0, said
    assert files(directory) == files(finished)
    with open_store(directory) as store:
        assert store.pending == [] and store.counts() == EXPECTED_COUNTS
    dataset = store.dataset()
    assert dataset["row"][:] == EXPECTED_ROWS
    assert dataset.data.table.combine_chunks().equals(open_store(finished).dataset().data.table.combine_chunks())


def test_killed_at_every_line(tmp_path):
    done = subprocess.run([sys.executable, FAULTS / "shards_every_line.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200
