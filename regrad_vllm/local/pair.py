"""Starts a bank, and vLLM with ReGrad in front of it, on ports that the kernel chooses."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from regrad_vllm.http_client import ServerError, get
from regrad_vllm.local.processes import Service, Services, free_port, waiting
from regrad_vllm.naming import BANK_READY
from regrad_vllm.serve.launch import KV_CACHE_VARIABLE

_BANK_SECONDS, _SERVER_SECONDS = 180.0, 600.0
_HEALTH_SECONDS = 5.0
SERVER_ENVIRONMENT = {
    # Memory for the KV cache in GiB, unless the user sets it. It suits a small machine; vLLM's default takes much more.
    KV_CACHE_VARIABLE: os.environ.get(KV_CACHE_VARIABLE, "1"),
    "VLLM_API_KEY": "",  # a user's variable must not lock us out
}


@dataclass(frozen=True, slots=True)
class LocalPair:
    """A running bank and server."""

    bank: str  # host:port
    url: str  # http://host:port of the server


@contextmanager
def local_pair(
    model: Path, learner: Path, folder: Path, *, model_name: str, namespace: str, server_flags: Sequence[str] = ()
) -> Iterator[LocalPair]:
    """Starts a bank and a server, and stops them at the end. ``folder`` gets their data and logs. ServiceFailure."""
    with Services(folder) as services:
        _, bank = start_bank(services, model, learner, folder / "bank")
        server, url = start_server(services, model, learner, bank, model_name, namespace, server_flags)
        wait_for_server(server, url)
        yield LocalPair(bank, url)


def start_bank(services: Services, model: Path, learner: Path, data_dir: Path) -> tuple[Service, str]:
    """Starts a bank and waits until it is ready. Returns the process and its host:port. ServiceFailure."""
    flags = ["--data-dir", str(data_dir), "--port", "0"]
    bank = services.start("bank", ["bank", "--model", str(model), "--learner", str(learner), *flags])
    return bank, wait_for_bank(bank)


def wait_for_bank(bank: Service) -> str:
    """Waits until a `regrad bank` is ready, and returns the host:port that it announces. ServiceFailure."""

    def address() -> str | None:
        lines = bank.log.read_text("utf-8", errors="replace").splitlines()
        return next((line.removeprefix(BANK_READY) for line in lines if line.startswith(BANK_READY)), None)

    return waiting(bank, address, _BANK_SECONDS)


def start_server(
    services: Services,
    model: Path,
    learner: Path,
    bank: str,
    model_name: str,
    namespace: str,
    flags: Sequence[str] = (),
) -> tuple[Service, str]:
    """Starts vLLM with ReGrad without waiting for it. Returns the process and its URL."""
    port = str(free_port())
    regrad = ["--bank", bank, "--namespace", namespace, "--learner", str(learner)]
    # Eager mode: compiling needs a C++ compiler, and a short run doesn't regain its time.
    common = ["--served-model-name", model_name, "--host", "127.0.0.1", "--port", port, "--enforce-eager"]
    server = services.start("server", ["serve", str(model), *regrad, *common, *flags], SERVER_ENVIRONMENT)
    return server, f"http://127.0.0.1:{port}"


def start_stock_server(
    services: Services, model: Path, model_name: str, flags: Sequence[str] = (), *, runtime_adapters: bool = False
) -> tuple[Service, str]:
    """Starts ``vllm serve`` with LoRA and without our plugin. It doesn't wait. Returns the process and its URL.

    runtime_adapters: adapters can be loaded and unloaded while the server runs.
    """
    port = str(free_port())
    common = ["--served-model-name", model_name, "--host", "127.0.0.1", "--port", port, "--enforce-eager"]
    environment = {**SERVER_ENVIRONMENT, "VLLM_PLUGINS": ""}
    if runtime_adapters:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    arguments = ["serve", str(model), *common, "--enable-lora", *flags]
    server = services.start("stock", arguments, environment, module="regrad_vllm.serve.vllm_main")
    return server, f"http://127.0.0.1:{port}"


def wait_for_server(server: Service, url: str) -> None:
    """Waits until the server answers. ServiceFailure."""

    def healthy() -> str | None:
        try:
            get(url, "/health", _HEALTH_SECONDS)
        except ServerError:
            return None
        return "ready"

    waiting(server, healthy, _SERVER_SECONDS)
