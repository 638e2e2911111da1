"""The engine of the benchmark, and the documents and recipes for its requests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bank_service.wire.codecs.factors import CODES, factor_form
from bank_service.wire.record import HEADER_BYTES, encode_gradient, record_digest
from benchmarks.shapes import RANK
from regrad_vllm.learner import Learner
from regrad_vllm.local.pair import SERVER_ENVIRONMENT
from regrad_vllm.serve.api.engine import Engine
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.engine_flags import EXTENSION_CLASS, GPU_COMPILATION, merged_modules
from regrad_vllm.serve.recipe import ADAPTER_ID, Recipe

_CHECKSUM = 80  # where it stands in a record's header, see ``bank_service.wire.record``


class RunningEngine:
    """An engine with ReGrad that answers requests."""

    def __init__(self, client: Any, doors: Engine, arena: Arena) -> None:
        self.client, self._doors, self._arena = client, doors, arena
        self._numbers = count()

    async def answer(self, prompt: Sequence[int], num_tokens: int, recipe: Recipe | None = None) -> None:
        """One request with a recipe's documents, or with the base model."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        lora = LoRARequest(recipe.name, ADAPTER_ID, recipe.path) if recipe is not None else None
        async with self._resident(recipe) if recipe is not None else nullcontext():
            generated = 0
            prompt_of = {"prompt_token_ids": list(prompt)}
            request_id = f"request-{next(self._numbers)}"
            async for output in self.client.generate(prompt_of, params, request_id, lora_request=lora):
                generated += len(output.outputs[0].token_ids)
            if generated != num_tokens:
                raise RuntimeError(f"a request must generate {num_tokens} tokens, it generated {generated}")

    @asynccontextmanager
    async def _resident(self, recipe: Recipe) -> AsyncIterator[None]:
        """The recipe's documents are in the worker while the context lasts."""
        placement = self._doors.place(recipe)
        try:
            await self._doors.prepare(placement, str(self._arena.folder))
            yield
        finally:
            self._doors.release(placement)

    async def figures(self) -> dict[str, Any]:
        """The worker's figures."""
        (figures,) = await self._doors.figures()
        return figures


class Documents:
    """Documents in the arena, and recipes of them."""

    def __init__(self, learner: Learner, arena: Arena, number: int, codec: str) -> None:
        self._learner = learner
        self._numbers, self._chance = count(), np.random.default_rng(1)
        self._digests = []
        hold = arena.hold()
        values = self._chance.standard_normal(learner.layout.num_values, np.float32) * np.float32(1e-4)
        record = encode_gradient(values, learner.spec, codec)
        place = HEADER_BYTES + int(factor_form(codec, learner.layout.shapes).table[1, CODES])
        for k in range(number):  # costs don't depend on values, and fitting factors takes time
            other = numbered(record, place, k)
            self._digests.append(record_digest(other))
            hold.put(self._digests[-1], other)

    def recipes(self, number: int, per_recipe: int) -> list[Recipe]:
        """New recipes. No document is in two of them while there are enough."""
        chosen = np.resize(self._chance.permutation(len(self._digests)), number * per_recipe).tolist()
        found = []
        for first in range(0, number * per_recipe, per_recipe):
            digests = tuple(self._digests[k] for k in chosen[first : first + per_recipe])
            gamma = 1 - next(self._numbers) / 2**20
            found.append(Recipe(self._learner.fingerprint, digests, (1.0,) * per_recipe, gamma))
        return found

    def phi_alone(self) -> Recipe:
        """φ* without documents."""
        return Recipe(self._learner.fingerprint, (), (), 1.0)


def numbered(record: bytes, place: int, number: int) -> bytes:
    """The record of factors with ``number`` in the eight codes at ``place``, which makes it another document."""
    codes = bytes(number // 7**digit % 7 + 0x11 for digit in range(8))  # codes of 8 bits, and pairs of codes of 4
    payload = record[HEADER_BYTES:place] + codes + record[place + 8 :]
    checksum = hashlib.sha256(record[:_CHECKSUM] + payload).digest()
    return record[:_CHECKSUM] + checksum + record[_CHECKSUM + len(checksum) : HEADER_BYTES] + payload


@asynccontextmanager
async def running(
    folder: Path,
    learner: Learner,
    arena: Arena,
    *,
    num_seqs: int,
    max_tokens: int,
    memory_share: float,
    graph_sizes: Sequence[int],
    max_loras: int,
    worker_bytes: int,
) -> AsyncIterator[RunningEngine]:
    """An engine of ``folder``/model and ``folder``/learner, for ``num_seqs`` requests of ``max_tokens`` at once.

    memory_share: of the GPU's memory. graph_sizes: the numbers of requests in a step that get CUDA graphs. max_loras: 1
    for φ* alone, more for operators' adapters beside it.
    """
    os.environ.update(
        SERVER_ENVIRONMENT
        | {
            "VLLM_PLUGINS": "regrad",
            "REGRAD_LEARNER": str(folder / "learner"),
            "REGRAD_WORKER_BYTES": str(worker_bytes),
        }
    )
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    device: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
    if torch.cuda.is_available():  # the compilation settings of `regrad serve`, with the measured sizes
        graphs = json.loads(GPU_COMPILATION) | {"cudagraph_capture_sizes": list(graph_sizes)}
        device = {"dtype": "bfloat16", "gpu_memory_utilization": memory_share, "compilation_config": graphs}
    client = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder / "model"), load_format="dummy", skip_tokenizer_init=True, max_model_len=max_tokens,
            max_num_seqs=num_seqs, enable_prefix_caching=False, enable_lora=True, max_loras=max_loras,
            max_cpu_loras=max_loras, max_lora_rank=RANK, lora_target_modules=list(merged_modules(learner)),
            worker_extension_cls=EXTENSION_CLASS, disable_log_stats=True, **device,
        )
    )  # fmt: skip
    doors = None
    try:
        doors, _ = await Engine.connect(client, learner)
        yield RunningEngine(client, doors, arena)
    finally:
        if doors is not None:
            await doors.close()
        client.shutdown()
