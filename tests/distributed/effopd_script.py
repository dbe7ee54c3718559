"""
Trains with EffOPD on however many processes started it, and checks what each process can check of its own shards.

    effopd_script.py STUDENT ROWS OUT KIND:CASE ...

Of KINDS and CASES. What the tests compare is written to OUT, by kind, case and rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, is_peft_model
from datasets import load_from_disk
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer
from trl_lopd.effopd.callback import EffOPDCallback
from trl_lopd.effopd.gates import ReverseKLGate

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))

# Scores that the gate gives, lower ones better: of each search, those of W and of the candidates.
SCHEDULE = [1, 2, 4]
SCALES = (3, 5, 7)
SCORES = [
    *(1.0, 0.9, 0.8, 0.85),  # 5 is accepted, and gone back to
    *(1.0, float("nan")),  # rejected
    *(1.0, 0.9, 0.8, 0.7),  # 7 is accepted, where the search ends
]
ACCEPTED = [5, 1, 7]
STEPS = 5

KINDS = {
    "single": {},
    "ddp": {},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    # Every parameter of a tiny model is below the default threshold.
    "zero3-persistent": {"stage": 3},
    # DeepSpeed's own Adam for the CPU would have to be compiled.
    "zero2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3-offload": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
    },
    "fsdp2": {},
    "fsdp2-keep": {},
}


def make_trainer(kind, student, rows, out, layer="LlamaDecoderLayer", **options):
    engine = {}
    if kind.startswith("zero"):
        zero = KINDS[kind] | ({"stage3_gather_16bit_weights_on_model_save": True} if "zero3" in kind else {})
        auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config = {"zero_optimization": zero, **dict.fromkeys(auto, "auto"), "bf16": {"enabled": "auto"}}
        engine["deepspeed"] = config | {"zero_force_ds_cpu_optimizer": False, "gradient_clipping": 1.0}
    if kind.startswith("fsdp2"):
        engine["fsdp"] = True
        engine["fsdp_config"] = {
            "version": 2,
            "transformer_layer_cls_to_wrap": [layer],
            "reshard_after_forward": kind == "fsdp2",
            "state_dict_type": "SHARDED_STATE_DICT",
        }
    peft = {"peft_config": options.pop("peft_config", None)}
    options = {
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 7,
        "learning_rate": 1e-3,
        # Where gradients are near zero, Adam makes much of how they were rounded; less so with this.
        "adam_epsilon": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 4 // WORLD,
        "activation_checkpointing": True,
    } | options
    args = OfflineOPDConfig(**engine, **options)
    student = str(student) if isinstance(student, Path) else student
    return OfflineOPDTrainer(student, args, rows, eval_dataset=rows, **peft)


def logits(model):
    """What the forward sees."""
    training = model.training
    model.eval()
    ids = (torch.arange(24).reshape(2, 12) * 7) % 29 + 3
    with torch.no_grad():
        out = model(input_ids=ids).logits.float().clone()
    model.train(training)
    return out


def state_of(trainer, forward=True):
    """Every tensor that holds weights on this process, from the engine itself, and the forward."""
    engine = trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else None
    found = {"logits": logits(trainer.model)} if forward else {}
    for name, p in trainer.parameters.items():
        if hasattr(p, "ds_tensor"):
            found[name] = p.ds_tensor
        else:
            found[name] = p.to_local() if isinstance(p, DTensor) else p
    masters = []
    if engine is not None:
        stage3 = hasattr(engine, "fp32_partitioned_groups_flat")
        if stage3:
            masters = engine.fp32_partitioned_groups_flat
        else:
            masters = getattr(engine, "single_partition_of_fp32_groups", None) or engine.fp32_groups_flat_partition
    found |= {f"master {i}": master for i, master in enumerate(masters)}
    return {name: value.detach().clone() for name, value in found.items()}


def assert_forward_is_rounded_master(trainer):
    """Of the trained parameters, wherever the engine has them: in parts, or whole."""
    if not trainer.is_deepspeed_enabled:
        return
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    masters = {name: safe_get_full_fp32_param(p) for name, p in trained.items()}

    def check(names):
        for name in names:
            p = trained[name]
            assert p.dtype == (torch.bfloat16 if trainer.args.bf16 else torch.float32)
            assert torch.equal(p.detach(), masters[name].to(p.dtype).view(p.shape)), name

    # Small ones, that ZeRO-3 keeps whole, as they are: gathering them would mend them.
    whole = [name for name, p in trained.items() if p.numel() == masters[name].numel()]
    check(whole)
    with GatheredParameters([trained[name] for name in trained if name not in whole]):
        check(trained)


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


class Before(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # After a forward, `fully_shard` has whole ones in some places.
        self.trainer.parameters = dict(self.trainer.model.named_parameters())
        # A forward before the first one of training would be what ZeRO-3 takes for the order of its modules.
        self.base = state_of(self.trainer, forward=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.state = state_of(self.trainer)


class After(TrainerCallback):
    """Added after EffOPD: compares with what was before the search."""

    def __init__(self, trainer, before, effopd, outputs):
        self.trainer, self.before, self.effopd, self.outputs = trainer, before, effopd, outputs

    def on_step_end(self, args, state, control, **kwargs):
        assert_forward_is_rounded_master(self.trainer)
        now, search = state_of(self.trainer), (self.effopd.history or [{}])[-1]
        if search.get("step") != state.global_step or search["accepted"] == 1:
            assert_same(self.before.state, now)
        if search.get("step") != state.global_step:
            return
        # What was accepted is what the gate saw.
        scales = list(search["scores"])
        assert torch.equal(now["logits"], self.outputs[scales.index(str(search["accepted"])) - len(scales)])
        for name, base in self.before.base.items():
            # Masters in float32: the forward's weights are compared with them above.
            if name in self.effopd.shards.names or name.startswith("master") and not is_peft_model(self.trainer.model):
                base = base.double()
                expected = base + search["accepted"] * (self.before.state[name].double() - base)
                if now[name].dtype == torch.float32:
                    torch.testing.assert_close(now[name].double(), expected, atol=1e-6, rtol=0)
        self.before.base = now


class Collectives(TorchDispatchMode):
    """Counts what is communicated while it is entered."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


class Watched(EffOPDCallback):
    """Counts how much the shards communicate: to read and write, and to publish."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.owned = sum(self.shards.read(name).numel() for name in self.shards.names)
        self.collectives = {"read": 0, "write": 0, "publish": 0}
        for name in self.collectives:
            setattr(self.shards, name, self.watched(name, getattr(self.shards, name)))

    def watched(self, name, function):
        def inner(*args):
            with Collectives() as collectives:
                out = function(*args)
            self.collectives[name] += collectives.calls
            return out

        return inner


def save_weights(trainer, out):
    """Gathered, as the forward sees them."""
    weights = {}
    for name, p in trainer.model.named_parameters():
        if isinstance(p, DTensor):
            weights[name] = p.full_tensor().clone()
        elif hasattr(p, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([p]):
                weights[name] = p.detach().clone()
        else:
            weights[name] = p.detach().clone()
    if RANK == 0:
        torch.save(weights, out / "weights.pt")


def scripted(kind, student, rows, out, parameters="all", **options):
    """Searches that the gate decides, whatever the weights."""
    trainer = make_trainer(kind, student, rows, out, max_steps=STEPS, **options)
    outputs, scores = [], iter(SCORES)

    def gate(model):
        assert not model.training
        outputs.append(logits(model))
        score = next(scores)
        # The others would decide otherwise.
        return score if RANK == 0 else -score

    before = Before(trainer)
    effopd = Watched(trainer, gate, greater_is_better=False, schedule=SCHEDULE, scales=SCALES, parameters=parameters)
    for callback in (before, effopd, After(trainer, before, effopd, outputs)):
        trainer.add_callback(callback)
    trainer.train()
    assert [search["accepted"] for search in effopd.history] == ACCEPTED
    assert next(scores, None) is None
    losses = [log["step"] for log in trainer.state.log_history if "loss" in log]
    assert losses == list(range(1, STEPS + 1)), losses
    outputs.append(logits(trainer.model))
    torch.save(outputs, out / f"outputs-{RANK}.pt")
    save_weights(trainer, out)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    return {
        "history": effopd.history,
        "collectives": effopd.collectives,
        "owned": effopd.owned,
        "trained": trained,
        "names": effopd.shards.names,
    }


def bf16(*case):
    """With a master copy in float32 where the engine has one; see `assert_forward_is_rounded_master`."""
    return scripted(*case, bf16=True)


def bf16_without_master(*case):
    return scripted(*case, model_init_kwargs={"dtype": "bfloat16"})


def lora(*case):
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return scripted(*case, parameters=None, peft_config=config)


def by_default(kind, student, rows, out):
    # The reverse KL and a strict level, so that some searches succeed and some fail.
    trainer = make_trainer(kind, student, rows, out, beta=1.0, per_device_eval_batch_size=16)
    effopd = EffOPDCallback(trainer, significance=0.05)
    trainer.add_callback(effopd)
    trainer.train()
    save_weights(trainer, out)
    return {"history": effopd.history}


def raising(kind, student, rows, out):
    trainer = make_trainer(kind, student, rows, out)
    calls = []

    def gate(model):
        calls.append(logits(model))
        if len(calls) == 3:
            raise KeyError("the gate broke")
        return -float(len(calls))

    before = Before(trainer)
    trainer.add_callback(before)
    trainer.add_callback(
        EffOPDCallback(trainer, gate, greater_is_better=False, schedule=[2], scales=SCALES, parameters="all")
    )
    try:
        trainer.train()
    except KeyError as error:
        assert error.args == ("the gate broke",)
    else:
        raise AssertionError("The gate's error was lost.")
    assert trainer.state.global_step == 2
    assert not torch.equal(calls[0], calls[1])
    assert_same(before.state, state_of(trainer))


def whole(kind, student, rows, out, kill=None, resume=None):
    """With checkpoints; `kill` says where to end without a word."""
    trainer = make_trainer(kind, student, rows, out, save_strategy="steps", save_steps=2)
    reverse_kl = ReverseKLGate(trainer, rows.select(range(16)))

    def die(where, step):
        if (where, step) == (kill, trainer.state.global_step):
            os.kill(os.getpid(), signal.SIGKILL)

    class Gate:
        greater_is_better, calls = False, 0

        def __call__(self, model):
            values = reverse_kl(model)
            self.calls += 1
            # At least one candidate was tried.
            if self.calls % 2 == 0:
                die("search", 5)
            return values

    class Killer(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            die("training", 4)

    effopd = EffOPDCallback(trainer, Gate(), schedule=[1, 3, 5, 6], scales=SCALES, significance=1.0, parameters="all")
    trainer.add_callback(effopd)
    trainer.add_callback(Killer())
    trainer.train(resume_from_checkpoint=resume)
    assert kill is None
    out.mkdir(exist_ok=True)
    save_weights(trainer, out)
    return {"history": effopd.history}


def killed_in_training(kind, student, rows, out):
    whole(kind, student, rows, out.parent / "killed", kill="training")


def killed_in_search(kind, student, rows, out):
    whole(kind, student, rows, out.parent / "killed", kill="search")


def resumed(kind, student, rows, out):
    killed = out.parent / "killed"
    assert (killed / "checkpoint-4").is_dir() and not (killed / "checkpoint-6").exists()
    return whole(kind, student, rows, killed, resume=True)


def continued(kind, student, rows, out):
    """From a checkpoint of the whole run."""
    return whole(kind, student, rows, out, resume=str(out.parent / "whole" / "checkpoint-4"))


def refused(kind, student, rows, out):
    """Checkpoints of another number of processes, where they own different parts, and without the callback's state."""
    checkpoint = out.parent / "whole" / "checkpoint-4"
    said = []
    for file in (f"base-{RANK:05d}-of-{WORLD:05d}.safetensors", "history.json"):
        path = checkpoint / "effopd" / file
        if WORLD > 1:
            dist.barrier()
        if path.name == "history.json" and RANK == 0:
            path.unlink()
        elif path.name != "history.json" and path.exists():
            path.rename(path.with_name(path.name.replace("-of-", "-of-9")))
        elif path.name != "history.json":
            continue
        if WORLD > 1:
            dist.barrier()
        trainer = make_trainer(kind, student, rows, out)
        trainer.add_callback(EffOPDCallback(trainer, parameters="all"))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        except ValueError as error:
            said.append(str(error))
    return said


CASES = {
    function.__name__: function
    for function in (
        *(scripted, bf16, bf16_without_master, lora, by_default, raising),
        *(whole, killed_in_training, killed_in_search, resumed, continued, refused),
    )
}


def fsdp_on_cpu():
    """Accelerate looks at its plugin for `fully_shard` on accelerators only."""
    init = accelerate.state.AcceleratorState.__init__

    def init_with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            # From where every later state takes it.
            accelerate.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = init_with_plugin


def begin(kind):
    """What has to be there before a trainer of this kind is made."""
    if kind.startswith("zero"):
        import deepspeed

        # Its own collectives would be compiled first, for a minute or two. Without them it takes gloo's.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed("gloo")


def run(functions, student, table, directory, *cases):
    """Runs each KIND:CASE, and writes what it gives."""
    fsdp_on_cpu()
    rows = load_from_disk(table)
    for case in cases:
        kind, name = case.split(":")
        begin(kind)
        out = Path(directory, kind, name)
        out.mkdir(parents=True, exist_ok=True)
        result = functions[name](kind, student, rows, out)
        (out / f"{RANK}.json").write_text(json.dumps(result))
    if WORLD > 1:
        # Gloo may abort a process that ends while the other one still talks to it.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run(CASES, *sys.argv[1:])
