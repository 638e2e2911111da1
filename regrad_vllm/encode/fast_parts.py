"""Runs norms, MLPs and attention of a model by derivatives.py, where they compute the same as the library's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from regrad_vllm.encode import derivatives

_ATTENTION = "regrad"  # our attention's name in the library's register


class Parts(Protocol):
    def used(self) -> AbstractContextManager[None]:
        """Within it the model runs by these parts."""


class FastParts:
    """The parts of a model that derivatives.py can run. Each was compared with the library's on random inputs."""

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        self._forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        configs = {}
        for module in model.modules():
            for make in (_norm, _mlp):
                found = make(module)
                if found is not None and _same(module, *found):
                    self._forwards[module] = found[0]
            config = getattr(module, "config", None)
            if hasattr(module, "num_key_value_groups") and _fits(getattr(config, "_attn_implementation", ""), model):
                configs[id(config)] = config
        self._configs: list[Any] = list(configs.values())
        AttentionInterface.register(_ATTENTION, _attend)

    @property
    def modules(self) -> list[nn.Module]:
        """The norms and MLPs that are swapped."""
        return list(self._forwards)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within it the model runs by these parts."""
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = _ATTENTION
            with replaced(self._forwards):
                yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Within it each module runs its function in ``forwards``."""
    changed = []
    try:
        for module, forward in forwards.items():
            module.forward = forward
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward  # the class's own comes back


def _fits(implementation: str, model: Any) -> bool:
    """On GPUs the library's fused attention is faster. It has no second derivative, so it isn't used in training."""
    return implementation == "eager" or (implementation == "sdpa" and model.device.type == "cpu")


def _norm(module: nn.Module) -> tuple[Callable[..., Tensor], int] | None:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or epsilon is None:
        return None
    return lambda x: derivatives.rms_norm(x, weight, epsilon), weight.shape[0]


def _mlp(module: Any) -> tuple[Callable[..., Tensor], int] | None:
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    if not isinstance(module.gate_proj, nn.Linear):
        return None
    return (
        lambda x: module.down_proj(derivatives.gated(module.gate_proj(x), module.up_proj(x))),
        module.gate_proj.in_features,
    )


@torch.no_grad()
def _same(module: nn.Module, forward: Callable[..., Tensor], size: int) -> bool:
    """Whether both compute the same of two random vectors."""
    weight = next(module.parameters())
    x = torch.randn((1, 2, size), generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    try:
        expected = module(x)
        error = (forward(x) - expected).float().norm() / expected.float().norm()
    except (RuntimeError, TypeError, AttributeError):  # a module of another kind
        return False
    return bool(error <= torch.finfo(weight.dtype).eps ** 0.75)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attention as the library calls it. With a setting that we don't know, such as a soft cap, it is the library's."""
    scaling = settings.get("scaling") or module.head_dim**-0.5
    if any(settings.get(name) is not None for name in ("softcap", "s_aux")):
        own = sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, attention_mask, **settings)  # type: ignore[no-any-return]
    if not torch.is_grad_enabled():
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, is_causal=attention_mask is None, scale=scaling, enable_gqa=True
        )
    else:
        if attention_mask is None:
            attention_mask = _causal(query.shape[2], query)
        out = derivatives.attention(query * scaling, key, value, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _causal(length: int, like: Tensor) -> Tensor:
    lowest = torch.finfo(like.dtype).min
    return torch.full((1, 1, length, length), lowest, dtype=like.dtype, device=like.device).triu_(1)
