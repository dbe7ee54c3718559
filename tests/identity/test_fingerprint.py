from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_experts
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    core_model_loading,
)

from trl_lopd.identity.fingerprint import (
    EVIDENCE,
    TeacherFingerprint,
    content_id,
    diff_ids,
    evidence_of,
    fingerprint_teacher,
    is_id,
    same_teacher,
    with_evidence,
)

VOCAB = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}


def make_tokenizer(vocab=VOCAB, normalizer=None, chat_template=None):
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer is not None:
        backend.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(tied=False, dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def save(model, directory, **kwargs):
    model.save_pretrained(directory, **kwargs)
    make_tokenizer().save_pretrained(directory)
    return directory


def weights(model):
    return fingerprint_teacher(model, make_tokenizer()).weights


def rewrite(directory, change):
    """Apply `change` to the tensors of an unsharded checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# The fingerprint and its id


def make_fingerprint(weights="a", tokenizer="b", chat_template="c", **fields):
    return TeacherFingerprint(64 * weights, 64 * tokenizer, 64 * chat_template, **fields)


def test_id_names_content_not_name():
    a = make_fingerprint(model_id="org/qwen")
    b = make_fingerprint(model_id="renamed@home", revision="main", dtype="bfloat16")
    assert a.id == "qwen@1-aaaaaaaaaaaa-bbbbbbbb-cccccccc" and a.name == "qwen"
    assert b.id == "renamed@home@1-aaaaaaaaaaaa-bbbbbbbb-cccccccc"
    assert a == b and hash(a) == hash(b) and content_id(a.id) == content_id(b.id)
    assert same_teacher(a, b) and same_teacher(a.id, b) and same_teacher(a.id, with_evidence(b.id, "probed"))


@pytest.mark.parametrize("field", ["weights", "tokenizer", "chat_template", "adapter"])
def test_id_follows_every_digest(field):
    a, b = make_fingerprint(adapter=64 * "d"), make_fingerprint(**({"adapter": 64 * "d"} | {field: "e"}))
    assert a != b and not same_teacher(a, b) and is_id(a.id)
    assert a.id != make_fingerprint().id


def test_an_id_is_one_word():
    for name in ("a b", "a#declared", "a\nb", "", "é@1"):
        fingerprint = make_fingerprint(model_id=name)
        assert is_id(fingerprint.id) and evidence_of(fingerprint.id) == "verified"
        assert content_id(fingerprint.id) == "1-aaaaaaaaaaaa-bbbbbbbb-cccccccc"


def test_evidence_of_an_id():
    verified = make_fingerprint(model_id="m").id
    assert EVIDENCE == ("verified", "probed", "declared")
    for evidence in EVIDENCE:
        marked = with_evidence(with_evidence(verified, "declared"), evidence)
        assert evidence_of(marked) == evidence and content_id(marked) == content_id(verified) and is_id(marked)
    assert with_evidence(verified, "probed") == f"{verified}#probed"
    assert with_evidence(f"{verified}#probed", "verified") == verified


@pytest.mark.parametrize("text", ["", "qwen", "qwen@", "qwen@1", "qwen@0123456789abcdef", "a b@1-{w}-{t}-{t}"])
def test_what_is_no_id(text):
    text = text.format(w="a" * 12, t="b" * 8)
    assert (
        not is_id(text) and not is_id(make_fingerprint().id + "#guessed") and not is_id(make_fingerprint().id + "\n")
    )
    assert diff_ids(text, make_fingerprint().id) == ["the content differs"]


def test_ids_without_content_name_no_teacher():
    assert content_id("qwen") == content_id("qwen@") == content_id("qwen@#declared") == ""
    assert not same_teacher("qwen", "qwen") and not same_teacher("a@", "b@")
    assert same_teacher("a@foreign", "b@foreign")


def test_diff_in_words():
    a = make_fingerprint(model_id="org/a", revision="abc")
    assert diff_ids(a.id, a.id) == diff_ids(a.id, with_evidence(a.id, "declared")) == []
    words = ["the weights differ", "the tokenizer differs", "the chat template differs"]
    b = make_fingerprint("1", "2", "3")
    assert diff_ids(a.id, b.id) == diff_ids(b.id, a.id) == words
    assert diff_ids(a.id, make_fingerprint(adapter="4").id) == words[:1]
    assert diff_ids(a.id, make_fingerprint(tokenizer="2").id) == words[1:2]
    assert diff_ids(a.id, make_fingerprint(schema=2).id) == ["written under another fingerprint schema"]


def test_dict_round_trip():
    fingerprint = make_fingerprint(model_id="org/n", parameters=7, adapter="d")
    record = fingerprint.to_dict()
    assert list(record)[0] == "id" and record["id"] == fingerprint.id
    assert record["parameters"] == 7 and "revision" not in record
    for extra in ({}, {"evidence": "declared"}):
        again = TeacherFingerprint.from_dict(json.loads(json.dumps(record)) | extra)
        assert again == fingerprint and again.to_dict() == record


def test_from_dict_refuses_a_record_that_contradicts_itself_or_lacks_a_field():
    record = make_fingerprint(model_id="n").to_dict()
    for change in ({"weights": "x"}, {"adapter": "x"}, {"tokenizer": "x"}):
        with pytest.raises(ValueError, match="edited by hand"):
            TeacherFingerprint.from_dict(record | change)
    assert TeacherFingerprint.from_dict(record | {"model_id": "called otherwise"}) == make_fingerprint(model_id="n")
    with pytest.raises(ValueError, match="weights, tokenizer, chat_template missing"):
        TeacherFingerprint.from_dict({"model_id": "n"})
    with pytest.raises(ValueError, match="adapter missing or not a string"):
        TeacherFingerprint.from_dict(record | {"adapter": 3})
    with pytest.raises(ValueError, match="schema 2.*another version.*fingerprint the teacher again"):
        TeacherFingerprint.from_dict(make_fingerprint(schema=2).to_dict())


# Weights: the same whatever holds them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_module_equals_its_saved_directory(tmp_path, tied, dtype):
    model = make_model(tied, dtype)
    expected = weights(model)
    one, many = save(model, tmp_path / "one"), save(model, tmp_path / "many", max_shard_size="1KB")
    assert len(list(many.glob("*.safetensors"))) > 1 and (many / "model.safetensors.index.json").is_file()
    assert weights(one) == weights(many) == expected
    assert weights(AutoModelForCausalLM.from_pretrained(many)) == expected


def test_tied_head_written_out_is_left_out(tmp_path):
    model = make_model(tied=True)
    directory = save(model, tmp_path)
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert weights(directory) == weights(model)


def test_tied_head_written_instead_of_the_embedding(tmp_path):
    model = make_model(tied=True)
    directory = save(model, tmp_path)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert weights(directory) == weights(AutoModelForCausalLM.from_pretrained(directory)) == weights(model)


def test_head_declared_tied_that_differs_counts_as_transformers_loads_it(tmp_path):
    model = make_model(tied=True)
    directory = save(model, tmp_path)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert weights(directory) != weights(model)
    assert weights(directory) == weights(AutoModelForCausalLM.from_pretrained(directory))


def test_equal_tensors_that_are_not_tied_both_count():
    model, other = make_model(), make_model()
    with torch.no_grad():
        for m in (model, other):
            m.lm_head.weight.copy_(m.model.embed_tokens.weight)
        other.lm_head.weight[0, 0] += 1
    tied = make_model(tied=True)
    tied.load_state_dict(model.state_dict())
    assert len({weights(m) for m in (model, other, tied)}) == 3


def test_mixture_of_experts_whose_checkpoint_is_laid_out_unlike_the_module(tmp_path, monkeypatch):
    config = Qwen3MoeConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=16,
        moe_intermediate_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    directory = save(model, tmp_path)
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert set(file.keys()) - set(model.state_dict())
    assert weights(directory) == weights(model) == weights(AutoModelForCausalLM.from_pretrained(directory))

    # What is merged into other tensors for a checkpoint is copied: a layer at a time, never the whole model.
    sizes, revert = [], core_model_loading.revert_weight_conversion
    monkeypatch.setattr(
        core_model_loading, "revert_weight_conversion", lambda m, group: sizes.append(len(group)) or revert(m, group)
    )
    assert weights(model) == weights(directory)
    assert max(sizes) == len(model.model.layers[0].state_dict())


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_in_shards(tmp_path, kind):
    model = make_experts(kind)
    whole = save(model, tmp_path / "whole")
    # Experts of one layer are in several files.
    sharded = save(model, tmp_path / "sharded", max_shard_size="6KB")
    layers = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({file for name, file in layers.items() if "layers.0" in name and "experts" in name}) > 1
    assert weights(whole) == weights(sharded) == weights(model)
    assert weights(AutoModelForCausalLM.from_pretrained(sharded)) == weights(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "experts" in name)[3, 0, 0] += 1
    assert weights(model) != weights(whole)


def test_tied_names_that_the_checkpoint_spells_unlike_the_module(tmp_path):
    text = make_model(tied=True).config
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=2
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=7, tie_word_embeddings=True)
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    directory = save(model, tmp_path)
    embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert embedding in file.keys() and embedding not in model.state_dict()  # noqa: SIM118
    assert weights(directory) == weights(model)
    rewrite(directory, lambda t: t.update({head: t[embedding].clone()}))
    assert weights(directory) == weights(model)


def test_tensors_that_transformers_drops_on_loading_do_not_count(tmp_path):
    directory = save(make_model(), tmp_path)
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert weights(directory) == weights(make_model())


def test_non_contiguous_tensors_hash_as_their_values():
    model, other = make_model(), make_model()
    weight = model.lm_head.weight.data
    other.lm_head.weight.data = weight.t().contiguous().t()
    assert not other.lm_head.weight.is_contiguous()
    assert weights(model) == weights(other)


# Weights: different when anything differs


def flip_one_bit(tensors):
    tensors["model.norm.weight"].view(torch.uint8)[0] ^= 1


def rename(tensors):
    tensors["model.norm.w"] = tensors.pop("model.norm.weight")


def cast(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()


def reinterpret(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.float16)


def reshape(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].reshape(2, 4)


def drop(tensors):
    del tensors["model.norm.weight"]


def swap(tensors):
    a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


@pytest.mark.parametrize("change", [flip_one_bit, cast, reinterpret, reshape, swap])
def test_weights_digest_changes(tmp_path, change):
    directory = save(make_model(), tmp_path)
    before = weights(directory)
    rewrite(directory, change)
    assert weights(directory) != before


def test_a_name_that_only_looks_like_one_that_is_dropped_counts(tmp_path):
    """transformers drops buffers named `attn.bias` of old GPT-2 checkpoints, and not `c_attn.bias`."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    directory = save(model, tmp_path)
    before = weights(directory)
    assert before == weights(model)
    rewrite(directory, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(2)}))
    assert weights(directory) == before
    rewrite(directory, lambda t: t["transformer.h.0.attn.c_attn.bias"].add_(1))
    assert weights(directory) != before


def test_a_checkpoint_of_the_base_model_alone_is_whole(tmp_path):
    """Old checkpoints, such as `gpt2`'s own, have no prefix before their names."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    directory = save(model, tmp_path)
    rewrite(directory, lambda t: t.update({k.removeprefix("transformer."): t.pop(k) for k in list(t)}))
    assert fingerprint_teacher(directory)


def test_one_flipped_bit_of_a_loaded_model_changes_its_digest():
    model = make_model()
    before = weights(model)
    model.lm_head.weight.data.view(torch.uint8)[-1, -1] ^= 1
    assert weights(model) != before


# What cannot be fingerprinted


@pytest.mark.parametrize("change", [rename, drop])
def test_weights_that_would_be_drawn_at_random_are_named(tmp_path, change):
    directory = save(make_model(), tmp_path)
    rewrite(directory, change)
    with pytest.raises(ValueError, match="1 weights of LlamaForCausalLM are not in its files, such as 'model.norm"):
        fingerprint_teacher(directory)


def test_pickle_is_never_loaded(tmp_path):
    directory = save(make_model(), tmp_path)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(FileNotFoundError, match="re-save the model as safetensors"):
        fingerprint_teacher(directory)


def test_a_dtype_that_safetensors_does_not_know(tmp_path):
    directory = save(make_model(), tmp_path)
    text = (directory / "model.safetensors").read_bytes()
    assert b'"dtype":"BF16"' in text
    (directory / "model.safetensors").write_bytes(text.replace(b'"dtype":"BF16"', b'"dtype":"XF16"', 1))
    with pytest.raises(ValueError, match="model.safetensors is truncated or corrupt"):
        fingerprint_teacher(directory)


def test_missing_shard(tmp_path):
    directory = save(make_model(), tmp_path, max_shard_size="1KB")
    shard = sorted(directory.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        fingerprint_teacher(directory)


def test_a_tensor_in_two_shards(tmp_path):
    directory = save(make_model(), tmp_path, max_shard_size="1KB")
    first, second = sorted(directory.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(ValueError, match="more than one"):
        fingerprint_teacher(directory)


def test_missing_directory(tmp_path):
    for path in (tmp_path / "none", "./none"):
        with pytest.raises(FileNotFoundError, match="no directory .*none"):
            fingerprint_teacher(path)


@pytest.mark.parametrize("bytes_left", [4, 100, -1])
def test_truncated_shard(tmp_path, bytes_left):
    directory = save(make_model(), tmp_path, max_shard_size="1KB")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:bytes_left])
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated or corrupt"):
        fingerprint_teacher(directory)


@pytest.mark.parametrize(
    "mark, message",
    [
        (lambda m: setattr(m, "hf_quantizer", object()), "quantized.*Fingerprint the directory"),
        (lambda m: setattr(m, "is_quantized", True), "quantized.*Fingerprint the directory"),
        (lambda m: setattr(m, "_tp_size", 2), "tensor parallelism.*Fingerprint the directory"),
        (lambda m: m.lm_head.to("meta"), "lm_head.weight is on the meta device.*Fingerprint the directory"),
        (lambda m: setattr(m, "_hf_peft_config_loaded", True), "unmerged adapter"),
    ],
)
def test_modules_that_do_not_hold_their_checkpoint(mark, message):
    model = make_model()
    mark(model)
    with pytest.raises(ValueError, match=message):
        fingerprint_teacher(model, make_tokenizer())


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp1_is_refused(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="FSDP1.*Use FSDP2"):
        fingerprint_teacher(model, make_tokenizer())


def test_wrapped_modules(process_group):
    model = make_model()
    wrapped = [torch.nn.parallel.DistributedDataParallel(model), torch.compile(model)]
    assert {weights(m) for m in wrapped} == {weights(model)}
    before = weights(model)
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert weights(model) == before


def test_other_objects():
    with pytest.raises(TypeError, match="got Linear"):
        fingerprint_teacher(torch.nn.Linear(2, 2), make_tokenizer())


# Tokenizer and chat template


def tokenizer_digest(tokenizer):
    return fingerprint_teacher(make_model(), tokenizer).tokenizer


def test_tokenizer_digest_survives_saving_and_state(tmp_path):
    tokenizer = make_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    assert tokenizer_digest(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == before


@pytest.mark.parametrize(
    "other",
    [
        lambda: make_tokenizer(VOCAB | {"a": 3, "b": 2}),
        lambda: make_tokenizer(VOCAB | {"d": 5}),
        lambda: make_tokenizer(normalizer=normalizers.Lowercase()),
    ],
)
def test_tokenizer_digest_changes(other):
    assert tokenizer_digest(other()) != tokenizer_digest(make_tokenizer())


def test_tokenizer_digest_changes_with_pre_tokenizer_added_and_special_tokens():
    split, added, special = make_tokenizer(), make_tokenizer(), make_tokenizer()
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    added.add_tokens([AddedToken("dd")])
    special.eos_token = "c"
    assert len({tokenizer_digest(t) for t in (make_tokenizer(), split, added, special)}) == 4


def test_vocabulary_order_is_no_content():
    assert tokenizer_digest(make_tokenizer(dict(reversed(VOCAB.items())))) == tokenizer_digest(make_tokenizer())


def test_slow_tokenizer():
    digest = tokenizer_digest(ByT5Tokenizer())
    assert digest == tokenizer_digest(ByT5Tokenizer())
    assert digest != tokenizer_digest(ByT5Tokenizer(extra_ids=5))
    assert digest != tokenizer_digest(ByT5Tokenizer(eos_token="<pad>"))


def test_chat_template(tmp_path):
    def digest(template):
        return fingerprint_teacher(make_model(), make_tokenizer(chat_template=template)).chat_template

    assert digest(None) == digest("")
    assert len({digest(t) for t in (None, "{{ a }}", "{{ b }}", {"default": "{{ a }}", "rag": "{{ b }}"})}) == 4
    make_tokenizer(chat_template="{{ a }}").save_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path)
    assert fingerprint_teacher(tmp_path).chat_template == digest("{{ a }}")


# Where the tokenizer and the name come from


def test_directory_and_the_module_loaded_from_it_have_one_id(tmp_path):
    directory = save(make_model(), tmp_path / "my-teacher")
    from_directory = fingerprint_teacher(str(directory))
    assert from_directory.name == from_directory.model_id == "my-teacher"
    assert fingerprint_teacher(AutoModelForCausalLM.from_pretrained(directory)) == from_directory
    assert fingerprint_teacher(directory, name="other").id == f"other@{content_id(from_directory.id)}"


def test_relative_directory_is_named_after_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(save(make_model(), tmp_path / "my-teacher"))
    assert fingerprint_teacher(".").name == "my-teacher"


def test_module_that_does_not_know_its_tokenizer():
    with pytest.raises(ValueError, match="Pass its `processing_class`"):
        fingerprint_teacher(make_model())
    assert fingerprint_teacher(make_model(), make_tokenizer()).name == "LlamaForCausalLM"


def test_hub_id(tmp_path, monkeypatch):
    directory = save(make_model(), tmp_path / "5f1c0ffee")
    calls = []

    def snapshot_download(repo_id, **kwargs):
        calls.append((repo_id, kwargs))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fingerprint = fingerprint_teacher("some-org/Teacher-8B", revision="abc")
    assert fingerprint.model_id == "some-org/Teacher-8B" and fingerprint.revision == "5f1c0ffee"
    assert fingerprint.name == "Teacher-8B" and same_teacher(fingerprint, fingerprint_teacher(directory))
    assert calls[0][0] == "some-org/Teacher-8B" and calls[0][1]["revision"] == "abc"

    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    wanted += ["chat_template.jinja", "merges.txt", "vocab.txt", "tokenizer.json"]
    unwanted = ["pytorch_model.bin", "consolidated.safetensors", "original/params.json", "model.gguf", "README.md"]
    patterns = {key: calls[0][1][key] for key in ("allow_patterns", "ignore_patterns")}
    assert set(filter_repo_objects(wanted + unwanted, **patterns)) == set(wanted)


def test_snapshot_in_the_hub_cache_is_named_after_its_repository(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    directory = save(make_model(), tmp_path / "models--org--Teacher-8B" / "snapshots" / commit)
    for teacher in (directory, AutoModelForCausalLM.from_pretrained(directory)):
        fingerprint = fingerprint_teacher(teacher)
        assert (fingerprint.model_id, fingerprint.revision) == ("org/Teacher-8B", commit)


def test_loaded_model_names_its_hub_id_or_no_path(tmp_path):
    model = make_model()
    model.config._name_or_path = str(tmp_path / "gone" / "teacher")
    assert fingerprint_teacher(model, make_tokenizer()).model_id == "teacher"
    model.config._name_or_path, model.config._commit_hash = "org/teacher", "abc"
    fingerprint = fingerprint_teacher(model, make_tokenizer())
    assert (fingerprint.model_id, fingerprint.revision) == ("org/teacher", "abc")


def test_what_a_person_wants_to_know(tmp_path):
    model = make_model(tied=True)
    model.model.norm.float()
    directory = save(model, tmp_path / "teacher")
    for teacher in (model, directory):
        fingerprint = fingerprint_teacher(teacher, make_tokenizer())
        assert fingerprint.dtype == "bfloat16" and fingerprint.architecture == "LlamaForCausalLM"
        assert fingerprint.parameters == sum(p.numel() for p in model.parameters())
        assert fingerprint.library == f"transformers {transformers.__version__}"


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_runs_only_when_it_is_trusted(tmp_path):
    directory = save(make_model(), tmp_path / "teacher")
    expected = fingerprint_teacher(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(CODE)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        fingerprint_teacher(directory)
    fingerprint = fingerprint_teacher(directory, trust_remote_code=True)
    assert fingerprint == expected and fingerprint.architecture == "OwnForCausalLM"


def test_saved_quantized_checkpoint_counts_as_its_files_are(tmp_path):
    directory = save(make_model(), tmp_path)
    quantize = {"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 1, dtype=torch.uint8)}
    rewrite(directory, lambda t: t.update(quantize | {"model.layers.0.mlp.up_proj.weight.absmax": torch.ones(2)}))
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (directory / "config.json").write_text(json.dumps(config))
    before = weights(directory)
    rewrite(directory, lambda t: t["model.layers.0.mlp.up_proj.weight.absmax"].mul_(2))
    assert weights(directory) != before


# Adapters


def make_adapter(teacher, r=2, alpha=4, seed=0, **options):
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(teacher)
    targets = options.pop("target_modules", ["q_proj", "down_proj"])
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, init_lora_weights=False, **options)
    return get_peft_model(base, config)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save(make_model(tied=True), tmp_path_factory.mktemp("base") / "teacher")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["norm"]},
        {"trainable_token_indices": [1, 2]},
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_loaded_adapter_equals_its_saved_directory(tmp_path, teacher, options):
    model = make_adapter(teacher, **options)
    model.save_pretrained(tmp_path / "adapter")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved, loaded = fingerprint_teacher(tmp_path / "adapter"), fingerprint_teacher(model)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(teacher), tmp_path / "adapter")
    base = fingerprint_teacher(teacher)
    assert saved == loaded == fingerprint_teacher(again)
    assert saved.weights == base.weights and saved.adapter is not None and saved.parameters == base.parameters
    assert diff_ids(saved.id, base.id) == ["the weights differ"]
    assert saved.model_id == "teacher+adapter" and loaded.model_id == "teacher+default"
    # The model is left as it was.
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_adapters_that_differ(tmp_path, teacher):
    directory = tmp_path / "adapter"
    make_adapter(teacher).save_pretrained(directory)
    found = [fingerprint_teacher(directory)]
    for options in ({"r": 3}, {"alpha": 5}, {"seed": 1}, {"use_rslora": True}, {"target_modules": ["q_proj"]}):
        found.append(fingerprint_teacher(make_adapter(teacher, **options)))
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(torch.uint8)[0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    found.append(fingerprint_teacher(directory))
    assert len({f.adapter for f in found}) == len(found) == len({f.id for f in found})
    assert len({f.weights for f in found}) == 1


def test_bookkeeping_and_new_default_options_are_no_part_of_an_adapter(tmp_path, teacher):
    make_adapter(teacher).save_pretrained(tmp_path)
    before = fingerprint_teacher(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"peft_version": "99", "inference_mode": False, "revision": "main", "option_of_next_year": None}
    config["target_modules"].reverse()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert fingerprint_teacher(tmp_path) == before


def test_sixteen_bit_adapter_loads_as_float32_of_the_same_values(tmp_path, teacher):
    make_adapter(teacher).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(teacher), tmp_path)
    assert fingerprint_teacher(model) == fingerprint_teacher(tmp_path)


def test_base_of_an_adapter_by_relative_path_and_its_own_tokenizer(tmp_path, teacher, monkeypatch):
    directory = tmp_path / "adapter"
    make_adapter(teacher).save_pretrained(directory)
    before = fingerprint_teacher(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = os.path.relpath(teacher, directory)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    assert fingerprint_teacher(directory) == before
    monkeypatch.chdir(teacher.parent)
    (directory / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "teacher"}))
    assert fingerprint_teacher(directory) == before
    make_tokenizer(chat_template="{{ a }}").save_pretrained(directory)
    assert diff_ids(fingerprint_teacher(directory).id, before.id) == ["the chat template differs"]


def test_adapter_over_a_hub_model(tmp_path, teacher, monkeypatch):
    directory = tmp_path / "adapter"
    make_adapter(teacher).save_pretrained(directory)
    before = fingerprint_teacher(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "org/Base-8B", "revision": "v1"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="adapter.* over the base model org/Base-8B, which is out of reach"):
        fingerprint_teacher(directory)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **kw: asked.append((repo, kw["revision"])) or str(teacher)
    )
    fingerprint = fingerprint_teacher(directory)
    assert fingerprint == before and asked == [("org/Base-8B", "v1")]
    assert (fingerprint.model_id, fingerprint.revision) == ("Base-8B+adapter", "teacher+?")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"base_model_name_or_path": None}, ValueError, "names no base model"),
        ({"base_model_name_or_path": "/gone/base"}, FileNotFoundError, "over the base model /gone/base.*out of reach"),
        ({"base_model_name_or_path": "."}, ValueError, "itself an adapter"),
    ],
)
def test_adapters_whose_base_is_not_there(tmp_path, teacher, monkeypatch, change, error, message):
    monkeypatch.chdir(tmp_path)
    make_adapter(teacher).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=message):
        fingerprint_teacher(tmp_path)


def test_adapter_without_safetensors(tmp_path, teacher):
    make_adapter(teacher).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="never loaded"):
        fingerprint_teacher(tmp_path)
    file.write_bytes(b"short")
    with pytest.raises(ValueError, match="adapter_model.safetensors is truncated"):
        fingerprint_teacher(tmp_path)


def test_the_active_adapter_counts(teacher):
    model = make_adapter(teacher)
    first = fingerprint_teacher(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert fingerprint_teacher(model) == first
    model.set_adapter("other")
    second = fingerprint_teacher(model)
    assert second.weights == first.weights and second.adapter != first.adapter and second.name == "teacher+other"
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 active adapters .default, other.*set_adapter"):
        fingerprint_teacher(model)


def test_adapters_that_have_changed_their_base(teacher):
    model = make_adapter(teacher)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into its base"):
        fingerprint_teacher(model)
    with pytest.raises(ValueError, match="trains biases"):
        fingerprint_teacher(make_adapter(teacher, bias="all"))


def test_import_is_light():
    code = """import sys
from trl_lopd.identity import cards, consistency, fingerprint
print([m for m in ('torch', 'transformers') if m in sys.modules])"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
