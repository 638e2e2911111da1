"""A frozen causal LM with LoRA tensors that may differ from row to row, split at the first adapted layer.

It works with any Hugging Face causal LM built like Llama: its decoder layers are ``model.model.layers``. Both halves
and the logits run the library's own forward pass. So masks, rotary embeddings, sliding windows, multipliers and soft
caps are the library's. At its start it compares itself with the whole model, and it refuses a model built otherwise.
Rows are padded on the right and attention is causal. So padding never influences a real token, and no padding mask is
needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from regrad_vllm.base_model import BaseModelError
from regrad_vllm.encode import derivatives
from regrad_vllm.encode.fast_parts import FastParts, Parts, replaced
from regrad_vllm.layout import Layout


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded rows. ``targets`` holds the token to predict after each position, or -100 if it doesn't count."""

    ids: Tensor  # int64 (rows, length)
    targets: Tensor  # int64 (rows, length)
    weights: Tensor  # float32 (rows, length): how much each target counts in its row's loss; each row sums to 1
    positions: Tensor | None = None  # int64 (rows, length); None: 0, 1, 2, …
    visible: Tensor | None = None  # bool (rows, length, length): position i attends to position j; None: causal

    @classmethod
    def pad(cls, rows: Sequence[tuple[Sequence[int], int]], device: str | torch.device = "cpu") -> TokenBatch:
        """A batch of rows. rows: (tokens, number of leading tokens whose prediction doesn't count; at least 1)."""
        length = max(len(tokens) for tokens, _ in rows)
        ids = torch.zeros((len(rows), length), dtype=torch.long)
        targets = torch.full((len(rows), length), -100, dtype=torch.long)
        for row, (tokens, start) in enumerate(rows):
            ids[row, : len(tokens)] = torch.as_tensor(tokens)
            if len(tokens) > start:
                targets[row, start - 1 : len(tokens) - 1] = torch.as_tensor(tokens[start:])
        counted = (targets != -100).float()
        weights = counted / counted.sum(1, keepdim=True).clamp(min=1)
        return cls(ids.to(device), targets.to(device), weights.to(device))

    @classmethod
    def pack(
        cls, groups: Sequence[Sequence[tuple[Sequence[int], int]]], device: str | torch.device = "cpu"
    ) -> TokenBatch:
        """One row for each group of token sequences. Its common prefix comes first, once, and all members see it.

        A member is (tokens, leading tokens whose prediction doesn't count), as for ``pad``. It sees only itself and the
        common prefix. Members count equally, and so do a member's targets. So the loss of a packed row is the mean of
        the losses of its members as separate rows.
        """
        shared = [_common_prefix(group) for group in groups]
        length = max(
            common + sum(len(tokens) - common for tokens, _ in group)
            for common, group in zip(shared, groups, strict=True)
        )
        shape = (len(groups), length)
        ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        targets, weights = torch.full(shape, -100, dtype=torch.long), torch.zeros(shape)
        visible = torch.eye(length, dtype=torch.bool).repeat(
            len(groups), 1, 1
        )  # padding sees itself, because an empty softmax is NaN
        for row, (common, group) in enumerate(zip(shared, groups, strict=True)):
            ids[row, :common] = torch.as_tensor(group[0][0][:common])
            positions[row, :common] = torch.arange(common)
            visible[row, :common, :common] = torch.ones(common, common, dtype=torch.bool).tril()
            begin = common
            for tokens, start in group:
                own = len(tokens) - common
                end = begin + own
                ids[row, begin:end] = torch.as_tensor(tokens[common:])
                positions[row, begin:end] = torch.arange(common, len(tokens))
                visible[row, begin:end, :common] = True
                visible[row, begin:end, begin:end] = torch.ones(own, own, dtype=torch.bool).tril()
                count = len(tokens) - start
                targets[row, end - count - 1 : end - 1] = torch.as_tensor(tokens[start:])
                weights[row, end - count - 1 : end - 1] = 1 / (count * len(group))
                begin = end
        return cls(*(tensor.to(device) for tensor in (ids, targets, weights, positions, visible)))


def _common_prefix(group: Sequence[tuple[Sequence[int], int]]) -> int:
    """The number of leading tokens that all members share. Each member keeps the token before its first target."""
    limit = min(start for _, start in group) - 1
    first = group[0][0]
    for index in range(limit):
        if any(tokens[index] != first[index] for tokens, _ in group):
            return index
    return limit


class AdaptedModel:
    """The base model with a layout and scaling s. Adapters are arguments of its methods and never stored."""

    def __init__(self, model: Any, layout: Layout, scaling: float) -> None:
        """BaseModelError, with the architecture's name, if the parts don't compute what ``model`` computes."""
        self.layout = layout
        self.scaling = scaling
        self.device: torch.device = model.device
        self._modules: list[nn.Module] = [model.get_submodule(name) for name in layout.modules]
        self._parts: Parts = FastParts(model)
        first = min(_layer_index(name) for name in layout.modules)
        try:
            decoder = model.model
            self._embed = model.get_input_embeddings()
            self._lower = _slice_decoder(decoder, 0, first) if first else None
            self._upper = _slice_decoder(decoder, first, len(decoder.layers))
            self._head = _with_modules(model, model=_Passing())
            error = self._relative_error(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as caught:  # anything, from the code of a model built otherwise
            raise BaseModelError(_refusal(model, " ".join(str(caught).split()))) from caught
        if not error <= torch.finfo(model.dtype).eps ** 0.5:
            raise BaseModelError(_refusal(model, f"the logits of its layers run apart are wrong by {error:.1%}"))

    def lower(self, batch: TokenBatch) -> Tensor:
        """Hidden states before the first adapted layer, (rows, length, hidden). They don't depend on φ."""
        with torch.no_grad(), self._parts.used():
            if self._lower is None:
                return cast(Tensor, self._embed(batch.ids))
            found: list[Any] = []
            last = self._lower.layers[-1].register_forward_hook(lambda _module, _inputs, output: found.append(output))
            with last:
                self._run(self._lower, batch, input_ids=batch.ids)
        return cast(Tensor, found[0][0] if isinstance(found[0], tuple) else found[0])

    def upper(self, hidden: Tensor, adapters: Sequence[Tensor], batch: TokenBatch) -> Tensor:
        """Final hidden states, (rows, length, hidden), under ``adapters``.

        adapters: the layout's tensors in order, each (groups, *shape). The number of rows must be a multiple of groups.
        Consecutive rows share an adapter.
        """
        with self._parts.used(), self.injected(adapters):
            if self._lower is None:
                return self._run(self._upper, batch, inputs_embeds=hidden)
            # The decoder may change its input before the first layer, as it changes embeddings.
            first = self._upper.layers[0].register_forward_pre_hook(lambda _module, inputs: (hidden, *inputs[1:]))
            with first:
                return self._run(self._upper, batch, inputs_embeds=hidden)

    def token_losses(self, final: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the counted positions, (counted,), and their mask, bool (rows, length)."""
        counted = targets != -100
        logits = self.logits(final[counted])
        return derivatives.cross_entropy(logits, targets[counted]), counted

    def logits(self, final: Tensor) -> Tensor:
        """Logits of the next token after each final hidden state, float32 (positions, vocabulary)."""
        return self._logits(final).float()

    def loss(self, final: Tensor, batch: TokenBatch, weights: Tensor | None = None) -> Tensor:
        """The sum over all rows of the next-token cross-entropy, each target times its weight.

        weights: float32 (rows, length); None: the batch's weights.
        """
        losses, counted = self.token_losses(final, batch.targets)
        return ((batch.weights if weights is None else weights)[counted] * losses).sum()

    def predict(self, final: Tensor) -> Tensor:
        """The likeliest next token of each final hidden state, int64 (positions,)."""
        return self._logits(final).argmax(-1)

    def split(self, flat: Tensor) -> list[Tensor]:
        """(groups, num_values) → the layout's tensors, each (groups, *shape)."""
        sizes = [tensor.num_values for tensor in self.layout.tensors]
        return [
            part.view(-1, *tensor.shape)
            for part, tensor in zip(torch.split(flat, sizes, dim=1), self.layout.tensors, strict=True)
        ]

    def _logits(self, final: Tensor) -> Tensor:
        return cast(Tensor, self._head(inputs_embeds=final[None], use_cache=False).logits[0])

    @staticmethod
    def _run(part: Any, batch: TokenBatch, **inputs: Tensor) -> Tensor:
        attention: dict[str, Any] = {}
        if batch.visible is not None and batch.positions is not None:
            attention = {
                "attention_mask": _attention_bias(part.config, batch.visible, batch.positions, part.dtype),
                "position_ids": batch.positions,
            }
        return cast(Tensor, part(**inputs, use_cache=False, **attention).last_hidden_state)

    @torch.no_grad()
    def _relative_error(self, model: Any) -> float:
        """The logits of two rows of tokens, padded and packed, against those of ``model``."""
        rows = torch.randint(self._embed.num_embeddings, (2, 9), generator=torch.Generator().manual_seed(0))
        rows[1, :4] = rows[0, :4]  # shared when packed
        expected = model(input_ids=rows.to(self.device), use_cache=False).logits[:, 4:8].flatten(0, 1).float()
        members = [(row, 5) for row in rows.tolist()]
        adapters = self.split(torch.zeros(1, self.layout.num_values, device=self.device))
        errors = []
        for batch in (TokenBatch.pad(members, self.device), TokenBatch.pack([members], self.device)):
            final = self.upper(self.lower(batch), adapters, batch)
            errors.append((self.logits(final[batch.targets != -100]) - expected).norm() / expected.norm())
        return float(torch.stack(errors).max())

    @contextmanager
    def injected(self, adapters: Sequence[Tensor]) -> Iterator[None]:
        """Within it the model's modules have the adapters of ``upper``."""
        pairs = list(zip(self._modules, adapters[::2], adapters[1::2], strict=True))
        linears: dict[nn.Module, Callable[..., Tensor]] = {
            module: self._lora_linear(module, a, b) for module, a, b in pairs if type(module) is nn.Linear
        }
        handles = [
            module.register_forward_hook(self._lora_hook(a, b)) for module, a, b in pairs if module not in linears
        ]
        try:
            with replaced(linears):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _lora_linear(self, module: nn.Linear, a: Tensor, b: Tensor) -> Any:
        def forward(x: Tensor) -> Tensor:
            return derivatives.lora_linear(x, a.to(x.dtype), b.to(x.dtype), module.weight, module.bias, self.scaling)

        return forward

    def _lora_hook(self, a: Tensor, b: Tensor) -> Any:
        def add_delta(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows, length, _ = inputs[0].shape
            grouped = inputs[0].reshape(a.shape[0], rows // a.shape[0] * length, -1)
            low = self.scaling * torch.bmm(grouped, a.to(grouped.dtype).transpose(1, 2))
            return output + torch.bmm(low, b.to(grouped.dtype).transpose(1, 2)).reshape(output.shape)

        return add_delta


def _layer_index(module: str) -> int:
    return int(module.split(".layers.")[1].split(".")[0])


def _attention_bias(config: Any, visible: Tensor, positions: Tensor, dtype: torch.dtype) -> Any:
    """``visible`` as the additive mask that the library takes: 0 or the least number, four dimensions.

    A model with several layer types gets a mask for each type.
    """

    def bias(allowed: Tensor) -> Tensor:
        zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]

    window = getattr(config, "sliding_window", None)
    near = visible if window is None else visible & (positions[:, :, None] - positions[:, None, :] < window)
    if getattr(config, "layer_types", None):
        return {"full_attention": bias(visible), "sliding_attention": bias(near)}
    return bias(near)


class _Passing(nn.Module):
    """In the place of the decoder: its output is its input. So the model makes logits of given final states."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> _FinalStates:
        return _FinalStates(inputs_embeds)


class _FinalStates:
    """A decoder's output with nothing else in it. Architectures differ in the names of the rest."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def _slice_decoder(decoder: Any, first: int, end: int) -> Any:
    """A view of ``decoder`` that runs the layers first … end − 1 and shares its weights."""
    part = _with_modules(decoder, layers=nn.ModuleList(decoder.layers[first:end]))
    part.config = copy.copy(decoder.config)
    part.config.num_hidden_layers = end - first
    if getattr(decoder.config, "layer_types", None):
        part.config.layer_types = list(decoder.config.layer_types[first:end])
    return part


def _with_modules(module: Any, **others: nn.Module) -> Any:
    """A copy of ``module`` that shares all modules except ``others``."""
    part = copy.copy(module)
    part.__dict__["_modules"] = {**module._modules, **others}
    return part


def _refusal(model: Any, reason: str) -> str:
    return (
        f"the base model must be built like Llama, got {type(model).__name__}: {reason}; use a model of another "
        "architecture"
    )
