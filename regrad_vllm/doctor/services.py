"""Checks of the bank and of the server, or of the ports where they would listen."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from bank_service.errors import BankError, DeadlineExceededError, PermissionDeniedError, UnauthenticatedError
from bank_service.wire.ports import DEFAULT_BANK, DEFAULT_PORT
from regrad_vllm.doctor.finding import Finding
from regrad_vllm.learner import Learner

DEFAULT_SERVER_PORT = 8000  # vLLM's default
LEAST_DISK_BYTES = 2**30
TIMEOUT_MS = 6000  # a server's status waits for its workers and its bank
_SLOW = "wait until it is less busy"


def check_bank(address: str | None, learner: Learner | None, port: int = DEFAULT_PORT) -> Iterator[Finding]:
    """The bank at ``address``: its token, its learner, its disk. None: whatever is at the default port."""
    from regrad_vllm.client import Bank

    at = address or (DEFAULT_BANK if port == DEFAULT_PORT else f"127.0.0.1:{port}")
    try:
        with Bank(at, timeout_ms=TIMEOUT_MS, attempts=1) as bank:
            stats = bank.stats()
    except (UnauthenticatedError, PermissionDeniedError) as error:
        yield Finding("bank", "wrong", f"{at} refuses: {error.message}", "name the token's file with --bank-token-file")
        return
    except (BankError, OSError, ValueError) as error:
        owner = listener(port) if address is None else None
        if address is None and owner is None:
            yield Finding("bank", "ok", f"none runs; port {port} is free for `regrad bank`")
        elif owner is not None and isinstance(error, DeadlineExceededError):
            remedy = f"{_SLOW}, or name the authority of its certificate with --bank-ca if it has TLS"
            yield Finding("bank", "wrong", f"{owner} has port {port}, and doesn't answer in time: {error}", remedy)
        elif owner is not None:
            yield Finding("bank", "wrong", f"{owner} has port {port}, and is no bank: {error}", "regrad bank --port N")
        else:
            yield Finding(
                "bank", "wrong", f"{at} doesn't answer: {error}", "start one with `regrad bank`, or mend --bank"
            )
        return
    documents = f"{stats.num_documents:,} documents"
    yield Finding("bank", "ok", f"{at}, version {stats.version}, {documents}, codec {stats.codec}")
    if learner is not None:
        yield _same_learner("bank's learner", stats.learner_fingerprint, learner)
    if stats.removals_stopped:
        remedy = "stop one of the two; the bank's log says more"
        yield Finding("bank's gradients", "wrong", "another bank has opened their place; none are removed", remedy)
    if not stats.free_disk_bytes:
        yield Finding("bank's disk", "ok", "not told to this token; an admin's token of all namespaces sees it")
    elif stats.free_disk_bytes < LEAST_DISK_BYTES:
        free = f"{stats.free_disk_bytes >> 20:,} MiB free"
        yield Finding("bank's disk", "odd", free, "free some: a full disk stops all writes")
    else:
        yield Finding("bank's disk", "ok", f"{stats.free_disk_bytes / 2**30:.1f} GiB free")


def check_server(url: str | None, learner: Learner | None, port: int = DEFAULT_SERVER_PORT) -> Iterator[Finding]:
    """The server at ``url``: its learner, its bank, its workers. None: whatever is at the default port."""
    at = url or f"http://127.0.0.1:{port}"
    owner = listener(port) if url is None else None
    if url is None and owner is None:
        yield Finding("server", "ok", f"none runs; port {port} is free for `regrad serve`")
        return
    if find_spec("httpx") is None:
        remedy = "pip install '.[cpu]' in the project's folder"
        yield Finding("server", "odd", f"{at} was not asked: httpx is not installed", remedy)
        return
    from regrad_vllm.http_client import KEY_VARIABLE, ServerError, get

    try:
        # Any program may listen at the default port, so it doesn't get the key.
        status = get(at, "/v1/regrad/status", TIMEOUT_MS / 1000, with_key=url is not None).json()
    except (ServerError, ValueError) as error:
        status_code = error.status if isinstance(error, ServerError) else 200
        if status_code == 401:
            remedy = f"set {KEY_VARIABLE} to its --api-key" + ("" if url else f", and name it with --server {at}")
            yield Finding("server", "wrong", f"{at} asks for an API key", remedy)
        elif owner is not None and status_code is None:
            remedy = f"{_SLOW}, or name it with --server https://HOST:PORT if it has TLS"
            yield Finding("server", "wrong", f"{owner} has port {port}, and doesn't answer: {error}", remedy)
        elif owner is not None:
            yield Finding(
                "server", "wrong", f"{owner} has port {port}, and serves no ReGrad", "regrad serve … --port N"
            )
        else:
            yield Finding("server", "wrong", str(error), "start one with `regrad serve`, or mend --server")
        return
    yield from _judged(at, status, learner)


def _judged(at: str, status: dict[str, Any], learner: Learner | None) -> Iterator[Finding]:
    """Findings about a server's answer to GET /v1/regrad/status."""
    yield Finding("server", "ok", f"{at}, vLLM {status['vllm_version']}, {', '.join(status['models'])}")
    if learner is not None:
        yield _same_learner("server's learner", status["learner"]["fingerprint"], learner)
    bank = status["bank"]
    if bank["available"]:
        yield Finding("server's bank", "ok", f"{bank['address']}, {bank['num_documents']:,} documents")
    else:
        remedy = "start that bank, or name another: regrad serve … --bank"
        yield Finding("server's bank", "wrong", f"{bank['address']}: {bank['reason']}", remedy)
    late = sum(worker.get("num_late", 0) for worker in status["workers"])
    lost = sum(worker.get("num_lost", 0) for worker in status["workers"])
    if lost or late:
        told = f"{lost} requests ran without their documents, {late} loaded them inside a step"
        yield Finding("server's workers", "wrong" if lost else "odd", told, "the server's log has the reason")
    else:
        yield Finding("server's workers", "ok", f"{len(status['workers'])}, none of them lost a document")


def _same_learner(name: str, fingerprint: str, learner: Learner) -> Finding:
    if fingerprint == learner.fingerprint:
        return Finding(name, "ok", fingerprint[:12])
    told = f"{fingerprint[:12]}, this one is {learner.fingerprint[:12]}; gradients of one mean nothing to another"
    remedy = "start bank and server with one learner, or name it with --learner, as during `regrad upgrade`"
    return Finding(name, "wrong", told, remedy)


def listener(port: int) -> str | None:
    """The program that listens on the port. None: the port is free."""
    import psutil

    try:
        socket.create_server(("0.0.0.0", port)).close()
        return None
    except OSError:
        pass
    for found in psutil.net_connections("tcp"):
        if found.status == psutil.CONN_LISTEN and found.laddr.port == port and found.pid:
            return f"{psutil.Process(found.pid).name()} (pid {found.pid})"
    return "another user's program"
