"""A new learner under load: two servers, one bank. No request fails, and each is answered by its server's learner."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bank_service.values.documents import Query
from bank_service.wire.record import DEFAULT_CODEC, decode_gradient, encode_gradient, record_digest
from regrad_vllm.client import Bank, Document, UpgradeProgress
from regrad_vllm.encode.gradient_encoder import GradientEncoder
from regrad_vllm.learner import Learner
from regrad_vllm.serve.recipe import Recipe
from tests.bank.upkeep.upgrading import begun, id_of, opened, put
from tests.serve.support import API_KEY, BASE, BankThread, DrawingEncoder, VllmServer, random_learner

logger = logging.getLogger(__name__)

NUM_DOCUMENTS = 40
NUM_ASKERS = 4
LOAD_SECONDS = 6.0  # of each phase
PAUSE_SECONDS = 0.2  # between two questions of an asker, so that the second server starts in time beside them


def text_of(number: int, version: int) -> str:
    return f"Harbour {number} of Orlen has {version} cranes and its master is called Quist {number}."


class Texts:
    """The gradients of all texts by either learner, by digest."""

    def __init__(self, *learners: Learner) -> None:
        self._learners = learners
        self._known: dict[str, str] = {}

    def add(self, text: str) -> None:
        for learner in self._learners:
            (drawn,) = DrawingEncoder(learner).encode([("", text)])
            record = encode_gradient(drawn.values, learner.spec, DEFAULT_CODEC)
            self._known[record_digest(record)] = learner.fingerprint

    def is_right(self, learner: Learner, used: dict[str, Any]) -> bool:
        """Whether gradient and adapter's name are the learner's. Of one document, because answers round the weights."""
        digests = tuple(document["gradient_digest"] for document in used["documents"])
        weights = tuple(document["weight"] for document in used["documents"])
        recipe = Recipe(learner.fingerprint, digests, weights, used["gamma"])
        return (
            bool(digests)
            and used["adapter"] == recipe.name
            and {self._known[digest] for digest in digests} == {learner.fingerprint}
        )


class Load:
    """Threads that ask the servers in turn, and one that writes documents, all the time."""

    def __init__(self, bank: str, texts: Texts) -> None:
        self.servers: list[tuple[str, VllmServer, Learner]] = []  # replaced as a whole
        self.counts: Counter[str] = Counter(failed=0, wrong=0)
        self.problems: list[str] = []
        self._bank = bank
        self._texts = texts
        self._ending = threading.Event()
        self._numbers = itertools.count()
        self._threads = [
            *(threading.Thread(target=self._ask, name=f"asker-{n}") for n in range(NUM_ASKERS)),
            threading.Thread(target=self._write, name="writer"),
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        while not self._ending.wait(PAUSE_SECONDS):
            number = next(self._numbers)
            servers = self.servers
            name, server, learner = servers[number % len(servers)]
            body = {
                "model": BASE, "prompt": f"Who is the master of harbour {number % NUM_DOCUMENTS}?", "max_tokens": 4,
                "temperature": 0, "regrad": {"top_k": 1},
            }  # fmt: skip
            try:
                answer = server.post("/v1/completions", body)
            except Exception as error:  # noqa: BLE001 - any error is a failed request
                self._note("failed", repr(error))
                continue
            if answer.status_code != 200:
                self._note("failed", answer.text)
            elif not self._texts.is_right(learner, answer.json()["regrad"]):
                self._note("wrong", answer.text)
            self.counts[name] += 1

    def _write(self) -> None:
        with Bank(self._bank) as bank:
            for change in itertools.count(1):
                if self._ending.wait(0.3):
                    return
                number = change % NUM_DOCUMENTS
                text = text_of(number, change)
                self._texts.add(text)
                try:
                    if change % 5 == 0:
                        bank.delete(f"d{number}")
                    list(bank.ingest([Document(f"d{number}", text)]))
                    self.counts["writes"] += 1
                except Exception as error:  # noqa: BLE001 - any error is a failed write
                    self._note("failed", repr(error))

    def _note(self, what: str, problem: str) -> None:
        self.counts[what] += 1
        self.problems.append(f"{what}: {problem[:500]}")


@contextmanager
def server(model: Path, learner: Path, bank: str, folder: Path) -> Iterator[VllmServer]:
    folder.mkdir()
    flags = [
        "--learner", str(learner), "--bank", bank, "--regrad-bank-timeout-ms", "30000",
        "--regrad-arena-dir", str(folder), "--regrad-arena-bytes", str(2**26), "--regrad-worker-bytes", str(2**26),
        "--served-model-name", BASE, "--api-key", API_KEY, "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "512", "--max-num-seqs", "8", "--regrad-mode", "blind",
    ]  # fmt: skip
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # else both servers work on the same core
    running = VllmServer(model, flags, environment, folder / "server.log")
    try:
        running.wait_until_ready(400)
        yield running
    finally:
        running.stop()


def saved(learner: Learner, folder: Path) -> Path:
    folder.mkdir()
    learner.save(folder)
    return folder


@pytest.mark.asyncio
async def test_the_real_encoder_gives_a_bank_the_gradients_of_the_new_learner(
    small_model: Path, tmp_path: Path
) -> None:
    old, new = (random_learner(small_model, seed) for seed in (1, 2))
    first, second = saved(old, tmp_path / "old"), saved(new, tmp_path / "new")
    text = text_of(1, 0)
    encoder = GradientEncoder.load(small_model, first, dtype=torch.float32, device="cpu")
    async with opened(tmp_path / "bank", encoder) as bank:
        await put(bank, text)
        assert (await begun(bank, second)).is_level
        other = encoder.of_learner(second)
        for learner in (old, new):
            query = Query(document_ids=(id_of(text),), learner_fingerprint=learner.fingerprint, include_gradients=True)
            answer = await bank.query(query)
            given = decode_gradient(answer.records[answer.hits[0].gradient_digest], learner.spec)
            errors = []
            for each in (encoder, other):
                (exact,) = each.encode([("", text)])
                errors.append(float(np.linalg.norm(given - exact.values) / np.linalg.norm(exact.values)))
            assert (errors[0] < errors[1]) == (learner is old), errors


@pytest.mark.only_test_all
@pytest.mark.timeout(1200)
def test_servers_of_an_old_and_a_new_learner_are_both_right_until_the_old_one_has_gone(
    small_model: Path, tmp_path: Path
) -> None:
    old, new = (random_learner(small_model, seed) for seed in (1, 2))
    for name, learner in (("old-learner", old), ("new-learner", new)):
        saved(learner, tmp_path / name)
    texts = Texts(old, new)
    documents = [(f"d{number}", text_of(number, 0)) for number in range(NUM_DOCUMENTS)]
    for _, text in documents:
        texts.add(text)
    bank = BankThread(tmp_path / "bank", old)
    bank.start()
    with ExitStack() as stack:
        stack.callback(bank.stop)
        bank.ingest(documents)

        def upgrade(*action: Any) -> UpgradeProgress:
            with Bank(bank.address) as client:
                return list(client.upgrade(*action))[-1]

        leaving = stack.enter_context(ExitStack())
        first = leaving.enter_context(server(small_model, tmp_path / "old-learner", bank.address, tmp_path / "old"))
        load = Load(bank.address, texts)
        load.servers = [("old", first, old)]
        with load:
            time.sleep(LOAD_SECONDS)
            assert upgrade("begin", str(tmp_path / "new-learner")).is_level
            second = stack.enter_context(server(small_model, tmp_path / "new-learner", bank.address, tmp_path / "new"))
            load.servers = [("old", first, old), ("new", second, new)]
            time.sleep(LOAD_SECONDS)
            load.servers = [("new", second, new)]
            time.sleep(LOAD_SECONDS)  # the old server's last answers
            leaving.close()
            finished = upgrade("finish")
            time.sleep(LOAD_SECONDS)
        assert finished.learner_fingerprint == new.fingerprint
        logger.info("upgrade under load: %s", dict(load.counts))
        assert not load.problems, load.problems[:5]
        assert min(load.counts["old"], load.counts["new"]) > 10 and load.counts["writes"] > 10
