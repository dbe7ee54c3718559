"""Packing of several rows into one sequence, and checks that a model keeps such rows separate."""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.utils.generic import is_flash_attention_requested

from ..generation.teachers import only_attends
from ..own_logits import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..table.schema import TableRows

logger = logging.getLogger(__name__)

# Attention implementations for which transformers builds a mask from `position_ids`. Flash attention needs no mask.
_MASKED = ("eager", "sdpa", "flex_attention")


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """
    Packs rows, longest first, each into the fullest pack that has room for it.

    It needs at most 11/9 of the optimal number of packs, plus 1. The packs depend on the lengths only.

    Args:
        lengths (`(rows,)` int): Number of tokens of each row, at least 1.
        capacity (`int`): Maximum number of tokens in a pack.

    Returns:
        `list[np.ndarray]`: Indices of the rows in each pack. Each row is in one pack.

    Raises:
        ValueError: If a row is longer than `capacity`.
    """
    if lengths.max(initial=0) > capacity:
        raise ValueError(f"A row of {lengths.max()} tokens does not fit into packs of {capacity}.")
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # packs by their remaining room
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
        if remaining := room - length:
            if remaining not in open_packs:
                open_packs[remaining] = []
                insort(rooms, remaining)
            open_packs[remaining].append(pack)
    return [np.array(pack) for pack in packs]


class PackedRows:
    """
    Map-style torch dataset of packs. Its items are lists of rows, which are read from the table when needed.

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
    Checks that the architecture and the attention implementation of a model keep sequences in one row separate.

    Warns if the attention implementation builds a dense mask for that. Reads no weights; [`check_boundaries`] tests
    the model itself.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, without adapters.

    Raises:
        ValueError: If the architecture or the attention implementation is not known to keep them separate.
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
    Checks that the logits of a sequence do not depend on the sequence before it in the same row.

    It makes two forward passes of 16 tokens. All processes must call it together, so it works on sharded models. This
    finds models that build their masks without `position_ids`, which their configs do not tell.

    Args:
        model ([`~torch.nn.Module`]): The model as it is trained.
        vocab_size (`int`): Vocabulary size of the model.
        device ([`torch.device`]): Device of its inputs.

    Raises:
        ValueError: If the logits depend on it.
    """
    first, other, second = torch.randint(vocab_size, (3, 8), generator=torch.Generator().manual_seed(0)).to(device)
    position_ids = torch.arange(8, device=device).repeat(1, 2)
    with evaluating(model):
        logits, logits_after_other = (
            model(input_ids=ids[None], position_ids=position_ids, use_cache=False).logits[:, 8:]
            for ids in (torch.cat([first, second]), torch.cat([other, second]))
        )
    change = (logits - logits_after_other).float().norm() / logits.float().norm()
    # The logits are equal bit for bit, except if experts process all tokens together: then rounding changes them, by a
    # percent in bfloat16. Attention across a boundary changes them much more.
    if change > 0.05:
        raise ValueError(
            f"`padding_free` and `packing` put several rows into one sequence, and this model mixes them: other "
            f"tokens in the row before change the logits of a row by {change:.0%}. {_REMEDY}"
        )
