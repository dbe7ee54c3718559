"""Probes: what a model says of itself, and a served model held against it over real HTTP."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from contextlib import contextmanager

import pytest
import torch
import yaml
from servers import changed, full_logprobs, stub_server
from tiny import make_model, make_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trl_lopd.generation.servers import VLLMServer
from trl_lopd.identity.probes import PROBE_VERSION, probe_model, probe_sequences, verify_served_teacher

TEACHER_ID = "teacher@1-0123456789ab-01234567-89abcdef"
OTHER_ID = "other@1-ba9876543210-01234567-89abcdef"


@pytest.fixture(scope="module")
def teacher():
    return make_model(seed=1)


@pytest.fixture(scope="module")
def probes(teacher, tokenizer):
    return probe_model(teacher, tokenizer)


@pytest.fixture(scope="module")
def card(probes):
    return {"teachers": [{"id": TEACHER_ID, "evidence": "verified", "probes": probes}]}


@contextmanager
def serving(*replicas, alter=lambda logprobs: logprobs):
    """A server whose requests go to `replicas` in turn; `alter` edits each `prompt_logprobs`."""

    def change(body):
        for choice in body["choices"]:
            choice["prompt_logprobs"] = alter(choice["prompt_logprobs"])

    with stub_server("vllm", *replicas, faults=itertools.repeat(changed(change))) as server:
        client = VLLMServer(server.url, model="served", max_retries=0)
        client.requests = server.requests
        yield client


# ---- Probes ----


def tokenizer_of(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    unk = next(iter(vocabulary))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=unk)), unk_token=unk
    )


def test_probe_sequences_never_change(tokenizer):
    sequences = probe_sequences(tokenizer)
    assert (len(sequences), {len(sequence) for sequence in sequences}) == (8, {24})
    assert all(sequence[:12] == sequence[12:] for sequence in sequences)
    # Cards in the world hold answers to these: if this fails, raise PROBE_VERSION.
    assert PROBE_VERSION == 1
    assert sequences[0][:12] == [10, 15, 13, 6, 10, 28, 30, 4, 21, 30, 28, 23]
    assert hashlib.sha256(json.dumps(sequences).encode()).hexdigest()[:16] == "454aceac6d11a2c1"


def test_probe_sequences_follow_from_the_vocabulary_alone(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    assert probe_sequences(AutoTokenizer.from_pretrained(tmp_path)) == probe_sequences(tokenizer)
    ordinary = {id for token, id in tokenizer.get_vocab().items() if token.startswith("w")}
    assert set(itertools.chain(*probe_sequences(tokenizer))) <= ordinary
    extended = make_tokenizer()
    extended.add_tokens(["<think>"])
    extended.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert probe_sequences(extended) == probe_sequences(tokenizer)


@pytest.mark.parametrize("ids", [range(19), range(150_000), [0, *range(5, 60, 7), 1000]])
def test_probe_sequences_of_any_vocabulary(ids):
    tokenizer = tokenizer_of({f"t{i}": i for i in ids})
    drawn = set(itertools.chain(*probe_sequences(tokenizer)))
    assert drawn <= set(ids) - {0}
    assert len(drawn) > min(len(ids), 96) // 2


def test_no_ordinary_tokens():
    with pytest.raises(ValueError, match="no ordinary tokens"):
        probe_sequences(tokenizer_of({"<unk>": 0}))


@pytest.mark.parametrize("training", [True, False])
def test_probe_model(tokenizer, training):
    model = make_model(seed=1, attention_dropout=0.5).train(training)
    probes = probe_model(model, tokenizer)
    assert model.training is training
    assert probes["sequences"] == probe_sequences(tokenizer)
    model.eval()
    for ids, logprobs in zip(probes["sequences"], probes["logprobs"], strict=True):
        expected = full_logprobs(model, ids)[:-1].gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)
        assert logprobs == [round(value, 4) for value in logprobs]
    assert yaml.safe_load(yaml.safe_dump(probes)) == json.loads(json.dumps(probes)) == probes


def test_probe_model_is_that_of_scoring(tokenizer, teacher, probes):
    from datasets import Dataset

    from trl_lopd import fingerprint_teacher, score_rollouts

    rows = Dataset.from_dict(
        {"prompt_ids": [s[:1] for s in probes["sequences"]], "completion_ids": [s[1:] for s in probes["sequences"]]}
    )
    fingerprint = fingerprint_teacher(teacher, tokenizer)
    scored = score_rollouts(rows, teacher, processing_class=tokenizer, fingerprint=fingerprint)["teacher_logprobs"]
    torch.testing.assert_close(torch.tensor(list(scored)), torch.tensor(probes["logprobs"]), atol=1e-4, rtol=0)


def test_probe_model_with_adapter(tokenizer, probes):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(seed=1), peft.LoraConfig(init_lora_weights=False))
    adapted = probe_model(model, tokenizer)["logprobs"]
    assert adapted != probes["logprobs"]
    merged = probe_model(model.merge_and_unload(), tokenizer)["logprobs"]
    torch.testing.assert_close(torch.tensor(adapted), torch.tensor(merged), atol=1e-3, rtol=0)


def test_probe_model_errors(tokenizer):
    broken = make_model(seed=1).train()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        probe_model(broken, tokenizer)
    assert broken.training
    with pytest.raises(ValueError, match="do not belong together"):
        probe_model(make_model(vocab=20), tokenizer)

    def fail(*args):
        raise RuntimeError("out of memory")

    broken.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        probe_model(broken, tokenizer)
    assert broken.training


def test_a_probe_that_fails_costs_no_samples_and_no_scores(tmp_path, caplog):
    """The tokenizer has more ids than the model: prompts and answers can do without them, probes cannot."""
    from trl_lopd import generate_sft_data, load_table, read_dataset_card, score_rollouts

    make_model(seed=1).save_pretrained(tmp_path / "teacher")
    make_tokenizer(size=64).save_pretrained(tmp_path / "teacher")
    for _ in range(2):  # sampled, and finished before
        answers = generate_sft_data(["w5", "w6 w7"], str(tmp_path / "teacher"), output_dir=tmp_path / "sft",
                                    max_completion_length=4, truncated="keep")  # fmt: skip
        assert caplog.text.count("do not belong together") == 1
        caplog.clear()
        assert len(answers) == 2 and load_table(tmp_path / "sft", split="train").to_dict() == answers.to_dict()
        (about,) = read_dataset_card(tmp_path / "sft")["sft_teachers"]
        assert "probes" not in about
    rows = answers.select_columns(["prompt_ids", "completion_ids"])
    assert len(score_rollouts(rows, str(tmp_path / "teacher"), top_k=2)) == 2
    assert caplog.text.count("do not belong together") == 1


def test_whatever_a_probe_raises(teacher, tokenizer, caplog):
    from trl_lopd import generate_sft_data, score_rollouts

    def fail_if_probed(module, args, kwargs):
        if args[0].shape[:2] == (1, 24):
            raise RuntimeError("out of memory")

    hook = teacher.model.layers[0].register_forward_pre_hook(fail_if_probed, with_kwargs=True)
    try:
        answers = generate_sft_data(["w5", "w6 w7"], teacher, processing_class=tokenizer, max_completion_length=4,
                                    truncated="keep")  # fmt: skip
        rows = answers.select_columns(["prompt_ids", "completion_ids"])
        assert len(score_rollouts(rows, teacher, processing_class=tokenizer, top_k=2)) == 2
    finally:
        hook.remove()
    assert caplog.text.count("no probes to be held against: out of memory") == 2


# ---- Served teachers ----


def test_same_teacher_is_accepted(teacher, card, probes):
    with serving(teacher) as client:
        result = verify_served_teacher(client, card)
    assert result.accepted and result.teacher == f"{TEACHER_ID}#probed"
    assert result.max < 1e-4 and result.mean <= result.max and result.spread == 0
    assert TEACHER_ID in result.reason and "0.000" in result.reason
    # One sequence a request, all repeats of a probe before the next.
    assert [body["prompt"] for body in client.requests] == [[ids] for ids in probes["sequences"] for _ in range(4)]


def test_model_card(teacher, card):
    with serving(teacher, teacher) as client:
        assert verify_served_teacher(client, {"sft_teachers": card["teachers"]}).accepted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_accepted(teacher, card, dtype):
    with serving(copy.deepcopy(teacher).to(dtype)) as client:
        result = verify_served_teacher(client, card, tolerance=0.25)
    assert result.accepted and result.mean > 0


def test_another_seed_is_refused(card):
    with serving(make_model(seed=2)) as client:
        result = verify_served_teacher(client, card)
    assert not result.accepted and result.teacher is None
    assert result.mean > 0.6 and result.spread == 0
    assert "does not answer the probes" in result.reason and f"{result.mean:.3f}" in result.reason


def test_disagreeing_replicas_are_refused(teacher, card):
    """Even where the mean over both is within the limit."""
    near = copy.deepcopy(teacher)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in near.parameters():
            weight.add_(torch.randn_like(weight) * 0.25 * weight.std())
    for replicas in ((teacher, near), (teacher, teacher, near)):
        with serving(*replicas) as client:
            result = verify_served_teacher(client, card)
        assert not result.accepted and result.teacher is None
        assert result.mean < 0.6 and result.max < 6.0 and result.spread > 0.3
        assert "disagrees with itself" in result.reason and f"{result.spread:.3f}" in result.reason


def test_a_few_wrong_tokens_are_refused(teacher, card):
    def alter(logprobs):
        logprobs[5] = {id: {**entry, "logprob": entry["logprob"] - 9.0} for id, entry in logprobs[5].items()}
        return logprobs

    with serving(teacher, alter=alter) as client:
        result = verify_served_teacher(client, card)
    assert not result.accepted and result.mean < 0.6 < 6.0 < result.max


def test_the_closest_of_several_teachers(tokenizer, teacher, card):
    other = make_model(seed=2)
    unprobed = {"id": "third@1-aaaaaaaaaaaa-01234567-89abcdef"}
    card = {"teachers": [*card["teachers"], {"id": OTHER_ID, "probes": probe_model(other, tokenizer)}, unprobed]}
    for model, id in ((teacher, TEACHER_ID), (other, OTHER_ID)):
        with serving(model) as client:
            result = verify_served_teacher(client, card, repeats=2)
        assert result.accepted and result.teacher == f"{id}#probed"
        # Both teachers have the same probes: each is asked once.
        assert len(client.requests) == 16


def test_a_probe_without_probability(teacher, card):
    def alter(logprobs):
        logprobs[7] = {id: {**entry, "logprob": -9999.0} for id, entry in logprobs[7].items()}
        return logprobs

    with serving(teacher, alter=alter) as client, pytest.raises(ValueError, match="-inf at token 7"):
        verify_served_teacher(client, card)


# ---- Cards and options ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"sequences": []}, "malformed"),
        ({"logprobs": [[-1.0]]}, "malformed"),
        ({"logprobs": [[math.nan] * 23] * 8}, "malformed"),
    ],
)
def test_probes_that_cannot_be_compared(probes, change, message):
    with pytest.raises(ValueError, match=message):
        verify_served_teacher(None, {"teachers": [{"id": TEACHER_ID, "probes": {**probes, **change}}]})


@pytest.mark.parametrize("card", [{}, {"teachers": []}, {"teachers": None}, {"sft_teachers": [{"id": TEACHER_ID}]}])
def test_no_probes(card):
    with pytest.raises(ValueError, match="score_rollouts.*fingerprint --probes"):
        verify_served_teacher(None, card)


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"max_spread": 0.0}, {"repeats": 1}])
def test_options_out_of_range(card, options):
    with pytest.raises(ValueError, match="`repeats` is 2 or more"):
        verify_served_teacher(None, card, **options)
