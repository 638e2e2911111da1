"""A quick validation during training: teacher-forced answers under several adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from regrad_vllm.encode.adapted_model import AdaptedModel
from regrad_vllm.encode.document_gradients import document_deltas
from regrad_vllm.learn.meta_step import MetaBatch, MetaParameters


def probe(model: AdaptedModel, parameters: MetaParameters, batches: list[MetaBatch]) -> dict[str, float]:
    """The share of right answer tokens, and of wholly right answers ("…_all"), for each method.

    The methods are "regrad" (the batch's mix), "learner" (φ* alone) and "wrong". In the last each task gets its
    neighbour's mix without its own document, and a task without any document doesn't count.
    """
    right: dict[str, list[Tensor]] = {}
    phi = parameters.phi
    step_sizes = torch.stack([_flat(model, sizes) for sizes in parameters.step_sizes])
    for batch in batches:
        deltas = document_deltas(model, phi, step_sizes, batch.documents, parameters.inner_loss)
        hidden = model.lower(batch.questions)
        mix = parameters.mix(batch)
        mixes = {"regrad": mix, "learner": torch.zeros_like(mix), "wrong": wrong_mix(mix)}
        for method, weights in mixes.items():
            with torch.no_grad():
                adapters = model.split(phi - parameters.gamma * (weights @ deltas))
                final = model.upper(hidden, adapters, batch.questions)
                targets = batch.questions.targets
                if method == "wrong":
                    targets = targets.masked_fill((weights.sum(1) == 0)[:, None], -100)
                tokens, answers = _answers_right(model, final, targets)
            right.setdefault(method, []).append(tokens)
            right.setdefault(f"{method}_all", []).append(answers)
    return {name: round(torch.cat(parts).float().mean().item(), 4) for name, parts in right.items()}


def _flat(model: AdaptedModel, step_sizes: list[Tensor]) -> Tensor:
    """One step size per value, (num_values,)."""
    tensors = model.layout.tensors
    return torch.cat([size.expand(t.shape).flatten() for size, t in zip(step_sizes, tensors, strict=True)])


def wrong_mix(mix: Tensor) -> Tensor:
    """(N, N): each row is the row above it, without the diagonal."""
    return mix.roll(1, dims=0).fill_diagonal_(0)


def _answers_right(model: AdaptedModel, final: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    counted = targets != -100
    hits = model.predict(final[counted]) == targets[counted]
    # An answer is a run of consecutive targets. At least one position separates two answers in a row.
    begins = counted & ~counted.roll(1, dims=1)
    answers = begins.flatten().cumsum(0)[counted.flatten()] - 1
    misses = torch.zeros(int(begins.sum()), device=hits.device).index_add(0, answers, (~hits).float())
    return hits.cpu(), (misses == 0).cpu()
