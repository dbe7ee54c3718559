"""Really launched processes: each launch runs many cases, as starting up costs more than training."""

from __future__ import annotations

import json

import pytest
import ranks
import torch


def parameters(cases, slow):
    """Pairs of kind and case as parameters, of which those in `slow` are marked."""
    return [pytest.param(*pair, marks=pytest.mark.slow if pair in slow else ()) for pair in cases]


class Launcher:
    """
    Runs a script over and over, with the same arguments and each time other cases, `kind:case`.

    Args:
        script (`str`): what `run` of `effopd_script` runs.
        arguments: of the script; the last is the directory that cases write to.
        groups (`dict` of `dict`): by name, what one launch runs: the cases of each kind. `single` and `alone` are one
            process, `alone` one that is a rank.
        slow (`set` of pairs): kinds and cases that slow tests alone ask for, in launches of their own.
    """

    def __init__(self, script, *arguments, groups, slow=frozenset()):
        self.script, self.groups, self.slow = str(script), groups, slow
        self.arguments = [str(argument) for argument in arguments]
        self.out = arguments[-1]
        self.launched = {}

    def start(self, processes, cases):
        return ranks.launch(self.script, *self.arguments, *cases, processes=processes)

    def __call__(self, kind, case, rank=0):
        """What a case gave, of which all those of its launch were run."""
        (group,) = [name for name, group in self.groups.items() if case in group.get(kind, ())]
        key = (group, (kind, case) in self.slow)
        if key not in self.launched:
            pairs = [(kind, case) for kind, cases in self.groups[group].items() for case in cases]
            cases = [":".join(pair) for pair in pairs if (pair in self.slow) == key[1]]
            self.launched[key] = self.start({"single": None, "alone": 1}.get(group, 2), cases)
        done = self.launched[key]
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads((self.out / kind / case / f"{rank}.json").read_text())

    def load(self, kind, case, name="weights"):
        return torch.load(self.out / kind / case / f"{name}.pt")
