"""From a teacher's answers to a second round, every artifact through a Hub and back; `test_chain.py` runs it."""

from __future__ import annotations

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_lopd import (
    OfflineOPDConfig,
    OfflineOPDTrainer,
    TeacherStampCallback,
    collect_rollouts,
    generate_sft_data,
    load_table,
    score_rollouts,
    stamp_dataset_card,
)
from trl_lopd.cli import main

# A space between prompt and answer, which TRL puts together as texts.
PROMPTS = ["w5 w6 ", "w7 ", "w8 w9 w10 ", "w11 "] * 4


class WaitForPush(TrainerCallback):
    """The upload of a folder runs beside the training, which writes the next checkpoint's card into that folder."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, *args, **kwargs):
        self.trainer.push_in_progress.wait_until_done()


def common(output_dir: str, hub_id: str) -> dict:
    return {
        "output_dir": output_dir, "hub_model_id": hub_id, "use_cpu": True, "report_to": "none", "bf16": False,
        "disable_tqdm": True, "per_device_train_batch_size": 4, "max_steps": 2, "activation_checkpointing": False,
        "save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_strategy": "every_save",
        "hub_always_push": True,
    }  # fmt: skip


def fine_tune(teacher: str, base: str, out: str) -> None:
    """TRL's trainer on the teacher's answers, packed, with checkpoints and pushes while it trains."""
    generate_sft_data(PROMPTS, teacher, max_completion_length=6, truncated="keep").push_to_hub("tester/answers")
    answers = load_dataset("tester/answers", split="train")
    args = SFTConfig(**common(out, "tester/student-sft"), packing=True, max_length=32, learning_rate=1e-3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    trainer = SFTTrainer(
        model, args, train_dataset=answers.select_columns(["prompt", "completion"]), processing_class=tokenizer
    )
    trainer.add_callback(TeacherStampCallback(trainer, answers))
    trainer.add_callback(WaitForPush(trainer))
    trainer.train()
    trainer.push_to_hub()


def distill(student: str, teacher: str, out: str, round: int) -> None:
    rollouts = collect_rollouts(PROMPTS, student, max_completion_length=6, seed=round)
    table = score_rollouts(rollouts, teacher, top_k=2)
    table.push_to_hub(f"tester/table-{round}")
    stamp_dataset_card(f"tester/table-{round}", table)
    args = OfflineOPDConfig(**common(out, f"tester/student-opd-{round}"), learning_rate=1e-3)
    trainer = OfflineOPDTrainer(student, args, train_dataset=load_table(f"tester/table-{round}", split="train"))
    print(f"round {round}:", trainer.rows.trained.verdict.evidence, trainer.rows.trained.verdict.rows)
    trainer.add_callback(WaitForPush(trainer))
    trainer.train()
    trainer.push_to_hub()


if __name__ == "__main__":
    teacher, base, out = sys.argv[1:]
    fine_tune(teacher, base, f"{out}/sft")
    distill("tester/student-sft", teacher, f"{out}/opd-1", 1)
    distill("tester/student-opd-1", teacher, f"{out}/opd-2", 2)
    assert main(["stamp", "tester/student-opd-2", "--sft_teacher", teacher, "--replace"]) == 0
    assert main(["inspect", "tester/student-sft", "datasets/tester/table-1"]) == 0
    assert main(["inspect", "tester/student-opd-2", "datasets/tester/table-1"]) == 1
    # A reader who knows nothing of cards.
    plain = load_dataset("tester/table-1", split="train")
    OfflineOPDTrainer("tester/student-sft", OfflineOPDConfig(**common(f"{out}/plain", "tester/x")), plain)
