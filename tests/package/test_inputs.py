"""What is given to the public functions and to the command line: paths of any kind, and what is easily mistaken."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from tiny import make_model, make_rollouts, make_tokenizer

from trl_lopd import (
    OfflineOPDConfig,
    OfflineOPDTrainer,
    TableError,
    check_teacher_consistency,
    cli,
    collect_rollouts,
    evaluate_model,
    fingerprint_teacher,
    generate_sft_data,
    load_benchmark,
    load_table,
    read_dataset_card,
    read_model_card,
    score_rollouts,
    stamp_dataset_card,
    stamp_model_card,
    validate_table,
)
from trl_lopd.evaluation.report.report import write_report

TEMPLATE = "{% for m in messages %}w3 {{ m['content'] }} w4 {% endfor %}{% if add_generation_prompt %}w30{% endif %}"


# ---- Paths ----


def test_a_path_is_as_good_as_a_string_everywhere(tmp_path, teacher_dir, student_dir):
    teacher, student = Path(teacher_dir), Path(student_dir)
    assert isinstance(teacher, Path) and isinstance(student, Path)
    answers = generate_sft_data(
        ["w5", "w6"], teacher, output_dir=tmp_path / "sft", max_completion_length=3, truncated="keep"
    )
    assert set(answers["teacher_fingerprint"]) == {fingerprint_teacher(teacher).id}
    rollouts = collect_rollouts(
        [f"w{i}" for i in range(3, 15)], student, output_dir=tmp_path / "rollouts", max_completion_length=4,
        ref_logprobs=False,
    )  # fmt: skip
    assert rollouts.to_dict() == load_table(tmp_path / "rollouts").to_dict()
    table = score_rollouts(rollouts, teacher, output_dir=tmp_path / "table", top_k=2, ref_model=student)
    assert table.to_dict() == load_table(tmp_path / "table", split="train").to_dict()
    benchmark = tmp_path / "problems.jsonl"
    benchmark.write_text('{"prompt": "w5", "answer": "w6"}\n{"prompt": "w7", "answer": "w6"}\n')
    options = {"metric": "exact_answer", "output_dir": tmp_path / "evaluation", "max_completion_length": 3}
    result = evaluate_model(student, load_benchmark(benchmark), teacher=teacher, **options)
    assert result["model"] == str(student) and "reverse_kl" in result["metrics"]
    args = OfflineOPDConfig(tmp_path / "out", max_steps=1, bf16=False, report_to="none", use_cpu=True)
    trainer = OfflineOPDTrainer(student, args, table)
    trainer.train()
    trainer.save_model(tmp_path / "out")
    stamp_model_card(tmp_path / "out", sft_teachers=[fingerprint_teacher(teacher)])
    stamp_dataset_card(tmp_path / "table", table)
    assert read_model_card(tmp_path / "out") and read_dataset_card(tmp_path / "table")
    assert check_teacher_consistency(read_model_card(student), table).consistent
    written = write_report(tmp_path / "out", table=tmp_path / "table", student=student, output=tmp_path / "r.html")
    assert written["rollouts"] == 12


def test_one_split_is_given_as_it_is(tmp_path, table):
    (tmp_path / "one").mkdir()
    table.to_parquet(tmp_path / "one" / "train.parquet")
    DatasetDict(train=table).save_to_disk(tmp_path / "saved")
    for name in ("one", "saved"):
        loaded = load_table(tmp_path / name)
        assert isinstance(loaded, Dataset) and len(loaded) == len(table)
    streamed = load_table(tmp_path / "one", streaming=True)
    assert len(list(streamed)) == len(table)
    table.to_parquet(tmp_path / "one" / "test.parquet")
    assert set(load_table(tmp_path / "one")) == {"train", "test"}


# ---- Prompts ----


def test_texts_for_a_chat_model_are_warned_of_once(tmp_path, teacher_dir, caplog):
    directory = Path(shutil.copytree(teacher_dir, tmp_path / "chat"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    messages = [[{"role": "user", "content": "w5"}], [{"role": "user", "content": "w6"}]]
    collect_rollouts(messages, directory, max_completion_length=2)
    collect_rollouts(["w5", "w6"], teacher_dir, max_completion_length=2)
    assert "chat template" not in caplog.text
    for _ in range(2):
        rollouts = collect_rollouts(["w5", "w6"], directory, max_completion_length=2)
    assert rollouts["prompt_ids"] == [[5], [6]]
    assert caplog.text.count("has a chat template") == 1
    assert '[{"role": "user", "content": text}]' in caplog.text and "`--as_chat`" in caplog.text


# ---- What is no Dataset, and what is no rollout ----

ROWS = make_rollouts(2).to_list()


@pytest.mark.parametrize("value", [ROWS, tuple(ROWS), None, Path("rollouts"), 3])
@pytest.mark.parametrize("function", ["score_rollouts", "evaluate_model", "validate_table", "stamp_dataset_card"])
def test_what_is_no_dataset_is_told_apart(tmp_path, teacher_dir, function, value):
    call = {
        "score_rollouts": lambda: score_rollouts(value, teacher_dir),
        "evaluate_model": lambda: evaluate_model(teacher_dir, value, metric="exact_answer"),
        "validate_table": lambda: validate_table(value),
        "stamp_dataset_card": lambda: stamp_dataset_card(tmp_path, value),
    }[function]
    with pytest.raises(TypeError, match="Dataset") as caught:
        call()
    if isinstance(value, list | tuple) and function != "validate_table":
        assert "Dataset.from_list" in str(caught.value)


@pytest.mark.parametrize(
    "prompts, words",
    [
        ([{"prompt": "w5"}], "`prompts` is a list of rows: give .*Dataset.from_list"),
        (Path("prompts.jsonl"), "`prompts` is a path: load it"),
        ("prompts.jsonl", "`prompts` is one text"),
        (None, "`prompts` is .*None"),
    ],
)
def test_what_are_no_prompts(teacher_dir, prompts, words):
    with pytest.raises(TypeError, match=words):
        collect_rollouts(prompts, teacher_dir, max_completion_length=2)


def with_value(column, value, row=1):
    columns = make_rollouts(3).to_dict()
    columns[column][row] = value
    return Dataset.from_dict(columns, features=make_rollouts(3).features)


@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
@pytest.mark.parametrize("value, words", [(None, "a null"), ([3, None], "a null"), ([], "0 tokens")])
def test_rollouts_with_nulls_name_the_row(tmp_path, teacher_dir, capsys, column, value, words):
    rollouts = with_value(column, value)
    words = f"Row 1, column `{column}`: {words}"
    with pytest.raises(TableError, match=words):
        score_rollouts(rollouts, teacher_dir)
    rollouts.to_parquet(tmp_path / "rollouts.parquet")
    flags = ["--teacher", teacher_dir, "--output_dir", tmp_path / "out"]
    refused(capsys, words, "score", "--dataset_name", tmp_path / "rollouts.parquet", *flags)


@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
def test_rollouts_of_another_type(teacher_dir, column):
    rollouts = make_rollouts(3).remove_columns(column).add_column(column, ["w5 w6"] * 3)
    words = f"Column `{column}`: type .*string, where list of integers is needed.* with `collect_rollouts`"
    with pytest.raises(TableError, match=words):
        score_rollouts(rollouts, teacher_dir)


@pytest.mark.parametrize("column", ["completion_mask", "ref_logprobs"])
def test_columns_of_another_length_are_found_before_scoring(monkeypatch, teacher_dir, column):
    monkeypatch.setattr("trl_lopd.generation.scoring.load_model", lambda *args: pytest.fail("a model was loaded"))
    rollouts = make_rollouts(3)
    values = [[column == "completion_mask" or -1.0] * len(ids) for ids in rollouts["completion_ids"]]
    values[2].append(values[2][0])
    with pytest.raises(TableError, match=f"Row 2, column `{column}`: {len(values[2])} entries for"):
        score_rollouts(rollouts.add_column(column, values), teacher_dir)


# ---- The command line ----


def refused(capsys, words, *command):
    """Exit status 2 and one line, which says why."""
    capsys.readouterr()
    try:
        code = cli.main([str(word) for word in command])
    except SystemExit as stopped:  # argparse, which prints the usage first
        code = stopped.code
    printed = capsys.readouterr().err
    assert code == 2 and "Traceback" not in printed, printed
    assert re.search(words, printed), printed


YAML = {
    "broken": ("dataset_name: [a\nb: {", r"config.yaml is no YAML: .*line"),
    "no mapping": ("- a\n- b", "config.yaml.*mapping"),
    "unknown": ("dataset_name: d\ntemprature: 0.5\n", "config.yaml.*`temprature`.*`temperature`"),
    "mistyped": ("temperature: warm", "temperature"),
    "not_utf8": (b"output_dir: \xff\xfe", "config.yaml"),
    "nested": ("temperature: {a: 1}", "config.yaml: `temperature` is of type float or str or int, not {'a': 1}"),
    "number": ("chat_template_kwargs: 5", "config.yaml: `chat_template_kwargs` is of type dict or str, not 5"),
    "yes": ("seed: true", "config.yaml: `seed` is of type int or str, not True"),
    "list": ("seed: [1, 2]", "config.yaml: `seed`"),
    "empty": ("", "config.yaml is no YAML mapping"),
}


@pytest.mark.parametrize("case", YAML)
def test_a_configuration_that_cannot_be_used(tmp_path, teacher_dir, capsys, case):
    content, words = YAML[case]
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w5"}\n')
    given = ["--model_name_or_path", teacher_dir, "--dataset_name", prompts, "--output_dir", tmp_path / "out"]
    refused(capsys, words, "rollout", *given, "--config", path)


def test_config_without_a_file(tmp_path, capsys):
    refused(capsys, "--config", "rollout", "--config")
    refused(capsys, "nowhere.yaml", "rollout", "--config", tmp_path / "nowhere.yaml")


def test_one_column_to_keep_in_yaml(tmp_path, teacher_dir):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w5", "answer": "a"}\n{"prompt": "w6", "answer": "b"}\n')
    (tmp_path / "config.yaml").write_text(f"""
dataset_name: {prompts}
model_name_or_path: {teacher_dir}
output_dir: {tmp_path / "out"}
max_completion_length: 2
keep_columns: answer
stop: w31
""")
    assert cli.main(["rollout", "--config", str(tmp_path / "config.yaml")]) == 0
    assert load_table(tmp_path / "out")["answer"] == ["a", "b"]


@pytest.mark.parametrize("content", [b"---\nlicense: \xe9\n---\n", b"\xff\xfe-\x00-\x00"])
def test_a_card_that_is_not_utf_8(tmp_path, student_dir, table, capsys, content):
    student = Path(shutil.copytree(student_dir, tmp_path / "student"))
    (student / "README.md").write_bytes(content)
    words = re.escape(str(student / "README.md")) + " is not UTF-8.*Save it as UTF-8"
    teacher = fingerprint_teacher(student_dir)
    for call in (
        lambda: read_model_card(student),
        lambda: stamp_model_card(student, sft_teachers=[teacher]),
        lambda: collect_rollouts(["w5"], student, max_completion_length=2),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    refused(capsys, words, "inspect", student)
    refused(capsys, words, "stamp", student, "--sft_teacher", teacher.id)
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "train.parquet")
    (tmp_path / "table" / "README.md").write_bytes(content)
    refused(capsys, "README.md is not UTF-8", "inspect", tmp_path / "table")


FILES = {
    "empty.jsonl": b"",
    "broken.jsonl": b'{"prompt": "w5"\nfoo\n',
    "bytes.jsonl": bytes(range(128, 256)),
    "empty.csv": b"",
    "broken.parquet": b"PAR1 and nothing else",
    "numbers.jsonl": b'{"prompt": 5}\n{"prompt": 6}\n',
    "none.jsonl": b'{"prompt": [{"role": "user", "content": "w5"}]}\n{"prompt": null}\n',
    "without.jsonl": b'{"prompt": [{"from": "human"}]}\n',
    "words.jsonl": b'{"prompt": ["w5", "w6"]}\n',
    "nothing.jsonl": b'{"prompt": [{"role": "user", "content": "w5"}]}\n{"prompt": []}\n',
    "good.jsonl": b'{"prompt": "w5", "answer": "w6"}\n{"prompt": "w7", "answer": "w8"}\n',
    "silent.jsonl": b'{"prompt": [{"role": "user"}], "answer": "1"}\n',
}
ROLLOUT = ["rollout", "--model_name_or_path", "{student}", "--output_dir", "{tmp}/out", "--dataset_name"]
SCORE = ["score", "--teacher", "{student}", "--output_dir", "{tmp}/out", "--dataset_name"]
EVALUATE = ["evaluate", "--model_name_or_path", "{student}", "--metric", "exact_answer", "--output_dir", "{tmp}/out"]
GOOD = [*ROLLOUT, "{tmp}/good.jsonl"]


@pytest.mark.parametrize(
    "command, words",
    [
        ([*ROLLOUT, "{tmp}/empty.jsonl"], "empty.jsonl has no rows"),
        ([*ROLLOUT, "{tmp}/broken.jsonl"], "broken.jsonl cannot be read: .*JSON"),
        ([*ROLLOUT, "{tmp}/bytes.jsonl"], "bytes.jsonl cannot be read: "),
        ([*ROLLOUT, "{tmp}/empty.csv"], "empty.csv cannot be read: "),
        ([*ROLLOUT, "{tmp}/broken.parquet"], "broken.parquet cannot be read: .*Parquet"),
        ([*ROLLOUT, "{tmp}/nowhere.jsonl"], "nowhere.jsonl is not there"),
        ([*ROLLOUT, "{student}"], "is a model, where a table"),
        ([*ROLLOUT, "{tmp}/numbers.jsonl"], "numbers.jsonl, prompt 0: .*neither a text nor a list of messages"),
        ([*ROLLOUT, "{tmp}/none.jsonl"], "none.jsonl, prompt 1: .*neither a text nor a list of messages"),
        ([*ROLLOUT, "{tmp}/without.jsonl"], "without.jsonl, prompt 0: .*neither a text nor a list of messages"),
        ([*ROLLOUT, "{tmp}/words.jsonl"], "words.jsonl, prompt 0: .*neither a text nor a list of messages"),
        ([*ROLLOUT, "{tmp}/nothing.jsonl"], "nothing.jsonl, prompt 1: the conversation is empty"),
        ([*GOOD, "--dataset_config", "x"], "good.jsonl is a file without configurations"),
        ([*GOOD, "--num_prompts", "-1"], "`num_prompts` is a whole number, 1 or more"),
        ([*GOOD, "--chat_template_kwargs", "{{a: "], "`chat_template_kwargs` is no YAML"),
        ([*GOOD, "--model_init_kwargs", "{{dtype:bfloat16}}"], "a space is missing.*'{dtype: bfloat16}'"),
        (
            [*SCORE, "{tmp}/rollouts.parquet", "--teacher", "{{a: x, b:http://localhost:1}}"],
            "`teacher` has the key 'b:http://localhost:1' .*a space is missing.*'{b: http://localhost:1}'",
        ),
        (
            [*EVALUATE, "--benchmark", "{tmp}/good.jsonl", "--teacher", "models/of/mine"],
            "models/of/mine is not there",
        ),
        ([*GOOD, "--engine", "localhost:8000"], "or the address of one, such as http://localhost:8000"),
        ([*GOOD, "--model_name_or_path", "{tmp}/nowhere"], "nowhere is not there"),
        ([*GOOD, "--model_name_or_path", "{tmp}/good.jsonl"], "good.jsonl is a file: give the directory of a model"),
        ([*SCORE, "{tmp}/nowhere"], "nowhere is not there"),
        ([*SCORE, "{student}"], "is a model, where a table"),
        ([*SCORE, "{tmp}/broken.parquet"], "broken.parquet cannot be read: .*Parquet"),
        ([*SCORE, "{tmp}/none.parquet"], "none.parquet cannot be read: .*no data"),
        ([*SCORE, "{tmp}/rollouts.parquet", "--dataset_split", "test"], "rollouts.parquet cannot be read: .*test"),
        ([*SCORE, "{tmp}/rollouts.parquet", "--teacher", "./nowhere"], "./nowhere is not there"),
        ([*SCORE, "{tmp}/rollouts.parquet", "--ref_model", "{tmp}/good.jsonl"], "is a file: give the directory"),
        ([*SCORE, "{tmp}/rollouts.parquet", "--teacher", "{tmp}"], "No tokenizer can be loaded from"),
        ([*EVALUATE, "--benchmark", "{tmp}/bytes.jsonl"], "bytes.jsonl is not UTF-8"),
        ([*EVALUATE, "--benchmark", "{tmp}/silent.jsonl"], "silent.jsonl, line 1: a message has no text as `content`"),
        ([*EVALUATE, "--benchmark", "{tmp}/good.jsonl", "--answer_after", ""], "`answer_after` is empty"),
        ([*EVALUATE, "--benchmark", "{tmp}/good.jsonl", "--teacher", "./no"], "./no is not there"),
        (["fingerprint", "{tmp}/good.jsonl"], "good.jsonl is a file: give the directory of a model"),
        (["fingerprint", "{tmp}/rollouts.parquet"], "rollouts.parquet is a file: give the directory of a model"),
        (
            ["stamp", "{student}", "--replace", "--sft_teacher", "{tmp}/good.jsonl"],
            "good.jsonl is a file: give the dir",
        ),
        (
            ["stamp", "{student}", "--replace", "--sft_teacher", "teacher@1-xyz"],
            "'teacher@1-xyz' is not the id of a m",
        ),
        (["stamp", "./nowhere", "--sft_teacher", "teacher@1-0123456789ab-01234567-89abcdef"], "./nowhere is not"),
        (["inspect", "{student}", "{tmp}/nowhere"], "nowhere is not there"),
        (["inspect", "{student}", "nowhere"], "nowhere is not there. A table on the Hub is `datasets/ORG/NAME`"),
        (["inspect", "{tmp}/broken.parquet"], "broken.parquet cannot be read: .*Parquet"),
        (["report", "{tmp}/good.jsonl"], "good.jsonl is no directory"),
        (["report", "{tmp}/strange"], "trainer_state.json has not the form"),
        (["report", "{tmp}/run", "--table", "{student}"], "is a model, where a table"),
    ],
)
def test_what_is_mistaken_on_the_command_line(tmp_path, student_dir, capsys, command, words):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    make_rollouts(4).to_parquet(tmp_path / "rollouts.parquet")
    make_rollouts(4).select([]).to_parquet(tmp_path / "none.parquet")
    for name, state in {
        "strange": '{"global_step": 1, "log_history": 5}',
        "run": '{"global_step": 1, "log_history": []}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "run" / "report.json").write_text('[{"model": "student", "accuracy": 1.0}]')
    refused(capsys, words, *(word.format(tmp=tmp_path, student=student_dir) for word in command))
    # Before anything is sampled or scored.
    assert not list(tmp_path.glob("out/**/*.parquet"))


def test_inspect_says_of_other_data_that_it_is_no_table(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("hello\n")
    refused(capsys, "data is no table of rollouts: it has only the columns text", "inspect", tmp_path / "data")


@pytest.mark.parametrize("answers", [[1, 2], ["a", None]])
def test_answers_of_a_benchmark_are_texts(student_dir, answers):
    benchmark = Dataset.from_dict({"prompt": ["w5", "w6"], "answer": answers})
    with pytest.raises(ValueError, match=rf"Row {0 if answers[0] == 1 else 1} of the benchmark: `answer` is a text"):
        evaluate_model(student_dir, benchmark, metric="exact_answer", max_completion_length=2)


def test_a_model_in_memory_whose_directory_is_gone_can_be_sampled(tmp_path, tokenizer, caplog):
    from transformers import AutoModelForCausalLM

    make_model(seed=2).save_pretrained(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    shutil.rmtree(tmp_path / "student")
    assert len(collect_rollouts(["w5"], model, processing_class=tokenizer, max_completion_length=2)) == 1


def test_a_config_or_revision_that_is_not_read_is_refused(tmp_path, table):
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    table.to_parquet(tmp_path / "files" / "train.parquet")
    for name in ("saved", "files", "files/train.parquet"):
        with pytest.raises(ValueError, match="`revision` is for a dataset on the Hub"):
            load_table(tmp_path / name, revision="v2")
    for name in ("saved", "files/train.parquet"):
        with pytest.raises(ValueError, match="has no configurations: `config` is 'math'"):
            load_table(tmp_path / name, "math")


def test_the_only_split_keeps_its_name(tmp_path, table):
    DatasetDict({"test": table}).save_to_disk(tmp_path / "saved")
    assert load_table(tmp_path / "saved").split == "test"
