"""Texts and files added on the page: what they replace, what they leave, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from bank_service.errors import NotFoundError
from regrad_vllm.client import Bank, Document
from tests.client.conftest import bank_process
from tests.serve.page.conftest import Questions, opened, without_engine

PARAGRAPHS = [f"Part {n} of the log. " + "The tide came in and went out again. " * 15 for n in range(3)]


@pytest.fixture
def client(bank_address: str) -> Iterator[Bank]:
    with Bank(bank_address) as made:
        yield made


def ids(client: Bank, namespace: str) -> list[str]:
    return [found.id for found in client.list(namespace=namespace)]


def paste(tab: Page, text: str, id: str) -> None:
    tab.get_by_label("Or paste a text").fill(text)
    tab.get_by_label("Id", exact=True).fill(id)
    tab.get_by_role("button", name="Add text").click()


def drop(tab: Page, name: str, data: bytes) -> None:
    """As files that are dropped: both go the same way."""
    tab.locator("#files").set_input_files({"name": name, "mimeType": "text/plain", "buffer": data})


def says(tab: Page, text: str) -> None:
    expect(tab.locator("#uploads .upload").first).to_contain_text(text)


def test_a_shorter_text_of_the_same_id_leaves_no_old_passages(tab: Page, client: Bank, namespace: str) -> None:
    list(client.ingest([Document("log#9", "Elsewhere."), Document("log#note", "Mine.")], namespace=namespace))
    paste(tab, "\n\n".join(PARAGRAPHS), "log")
    says(tab, "3 of 3 encoded")
    assert ids(client, namespace) == ["log#1", "log#2", "log#3", "log#9", "log#note"]
    paste(tab, "\n\n".join(PARAGRAPHS[:2]), "log")
    says(tab, "Deleted, because the text no longer has them: log#3")
    paste(tab, "It is short now.", "log")
    says(tab, "Deleted, because the text no longer has them: log#1, log#2")
    assert ids(client, namespace) == ["log", "log#9", "log#note"], "those of other sources stay"
    paste(tab, "\n\n".join(PARAGRAPHS[:2]), "log")
    expect(tab.locator("#uploads .upload")).to_have_count(4)
    says(tab, "Deleted, because the text no longer has them: log")
    assert ids(client, namespace) == ["log#1", "log#2", "log#9", "log#note"]


def test_a_shorter_file_leaves_no_old_passages_unless_one_was_refused(tab: Page, client: Bank, namespace: str) -> None:
    lines = [{"text": f"The lamp {n} is red."} for n in range(3)]
    drop(tab, "lamps.jsonl", "\n".join(map(json.dumps, lines)).encode())
    says(tab, "3 of 3 encoded")
    drop(tab, "lamps.jsonl", b'{"text": " "}')
    says(tab, "Not all is stored, so earlier passages stay: lamps.jsonl#2, lamps.jsonl#3")
    drop(tab, "lamps.jsonl", json.dumps(lines[0]).encode())
    says(tab, "Deleted, because the text no longer has them: lamps.jsonl#2, lamps.jsonl#3")
    assert ids(client, namespace) == ["lamps.jsonl#1"]


def test_documents_of_other_sources_are_replaced_only_when_the_user_agrees(
    tab: Page, client: Bank, namespace: str
) -> None:
    given = Document("pier.txt", "The old pier.", metadata={"regrad.source": "/docs"})
    list(client.ingest([given], namespace=namespace))
    questions = Questions(tab)
    drop(tab, "pier.txt", b"The new pier.")
    expect(tab.get_by_text("pier.txt: nothing is added, because its ids are taken.")).to_be_visible()
    assert client.get("pier.txt", namespace=namespace).document.text == "The old pier."
    paste(tab, "The new pier.", "pier.txt")
    expect(tab.get_by_text("nothing is added", exact=False).nth(1)).to_be_visible()
    assert tab.get_by_label("Or paste a text").input_value() == "The new pier."
    questions.agrees = True
    drop(tab, "pier.txt", b"The new pier.")
    says(tab, "1 of 1 encoded")
    drop(tab, "pier.txt", b"The newest pier.")  # its own source now
    expect(tab.locator("#uploads .upload")).to_have_count(2)
    says(tab, "1 of 1 encoded")
    assert client.get("pier.txt", namespace=namespace).document.text == "The newest pier."
    assert questions.asked == ["The bank has documents of other sources with these ids: pier.txt. Replace them?"] * 3


def test_files_that_would_be_stored_otherwise_than_they_are_written_are_refused(
    tab: Page, client: Bank, namespace: str
) -> None:
    drop(tab, "old.txt", "Der Leuchtturmwärter".encode("latin-1"))
    expect(tab.get_by_text("old.txt: only texts in UTF-8 can be added.")).to_be_visible()
    drop(tab, "empty.txt", b" ")
    expect(tab.get_by_text("empty.txt: the file has no text.")).to_be_visible()
    for number in ("1234567890123456789", "9007199254740994", "1.0", "0.12345678901234567890"):
        drop(tab, "n.jsonl", b'{"text": "a"}\n{"id": %s, "text": "b"}' % number.encode())
        expect(tab.get_by_text(f'line 2 has the number {number} in "id"')).to_be_visible()
    with pytest.raises(NotFoundError):  # nothing is stored
        ids(client, namespace)
    drop(tab, "n.jsonl", '{"id": 12, "text": "Leuchtturmwärter", "height": 1.5, "of": [3]}'.encode())
    says(tab, "1 of 1 encoded")
    document = client.get("12", namespace=namespace).document
    assert document.text == "Leuchtturmwärter"
    assert document.metadata == {"height": "1.5", "of": "[3]", "regrad.source": "n.jsonl"}


def test_texts_that_the_learner_cuts_are_counted(tab: Page) -> None:
    drop(tab, "long.jsonl", "\n".join(json.dumps({"text": "word " * count}) for count in (300, 20, 200)).encode())
    says(tab, "3 of 3 encoded, 2 longer than the learner reads")
    paste(tab, "word " * 20, "short")
    says(tab, "1 of 1 encoded")
    expect(tab.locator("#uploads .upload").first).not_to_contain_text("longer")
    tab.locator("#list button").filter(has_text="short").click()
    tab.get_by_role("button", name="Edit").click()
    tab.locator("#document").get_by_label("Text").fill("word " * 300)
    tab.get_by_role("button", name="Save").click()
    expect(tab.get_by_text("Version 2 is in the bank. It is longer than the learner reads.")).to_be_visible()


def test_an_upload_that_fails_names_the_reason_and_deletes_nothing(tmp_path: Path, browser: Browser) -> None:
    with (
        bank_process(tmp_path) as (process, address),
        without_engine(address) as url,
        opened(browser, url) as tab,
    ):
        tab.get_by_role("navigation").get_by_role("link", name="Documents").click()
        paste(tab, "\n\n".join(PARAGRAPHS), "log")
        says(tab, "3 of 3 encoded")

        def after_the_bank_died(route: Route) -> None:
            process.kill()
            process.wait()
            route.continue_()

        tab.route("**/documents/batch*", after_the_bank_died)
        paste(tab, "It is short now.", "log")
        says(tab, "0 of 1 encoded, stopped")
        says(tab, "the gradient bank at")
        expect(tab.locator("#uploads .upload").first).not_to_contain_text("Deleted")
