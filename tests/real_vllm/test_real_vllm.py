"""
The served paths against a real vLLM on a CPU: `make test-vllm`. `LOPD_MODEL`, a directory, names a model to serve in
the place of both the quickstart's teacher and its student.

What this build of vLLM cannot do is skipped with its own words.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_lopd import (
    ServerError,
    collect_rollouts,
    fingerprint_teacher,
    load_table,
    read_model_card,
    score_rollouts,
)
from trl_lopd.generation.samplers import Sampling
from trl_lopd.generation.servers import VLLMServer
from trl_lopd.generation.teachers import LocalTeacher
from trl_lopd.identity.probes import probe_model

ROOT = Path(__file__).parents[2]
BIN = Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm")) / "bin"
QUICKSTART = ROOT / "examples" / "quickstart"
OTHER = os.environ.get("LOPD_MODEL")
TEACHER, STUDENT = (OTHER, OTHER) if OTHER else (str(QUICKSTART / "teacher"), str(QUICKSTART / "student"))
CONTEXT = 256
# Several minutes where other programs run beside it: each of its processes imports torch.
START_SECONDS = 600
# Between vLLM's kernels and those of transformers, both in float32; nats.
ROUNDING = 2e-4
# All of a long row's prompt does not fit into one step.
IN_PIECES = ("--max-num-batched-tokens", "64", "--max-num-seqs", "16")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}


class Server:
    """A process of the other environment that listens on a loopback port; its output is in `log`."""

    def __init__(self, log: Path, *command: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        self.command = [str(BIN / command[0]), *command[1:], "--host", "127.0.0.1", "--port", str(self.port)]

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=ENVIRONMENT, cwd=self.log.parent, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.5)
        self.kill()
        raise RuntimeError(f"{self.command} does not start: {self.words('Error')}")

    def kill(self) -> None:
        """Kills it with the processes that it started, which are in its session."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def words(self, pattern: str) -> str:
        """The last line of its output in which the pattern occurs, or the last of all."""
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if re.search(pattern, line)), lines[-1] if lines else "")


@contextmanager
def running(log: Path, *command: str):
    server = Server(log, *command)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def serve(model: str, *options: str) -> tuple[str, ...]:
    return "vllm", "serve", model, "--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT), *options


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def cached(logs):
    """The teacher, with vLLM's default of a prefix cache, under two names."""
    with running(logs / "cached.log", *serve(TEACHER, *IN_PIECES, "--served-model-name", "first", "second")) as server:
        yield server


@pytest.fixture(scope="session")
def uncached(logs):
    """The teacher without a prefix cache, under the name of its directory."""
    with running(logs / "uncached.log", *serve(TEACHER, *IN_PIECES, "--no-enable-prefix-caching")) as server:
        yield server


@pytest.fixture(scope="session")
def sampling_server(logs):
    with running(logs / "student.log", *serve(STUDENT)) as server:
        yield server


@pytest.fixture(scope="session")
def teacher_tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER)


@pytest.fixture(scope="session")
def rows(teacher_tokenizer):
    """Short rows; long ones, of which vLLM prefills a piece at a time; special tokens anywhere."""
    if OTHER:
        text = "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
        pieces = np.array(teacher_tokenizer(text)["input_ids"][:4000]).reshape(200, 20).tolist()
        prompts, completions = [ids[:6] for ids in pieces], [ids[6:] for ids in pieces]
    else:
        table = load_table(str(QUICKSTART / "table"), split="train").select(range(200))
        prompts, completions = list(table["prompt_ids"]), list(table["completion_ids"])
    ids = [id for row in zip(prompts, completions, strict=True) for part in row for id in part]
    special = teacher_tokenizer.all_special_ids
    for start, length in enumerate((100, 180, CONTEXT - 1)):
        row = ids[1000 * start :][:length]
        prompts.append(row[: length // 2])
        completions.append(row[length // 2 :])
    prompts += [[*special, *ids[:5]], ids[:3] + special + ids[3:80], special]
    completions += [ids[5:12] + special, special[::-1], ids[:9]]
    return Dataset.from_dict({"prompt_ids": prompts, "completion_ids": completions})


@pytest.fixture(scope="session")
def local(rows):
    return score_rollouts(rows, TEACHER, top_k=8, dtype="float32")


def assert_same_scores(served: Dataset, local: Dataset, top_k: int) -> None:
    for row, (ours, theirs) in enumerate(zip(served, local, strict=True)):
        np.testing.assert_allclose(ours["teacher_logprobs"], theirs["teacher_logprobs"], atol=ROUNDING, rtol=0)
        if top_k:
            theirs_topk = np.array(theirs["teacher_topk_logprobs"])[:, :top_k]
            # Both are stored in float16.
            np.testing.assert_allclose(ours["teacher_topk_logprobs"], theirs_topk, atol=ROUNDING, rtol=2**-10)
            # Where two are as likely as each other within what is rounded, either may come first.
            same = np.array(ours["teacher_topk_ids"]) == np.array(theirs["teacher_topk_ids"])[:, :top_k]
            assert same.mean() > 0.97, row


# ---- Scoring ----


@pytest.mark.parametrize("top_k", [0, 1, 3, 8])
@pytest.mark.parametrize("kind", ["cached", "uncached"])
def test_scores_are_those_of_the_local_model(request, rows, local, teacher_tokenizer, kind, top_k):
    server = request.getfixturevalue(kind)
    client = VLLMServer(
        server.url, model="second" if kind == "cached" else TEACHER, processing_class=teacher_tokenizer
    )
    fingerprint = fingerprint_teacher(TEACHER)
    served = score_rollouts(rows, client, top_k=top_k, fingerprint=fingerprint)
    assert_same_scores(served, local, top_k)
    # The same again, now that the server has seen every prompt.
    assert_same_scores(score_rollouts(rows, client, top_k=top_k, fingerprint=fingerprint), local, top_k)


def test_of_two_names_one_has_to_be_said(cached, uncached, rows):
    with pytest.raises(ServerError, match=r"serves \['first', 'second'\]. Say which is meant"):
        score_rollouts(rows, cached.url, fingerprint=fingerprint_teacher(TEACHER))
    with pytest.raises(ServerError, match="status 404.*`third` does not exist.*the name of a model that it serves"):
        VLLMServer(cached.url, model="third").score([np.arange(4)], [2], 1)


def test_a_teacher_is_known_by_its_probes(uncached, rows, local, teacher_tokenizer):
    """By the address alone, with a card made locally; the card of the quickstart's student has them too."""
    if OTHER:
        model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
        entry = {"id": fingerprint_teacher(TEACHER).id, "probes": probe_model(model, teacher_tokenizer)}
        card = {"sft_teachers": [entry]}
    else:
        card = read_model_card(STUDENT)
    served = score_rollouts(rows, uncached.url, top_k=2, teacher_card=card, processing_class=teacher_tokenizer)
    assert_same_scores(served, local, 2)
    assert served["teacher_fingerprint"][0] == f"{card['sft_teachers'][0]['id']}#probed"


@pytest.mark.skipif(bool(OTHER), reason="of the tokenizer of LOPD_MODEL there is one model")
def test_another_teacher_is_refused(sampling_server, rows):
    """The student in the place of its teacher: the same tokenizer and nearly the same answers."""
    with pytest.raises(ServerError, match="does not answer the probes as teacher@.* does: mean difference"):
        score_rollouts(rows, sampling_server.url, teacher_card=read_model_card(STUDENT))


def test_what_the_server_refuses_is_said_at_once(uncached):
    client, start = VLLMServer(uncached.url), time.monotonic()
    limits = {
        "out of vocabulary": ([3, 10**7, 4], 1),
        "greater than max allowed: 20": ([3, 4, 5], 21),
        # vLLM has to sample a token, for which there is no room.
        "max_tokens must be at least 1.*a row as long as its context": ([3] * CONTEXT, 1),
    }
    for words, (ids, top_k) in limits.items():
        with pytest.raises(ServerError, match=f"(?s)Row 0, http.*refuses with status 400.*{words}"):
            client.score([np.array(ids)], [2], top_k)
    assert time.monotonic() - start < 30


# ---- Sampling ----

PROMPTS = ["017,219,825=", "052,905,228=", "299,003,111=", "5,4="]
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "max_completion_length": 64, "num_generations": 4, "seed": 5}


@pytest.fixture(scope="session")
def student():
    return AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)


@pytest.fixture(scope="session")
def rollouts(sampling_server):
    return collect_rollouts(PROMPTS, STUDENT, engine=sampling_server.url, **SAMPLED)


def own_logprobs(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """`(tokens, vocabulary)`."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


def test_samples_come_with_the_model_s_own_log_probabilities(rollouts, student):
    scores = LocalTeacher(student).score(
        [np.array(row["prompt_ids"] + row["completion_ids"]) for row in rollouts],
        [len(row["completion_ids"]) for row in rollouts],
        0,
    )
    for row, local in zip(rollouts, scores, strict=True):
        np.testing.assert_allclose(row["ref_logprobs"], local.logprobs, atol=ROUNDING, rtol=0)
    assert set(rollouts["finish_reason"]) <= {"stop", "length"}
    eos = student.config.eos_token_id
    for row in rollouts:
        assert (row["completion_ids"][-1] == eos) == (row["finish_reason"] == "stop")
        assert eos not in row["completion_ids"][:-1]


def test_seeds(rollouts, sampling_server):
    """An answer depends on its number and the seed, not on what else is asked for."""
    one_at_a_time = VLLMServer(sampling_server.url, max_concurrency=1)
    again = collect_rollouts(PROMPTS, STUDENT, engine=one_at_a_time, rows_per_shard=1, **SAMPLED)
    assert again["completion_ids"] == rollouts["completion_ids"]
    other = collect_rollouts(PROMPTS, STUDENT, engine=sampling_server.url, **SAMPLED | {"seed": 6})
    assert sum(a == b for a, b in zip(other["completion_ids"], rollouts["completion_ids"], strict=True)) < 8


def test_greedy_answers_are_those_of_transformers(sampling_server):
    options = {"temperature": 0.0, "max_completion_length": 64}
    served = collect_rollouts(PROMPTS, STUDENT, engine=sampling_server.url, **options)
    assert served["completion_ids"] == collect_rollouts(PROMPTS, STUDENT, **options)["completion_ids"]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (2.0, 0.7)])
def test_tokens_follow_the_distribution(sampling_server, student, temperature, top_p):
    prompt = AutoTokenizer.from_pretrained(STUDENT).encode("017,219,825=")
    sampling = Sampling(temperature, top_p, 1, (student.config.eos_token_id,), (), 0)
    answers = VLLMServer(sampling_server.url).sample([prompt] * 1000, sampling)
    counts = np.bincount([answer.ids[0] for answer in answers], minlength=student.config.vocab_size)
    p, order = (own_logprobs(student, prompt, [0])[0].double() / temperature).softmax(-1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    p, counts = (p / p.sum()).numpy(), counts[order.numpy()]
    assert counts[p == 0].sum() == 0
    # Five standard deviations of a binomial; more of those of a rare token, of which there may be one or two.
    assert (np.abs(counts - 1000 * p) <= 5 * np.sqrt(1000 * p * (1 - p)) + 2).all()


def test_stops(sampling_server, rollouts, student):
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    stopped = collect_rollouts(PROMPTS, STUDENT, engine=sampling_server.url, stop=["="], **SAMPLED)
    for row, whole in zip(stopped, rollouts, strict=True):
        ids = whole["completion_ids"]
        end = next((n for n in range(1, len(ids) + 1) if "=" in tokenizer.decode(ids[:n])), None)
        assert row["completion_ids"] == ids[:end]
        assert row["finish_reason"] == ("stop" if end else whole["finish_reason"])
    if not OTHER:  # It need not end its answer.
        # A stop text may be a special token's.
        prompt, eos = tokenizer.encode(PROMPTS[0]), tokenizer.eos_token
        (answer,) = VLLMServer(sampling_server.url).sample([prompt], Sampling(0.0, 1.0, 64, (), (eos,), 0))
        assert answer.finish_reason == "stop" and answer.ids[-1] == student.config.eos_token_id
    cut = collect_rollouts(PROMPTS, STUDENT, engine=sampling_server.url, **SAMPLED | {"max_completion_length": 3})
    assert cut["completion_ids"] == [ids[:3] for ids in rollouts["completion_ids"]]
    assert set(cut["finish_reason"]) == {"length"}


def test_an_answer_for_which_there_is_no_room(sampling_server):
    """vLLM answers with what fits, and says no word of it."""
    sampling, start = Sampling(1.0, 1.0, 20, (), (), 0), time.monotonic()
    with pytest.raises(
        ServerError, match="Answer 0.*cut after 6 tokens, of 20 allowed, asked once.*`--max-model-len`"
    ):
        VLLMServer(sampling_server.url).sample([[2] * (CONTEXT - 6)], sampling)
    assert time.monotonic() - start < 30


# ---- In process ----


def test_in_process_it_answers_as_its_server_does(sampling_server, logs):
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS] * 3
    sampling = Sampling(0.8, 0.9, 64, (tokenizer.eos_token_id,), ("#",), 7)
    request = {"model": STUDENT, "prompts": prompts, "sampling": asdict(sampling), "max_model_len": CONTEXT}
    with (logs / "in_process.log").open("wb") as log:
        done = subprocess.run(
            [BIN / "python", Path(__file__).with_name("in_process.py"), logs / "in_process.json"],
            input=json.dumps(request).encode(),
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT / "src")},
            stdout=log,
            stderr=log,
            timeout=START_SECONDS,
        )
    assert done.returncode == 0, (logs / "in_process.log").read_text(errors="replace")[-3000:]
    samples = json.loads((logs / "in_process.json").read_text())
    served = VLLMServer(sampling_server.url).sample(prompts, sampling)
    for (ids, reason, logprobs), expected in zip(samples, served, strict=True):
        assert (ids, reason) == (expected.ids, expected.finish_reason)
        np.testing.assert_allclose(logprobs, expected.logprobs, atol=ROUNDING, rtol=0)


# ---- What happens to servers ----


def test_a_server_killed_in_the_middle_and_started_again(uncached, rows, local, tmp_path):
    fingerprint = fingerprint_teacher(TEACHER)

    def score(directory: Path) -> Dataset:
        client = VLLMServer(uncached.url, max_concurrency=2, max_retries=1)
        return score_rollouts(
            rows, client, top_k=8, fingerprint=fingerprint, rows_per_shard=10, output_dir=str(directory)
        )

    def shards() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in directory.glob("*.parquet")}

    directory = tmp_path / "killed"

    def kill_after_three_shards() -> None:
        while len(list(directory.glob("*.parquet"))) < 3:
            time.sleep(0.001)
        uncached.kill()

    killer = threading.Thread(target=kill_after_three_shards, daemon=True)
    killer.start()
    with pytest.raises(ServerError, match=r"^Row \d+ of the table: Row \d+, http.*: no answer .*, asked 2 times"):
        score(directory)
    killer.join()
    before = shards()
    assert 3 <= len(before) < 20
    uncached.start()
    table = score(directory)
    assert_same_scores(table, local, 8)
    assert {name: shards()[name] for name in before} == before
    assert len(load_table(str(directory), split="train")) == len(rows)


def test_a_seed_and_a_prompt_in_pieces(uncached):
    """The last that is asked of this server: it may not survive."""
    sampling = Sampling(1.0, 1.0, 4, (), (), 0)
    client = VLLMServer(uncached.url, max_retries=0)
    try:
        prompts = [[2 + i % 9 for i in range(150)]] * 2
        first, second = client.sample(prompts, sampling), client.sample(prompts, sampling)
    except ServerError:
        words = uncached.words("CPU Generator")
        assert "CPU Generator" in words, words
        pytest.skip(words)
    assert first == second


def test_trl_s_server(logs, rows, local, teacher_tokenizer):
    """`trl vllm-serve` gives log-probabilities at the temperature of sampling, unless told otherwise."""
    options = ["--model", TEACHER, "--dtype", "float32", "--enforce_eager", "--max_model_len", str(CONTEXT)]
    server = Server(logs / "trl.log", "trl", "vllm-serve", *options)
    try:
        try:
            server.start()
        except RuntimeError as error:
            pytest.skip(str(error))
        served = score_rollouts(rows, server.url, top_k=8, fingerprint=fingerprint_teacher(TEACHER))
        assert_same_scores(served, local, 8)
        prompts = [list(row) for row in rows["prompt_ids"][:4]]
        warped, client = Sampling(0.5, 1.0, 16, (1,), (), 0), VLLMServer(server.url)
        with pytest.raises(ServerError, match="not those at temperature 1.*--logprobs-mode raw_logprobs"):
            client.sample(prompts, warped)
        assert len(client.sample(prompts, replace(warped, temperature=1.0))) == 4
    finally:
        server.kill()
