from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from regrad_vllm.base_model import build_layout
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.layout import Layout
from regrad_vllm.learn.meta_step import MetaBatch, MetaParameters, meta_loss
from tests.method.reference import lm_loss, peft_model, relative_error
from tests.method.test_gradients import random_tokens

SCALING, GAMMA = 2.0, 0.9
DOCUMENTS = [random_tokens(length, length) for length in (25, 11, 18)]
# (tokens, first answer position), two questions a document
QUESTIONS = [(random_tokens(length, 100 + length), length - 4) for length in (9, 14, 11, 20, 8, 16)]
GROUPS = [QUESTIONS[0:2], QUESTIONS[2:4], QUESTIONS[4:6]]
MIX = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])


def reference_loss(peft: Any, layout: Layout, phi: Tensor, flat_steps: Tensor) -> Tensor:
    """Task by task: inner steps of the mixed documents one by one, then each question one by one."""
    losses = []
    for task in range(len(DOCUMENTS)):
        adapted = phi
        for other, tokens in enumerate(DOCUMENTS):
            if MIX[task, other]:
                own = phi
                for steps in flat_steps:
                    (gradient,) = torch.autograd.grad(lm_loss(peft, layout, own, tokens), own, create_graph=True)
                    own = own - steps * gradient
                adapted = adapted - GAMMA * MIX[task, other] * (phi - own)
        for tokens, start in QUESTIONS[2 * task : 2 * task + 2]:
            losses.append(lm_loss(peft, layout, adapted, tokens, start))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("kind", "inner_steps"), [("tie", 1), ("full", 1), ("tie", 2)])
def test_the_meta_gradient_equals_the_per_task_reference(any_model: Any, kind: str, inner_steps: int) -> None:
    layout = build_layout(any_model, rank=4, layers=(2, 3), projections=("gate_proj", "up_proj", "down_proj"))
    generator = torch.Generator().manual_seed(3)
    phi = (torch.randn(layout.num_values, generator=generator) * 0.3).requires_grad_()
    count = len(layout.tensors) if kind == "tie" else layout.num_values
    steps = (torch.rand(inner_steps, count, generator=generator) * 0.3 + 0.1).requires_grad_()

    model = AdaptedModel(any_model, layout, SCALING)
    batch = MetaBatch(TokenBatch.pad([(tokens, 1) for tokens in DOCUMENTS]), TokenBatch.pack(GROUPS), MIX)
    tensors = [list(of.unbind()) if kind == "tie" else [view for _, view in layout.views(of)] for of in steps]
    loss = meta_loss(model, MetaParameters(phi, tensors, GAMMA), batch)
    actual = torch.autograd.grad(loss, (phi, steps))

    sizes = torch.tensor([tensor.num_values for tensor in layout.tensors])
    flat_steps = steps.repeat_interleave(sizes, dim=1) if kind == "tie" else steps
    expected_loss = reference_loss(peft_model(any_model, layout, SCALING), layout, phi, flat_steps)
    expected = torch.autograd.grad(expected_loss, (phi, steps))
    assert abs(float(loss.detach() - expected_loss.detach())) <= 1e-4
    for mine, theirs in zip(actual, expected, strict=True):
        assert relative_error(mine, theirs) <= 1e-4 * inner_steps  # float32's rounding goes through each once more

    # The second order is really there: the first-order gradient is a different one.
    first_order = torch.autograd.grad(meta_loss_first_order(model, phi, flat_steps, batch), phi)[0]
    assert relative_error(first_order, expected[0]) > 1e-2


def meta_loss_first_order(model: AdaptedModel, phi: Tensor, flat_steps: Tensor, batch: MetaBatch) -> Tensor:
    from regrad_vllm.encode.document_gradients import document_deltas

    deltas = document_deltas(model, phi.detach(), flat_steps.detach(), batch.documents)
    adapters = model.split(phi - GAMMA * (batch.mix @ deltas))
    final = model.upper(model.lower(batch.questions), adapters, batch.questions)
    return model.loss(final, batch.questions) / len(batch.questions.ids)


def test_packed_questions_cost_what_they_cost_one_by_one(any_model: Any) -> None:
    common = random_tokens(7, 1)
    groups = [
        [(common + random_tokens(5, 2), 9), (common + random_tokens(8, 3), 10), (common + random_tokens(3, 4), 8)],
        [(random_tokens(6, 5), 5)],  # alone
        [(common, 6), (common, 6)],  # the same twice
        [(common + [5, 6, 7], 8), (common + [5, 6, 9, 11], 9)],  # answers that begin alike don't melt together
    ]
    packed = TokenBatch.pack(groups)
    assert packed.ids.shape[1] == 7 + 5 + 8 + 3
    layout = build_layout(any_model, rank=4, layers=(2, 3), projections=("gate_proj", "up_proj", "down_proj"))
    model = AdaptedModel(any_model, layout, SCALING)
    phi = torch.randn(len(groups), layout.num_values, generator=torch.Generator().manual_seed(1)) * 0.3

    def losses(batch: TokenBatch, adapters: Tensor) -> Tensor:
        with torch.no_grad():
            return model.loss(model.upper(model.lower(batch), model.split(adapters), batch), batch)

    expected = [
        torch.stack([losses(TokenBatch.pad([row]), phi[index, None]) for row in group]).mean()
        for index, group in enumerate(groups)
    ]
    assert float(losses(packed, phi)) == pytest.approx(float(sum(expected)), rel=1e-5)


def test_weights_from_scores_fall_with_the_distance_to_the_best_and_can_be_learnt() -> None:
    mix = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    scores = torch.tensor([[0.5, 0.7, 0.9], [0.1, 0.2, 0.3]])
    batch = MetaBatch(TokenBatch.pad([([1, 2], 1)]), TokenBatch.pad([([1, 2], 1)]), mix, scores)
    temperature = torch.tensor(0.1, requires_grad=True)
    weights = MetaParameters(torch.zeros(1), [], score_temperature=temperature).mix(batch)
    assert weights.flatten().tolist() == pytest.approx([math.exp(-2.0), 1.0, 0.0, 0.0, 1.0, 0.0])
    (slope,) = torch.autograd.grad(weights.sum(), temperature)
    assert float(slope) == pytest.approx(0.2 / 0.1**2 * math.exp(-2.0), rel=1e-4)
    assert torch.equal(MetaParameters(torch.zeros(1), []).mix(batch), mix)
