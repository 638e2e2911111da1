"""Token sequences as a batch of rows.

Rows are padded on the right and attention is causal. So padding never influences a real token, and no padding mask is
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded rows. ``targets`` holds the token to predict after each position, or -100 if it doesn't count."""

    ids: Tensor  # int64 (rows, length)
    targets: Tensor  # int64 (rows, length)
    weights: Tensor  # float32 (rows, length): how much each target counts in its row's loss
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
        the losses of its members as separate rows. A group may be empty.
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
            if common:
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

    def beside(self, other: TokenBatch, weight: float) -> TokenBatch:
        """Each row followed by that of ``other``, neither of which sees the other. Its loss is the first's + weight ×
        the second's."""
        mine, others = self._attention(), other._attention()
        rows, first, second = len(self.ids), self.ids.shape[1], other.ids.shape[1]
        visible = torch.zeros((rows, first + second, first + second), dtype=torch.bool, device=self.ids.device)
        visible[:, :first, :first], visible[:, first:, first:] = mine[1], others[1]
        return TokenBatch(
            torch.cat([self.ids, other.ids], 1),
            torch.cat([self.targets, other.targets], 1),
            torch.cat([self.weights, weight * other.weights], 1),
            torch.cat([mine[0], others[0]], 1),
            visible,
        )

    def _attention(self) -> tuple[Tensor, Tensor]:
        """``positions`` and ``visible``, also where these are None."""
        if self.positions is not None and self.visible is not None:
            return self.positions, self.visible
        rows, length = self.ids.shape
        causal = torch.ones((length, length), dtype=torch.bool, device=self.ids.device).tril()
        return torch.arange(length, device=self.ids.device).expand(rows, -1), causal.expand(rows, -1, -1)


def _common_prefix(group: Sequence[tuple[Sequence[int], int]]) -> int:
    """The number of leading tokens that all members share. Each member keeps the token before its first target."""
    if not group:
        return 0
    limit = min(start for _, start in group) - 1
    first = group[0][0]
    for index in range(limit):
        if any(tokens[index] != first[index] for tokens, _ in group):
            return index
    return limit
