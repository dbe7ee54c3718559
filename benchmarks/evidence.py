"""What the student of a small task gains from each way to distill, every cost counted, over several seeds.

Every seed has its own SFT student, rollouts and order of rows; the teachers and the held-out problems are shared.
There are two sets of held-out problems: one to choose settings by, and one that is reported. Seconds are CPU seconds
of the one thread that works, so that other work on the machine does not count: sampling, scoring and training, without
imports and measurements. On a GPU, which is used where there is one, they are the host's and say little. What is in
`--directory` is not run again.

    python benchmarks/evidence.py
    python benchmarks/evidence.py --tables divergences --tasks addition --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from trl_lopd import (
    OfflineOPDConfig,
    OfflineOPDTrainer,
    check_teacher_consistency,
    collect_rollouts,
    evaluate_model,
    load_table,
    read_model_card,
    residualize_table,
    score_rollouts,
)
from trl_lopd.table.schema import score_column
from trl_lopd.training.loss import Objective
from trl_lopd.training.objective import divergence_topk

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
import build  # noqa: E402
from tasks import TASKS  # noqa: E402

BATCH_SIZE, ROWS, HELD_OUT, TOP_K, LEARNING_RATE = 64, 3_000, 200, 4, 3e-4
# What held-out rows say of a student, by the names of the trainer.
SELECTORS = ("eval_reverse_kl_topk", "eval_loss", "eval_huber", "eval_top1_agreement", "eval_entropy")
MORE_STEPS = 150
SETTINGS = ("BATCH_SIZE", "HELD_OUT", "TOP_K", "LEARNING_RATE", "MORE_STEPS")
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
BEST = 0.5


@dataclass(frozen=True)
class Arm:
    """One way to train a student.

    Attributes:
        rows: whose answers its table holds, `"student"`, `"teacher"` or `"both"`. `"online"` and `"sft"` read none.
        teacher: who scores them: `"teacher"` or another of `OTHERS`.
        count: rows of the table, beside those that are held out; with `"sft"`, further answers of the teacher.
        sft_answers: answers that the student was fine-tuned on; `None` is the task's number.
        more_answers: answers of the scoring teacher that it was fine-tuned on after that, for `MORE_STEPS`.
        options: of the trainer's configuration.
        mixed: half of the forward and half of the reverse divergence.
        residual: on what `residualize_table` leaves of the scores.
        steps: where it is measured; training ends at the last.
    """

    rows: str = "student"
    teacher: str = "teacher"
    count: int = ROWS
    sft_answers: int | None = None
    more_answers: int = 0
    options: tuple[tuple[str, object], ...] = ()
    mixed: bool = False
    residual: bool = False
    steps: tuple[int, ...] = (150, 600)

    def table(self) -> Arm:
        """What of it decides the table that it reads, or whose costs it is compared with."""
        rows = "student" if self.rows in ("online", "sft") else self.rows
        return Arm(rows, self.teacher, self.count, self.sft_answers, self.more_answers)

    def key(self) -> str:
        options = [f"{name}={value}" for name, value in self.options]
        parts = [self.rows, self.teacher, self.count, f"sft-{self.sft_answers}", *options]
        parts += [f"more-{self.more_answers}"] if self.more_answers else []
        parts += ["residual"] if self.residual else []
        return ",".join(map(str, [*parts, *(["mixed"] if self.mixed else []), "-".join(map(str, self.steps))]))


def topk(beta: float, **options) -> Arm:
    return Arm(options=(("loss_type", "topk"), ("beta", beta)), **options)


def sampled(advantage_clip: float = 10.0, ratio_clip: float | None = None, **options) -> Arm:
    settings = {"loss_type": "sampled", "advantage_clip": advantage_clip, "ratio_clip": ratio_clip}
    return Arm(options=tuple(settings.items()), **{"steps": (150,), **options})


@dataclass(frozen=True)
class Line:
    """A line of a table: an arm after some steps. `step` 0 is its student before."""

    name: str
    arm: Arm
    step: int


@dataclass(frozen=True)
class Claim:
    """A table: its lines, and the line that the others are compared with; with none, each with its SFT student."""

    title: str
    lines: list[Line]
    reference: str | None
    tasks: tuple[str, ...] = ("addition", "sums")
    arms: list[Arm] = field(init=False)

    def __post_init__(self):
        if self.reference is not None and self.reference not in [line.name for line in self.lines]:
            raise ValueError(f"No line of {self.title!r} is {self.reference!r}.")
        object.__setattr__(self, "arms", list(dict.fromkeys(line.arm for line in self.lines)))


DECAYED = (("learning_rate", 2e-3), ("lr_scheduler_type", "cosine"))
MIXED = Arm(options=(("loss_type", "topk"), ("beta", 0.0)), mixed=True)
ONLINE = Arm(rows="online", steps=(150,))
OTHERS = {"another, the same way of writing": "addition", "another way of writing": "addition, in order"}
SFT = Line("SFT student", topk(BEST), 0)


def divergences() -> Claim:
    lines = [SFT]
    for step in (150, 600):
        for beta in reversed(BETAS):
            name = {0.0: "0, forward KL", 1.0: "1, reverse KL"}.get(beta, f"{beta:g}")
            lines.append(Line(f"{step} steps, beta {name}", topk(beta), step))
        lines.append(Line(f"{step} steps, ½ reverse + ½ forward", MIXED, step))
    return Claim("Which divergence on the stored top-k", lines, "600 steps, beta 1, reverse KL")


def online() -> Claim:
    lines = [SFT, Line("online, TRL", ONLINE, 150)]
    lines += [Line(f"offline, beta {b:g}, {n} steps", topk(b), n) for b in (BEST, 1.0) for n in (150, 600)]
    lines.insert(3, Line(f"offline, beta {BEST:g}, 400 steps", topk(BEST, steps=(400,)), 400))
    return Claim("Offline and online", lines, "online, TRL", tasks=("addition", "sums", "claims"))


def schedule() -> Claim:
    lines = [SFT, Line("online, TRL", ONLINE, 150)]
    lines.append(Line("online, TRL, decayed", Arm(rows="online", options=DECAYED, steps=(150,)), 150))
    for steps in (150, 600):
        lines.append(Line(f"offline, {steps} steps", topk(BEST), steps))
        arm = Arm(options=(*topk(BEST).options, *DECAYED), steps=(steps,))
        lines.append(Line(f"offline, {steps} steps, decayed", arm, steps))
    return Claim("The learning rate", lines, "online, TRL", tasks=("addition",))


def teachers() -> Claim:
    objectives = {f"beta {BEST:g}": topk(BEST), "beta 1": topk(1.0), "sampled": sampled()}
    lines = [SFT]
    for name, arm in objectives.items():
        lines.append(Line(f"{name}, the right teacher", arm, 150))
        for other in OTHERS:
            changed = Arm(teacher=other, options=(*arm.options, ("teacher_consistency", "off")), steps=(150,))
            lines.append(Line(f"{name}, {other}", changed, 150))
    return Claim("Whose scores", lines, "SFT student", tasks=("addition",))


def remedy() -> Claim:
    other, lines = "another way of writing", [SFT]
    for answers in (0, 100, 300, 1_000):
        overridden = (("teacher_consistency", "off"),) if not answers else ()
        arm = Arm(teacher=other, more_answers=answers, options=(*topk(BEST).options, *overridden), steps=(150,))
        if answers:
            lines.append(Line(f"{answers:,} answers of the new teacher", arm, 0))
        lines.append(Line(f"{answers:,} answers, then its scores", arm, 150))
    return Claim("When another teacher scores", lines, "SFT student", tasks=("addition",))


def residual() -> Claim:
    lines = [SFT]
    for teacher, clip in (("another way of writing", 10.0), ("another way of writing", 1.0), ("teacher", 10.0)):
        raw = sampled(clip, teacher=teacher)
        overridden = (("teacher_consistency", "off"),) if teacher != "teacher" else ()
        name = f"{'the right teacher' if teacher == 'teacher' else teacher}, tau {clip:g}"
        lines.append(Line(name, replace(raw, options=(*raw.options, *overridden)), 150))
        lines.append(Line(f"{name}, residual", replace(raw, residual=True), 150))
    return Claim("What the residual recovers", lines, "SFT student", tasks=("addition",))


def update() -> Claim:
    arms = {
        "tau 10": sampled(),
        "tau 1": sampled(advantage_clip=1.0),
        "trust region 0.2": sampled(ratio_clip=0.2),
        f"beta {BEST:g}": topk(BEST, steps=(150,)),
    }
    lines = []
    for answers in (1_000, 3_000, 10_000, 30_000):
        own = {name: Arm(sft_answers=answers, options=arm.options, steps=arm.steps) for name, arm in arms.items()}
        lines.append(Line(f"SFT on {answers:,}", own["tau 10"], 0))
        lines += [Line(f"SFT on {answers:,}, {name}", arm, 150) for name, arm in own.items()]
    return Claim("The paper's update, from weak students to strong", lines, None, tasks=("addition",))


def rows(answers: int, tasks: tuple[str, ...]) -> Claim:
    own = {"sft_answers": answers, "steps": (600,)}
    reference = f"SFT on {answers:,}, the student's rows"
    lines = [
        Line(f"SFT on {answers:,}", topk(BEST, **own), 0),
        Line(reference, topk(BEST, **own), 600),
        Line(f"SFT on {answers:,}, the teacher's rows", topk(BEST, rows="teacher", **own), 600),
        Line(f"SFT on {answers:,}, half and half", topk(BEST, rows="both", **own), 600),
        Line(f"SFT on {answers:,} and {ROWS:,} more, 600 steps longer", Arm(rows="sft", **own), 600),
    ]
    return Claim("Whose rows", lines, reference, tasks)


def budget() -> Claim:
    lines = [SFT]
    for count in (1_000, 3_000, 9_600):
        arm = topk(BEST, count=count)
        lines += [Line(f"{count:,} rows, {step} steps", arm, step) for step in arm.steps]
    return Claim("Rows or epochs", lines, "3,000 rows, 600 steps", tasks=("addition",))


CLAIMS = {f.__name__: [f()] for f in (divergences, online, schedule, teachers, remedy, residual, update, budget)}
CLAIMS["rows"] = [rows(3_000, ("addition", "claims")), rows(1_000, ("addition",)), rows(30_000, ("addition",))]


# ---- What is built once ----


def build_teacher(task: str, path: Path, as_good_as: Path | None = None) -> dict:
    """The teacher that `build.py` would make, or another, trained on until it is as good."""
    tokenizer = build.make_tokenizer()
    problems = build.draw_problems(TASKS[task], 0, TASKS[task].sft_answers, ROWS + HELD_OUT)
    if as_good_as is None:
        exclude = {problem for some in problems.values() for problem in some}
        build.make_teacher(TASKS[task], tokenizer, path, TASKS[task].teacher_steps, exclude)
        rounds = []
    else:
        least = build.accuracy(TASKS[task], str(as_good_as), problems["choosing"]) - 0.02
        rounds = build.make_other_teacher(TASKS[task], tokenizer, path, problems, least)
    return {"rounds": rounds, "accuracy": build.accuracy(TASKS[task], str(path), problems["reported"])}


def build_student(task: str, teacher: Path, path: Path, seed: int, answers: int, steps: int) -> dict:
    """An SFT student and how good it is."""
    problems = build.draw_problems(TASKS[task], seed, answers, 0)["sft"]
    begun = time.process_time()
    build.make_student(TASKS[task], build.make_tokenizer(), str(teacher), problems, path, steps, seed)
    return {"seconds": time.process_time() - begun, "curve": {"0": measure(task, str(path), teacher)}}


def build_more(task: str, teacher: Path, scorer: Path, student: Path, path: Path, seed: int, arm: Arm) -> dict:
    """An SFT student that learnt from some answers of another teacher after that."""
    answers = arm.sft_answers or TASKS[task].sft_answers
    problems = build.draw_problems(TASKS[task], seed, answers, arm.count + HELD_OUT + arm.more_answers)["rollouts"]
    begun, tokenizer = time.process_time(), build.make_tokenizer()
    written = build.answer(TASKS[task], str(scorer), problems[arm.count + HELD_OUT :], seed)
    model = AutoModelForCausalLM.from_pretrained(student)
    build.fine_tune(model, tokenizer, written, path, MORE_STEPS, seed)
    return {"seconds": time.process_time() - begun, "curve": {"0": measure(task, str(path), teacher)}}


def build_table(task: str, arm: Arm, teacher: Path, scorer: Path, student: Path, path: Path, seed: int) -> dict:
    """Answers, scored, and what they cost."""
    answers = arm.sft_answers or TASKS[task].sft_answers
    problems = build.draw_problems(TASKS[task], seed, answers, arm.count + HELD_OUT)["rollouts"]
    halves = {"student": problems, "teacher": problems}
    if arm.rows == "both":
        halves = {"student": problems[: len(problems) // 2], "teacher": problems[len(problems) // 2 :]}
    begun, rollouts = time.process_time(), []
    for who in ("student", "teacher") if arm.rows == "both" else (arm.rows,):
        model, temperature = (student, 0.8) if who == "student" else (teacher, 1.0)
        answered = collect_rollouts(
            halves[who],
            str(model),
            temperature=temperature,
            max_completion_length=TASKS[task].max_answer_tokens,
            batch_size=500,
            seed=seed,
        )
        rollouts.append(
            answered.select_columns(["prompt_ids", "completion_ids", "ref_logprobs", "student_fingerprint"])
        )
    sampling = time.process_time() - begun
    table = score_rollouts(datasets.concatenate_datasets(rollouts), str(scorer), top_k=TOP_K, output_dir=path)
    result = {"sampling": sampling, "scoring": time.process_time() - begun - sampling}
    return result | describe_table(table, student)


def describe_table(table: datasets.Dataset, student: Path) -> dict:
    """How long its answers are, how far its scores are from the student's, and what the check says."""
    ref, scores = (np.concatenate(table[name]) for name in ("ref_logprobs", score_column(table.column_names)))
    verdict = check_teacher_consistency(read_model_card(student), table, teacher_consistency="off")
    return {
        "tokens": len(ref) / len(table),
        "spread": float((scores - ref).std()),
        "clipped": float((abs(scores - ref) > 10.0).mean()),
        "verdict": verdict.evidence if verdict.consistent else "refused",
    }


# ---- Training ----


def measure(task: str, model, teacher: Path, **options) -> dict:
    """Accuracy and reverse KL on fresh rollouts, on both sets of held-out problems."""
    results = {}
    for name, problems in build.draw_problems(TASKS[task], 0, 0, 0).items():
        if problems:
            rows = [{"prompt": p, "answer": TASKS[task].solve(p)} for p in problems]
            found = evaluate_model(
                model,
                datasets.Dataset.from_list(rows),
                metric="exact_answer",
                teacher=str(teacher),
                temperature=0,
                max_completion_length=TASKS[task].max_answer_tokens,
                batch_size=400,
                **options,
            )["metrics"]
            results[name] = {
                "accuracy": found["exact_answer"]["value"],
                "reverse_kl": found["reverse_kl"]["value"],
            }
    return results


class Curve(TrainerCallback):
    """Measures at some steps, and stops the clock meanwhile. Online training ends after as many tokens as offline."""

    def __init__(self, measure: Callable, at: tuple[int, ...], most_tokens: float = float("inf")):
        self.measure, self.at, self.most_tokens = measure, at, most_tokens
        self.points, self.paused, self.tokens, self.trainer = {}, 0.0, 0.0, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = time.process_time()

    def on_step_end(self, args, state, control, model, **kwargs):
        if self.most_tokens == float("inf") and state.global_step in self.at:
            self.add(state.global_step, model)

    def on_log(self, args, state, control, model, logs, **kwargs):
        self.tokens += logs.get("completions/mean_length", 0) * BATCH_SIZE
        if self.tokens >= self.most_tokens and not control.should_training_stop:
            control.should_training_stop = True
            self.add(self.at[-1], model)

    def add(self, step: int, model) -> None:
        begun = time.process_time()
        point = {"seconds": begun - self.begun - self.paused}
        if self.trainer is not None:
            metrics = self.trainer.evaluate()
            point |= {name: metrics[name] for name in SELECTORS}
        self.points[str(step)] = point | self.measure(model.eval())
        model.train()
        self.paused += time.process_time() - begun


class Mixed(Objective):
    """Half of the forward and half of the reverse divergence."""

    def divergence(self, *args) -> torch.Tensor:
        return (divergence_topk(*args, beta=0.0) + divergence_topk(*args, beta=1.0)) / 2


def settings(run: Path, seed: int, steps: int, length: int) -> dict:
    """Arguments that an offline and an online trainer have in common."""
    return dict(
        output_dir=str(run),
        seed=seed,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_beta2=0.98,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=HELD_OUT,
        max_completion_length=length,
        dataloader_drop_last=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    )


def train(task: str, arm: Arm, teacher: Path, student: Path, table: Path, tokens: float, run: Path, seed: int) -> dict:
    """Trains and measures; `tokens` is the mean length of the student's rollouts, which bounds online training."""
    common = settings(run, seed, arm.steps[-1], TASKS[task].max_answer_tokens) | dict(arm.options)
    tokenizer = build.make_tokenizer()
    curve = Curve(lambda model: measure(task, model, teacher, processing_class=tokenizer), arm.steps)
    if arm.rows == "online":
        curve.most_tokens = arm.steps[-1] * BATCH_SIZE * tokens
        problems = build.draw_problems(TASKS[task], seed, TASKS[task].sft_answers, arm.count)["rollouts"]
        # A constant learning rate does not depend on where training would end.
        most = 2 * arm.steps[-1] if common["lr_scheduler_type"] == "constant" else arm.steps[-1] + 1
        config = DistillationConfig(**common | {"max_steps": most}, logging_steps=1, gradient_checkpointing=False)
        trainer = DistillationTrainer(
            str(student),
            str(teacher),
            config,
            train_dataset=datasets.Dataset.from_dict({"prompt": problems}),
            callbacks=[curve],
        )
    else:
        args = OfflineOPDConfig(**common, logging_strategy="no", activation_checkpointing=False)
        rows = load_table(table, split="train")
        if arm.rows == "both":
            rows = rows.shuffle(seed=0)
        if arm.residual:
            rows = residualize_table(rows)
        parts = rows.select(range(arm.count)), rows.select(range(arm.count, len(rows)))
        trainer = OfflineOPDTrainer(str(student), args, *parts, callbacks=[curve])
        curve.trainer = None if arm.residual else trainer  # its held-out rows have no top-k
        if arm.mixed:
            trainer.objective = Mixed(trainer.objective.loss_type, args, trainer.objective.vocab_size)
    trainer.train()
    return {"curve": curve.points} | ({"table": describe_table(rows, student)} if arm.residual else {})


def train_sft(task: str, arm: Arm, teacher: Path, run: Path, seed: int) -> dict:
    """A new student of the answers of the SFT student and `arm.count` more, for as many more steps."""
    steps, answers = TASKS[task].sft_steps, arm.sft_answers or TASKS[task].sft_answers
    longer = build_student(task, teacher, run, seed, answers + arm.count, steps + arm.steps[-1])
    point = longer["curve"]["0"] | {"seconds": longer["seconds"]}
    return {"curve": {str(arm.steps[-1]): point}}


# ---- The order of work ----


def once(path: Path, work: Callable, *args) -> dict:
    """The result of `work` from its file, if there is one."""
    if not path.exists():
        datasets.disable_progress_bars()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        result = work(*args)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1))
        print(path, flush=True)
    return json.loads(path.read_text())


class Work:
    """Runs what the arms need, each thing once, in a few processes."""

    def __init__(self, directory: Path, jobs: int):
        self.directory, self.jobs = directory, jobs
        # What is in the directory is not run again, so it has to be of the same settings.
        directory.mkdir(parents=True, exist_ok=True)
        path, own = directory / "settings.json", {name: globals()[name] for name in SETTINGS}
        own["sft_steps"] = {name: task.sft_steps for name, task in TASKS.items()}
        if not any(directory.iterdir()):
            path.write_text(json.dumps(own, indent=1))
        found = json.loads(path.read_text()) if path.exists() else {}
        if other := {name: found.get(name) for name in own if found.get(name) != own[name]}:
            raise SystemExit(
                f"{directory} has runs with {other}, which is not what is here: name another `--directory`."
            )
        self.pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
        self.futures: dict[Path, Future] = {}
        self.lock = threading.Lock()

    def teacher(self, task: str) -> Path:
        return (QUICKSTART if task == build.Arguments.task else self.directory / task) / "teacher"

    def student(self, task: str, arm: Arm, seed: int) -> Path:
        name = f"student-{seed}-{arm.sft_answers or TASKS[task].sft_answers}"
        return self.directory / task / (f"{name}-more-{arm.more_answers}" if arm.more_answers else name)

    def table(self, task: str, arm: Arm, seed: int) -> Path:
        own, student = arm.table(), self.student(task, arm, seed)
        return student.with_name(f"{student.name}-{own.rows}-{own.teacher}-{own.count}")

    def scorer(self, task: str, arm: Arm) -> Path:
        return self.teacher(task) if arm.teacher == "teacher" else self.directory / task / arm.teacher

    def run(self, task: str, arm: Arm, seed: int) -> Path:
        return self.directory / task / f"runs-{seed}" / arm.key()

    def result(self, path: Path, work: Callable, *args) -> dict:
        """What the work gives, when it is done; `path` is the directory that it makes."""
        with self.lock:
            if path not in self.futures:
                self.futures[path] = self.pool.submit(once, path.with_name(f"{path.name}.json"), work, *args)
        return self.futures[path].result()

    def cell(self, task: str, arm: Arm, seed: int) -> None:
        """One run, after the models and the table that it needs."""
        teacher, scorer = self.teacher(task), self.scorer(task, arm)
        if teacher.parent != QUICKSTART:
            self.result(teacher, build_teacher, task, teacher)
        if scorer != teacher:
            self.result(scorer, build_teacher, OTHERS[arm.teacher], scorer, teacher)
        student = self.student(task, replace(arm, more_answers=0), seed)
        answers = arm.sft_answers or TASKS[task].sft_answers
        self.result(student, build_student, task, teacher, student, seed, answers, TASKS[task].sft_steps)
        if arm.more_answers:
            first, student = student, self.student(task, arm, seed)
            self.result(student, build_more, task, teacher, scorer, first, student, seed, arm)
        table = self.table(task, arm, seed)
        own = self.result(table, build_table, task, arm.table(), teacher, scorer, student, table, seed)
        run = self.run(task, arm, seed)
        if arm.rows == "sft":
            self.result(run, train_sft, task, arm, teacher, run, seed)
        else:
            self.result(run, train, task, arm, teacher, student, table, own["tokens"], run, seed)

    def all(self, cells: list[tuple[str, Arm, int]]) -> None:
        """Runs all cells, about in their order. Those that wait for a model take no process meanwhile."""
        with ThreadPoolExecutor(4 * self.jobs) as threads:
            waiting = [threads.submit(self.cell, *cell) for cell in dict.fromkeys(cells)]
            try:
                for future in as_completed(waiting):
                    future.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self.pool.shutdown(cancel_futures=True)
                raise

    def point(self, task: str, line: Line, seed: int) -> dict:
        """What is known of a line: measurements, seconds in all, and the table that was read."""

        def result(path: Path) -> dict:
            return json.loads(path.with_name(f"{path.name}.json").read_text())

        student = result(self.student(task, line.arm, seed))
        table = result(self.table(task, line.arm, seed))
        if not line.step:
            return student["curve"]["0"] | {"table": table, "before": student["curve"]["0"]}
        run = result(self.run(task, line.arm, seed))
        point, table = run["curve"][str(line.step)], table | run.get("table", {})
        seconds = point["seconds"]
        if line.arm.rows == "sft":
            seconds -= student["seconds"]
        elif line.arm.rows != "online":
            seconds += table["sampling"] + table["scoring"]
        return point | {"seconds": seconds, "table": table, "before": student["curve"]["0"]}


# ---- Tables ----


def interval(values: list[float], digits: int, sign: str = "") -> str:
    """The mean over the seeds and the 95 % interval of its bootstrap."""
    values = np.array(values)
    means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{values.mean():{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def show(claim: Claim, task: str, work: Work, seeds: list[int], problems: str, console: Console) -> None:
    points = {line.name: [work.point(task, line, seed) for seed in seeds] for line in claim.lines}
    table = Table("", "accuracy", "difference", "reverse KL", "difference", "better", "seconds", "spread, clipped",
                  "the check says", title=f"{claim.title}: {task}, {problems} problems", box=MARKDOWN)  # fmt: skip
    for line in claim.lines:
        own = points[line.name]
        reference = points.get(claim.reference) or [{problems: point["before"][problems]} for point in own]
        cells = []
        for key, digits in (("accuracy", 3), ("reverse_kl", 2)):
            values = [point[problems][key] for point in own]
            differences = [v - r[problems][key] for v, r in zip(values, reference, strict=True)]
            cells += [interval(values, digits), interval(differences, digits, "+") if any(differences) else "–"]
        better = sum(
            p[problems]["reverse_kl"] < r[problems]["reverse_kl"] for p, r in zip(own, reference, strict=True)
        )
        cells.append(f"{better} of {len(seeds)}" if cells[-1] != "–" else "–")
        cells.append(f"{statistics.fmean(point['seconds'] for point in own):.0f}" if line.step else "–")
        spread, clipped = (statistics.fmean(point["table"][key] for point in own) for key in ("spread", "clipped"))
        cells.append(f"{spread:.2f}, {clipped:.2%}" if line.arm.rows not in ("online", "sft") else "–")
        cells.append("/".join(sorted({point["table"]["verdict"] for point in own})) if line.step else "–")
        table.add_row(line.name, *cells)
    table.caption = (
        f"Means over {len(seeds)} seeds and their bootstrap intervals; differences from: "
        f"{claim.reference or 'their SFT student'}. "
        "reverse KL: from the teacher, on fresh rollouts, nats a sequence. better: seeds with a lower one. "
        "seconds: sampling, scoring and training"
    )
    console.print(table)


def show_selection(claim: Claim, task: str, work: Work, seeds: list[int], console: Console) -> None:
    """How held-out rows order the runs of a seed, beside accuracy: Spearman's correlation with the reported one."""
    table = Table("held-out rows", "with accuracy", title=f"Which number selects: {task}", box=MARKDOWN)
    for name in (*SELECTORS, "accuracy on the problems to choose by"):
        rho = []
        for seed in seeds:
            points = [work.point(task, line, seed) for line in claim.lines if line.step]
            pairs = [[p["reported"]["accuracy"], p.get(name, p["choosing"]["accuracy"])] for p in points]
            rho.append(pd.DataFrame(pairs).corr("spearman").iloc[0, 1])
        table.add_row(name, interval(rho, 2, "+"))
    console.print(table)


def draw(work: Work, task: str, seeds: list[int], path: Path) -> None:
    """Accuracy against cost, for the first page."""
    lines = {line.name: line for line in online().lines}
    matplotlib.rcParams.update({"svg.hashsalt": "trl-lopd", "font.size": 11})
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()

    def add(names: list[str], label: str, color: str) -> None:
        points = [[work.point(task, lines[name], seed) for seed in seeds] for name in names]
        seconds = [statistics.fmean(p.get("seconds", 0.0) for p in own) for own in points]
        accuracy = [statistics.fmean(p["reported"]["accuracy"] for p in own) for own in points]
        axes.plot(seconds, accuracy, "o-", color=color, label=label, linewidth=2, markersize=7)

    best = [f"offline, beta {BEST:g}, {n} steps" for n in (150, 400, 600)]
    add(["SFT student", *best], "offline: teacher never loaded while training", "#1a7f5a")
    add(["SFT student", "online, TRL"], "online: TRL's DistillationTrainer", "#b3541e")
    axes.set(xlabel="CPU seconds, sampling and scoring included", ylabel="accuracy, held-out problems")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tables", nargs="+", default=list(CLAIMS), choices=list(CLAIMS))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="where a table has them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, of one thread each")
    parser.add_argument("--directory", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--figure", type=Path, help="SVG of the table `online`, of the last task, to write")
    a = parser.parse_args()
    work, console = Work(a.directory, a.jobs), Console(width=200)
    claims = [(table, claim) for table in a.tables for claim in CLAIMS[table]]
    if a.tasks and not any(set(a.tasks) & set(claim.tasks) for _, claim in claims):
        parser.error(f"none of {a.tables} has {a.tasks}")
    for table, claim in claims:
        tasks = [task for task in claim.tasks if task in (a.tasks or claim.tasks)]
        work.all([(task, arm, seed) for seed in a.seeds for task in tasks for arm in claim.arms])
        for task in tasks:
            for problems in ("choosing", "reported") if table == "divergences" else ("reported",):
                show(claim, task, work, a.seeds, problems, console)
            if table == "divergences":
                show_selection(claim, task, work, a.seeds, console)
    if a.figure:
        draw(work, (a.tasks or online().tasks)[-1], a.seeds, a.figure)
    work.pool.shutdown()


if __name__ == "__main__":
    main()
