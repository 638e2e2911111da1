"""The sizing page's tables are its program's, and what measures the unit costs runs, in small."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from bank_service.wire.record import encode_gradient
from benchmarks import sizing
from benchmarks.bank import cache_bytes, catalog_bytes
from benchmarks.popularity import Popularity
from regrad_vllm.default_model import shipped_learner
from regrad_vllm.learner import Learner
from regrad_vllm.load.traffic import zipf_exponent
from tests.bank.postgres_server import schema_of
from tests.house.pages import ROOT


def test_the_page_has_the_tables_that_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert sizing.main([]) == 0
    stored, served, line = capsys.readouterr().out.split("\n\n")
    page = (ROOT / "docs" / "sizing.md").read_text("utf-8")
    assert stored in page and served in page
    first, *_ = json.loads(line)["sizes"]
    assert first["postgres_bytes"] == 10**6 * json.loads(line)["costs"]["postgres_bytes"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--codec zip", "codec must be factors-P-Q-BITS"),
        ("--documents 0", "--documents: must be a whole number of at least 5"),
        ("--postgres-bytes -1", "postgres_bytes must be more than 0 and less than 1e18, got -1"),
        ("--encode-per-s 0", "encode_per_s must be more than 0 and less than 1e18, got 0.0"),
        ("--requests-per-s 1e400", "requests_per_s must be more than 0 and less than 1e18, got inf"),
        ("--top-fifth-share 1", "top_fifth_share must be at least 0.2 and less than 1, got 1.0"),
        ("--learner /nowhere", "/nowhere"),
    ],
)
def test_a_wrong_flag_is_told_by_name(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sizing.main(flags.split())
    assert said in capsys.readouterr().err


def test_a_record_is_as_large_as_it_is_said_to_be() -> None:
    spec = Learner.load(shipped_learner()).spec
    values = np.random.default_rng(0).standard_normal(spec.num_values, np.float32)
    for codec in sizing.CODECS:
        assert sizing.record_bytes(codec) == len(encode_gradient(values, spec, codec))


@pytest.mark.parametrize(("record", "measured"), [(271_088, 328_938), (144_368, 163_507)])
def test_redis_sizes_are_near_those_measured(record: int, measured: int) -> None:
    assert sizing.redis_bytes(record) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0.00"),
        (999, "", "999"),
        (1e3, "", "1.00 thousand"),
        (99.7e6, "B", "100 MB"),
        (5.688e12, "B", "5.69 TB"),
    ],
)
def test_quantities_are_rounded_once(value: float, unit: str, text: str) -> None:
    assert sizing.quantity(value, unit) == text


@pytest.mark.parametrize("number", [7, 1000, 60_000])
def test_the_law_is_that_of_the_load_benchmark(number: int) -> None:
    popularity = Popularity.zipf(number)
    assert popularity.exponent == pytest.approx(zipf_exponent(number), abs=2e-3)
    assert popularity.counts.sum() == number
    assert (popularity.counts * popularity.shares).sum() == pytest.approx(1)


def test_a_thousand_million_documents_keep_the_law() -> None:
    popularity = Popularity.zipf(10**9)
    last = popularity.counts.cumsum()
    assert last[-1] == 10**9
    assert (popularity.counts * popularity.shares)[last <= 2 * 10**8].sum() == pytest.approx(0.74, abs=1e-3)


def test_hits_and_different_documents_are_those_of_drawn_references() -> None:
    popularity = Popularity.zipf(1000)
    drawn = random.Random(0).choices(range(1000), popularity.shares.tolist(), k=60_000)
    latest: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number in drawn:
        hits += number in latest
        latest[number] = None
        latest.move_to_end(number)
        if len(latest) > 200:
            latest.popitem(last=False)
    assert popularity.hit_ratio(200) == pytest.approx(hits / len(drawn), abs=0.01)
    seen = [len(set(drawn[start : start + 3000])) for start in range(0, len(drawn), 3000)]
    assert popularity.distinct(3000) == pytest.approx(sum(seen) / len(seen), rel=0.01)
    assert (popularity.hit_ratio(0), popularity.hit_ratio(1000)) == (0, 1)


def test_a_documents_bytes_in_postgresql_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        json.dumps({"id": f"d{n}", "text": f"Sentence {n} is here. It has words.", "title": "T"}) for n in range(50)
    ]
    (tmp_path / "train.documents.jsonl").write_text("\n".join(lines) + "\n")
    words = ["--catalog", schema_of(tmp_path), "--data", str(tmp_path), "--documents", "40"]
    assert catalog_bytes.main(words) == 0
    said = json.loads(capsys.readouterr().out)
    each = said["bytes_a_document"]
    assert said["documents"] == 40 and said["sentences"] == 2
    assert min(each.values()) > 0 and each["all"] == sum(each.values()) - each["all"]


def test_a_cached_gradients_bytes_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert cache_bytes.main(["--bytes", "5000", "--records", "200"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert 5000 < said["memory_bytes_a_record"] < 10_000 and said["allocator"]
