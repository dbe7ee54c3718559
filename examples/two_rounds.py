"""
Shows the effect of a second round. After a first round on the rollouts of the bundled quickstart, training continues
once on the same rollouts and once on fresh ones. It takes a few minutes on one CPU core:

    OMP_NUM_THREADS=1 python examples/two_rounds.py
"""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import TrlParser

from trl_lopd import (
    OfflineOPDConfig,
    OfflineOPDTrainer,
    collect_rollouts,
    evaluate_model,
    load_benchmark,
    load_table,
    score_rollouts,
)

QUICKSTART = Path(__file__).parent / "quickstart"
MAX_ANSWER_TOKENS = 34


@dataclass
class Arguments:
    output_dir: str = field(default="runs/two-rounds", metadata={"help": "Directory to write the students to."})
    steps: int = field(default=200, metadata={"help": "Number of steps in a round."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of both rounds."})
    seed: int = field(default=0, metadata={"help": "Seed of the order of rows and of the fresh rollouts."})


def main(args: Arguments) -> None:
    student, teacher = str(QUICKSTART / "student"), str(QUICKSTART / "teacher")
    problems = load_benchmark(QUICKSTART / "prompts.jsonl")
    rollouts = load_table(str(QUICKSTART / "table"))["train"]
    results = Table("model", "greedy accuracy", "reverse KL, fresh rollouts\n(nats a sequence)",
                    "effective sample size\nof the last 50 steps")  # fmt: skip

    def evaluate(name: str, model: str, ess: float | None = None) -> None:
        metrics = evaluate_model(
            model,
            problems,
            metric="exact_answer",
            teacher=teacher,
            temperature=0,
            max_completion_length=MAX_ANSWER_TOKENS,
            batch_size=256,
        )["metrics"]
        kl, se = metrics["reverse_kl"].values()
        weight = "–" if ess is None else f"{ess:.2f}"
        results.add_row(name, f"{metrics['exact_answer']['value']:.3f}", f"{kl:.2f} ± {se:.2f}", weight)

    def train(model: str, table, name: str) -> tuple[str, float]:
        config = OfflineOPDConfig(
            f"{args.output_dir}/{name}",
            learning_rate=args.learning_rate,
            max_steps=args.steps,
            per_device_train_batch_size=64,
            logging_steps=50,
            save_strategy="no",
            activation_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            seed=args.seed,
        )
        trainer = OfflineOPDTrainer(model, config, table)
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        weights = [log["importance_weight/ess"] for log in trainer.state.log_history if "importance_weight/ess" in log]
        return config.output_dir, weights[-1]

    evaluate("SFT student", student)
    first, ess = train(student, rollouts, "first")
    evaluate("first round", first, ess)
    evaluate("… and on, same rollouts", *train(first, rollouts, "same"))

    decode = AutoTokenizer.from_pretrained(student).decode
    prompts = [decode(ids) for ids in rollouts["prompt_ids"]]
    fresh = collect_rollouts(
        prompts, first, temperature=0.8, max_completion_length=MAX_ANSWER_TOKENS, batch_size=500, seed=args.seed
    )
    evaluate("… and on, fresh rollouts", *train(first, score_rollouts(fresh, teacher, top_k=4), "second"))
    Console(width=100).print(results)


if __name__ == "__main__":
    main(*TrlParser(Arguments).parse_args_and_config())
