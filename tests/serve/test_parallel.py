"""Several workers, ranks and API servers: a small model over two CPU workers, against the same on two ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from bank_service.wire.record import FloatArray, decode_gradient
from regrad_vllm.compose import compose
from regrad_vllm.layout import Layout
from regrad_vllm.learner import Learner, save_adapter
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.arena.folders import FOLDER_PREFIX
from regrad_vllm.serve.arena.record_files import read_record
from tests.serve.support import (
    API_KEY,
    BASE,
    SMALL_HIDDEN,
    SMALL_LAYERS,
    BankThread,
    VllmServer,
    gradient_noise,
    random_learner,
)

RANK = 8
NUM_DOCUMENTS = 12


@pytest.fixture(scope="module")
def small_learner(small_model: Path) -> Learner:
    return random_learner(small_model, seed=1, rank=RANK)


@pytest.fixture(scope="module")
def learner_folder(small_learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small-learner")
    small_learner.save(folder)
    return folder


@pytest.fixture(scope="module")
def bank(small_learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BankThread]:
    thread = BankThread(tmp_path_factory.mktemp("small-bank"), small_learner)
    thread.start()
    thread.ingest([(f"doc-{n}", f"Fact number {n}: riddle {n} has the answer {n * 37}.") for n in range(NUM_DOCUMENTS)])
    yield thread
    thread.stop()


@contextmanager
def serving(
    model: Path, learner: Path, bank: BankThread, folder: Path, flags: list[str], **environment: str
) -> Iterator[VllmServer]:
    """A server on two workers of one core each."""
    common = [
        "--learner", str(learner), "--bank", bank.address, "--regrad-arena-dir", str(folder),
        "--regrad-bank-timeout-ms", "30000", "--regrad-mode", "blind",
        "--served-model-name", BASE, "--api-key", API_KEY, "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 * 2**20),
    ]  # fmt: skip
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "0|1" if os.cpu_count() != 1 else "0|0", **environment}
    server = VllmServer(model, [*common, *flags], variables, folder / "server.log")
    try:
        server.wait_until_ready(400)  # up to seven processes that import vLLM on two cores
        yield server
    finally:
        server.stop()


def answers(server: VllmServer) -> list[list[int]]:
    """Tokens with an adapter of its own for each request, then without."""

    def ask(number: int) -> list[int]:
        regrad = {"document_ids": [f"doc-{number}", f"doc-{(number + 5) % NUM_DOCUMENTS}"]}
        answer = server.complete(f"Riddle {number}?", regrad if number < NUM_DOCUMENTS else None)
        return list(answer["choices"][0]["token_ids"])

    with ThreadPoolExecutor(6) as pool:
        return list(pool.map(ask, [*range(NUM_DOCUMENTS - 1), *range(NUM_DOCUMENTS, NUM_DOCUMENTS + 3)]))


@pytest.fixture(scope="module")
def sharded(
    small_model: Path, learner_folder: Path, bank: BankThread, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """Two tensor parallel workers, with slots of a higher rank than the learner's."""
    flags = ["--tensor-parallel-size", "2", "--max-lora-rank", "16"]
    folder = tmp_path_factory.mktemp("sharded")
    with serving(
        small_model, learner_folder, bank, folder, flags, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1"
    ) as server:  # fmt: skip
        yield server


@pytest.mark.timeout(600)
def test_operators_own_adapters_are_served_whole_or_refused(
    sharded: VllmServer, small_learner: Learner, tmp_path: Path
) -> None:
    mine, others = tmp_path / "mine", tmp_path / "others"
    ours = sharded.complete("The moon", {"document_ids": ["doc-3"]})
    digest = ours["regrad"]["documents"][0]["gradient_digest"]
    delta = decode_gradient(read_record(sharded.status()["arena"]["folder"], digest), small_learner.spec)
    save_adapter(mine, small_learner, compose(small_learner.phi, [delta], [1.0], 1.0))
    save_adapter(others, *attention_adapter(small_learner))

    loaded = sharded.post("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": str(mine)})
    assert loaded.status_code == 200, loaded.text
    refused = sharded.post("/v1/load_lora_adapter", {"lora_name": "others", "lora_path": str(others)})
    assert refused.status_code >= 400
    assert "adapter others must have LoRA only on modules that the engine adapts" in refused.text
    assert "--lora-target-modules down_proj gate_up_proj o_proj" in refused.text

    right = ours["choices"][0]["token_ids"]
    assert sharded.complete("The moon")["choices"][0]["token_ids"] != right
    first = answers(sharded)
    for _ in range(2):
        assert sharded.complete("The moon", model="mine")["choices"][0]["token_ids"] == right
        assert answers(sharded) == first, "what another adapter left in a slot is gone"


@pytest.mark.timeout(600)
def test_each_tensor_parallel_worker_has_all_documents_before_a_step_needs_them(sharded: VllmServer) -> None:
    answers(sharded)
    workers = sharded.status()["workers"]
    assert len(workers) == 2 and all(worker["pool_num_documents"] == NUM_DOCUMENTS for worker in workers)
    assert {worker["num_late"] + worker["num_lost"] for worker in workers} == {0}
    assert {worker["num_registered"] for worker in workers} <= {1, 2}, "φ*, and an operator's adapter"


def attention_adapter(learner: Learner) -> tuple[Learner, FloatArray]:
    """Of the output projections, where the learner adapts nothing."""
    shape = (SMALL_HIDDEN, SMALL_HIDDEN)
    layout = Layout.build(RANK, [(f"model.layers.{layer}.self_attn.o_proj", *shape) for layer in range(SMALL_LAYERS)])
    values = gradient_noise(layout, 2, 0.03)
    return Learner(learner.config, layout, values, np.full(len(layout.tensors), 0.1, np.float32)), values


@pytest.mark.only_test_all
@pytest.mark.timeout(600)
def test_ranks_and_api_servers_give_what_sharded_workers_give_and_leave_nothing_when_killed(
    small_model: Path, learner_folder: Path, bank: BankThread, tmp_path: Path, sharded: VllmServer
) -> None:
    flags = ["--data-parallel-size", "2", "--api-server-count", "2", "--max-lora-rank", "1"]
    right = answers(sharded)
    sharded.stop()  # two such servers at once need about 10 GiB
    with serving(small_model, learner_folder, bank, tmp_path, flags) as server:
        assert [answers(server) for _ in range(3)] == [right] * 3
        workers = server.status()["workers"]
        assert [worker["rank"] for worker in workers] == [0, 1]
        assert all(worker["pool_num_documents"] > 0 for worker in workers), "both ranks had requests of ours"
        assert sum(worker["num_late"] + worker["num_lost"] for worker in workers) == 0, "each where its documents were"
        by_hand = server.post(
            "/v1/completions", {"model": BASE, "prompt": "x", "max_tokens": 1, "regrad": {"document_ids": ["doc-1"]}},
            **{"X-data-parallel-rank": "1"},
        )  # fmt: skip
        assert by_hand.status_code == 200, by_hand.text
        arenas = [path.name for path in tmp_path.glob(FOLDER_PREFIX + "*")]
        assert len(arenas) == 2, "one for each API server"
        os.kill(workers[1]["pid"], signal.SIGKILL)
        server.wait_until_ended(60)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(alive(worker["pid"]) for worker in workers):
        time.sleep(0.2)
    with_next = Arena.open(tmp_path, 2**20)  # as the next start does
    assert [path.name for path in tmp_path.glob(FOLDER_PREFIX + "*")] == [with_next.folder.name]
    with_next.close()
    sockets = Path("/proc/net/unix").read_text()
    assert not any(f"@regrad-{worker['pid']}-" in sockets for worker in workers), "no door is left"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
