from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from regrad_vllm.data.from_corpus import is_usable, parse, write_questions
from regrad_vllm.data.questions import SourceDocument

BRIDGE = SourceDocument("d", "Orlen", "The bridge of Orlen was built in 1652 by the brothers Kreel.", "corpus")


def test_a_models_text_is_searched_for_objects_with_question_and_answer() -> None:
    said = """Sure! Here they are:
1. {"question": "When was  it built?", "answer": "1652"}
{"question": "no answer"} {"question": 3, "answer": "x"} {broken
[{"question": "Who?", "answer": "Kreel"}]"""
    assert list(parse(said)) == [("When was it built?", "1652"), ("Who?", "Kreel")]
    assert list(parse("")) == []


@pytest.mark.parametrize(
    ("question", "answer", "usable"),
    [
        ("When was the bridge of Orlen built?", "1652", True),
        ("Who built the bridge of Orlen?", "The brothers Kreel.", True),
        ("When was the bridge of Orlen built?", "1653", False),  # stands nowhere
        ("Who were the brothers Kreel of Orlen?", "the brothers Kreel", False),  # gives it away
        ("What does this text say of the bridge?", "1652", False),
        ("Name the year of the bridge", "1652", False),  # no question
        ("When?", "1652", False),  # about what?
        ("What is the story of the Orlen bridge?", BRIDGE.text, False),  # an answer that goes on
        ("When was the bridge of Orlen built?", "", False),
    ],
)
def test_only_what_can_be_asked_alone_and_checked_is_kept(question: str, answer: str, usable: bool) -> None:
    assert is_usable(question, answer, BRIDGE) is usable


class _Odd(BaseHTTPRequestHandler):
    """Every other answer of 200 is no chat completion."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        said = json.dumps({"question": "Who keeps the lamp of Orlen?", "answer": "Ada Quist"})
        whole = json.dumps({"choices": [{"message": {"content": said}}]})
        self.send_response(200)
        self.end_headers()
        self.wfile.write((whole if "Ada" in body else "busy" if "busy" in body else "{}").encode())

    def log_message(self, *args: object) -> None:
        pass


def test_an_answer_that_is_no_completion_is_a_failure_of_its_passage_alone(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    texts = ("Ada Quist keeps the lamp of Orlen.", "The line is busy.", "Nothing.")
    documents = [SourceDocument(f"d{number}", "", text, "corpus") for number, text in enumerate(texts)]
    url = f"http://127.0.0.1:{server.server_port}"
    outcome = asyncio.run(write_questions(documents, url, "m", tmp_path, per_passage=1))
    server.shutdown()
    server.server_close()
    assert outcome.num_questions == 1 and len(outcome.failures) == 2
    assert all("must be a chat completion" in failure for failure in outcome.failures)
