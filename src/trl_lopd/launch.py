"""`trl-lopd train`, which starts the packaged training script with `accelerate launch`, as `trl sft` starts TRL's."""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

from accelerate.commands.launch import launch_command, launch_command_parser

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
# A word that begins with a dash of any length and is no negative number.
_FLAG = re.compile("[-\u2010-\u2015\u2212]+[^\W\d]")
CONFIGS = Path(__file__).parent / "accelerate_configs"


def train(arguments: list[str]) -> None:
    """
    Launches the training script.

    Args:
        arguments (`list[str]`): Options of the script, of `accelerate launch`, and `--accelerate_config`, which takes
            the name of a packaged configuration or a path. All of them may also be in the YAML file of `--config`.

    Raises:
        ValueError: If an option is unknown or the configuration does not exist.
    """
    parser = _script().make_parser(prog="trl-lopd train")
    *_, config_flags, cli_flags = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    refuse_unknown_options([*config_flags, *cli_flags])
    flags = _with_config_file([*config_flags, *cli_flags])
    launcher = launch_command_parser()
    launch_args = launcher.parse_args([*flags, str(SCRIPT), *_without(arguments, cli_flags)])
    if launch_args.training_script != str(SCRIPT):
        raise ValueError(
            f"{launch_args.training_script!r} belongs to no option: an option takes one value, or a list."
        )
    launch_command(launch_args)


def refuse_unknown_options(remaining: list[str]) -> None:
    """
    Checks the options, from the command line or from YAML, that a script's parser does not take and would ignore.

    Args:
        remaining (`list[str]`): Flags and values, which may include those of `accelerate launch`.

    Raises:
        ValueError: If a flag is not one of `accelerate launch` either, with two dashes.
    """
    launch_flags = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    for flag in remaining:
        name = flag.partition("=")[0]
        # Other dashes than two are typed by mistake, or by an editor.
        if _FLAG.match(name) and name not in {*launch_flags, "--accelerate_config"}:
            script = {flag for action in _script().make_parser()._actions for flag in action.option_strings}
            near = difflib.get_close_matches(name, [*script, *launch_flags], n=1)
            raise ValueError(f"`{name}` is not an option.{f' Did you mean `{near[0]}`?' if near else ''}")


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trl_lopd_train_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _with_config_file(flags: list[str]) -> list[str]:
    """Replaces `--accelerate_config` by accelerate's `--config_file` with a path. If repeated, the last one counts."""
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
    """Returns `arguments` without those in `taken`, which are in the same order."""
    to_remove, remaining = list(taken), []
    for argument in arguments:
        if to_remove and argument == to_remove[0]:
            to_remove.pop(0)
        else:
            remaining.append(argument)
    return remaining
