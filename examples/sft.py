"""
Fine-tunes a student on SFT data that its teacher wrote, with TRL's `SFTTrainer`, and stamps it with that teacher.

    trl-lopd rollout --role teacher --model_name_or_path my-org/teacher --dataset_name my-org/prompts \
        --output_dir sft-data
    accelerate launch examples/sft.py --model_name_or_path my-org/base --dataset_name sft-data --output_dir student-sft

Options of `SFTConfig` are flags or in a YAML file (`--config`); without a GPU, add `--use_cpu true`. The student is
trained on the tokens that the teacher sampled, so both must have the same tokenizer.
"""

from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_lopd import TeacherStampCallback, load_table


def as_tokens(row: dict) -> dict:
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}


def main(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    if training_args.completion_only_loss is None:
        # `SFTTrainer` learns the prompts of tokens, too, where it is not told.
        training_args.completion_only_loss = True
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    data = load_table(script_args.dataset_name, script_args.dataset_config, split=script_args.dataset_train_split)
    with training_args.main_process_first():
        # `SFTTrainer` leaves out rows whose prompts fill `max_length`: the stamp goes by these columns of the others.
        others = {*data.column_names} - {"prompt_ids", "completion_ids", "teacher_fingerprint", "teacher_id"}
        tokens = data.map(as_tokens, remove_columns=[*others], desc="Joining prompts and completions")
    trainer = SFTTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=tokens,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.add_callback(TeacherStampCallback(trainer, data))
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if (resume or "").lower() == "true" else resume)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config())
