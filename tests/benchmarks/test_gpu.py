"""The benchmark for GPUs, as far as it goes without one: its sheet of bytes, its documents, its call of the kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from bank_service.wire.codecs.factors import CODES, factor_form
from bank_service.wire.record import HEADER_BYTES, decode_gradient, encode_gradient, verify_record
from benchmarks.gpu import sheet
from benchmarks.gpu.running_engine import numbered
from benchmarks.shapes import LLAMA_1B, SMOLLM2_135M, made_up_learner

ROOT = Path(__file__).parents[2]


def test_the_sheet_counts_what_a_step_reads() -> None:
    learner = made_up_learner(SMOLLM2_135M)
    record = encode_gradient(np.ones(learner.layout.num_values, np.float32), learner.spec, sheet.CODEC)
    payload = len(record) - HEADER_BYTES
    phi = 2 * learner.layout.num_values
    assert sheet.documents(learner.layout, 5, 3).num_bytes == phi + 15 * payload
    assert sheet.adapters(learner.layout, 5).num_bytes == 5 * phi
    assert sheet.documents(learner.layout, 1, 1).launches == 2 * 2 * 15, "two for gate_up and two for down in 15 layers"
    # Llama-3.2-1B has 1,235,814,400 parameters, of which 16 · 2 + 1 vectors of 2048 are norms.
    assert sheet.base_bytes(LLAMA_1B) == 2 * (1_235_814_400 - 33 * 2048)


def test_the_documents_of_the_table_are_those_of_the_sheet() -> None:
    """docs/benchmarks.md shows it."""
    assert sheet.table() in (ROOT / "docs" / "benchmarks.md").read_text()


def test_a_numbered_record_is_sound_and_another_document() -> None:
    learner = made_up_learner(SMOLLM2_135M | {"num_hidden_layers": 2})
    values = np.random.default_rng(1).standard_normal(learner.layout.num_values, np.float32)
    for codec in ("factors-4-1-8", "factors-2-0-4"):
        record = encode_gradient(values, learner.spec, codec)
        place = HEADER_BYTES + int(factor_form(codec, learner.layout.shapes).table[1, CODES])
        others = [numbered(record, place, number) for number in range(50)]
        assert len(set(others)) == 50
        for other in others:
            verify_record(other, learner.spec)
        changed = decode_gradient(others[1], learner.spec) != decode_gradient(record, learner.spec)
        assert 0 < changed.sum() <= 16 * learner.layout.rank


def test_the_call_of_the_kernels_runs_in_tritons_interpreter() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.kernels", "--shape", "tiny", "--decode", "1", "1", "9", "2"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    last = json.loads(found.stdout.splitlines()[-1])
    assert list(last) == [
        f"{layer}, {batch}" for layer in ("gate_up", "down") for batch in ("1 rows, k=1", "9 rows, k=2")
    ]
