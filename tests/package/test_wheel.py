"""The wheel as somebody without a clone has it: what is in it, and `trl-lopd train` from another directory."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from trl_lopd import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory that the wheel is installed to."""
    path = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools leaves what it built beside the source, and takes it again.
    source = shutil.copytree(
        ROOT,
        path / "source",
        symlinks=True,
        ignore=shutil.ignore_patterns(".*", "build", "quickstart", "tests", "runs"),
    )
    pip = [sys.executable, "-m", "pip", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", path, source]
    subprocess.run([*pip, *map(str, build)], check=True, capture_output=True)
    (wheel,) = path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(path / "site")
    return path / "site"


def run(site, directory, *words):
    command = [sys.executable, "-m", "trl_lopd.cli", "train", *map(str, words)]
    env = os.environ | {"PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def config(tmp_path, student_dir, table):
    table.to_parquet(tmp_path / "table.parquet")
    options = {"model_name_or_path": str(student_dir), "dataset_name": "table.parquet", "output_dir": "out"}
    options |= {"max_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False}
    # As in TRL's configs: an option of the launcher beside those of the script.
    options |= {"accelerate_config": "zero9", "num_processes": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    return "run.yaml"


def test_the_wheel_has_what_the_command_line_needs(site):
    names = {path.name for path in (site / "trl_lopd" / "accelerate_configs").iterdir()}
    assert names == {path.name for path in (ROOT / "accelerate_configs").iterdir()}
    assert (site / "trl_lopd" / "scripts" / "train.py").read_text() == (ROOT / "examples" / "train.py").read_text()
    assert (site / "trl_lopd" / "py.typed").is_file()
    assert (site / "trl_lopd" / "evaluation" / "report" / "report.js").is_file()


def test_train_without_a_clone(site, tmp_path, config):
    flags = ["--accelerate_config", "ddp", "--num_processes", "1", "--main_process_port", "0"]
    done = run(site, tmp_path, "--config", config, *flags, "--mixed_precision", "no")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "`--accelerate_config` is a file, or one of ddp, fsdp2, .*zero3.*got 'zero9'"),
        (["--learnig_rate", "1e-5"], "`--learnig_rate` is not an option. Did you mean `--learning_rate`?"),
        (["-learning_rate", "1e-5"], "`-learning_rate` is not an option. Did you mean `--learning_rate`?"),
        (["\u2014learning_rate", "1e-5"], "`\u2014learning_rate` is not an option. Did you mean `--learning_rate`?"),
        (["--accelerate_config", "single", "quickly"], "'quickly' belongs to no option"),
    ],
)
def test_mistaken_options_are_named_before_anything_is_launched(capsys, monkeypatch, tmp_path, config, flags, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", config, *flags]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_unknown_options_in_yaml_are_refused_by_the_script_too(tmp_path, monkeypatch, config):
    (tmp_path / "run.yaml").write_text((tmp_path / "run.yaml").read_text() + "learnig_rate: 1.0e-5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-v", "--config", config])
    with pytest.raises(SystemExit, match="`--learnig_rate` is not an option"):
        runpy.run_path(str(ROOT / "examples" / "train.py"), run_name="__main__")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["-learning_rate", "1e-5"], "`-learning_rate` is not an option. Did you mean `--learning_rate`?"),
        (["\u2014learning_rate", "1e-5"], "`\u2014learning_rate` is not an option"),
        (["quickly"], "'quickly' would be ignored"),
        (["--num_processes", "2"], "'--num_processes 2' would be ignored.*before the script"),
    ],
)
def test_words_that_the_script_would_ignore_are_refused(tmp_path, monkeypatch, config, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", config, *flags, "-v"])
    with pytest.raises(SystemExit, match=words):
        runpy.run_path(str(ROOT / "examples" / "train.py"), run_name="__main__")
