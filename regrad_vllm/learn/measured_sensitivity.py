"""Measures a learner's sensitivity: the change of the answers for a small error in a document's gradient.

For each question the adapter is the one of its document, φ* − γ δ. The measure is the Fisher information of the model's
answers. At each position of the known answer, a token is drawn from the model's distribution. The gradient of its log
likelihood by each LoRA tensor is squared and summed over each side. Tokens are drawn, not taken from the known answer,
because the change of the distribution counts, and not whether it is right.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from bank_service.wire.codecs.lowrank_fit import long_is_columns
from bank_service.wire.codecs.sensitivity import Sensitivity
from regrad_vllm.adapt.compose import compose
from regrad_vllm.base_model import load_base_model
from regrad_vllm.data.questions import EvalData, Question
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.encode.gradient_encoder import GradientEncoder, check_base
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.learner import Learner

_ROWS = 8  # questions in one backward pass, each with another adapter
_DOCUMENTS = 16  # documents encoded at a time


def measure_sensitivity(learner: Learner, model_folder: Path, data: EvalData, seed: int) -> Sensitivity:
    """The sensitivity over all questions of ``data``, each with the gradient of its first document.

    LearnerError for another base model. ValueError without questions.
    """
    if not data.questions:
        raise ValueError("there must be a question to measure a sensitivity by, got none")
    check_base(learner, model_folder)
    base, tokenizer = load_base_model(model_folder, dtype=torch.float32, device="cpu")
    model = AdaptedModel(base, learner.layout, learner.scaling)
    builder = PromptBuilder(tokenizer, learner.config.prompts)
    encoder = GradientEncoder(model, builder, learner)
    sums = SensitivitySums(learner)
    generator = torch.Generator().manual_seed(seed)
    asked: dict[str, list[Question]] = {}
    for question in data.questions:
        asked.setdefault(question.documents[0], []).append(question)
    documents = [document for document in data.documents if document.id in asked]
    for start in tqdm(range(0, len(documents), _DOCUMENTS), unit="batch", desc="sensitivity"):
        some = documents[start : start + _DOCUMENTS]
        encoded = encoder.encode([(document.title, document.text) for document in some])
        weights = learner.config.weights([1.0])
        rows = [
            (builder.question(question.question), builder.answer(question.answers[0]), index)
            for index, document in enumerate(some)
            for question in asked[document.id]
        ]
        adapters = [compose(learner.phi, [each.values], weights, learner.config.gamma) for each in encoded]
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))  # like lengths together, to save padding
        for first in range(0, len(rows), _ROWS):
            chosen = rows[first : first + _ROWS]
            batch = TokenBatch.pad([(prompt + answer, len(prompt)) for prompt, answer, _ in chosen])
            sums.add(model, batch, np.stack([adapters[index] for *_, index in chosen]), generator)
    return sums.sensitivity()


class SensitivitySums:
    """Sums over the questions for each tensor, with its gradient G (short side, long side) for a question.

    They are Σ G Gᵀ, and Σ G² along the short side.
    """

    def __init__(self, learner: Learner) -> None:
        shapes = learner.layout.shapes
        self._short = [np.zeros((min(shape),) * 2) for shape in shapes]
        self._long = [np.zeros(max(shape)) for shape in shapes]
        self._count = 0

    def add(
        self, model: AdaptedModel, batch: TokenBatch, adapters: NDArray[np.float32], generator: torch.Generator
    ) -> None:
        """Adds the questions of a batch. adapters: float32 (rows, num_values), one for each question."""
        leaves = [part.detach().requires_grad_() for part in model.split(torch.from_numpy(adapters))]
        final = model.upper(model.lower(batch), leaves, batch)
        counted = batch.targets != -100
        logits = model.logits(final[counted])
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(
            logits, drawn, reduction="sum"
        )  # each row's loss depends only on that row's leaves
        for index, gradient in enumerate(torch.autograd.grad(loss, leaves)):
            for own in gradient.double().numpy():
                side = own if long_is_columns(own.shape) else own.T
                self._short[index] += side @ side.T
                self._long[index] += (side * side).sum(axis=0)
        self._count += len(adapters)

    def sensitivity(self) -> Sensitivity:
        """The mean over the questions. The short side has the scale, and the long side is relative to its mean."""
        short = [total / (self._count * len(long)) for total, long in zip(self._short, self._long, strict=True)]
        return Sensitivity(
            tuple(each.astype(np.float32) for each in short),
            tuple(_relative(each).astype(np.float32) for each in self._long),
        )


def _relative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    mean = float(values.mean())
    return values / mean if mean else values


def about(data: EvalData, seed: int) -> dict[str, str]:
    """The origin of a sensitivity, for its file."""
    counts = Counter(question.set_name for question in data.questions)
    return {
        "questions": ", ".join(f"{count} of {name}" for name, count in sorted(counts.items())),
        "seed": str(seed),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
