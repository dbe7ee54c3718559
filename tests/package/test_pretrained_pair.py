"""examples/pretrained_pair.py on the quickstart's teacher, and what a second start of it does."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def pair():
    spec = importlib.util.spec_from_file_location("pretrained_pair", ROOT / "examples" / "pretrained_pair.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_pair_goes_from_sft_data_to_the_report_and_on(pair, tmp_path, capsys):
    quickstart = ROOT / "examples" / "quickstart"
    args = pair.Arguments(
        teacher=str(quickstart / "teacher"),
        prompts=str(quickstart / "prompts.jsonl"),
        output_dir=str(tmp_path),
        sft_prompts=16,
        rollout_prompts=16,
        held_out=8,
        batch_size=8,
        sft_steps=2,
        steps=4,
        max_completion_length=16,
        runs=["sampled"],
    )
    pair.main(args)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert {path.parent.name for path in made} >= {"base", "student-sft", "sampled"}
    assert (tmp_path / "sampled" / "report.html").exists()
    capsys.readouterr()

    args.runs = ["sampled", "topk, 1e-5, EffOPD"]
    pair.main(args)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[-3:]] == ["SFT student", "sampled", "topk, 1e-5, EffOPD"]
    result = json.loads((tmp_path / "topk-1e-5-EffOPD" / "run.json").read_text())
    assert result["effopd"]["searches"] and result["held_out"][0][0] == 0
    # The number in the table is the one that was measured.
    assert f"{result['held_out'][-1][1]:.4f}" in lines[-1]
