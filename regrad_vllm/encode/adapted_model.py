"""A frozen causal LM with LoRA tensors that may differ from row to row, split at the first adapted layer.

Works on any Hugging Face causal LM built like Llama (``model.model.layers`` of decoder layers, a final norm and
``lm_head``): the two halves run the library's own forward pass, so masks, rotary embeddings and sliding windows
are the library's. Rows are padded on the right and attention is causal, so padding reaches no real token
and no padding mask is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from regrad_vllm.layout import Layout


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded rows. ``targets`` holds the token to predict after each position, -100 where none counts."""

    ids: Tensor  # int64 (rows, length)
    targets: Tensor  # int64 (rows, length)

    @classmethod
    def pad(cls, rows: Sequence[tuple[Sequence[int], int]], device: str | torch.device = "cpu") -> TokenBatch:
        """Rows of (tokens, number of leading tokens whose prediction doesn't count; at least 1)."""
        length = max(len(tokens) for tokens, _ in rows)
        ids = torch.zeros((len(rows), length), dtype=torch.long)
        targets = torch.full((len(rows), length), -100, dtype=torch.long)
        for row, (tokens, start) in enumerate(rows):
            ids[row, : len(tokens)] = torch.as_tensor(tokens)
            if len(tokens) > start:
                targets[row, start - 1 : len(tokens) - 1] = torch.as_tensor(tokens[start:])
        return cls(ids.to(device), targets.to(device))


class AdaptedModel:
    """Base model, layout and scaling s; adapters are arguments, never state that outlives a call."""

    def __init__(self, model: Any, layout: Layout, scaling: float) -> None:
        self.layout = layout
        self.scaling = scaling
        self.device: torch.device = model.device
        self._lm_head = model.lm_head
        self._modules: list[nn.Module] = [model.get_submodule(name) for name in layout.modules]
        decoder = model.model
        first = min(_layer_index(name) for name in layout.modules)
        self._lower = _slice_decoder(decoder, 0, first, norm=False)
        self._upper = _slice_decoder(decoder, first, len(decoder.layers), norm=True)
        self._embed = decoder.embed_tokens

    def lower(self, ids: Tensor) -> Tensor:
        """Hidden states before the first adapted layer, (rows, length, hidden). They don't depend on φ: no gradient."""
        with torch.no_grad():
            embedded: Tensor = self._embed(ids)
            if not len(self._lower.layers):
                return embedded
            return cast(Tensor, self._lower(inputs_embeds=embedded, use_cache=False).last_hidden_state)

    def upper(self, hidden: Tensor, adapters: Sequence[Tensor]) -> Tensor:
        """Final hidden states under ``adapters``: the layout's tensors in order, each (groups, *shape).

        rows must be a multiple of groups: consecutive rows share an adapter.
        """
        with self._injected(adapters):
            return cast(Tensor, self._upper(inputs_embeds=hidden, use_cache=False).last_hidden_state)

    def token_losses(self, final: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the counted positions, (counted,), and the row of each, (counted,)."""
        counted = targets != -100
        logits = self._lm_head(final[counted]).float()
        losses = nn.functional.cross_entropy(logits, targets[counted], reduction="none")
        return losses, counted.nonzero()[:, 0]

    def predict(self, final: Tensor) -> Tensor:
        """The likeliest next token of each final hidden state, int64 (positions,)."""
        return cast(Tensor, self._lm_head(final).argmax(-1))

    def row_losses(self, final: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token cross-entropy of each row, (rows,); 0 for a row with nothing to predict."""
        losses, rows = self.token_losses(final, targets)
        sums = torch.zeros(len(targets), device=losses.device).index_add(0, rows, losses)
        return sums / (targets != -100).sum(1).clamp(min=1)

    def split(self, flat: Tensor) -> list[Tensor]:
        """(groups, num_values) → the layout's tensors, each (groups, *shape)."""
        sizes = [tensor.num_values for tensor in self.layout.tensors]
        return [
            part.view(-1, *tensor.shape)
            for part, tensor in zip(torch.split(flat, sizes, dim=1), self.layout.tensors, strict=True)
        ]

    @contextmanager
    def _injected(self, adapters: Sequence[Tensor]) -> Iterator[None]:
        handles = [
            module.register_forward_hook(self._lora_hook(adapters[2 * index], adapters[2 * index + 1]))
            for index, module in enumerate(self._modules)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _lora_hook(self, a: Tensor, b: Tensor) -> Any:
        def add_delta(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows, length, _ = inputs[0].shape
            grouped = inputs[0].reshape(a.shape[0], rows // a.shape[0] * length, -1)
            low = torch.bmm(grouped, a.to(grouped.dtype).transpose(1, 2))
            delta = torch.bmm(low, b.to(grouped.dtype).transpose(1, 2))
            return output + self.scaling * delta.reshape(output.shape)

        return add_delta


def _layer_index(module: str) -> int:
    return int(module.split(".layers.")[1].split(".")[0])


def _slice_decoder(decoder: Any, first: int, end: int, *, norm: bool) -> Any:
    """A view of ``decoder`` that runs layers first..end-1 and shares all weights with it."""
    part = copy.copy(decoder)
    part.__dict__["_modules"] = dict(decoder._modules)
    part.config = copy.copy(decoder.config)
    part.config.num_hidden_layers = end - first
    if getattr(decoder.config, "layer_types", None):
        part.config.layer_types = list(decoder.config.layer_types[first:end])
    part.layers = nn.ModuleList(decoder.layers[first:end])
    if not norm:
        part.norm = nn.Identity()
    return part
