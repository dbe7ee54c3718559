"""The documentation against the code: its links, names, messages, code and commands."""

from __future__ import annotations

import argparse
import ast
import functools
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser
from trl import TrlParser

import trl_lopd
from trl_lopd import cli, commands

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "trl_lopd"
QUICKSTART = ROOT / "examples" / "quickstart"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

# Pages that are linked and not written: remove each when it lands.
NOT_YET_WRITTEN: set[str] = set()

# Blocks of Python that are not executed: page, first line, reason.
NOT_EXECUTED = {
    ("README.md", "from transformers import AutoTokenizer"): "test_package.py runs it",
    ("README.md", "from trl import SFTTrainer"): "TRL's default of bf16 is refused on a CPU",
    ("README.md", "trainer.add_callback(EffOPDCallback(trainer))"): "one line; docs/effopd.md has the whole",
    ("effopd.md", "from trl import SFTConfig, SFTTrainer"): "an ellipsis stands for the reader's settings",
    ("scoring.md", "from trl_lopd import VLLMServer, read_model_card, score_rollouts  # or SGLangServer"): "a server",
    ("teacher-consistency.md", 'table.push_to_hub("my-org/scored-rollouts")'): "the Hub",
    ("teacher-consistency.md",
     "from trl_lopd import VLLMServer, read_model_card, verify_served_teacher  # or SGLangServer"): "a server",
}  # fmt: skip

# What a page takes for given.
GIVEN = {
    "README.md": "prompts = ['017,219,825=', '052,905,228=']",
    "effopd.md": """
from datasets import Dataset
from trl_lopd import OfflineOPDConfig, load_table
student = "examples/quickstart/student"
args = OfflineOPDConfig("run", max_steps=2, per_device_train_batch_size=4, report_to="none")
table = load_table("examples/quickstart/table")
table = {split: rows.select(range(16)) for split, rows in table.items()}
prompts = Dataset.from_dict({"prompt": ["017,219,825="], "answer": ["1"]})
is_right = lambda completions, answer, **_: [float(a in c) for c, a in zip(completions, answer)]
""",
    "adapters.md": """
import torch
from trl_lopd import OfflineOPDConfig, load_table
torch.manual_seed(0)
student = "examples/quickstart/student"
args = OfflineOPDConfig("run", max_steps=1, per_device_train_batch_size=4, report_to="none", bf16=False)
table = load_table("examples/quickstart/table")["train"].select(range(8))
""",
    "quickstart.md": """
from pathlib import Path
Path("runs").mkdir()
Path("runs/quickstart").symlink_to(Path("examples/quickstart/student").resolve())
""",
    "rollouts.md": "prompts = ['017,219,825=', '052,905,228=']",
    "teacher-consistency.md": """
from trl_lopd import collect_rollouts
collect_rollouts([f"017,219,8{i}=" for i in range(10, 30)], "my-student-sft", output_dir="rollouts")
""",
    "scoring.md": """
from datasets import Dataset
from trl_lopd import collect_rollouts
prompts = Dataset.from_dict({"prompt": ['017,219,825=', '052,905,228='], "teacher_id": ["math", "code"]})
collect_rollouts(prompts, "my-student-sft", output_dir="rollouts")
""",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in link]
    missing = {link for link in links if not (page.parent / link).exists()}
    assert missing <= NOT_YET_WRITTEN


def test_the_index_has_every_page():
    linked = set(re.findall(r"\]\(([^)]+)\)", (DOCS / "index.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"index.md"} | NOT_YET_WRITTEN | {"../README.md"}
    assert not [name for name in NOT_YET_WRITTEN if (DOCS / name).exists()], "landed: remove it from the list"


def test_public_names_have_a_docstring_and_a_place():
    places = dict(re.findall(r"\[`(\w+)`\]\(\.\./(.+?)\)", (DOCS / "api.md").read_text()))
    assert places.keys() == set(trl_lopd.__all__)
    for name, path in places.items():
        thing = getattr(trl_lopd, name)
        assert path == f"src/{thing.__module__.replace('.', '/')}.py"
        first_line = (thing.__doc__ or "").strip().partition("\n")[0]
        # A dataclass without a docstring gets its signature for one.
        assert first_line and not first_line.startswith(("Args:", f"{name}("))


def template(node: ast.expr) -> str | None:
    """A string of the source, `…` where values go; of several added up, the first."""
    if isinstance(node, ast.BinOp):
        return template(node.left)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        # What logging fills in.
        return re.sub(r"%s", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


@functools.cache
def source_strings() -> set[str]:
    """All strings of the source."""
    nodes = (node for path in SOURCE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    return {text for node in nodes if isinstance(node, ast.expr) and (text := template(node))}


def quoted_messages() -> list[str]:
    """The beginnings of messages, first in each row of the tables."""
    rows = re.findall(r"^\| (`+) ?(.+?) ?\1 \|", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    return [quote for _, quote in rows]


def test_quoted_messages_occur_in_the_source():
    everything = source_strings()
    quotes = quoted_messages()
    assert len(quotes) > 20  # the table was read
    assert not [quote for quote in quotes if not any(text.startswith(quote) for text in everything)]
    assert len(set(quotes)) == len(quotes)


def test_what_is_not_executed_exists():
    first_lines = {(page.name, code.partition("\n")[0]) for page in PAGES for code in blocks(page, "python")}
    assert NOT_EXECUTED.keys() <= first_lines


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, one after another, in a directory where the names that it uses are the quickstart's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "my-org").mkdir()
    for name in ("teacher", "math-teacher", "code-teacher"):
        (tmp_path / "my-org" / name).symlink_to(QUICKSTART / "teacher")
    shutil.copytree(QUICKSTART / "student", tmp_path / "my-org" / "base")
    (tmp_path / "my-student-sft").symlink_to(QUICKSTART / "student")
    names = {"__name__": page.stem}
    exec(GIVEN.get(page.name, ""), names)
    for code in blocks(page, "python"):
        compiled = compile(code, f"{page.name}: {code.partition(chr(10))[0]}", "exec")
        if (page.name, code.partition("\n")[0]) not in NOT_EXECUTED:
            exec(compiled, names)


class Parsed(Exception):
    """The flags were read; what follows would be the work."""


def parse(words: list[str], monkeypatch) -> None:
    """Reads a command's flags as it would itself, and stops there; a flag that it does not know raises SystemExit."""
    while "=" in words[0]:
        words = words[1:]
    words = [str(ROOT / "examples" / "quickstart.yaml") if word == "my-run.yaml" else word for word in words]
    if "--deepspeed" in words:  # reading it would set up DeepSpeed in this process
        place = words.index("--deepspeed")
        del words[place : place + 2]
    command, *words = words
    if command == "torchrun":
        launch = torchrun_parser().parse_args(words)
        command, words = "python", [launch.training_script, *launch.training_script_args]
    if command == "accelerate":
        assert words.pop(0) == "launch"
        launch = launch_command_parser().parse_args(words)
        assert not launch.module or launch.training_script == "trl_lopd.cli"
        command, words = "trl-lopd" if launch.module else "python", launch.training_script_args
        words = words if launch.module else [launch.training_script, *words]
    if command == "trl-lopd":
        main = cli.main
    elif command == "python":
        file, *words = words
        monkeypatch.syspath_prepend(str((ROOT / file).parent))

        def main(flags: list[str]) -> None:
            monkeypatch.setattr(sys, "argv", [file, *flags])
            runpy.run_path(str(ROOT / file), run_name="__main__")
    elif command == "make":
        assert all(re.search(f"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE) for target in words)
        return
    else:
        assert command == "pip", f"{command} is none of the commands that this test knows"
        return

    def stop_after(read):
        def reads(*args, **kwargs):
            read(*args, **kwargs)
            raise Parsed

        return reads

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
        patch.setattr(TrlParser, "parse_args_and_config", stop_after(TrlParser.parse_args_and_config))
        for job in ("_fingerprint", "_stamp", "_inspect", "_report"):
            patch.setattr(cli, job, stop_after(lambda args: None))
        # A model that is named need not be there.
        patch.setattr(commands, "Path", type("Found", (type(Path()),), {"is_dir": lambda path: True}))
        with pytest.raises(Parsed):
            main(words)


COMMANDS = [
    pytest.param(line, id=f"{page.name}-{line[:60]}")
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").replace("&&", "\n").splitlines()
    if line.strip()
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line, monkeypatch):
    parse(shlex.split(line, comments=True), monkeypatch)
