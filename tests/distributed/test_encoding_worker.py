"""A worker of `regrad encode` without Ray: what it encodes, what it leaves, and what the bank refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bank_service.wire.record import DEFAULT_CODEC, decode_gradient, encode_gradient
from regrad_vllm.client import Bank, BankCredentials
from regrad_vllm.client.corpus import CorpusDocument
from regrad_vllm.distributed.encoding_worker import EncodingJob, EncodingWorker, Result, line_of
from regrad_vllm.encode.gradient_encoder import GradientEncoder
from regrad_vllm.learner import Learner
from regrad_vllm.local.processes import free_port
from tests.serve.support import BankThread

DOCUMENTS = [
    CorpusDocument(f"d{n}", f"The lamp {n} was lit {'again and ' * n}again.", metadata={"n": str(n)}, place=f"c:{n}")
    for n in range(6)
]


@pytest.fixture(scope="module")
def bank(learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bank]:
    thread = BankThread(tmp_path_factory.mktemp("bank"), learner)
    thread.start()
    try:
        with Bank(thread.address, spec=learner.spec) as client:
            yield client
    finally:
        thread.stop()


@pytest.fixture(scope="module")
def job(bank: Bank, small_model: Path, learner_folder: Path) -> EncodingJob:
    return EncodingJob(small_model, learner_folder, bank.address, BankCredentials(), "w", DEFAULT_CODEC)


@pytest.fixture(scope="module")
def worker(job: EncodingJob) -> EncodingWorker:
    return EncodingWorker(job)


def run(worker: EncodingWorker, documents: list[CorpusDocument]) -> list[Result]:
    columns = worker({"document": [line_of(document) for document in documents]})
    return [Result(*row) for row in zip(*columns.values(), strict=True)]


def test_a_worker_encodes_what_is_new_and_nothing_twice(
    bank: Bank, job: EncodingJob, worker: EncodingWorker, learner: Learner
) -> None:
    first = run(worker, DOCUMENTS[:4])
    assert [(r.place, r.outcome, r.was_encoded) for r in first] == [(f"c:{n}", "created", True) for n in range(4)]
    second = run(worker, DOCUMENTS)
    assert [(r.outcome, r.was_encoded) for r in second] == [("unchanged", False)] * 4 + [("created", True)] * 2
    assert [r.sequence for r in second[:4]] == [r.sequence for r in first]
    encoded = GradientEncoder.load(job.model, job.learner).encode([(d.title, d.text) for d in DOCUMENTS])
    for document, exact in zip(DOCUMENTS, encoded, strict=True):
        digest = bank.get(document.id, namespace="w").gradient_digest
        stored = decode_gradient(next(record for _, record in bank.fetch([digest])), learner.spec)
        coded = decode_gradient(encode_gradient(exact.values, learner.spec, DEFAULT_CODEC), learner.spec)
        error_of_codec = np.linalg.norm(coded - exact.values)
        assert np.linalg.norm(stored - exact.values) <= 1.05 * error_of_codec, document.id
        assert error_of_codec < 0.5 * np.linalg.norm(exact.values), "else any gradient would pass"


def test_other_metadata_keep_the_gradient_and_another_text_gets_a_new_one(bank: Bank, worker: EncodingWorker) -> None:
    run(worker, DOCUMENTS[:2])
    before = [bank.get(document.id, namespace="w").gradient_digest for document in DOCUMENTS[:2]]
    moved = replace(DOCUMENTS[0], metadata={"n": "other"})
    written = replace(DOCUMENTS[1], text="Another text.")
    assert [(r.outcome, r.was_encoded) for r in run(worker, [moved, written])] == [
        ("updated", False),
        ("updated", True),
    ]
    now = [bank.get(document.id, namespace="w") for document in DOCUMENTS[:2]]
    assert [stored.gradient_digest == digest for stored, digest in zip(now, before, strict=True)] == [True, False]
    assert dict(now[0].document.metadata) == {"n": "other"} and now[1].document.text == "Another text."


def test_a_refused_document_is_named_and_the_others_are_stored(bank: Bank, worker: EncodingWorker) -> None:
    documents = [replace(document, id=f"r{n}") for n, document in enumerate(DOCUMENTS[:3])]
    documents[1] = replace(documents[1], title="long " * 1000)
    results = run(worker, documents)
    assert [r.outcome for r in results] == ["created", "refused", "created"]
    assert "title" in results[1].refusal and not results[1].was_encoded
    assert bank.get("r2", namespace="w").document.text == documents[2].text


def test_a_bank_that_is_gone_ends_a_batch_after_some_tries(job: EncodingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrad_vllm.distributed.encoding_worker._WAITS_S", (0, 0))
    gone = EncodingWorker(replace(job, bank=f"127.0.0.1:{free_port()}"))
    with pytest.raises(RuntimeError, match="(?i)connect"):
        run(gone, DOCUMENTS[:1])


@pytest.mark.skipif(find_spec("ray") is None, reason="pip install '.[ray]' brings Ray, 590 MB")
def test_a_ray_that_is_not_there_is_one_line_with_what_to_do(job: EncodingJob) -> None:
    from regrad_vllm.distributed.ray_encoding import EncodingError, encode_on_ray

    with pytest.raises(EncodingError, match=r"got: [^\n.]*Ray instance.*; start Ray there.*regrad ingest`$"):
        next(encode_on_ray(job, (), (), address="auto", num_workers=None))
