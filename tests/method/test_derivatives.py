from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrad_vllm.encode import derivatives
from regrad_vllm.encode.fast_parts import FastParts
from tests.method.conftest import tiny_model
from tests.method.reference import relative_error

GENERATOR = torch.Generator().manual_seed(0)


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


WEIGHT, MATRIX, BIAS, TARGETS = values(6), values(7, 5), values(7), torch.tensor([1, 4, 0])
HIDDEN = torch.zeros(2, 1, 5, 5).masked_fill_(~torch.ones(5, 5, dtype=torch.bool).tril(), -3e38)
HIDDEN[1, :, 3, 1] = -3e38


def plain_norm(x: Tensor) -> Tensor:
    return WEIGHT * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def plain_lora(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    of = torch.arange(len(x)) * len(a) // len(x)  # each row's group
    return x @ MATRIX.T + BIAS + 1.7 * x @ a[of].mT @ b[of].mT


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
    return (query @ key.mT + HIDDEN).softmax(-1) @ value


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = {
    "norm": (lambda x: derivatives.rms_norm(x, WEIGHT, 1e-5), plain_norm, [values(2, 3, 6)]),
    "gated": (derivatives.gated, lambda gate, up: nn.functional.silu(gate) * up, [values(3, 5), values(3, 5)]),
    "lora_linear": (
        lambda x, a, b: derivatives.lora_linear(x, a, b, MATRIX, BIAS, 1.7),
        plain_lora,
        [values(4, 3, 5), values(2, 2, 5), values(2, 7, 2)],
    ),
    "attention": (
        lambda query, key, value: derivatives.attention(query, key, value, HIDDEN),
        plain_attention,
        [values(2, 4, 5, 3), values(2, 2, 5, 3), values(2, 2, 5, 3)],
    ),
    "cross_entropy": (
        lambda logits: derivatives.cross_entropy(logits, TARGETS),
        lambda logits: nn.functional.cross_entropy(logits, TARGETS, reduction="none"),
        [values(3, 6)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_both_derivatives_are_autograds(name: str) -> None:
    ours, plain, inputs = CASES[name]
    found = [twice(function, inputs) for function in (ours, plain)]
    for mine, theirs in zip(*found, strict=True):
        assert theirs.norm() > 1e-3
        assert relative_error(mine, theirs) <= 1e-5


def twice(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output, its gradients, and the gradients of a mix of all of these."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    generator = torch.Generator().manual_seed(1)
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=generator).requires_grad_()
    first = torch.autograd.grad((out * weights).sum(), leaves, create_graph=True)
    mixed = [(part * torch.randn(part.shape, generator=generator)).sum() for part in (out, *first)]
    second = torch.autograd.grad(torch.stack(mixed).sum(), [*leaves, weights])
    return [part.detach() for part in (out, *first, *second)]


def test_a_first_layer_whose_input_is_constant_has_the_same_derivatives() -> None:
    ours, plain, (x, *adapter) = CASES["lora_linear"]
    found = [twice(lambda a, b, run=run: run(x, a, b), adapter) for run in (ours, plain)]  # type: ignore[misc]
    for mine, theirs in zip(*found, strict=True):
        assert relative_error(mine, theirs) <= 1e-5


def test_a_model_has_its_own_forward_passes_again_afterwards() -> None:
    model = tiny_model("Llama")
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    parts = FastParts(model)
    with parts.used():
        assert model.config._attn_implementation == "regrad"
        assert relative_error(model(ids).logits, expected) <= 1e-5
    assert model.config._attn_implementation == "eager"
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("architecture", "norms", "mlps"), [("Llama", 9, 4), ("Qwen3", 17, 4), ("Gemma2", 0, 0)])
def test_only_parts_that_compute_the_same_are_swapped(architecture: str, norms: int, mlps: int) -> None:
    parts: Any = FastParts(tiny_model(architecture))
    names = [type(module).__name__ for module in parts.modules]
    assert [sum(name.endswith(kind) for name in names) for kind in ("RMSNorm", "MLP")] == [norms, mlps]
