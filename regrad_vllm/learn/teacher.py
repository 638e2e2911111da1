"""A teacher: a learner with the right documents in the prompt. The trained learner imitates it without these documents.

The teacher answers each step's questions in one forward pass without derivatives. This is a small part of a
second-order step, so its answers are not stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.learn.train_config import ConfigError
from regrad_vllm.learner import Learner


def teacher_phi(model: AdaptedModel, learner: Learner) -> Tensor:
    """The learner's φ* for ``model``. ConfigError if layout or scaling differ."""
    if learner.layout != model.layout or learner.scaling != model.scaling:
        raise ConfigError("teacher must have the modules, rank and lora_alpha of this run; give another")
    return torch.tensor(learner.phi, device=model.device)


@torch.no_grad()
def expectations(model: AdaptedModel, phi: Tensor, reading: TokenBatch) -> Tensor:
    """Log-probabilities of every token at each target of ``reading``, float32 (targets, vocabulary)."""
    final = model.upper(model.lower(reading), model.split(phi[None]), reading)
    return model.logits(final[reading.targets != -100]).log_softmax(-1)


def distance(model: AdaptedModel, final: Tensor, batch: TokenBatch, expected: Tensor) -> Tensor:
    """Σ_t w_t KL(expected_t ‖ ours_t) over the targets of ``batch``, with its weights w. final: its hidden states."""
    counted = batch.targets != -100
    ours = model.logits(final[counted]).log_softmax(-1)
    divergence = torch.nn.functional.kl_div(ours, expected, reduction="none", log_target=True).sum(-1)
    return (batch.weights[counted] * divergence).sum()
