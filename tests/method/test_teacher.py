from __future__ import annotations

from typing import Any

import pytest
import torch

from regrad_vllm.base_model import build_layout
from regrad_vllm.encode.adapted_model import AdaptedModel, TokenBatch
from regrad_vllm.learn.meta_step import MetaBatch, MetaParameters, meta_loss
from regrad_vllm.learn.teacher import expectations
from tests.method.test_gradients import random_tokens

ANSWERS = [random_tokens(length, length) for length in (3, 4, 2, 3)]
BLIND = [(random_tokens(5, 50 + index) + answer, 5) for index, answer in enumerate(ANSWERS)]
READING = [(random_tokens(14, 90 + index) + answer, 14) for index, answer in enumerate(ANSWERS)]


def packed(rows: list[tuple[list[int], int]]) -> TokenBatch:
    return TokenBatch.pack([rows[:2], rows[2:]])


def test_the_loss_grows_by_the_distance_to_a_teacher_that_reads_more(llama: Any) -> None:
    layout = build_layout(llama, rank=4, layers=(2, 3), projections=("gate_proj", "down_proj"))
    model = AdaptedModel(llama, layout, 2.0)
    phi, teacher = torch.randn(2, layout.num_values, generator=torch.Generator().manual_seed(1)) * 0.3
    expected = expectations(model, teacher, packed(READING))
    batch = MetaBatch(TokenBatch.pad([(random_tokens(6, 7), 1)] * 2), packed(BLIND), torch.eye(2), None, expected)
    parameters = MetaParameters(phi, [], gamma=0.0)
    with torch.no_grad():
        plain, taught = meta_loss(model, parameters, batch), meta_loss(model, parameters, batch, 0.5)
        # One question at a time: the mean over its answer's tokens of KL(teacher ‖ learner).
        distances = []
        for asked, read in zip(BLIND, READING, strict=True):
            ours, theirs = (
                expectations(model, flat, TokenBatch.pad([row])).exp() for row, flat in ((asked, phi), (read, teacher))
            )
            distances.append(float((theirs * (theirs / ours).log()).sum(-1).mean()))
        assert min(distances) > 0.01, "they differ"
        assert float(taught - plain) == pytest.approx(0.5 * sum(distances) / 4, rel=1e-4)
