"""Servers in miniature on loopback: vLLM's and SGLang's documented formats over a tiny model, and what goes wrong."""

from __future__ import annotations

import itertools
import json
import math
import select
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import NamedTuple

import torch
from tiny import make_tokenizer


def full_logprobs(model, ids: list[int]) -> torch.Tensor:
    """`(tokens, vocabulary)`, the plain way."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


# ---- The formats ----


def vllm_logprobs(model, ids: list[int], k: int, texts: list[str]) -> list[dict | None]:
    """`prompt_logprobs` of a choice as vLLM writes it: the `k` most likely tokens and always the actual one."""
    result: list[dict | None] = [None]
    for actual, row in zip(ids[1:], full_logprobs(model, ids), strict=False):
        rank = {token: rank for rank, token in enumerate(row.argsort(descending=True).tolist(), 1)}
        shown = [actual, *(token for token in rank if rank[token] <= k and token != actual)]
        result.append(
            {
                str(token): {
                    "logprob": row[token].item() if row[token] > -math.inf else -9999.0,
                    "rank": rank[token],
                    "decoded_token": texts[token],
                }
                for token in shown
            }
        )
    return result


# What a model's generation_config.json may say, which a server of vLLM applies to what a request leaves open.
GENERATION_CONFIG = {
    "temperature": 0.3,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.2,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "eos_token_id": [1, 7],
}
CONTEXT = 128
# Of the tests' tokenizer.
SPECIAL = {0, 1, 2}


class Refused(Exception):
    """An answer of status 400."""


class Answer(NamedTuple):
    """What vLLM samples: log-probabilities at temperature 1 and as warped, each `(tokens, vocabulary)`."""

    ids: list[int]
    text: str
    raw: torch.Tensor
    warped: torch.Tensor
    finish_reason: str
    stop_reason: int | str | None


@cache
def next_logits(model, ids: tuple[int, ...]) -> torch.Tensor:
    """`(vocabulary,)`. Tests ask for the same answers again and again."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float()


def vllm_sample(model, prompt: list[int], parameters: dict, texts: list[str]) -> Answer:
    """One answer as vLLM's `SamplingParams` say, to which the model's own end-of-sequence tokens are added."""
    get = parameters.get
    own_ends = get("eos_token_id", [1])
    generator = torch.Generator().manual_seed(parameters["seed"])
    longest = min(get("max_tokens", 16), get("max_new_tokens", CONTEXT))
    ids, raw, warped = [], [], []
    while True:
        logits = next_logits(model, (*prompt, *ids)).clone()
        raw.append(logits.log_softmax(-1))
        penalty, seen = get("repetition_penalty", 1.0), torch.tensor(sorted({*prompt, *ids}))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        for id in set(ids):
            logits[id] -= get("frequency_penalty", 0.0) * ids.count(id) + get("presence_penalty", 0.0)
        temperature = get("temperature", 1.0)
        if temperature < 1e-5:
            ids.append(int(logits.argmax()))
        else:
            logits = logits / temperature
            p, order = logits.softmax(-1).sort(descending=True)
            out = p.cumsum(-1) - p >= get("top_p", 1.0)
            out |= p < get("min_p", 0.0) * p[0]
            if get("top_k", 0) > 0:
                out[get("top_k") :] = True
            logits[order[out]] = -math.inf
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        warped.append(logits.log_softmax(-1))

        def text() -> str:
            skipped = SPECIAL if get("skip_special_tokens", True) else ()
            return " ".join(texts[id] for id in ids if id not in skipped)

        end = None
        if ids[-1] in own_ends and not get("ignore_eos", False):
            end = "stop", None if ids[-1] == own_ends[0] else ids[-1]
        elif ids[-1] in (get("stop_token_ids") or ()):
            end = "stop", ids[-1]
        elif found := [stop for stop in get("stop") or () if stop in text()]:
            end = "stop", found[0]
        elif len(ids) == longest or len(prompt) + len(ids) == CONTEXT:
            end = "length", None
        if end is not None:
            before = text().partition(end[1])[0] if isinstance(end[1], str) else text()
            return Answer(ids, before, torch.stack(raw), torch.stack(warped), *end)


def answer_vllm_sample(
    model,
    body: dict,
    texts: list[str],
    generation_config: dict | None = None,
    logprobs_mode: str = "raw_logprobs",
    version: tuple[int, ...] = (0, 11),
) -> dict:
    (prompt,) = body["prompt"]
    config = GENERATION_CONFIG if generation_config is None else generation_config
    if not 0 <= body["temperature"] <= 2:
        raise Refused(f"temperature must be in [0, 2], got {body['temperature']}.")
    answer = vllm_sample(model, prompt, config | body, texts)
    shown = answer.warped if logprobs_mode == "processed_logprobs" else answer.raw
    as_ids = body.get("return_tokens_as_token_ids") and version >= (0, 6, 3)

    def word(token: int) -> str:
        return f"token_id:{token}" if as_ids else texts[token]

    token_logprobs = [max(row[id].item(), -9999.0) for row, id in zip(shown, answer.ids, strict=True)]
    top = []
    for row, id in zip(shown, answer.ids, strict=True):
        tokens = [id, *row.topk(body["logprobs"]).indices.tolist()]
        top.append({word(token): max(row[token].item(), -9999.0) for token in tokens})
    words = [word(id) for id in answer.ids]
    choice = {
        "index": 0,
        "text": answer.text,
        "logprobs": {
            "text_offset": [sum(map(len, words[:i])) for i in range(len(words))],
            "token_logprobs": token_logprobs,
            "tokens": words,
            "top_logprobs": top,
        },
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "prompt_logprobs": None,
    }
    if version >= (0, 10, 2):
        asked = body.get("return_token_ids")
        choice |= {"token_ids": answer.ids if asked else None, "prompt_token_ids": prompt if asked else None}
    counts = {"prompt_tokens": len(prompt), "completion_tokens": len(answer.ids)}
    return {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice],
        "usage": {**counts, "total_tokens": sum(counts.values())},
    }


def answer_vllm(model, body: dict, texts: list[str], **options) -> dict:
    longest = max(map(len, body["prompt"]))
    if longest > CONTEXT:
        raise Refused(f"Input length ({longest}) exceeds model's maximum context length ({CONTEXT}).")
    if longest == CONTEXT:
        # It lowers `max_tokens` to what fits, without a word, and needs one.
        raise Refused("max_tokens must be at least 1, got 0.")
    if body.get("prompt_logprobs") is None:
        assert body["model"] == "served"
        return answer_vllm_sample(model, body, texts, **options)
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("served", 1, 1.0)
    choices = [
        {"prompt_logprobs": vllm_logprobs(model, ids, body["prompt_logprobs"], texts)} for ids in body["prompt"]
    ]
    return {"choices": choices}


def answer_sglang(model, body: dict, texts: list[str]) -> dict:
    assert body["sampling_params"] == {"temperature": 0, "max_new_tokens": 0} and body["return_logprob"] is True
    ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
    with_text = body.get("return_text_in_logprobs", False)

    def entry(logprob: float, token: int) -> list:
        # SGLang clips the ids of images, which lie outside the vocabulary, and the last of the vocabulary with them.
        token = token if token < len(texts) - 1 else 0
        return [logprob, token, texts[token] if with_text else None]

    logprobs = full_logprobs(model, ids)[:-1]
    tokens = [entry(None, ids[0])]
    tokens += [entry(row[token].item(), token) for token, row in zip(ids[1:], logprobs, strict=True)]
    top = [None]
    for row in logprobs:
        values, indices = row.topk(k)
        # The most likely tokens are not clipped.
        top.append([[v, i, None] for v, i in zip(values.tolist(), indices.tolist(), strict=True)])
    # Whatever is asked for, the first has no log-probability.
    tokens, top = [[None, *tokens[start][1:]], *tokens[start + 1 :]], [None, *top[start + 1 :]]
    meta = {"prompt_tokens": len(ids), "completion_tokens": 0, "finish_reason": {"type": "length", "length": 0}}
    return {
        "text": "",
        "meta_info": {**meta, "input_token_logprobs": tokens} | ({"input_top_logprobs": top} if k else {}),
    }


FORMATS = {"vllm": ("/v1/completions", "prompt", answer_vllm), "sglang": ("/generate", "input_ids", answer_sglang)}


# ---- What goes wrong: each takes the handler and the honest answer, and answers ----


def honest(handler, answer: dict) -> None:
    handler.reply(200, json.dumps(answer))


def status(code: int, words: str = "it went wrong", **headers: str) -> Callable:
    def fault(handler, answer):
        handler.reply(code, json.dumps({"error": {"message": words, "code": code}}), **headers)

    return fault


def slow(seconds: float) -> Callable:
    def fault(handler, answer):
        time.sleep(seconds)
        honest(handler, answer)

    return fault


def truncated(handler, answer: dict) -> None:
    text = json.dumps(answer)
    handler.reply(200, text[: len(text) // 2])


def cut_off(handler, answer: dict) -> None:
    """The connection breaks in the middle of the body."""
    text = json.dumps(answer)
    handler.reply(200, text[: len(text) // 2], length=len(text))
    handler.close_connection = True


def hang_up(handler, answer: dict) -> None:
    handler.close_connection = True


def closed_at_the_next_request(handler, answer: dict) -> None:
    """The time to keep the connection is over just when it is used again."""
    honest(handler, answer)
    handler.wfile.flush()
    select.select([handler.connection], [], [])
    handler.close_connection = True


def changed(change: Callable[[dict], None]) -> Callable:
    """`change` edits the answer."""

    def fault(handler, answer):
        change(answer)
        honest(handler, answer)

    return fault


def every_logprob(body: dict, change: Callable[[float], float | None], first: int = 1) -> None:
    """Edits the log-probabilities of all positions from `first` on, in either format."""
    if "choices" in body:
        for position in body["choices"][0]["prompt_logprobs"][first:]:
            for entry in position.values():
                entry["logprob"] = change(entry["logprob"])
    else:
        for entry in body["meta_info"]["input_token_logprobs"][first:]:
            entry[0] = change(entry[0])
        for position in body["meta_info"].get("input_top_logprobs", [])[first:]:
            for entry in position:
                entry[0] = change(entry[0])


def null_logprobs(body: dict) -> None:
    every_logprob(body, lambda value: None, first=-1)


def nan_logprobs(body: dict) -> None:
    every_logprob(body, lambda value: math.nan, first=-1)


def off_by_half_a_nat(body: dict) -> None:
    every_logprob(body, lambda value: value - 0.5)


def short(body: dict) -> None:
    """Without the last token."""
    if "choices" in body:
        body["choices"][0]["prompt_logprobs"].pop()
    else:
        for name in ("input_token_logprobs", "input_top_logprobs"):
            del body["meta_info"].get(name, [])[1:]


# ---- The server ----


class StubServer(ThreadingHTTPServer):
    """
    Attributes:
        url: `http://127.0.0.1:port`.
        requests: Bodies of the requests for scores and samples, as they came.
        authorizations: Their `Authorization` headers, `None` for none.
        peak: The most of them at one time.
    """

    daemon_threads = True
    request_queue_size = 128

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def stub_server(
    kind: str,
    *replicas,
    faults: Iterable[Callable] = (),
    names: tuple[str, ...] = ("served",),
    roots: Mapping[str, str] = MappingProxyType({}),
    texts: list[str] | None = None,
    **options,
):
    """
    A server of `kind` "vllm" or "sglang" whose requests go to `replicas` in turn.

    `faults` are what happens to successive requests, honest answers when they run out; `names` are the served models
    and `roots` what they were loaded from; `texts` the tokenizer's text of each token; `options` those of
    `answer_vllm_sample`. Ids beyond `texts` are refused.
    """
    if texts is None:
        texts = [make_tokenizer().decode([token]) for token in range(len(make_tokenizer()))]
    path, ids_key, answer = FORMATS[kind]
    turn, to_happen = itertools.cycle(replicas), iter(faults)
    # Models take turns in the order of requests; what happens then, they do at the same time.
    lock, counting, count = threading.Lock(), threading.Lock(), itertools.count()
    running: set[int] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body are two writes: 40 ms apart otherwise.
        disable_nagle_algorithm = True
        number = None

        def log_message(self, *args):
            pass

        def reply(self, code: int, text: str, length: int | None = None, **headers: str) -> None:
            data = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(length or len(data)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            # Before the client can know of the answer and ask anew.
            self.ended()
            self.wfile.write(data)

        def ended(self) -> None:
            with counting:
                running.discard(self.number)

        def do_GET(self):
            # Both also say what the model was loaded from: a directory or Hub id, whatever name it is served under.
            models = {"data": [{"id": name, "root": roots.get(name, name), "owned_by": kind} for name in names]}
            self.reply(200, json.dumps(models if self.path == "/v1/models" else {}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != path:
                return status(404, f"no {self.path} here")(self, {})
            with counting:
                self.number = next(count)
                running.add(self.number)
                server.peak = max(server.peak, len(running))
            with lock:
                server.requests.append(body)
                server.authorizations.append(self.headers["Authorization"])
                fault, model = next(to_happen, honest), next(turn)
                ids = body[ids_key]
                largest = max(max(ids) if isinstance(ids[0], int) else max(map(max, ids)), 0)
                if largest >= len(texts):
                    fault, result = status(400, f"Token id {largest} is out of vocabulary"), {}
                else:
                    try:
                        result = answer(model, body, texts, **options)
                    except Refused as refused:
                        fault, result = status(400, str(refused)), {}
            try:
                fault(self, result)
            except (BrokenPipeError, ConnectionResetError):
                # The client has given up.
                self.close_connection = True
            finally:
                self.ended()

    server = StubServer(("127.0.0.1", 0), Handler)
    server.requests, server.authorizations, server.peak = [], [], 0
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def trl_client(monkeypatch, server: StubServer):
    """TRL's `VLLMClient` of a server."""
    from trl.generation import vllm_client

    # The client refuses to be made without vLLM installed, though it needs none of it to score.
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *args, **kwargs: True)
    client = vllm_client.VLLMClient(base_url=server.url)
    try:
        yield client
    finally:
        client.session.close()
