"""Samples with `VLLMEngine` in vLLM's environment: the request is JSON on standard input, the answer a file."""

import json
import sys
from pathlib import Path

from trl_lopd.generation.options import Sampling
from trl_lopd.generation.vllm_engine import VLLMEngine

# vLLM starts processes that import this module.
if __name__ == "__main__":
    request = json.load(sys.stdin)
    sampling = {
        name: tuple(value) if isinstance(value, list) else value for name, value in request["sampling"].items()
    }
    engine = VLLMEngine(request["model"], dtype="float32", enforce_eager=True, max_model_len=request["max_model_len"])
    samples = engine.sample(request["prompts"], Sampling(**sampling))
    Path(sys.argv[1]).write_text(json.dumps(samples))
