"""Real parts for the serve tests: a random learner, an encoder that draws gradients, a bank, a vLLM server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import torch
from redis import Redis
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bank_service.cache.embedded_redis import EmbeddedRedis
from bank_service.service.server import BankServer
from bank_service.values.config import BankConfig
from bank_service.values.encoder import EncodedDocument
from bank_service.wire.record import DEFAULT_CODEC, FloatArray, encode_gradient, record_digest
from regrad_vllm.base_model import base_digest
from regrad_vllm.client import Bank, Document
from regrad_vllm.default_model import ensure_default_model
from regrad_vllm.layout import Layout
from regrad_vllm.learner import Learner, LearnerConfig
from regrad_vllm.prompts import Prompts
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.worker.admissions import Admissions
from regrad_vllm.serve.worker.cpu_device import CpuDevice
from regrad_vllm.serve.worker.door import Door
from regrad_vllm.serve.worker.pool import Pool
from regrad_vllm.serve.worker.steps import Steps

API_KEY = "tests-only"
BASE = "base"  # the name under which the tests' server serves its model
MAX_NUM_SEQS = 12
RANK = 16
SMALL_HIDDEN, SMALL_INNER, SMALL_LAYERS = 128, 256, 4


def save_small_model(folder: Path) -> None:
    """A random Llama of four layers with the default model's tokenizer. Two workers can share its four heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=SMALL_HIDDEN, intermediate_size=SMALL_INNER, num_hidden_layers=SMALL_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=49152, max_position_embeddings=2048,
        tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ensure_default_model()).save_pretrained(folder)


def random_learner(model: Path, seed: int, *, rank: int = RANK) -> Learner:
    """A learner of the model's upper half. Its φ* is noise that is strong enough to change the answers."""
    sizes = json.loads((model / "config.json").read_text("utf-8"))
    hidden, inner, num_layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    modules = [
        (f"model.layers.{layer}.mlp.{name}", *shape)
        for layer in range(num_layers // 2, num_layers)
        for name, shape in (
            ("gate_proj", (hidden, inner)),
            ("up_proj", (hidden, inner)),
            ("down_proj", (inner, hidden)),
        )
    ]
    layout = Layout.build(rank, modules)
    config = LearnerConfig(
        base_digest=base_digest(model),
        lora_alpha=2.0 * rank,
        step_size_kind="tie",
        prompts=Prompts(system="Answer in a few words."),
        top_k=2,
        score_temperature=0.2,
    )
    return Learner(config, layout, gradient_noise(layout, seed, 0.03), np.full(len(layout.tensors), 0.1, np.float32))


def record_bytes(learner: Learner) -> int:
    """The size of each of the learner's gradients in a bank."""
    return len(encode_gradient(np.zeros(learner.layout.num_values, np.float32), learner.spec, DEFAULT_CODEC))


def gradient_noise(layout: Layout, seed: int, spread: float) -> FloatArray:
    """A (rank, in) with entries of about 1/√in, B (out, rank) with entries of about ``spread``."""
    random = np.random.default_rng(seed)
    flat = random.standard_normal(layout.num_values, dtype=np.float32)
    for tensor, view in layout.views(flat):
        view *= np.float32(1 / np.sqrt(tensor.shape[1]) if tensor.part == "A" else spread)
    return flat


class DrawingEncoder:
    """A bank's Encoder that draws gradients from learner and text, and computes nothing."""

    def __init__(self, learner: Learner) -> None:
        self._layout = learner.layout
        self.spec = learner.spec

    def of_learner(self, folder: Path) -> DrawingEncoder:
        return DrawingEncoder(Learner.load(folder))

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        return [EncodedDocument(self._draw(title, text), len(text.split()), False) for title, text in documents]

    def _draw(self, title: str, text: str) -> FloatArray:
        seeded = f"{self.spec.fingerprint}\n{title}\n{text}"
        seed = int.from_bytes(hashlib.sha256(seeded.encode()).digest()[:8], "big")
        return gradient_noise(self._layout, seed, 0.03)


class Worker:
    """A worker's parts with their door, without vLLM's layers."""

    def __init__(self, learner: Learner, *, max_bytes: int = 2**28) -> None:
        manager = SimpleNamespace(punica_wrapper_mapping={}, modules={}, packed_modules={})
        self.device = CpuDevice(manager, learner)
        self.pool = Pool(self.device, max_bytes)
        self.admissions = Admissions(learner.fingerprint, self.pool)
        self.steps = Steps(self.admissions, self.pool, self.device)
        self.door = Door(self.admissions, self.pool, self.steps)


def stored_recipe(arena: Arena, learner: Learner, texts: list[str], codec: str = DEFAULT_CODEC) -> Recipe:
    """A recipe whose gradients lie in the arena."""
    encoder = DrawingEncoder(learner)
    records = [encode_gradient(item.values, encoder.spec, codec) for item in encoder.encode([("", t) for t in texts])]
    hold = arena.hold()
    for record in records:
        hold.put(record_digest(record), record)
    digests = tuple(record_digest(record) for record in records)
    return Recipe(learner.fingerprint, digests, tuple(1 / (n + 1) for n in range(len(texts))), 0.7)


class BankThread:
    """A bank in a thread of this process. It keeps its port over restarts."""

    def __init__(self, data_dir: Path, learner: Learner, port: int = 0) -> None:
        self._data_dir = data_dir
        self._encoder = DrawingEncoder(learner)
        self._stop: Callable[[], object] = lambda: None
        self._thread: threading.Thread | None = None
        self.port = port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        ready = threading.Event()
        failures: list[BaseException] = []

        async def run() -> None:
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            self._stop = lambda: loop.call_soon_threadsafe(stop.set)
            config = BankConfig(data_dir=self._data_dir, port=self.port)
            async with BankServer(config, self._encoder) as bank:
                self.port = bank.address.port
                ready.set()
                await stop.wait()

        def main() -> None:
            try:
                asyncio.run(run())
            except BaseException as error:  # noqa: BLE001  # handed to the thread that waits
                failures.append(error)
                ready.set()

        self._thread = threading.Thread(target=main, name="bank", daemon=True)
        self._thread.start()
        if not ready.wait(60) or failures:
            raise RuntimeError(f"the bank did not start: {failures}")

    def stop(self) -> None:
        if self._thread is not None:
            self._stop()
            self._thread.join(60)
            self._thread = None

    def ingest(self, documents: Sequence[tuple[str, str]], namespace: str = "default") -> list[str]:
        """Stores (id, text) pairs. Returns their gradients' digests."""
        with Bank(self.address) as bank:
            receipts = bank.ingest((Document(id, text) for id, text in documents), namespace=namespace)
            return [receipt.gradient_digest for receipt in receipts]

    def upload(self, id: str, text: str) -> str:
        """Stores a document with an uploaded gradient, which the bank can't make again. Returns its digest."""
        record = encode_gradient(self._encoder.encode([("", text)])[0].values, self._encoder.spec, DEFAULT_CODEC)
        with Bank(self.address) as bank:
            (receipt,) = bank.ingest_gradients([(Document(id, text), record)])
            return receipt.gradient_digest

    def redis(self) -> Redis:
        """A client of this bank's Redis server."""
        return Redis.from_url(EmbeddedRedis(self._data_dir, 1).url)

    def lose(self, digest: str) -> None:
        """Removes a gradient's record from the store, like a broken disk."""
        (found,) = [path for path in self._data_dir.glob(f"**/{digest[:2]}/{digest[2:]}") if path.is_file()]
        found.unlink()

    def delete(self, id: str, namespace: str = "default") -> None:
        with Bank(self.address) as bank:
            bank.delete(id, namespace=namespace)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class VllmServer:
    """``regrad serve`` in its own process group. ``plain``: the command that it prints."""

    def __init__(
        self, model: Path, flags: Sequence[str], environment: dict[str, str], log: Path, *, plain: bool = False
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        # All threads share one client, because making a client costs more than a request.
        self.client = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {API_KEY}"},
            timeout=300,
            # The server closes a connection after 5 s of silence, so old connections must not be used again.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=1),
            verify=False,
        )
        command = [sys.executable, "-m", "regrad_vllm.cli", "serve", str(model), "--port", str(self.port), *flags]
        variables = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **environment}
        if plain:
            printed = subprocess.run([*command, "--print-command"], env=variables, capture_output=True, check=True)
            lines = printed.stdout.decode().splitlines()
            assert len(lines) == 1, lines
            command = ["sh", "-c", "exec env " + lines[0]]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                cwd=log.parent,
                start_new_session=True,
            )

    def wait_until_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            try:
                if self.client.get("/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"the server was not ready after {seconds} s:\n{self.tail()}")

    def wait_until_ended(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def tail(self, num_bytes: int = 6000) -> str:
        return self._log.read_text("utf-8", errors="replace")[-num_bytes:]

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return self.client.post(path, json=body, headers=headers)

    def complete(self, prompt: str, regrad: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        """A greedy text completion of exactly max_tokens tokens, with their ids."""
        body = {"model": BASE, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True, **fields}  # fmt: skip
        answer = self.post("/v1/completions", body if regrad is None else {**body, "regrad": regrad})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def status(self, *, base_weights: bool = False) -> dict[str, Any]:
        answer = self.client.get("/v1/regrad/status", params={"base_weights": base_weights})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())
