"""Chat prompts are rendered as TRL renders them: tools, arguments of the template, and an answer to be continued."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from tiny import make_model, make_tokenizer
from trl import SFTConfig, SFTTrainer
from trl.data_utils import apply_chat_template

from trl_lopd import RewardGate, cli, collect_rollouts, generate_sft_data, load_table

# A turn ends with w4; tools are listed at the top, by name.
TEMPLATE = (
    "{% if tools %}w9 {% for t in tools %}{{ t['function']['name'] }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ 'w5' if m['role'] == 'assistant' else 'w3' }} {{ m['content'] }} w4 {% endfor %}"
    "{% if add_generation_prompt %}w5 {{ 'w8' if thinking }}{% endif %}"
)
USER = [{"role": "user", "content": "w20 w21"}]
BEGUN = [*USER, {"role": "assistant", "content": "w22 w23"}]


def tool(name):
    return {"type": "function", "function": {"name": name, "description": "w1", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return make_model(seed=2, scale=0.5)


def of_trl(tokenizer, example):
    """What TRL's trainers make of a prompt."""
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    given = {name: example[name] for name in ("prompt", "chat_template_kwargs") if example.get(name)}
    return tokenizer(apply_chat_template(given, tokenizer, tools)["prompt"], add_special_tokens=False)["input_ids"]


EXAMPLES = {
    "plain": {"prompt": USER},
    "tools": {"prompt": USER, "tools": [tool("w10"), tool("w11")]},
    "tools as JSON": {"prompt": USER, "tools": json.dumps([tool("w10")])},
    "no tools": {"prompt": USER, "tools": []},
    "begun": {"prompt": BEGUN},
    "begun, with tools": {"prompt": BEGUN, "tools": [tool("w10")]},
    "template": {"prompt": USER, "chat_template_kwargs": {"thinking": True}},
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_prompts_are_rendered_as_trl_does(model, tokenizer, case):
    rows = [EXAMPLES[case], EXAMPLES[case]]
    rollouts = collect_rollouts(Dataset.from_list(rows), model, processing_class=tokenizer, max_completion_length=3)
    expected = of_trl(tokenizer, EXAMPLES[case])
    assert rollouts["prompt_ids"] == [expected, expected]
    assert (9 in expected) == ("tools" in case and case != "no tools") and (8 in expected) == (case == "template")
    # One turn of the assistant, which is open.
    assert expected.count(5) == 1 and expected[-1] != 4
    assert set(rows[0]) <= set(rollouts.column_names)


def test_tools_may_differ_from_row_to_row(model, tokenizer):
    tools = [json.dumps([tool("w10")]), None, json.dumps([tool("w11"), tool("w12")])]
    prompts = Dataset.from_dict({"prompt": [USER] * 3, "tools": tools})
    rollouts = collect_rollouts(prompts, model, processing_class=tokenizer, max_completion_length=3, num_generations=2)
    expected = [of_trl(tokenizer, {"prompt": USER, "tools": value}) for value in tools for _ in range(2)]
    assert rollouts["prompt_ids"] == expected and len({tuple(ids) for ids in expected}) == 3


def test_arguments_of_a_call_come_before_those_of_a_row(model, tokenizer):
    prompts = Dataset.from_list([{"prompt": USER, "chat_template_kwargs": {"thinking": True}}])
    options = {"processing_class": tokenizer, "max_completion_length": 3}
    rollouts = collect_rollouts(prompts, model, chat_template_kwargs={"thinking": False}, **options)
    assert 8 not in rollouts["prompt_ids"][0]


@pytest.mark.parametrize("value", ["not JSON", '{"name": "w10"}', "3"])
def test_tools_that_are_none_name_the_prompt(model, tokenizer, value):
    prompts = Dataset.from_dict({"prompt": [USER] * 2, "tools": ["[]", value]})
    with pytest.raises(ValueError, match="Prompt 1.*`tools`.*JSON"):
        collect_rollouts(prompts, model, processing_class=tokenizer, max_completion_length=3)


def test_a_template_without_tools_is_told(model):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    prompts = Dataset.from_list([EXAMPLES["tools"]])
    with pytest.raises(ValueError, match="Prompt 0 has `tools`, which the chat template does not render"):
        collect_rollouts(prompts, model, processing_class=tokenizer, max_completion_length=3)


def test_a_message_of_nothing_is_refused_before_sampling(model):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    prompts = [USER, [{"role": "user", "content": ""}]]
    with pytest.raises(ValueError, match="Prompt 1 is empty.* Drop it"):
        collect_rollouts(prompts, model, processing_class=tokenizer, max_completion_length=3)


def test_messages_need_a_template(model):
    options = {"processing_class": make_tokenizer(), "max_completion_length": 3}
    with pytest.raises(ValueError, match="Prompt 0 is a list of messages, and .* has no chat template"):
        collect_rollouts([USER], model, **options)
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    rollouts = collect_rollouts([USER], model, chat_template_kwargs={"chat_template": template}, **options)
    assert rollouts["prompt_ids"] == [[20, 21]]
    rows = Dataset.from_list([{"prompt": USER, "chat_template_kwargs": {"chat_template": template}}])
    assert collect_rollouts(rows, model, **options)["prompt_ids"] == [[20, 21]]
    with pytest.raises(ValueError, match="has no chat template"):
        collect_rollouts([USER], model, chat_template_kwargs={"chat_template": None}, **options)


def test_template_arguments_that_change_nothing_are_told(model, tokenizer):
    options = {"processing_class": tokenizer, "max_completion_length": 3}
    with pytest.raises(ValueError, match="'thinkng', which the chat template .* never reads"):
        collect_rollouts([USER], model, chat_template_kwargs={"thinkng": True}, **options)
    with pytest.raises(ValueError, match="thinking, are for prompts that are lists of messages"):
        collect_rollouts(["w5 w6"], model, chat_template_kwargs={"thinking": True}, **options)


def test_what_continues_an_answer_is_taught_as_its_continuation(tmp_path, model, tokenizer):
    """`SFTTrainer` would render prompt and completion as two turns of the assistant."""
    data = generate_sft_data(
        [BEGUN] * 20, model, processing_class=tokenizer, temperature=2.0, max_completion_length=20
    )
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None, max_steps=1)
    trainer = SFTTrainer(make_model(seed=5), args, train_dataset=data, processing_class=tokenizer)
    assert set(data["finish_reason"]) == {"stop"}
    for row, prepared in zip(data, trainer.train_dataset, strict=True):
        assert row["prompt_ids"] == of_trl(tokenizer, {"prompt": BEGUN})
        assert prepared["input_ids"] == row["prompt_ids"] + row["completion_ids"]
        assert prepared["labels"] == [-100] * len(row["prompt_ids"]) + row["completion_ids"]


def test_the_command_line_keeps_tools_with_their_prompts(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    Dataset.from_list([EXAMPLES["tools as JSON"]] * 2).to_parquet(tmp_path / "prompts.parquet")
    flags = ["--model_name_or_path", tmp_path / "student", "--dataset_name", tmp_path / "prompts.parquet"]
    flags += ["--output_dir", tmp_path / "out", "--max_completion_length", 3]
    assert cli.main(["rollout", *map(str, flags)]) == 0
    assert load_table(tmp_path / "out")["prompt_ids"] == [of_trl(tokenizer, EXAMPLES["tools as JSON"])] * 2


def test_a_gate_of_rewards_renders_them_too(model, tokenizer):
    class Trainer:
        processing_class = tokenizer

        class accelerator:
            num_processes, process_index = 1, 0

    seen = []
    prompts = Dataset.from_list([EXAMPLES["tools as JSON"], EXAMPLES["tools as JSON"]])
    sample = model.generate
    try:
        model.generate = lambda *args, input_ids, **kwargs: (seen.append(input_ids), sample(input_ids, **kwargs))[1]
        RewardGate(Trainer, prompts, lambda completions, **_: [0.0] * len(completions), max_completion_length=2)(model)
    finally:
        del model.generate
    assert [of_trl(tokenizer, EXAMPLES["tools as JSON"])] * 2 in [ids.tolist() for ids in seen]
