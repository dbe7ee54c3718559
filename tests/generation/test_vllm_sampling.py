"""Sampling by vLLM, in this process and behind HTTP, against both in miniature: as was asked for, or an error."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import servers
import torch
import vllm_stub
from servers import changed, full_logprobs, honest, status, stub_server
from tiny import VOCAB, make_model

from trl_lopd.generation import servers as served
from trl_lopd.generation.samplers import Sampling
from trl_lopd.generation.servers import ServerError, VLLMServer
from trl_lopd.generation.vllm_engine import VLLMEngine

KEY = "sk-very-secret-0123456789"
EOS = 1
GREEDY = Sampling(0.0, 1.0, 12, (EOS,), (), 0)
PLAIN = replace(GREEDY, temperature=1.0)
WARPED = replace(GREEDY, temperature=0.8, top_p=0.9)

PROMPTS = [np.random.default_rng(i).integers(3, VOCAB, 2 + i % 4).tolist() for i in range(12)]

both = pytest.mark.parametrize("kind", ["server", "engine"])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(served, "BACKOFF_SECONDS", 0.01)
    monkeypatch.delenv(served.API_KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def model():
    return make_model(seed=1)


@pytest.fixture
def vllm(monkeypatch, model, tokenizer):
    module = vllm_stub.module(model, [tokenizer.decode([token]) for token in range(VOCAB)])
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.fixture
def sampler(model, vllm):
    """Of either kind, in a `with` block."""

    @contextmanager
    def open_sampler(kind):
        if kind == "engine":
            yield VLLMEngine("served")
        else:
            with stub_server("vllm", model) as server:
                yield VLLMServer(server.url, model="served")

    return open_sampler


def expected_logprobs(model, prompt, ids):
    """`(tokens, vocabulary)`, at temperature 1."""
    return full_logprobs(model, [*prompt, *ids])[len(prompt) - 1 : -1]


def warp(logprobs, temperature, top_p):
    """Probabilities after temperature and nucleus: the fewest most likely tokens of mass `top_p`, one by one."""
    p = (logprobs.double() / temperature).softmax(-1).numpy()
    for row in p:
        kept, mass = np.zeros(len(row), bool), 0.0
        for token in np.argsort(-row):
            if mass < top_p:
                kept[token] = True
                mass += row[token]
        row[~kept] = 0
    return p / p.sum(-1, keepdims=True)


# ---- What is sampled ----


@both
def test_greedy_answers_are_those_of_transformers(model, sampler, kind):
    # The last token of some answer, so that one at least stops.
    with sampler(kind) as engine:
        first = engine.sample(PROMPTS, GREEDY)
        sampling = replace(GREEDY, eos_token_ids=(EOS, first[0].ids[3]))
        samples = engine.sample(PROMPTS, sampling)
    reasons = set()
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(sampling.eos_token_ids),
        )
        assert sample.ids == output[0, len(prompt) :].tolist()
        assert sample.finish_reason == ("stop" if sample.ids[-1] in sampling.eos_token_ids else "length")
        reasons.add(sample.finish_reason)
    assert reasons == {"stop", "length"}


@both
@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(WARPED, id="warped"),
        pytest.param(replace(PLAIN, temperature=1.5), id="hot", marks=pytest.mark.slow),
    ],
)
def test_samples_follow_the_distribution(model, sampler, kind, sampling):
    prompts = PROMPTS * 5
    with sampler(kind) as engine:
        samples = engine.sample(prompts, sampling)
    of_rank, surprise, draws = [], [], []
    for prompt, sample in zip(prompts, samples, strict=True):
        raw = expected_logprobs(model, prompt, sample.ids)
        own = raw.gather(-1, torch.tensor(sample.ids)[:, None]).squeeze(-1)
        np.testing.assert_allclose(sample.logprobs, own, atol=1e-5)
        p = warp(raw, sampling.temperature, sampling.top_p)
        assert (p[range(len(p)), sample.ids] > 0).all()
        order = np.argsort(-p, axis=-1)
        of_rank.extend(np.take_along_axis(p, order, -1))
        draws.extend(order == np.array(sample.ids)[:, None])
        logp = np.log(p, out=np.zeros_like(p), where=p > 0)
        mean = (p * logp).sum(-1)
        surprise.extend(zip(logp[range(len(p)), sample.ids] - mean, (p * logp**2).sum(-1) - mean**2, strict=True))
        # The server's own end-of-sequence tokens, 7 among them, end nothing.
        assert EOS not in sample.ids[:-1]
    assert any(7 in sample.ids[:-1] for sample in samples)
    of_rank, draws = np.array(of_rank), np.array(draws)
    assert len(draws) > 400
    z = (draws - of_rank).sum(0) / np.sqrt((of_rank * (1 - of_rank)).sum(0) + 1e-9)
    assert np.abs(z[:8]).max() < 3.5
    total, variance = np.sum(surprise, axis=0)
    assert abs(total) < 3.5 * math.sqrt(variance)


@both
def test_an_answer_depends_on_its_number_and_on_nothing_else(sampler, kind):
    prompts = [PROMPTS[0]] * 8
    with sampler(kind) as engine:
        samples = engine.sample(prompts, WARPED)
        again = [engine.sample([PROMPTS[0]], WARPED, first)[0] for first in reversed(range(8))]
        later = engine.sample(prompts, WARPED, 4)
        other = engine.sample(prompts, replace(WARPED, seed=1))
    assert samples == again[::-1] and samples[4:] == later[:4]
    ids = [tuple(sample.ids) for sample in [*samples, *later[4:], *other]]
    assert len(set(ids)) == len(ids)


def test_any_concurrency_and_order_of_answers(model):
    faults = itertools.cycle([servers.slow(0.02), honest, status(503)])
    with stub_server("vllm", model) as server:
        samples = VLLMServer(server.url, max_concurrency=1).sample(PROMPTS, WARPED)
        assert server.peak == 1
    with stub_server("vllm", model, faults=faults) as server:
        assert VLLMServer(server.url, max_concurrency=5).sample(PROMPTS, WARPED) == samples
        assert server.peak <= 5


@both
def test_progress(sampler, kind):
    seen = []
    with sampler(kind) as engine:
        samples = engine.sample(PROMPTS, WARPED, 3, seen.append)
        assert engine.sample([], WARPED) == []
        assert engine.sample([np.array(prompt) for prompt in PROMPTS], WARPED, 3) == samples
    assert sorted(seen) == sorted(len(sample.ids) for sample in samples)


def test_inside_a_running_event_loop(model):
    async def cell():
        return VLLMServer(server.url).sample(PROMPTS, WARPED)

    with stub_server("vllm", model) as server:
        assert len(asyncio.run(cell())) == len(PROMPTS)


# ---- Where an answer ends ----


@both
def test_stop_texts_end_an_answer_and_are_kept(sampler, kind):
    with sampler(kind) as engine:
        (free,) = engine.sample(PROMPTS[:1], PLAIN)
        a, b = free.ids[2:4]
        (stopped,) = engine.sample(PROMPTS[:1], replace(PLAIN, stop=("no such", f"w{a} w{b}")))
        (special,) = engine.sample(PROMPTS[:1], replace(PLAIN, stop=(f"w{b}",)))
    assert stopped.ids == free.ids[:4] and stopped.finish_reason == "stop"
    assert stopped.logprobs == free.logprobs[:4]
    assert special.ids == free.ids[: free.ids.index(b) + 1]


@both
def test_a_stop_text_may_be_a_special_token_s(sampler, kind):
    sampling = replace(PLAIN, eos_token_ids=(), stop=("<bos>",), max_completion_length=20)
    with sampler(kind) as engine:
        samples = engine.sample(PROMPTS, sampling)
    assert all((2 in sample.ids) == (sample.finish_reason == "stop") for sample in samples)
    assert any(sample.finish_reason == "stop" for sample in samples)
    assert all(sample.ids.index(2) == len(sample.ids) - 1 for sample in samples if 2 in sample.ids)


@both
def test_without_end_of_sequence_tokens_nothing_ends(sampler, kind):
    with sampler(kind) as engine:
        samples = engine.sample(PROMPTS, replace(PLAIN, eos_token_ids=(), max_completion_length=20))
    assert {(len(sample.ids), sample.finish_reason) for sample in samples} == {(20, "length")}
    assert any(EOS in sample.ids[:-1] for sample in samples)


def test_an_end_of_sequence_token_where_the_answer_has_to_end(model):
    """Some versions of vLLM look at the length first."""
    with stub_server("vllm", model) as server:
        (free,) = VLLMServer(server.url).sample(PROMPTS[:1], GREEDY)
        sampling = replace(GREEDY, eos_token_ids=(free.ids[0],), max_completion_length=1)
        fault = changed(lambda body: body["choices"][0].update(finish_reason="length", stop_reason=None))
        server_samples = VLLMServer(server.url).sample(PROMPTS[:1], sampling)
    with stub_server("vllm", model, faults=[fault]) as server:
        assert VLLMServer(server.url).sample(PROMPTS[:1], sampling) == server_samples
    assert server_samples[0].finish_reason == "stop"


# ---- Requests ----


def test_everything_is_said(model):
    """What a request leaves open, a server takes from the model's generation config."""
    sampling = replace(WARPED, stop=("w3 w4",), eos_token_ids=(1, 9))
    with stub_server("vllm", model) as server:
        VLLMServer(server.url).sample([np.array(PROMPTS[0])], replace(sampling, temperature=1.0, top_p=1.0), 5)
    assert server.requests == [
        {
            "model": "served",
            "prompt": [PROMPTS[0]],
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": 12,
            "seed": sampling.seed_of(5),
            "ignore_eos": True,
            "stop_token_ids": [1, 9],
            "skip_special_tokens": False,
            "stop": ["w3 w4"],
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
    ]
    assert set(servers.GENERATION_CONFIG) - {"eos_token_id"} < set(server.requests[0])


def test_a_prompt_without_room_for_its_answer(model):
    with stub_server("vllm", model) as server:
        for length, message in [
            # The server answers with what fits.
            (servers.CONTEXT - 5, "cut after 5 tokens, of 12 allowed, asked once.*`--max-model-len`, for prompt and"),
            (servers.CONTEXT, "status 400, 'max_tokens must be at least 1.*leaves no room.*`--max-model-len`"),
            (servers.CONTEXT + 1, "status 400, .Input length .129. exceeds.*leaves no room.*`--max-model-len`"),
        ]:
            server.requests.clear()
            with pytest.raises(ServerError, match=f"^Answer 8, http.*{message}") as caught:
                VLLMServer(server.url, max_concurrency=1).sample(
                    [[3], [3] * length], replace(PLAIN, eos_token_ids=()), 7
                )
            assert caught.value.row == 1 and len(server.requests) == 2
        with pytest.raises(ServerError, match="Answer 0.*out of vocabulary.*another tokenizer"):
            VLLMServer(server.url).sample([[999]], PLAIN)


# ---- Faults ----


def edit(**values):
    return changed(lambda body: body["choices"][0].update(values))


def edit_logprobs(change):
    def edited(body):
        values = body["choices"][0]["logprobs"]["token_logprobs"]
        values[1] = change(values[1])

    return changed(edited)


def old(body):
    """As of a server that knows neither option."""
    choice = body["choices"][0]
    choice["logprobs"]["tokens"] = [f"w{id}" for id in choice.pop("token_ids")]
    del choice["prompt_token_ids"]


def longer(body):
    choice = body["choices"][0]
    for values, more in [
        (choice["token_ids"], 5),
        (choice["logprobs"]["tokens"], "token_id:5"),
        (choice["logprobs"]["token_logprobs"], -1.0),
    ]:
        values.extend([more] * 20)


def ends(body, at, **reasons):
    """Shortened."""
    choice = body["choices"][0]
    for values in (choice["token_ids"], *choice["logprobs"].values()):
        del values[at:]
    choice.update(reasons)


def through_eos(body):
    body["choices"][0]["token_ids"][1] = EOS
    body["choices"][0]["logprobs"]["tokens"][1] = f"token_id:{EOS}"


def other_id(body):
    body["choices"][0]["token_ids"][0] += 1


BAD_ANSWERS = {
    "null": (edit_logprobs(lambda value: None), "null or NaN for the log-probability, at completion token 1 of"),
    "nan": (edit_logprobs(lambda value: math.nan), "null or NaN for the log-probability"),
    "logits": (edit_logprobs(lambda value: value + 99), "a log-probability above 0", "`raw_logprobs`"),
    "impossible": (edit_logprobs(lambda value: -9999.0), "without a probability", "`raw_logprobs`"),
    "no log-probabilities": (edit(logprobs=None), "log-probabilities of 12 tokens"),
    "one missing": (changed(lambda body: body["choices"][0]["logprobs"]["token_logprobs"].pop()), "11 log-prob"),
    "text": (changed(old), "text without its token ids", "0.10.2"),
    "no ids": (edit(token_ids=None, logprobs=None), "text without its token ids"),
    "two lists": (changed(other_id), "two lists of token ids that differ"),
    "negative": (edit(token_ids=[-1] * 12, logprobs={"token_logprobs": [-1.0] * 12}), "-1 for a token id"),
    "float": (edit(token_ids=[3.0] * 12, logprobs={"token_logprobs": [-1.0] * 12}), "3.0 for a token id"),
    "empty": (changed(lambda body: ends(body, 0)), "an empty answer"),
    "longer": (changed(longer), "32 tokens where 12 are the most"),
    "abort": (edit(finish_reason="abort"), "ended with 'abort'", "its log"),
    "unfinished": (edit(finish_reason=None), "ended with None"),
    "ended": (changed(lambda body: ends(body, 5, finish_reason="stop")), "ended by token", "--generation-config vllm"),
    "through": (changed(through_eos), "goes on after its end-of-sequence token 1"),
    "another prompt": (edit(prompt_token_ids=[4]), "an answer to another prompt"),
    "truncated": (servers.truncated, "cannot be read"),
    "other format": (changed(dict.clear), "cannot be read.*KeyError"),
    "500": (status(500, "CUDA out of memory"), "status 500, 'CUDA out of memory'"),
    "429": (status(429, Retry_After="0"), "status 429"),
    "hang up": (servers.hang_up, "no answer .RemoteProtocolError"),
    "slow": (servers.slow(4), "no answer .ReadTimeout", "raise `timeout`"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "slow" else ()) for n in BAD_ANSWERS])
def test_faults(model, name):
    """A fault that passes leaves no trace; one that stays is reported."""
    fault, message, *remedy = BAD_ANSWERS[name]
    # No shorter where nothing is late: a busy machine is.
    options = {"timeout": 2 if name == "slow" else 60, "max_concurrency": 1, "max_retries": 1}
    prompts = PROMPTS[:2]
    # Greedy answers of 12 tokens each.
    sampling = replace(GREEDY, eos_token_ids=(EOS,))
    with stub_server("vllm", model) as server:
        expected = VLLMServer(server.url).sample(prompts, sampling)
    assert [len(sample.ids) for sample in expected] == [12, 12]
    with stub_server("vllm", model, faults=[fault, honest, fault, honest]) as server:
        assert VLLMServer(server.url, **options).sample(prompts, sampling) == expected
        assert len(server.requests) == 4
    with stub_server("vllm", model, faults=[honest, *[fault] * 9]) as server:
        with pytest.raises(
            ServerError, match=f"(?s)^Answer 41, http://127.*{message}.*asked 2 times\\. .*{''.join(remedy)}"
        ) as caught:
            VLLMServer(server.url, **options).sample(prompts, sampling, 40)
    assert caught.value.row == 1 and len(server.requests) == 3


def test_retry_after_is_honoured(model):
    with stub_server("vllm", model, faults=[status(429, Retry_After="0.5")]) as server:
        start = time.monotonic()
        VLLMServer(server.url, model="served").sample(PROMPTS[:1], GREEDY)
    assert time.monotonic() - start > 0.5


def test_the_first_failure_ends_the_call(model):
    with stub_server("vllm", model, faults=[status(400), *[servers.slow(30)] * 99]) as server:
        start = time.monotonic()
        with pytest.raises(ServerError, match="Answer"):
            VLLMServer(server.url, model="served", max_concurrency=2).sample(PROMPTS, GREEDY)
        assert time.monotonic() - start < 15 and len(server.requests) <= 4


@pytest.mark.parametrize("version", [(0, 6, 3), (0, 10, 1), (0, 11)])
def test_ids_are_taken_from_where_they_are(model, version):
    with stub_server("vllm", model) as server:
        expected = VLLMServer(server.url).sample(PROMPTS, WARPED)
    with stub_server("vllm", model, version=version) as server:
        assert VLLMServer(server.url).sample(PROMPTS, WARPED) == expected
    # Whether or not it writes them instead of text.
    fault = changed(lambda body: body["choices"][0]["logprobs"].update(tokens=["w"] * 12))
    with stub_server("vllm", model, faults=[fault]) as server:
        assert len(VLLMServer(server.url, max_retries=0).sample(PROMPTS[:1], GREEDY)[0].ids) == 12


def test_a_limit_of_the_server_s_own(model):
    config = {"max_new_tokens": 6}
    with stub_server("vllm", model, generation_config=config) as server:
        with pytest.raises(ServerError, match="Answer 0.*cut after 6 tokens, of 12 allowed.*max_new_tokens"):
            VLLMServer(server.url).sample(PROMPTS[:1], GREEDY)
        # Asking again would change nothing.
        assert len(server.requests) == 1


def test_the_key_is_sent_and_told_nobody(monkeypatch, caplog, model):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(served.API_KEY_VARIABLE, f"{KEY}\n")
    echo = changed(lambda body: (body.clear(), body.update(headers=f"Bearer {KEY}")))
    faults = [status(500, f"try later, {KEY}"), echo, honest, status(401, f"Incorrect API key provided: {KEY}")]
    with stub_server("vllm", model, faults=faults) as server:
        engine = VLLMServer(server.url)
        engine.sample(PROMPTS[:1], GREEDY)
        with pytest.raises(ServerError, match="Answer 0.*status 401.*\\*\\*\\*.*TRL_LOPD_API_KEY") as caught:
            engine.sample(PROMPTS[:1], GREEDY)
        assert set(server.authorizations) == {f"Bearer {KEY}"}
    told = [caplog.text, repr(engine), repr(vars(engine)), *traceback.format_exception(caught.value)]
    assert not any(KEY in text for text in told)


# ---- At which temperature the log-probabilities are ----


@pytest.mark.parametrize(
    "warps", [{"temperature": 0.8}, {"temperature": 1.2}, {"top_p": 0.9}, {"temperature": 0.6, "top_p": 0.95}]
)
def test_log_probabilities_of_the_warped_distribution_are_refused(model, warps):
    sampling = replace(PLAIN, **warps)
    with stub_server("vllm", model, logprobs_mode="processed_logprobs") as server:
        with pytest.raises(ServerError, match=f"{server.url}: The log-prob.*not those at temp.*`--logprobs-mode raw"):
            VLLMServer(server.url).sample(PROMPTS, sampling)
        # There they are the same.
        for same in (PLAIN, GREEDY):
            assert len(VLLMServer(server.url).sample(PROMPTS, same)) == len(PROMPTS)


def noise(scale, seed=0):
    """What engines differ by between a prompt and what follows it."""
    rng = np.random.default_rng(seed)

    def change(body):
        if body["choices"][0]["prompt_logprobs"] is None:
            values = body["choices"][0]["logprobs"]["token_logprobs"]
            values[:] = [min(0.0, value + rng.normal(0, scale)) for value in values]

    return changed(change)


def test_rounding_is_no_temperature(model):
    with stub_server("vllm", model, faults=itertools.repeat(noise(0.1))) as server:
        VLLMServer(server.url).sample(PROMPTS[:4], replace(PLAIN, temperature=0.99))


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_a_vocabulary_with_tokens_that_cannot_be(model, temperature):
    """Where most have no probability, as in a vocabulary padded with -inf, there is still a comparison."""

    def padded(ids):
        logits = model(ids).logits.clone()
        logits[..., 8:] = -math.inf
        return SimpleNamespace(logits=logits)

    with stub_server("vllm", padded, faults=itertools.repeat(noise(0.02))) as server:
        VLLMServer(server.url).sample(PROMPTS[:4], replace(PLAIN, temperature=temperature))


def test_replicas_of_two_models_are_refused(model):
    replicas = itertools.cycle([model, make_model(seed=2)])
    with stub_server("vllm", *itertools.islice(replicas, 2)) as server:
        with pytest.raises(ServerError, match="replicas are different models"):
            VLLMServer(server.url, max_concurrency=1).sample(PROMPTS[:4], WARPED)


def test_the_comparison_costs_little(model):
    with stub_server("vllm", model) as server:
        VLLMServer(server.url).sample(PROMPTS, replace(WARPED, max_completion_length=100))
    scored = [body for body in server.requests if "prompt_logprobs" in body]
    assert len(server.requests) - len(scored) - len(PROMPTS) == len(scored) == 1
    assert len(scored[0]["prompt"][0]) == len(PROMPTS[0]) + 16


# ---- The engine in this process ----


def test_options_of_the_engine(vllm):
    engine = VLLMEngine("served", dtype="bfloat16", tensor_parallel_size=2)
    options = {"model": "served", "logprobs_mode": "raw_logprobs", "dtype": "bfloat16", "tensor_parallel_size": 2}
    assert vllm.engines[0].options == options and repr(engine) == "VLLMEngine('served')"
    VLLMEngine("served", logprobs_mode="raw_logprobs")
    with pytest.raises(ValueError, match="'processed_logprobs'.*temperature 1"):
        VLLMEngine("served", logprobs_mode="processed_logprobs")
    assert len(vllm.engines) == 2


def test_the_engine_gets_all_prompts_at_once(vllm):
    VLLMEngine("served").sample(PROMPTS, WARPED, 5)
    (parameters,) = vllm.engines[0].calls
    assert [p.seed for p in parameters] == [WARPED.seed_of(5 + row) for row in range(len(PROMPTS))]
    assert {(p.temperature, p.top_p, p.top_k, p.logprobs, p.ignore_eos) for p in parameters} == {
        (0.8, 0.9, -1, 0, True)
    }


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-lopd\[vllm\]'"):
        VLLMEngine("served")


def test_adapters_are_refused(tmp_path, vllm):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter.*merge_and_unload.*tokenizer"):
        VLLMEngine(str(tmp_path))
    assert vllm.engines == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"finish_reason": "abort"}, "ended with 'abort'"),
        ({"logprobs": None}, "log-probabilities of 12 tokens"),
        ({"token_ids": (), "logprobs": []}, "an empty answer"),
        ({"finish_reason": "stop"}, "ended by token"),
    ],
)
def test_wrong_answers_of_the_engine(vllm, values, message):
    vllm.edit = lambda output: vars(output).update(values)
    with pytest.raises(RuntimeError, match=f"^Answer 7, served: .*{message}"):
        VLLMEngine("served").sample(PROMPTS, GREEDY, 7)


def test_the_engine_s_answer_of_nan(vllm):
    vllm.edit = lambda output: setattr(output.logprobs[0][output.token_ids[0]], "logprob", math.nan)
    with pytest.raises(RuntimeError, match="null or NaN for the log-probability, at completion token 0 of"):
        VLLMEngine("served").sample(PROMPTS, GREEDY)
