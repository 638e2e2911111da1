"""Documents/s of the batched encoder over the one-by-one autograd loop, on one machine in one run.

    make bench-encode          (python -m benchmarks.encode [--repeats N] [--tokens N])

The loop follows the method's published scripts: Hugging Face PEFT holds φ*, and each document has a forward pass and
``torch.autograd.grad``. Both give the same gradients, in float32.

``over_before`` compares the bank's encoder, with all inner steps, with the one before commit dfcf5f2 (plain_model.py).
That one had autograd's derivatives, and float32 on CPUs. The present one has the type that is fast on this machine.
Their gradients differ by rounding. The last line gives it for 128 tokens.

All are warmed up, then take turns on the same documents. A repeat's ratio is the others' seconds / the encoder's. The
largest relative difference of the results is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.plain_model import PlainModel, plain_deltas
from regrad_vllm.base_model import fast_dtype, load_base_model
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.document_gradients import document_deltas, document_gradients
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
    dtype = fast_dtype(device)
    quick, _ = load_base_model(folder, dtype=dtype, device=device)
    models = (
        AdaptedModel(quick, learner.layout, learner.scaling),
        PlainModel(base if device == "cpu" else quick, learner.layout, learner.scaling),
    )
    looped = _peft(folder, device)
    phi = torch.tensor(learner.phi, device=device)
    text = Path(__file__).parent.parent.joinpath("README.md").read_text("utf-8") * 8
    source = tokenizer(text)["input_ids"]
    report: dict[str, Any] = {"machine": describe("torch", "transformers", "peft"), "threads": torch.get_num_threads()}
    report["encoder_dtype"] = str(dtype).removeprefix("torch.")
    ratios = {}
    for length in LENGTHS:
        number = max(4, args.tokens // length)
        documents = [source[start * 37 : start * 37 + length] for start in range(number)]
        if len(documents[-1]) != length:
            raise SystemExit(f"README.md must give {number} documents of {length} tokens, it is too short")
        figures = _compare(batched, looped, learner, phi, documents, args.repeats)
        before = _over_before(*models, learner, phi, documents, args.repeats)
        report[f"documents_of_{length}_tokens"] = {"num_documents": number, **figures, **before}
        ratios[f"ratio_{length}"] = figures["ratio"]["median"]
        if length == 128:
            ratios["over_before"] = before["over_before"]["median"]
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + json.dumps(ratios) + "\n")


def _compare(
    batched: AdaptedModel, looped: Any, learner: Learner, phi: torch.Tensor, documents: list[list[int]], repeats: int
) -> dict[str, Any]:
    def loop() -> torch.Tensor:
        return torch.stack([_one(looped, learner, tokens, phi.device) for tokens in documents])

    def batch() -> torch.Tensor:
        return _in_passes(documents, phi, lambda rows: document_gradients(batched, phi, rows))

    seconds, error = _take_turns({"batch": batch, "loop": loop}, repeats)
    return {
        "documents_per_s_batch": spread([len(documents) / value for value in seconds["batch"]]),
        "documents_per_s_loop": spread([len(documents) / value for value in seconds["loop"]]),
        "ratio": spread([slow / fast for slow, fast in zip(seconds["loop"], seconds["batch"], strict=True)]),
        "largest_relative_difference": error,
    }


def _over_before(
    now: AdaptedModel, before: PlainModel, learner: Learner, phi: torch.Tensor, documents: list[list[int]], repeats: int
) -> dict[str, Any]:
    sizes = torch.tensor(learner.expand_step_sizes(), device=phi.device)
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "now": lambda: _in_passes(documents, phi, lambda rows: document_deltas(now, phi, sizes, rows)),
        "before": lambda: _in_passes(documents, phi, lambda rows: plain_deltas(before, phi, sizes, rows)),
    }
    seconds, error = _take_turns(runs, repeats)
    return {
        "encoded_per_s": spread([len(documents) / value for value in seconds["now"]]),
        "encoded_per_s_before": spread([len(documents) / value for value in seconds["before"]]),
        "over_before": spread([slow / fast for slow, fast in zip(seconds["before"], seconds["now"], strict=True)]),
        "largest_relative_difference_to_before": error,
    }


def _in_passes(
    documents: list[list[int]], phi: torch.Tensor, run: Callable[[TokenBatch], torch.Tensor]
) -> torch.Tensor:
    found = torch.empty(len(documents), len(phi))
    for indices in plan_passes([len(tokens) for tokens in documents]):
        found[indices] = run(TokenBatch.pad([(documents[index], 1) for index in indices], phi.device)).cpu()
    return found


def _take_turns(runs: dict[str, Callable[[], torch.Tensor]], repeats: int) -> tuple[dict[str, list[float]], float]:
    """The seconds of both runs in each repeat, and the largest relative difference of a document's results."""
    first, second = (run() for run in runs.values())
    error = float(((first - second).norm(dim=1) / second.norm(dim=1)).max())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in list(runs.items())[:: 1 if repeat % 2 else -1]:
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds, error


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
