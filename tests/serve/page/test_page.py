"""The page at /regrad/ in a real browser, with a real server and bank behind it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from regrad_vllm.client import Bank, Document
from regrad_vllm.serve.api.web_page import FOLDER
from tests.serve.page.conftest import opened
from tests.serve.support import API_KEY, BASE, BankThread, VllmServer

NAMESPACE = "page"
MAX_LINES = 1500
# Text that would run if the page took it for HTML.
MARKUP = '<img src="x" onerror="document.title=\'run\'">'
DOCUMENTS = [
    {"id": "orlen", "title": "Orlen", "text": "The harbour master of Orlen is Ada Quist."},
    {"id": "kell", "title": MARKUP, "text": f"The tower of Kell is red. {MARKUP}"},
    {"id": "bad", "text": " "},
]
QUESTION = "Who is the harbour master of Orlen?"


@pytest.fixture
def page(server: VllmServer, browser: Browser) -> Iterator[Page]:
    with opened(browser, server.url) as tab:
        yield tab


def log_in(page: Page) -> None:
    page.get_by_label("Key", exact=True).fill(API_KEY)
    page.get_by_role("button", name="Use key").click()
    page.get_by_label("Namespace").fill(NAMESPACE)
    page.get_by_label("Namespace").press("Enter")


def answers(page: Page, method: str) -> Locator:
    """The method's columns, those of the last question first."""
    return page.get_by_role("group", name=method, exact=True)


def ask(page: Page) -> None:
    page.get_by_label("Your question").fill(QUESTION)
    page.get_by_label("Your question").press("Enter")


def all_answered(page: Page, num_questions: int) -> None:
    expect(page.locator(".column[aria-busy=false]")).to_have_count(4 * num_questions)


def test_from_a_pasted_document_to_an_answer_that_changes_without_it(
    server: VllmServer, bank: BankThread, page: Page
) -> None:
    page.get_by_label("Key", exact=True).fill("wrong")
    page.get_by_label("Key", exact=True).press("Enter")
    expect(page.get_by_text("The server refused this key.")).to_be_visible()
    log_in(page)
    expect(page.get_by_text("This namespace has no documents yet")).to_be_visible()

    assert page.locator(".read-only-note:visible").count() == 0, "this server takes changes"

    # Documents: a file with a line that the bank refuses, and a pasted text that is edited.
    page.get_by_role("navigation").get_by_role("link", name="Documents").click()
    file = "\n".join(map(json.dumps, DOCUMENTS)).encode()
    page.locator("#files").set_input_files({"name": "notes.jsonl", "mimeType": "text/plain", "buffer": file})
    expect(page.locator("#uploads").get_by_text("2 of 3 encoded, 1 refused")).to_be_visible()
    page.get_by_label("Or paste a text").fill("Draimdan has a fair.")
    page.get_by_label("Title").fill("Draimdan")
    page.get_by_role("button", name="Add text").click()
    rows = page.locator("#list button")
    expect(rows).to_have_count(3)
    expect(page.get_by_text(MARKUP, exact=True)).to_be_visible()
    rows.filter(has_text="Draimdan").click()
    page.get_by_role("button", name="Edit").click()
    drawer = page.locator("#document")
    drawer.get_by_label("Text").fill("Draimdan has a fair in July.")
    stored = drawer.get_by_label("Metadata").input_value()
    drawer.get_by_label("Metadata").fill("no JSON")
    page.get_by_role("button", name="Save").click()
    expect(drawer.get_by_text("Metadata must be a JSON object")).to_be_visible()
    drawer.get_by_label("Metadata").fill(stored)
    page.get_by_role("button", name="Save").click()
    expect(rows.filter(has_text="v2")).to_have_count(1)
    rows.filter(has_text="Draimdan").click()
    page.get_by_role("button", name="History").click()
    expect(drawer.get_by_text("Nothing earlier is kept")).to_be_visible()  # this bank keeps no past
    page.keyboard.press("Escape")
    page.get_by_label("Search documents").fill("harbour master")
    expect(rows.first).to_contain_text("Orlen")

    # The question: four answers with their times, tokens and documents.
    page.get_by_role("navigation").get_by_role("link", name="Ask").click()
    page.get_by_text("Options").click()
    page.get_by_label("Most tokens").fill("8")
    page.get_by_label("Documents (k)").fill("1")
    ask(page)
    all_answered(page, 1)
    regrad = answers(page, "ReGrad")
    expect(regrad).to_contain_text(re.compile(r"score \d\.\d\d · weight 1\.00"))
    expected = server.post(
        "/v1/chat/completions",
        {"model": BASE, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "temperature": 0,
         "regrad": {"namespace": NAMESPACE, "top_k": 1, "mode": "blind"}},
    ).json()  # fmt: skip
    assert regrad.locator(".answer").inner_text().split() == expected["choices"][0]["message"]["content"].split()
    tokens = {name: int(answers(page, name).locator("dd").nth(1).inner_text().split("t")[0]) for name in
              ("Base", "RAG", "ReGrad", "ReGrad + cue")}  # fmt: skip
    assert tokens["ReGrad"] == expected["usage"]["prompt_tokens"] == tokens["Base"]
    assert tokens["RAG"] > tokens["ReGrad"] and tokens["ReGrad + cue"] > tokens["ReGrad"]

    # The document: its text and origin; without it the answer is another.
    regrad.get_by_role("button", name="Orlen").click()
    expect(page.get_by_role("region", name="Text")).to_have_text(DOCUMENTS[0]["text"])
    expect(page.locator("dialog").get_by_text("notes.jsonl")).to_be_visible()
    page.get_by_role("button", name="Leave out and ask again").click()
    all_answered(page, 2)
    assert regrad.first.locator(".tag").inner_text() == "changed"
    assert answers(page, "Base").first.locator(".tag").inner_text() == "same answer"
    expect(regrad.first.locator(".before")).to_contain_text(regrad.nth(1).locator(".answer").inner_text().strip())

    # Deleted from the bank, and back.
    regrad.nth(1).get_by_role("button", name="Orlen").click()
    page.get_by_role("button", name="Delete and ask again").click()
    page.get_by_role("button", name="Really delete it?").click()
    all_answered(page, 3)
    assert "Orlen" not in regrad.first.locator(".used").inner_text()
    with Bank(bank.address) as client:
        assert sorted(found.id for found in client.list(namespace=NAMESPACE)) == ["draimdan", "kell"]
        page.get_by_role("button", name="Undo").click()
        expect(page.get_by_text("Orlen is back.")).to_be_visible()
        assert client.get("orlen", namespace=NAMESPACE).document.text == DOCUMENTS[0]["text"]
    assert page.title() == "Ask · ReGrad"


def test_the_state_is_asked_for_only_while_it_is_shown_and_a_phone_shows_all(server: VllmServer, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(server.url)))
    log_in(page)
    page.get_by_role("navigation").get_by_role("link", name="State").click()
    expect(page.get_by_role("img", name="Arena: used")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("Requests: running [0-9]+, waiting 0"))).to_be_visible()
    status = server.status()
    assert page.get_by_label("Namespace").input_value() == NAMESPACE and status["namespace"] == "default"
    expect(page.locator("#chart-arena")).to_contain_text(f"{status['arena']['num_records']} gradients")
    expect(page.locator("#facts")).to_contain_text(status["bank"]["codec"])
    page.get_by_role("navigation").get_by_role("link", name="Ask").click()
    page.wait_for_load_state("networkidle")
    asked.clear()
    page.wait_for_timeout(3500)  # longer than the time between two looks at the state
    assert "/metrics" not in asked

    html = page.locator("html")
    expect(html).to_have_attribute("data-theme", "dark")  # the system's colours
    page.get_by_role("button", name="Dark colours").click()
    expect(html).to_have_attribute("data-theme", "light")
    page.set_viewport_size({"width": 360, "height": 740})
    for part in ("Documents", "State", "Ask"):
        page.get_by_role("navigation").get_by_role("link", name=part).click()
        expect(page.get_by_role("heading", name=part, exact=True)).to_be_in_viewport()
        assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_page_that_only_reads_says_what_to_do(server: VllmServer, bank: BankThread, page: Page) -> None:
    with Bank(bank.address) as client:
        list(client.ingest([Document("still", "The bell of Orlen is still.")], namespace="read-only"))
    page.route("**/v1/regrad/status", lambda route: route.fulfill(json={**server.status(), "documents": "read"}))
    page.reload()
    log_in(page)
    page.get_by_label("Namespace").fill("read-only")
    page.get_by_label("Namespace").press("Enter")
    page.get_by_role("navigation").get_by_role("link", name="Documents").click()
    note = page.locator("#documents .read-only-note")
    expect(note).to_contain_text("start the server with --regrad-documents write")
    expect(page.get_by_role("button", name="Add text")).to_be_hidden()
    page.locator("#list button").first.click()
    expect(page.get_by_role("button", name="History")).to_be_visible()
    expect(page.get_by_role("button", name="Edit")).to_be_hidden()
    expect(page.get_by_role("button", name="Delete")).to_be_hidden()


def test_the_files_need_no_key_and_let_nothing_else_in(server: VllmServer) -> None:
    for name in ("", "main.js", "page.css"):
        answer = server.client.get(f"/regrad/{name}", headers={"authorization": ""})
        assert answer.status_code == 200
        assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]
    assert server.client.get("/regrad/%2e%2e/api/web_page.py").status_code == 404


def test_the_page_stays_small() -> None:
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in Path(FOLDER).iterdir())
    assert lines <= MAX_LINES
