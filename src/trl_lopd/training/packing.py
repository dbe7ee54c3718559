"""Rows that share a forward pass: which of them go together, and which models keep them apart."""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.utils.generic import is_flash_attention_requested

from ..generation.teachers import only_attends

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..table.schema import TableRows

logger = logging.getLogger(__name__)

# Attention implementations whose masks transformers builds from `position_ids`; flash attention needs none.
_MASKED = ("eager", "sdpa", "flex_attention")


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """
    Packs rows: longest first, each into the fullest pack that has room for it.

    Needs at most 11/9 of the fewest packs there can be, plus 1; the ones it needs depend on the lengths alone.

    Args:
        lengths (`(rows,)` int): Tokens of each row, each at least 1.
        capacity (`int`): The most tokens in a pack.

    Returns:
        `list[np.ndarray]`: Indices of the rows in each pack, each row in one.

    Raises:
        ValueError: for a row longer than `capacity`.
    """
    if lengths.max(initial=0) > capacity:
        raise ValueError(f"A row of {lengths.max()} tokens does not fit into packs of {capacity}.")
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # by the room left in them
    rooms: list[int] = []  # the keys of `open_packs`, ascending
    order = np.argsort(-lengths, kind="stable")
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            pack = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room], rooms[at]
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(row)
        if left := room - length:
            if left not in open_packs:
                open_packs[left] = []
                insort(rooms, left)
            open_packs[left].append(pack)
    return [np.array(pack) for pack in packs]


class PackedRows:
    """
    Packs of rows, as a map-style torch dataset whose items are lists of rows; the rows stay where they are.

    Args:
        rows ([`TableRows`]): The rows.
        packs (`list` of int arrays): Indices of the rows in each pack.
    """

    def __init__(self, rows: TableRows, packs: list[np.ndarray]):
        self.rows, self.packs = rows, packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, pack: int) -> list[dict[str, np.ndarray]]:
        return self.__getitems__([pack])[0]

    def __getitems__(self, packs: list[int]) -> list[list[dict[str, np.ndarray]]]:
        members = [self.packs[pack] for pack in packs]
        rows = iter(self.rows.__getitems__(np.concatenate(members).tolist()))
        return [[next(rows) for _ in pack] for pack in members]


_REMEDY = (
    "Leave `padding_free` and `packing` unset; `train_sampling_strategy='group_by_length'` and "
    "`max_tokens_per_device` save padding too."
)


def check_architecture(model: PreTrainedModel) -> None:
    """
    Refuses models that are known not to keep apart sequences which stand in one row, and warns where the attention
    builds a dense mask for that. Needs no weights. [`check_boundaries`] tries what this cannot know.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, without adapters.

    Raises:
        ValueError: for an architecture or an attention implementation that does not do it.
    """
    if not only_attends(model):
        raise ValueError(
            f"`padding_free` and `packing` put several rows into one sequence, which `{type(model).__name__}` would "
            "mix: that takes an architecture in which all layers are full or sliding-window attention, without a "
            "recurrent state, a convolution, chunks or the keys of another layer, and with rotary embeddings that do "
            f"not depend on the longest row. {_REMEDY}"
        )
    attention = model.config._attn_implementation
    if is_flash_attention_requested(model.config):
        return
    if attention not in _MASKED:
        raise ValueError(
            f"`padding_free` and `packing` put several rows into one sequence, and attention implementation "
            f"{attention!r} is not known to keep them apart. Load the model with `attn_implementation` "
            f"'flash_attention_2' or one of {_MASKED}. {_REMEDY}"
        )
    if attention != "flex_attention":
        logger.warning(
            f"Without padding, attention implementation {attention!r} computes a dense mask of tokens x tokens for a "
            "whole batch, which can cost more than padding does. Load the model with "
            "`attn_implementation='flash_attention_2'` (or another flash attention), or 'flex_attention'."
        )


@torch.no_grad()
def check_boundaries(model: torch.nn.Module, vocab_size: int, device: torch.device) -> None:
    """
    Tries whether a sequence changes when the one before it in the same row does.

    Two forward passes of 16 tokens, which all processes must make together, so they work on a model that is sharded.
    The model may build its masks without looking at `position_ids`, which nothing it declares would tell.

    Args:
        model ([`~torch.nn.Module`]): The model as it is trained.
        vocab_size (`int`): Token ids it knows.
        device ([`torch.device`]): Where its inputs go.

    Raises:
        ValueError: if it changes.
    """
    first, other, second = torch.randint(vocab_size, (3, 8), generator=torch.Generator().manual_seed(0)).to(device)
    position_ids = torch.arange(8, device=device).repeat(1, 2)
    training = model.training
    model.eval()
    beside, beside_other = (
        model(input_ids=torch.cat([before, second])[None], position_ids=position_ids, use_cache=False).logits[:, 8:]
        for before in (first, other)
    )
    model.train(training)
    change = (beside - beside_other).float().norm() / beside.float().norm()
    # Nothing changes, bit for bit, but where experts read all tokens together: then rounding does, in bfloat16 a
    # percent. What attention reads across a boundary changes logits by a good part of their size.
    if change > 0.05:
        raise ValueError(
            f"`padding_free` and `packing` put several rows into one sequence, and this model mixes them: other "
            f"tokens in the row before change the logits of a row by {change:.0%}. {_REMEDY}"
        )
