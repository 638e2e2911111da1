"""A LoRA per document, as in parametric RAG (PRAG): many optimiser steps, while ReGrad takes one gradient.

PRAG's generated questions are left out, because the default model is too small to write them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.gradient_encoder import plan_passes
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.learner import Learner


def fit_each(
    model: AdaptedModel,
    builder: PromptBuilder,
    learner: Learner,
    documents: Sequence[tuple[str, str]],
    *,
    learning_rate: float,
    num_steps: int = 10,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(index, δ = φ* − φ_d) for every (title, text). Documents of like length come together.

    φ_d is φ* after ``num_steps`` steps of Adam on the document's language-model loss. δ is float32 (num_values,), and
    it is composed like a gradient.
    """
    from tqdm import tqdm

    phi = torch.tensor(learner.phi, device=model.device)
    limit = learner.config.max_document_tokens
    tokens = [builder.document(*document, limit)[0] for document in documents]
    with tqdm(total=len(documents), desc="a LoRA per document", unit="document") as bar:
        for indices in plan_passes([len(row) for row in tokens]):
            batch = TokenBatch.pad([(tokens[index], 1) for index in indices], model.device)
            hidden = model.lower(batch)
            own = phi.repeat(len(indices), 1).requires_grad_()
            optimizer = torch.optim.Adam([own], lr=learning_rate)  # Adam works by element, so the rows don't mix
            for _ in range(num_steps):
                torch.autograd.backward(model.loss(model.upper(hidden, model.split(own), batch), batch))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            deltas = (phi - own.detach()).cpu().numpy()
            for row, index in enumerate(indices):
                yield index, deltas[row].copy()
            bar.update(len(indices))
