"""Prompts, texts or conversations: their checks, and their token ids."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import re
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


@functools.cache  # warns once per model
def warn_of_texts(name: str) -> None:
    """Warns that prompts are texts although the model has a chat template."""
    logger.warning(
        f"{name} has a chat template, and the prompts are texts, which the model gets without the chat template. If "
        'it is a chat model, give each prompt as messages, `[{"role": "user", "content": text}]`; `--as_chat` does '
        "that on the command line, and `as_chat=True` in `load_benchmark`."
    )


def as_dataset(
    prompts: Dataset | Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]
) -> Dataset:
    """
    Converts prompts to a dataset, and checks each of them before any answer is sampled.

    Raises:
        TypeError: If `prompts` is a single conversation or a list of rows.
        ValueError: If there are no prompts, or one is empty or neither a text nor a list of messages.
    """
    if not isinstance(prompts, list | tuple):
        if isinstance(prompts, str):
            raise TypeError(
                f"`prompts` is one text, {prompts!r:.80}: give a list of prompts, `[prompts]`, or a `Dataset`, which "
                "`datasets.load_dataset` reads from a file."
            )
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
        raise ValueError("There are no prompts to answer. Check the file, filter or split that they come from.")
    kinds = set()
    # A row may have a template of its own.
    has_own = isinstance(prompts, Dataset) and "chat_template_kwargs" in prompts.column_names
    of_rows = prompts["chat_template_kwargs"] if has_own else None
    has_template = tokenizer.chat_template or chat_template_kwargs.get("chat_template") or has_own
    for i, prompt in enumerate(values):
        messages = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
        if not isinstance(prompt, str) and not messages:
            raise ValueError(
                f"Prompt {i} is neither a text nor a list of messages with `role` and `content`: {prompt!r:.200}."
            )
        kinds.add(type(prompt))
        if len(kinds) > 1:
            raise ValueError(
                f"Prompt {i} is {'a text' if not messages else 'a list of messages'}, those before it are not."
            )
        if messages and not has_template:
            raise ValueError(
                f"Prompt {i} is a list of messages, and {tokenizer.name_or_path or 'the tokenizer'} has no chat "
                "template to render it. Give a tokenizer that has one (`processing_class`), `chat_template_kwargs` "
                "with a `chat_template`, or prompts that are texts."
            )
        if messages and any(m.get("content") is None and m["role"] != "assistant" for m in prompt):
            raise ValueError(f"Prompt {i} has a message without `content`: {prompt!r:.200}.")
        texts = [m.get("content") for m in prompt] if messages else [prompt]
        is_blank = not any(text.strip() if isinstance(text, str) else text for text in texts)
        # Encoding every prompt would take long, and only blank ones may have no tokens.
        if i == 0 or is_blank:
            row = {"prompt": [prompt], "chat_template_kwargs": [of_rows[i] if has_own else None]}
            if len(prompt) == 0 or not encode_prompts(row, tokenizer, **chat_template_kwargs)[0]:
                raise ValueError(f"Prompt {i} is empty: the first answer token would have no context. Drop it.")
    _check_template_kwargs(tokenizer, chat_template_kwargs, messages)
    if not isinstance(prompts, Dataset):
        return Dataset.from_dict({"prompt": prompts})
    if messages and "tools" in prompts.column_names:
        _check_tools(prompts, tokenizer, chat_template_kwargs)
    return prompts


def continues_answers(prompts: Dataset) -> bool:
    """Returns whether some of the prompts end with a turn of the assistant, which the answer continues."""
    messages = (prompt for prompt in prompts.select_columns("prompt")["prompt"] if not isinstance(prompt, str))
    return any(prompt[-1]["role"] == "assistant" for prompt in messages)


def _check_template_kwargs(
    tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any], messages: bool
) -> None:
    if chat_template_kwargs and not messages:
        raise ValueError(
            f"`chat_template_kwargs`, {', '.join(chat_template_kwargs)}, are for prompts that are lists of messages; "
            "these are texts, which no template renders."
        )
    options = inspect.signature(tokenizer.apply_chat_template).parameters
    template = chat_template_kwargs.get("chat_template", tokenizer.chat_template)
    for name in chat_template_kwargs:
        if name not in options and isinstance(template, str) and not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"`chat_template_kwargs` has {name!r}, which the chat template of "
                f"{tokenizer.name_or_path or 'the tokenizer'} never reads: it would change nothing."
            )


def _check_tools(prompts: Dataset, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]) -> None:
    rendered = False
    for i, row in enumerate(prompts.select_columns(["prompt", "tools"])):
        try:
            tools = read_tools(row["tools"])
        except ValueError as error:
            raise ValueError(f"Prompt {i}: {error}.") from None
        if tools and not rendered:
            args = (row["prompt"], tokenizer)
            rendered = encode_prompt(*args, tools, **chat_template_kwargs) != encode_prompt(
                *args, **chat_template_kwargs
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
    Encodes prompts up to the position at which the answer begins.

    Args:
        rows (`dict` of columns): `prompt`, texts or lists of messages, and optionally, as in TRL's trainers, columns
            for the chat template: `tools` (a list of schemas or its JSON) and `chat_template_kwargs`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        **chat_template_kwargs: Arguments for the chat template of every prompt. They override those of a row.
    """
    prompts = rows["prompt"]
    tools, kwargs = (rows.get(name) or [None] * len(prompts) for name in TEMPLATE_COLUMNS)
    return [
        encode_prompt(prompt, tokenizer, read_tools(row_tools), **{**(row_kwargs or {}), **chat_template_kwargs})
        for prompt, row_tools, row_kwargs in zip(prompts, tools, kwargs, strict=True)
    ]


def encode_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]] | None = None,
    **chat_template_kwargs: Any,
) -> list[int]:
    """Encodes a text, or messages with the chat template up to the position at which the answer begins. If the last
    message is the assistant's, the answer continues it."""
    if not is_conversational({"prompt": prompt}):
        return tokenizer(prompt, add_special_tokens=True)["input_ids"]
    continues = prompt[-1]["role"] == "assistant"
    kwargs = {"tools": tools, "add_generation_prompt": not continues, "continue_final_message": continues}
    return tokenizer.apply_chat_template(
        prompt, tokenize=True, return_dict=True, **{**kwargs, **chat_template_kwargs}
    )["input_ids"]


def read_tools(value: list[dict[str, Any]] | str | None) -> list[dict[str, Any]] | None:
    """
    Returns the tools of a prompt from the value of a `tools` column; `None` if there are none.

    Raises:
        ValueError: If the value is neither a list of schemas nor its JSON.
    """
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        tools = value
    if not (tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))):
        raise ValueError(f"`tools` is a list of JSON schemas, or its JSON, not {value!r:.80}")
    # With an empty list, some chat templates write that there are tools.
    return tools or None
