"""Greedy tokens of the server against Hugging Face running W with φ_q merged in: the same, many at a time.

The oracle is the slow obvious version: gradients as the encoder drew them, through the codec, summed, and one
model merged anew for each request.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bank_service.wire.record import DEFAULT_CODEC, FloatArray, decode_gradient, encode_gradient
from regrad_vllm.learner import Learner, save_adapter
from tests.serve.support import BASE, MAX_NUM_SEQS, BankThread, DrawingEncoder, VllmServer

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
        """None where ``tokens`` are the greedy ones, else (place of the first that isn't, lead of the right one)."""
        logits = self.logits(ask, texts, tokens)
        best = logits.topk(1)
        for place, (token, right, value) in enumerate(zip(tokens, best.indices[:, 0], best.values[:, 0], strict=True)):
            if token != int(right):
                return place, float(value - logits[place, token])
        return None

    def logits(self, ask: Ask, texts: Sequence[str], tokens: list[int]) -> torch.Tensor:
        """(tokens, vocabulary): after the prompt and the tokens before each. One pass, which is what decoding does."""
        self._merge(texts, ask.gamma, adapted=ask.ids is not None)
        prompt = self._tokenizer(ask.prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            logits: torch.Tensor = self._model(torch.cat([prompt, torch.tensor([tokens])], dim=1)).logits[0]
        return logits[prompt.shape[1] - 1 : -1]

    def adapter(self, texts: Sequence[str], gamma: float) -> FloatArray:
        """φ_q of documents whose weights are 1, flat."""
        adapter = self._learner.phi.copy()
        for text in texts:
            drawn = self._encoder.encode([("", text)])[0].values
            record = encode_gradient(drawn, self._encoder.spec, DEFAULT_CODEC)
            adapter -= np.float32(gamma) * decode_gradient(record, self._encoder.spec)
        return adapter

    def _merge(self, texts: Sequence[str], gamma: float, *, adapted: bool) -> None:
        adapter = self.adapter(texts, gamma)
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
        ids = tuple(f"doc-{(n * 2 + k) % 100}" for k in range(1 + n % 3))  # no more than fit at once
        adapted.append(Ask(PROMPTS[n % len(PROMPTS)], ids, (3.0, 2.0, 4.0)[n % 3]))
    asks = adapted + [Ask(PROMPTS[n % len(PROMPTS)], None, 1.0) for n in range(NUM_BASE)]
    shuffle.shuffle(asks)
    return asks


@pytest.fixture(scope="module")
def text_of() -> dict[str, str]:
    return {f"doc-{n}": f"Fact number {n}: the answer to riddle {n} is {n * 37 % 1000}." for n in range(150)}


@pytest.fixture(scope="module")
def oracle(model: Path, learner: Learner) -> Oracle:
    return Oracle(model, learner)


@pytest.mark.timeout(600)
def test_concurrent_requests_give_the_tokens_of_hugging_face_one_at_a_time(
    server: VllmServer, bank: BankThread, oracle: Oracle, text_of: dict[str, str]
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


def num_steps(server: VllmServer) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:iteration_tokens_total_count"))


@pytest.mark.timeout(600)
def test_operators_adapters_documents_and_the_base_model_share_a_batch(
    server: VllmServer, learner: Learner, oracle: Oracle, text_of: dict[str, str], tmp_path: Path
) -> None:
    """The operator's adapter is φ_q of two documents, as a plain LoRA folder. So every row has its oracle."""
    ids, num_tokens = ("doc-3", "doc-4"), 200
    save_adapter(tmp_path, learner, oracle.adapter([text_of[id] for id in ids], 1.5))
    loaded = server.post("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": str(tmp_path)})
    assert loaded.status_code == 200, loaded.text
    asks: list[tuple[str, Ask]] = []
    for n, prompt in enumerate(PROMPTS[: MAX_NUM_SEQS // 3]):
        documents = tuple(f"doc-{10 * n + k}" for k in range(1 + n % 3))
        asks += [
            (BASE, Ask(prompt, None, 1.0)),
            ("mine", Ask(prompt, ids, 1.5)),
            ("ours", Ask(prompt, documents, 1.25)),
        ]

    def ask_server(model: str, ask: Ask) -> tuple[list[int], list[float]]:
        regrad = {"document_ids": list(ask.ids or ()), "gamma": ask.gamma} if model == "ours" else None
        name = BASE if model == "ours" else model
        answer = server.complete(ask.prompt, regrad, max_tokens=num_tokens, model=name, logprobs=1)["choices"][0]
        return answer["token_ids"], answer["logprobs"]["token_logprobs"]

    for _ in range(5):  # on a busy machine requests may come so late that each runs alone
        before = num_steps(server)
        with ThreadPoolExecutor(MAX_NUM_SEQS) as pool:
            served = list(pool.map(lambda asked: ask_server(*asked), asks))
        rows_a_step = len(asks) * num_tokens / (num_steps(server) - before)
        if rows_a_step > MAX_NUM_SEQS * 2 / 3:
            break
    assert rows_a_step > MAX_NUM_SEQS * 2 / 3, "few steps had rows of all three kinds"
    server.post("/v1/unload_lora_adapter", {"lora_name": "mine"})
    assert len({tuple(tokens) for tokens, _ in served}) == len(asks), "a row with another's adapter would show"
    for (_, ask), (tokens, logprobs) in zip(asks, served, strict=True):
        right = oracle.logits(ask, [text_of[id] for id in ask.ids or ()], tokens).log_softmax(dim=1)
        chosen = right[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert float((right.max(dim=1).values - chosen).max()) < TIE, "greedy"
        assert float((chosen - torch.tensor(logprobs)).abs().max()) < 5 * TIE


def prefix_hits(server: VllmServer) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


@pytest.mark.timeout(600)
def test_a_cached_prefix_is_used_again_by_the_same_adapter_only(
    server: VllmServer, bank: BankThread, oracle: Oracle, text_of: dict[str, str]
) -> None:
    words = " ".join(PROMPTS).split()
    # Without a pattern that any adapter would go on with.
    prompt = " ".join(random.Random(5).choices(words, k=320)) + ". " + PROMPTS[1]
    first, second, base = Ask(prompt, ("doc-61",), 4.0), Ask(prompt, ("doc-62",), 4.0), Ask(prompt, None, 1.0)
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
