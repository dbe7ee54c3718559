"""Really launched processes: each launch runs many cases, as starting up costs more than training."""

from __future__ import annotations

import json

import ranks
import torch


class Launcher:
    """
    Runs a script over and over, with the same arguments and each time other cases, `kind:case`.

    Args:
        script (`str`): what `run` of `effopd_script` runs.
        arguments: of the script; the last is the directory that cases write to.
        groups (`dict` of `dict`): by name, what one launch runs: the cases of each kind. `single` and `alone` are one
            process, `alone` one that is a rank.
    """

    def __init__(self, script, *arguments, groups):
        self.script, self.groups = str(script), groups
        self.arguments = [str(argument) for argument in arguments]
        self.out = arguments[-1]
        self.launched = {}

    def start(self, processes, cases):
        return ranks.launch(self.script, *self.arguments, *cases, processes=processes)

    def __call__(self, kind, case, rank=0):
        """What a case gave, of which all those of its launch were run."""
        group = next(name for name, group in self.groups.items() if case in group.get(kind, ()))
        if group not in self.launched:
            cases = [f"{kind}:{case}" for kind, cases in self.groups[group].items() for case in cases]
            self.launched[group] = self.start({"single": None, "alone": 1}.get(group, 2), cases)
        done = self.launched[group]
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads((self.out / kind / case / f"{rank}.json").read_text())

    def load(self, kind, case, name="weights"):
        return torch.load(self.out / kind / case / f"{name}.pt")
