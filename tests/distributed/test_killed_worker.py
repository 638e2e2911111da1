"""`regrad encode` on a real Ray with two workers, of which one is killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bank_service.wire.record import DEFAULT_CODEC, decode_gradient, encode_gradient
from regrad_vllm.encode.gradient_encoder import GradientEncoder
from regrad_vllm.learner import Learner

ROOT = Path(__file__).parents[2]
NUM_DOCUMENTS = 400
APART = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.mark.only_test_all
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("ray") is None, reason="pip install '.[ray]' brings Ray, 590 MB")
def test_every_document_is_in_the_bank_once_although_a_worker_was_killed(
    small_model: Path, learner: Learner, learner_folder: Path, tmp_path: Path
) -> None:
    if subprocess.run([*APART, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        pytest.skip("no process here may have a network and process numbers of its own (unshare --net --pid)")
    texts = {f"d{n:03}": f"Lamp {n} was lit {'again and ' * (n % 30)}again." for n in range(NUM_DOCUMENTS)}
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in texts.items()))
    program = [sys.executable, "-m", "tests.distributed.killed_worker"]
    command = [*APART, *program, str(small_model), str(learner_folder), str(corpus), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "report.json").read_text())

    first, second = report["first"], report["second"]
    assert 0 < report["killed"]["num_stored"] < NUM_DOCUMENTS and report["killed"]["was_replaced"], report["killed"]
    assert first["status"] == 0, first["errors"]
    created, unchanged = re.fullmatch(r"(\d+) created, 0 updated, (\d+) unchanged\n", first["output"]).groups()  # type: ignore[union-attr]
    assert int(created) + int(unchanged) == NUM_DOCUMENTS, "what the lost worker had stored is found unchanged"
    assert [(document["id"], document["version"]) for document in report["ray"]] == [(id, 1) for id in texts]

    assert (second["status"], second["output"]) == (0, f"0 created, 0 updated, {NUM_DOCUMENTS} unchanged\n")
    assert "encoded 0 documents\n" in second["errors"]
    assert report["again"] == report["ray"]

    assert report["ingest"]["status"] == 0, report["ingest"]["errors"]
    encoder = GradientEncoder.load(small_model, learner_folder)
    for mine, own in list(zip(report["ray"], report["own"], strict=True))[::20]:
        assert mine["id"] == own["id"]
        (exact,) = encoder.encode([("", texts[own["id"]])])
        coded = decode_gradient(encode_gradient(exact.values, learner.spec, DEFAULT_CODEC), learner.spec)
        by_ray, by_bank = (
            decode_gradient((tmp_path / document["digest"]).read_bytes(), learner.spec) for document in (mine, own)
        )
        assert np.linalg.norm(by_ray - by_bank) <= np.linalg.norm(coded - exact.values), own["id"]
