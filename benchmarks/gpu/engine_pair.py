"""The two engines of the benchmark, and the adapters for their requests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bank_service.wire.record import DEFAULT_CODEC, decode_gradient, encode_gradient, record_digest
from benchmarks.shapes import RANK
from regrad_vllm.adapt.arena import Arena, read_record
from regrad_vllm.adapt.compose import compose
from regrad_vllm.learner import Learner, save_adapter
from regrad_vllm.local.pair import SERVER_ENVIRONMENT
from regrad_vllm.serve.engine import Engine
from regrad_vllm.serve.launch import GPU_COMPILATION, merged_modules
from regrad_vllm.serve.recipe import Recipe


class RunningEngine:
    """An engine that answers requests, ours or stock vLLM."""

    def __init__(self, client: Any, doors: Engine | None) -> None:
        self.client, self._doors = client, doors
        self._numbers = count()

    async def answer(
        self, prompt: Sequence[int], num_tokens: int, recipe: Recipe | None = None, path: str = ""
    ) -> None:
        """One request with a recipe's adapter, with the PEFT folder ``path``, or with the base model."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        lora = None
        if recipe is not None:
            lora = LoRARequest(recipe.name, recipe.int_id, recipe.path)
        elif path:
            lora = LoRARequest(Path(path).name, int(Path(path).name.rpartition("-")[2]) + 1, path)
        async with self._prepared(recipe) if recipe is not None else nullcontext():
            generated = 0
            prompt_of = {"prompt_token_ids": list(prompt)}
            request_id = f"request-{next(self._numbers)}"
            async for output in self.client.generate(prompt_of, params, request_id, lora_request=lora):
                generated += len(output.outputs[0].token_ids)
            if generated != num_tokens:
                raise RuntimeError(f"a request must generate {num_tokens} tokens, it generated {generated}")

    async def activate(self, recipe: Recipe) -> tuple[float, float]:
        """(ms in the engine's loop, ms from the recipe to the active adapter) for a new adapter."""
        start = time.perf_counter()
        async with self._prepared(recipe):
            in_loop = await self.add(recipe.name, recipe.int_id, recipe.path)
            return in_loop, (time.perf_counter() - start) * 1000

    @asynccontextmanager
    async def _prepared(self, recipe: Recipe) -> AsyncIterator[None]:
        """The recipe's adapter is in a slot while the context lasts."""
        assert self._doors is not None, "stock vLLM knows no recipes"
        place = self._doors.place(recipe)
        try:
            await self._doors.prepare(place)
            yield
        finally:
            self._doors.release(place)

    async def add(self, name: str, int_id: int, path: str) -> float:
        """``benchmarks.activation.Probe.probe_add``."""
        (ms,) = await self.client.collective_rpc("probe_add", args=(name, int_id, path))
        return float(ms)

    async def num_recomposed(self) -> int:
        (figures,) = await self._doors.figures()  # type: ignore[union-attr]
        return int(figures["num_recomposed"])


class Adapters:
    """Makes new recipes from records in the arena, and PEFT folders."""

    def __init__(self, learner: Learner, arena: Arena, folder: Path, num_records: int) -> None:
        self.learner, self.folder = learner, folder
        self._arena, self._numbers, self._chance = arena, count(), np.random.default_rng(1)
        self._digests = []
        for _ in range(num_records):
            values = self._chance.standard_normal(learner.layout.num_values, np.float32) * np.float32(1e-4)
            record = encode_gradient(values, learner.spec, DEFAULT_CODEC)
            self._digests.append(record_digest(record))
            arena.hold().put(self._digests[-1], record)

    def recipe(self, num_documents: int) -> Recipe:
        """A new recipe. For 0 documents it is always the same one, φ* alone."""
        digests = tuple(self._digests[i] for i in self._chance.permutation(len(self._digests))[:num_documents])
        gamma = 1 - next(self._numbers) / 2**20 if num_documents else 1.0
        return Recipe(str(self._arena.folder), self.learner.fingerprint, digests, (1.0,) * len(digests), gamma)

    def written(self, recipe: Recipe, number: int) -> str:
        """The recipe's adapter as a PEFT folder."""
        path = self.folder / f"adapter-{number}"
        deltas = [decode_gradient(read_record(recipe.arena, key), self.learner.spec) for key in recipe.digests]
        save_adapter(path, self.learner, compose(self.learner.phi, deltas, recipe.weights, recipe.gamma))
        return str(path)

    def named_again(self, path: str, number: int) -> str:
        """The folder under another name, which is another adapter for vLLM."""
        other = self.folder / f"adapter-{number}"
        other.symlink_to(path)
        return str(other)


@asynccontextmanager
async def running(
    folder: Path,
    learner: Learner,
    *,
    ours: bool,
    slots: int,
    max_tokens: int,
    memory_share: float,
    graph_sizes: Sequence[int],
) -> AsyncIterator[RunningEngine]:
    """An engine of ``folder``/model for ``slots`` requests of ``max_tokens``. Ours also has ``folder``/learner.

    memory_share: of the GPU's memory. graph_sizes: the numbers of requests in a step that get CUDA graphs.
    """
    os.environ.update(SERVER_ENVIRONMENT | {"VLLM_PLUGINS": "regrad" if ours else ""})
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a forked worker would inherit the other engine's patches
    os.environ.pop("REGRAD_LEARNER", None)
    if ours:
        os.environ["REGRAD_LEARNER"] = str(folder / "learner")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    device: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
    if torch.cuda.is_available():
        # Both engines have the compilation settings of `regrad serve`, with the measured sizes.
        graphs = json.loads(GPU_COMPILATION) | {"cudagraph_capture_sizes": list(graph_sizes)}
        device = {"dtype": "bfloat16", "gpu_memory_utilization": memory_share, "compilation_config": graphs}
    client = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder / "model"), load_format="dummy", skip_tokenizer_init=True, max_model_len=max_tokens,
            max_num_seqs=slots, enable_prefix_caching=False, enable_lora=True, max_loras=slots, max_cpu_loras=slots,
            max_lora_rank=RANK, lora_target_modules=list(merged_modules(learner)),
            worker_extension_cls="benchmarks.activation.Probe", disable_log_stats=True, **device,
        )
    )  # fmt: skip
    doors = None
    try:
        if ours:
            doors, _ = await Engine.connect(client, learner)
        yield RunningEngine(client, doors)
    finally:
        if doors is not None:
            await doors.close()
        client.shutdown()
