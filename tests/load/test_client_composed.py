"""The published way: the base weights are overwritten for one request, and are what they were after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from regrad_vllm.data.questions import Question
from regrad_vllm.default_model import ensure_default_model, shipped_learner
from regrad_vllm.learner import Learner
from regrad_vllm.load.askers import Attempt, OneAtATime
from regrad_vllm.load.client_composed import SwappedWeights
from regrad_vllm.load.comparison import CONTENDERS, LoadCondition
from tests.load.made import condition

QUESTION = Question("q", "What is the capital of France?", ("Paris",), ("d",), "set")


class Given:
    """Gradients that were composed already."""

    def __init__(self, adapter: NDArray[np.float32]) -> None:
        self.composed = adapter

    async def adapter(self, question: Question, condition: LoadCondition, attempt: Attempt) -> NDArray[np.float32]:
        return self.composed


@pytest.fixture(scope="module")
def learner() -> Learner:
    return Learner.load(shipped_learner())


@pytest.fixture(scope="module")
def gradients(learner: Learner) -> Given:
    return Given(learner.phi)


@pytest.fixture(scope="module")
def swapped(learner: Learner, gradients: Given) -> SwappedWeights:
    return SwappedWeights(ensure_default_model(), learner, gradients, "float32")  # type: ignore[arg-type]


def weights(swapped: SwappedWeights, learner: Learner) -> list[torch.Tensor]:
    return [swapped._model.get_submodule(name).weight.clone() for name in learner.layout.modules]


def ask(swapped: SwappedWeights, own: LoadCondition) -> Attempt:
    attempt = Attempt()
    asyncio.run(swapped.ask(QUESTION, CONTENDERS["published"], own, attempt))
    return attempt


def test_an_answer_is_the_adapters_and_the_weights_are_the_bases_again(
    swapped: SwappedWeights, learner: Learner, gradients: Given
) -> None:
    before = weights(swapped, learner)
    own = ask(swapped, condition(output_tokens=8))
    assert len(own.stream.event_times) == own.stream.output_tokens == 8 and own.stream.ended is not None
    assert own.prepare_ms > 0 and own.stream.prompt_tokens > 10
    gradients.composed = np.zeros_like(learner.phi)
    base = ask(swapped, condition(output_tokens=8))
    gradients.composed = learner.phi
    assert base.stream.text != own.stream.text
    assert all(torch.equal(*pair) for pair in zip(before, weights(swapped, learner), strict=True))


def test_a_request_that_is_stopped_leaves_the_weights_as_they_were(swapped: SwappedWeights, learner: Learner) -> None:
    before = weights(swapped, learner)
    only = OneAtATime(swapped)
    attempt = Attempt()

    async def run() -> None:
        own = condition(output_tokens=400)
        task = asyncio.create_task(only.ask(QUESTION, CONTENDERS["published"], own, attempt))
        await eventually(lambda: len(attempt.stream.event_times) > 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert 2 < len(attempt.stream.event_times) < 400, "it stopped early"
    assert all(torch.equal(*pair) for pair in zip(before, weights(swapped, learner), strict=True))


async def eventually(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)
