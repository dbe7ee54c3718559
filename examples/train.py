"""
Trains a student on a table of scored rollouts, without its teacher, and evaluates it before and after.

Train the bundled quickstart student, in a few minutes on a CPU core:

    accelerate launch examples/train.py
    accelerate launch examples/train.py --compare

Train your own student on your own table (Hub ids or local paths). Options of `OfflineOPDConfig` are flags or in a YAML
file. Without a clone of the repository, `trl-lopd train` runs the same script:

    accelerate launch examples/train.py --model_name_or_path my-org/student-sft --dataset_name my-org/scored-rollouts \
        --output_dir student-opd --learning_rate 2e-6 --max_steps 150

It prints a line for each evaluation and a table; `-v`, or `TRL_LOPD_VERBOSE=1`, also shows messages of the libraries
it uses. With `--eval_prompts` (JSON lines with `prompt` and `answer`), it measures greedy accuracy before and after
training, and with `--teacher` also the reverse KL divergence on fresh rollouts.
"""

import logging
import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import transformers
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer, compare_models, load_benchmark, load_table
from trl_lopd.launch import refuse_unknown_options
from trl_lopd.models import config_of

QUICKSTART = Path(__file__).parent / "quickstart"


@dataclass
class TrainScriptArguments(ScriptArguments):
    compare: bool = field(
        default=False,
        metadata={
            "help": "Also train with the reverse KL divergence and with the paper's update, from the same start."
        },
    )
    other_teacher_dataset: str | None = field(
        default=None,
        metadata={"help": "Table scored by another teacher, for `--compare`: what overriding the check does."},
    )
    eval_prompts: str | None = field(
        default=None, metadata={"help": "JSON lines with `prompt` and `answer`: held-out problems to answer."}
    )
    answer_after: str = field(
        default="#", metadata={"help": "Marker of the answer, which is the text after the last one in a completion."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Teacher to measure the reverse KL divergence on fresh rollouts against."}
    )
    eval_max_completion_length: int = field(default=1024, metadata={"help": "Maximum length of an answer, in tokens."})
    verbose: bool = field(
        default=bool(os.environ.get("TRL_LOPD_VERBOSE")),
        metadata={"help": "Also show messages of the libraries.", "aliases": ["-v"]},
    )


def main(script_args: TrainScriptArguments, training_args: OfflineOPDConfig, model_args: ModelConfig) -> None:
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if script_args.teacher and not script_args.eval_prompts:
        raise SystemExit("`--teacher` is what models are compared with on `--eval_prompts`: give both, or neither.")
    # What is only needed at the end is looked for before training.
    problems = load_benchmark(script_args.eval_prompts) if script_args.eval_prompts else None
    trust_remote_code = training_args.model_init_kwargs.get("trust_remote_code", training_args.trust_remote_code)
    if script_args.teacher:
        try:
            config_of(script_args.teacher, {"trust_remote_code": trust_remote_code})
        except OSError as error:
            raise SystemExit(f"`--teacher {script_args.teacher}` cannot be read: {error}") from None
    defaults = vars(ModelConfig())
    changed = [name for name, value in vars(model_args).items() if "lora" in name and value != defaults[name]]
    if changed and not model_args.use_peft:
        raise SystemExit(f"`{'`, `'.join(changed)}` is for adapters, which are only trained with `--use_peft`.")
    train_table, eval_table = load_splits(script_args.dataset_name, script_args)
    if script_args.compare and "teacher_topk_ids" not in next(iter(train_table)):
        raise SystemExit("`--compare` needs a table with teacher top-k columns: score it with `top_k=8`.")
    if (training_args.resume_from_checkpoint or "").lower() == "true":
        training_args.resume_from_checkpoint = True
    # Evaluate at the start of `train`, because DeepSpeed has no engine before that.
    training_args.eval_on_start = eval_table is not None
    student = model_args.model_name_or_path
    models, held_out = {"SFT student": student}, {}

    def train(name: str, args: OfflineOPDConfig, table=train_table) -> OfflineOPDTrainer:
        if script_args.compare and args.distributed_state.is_main_process:
            print(f"Training: {name}", flush=True)
        trainer = OfflineOPDTrainer(
            model=student,
            args=args,
            train_dataset=table,
            eval_dataset=eval_table,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if eval_table is not None:
            held_out.setdefault("SFT student", trainer.state.log_history[0].get("eval_reverse_kl_topk"))
            held_out[name] = trainer.evaluate().get("eval_reverse_kl_topk")
        trainer.save_model(args.output_dir)
        trainer.save_state()
        trainer.accelerator.print(f"Model saved to {args.output_dir}")
        if args.push_to_hub:
            trainer.push_to_hub(dataset_name=script_args.dataset_name)
        models[name] = args.output_dir
        return trainer

    trainer = train("offline OPD", training_args)
    if script_args.compare:
        variants = {
            "reverse KL (beta=1)": {"loss_type": "topk", "beta": 1.0, "ratio_clip": None},
            "sampled, as in the paper": {"loss_type": "sampled", "beta": OfflineOPDConfig.beta, "ratio_clip": None},
        }
        for name, changes in variants.items():
            train(f"offline OPD, {name}", variant(training_args, name, **changes))
        if script_args.other_teacher_dataset is not None:
            table, _ = load_splits(script_args.other_teacher_dataset, script_args)
            train(
                "offline OPD, another teacher's scores",
                variant(training_args, "another teacher", teacher_consistency="off"),
                table,
            )

    if problems is not None:
        unset_hf_deepspeed_config()  # otherwise ZeRO-3 would shard these models too
        compare_models(
            models | ({"teacher": script_args.teacher} if script_args.teacher else {}),
            problems,
            training_args.output_dir,
            name=Path(script_args.eval_prompts).stem,
            answer_after=script_args.answer_after,
            teacher=script_args.teacher,
            held_out=held_out,
            revisions={"SFT student": training_args.model_init_kwargs["revision"]},
            trust_remote_code=trust_remote_code,
            max_completion_length=script_args.eval_max_completion_length,
        )
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def variant(args: OfflineOPDConfig, name: str, **changes) -> OfflineOPDConfig:
    """The arguments of a run that is only compared with."""
    output_dir = f"{args.output_dir}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"
    alone = {"push_to_hub": False, "resume_from_checkpoint": None}
    return replace(args, output_dir=output_dir, **alone, **changes)


def load_splits(name: str, script_args: ScriptArguments):
    """Loads a table and, if there is one, its held-out split, from the Hub, a directory or a parquet file."""
    table = load_table(name, script_args.dataset_config, streaming=script_args.dataset_streaming)
    splits = table if isinstance(table, dict) else {str(table.split or "train"): table}
    if script_args.dataset_train_split not in splits:
        raise SystemExit(
            f"{name} has no split {script_args.dataset_train_split!r}, only {sorted(splits)}: set "
            "`--dataset_train_split`."
        )
    held_out = script_args.dataset_test_split
    if held_out not in splits and held_out != ScriptArguments.dataset_test_split:
        raise SystemExit(f"{name} has no split {held_out!r}, only {sorted(splits)}: set `--dataset_test_split`.")
    return splits[script_args.dataset_train_split], splits.get(held_out)


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser((TrainScriptArguments, OfflineOPDConfig, ModelConfig), prog=prog)


def with_quickstart(flags: list[str]) -> list[str]:
    """Adds the flags of the bundled quickstart if neither a model nor a table is given."""
    names = {flag.partition("=")[0] for flag in flags}
    required = {"--model_name_or_path", "--dataset_name"}
    if names & {"--config", "-h", "--help"} or names >= required:
        return flags
    if names & required or not QUICKSTART.is_dir():
        raise SystemExit(
            "Give both `--model_name_or_path` and `--dataset_name`"
            + (", or neither for the quickstart." if QUICKSTART.is_dir() else ", as flags or in a YAML file.")
        )
    print("No model and no table given: training the bundled quickstart student.")
    paths = {"model_name_or_path": "student", "dataset_name": "table", "teacher": "teacher"}
    paths |= {"eval_prompts": "prompts.jsonl", "other_teacher_dataset": "other-teacher-table"}
    defaults = [word for option, path in paths.items() for word in (f"--{option}", str(QUICKSTART / path))]
    return ["--config", str(QUICKSTART.with_suffix(".yaml")), *defaults, *flags]


def hide_what_libraries_say() -> None:
    """Hides progress bars of short operations, and DeepSpeed's message that there is no GPU."""
    datasets.disable_progress_bars()  # `evaluate_model` reads this setting too
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())


if __name__ == "__main__":
    flags = with_quickstart(sys.argv[1:])
    if not {"-v", "--verbose"} & {*flags} and not TrainScriptArguments.verbose:
        hide_what_libraries_say()
    *parsed, of_config, stray = make_parser().parse_args_and_config(
        flags, return_remaining_strings=True, separate_remaining_strings=True
    )
    try:
        refuse_unknown_options([*of_config, *stray])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if stray:  # `accelerate launch` does not read what comes after the script
        raise SystemExit(
            f"{' '.join(stray)!r} would be ignored: it belongs to no option of this script. Options of `accelerate "
            "launch` go before the script; `trl-lopd train` takes both."
        )
    main(*parsed)
