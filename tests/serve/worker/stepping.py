"""vLLM's side of a worker's steps: requests with adapters, and the batches that it makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from regrad_vllm.serve.kernels.batch import BatchDocuments
from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.seams.worker_patches import StepRequests
from tests.serve.support import Worker


@dataclass(frozen=True)
class Adapter:
    """vLLM's LoRARequest, of ours or of an operator."""

    lora_name: str
    lora_path: str


def adapter(recipe: Recipe) -> Adapter:
    return Adapter(recipe.name, recipe.path)


@dataclass
class Engine:
    """A model runner: the requests that it knows, and the batch of the next step."""

    worker: Worker
    known: dict[str, Adapter | None] = field(default_factory=dict)
    batches: list[BatchDocuments | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.worker.device.set_batch = self.batches.append  # type: ignore[method-assign]

    def step(self, **tokens: int) -> BatchDocuments | None:
        """A step with so many tokens of each request. The table that the device has then."""
        requests = StepRequests(list(tokens), np.array(list(tokens.values())), self.known.__getitem__, self.known)
        self.worker.steps.set(requests)
        return self.batches[-1]


def documents(batch: BatchDocuments | None, row: int) -> list[tuple[int, float]]:
    """(address, coefficient) of the documents of a token row; an empty list for a row that isn't ours."""
    assert batch is not None
    places = np.flatnonzero(batch.rows == row)
    if not len(places):
        return []
    own = slice(*batch.first[places[0] : places[0] + 2])
    return list(zip(batch.addresses[own].tolist(), batch.coefficients[own].tolist(), strict=True))
