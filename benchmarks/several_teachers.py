"""What a student of two domains gains from a teacher for each, beside one teacher and beside TRL's online trainer.

Addition has one teacher and running sums another; neither knows the other's domain. Each seed has a student that was
fine-tuned on answers of both, and rollouts of both domains. A line trains it on a table, or online on prompts with one
teacher, since TRL's `DistillationTrainer` has one. Accuracy is greedy on 400 held-out problems of each domain; the
reverse KL is from the domain's teacher, in nats a sequence of fresh rollouts. On a GPU where there is one. What is in
`--directory` is not run again.

    python benchmarks/several_teachers.py
    python benchmarks/several_teachers.py --seeds 0 --jobs 1
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import evidence
from evidence import BATCH_SIZE, HELD_OUT, TOP_K, Curve, build, interval, measure, once, settings
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from tasks import TASKS
from trl import DistillationConfig, DistillationTrainer

from trl_lopd import (
    OfflineOPDConfig,
    OfflineOPDTrainer,
    check_teacher_consistency,
    collect_rollouts,
    generate_sft_data,
    read_model_card,
    score_rollouts,
)

DOMAINS = ("addition", "sums")
SFT_ANSWERS, SFT_STEPS, ROWS = 2_000, 1_000, 1_500  # answers and rows of each domain
LENGTH = max(TASKS[domain].max_answer_tokens for domain in DOMAINS)

# Whose scores the rows of each domain have; a domain that is not named has no rows.
OFFLINE = {
    "each its own teacher": {"addition": "addition", "sums": "sums"},
    "addition alone": {"addition": "addition"},
    "sums alone": {"sums": "sums"},
    "the teacher of addition for both": {"addition": "addition", "sums": "addition"},
    "the teacher of sums for both": {"addition": "sums", "sums": "sums"},
    "swapped": {"addition": "sums", "sums": "addition"},
}
STEPS = {"each its own teacher": (150, 600)}
# The online trainer's prompts, which have one teacher.
ONLINE = {"online, TRL, addition": "addition", "online, TRL, sums": "sums"}


def problems_of(seed: int, count: int) -> dict[str, dict[str, list[str]]]:
    return {domain: build.draw_problems(TASKS[domain], seed, SFT_ANSWERS, count) for domain in DOMAINS}


def teachers(directory: Path) -> dict[str, str]:
    return {domain: str(directory / f"{domain}-teacher") for domain in DOMAINS}


def named(problems: dict[str, list[str]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"prompt": prompt, "teacher_id": domain} for domain in problems for prompt in problems[domain]]
    )


def measure_both(model, directory: Path) -> dict:
    """Accuracy and reverse KL of each domain."""
    tokenizer = build.make_tokenizer()
    of = teachers(directory)
    return {domain: measure(domain, model, of[domain], processing_class=tokenizer)["reported"] for domain in DOMAINS}


def build_student(seed: int, directory: Path) -> dict:
    """A student that learnt from both teachers, and its rollouts."""
    drawn, path = problems_of(seed, ROWS + HELD_OUT), directory / f"student-{seed}"
    prompts = named({domain: drawn[domain]["sft"] for domain in DOMAINS})
    options = {"max_completion_length": LENGTH, "batch_size": 500, "seed": seed}
    answers = generate_sft_data(prompts, teachers(directory), truncated="keep", **options)
    model = build.make_model(build.make_tokenizer(), seed=seed + 2, hidden=64, layers=4)
    build.fine_tune(model, build.make_tokenizer(), answers, path, SFT_STEPS, seed)
    prompts = named({domain: drawn[domain]["rollouts"] for domain in DOMAINS})
    rollouts = collect_rollouts(prompts, str(path), temperature=0.8, **options)
    rollouts.to_parquet(directory / f"rollouts-{seed}.parquet")
    tokens = {
        domain: sum(len(ids) for ids, name in zip(rollouts["completion_ids"], rollouts["teacher_id"], strict=True)
                    if name == domain) / (ROWS + HELD_OUT)
        for domain in DOMAINS
    }  # fmt: skip
    return {"curve": {"0": measure_both(str(path), directory)}, "tokens": tokens}


def train(line: str, seed: int, directory: Path, tokens: dict[str, float]) -> dict:
    run, student = directory / f"runs-{seed}" / line, str(directory / f"student-{seed}")
    steps = STEPS.get(line, (150,) if line in ONLINE else (600,))
    common = settings(run, seed, steps[-1], LENGTH)
    curve = Curve(lambda model: measure_both(model, directory), steps)
    if line in ONLINE:
        domain = ONLINE[line]
        curve.most_tokens = steps[-1] * BATCH_SIZE * tokens[domain]
        prompts = problems_of(seed, ROWS + HELD_OUT)[domain]["rollouts"][:ROWS]
        trainer = DistillationTrainer(
            student,
            teachers(directory)[domain],
            DistillationConfig(**common | {"max_steps": 2 * steps[-1]}, logging_steps=1, gradient_checkpointing=False),
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            callbacks=[curve],
        )
        trainer.train()
        return {"curve": curve.points, "verdict": "–"}
    scorers, of = OFFLINE[line], teachers(directory)
    rollouts = datasets.Dataset.from_parquet(str(directory / f"rollouts-{seed}.parquet"), cache_dir=str(run / "cache"))
    rollouts = rollouts.filter(lambda name: name in scorers, input_columns="teacher_id")
    table = score_rollouts(rollouts, {domain: of[name] for domain, name in scorers.items()}, top_k=TOP_K)
    verdict = check_teacher_consistency(read_model_card(student), table, teacher_consistency="off")
    args = OfflineOPDConfig(**common, logging_strategy="no", activation_checkpointing=False, teacher_consistency="off")
    trainer = OfflineOPDTrainer(student, args, table.shuffle(seed=0), callbacks=[curve])
    trainer.train()
    return {"curve": curve.points, "verdict": verdict.evidence if verdict.consistent else "refused"}


def run(work, seed: int, directory: Path, *args) -> dict:
    """One piece of work in a process of the pool, once."""
    if work == "student":
        return once(directory / f"student-{seed}.json", build_student, seed, directory)
    line, tokens = args
    return once(directory / f"runs-{seed}" / f"{line}.json", train, line, seed, directory, tokens)


def show(seeds: list[int], directory: Path) -> None:
    def result(path: str) -> dict:
        return json.loads((directory / path).read_text())

    before = [result(f"student-{seed}.json")["curve"]["0"] for seed in seeds]
    lines = {"SFT student": (before, "–")}
    for name in [*ONLINE, *OFFLINE]:
        results = [result(f"runs-{seed}/{name}.json") for seed in seeds]
        for step in results[0]["curve"]:
            points = [found["curve"][step] for found in results]
            lines[f"{name}, {step} steps"] = (points, "/".join(sorted({found["verdict"] for found in results})))
    table = Table("", *(f"{domain}: {what}" for domain in DOMAINS for what in ("accuracy", "reverse KL")),
                  "the check says", title=f"A teacher for each domain, {len(seeds)} seeds", box=MARKDOWN)  # fmt: skip
    for name, (points, verdict) in lines.items():
        cells = [
            interval([point[domain][key] for point in points], digits)
            for domain in DOMAINS
            for key, digits in (("accuracy", 3), ("reverse_kl", 2))
        ]
        table.add_row(name, *cells, verdict)
    Console(width=190).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, of one thread each")
    parser.add_argument("--directory", type=Path, default=Path("runs/several-teachers"))
    a = parser.parse_args()
    for domain, teacher in teachers(a.directory).items():
        once(Path(f"{teacher}.json"), evidence.build_teacher, domain, Path(teacher))
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context("spawn")) as pool:
        students = list(pool.map(run, ["student"] * len(a.seeds), a.seeds, [a.directory] * len(a.seeds)))
        tokens = {seed: student["tokens"] for seed, student in zip(a.seeds, students, strict=True)}
        runs = [
            pool.submit(run, "train", seed, a.directory, line, tokens[seed])
            for line in [*OFFLINE, *ONLINE]
            for seed in a.seeds
        ]
        for future in runs:
            future.result()
    show(a.seeds, a.directory)


if __name__ == "__main__":
    main()
