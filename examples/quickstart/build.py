"""
Rebuilds the quickstart from nothing: a teacher, an SFT student, and its rollouts scored by the teacher.

    python examples/quickstart/build.py

The task is addition of numbers of 2 to 5 digits with the working written out. There are many right ways to write a
working, and the teacher, which learns from problems without end, learns them all: it has entropy. The smaller student
is fine-tuned on 3,000 of the teacher's answers and generalises only partly. Then it answers new problems once, and the
teacher scores those answers once: that table is what `examples/train.py` trains on.
"""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
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

SEPARATORS = ",;|/"
MIN_DIGITS, MAX_DIGITS = 2, 5
BATCH_SIZE = 64
MAX_ANSWER_TOKENS = 56  # the longest right one has 50


@dataclass
class Arguments:
    output_dir: str = str(Path(__file__).parent)
    seed: int = 0
    teacher: str | None = None  # a teacher built before, to reuse
    teacher_steps: int = 850
    sft_answers: int = 3_000
    sft_steps: int = 1_000
    rollouts: int = 3_000
    held_out_rollouts: int = 200
    eval_prompts: int = 400
    top_k: int = 4


def make_problem(rng: random.Random) -> str:
    """`123+45=`: the longer number has 2 to 5 digits, the other 2 to as many, in either order."""
    longer = rng.randint(MIN_DIGITS, MAX_DIGITS)
    numbers = [rng.randint(10 ** (d - 1), 10**d - 1) for d in (longer, rng.randint(MIN_DIGITS, longer))]
    rng.shuffle(numbers)
    return f"{numbers[0]}+{numbers[1]}="


def make_problems(rng: random.Random, count: int, exclude: set[str]) -> list[str]:
    """Distinct problems, none of them in `exclude`, to which they are added."""
    problems = []
    while len(problems) < count:
        problem = make_problem(rng)
        if problem not in exclude:
            exclude.add(problem)
            problems.append(problem)
    return problems


def solve(problem: str) -> str:
    a, b = problem.rstrip("=").split("+")
    return str(int(a) + int(b))


def write_working(problem: str, rng: random.Random) -> str:
    """`58+67=` becomes `8+7=15;6+5+1=12#125`: columns from the right with their carries, then the answer.

    The order of a column's digits and the mark between columns are drawn at random.
    """
    a, b = problem.rstrip("=").split("+")
    width = max(len(a), len(b))
    columns, carry = [], 0
    for digits in zip(reversed(a.zfill(width)), reversed(b.zfill(width)), strict=True):
        x, y = rng.sample(digits, 2)
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}" + ("+1" if carry else "") + f"={total}")
        carry = total // 10
    working = columns[0] + "".join(rng.choice(SEPARATORS) + column for column in columns[1:])
    return f"{working}#{solve(problem)}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+=#", *SEPARATORS])}
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
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def fine_tune(model, tokenizer, rows: Dataset | list[dict], output_dir: Path, steps: int, seed: int) -> None:
    """TRL's SFT on `prompt_ids` and `completion_ids`; what a teacher wrote stamps the model that learns from it."""
    dataset = Dataset.from_list(
        [
            {
                "input_ids": row["prompt_ids"] + row["completion_ids"],
                "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"]),
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


def make_teacher(
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
        problem = make_problem(rng)
        if problem not in exclude:
            completion = tokenizer(write_working(problem, rng))["input_ids"] + [tokenizer.eos_token_id]
            gold.append({"prompt_ids": tokenizer(problem)["input_ids"], "completion_ids": completion})
    model = model or make_model(tokenizer, seed=seed, hidden=96, layers=4)
    fine_tune(model, tokenizer, gold, path, steps, seed=seed)
    return model


def accuracy(model: str, problems: list[str]) -> float:
    rollouts = collect_rollouts(
        problems, model, temperature=0, max_completion_length=MAX_ANSWER_TOKENS, batch_size=500
    )
    return sum(c.rpartition("#")[2] == solve(p) for p, c in zip(problems, rollouts["completion"], strict=True)) / len(
        problems
    )


def main(args: Arguments) -> None:
    start = time.perf_counter()

    def say(message: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {message}", flush=True)

    out = Path(args.output_dir)
    tokenizer = make_tokenizer()
    seen: set[str] = set()
    # Held-out problems are the same for every seed.
    eval_problems = make_problems(random.Random(2026), args.eval_prompts, seen)
    rng = random.Random(args.seed)
    sft_problems = make_problems(rng, args.sft_answers, seen)
    opd_problems = make_problems(rng, args.rollouts + args.held_out_rollouts, seen)

    teacher = args.teacher or str(out / "teacher")
    if args.teacher is None:
        model = make_teacher(tokenizer, Path(teacher), args.teacher_steps, seen)
        say(f"teacher: {model.num_parameters():,} parameters, accuracy {accuracy(teacher, eval_problems):.3f}")

    sampling = dict(max_completion_length=MAX_ANSWER_TOKENS, batch_size=500, rows_per_shard=4096, seed=args.seed)
    # Answers that were cut are learnt as they are, token by token: `fine_tune` ends none of them.
    answers = generate_sft_data(sft_problems, teacher, truncated="keep", **sampling)
    student = str(out / "student")
    model = make_model(tokenizer, seed=args.seed + 2, hidden=64, layers=4)
    fine_tune(model, tokenizer, answers, Path(student), args.sft_steps, seed=args.seed)
    say(f"SFT student: {model.num_parameters():,} parameters, accuracy {accuracy(student, eval_problems):.3f}")

    rollouts = collect_rollouts(opd_problems, student, temperature=0.8, ref_logprobs=False, **sampling)
    rollouts = rollouts.select_columns(["prompt_ids", "completion_ids", "student_fingerprint"])
    table = score_rollouts(rollouts, teacher, top_k=args.top_k, ref_model=student)
    (out / "table").mkdir(parents=True, exist_ok=True)
    splits = {
        "train": table.select(range(args.rollouts)),
        "test": table.select(range(args.rollouts, len(table))),
    }
    for split, rows in splits.items():
        rows.to_parquet(out / "table" / f"{split}.parquet")
    stamp_dataset_card(out / "table", splits)
    say(f"table: {len(table)} scored rollouts")
    with open(out / "prompts.jsonl", "w") as file:
        for problem in eval_problems:
            file.write(json.dumps({"prompt": problem, "answer": solve(problem)}) + "\n")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
