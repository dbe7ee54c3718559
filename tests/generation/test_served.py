"""Teachers behind HTTP, against servers in miniature: the same numbers as locally, and nothing wrong ever taken."""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import os
import signal
import socket
import threading
import time
import traceback

import numpy as np
import pytest
import servers
import torch
from servers import changed, honest, status, stub_server, trl_client
from tiny import VOCAB, make_model, make_rollouts

from trl_lopd import score_rollouts
from trl_lopd.generation import servers as served
from trl_lopd.generation.servers import ServerError, SGLangServer, VLLMServer
from trl_lopd.identity.probes import probe_model

TEACHER_ID = "teacher@1-0123456789ab-01234567-89abcdef"
TEACHERS = {"vllm": VLLMServer, "sglang": SGLangServer}
KEY = "sk-very-secret-0123456789"

both = pytest.mark.parametrize("kind", TEACHERS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(served, "BACKOFF_SECONDS", 0.01)
    monkeypatch.delenv(served.API_KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def model():
    return make_model(seed=1)


@pytest.fixture(scope="module")
def rows():
    """Sequences and the lengths of their completions."""
    dataset = make_rollouts(12, seed=3)
    pairs = list(zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True))
    return [np.array([*prompt, *completion]) for prompt, completion in pairs], [len(c) for _, c in pairs]


@pytest.fixture(scope="module")
def local(model, tokenizer):
    return score_rollouts(make_rollouts(12, seed=3), model, processing_class=tokenizer, top_k=4)


@pytest.fixture(scope="module")
def card(model, tokenizer):
    return {"teachers": [{"id": TEACHER_ID, "probes": probe_model(model, tokenizer)}]}


def plain(model, sequences, lengths, k):
    """What the stub computes, without the way through HTTP."""
    for sequence, length in zip(sequences, lengths, strict=True):
        logprobs = servers.full_logprobs(model, sequence.tolist())[-length - 1 : -1]
        actual = logprobs.gather(-1, torch.tensor(sequence[-length:])[:, None]).squeeze(-1)
        values, ids = logprobs.topk(k)
        yield actual.numpy(), ids.int().numpy(), values.half().numpy()


# ---- The numbers ----


@both
@pytest.mark.parametrize("k", [0, 4, VOCAB])
def test_numbers_pass_unchanged(model, rows, kind, k):
    with stub_server(kind, model) as server:
        result = TEACHERS[kind](server.url).score(*rows, k)
    for scores, expected in zip(result, plain(model, *rows, k), strict=True):
        assert [array.dtype for array in scores] == [np.float32, np.int32, np.float16]
        for array, other in zip(scores, expected, strict=True):
            np.testing.assert_array_equal(array, other)
    # The token itself was outside the most likely four, and inside.
    if k == 4:
        inside = [(s.topk_ids == ids[-n:, None]).any(-1) for s, ids, n in zip(result, *rows, strict=True)]
        assert 0 < np.concatenate(inside).mean() < 1


@both
def test_equal_to_local_scoring(model, rows, local, kind):
    with stub_server(kind, model) as server:
        result = TEACHERS[kind](server.url).score(*rows, 4)
    for scores, row in zip(result, local.with_format("numpy"), strict=True):
        np.testing.assert_allclose(scores.logprobs, row["teacher_logprobs"], atol=1e-5)
        np.testing.assert_array_equal(scores.topk_ids, np.stack(row["teacher_topk_ids"]))
        np.testing.assert_allclose(scores.topk_logprobs, np.stack(row["teacher_topk_logprobs"]), atol=2e-3, rtol=2e-3)


def test_vllm_is_asked_as_trl_asks(monkeypatch, model, rows):
    """The same requests, and the same numbers where TRL's client has them."""
    sequences, lengths = rows
    with stub_server("vllm", model) as server, trl_client(monkeypatch, server) as client:
        prompts = [len(sequence) - length for sequence, length in zip(sequences, lengths, strict=True)]
        theirs = client.get_sequence_logprobs([s.tolist() for s in sequences], prompts, top_logprobs=4, chunk_size=1)
        asked, server.requests = server.requests, []
        ours = VLLMServer(server.url).score(sequences, lengths, 4)

        def in_order(requests):
            return sorted(requests, key=lambda body: body["prompt"])

        assert in_order(asked) == in_order(server.requests)
    for row, scores in enumerate(ours):
        np.testing.assert_array_equal(scores.logprobs, np.array(theirs["actual_logprobs"][row], np.float32)[:, 0])
        np.testing.assert_array_equal(scores.topk_ids, theirs["logprob_token_ids"][row])
        np.testing.assert_array_equal(scores.topk_logprobs, np.array(theirs["logprobs"][row], np.float16))


def test_sglang_is_asked_for_the_completion_only(model):
    with stub_server("sglang", model) as server:
        SGLangServer(server.url).score([np.arange(3, 12)], [4], 2)
    assert server.requests == [
        {
            "input_ids": list(range(3, 12)),
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 4,
            "top_logprobs_num": 2,
        }
    ]


def test_sglang_clips_the_last_id(model):
    """The last of the vocabulary comes back as 0; that is the only change of an id that is let pass."""
    sequence = np.array([5, VOCAB - 1, 7, VOCAB - 1])
    with stub_server("sglang", model) as server:
        (scores,) = SGLangServer(server.url).score([sequence], [3], 1)
    np.testing.assert_array_equal(scores.logprobs, next(plain(model, [sequence], [3], 1))[0])


def test_vllm_writes_a_number_for_minus_infinity(model):
    sequence = np.arange(3, 12)
    expected, _, top = next(plain(model, [sequence], [8], VOCAB))
    limit = np.median(expected).item()

    def change(body):
        servers.every_logprob(body, lambda value: value if value >= limit else -9999.0)

    with stub_server("vllm", model, faults=[changed(change)]) as server:
        (scores,) = VLLMServer(server.url, max_retries=0).score([sequence], [8], VOCAB)
    np.testing.assert_array_equal(scores.logprobs, np.where(expected >= limit, expected, -np.inf))
    assert 0 < np.isneginf(scores.logprobs).mean() < 1
    assert np.isneginf(scores.topk_logprobs[top < limit - 0.01]).all()


def test_inside_a_running_event_loop(model, rows):
    async def cell():
        return VLLMServer(server.url).score(*rows, 1)

    with stub_server("vllm", model) as server:
        assert len(asyncio.run(cell())) == len(rows[0])


@pytest.mark.parametrize("kind", ["vllm", pytest.param("sglang", marks=pytest.mark.slow)])
def test_bounded_concurrency(model, kind):
    sequences, lengths = [np.arange(3, 9)] * 24, [3] * 24
    for limit in (1, 5):
        faults = itertools.repeat(servers.slow(0.03))
        with stub_server(kind, model, faults=faults) as server:
            TEACHERS[kind](server.url, max_concurrency=limit).score(sequences, lengths, 1)
        assert server.peak == limit and len(server.requests) == 24


def test_order_is_that_of_the_call(model, rows):
    faults = itertools.chain.from_iterable(itertools.repeat((servers.slow(0.05), honest, status(500))))
    with stub_server("sglang", model, faults=faults) as server:
        result = SGLangServer(server.url).score(*rows, 0)
    for scores, (expected, _, _) in zip(result, plain(model, *rows, 1), strict=True):
        np.testing.assert_array_equal(scores.logprobs, expected)


@pytest.mark.parametrize(("length", "k"), [(0, 1), (6, 1), (7, 1), (3, -1)])
def test_what_cannot_be_scored(length, k):
    with pytest.raises(ValueError, match="cannot be scored|`top_k` is 0 or more"):
        VLLMServer("http://127.0.0.1:1").score([np.arange(3, 9)], [length], k)


def test_nothing_to_score(model):
    with stub_server("sglang", model) as server:
        assert SGLangServer(server.url).score([], [], 4) == []


# ---- Faults ----


def wrong_ids(body):
    if "choices" in body:
        position = body["choices"][0]["prompt_logprobs"][-1]
        position["999"] = position.pop(next(iter(position)))
    else:
        body["meta_info"]["input_token_logprobs"][-1][1] = 999


def one_too_few(body):
    if "choices" in body:
        # k tokens, but one of them is the token itself, far below the others.
        position = body["choices"][0]["prompt_logprobs"][-1]
        del position[next(token for token, entry in position.items() if entry["rank"] == 2)]
    else:
        body["meta_info"]["input_top_logprobs"][-1].pop()


def shifted(body):
    """The most likely tokens of the position before."""
    if "choices" in body:
        last = body["choices"][0]["prompt_logprobs"]
        for position in last[1:]:
            own = position[next(iter(position))]
            own["logprob"] = own["logprob"] / 2 - 0.01
    else:
        top = body["meta_info"]["input_top_logprobs"]
        top[2:] = top[1:-1]


BAD_ANSWERS = {
    "null": (changed(servers.null_logprobs), "null or NaN for the log-probability, at completion token 3 of 4"),
    "nan": (changed(servers.nan_logprobs), "null or NaN for the log-probability, at completion token 3 of 4"),
    "short": (changed(servers.short), "log-probabilities of"),
    "ids": (changed(wrong_ids), "completion token 3 was sent as id 11 and scored as"),
    "k": (changed(one_too_few), "of the 2 most likely tokens at completion token 3"),
    "logits": (changed(lambda body: servers.every_logprob(body, lambda value: value + 9)), "above 0"),
    "shifted": (changed(shifted), "contradict the score of the token itself"),
    "truncated": (servers.truncated, "cannot be read"),
    "other format": (changed(dict.clear), "cannot be read.*KeyError"),
}
NO_ANSWERS = {
    "500": (status(500, "CUDA out of memory"), "status 500, 'CUDA out of memory'"),
    "503": (status(503), "status 503"),
    "429": (status(429, Retry_After="0"), "status 429"),
    "timeout": (servers.slow(4), "no answer .ReadTimeout"),
    "hang up": (servers.hang_up, "no answer .RemoteProtocolError"),
    "cut off": (servers.cut_off, "no answer .RemoteProtocolError"),
}
FAULTS = BAD_ANSWERS | NO_ANSWERS
# What fails before there is an answer is no matter of its format.
CASES = [(kind, name) for kind in TEACHERS for name in BAD_ANSWERS] + [("vllm", name) for name in NO_ANSWERS]


def teacher_of(kind, server, name, **options):
    # No shorter where nothing is late: a busy machine is.
    return TEACHERS[kind](server.url, timeout=2 if name == "timeout" else 60, **options)


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*case, marks=pytest.mark.slow if "timeout" in case else ()) for case in CASES],
)
def test_a_fault_that_passes(model, kind, name):
    sequence, expected = np.arange(3, 12), next(plain(model, [np.arange(3, 12)], [4], 2))
    with stub_server(kind, model, faults=[FAULTS[name][0]] * 2) as server:
        (scores,) = teacher_of(kind, server, name, max_retries=2).score([sequence], [4], 2)
    assert len(server.requests) == 3
    for array, other in zip(scores, expected, strict=True):
        np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_fault_that_stays(model, kind, name):
    fault, message = FAULTS[name]
    with stub_server(kind, model, faults=[honest, *[fault] * 9]) as server:
        teacher = teacher_of(kind, server, name, max_retries=1, max_concurrency=1)
        with pytest.raises(ServerError, match=f"(?s)^Row 1, http://127.*{message}.*asked 2 times\\. ") as caught:
            teacher.score([np.arange(3, 12)] * 2, [4, 4], 2)
    assert caught.value.row == 1 and len(server.requests) == 3


@both
def test_bad_input_is_not_repeated(model, kind):
    with stub_server(kind, model) as server:
        with pytest.raises(ServerError, match="Row 0.*status 400, 'Token id 999 is out of vocabulary'.*another token"):
            TEACHERS[kind](server.url).score([np.array([3, 999, 5])], [2], 1)
        assert len(server.requests) == 1


@both
@pytest.mark.parametrize(
    ("code", "remedy"), [(401, served.API_KEY_VARIABLE), (404, "http://localhost:8000"), (413, "not help")]
)
def test_refusals_say_what_to_do(model, kind, code, remedy):
    with stub_server(kind, model, faults=[status(code, "no")]) as server:
        with pytest.raises(ServerError, match=f"status {code}, 'no'.*{remedy}"):
            TEACHERS[kind](server.url).score([np.arange(3, 12)], [4], 1)
        assert len(server.requests) == 1


def test_retry_after_is_honoured(model):
    with stub_server("vllm", model, faults=[status(429, Retry_After="1")]) as server:
        start = time.monotonic()
        VLLMServer(server.url, model="served").score([np.arange(3, 12)], [4], 1)
    assert 0.9 < time.monotonic() - start < 15


@pytest.mark.parametrize("value", ["", "soon", "-3", "nan", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_retry_after_that_says_nothing(value):
    assert served._retry_after(served.httpx.Response(429, headers={"Retry-After": value})) == 0.0


def test_waits_double_and_differ(monkeypatch, model):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(served.asyncio, "sleep", sleep)
    monkeypatch.setattr(served, "BACKOFF_SECONDS", 1.0)
    monkeypatch.setattr(served, "MAX_BACKOFF_SECONDS", 8.0)
    with stub_server("vllm", model, faults=[status(502)] * 6) as server:
        VLLMServer(server.url, model="served").score([np.arange(3, 12)], [4], 1)
    assert len(waits) == 6 and len(set(waits)) == 6
    assert all(0.5 * base <= wait <= 1.5 * base for wait, base in zip(waits, [1, 2, 4, 8, 8, 8], strict=True))


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match="no answer .ConnectError.*asked 2 times.*Is the server up"):
        SGLangServer(url, max_retries=1).score([np.arange(3, 12)], [4], 1)


def test_a_connection_that_the_server_keeps_no_longer(model, rows):
    sequences, lengths = rows
    with stub_server("vllm", model, faults=[servers.closed_at_the_next_request] * len(lengths)) as server:
        teacher = VLLMServer(server.url, model="served", max_retries=0, max_concurrency=2)
        assert len(teacher.score(sequences, lengths, 1)) == len(lengths)


def test_another_server_there(model):
    with stub_server("vllm", model) as server:
        with pytest.raises(ServerError, match="status 404"):
            SGLangServer(server.url).score([np.arange(3, 12)], [4], 1)


def test_the_first_failure_ends_the_call(model):
    """Without waiting for rows that are in their turn."""
    faults = [status(400), *[servers.slow(30)] * 99]
    with stub_server("vllm", model, faults=faults) as server:
        start = time.monotonic()
        with pytest.raises(ServerError, match="Row"):
            VLLMServer(server.url, model="served", max_concurrency=2).score([np.arange(3, 12)] * 50, [4] * 50, 1)
        assert time.monotonic() - start < 15
        assert len(server.requests) <= 4
    assert not any("portal" in thread.name for thread in threading.enumerate())


def test_two_scores_of_one_token_that_differ(model):
    """SGLang answers with two lists: here the token is among the most likely ones, with another score."""

    def change(body):
        body["meta_info"]["input_token_logprobs"][-1][0] -= 0.3

    with stub_server("sglang", model, faults=[changed(change)]) as server:
        with pytest.raises(ServerError, match="contradict the score of the token itself, at completion token 3"):
            SGLangServer(server.url, max_retries=0).score([np.arange(3, 12)], [4], VOCAB)


def test_an_interrupt_ends_the_call(model):
    with stub_server("sglang", model, faults=itertools.repeat(servers.slow(30))) as server:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        start = time.monotonic()
        # A worker of pytest-xdist ignores it.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            SGLangServer(server.url).score([np.arange(3, 12)] * 9, [4] * 9, 1)
        signal.signal(signal.SIGINT, handler)
        assert time.monotonic() - start < 15
    assert not any("portal" in thread.name for thread in threading.enumerate())


# ---- Models, addresses, options ----


def test_names_of_served_models(model):
    arguments = [np.arange(3, 12)], [4], 1
    with stub_server("vllm", model, names=("base", "served")) as server:
        with pytest.raises(ServerError, match="serves .'base', 'served'.. Say which"):
            VLLMServer(server.url).score(*arguments)
        VLLMServer(server.url + "/v1/", model="served").score(*arguments)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "served", ""])
def test_addresses(url):
    with pytest.raises(ValueError, match="is like http://localhost:8000"):
        VLLMServer(url)


@pytest.mark.parametrize("options", [{"max_concurrency": 0}, {"timeout": 0}, {"max_retries": -1}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="`max_retries` is 0 or more"):
        SGLangServer("http://localhost:1", **options)


# ---- The API key ----


@both
def test_the_key_is_sent_and_told_nobody(monkeypatch, caplog, model, tokenizer, kind):
    caplog.set_level(logging.DEBUG)
    # As people paste it.
    monkeypatch.setenv(served.API_KEY_VARIABLE, f"{KEY}\n")
    echo = changed(lambda body: (body.clear(), body.update(headers=f"Bearer {KEY}")))
    faults = [status(500, f"try later, {KEY}"), echo, honest, status(401, f"Incorrect API key provided: {KEY}")]
    with stub_server(kind, model, faults=faults) as server:
        teacher = TEACHERS[kind](server.url, processing_class=tokenizer)
        teacher.score([np.arange(3, 12)], [4], 1)
        with pytest.raises(ServerError) as caught:
            teacher.score([np.arange(3, 12)], [4], 1)
        assert set(server.authorizations) == {f"Bearer {KEY}"} and len(server.authorizations) == 4
    assert "***" in str(caught.value) and "status 500" in caplog.text
    told = [caplog.text, repr(teacher), repr(vars(teacher)), repr(caught.value), repr(vars(caught.value))]
    told += traceback.format_exception(caught.value)
    told += [repr(vars(record)) for record in caplog.records]
    assert not any(KEY in text for text in told)

    monkeypatch.delenv(served.API_KEY_VARIABLE)
    with stub_server(kind, model) as server:
        TEACHERS[kind](server.url).score([np.arange(3, 12)], [4], 1)
        assert server.authorizations == [None]


def test_a_key_that_is_none(monkeypatch):
    monkeypatch.setenv(served.API_KEY_VARIABLE, f"{KEY}\n{KEY}")
    with pytest.raises(ValueError, match=served.API_KEY_VARIABLE) as caught:
        VLLMServer("http://127.0.0.1:1").score([np.arange(3, 12)], [4], 1)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("url", [f"http://user:{KEY}@host:8000", f"http://host/?key={KEY}"])
def test_a_key_in_the_address(url):
    with pytest.raises(ValueError, match="no user, password or query") as caught:
        VLLMServer(url)
    assert KEY not in str(caught.value)


# ---- The self-test ----


@both
def test_self_test_passes(model, tokenizer, card, kind):
    with stub_server(kind, model) as server:
        assert TEACHERS[kind](server.url, processing_class=tokenizer).self_test(card) == f"{TEACHER_ID}#probed"
        before = len(server.requests)
        assert TEACHERS[kind](server.url, processing_class=tokenizer).self_test() is None
        assert TEACHERS[kind](server.url).self_test({"teachers": [{"id": TEACHER_ID}]}, list(range(3, 20))) is None
        assert len(server.requests) - before == 11


@pytest.mark.parametrize(("kind", "with_card"), [("vllm", True), ("sglang", False)])
def test_self_test_refuses_a_replica_that_is_off(model, tokenizer, card, kind, with_card):
    faults = itertools.cycle([honest, changed(servers.off_by_half_a_nat)])
    with stub_server(kind, model, faults=faults) as server:
        teacher = TEACHERS[kind](server.url, processing_class=tokenizer)
        with pytest.raises(ServerError, match="self-test of http.*disagrees with itself.*0.500 nats a token"):
            teacher.self_test(card if with_card else None)


@both
def test_self_test_refuses_another_tokenizer(model, tokenizer, kind):
    texts = [f"w{(token * 7) % VOCAB}" for token in range(VOCAB)]
    with stub_server(kind, model, texts=texts) as server:
        teacher = TEACHERS[kind](server.url, processing_class=tokenizer)
        with pytest.raises(ServerError, match="another tokenizer: token id .* is 'w.*' there and 'w.*' here"):
            teacher.self_test()
        assert len(server.requests) == 1
    # One with fewer tokens.
    with stub_server(kind, model, texts=["", *(f"w{token}" for token in range(1, 20))]) as server:
        with pytest.raises(ServerError, match="self-test.*status 400, 'Token id .* is out of vocabulary'"):
            TEACHERS[kind](server.url, processing_class=tokenizer).self_test()


@both
def test_self_test_takes_no_offence_at_spaces(model, tokenizer, kind):
    texts = [f" {tokenizer.decode([token])}" if token % 3 else "\ufffd" for token in range(VOCAB)]
    with stub_server(kind, model, texts=texts) as server:
        assert TEACHERS[kind](server.url, processing_class=tokenizer).self_test() is None


def test_self_test_refuses_another_model(tokenizer, card):
    with stub_server("sglang", make_model(seed=2)) as server:
        with pytest.raises(ServerError, match="self-test.*does not answer the probes"):
            SGLangServer(server.url, processing_class=tokenizer).self_test(card)


def test_self_test_with_limits_of_ones_own(model, card):
    near = copy.deepcopy(model).to(torch.bfloat16)
    with stub_server("sglang", near) as server:
        teacher = SGLangServer(server.url)
        assert teacher.self_test(card) is not None
        with pytest.raises(ServerError, match="does not answer the probes"):
            teacher.self_test(card, tolerance=1e-4)


def test_self_test_refuses_a_start_that_is_off(model, tokenizer):
    """A server whose answers depend on where it is told to begin."""

    def change(body):
        if len(body["meta_info"]["input_token_logprobs"]) < 90:
            servers.off_by_half_a_nat(body)

    with stub_server("sglang", model, faults=itertools.repeat(changed(change))) as server:
        with pytest.raises(ServerError, match="disagrees with itself"):
            SGLangServer(server.url, processing_class=tokenizer).self_test()


def test_self_test_on_a_server_in_trouble(model, tokenizer):
    with stub_server("vllm", model, faults=[status(500), servers.truncated]) as server:
        assert VLLMServer(server.url, processing_class=tokenizer).self_test() is None
    with stub_server("vllm", model, faults=itertools.repeat(status(500))) as server:
        with pytest.raises(ServerError, match="self-test.*status 500"):
            VLLMServer(server.url, processing_class=tokenizer, max_retries=1).self_test()


def test_self_test_with_nothing_to_test_with():
    for arguments in ((), ({"teachers": []},), (None, [3, 4, 5])):
        with pytest.raises(ValueError, match="nothing to test|4 or more"):
            VLLMServer("http://127.0.0.1:1").self_test(*arguments)
