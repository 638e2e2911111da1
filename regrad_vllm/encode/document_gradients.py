"""Per-document gradients, exact, for a whole batch in one backward pass.

Each document gets its own copy (by broadcast) of φ* as the differentiation variable. The gradient of the sum of all
losses with respect to copy i is then the gradient of document i's loss alone. For the linear layers this is
gB_i = s · δ_iᵀ (A x_i), gA_i = s · (δ_i B)ᵀ x_i, computed as batched matrix products. Here δ_i is the derivative by the
layer's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.inner_loss import InnerLoss


def document_gradients(
    model: AdaptedModel, phi: Tensor, batch: TokenBatch, inner_loss: InnerLoss | None = None
) -> Tensor:
    """g_d = ∇φ L(φ; d) for every row d of ``batch``.

    phi: float32 (num_values,), or (rows, num_values) if each document has its own. inner_loss: L; None: the mean over
    the tokens. Returns float32 (rows, num_values), with zeros for a row without targets.
    """
    return document_deltas(model, phi, torch.ones(1, 1, device=phi.device), batch, inner_loss)


def document_deltas(
    model: AdaptedModel, phi: Tensor, step_sizes: Tensor, batch: TokenBatch, inner_loss: InnerLoss | None = None
) -> Tensor:
    """δ_d = Σ_s a_s ⊙ g_d(φ_s) with φ_0 = φ* and φ_s+1 = φ_s − a_s ⊙ g_d(φ_s); one inner step is a ⊙ g_d(φ*).

    step_sizes: float32 (inner_steps, num_values or 1). Returns float32 (rows, num_values).
    """
    deltas = torch.zeros(len(batch.ids), model.layout.num_values, device=phi.device)
    if not (batch.targets != -100).any():
        return deltas
    hidden = model.lower(batch)
    weights = (inner_loss or InnerLoss()).weights(batch, hidden).detach()
    for sizes in step_sizes:
        own = [part.detach().requires_grad_() for part in model.split(phi - deltas)]
        loss = model.loss(model.upper(hidden, own, batch), batch, weights)
        gradients = torch.autograd.grad(loss, own)
        deltas += sizes * torch.cat([gradient.reshape(len(deltas), -1).float() for gradient in gradients], dim=1)
    return deltas
