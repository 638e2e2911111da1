"""The uses of vLLM's private API in the API server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from regrad_vllm.naming import ADAPTER_PREFIX
from regrad_vllm.serve.recipe import ADAPTER_ID, Recipe
from regrad_vllm.serve.seams.seam import PATCH_MARK, Seam, SeamError, replace_by

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

ID_PREFIXES = ("chatcmpl-", "cmpl-")  # vLLM puts one before a request's id

SERVER_SEAMS: tuple[Seam, ...] = (
    Seam(
        "vllm.entrypoints.serve.engine.serving", "BaseServing._maybe_get_adapters",
        ("self", "request", "supports_default_mm_loras"), "maps an API request to its LoRARequest",
    ),
    Seam(
        "vllm.entrypoints.openai.models.serving", "OpenAIServingModels.model_name", ("self", "lora_request"),
        "names the model in an answer",
    ),
    Seam(
        "vllm.v1.metrics.stats", "LoRARequestStates.update_scheduler_stats", ("self", "scheduler_stats"),
        "labels vllm:lora_requests_info with adapter names, one time series for each combination",
    ),
    Seam(
        "vllm.v1.engine.async_llm", "AsyncLLM.generate",
        ("self", "prompt", "request_id", "lora_request", "data_parallel_rank"),
        "is told a request's rank, and the adapter of each prompt", others_may_follow=True,
    ),
    Seam(
        "vllm.v1.engine.output_processor", "RequestState.__init__",
        None, "knows by lora_name and external_req_id which adapters unfinished requests use",
    ),
    Seam("vllm.v1.engine.output_processor", "OutputProcessor", None, "holds request_states"),
    Seam(
        "vllm.v1.engine.core_client", "AsyncMPClient._call_utility_async", ("self", "method", "args", "engine"),
        "asks each of core_engines, the data parallel ranks; collective_rpc gives the first one's answers alone",
    ),
    Seam(
        "vllm.v1.core.kv_cache_utils", "_gen_lora_extra_hash_keys", ("request",),
        "has an adapter's name in the keys of the prefix cache",
    ),
)  # fmt: skip


def check_prefix_keys() -> None:
    """SeamError if vLLM's prefix cache takes two of our adapters for one. They have one id in vLLM."""
    from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

    calls = [make_served_call(Recipe("0" * 64, (), (), gamma), "") for gamma in (1.0, 0.5)]
    requests: list[Any] = [SimpleNamespace(lora_request=call.lora_request) for call in calls]
    first, second = map(_gen_lora_extra_hash_keys, requests)
    if first == second:
        raise SeamError(
            "vLLM's prefix cache must tell adapters apart by name, it has the same key for two; one request would get "
            "the KV of another's documents. Install vllm 0.26 to 0.33, or a newer regrad"
        )


@dataclass(frozen=True, slots=True)
class ServedCall:
    """The adapter, model name and rank that vLLM's serving layer must use for the current API request."""

    lora_request: LoRARequest | None  # None: vLLM's own choice
    model_name: str  # for the answer's "model"
    data_parallel_rank: int | None = None  # the rank that has the adapter; None: vLLM's own choice
    prompt_calls: tuple[ServedCall, ...] = ()  # of a request with several prompts: the call of each


SERVED_CALL: ContextVar[ServedCall | None] = ContextVar("regrad_served_call", default=None)


def install_served_call() -> None:
    """Makes the serving layer use the LoRARequest of ``served_call`` for the API request handled inside it.

    A context variable reaches the handler's task and its children, and no other request.
    """
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.v1.engine.async_llm import AsyncLLM

    original_generate = AsyncLLM.generate
    original = BaseServing._maybe_get_adapters
    original_name = OpenAIServingModels.model_name
    if hasattr(original, PATCH_MARK):
        return

    @wraps(original)
    def maybe_get_adapters(
        self: BaseServing, request: Any, supports_default_mm_loras: bool = False
    ) -> LoRARequest | None:
        call = SERVED_CALL.get()
        if call is not None and call.lora_request is not None:
            return call.lora_request
        return original(self, request, supports_default_mm_loras)

    @wraps(original_name)
    def model_name(self: OpenAIServingModels, lora_request: LoRARequest | None = None) -> str:
        call = SERVED_CALL.get()
        if call is not None and _name_of(lora_request) == _name_of(call.lora_request):
            return call.model_name
        return original_name(self, lora_request)

    @wraps(original_generate)
    def generate(self: AsyncLLM, *args: Any, **kwargs: Any) -> Any:
        call = SERVED_CALL.get()
        if call is not None and call.prompt_calls:
            # The number of the prompt stands at the end of vLLM's id for it.
            request_id: str = kwargs["request_id"] if "request_id" in kwargs else args[2]
            call = call.prompt_calls[int(re.split("[-_]", request_id)[-1])]
            kwargs["lora_request"] = call.lora_request
        # Some handlers of vLLM don't pass the rank on (responses and beam search in 0.32).
        if call is not None and kwargs.get("data_parallel_rank") is None:
            kwargs["data_parallel_rank"] = call.data_parallel_rank
        return original_generate(self, *args, **kwargs)

    replace_by(AsyncLLM, "generate", generate)
    replace_by(BaseServing, "_maybe_get_adapters", maybe_get_adapters)
    replace_by(OpenAIServingModels, "model_name", model_name)


def _name_of(lora_request: LoRARequest | None) -> str | None:
    return None if lora_request is None else lora_request.lora_name


def make_served_call(recipe: Recipe, model_name: str, data_parallel_rank: int | None = None) -> ServedCall:
    """The call for a recipe. The LoRARequest is named by its content, and its path is the recipe itself."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest(lora_name=recipe.name, lora_int_id=ADAPTER_ID, lora_path=recipe.path)
    return ServedCall(request, model_name, data_parallel_rank)


@contextmanager
def served_call(call: ServedCall | None) -> Iterator[None]:
    """Makes the serving layer use ``call`` inside the context. None: vLLM's own choice."""
    token = SERVED_CALL.set(call)
    try:
        yield
    finally:
        SERVED_CALL.reset(token)


async def ask_workers(engine_client: Any, method: str) -> list[list[Any]]:
    """Calls a method of all workers. Returns the workers' answers for each data parallel rank of this server."""
    core = engine_client.engine_core
    ask = getattr(core, "_call_utility_async")  # noqa: B009
    ranks: list[list[Any]] = await asyncio.gather(
        *(ask("collective_rpc", method, None, (), {}, engine=engine) for engine in core.core_engines)
    )
    return ranks


def unfinished(engine_client: Any, request_id: str, lora_name: str) -> frozenset[str]:
    """The engine's ids for the parts of one API request with this adapter that still run.

    An API request with several prompts or answers has several parts in the engine. The id of a part is the endpoint's
    prefix, the API's id, and a number if there are several parts.
    """
    states = engine_client.output_processor.request_states

    def belongs(external_id: str) -> bool:
        bare = next((external_id[len(p) :] for p in ID_PREFIXES if external_id.startswith(p)), external_id)
        return any(
            known == request_id or known.startswith((request_id + "-", request_id + "_"))
            for known in (external_id, bare)
        )

    return frozenset(
        id for id, state in states.items() if state.lora_name == lora_name and belongs(state.external_req_id)
    )


def still_runs(engine_client: Any, engine_ids: frozenset[str]) -> bool:
    """Whether the server still waits for one of ``engine_ids``. vLLM never uses such an id twice."""
    return not engine_ids.isdisjoint(engine_client.output_processor.request_states)


def install_bounded_lora_metrics() -> None:
    """Counts all ReGrad adapters under one name in vllm:lora_requests_info.

    vLLM labels that gauge with the names of the running adapters, and it keeps every set of labels forever. With a new
    name for each request the gauge would grow without end.
    """
    from vllm.v1.metrics.stats import LoRARequestStates

    original = LoRARequestStates.update_scheduler_stats
    if hasattr(original, PATCH_MARK):
        return

    @wraps(original)
    def update_scheduler_stats(self: LoRARequestStates, scheduler_stats: Any) -> None:
        original(self, scheduler_stats)
        if scheduler_stats is None:
            return
        for counts in (scheduler_stats.waiting_lora_adapters, scheduler_stats.running_lora_adapters):
            ours = [name for name in counts if name.startswith(ADAPTER_PREFIX)]
            if ours:
                counts[ADAPTER_PREFIX.rstrip("-")] = sum(counts.pop(name) for name in ours)

    replace_by(LoRARequestStates, "update_scheduler_stats", update_scheduler_stats)
