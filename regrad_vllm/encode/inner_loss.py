"""The weight of each token in a document's inner loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from regrad_vllm.encode.adapted_model import TokenBatch

REFERENCE_TOKENS = 32  # for a document of this length the exponent makes no difference


@dataclass(frozen=True, slots=True)
class InnerLoss:
    """L(d) = Σ_t w_t ℓ_t / (T^p · 32^(1−p)) over the T tokens of a document, ℓ_t their cross-entropies.

    length_exponent: p. With p = 1 it is the paper's mean, in which a fact of a long document counts less than one of a
    short document.
    token_head: (u, b) as float32 (hidden + 1,). It gives w_t = softplus(u · h / rms(h) + b) / ln 2, where h is the
    target's hidden state below the first adapted layer. None or zeros: w_t = 1.
    """

    length_exponent: float = 1.0
    token_head: Tensor | None = None

    def weights(self, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """The weight of every target, (rows, length). hidden: the batch's states from ``AdaptedModel.lower``."""
        weights = batch.weights
        if self.length_exponent != 1.0:
            lengths = (batch.targets != -100).sum(1, keepdim=True)
            weights = weights * (lengths / REFERENCE_TOKENS) ** (1 - self.length_exponent)
        if self.token_head is not None:
            of_target = hidden.float().roll(-1, dims=1)  # position t predicts token t + 1
            normed = of_target * of_target.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
            scores = normed @ self.token_head[:-1] + self.token_head[-1]
            weights = weights * nn.functional.softplus(scores) / math.log(2)
        return weights
