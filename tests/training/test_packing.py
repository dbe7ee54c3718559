"""Packs, boundaries between the rows of one, and that a step is the same however its rows are read."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
import transformers
from test_collator import random_rows
from tiny import make_args, make_tokenizer, make_trainer
from transformers import TrainerCallback

from trl_lopd import OfflineOPDTrainer, TableError
from trl_lopd.table.schema import TableRows
from trl_lopd.training.collator import OfflineOPDCollator
from trl_lopd.training.packing import PackedRows, best_fit_decreasing, check_architecture, check_boundaries

CPU = torch.device("cpu")


def fewest_packs(lengths, capacity):
    """By trying all ways to put each row into a pack there is, or a new one."""
    best = len(lengths)

    def place(i, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if i == len(lengths):
            best = len(rooms)
            return
        for room in {room for room in rooms if room >= lengths[i]}:
            j = rooms.index(room)
            place(i + 1, rooms[:j] + [room - lengths[i]] + rooms[j + 1 :])
        place(i + 1, rooms + [capacity - lengths[i]])

    place(0, [])
    return best


def assert_packed(packs, lengths, capacity):
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    assert all(lengths[pack].sum() <= capacity for pack in packs)


@pytest.mark.parametrize("seed", range(40))
def test_packs_are_few(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(4, 30))
    lengths = rng.integers(1, capacity + 1, 9)
    packs = best_fit_decreasing(lengths, capacity)
    assert_packed(packs, lengths, capacity)
    assert len(packs) <= 11 / 9 * fewest_packs(lengths.tolist(), capacity) + 1


@pytest.mark.parametrize("capacity", [512, 4096, 40_000])
def test_many_rows(capacity):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.2, 20_000).astype(int), 1, capacity)
    packs = best_fit_decreasing(lengths, capacity)
    assert_packed(packs, lengths, capacity)
    # No packing needs fewer than all tokens fill, or than there are rows of more than half a pack.
    least = max(-(-lengths.sum() // capacity), (lengths > capacity / 2).sum())
    assert len(packs) <= 11 / 9 * least + 1


def test_each_row_goes_where_the_least_room_is_left():
    packs = best_fit_decreasing(np.array([2, 6, 7, 3, 10, 1]), 10)
    assert [pack.tolist() for pack in packs] == [[4], [2, 3], [1, 0, 5]]


def test_a_row_that_fits_nowhere_is_an_error():
    with pytest.raises(ValueError, match="A row of 11 tokens does not fit into packs of 10"):
        best_fit_decreasing(np.array([3, 11]), 10)


def test_packed_rows_are_the_table_s(table):
    rows = TableRows(table)
    packed = PackedRows(rows, [np.array([5, 0]), np.array([3]), np.array([1, 2, 4])])
    assert len(packed) == 3
    for found, expected in zip(packed.__getitems__([2, 0]), ([1, 2, 4], [5, 0]), strict=True):
        assert [row["completion_ids"].tolist() for row in found] == table[expected]["completion_ids"]
    assert len(packed[1]) == 1 and packed[1][0]["prompt_ids"].tolist() == table[3]["prompt_ids"]


# ---- The same step ----

WAYS = {
    "padding_free": {"padding_free": True},
    "packing": {"packing": True, "max_length": 24},
    "budget": {"max_tokens_per_device": 40},
    "budget, padded to 8": {"max_tokens_per_device": 48, "pad_to_multiple_of": 8},
    "budget, padding_free": {"padding_free": True, "max_tokens_per_device": 20},
    "budget, packing": {"packing": True, "max_length": 24, "max_tokens_per_device": 30},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
}


def step_on_all_rows(trainer, accumulation=2):
    """Loss and gradients of one optimizer step, and the micro-batches that were read."""
    model, read = trainer.model, []

    def watch(model, args, inputs):
        if model.training:  # else it tries the boundaries
            read.append(inputs["input_ids"])

    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), accumulation, CPU)
    assert len(batches) == accumulation
    loss = sum(trainer.training_step(model, batch, count) for batch in batches)
    hook.remove()
    return loss, {name: p.grad for name, p in model.named_parameters()}, read


@pytest.fixture(scope="module")
def masked_table(table):
    """The rows, of which some tokens are not trained."""
    masks = [
        [(i + j) % 3 > 0 or len(ids) < 3 for j in range(len(ids))] for i, ids in enumerate(table["completion_ids"])
    ]
    return table.add_column("completion_mask", masks)


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [("topk", "sequence_mean"), pytest.param("sampled", "token_mean", marks=pytest.mark.slow)],
)
def test_a_step_is_the_same_however_its_rows_are_read(tmp_path, student_dir, masked_table, loss_type, aggregation):
    """
    The same sums in another order: each differs by a few units of float32 rounding, 6e-8 of the largest of its terms.
    A row or a token counted twice would change the loss and most gradients by a 24th or a 100th.
    """

    def step(**options):
        options = {"loss_type": loss_type, "loss_aggregation": aggregation, "max_completion_length": 9} | options
        if options.get("packing"):
            packs = len(make_trainer(tmp_path, student_dir, masked_table, **options).get_train_dataloader().dataset)
            size = -(-packs // 2)
        else:
            size = len(masked_table) // 2
        trainer = make_trainer(
            tmp_path, student_dir, masked_table, per_device_train_batch_size=size, gradient_accumulation_steps=2,
            **options,
        )  # fmt: skip
        return *step_on_all_rows(trainer), trainer.window.totals

    loss, grads, read, window = step()
    assert len(read) == 2 and max(p.abs().max() for p in grads.values()) > 0.1
    for way, options in WAYS.items():
        loss_2, grads_2, read_2, window_2 = step(**options)
        torch.testing.assert_close(loss_2, loss, atol=0, rtol=2e-6, msg=lambda m, w=way: f"{w}: {m}")
        for name, grad in grads.items():
            scale = float(grad.abs().max())
            torch.testing.assert_close(
                grads_2[name], grad, atol=4e-6 * scale, rtol=0, msg=lambda m, w=way, n=name: f"{w}: {n}: {m}"
            )
        for name in window.keys() - {"tokens_read", "tokens_padding"}:
            torch.testing.assert_close(window_2[name], window[name], atol=1e-4, rtol=1e-5)
        # And they were read in another way.
        limit = options.get("max_tokens_per_device")
        if limit is not None:
            assert len(read_2) > 2 and all(ids.numel() <= limit for ids in read_2)
        else:
            assert len(read_2) == 2
        if options.get("padding_free") or options.get("packing"):
            assert all(len(ids) == 1 for ids in read_2) and window_2["tokens_padding"] == 0
        assert not torch.equal(read[0], read_2[0])


def test_evaluation_is_the_same_without_padding_and_is_not_split(tmp_path, student_dir, table):
    options = dict(eval_dataset=table, per_device_eval_batch_size=10)
    padded = make_trainer(tmp_path, student_dir, table, **options).evaluate()
    for way in WAYS.values():
        trainer = make_trainer(tmp_path, student_dir, table, **options | way)
        found = trainer.evaluate()
        # 10, 10 and 4 rows at a time.
        assert [len(batch["truncated"]) for batch in trainer.get_eval_dataloader()] == [10, 10, 4]
        for name in ("eval_loss", "eval_huber", "eval_reverse_kl_topk", "eval_entropy", "eval_importance_weight/max"):
            assert found[name] == pytest.approx(padded[name], rel=1e-5), name


def test_packs_are_the_examples_and_are_shuffled(tmp_path, student_dir, table):
    trainer = make_trainer(tmp_path, student_dir, table, packing=True, max_length=30, per_device_train_batch_size=2)
    packs = trainer.get_train_dataloader().dataset.packs
    assert 2 < len(packs) < len(table) / 2
    loader, orders = trainer.get_train_dataloader(), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append([tuple(batch["input_ids"].flatten().tolist()) for batch in loader])
    assert len(orders[0]) == -(-len(packs) // 2) and orders[0] != orders[1]
    tokens = sum(map(len, table["prompt_ids"])) + sum(map(len, table["completion_ids"]))
    assert sum(map(len, orders[0])) == tokens
    trainer.train()
    assert trainer.state.epoch == pytest.approx(6 / len(orders[0]))


@pytest.mark.parametrize("way", [{}, *WAYS.values()], ids=["padded", *WAYS])
def test_the_share_of_padding_is_logged_over_the_window(tmp_path, student_dir, table, way):
    class Reads(TrainerCallback):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(logs)

    reads = Reads()
    options = dict(max_steps=3, logging_steps=3, include_num_input_tokens_seen="all") | way
    trainer = make_trainer(tmp_path, student_dir, table, callbacks=[reads], **options)
    seen = []

    def watch(model, args, inputs):
        if model.training:  # else it tries the boundaries
            seen.append((inputs["input_ids"], inputs.get("attention_mask")))

    trainer.model.register_forward_pre_hook(watch, with_kwargs=True)
    trainer.train()
    tokens = sum(ids.numel() for ids, _ in seen)
    padding = sum(int((mask == 0).sum()) for _, mask in seen if mask is not None)
    assert reads.logs[0]["padding"] == pytest.approx(padding / tokens, abs=1e-6)
    assert (padding > 0) == (not trainer.args.padding_free)
    assert trainer.state.num_input_tokens_seen == tokens and trainer.state.total_flos > 0


def test_grouping_by_length_saves_padding(tmp_path, student_dir, table):
    # With more rows to a batch, transformers' sampler finds 24 rows too few to group.
    def padding(**options):
        trainer = make_trainer(tmp_path, student_dir, table, per_device_train_batch_size=2, **options)
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        return sum(int((mask == 0).sum()) for mask in masks)

    assert padding(train_sampling_strategy="group_by_length") < padding()


# ---- Boundaries ----


def make(architecture, attention="sdpa", **options):
    options = {
        "vocab_size": 96, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.5,
    } | options  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    # Gemma 2 would not be made with `sdpa`, for a soft-capping that is not there.
    model.config._attn_implementation = attention
    return model


MODELS = {
    "Llama": {},
    "Qwen3": {},
    # Windows of 4 tokens, in every second layer.
    "Gemma2": {"sliding_window": 4, "attn_logit_softcapping": None},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", MODELS)
def test_rows_of_a_sequence_do_not_see_each_other(architecture, attention):
    model, rows = make(architecture, attention, **MODELS[architecture]), random_rows(6)
    check_architecture(model)
    check_boundaries(model, 96, CPU)
    batch = OfflineOPDCollator(pad_token_id=0, padding_free=True)(rows)
    names = ("input_ids", "position_ids")
    with torch.no_grad():
        together = model(**{name: batch[name] for name in names}, use_cache=False).logits[0]
        apart = [
            model(input_ids=torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]]), use_cache=False).logits[0]
            for row in rows
        ]
    # Logits of about 10, in float32, through two layers.
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Mamba", {}),
        ("Rwkv", {"attention_hidden_size": 16}),
        ("Lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
@pytest.mark.parametrize("way", [{"padding_free": True}, {"packing": True, "max_length": 64}])
def test_models_that_mix_rows_are_refused(tmp_path, table, architecture, options, way):
    args = make_args(tmp_path, teacher_consistency="off", **way)
    with pytest.raises(ValueError, match=f"{architecture}ForCausalLM.*would mix.*group_by_length"):
        OfflineOPDTrainer(make(architecture, "eager", **options), args, table, processing_class=make_tokenizer(96))


@pytest.mark.parametrize("start", ["train", "evaluate"])
def test_masks_that_ignore_positions_are_found_by_trying(tmp_path, table, start):
    model = make("OPT", ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64)
    check_architecture(model)
    args = make_args(tmp_path, teacher_consistency="off", padding_free=True)
    trainer = OfflineOPDTrainer(model, args, table, table, processing_class=make_tokenizer(96))
    with pytest.raises(ValueError, match="this model mixes them.*by [0-9]+%"):
        getattr(trainer, start)()
    assert trainer.state.global_step == 0


def test_an_unknown_attention_is_refused_and_a_dense_mask_warned_about(tmp_path, student_dir, table, caplog):
    model = make("Llama")
    with caplog.at_level(logging.WARNING):
        check_architecture(model)
    assert "'sdpa' computes a dense mask" in caplog.text
    caplog.clear()
    model.config._attn_implementation = "flash_attention_2"
    check_architecture(model)
    model.config._attn_implementation = "flex_attention"
    check_architecture(model)
    assert not caplog.records
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match="'paged|sdpa' is not known"):
        check_architecture(model)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"packing": True}, "`packing` needs `max_length`"),
        ({"packing": True, "max_length": 9, "train_sampling_strategy": "group_by_length"}, "with `packing` all"),
        ({"packing": True, "max_length": 9, "pad_to_multiple_of": 8}, "`pad_to_multiple_of` has no effect"),
        ({"padding_free": True, "pad_to_multiple_of": 8}, "`pad_to_multiple_of` has no effect"),
        ({"max_tokens_per_device": 0}, "max_tokens_per_device.*positive"),
    ],
)
def test_contradicting_options(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        make_args(tmp_path, **options)


def test_streams_are_not_packed(tmp_path, student_dir, table):
    args = make_args(tmp_path, packing=True, max_length=64)
    with pytest.raises(ValueError, match="lengths of all rows.*`padding_free=True`"):
        OfflineOPDTrainer(str(student_dir), args, table.to_iterable_dataset())
    args = make_args(tmp_path, padding_free=True, max_tokens_per_device=24, max_steps=2)
    OfflineOPDTrainer(str(student_dir), args, table.to_iterable_dataset()).train()


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"pad_to_multiple_of": 8}])
def test_a_row_longer_than_the_budget_is_found_before_training(tmp_path, student_dir, table, options):
    sizes = [len(p) + len(c) for p, c in zip(table["prompt_ids"], table["completion_ids"], strict=True)]
    longest = max(sizes)
    read = -(-longest // 8) * 8 if "pad_to_multiple_of" in options else longest
    match = f"row {sizes.index(longest)}: {read} tokens in one row.*max_tokens_per_device={longest - 1}"
    options = options | {"max_tokens_per_device": longest - 1}
    with pytest.raises(TableError, match=match):
        make_trainer(tmp_path, student_dir, table, **options)
    if "pad_to_multiple_of" not in options:
        make_trainer(tmp_path, student_dir, table, max_length=longest - 1, **options)
