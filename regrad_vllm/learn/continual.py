"""Continual pre-training: one plain LoRA trained on the whole corpus. It is a rival of gradients per document."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray

from regrad_vllm.base_model import fast_dtype, load_base_model
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.gradient_encoder import check_base
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.learner import Learner

_LOG = logging.getLogger(__name__)


def pretrain(
    learner: Learner,
    model_folder: Path,
    documents: Sequence[tuple[str, str]],
    *,
    learning_rate: float,
    start: NDArray[np.float32] | None = None,
    epochs: int = 10,
    batch_size: int = 4,
    seed: int = 0,
) -> NDArray[np.float32]:
    """φ* trained on with the language-model loss of all (title, text), so that the form of the answers is known.

    start: an adapter to go on from in place of φ*, float32 (num_values,).
    AdamW with linear decay, ``batch_size`` documents of like length a step, in random order. Returns float32
    (num_values,); logs the steps and the first and last epoch's mean loss. LearnerError for another base model.
    """
    from tqdm import tqdm

    check_base(learner, model_folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_base_model(model_folder, dtype=fast_dtype(device), device=device)
    model = AdaptedModel(base, learner.layout, learner.scaling)
    builder = PromptBuilder(tokenizer, learner.config.prompts)
    tokens = [builder.document(*document, learner.config.max_document_tokens)[0] for document in documents]
    phi = torch.tensor(learner.phi if start is None else start, device=device).requires_grad_()
    optimizer = torch.optim.AdamW([phi], lr=learning_rate, weight_decay=0.0)
    by_length = sorted(
        range(len(tokens)), key=lambda index: len(tokens[index])
    )  # like lengths together, to save padding
    batches = [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
    total = epochs * len(batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    rng = random.Random(f"regrad.continual.{seed}")
    with tqdm(total=total, desc="continual pre-training", unit="step") as bar:
        means = []
        for _ in range(epochs):
            rng.shuffle(batches)
            losses = []
            for indices in batches:
                batch = TokenBatch.pad([(tokens[index], 1) for index in indices], device)
                final = model.upper(model.lower(batch), model.split(phi[None]), batch)
                loss = model.loss(final, batch) / len(indices)
                torch.autograd.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(float(loss.detach()))
                bar.update()
            means.append(fmean(losses))
            bar.set_postfix(loss=f"{means[-1]:.3f}", refresh=False)
    _LOG.info(
        "continual pre-training: %d steps, loss %.3f in the first epoch, %.3f in the last", total, means[0], means[-1]
    )
    return phi.detach().cpu().numpy()
