"""What the processes of a launch do together: one decides for all of them, those that are done wait for the rest."""

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

# A process that is done waits for those that are not: for hours, where the launch's own limit is minutes.
_PATIENCE = timedelta(days=7)
# A launcher ends all processes when the first has ended: this leaves the main process the time to print its error.
_GRACE_SECONDS = 2

# Set on an error that repeats, on another process, the one of the main process.
_REPEATED = "_trl_lopd_repeated"


def processes(cpu: bool = False) -> PartialState:
    """
    The processes of this launch. All of them make the first call together.

    Raises:
        ValueError: If there are several, and accelerate takes each for the only one.
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
    """Waits until all processes are here, for days if need be."""
    if (group := _patient_group(state)) is not None:
        torch.distributed.barrier(group=group)
    else:
        state.wait_for_everyone()


def _patient_group(state: PartialState) -> torch.distributed.ProcessGroup | None:
    """A group of all processes whose waits last days; `None` where there is only the default one, or none."""
    if state.num_processes == 1 or not (torch.distributed.is_initialized() and torch.distributed.is_gloo_available()):
        return None
    return _group_beside(torch.distributed.group.WORLD)


@functools.lru_cache(maxsize=1)
def _group_beside(world: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
    # A group of its own: the time limit of the default one is the launch's, and training's (`ddp_timeout`).
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)


def own_device(state: PartialState, init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """What to load a model with so that each of several processes has it on its own accelerator."""
    several = state.num_processes > 1 and state.device.type != "cpu"
    return {**({"device_map": {"": state.device}} if several else {}), **(init_kwargs or {})}


def on_main_process(state: PartialState, compute: Callable[[], Any]) -> Any:
    """
    Computes something on the main process and returns it on all of them.

    If it raises, every process raises the same error. Where nothing catches it, the main process prints it, and the
    others end with status 1 without repeating it.

    Args:
        state (`PartialState`): The processes. All of them call this.
        compute (`Callable`): Called on the main process only; returns something that can be pickled.

    Raises:
        `Exception`: what `compute` raised. On the other processes a class that they cannot import is replaced by its
            first base class that they can.
    """
    if state.num_processes == 1:
        return compute()
    error, outcome = None, [None, None]  # what it returned, and what went wrong
    if state.is_main_process:
        try:
            outcome[0] = compute()
        except Exception as raised:  # raised here and now, it would leave the other processes waiting
            error, outcome[1] = raised, _packed(raised)
    if (group := _patient_group(state)) is not None:
        torch.distributed.broadcast_object_list(outcome, src=0, group=group)
    else:
        broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        repeated = _unpacked(outcome[1])
        setattr(repeated, _REPEATED, True)
        _end_quietly()
        raise repeated
    return outcome[0]


def is_repeated(error: BaseException) -> bool:
    """Whether an error repeats the one that the main process raises, and prints."""
    return getattr(error, _REPEATED, False)


def _packed(error: Exception) -> bytes:
    """An error to send to other processes: itself if it can be pickled, otherwise a class and its arguments."""
    kind = next(kind for kind in type(error).__mro__ if _is_importable(kind))
    for content in (error, (kind, error.args), (kind, (str(error),))):
        with contextlib.suppress(Exception):  # its constructor takes other arguments, or they cannot be pickled
            packed = pickle.dumps(content)
            copy = _unpacked(packed)
            if type(copy) is kind and str(copy) == str(error):
                return packed
    return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _unpacked(packed: bytes) -> Exception:
    content = pickle.loads(packed)
    if isinstance(content, Exception):
        return content
    kind, args = content
    # Without `__init__`, which may take other arguments.
    error = kind.__new__(kind, *args)
    error.args = args
    return error


def _is_importable(kind: type) -> bool:
    try:
        pickle.dumps(kind)
    except Exception:
        return False
    return True


@functools.cache
def _end_quietly() -> None:
    """From now on, an uncaught error that is repeated ends this process without being printed."""
    print_error = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if is_repeated(error):
            time.sleep(_GRACE_SECONDS)
        else:
            print_error(kind, error, traceback)

    sys.excepthook = hook
