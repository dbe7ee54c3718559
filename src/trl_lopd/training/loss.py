"""The objective on a batch: the forward pass, the loss and the totals for metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..table.schema import RESIDUAL
from .config import OfflineOPDConfig
from .experts import aux_loss_coef, check_gradient
from .head import Targets, TokenOutput
from .objective import (
    OF_PROBABILITIES,
    TokenValues,
    divergence_topk,
    reverse_kl_topk,
    sampled_loss,
    sequence_totals,
    teacher_support,
    token_weights,
)


@dataclass(frozen=True)
class Objective:
    """
    Loss on the rows of a table.

    Args:
        loss_type (`str`): `"topk"` or `"sampled"`, see [`objective`].
        args ([`OfflineOPDConfig`]): Arguments with `advantage_clip`, `ratio_clip` and `loss_aggregation`.
        vocab_size (`int`): Vocabulary size of the student.
        aux_loss_coef (`float`, *optional*, defaults to `0.0`): Weight of the load-balancing loss in training, see
            [`~experts.aux_loss_coef`].
    """

    loss_type: str
    args: OfflineOPDConfig
    vocab_size: int
    aux_loss_coef: float = 0.0

    @classmethod
    def of(cls, model, loss_type: str, args: OfflineOPDConfig) -> Objective:
        """
        Creates the objective for a student.

        Raises:
            ValueError: If `args.router_aux_loss_coef` is set for a model without a load-balancing loss.
        """
        return cls(loss_type, args, model.config.get_text_config().vocab_size, aux_loss_coef(args, model))

    def num_items(self, batch: dict[str, Tensor]) -> int:
        """Returns the number of items that the loss of a batch is the mean over: sequences or trained tokens."""
        return len(batch["truncated"] if self.args.loss_aggregation == "sequence_mean" else batch["labels"])

    def divergence(self, logprobs: Tensor, tail: Tensor, teacher_logprobs: Tensor, distinct: Tensor) -> Tensor:
        """Returns the loss per token of `"topk"`. Override it to try another divergence; see
        [`~objective.divergence_topk`] for the shapes."""
        return divergence_topk(logprobs, tail, teacher_logprobs, distinct, self.args.beta)

    def __call__(
        self, model: torch.nn.Module, batch: dict[str, Tensor], num_items: Tensor | int
    ) -> tuple[TokenOutput, dict[str, Tensor]]:
        """
        Computes the share of a batch in a loss over `num_items` sequences or tokens.

        In training, the load-balancing loss of the batch is added, times its weight and the batch's share of the
        items.

        Args:
            model ([`~torch.nn.Module`]): Model patched by [`~head.add_distillation_head`].
            batch (`dict`): Output of [`~collator.OfflineOPDCollator`].
            num_items (`Tensor` or `int`): Number of items in all micro-batches, accumulation steps and processes.

        Returns:
            [`~head.TokenOutput`] and the totals that the metrics are computed from, one value per sequence: see
            [`~objective.sequence_totals`].
        """
        labels, ref = batch["labels"], batch.get("ref_logprobs")
        is_residual = RESIDUAL in batch
        teacher = batch[RESIDUAL if is_residual else "teacher_logprobs"]
        sequences, num_sequences = batch["sequences"], len(batch["truncated"])
        topk_ids, topk_logprobs = batch.get("teacher_topk_ids"), batch.get("teacher_topk_logprobs")
        has_topk = topk_ids is not None
        if not has_topk:
            topk_ids, topk_logprobs = labels.new_empty((len(labels), 0)), teacher.new_empty((len(labels), 0))
        ids, support, distinct = teacher_support(topk_ids, topk_logprobs, labels, teacher, self.vocab_size)

        def loss(logprobs: Tensor, tail: Tensor, tokens: slice) -> Tensor:
            if self.loss_type == "topk":
                return self.divergence(logprobs, tail, support[tokens], distinct[tokens])
            return sampled_loss(
                logprobs[:, -1],
                teacher[tokens],
                advantage_clip=self.args.advantage_clip,
                ref_logprobs=None if ref is None else ref[tokens],
                ratio_clip=self.args.ratio_clip,
            )

        weights = token_weights(sequences, num_sequences, self.args.loss_aggregation, num_items)
        if "weights" in batch:
            weights = weights * batch["weights"][sequences]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        if self.aux_loss_coef and torch.is_grad_enabled():
            inputs["output_router_logits"] = True
        out = model(**inputs, targets=Targets(batch["positions"], ids, distinct, weights, loss))
        with torch.no_grad():
            kl = agreement = None
            if has_topk:
                kl = reverse_kl_topk(out.support_logprobs, out.tail_logprobs, support, distinct)
                teacher_top1 = topk_ids.gather(-1, topk_logprobs.argmax(-1, keepdim=True)).squeeze(-1)
                agreement = out.top1_ids == teacher_top1
            tokens = TokenValues(
                logprobs=out.support_logprobs[:, -1],
                teacher_logprobs=teacher,
                per_token_loss=out.per_token,
                entropy=out.entropy,
                is_top1=out.top1_ids == labels,
                ref_logprobs=ref,
                reverse_kl=kl,
                top1_agreement=agreement,
            )
            totals = sequence_totals(tokens, sequences, num_sequences, self.args.advantage_clip)
            if is_residual:  # a residual is no probability, so these would not be what their names say
                for name in OF_PROBABILITIES:
                    totals.pop(name, None)
            totals["truncated"] = batch["truncated"].float()
        if out.aux_loss is not None:
            check_gradient(out.aux_loss)
            share = self.num_items(batch) / num_items
            out.loss = out.loss + self.aux_loss_coef * share * out.aux_loss.to(out.loss.device)
            items = totals["sequences" if self.args.loss_aggregation == "sequence_mean" else "tokens"]
            totals |= {"aux_loss": out.aux_loss.detach() * items, "aux_items": items}
        elif "output_router_logits" in inputs and self.args.router_aux_loss_coef:
            raise ValueError(
                f"`router_aux_loss_coef` is {self.aux_loss_coef}, but no layer of the model has a router that would "
                "be balanced. Leave it unset."
            )
        return out, totals
