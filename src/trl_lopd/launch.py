"""`trl-lopd train`: the packaged training script, started by `accelerate launch`, as `trl sft` starts TRL's."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from types import ModuleType

from accelerate.commands.launch import launch_command, launch_command_parser

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
CONFIGS = Path(__file__).parent / "accelerate_configs"


def train(arguments: list[str]) -> None:
    """
    Launches the training script.

    Args:
        arguments (`list[str]`): Options of the script, of `accelerate launch`, and `--accelerate_config`, which takes
            the name of a packaged configuration or a path. The first and the others may also be in the YAML file of
            `--config`.

    Raises:
        ValueError: If an option is unknown, or there is no such configuration.
    """
    parser = _script().make_parser(prog="trl-lopd train")
    *_, of_config, of_line = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    refuse_unknown_options([*of_config, *of_line])
    flags = _with_config_file([*of_config, *of_line])
    launcher = launch_command_parser()
    launch_command(launcher.parse_args([*flags, str(SCRIPT), *_without(arguments, of_line)]))


def refuse_unknown_options(remaining: list[str]) -> None:
    """
    Checks what a script's parser did not take, from the command line or from YAML, which it would ignore.

    Args:
        remaining (`list[str]`): Flags and values. Those of `accelerate launch` may be among them.

    Raises:
        ValueError: If a flag is not one of `accelerate launch` either.
    """
    known = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    for flag in remaining:
        name = flag.partition("=")[0]
        if name.startswith("--") and name not in {*known, "--accelerate_config"}:
            script = {flag for action in _script().make_parser()._actions for flag in action.option_strings}
            near = difflib.get_close_matches(name, [*script, *known], n=1)
            raise ValueError(f"`{name}` is no option.{f' Is `{near[0]}` meant?' if near else ''}")


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trl_lopd_train_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _with_config_file(flags: list[str]) -> list[str]:
    """Flags of `accelerate launch`, with the file of a configuration in the place of its name; the last one counts."""
    name, others, words = None, [], iter(flags)
    for word in words:
        if word == "--accelerate_config":
            name = next(words, "")
        else:
            others.append(word)
    if name is None:
        return others
    file = Path(name) if Path(name).is_file() else CONFIGS / f"{name}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise ValueError(f"`--accelerate_config` is a file, or one of {names}; got {name!r}.")
    return ["--config_file", str(file), *others]


def _without(arguments: list[str], taken: list[str]) -> list[str]:
    """Arguments without some of them, which are in the same order."""
    left, rest = list(taken), []
    for argument in arguments:
        if left and argument == left[0]:
            left.pop(0)
        else:
            rest.append(argument)
    return rest
