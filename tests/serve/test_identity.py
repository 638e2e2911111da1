"""Greedy tokens of the server against Hugging Face running W with φ_q merged in: the same, many at a time.

The oracle is the slow obvious version: gradients as the encoder drew them, through the codec, summed, and one
model merged anew for each request.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bank_service.wire.record import DEFAULT_CODEC, decode_gradient, encode_gradient
from regrad_vllm.learner import Learner
from tests.serve.support import MAX_NUM_SEQS, BankThread, DrawingEncoder, VllmServer

NUM_ADAPTED = 64
NUM_BASE = 24
NUM_TOKENS = 10
TIE = 1e-3  # two logits this close are a tie that rounding may break either way
PROMPTS = (
    "The three largest cities of the country are",
    "To bake bread, first",
    "Fact: the moon",
    "Question: who wrote the letter? Answer:",
    "def add(a, b):\n    return",
    "Once upon a time there was a",
)


@dataclass(frozen=True)
class Ask:
    """One request: with documents, or None for the base model."""

    prompt: str
    ids: tuple[str, ...] | None
    gamma: float


class Oracle:
    """W, or W with one φ_q merged in, in float32, one request at a time."""

    def __init__(self, folder: Path, learner: Learner) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._learner = learner
        self._encoder = DrawingEncoder(learner)
        self._base = {name: self._weight(name).clone() for name in learner.layout.modules}

    def check(self, ask: Ask, texts: Sequence[str], tokens: list[int]) -> tuple[int, float] | None:
        """None where ``tokens`` are the greedy ones, else (place of the first that isn't, lead of the right one).

        One pass over prompt and tokens: each must be the best after all before it, which is what decoding does.
        """
        self._merge(texts, ask.gamma, adapted=ask.ids is not None)
        prompt = self._tokenizer(ask.prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = self._model(torch.cat([prompt, torch.tensor([tokens])], dim=1)).logits[0]
        best = logits[prompt.shape[1] - 1 : -1].topk(1)
        for place, (token, right, value) in enumerate(zip(tokens, best.indices[:, 0], best.values[:, 0], strict=True)):
            if token != int(right):
                return place, float(value - logits[prompt.shape[1] - 1 + place, token])
        return None

    def _merge(self, texts: Sequence[str], gamma: float, *, adapted: bool) -> None:
        adapter = self._learner.phi.copy()
        for text in texts:
            drawn = self._encoder.encode([("", text)])[0].values
            record = encode_gradient(drawn, self._encoder.spec, DEFAULT_CODEC)
            adapter -= np.float32(gamma) * decode_gradient(record, self._encoder.spec)
        parts = {(t.module, t.part): torch.from_numpy(view) for t, view in self._learner.layout.views(adapter)}
        for name, base in self._base.items():
            change = self._learner.scaling * parts[name, "B"] @ parts[name, "A"]
            self._weight(name).copy_(base + change if adapted else base)

    def _weight(self, name: str) -> Any:
        return self._model.get_submodule(name).weight.data


def requests() -> list[Ask]:
    """64 with 64 different document sets, and base rows, shuffled so that every batch has both."""
    shuffle = random.Random(3)
    adapted = []
    for n in range(NUM_ADAPTED):
        ids = tuple(f"doc-{(n * 2 + k) % 150}" for k in range(1 + n % 3))
        adapted.append(Ask(PROMPTS[n % len(PROMPTS)], ids, (1.0, 0.5, 1.5)[n % 3]))
    asks = adapted + [Ask(PROMPTS[n % len(PROMPTS)], None, 1.0) for n in range(NUM_BASE)]
    shuffle.shuffle(asks)
    return asks


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The engine has the other cores; threads that wait for each other on a busy machine make the oracle crawl."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text_of() -> dict[str, str]:
    return {f"doc-{n}": f"Fact number {n}: the answer to riddle {n} is {n * 37 % 1000}." for n in range(150)}


@pytest.fixture(scope="module")
def oracle(model: Path, learner: Learner) -> Oracle:
    return Oracle(model, learner)


@pytest.mark.timeout(600)
def test_concurrent_requests_give_the_tokens_of_hugging_face_one_at_a_time(
    server: VllmServer, bank: BankThread, oracle: Oracle, text_of: dict[str, str], one_thread: None
) -> None:
    """Also the guard against slot −1: all base rows are the base's."""
    asks = requests()
    assert len({(ask.ids, ask.gamma) for ask in asks if ask.ids}) == NUM_ADAPTED > 4 * MAX_NUM_SEQS

    def ask_server(ask: Ask) -> list[int]:
        regrad = None if ask.ids is None else {"document_ids": list(ask.ids), "gamma": ask.gamma}
        answer = server.complete(ask.prompt, regrad, max_tokens=NUM_TOKENS)
        return list(answer["choices"][0]["token_ids"])

    with ThreadPoolExecutor(len(asks)) as pool:  # all at once
        served = list(pool.map(ask_server, asks))

    ties = 0
    for ask, tokens in zip(asks, served, strict=True):
        wrong = oracle.check(ask, [text_of[id] for id in ask.ids or ()], tokens)
        if wrong is not None:
            place, lead = wrong
            assert lead < TIE, f"{ask}: token {place} of {tokens} must be the best one, another leads by {lead}"
            ties += 1
    assert ties <= 1
    base_tokens = {ask.prompt: tokens for ask, tokens in zip(asks, served, strict=True) if ask.ids is None}
    changed = [tokens != base_tokens[ask.prompt] for ask, tokens in zip(asks, served, strict=True) if ask.ids]
    assert sum(changed) > NUM_ADAPTED * 3 // 4, "adapters that change nothing would prove nothing"


def test_base_rows_stay_the_base_models_beside_as_many_adapters_as_fit(server: VllmServer) -> None:
    alone = {prompt: server.complete(prompt, max_tokens=24)["choices"][0]["token_ids"] for prompt in PROMPTS[:4]}
    adapters = [
        {"document_ids": [f"doc-{n}", f"doc-{n + 50}"], "gamma": 1.25} for n in range(MAX_NUM_SEQS - len(alone))
    ]
    with ThreadPoolExecutor(MAX_NUM_SEQS) as pool:
        others = [pool.submit(server.complete, PROMPTS[0], regrad, max_tokens=24) for regrad in adapters]
        rows = {prompt: pool.submit(server.complete, prompt, max_tokens=24) for prompt in alone}
        beside = {prompt: row.result()["choices"][0]["token_ids"] for prompt, row in rows.items()}
        assert all(other.result()["choices"][0]["token_ids"] != alone[PROMPTS[0]] for other in others)
    assert beside == alone


def prefix_hits(server: VllmServer) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


@pytest.mark.timeout(600)
def test_a_cached_prefix_is_used_again_by_the_same_adapter_only(
    server: VllmServer, bank: BankThread, oracle: Oracle, text_of: dict[str, str], one_thread: None
) -> None:
    words = " ".join(PROMPTS).split()
    # Without a pattern that any adapter would go on with.
    prompt = " ".join(random.Random(5).choices(words, k=320)) + ". " + PROMPTS[1]
    first, second, base = Ask(prompt, ("doc-61",), 1.5), Ask(prompt, ("doc-62",), 1.5), Ask(prompt, None, 1.0)
    before = prefix_hits(server)
    seen: dict[Ask, list[int]] = {}
    for ask in (first, second, base, first, base, second):
        regrad = None if ask.ids is None else {"document_ids": list(ask.ids), "gamma": ask.gamma}
        answer = server.complete(prompt, regrad, max_tokens=NUM_TOKENS)
        assert answer["usage"]["prompt_tokens"] >= 300, "shorter than the cache's blocks: nothing would be shared"
        tokens = list(answer["choices"][0]["token_ids"])
        wrong = oracle.check(ask, [text_of[id] for id in ask.ids or ()], tokens)
        assert wrong is None or wrong[1] < TIE, (
            f"{ask.ids}: token {wrong[0]} is not the best, which leads by {wrong[1]}"
        )
        assert seen.setdefault(ask, tokens) == tokens
    assert len({tuple(tokens) for tokens in seen.values()}) == 3, "adapters that change nothing would prove nothing"
    assert prefix_hits(server) - before >= 3 * 256, "the three repeated requests must have found their prefix"


def test_the_base_weights_in_the_worker_are_what_they_were(weights_before: list[str], server: VllmServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: server.complete("x", {"document_ids": [f"doc-{n}"]}, max_tokens=2), range(16)))
    after = server.status(base_weights=True)["base_weights"]
    assert after == weights_before
    assert all(len(digest) == 64 for digest in after)
