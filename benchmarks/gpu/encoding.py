"""Documents/s of the encoder on a model of some shape with random weights, in bfloat16 on a GPU."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks.shapes import Shape, made_up_learner
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.document_gradients import document_gradients
from regrad_vllm.encode.gradient_encoder import plan_passes
from regrad_vllm.reporting.intervals import spread

_LENGTHS = {"cuda": (32, 128, 512), "cpu": (32,)}
_TOKENS = {"cuda": 65_536, "cpu": 256}  # of all documents of one length together


def measured(shape: Shape, repeats: int) -> dict[str, Any]:
    """Documents/s by length. The gradients are moved to the host, as for a bank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=8192)
    with torch.device(device):
        base = (
            LlamaForCausalLM(config)
            .to(torch.bfloat16 if device == "cuda" else torch.float32)
            .eval()
            .requires_grad_(requires_grad=False)
        )
    learner = made_up_learner(shape, 1e-3)
    model = AdaptedModel(base, learner.layout, learner.scaling)
    phi = torch.from_numpy(learner.phi.copy()).to(device)
    chance = np.random.default_rng(1)
    found = {}
    for length in _LENGTHS[device]:
        number = max(4, _TOKENS[device] // length)
        documents = chance.integers(1, 4000, (number, length)).tolist()
        per_s = []
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            for indices in plan_passes([length] * number):
                batch = TokenBatch.pad([(documents[index], 1) for index in indices], device)
                document_gradients(model, phi, batch).cpu()
            if repeat:  # the first warms up
                per_s.append(number / (time.perf_counter() - start))
        found[f"{length} tokens"] = spread(per_s)
    return found
