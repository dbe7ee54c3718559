"""Servers in miniature on loopback: vLLM's and SGLang's documented formats over a tiny model, and what goes wrong."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from conftest import make_tokenizer


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


def answer_vllm(model, body: dict, texts: list[str]) -> dict:
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
        requests: Bodies of the requests for scores, as they came.
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
    texts: list[str] | None = None,
):
    """
    A server of `kind` "vllm" or "sglang" whose requests go to `replicas` in turn.

    `faults` are what happens to successive requests, honest answers when they run out; `names` are the served models;
    `texts` the tokenizer's text of each token. Ids beyond `texts` are refused.
    """
    if texts is None:
        texts = [make_tokenizer().decode([token]) for token in range(len(make_tokenizer()))]
    path, ids_key, answer = FORMATS[kind]
    turn, to_happen = itertools.cycle(replicas), iter(faults)
    # Models take turns in the order of requests; what happens then, they do at the same time.
    lock, count = threading.Lock(), itertools.count()
    running: set[int] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body are two writes: 40 ms apart otherwise.
        disable_nagle_algorithm = True

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
            self.wfile.write(data)

        def do_GET(self):
            models = {"data": [{"id": name} for name in names]}
            self.reply(200, json.dumps(models if self.path == "/v1/models" else {}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != path:
                return status(404, f"no {self.path} here")(self, {})
            with lock:
                running.add(request := next(count))
                server.peak = max(server.peak, len(running))
                server.requests.append(body)
                server.authorizations.append(self.headers["Authorization"])
                fault, model = next(to_happen, honest), next(turn)
                ids = body[ids_key]
                largest = max(max(ids) if isinstance(ids[0], int) else max(map(max, ids)), 0)
                if largest >= len(texts):
                    fault, result = status(400, f"Token id {largest} is out of vocabulary"), {}
                else:
                    result = answer(model, body, texts)
            try:
                fault(self, result)
            except (BrokenPipeError, ConnectionResetError):
                # The client has given up.
                self.close_connection = True
            finally:
                with lock:
                    running.discard(request)

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
