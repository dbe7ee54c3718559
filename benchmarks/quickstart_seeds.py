"""The quickstart over several seeds: SFT student, both objectives, teacher.

Each seed has its own student, SFT answers, rollouts and training order; the teacher and the held-out problems are the
bundled ones. Prints a table and writes the figures as JSON.

    python benchmarks/quickstart_seeds.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_seed(seed: int, out: Path) -> list[dict]:
    bundled_teacher = EXAMPLES / "quickstart" / "teacher"
    data = out / f"data-{seed}"
    subprocess.run(
        [
            *(sys.executable, str(EXAMPLES / "quickstart" / "build.py"), "--output_dir", str(data)),
            *("--seed", str(seed), "--teacher", str(bundled_teacher)),
        ],
        check=True,
    )
    subprocess.run(
        [
            *(sys.executable, str(EXAMPLES / "train.py"), "--config", str(EXAMPLES / "quickstart.yaml"), "--compare"),
            *("--model_name_or_path", str(data / "student"), "--dataset_name", str(data / "table")),
            *("--teacher", str(bundled_teacher), "--eval_prompts", str(data / "prompts.jsonl")),
            *("--output_dir", str(out / f"run-{seed}"), "--seed", str(seed)),
        ],
        check=True,
    )
    return json.loads((out / f"run-{seed}" / "report.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", default="runs/seeds")
    args = parser.parse_args()
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    results = {seed: run_seed(seed, out) for seed in args.seeds}
    (out / "results.json").write_text(json.dumps(results, indent=2))

    table = Table("seed", "model", "greedy accuracy", "fresh reverse KL\n(nats a sequence)",
                  "held-out top-k reverse KL\n(nats a token)")  # fmt: skip
    for seed, rows in results.items():
        for row in rows:
            table.add_row(
                str(seed),
                row["model"],
                f"{row['accuracy']:.3f}",
                f"{row['fresh']:.2f} ± {row['fresh_se']:.2f}" if "fresh" in row else "–",
                f"{row['held_out']:.4f}" if row["held_out"] is not None else "–",
            )
        table.add_section()
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
