"""Every way the local teacher reads rows, against float32 log_softmax of one row at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tiny import make_model
from transformers import modeling_flash_attention_utils as flash

from trl_lopd.generation import teachers
from trl_lopd.generation.teachers import LocalTeacher, RowError

VOCAB, TOP_K = 32, 4
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.5,
    "max_position_embeddings": 128,
}  # fmt: skip
SPECIAL = {
    "Gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0, "sliding_window": 4},
    "Lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "FalconH1": {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8},
}
ARCHITECTURES = ["Qwen3", "Llama", "Gemma2"]


def make(architecture: str, attention: str = "eager", **options):
    options = COMMON | SPECIAL.get(architecture, {}) | options
    if attention == "sdpa" and architecture == "Gemma2":
        options["attn_logit_softcapping"] = None  # refuses it, and leaves the sliding windows to be tested
    config = getattr(transformers, f"{architecture}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    model.config._attn_implementation = attention
    return model


def make_rows(groups: list[int], seed: int = 0, longest: int = 9) -> tuple[list[np.ndarray], list[int]]:
    """Prompts with that many completions each, shuffled; completions of one token among them."""
    rng = np.random.default_rng(seed)
    rows = []
    for size in groups:
        prompt = rng.integers(2, VOCAB, rng.integers(6, 12))
        counts = rng.integers(1, longest + 1, size)
        counts[0] = 1
        rows += [(np.concatenate([prompt, rng.integers(1, VOCAB, count)]), int(count)) for count in counts]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    return [sequence for sequence, _ in rows], [count for _, count in rows]


def assert_scores(model, sequences, counts, scores):
    for sequence, count, score in zip(sequences, counts, scores, strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(sequence)[None]).logits[0, -count - 1 : -1]
        expected = logits.float().log_softmax(-1)
        sampled = expected.gather(-1, torch.from_numpy(sequence[-count:])[:, None])[:, 0]
        np.testing.assert_allclose(score.logprobs, sampled, atol=1e-5)
        top = expected.topk(score.topk_ids.shape[1])
        assert score.topk_ids.tolist() == top.indices.tolist()
        np.testing.assert_allclose(score.topk_logprobs, top.values, atol=1e-5, rtol=2**-10)
        assert [values.dtype for values in score] == [np.float32, np.int32, np.float16]


class Passes(list):
    """What is given to the model: the shape of its ids, the tokens in its cache, and whether there is a mask."""

    def __init__(self, model, memory: int | None = None):
        self.failed, self.memory = 0, memory
        self.handle = model.base_model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, inputs):
        rows, width = inputs["input_ids"].shape
        cache = inputs.get("past_key_values")
        cached = 0 if cache is None else rows * cache.get_seq_length()
        if self.memory is not None and rows * width + cached > self.memory:
            self.failed += 1
            raise torch.OutOfMemoryError
        self.append(((rows, width), cached, inputs.get("attention_mask") is not None))


def tried(model, max_batch_tokens: int | None = None) -> LocalTeacher:
    """A teacher that has read its trial rows."""
    teacher = LocalTeacher(model, max_batch_tokens)
    teacher.score([np.array([2, 3])], [1], 0)
    return teacher


def pack(monkeypatch):
    """As with flash attention, whatever attention there is."""
    monkeypatch.setattr(teachers, "is_flash_attention_requested", lambda config: True)


def varlen_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """What `flash_attn_varlen_func` computes, in plain operations: `(tokens, heads, head_dim)`."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q and int(cu_seqlens_k.diff().max()) == max_seqlen_k
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = torch.zeros_like(q)
    for i in range(len(cu_seqlens_q) - 1):
        of_q, of_k = (slice(int(cu[i]), int(cu[i + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
        z = torch.einsum("qhd,khd->hqk", q[of_q], k[of_k]) * (softmax_scale or q.shape[-1] ** -0.5)
        z = softcap * torch.tanh(z / softcap) if softcap else z
        queries, keys = z.shape[1:]
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        seen = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
        seen &= (distance <= window_size[0]) if window_size[0] >= 0 else True
        out[of_q] = torch.einsum("hqk,khd->qhd", z.masked_fill(~seen, -torch.inf).softmax(-1), v[of_k])
    return out


def flash_attention(q, k, v, **options):
    sizes = [torch.arange(len(x) + 1, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    out = varlen_attention(*(x.flatten(0, 1) for x in (q, k, v)), *sizes, q.shape[1], k.shape[1], **options)
    return out.view(q.shape)


@pytest.fixture
def plain_flash(monkeypatch):
    """Transformers' own flash attention path, down to the kernels."""
    functions = (flash_attention, varlen_attention, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    # It would guess the boundaries from positions if they did not reach it.
    monkeypatch.setattr(flash, "_prepare_from_posids", lambda *args: pytest.fail("no `cu_seq_lens`"))


GROUPS = {"distinct": [1] * 9, "one prompt": [6], "several prompts": [4, 5, 3], "mixed": [4, 1, 1, 5, 1]}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("way", ["sdpa", "eager", "sdpa, packed", "eager, packed", "flash_attention_2"])
@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=pytest.mark.slow if i else ()) for i, name in enumerate(ARCHITECTURES)]
)
def test_scores_are_those_of_one_row_at_a_time(architecture, way, groups, monkeypatch, plain_flash):
    attention, _, packed = way.partition(", ")
    model = make(architecture, attention)
    if packed:
        pack(monkeypatch)
    for seed, max_batch_tokens in enumerate((64, 16384)):
        sequences, counts = make_rows(GROUPS[groups], seed)
        teacher = tried(model, max_batch_tokens)
        passes, advanced = Passes(model), []
        scores = teacher.score(sequences, counts, TOP_K, advanced.append)
        passes.handle.remove()
        assert sum(advanced) == sum(counts)
        # One row of nothing but tokens, or rows of several sequences with a mask.
        alone = [(shape, masked) for shape, cached, masked in passes if not cached]
        if packed or way == "flash_attention_2":
            assert any(shape[0] == 1 and not masked for shape, masked in alone) == (groups in ("distinct", "mixed"))
        else:
            assert all(masked for _, masked in alone)
        assert any(cached for _, cached, _ in passes) == (groups != "distinct")
        if way == "flash_attention_2":
            model.config._attn_implementation = "eager"
        assert_scores(model, sequences, counts, scores)
        model.config._attn_implementation = attention


def test_distinct_prompts_are_batched_by_length():
    model = make("Llama")
    sequences, counts = make_rows([1] * 30)
    teacher = tried(model, 60)
    passes = Passes(model)
    teacher.score(sequences, counts, 0)
    lengths, expected = sorted(map(len, sequences), reverse=True), []
    while lengths:
        rows = min(60 // lengths[0], len(lengths))
        expected.append((rows, lengths[0]))
        lengths = lengths[rows:]
    assert [shape for shape, _, _ in passes] == expected and len(expected) > 3


def test_packed_batches_are_full(monkeypatch):
    pack(monkeypatch)
    model = make("Llama")
    sequences = list(np.random.default_rng(0).integers(2, VOCAB, (7, 10)))
    teacher = tried(model, 30)
    passes = Passes(model)
    scores = teacher.score(sequences, [4] * 7, TOP_K)
    assert [shape for shape, _, _ in passes] == [(1, 30), (1, 30), (1, 10)]
    passes.handle.remove()
    assert_scores(model, sequences, [4] * 7, scores)


def test_a_shared_prompt_is_read_once_and_counts_in_the_budget():
    model = make("Qwen3")
    sequences, counts = make_rows([8] * 6, longest=6)
    teacher, small = tried(model, 16384), tried(model, 80)
    passes = Passes(model)
    teacher.score(sequences, counts, 0)
    prompts = {tuple(sequence[:-count]): None for sequence, count in zip(sequences, counts, strict=True)}
    width = max(map(len, prompts))
    assert [shape for shape, _, _ in passes] == [(6, width), (48, max(counts) - 1)]
    passes.clear()
    small.score(sequences, counts, 0)
    held = 0
    for (rows, width), cached, _ in passes:
        held = held if cached else rows * width
        assert held <= 40 and held + cached + (rows * width if cached else 0) <= 80
    assert len(passes) > 8


def test_sharing_that_saves_little_is_left():
    model = make("Qwen3")
    rng = np.random.default_rng(0)
    prompt = rng.integers(2, VOCAB, 4)
    sequences = [np.concatenate([prompt, rng.integers(2, VOCAB, 40)]) for _ in range(4)]
    teacher = tried(model)
    passes = Passes(model)
    teacher.score(sequences, [40] * 4, 0)
    assert [(shape, cached) for shape, cached, _ in passes] == [((4, 44), 0)]


@pytest.mark.parametrize("architecture", ["Lfm2", "FalconH1"])
def test_layers_that_read_across_rows_are_neither_packed_nor_given_prompts(architecture, monkeypatch):
    pack(monkeypatch)
    model = make(architecture)
    sequences, counts = make_rows([5, 4])
    teacher = tried(model)
    passes = Passes(model)
    scores = teacher.score(sequences, counts, TOP_K)
    passes.handle.remove()
    assert len(passes) == 1 and passes[0] == ((9, max(map(len, sequences))), 0, True)
    assert_scores(model, sequences, counts, scores)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {"attention_chunk_size": 8},
        {"layer_types": ["sliding_attention", "linear_attention"]},
    ],
)
def test_what_a_config_rules_out(options):
    assert teachers.only_attends(make("Llama"))
    model = make("Llama")
    for name, value in options.items():
        setattr(model.config, name, value)
    assert not teachers.only_attends(model)


@pytest.mark.parametrize("way", ["padded", "packed", "shared", "mixed"])
def test_when_memory_runs_out_nothing_is_lost(way, monkeypatch, caplog):
    if way == "packed":
        pack(monkeypatch)
    model = make("Gemma2")
    sequences, counts = make_rows({"shared": [4, 6, 5], "mixed": [6, 1, 1, 1, 5]}.get(way, [1] * 12))
    teacher = tried(model, 400)
    passes, advanced = Passes(model, memory=70), []
    scores = teacher.score(sequences, counts, TOP_K, advanced.append)
    assert passes.failed and passes and "Out of memory: from here on" in caplog.text
    assert teacher.max_batch_tokens < 400 and sum(advanced) == sum(counts)
    assert any(cached for _, cached, _ in passes) == (way in ("shared", "mixed"))
    passes.handle.remove()
    assert_scores(model, sequences, counts, scores)


@pytest.mark.parametrize("way", ["padded", "packed", "shared"])
def test_a_row_that_never_fits_raises(way, monkeypatch):
    if way == "packed":
        pack(monkeypatch)
    model = make("Qwen3")
    sequences, counts = make_rows([6] if way == "shared" else [1] * 6)
    teacher = tried(model)
    Passes(model, memory=4)
    with pytest.raises(torch.OutOfMemoryError):
        teacher.score(sequences, counts, 0)


def test_modules_are_left_in_their_modes():
    model = make_model()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    sequences, counts = make_rows([3, 1])
    LocalTeacher(model).score(sequences, counts, 0)
    assert [module.training for module in model.modules()] == before
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(RowError, match="NaN"):
        LocalTeacher(model).score(sequences, counts, 0)
    assert [module.training for module in model.modules()] == before
    assert LocalTeacher(model).score([], [], 0) == []


def on_cuda(monkeypatch, used, free, tokens=2048):
    """
    A teacher on CUDA devices that are made up, and what it reads there.

    Args:
        used (`list[int]`): bytes that a forward takes, on each device.
        free (`int`): bytes of each that nobody has; in this process's cache there are 2**20 more.
        tokens (`int`): as many as the model has positions for.
    """
    devices = [torch.device("cuda", i) for i in range(len(used))]
    model = make("Llama", max_position_embeddings=tokens)
    reads, allocated = [], 2**30
    fake = SimpleNamespace(
        config=model.config,
        parameters=lambda: (SimpleNamespace(device=device) for device in devices),
        get_input_embeddings=model.get_input_embeddings,
        base_model=lambda input_ids, use_cache: reads.append((input_ids.shape, use_cache)),
        _modules={},
        _supports_attention_backend=True,
        _is_stateful=False,
    )
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated + used[device.index])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: allocated + 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
    return LocalTeacher(fake), reads


@pytest.mark.parametrize(
    ("used", "free", "fitting"),
    [
        (2**20, 2**24 - 2**20, 2**14),  # 22,937 of 512 bytes each
        (2**30, 0, 1),
        (2**20, 2**40, 65536),
    ],
)
def test_tokens_that_fit(monkeypatch, used, free, fitting):
    assert on_cuda(monkeypatch, [used], free)[0].find_budget() == fitting


def test_without_cuda_there_is_a_default():
    teacher = LocalTeacher(make("Llama"))
    teacher.score(*make_rows([1]), 0)
    assert teacher.max_batch_tokens == 16384


def test_the_tightest_device_sets_the_budget(monkeypatch):
    teacher, reads = on_cuda(monkeypatch, [2**21, 2**20], 2**22, tokens=1024)
    assert teacher.find_budget() == 1024  # 0.7 * 5 MiB at 2 KiB a token
    assert reads == [((1, 1024), True)]
    assert on_cuda(monkeypatch, [2**20], 2**22, tokens=1024)[0].find_budget() == 2048

    def fails(**inputs):
        raise torch.OutOfMemoryError

    teacher, _ = on_cuda(monkeypatch, [2**21, 2**20], 2**22, tokens=1024)
    teacher.model.base_model = fails
    assert teacher.find_budget() == 512


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_that_stretch_the_rotary_embeddings_stretch_no_other_row_s(kind):
    """One long row in a batch changes what transformers makes of the short ones."""
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 12}
    options = {"rope_parameters": rope, "max_position_embeddings": 48 if kind == "longrope" else 12}
    model = make("Llama", **options)
    sequences, counts = make_rows([3, 2, 1, 1, 1], longest=12)
    lengths = np.array([len(sequence) for sequence in sequences])
    assert (lengths > 12).any() and (lengths <= 12).sum() > 1
    scores = LocalTeacher(model, 4096).score(sequences, counts, 3)
    for row in zip(sequences, counts, scores, strict=True):
        assert_scores(make("Llama", **options), *([value] for value in row))
    # What a padded batch of them would give the shortest.
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(sequence) for sequence in sequences], True)
    mask = torch.arange(input_ids.shape[1]) < torch.from_numpy(lengths)[:, None]
    short = int(lengths.argmin())
    with torch.no_grad():
        batch = model(input_ids=input_ids, attention_mask=mask.long()).logits[short, : lengths[short]]
        alone = make("Llama", **options)(input_ids=input_ids[[short], : lengths[short]]).logits[0]
    assert not torch.allclose(batch.log_softmax(-1), alone.log_softmax(-1), atol=1e-3)
