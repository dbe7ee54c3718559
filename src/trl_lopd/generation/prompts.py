"""Prompts: texts or conversations, checked before hours are spent on them, and their token ids."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl.data_utils import is_conversational

from ..table.schema import refuse_no_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, Any]]

# Columns of the prompts that the chat template reads, as in TRL.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


@functools.cache  # once for each model
def warn_of_texts(name: str) -> None:
    logger.warning(
        f"{name} has a chat template, and the prompts are texts, which are not put through it: the model gets them as "
        'they stand. If it is a chat model, give each prompt as messages, `[{"role": "user", "content": text}]`; '
        "`--as_chat` does that on the command line, and `as_chat=True` in `load_benchmark`."
    )


def as_dataset(
    prompts: Dataset | Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]
) -> Dataset:
    """The prompts, each of them something that can be answered: what is wrong shows before hours are spent."""
    if not isinstance(prompts, list | tuple):
        refuse_no_dataset(prompts, "prompts")
    elif prompts and isinstance(prompts[0], dict):
        raise TypeError(
            "`prompts` is one conversation: give a list of such lists."
            if "role" in prompts[0]
            else "`prompts` is a list of rows: give a `Dataset`, such as `Dataset.from_list(prompts)`."
        )
    if isinstance(prompts, Dataset):
        if "prompt" not in prompts.column_names:
            raise ValueError(
                f"The dataset has no `prompt` column, only {prompts.column_names}. Rename yours to `prompt`."
            )
        values: Iterable[Any] = prompts.select_columns("prompt")["prompt"]
    else:
        values = prompts = list(prompts)
    if len(prompts) == 0:
        raise ValueError("There are no prompts to answer.")
    kinds = set()
    for i, prompt in enumerate(values):
        messages = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
        if not isinstance(prompt, str) and not messages:
            raise ValueError(
                f"Prompt {i} is neither a text nor a list of messages with `role` and `content`: {prompt!r:.200}."
            )
        kinds.add(type(prompt))
        if len(kinds) > 1:
            raise ValueError(
                f"Prompt {i} is {'a text' if not messages else 'a list of messages'}, the others are not."
            )
        if messages and any(m.get("content") is None and m["role"] != "assistant" for m in prompt):
            raise ValueError(f"Prompt {i} has a message without `content`: {prompt!r:.200}.")
        # Long ones have tokens in any tokenizer.
        if i == 0 or len(prompt) == 0 or (not messages and not prompt.strip()):
            if len(prompt) == 0 or not encode_prompt(prompt, tokenizer, **chat_template_kwargs):
                raise ValueError(f"Prompt {i} is empty: the first answer token would have no context.")
    if not isinstance(prompts, Dataset):
        return Dataset.from_dict({"prompt": prompts})
    if messages and "tools" in prompts.column_names:
        _check_tools(prompts, tokenizer, chat_template_kwargs)
    return prompts


def continues_answers(prompts: Dataset) -> bool:
    """Whether some of the prompts end with a turn of the assistant, which the answer continues."""
    messages = (prompt for prompt in prompts.select_columns("prompt")["prompt"] if not isinstance(prompt, str))
    return any(prompt[-1]["role"] == "assistant" for prompt in messages)


def _check_tools(prompts: Dataset, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]) -> None:
    rendered = False
    for i, row in enumerate(prompts.select_columns(["prompt", "tools"])):
        try:
            tools = read_tools(row["tools"])
        except ValueError as error:
            raise ValueError(f"Prompt {i}: {error}.") from None
        if tools and not rendered:
            given = (row["prompt"], tokenizer)
            rendered = encode_prompt(*given, tools, **chat_template_kwargs) != encode_prompt(
                *given, **chat_template_kwargs
            )
            if not rendered:
                raise ValueError(
                    f"Prompt {i} has `tools`, which the chat template does not render: the model would not see them. "
                    "Remove the column, or give a tokenizer whose chat template has tools."
                )


def encode_prompts(
    rows: Mapping[str, Sequence], tokenizer: PreTrainedTokenizerBase, **chat_template_kwargs: Any
) -> list[list[int]]:
    """
    Token ids of prompts up to where the answer begins.

    Args:
        rows (`dict` of columns): `prompt`, texts or lists of messages, and, for the chat template, as TRL's trainers
            read them, `tools` (a list of schemas or its JSON) and `chat_template_kwargs`, if there are such columns.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        **chat_template_kwargs: For the chat template of every prompt; they come before those of a row.
    """
    prompts = rows["prompt"]
    tools, kwargs = (rows.get(name) or [None] * len(prompts) for name in TEMPLATE_COLUMNS)
    return [
        encode_prompt(prompt, tokenizer, read_tools(of_row), **{**(of_template or {}), **chat_template_kwargs})
        for prompt, of_row, of_template in zip(prompts, tools, kwargs, strict=True)
    ]


def encode_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]] | None = None,
    **chat_template_kwargs: Any,
) -> list[int]:
    """Token ids of a text, or of messages through the chat template up to where the answer begins, or goes on if the
    last message is the assistant's."""
    if not is_conversational({"prompt": prompt}):
        return tokenizer(prompt, add_special_tokens=True)["input_ids"]
    goes_on = prompt[-1]["role"] == "assistant"
    kwargs = {"tools": tools, "add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    return tokenizer.apply_chat_template(
        prompt, tokenize=True, return_dict=True, **{**kwargs, **chat_template_kwargs}
    )["input_ids"]


def read_tools(value: list[dict[str, Any]] | str | None) -> list[dict[str, Any]] | None:
    """
    The tools of a prompt, from the value of a `tools` column; `None` if there are none.

    Raises:
        ValueError: If it is no list of schemas, nor its JSON.
    """
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        tools = value
    if not (tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))):
        raise ValueError(f"`tools` is a list of JSON schemas, or its JSON, not {value!r:.80}")
    # Some templates announce tools for an empty list.
    return tools or None
