from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regrad_vllm.base_model import build_layout
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.layout import Layout
from regrad_vllm.learn.meta_step import MetaBatch, meta_loss
from tests.method.reference import lm_loss, peft_model, relative_error
from tests.method.test_gradients import random_tokens

SCALING, GAMMA = 2.0, 0.9
DOCUMENTS = [random_tokens(length, length) for length in (25, 11, 18)]
# (tokens, first answer position), two questions a document
QUESTIONS = [(random_tokens(length, 100 + length), length - 4) for length in (9, 14, 11, 20, 8, 16)]
MIX = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])


def reference_loss(peft: Any, layout: Layout, phi: Tensor, flat_steps: Tensor) -> Tensor:
    """Task by task: inner gradients of the mixed documents one by one, then each question one by one."""
    losses = []
    for task in range(len(DOCUMENTS)):
        adapted = phi
        for other, tokens in enumerate(DOCUMENTS):
            if MIX[task, other]:
                (gradient,) = torch.autograd.grad(lm_loss(peft, layout, phi, tokens), phi, create_graph=True)
                adapted = adapted - GAMMA * MIX[task, other] * flat_steps * gradient
        for tokens, start in QUESTIONS[2 * task : 2 * task + 2]:
            losses.append(lm_loss(peft, layout, adapted, tokens, start))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["tie", "full"])
def test_the_meta_gradient_equals_the_per_task_reference(any_model: Any, kind: str) -> None:
    layout = build_layout(any_model, rank=4, layers=(2, 3), projections=("gate_proj", "up_proj", "down_proj"))
    generator = torch.Generator().manual_seed(3)
    phi = (torch.randn(layout.num_values, generator=generator) * 0.3).requires_grad_()
    count = len(layout.tensors) if kind == "tie" else layout.num_values
    steps = (torch.rand(count, generator=generator) * 0.3 + 0.1).requires_grad_()

    model = AdaptedModel(any_model, layout, SCALING)
    batch = MetaBatch(TokenBatch.pad([(tokens, 1) for tokens in DOCUMENTS]), TokenBatch.pad(QUESTIONS), MIX)
    tensors = list(steps.unbind()) if kind == "tie" else [view for _, view in layout.views(steps)]
    loss = meta_loss(model, phi, tensors, batch, GAMMA)
    actual = torch.autograd.grad(loss, (phi, steps))

    sizes = torch.tensor([tensor.num_values for tensor in layout.tensors])
    flat_steps = steps.repeat_interleave(sizes) if kind == "tie" else steps
    expected_loss = reference_loss(peft_model(any_model, layout, SCALING), layout, phi, flat_steps)
    expected = torch.autograd.grad(expected_loss, (phi, steps))
    assert abs(float(loss.detach() - expected_loss.detach())) <= 1e-4
    for mine, theirs in zip(actual, expected, strict=True):
        assert relative_error(mine, theirs) <= 1e-4

    # The second order is really there: the first-order gradient is a different one.
    first_order = torch.autograd.grad(
        meta_loss_first_order(model, phi, tensors, batch), phi
    )[0]  # fmt: skip
    assert relative_error(first_order, expected[0]) > 1e-2


def meta_loss_first_order(model: AdaptedModel, phi: Tensor, steps: list[Tensor], batch: MetaBatch) -> Tensor:
    from regrad_vllm.encode.gradients import document_gradients

    gradients = model.split(document_gradients(model, phi.detach(), batch.documents))
    deltas = torch.cat([(step * part).reshape(len(part), -1) for step, part in zip(steps, gradients, strict=True)], 1)
    adapters = model.split(phi - GAMMA * (batch.mix @ deltas.detach()))
    return model.row_losses(model.upper(model.lower(batch.questions.ids), adapters), batch.questions.targets).mean()
