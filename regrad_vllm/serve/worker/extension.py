"""The methods of a worker that the API server calls by ``collective_rpc``."""

from __future__ import annotations

import hashlib
from typing import Any

from regrad_vllm.serve.process_figures import process_figures
from regrad_vllm.serve.seams import worker_seams
from regrad_vllm.serve.worker.part import Adopted


class RegradWorkerExtension:
    """``--worker-extension-cls``: the methods that the server calls by ``collective_rpc``. Answers are plain data."""

    model_runner: Any  # vLLM's model runner in this worker

    @property
    def _part(self) -> Adopted:
        worker_seams.model_manager(self)  # SeamError without LoRA
        part: Adopted = self.model_runner.regrad
        return part

    def regrad_settled(self) -> None:
        """Its answer comes when the worker has done all earlier calls."""

    def regrad_check(self) -> dict[str, Any]:
        """The worker's answer to the server at its start: {"error", "learner", "modules", "dtype", "door"}."""
        part = self._part
        return {
            "error": part.refusal,
            "learner": part.learner.fingerprint,
            "modules": sorted(worker_seams.adaptable_modules(self)),
            "dtype": str(worker_seams.lora_dtype(worker_seams.model_manager(self))),
            "door": part.door_address,
        }

    def regrad_figures(self) -> dict[str, Any]:
        """The counters of this worker, and all sizes that must not grow."""
        part = self._part
        registered, active = worker_seams.count_adapters(self)
        return {
            **process_figures("worker"),
            **(part.figures() if not part.refusal else {}),
            "num_registered": registered,
            "num_active": active,
        }

    def regrad_base_weights(self) -> str:
        """SHA-256 over all base weights as this worker computes with them, 64 hex digits."""
        import torch

        state = hashlib.sha256(b"regrad.base-weights.v1\0")
        for name, tensor in worker_seams.base_weights(self):
            state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            state.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()
