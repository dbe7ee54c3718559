"""Mixtures of experts on every engine, really launched on two processes whose tokens visit different experts, against
one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from launcher import Launcher, parameters
from safetensors.torch import load_file
from test_engines import assert_same_log, assert_same_weights
from tiny import VOCAB, make_experts, save_student
from transformers import AutoModelForCausalLM

from trl_lopd import fingerprint_teacher, read_model_card, score_rollouts

SCRIPT = Path(__file__).parent / "experts_script.py"
ALL = ["whole", "budget", "mixtral", "gpt_oss", "listed"]
TORCH = {"ddp": ALL, "fsdp2": ALL[:-1]}
ZERO = {"zero3": ALL}
GROUPS = {"single": {"single": ALL}, "torch": TORCH, "zero": ZERO}
# Each engine that shards does the whole. In one process the gradients of each model are those of the plain loss, and
# passes that keep step are seen by `test_micro_batches`.
SLOW = {(kind, case) for kind in ("single", "fsdp2", "zero3") for case in ALL[1:-1]}
SLOW |= {("ddp", case) for case in ALL}

pytestmark = pytest.mark.filterwarnings("ignore")


def make_student(kind):
    """Tokens of the first half of the vocabulary visit experts 0 and 1, others 2 and 3."""
    model = make_experts(kind)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = torch.where(torch.arange(VOCAB) < VOCAB // 2, 1.0, -1.0)
        for name, router in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                router[:, 0] = torch.tensor([8.0, 8.0, -8.0, -8.0])
    return model


def make_rows(count):
    """Two rows of one half of the vocabulary, then two of the other, of all lengths."""
    generator = torch.Generator().manual_seed(0)

    def draw(row, size):
        half = VOCAB // 2
        first = 3 if row % 4 < 2 else half
        return torch.randint(first, first + half - 3, (size,), generator=generator).tolist()

    lengths = torch.randint(1, 11, (count, 2), generator=generator).tolist()
    rows = [(draw(i, prompt), draw(i, completion)) for i, (prompt, completion) in enumerate(lengths)]
    return Dataset.from_dict({"prompt_ids": [prompt for prompt, _ in rows], "completion_ids": [x for _, x in rows]})


@pytest.fixture(scope="module")
def launch(tmp_path_factory, tokenizer, teacher_dir):
    path = tmp_path_factory.mktemp("experts")
    for kind in ("qwen3_moe", "mixtral", "gpt_oss"):
        save_student(path / kind, make_student(kind), tokenizer, teacher_dir)
    score_rollouts(make_rows(32), str(teacher_dir), top_k=4).save_to_disk(path / "rows")
    return Launcher(SCRIPT, path, path / "rows", path / "out", groups=GROUPS, slow=SLOW)


@pytest.mark.parametrize(
    "kind, case", parameters([(kind, case) for kind, cases in (TORCH | ZERO).items() for case in cases], SLOW)
)
def test_is_what_one_process_does(launch, kind, case):
    """As in `test_engines`. Both read the same rows in a pass, which decide the load-balancing loss."""
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    expected, found = launch("single", case), launch(kind, case)
    assert_same_log(found["log"], expected["log"], rel=1e-5, absolute=1e-5)
    assert all(0 < entry["aux_loss"] for entry in found["log"] if "loss" in entry)
    weights = launch.load("single", case)
    assert_same_weights(launch.load(kind, case), weights, atol=2e-6)
    other = launch(kind, case, rank=1)
    # Padding is not counted.
    assert found["visited"] == [0, 1] and other["visited"] == [2, 3]
    assert found["passes"] == other["passes"]
    # One process does without passes that keep step.
    assert (found["passes"] + other["passes"] > expected["passes"]) == (case == "budget")


@pytest.mark.parametrize(
    "kind, case", parameters([(k, c) for k in [*TORCH, *ZERO] for c in ("whole", "mixtral", "gpt_oss")], SLOW)
)
def test_save_model_writes_what_was_trained(launch, kind, case):
    """With the names and shapes of the checkpoint that training began with, which transformers fuses on loading."""
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    launch(kind, case)
    directory = launch.out / kind / case / "model"
    start = launch.arguments[0] + {"whole": "/qwen3_moe"}.get(case, f"/{case}")
    shapes = [
        {name: x.shape for name, x in load_file(f"{path}/model.safetensors").items()} for path in (directory, start)
    ]
    assert shapes[0] == shapes[1]
    model = AutoModelForCausalLM.from_pretrained(directory)
    loaded = dict(model.named_parameters())
    for name, value in launch.load(kind, case).items():
        assert torch.equal(loaded[name], value), name
    assert read_model_card(directory)["model"]["id"] == fingerprint_teacher(directory).id
