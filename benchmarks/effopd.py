"""EffOPD beside plain training, every cost counted: steps and seconds until what plain training reaches.

Two tasks, addition and running sums of digits in any order, each with a teacher of its own.
Every seed has its own SFT student, rollouts and order of rows, built first, in three to five minutes each. Three
quantities: top-k reverse KL on held-out rows that no gate reads; reverse KL on fresh rollouts; greedy accuracy.
Seconds are CPU seconds of the one thread that trains, so that other work on the machine does not count; searches are
included, measurements are not. Between two measurements a quantity is taken to change linearly. What is in
`--directory` is not run again.

    python benchmarks/effopd.py
    python benchmarks/effopd.py --tasks addition --batch_size 256 --steps 256
    python benchmarks/effopd.py --tasks addition --seeds 0 --learning_rates 3e-6 3e-5 1e-4 --quantities held_out
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
from evidence import build, once
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from trl_lopd import (
    EffOPDCallback,
    OfflineOPDConfig,
    OfflineOPDTrainer,
    collect_rollouts,
    load_table,
    score_rollouts,
)

QUANTITIES = {"held_out": "reverse KL, held-out top-k", "fresh": "reverse KL, fresh rollouts", "accuracy": "accuracy"}
ARMS = {"plain": None, "powers of two": {"schedule": [2**i for i in range(20)]}, "default": {}}


def place_of(task: str, seed: int, directory: Path) -> Path:
    """The directory of an SFT student, its teacher, its scored rollouts and held-out prompts."""
    return directory / f"{task}-{seed}"


def make_task(task: str, seed: int, directory: Path) -> dict:
    """Fills that directory; the first seed makes the teacher of all."""
    path = place_of(task, seed, directory)
    teacher = str(place_of(task, 0, directory) / "teacher") if seed else None
    build.main(build.Arguments(output_dir=str(path), task=task, other_task="", seed=seed, teacher=teacher))
    if teacher:
        (path / "teacher").unlink(missing_ok=True)
        (path / "teacher").symlink_to(Path(teacher).resolve())
    return {}


class Measure(TrainerCallback):
    """Measures at some steps, and stops the clock meanwhile."""

    def __init__(self, trainer, task: Path, rows, prompts, at: list[int], quantities: list[str]):
        self.trainer, self.task, self.rows, self.prompts = trainer, task, rows, prompts
        self.at, self.quantities, self.curve, self.paused = at, quantities, [], 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()
        self.measure(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.at:
            self.measure(state.global_step)

    def measure(self, step: int) -> None:
        begun = time.process_time()
        point = {"step": step, "seconds": begun - self.start - self.paused}
        model = self.trainer.model
        if "held_out" in self.quantities:
            point["held_out"] = float(self.trainer.reverse_kl_of_rows(self.rows).mean())
        sampling = {"processing_class": self.trainer.processing_class, "max_completion_length": 56, "batch_size": 200}
        if "accuracy" in self.quantities:
            answers = collect_rollouts(self.prompts, model, temperature=0, ref_logprobs=False, **sampling)
            right = [c.rpartition("#")[2] == a for c, a in zip(answers["completion"], answers["answer"], strict=True)]
            point["accuracy"] = sum(right) / len(right)
        if "fresh" in self.quantities:
            fresh = collect_rollouts(self.prompts, model, temperature=1.0, **sampling)
            fresh = score_rollouts(fresh, str(self.task / "teacher"), top_k=0)
            pairs = zip(fresh["ref_logprobs"], fresh["teacher_logprobs"], strict=True)
            point["fresh"] = statistics.fmean(sum(p) - sum(t) for p, t in pairs)
        model.train()
        self.curve.append(point)
        self.paused += time.process_time() - begun


def run(name: str, arm: str, learning_rate: float, seed: int, steps: int, a) -> dict:
    task = place_of(name, seed, a.directory)
    table = load_table(task / "table")
    prompts = datasets.load_dataset("json", data_files=str(task / "prompts.jsonl"), split="train")
    # The test split is measured, so the gate reads rows that are taken from training.
    train, gate = (
        table["train"].select(range(len(table["train"]) - 256)),
        table["train"].select(range(len(table["train"]) - 256, len(table["train"]))),
    )
    args = OfflineOPDConfig(
        str(a.directory / "run"),
        learning_rate=learning_rate,
        max_steps=steps,
        seed=seed,
        per_device_train_batch_size=a.batch_size,
        per_device_eval_batch_size=128,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        activation_checkpointing=False,
        use_cpu=True,
    )
    trainer = OfflineOPDTrainer(str(task / "student"), args, train_dataset=train, eval_dataset=table["test"])
    searches = None
    if ARMS[arm] is not None:
        searches = EffOPDCallback(trainer, gate_dataset=gate, **ARMS[arm])
        trainer.add_callback(searches)
    at = sorted({max(1, round(steps * i / a.measurements)) for i in range(1, a.measurements + 1)})
    measure = Measure(trainer, task, table["test"], prompts, at, a.quantities)
    trainer.add_callback(measure)
    trainer.train()
    result = {"arm": arm, "task": name, "seed": seed, "learning_rate": learning_rate, "curve": measure.curve}
    if searches is not None:
        result |= {"summary": searches.summary(), "accepted": [(h["step"], h["accepted"]) for h in searches.history]}
    return result


def reached(curve: list[dict], quantity: str, target: float, axis: str) -> float | None:
    """Where on an axis a curve first reaches a target."""
    sign = -1 if quantity == "accuracy" else 1
    for before, after in zip(curve, curve[1:], strict=False):
        start, end = sign * before[quantity], sign * after[quantity]
        if end <= sign * target:
            share = 1.0 if start <= end else (start - sign * target) / (start - end)
            return before[axis] + min(max(share, 0.0), 1.0) * (after[axis] - before[axis])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["addition", "sums"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-5])
    parser.add_argument("--quantities", nargs="+", default=list(QUANTITIES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=384, help="of plain training; EffOPD gets half")
    parser.add_argument("--measurements", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, of one thread each")
    parser.add_argument("--directory", type=Path, default=Path("runs/effopd"))
    a = parser.parse_args()
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context("spawn")) as pool:

        def all_of(work: list[tuple]) -> list[dict]:
            """Results of `once`, in the order of what is asked."""
            return [future.result() for future in [pool.submit(once, *each) for each in work]]

        wanted = [(task, seed) for task in a.tasks for seed in a.seeds]
        # The first seed of a task makes its teacher.
        first = [(task, 0) for task in a.tasks]
        for stage in (first, [each for each in wanted if each not in first]):
            all_of([(a.directory / f"{t}-{seed}.json", make_task, t, seed, a.directory) for t, seed in stage])
        results = all_of(
            [
                (a.directory / f"{key_of(task, arm, rate, seed, a)}.json", run, task, arm, rate, seed, steps, a)
                for task in a.tasks
                for rate in a.learning_rates
                for seed in a.seeds
                for arm in a.arms
                # EffOPD gets half of the steps.
                for steps in [a.steps if arm == "plain" else a.steps // 2]
            ]
        )
    show(results, a)


def key_of(task: str, arm: str, rate: float, seed: int, a) -> str:
    return "-".join(map(str, (task, arm, rate, seed, a.batch_size, a.steps, a.measurements, *a.quantities)))


def show(results: list[dict], a) -> None:
    table = Table("task", "learning rate", "arm", "quantity", "plain steps", "target", "steps", "fewer", "seconds",
                  "less", title="Until what plain training reaches: medians (least and most)")  # fmt: skip
    runs = {(r["task"], r["learning_rate"], r["arm"], r["seed"]): r["curve"] for r in results}
    for task, rate in dict.fromkeys((r["task"], r["learning_rate"]) for r in results):
        for quantity in a.quantities:
            for place in (-1 - 2 * a.measurements // 3, -1 - a.measurements // 3, -1):
                plain = [runs[task, rate, "plain", seed][place] for seed in a.seeds]
                target = f"{statistics.median(point[quantity] for point in plain):.3f}"
                for arm in [arm for arm in a.arms if arm != "plain"]:
                    cells = []
                    for axis in ("step", "seconds"):
                        pairs = [
                            (point, reached(runs[task, rate, arm, seed], quantity, point[quantity], axis))
                            for point, seed in zip(plain, a.seeds, strict=True)
                        ]
                        ends = [end for _, end in pairs if end]
                        if not ends:
                            cells += ["not reached", "–"]
                            continue
                        ratios = [point[axis] / end for point, end in pairs if end]
                        missed = f" ({len(pairs) - len(ends)} of {len(pairs)} not)" if len(ends) < len(pairs) else ""
                        cells.append(f"{statistics.median(ends):.0f}{missed}")
                        cells.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})")
                    table.add_row(task, f"{rate:g}", arm, QUANTITIES[quantity], str(plain[0]["step"]), target, *cells)
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
