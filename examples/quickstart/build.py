"""
Rebuilds the quickstart from nothing: a teacher, an SFT student, and its rollouts scored by the teacher.

    python examples/quickstart/build.py

The task is *claims* of `tasks.py`: an answer says first which of two numbers it will be, then adds up the digits of
both, then says which it is. The teacher learns from problems without end. The smaller student is fine-tuned on 3,000
of the teacher's answers, and its claims are often wrong. Then it answers new problems once, and the teacher scores
those answers once: that table is what `examples/train.py` trains on. Another teacher, which is as good and writes
otherwise, scores some of them too, to show what its scores do.
"""

import json
import random
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tasks import CHARACTERS, TASKS, Task
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trl_lopd import (
    TeacherStampCallback,
    collect_rollouts,
    generate_sft_data,
    score_rollouts,
    stamp_dataset_card,
)

BATCH_SIZE = 64
# The same problems, written down otherwise.
OTHER_WAYS = {"addition": "addition, in order", "claims": "claims, turned"}


@dataclass
class Arguments:
    output_dir: str = str(Path(__file__).parent)
    task: str = field(default="claims", metadata={"choices": [*TASKS]})
    other_task: str | None = field(
        default=None,
        metadata={
            "help": "Task of a teacher that writes otherwise and also scores; `''` is none.",
            "choices": [*OTHER_WAYS.values(), ""],
        },
    )
    seed: int = 0
    teacher: str | None = None  # a teacher built before, to reuse
    teacher_steps: int | None = None  # the task's
    sft_answers: int | None = None
    sft_steps: int | None = None
    rollouts: int = 3_000
    other_rollouts: int = 600  # that the other teacher scores
    held_out_rollouts: int = 200
    top_k: int = 4


def make_problems(task: Task, rng: random.Random, count: int, exclude: set[str]) -> list[str]:
    """Distinct problems, none of them in `exclude`, to which they are added."""
    problems = []
    while len(problems) < count:
        problem = task.make_problem(rng)
        if problem not in exclude:
            exclude.add(problem)
            problems.append(problem)
    return problems


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=5 * hidden // 2,
            num_hidden_layers=layers,
            num_attention_heads=4,
            head_dim=32,  # one for which serving engines have kernels, also on a CPU
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def fine_tune(model, tokenizer, rows: Dataset | list[dict], output_dir: Path, steps: int, seed: int) -> None:
    """TRL's SFT on `prompt_ids` and `completion_ids`; what a teacher wrote stamps the model that learns from it.

    Prompts are learnt, too, and what is not `learnt` is only read.
    """
    dataset = Dataset.from_list(
        [
            {
                "input_ids": row["prompt_ids"] + row["completion_ids"],
                "completion_mask": [1] * len(row["prompt_ids"]) + row.get("learnt", [1] * len(row["completion_ids"])),
            }
            for row in rows
        ]
    )
    args = SFTConfig(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.1,
        adam_beta2=0.98,
        logging_steps=100,
        disable_tqdm=True,
        save_strategy="no",
        completion_only_loss=True,  # without it, `SFTTrainer` ignores the mask
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        max_length=None,
        seed=seed,
    )
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    if isinstance(rows, Dataset):
        trainer.add_callback(TeacherStampCallback(trainer, rows))
    trainer.train()
    trainer.save_model()
    (output_dir / "training_args.bin").unlink()


def write_gold(task: Task, problem: str, rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> dict:
    """A row of gold data; slips, in brackets, are read and not learnt."""
    completion_ids, learnt = [], []
    for i, piece in enumerate(re.split(r"[\[\]]", task.write_working(problem, rng))):
        ids = tokenizer(piece)["input_ids"]
        completion_ids += ids
        learnt += [1 - i % 2] * len(ids)
    return {
        "prompt_ids": tokenizer(problem)["input_ids"],
        "completion_ids": completion_ids + [tokenizer.eos_token_id],
        "learnt": learnt + [1],
    }


def make_teacher(
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    steps: int,
    exclude: set[str],
    seed: int = 1,
    model: LlamaForCausalLM | None = None,
) -> LlamaForCausalLM:
    """Learns from new problems at every step, none of them in `exclude`; `model` is one to train on."""
    rng, gold = random.Random(seed), []
    while len(gold) < steps * BATCH_SIZE:
        problem = task.make_problem(rng)
        if problem not in exclude:
            gold.append(write_gold(task, problem, rng, tokenizer))
    model = model or make_model(tokenizer, seed=seed, hidden=96, layers=4)
    fine_tune(model, tokenizer, gold, path, steps, seed=seed)
    return model


def make_other_teacher(
    task: Task, tokenizer: PreTrainedTokenizerFast, path: Path, problems: dict[str, list[str]], least: float
) -> list[float]:
    """Another teacher, which learns on until its accuracy is `least`. Returns the accuracy after each round."""
    exclude, rounds = {*problems["reported"], *problems["choosing"]}, []
    model = make_teacher(task, tokenizer, path, task.teacher_steps, exclude, seed=2)
    while True:
        rounds.append(accuracy(task, str(path), problems["choosing"]))
        if rounds[-1] >= least:
            return rounds
        if len(rounds) == 5:
            raise RuntimeError(f"The other teacher is not as good: {rounds}, and {least:.3f} is wanted.")
        make_teacher(task, tokenizer, path, 400, exclude, seed=2 + len(rounds), model=model)


def accuracy(task: Task, model: str, problems: list[str]) -> float:
    rollouts = collect_rollouts(
        problems, model, temperature=0, max_completion_length=task.max_answer_tokens, batch_size=500
    )
    answers = [completion.rpartition("#")[2] for completion in rollouts["completion"]]
    return sum(a == task.solve(p) for p, a in zip(problems, answers, strict=True)) / len(problems)


def draw_problems(task: Task, seed: int, sft_answers: int, rollouts: int, held_out: int = 400) -> dict[str, list[str]]:
    """Distinct problems: to report by and to choose settings by, the same for every seed, and to learn from."""
    seen: set[str] = set()
    shared, own = random.Random(2026), random.Random(seed)
    return {
        "reported": make_problems(task, shared, held_out, seen),
        "choosing": make_problems(task, shared, held_out, seen),
        "sft": make_problems(task, own, sft_answers, seen),
        "rollouts": make_problems(task, own, rollouts, seen),
    }


def answer(task: Task, teacher: str, problems: list[str], seed: int) -> Dataset:
    """A teacher's answers, to fine-tune on."""
    sampling = dict(max_completion_length=task.max_answer_tokens, batch_size=500, rows_per_shard=4096, seed=seed)
    # Answers that were cut are learnt as they are, token by token: `fine_tune` ends none of them.
    return generate_sft_data(problems, teacher, truncated="keep", **sampling)


def make_student(
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    teacher: str,
    problems: list[str],
    path: Path,
    steps: int,
    seed: int,
) -> LlamaForCausalLM:
    """Fine-tunes a new student on the teacher's answers to `problems`."""
    answers = answer(task, teacher, problems, seed)
    model = make_model(tokenizer, seed=seed + 2, hidden=64, layers=4)
    fine_tune(model, tokenizer, answers, path, steps, seed=seed)
    return model


def write_problems(task: Task, problems: list[str], path: Path) -> None:
    with open(path, "w") as file:
        for problem in problems:
            file.write(json.dumps({"prompt": problem, "answer": task.solve(problem)}) + "\n")


def write_table(splits: dict[str, Dataset], path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        rows.to_parquet(path / f"{split}.parquet")
    stamp_dataset_card(path, splits)


def main(args: Arguments) -> None:
    start = time.perf_counter()

    def say(message: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {message}", flush=True)

    out = Path(args.output_dir)
    task, tokenizer = TASKS[args.task], make_tokenizer()
    other_task = OTHER_WAYS.get(args.task) if args.other_task is None else args.other_task
    if other_task and TASKS[other_task].make_problem is not task.make_problem:
        raise SystemExit(f"`--other_task {other_task}` is not about the problems of {args.task!r}.")
    if other_task and args.other_rollouts > args.rollouts:
        raise SystemExit(f"Another teacher cannot score {args.other_rollouts} of {args.rollouts} rollouts.")
    problems = draw_problems(
        task, args.seed, args.sft_answers or task.sft_answers, args.rollouts + args.held_out_rollouts
    )
    reported = problems["reported"]

    teacher = args.teacher or str(out / "teacher")
    exclude = {problem for some in problems.values() for problem in some}
    if args.teacher is None:
        model = make_teacher(task, tokenizer, Path(teacher), args.teacher_steps or task.teacher_steps, exclude)
        say(f"teacher: {model.num_parameters():,} parameters, accuracy {accuracy(task, teacher, reported):.3f}")

    student = str(out / "student")
    steps = args.sft_steps or task.sft_steps
    model = make_student(task, tokenizer, teacher, problems["sft"], Path(student), steps, args.seed)
    say(f"SFT student: {model.num_parameters():,} parameters, accuracy {accuracy(task, student, reported):.3f}")

    rollouts = collect_rollouts(
        problems["rollouts"],
        student,
        temperature=0.8,
        max_completion_length=task.max_answer_tokens,
        batch_size=500,
        seed=args.seed,
        ref_logprobs=False,
    )
    rollouts = rollouts.select_columns(["prompt_ids", "completion_ids", "student_fingerprint"])
    table = score_rollouts(rollouts, teacher, top_k=args.top_k, ref_model=student)
    test = range(args.rollouts, len(table))
    write_table({"train": table.select(range(args.rollouts)), "test": table.select(test)}, out / "table")
    say(f"table: {len(table)} scored rollouts")

    if other_task:
        with tempfile.TemporaryDirectory() as directory:
            other = Path(directory) / "other-teacher"
            least = accuracy(task, teacher, problems["choosing"]) - 0.02
            rounds = make_other_teacher(TASKS[other_task], tokenizer, other, problems, least)
            say(f"another teacher, in {len(rounds)} rounds: accuracy {accuracy(task, str(other), reported):.3f}")
            some = rollouts.select(range(args.other_rollouts))
            table = score_rollouts(some, str(other), top_k=args.top_k)
        write_table({"train": table}, out / "other-teacher-table")
    write_problems(task, reported, out / "prompts.jsonl")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
