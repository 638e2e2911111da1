from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from regrad_vllm.base_model import BaseModelError, build_layout
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.document_gradients import document_deltas, document_gradients
from regrad_vllm.encode.inner_loss import InnerLoss
from tests.method.conftest import tiny_model
from tests.method.reference import lm_loss, peft_model, relative_error

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SCALING = 2.0


def random_tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_batched_gradients_equal_the_one_document_autograd_loop(any_model: Any) -> None:
    layout = build_layout(any_model, rank=4, layers=(2, 3), projections=PROJECTIONS)
    phi = torch.randn(layout.num_values, generator=torch.Generator().manual_seed(1)) * 0.3
    documents = [random_tokens(length, length) for length in (33, 2, 7, 20, 57)]
    documents.append(list(documents[2]))  # repeated
    documents.append(documents[4][:40])  # as truncation leaves it
    batch = TokenBatch.pad([(tokens, 1) for tokens in documents])
    model = AdaptedModel(any_model, layout, SCALING)
    actual = document_gradients(model, phi, batch)
    with torch.no_grad():
        final = model.upper(model.lower(batch), model.split(phi[None]), batch)
        losses, counted = model.token_losses(final, batch.targets)

    peft = peft_model(any_model, layout, SCALING)
    for row, tokens in enumerate(documents):
        leaf = phi.clone().requires_grad_()
        loss = lm_loss(peft, layout, leaf, tokens)
        (expected,) = torch.autograd.grad(loss, leaf)
        assert expected.norm() > 1e-3
        assert float(losses[counted.nonzero()[:, 0] == row].mean()) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert relative_error(actual[row], expected) <= 1e-5
    assert torch.equal(actual[2], actual[5])
    assert relative_error(actual[6], actual[4]) > 1e-2


@pytest.mark.parametrize(("architecture", "projections"), [("Mixtral", ("q_proj", "o_proj")), ("Phi", ("fc1", "fc2"))])
def test_experts_and_a_final_norm_of_another_name_do_no_harm(architecture: str, projections: tuple[str, ...]) -> None:
    model = tiny_model(architecture)
    layout = build_layout(model, rank=2, layers=(2, 3), projections=projections)
    phi = torch.randn(layout.num_values, generator=torch.Generator().manual_seed(1)) * 0.3
    tokens = random_tokens(12, 5)
    actual = document_gradients(AdaptedModel(model, layout, SCALING), phi, TokenBatch.pad([(tokens, 1)]))
    leaf = phi.clone().requires_grad_()
    (expected,) = torch.autograd.grad(lm_loss(peft_model(model, layout, SCALING), layout, leaf, tokens), leaf)
    assert relative_error(actual[0], expected) <= 1e-5


@pytest.mark.parametrize("architecture", ["RecurrentGemma", "GPTNeoX"])
def test_a_model_whose_layers_do_not_run_apart_is_refused_by_name(architecture: str) -> None:
    model = tiny_model(architecture)
    projections = {"RecurrentGemma": ("down_proj",), "GPTNeoX": ("dense_4h_to_h",)}[architecture]
    with pytest.raises(BaseModelError, match=f"must be built like Llama, got {architecture}ForCausalLM: "):
        AdaptedModel(model, build_layout(model, rank=4, layers=(2, 3), projections=projections), SCALING)


def test_layers_of_every_position_can_be_adapted(llama: Any) -> None:
    layout = build_layout(llama, rank=2, layers=(0, 3), projections=("q_proj", "o_proj", "up_proj"))
    phi = torch.randn(layout.num_values) * 0.3
    tokens = random_tokens(12, 5)
    actual = document_gradients(AdaptedModel(llama, layout, SCALING), phi, TokenBatch.pad([(tokens, 1)]))
    leaf = phi.clone().requires_grad_()
    (expected,) = torch.autograd.grad(lm_loss(peft_model(llama, layout, SCALING), layout, leaf, tokens), leaf)
    assert relative_error(actual[0], expected) <= 1e-5


def test_a_one_token_document_has_a_zero_gradient_and_harms_no_other(llama: Any) -> None:
    layout = build_layout(llama, rank=4, layers=(2, 3), projections=PROJECTIONS)
    model, phi = AdaptedModel(llama, layout, SCALING), torch.randn(layout.num_values) * 0.3
    long = random_tokens(15, 3)
    together = document_gradients(model, phi, TokenBatch.pad([([9], 1), (long, 1)]))
    alone = document_gradients(model, phi, TokenBatch.pad([(long, 1)]))
    assert torch.count_nonzero(together[0]) == 0
    assert relative_error(together[1], alone[0]) <= 1e-5
    only = document_gradients(model, phi, TokenBatch.pad([([9], 1)]))
    assert only.shape == (1, layout.num_values) and torch.count_nonzero(only) == 0


def test_encoding_leaves_the_base_weights_alone(llama: Any) -> None:
    layout = build_layout(llama, rank=4, layers=(2, 3), projections=PROJECTIONS)
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    model = AdaptedModel(llama, layout, SCALING)
    document_gradients(model, torch.randn(layout.num_values), TokenBatch.pad([(random_tokens(9, 1), 1)]))
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    hooks = [module for module in llama.modules() if module._forward_hooks]
    assert not hooks


def test_an_unknown_projection_is_an_error_that_lists_the_known_ones(llama: Any) -> None:
    with pytest.raises(BaseModelError, match=r"'gate'.*gate_proj"):
        build_layout(llama, rank=4, layers=(2,), projections=("gate",))


def test_token_weights_and_length_scale_each_tokens_part_of_the_gradient(llama: Any) -> None:
    layout = build_layout(llama, rank=4, layers=(2, 3), projections=("gate_proj", "up_proj", "down_proj"))
    phi = torch.randn(layout.num_values, generator=torch.Generator().manual_seed(0)) * 0.3
    model = AdaptedModel(llama, layout, SCALING)
    tokens = random_tokens(12, 1)
    batch = TokenBatch.pad([(tokens, 1), (random_tokens(20, 2), 1)])
    generator = torch.Generator().manual_seed(5)
    head = torch.randn(33, generator=generator)
    actual = document_gradients(model, phi, batch, InnerLoss(0.25, head))[0]

    # One target at a time: its own gradient, times the weight that the formula gives it.
    hidden = llama.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[2][0].detach()
    expected = torch.zeros_like(phi)
    for position in range(1, len(tokens)):
        normed = hidden[position] / hidden[position].square().mean().add(1e-6).sqrt()
        weight = torch.nn.functional.softplus(normed @ head[:-1] + head[-1]) / math.log(2)
        single = document_gradients(model, phi, TokenBatch.pad([(tokens[: position + 1], position)]))[0]
        expected += weight / 11**0.25 / 32**0.75 * single
    assert relative_error(actual, expected) <= 1e-5
    plain = document_gradients(model, phi, batch)[0]
    assert relative_error(actual, plain) > 0.1


def test_each_inner_step_starts_where_the_one_before_led(llama: Any) -> None:
    layout = build_layout(llama, rank=4, layers=(2, 3), projections=PROJECTIONS)
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(layout.num_values, generator=generator) * 0.3
    steps = torch.rand(2, layout.num_values, generator=generator)
    model = AdaptedModel(llama, layout, SCALING)
    tokens = random_tokens(12, 1)
    batch = TokenBatch.pad([(random_tokens(7, 2), 1), (tokens, 1)])
    peft = peft_model(llama, layout, SCALING)
    own = phi.clone().requires_grad_()
    for sizes in steps:
        (gradient,) = torch.autograd.grad(lm_loss(peft, layout, own, tokens), own)
        own = (own - sizes * gradient).detach().requires_grad_()
    actual = document_deltas(model, phi, steps, batch)[1]
    assert relative_error(actual, phi - own.detach()) <= 1e-5
    assert relative_error(actual, document_deltas(model, phi, steps[:1], batch)[1]) > 0.1
