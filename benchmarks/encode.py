"""Documents/s of the batched encoder over the one-by-one autograd loop, on one machine in one run.

    make bench-encode          (python -m benchmarks.encode [--repeats N] [--tokens N])

The loop follows the method's published scripts: Hugging Face PEFT holds φ*, and each document has a forward pass and
``torch.autograd.grad``. Both are warmed up, then take turns on the same documents. A repeat's ratio is loop seconds /
batch seconds. Both give the same gradients, and the largest relative difference is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from regrad_vllm.base_model import load_base_model
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.document_gradients import document_gradients
from regrad_vllm.encode.gradient_encoder import check_base, plan_passes
from regrad_vllm.learner import Learner
from regrad_vllm.reporting.intervals import spread
from regrad_vllm.reporting.machine import describe

LENGTHS = (32, 128, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="of all documents of one length together")
    args = parser.parse_args()
    folder, learner = ensure_default_model(), Learner.load(shipped_learner())
    check_base(learner, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_base_model(folder, dtype=torch.float32, device=device)
    batched = AdaptedModel(base, learner.layout, learner.scaling)
    looped = _peft(folder, device)
    phi = torch.tensor(learner.phi, device=device)
    text = Path(__file__).parent.parent.joinpath("README.md").read_text("utf-8") * 8
    source = tokenizer(text)["input_ids"]
    report: dict[str, Any] = {"machine": describe("torch", "transformers", "peft"), "threads": torch.get_num_threads()}
    ratios = {}
    for length in LENGTHS:
        number = max(4, args.tokens // length)
        documents = [source[start * 37 : start * 37 + length] for start in range(number)]
        if len(documents[-1]) != length:
            raise SystemExit(f"README.md must give {number} documents of {length} tokens, it is too short")
        figures = _compare(batched, looped, learner, phi, documents, args.repeats)
        report[f"documents_of_{length}_tokens"] = {"num_documents": number, **figures}
        ratios[f"ratio_{length}"] = figures["ratio"]["median"]
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(ratios) + "\n")


def _compare(
    batched: AdaptedModel, looped: Any, learner: Learner, phi: torch.Tensor, documents: list[list[int]], repeats: int
) -> dict[str, Any]:
    def batch() -> torch.Tensor:
        found = torch.empty(len(documents), len(phi))
        for indices in plan_passes([len(tokens) for tokens in documents]):
            rows = TokenBatch.pad([(documents[index], 1) for index in indices], phi.device)
            found[indices] = document_gradients(batched, phi, rows).cpu()
        return found

    def loop() -> torch.Tensor:
        return torch.stack([_one(looped, learner, tokens, phi.device) for tokens in documents])

    expected, actual = loop(), batch()
    error = float(((actual - expected).norm(dim=1) / expected.norm(dim=1)).max())
    seconds: dict[str, list[float]] = {"batch": [], "loop": []}
    for repeat in range(repeats):
        for name, run in (("batch", batch), ("loop", loop)) if repeat % 2 else (("loop", loop), ("batch", batch)):
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {
        "documents_per_s_batch": spread([len(documents) / value for value in seconds["batch"]]),
        "documents_per_s_loop": spread([len(documents) / value for value in seconds["loop"]]),
        "ratio": spread([slow / fast for slow, fast in zip(seconds["loop"], seconds["batch"], strict=True)]),
        "largest_relative_difference": error,
    }


def _peft(folder: Path, device: str) -> Any:
    from peft import PeftModel

    base, _ = load_base_model(folder, dtype=torch.float32, device=device)
    return PeftModel.from_pretrained(base, shipped_learner(), is_trainable=True).eval()


def _one(model: Any, learner: Learner, tokens: list[int], device: torch.device) -> torch.Tensor:
    ids = torch.tensor([tokens], device=device)
    named = dict(model.named_parameters())
    leaves = [named[f"base_model.model.{t.module}.lora_{t.part}.default.weight"] for t in learner.layout.tensors]
    gradients = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, leaves)
    return torch.cat([gradient.reshape(-1) for gradient in gradients]).cpu()


if __name__ == "__main__":
    main()
