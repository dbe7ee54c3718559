"""`trl-lopd rollout` and `score`, and the recipe in examples/qwen3 with small models in the place of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import ranks
import wandb
import yaml
from datasets import Dataset
from servers import stub_server
from tiny import make_model, make_tokenizer
from trl import TrlParser

from trl_lopd import cli, commands, fingerprint_teacher, load_table
from trl_lopd.commands import RolloutArguments, ScoreArguments, load_prompts
from trl_lopd.identity.cards import record_of

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "qwen3"

TEMPLATE = "{% for m in messages %}w3 {{ m['content'] }} w4 {% endfor %}{% if add_generation_prompt %}w30{% endif %}"
CONVERSATION = [{"from": "human", "value": "w5 w6"}, {"from": "gpt", "value": "w7"}]


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory):
    """A teacher and a base model that share a tokenizer with a chat template."""
    directory = tmp_path_factory.mktemp("chat")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for seed, name in enumerate(["teacher", "base"], start=1):
        make_model(seed=seed).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory


def options(**changes) -> RolloutArguments:
    given = {"output_dir": "x", "model_name_or_path": "m", "dataset_name": "d"}
    return RolloutArguments(**given | changes)


# ---- Options ----


@pytest.mark.parametrize("file", ["1-sft-data", "3-rollouts", "4-score"])
def test_the_recipe_s_configurations_are_understood(file):
    arguments = ScoreArguments if "score" in file else RolloutArguments
    path = RECIPE / f"{file}.yaml"
    (args,) = TrlParser(arguments).parse_args_and_config(["--config", str(path)])
    for name, value in yaml.safe_load(path.read_text()).items():
        assert getattr(args, name) == value


def test_flags_come_before_the_file_and_dictionaries_are_yaml(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model_name_or_path: m\ndataset_name: d\noutput_dir: o\nseed: 3\nstop: [a, b]\n")
    flags = ["--config", str(config), "--seed", "4", "--model_init_kwargs", "{dtype: bfloat16, a: [1]}"]
    (args,) = TrlParser(RolloutArguments).parse_args_and_config(flags)
    assert (args.seed, args.stop, args.output_dir) == (4, ["a", "b"], "o")
    assert args.model_init_kwargs == {"dtype": "bfloat16", "a": [1]}
    (args,) = TrlParser(RolloutArguments).parse_args_and_config([*flags[:-1], '{"dtype": "float16"}'])
    assert args.model_init_kwargs == {"dtype": "float16"}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["rollout", "--role", "dog"], '`role` is "student" or "teacher"'),
        (["rollout", "--model_init_kwargs", "bfloat16"], "`model_init_kwargs` is a dictionary"),
        (["rollout", "--report_to", "paper"], '`report_to` is "none" or "wandb"'),
        (["rollout", "--dataset_name", "nowhere/at.txt"], "nowhere/at.txt"),
        (["rollout", "--engine", "tgi"], "`engine` is one of"),
        (["rollout", "--engine", "http://me:secret@host"], "no user, password"),
        (["rollout", "--prompt_column", "question"], r"no column 'question', only \['prompt', 'answer'\]: set `prom"),
        (["rollout", "--keep_columns", "x"], r"no column 'x', only .*: set `keep_columns`"),
        (["rollout", "--num_prompts", "99"], "has 2 prompts; `num_prompts` asks for 99"),
        (["rollout", "--keep_columns", "completion"], "`keep_columns` names .'completion'., which sampling writes"),
        (["rollout", "--server_kwargs", "{timeout: 1}"], "`server_kwargs` are for a server"),
        (["rollout", "--engine", "http://h", "--server_kwargs", "{retry: 0}"], "`server_kwargs`: .*'retry'"),
        (["rollout", "--model_init_kwargs", "{bogus: 1}"], "cannot be loaded with `model_init_kwargs=.*bogus"),
        (["rollout", "--dataset_split", "test"], "is a file without splits"),
        (["score", "--teacher_card", "x", "--teacher", "y"], "is for a teacher on a server"),
        (["score", "--teacher", "y"], "prompts.jsonl is no table"),
        (["score", "--teacher", "y", "--dataset_name", "./nothere"], "./nothere is not there"),
        (
            ["rollout", "--model_name_or_path", "http://127.0.0.1:9"],
            "http://127.0.0.1:9: no answer .*Is the server up",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, chat_models, capsys, flags, words):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w5", "answer": "w6"}\n{"prompt": "w7", "answer": "w8"}\n')
    given = ["--output_dir", str(tmp_path / "out"), "--dataset_name", str(prompts)]
    given += ["--model_name_or_path", str(chat_models / "base")] if flags[0] == "rollout" else []
    assert cli.main([flags[0], *given, *flags[1:]]) == 2
    printed = capsys.readouterr().err
    assert printed.count("trl-lopd: ") == 1 and "Traceback" not in printed and "secret" not in printed
    assert re.search(words, printed)


def test_unknown_options_are_not_swallowed(capsys):
    for command in (["inspect", "x", "--colour"], ["score", "--colour", "red"]):
        with pytest.raises(SystemExit):
            cli.main(command)
    assert "--colour" in capsys.readouterr().err


# ---- Prompts ----


def test_prompts_of_conversations_end_before_the_first_answer(tmp_path):
    rows = {
        "conversations": [CONVERSATION, [{"from": "system", "value": "w9"}, {"from": "human", "value": "w8"}]],
        "domain": ["math", "code"],
        "other": [1, 2],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    args = options(dataset_name=str(tmp_path / "data.parquet"), prompt_column="conversations", keep_columns=["domain"])
    prompts = load_prompts(args)
    assert prompts.to_list() == [
        {"prompt": [{"role": "user", "content": "w5 w6"}], "domain": "math"},
        {"prompt": [{"role": "system", "content": "w9"}, {"role": "user", "content": "w8"}], "domain": "code"},
    ]
    rows["conversations"][1] = CONVERSATION[1:]
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="prompt 1: the conversation begins with an answer"):
        load_prompts(args)


def test_prompts_of_text_are_text_or_a_user_s_message(tmp_path):
    Dataset.from_dict({"question": [f"w{i}" for i in range(9)]}).to_parquet(tmp_path / "data.parquet")
    given = {"dataset_name": str(tmp_path / "data.parquet"), "prompt_column": "question"}
    assert load_prompts(options(**given))["prompt"] == [f"w{i}" for i in range(9)]
    drawn = [load_prompts(options(**given, num_prompts=5, as_chat=True, seed=seed))["prompt"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 5
    assert drawn[0][0][0].keys() == {"role", "content"} and drawn[0][0][0]["role"] == "user"


# ---- Jobs ----


@pytest.mark.slow
def test_the_recipe_runs_from_prompts_to_a_student(tmp_path, chat_models, monkeypatch, capsys):
    """Every command of examples/qwen3, with its file; flags put small models and data in the place of its own."""
    monkeypatch.chdir(tmp_path)
    Dataset.from_dict({"conversations": [CONVERSATION] * 40}).to_parquet("sft-prompts.parquet")
    texts = [f"w{i % 20 + 5} w{i % 7 + 5}" for i in range(40)]
    Dataset.from_dict({"prompt": texts, "solution": texts}).to_parquet("prompts.parquet")
    commands = [line.split("  ")[0] for line in (RECIPE / "README.md").read_text().splitlines()]
    commands = [line.split() for line in commands if "examples/qwen3/" in line and line.split()[0] != "#"]
    small = {
        "1-sft-data.yaml": "--dataset_name sft-prompts.parquet --num_prompts 32 --engine transformers "
        f"--model_name_or_path {chat_models}/teacher --max_completion_length 12 --model_init_kwargs {{}}",
        "2-sft.yaml": f"--model_name_or_path {chat_models}/base --eos_token <eos> --max_steps 4 --packing false "
        "--attn_implementation sdpa --warmup_steps 0 --bf16 false --use_cpu true --report_to none --max_length 64",
        "3-rollouts.yaml": "--dataset_name prompts.parquet --engine transformers --max_completion_length 12 "
        "--model_init_kwargs {}",
        "4-score.yaml": f"--teacher {chat_models}/teacher --top_k 4 --model_init_kwargs {{}} --use_cpu",
        "5-train.yaml": "--max_steps 3 --gradient_accumulation_steps 1 --attn_implementation sdpa --use_cpu true "
        "--report_to none --bf16 false",
    }
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert len(commands) == 5
    for command in commands:
        (config,) = [word for word in command if word.endswith(".yaml")]
        # The small data has no configurations.
        lines = [line for line in (ROOT / config).read_text().splitlines() if "dataset_config" not in line]
        Path(Path(config).name).write_text("\n".join(lines))
        command = [Path(word).name if word == config else word for word in command]
        command = [str(ROOT / word) if word.startswith("examples/") else word for word in command]
        flags = small[Path(config).name].split()
        if command[0] == "trl-lopd":
            assert cli.main([*command[1:], *flags]) == 0, capsys.readouterr().err
        else:
            assert command[:2] == ["accelerate", "launch"]
            done = ranks.launch(*command[2:], *flags, processes=None, cwd=tmp_path, env={"ACCELERATE_USE_CPU": "true"})
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    totals = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["run"] for line in totals] == ["sampling", "sampling"]
    table = load_table("runs/qwen3/table", split="train")
    assert table["solution"] == texts and record_of(table)["teachers"][0]["evidence"] == "verified"
    assert cli.main(["inspect", "runs/qwen3/student-sft", "runs/qwen3/table"]) == 0
    assert "consistent (verified)" in capsys.readouterr().out
    assert (tmp_path / "runs/qwen3/student-opd/model.safetensors").exists()


def test_a_served_teacher_is_declared_or_answers_the_student_s_card(tmp_path, teacher_dir, student_dir, capsys):
    from tiny import make_rollouts

    make_rollouts(6).to_parquet(tmp_path / "rollouts.parquet")
    with stub_server("vllm", make_model(seed=1)) as server:
        flags = ["--dataset_name", str(tmp_path / "rollouts.parquet"), "--teacher", server.url, "--top_k", "2"]
        assert cli.main(["score", *flags, "--output_dir", str(tmp_path / "a")]) == 2
        assert "Nothing says which teacher" in capsys.readouterr().err
        declared = ["--fingerprint", str(teacher_dir)]
        assert cli.main(["score", *flags, *declared, "--output_dir", str(tmp_path / "a")]) == 0
    assert load_table(tmp_path / "a", split="train")["teacher_fingerprint"][0].endswith("#declared")


def test_a_declared_revision_is_the_one_that_is_fingerprinted(tmp_path, teacher_dir, monkeypatch):
    from tiny import make_rollouts

    make_rollouts(4).to_parquet(tmp_path / "rollouts.parquet")
    asked = []
    monkeypatch.setattr(
        commands,
        "fingerprint_teacher",
        lambda name, **kwargs: asked.append(kwargs) or fingerprint_teacher(teacher_dir),
    )
    with stub_server("vllm", make_model(seed=1)) as server:
        flags = ["--dataset_name", str(tmp_path / "rollouts.parquet"), "--teacher", server.url, "--top_k", "2"]
        flags += ["--fingerprint", "org/teacher", "--revision", "v2", "--output_dir", str(tmp_path / "a")]
        assert cli.main(["score", *flags]) == 0
    assert asked == [{"revision": "v2", "trust_remote_code": False}]


def test_wandb_gets_speed_and_totals(tmp_path, chat_models, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "w{i}"}}\n' for i in range(3, 9)))
    logged, real = [], wandb.Run.log
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(wandb.Run, "log", lambda run, values: (logged.append(values), real(run, values)))
    flags = [
        "--model_name_or_path",
        str(chat_models / "base"),
        "--dataset_name",
        str(prompts),
        "--rows_per_shard",
        "2",
    ]
    flags += ["--max_completion_length", "4", "--output_dir", str(tmp_path / "out"), "--report_to", "wandb"]
    assert cli.main(["rollout", *flags]) == 0
    assert len(logged) == 4  # three shards and the totals
    assert logged[0]["sampling/tokens_per_second"] > 0 and logged[-1]["sampling/answers"] == 6
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert wandb.run is None
    wandb.teardown()  # it would write the runs of other tests into this one's directory
