"""Documents/s of ``regrad encode --ray`` with one worker and with two.

Each corpus is encoded by a command and then once more. The second command starts the same and encodes nothing, so the
difference of both times is that of the documents.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.local.pair import start_bank
from regrad_vllm.local.processes import Services
from regrad_vllm.reporting.intervals import spread

WORKERS = (1, 2)
TIMEOUT_SECONDS = 1800  # of one command
SENTENCES = 12  # of a document: a kB, so that 256 documents are four of Ray's blocks, which two workers share


def measure_ray(folder: Path, num_documents: int, repeats: int) -> dict[str, Any] | None:
    """None without Ray. RuntimeError where a command fails, takes too long, or has too few documents to measure."""
    if find_spec("ray") is None:
        sys.stderr.write("Ray must be installed for ray_2_over_1, so it is null; pip install '.[ray]'\n")
        return None
    folder.mkdir()
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(_document(number)) + "\n" for number in range(num_documents)))
    model, learner = ensure_default_model(), shipped_learner()
    rates: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    starts: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    with Services(folder) as services:
        _, bank = start_bank(services, model, learner, folder / "bank")
        flags = ("--bank", bank, "--model", str(model), "--learner", str(learner), "--ray")
        for repeat in range(repeats):
            for workers in WORKERS[:: 1 if repeat % 2 else -1]:
                first, again = (
                    _seconds(corpus, outcome, "--namespace", f"{workers}-{repeat}", "--workers", str(workers), *flags)
                    for outcome in (f"{num_documents} created", f"{num_documents} unchanged")
                )
                if first <= again:
                    raise RuntimeError(
                        f"{num_documents} documents must take longer than none, got {first:.1f} and {again:.1f} s; "
                        "raise --encodes"
                    )
                rates[workers].append(num_documents / (first - again))
                starts[workers].append(again)
    return {
        "documents": num_documents,
        "ray_2_over_1": spread([two / one for one, two in zip(*rates.values(), strict=True)]),
        "documents_per_s": {f"workers_{workers}": spread(each) for workers, each in rates.items()},
        "start_s": {f"workers_{workers}": spread(each) for workers, each in starts.items()},
    }


def _document(number: int) -> dict[str, str]:
    lines = (f"Crane {line} of harbour {number} lifts {line * number % 89} tons a day." for line in range(SENTENCES))
    return {"id": f"d{number}", "text": " ".join(lines)}


def _seconds(corpus: Path, outcome: str, *flags: str) -> float:
    """RuntimeError where the command fails or takes too long, or where its summary lacks the outcome."""
    command = [sys.executable, "-m", "regrad_vllm.cli", "encode", str(corpus), *flags]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"regrad encode must end within {TIMEOUT_SECONDS} s, it goes on") from error
    seconds = time.perf_counter() - started
    if done.returncode or outcome not in done.stdout:
        raise RuntimeError(f"regrad encode must say {outcome}, got {done.stdout}{done.stderr[-2000:]}")
    return seconds
