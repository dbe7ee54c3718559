"""Behavioural probes: is the model behind a server the teacher that a card names?

The weights of a served or quantized teacher cannot be hashed, but its answers can be compared. A card holds the
log-probabilities that the teacher, loaded locally, gave to a few fixed sequences; the server is asked for the same.
A match is evidence between a hash of the weights (`verified`) and a person's word (`declared`).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import is_peft_model

from ..own_logits import TrialRow, evaluating, own_logprobs
from .fingerprint import content_id, with_evidence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Stored with every answer: a change in what is asked must never be compared with answers to the old questions.
PROBE_VERSION = 1

# Nats by which repeats of a probe may lie apart, and how often it is asked.
MAX_SPREAD = 0.3
PROBE_REPEATS = 4

_NUM_PROBES = 8
_HALF_LENGTH = 12


@dataclass(frozen=True)
class ProbeResult:
    """
    Verdict on a server. Figures are in nats, over the scored tokens of all probes.

    Args:
        accepted (`bool`): Whether it is taken for the teacher.
        teacher (`str` or `None`): Id of the teacher with the suffix `#probed`; `None` if refused.
        mean (`float`): Mean absolute difference to the card, over all repeats.
        max (`float`): Largest absolute difference to the card.
        spread (`float`): How far repeats of one probe lie apart: largest minus smallest answer, mean over its tokens;
            that of the worst probe.
        reason (`str`): The verdict in a sentence, with the figures; what to do if it is a refusal.
    """

    accepted: bool
    teacher: str | None
    mean: float
    max: float
    spread: float
    reason: str


def probe_sequences(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """
    The probes of a tokenizer: 8 sequences of 24 token ids, the second half of each a copy of its first.

    The first half is drawn by SHA-256 from the ids of the vocabulary, without special and added tokens, which many
    models never saw in training. Random tokens surprise a model, repeated ones do not: a model is compared on both.
    Tokenizers with the same ids get the same probes, whatever the machine and the versions of libraries.

    Raises:
        `ValueError`: if the vocabulary holds special and added tokens only.
    """
    vocabulary = set(tokenizer.get_vocab().values())
    ids = sorted(vocabulary - set(tokenizer.get_added_vocab().values()) - set(tokenizer.all_special_ids))
    if not ids:
        raise ValueError("The tokenizer has no ordinary tokens to make probes from, only special and added ones.")

    def draw(probe: int, position: int) -> int:
        digest = hashlib.sha256(f"{PROBE_VERSION}:{probe}:{position}".encode()).digest()
        return ids[int.from_bytes(digest[:8], "big") % len(ids)]

    return [[draw(probe, position) for position in range(_HALF_LENGTH)] * 2 for probe in range(_NUM_PROBES)]


def probe_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    What a card stores of a teacher's behaviour: `{"version": 1, "sequences": [[ids]], "logprobs": [[nats]]}`.

    Log-probabilities are those of every token but the first, at temperature 1 over the full vocabulary, from a float32
    softmax over the model's logits, rounded to 4 decimals. The model is left in the mode, training or evaluation, in
    which it was.

    Args:
        model ([`~transformers.PreTrainedModel`]): A loaded model; a PEFT model is probed with its adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.

    Raises:
        `ValueError`: if the tokenizer has ids that the model has not, or if the model answers with NaN or infinity.
    """
    sequences = probe_sequences(tokenizer)
    vocab = model.config.get_text_config().vocab_size
    if (largest := max(map(max, sequences))) >= vocab:
        raise ValueError(
            f"The tokenizer has a token id {largest}, but the model's vocabulary has {vocab} tokens. They do not "
            "belong together."
        )
    # Adapters live in the layers of the model that PEFT wraps.
    inner = model.get_base_model() if is_peft_model(model) else model
    device = inner.get_input_embeddings().weight.device
    with evaluating(model):
        rows = [TrialRow(np.array(sequence), len(sequence) - 1) for sequence in sequences]
        logprobs = np.array([own_logprobs(model, row, device).logprobs for row in rows], np.float64)
    if not np.isfinite(logprobs).all():
        raise ValueError(
            "The model answers its probes with NaN or infinity. Load it in another dtype, float32 or bfloat16."
        )
    return {"version": PROBE_VERSION, "sequences": sequences, "logprobs": logprobs.round(4).tolist()}


def probes_of_run(
    card: dict[str, Any], id: str, load: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any] | None:
    """
    The probes for the card of samples or scores: those that the card of a finished run has of this `id`, otherwise
    [`probe_model`] of the model. `None`, with a warning, if the model cannot be probed: the samples or scores, which
    took hours, are as good without.
    """
    if known := [entry for entry in probed_entries(card) if content_id(entry["id"]) == content_id(id)]:
        return known[0]["probes"]
    model = load()
    try:
        return probe_model(model, tokenizer)
    except Exception as error:
        logger.warning(f"A served copy of this teacher will have no probes to be held against: {error}")
        return None


def verify_served_teacher(
    client: Any,
    card: dict[str, Any],
    tolerance: float = 0.6,
    *,
    max_spread: float = MAX_SPREAD,
    repeats: int = PROBE_REPEATS,
) -> ProbeResult:
    """
    Ask a server the probes of the teachers that a card names, and compare the answers.

    It is accepted if the mean absolute difference to the closest teacher is at most `tolerance`, the largest at most
    ten times that, and the spread of repeated answers at most `max_spread`.

    It tells a teacher from another model and from a proper fine-tune of itself, but not from a neighbouring checkpoint
    of the same run. A server is judged by these requests only: replicas to which none of them went stay unseen.
    docs/teacher-consistency.md has the measurements behind the defaults, and when to choose others.

    Args:
        client ([`VLLMServer`] or [`SGLangServer`]): A teacher behind HTTP.
        card (`dict`): A card's record. Entries in `teachers` (dataset card) or `sft_teachers` (model card) that have
            `probes` (see [`probe_model`]) are compared; the closest is reported.
        tolerance (`float`, *optional*, defaults to `0.6`): Mean absolute difference allowed, nats.
        max_spread (`float`, *optional*, defaults to `0.3`): Spread of repeats allowed, nats.
        repeats (`int`, *optional*, defaults to `4`): How often each probe is sent. The repeats of a probe go out
            together, each as a request of its own, so that a balancer deals them to different replicas.

    Raises:
        `ValueError`: if the card has no probes, or probes of another version or malformed ones; if the server answers
            with -inf; if an option is out of range.
        `ServerError`: if the server does not answer, or with anything but scores of these tokens.
    """
    if not (tolerance > 0 and max_spread > 0 and repeats >= 2):
        raise ValueError(
            f"`tolerance` and `max_spread` are positive and `repeats` is 2 or more; got {tolerance}, {max_spread} and "
            f"{repeats}."
        )
    answers: dict[tuple[int, ...], np.ndarray] = {}
    figures = []
    # A dict first: teachers whose probes are malformed are to be told before the server is asked.
    for teacher, probes in dict(_probed_teachers(card)).items():
        differences, spreads = [], []
        for sequence, expected in zip(probes["sequences"], probes["logprobs"], strict=True):
            key = tuple(sequence)
            if key not in answers:
                # All repeats of a probe before the next probe: in rounds over all probes, two replicas in turn would
                # each get the same probes in every round, and never be seen to disagree.
                answers[key] = _ask(client, sequence, repeats)
            differences.append(np.abs(answers[key] - np.array(expected)))
            spreads.append(np.ptp(answers[key], axis=0).mean())
        all_differences = np.concatenate(differences, axis=1)
        figures.append((float(all_differences.mean()), float(all_differences.max()), float(max(spreads)), teacher))
    mean, largest, spread, teacher = min(figures)

    measured = (
        f"mean difference {mean:.3f} nats (limit {tolerance:g}), largest {largest:.3f} (limit {10 * tolerance:g}), "
        f"between repeats {spread:.3f} (limit {max_spread:g})"
    )
    accepted = mean <= tolerance and largest <= 10 * tolerance and spread <= max_spread
    if accepted:
        reason = f"The server answers the probes as {teacher} does: {measured}."
    elif spread > max_spread:
        reason = (
            f"The server disagrees with itself on probes of {teacher}: {measured}. Its replicas are different models "
            "or run in different precisions, or an answer depends on what else is in the batch. Serve one model in "
            "one precision, in a batch-invariant mode if the server has one, or score with the teacher loaded locally."
        )
    else:
        reason = (
            f"The server does not answer the probes as {teacher} does: {measured}. Serve that teacher. If you do, and "
            "its quantization alone moves it so far, give a larger `tolerance` knowingly."
        )
    return ProbeResult(accepted, with_evidence(teacher, "probed") if accepted else None, mean, largest, spread, reason)


def probed_entries(card: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a card's teachers that have probes, of a model card and of a dataset card alike."""
    # What `trl-lopd fingerprint --probes --json` prints is an entry by itself.
    entries = [card] if "probes" in card else [*(card.get("teachers") or ()), *(card.get("sft_teachers") or ())]
    return [entry for entry in entries if entry.get("probes")]


def _probed_teachers(card: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Id and probes of each teacher in a card that has probes; they are checked."""
    found = [(entry["id"], entry["probes"]) for entry in probed_entries(card)]
    if not found:
        raise ValueError(
            "The card has no probes of its teachers to compare the server with. Load the teacher locally once: "
            "`score_rollouts` stores its probes in the table's card, and `trl-lopd fingerprint --probes` prints them."
        )
    for teacher, probes in found:
        if probes.get("version") != PROBE_VERSION:
            raise ValueError(
                f"The card's probes of {teacher} are of version {probes.get('version')!r}, this library compares "
                f"version {PROBE_VERSION}. Make them again with `trl-lopd fingerprint --probes`."
            )
        sequences, logprobs = probes.get("sequences"), probes.get("logprobs")
        if not (
            sequences
            and logprobs
            and [len(sequence) - 1 for sequence in sequences] == [len(row) for row in logprobs]
            and all(math.isfinite(value) for row in logprobs for value in row)
        ):
            raise ValueError(
                f"The card's probes of {teacher} are malformed: they need a finite log-probability for every token "
                "but the first of every sequence. Make them again with `trl-lopd fingerprint --probes`."
            )
        yield teacher, probes


def _ask(client: Any, sequence: list[int], repeats: int) -> np.ndarray:
    """`(repeats, tokens)`: log-probabilities of every token but the first, from requests sent together."""
    scores = client.score([np.array(sequence)] * repeats, [len(sequence) - 1] * repeats, 0)
    answers = np.array([answer.logprobs for answer in scores], np.float64)
    if not np.isfinite(answers).all():
        token = int(np.isfinite(answers).all(axis=0).argmin()) + 1
        raise ValueError(
            f"The server answers a probe with -inf at token {token} of {sequence}: the model overflows there, or is "
            "not the teacher. Serve it in bfloat16."
        )
    return answers
