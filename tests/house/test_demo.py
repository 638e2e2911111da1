"""The demo's parts, and the demo as a newcomer sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from regrad_vllm.client.corpus import BadInput, find_files, read_corpus
from regrad_vllm.demo.chat import ChatAnswer
from regrad_vllm.demo.people import DATA, invented, render
from regrad_vllm.demo.quiz import DOCUMENTS, QuizQuestion, load_questions
from regrad_vllm.demo.table import WIDTH
from regrad_vllm.demo.table import render as render_table
from regrad_vllm.demo.ways import Told
from regrad_vllm.local.processes import ServiceFailure, Services, waiting


def test_the_committed_documents_are_what_their_generator_gives() -> None:
    documents, questions = invented()
    assert (DATA / "documents" / "invented.jsonl").read_text("utf-8") == render(documents)
    assert (DATA / "questions" / "invented.jsonl").read_text("utf-8") == render(questions)


def test_every_document_of_the_demo_can_be_ingested() -> None:
    files, left_out, bad = find_files([DOCUMENTS])
    items = list(read_corpus(files))
    assert not left_out and not bad
    assert not [item for item in items if isinstance(item, BadInput)]
    assert len(items) == 180


def test_the_demo_asks_at_least_twenty_questions_and_each_answer_stands_in_its_document() -> None:
    files, _, _ = find_files([DOCUMENTS])
    texts = {item.id: item.text for item in read_corpus(files) if not isinstance(item, BadInput)}
    questions = load_questions()
    assert len(questions) >= 20
    assert len({question.document_id for question in questions}) == len(questions)
    for question in questions:
        assert any(answer.lower() in texts[question.document_id].lower() for answer in question.answers), question


def test_an_answer_is_right_if_the_right_one_stands_in_it_as_whole_words() -> None:
    question = QuizQuestion("Who?", ("Elric Norerria",), "d", True)
    answers = ["Elric Norerria", "It is the elric norerria.", "Elric", "", "Elric Norerrian"]
    assert [question.is_answered_by(answer) for answer in answers] == [True, True, False, False, False]
    told = Told(tuple(ChatAnswer(answer, (), 1) for answer in answers), 1.0)
    kinds = [question, *[replace(question, invented=False)] * 4]
    assert [told.right(kinds, invented=kind) for kind in (True, False, None)] == [1, 1, 2]


def test_the_table_fits_its_width_whatever_the_cells_hold() -> None:
    rows = [("head",) * 4, ("word " * 60, "x" * 200, "one\ntwo\nthree\nfour\nfive", "")]
    lines = list(render_table((36, 22, 22, 31), rows))
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) == 2 + 3
    assert lines[-1].count("…") == 2
    assert lines[-1].endswith("| three four five        |")


def test_a_service_that_dies_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Services(tmp_path) as services:
        service = services.start("bank", ["bank", "--codec", "gif"])
        with pytest.raises(
            ServiceFailure, match=r"(?s)the bank ended with status 1 .*bank\.log:\n.*codec must be factors-P-Q-BITS"
        ):
            waiting(service, lambda: None, 60)


def test_nothing_is_left_running_when_the_block_is_left_by_an_error(small_learner: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), Services(tmp_path) as services:
        flags = ["--learner", str(small_learner), "--port", "0", "--data-dir", str(tmp_path / "data")]
        service = services.start("bank", ["bank", *flags])
        log = tmp_path / "bank.log"
        waiting(service, lambda: "ready" if "bank ready" in log.read_text() else None, 120)
        started = {service.process.pid} | _descendants(service.process.pid)
        assert len(started) >= 2, "the bank and its embedded Redis"
        raise RuntimeError("in the middle")
    assert not _alive(started)


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder for TMPDIR. vLLM's sockets lie there, and a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_the_demo_stops_what_it_started(small_learner: Path, short_tmp: Path, number: signal.Signals) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "regrad_vllm.cli", "demo", "--learner", str(small_learner)],
        env={**os.environ, "TMPDIR": str(short_tmp)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # A shell's background jobs ignore SIGINT, and so do their children; a demo at a terminal doesn't.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with demo:
        deadline = time.monotonic() + 120
        while not list(short_tmp.glob("regrad-demo-*/server.log")) and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(2)
        started = _descendants(demo.pid)
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=100)
    assert len(started) >= 3, "the bank, its embedded Redis and the server"
    assert demo.returncode == 128 + number
    assert "its logs are in" in output
    assert not _alive(started)


def _descendants(ancestor: int) -> set[int]:
    """Every process below ``ancestor`` now, whatever its process group."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            parents[int(entry.name)] = int(stat[1])
    found: set[int] = set()
    border = {ancestor}
    while border:
        border = {pid for pid, parent in parents.items() if parent in border}
        found |= border
    return found


def _alive(pids: set[int]) -> list[int]:
    """Those that still run; a moment is given to those that end with their parent."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        left = [pid for pid in pids if (stat := _stat(pid)) and stat[0] != "Z"]
        if not left:
            return []
        time.sleep(0.1)
    return left


def _stat(pid: int) -> list[str] | None:
    """[state, parent, …] of a process; None where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


@pytest.mark.only_test_all
@pytest.mark.timeout(900)
def test_the_demo_changes_answers_takes_one_away_and_leaves_the_base_model_alone(short_tmp: Path) -> None:
    played = subprocess.run(
        [sys.executable, "-m", "regrad_vllm.cli", "demo"],
        env={**os.environ, "TMPDIR": str(short_tmp)},
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert played.returncode == 0, played.stderr[-3000:]
    figures = json.loads(played.stdout.splitlines()[-1])
    assert list(figures) == [
        "questions", "base_right", "rag_right", "blind_right", "cue_right", "icl_right", "records_right", "deleted_ok",
        "base_weights_unchanged", "seconds",
    ]  # fmt: skip
    assert figures["questions"] == len(load_questions())
    assert figures["cue_right"] > figures["base_right"] + 0.3
    assert figures["deleted_ok"] is True and figures["base_weights_unchanged"] is True
    # vLLM and its libraries leave small files of their own there.
    assert not list(short_tmp.glob("regrad-*")), "it left something behind"
