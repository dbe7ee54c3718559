"""Coordination of the processes of a launch: one process decides for all, and finished processes wait for the rest."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

# A finished process may have to wait for hours, while the time limit of the launch is minutes.
_PATIENCE = timedelta(days=7)
# A launcher ends all processes when the first one ends. The delay gives the main process time to print its error.
_GRACE_SECONDS = 2

# Attribute set on an error that repeats the main process's error on another process.
_REPEATED = "_trl_lopd_repeated"


def processes(cpu: bool = False) -> PartialState:
    """
    Returns the state of the processes of this launch. All processes must make the first call together.

    Raises:
        ValueError: If there are several processes and accelerate treats each as the only one.
    """
    state = PartialState(cpu=cpu)
    if state.num_processes == 1 and (launched := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"{launched} processes were launched, and without an accelerator such as a GPU each would do all of the "
            "work. To share it on CPUs, give `--use_cpu`, or call `accelerate.PartialState(cpu=True)` before "
            "anything else."
        )
    _patient_group(state)
    return state


def wait_for_everyone(state: PartialState) -> None:
    """Waits until all processes have called this, for up to seven days."""
    if (group := _patient_group(state)) is not None:
        torch.distributed.barrier(group=group)
    else:
        state.wait_for_everyone()


def _patient_group(state: PartialState) -> torch.distributed.ProcessGroup | None:
    """Returns a group of all processes with a time limit of days; `None` without several processes or gloo."""
    if state.num_processes == 1 or not (torch.distributed.is_initialized() and torch.distributed.is_gloo_available()):
        return None
    return _group_beside(torch.distributed.group.WORLD)


@functools.lru_cache(maxsize=1)
def _group_beside(world: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
    # A separate group, because the default one has the time limit of the launch and of training (`ddp_timeout`).
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)


def own_device(state: PartialState, init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the arguments that make each of several processes load a model onto its own accelerator."""
    several = state.num_processes > 1 and state.device.type != "cpu"
    return {**({"device_map": {"": state.device}} if several else {}), **(init_kwargs or {})}


def on_main_process(state: PartialState, compute: Callable[[], Any]) -> Any:
    """
    Computes something on the main process and returns it on all of them.

    If it raises, every process raises the same error. If nothing catches the error, the main process prints it and the
    others exit with status 1 without printing it again.

    Args:
        state (`PartialState`): The processes. All of them call this.
        compute (`Callable`): Called on the main process only; returns something that can be pickled.

    Raises:
        `Exception`: The error that `compute` raised. On the other processes, one that cannot be pickled is a
            `RuntimeError` with its class and message.
    """
    if state.num_processes == 1:
        return compute()
    error, outcome = None, [None, None]  # the returned value and the error
    if state.is_main_process:
        try:
            outcome[0] = compute()
        except Exception as raised:  # raising it before the broadcast would leave the other processes waiting
            error, outcome[1] = raised, _picklable(raised)
    if (group := _patient_group(state)) is not None:
        torch.distributed.broadcast_object_list(outcome, src=0, group=group)
    else:
        broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        setattr(outcome[1], _REPEATED, True)
        _end_quietly()
        raise outcome[1]
    return outcome[0]


def is_repeated(error: BaseException) -> bool:
    """Returns whether an error repeats one that the main process raises and prints."""
    return getattr(error, _REPEATED, False)


def _picklable(error: Exception) -> Exception:
    """Returns an error that can be sent to other processes: itself, or a `RuntimeError` with its class and message."""
    # Pickling fails if the class is local, or if its constructor takes other arguments.
    with contextlib.suppress(Exception):
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


@functools.cache
def _end_quietly() -> None:
    """Installs an exception hook that does not print errors repeated from the main process."""
    print_error = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if is_repeated(error):
            time.sleep(_GRACE_SECONDS)
        else:
            print_error(kind, error, traceback)

    sys.excepthook = hook
