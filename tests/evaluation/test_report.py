"""`trl-lopd report`: what is gathered, what is refused, and the page as Chromium shows it."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict, concatenate_datasets
from tiny import make_model, make_rollouts, without_topk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trl_lopd import (
    EffOPDCallback,
    OfflineOPDConfig,
    OfflineOPDTrainer,
    fingerprint_teacher,
    load_table,
    read_model_card,
    score_rollouts,
    stamp_model_card,
)
from trl_lopd.cli import main
from trl_lopd.evaluation.report.charts import curves
from trl_lopd.evaluation.report.report import text_pieces, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian package `chromium`)")

# Whatever of this became markup would run, or break what follows it.
ATTACK = "<img src=x onerror=window.hacked=1>"
HOSTILE = [
    "</script><script>window.hacked=1</script>",
    ATTACK,
    "<!--<script>",
    "]]>&lt;&amp;",
    "\u2028\u2029",
    "\u202eterces",
    "\ufffd",
    "\0",
    "{{ 7*7 }}",
    "${1}`'\"",
]
TOKENS = ["<pad>", "<eos>", "<bos>", *HOSTILE, *(f"w{i}" for i in range(3 + len(HOSTILE), 32))]


def hostile_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<pad>"
    )


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A teacher and its student, whose tokenizer writes what it should not."""
    directory = tmp_path_factory.mktemp("hostile")
    for seed, name in enumerate(["teacher", "student", "stranger"], start=1):
        make_model(seed=seed).save_pretrained(directory / name)
        hostile_tokenizer().save_pretrained(directory / name)
    stamp_model_card(
        directory / "student",
        sft_teachers=[fingerprint_teacher(directory / "teacher")],
        evidence="verified",
        checkpoint=fingerprint_teacher(directory / "student"),
    )
    return directory


@pytest.fixture(scope="module")
def table_dir(models_dir):
    sampler = fingerprint_teacher(models_dir / "student").id
    rollouts = make_rollouts(40).add_column("student_fingerprint", [sampler] * 40)
    scored = score_rollouts(rollouts, str(models_dir / "teacher"), top_k=4, ref_model=str(models_dir / "student"))
    splits = DatasetDict(train=scored.select(range(16)), test=scored.select(range(16, 40)))
    splits.save_to_disk(models_dir / "table")
    return models_dir / "table"


@pytest.fixture(scope="module")
def run(models_dir, table_dir):
    """A run with everything that a report shows, in a directory with a name that should not be markup either."""
    directory = models_dir / ATTACK
    table = load_table(table_dir)
    args = OfflineOPDConfig(
        str(directory),
        learning_rate=1e-2,
        model_init_kwargs={"dtype": torch.float32, "token": "hf_secret"},
        max_steps=8,
        per_device_train_batch_size=8,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="no",
        activation_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = OfflineOPDTrainer(
        str(models_dir / "student"), args, train_dataset=table["train"], eval_dataset=table["test"]
    )
    trainer.add_callback(EffOPDCallback(trainer, schedule=[2, 4], gate_rows=8))
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    rows = [{"model": ATTACK, "accuracy": 0.5, "fresh": 4.802327, "fresh_se": 0.386, "held_out": None}]
    (directory / "report.json").write_text(json.dumps(rows))
    found = {
        "benchmark": "gsm8k\u202e",
        "model": "somewhere/student",
        "fingerprint": fingerprint_teacher(directory).id,
        "settings": {"temperature": 0.6},
        "metrics": {"accuracy": {"value": 0.25, "ci": [0.2, 0.3]}, "tokens": {"value": 120.0, "se": 2.5}},
    }
    (directory / "evaluations" / "gsm8k").mkdir(parents=True)
    (directory / "evaluations" / "gsm8k" / "metrics.json").write_text(json.dumps(found))
    return directory


@pytest.fixture(scope="module", autouse=True)
def same_charts_are_drawn_once():
    """Most reports of these tests are of the same run, and half of their time is matplotlib's."""
    drawn = {}

    def curves_of(*points):
        if repr(points) not in drawn:
            drawn[repr(points)] = curves(*points)
        return drawn[repr(points)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_lopd.evaluation.report.report.curves", curves_of)
        yield


@pytest.fixture(scope="module")
def report(run, table_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(run, table=str(table_dir), output=path)


def unpack(path: str, name: str) -> bytes:
    (text,) = re.findall(rf'<script type="text/plain" id="data-{name}">([^<]*)</script>', Path(path).read_text())
    return gzip.decompress(base64.b64decode(text))


# ---- Tokens as text ----


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that has learnt little: most characters that are not ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["the the the"], trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "text", ["the naïve 😀 the", "漢字とかな", "👨‍👩‍👧", "e\u0301 \u200f שלום", "a\n\n\tb  c", "\ufffd!"]
)
def test_pieces_join_to_the_text_and_no_character_is_split(text):
    tokenizer = bytes_tokenizer()
    ids = tokenizer(text)["input_ids"]
    pieces = text_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        unfinished = [len(c.encode()) - 1 for c in text if not c.isascii()]
        assert pieces.count("") == sum(unfinished)


def test_bytes_that_are_no_text_hold_nothing_back():
    tokenizer = bytes_tokenizer()
    emoji = tokenizer("😀")["input_ids"]
    broken = [emoji[0]] * 9 + tokenizer("the end")["input_ids"] + emoji[:2]
    pieces = text_pieces(tokenizer, broken)
    assert len(pieces) == len(broken) and "the end" in "".join(pieces) and "\ufffd" in pieces[-1]


# ---- What is in the file ----


def test_the_scores_in_the_file_are_those_of_the_models(report, run, models_dir, table_dir):
    rows = load_table(table_dir)["test"]
    header = json.loads(unpack(report["output"], "header"))
    assert [row["row"] for row in header["rows"]] == list(range(24)) and report["rollouts"] == 24
    for name, place in (("after", run), ("before", models_dir / "student"), ("teacher", models_dir / "teacher")):
        model = AutoModelForCausalLM.from_pretrained(place).eval()
        expected = []
        for row in rows:
            ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
            with torch.no_grad():
                logprobs = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
            expected.append(logprobs.gather(-1, ids[0, len(row["prompt_ids"]) :, None])[:, 0].numpy())
        stored = np.frombuffer(unpack(report["output"], name), np.int16) / 1000
        # Half of the thousandth that they are rounded to, and what two ways of computing differ by.
        assert np.abs(stored - np.concatenate(expected)).max() <= 0.0005 + 1e-4
    indices = np.frombuffer(unpack(report["output"], "tokens"), np.uint32)
    assert [header["vocabulary"][i][0] for i in indices] == sum(rows["completion_ids"], [])
    best = np.frombuffer(unpack(report["output"], "topk"), np.uint32)
    assert [header["vocabulary"][i][0] for i in best] == np.ravel(np.concatenate(rows["teacher_topk_ids"])).tolist()


def test_a_score_of_minus_infinity_and_a_mask_are_kept(models_dir, run, table_dir, tmp_path):
    rows = load_table(table_dir)["test"].select(range(3))
    teacher = [[float("-inf"), *row[1:]] for row in rows["teacher_logprobs"]]
    masks = [[i != 1 for i in range(len(row))] for row in teacher]
    rows = without_topk(rows).remove_columns("teacher_logprobs").add_column("teacher_logprobs", teacher)
    rows.add_column("completion_mask", masks).to_parquet(tmp_path / "rows.parquet")
    made = write_report(run, table=str(tmp_path / "rows.parquet"), output=tmp_path / "report.html")
    assert np.frombuffer(unpack(made["output"], "teacher"), np.int16)[0] == -32768
    assert np.frombuffer(unpack(made["output"], "mask"), np.uint8).tolist() == sum(masks, [])


def test_fewer_rows_are_drawn_and_a_student_is_scored(run, models_dir, table_dir, tmp_path):
    made = write_report(
        run, table=str(table_dir), student=str(models_dir / "stranger"), rows=5, output=tmp_path / "report.html"
    )
    assert made["rollouts"] == 5
    header = json.loads(unpack(made["output"], "header"))
    assert set(header["columns"]) > {"before", "after", "ref", "teacher"}
    assert np.any(
        np.frombuffer(unpack(made["output"], "before"), np.int16)
        != np.frombuffer(unpack(made["output"], "ref"), np.int16)
    )
    assert any("not the student that the run began with" in warning for warning in made["warnings"])


def test_the_page_says_what_the_run_was(report, run):
    text = Path(report["output"]).read_text()
    for shown in ("4.80 ± 0.39", "0.2500 [0.2000, 0.3000]", "120.0 ± 2.5", "learning_rate", "0.01", "advantage_clip"):
        assert shown in text, shown
    for shown in (
        "gsm8k\\u202e",
        "wrote SFT data",
        "scored rollouts",
        "sampled rollouts",
        "Searches of EffOPD",
    ):
        assert shown in text, shown
    assert report["warnings"] == []
    # Nothing of the machine, and nothing that a browser would fetch.
    assert (
        str(run.parent) not in text
        and "hf_secret" not in text
        and "hf_secret" not in (run / "training_args.json").read_text()
    )
    assert not re.search(r"(src|href)=\"(?!#)", text)


def test_a_lineage_of_rounds_and_several_teachers(tmp_path):
    def id(name: str, number: int) -> str:
        return f"{name}@1-{number:012x}-01234567-01234567"

    def teacher(name: str, number: int, evidence: str) -> dict:
        return {"id": id(name, number), "evidence": evidence, "rows": 1000 * number}

    strong, other = teacher("strong", 1, "verified"), teacher("other-teacher-with-a-long-name", 2, "declared")
    rounds = [
        {
            "student": id("sft", 3),
            "teachers": [strong],
            "sampled_by": [teacher("sft", 3, "verified")],
            "objective": "topk",
        },
        {"student": id("first", 4), "teachers": [strong, other], "sampled_by": [teacher("sft", 3, "probed")]},
        {"student": id("second", 5), "teachers": [other], "teacher_consistency": "overridden (warn)"},
    ]
    stamp_model_card(tmp_path, sft_teachers=[strong, other], opd_rounds=rounds)
    text = Path(write_report(tmp_path)["output"]).read_text()
    table = text.partition('id="lineage"')[2].partition("</section>")[0]
    rows = [
        [re.sub("<.*?>", "", cell).strip() for cell in re.findall("<td>(.*?)</td>", row, re.DOTALL)]
        for row in re.findall("<tr><td>.*?</tr>", table, re.DOTALL)
    ]
    assert [row[0].partition(" (")[0] for row in rows] == [
        *("wrote SFT data", "wrote SFT data"),
        *("began round 1", "sampled rollouts", "scored rollouts"),
        *("began round 2", "sampled rollouts", "scored rollouts", "scored rollouts"),
        *("began round 3", "sampled rollouts", "scored rollouts", "this model"),
    ]
    assert rows[1] == ["wrote SFT data", other["id"], "declared", "2,000"]
    assert [row[2] for row in rows if row[0] == "sampled rollouts"] == ["verified", "probed", "unknown"]
    for shown in ("(topk)", "not named", "overridden (warn)"):
        assert shown in table, shown


def test_hostile_text_is_no_markup(report):
    text = Path(report["output"]).read_text()
    assert ATTACK not in text and "window.hacked" not in re.sub(r"&lt;.*?&gt;", "", text)
    assert text.count("<script>") == 1 and not re.search("[\u2028\u2029\u202e\0]", text)


# ---- Rows that were trained on, and rows that were not ----


def train(student, out, rows, eval_rows=None):
    args = OfflineOPDConfig(str(out), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True)
    trainer = OfflineOPDTrainer(str(student), args, train_dataset=rows, eval_dataset=eval_rows)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return out


def rows_shown(written):
    return {row["row"] for row in json.loads(unpack(written["output"], "header"))["rows"]}


def test_after_a_split_in_memory_the_rows_shown_were_not_trained_on(models_dir, table_dir, tmp_path):
    whole = load_table(table_dir)["test"]
    whole.to_parquet(tmp_path / "table.parquet")
    indexed = whole.add_column("index", range(len(whole)))
    parts = indexed.train_test_split(0.25, seed=3)
    run = train(models_dir / "student", tmp_path / "run", parts["train"].shuffle(seed=1), parts["test"])
    made = write_report(run, table=tmp_path / "table.parquet")
    assert rows_shown(made) == set(parts["test"]["index"]) and not made["warnings"]
    text = Path(made["output"]).read_text()
    assert "The run was not trained on them." in text
    assert re.search(r"All 6 rows that were not trained on, of the 24\s+of table", text)
    # The same from a checkpoint, where nothing was saved after it.
    (tmp_path / "killed").mkdir()
    shutil.copytree(run, tmp_path / "killed" / "checkpoint-1")
    assert rows_shown(write_report(tmp_path / "killed", table=tmp_path / "table.parquet")) == rows_shown(made)


def test_rows_that_were_trained_on_are_called_so(run, models_dir, table_dir, tmp_path, capsys):
    made = write_report(run, table=table_dir, split="train", output=tmp_path / "train.html")
    text = Path(made["output"]).read_text()
    assert "not trained on" not in text and "The run was trained on them." in text
    assert "trained on 16 of the 16 rows" in made["warnings"][0]
    # A split whose name says something else.
    DatasetDict(test=load_table(table_dir)["train"]).save_to_disk(tmp_path / "misnamed")
    made = write_report(run, table=tmp_path / "misnamed", output=tmp_path / "misnamed.html")
    assert "trained on 16 of the 16 rows" in made["warnings"][0]
    assert "The run was trained on them." in Path(made["output"]).read_text()
    # Both.
    splits = load_table(table_dir)
    concatenate_datasets([splits["train"], splits["test"]]).to_parquet(tmp_path / "both.parquet")
    both = ["--table", tmp_path / "both.parquet", "--output", tmp_path / "both.html", "--split", "train"]
    assert main([str(word) for word in ("report", run, *both)]) == 0
    assert "Note: The run was trained on 16 of the 40 rows" in capsys.readouterr().out
    assert "The run was trained on 16 of them." in (tmp_path / "both.html").read_text()
    assert main(["report", str(run), "--table", str(table_dir), "--split", "dev"]) == 2
    assert "has no split 'dev'" in capsys.readouterr().err


def test_a_run_that_says_nothing_of_its_rows_is_not_believed(run, table_dir, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "trained_rows.npy").unlink()
    text = Path(write_report(tmp_path / "run", table=table_dir)["output"]).read_text()
    assert "Nothing says whether the run was trained on them." in text
    assert "held out" not in text and "held-out" not in text


# ---- Several teachers ----


@pytest.fixture(scope="module")
def by_two(models_dir, table_dir, tmp_path_factory):
    """The report of a run whose rows have two teachers, and the names in its held-out rows."""
    directory = tmp_path_factory.mktemp("two")
    names = {
        split: [("code", ATTACK)[row % 3 == 0] for row in range(len(rows))]
        for split, rows in load_table(table_dir).items()
    }
    table = DatasetDict(
        {split: rows.add_column("teacher_id", names[split]) for split, rows in load_table(table_dir).items()}
    )
    table.save_to_disk(directory / "table")
    args = OfflineOPDConfig(
        str(directory / "run"), max_steps=2, learning_rate=1e-2, per_device_train_batch_size=4, eval_strategy="steps",
        eval_steps=1, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = OfflineOPDTrainer(str(models_dir / "student"), args, table["train"], table["test"])
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return write_report(directory / "run", table=directory / "table"), names["test"]


def test_each_teacher_has_a_curve_in_its_colour(by_two):
    made, names = by_two
    text = Path(made["output"]).read_text()
    figures = re.findall('<figure class="chart">.*?</figure>', text, re.DOTALL)
    kl = next(figure for figure in figures if "Reverse KL" in figure)
    assert re.findall('<g class="(chart-c[^"]*)"', kl) == ["chart-c0", "chart-c1", "chart-c-t0", "chart-c-t1"]
    key = dict(re.findall(r'<span class="chart-c-t(\d)">evaluation (.*?) <b>', kl))
    assert key == {"0": "&lt;img src=x onerror=window.hacked=1&gt;", "1": "code"}
    # The learning rate is nobody's; every other curve has both in the same colours.
    assert sum("chart-c-t0" in figure for figure in figures) == sum("chart-c-t1" in figure for figure in figures) > 5
    header = json.loads(unpack(made["output"], "header"))
    assert [row["teacher"] for row in header["rows"]] == [sorted({*names}).index(name) for name in names]
    assert f"code, {names.count('code')} rows" in text and ATTACK not in text


def test_the_mean_advantage_of_each_teacher_is_that_of_its_rows(by_two):
    made, names = by_two
    scores = {name: np.frombuffer(unpack(made["output"], name), np.int16).astype(int) for name in ("after", "teacher")}
    sizes = [row["tokens"] for row in json.loads(unpack(made["output"], "header"))["rows"]]
    is_code = np.repeat([name == "code" for name in names], sizes)
    expected = np.abs((scores["teacher"] - scores["after"])[is_code] / 1000).clip(max=10).mean()
    shown = re.search(
        r"code, \d+ rows: mean size before <b>[\d.]+</b>, after <b>([\d.]+)", Path(made["output"]).read_text()
    )
    assert float(shown[1]) == pytest.approx(expected, abs=2e-3)


def test_rows_of_one_teacher_have_no_choice(report):
    text = Path(report["output"]).read_text()
    assert 'name="teacher"' not in text and 'chart-c-t0"' not in text


# ---- What is missing, what is wrong ----


def test_a_run_that_left_little_says_what_is_missing(run, table_dir, tmp_path):
    shutil.copy(run / "README.md", tmp_path)
    made = write_report(tmp_path, table=str(table_dir))
    text = Path(made["output"]).read_text()
    for missing in ("No trainer_state.json", "no “after”", "No training_args.json", "need a <code>ref_logprobs"):
        assert missing in text, missing
    assert "data-before" in text and "data-after" not in text
    assert "No table was named" in Path(write_report(tmp_path)["output"]).read_text()


def test_what_is_missing_is_taken_from_the_last_checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "run" / "checkpoint-8", ignore=shutil.ignore_patterns("evaluations", "*.html"))
    (tmp_path / "run" / "checkpoint-8" / "effopd").mkdir()
    history = json.loads((run / "effopd_history.json").read_text())["searches"]
    (tmp_path / "run" / "checkpoint-8" / "effopd" / "history.json").write_text(json.dumps(history))
    text = Path(write_report(tmp_path / "run")["output"]).read_text()
    assert "Gradient norm" in text and "Searches of EffOPD" in text and "scored rollouts" in text


def test_a_table_that_is_not_the_run_s_is_named(run, models_dir, tmp_path):
    other = score_rollouts(make_rollouts(4), str(models_dir / "stranger"), top_k=2)
    other.to_parquet(tmp_path / "other.parquet")
    made = write_report(run, table=str(tmp_path / "other.parquet"), output=tmp_path / "report.html")
    (warning,) = made["warnings"]
    assert "not the table of the run" in warning and "stranger@1-" in warning and "teacher@1-" in warning
    text = Path(made["output"]).read_text()
    assert "not the table of the run" in text and "name the student with" in text


def test_a_card_of_other_weights_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    make_model(seed=7).save_pretrained(tmp_path / "run")
    assert "not written for these weights" in write_report(tmp_path / "run")["warnings"][0]


def test_what_an_earlier_run_left_is_not_shown_as_this_run_s(run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    card = read_model_card(again)
    del card["opd_rounds"][-1]["effopd"]
    stamp_model_card(
        again,
        sft_teachers=card["sft_teachers"],
        opd_rounds=card["opd_rounds"],
        checkpoint=fingerprint_teacher(again),
    )
    path = again / "evaluations" / "gsm8k" / "metrics.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"fingerprint": None}))
    assert [w for w in write_report(again)["warnings"] if "gsm8k does not say of which weights" in w]
    path.write_text(json.dumps(found | {"fingerprint": "run@1-000000000001-00000000-00000000"}))
    written = write_report(again)
    assert [w for w in written["warnings"] if "an earlier run’s" in w]
    assert [w for w in written["warnings"] if "gsm8k is of other weights" in w]
    page = re.sub("<script.*?</script>", "", Path(written["output"]).read_text(), flags=re.DOTALL)
    assert page.count("EffOPD") == 1  # in the warning


def test_the_best_step_is_what_the_page_says_of_the_best_model(run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    settings = json.loads((again / "training_args.json").read_text()) | {"load_best_model_at_end": True}
    (again / "training_args.json").write_text(json.dumps(settings))
    state = json.loads((again / "trainer_state.json").read_text()) | {"best_global_step": 4}
    (again / "trainer_state.json").write_text(json.dumps(state))
    page = Path(write_report(again)["output"]).read_text()
    (value,) = [e["eval_reverse_kl_topk"] for e in state["log_history"] if e["step"] == 4 and "eval_loss" in e]
    assert "the best of 8" in page and f"{value:.4f}" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not there"),
        (["{empty}"], "holds nothing of a run"),
        (["{run}", "--rows", "0"], "`rows` is 1 or more"),
        (["{run}", "--student", "x"], "give `table` too"),
        (["{run}", "--table", "./nothing"], "./nothing is not there"),
        (["{run}", "--table", "{unscored}"], "no column 'teacher_logprobs'.*trl-lopd score"),
        (["{run}", "--table", "{residual}"], "holds residual scores.*that `residualize_table` was given"),
        (["{run}", "--table", "{wide}"], "Row 0, column .completion_ids.*99"),
        (["{run}", "--table", "{table}", "--student", "{small}"], r"Row \d+ does not fit .*small.*vocabulary of 16"),
        (["{card}", "--table", "{alone}"], "Name the student: `--student`"),
        (["{damaged}"], "trainer_state.json is no JSON"),
        (["{strange}"], "has not the form of an evaluation"),
        (["{no step}"], "no step/trainer_state.json has not the form that training writes: its step is None"),
        (["{no rows}"], "no rows/trained_rows.npy has not the form that training writes: it holds no array"),
        (["{compared}"], "compared/report.json has not the form that examples/train.py writes"),
        (["{intervals}"], "intervals/evaluations/a/metrics.json has not the form of an evaluation.*IndexError"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, message, run, table_dir, tmp_path, capsys):
    rows = load_table(table_dir)["test"].select(range(2))
    places = ("empty", "card", "damaged", "strange", "small", "no step", "no rows", "compared", "intervals")
    names = {name: str(tmp_path / name) for name in places}
    for path in names.values():
        Path(path).mkdir()
    (tmp_path / "no step" / "trainer_state.json").write_text('{"log_history": []}')
    shutil.copy(run / "trainer_state.json", tmp_path / "no rows")
    (tmp_path / "no rows" / "trained_rows.npy").write_text("no array")
    (tmp_path / "compared" / "report.json").write_text("[1]")
    (tmp_path / "intervals" / "evaluations" / "a").mkdir(parents=True)
    found = {"benchmark": "a", "model": "m", "metrics": {"x": {"value": 1.0, "ci": [1.0]}}}
    (tmp_path / "intervals" / "evaluations" / "a" / "metrics.json").write_text(json.dumps(found))
    shutil.copy(run / "README.md", tmp_path / "card")
    (tmp_path / "damaged" / "trainer_state.json").write_text("{")
    (tmp_path / "strange" / "evaluations" / "a").mkdir(parents=True)
    (tmp_path / "strange" / "evaluations" / "a" / "metrics.json").write_text('{"metrics": {"x": 1}}')
    names |= {name: str(tmp_path / f"{name}.parquet") for name in ("unscored", "wide", "alone", "residual")}
    rows.select_columns(["prompt_ids", "completion_ids"]).to_parquet(names["unscored"])
    rows.remove_columns("ref_logprobs").to_parquet(names["alone"])
    rows.rename_column("teacher_logprobs", "residual_logprobs").to_parquet(names["residual"])
    rows.map(lambda row: {"completion_ids": [99] * len(row["completion_ids"])}).to_parquet(names["wide"])
    make_model(vocab=16).save_pretrained(names["small"])
    assert main(["report", *(word.format(run=run, table=table_dir, **names) for word in words)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


def test_the_command_prints_what_it_wrote(run, table_dir, tmp_path, capsys):
    words = ["report", str(run), "--table", str(table_dir), "--output", str(tmp_path / "new" / "page.html"), "--json"]
    assert main(words) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["rollouts"] == 24 and Path(made["output"]).stat().st_size == made["bytes"]


# ---- In a browser ----


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, path, **options):
    """The page; at the end nothing has gone wrong in it, nothing was fetched, and no text of a model has run."""
    page = browser.new_page(**options)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(Path(path).as_uri())
    page.wait_for_selector("article .tokens span")
    yield page
    assert not said and page.evaluate("window.hacked") is None
    assert asked == [Path(path).as_uri()]
    page.close()


def shade_of(advantage: float) -> str:
    level = sum(abs(advantage) >= edge for edge in (0.1, 0.25, 0.5, 1, 2, 5))
    return f"{'less' if advantage < 0 else 'more'} l{level}" if level else ""


@needs_chromium
def test_tokens_are_coloured_and_tell_their_scores(browser, report, table_dir):
    scores = {name: np.frombuffer(unpack(report["output"], name), np.int16) for name in ("before", "after", "teacher")}
    header = json.loads(unpack(report["output"], "header"))
    starts = np.cumsum([0, *(row["tokens"] for row in header["rows"])])
    sizes = np.add.reduceat(np.abs((scores["teacher"] - scores["before"]) / 1000).clip(max=10), starts[:-1])
    worst = int(np.argmax(sizes / np.diff(starts)))
    with opened(browser, report["output"], viewport={"width": 1200, "height": 900}) as page:
        first = page.locator("article").first
        assert f"row {worst}" in first.locator("header").inner_text()
        for state in ("before", "after"):
            page.get_by_text(f"{state} training", exact=True).click()
            shown = [
                value.strip() for value in first.locator(".tokens span").evaluate_all("s => s.map(e => e.className)")
            ]
            of_row = slice(starts[worst], starts[worst + 1])
            gaps = ((scores["teacher"] - scores[state].astype(int))[of_row] / 1000).clip(-10, 10)
            assert [re.sub(" *(empty|break|current) *", "", value) for value in shown] == [
                shade_of(gap) for gap in gaps
            ]

        first.locator(".tokens span").nth(0).hover()
        at = starts[worst]
        detail = page.locator("#detail")
        page.wait_for_selector("#detail .top-tokens")
        text = detail.inner_text().replace("−", "-")
        for name in ("before", "after", "teacher"):
            assert f"{scores[name][at] / 1000:.3f}" in text
        assert f"{(scores['teacher'][at] - int(scores['after'][at])) / 1000:+.3f}" in text
        token = header["vocabulary"][np.frombuffer(unpack(report["output"], "tokens"), np.uint32)[at]]
        assert f"id {token[0]}" in text and detail.locator(".top-tokens tr").count() == 4
        page.mouse.move(0, 0)
        assert detail.is_hidden()


@needs_chromium
def test_the_keyboard_and_the_controls(browser, report):
    with opened(browser, report["output"], viewport={"width": 1200, "height": 900}) as page:
        page.locator("input[name=find]").focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        detail, tokens = page.locator("#detail"), page.locator("article").first.locator(".tokens span")
        first = detail.inner_text()
        page.keyboard.press("ArrowRight")
        assert detail.inner_text() != first and tokens.nth(1).get_attribute("class").endswith("current")
        page.keyboard.press("Escape")
        assert detail.is_hidden()

        page.locator("input[name=numbers]").check()
        shaded = page.locator("article").first.locator(".less, .more")
        numbers = [span.get_attribute("data-a") for span in shaded.all()]
        assert numbers and all(re.fullmatch(r"[+−]\d+\.\d", number) for number in numbers)
        assert page.locator("[data-a]").count() == page.locator("article .less, article .more").count()
        page.locator("select[name=sort]").select_option("row")
        assert page.locator("article header").first.inner_text().startswith("row 0")
        status = page.locator("#pager span")
        assert status.inner_text() == "1–20 of 24"
        page.get_by_role("button", name="Next").click()
        assert status.inner_text() == "21–24 of 24" and page.locator("article").count() == 4
        page.locator("input[name=find]").fill("WINDOW.hacked")
        found = page.locator("article").count()
        assert 0 < found and "found" in status.inner_text()
        assert all("window.hacked" in text for text in page.locator("article").all_inner_texts())
        page.locator("input[name=find]").fill("nobody wrote this")
        assert page.locator("article").count() == 0 and "No rollout" in status.inner_text()


@needs_chromium
def test_the_rollouts_of_one_teacher(browser, by_two):
    made, names = by_two
    with opened(browser, made["output"], viewport={"width": 1200, "height": 900}) as page:
        page.locator("select[name=sort]").select_option("row")
        tones = {}
        for teacher in sorted({*names}):
            page.locator("select[name=teacher]").select_option(label=teacher)
            wanted = [row for row, name in enumerate(names) if name == teacher]
            headers = page.locator("article header")
            assert page.locator("#pager span").inner_text().endswith(f" of {len(wanted)} found")
            assert [int(re.match(r"row (\d+)", text)[1]) for text in headers.all_inner_texts()] == wanted
            assert all(teacher in text for text in headers.all_inner_texts())
            line = headers.first.locator("[class^=chart-c]")
            colour = line.evaluate("e => getComputedStyle(e, '::before').borderTopColor")
            curve = page.locator(f"#training svg .{line.get_attribute('class')} > path").first
            assert curve.evaluate("e => getComputedStyle(e).stroke") == colour
            tones[teacher] = colour
        assert len({*tones.values()}) == 2
        page.locator("select[name=teacher]").select_option("")
        assert page.locator("#pager span").inner_text() == f"1–20 of {len(names)}"


@needs_chromium
def test_hostile_text_is_shown_and_does_nothing(browser, report):
    with opened(browser, report["output"]) as page:
        page.locator("select[name=sort]").select_option("row")
        texts = []
        while True:
            texts += page.locator("article").all_inner_texts()
            if page.get_by_role("button", name="Next").is_disabled():
                break
            page.get_by_role("button", name="Next").click()
        text = "".join(texts)
        for shown in ("</script><script>window.hacked=1</script>", ATTACK, "<!--<script>", "⟨U+202E⟩terces"):
            assert shown in text, shown
        assert "⟨U+2028⟩⟨U+2029⟩" in text and "⟨U+0000⟩" in text and "\u202e" not in text
        assert page.locator("img").count() == 0 and page.locator("h1").inner_text() == ATTACK


@needs_chromium
def test_what_would_be_markup_could_not_run_either(browser, report):
    page = browser.new_page()
    page.goto(Path(report["output"]).as_uri())
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<b id=probe onclick=\"window.hacked=1\">x</b>')")
    page.evaluate("document.getElementById('probe').click()")
    assert page.evaluate("window.hacked") is None
    assert "Content Security Policy" in said[0]
    page.close()


@pytest.mark.slow
@needs_chromium
def test_a_phone_has_it_all_without_scrolling_aside(browser, report):
    width = 320
    options = {"viewport": {"width": width, "height": 700}, "has_touch": True, "is_mobile": True}
    with opened(browser, report["output"], **options) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.locator(".tokens span").first.tap()
        box = page.locator("#detail").bounding_box()
        # A sheet at the lower edge.
        assert (box["x"], box["width"]) == (0, width) and round(box["y"] + box["height"]) == 700


@pytest.mark.slow
@needs_chromium
def test_light_and_dark(browser, report):
    def brightness(page) -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    for scheme in ("light", "dark"):
        with opened(browser, report["output"], color_scheme=scheme) as page:
            is_light = brightness(page) > 600
            assert is_light == (scheme == "light")
            page.locator("#theme").click()
            assert (brightness(page) > 600) != is_light


@needs_chromium
def test_without_scripts_all_but_the_rollouts_is_there(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(Path(report["output"]).as_uri())
    text = page.locator("body").inner_text()
    assert "need JavaScript" in text and "wrote SFT data" in text
    charts = page.locator("#training svg")
    assert charts.count() == 8
    # A curve and its evaluations, with the colours of the style sheet, and ticks that are text.
    strokes = charts.first.locator("[class^=chart-c] > path").evaluate_all(
        "p => p.map(e => getComputedStyle(e).stroke)"
    )
    assert len(strokes) == len(set(strokes)) == 2 and "none" not in strokes
    assert len(charts.first.locator("text").all_text_contents()) > 4
    assert page.locator("#weights .chart-band").count() == 2 and page.locator("#searches .chart-tried use").count()
    context.close()
