"""What `trl-lopd inspect` says a table holds: numbers against plain numpy, and texts that nobody should trust."""

from __future__ import annotations

import io
import json
import math
import shutil

import numpy as np
import pytest
from datasets import Dataset, Value
from rich.console import Console
from tiny import make_rollouts

from trl_lopd import OfflineOPDConfig, TableError
from trl_lopd.evaluation import inspect as overview
from trl_lopd.identity.cards import attach_record, record_of

HOSTILE = "[bold red]x[/]\x1b[2J\x1b]0;owned\x07\u202e:smile:\r\nnext\ttab \udc80"


@pytest.fixture
def show(monkeypatch):
    """What is printed, on a terminal of so many columns or, by default, into a file."""

    def show(result, columns=80, terminal=False):
        out = io.StringIO()
        kwargs = {"file": out, "width": columns, "force_terminal": terminal, "color_system": None}
        monkeypatch.setattr(overview, "Console", lambda **more: Console(**more, **kwargs))
        overview.show(result)
        return out.getvalue()

    return show


def report(about, decoded_with=None):
    """The result of `inspect` on a table of one split."""
    splits = {"all rows": {key: value for key, value in about.items() if key != "problems"}}
    table = {"name": "table", "splits": splits, "decoded_with": decoded_with, "problems": about["problems"]}
    return {"table": table}


def tokens(rows, name, mask):
    return np.concatenate([np.array(values)[m] for values, m in zip(rows[name], mask, strict=True)])


@pytest.fixture(scope="module")
def masked(table):
    rng = np.random.default_rng(0)
    mask = [[True, *(rng.random(len(ids) - 1) < 0.7).tolist()] for ids in table["completion_ids"]]
    # Far enough from the teacher for some advantages to be clipped.
    table = table.map(lambda row: {"ref_logprobs": [2 * x for x in row["ref_logprobs"]]}, features=table.features)
    return table.add_column("completion_mask", mask)


@pytest.mark.parametrize("batch", [3, 256])
def test_numbers_are_those_of_numpy(masked, batch, monkeypatch):
    real = Dataset.iter
    monkeypatch.setattr(Dataset, "iter", lambda self, size: real(self, min(size, batch)))
    found = overview.statistics(masked)
    mask = [np.array(m) for m in masked["completion_mask"]]
    lengths = np.array([len(ids) for ids in masked["completion_ids"]])
    assert found["completion_tokens"] == lengths.sum() and found["trainable_tokens"] == sum(m.sum() for m in mask)
    assert found["prompt_tokens"] == sum(map(len, masked["prompt_ids"]))
    assert found["distinct_prompts"] == len({tuple(ids) for ids in masked["prompt_ids"]}) and found["floored"] == 0
    about = found["length"]
    assert (about["min"], about["max"], about["mean"]) == (lengths.min(), lengths.max(), pytest.approx(lengths.mean()))
    assert [about[key] for key in ("median", "p90", "p99")] == np.quantile(lengths, [0.5, 0.9, 0.99]).tolist()

    ratio = tokens(masked, "teacher_logprobs", mask) - tokens(masked, "ref_logprobs", mask)
    bounded = ratio.clip(-10, 10)
    advantage = found["advantage"]
    assert advantage["mean"] == pytest.approx(bounded.mean(), rel=1e-4)
    assert advantage["std"] == pytest.approx(bounded.std(), rel=1e-4)
    assert advantage["clipped"] == pytest.approx((abs(ratio) > 10).mean()) and advantage["clipped"] > 0
    assert [advantage[key] for key in ("p1", "p10", "median", "p90", "p99")] == pytest.approx(
        np.quantile(bounded, [0.01, 0.1, 0.5, 0.9, 0.99]).tolist(), rel=1e-4
    )
    assert found["teacher_logprob"] is None

    topk = tokens(masked, "teacher_topk_logprobs", mask)
    among = (tokens(masked, "teacher_topk_ids", mask) == tokens(masked, "completion_ids", mask)[:, None]).any(-1)
    expected = {"k": 4, "mass": pytest.approx(np.exp(topk).sum(-1).mean(), rel=1e-4), "sampled": among.mean()}
    assert found["top_k"] == expected


def test_the_spread_of_the_advantages_of_each_teacher_and_domain(masked, show):
    other = "other@1-0123456789ab-01234567-89abcdef"
    own = masked[0]["teacher_fingerprint"]
    signed = [own if i < 18 else other for i in range(24)]
    names = [["math", "code", None][i % 3] for i in range(24)]
    rows = masked.remove_columns("teacher_fingerprint").add_column("teacher_fingerprint", signed)
    rows = rows.add_column("teacher_id", names)
    about = overview.describe_rows(rows)
    found = about["statistics"]["advantage"]["teachers"]

    def std(is_meant):
        chosen = rows.select(np.flatnonzero([is_meant(*pair) for pair in zip(signed, names, strict=True)]))
        mask = [np.array(m) for m in chosen["completion_mask"]]
        ratio = tokens(chosen, "teacher_logprobs", mask) - tokens(chosen, "ref_logprobs", mask)
        return pytest.approx(ratio.clip(-10, 10).std(), rel=1e-4)

    assert found == {
        id: {
            "std": std(lambda teacher, _: teacher == id),  # noqa: B023
            "teacher_ids": {name: std(lambda *pair: pair == (id, name)) for name in ("code", "math")},  # noqa: B023
        }
        for id in (own, other)
    }
    shown = show(report(about), columns=200)
    assert f"{other}  6 rows, advantages of std {found[other]['std']:.3f}" in shown
    assert f"std {found[own]['teacher_ids']['math']:.3f}" in shown
    assert (
        "std" not in show(report(overview.describe_rows(rows.remove_columns("ref_logprobs")))).partition("prompts")[0]
    )


def test_the_clip_is_the_trainer_s_default():
    assert OfflineOPDConfig.advantage_clip == overview.ADVANTAGE_CLIP


@pytest.mark.parametrize("batch", [3, 256])
def test_the_worst_rows_are_the_worst(masked, tokenizer, batch, monkeypatch):
    real = Dataset.iter
    monkeypatch.setattr(Dataset, "iter", lambda self, size: real(self, min(size, batch)))
    shown = overview.describe_rows(masked, 4, tokenizer)["worst_rows"]
    scores = zip(masked["teacher_logprobs"], masked["ref_logprobs"], strict=True)
    ratios = [np.array(teacher) - np.array(ref) for teacher, ref in scores]
    masks = [np.array(m) for m in masked["completion_mask"]]
    means = [ratio[m].clip(-10, 10).mean() for ratio, m in zip(ratios, masks, strict=True)]
    assert [row["row"] for row in shown] == np.argsort(means, kind="stable")[:4].tolist()
    worst = shown[0]
    row = masked[worst["row"]]
    assert worst["mean"] == pytest.approx(min(means), rel=1e-4)
    assert worst["completion"] == tokenizer.decode(row["completion_ids"])
    assert worst["prompt"] == tokenizer.decode(row["prompt_ids"])
    ratio, mask = ratios[worst["row"]], masks[worst["row"]]
    expected = [at for at in np.argsort(ratio, kind="stable") if mask[at]][:5]
    assert [token["position"] for token in worst["tokens"]] == expected
    for token in worst["tokens"]:
        at = token["position"]
        assert token["id"] == row["completion_ids"][at] and token["text"] == tokenizer.decode([token["id"]])
        assert token["teacher_logprob"] == pytest.approx(row["teacher_logprobs"][at])
        assert token["ref_logprob"] == pytest.approx(row["ref_logprobs"][at])
        assert token["advantage"] == pytest.approx(ratio[at], rel=1e-4)


def test_repeated_rows_and_prompts_are_counted(show):
    rows = {
        "prompt_ids": [[5], [5], [5], [5, 7], [7, 5], [5, 7]],
        "completion_ids": [[7, 8], [7, 8], [8, 7], [8], [8], [8]],
    }
    about = overview.describe_rows(Dataset.from_dict(rows))
    found = about["statistics"]
    # Neither order nor the border between prompt and completion is lost.
    assert (found["distinct_prompts"], found["duplicates"]) == (3, 2)
    assert "3 distinct, 2 answers each, 9 tokens; 2 rows repeat" in show(report(about))


def test_scores_of_minus_infinity_are_counted_and_do_not_spread(masked, tokenizer):
    def floor(row, i):
        if i == 2:
            row["teacher_logprobs"][0] = -math.inf
            row["teacher_topk_logprobs"][0] = [min(x, -1.0) for x in row["teacher_topk_logprobs"][0]]
            row["teacher_topk_ids"][0] = [t for t in range(40, 44)]
        return row

    rows = masked.map(floor, with_indices=True)
    about = overview.describe_rows(rows, 24, tokenizer)
    found = about["statistics"]
    assert found["floored"] == 1 and math.isfinite(found["advantage"]["mean"])
    (token,) = [t for row in about["worst_rows"] if row["row"] == 2 for t in row["tokens"] if t["position"] == 0]
    assert token["teacher_logprob"] is None and token["advantage"] is None
    text = json.dumps(about, allow_nan=False)
    assert "Infinity" not in text


def test_without_ref_logprobs_nothing_is_called_an_advantage(masked, show):
    rows = masked.remove_columns("ref_logprobs")
    about = overview.describe_rows(rows, 2)
    found = about["statistics"]
    scores = tokens(rows, "teacher_logprobs", [np.array(m) for m in rows["completion_mask"]])
    assert found["advantage"] is None
    assert found["teacher_logprob"]["mean"] == pytest.approx(scores.mean(), rel=1e-4)
    assert found["teacher_logprob"]["median"] == pytest.approx(np.median(scores), rel=1e-4)
    assert about["worst_rows"][0]["tokens"][0]["ref_logprob"] is None
    out = show(report(about))
    assert "it needs `ref_logprobs`" in out and "Lowest mean teacher log-probability" in out


def test_rollouts_that_nobody_scored(show):
    rows = make_rollouts(10)
    about = overview.describe_rows(rows)
    found = about["statistics"]
    assert not about["scored"] and about["problems"] == [] and about["worst_rows"] == []
    assert found["top_k"] is None and found["advantage"] is None and found["teacher_logprob"] is None
    assert about["completion_tokens"] == found["completion_tokens"] == sum(map(len, rows["completion_ids"]))
    out = show(report(about))
    assert "completions" in out and "advantage" not in out
    masked = rows.add_column("completion_mask", [[True] + [False] * (len(ids) - 1) for ids in rows["completion_ids"]])
    assert overview.describe_rows(masked)["statistics"]["trainable_tokens"] == 10


@pytest.mark.parametrize("rows", [{"prompt": ["a"]}, {"prompt_ids": ["a"], "completion_ids": ["b"]}])
def test_rows_without_ids_have_no_statistics(rows, show):
    about = overview.describe_rows(Dataset.from_dict(rows))
    assert about["statistics"] is None and about["problems"] == [] and "completion_tokens" not in about
    assert "not named" in show(report(about))


def test_no_rows(show):
    none = make_rollouts(2).select([])
    about = overview.describe_rows(none)
    assert about["rows"] == 0 and about["problems"] == []
    show(report(about))


def test_a_table_that_is_not_valid_says_so(table, show):
    def shorten(row, i):
        row["teacher_logprobs"] = row["teacher_logprobs"][i == 5 :]
        return row

    rows = table.map(shorten, with_indices=True)
    with pytest.raises(TableError, match="Row 5, column `teacher_logprobs`"):
        overview.statistics(rows)
    about = overview.describe_rows(rows)
    assert about["statistics"] is None and "Row 5, column `teacher_logprobs`" in about["problems"][0]
    assert not overview.accepted(report(about)) and "! This table cannot be trained on. Row 5" in show(report(about))
    nulls = Dataset.from_dict({"prompt_ids": [[1], None], "completion_ids": [[1], [2]]})
    assert "has nulls" in overview.describe_rows(nulls)["problems"][0]


def test_finish_reasons(table, show):
    reasons = ["length"] * 6 + ["stop"] * 12 + [HOSTILE.encode("ascii", "ignore").decode()] * 2 + [None] * 4
    about = overview.describe_rows(table.add_column("finish_reason", reasons))
    found = about["statistics"]
    assert found["finish_reasons"] == {"stop": 12, "length": 6, "other": 2} and found["truncated"] == 0.3
    assert "30.0% of completions reached the length limit; 2 ended otherwise" in show(report(about))
    unknown = table.add_column("finish_reason", [None] * 24, feature=Value("string"))
    assert overview.statistics(unknown)["truncated"] is None
    assert overview.statistics(table)["finish_reasons"] is None
    # Of another kind, it is somebody else's column.
    assert overview.statistics(table.add_column("finish_reason", [3] * 24))["finish_reasons"] is None


class Hostile:
    def decode(self, ids):
        return HOSTILE


@pytest.mark.parametrize("terminal", [False, True])
def test_hostile_text_does_not_reach_the_terminal(table, show, terminal):
    name = "x\x1b[31m[blink]"
    rows = table.add_column("student_fingerprint", [name] * 24)
    about = overview.describe_rows(rows, 2, Hostile())
    assert about["worst_rows"][0]["completion"] == HOSTILE
    out = show(report(about, decoded_with="[red]dir\x07"), columns=200, terminal=terminal)
    control = set(map(chr, [*range(10), *range(11, 32), 127, 0x202E, 0xDC80]))
    assert set(out) & control <= set("\x1b" * terminal)
    assert "\x1b[2J" not in out and "\x1b]0" not in out and "\x1b[31m" not in out
    assert "[bold red]x[/]\\x1b[2J" in out and "\\u202e:smile:\\r↵next⇥tab \\udc80" in out and "[blink]" in out
    assert json.loads(json.dumps(about))["worst_rows"] == about["worst_rows"]


@pytest.mark.parametrize("columns", [40, 200])
def test_the_worst_rows_fit_the_terminal(table, tokenizer, show, columns):
    about = overview.describe_rows(table, 2, tokenizer)
    out = show(report(about), columns).splitlines()
    start = next(i for i, line in enumerate(out) if "Lowest" in line)
    assert all(len(line) <= columns for line in out[start:])


def test_where_the_text_comes_from(table, tokenizer, student_dir, teacher_dir, tmp_path, show, monkeypatch):
    def found(**changes):
        arguments = {"name": None, "model": None, "revision": None, "record": record, "table": str(tmp_path / "t")}
        return overview.find_tokenizer(**{**arguments, **changes})

    record = record_of(table)
    assert found() == (None, None)
    shutil.copytree(teacher_dir, tmp_path / "models" / "teacher")
    monkeypatch.chdir(tmp_path / "models")
    assert found()[1] == "teacher"
    assert found(model=str(student_dir))[1] == str(student_dir)
    assert found(model=str(student_dir), name="teacher")[1] == "teacher"
    # A namesake's is not taken.
    namesake = {"teachers": [{**record["teachers"][0], "tokenizer": "0" * 64}]}
    assert found(record=namesake) == (None, None)
    monkeypatch.chdir(tmp_path)
    beside = tmp_path / "models" / "teacher"
    assert found(table=str(tmp_path / "models" / "table"))[1] == str(beside)
    assert found(model=str(tmp_path)) == (None, None)
    with pytest.raises((OSError, ValueError)):
        found(name=str(tmp_path))

    bare = overview.describe_rows(table, 1)
    assert bare["worst_rows"][0]["completion"] is None
    assert "name one with --tokenizer" in show(report(bare))
    messages = [[{"role": "user", "content": f"question {i}"}] for i in range(24)]
    texts = table.add_column("completion", [f"answer {i}" for i in range(24)]).add_column("prompt", messages)
    about = overview.describe_rows(texts, 1)
    row = about["worst_rows"][0]
    assert (row["prompt"], row["completion"]) == (f"question {row['row']}", f"answer {row['row']}")
    assert f"answer {row['row']}" in show(report(about)) and "--tokenizer" not in show(report(about))


def test_inspect_decodes_with_what_it_is_given(table, tmp_path, student_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table.save_to_disk(tmp_path / "table")
    result = overview.inspect(str(student_dir), str(tmp_path / "table"), worst=1)
    assert overview.accepted(result) and result["table"]["decoded_with"] == str(student_dir)
    assert result["table"]["splits"]["all rows"]["worst_rows"][0]["completion"]
    result = overview.inspect(str(tmp_path / "table"), worst=0, tokenizer="nowhere")
    assert result["table"]["splits"]["all rows"]["worst_rows"] == []
    with pytest.raises((OSError, ValueError)):
        overview.inspect(str(tmp_path / "table"), tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="0 or more"):
        overview.inspect(str(tmp_path / "table"), worst=-1)


def test_a_malformed_record_names_no_tokenizer(table, tmp_path):
    rows = table.select(range(2))
    attach_record(rows, {"students": [{"id": "x", "model_id": ["a"], "tokenizer": {}, "revision": []}]})
    assert overview.find_tokenizer(None, None, None, record_of(rows), str(tmp_path / "t")) == (None, None)


def test_the_domains_of_a_round_are_shares_of_its_own_rows(capsys):
    """Not of the rows of the SFT data, of which there are many more."""
    teacher = "teacher@1-000000000000-00000000-00000000"
    entry = {"id": teacher, "rows": 40, "share": 1.0, "teacher_ids": {"math": 30, "code": 10}}
    card = {"sft_teachers": [{"id": teacher, "rows": 4000}], "sft_rows": 4000, "opd_rounds": [{"teachers": [entry]}]}
    overview._show_model({"name": "m", "fingerprint": None, "card": card})
    out = capsys.readouterr().out
    assert "30 rows (75.0%)" in out and "10 rows (25.0%)" in out
