"""Starts the processes of a launch from one that has imported everything: imports take seconds, most cases less.

As a script it is that process. It runs nothing itself: it forks, and each fork is a rank that runs a script as
`python SCRIPT ARGUMENTS` would, with the environment that torchrun would give it. What is read when libraries are
imported is that of the first launch, but for the address and the caches of a Hub.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.metadata
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent
# From the end of the first rank that fails until the others are told to end.
GRACE = 10
# The environment variable with the address of the one that is shared.
SHARED = "TRL_LOPD_TESTS_RANKS"

# accelerate and datasets read the metadata of installed packages again and again, which takes a tenth of all tests.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


def warm() -> str:
    """The address of the process that has imported everything. One is started, for this process and all that it
    starts, if there is none."""
    if SHARED in os.environ:
        return os.environ[SHARED]
    address = str(Path(tempfile.mkdtemp(), "ranks"))
    # Against no accelerator, and one thread a process.
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # Not where the test that comes first has gone: `PYTHONPATH` may be relative.
    command, pipe = [sys.executable, __file__, address], subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, cwd=TESTS.parent)
    # It ends when its standard input does.
    atexit.register(server.communicate)
    # It listens before it imports.
    server.stdout.readline()
    os.environ[SHARED] = address
    return address


def launch(script, *arguments, processes: int | None = 2, timeout: float = 400, env=None, cwd=None):
    """
    Runs a script, or `-m` and a module, on so many processes; `None` is one that was not launched as a rank.

    Returns:
        `subprocess.CompletedProcess`: with the output of all ranks, and 0 or what the first that failed ended with.
    """
    argv = [str(word) for word in (script, *arguments)]
    with tempfile.TemporaryDirectory() as out:
        request = {"argv": argv, "processes": processes, "timeout": timeout, "out": out, "cwd": str(cwd or Path.cwd())}
        request["env"] = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | (env or {})
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(warm())
            with server.makefile("rw") as stream:
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                reply = json.loads(stream.readline())
        stdout, stderr = (Path(out, name).read_text(errors="replace") for name in ("stdout", "stderr"))
    assert not reply["timed_out"], f"{argv} ran for more than {timeout} s:\n{stdout[-2000:]}\n{stderr[-5000:]}"
    return subprocess.CompletedProcess(argv, reply["code"], stdout, stderr)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def read_hub_settings() -> None:
    """Has the libraries take the Hub of the environment, as if they were imported only now."""
    import importlib

    import datasets.config
    import huggingface_hub

    constants = importlib.reload(huggingface_hub.constants)
    importlib.reload(datasets.config)
    huggingface_hub.hf_api.api.endpoint = constants.ENDPOINT


def run_rank(request: dict, environment: dict[str, str]) -> None:
    """Becomes a process of its own, and ends with what its script ends with."""
    import runpy

    code = 1
    try:
        os.setpgid(0, 0)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            flags = os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            descriptor = os.open(os.devnull if name == "stdin" else f"{request['out']}/{name}", flags)
            os.dup2(descriptor, number)
        os.environ.clear()
        os.environ |= request["env"] | environment
        if "HF_ENDPOINT" in os.environ:
            read_hub_settings()
        os.chdir(request["cwd"])
        module = request["argv"][0] == "-m"
        sys.argv = request["argv"][module:]
        # Of the script, and of what imports `tiny`.
        sys.path[:1] = [os.getcwd() if module else str(Path(sys.argv[0]).parent), str(TESTS)]
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(request: dict) -> list[int]:
    processes, port = request["processes"], free_port()
    pids = []
    for rank in range(processes or 1):
        environment = {}
        if processes:
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if (pid := os.fork()) == 0:
            run_rank(request, {name: str(value) for name, value in environment.items()})
        pids.append(pid)
    return pids


def serve(request: dict) -> dict:
    """Waits for all ranks; ends those that do not end soon after one of them failed."""
    for name in ("stdout", "stderr"):
        Path(request["out"], name).touch()
    left, code, timed_out = start(request), 0, False
    deadline, end_with = time.monotonic() + request["timeout"], signal.SIGTERM
    while left:
        for pid in left[:]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.remove(pid)
                failed = os.waitstatus_to_exitcode(status)
                if failed and not code:
                    code, deadline = failed, min(deadline, time.monotonic() + GRACE)
        if left and time.monotonic() > deadline:
            timed_out = timed_out or code == 0
            for pid in left:
                os.killpg(pid, end_with)
            deadline, end_with = time.monotonic() + 5, signal.SIGKILL
        time.sleep(0.01)
    return {"code": code, "timed_out": timed_out}


def main(address: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("listening", flush=True)
    # What the ranks print is not for the one who asks.
    os.dup2(2, 1)

    # No launch quantizes, and PEFT would import what does, which takes longer than all of PEFT.
    sys.modules["bitsandbytes"] = None

    import torch  # noqa: F401, I001
    import datasets
    import transformers  # noqa: F401
    import trl  # noqa: F401
    import wandb  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Trainer,
    )
    from trl import SFTTrainer, TrlParser  # noqa: F401
    import trl_lopd
    import trl_lopd.cli  # noqa: F401

    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    try:
        # ZeRO imports it when it starts, and with it what compiles models.
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    except ImportError:
        pass
    import peft  # noqa: F401

    # Built when it is first asked for, of all models.
    get_checkpoint_conversion_mapping("llama")

    for name in trl_lopd.__all__:
        getattr(trl_lopd, name)
    datasets.disable_progress_bars()
    # That of jemalloc, which Arrow brings along, begins anew in a fork.
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")} - {"jemalloc_bg_thd"}
    assert len(threads) == 1, f"Only one thread is forked, not {threads}."
    # Of what was imported nothing is garbage, and nothing is copied because it was looked at.
    gc.collect()
    gc.freeze()
    serving = []
    while sys.stdin not in (ready := select.select([sys.stdin, listener], [], [], 1)[0]):
        serving = [pid for pid in serving if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        if ready:
            test, _ = listener.accept()
            with test, test.makefile("rw") as stream:
                if (pid := os.fork()) == 0:
                    stream.write(json.dumps(serve(json.loads(stream.readline()))) + "\n")
                    stream.flush()
                    os._exit(0)
            serving.append(pid)
    shutil.rmtree(Path(address).parent)


if __name__ == "__main__":
    main(*sys.argv[1:])
