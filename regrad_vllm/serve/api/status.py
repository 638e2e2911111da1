"""The answer of GET /v1/regrad/status: the state of all parts, and every size that must not grow."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from bank_service.wire.errors import BankError
from regrad_vllm.client import AsyncBank
from regrad_vllm.serve.api.middleware import Runtime
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.process_figures import process_figures
from regrad_vllm.serve.seams.seam import vllm_version

Status = Callable[[bool], Awaitable[dict[str, Any]]]


def status_of(runtime: Runtime, arena: Arena, bank: AsyncBank, dtype: str) -> Status:
    """``status(with_base_weights)`` → plain data."""

    async def status(with_base_weights: bool) -> dict[str, Any]:
        learner, settings = runtime.planner.learner, runtime.planner.settings
        answer = {
            "learner": {
                "fingerprint": learner.fingerprint,
                "layout_id": learner.layout.id,
                "rank": learner.layout.rank,
                "num_values": learner.layout.num_values,
                "base_digest": learner.config.base_digest,
                "top_k": settings.top_k_for(learner.config.top_k),
                "max_documents": settings.max_documents,
                "gamma": learner.config.gamma if settings.gamma is None else settings.gamma,
                "prompts": asdict(learner.config.prompts),
            },
            "models": list(runtime.planner.regrad_names),
            "namespace": settings.namespace,
            "documents": settings.documents,
            "bank": await _bank_state(bank),
            "arena": {"folder": str(arena.folder), **asdict(arena.figures())},
            "server": process_figures("server"),
            "workers": await runtime.engine.figures(),
            "num_kept_requests": len(runtime.memory),
            "num_releases_waiting": len(runtime.releases),
            "lora_dtype": dtype,
            "vllm_version": vllm_version(),
        }
        if with_base_weights:
            answer["base_weights"] = await runtime.engine.base_weights()
        return answer

    return status


async def _bank_state(bank: AsyncBank) -> dict[str, Any]:
    try:
        stats = await bank.stats()
    except BankError as error:
        return {"address": bank.address, "available": False, "reason": str(error)}
    return {
        "address": bank.address,
        "available": True,
        "learner_fingerprint": stats.learner_fingerprint,
        "num_documents": stats.num_documents,
        "num_gradients": stats.num_gradients,
        "sequence": stats.sequence,
        "codec": stats.codec,
        "version": stats.version,
    }
