"""The API server's side of the plugin: the ``vllm.endpoint_plugins`` entry point and the routes it adds.

It refuses unusable settings at the start. vLLM then ends with a message that names the flag to set.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse

from bank_service.wire.channel import may_have_nodes
from bank_service.wire.ports import is_loopback
from bank_service.wire.tracing import configure_tracing
from regrad_vllm.base_model import base_digest
from regrad_vllm.client import AsyncBank
from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.engine import Engine
from regrad_vllm.serve.api.middleware import RegradMiddleware, Runtime
from regrad_vllm.serve.api.plan import Planner
from regrad_vllm.serve.api.plugin_metrics import Metrics
from regrad_vllm.serve.api.preparer import Preparer
from regrad_vllm.serve.api.request_errors import RequestError
from regrad_vllm.serve.api.status import status_of
from regrad_vllm.serve.api.used import UsedMemory
from regrad_vllm.serve.api.web_page import WebPage
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.budgets import check_room, room, warn_of_small_budgets
from regrad_vllm.serve.documents.document_routes import DocumentStore, document_routes
from regrad_vllm.serve.engine_flags import PLUGIN_NAME, check_engine_settings
from regrad_vllm.serve.seams import server_seams
from regrad_vllm.serve.seams.seam import check_seams
from regrad_vllm.serve.settings import Settings, SettingsError

if TYPE_CHECKING:
    from starlette.datastructures import State

_LOGGER = logging.getLogger("regrad")
MAX_RESIDENT = 100_000  # records in an answer of /v1/regrad/resident


class RegradEndpoint:
    """The plugin that vLLM calls when it builds its API server. It does nothing if REGRAD_LEARNER is unset."""

    name = PLUGIN_NAME
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds routes and middleware. SettingsError, SeamError."""
        settings = Settings.from_environment(os.environ)
        if settings is None:
            return
        _check_root_path(app.root_path)
        check_seams(server_seams.SERVER_SEAMS)
        server_seams.check_prefix_keys()
        server_seams.install_served_call()
        server_seams.install_bounded_lora_metrics()
        app.include_router(routes())
        if settings.documents != "off":
            app.include_router(document_routes())
        app.mount("/regrad", WebPage())
        app.add_middleware(RegradMiddleware)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Checks vLLM's settings against the learner and makes the runtime. SettingsError, LearnerError."""
        settings = Settings.from_environment(os.environ)
        if settings is None:
            return
        configure_tracing("regrad-server")
        learner = Learner.load(settings.learner)
        check_engine_settings(engine_client.vllm_config, learner)
        if settings.check_base:
            await asyncio.to_thread(check_base, engine_client.vllm_config, learner)
        engine, dtype = await Engine.connect(engine_client, learner)
        vllm_config = engine_client.vllm_config
        warn_of_small_budgets(settings, learner, vllm_config.scheduler_config.max_num_seqs)
        if vllm_config.device_config.device_type == "cpu":
            num_servers = getattr(args, "api_server_count", None) or 1
            check_room(settings, room(settings), num_servers, engine.num_ranks)
        arena = Arena.open(settings.arena_dir, settings.arena_bytes)
        atexit.register(arena.close)
        bank = AsyncBank(
            settings.bank,
            credentials=settings.bank_credentials,
            spec=learner.spec,
            timeout_ms=settings.bank_timeout_ms,
            # A request that may run without documents must not wait for a missing bank. Of several nodes, another one
            # gets the calls of one that was killed. Where none is there, that costs about 0.2 s.
            attempts=2 if may_have_nodes(settings.bank) else 1,
        )
        metrics = _metrics()
        models = state.openai_serving_models
        planner = Planner(settings, learner, tuple(path.name for path in models.base_model_paths))
        state.regrad = Runtime(
            planner=planner,
            preparer=Preparer(learner, bank, arena, engine, metrics, settings.bank_concurrency),
            engine=engine,
            metrics=metrics,
            memory=UsedMemory(settings.kept_requests),
            adapter_names=_names_of(models),
            releases=set(),
        )
        state.regrad_documents = DocumentStore(
            bank, settings, learner.config, has_key=_has_key(args), is_local=_is_local(args)
        )
        _warn_of_open_documents(settings, args)
        state.regrad_status = status_of(state.regrad, arena, bank, dtype)
        state.regrad_models = models
        state.regrad_arena = arena


def _check_root_path(root_path: str | None) -> None:
    """SettingsError for a path with which vLLM would ask no API key: it removes the path from others that begin so."""
    if root_path and (root_path.endswith("/") or "/v1".startswith(root_path) or root_path.startswith("/v1/")):
        raise SettingsError(
            f"--root-path must not end with / nor begin as the routes do (/v1), got {root_path}; leave it out, or "
            "choose a path such as /regrad-server"
        )


def _has_key(args: Namespace) -> bool:
    return bool(getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY"))


def _is_local(args: Namespace) -> bool:
    return bool(getattr(args, "uds", None)) or is_loopback(getattr(args, "host", None) or "")


def _warn_of_open_documents(settings: Settings, args: Namespace) -> None:
    """Logs a warning if everybody who reaches the server may change documents."""
    if settings.documents == "write" and not _has_key(args) and not _is_local(args):
        _LOGGER.warning(
            "everybody who reaches this server may store and delete documents; set --api-key, or --host 127.0.0.1, or "
            "leave out --regrad-documents write"
        )


def check_base(vllm_config: Any, learner: Learner) -> None:
    """Compares the served model's files with the learner's base. SettingsError, BaseModelError.

    vLLM reads the weights from --download-dir. It reads config and tokenizer from the hub's own cache, and each of the
    three may be of another model or revision.
    """
    model = vllm_config.model_config
    found = base_digest(
        _local_folder(model.model, model.revision, vllm_config.load_config.download_dir),
        config=_local_folder(model.hf_config_path or model.model, model.revision),
        tokenizer=_local_folder(model.tokenizer, model.tokenizer_revision),
    )
    if found != learner.config.base_digest:
        raise SettingsError(
            f"the learner must have been trained on the served model {model.model} (digest {found}), it was trained on "
            f"{learner.config.base_digest}; serve that model, or set --regrad-check-base off if you know better"
        )


def _local_folder(name: str, revision: str | None, cache: str | None = None) -> Path:
    """The folder with the files that vLLM loaded: ``name`` itself, or its snapshot in a cache. SettingsError."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"the served model {name} must be a folder or in the hub's cache, to be compared with the learner's base: "
            f"{error}; set --regrad-check-base off to leave that out"
        ) from error


@asynccontextmanager
async def _serving(app: FastAPI) -> AsyncIterator[None]:
    """The plugin's part of the server's lifespan. At the end it closes the connections to the workers."""
    runtime: Runtime = app.state.regrad  # read now, because vLLM removes the state at the end
    try:
        yield
    finally:
        await runtime.engine.close()


def routes() -> APIRouter:
    router = APIRouter(lifespan=_serving)

    @router.get("/v1/models")
    async def models(request: Request) -> JSONResponse:
        """vLLM's list of models. Each name of the base model has a second entry with ReGrad on."""
        shown = (await request.app.state.regrad_models.show_available_models()).model_dump()
        planner: Planner = request.app.state.regrad.planner
        twins = [
            {**card, "id": twin, "parent": base}
            for base, twin in zip(planner.model_names, planner.regrad_names, strict=True)
            for card in shown["data"]
            if card["id"] == base
        ]
        return JSONResponse({**shown, "data": [*shown["data"], *twins]})

    @router.get("/v1/regrad/status")
    async def status(request: Request, base_weights: bool = False) -> JSONResponse:
        """The state of learner, bank, arena and workers. With base_weights also the SHA-256 of W in each worker."""
        return JSONResponse(await request.app.state.regrad_status(base_weights))

    @router.get("/v1/regrad/resident")
    async def resident(request: Request, limit: Annotated[int, Query(ge=1, le=MAX_RESIDENT)] = 1000) -> JSONResponse:
        """The gradients in this API server's arena, for routers, the most recently used first."""
        arena: Arena = request.app.state.regrad_arena
        figures = arena.figures()
        found = {"num_records": figures.num_records, "used_bytes": figures.used_bytes, "max_bytes": figures.max_bytes}
        return JSONResponse({**found, "records": [asdict(record) for record in arena.records(limit)]})

    @router.get("/v1/regrad/requests/{request_id:path}")  # an id may contain slashes
    async def used(request: Request, request_id: str) -> JSONResponse:
        """The documents that one of the latest requests used."""
        runtime: Runtime = request.app.state.regrad
        found = runtime.memory.get(request_id)
        if found is None:
            kept = runtime.planner.settings.kept_requests
            error = RequestError(404, f"request_id must be one of the last {kept} with regrad, got {request_id[:80]}")
            return JSONResponse(error.as_json(), status_code=404)
        return JSONResponse(found.as_json())

    return router


def _names_of(models: Any) -> Callable[[], frozenset[str]]:
    return lambda: frozenset(models.lora_requests)


@cache
def _metrics() -> Metrics:
    """Prometheus knows one registry per process, so there is one set of metrics per process."""
    return Metrics.create()
