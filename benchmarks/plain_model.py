"""Encoder and adapted model before their derivatives were written by hand, for the figure ``over_before``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.layout import Layout


class PlainModel(AdaptedModel):
    """Every part is the library's, adapters are added by hooks, and autograd derives all of it."""

    def __init__(self, model: Any, layout: Layout, scaling: float) -> None:
        super().__init__(model, layout, scaling)
        self._parts = _Library()

    @contextmanager
    def injected(self, adapters: Sequence[Tensor]) -> Iterator[None]:
        pairs = zip(self._modules, adapters[::2], adapters[1::2], strict=True)
        handles = [module.register_forward_hook(self._lora_hook(a, b)) for module, a, b in pairs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def token_losses(self, final: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        counted = targets != -100
        return nn.functional.cross_entropy(self.logits(final[counted]), targets[counted], reduction="none"), counted


class _Library:
    @staticmethod
    def used() -> AbstractContextManager[None]:
        return nullcontext()


def plain_deltas(model: AdaptedModel, phi: Tensor, step_sizes: Tensor, batch: TokenBatch) -> Tensor:
    """``document_deltas`` with the lower layers in each inner step."""
    deltas = torch.zeros(len(batch.ids), model.layout.num_values, device=phi.device)
    for sizes in step_sizes:
        own = [part.detach().requires_grad_() for part in model.split(phi - deltas)]
        loss = model.loss(model.upper(model.lower(batch), own, batch), batch)
        gradients = torch.autograd.grad(loss, own)
        deltas = deltas + sizes * torch.cat([gradient.reshape(len(deltas), -1).float() for gradient in gradients], 1)
    return deltas
