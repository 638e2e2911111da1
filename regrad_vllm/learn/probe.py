"""A quick look during training: teacher-forced answers on validation tasks under several adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from regrad_vllm.encode.adapted_model import AdaptedModel
from regrad_vllm.encode.gradients import document_gradients
from regrad_vllm.learn.meta_step import MetaBatch


def probe(
    model: AdaptedModel, phi: Tensor, step_sizes: list[Tensor], batches: list[MetaBatch], gamma: float
) -> dict[str, float]:
    """Share of answer tokens right, and of answers with every token right ("…_all"), per method.

    Methods: regrad (the batch's mix), learner (φ* alone), wrong (each task gets its neighbour's mix).
    """
    right: dict[str, list[Tensor]] = {}
    for batch in batches:
        num_tasks = len(batch.documents.ids)
        gradients = document_gradients(model, phi, batch.documents)
        parts = model.split(gradients)
        deltas = torch.cat([(a * g).reshape(num_tasks, -1) for a, g in zip(step_sizes, parts, strict=True)], dim=1)
        hidden = model.lower(batch.questions.ids)
        mixes = {"regrad": batch.mix, "learner": torch.zeros_like(batch.mix), "wrong": batch.mix.roll(1, dims=0)}
        for method, mix in mixes.items():
            with torch.no_grad():
                final = model.upper(hidden, model.split(phi - gamma * (mix @ deltas)))
                tokens, answers = _answers_right(model, final, batch.questions.targets)
            right.setdefault(method, []).append(tokens)
            right.setdefault(f"{method}_all", []).append(answers)
    return {name: round(torch.cat(parts).float().mean().item(), 4) for name, parts in right.items()}


def _answers_right(model: AdaptedModel, final: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    counted = targets != -100
    hits = model.predict(final[counted]) == targets[counted]
    misses = torch.zeros(len(targets)).index_add(0, counted.nonzero()[:, 0].cpu(), (~hits).float().cpu())
    return hits.cpu(), misses == 0
