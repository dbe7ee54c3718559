"""Models behind HTTP: servers of vLLM and SGLang that score tokens already sampled, and of vLLM that sample.

A server answers with something even when it is wrong: replicas of different models, another tokenizer's ids, nulls
where a sum overflowed, defaults that were not asked for. Each answer is checked before it counts as scores or as a
sample, and a server before it scores.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from anyio.from_thread import start_blocking_portal

from ..errors import ServerError
from ..identity.probes import MAX_SPREAD, PROBE_REPEATS, probe_sequences, probed_entries, verify_served_teacher
from ..table.schema import TOLERANCE
from .samplers import Sample, Sampling
from .teachers import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "TRL_LOPD_API_KEY"

# The first wait before a request is repeated; it doubles each time, up to the second.
BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0
# A server that asks for a longer pause is asked again after this one.
MAX_RETRY_AFTER_SECONDS = 600.0

# A server whose log-probabilities are at the temperature of sampling is nats off on these tokens at this temperature;
# one that does not is off by what it rounds in computing a prompt and what follows it.
_HOT_TEMPERATURE = 2.0  # the highest that vLLM takes
_HOT_TOKENS = 16
_MAX_DIFFERENCE = 0.5

# What a server says while it is up but busy or slow. All of 500 and above are repeated too.
_BUSY = {408, 425, 429}

_REASONS_TO_REFUSE = (
    "a token id that is not in the server's vocabulary, because it has another tokenizer; a row as long as its "
    "context (`--max-model-len` in vLLM) or longer; `top_k` above its limit (`--max-logprobs` in vLLM)."
)
_REASONS_NOT_TO_SAMPLE = (
    "a prompt that leaves no room in the server's context: raise `--max-model-len`, or drop the prompt; a token id "
    "that is not in its vocabulary, because it has another tokenizer; a `temperature` above 2."
)
# JSON has no infinity: vLLM writes this for it.
_NO_PROBABILITY = -9999.0
# How vLLM writes a token if asked for ids.
_ID = "token_id:"
_OVERFLOWS = "The model overflows on it: serve it in bfloat16 or float32, or drop the row."


@cache
def _certificates() -> ssl.SSLContext:
    # Reading them takes longer than a short request.
    return httpx.create_ssl_context()


class Failure(Exception):
    """What is wrong with one answer, what to do if it stays wrong, and whether and after how long to ask again."""

    def __init__(self, what: str, remedy: str, wait: float = 0.0, may_pass: bool = True):
        super().__init__(what)
        self.what, self.remedy, self.wait, self.may_pass = what, remedy, wait, may_pass


class _Server:
    """What vLLM and SGLang have in common: each sequence is a request of its own, checked and repeated by itself."""

    _path: str
    # What to add to a request for the text of tokens.
    _text_options: dict[str, Any] = {}

    def __init__(
        self,
        base_url: str,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        max_concurrency: int = 32,
        timeout: float = 600.0,
        max_retries: int = 6,
    ):
        url = httpx.URL(base_url)
        if url.userinfo or url.query:
            # Said without the address: it holds what must not be in a log.
            raise ValueError(
                "The address of a server has no user, password or query: addresses are logged. Put the API key into "
                f"the environment variable {API_KEY_VARIABLE}."
            )
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"The address of a server is like http://localhost:8000, not {base_url!r}.")
        if max_concurrency < 1 or timeout <= 0 or max_retries < 0:
            raise ValueError(
                "`max_concurrency` and `timeout` are positive and `max_retries` is 0 or more; got "
                f"{max_concurrency}, {timeout} and {max_retries}."
            )
        # The paths of requests begin with it: /v1/completions.
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.processing_class = processing_class
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self._said = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def score(
        self,
        sequences: list[np.ndarray],
        completion_lengths: list[int],
        top_k: int,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> list[Scores]:
        """
        Scores the last tokens of each sequence: see [`Teacher`]. Holds no connection when it returns, and may be
        called where an event loop runs, as in a notebook.

        Raises:
            `ServerError`: at the first sequence that the server refuses, or that still fails when it has been asked
                `1 + max_retries` times: no answer, or one with null or NaN, for other or fewer tokens, or without the
                most likely ones. Its `row` is the sequence's position.
            `ValueError`: if a completion is empty or is the whole sequence, or if `top_k` is negative.
        """
        for row, (sequence, length) in enumerate(zip(sequences, completion_lengths, strict=True)):
            if not 0 < length < len(sequence):
                raise ValueError(
                    f"Row {row}: {length} of {len(sequence)} tokens cannot be scored. A completion has a token or "
                    "more, and follows one or more."
                )
        if top_k < 0:
            raise ValueError(f"`top_k` is 0 or more; got {top_k}.")

        async def one(client: httpx.AsyncClient, row: int) -> Scores:
            ids, length = np.asarray(sequences[row]).tolist(), int(completion_lengths[row])
            scores = await self._score(client, ids, length, top_k, row=row, name=f"Row {row}")
            advance(length)
            return scores

        return self._run(
            lambda client: self._side_by_side([partial(one, client, row) for row in range(len(sequences))])
        )

    async def _score(self, client: httpx.AsyncClient, ids: list[int], length: int, top_k: int, **about: Any) -> Scores:
        """Of the last `length` tokens; `about` is for messages, see `_ask`."""

        def parse(body: dict) -> Scores:
            return _scores(ids[-length:], top_k, *self._read(body, ids, length, top_k))

        return await self._ask(client, self._payload(ids, length, top_k), parse, **about)

    async def _side_by_side(self, jobs: list[Callable[[], Awaitable]]) -> list:
        """The results of the jobs, of which `max_concurrency` run at a time; the first that fails ends the others."""
        # Each holds its slot while it waits to be repeated: a server in trouble gets fewer requests.
        slots = asyncio.Semaphore(self.max_concurrency)

        async def one(job: Callable[[], Awaitable]) -> Any:
            async with slots:
                return await job()

        tasks = [asyncio.ensure_future(one(job)) for job in jobs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def self_test(
        self,
        card: dict[str, Any] | None = None,
        sequence: list[int] | None = None,
        *,
        tolerance: float = 0.6,
    ) -> str | None:
        """
        Whether this server may score a run; asked before the first row.

        - Its own text for each token is that of `processing_class`, if there is one and the server gives text.
        - Several copies of one sequence, sent together so that a balancer deals them to different replicas, get the
          same answers, whether most of the sequence is scored or its second half.
        - It answers the probes of a card as a teacher there does: see [`verify_served_teacher`].

        Args:
            card (`dict`, *optional*): A card's record. Without probes of a teacher in it, the last test is left out.
            sequence (`list[int]`, *optional*): Token ids to test with, 4 or more. Made from the tokenizer or the
                card's probes if not given.
            tolerance (`float`, *optional*, defaults to `0.6`): As in [`verify_served_teacher`].

        Returns:
            `str` or `None`: The id to write into the table, with the suffix `#probed`. `None` if no probes were
            compared: then it is for a person to declare who the teacher is.

        Raises:
            `ServerError`: if a test fails, or the server does.
            `ValueError`: if there is neither tokenizer nor probes nor `sequence`; if the card's probes are malformed.
        """
        probes = [entry["probes"]["sequences"] for entry in probed_entries(card or {})]
        if sequence is None:
            if self.processing_class is None and not probes:
                raise ValueError(
                    "There is nothing to test the server with: give `processing_class`, a card with probes, or "
                    "`sequence`, the token ids of a row."
                )
            halves = probe_sequences(self.processing_class) if self.processing_class is not None else probes[0]
            # The second half of a probe repeats its first.
            sequence = [id for probe in halves for id in probe[: len(probe) // 2]]
        if len(sequence) < 4:
            raise ValueError(f"The test takes a `sequence` of 4 or more tokens; got {len(sequence)}.")
        try:
            if self.processing_class is not None:
                self._check_texts(sequence)
            # A server that starts in the middle of a sequence must say of it what it says from the beginning.
            lengths = [len(sequence) - 1] * PROBE_REPEATS + [len(sequence) // 2]
            answers = [scores.logprobs for scores in self.score([np.array(sequence)] * len(lengths), lengths, 1)]
            tails = [logprobs[-lengths[-1] :] for logprobs in answers]
            spread = max(_spread(answers[:-1]), _spread(tails))
            if spread > MAX_SPREAD:
                raise ServerError(
                    f"It disagrees with itself: answers to one sequence lie {spread:.3f} nats a token apart (limit "
                    f"{MAX_SPREAD:g}). Its replicas are different models or run in different precisions, or an "
                    "answer depends on what else is in the batch. Serve one model in one precision, in a "
                    "batch-invariant mode if the server has one, or score with the teacher loaded locally."
                )
            if not probes:
                return None
            result = verify_served_teacher(self, card, tolerance)
        except ServerError as error:
            raise ServerError(f"The self-test of {self.base_url} fails. {error}") from error
        if not result.accepted:
            raise ServerError(f"The self-test of {self.base_url} fails. {result.reason}")
        return result.teacher

    def _payload(self, ids: list[int], length: int, top_k: int) -> dict[str, Any]:
        """The request's body."""
        raise NotImplementedError

    def _read(self, body: dict, ids: list[int], length: int, top_k: int) -> tuple[list, list, list, list]:
        """Of an answer, for the last `length` tokens: ids, log-probabilities, most likely ids and theirs."""
        raise NotImplementedError

    def _texts(self, body: dict, ids: list[int]) -> list[str | None]:
        """Of an answer, the text of each token but the first."""
        raise NotImplementedError

    async def _prepare(self, client: httpx.AsyncClient) -> None:
        """What a server has to be asked before it can be asked for scores or samples."""

    def _run(self, work: Callable) -> Any:
        """The result of `work(client)`, run in a thread with an event loop of its own."""

        async def connected():
            # Rows wait for their slot, where no time-out runs, and not for a connection. Each request has its own: one
            # that was kept may be closed by the server (vLLM: after 5 s) while this process reads other answers,
            # between httpx's check that it is open and the request.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            options = {"timeout": self.timeout, "limits": limits, "verify": _certificates()}
            async with httpx.AsyncClient(headers=authorization(), **options) as client:
                await self._prepare(client)
                return await work(client)

        # Leaving the block by an exception, Ctrl-C in this thread among them, cancels what runs in the other.
        with start_blocking_portal() as portal:
            return portal.start_task_soon(connected).result()

    async def _ask(
        self,
        client: httpx.AsyncClient,
        payload: dict[str, Any] | None,
        parse: Callable[[dict], Any],
        *,
        path: str | None = None,
        row: int | None = None,
        name: str | None = None,
        reasons: str = "",
    ) -> Any:
        """
        The parsed answer to one request, which is repeated while it fails in a way that may pass.

        `row` and `name` say what it is for, in an error and in its message; `reasons` why it may be refused.
        """
        where = self.base_url if name is None else f"{name}, {self.base_url}"
        for attempt in itertools.count(1):
            try:
                return await self._ask_once(client, payload, parse, path or self._path, reasons or _REASONS_TO_REFUSE)
            except Failure as failure:
                if attempt > self.max_retries or not failure.may_pass:
                    times = "once" if attempt == 1 else f"{attempt} times"
                    raise ServerError(f"{where}: {failure.what}, asked {times}. {failure.remedy}", row) from None
                # Jitter, so that rows that failed together do not return together.
                wait = min(BACKOFF_SECONDS * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1.5)
                wait = max(wait, min(failure.wait, MAX_RETRY_AFTER_SECONDS))
                # The first time it is news; a server in trouble fails many requests, and each of them again and again.
                level, self._said = (logging.INFO if self._said else logging.WARNING), True
                logger.log(level, f"{where}: {failure.what}. Asking again in {wait:.1f} s.")
                await asyncio.sleep(wait)
            except ServerError as error:
                raise ServerError(f"{where}: {error}", row) from None

    async def _ask_once(
        self, client: httpx.AsyncClient, payload: dict | None, parse: Callable, path: str, reasons: str
    ) -> Any:
        try:
            url = f"{self.base_url}{path}"
            response = await (client.get(url) if payload is None else client.post(url, json=payload))
        except httpx.RequestError as error:
            raise Failure(
                f"no answer ({type(error).__name__}{f': {error}' if str(error) else ''})",
                "Is the server up, and reachable from here? If it is slow, raise `timeout` or lower "
                "`max_concurrency`. Long rows with prompt log-probabilities can take a server out of memory.",
            ) from None
        status = response.status_code
        if status in _BUSY or status >= 500:
            raise Failure(
                f"status {status}, {_words(response)}",
                "Look into the server's log; lower `max_concurrency` if it is overloaded.",
                _retry_after(response),
            )
        if status != 200:
            raise ServerError(
                f"the server refuses with status {status}, {_words(response)}. {_remedy(status, reasons)}"
            )
        try:
            return parse(response.json())
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise Failure(
                f"an answer that cannot be read ({_quoted(repr(error))}): {_quoted(response.text)}",
                f"It is not in the format of {type(self).__name__}: is something else listening there, or is the "
                "answer cut off on its way?",
            ) from None

    def _check_texts(self, sequence: list[int]) -> None:
        """Raises a `ServerError` if the server's text for a token is not the tokenizer's."""

        async def texts(client: httpx.AsyncClient) -> list[str | None]:
            payload = self._payload(sequence, len(sequence) - 1, 1) | self._text_options
            return await self._ask(client, payload, lambda body: self._texts(body, sequence))

        for id, text in zip(sequence[1:], self._run(texts), strict=True):
            decoded, token = self.processing_class.decode([id]), self.processing_class.convert_ids_to_tokens(id)
            # A part of a character has no text of its own, and servers differ in the spaces around a word.
            if text is None or "\ufffd" in text + decoded or text.strip() in (decoded.strip(), token):
                continue
            raise ServerError(
                f"It has another tokenizer: token id {id} is {text!r} there and {decoded!r} here. Its scores would be "
                "of other words. Serve a teacher that shares the student's tokenizer."
            )


class VLLMServer(_Server):
    """
    A model behind `vllm serve`, by its completions endpoint.

    As a teacher it scores with `prompt_logprobs`, as TRL's `VLLMClient` asks for them; `top_k` above 20 needs a server
    started with `--max-logprobs`. As a student it samples, from vLLM 0.10.2 on. An API key is read from the
    environment variable `TRL_LOPD_API_KEY` at each call, and kept nowhere.

    Args:
        base_url (`str`): The server's address, `http://localhost:8000`.
        model (`str`, *optional*): The name under which the model is served. Asked of the server if not given.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): The model's tokenizer, which the
            self-test compares with the server's.
        max_concurrency (`int`, *optional*, defaults to `32`): Requests at a time.
        timeout (`float`, *optional*, defaults to `600.0`): Seconds without a byte from the server before a request is
            given up; it may wait in the server's queue meanwhile. A sampled answer comes whole, so this must be more
            than the longest takes.
        max_retries (`int`, *optional*, defaults to `6`): How often a request is repeated if there is no answer, a
            useless one, or one of status 408, 425, 429 or 500 and above. Waits begin at a second and double each time.

    Raises:
        `ValueError`: if an option is out of range, or if the address holds a user, a password or a query.
    """

    _path = "/v1/completions"

    def __init__(self, base_url: str, *, model: str | None = None, **options: Any):
        super().__init__(base_url, **options)
        self.model = model

    async def _prepare(self, client: httpx.AsyncClient) -> None:
        if self.model is not None:
            return
        names = [model["id"] for model in await self._served(client)]
        if len(names) != 1:
            # Adapters are served beside their base: to take the first could be to take another teacher.
            raise ServerError(f"{self.base_url} serves {names}. Say which is meant: `model=...`.")
        self.model = names[0]

    async def _served(self, client: httpx.AsyncClient) -> list[dict[str, Any]]:
        def parse(body: dict) -> list[dict[str, Any]]:
            return [{**model, "id": str(model["id"])} for model in body["data"]]

        return await self._ask(client, None, parse, path="/v1/models")

    def served(self) -> list[dict[str, Any]]:
        """Asks a server, of vLLM or SGLang, what it serves: an entry a model, with its name as `id`."""
        return self._run(self._served)

    def sample(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        first: int = 0,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> list[Sample]:
        """
        Answers each prompt once: see [`Sampler`]. The model's generation config has no say, its end-of-sequence
        tokens included. An answer has the same tokens in any call and order if the server computes a sequence the same
        in any batch; `--enable-prefix-caching`, vLLM's default, saves most of the work of repeated prompts.

        Raises:
            `ServerError`: at the first prompt that the server refuses, or that still fails when it has been asked
                `1 + max_retries` times: no answer, one with text for token ids, null or NaN, one that was given up,
                cut before `max_completion_length` or ended by a token that ends none. Or if the log-probabilities are
                not those at temperature 1. Its `row` is the prompt's position in the call; messages say the answer's
                number, `first + row`.
        """

        async def ask(client: httpx.AsyncClient, row: int, sampling: Sampling) -> Sample:
            prompt = np.asarray(prompts[row]).tolist()
            payload = {
                "model": self.model,
                "prompt": [prompt],
                **sampling_parameters(sampling, first + row),
                "logprobs": 1,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            }
            about = {"row": row, "name": f"Answer {first + row}", "reasons": _REASONS_NOT_TO_SAMPLE}
            return await self._ask(client, payload, lambda body: self._read_sample(body, prompt, sampling), **about)

        async def one(client: httpx.AsyncClient, row: int) -> Sample:
            answer = await ask(client, row, sampling)
            advance(len(answer.ids))
            return answer

        async def check(client: httpx.AsyncClient) -> None:
            longest = min(sampling.max_completion_length, _HOT_TOKENS)
            ends = {"eos_token_ids": (), "stop": ()}
            hot = replace(sampling, temperature=_HOT_TEMPERATURE, top_p=1.0, max_completion_length=longest, **ends)
            answer = await ask(client, 0, hot)
            # The same tokens as the end of a prompt, whose log-probabilities no version of vLLM warps.
            ids, length = [*np.asarray(prompts[0]).tolist(), *answer.ids], len(answer.ids)
            scores = await self._score(client, ids, length, 0, row=0, name=f"Scores of answer {first}")
            difference = np.abs(np.array(answer.logprobs) - scores.logprobs).mean()
            if difference > _MAX_DIFFERENCE:
                raise ServerError(
                    f"{self.base_url}: The log-probabilities of sampled tokens are not those at temperature 1 over "
                    f"the full vocabulary: they lie {difference:.3f} nats a token from the server's own scores of the "
                    "same tokens. Start it with `--logprobs-mode raw_logprobs`, as vLLM does by default and `trl "
                    "vllm-serve` does not. If it is, then its replicas are different models."
                )

        async def work(client: httpx.AsyncClient) -> list[Sample]:
            # Where sampling leaves the distribution as it is, there is one log-probability only.
            warps = sampling.temperature > 0 and (sampling.temperature != 1 or sampling.top_p < 1)
            checks = [partial(check, client)] if warps and prompts else []
            answers = [partial(one, client, row) for row in range(len(prompts))]
            return (await self._side_by_side(checks + answers))[len(checks) :]

        return self._run(work)

    def _payload(self, ids: list[int], length: int, top_k: int) -> dict[str, Any]:
        # As in TRL's client: vLLM has to sample a token, and 0 log-probabilities are easily taken for none wanted.
        sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": max(top_k, 1)}
        return {"model": self.model, "prompt": [ids], **sampling}

    def _read(self, body: dict, ids: list[int], length: int, top_k: int) -> tuple[list, list, list, list]:
        echoed, logprobs, topk_ids, topk_logprobs = [], [], [], []
        for id, position in self._positions(body, ids)[-length:]:
            shown = {int(token): entry for token, entry in (position or {}).items()}
            # The token itself is always among them; where it is not, another was scored in its place.
            echoed.append(id if id in shown or position is None else next(iter(shown), None))
            logprobs.append(_number(shown[id]) if id in shown else None)
            # The token itself comes on top of the k where it is not one of them: ranks tell which is which.
            of_rank = {entry["rank"]: token for token, entry in shown.items()}
            ranked = [of_rank[rank] for rank in range(1, top_k + 1) if rank in of_rank]
            topk_ids.append(ranked)
            topk_logprobs.append([_number(shown[token]) for token in ranked])
        return echoed, logprobs, topk_ids, topk_logprobs

    def _texts(self, body: dict, ids: list[int]) -> list[str | None]:
        positions = self._positions(body, ids)[1:]
        return [(position or {}).get(str(id), {}).get("decoded_token") for id, position in positions]

    def _read_sample(self, body: dict, prompt: list[int], sampling: Sampling) -> Sample:
        (choice,) = body["choices"]
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise Failure(
                "an answer to another prompt than was sent",
                "Something between here and the model changes token ids, or answers a request with another's. Talk "
                "to the server directly.",
            )
        logprobs = choice["logprobs"] or {}
        tokens = logprobs.get("tokens") or []
        written = [int(token[len(_ID) :]) if token.startswith(_ID) else None for token in tokens]
        ids = choice.get("token_ids")
        if ids is None:
            if not written or None in written:
                raise Failure(
                    "text without its token ids",
                    "vLLM sends them from version 0.10.2 on (`return_token_ids`): update the server, and talk to it "
                    "directly.",
                )
            ids = written
        elif written and None not in written and written != ids:
            raise Failure("two lists of token ids that differ", "That is an error in the server: update it.")
        reasons = choice["finish_reason"], choice.get("stop_reason")
        return checked_sample(ids, logprobs.get("token_logprobs") or [], *reasons, sampling)

    def _positions(self, body: dict, ids: list[int]) -> list[tuple[int, dict | None]]:
        """Each token and what the server says of it."""
        (choice,) = body["choices"]
        positions = choice["prompt_logprobs"] or []
        if len(positions) != len(ids):
            raise _too_short(len(positions), len(ids))
        return list(zip(ids, positions, strict=True))


class SGLangServer(_Server):
    """
    A teacher behind an SGLang server: `input_token_logprobs` of its `/generate` endpoint. It scores and does not
    sample.

    Only what follows the prompt is asked for, so that the server may keep the prompt in its prefix cache, once for
    all its completions. An API key is read from the environment variable `TRL_LOPD_API_KEY` at each call, and
    kept nowhere.

    Args:
        base_url (`str`): The server's address, `http://localhost:30000`.
        processing_class, max_concurrency, timeout, max_retries: As in [`VLLMServer`].

    Raises:
        `ValueError`: if an option is out of range, or if the address holds a user, a password or a query.
    """

    _path = "/generate"
    _text_options = {"return_text_in_logprobs": True}

    def _payload(self, ids: list[int], length: int, top_k: int) -> dict[str, Any]:
        return {
            "input_ids": ids,
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            # The first position asked for has no log-probability, hence one token of the prompt.
            "logprob_start_len": len(ids) - length - 1,
            "top_logprobs_num": top_k,
        }

    def _read(self, body: dict, ids: list[int], length: int, top_k: int) -> tuple[list, list, list, list]:
        entries = self._entries(body, "input_token_logprobs", length)
        echoed = [entry[1] for entry in entries]
        # SGLang clips ids, and the vocabulary's last to 0 with them: the only one that may come back changed.
        last = max(ids)
        echoed = [last if (id, sent) == (0, last) else id for id, sent in zip(echoed, ids[-length:], strict=True)]
        top = self._entries(body, "input_top_logprobs", length) if top_k else [[]] * length
        return (
            echoed,
            [entry[0] for entry in entries],
            [[entry[1] for entry in position or []] for position in top],
            [[entry[0] for entry in position or []] for position in top],
        )

    def _texts(self, body: dict, ids: list[int]) -> list[str | None]:
        entries = self._entries(body, "input_token_logprobs", len(ids) - 1)
        return [text if echo == id else None for id, (_, echo, text) in zip(ids[1:], entries, strict=True)]

    def _entries(self, body: dict, key: str, length: int) -> list:
        """The last `length` entries of a list in `meta_info`."""
        entries = body["meta_info"][key] or []
        if len(entries) < length:
            raise _too_short(len(entries), length)
        return entries[-length:]


def _scores(sent: list[int], top_k: int, echoed: list, logprobs: list, topk_ids: list, topk_logprobs: list) -> Scores:
    """The scores that a server's answer holds, or a `Failure` that says what is wrong with it."""
    for token, (id, echo) in enumerate(zip(sent, echoed, strict=True)):
        if echo != id:
            raise Failure(
                f"completion token {token} was sent as id {id} and scored as {echo}",
                "Something between here and the model changes token ids, or answers a request with another's. Talk "
                "to the server directly.",
            )
    # A null becomes NaN here.
    logprobs = np.array(logprobs, np.float32)
    _refuse(np.isnan(logprobs), "null or NaN for the log-probability", _OVERFLOWS)
    for token, ids in enumerate(topk_ids):
        if len(ids) != top_k:
            raise Failure(
                f"{len(ids)} of the {top_k} most likely tokens at completion token {token}",
                "Ask for fewer with `top_k`, or let the server return more: `--max-logprobs` in vLLM.",
            )
    topk_ids = np.array(topk_ids, np.int32).reshape(len(sent), top_k)
    topk_logprobs = np.array(topk_logprobs, np.float32).reshape(len(sent), top_k)
    _refuse(np.isnan(topk_logprobs).any(-1), "null or NaN among the most likely tokens", _OVERFLOWS)
    _refuse(
        (logprobs > TOLERANCE) | (topk_logprobs > TOLERANCE).any(-1),
        "a log-probability above 0",
        "Does the server return logits? In vLLM, `--logprobs-mode` is `raw_logprobs`.",
    )
    if top_k:
        ordered = np.sort(topk_ids, axis=-1)
        itself = topk_ids == np.array(sent)[:, None]
        # The token's own score says whether the two lists are of the same position and of one distribution.
        own = np.where(itself.any(-1), topk_logprobs[np.arange(len(sent)), itself.argmax(-1)], logprobs)
        wrong = (ordered[:, 1:] == ordered[:, :-1]).any(-1) | ~(topk_logprobs[:, 1:] <= topk_logprobs[:, :-1]).all(-1)
        wrong |= ~np.isclose(own, logprobs, rtol=0, atol=TOLERANCE)
        wrong |= ~itself.any(-1) & (logprobs > topk_logprobs[:, -1] + TOLERANCE)
        _refuse(
            wrong,
            "most likely tokens that are repeated, out of order, or contradict the score of the token itself",
            "That is an error in the server: update it, or score with `top_k=0`.",
        )
    return Scores(logprobs, topk_ids, topk_logprobs.astype(np.float16))


def sampling_parameters(sampling: Sampling, answer: int) -> dict[str, Any]:
    """
    Parameters of an answer, by its number in the whole run: names and values are those of vLLM's `SamplingParams` and
    of its server's requests.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # What is left out, a server takes from the model's generation config. For no top-k, some versions take 0 too.
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": sampling.max_completion_length,
        "seed": sampling.seed_of(answer),
        # vLLM has end-of-sequence tokens of its own beside those asked for, of the tokenizer and of that config.
        "ignore_eos": True,
        "stop_token_ids": list(sampling.eos_token_ids),
        # A stop text may be a special token's.
        "skip_special_tokens": False,
        **({"stop": list(sampling.stop)} if sampling.stop else {}),
    }


def checked_sample(
    ids: list[int],
    logprobs: list[float | None],
    finish_reason: str | None,
    stop_reason: int | str | None,
    sampling: Sampling,
) -> Sample:
    """The sample that vLLM's answer holds, or a `Failure` that says what is wrong with it."""
    length, longest = len(ids), sampling.max_completion_length
    if finish_reason not in ("stop", "length"):
        raise Failure(f"an answer that ended with {finish_reason!r}", "vLLM gave it up: look into its log.")
    if not ids:
        raise Failure("an empty answer", "vLLM samples a token at least: is something else listening there?")
    if wrong := [id for id in ids if type(id) is not int or id < 0]:
        raise Failure(f"{wrong[0]!r} for a token id", "That is an error in the server: update it.")
    if length > longest:
        raise Failure(f"{length} tokens where {longest} are the most", "Does a proxy between change requests?")
    if len(logprobs) != length:
        raise Failure(
            f"{len(logprobs)} log-probabilities of {length} tokens", "Does a proxy between change requests or answers?"
        )
    # A null becomes NaN here.
    values = np.array(logprobs, np.float64)
    _refuse(np.isnan(values), "null or NaN for the log-probability", _OVERFLOWS)
    modes = "In vLLM, `--logprobs-mode` is to be `raw_logprobs`."
    _refuse(values > TOLERANCE, "a log-probability above 0", f"Does it return logits? {modes}")
    _refuse(values <= _NO_PROBABILITY, "a token that was sampled without a probability", modes)
    ends = [position for position, id in enumerate(ids) if id in sampling.eos_token_ids]
    if ends and ends[0] < length - 1:
        raise Failure(
            f"an answer that goes on after its end-of-sequence token {ids[ends[0]]}",
            "Does a proxy between drop `stop_token_ids`? Talk to the server directly.",
        )
    if finish_reason == "length" and length < longest:
        raise Failure(
            f"an answer cut after {length} tokens, of {longest} allowed",
            "vLLM has a limit of its own: `--max-model-len`, for prompt and answer together, or `max_new_tokens` in a "
            "generation config, which `--generation-config vllm` leaves out. Raise it, or lower "
            "`max_completion_length`.",
            may_pass=False,
        )
    if finish_reason == "stop" and not ends and stop_reason not in sampling.stop:
        raise Failure(
            f"an answer ended by token {ids[-1]}, which is no end-of-sequence token here",
            "vLLM has others of its own: start it with `--generation-config vllm`, or name them here too.",
        )
    # Where the last token that fits ends the answer, versions of vLLM differ in the reason.
    return Sample(ids, "stop" if ends else finish_reason, values.tolist())


def _refuse(wrong: np.ndarray, what: str, remedy: str) -> None:
    """Raises a `Failure` for the first completion token that is wrong."""
    if wrong.any():
        raise Failure(f"{what}, at completion token {int(wrong.argmax())} of {len(wrong)}", remedy)


def _too_short(got: int, needed: int) -> Failure:
    return Failure(
        f"log-probabilities of {got} tokens where {needed} are needed",
        "Is it a server that scores prompts, and does a proxy between cut or cache answers?",
    )


def _number(entry: dict) -> float | None:
    return -np.inf if entry["logprob"] == _NO_PROBABILITY else entry["logprob"]


def _spread(answers: list[np.ndarray]) -> float:
    """How far answers lie apart, mean over tokens, nats."""
    # Two of -inf are no distance apart.
    return float(np.ptp(np.maximum(answers, _NO_PROBABILITY), axis=0).mean())


def _api_key() -> str:
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        # httpx would say so too, and quote the key.
        raise ValueError(f"The environment variable {API_KEY_VARIABLE} has characters that no API key has.")
    return key


def authorization() -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if (key := _api_key()) else {}


def _words(response: httpx.Response) -> str:
    """What a server says of an error."""
    try:
        body = response.json()
        error = body.get("error", body)
        words = error if isinstance(error, str) else error["message"]
    except (AttributeError, KeyError, TypeError, ValueError):
        words = response.text
    return _quoted(str(words))


def _quoted(words: str) -> str:
    """The beginning of what a server says, in quotes; never the API key, which some say back."""
    if key := _api_key():
        # Before it is cut, lest a part of the key remain.
        words = words.replace(key, "***")
    return repr(words[:500])


def _remedy(status: int, reasons: str) -> str:
    if status in (401, 403):
        return f"Put the API key into the environment variable {API_KEY_VARIABLE}."
    if status == 404 or 300 <= status < 400:
        return "Give the server's own address, as in http://localhost:8000, and the name of a model that it serves."
    return f"Asking again would not help. Usual reasons: {reasons}"


def _retry_after(response: httpx.Response) -> float:
    """Seconds that a server asks to wait; 0 if it gives no number of them."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(response.headers.get("Retry-After", "")))
    return 0.0
