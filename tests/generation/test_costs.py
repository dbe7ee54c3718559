"""What a dry run says beforehand, against what the run then takes."""

from __future__ import annotations

import itertools
import json
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from servers import stub_server
from tiny import make_model, make_rollouts

from trl_lopd import cli, collect_rollouts, score_rollouts
from trl_lopd.generation import costs
from trl_lopd.generation.costs import estimate_rollouts, estimate_scoring
from trl_lopd.generation.options import RolloutOptions, ScoringOptions
from trl_lopd.generation.samplers import Sample
from trl_lopd.generation.teachers import Scores
from trl_lopd.identity.fingerprint import fingerprint_teacher

PROMPTS = [f"w{i} w{i + 1} w{i + 2}"[: 3 + 4 * (i % 3)] for i in range(3, 27)]


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when a model works."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(costs, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class SlowTeacher:
    """A row takes as long as it has tokens, and as attention has pairs of them; a call, `call_seconds` more."""

    def __init__(self, clock, call_seconds=0.0):
        self.clock, self.calls, self.call_seconds = clock, [], call_seconds

    def score(self, sequences, completion_lengths, top_k, advance=lambda tokens: None):
        self.calls.append(sequences)
        self.clock.now += self.call_seconds + sum(0.001 * len(ids) + 0.0001 * len(ids) ** 2 for ids in sequences)
        return [
            Scores(np.full(n, -1.0, np.float32), np.zeros((n, top_k), np.int32), np.zeros((n, top_k), np.float16))
            for n in completion_lengths
        ]


class SlowSampler:
    """Answers have given lengths; a token takes two milliseconds."""

    def __init__(self, clock, answer_lengths):
        self.clock, self.answer_lengths = clock, answer_lengths

    def sample(self, prompts, sampling, first=0, advance=lambda tokens: None):
        most, samples = sampling.max_completion_length, []
        for prompt in prompts:
            length = self.answer_lengths[prompt[0] % len(self.answer_lengths)]
            self.clock.now += 0.002 * min(length, most)
            samples.append(Sample([5] * min(length, most), "stop" if length <= most else "length", None))
        return samples


def rows_of_all_lengths(rows=400, per_prompt=1):
    rng = np.random.default_rng(0)
    sizes = rng.pareto(2, rows) * 20 + 2
    prompts = [rng.integers(2, 32, rng.integers(1, 6)).tolist() for _ in range(-(-rows // per_prompt))]
    answers = [rng.integers(1, 32, int(min(size, 400))).tolist() for size in sizes]
    return Dataset.from_dict(
        {"prompt_ids": [prompts[i // per_prompt] for i in range(rows)], "completion_ids": answers}
    )


@pytest.mark.parametrize("call_seconds", [0.0, 1.0])
def test_scoring_takes_the_time_that_was_estimated(clock, teacher_dir, call_seconds):
    rows, teacher = rows_of_all_lengths(), SlowTeacher(clock, call_seconds)
    declared = {"fingerprint": fingerprint_teacher(teacher_dir)}
    estimate = estimate_scoring(rows, teacher, ScoringOptions(top_k=0), **declared)
    measured = clock.now
    assert sum(map(len, teacher.calls)) < len(rows) / 2 and measured < 1.5 * costs.SAMPLE_SECONDS
    score_rollouts(rows, teacher, top_k=0, **declared)
    # Most of it is spent on the longest rows: tokens a second of all lengths together would say far less.
    low, high = estimate["seconds"]
    assert low <= clock.now - measured <= high < (1.6 if not call_seconds else 3) * low


@pytest.mark.slow
def test_rows_of_one_prompt_are_measured_together(clock, teacher_dir):
    rows, teacher = rows_of_all_lengths(64, per_prompt=4), SlowTeacher(clock)
    estimate_scoring(rows, teacher, ScoringOptions(), fingerprint=fingerprint_teacher(teacher_dir))
    for sequences in teacher.calls[1:]:
        prompts = [rows["prompt_ids"][i] for i in range(64) for s in sequences if s.tolist() == joined(rows, i)]
        assert len(prompts) == len(sequences) and all(prompts.count(prompt) == 4 for prompt in prompts)


def joined(rows, i):
    return [*rows["prompt_ids"][i], *rows["completion_ids"][i]]


@pytest.mark.slow
def test_a_table_has_the_size_that_was_estimated(tmp_path, teacher_dir, student_dir, monkeypatch):
    # So that the sample is the same on a slow machine.
    monkeypatch.setattr(costs, "time", types.SimpleNamespace(perf_counter=itertools.count(step=0.001).__next__))
    rows = make_rollouts(1000)
    options = {"top_k": 4, "rows_per_shard": 300}
    estimate = estimate_scoring(rows, str(teacher_dir), ScoringOptions(**options), ref_model=str(student_dir))
    table = score_rollouts(rows, str(teacher_dir), ref_model=str(student_dir), output_dir=tmp_path / "t", **options)
    tokens = [sum(map(len, table[name])) for name in ("prompt_ids", "completion_ids")]
    assert (estimate["rows"], estimate["prompt_tokens"], estimate["completion_tokens"]) == (1000, *tokens)
    assert estimate["longest_row"] == max(len(joined(rows, i)) for i in range(1000)) and estimate["shards"] == 4
    sizes = dict.fromkeys(table.column_names, 0)
    for path in (tmp_path / "t").glob("*.parquet"):
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            for i in range(metadata.num_columns):
                column = metadata.row_group(group).column(i)
                sizes[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    assert estimate["bytes"].keys() == sizes.keys()
    for name in sizes.keys() - {"teacher_fingerprint"}:
        assert estimate["bytes"][name][0] == pytest.approx(sizes[name], rel=0.15), name
    model = estimate["models"]["teacher"]
    assert model["max_batch_tokens"] == 16384 and 0 < model["tokens_at_once"] <= 16384
    assert estimate["memory_bytes"]["process"] > 50e6


@pytest.mark.parametrize("longest", [60, 3000])
def test_answers_have_the_tokens_that_were_estimated(clock, student_dir, longest):
    """Also if some of them do not end while they are measured."""
    sampler = SlowSampler(clock, [10, 20, 30, longest])
    options = {"max_completion_length": 2000, "engine": sampler, "num_generations": 3}
    estimate = estimate_rollouts(PROMPTS, str(student_dir), "student", RolloutOptions(temperature=0.8, **options))
    measured, (low, high) = clock.now, estimate["completion_tokens"]
    rollouts = collect_rollouts(PROMPTS, str(student_dir), ref_logprobs=False, **options)
    tokens = sum(map(len, rollouts["completion_ids"]))
    assert low <= tokens <= high and estimate["rows"] == len(rollouts) == 72
    assert estimate["prompt_tokens"] == sum(map(len, rollouts["prompt_ids"]))
    assert estimate["seconds"][0] <= clock.now - measured <= estimate["seconds"][1]
    model = estimate["models"]["student"]
    everything_ended = model["ended"] == model["measured_rows"]
    assert everything_ended == (longest == 60) and (high < 3 * low) == everything_ended


def test_a_batch_takes_as_long_as_its_longest_answer(clock, student_dir, monkeypatch):
    """64 answers of 8 tokens that end and one of 400 that does not."""

    def sample(self, prompts, sampling, first=0, advance=lambda tokens: None):
        samples = SlowSampler(types.SimpleNamespace(now=0), [8, 8, 400]).sample(prompts, sampling)
        clock.now += 2 + 0.1 * max(len(sample.ids) for sample in samples)
        return samples

    monkeypatch.setattr("trl_lopd.generation.samplers.TransformersSampler.sample", sample)
    options = RolloutOptions(temperature=0.8, batch_size=8, max_completion_length=500, rows_per_shard=10)
    estimate = estimate_rollouts(PROMPTS, str(student_dir), "student", options)
    # Two shards of ten prompts and one of four: five batches, of which each takes up to 500 steps.
    assert estimate["seconds"][1] == pytest.approx(1.15 * 5 * (2 + 0.1 * 500))
    assert estimate["seconds"][0] < 5 * (2 + 0.1 * 400)


def test_a_process_has_its_share_of_the_shards(monkeypatch):
    monkeypatch.setattr(costs, "processes", lambda: types.SimpleNamespace(num_processes=2))
    assert costs._largest_share(np.array([1, 1, 2, 2, 3, 3]), 2) == 8 / 12


def test_the_command_writes_nothing(tmp_path, teacher_dir, student_dir, capsys, monkeypatch):
    monkeypatch.setattr(costs, "SAMPLE_SECONDS", 0.5)
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("a dry run is no run"))
    rows = make_rollouts(20).add_column("teacher_id", ["math", "code"] * 10)
    rows.to_parquet(tmp_path / "rollouts.parquet")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    out = ["--output_dir", str(tmp_path / "out"), "--dry_run", "--report_to", "wandb"]
    with stub_server("vllm", make_model(seed=1)) as server:
        teachers = f"{{math: {teacher_dir}, code: '{server.url}'}}"
        flags = ["--dataset_name", str(tmp_path / "rollouts.parquet"), "--teacher", teachers, "--top_k", "2"]
        assert cli.main(["score", *flags, *out, "--fingerprint", f"{{code: {teacher_dir}}}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("20 rows, ") and "teacher_topk_ids" in printed[1]
    assert printed[2].startswith("math: 10 rows in ")
    assert printed[3].startswith("code: 10 rows in ") and "tokens at once" not in printed[3]
    assert json.loads(printed[-1])["rows"] == 20
    for role in ("student", "teacher"):
        flags = ["--dataset_name", str(tmp_path / "prompts.jsonl"), "--model_name_or_path", str(student_dir)]
        flags += ["--role", role, "--max_completion_length", "16"]
        assert cli.main(["rollout", *flags, *out]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].startswith("24 rows, ") and printed[2].startswith(f"{role}: 24 rows in ")
        assert ("ref_logprobs" in json.loads(printed[-1])["bytes"]) == (role == "student")
    assert {path.name for path in tmp_path.iterdir()} == {"rollouts.parquet", "prompts.jsonl"}


def test_what_is_wrong_is_said_as_by_the_run(tmp_path, teacher_dir, table, capsys):
    table.to_parquet(tmp_path / "scored.parquet")
    flags = ["--dataset_name", str(tmp_path / "scored.parquet"), "--teacher", str(teacher_dir), "--dry_run"]
    assert cli.main(["score", *flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert "The rollouts have the column 'teacher_logprobs' already" in capsys.readouterr().err
