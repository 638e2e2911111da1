"""A learner without meta-training. It shows the quality of raw gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from regrad_vllm.base_model import load_base_model
from regrad_vllm.encode.adapted_model import AdaptedModel
from regrad_vllm.encode.document_gradients import document_gradients
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.learn.batches import make_batch
from regrad_vllm.learn.state import initial_phi
from regrad_vllm.learn.tasks import Sampler, synthetic_set
from regrad_vllm.learner import Learner

STEP_SIZES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_NUM_TASKS = 48


def raw_learner(learner: Learner, model_folder: Path, top_k: int, seed: int = 0) -> Learner:
    """A learner with the layout and prompts of ``learner``, the paper's inner loss, and LoRA's usual φ*.

    All tensors have one step size, the one of STEP_SIZES with the least answer loss on invented facts for validation.
    top_k: documents per adapter there.
    """
    base, tokenizer = load_base_model(model_folder, dtype=torch.float32, device="cpu")
    model = AdaptedModel(base, learner.layout, learner.scaling)
    phi = initial_phi(learner.layout, torch.Generator().manual_seed(seed))
    sampler = Sampler(
        sets=(synthetic_set("validation", seed, 4 * _NUM_TASKS),), set_weights=(1.0,), seed=seed,
        tokens_per_step=100 * _NUM_TASKS, max_tasks=_NUM_TASKS, questions_per_task=2, max_words=200,
        top_k_weights=tuple(float(k == top_k) for k in range(1, top_k + 1)), icl_share=0.0, neighbour_share=0.0,
    )  # fmt: skip
    builder = PromptBuilder(tokenizer, learner.config.prompts)
    batch = make_batch(sampler.plan(0), builder, learner.config.max_document_tokens, torch.device("cpu"))
    gradients = document_gradients(model, phi, batch.documents)
    losses = {}
    with torch.no_grad():
        hidden = model.lower(batch.questions)
        for size in STEP_SIZES:
            adapters = model.split(phi - learner.config.gamma * size * (batch.mix @ gradients))
            losses[size] = float(model.loss(model.upper(hidden, adapters, batch.questions), batch.questions))
    best = min(losses, key=lambda size: losses[size])
    config = replace(
        learner.config, step_size_kind="same", inner_steps=1, length_exponent=1.0, score_temperature=0.0,
        training={"kind": "raw", "seed": seed, "answer_loss": {str(size): losses[size] for size in STEP_SIZES}},
    )  # fmt: skip
    return Learner(config, learner.layout, phi.numpy(), np.array([best], np.float32))
