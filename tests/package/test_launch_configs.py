"""Every file of accelerate_configs, with the options that docs/launching.md gives for a CPU; two are trained with."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import ranks
import torch.distributed.run
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands import launch
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


def words_of(command, tmp_path):
    """Of `accelerate launch`, with the file of the page beside it."""
    (tmp_path / "ds.json").write_text(re.search(r"```json\n(.*?)```", PAGE, re.S)[1])
    _, _, *words = shlex.split(command.replace("\\\n", " ").replace("ds.json", str(tmp_path / "ds.json")))
    return ["--main_process_port", "0", *words]


def made_of(command, tmp_path, monkeypatch):
    """What accelerate makes of a command, up to where it would start processes: arguments and their environment."""
    if "deepspeed" in name_of(command) or "zero" in name_of(command):
        pytest.importorskip("deepspeed")
    started = []

    class Process:
        returncode = 0

        def __init__(self, command, env):
            started.append(env)

        def wait(self):
            pass

    args = launch.launch_command_parser().parse_args(words_of(command, tmp_path))
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(torch.distributed.run, "run", lambda args: started.append(dict(os.environ)))
        patch.setattr(subprocess, "Popen", Process)
        launch.launch_command(args)
    (env,) = started
    return args, env


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_a_command_of_the_page_is_what_its_config_says(tmp_path, monkeypatch, command):
    name = name_of(command)
    _, env = made_of(command, tmp_path, monkeypatch)
    config = {} if name == "deepspeed_json" else yaml.safe_load((ROOT / f"accelerate_configs/{name}.yaml").read_text())
    assert env["ACCELERATE_MIXED_PRECISION"] == "no"
    assert (env.get("ACCELERATE_USE_DEEPSPEED") == "true") == ("zero" in name or "deepspeed" in name)
    assert (env.get("ACCELERATE_USE_FSDP") == "true") == (name == "fsdp2")
    for key, variable in (
        ("zero_stage", "ZERO_STAGE"),
        ("zero3_init_flag", "ZERO3_INIT"),
        ("zero3_save_16bit_model", "ZERO3_SAVE_16BIT_MODEL"),
        ("offload_param_device", "OFFLOAD_PARAM_DEVICE"),
        ("offload_optimizer_device", "OFFLOAD_OPTIMIZER_DEVICE"),
    ):
        if key in config.get("deepspeed_config", {}):
            assert env[f"ACCELERATE_DEEPSPEED_{variable}"] == str(config["deepspeed_config"][key]).lower()
    if name == "fsdp2":
        for variable in [variable for variable in env if "FSDP" in variable]:
            monkeypatch.setenv(variable, env[variable])
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"


@pytest.mark.slow
# On a CPU accelerate trains DDP where `fsdp2` asks for `fully_shard`; tests/distributed has that.
@pytest.mark.parametrize("name", ["zero3", "deepspeed_json"])
def test_commands_of_the_page_train_on_a_cpu(tmp_path, monkeypatch, name):
    (command,) = [command for command in COMMANDS if name_of(command) == name]
    args, env = made_of(command, tmp_path, monkeypatch)
    words = [*args.training_script_args, "--output_dir", tmp_path / "out"]
    done = ranks.launch(args.training_script, *words, processes=int(args.num_processes), env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    # DeepSpeed writes tied weights twice, so the files differ in keys.
    trained, start = (
        dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
        for path in (tmp_path / "out", ROOT / "examples" / "quickstart" / "student")
    )
    assert trained.keys() == start.keys()
    assert any((trained[key] - start[key]).abs().max() > 1e-4 for key in start)
