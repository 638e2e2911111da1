"""The outer loss of one meta-step under φ_q. It is differentiable through the inner gradients (second order)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.inner_loss import InnerLoss
from regrad_vllm.learn.teacher import distance


@dataclass(frozen=True, slots=True)
class MetaBatch:
    """N tasks with their questions.

    documents: N rows. questions: one packed row for each task, or equally many consecutive rows for each task.
    mix: float32 (N, N), the weight of document j in the adapter of task i. scores: float32 (N, N), the retrieval score
    of document j for task i. Only the scores with mix ≠ 0 are used.
    """

    documents: TokenBatch
    questions: TokenBatch
    mix: Tensor
    scores: Tensor | None = None
    expected: Tensor | None = None  # float32 (targets, vocabulary): a teacher's log-probabilities, teacher.py


@dataclass(frozen=True, slots=True)
class MetaParameters:
    """The parameters that meta-training learns, in the form that the loss takes."""

    phi: Tensor  # float32 (num_values,)
    step_sizes: list[list[Tensor]]  # per inner step and tensor of the layout, a scalar or the tensor's shape
    gamma: float = 1.0
    inner_loss: InnerLoss = field(default_factory=InnerLoss)
    score_temperature: Tensor | None = None  # scalar τ; None: every document has the weight 1

    def detach(self) -> MetaParameters:
        """The same values, detached from the autograd graph."""
        head, temperature = self.inner_loss.token_head, self.score_temperature
        return MetaParameters(
            self.phi.detach(),
            [[size.detach() for size in sizes] for sizes in self.step_sizes],
            self.gamma,
            InnerLoss(self.inner_loss.length_exponent, None if head is None else head.detach()),
            None if temperature is None else temperature.detach(),
        )

    def mix(self, batch: MetaBatch) -> Tensor:
        """(N, N): mix_ij · exp((s_ij − max_j s_ij) / τ), the maximum over the documents of task i."""
        if self.score_temperature is None or batch.scores is None:
            return batch.mix
        absent = batch.mix == 0
        best = batch.scores.masked_fill(absent, float("-inf")).amax(1, keepdim=True)
        # Absent documents get 0, not −inf, because the derivative of −inf / τ would make the sum NaN.
        return batch.mix * torch.exp((batch.scores - best).masked_fill(absent, 0.0) / self.score_temperature)


def meta_loss(model: AdaptedModel, parameters: MetaParameters, batch: MetaBatch, teacher_weight: float = 0.0) -> Tensor:
    """Mean answer loss over the batch's questions, each under its task's φ_q = φ* − γ Σ_j mix_ij δ_j.

    The distance to the batch's ``expected`` is added, times ``teacher_weight``. One batched inner pass serves all tasks
    that use a document. With γ = 0 there is no inner pass, and φ* is a plain LoRA. Layers below the first adapted one
    run without gradient.
    """
    adapters = _adapters(model, parameters, batch) if parameters.gamma else model.split(parameters.phi[None])
    outer_final = model.upper(model.lower(batch.questions), adapters, batch.questions)
    loss = model.loss(outer_final, batch.questions)
    if teacher_weight and batch.expected is not None:
        loss = loss + teacher_weight * distance(model, outer_final, batch.questions, batch.expected)
    return loss / len(batch.questions.ids)


def _adapters(model: AdaptedModel, parameters: MetaParameters, batch: MetaBatch) -> list[Tensor]:
    """φ_q of every task, the layout's tensors in order, each (N, *shape)."""
    num_tasks = len(batch.documents.ids)
    shared = own = model.split(parameters.phi.expand(num_tasks, -1))
    hidden = model.lower(batch.documents)
    weights = parameters.inner_loss.weights(batch.documents, hidden)
    for step_sizes in parameters.step_sizes:
        inner = model.loss(model.upper(hidden, own, batch.documents), batch.documents, weights)
        gradients = torch.autograd.grad(inner, own, create_graph=True)
        own = [value - size * found for value, size, found in zip(own, step_sizes, gradients, strict=True)]
    mix = parameters.mix(batch)
    adapters = []
    for value, moved in zip(shared, own, strict=True):
        delta = (value - moved).reshape(num_tasks, -1)
        adapters.append(value - parameters.gamma * (mix @ delta).reshape(value.shape))
    return adapters
