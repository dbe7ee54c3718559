"""What the trainer overrides of transformers, and is not public there, against the installed version."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from trl_lopd import OfflineOPDTrainer

PRIVATE = {
    *("_get_dataloader", "_remove_unused_columns", "_get_collator_with_removed_columns", "_get_train_sampler"),
    *("_get_eval_sampler", "_inner_training_loop", "_run_epoch", "_load_optimizer_and_scheduler", "_prepare_input"),
    *("_get_num_items_in_batch", "_track_num_input_tokens", "_push_from_checkpoint"),
}


def test_private_methods_of_trainer_are_those_that_are_known():
    own = {name for name, value in vars(OfflineOPDTrainer).items() if inspect.isfunction(value)}
    overridden = {name for name in own if name.startswith("_") and hasattr(Trainer, name)} - {"__init__"}
    assert overridden == PRIVATE
    # A helper of ours that transformers comes to have would be called by it.
    assert {name for name in own if name.startswith("_") and name not in PRIVATE} == {
        "__init__", "_advise_fresh_rollouts", "_forward", "_try_once",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_they_take_what_transformers_gives_them(name):
    theirs, ours = (inspect.signature(getattr(kind, name)) for kind in (Trainer, OfflineOPDTrainer))
    for given in (theirs.parameters, [p for p in theirs.parameters.values() if p.default is p.empty]):
        ours.bind(*given)
