"""Fingerprints a model that is sharded over the processes; each process writes what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from effopd_script import begin
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from trl_lopd.identity.fingerprint import fingerprint_teacher


def shard_fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for layer in base.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def is_sharded(model):
    def is_part(parameter):
        if isinstance(parameter, DTensor):
            return parameter.to_local().numel() < parameter.numel()
        return hasattr(parameter, "ds_id") and parameter.numel() == 0

    return all(is_part(parameter) for parameter in model.parameters())


def main():
    kind, teacher, adapter, out = sys.argv[1:]
    found = {}
    if kind == "fsdp2":
        dist.init_process_group("gloo")
        model = shard_fsdp2(AutoModelForCausalLM.from_pretrained(teacher))
        over = shard_fsdp2(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(teacher), adapter))
    else:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        begin(kind)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        keep = HfDeepSpeedConfig(config)  # from_pretrained partitions while this is alive
        model = AutoModelForCausalLM.from_pretrained(teacher)
        over = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(teacher), adapter)
        found["engine"] = fingerprint_teacher(deepspeed.initialize(model=model, config=config)[0]).to_dict()
        del keep
    assert is_sharded(model)
    found["model"] = fingerprint_teacher(model).to_dict()
    found["adapter"] = fingerprint_teacher(over).to_dict()
    # The model is as sharded as before, and holds the same.
    assert fingerprint_teacher(model).to_dict() == found["model"]
    assert is_sharded(model)
    Path(out, f"{dist.get_rank()}.json").write_text(json.dumps(found))
    # Gloo may abort a process that ends while the other one still talks to it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
