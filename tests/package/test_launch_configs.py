"""Every file of accelerate_configs, with the options that docs/launching.md gives for a CPU, really launched."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
PAGE = (ROOT / "docs" / "launching.md").read_text()

# The commands of the page that begin in this way are those for a CPU.
COMMANDS = re.findall(r"^DS_ACCELERATOR=cpu (accelerate launch (?:.*\\\n)*.*)$", PAGE, re.M)


def name_of(command):
    return "deepspeed_json" if "ds.json" in command else re.search(r"accelerate_configs/(\w+)\.yaml", command)[1]


def test_the_page_has_a_command_for_every_config_of_one_machine():
    names = {path.stem for path in CONFIGS} - {"multi_node"}
    assert {name_of(command) for command in COMMANDS} == names | {"deepspeed_json"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_for_gpus_in_bf16(path):
    config = yaml.safe_load(path.read_text())
    assert config["mixed_precision"] == "bf16" and config["use_cpu"] is False
    stage = config.get("deepspeed_config", {}).get("zero_stage")
    assert stage != 3 or config["deepspeed_config"]["zero3_save_16bit_model"] is True


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_commands_of_the_page_run_on_a_cpu(tmp_path, command):
    name = name_of(command)
    if name not in ("single", "ddp", "fsdp2"):
        pytest.importorskip("deepspeed")
    if name == "zero3_offload":
        pytest.skip("DeepSpeed compiles its Adam for the CPU first, which takes minutes.")
    (tmp_path / "ds.json").write_text(re.search(r"```json\n(.*?)```", PAGE, re.S)[1])
    _, _, *words = shlex.split(command.replace("\\\n", " ").replace("ds.json", str(tmp_path / "ds.json")))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    words += ["--output_dir", str(tmp_path / "out")]
    done = subprocess.run([*launcher, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    # DeepSpeed writes tied weights twice, so the files differ in keys.
    trained, start = (
        dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
        for path in (tmp_path / "out", ROOT / "examples" / "quickstart" / "student")
    )
    assert trained.keys() == start.keys()
    assert any((trained[key] - start[key]).abs().max() > 1e-4 for key in start)
