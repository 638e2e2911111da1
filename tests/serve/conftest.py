"""One learner, one bank and one engine for all tests of this folder. An engine takes most of a minute to start.

The model is a random one of four layers. `make test-all` runs the same tests on the default model, too.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vLLM and torch warn about while they are imported is theirs
    import vllm.v1.engine.async_llm  # noqa: F401

from regrad_vllm.default_model import ensure_default_model
from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.door_client import DoorClient
from regrad_vllm.serve.arena.arena import Arena
from tests.serve.collector import Collector
from tests.serve.support import (
    API_KEY,
    BASE,
    MAX_NUM_SEQS,
    BankThread,
    VllmServer,
    random_learner,
    record_bytes,
    save_small_model,
)

NUM_DOCUMENTS = 150
ARENA_RECORDS, WORKER_RECORDS = 142, 103  # what the server's arena and its worker's cache have room for


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small-model")
    save_small_model(folder)
    return folder


@pytest.fixture(scope="session", params=["small", pytest.param("default", marks=pytest.mark.only_test_all)])
def model(request: pytest.FixtureRequest) -> Path:
    """The folder of the served model."""
    if request.param == "default":
        return ensure_default_model()
    return request.getfixturevalue("small_model")


@pytest.fixture(scope="session")
def learner(model: Path) -> Learner:
    return random_learner(model, seed=1)


@pytest.fixture(scope="session")
def learner_folder(learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learner")
    learner.save(folder)
    return folder


@pytest.fixture(scope="session")
def bank(learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BankThread]:
    """A bank with documents doc-0 … doc-149."""
    thread = BankThread(tmp_path_factory.mktemp("bank"), learner)
    thread.start()
    try:
        thread.ingest([(f"doc-{n}", f"Fact number {n}: the answer to riddle {n} is {n * 37 % 1000}.") for n in
                       range(NUM_DOCUMENTS)])  # fmt: skip
        yield thread
    finally:
        thread.stop()


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """The collector that gets the spans of the server's processes."""
    running = Collector()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def server(
    model: Path,
    learner: Learner,
    learner_folder: Path,
    bank: BankThread,
    collector: Collector,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[VllmServer]:
    """A server by the command of ``regrad serve --print-command``, with fewer slots than tests have adapters."""
    folder = tmp_path_factory.mktemp("server")
    flags = [
        "--learner", str(learner_folder), "--bank", bank.address, "--regrad-kept-requests", "40",
        "--regrad-bank-timeout-ms", "30000", "--regrad-documents", "write", "--regrad-mode", "blind",
        "--regrad-arena-dir", str(folder),
        "--regrad-arena-bytes", str(ARENA_RECORDS * record_bytes(learner)),
        "--regrad-worker-bytes", str(WORKER_RECORDS * record_bytes(learner)),
        "--served-model-name", BASE, "--api-key", API_KEY, "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "1024", "--max-num-seqs", str(MAX_NUM_SEQS),
    ]  # fmt: skip
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.address, "OTEL_BSP_SCHEDULE_DELAY": "200",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }  # fmt: skip
    running = VllmServer(model, flags, variables, folder / "server.log", plain=True)
    try:
        running.wait_until_ready(900)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def weights_before(server: VllmServer) -> list[str]:
    """SHA-256 of the base weights in the workers, before any request that a test makes afterwards."""
    return list(server.status(base_weights=True)["base_weights"])


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    made = Arena.open(tmp_path, 2**27)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def doors_are_closed() -> Iterator[None]:
    """Fails the test that leaves a door open. Else another test fails, in which that is collected."""
    made: list[DoorClient] = []
    init = DoorClient.__init__

    def noted(door: DoorClient, address: str) -> None:
        made.append(door)
        init(door, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DoorClient, "__init__", noted)
        yield
    assert not [door for door in made if door._writer is not None and not door._closed], (
        "a test must close the doors that it opens"
    )


@pytest.fixture
def loggers() -> Iterator[None]:
    """Restores the levels of the root logger and of the plugin's."""
    both = logging.getLogger(), logging.getLogger("regrad")
    levels = [logger.level for logger in both]
    yield
    for logger, level in zip(both, levels, strict=True):
        logger.setLevel(level)
