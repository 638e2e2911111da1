"""The bank's benchmarks run, in small, and their figures can be."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.bank.drawn_corpus import BLOCK, DrawnCorpus, number_of
from benchmarks.bank_ingest import spec_with
from benchmarks.bank_soak.__main__ import Soak
from benchmarks.bank_soak.ledger import SeededContent, Stored
from benchmarks.bank_soak.sampling import growth
from benchmarks.crash.killable import ROOT
from benchmarks.scale_out.staleness import staleness_of
from tests.bank.postgres_server import schema_of

SMALL = (
    "--documents 100 --queries 24 --repeats 1 --fetches 4 --fetch-values 9000 --ingest-documents 8 --ingest-values 900 "
    "--cue-documents 16"
)


def _run(module: str, *words: str, timeout: int = 200) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report and the figures that a benchmark prints."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    report, figures = done.stdout.strip().rsplit("\n", 1)
    return json.loads(report), json.loads(figures)


def test_a_catalog_in_postgresql_is_measured_beside_its_sql(tmp_path: Path) -> None:
    words = "--documents 300 --queries 8 --repeats 1"
    report, figures = _run("benchmarks.bank.catalog_times", "--catalog", schema_of(tmp_path), *words.split())
    assert set(figures) == {"query_p50_ms_over_sql", "recall_at_10"} and figures["recall_at_10"] == 1.0
    assert report["build"]["documents_per_s"] > 0 and report["words"]["calls"] == 8


@pytest.mark.only_test_all
@pytest.mark.timeout(600)
def test_two_bank_nodes_are_measured_beside_one_and_killed() -> None:
    words = "--documents 2500 --queries 16 --repeats 1 --seconds 1 --fetches 2 --encodes 8 --kills 2"
    report, figures = _run("benchmarks.scale_out", *words.split(), timeout=550)
    assert set(figures) == {
        "nodes_2_over_1", "query_p50_ms_over_sql", "recall_at_10", "staleness_ms_p99", "fetch_mb_s", "ray_2_over_1",
        "kills", "lost", "wrong",
    }  # fmt: skip
    assert (figures["kills"], figures["lost"], figures["wrong"]) == (2, 0, 0)
    assert figures["nodes_2_over_1"] > 0 and figures["fetch_mb_s"] > 0 and 0.9 < figures["recall_at_10"] <= 1
    assert report["staleness"]["share_at_replica"] > 0 and report["staleness"]["p99_ms"]["median"] >= 0
    assert all(0.9 < report["query"][f"recall_at_10_{name}"] <= 1 for name in ("shelf", "topic"))
    assert all(rate["median"] > 0 for rate in report["load"]["queries_per_s"].values())


def test_answers_of_the_primary_are_no_staleness() -> None:
    found = {"p99_ms": {"median": 0.0}, "share_at_replica": 0.6}
    assert staleness_of(found) == 0.0 and staleness_of({**found, "share_at_replica": 0.4}) is None


def test_a_move_to_postgresql_and_back_is_measured(tmp_path: Path) -> None:
    words = ("--catalog", schema_of(tmp_path), "--documents", "60", "--folder", str(tmp_path))
    report, figures = _run("benchmarks.bank.moving", *words)
    rates = {name for name in figures if name.endswith("documents_per_s")}
    assert len(rates) == 4 and figures.keys() - rates == {"documents"}
    assert all(figures[name] > 0 for name in rates) and report["machine"]["cores"] >= 1


@pytest.mark.only_test_all
def test_the_bank_is_measured_beside_what_it_stands_on(tmp_path: Path) -> None:
    report, figures = _run("benchmarks.bank", *SMALL.split(), "--keep", str(tmp_path / "kept"))
    assert set(figures) == {
        "query_p50_ms_over_raw", "recall_at_10", "fetch_mb_s_ratio_redis", "ingest_ratio_fsync", "documents",
    }  # fmt: skip
    assert figures["documents"] == 100 == report["build"]["stored"] == report["folder_bytes"]["num_blobs"]
    assert 0.9 < figures["recall_at_10"] <= 1 and 0.9 < report["query"]["recall_at_10_raw"] <= 1
    assert figures["query_p50_ms_over_raw"] > 0 and figures["ingest_ratio_fsync"] > 0
    assert figures["fetch_mb_s_ratio_redis"] > 0 and report["fetch"]["hit_share_bank_redis"] > 0.5
    assert report["restart"]["after_kill"]["first_answer_seconds"] > 0
    assert report["purge"]["seconds"]["median"] > 0 and report["purge"]["cpu_seconds"]["median"] > 0
    cues = report["cues"]
    assert all(cues[f"documents_per_s_{kind}_sentences"]["median"] > 0 for kind in ("with", "without"))
    assert cues["query_with_cue_0"]["calls"] == cues["query_with_cue_2"]["calls"] == 24
    kinds = {"filter_1_in_10", "filter_1_in_1000", "filter_1_in_100000", "lexical", "hybrid", "dense_by_text"}
    assert all(report["other_queries"][kind]["p50_ms"]["median"] > 0 for kind in kinds)
    assert json.loads((tmp_path / "kept" / "build.json").read_text()).items() <= report["build"].items()
    part, figures = _run("benchmarks.bank", *SMALL.split(), "--reuse", str(tmp_path / "kept"), "--parts", "fetch")
    assert part["build"] == {**report["build"], "stop_seconds": part["build"]["stop_seconds"]}
    assert figures["fetch_mb_s_ratio_redis"] > 0 and figures["query_p50_ms_over_raw"] is None and "query" not in part


def test_a_bank_is_measured_again_only_as_it_was_built(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"documents": 200, "values": 256}))
    command = [sys.executable, "-m", "benchmarks.bank", "--documents", "300"]
    for option, reason in (("--reuse", "same --documents"), ("--keep", "new or empty")):
        refused = subprocess.run([*command, option, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        assert refused.returncode and reason in refused.stderr


def test_a_corpus_is_the_same_each_time_and_its_nearest_are_those_of_a_comparison_with_each() -> None:
    corpus = DrawnCorpus(BLOCK + 100, 32, spec_with(8))
    assert [part.SerializeToString(deterministic=True) for part in corpus.uploads(1)] == [
        part.SerializeToString(deterministic=True) for part in DrawnCorpus(BLOCK + 100, 32, spec_with(8)).uploads(1)
    ]
    headers = [part.header for block in range(2) for part in corpus.uploads(block) if part.HasField("header")]
    assert [number_of(header.document.id) for header in headers] == list(range(BLOCK + 100))
    vectors = np.array([header.embedding for header in headers], np.float32)
    questions = corpus.questions(30)
    assert len(questions) == 30
    for question, nearest in zip(questions, corpus.nearest(questions, 10).tolist(), strict=True):
        scores = vectors @ question.vector
        assert set(nearest) == set(np.argsort(-scores)[:10].tolist())
        document = headers[question.number].document
        assert dict(document.metadata) == question.metadata and set(question.words.split()) <= set(
            document.text.split()
        )
    same = corpus.nearest(questions, 10, "topic").tolist()  # about a document in a thousand
    for question, nearest in zip(questions, same, strict=True):
        topic = [
            n for n, header in enumerate(headers) if header.document.metadata["topic"] == question.metadata["topic"]
        ]
        assert question.number in nearest and {*nearest} - {-1} == set(topic)


@pytest.mark.only_test_all
@pytest.mark.timeout(120)
def test_a_bank_under_load_for_ten_seconds_makes_no_error_and_holds_what_it_acknowledged(tmp_path: Path) -> None:
    words = "--minutes 0.1667 --documents 150 --values 500 --rate 30"
    report, figures = _run("benchmarks.bank_soak", *words.split(), "--folder", str(tmp_path))
    assert (figures["errors"], figures["inconsistencies"]) == (0, 0)
    assert figures["operations"] > 100 and report["samples"] > 10
    assert report["expected"]["foreign_namespace PERMISSION_DENIED"], "calls that must be refused were made"
    assert {"create", "update", "unchanged", "delete", "dense", "filtered", "fetch", "snapshot"} <= set(report["calls"])
    assert 0.8 < report["growth"]["documents"]["last_third"] / 150 < 1.2


def test_the_soak_sees_a_document_that_is_not_what_it_should_be(tmp_path: Path) -> None:
    args = Namespace(minutes=0.03, documents=60, values=500, rate=30.0, seed=0, given_up_writes=0.0)
    soak = Soak(tmp_path, args)
    load = soak._load

    async def load_and_forget(process: Any) -> Any:
        samples = await load(process)
        documents = soak._spaces[0].documents
        first, second, *_ = documents
        documents[first] = Stored(SeededContent(1), documents[first].version, documents[second].digest)
        del documents[second]
        return samples

    soak._load = load_and_forget  # type: ignore[method-assign]
    assert len(soak.run()["inconsistencies"]) >= 4, "of each document, before and after the restart"


def test_growth_is_the_slope_after_the_first_third() -> None:
    samples = [
        {"seconds": float(t), "files": 40.0 + (t - 1200 if t > 1200 else 5000 - t) / 60} for t in range(0, 3600, 10)
    ]
    found = growth(samples, 3600)["files"]
    assert found["per_hour"] == pytest.approx(60, rel=1e-3) and found["interval"][0] > 59
    assert found["first_third"] > found["last_third"]
