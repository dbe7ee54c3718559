"""What one process of a launch decides for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .consistency import TeacherConsistencyError
from .shards import ShardError

# A process that is done waits for those that are not: for hours, where torch would give up after ten minutes.
_PATIENCE = timedelta(days=7)


def processes(cpu: bool = False) -> PartialState:
    """The processes of this launch, which wait for one another for days if they have not been set up before."""
    return PartialState(cpu=cpu, timeout=_PATIENCE)


def own_device(state: PartialState, init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """What to load a model with so that each of several processes has it on its own accelerator."""
    several = state.num_processes > 1 and state.device.type != "cpu"
    return {**({"device_map": {"": state.device}} if several else {}), **(init_kwargs or {})}


class RefusedElsewhere(TeacherConsistencyError, ShardError, SystemExit):
    """Can be caught like the error of the main process; uncaught, ends this process without repeating it."""

    def __init__(self, message: str):
        super().__init__(message)
        self.code = 1


def on_main_process(state: PartialState, compute: Callable[[], Any]) -> Any:
    """
    What `compute` gives on the main process, everywhere. If it raises, every process does, and one is heard.

    Args:
        state (`PartialState`): The processes. All of them call this.
        compute (`Callable`): Called on the main process only; gives something that can be pickled.

    Raises:
        `Exception`: what `compute` raised, on the main process.
        `RefusedElsewhere`: with its message, on the others.
    """
    if state.num_processes == 1:
        return compute()
    error, outcome = None, [None, None]  # what it gave, what went wrong
    if state.is_main_process:
        try:
            outcome[0] = compute()
        except Exception as raised:  # raised here and now, it would leave the other processes waiting
            error, outcome[1] = raised, str(raised)
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        # A launcher ends all processes when the first has ended: let that be the one with the message.
        time.sleep(2)
        raise RefusedElsewhere(outcome[1])
    return outcome[0]
