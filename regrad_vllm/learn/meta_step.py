"""One meta-step: the outer loss under φ_q, differentiable through the inner gradients (second order)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch


@dataclass(frozen=True, slots=True)
class MetaBatch:
    """N tasks with Q questions each.

    documents: N rows. questions: N·Q rows, those of a task side by side. mix: float32 (N, N), the weight of
    document j in the adapter of task i.
    """

    documents: TokenBatch
    questions: TokenBatch
    mix: Tensor


def meta_loss(model: AdaptedModel, phi: Tensor, step_sizes: list[Tensor], batch: MetaBatch, gamma: float) -> Tensor:
    """Mean answer loss over the batch's questions, each under its task's φ_q = φ* − γ Σ_j mix_ij · a ⊙ g_j.

    phi: float32 (num_values,), requires grad. step_sizes: per tensor of the layout, a scalar or the tensor's
    shape; require grad unless fixed. One batched inner pass serves every task that uses a document. Layers
    below the first adapted one run without gradient.
    """
    num_tasks = len(batch.documents.ids)
    shared = model.split(phi.expand(num_tasks, -1))
    inner_final = model.upper(model.lower(batch.documents.ids), shared)
    inner = model.row_losses(inner_final, batch.documents.targets).sum()
    gradients = torch.autograd.grad(inner, shared, create_graph=True)
    adapters = []
    for value, gradient, step_size in zip(shared, gradients, step_sizes, strict=True):
        delta = step_size * gradient
        adapters.append(value - gamma * (batch.mix @ delta.reshape(num_tasks, -1)).reshape(value.shape))
    outer_final = model.upper(model.lower(batch.questions.ids), adapters)
    return model.row_losses(outer_final, batch.questions.targets).mean()
