"""Steps and a GPU's tables together: many requests with many documents each, without an engine."""

from __future__ import annotations

import random

import numpy as np
import pytest

from regrad_vllm.serve.kernels.device_tables import DOCUMENT_BYTES, DeviceTables
from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.seams.worker_patches import StepRequests
from regrad_vllm.serve.worker.admissions import Admissions
from regrad_vllm.serve.worker.pool import Pool
from regrad_vllm.serve.worker.steps import Steps
from tests.serve.kernels.test_device_tables import tables
from tests.serve.worker.stepping import Adapter, adapter
from tests.serve.worker.test_steps import Memory

REQUESTS, DOCUMENTS = 256, 16
ROWS = 3 * REQUESTS
Row = list[tuple[str | None, float]] | None  # (digest, coefficient) of a row's documents; None: of the base model


def drawn(chance: random.Random) -> Recipe:
    digests = chance.sample([f"{number:064x}" for number in range(1000)], DOCUMENTS)
    return Recipe("f" * 64, tuple(digests), tuple(chance.random() for _ in digests), chance.random())


def found(written: DeviceTables, device: Memory) -> list[Row]:
    """What a kernel finds for each row."""
    entries = written.documents.cpu().numpy().reshape(-1, DOCUMENT_BYTES)
    addresses = entries[:, :8].copy().view(np.int64)[:, 0].tolist()
    coefficients = entries[:, 8:12].copy().view(np.float32)[:, 0].tolist()
    return [
        None if count < 0 else [(device.there.get(addresses[place]), coefficients[place])
                                for place in range(first, first + count)]
        for first, count in written.rows.view(-1, 2).tolist()
    ]  # fmt: skip


def test_each_row_of_256_requests_finds_its_sixteen_documents_while_requests_come_and_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, chance = Memory(), random.Random(3)
    pool = Pool(device, 10**6)
    admissions = Admissions("f" * 64, pool)
    steps = Steps(admissions, pool, device)
    written = tables(ROWS, REQUESTS, REQUESTS * DOCUMENTS)
    monkeypatch.setattr(device, "set_batch", written.write)
    running: dict[str, Recipe] = {}
    known: dict[str, Adapter | None] = {}
    for step in range(4):
        for id in chance.sample(list(running), len(running) // 2):
            admissions.release(running.pop(id))
            del known[id]
        for number in range(REQUESTS - len(running)):
            id, recipe = f"{step}-{number}", drawn(chance)
            admissions.admit(recipe, "arena")
            running[id], known[id] = recipe, adapter(recipe)
        ids = chance.sample(list(running), REQUESTS)
        counts = [chance.choice((1, 1, 5)) if step == 0 else 1 for _ in ids]
        steps.set(StepRequests(ids, np.array(counts), known.__getitem__, known))
        expected: list[Row] = []
        for id, count in zip(ids, counts, strict=True):
            coefficients = np.float32(running[id].coefficients).tolist()
            expected += [list(zip(running[id].digests, coefficients, strict=True))] * count
        assert found(written, device) == expected + [None] * (ROWS - len(expected))
    for recipe in running.values():
        admissions.release(recipe)
    known.clear()
    figures = steps.figures()
    assert (figures["num_running"], figures["num_late"], figures["num_lost"]) == (0, 0, 0)
    assert pool.figures().num_held == len(admissions) == 0 and pool.figures().num_documents == len(device.there)
