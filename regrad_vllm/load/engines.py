"""The engines under load, started here or already running: addresses, askers, and sizes of KV cache and adapters."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_vllm.client import AsyncBank
from regrad_vllm.http_client import ServerError, connect, get, served_models
from regrad_vllm.learner import Learner, save_adapter
from regrad_vllm.load.askers import (
    PLAIN_ADAPTERS,
    STATIC_ADAPTER,
    TUNED_ADAPTER,
    Asker,
    OneAtATime,
    Passages,
    Served,
)
from regrad_vllm.load.client_composed import Gradients, PeftFolders, SwappedWeights
from regrad_vllm.load.comparison import CONTENDERS, Adapter, Engine
from regrad_vllm.load.corpora import Corpus
from regrad_vllm.load.watching import Processes
from regrad_vllm.local.pair import start_bank, start_server, start_stock_server, wait_for_server
from regrad_vllm.local.processes import Services
from regrad_vllm.reporting.server_metrics import labels
from regrad_vllm.serve.engine_flags import lora_rank, merged_modules
from regrad_vllm.serve.launch import has_gpu

if TYPE_CHECKING:
    import httpx

MODEL = "base"  # the served model's name at the servers started here
_BANK_TIMEOUT_MS = 60_000
_REQUEST_TIMEOUT_S = 600.0
_MEMORY = Path("/dev/shm")  # a file system in memory
_BYTES = {"float32": 4, "bfloat16": 2}
_MISSING: Mapping[Adapter, str] = {
    "static": "φ* as the adapter {name} at {server}: write it with `regrad export --gamma 0 --document ID FOLDER`, "
    "start the server with --lora-modules {name}=FOLDER",
    "tuned": "FT-RAG's LoRA as the adapter {name} at {server}: start the server with --lora-modules {name}=FOLDER; "
    "the folder ft_rag of a learner holds it",
}
_BLOCK_TOKENS = 16  # used if the server's metrics have no label for it


@dataclass(frozen=True, slots=True)
class Addresses:
    """Addresses of the bank and the servers. The contender "peft_folder" needs a stock server."""

    bank: str  # host:port
    server: str  # URL
    stock: str | None  # URL
    model_name: str
    pids: Mapping[str, int]  # by role, of the processes started here


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of the servers that are started here."""

    model: Path
    learner_folder: Path
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_documents: int  # the most documents of one request
    server_flags: Sequence[str] = ()  # flags for both servers
    with_stock: bool = True
    ft_rag: Path | None = None  # the folder of FT-RAG's LoRA, to be served too


@contextmanager
def started(settings: EngineSettings, learner: Learner, folder: Path) -> Iterator[Addresses]:
    """Starts a bank, a server with ReGrad and a stock server, and stops them at the context's end. ServiceFailure."""
    static = folder / STATIC_ADAPTER
    save_adapter(static, learner, learner.phi)
    model, number = settings.model, str(settings.max_num_seqs)
    common = ["--dtype", settings.dtype, "--max-model-len", str(settings.max_model_len), "--max-num-seqs", number]
    common += ["--max-lora-rank", str(lora_rank(learner.layout.rank)), *settings.server_flags]
    if settings.with_stock and has_gpu():  # two servers share one GPU
        common += ["--gpu-memory-utilization", "0.4"]
    plain = {STATIC_ADAPTER: static, **({TUNED_ADAPTER: settings.ft_rag} if settings.ft_rag else {})}
    ours = ["--max-loras", str(len(plain)), *common, "--regrad-max-documents", str(settings.max_documents)]
    ours += ["--lora-modules", *(f"{name}={path}" for name, path in plain.items())]
    with Services(folder) as services:
        bank, address = start_bank(services, model, settings.learner_folder, folder / "bank")
        server, url = start_server(services, model, settings.learner_folder, address, MODEL, MODEL, ours)
        pids = {"bank": bank.process.pid, "server": server.process.pid, "client": os.getpid()}
        stock_url = None
        if settings.with_stock:  # the two servers start at the same time
            flags = [*common, "--max-loras", number, "--max-cpu-loras", number]
            flags += [
                "--lora-target-modules",
                *merged_modules(learner),
            ]  # the fastest stock setting: LoRA only on the modules of the learner
            stock, stock_url = start_stock_server(services, model, MODEL, flags, runtime_adapters=True)
            wait_for_server(stock, stock_url)
            pids["stock"] = stock.process.pid
        wait_for_server(server, url)
        yield Addresses(address, url, stock_url, MODEL, pids)


def cannot_be_asked(server: str, stock: str | None, model_name: str) -> dict[str, str]:
    """Contender → the reason why the running servers can't serve it. ServerError; ValueError without the model."""
    served = served_models(server, model_name)
    if stock is not None:
        get(stock, "/v1/models")
    cannot = {}
    for contender in CONTENDERS.values():
        if contender.engine == "stock" and stock is None:
            cannot[contender.name] = "--stock-server beside --server"
        name = PLAIN_ADAPTERS.get(contender.adapter)
        if name is not None and name not in served:
            cannot[contender.name] = _MISSING[contender.adapter].format(name=name, server=server)
    return cannot


@dataclass(frozen=True, slots=True)
class Engines:
    askers: Mapping[Engine, Asker]
    clients: Mapping[Engine, httpx.AsyncClient]  # for the engines that have a server
    processes: Processes


@asynccontextmanager
async def opened(
    addresses: Addresses,
    learner: Learner,
    model: Path,
    dtype: str,
    corpora: Sequence[Corpus],
    wanted: Collection[Engine],
) -> AsyncIterator[Engines]:
    """Connects to the bank and the servers. If ``wanted`` has "alone", loads the published code's method too."""
    async with AsyncExitStack() as stack:
        # One try, as the server makes: a failed call is counted, and no pause between tries is measured.
        bank = AsyncBank(addresses.bank, spec=learner.spec, timeout_ms=_BANK_TIMEOUT_MS, attempts=1)
        stack.push_async_callback(bank.close)
        parts = {corpus.name: corpus.parts for corpus in corpora if corpus.parts is not None}
        text_bytes = {
            corpus.name: {d.id: len(d.title.encode()) + len(d.text.encode()) for d in corpus.data.documents}
            for corpus in corpora
        }
        passages = Passages(bank, learner.config.prompts, parts, text_bytes)
        gradients = Gradients(bank, learner, passages)
        clients: dict[Engine, httpx.AsyncClient] = {}
        clients["regrad"] = await stack.enter_async_context(connect(addresses.server, _REQUEST_TIMEOUT_S))
        askers: dict[Engine, Asker] = {
            "regrad": Served(clients["regrad"], addresses.model_name, learner.config.prompts, passages)
        }
        if addresses.stock is not None and "stock" in wanted:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="regrad-load-", dir=_MEMORY if _MEMORY.is_dir() else None)
            )
            clients["stock"] = await stack.enter_async_context(connect(addresses.stock, _REQUEST_TIMEOUT_S))
            askers["stock"] = PeftFolders(clients["stock"], learner, gradients, Path(folder))
        if "alone" in wanted:
            askers["alone"] = OneAtATime(SwappedWeights(model, learner, gradients, dtype))
        yield Engines(askers, clients, Processes(addresses.pids, servers=("server", "stock"), alone=("client",)))


def default_dtype() -> str:
    """bfloat16, or float32 on a CPU that is slow at bfloat16. `regrad serve` chooses in the same way."""
    import torch

    from regrad_vllm.base_model import fast_dtype

    return str(fast_dtype("cuda" if torch.cuda.is_available() else "cpu")).removeprefix("torch.")


def served_dtype(server: str) -> str:
    """The type of a running server's LoRA slots. It is the model's type, unless a flag of the server changed it.

    ServerError; ValueError if the server has no ReGrad or another type.
    """
    try:
        found = str(get(server, "/v1/regrad/status").json().get("lora_dtype")).removeprefix("torch.")
    except ServerError as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
        found = "a server without ReGrad"
    if found not in _BYTES:
        raise ValueError(f"{server} must serve ReGrad in {' or '.join(_BYTES)}, got {found}")
    return found


def sizes(model: Path, learner: Learner, dtype: str, server: str) -> dict[str, int]:
    """Sizes: bytes of KV cache per token, tokens per KV block, bytes of a dense adapter in a slot of stock vLLM.

    Raises ServerError.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {
        "kv_bytes_per_token": 2 * config.num_hidden_layers * kv_heads * head * _BYTES[dtype],
        "kv_block_tokens": _block_tokens(server),
        "adapter_bytes": learner.layout.num_values * _BYTES[dtype],
    }


def _block_tokens(server: str) -> int:
    text = get(server, "/metrics").text
    return next((int(found) for found in labels(text, "block_size") if found.isdigit()), _BLOCK_TOKENS)
