"""What the quickstart's student gains from each way to distill, every cost counted, over several seeds.

Every seed has its own SFT student, rollouts and order of rows; both teachers and the held-out problems are shared.
Seconds are CPU seconds of the one thread that works, so that other work on the machine does not count: rollouts,
scoring and training (with the searches of EffOPD), without imports and measurements. Each arm runs in a process of its
own, whose peak memory is read before anything is measured. What is in `--directory` is not run again.

    python benchmarks/evidence.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from effopd import QUICKSTART, build, make_task
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from trl_lopd import (
    EffOPDCallback,
    OfflineOPDConfig,
    OfflineOPDTrainer,
    collect_rollouts,
    evaluate_model,
    load_benchmark,
    load_table,
    score_rollouts,
)
from trl_lopd.models import load_tokenizer

TEACHER = QUICKSTART / "teacher"
HELD_OUT_ROWS = 200
MORE_TEACHER_STEPS = 400
# Arguments of the trainer, and whose scores it reads.
OFFLINE = {
    "topk": ({"loss_type": "topk"}, "teacher"),
    "sampled": ({"loss_type": "sampled"}, "teacher"),
    "sampled, ratio_clip=0.2": ({"loss_type": "sampled", "ratio_clip": 0.2}, "teacher"),
    "topk, other teacher": ({"loss_type": "topk", "teacher_consistency": "off"}, "other"),
    "sampled, other teacher": ({"loss_type": "sampled", "teacher_consistency": "off"}, "other"),
    "topk, EffOPD": ({"loss_type": "topk"}, "teacher"),
}
ARMS = ["SFT student", *OFFLINE, "online, TRL"]


class StopAtTokens(TrainerCallback):
    """Ends online training once it has seen as many completion tokens as offline training."""

    def __init__(self, most: float, batch_size: int):
        self.most, self.batch_size, self.tokens = most, batch_size, 0.0

    def on_log(self, args, state, control, logs, **kwargs):
        self.tokens += logs.get("completions/mean_length", 0) * self.batch_size
        control.should_training_stop |= self.tokens >= self.most


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(model, problems, **options) -> dict:
    metrics = evaluate_model(model, problems, metric="exact_answer", teacher=str(TEACHER), temperature=0,
                             max_completion_length=build.MAX_ANSWER_TOKENS, batch_size=400, **options)  # fmt: skip
    metrics = metrics["metrics"]
    return {
        "accuracy": metrics["exact_answer"]["value"],
        "reverse_kl": metrics["reverse_kl"]["value"],
        "reverse_kl_se": metrics["reverse_kl"]["se"],
    }


def make_other_teacher(path: Path) -> dict:
    """A second teacher, with initial weights and problems of its own, trained on until it is as good as the first."""
    problems = load_benchmark(QUICKSTART / "prompts.jsonl")
    exclude, tokenizer = set(problems["prompt"]), build.make_tokenizer()
    teacher, rounds = measure(str(TEACHER), problems), []
    model = build.make_teacher(tokenizer, path, build.Arguments.teacher_steps, exclude, seed=2)
    while not rounds or rounds[-1]["accuracy"] < teacher["accuracy"] - 0.02:
        if rounds:
            build.make_teacher(tokenizer, path, MORE_TEACHER_STEPS, exclude, seed=2 + len(rounds), model=model)
        rounds.append(measure(str(path), problems))
    return {"bundled teacher": teacher} | {f"other teacher, round {i}": result for i, result in enumerate(rounds)}


def make_table(task: Path, seed: int, path: Path) -> dict:
    """The student answers the prompts of its task, and its teacher scores the answers."""
    rows = datasets.concatenate_datasets(list(load_table(task / "table").values()))
    prompts = load_tokenizer(str(task / "student")).batch_decode(list(rows["prompt_ids"]))
    begun = time.process_time()
    rollouts = collect_rollouts(
        prompts,
        str(task / "student"),
        temperature=0.8,
        max_completion_length=build.MAX_ANSWER_TOKENS,
        seed=seed,
        batch_size=500,
    )
    sampled = time.process_time()
    table = score_rollouts(rollouts, str(TEACHER), top_k=4, output_dir=path)
    result = {"rollouts": sampled - begun, "scoring": time.process_time() - sampled, "memory": peak_memory()}
    ref, teacher = (np.concatenate(table[name]) for name in ("ref_logprobs", "teacher_logprobs"))
    return result | {"tokens": len(ref) / len(table), "advantage": float((teacher - ref).std())}


def score_again(table: Path, other: Path, path: Path) -> dict:
    """The other teacher scores the same answers."""
    scored = load_table(table, split="train")
    rollouts = scored.select_columns(["prompt_ids", "completion_ids", "ref_logprobs", "student_fingerprint"])
    begun = time.process_time()
    again = score_rollouts(rollouts, str(other), top_k=4, output_dir=path)
    result = {"scoring": time.process_time() - begun, "memory": peak_memory()}
    teacher, second = (np.concatenate(table["teacher_logprobs"]) for table in (scored, again))
    return result | {"difference": float((teacher - second).std())}


def train(arm: str, task: Path, tables: Path, seed: int, steps: int, tokens: float, a: dict) -> dict:
    """Trains one arm; `tokens` is what its steps see offline, and what it may see online."""
    problems = load_benchmark(task / "prompts.jsonl")
    if arm == "SFT student":
        return measure(str(task / "student"), problems)
    common = dict(
        output_dir=str(tables / "run"),
        seed=seed,
        learning_rate=a["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_beta2=0.98,
        per_device_train_batch_size=a["batch_size"],
        per_device_eval_batch_size=HELD_OUT_ROWS,
        max_completion_length=build.MAX_ANSWER_TOKENS,
        dataloader_drop_last=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    table = load_table(tables / OFFLINE.get(arm, (None, "teacher"))[1], split="train")
    rows = table.select(range(len(table) - HELD_OUT_ROWS))
    held_out = table.select(range(len(table) - HELD_OUT_ROWS, len(table)))
    student = str(task / "student")
    begun, stop = time.process_time(), StopAtTokens(tokens, a["batch_size"])
    if arm in OFFLINE:
        args = OfflineOPDConfig(**common, max_steps=steps, activation_checkpointing=False, **OFFLINE[arm][0])
        trainer = OfflineOPDTrainer(student, args, train_dataset=rows, eval_dataset=held_out)
    else:
        prompts = load_tokenizer(student).batch_decode(list(rows["prompt_ids"]))
        trainer = DistillationTrainer(
            student,
            str(TEACHER),
            DistillationConfig(**common, max_steps=2 * steps, gradient_checkpointing=False),
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            callbacks=[stop],
        )
    searches = EffOPDCallback(trainer) if arm == "topk, EffOPD" else None
    if searches is not None:
        trainer.add_callback(searches)
    trainer.train()
    result = {"training": time.process_time() - begun, "memory": peak_memory(), "steps": trainer.state.global_step}
    result["tokens"] = stop.tokens or tokens
    logs = [log for log in trainer.state.log_history if "importance_weight/mean" in log][-10:]
    if logs:
        for key in ("mean", "std"):
            result[f"importance_{key}"] = statistics.fmean(log[f"importance_weight/{key}"] for log in logs)
    if searches is not None:
        result["searches"] = searches.summary()
    return result | measure(trainer.model.eval(), problems, processing_class=trainer.processing_class)


def in_process(work: Callable, *args):
    """The result of `work` in a process that does nothing else, with one thread."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.apply(work, args)


def once(path: Path, work: Callable, *args) -> dict:
    """The result of `work` from its file, if there is one."""
    if not path.exists():
        result = in_process(work, *args)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1))
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--steps", type=int, default=150, help="EffOPD gets half")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="the quickstart's")
    parser.add_argument("--directory", default="runs/evidence")
    a = parser.parse_args()
    directory = Path(a.directory)
    settings = json.dumps({"steps": a.steps, "batch_size": a.batch_size, "learning_rate": a.learning_rate})
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "settings.json").exists() and (directory / "settings.json").read_text() != settings:
        raise SystemExit(f"The results in {directory} are of other settings: give another `--directory`.")
    (directory / "settings.json").write_text(settings)
    other = directory / "other-teacher"
    both = any(OFFLINE.get(arm, (None, "teacher"))[1] == "other" for arm in a.arms)
    teachers = once(directory / "teachers.json", make_other_teacher, other) if both else {}
    costs, results = {}, {}
    for seed in a.seeds:
        task = in_process(make_task, "addition", seed, directory)
        tables = directory / f"tables-{seed}"
        costs[seed] = {"teacher": once(tables / "teacher.json", make_table, task, seed, tables / "teacher")}
        if both:
            scores = tables / "teacher", other, tables / "other"
            costs[seed]["other"] = once(tables / "other.json", score_again, *scores)
        for arm in a.arms:
            steps = a.steps // 2 if "EffOPD" in arm else a.steps
            args = arm, task, tables, seed, steps, steps * a.batch_size * costs[seed]["teacher"]["tokens"], vars(a)
            results[arm, seed] = once(directory / f"seed-{seed}" / f"{arm}.json", train, *args)
            print(seed, arm, json.dumps(results[arm, seed]), flush=True)
    show(results, costs, teachers, a)


def show(results: dict, costs: dict, teachers: dict, a: argparse.Namespace) -> None:
    def total(arm: str, seed: int) -> float:
        """Rollouts and scoring, if there were any before training, and training."""
        seconds = results[arm, seed]["training"]
        if arm in OFFLINE:
            seconds += costs[seed]["teacher"]["rollouts"] + costs[seed][OFFLINE[arm][1]]["scoring"]
        return seconds

    def cell(values: list[float], digits: int, sign: str = "") -> str:
        mean, least, most = (f"{f(values):{sign}.{digits}f}" for f in (statistics.fmean, min, max))
        return mean if least == most else f"{mean} ({least} to {most})"

    table = Table("", "accuracy", "beside SFT", "reverse KL", "beside SFT", "steps", "tokens, 10³", "seconds",
                  "of training", "memory, MiB", "weights",
                  title=f"Means of seeds {', '.join(map(str, a.seeds))} (least to most)")  # fmt: skip
    for arm in a.arms:
        runs = [results[arm, seed] for seed in a.seeds]
        row = []
        for key, digits in (("accuracy", 3), ("reverse_kl", 2)):
            row.append(cell([run[key] for run in runs], digits))
            before = [results.get((ARMS[0], seed), {}).get(key) for seed in a.seeds]
            compared = arm != ARMS[0] and None not in before
            row.append(
                cell([run[key] - b for run, b in zip(runs, before, strict=True)], digits, "+") if compared else "–"
            )
        # Of the mean, from the sampling of the rollouts alone.
        error = sum(run["reverse_kl_se"] ** 2 for run in runs) ** 0.5 / len(runs)
        mean, *spread = row[2].split(maxsplit=1)
        row[2] = " ".join([f"{mean} ± {error:.2f}", *spread])
        if arm != ARMS[0]:
            for values in (
                [run["steps"] for run in runs],
                [run["tokens"] / 1000 for run in runs],
                [total(arm, seed) for seed in a.seeds],
                [run["training"] for run in runs],
                [run["memory"] for run in runs],
            ):
                row.append(cell(values, 0))
        if arm in OFFLINE:
            weights = [statistics.fmean(run[f"importance_{key}"] for run in runs) for key in ("mean", "std")]
            row.append("{:.3f}, {:.3f}".format(*weights))
        table.add_row(arm, *row, *["–"] * (10 - len(row)))
    table.caption = (
        "reverse KL: from the bundled teacher, on fresh rollouts, nats a sequence; ±: standard error of the mean. "
        "seconds: rollouts, scoring and training. memory: peak of the process that trains. "
        "weights: mean and standard deviation over the tokens of the last ten steps, against the rollout policy"
    )
    console = Console(width=220)
    console.print(table)
    for (arm, seed), result in results.items():
        if searches := result.get("searches"):
            console.print(
                f"{arm}, seed {seed}: {searches['accepted']} of {searches['searches']} searches taken, "
                f"{searches['search_seconds']:.0f} seconds of the clock for all"
            )
    for name, result in teachers.items():
        console.print(f"{name}: accuracy {result['accuracy']:.3f}")
    for name, key, about in (
        ("teacher", "rollouts", "seconds of the rollouts"),
        ("teacher", "scoring", "seconds of scoring"),
        ("teacher", "memory", "peak memory of rollouts and scoring (MiB)"),
        ("teacher", "advantage", "standard deviation of log teacher - log student before training (nats a token)"),
        ("other", "difference", "standard deviation of log teacher - log other teacher there (nats a token)"),
    ):
        if name in costs[a.seeds[0]]:
            console.print(f"{about}: {cell([costs[seed][name][key] for seed in a.seeds], 2)}")


if __name__ == "__main__":
    main()
