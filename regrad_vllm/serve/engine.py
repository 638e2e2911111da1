"""The engine as the plugin sees it: what the server asks of vLLM's workers, and what must be set for it."""

from __future__ import annotations

from typing import Any

from opentelemetry import propagate

from regrad_vllm.learner import Learner
from regrad_vllm.serve import vllm_server_seams
from regrad_vllm.serve.launch import EXTENSION_CLASS
from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.settings import SettingsError


class AdapterError(RuntimeError):
    """A worker can't compose an adapter; the message says why."""


class Engine:
    """vLLM's engine client, with our questions to the workers."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def prepare(self, recipe: Recipe) -> float:
        """Has every worker compose the adapter; returns the slowest one's ms. AdapterError."""
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        answers = await self._client.collective_rpc(
            "regrad_prepare", args=(recipe.path, carrier.get("traceparent", ""))
        )
        for answer in answers:
            if answer["error"]:
                raise AdapterError(answer["error"])
        return max(float(answer["compose_ms"]) for answer in answers)

    def unfinished(self, request_id: str, recipe: Recipe) -> frozenset[str]:
        """What still runs of one API request, for ``still_runs``."""
        return vllm_server_seams.unfinished(self._client, request_id, recipe.name)

    def still_runs(self, engine_ids: frozenset[str]) -> bool:
        """Whether one of these is unfinished."""
        return vllm_server_seams.still_runs(self._client, engine_ids)

    async def forget(self, recipe: Recipe) -> None:
        """Drops a prepared adapter that no request uses; returns when the workers have done all asked before."""
        used = vllm_server_seams.engine_uses(self._client, recipe.name)
        await self._client.collective_rpc("regrad_forget", args=(None if used else recipe.int_id,))

    async def check(self, learner: Learner) -> str:
        """Compares the workers with the learner and returns their LoRA dtype. SettingsError."""
        answers = await self._client.collective_rpc("regrad_check")
        for answer in answers:
            if answer["error"]:
                raise SettingsError(answer["error"])
            if answer["learner"] != learner.fingerprint:
                raise SettingsError(
                    f"server and workers must have one learner, got {learner.fingerprint} and {answer['learner']}; "
                    "don't change the learner's folder while the server starts"
                )
        return str(answers[0]["dtype"])

    async def figures(self) -> list[dict[str, Any]]:
        """Each worker's counters."""
        return list(await self._client.collective_rpc("regrad_figures"))

    async def base_weights(self) -> list[str]:
        """SHA-256 of each worker's base weights."""
        return list(await self._client.collective_rpc("regrad_base_weights"))


def check_engine_settings(vllm_config: Any, learner: Learner) -> None:
    """What must hold between vLLM's flags and the learner. SettingsError says which flag to set."""
    lora = vllm_config.lora_config
    if lora is None:
        raise SettingsError("the engine must run with LoRA; set --enable-lora")
    rank = learner.layout.rank
    if lora.max_lora_rank < rank:
        raise SettingsError(f"--max-lora-rank must be at least the learner's rank {rank}, got {lora.max_lora_rank}")
    num_seqs = vllm_config.scheduler_config.max_num_seqs
    if lora.max_loras < num_seqs:
        raise SettingsError(
            f"--max-loras must be at least --max-num-seqs ({num_seqs}), because every request has an adapter of its "
            f"own, got {lora.max_loras}; set both alike"
        )
    if lora.fully_sharded_loras:
        raise SettingsError("--fully-sharded-loras must be off: adapters are composed whole; leave the flag out")
    if vllm_config.parallel_config.worker_extension_cls != EXTENSION_CLASS:
        raise SettingsError(
            f"--worker-extension-cls must be {EXTENSION_CLASS}, "
            f"got {vllm_config.parallel_config.worker_extension_cls!r}"
        )
