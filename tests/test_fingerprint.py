from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_lopd.fingerprint import TeacherFingerprint, content_id, fingerprint_teacher, same_teacher

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


def test_id_names_content_not_name():
    a = TeacherFingerprint("qwen", "w", "t", "c")
    b = TeacherFingerprint("renamed@home", "w", "t", "c")
    assert a.id.startswith("qwen@") and len(content_id(a.id)) == 16
    assert int(content_id(a.id), 16) >= 0
    assert a.id != b.id and content_id(a.id) == content_id(b.id)
    assert same_teacher(a, b) and same_teacher(a.id, b) and same_teacher(a.id, b.id)


@pytest.mark.parametrize("field", ["weights", "tokenizer", "chat_template"])
def test_id_follows_every_digest(field):
    fields = {"name": "n", "weights": "w", "tokenizer": "t", "chat_template": "c"}
    assert not same_teacher(TeacherFingerprint(**fields), TeacherFingerprint(**(fields | {field: "other"})))


def test_dict_round_trip():
    fingerprint = TeacherFingerprint("n", "w", "t", "c")
    record = fingerprint.to_dict()
    assert record == {"id": fingerprint.id, "name": "n", "weights": "w", "tokenizer": "t", "chat_template": "c"}
    assert TeacherFingerprint.from_dict(json.loads(json.dumps(record))) == fingerprint
    assert TeacherFingerprint.from_dict(record | {"evidence": "declared"}) == fingerprint


def test_from_dict_refuses_a_record_that_contradicts_itself_or_lacks_a_field():
    record = TeacherFingerprint("n", "w", "t", "c").to_dict()
    with pytest.raises(ValueError, match="edited by hand"):
        TeacherFingerprint.from_dict(record | {"weights": "x"})
    with pytest.raises(ValueError, match="weights, tokenizer, chat_template missing"):
        TeacherFingerprint.from_dict({"name": "n"})


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


def test_mixture_of_experts_whose_checkpoint_is_laid_out_unlike_the_module(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=16,
        moe_intermediate_size=4,
        num_hidden_layers=1,
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


@pytest.mark.parametrize("change", [flip_one_bit, rename, cast, reinterpret, reshape, drop, swap])
def test_weights_digest_changes(tmp_path, change):
    directory = save(make_model(), tmp_path)
    before = weights(directory)
    rewrite(directory, change)
    assert weights(directory) != before


def test_one_flipped_bit_of_a_loaded_model_changes_its_digest():
    model = make_model()
    before = weights(model)
    model.lm_head.weight.data.view(torch.uint8)[-1, -1] ^= 1
    assert weights(model) != before


# What cannot be fingerprinted


def test_pickle_is_never_loaded(tmp_path):
    directory = save(make_model(), tmp_path)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(FileNotFoundError, match="re-save the model as safetensors"):
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


def test_adapter_directory(tmp_path):
    directory = save(make_model(), tmp_path)
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter"):
        fingerprint_teacher(directory)


@pytest.mark.parametrize(
    "mark, message",
    [
        (lambda m: setattr(m, "hf_quantizer", object()), "quantized.*Fingerprint the directory"),
        (lambda m: setattr(m, "is_quantized", True), "quantized.*Fingerprint the directory"),
        (lambda m: setattr(m.lm_head.weight, "ds_id", 0), "sharded.*lm_head.weight.*Fingerprint the directory"),
        (lambda m: m.lm_head.to("meta"), "lm_head.weight is on the meta device.*Fingerprint the directory"),
        (lambda m: setattr(m, "_hf_peft_config_loaded", True), "unmerged adapter"),
    ],
)
def test_modules_that_do_not_hold_their_checkpoint(mark, message):
    model = make_model()
    mark(model)
    with pytest.raises(ValueError, match=message):
        fingerprint_teacher(model, make_tokenizer())


def test_fsdp2_and_tensor_parallel_modules_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_model()
        mesh = init_device_mesh("cpu", (1,))
        model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh))
        with pytest.raises(ValueError, match="sharded.*lm_head.weight"):
            fingerprint_teacher(model, make_tokenizer())
    finally:
        dist.destroy_process_group()


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
    assert from_directory.name == "my-teacher"
    assert fingerprint_teacher(AutoModelForCausalLM.from_pretrained(directory)) == from_directory
    assert fingerprint_teacher(directory, name="other").id == f"other@{content_id(from_directory.id)}"


def test_relative_directory_is_named_after_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(save(make_model(), tmp_path / "my-teacher"))
    assert fingerprint_teacher(".").name == "my-teacher"


def test_module_that_does_not_know_its_tokenizer():
    with pytest.raises(ValueError, match="Pass `tokenizer`"):
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
    assert fingerprint.name == "Teacher-8B" and same_teacher(fingerprint, fingerprint_teacher(directory))
    assert calls[0][0] == "some-org/Teacher-8B" and calls[0][1]["revision"] == "abc"

    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    wanted += ["chat_template.jinja", "merges.txt", "vocab.txt", "tokenizer.json"]
    unwanted = ["pytorch_model.bin", "consolidated.safetensors", "original/params.json", "model.gguf", "README.md"]
    patterns = {key: calls[0][1][key] for key in ("allow_patterns", "ignore_patterns")}
    assert set(filter_repo_objects(wanted + unwanted, **patterns)) == set(wanted)


@pytest.mark.parametrize("module", ["fingerprint", "cards", "consistency"])
def test_import_is_light(module):
    code = f"import sys, trl_lopd.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
