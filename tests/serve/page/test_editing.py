"""One document on the page: edited, deleted and brought back, its history, and answers that come late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from regrad_vllm.client import Bank, Document
from tests.client.conftest import bank_process
from tests.serve.page.conftest import Questions, opened, without_engine


@pytest.fixture
def store(bank_address: str, namespace: str) -> Iterator[Callable[[str, str], None]]:
    """Stores a document in the test's namespace, as another user."""
    with Bank(bank_address) as client:

        def put(id: str, text: str) -> None:
            list(client.ingest([Document(id, text)], namespace=namespace))

        yield put


@pytest.fixture
def text_of(bank_address: str, namespace: str) -> Iterator[Callable[[str], str]]:
    with Bank(bank_address) as client:
        yield lambda id: client.get(id, namespace=namespace).document.text


def open_document(tab: Page, id: str) -> None:
    tab.get_by_label("Search documents").fill("")
    tab.get_by_label("Search by").select_option("prefix")
    tab.locator("#list button").filter(has=tab.get_by_text(id, exact=True)).first.click()


def edit(tab: Page, text: str) -> None:
    tab.get_by_role("button", name="Edit").click()
    tab.locator("#document").get_by_label("Text").fill(text)


def reload_list(tab: Page) -> None:
    tab.get_by_label("Search by").select_option("dense")
    tab.get_by_label("Search by").select_option("prefix")


def held(tab: Page, pattern: str, method: str) -> list[Route]:
    """The calls that are kept waiting, until the test lets them go on."""
    routes: list[Route] = []
    tab.route(pattern, lambda route: routes.append(route) if route.request.method == method else route.fallback())
    return routes


def test_an_edit_overwrites_no_newer_version_and_keeps_what_was_typed(
    tab: Page, store: Callable[[str, str], None], text_of: Callable[[str], str]
) -> None:
    store("pier", "The pier is grey.")
    reload_list(tab)
    open_document(tab, "pier")
    edit(tab, "The pier is green.")
    store("pier", "The pier is gone.")
    tab.get_by_role("button", name="Save").click()
    drawer = tab.locator("#document")
    expect(drawer.get_by_role("alert")).to_contain_text("The document changed meanwhile")
    assert drawer.get_by_label("Text").input_value() == "The pier is green."
    assert text_of("pier") == "The pier is gone."


def test_an_edit_is_left_only_after_a_question(tab: Page, store: Callable[[str, str], None]) -> None:
    store("pier", "The pier is grey.")
    reload_list(tab)
    open_document(tab, "pier")
    asked = Questions(tab).asked
    tab.get_by_role("button", name="Edit").click()
    tab.keyboard.press("Escape")
    expect(tab.locator("#document")).to_be_hidden()
    assert asked == [], "nothing was typed"
    open_document(tab, "pier")
    edit(tab, "The pier is green.")
    for _ in range(3):
        tab.keyboard.press("Escape")
    tab.locator("#document").get_by_role("button", name="Close", exact=True).click()
    expect(tab.locator("#document").get_by_label("Text")).to_have_value("The pier is green.")
    assert asked == ["Your changes are not stored yet. Close all the same?"] * 4


def test_answers_that_come_late_leave_the_open_document_alone(tab: Page, store: Callable[[str, str], None]) -> None:
    for id in ("ash", "beech"):
        store(id, f"A tree: {id}.")
    reload_list(tab)
    Questions(tab).agrees = True
    drawer = tab.locator("#document")

    # Saving one is slow. Meanwhile another is opened and edited.
    saves = held(tab, "**/documents/ash*", "PUT")
    open_document(tab, "ash")
    edit(tab, "A tree: the ash.")
    tab.get_by_role("button", name="Save").click()
    expect(tab.get_by_role("button", name="Encoding…")).to_be_visible()
    tab.keyboard.press("Escape")
    open_document(tab, "beech")
    edit(tab, "A tree: the beech.")
    saves[0].continue_()
    expect(tab.get_by_text("Version 2 is in the bank.")).to_be_visible()
    expect(drawer.get_by_label("Text")).to_have_value("A tree: the beech.")
    tab.keyboard.press("Escape")
    expect(drawer).to_be_hidden()

    # Opening one is slow. Meanwhile another is asked for.
    reads = held(tab, "**/documents/ash*", "GET")
    open_document(tab, "ash")
    open_document(tab, "beech")
    expect(drawer.get_by_role("heading")).to_have_text("beech")
    reads[0].continue_()
    tab.wait_for_timeout(500)
    expect(drawer.get_by_role("heading")).to_have_text("beech")


def delete(tab: Page, id: str) -> None:
    open_document(tab, id)
    tab.get_by_role("button", name="Delete", exact=True).click()
    tab.get_by_role("button", name="Really delete it?").click()
    expect(tab.get_by_text(f"{id} is deleted.")).to_be_visible()


def test_a_deletion_can_be_undone_after_an_undo_that_failed(
    tab: Page, store: Callable[[str, str], None], text_of: Callable[[str], str]
) -> None:
    store("pier", "The pier is grey.")
    reload_list(tab)
    delete(tab, "pier")
    tab.route("**/documents/pier*", lambda route: route.abort(), times=1)
    tab.get_by_role("button", name="Undo").click()
    expect(tab.get_by_text("The server can't be reached.")).to_be_visible()
    tab.get_by_role("button", name="Undo").click()
    expect(tab.get_by_text("pier is back.")).to_be_visible()
    assert text_of("pier") == "The pier is grey."


def test_undo_replaces_no_document_that_came_meanwhile(
    tab: Page, store: Callable[[str, str], None], text_of: Callable[[str], str]
) -> None:
    store("pier", "The pier is grey.")
    reload_list(tab)
    delete(tab, "pier")
    store("pier", "The pier is new.")
    tab.get_by_role("button", name="Undo").click()
    expect(tab.get_by_text("The bank has another pier meanwhile. Delete that first.")).to_be_visible()
    assert text_of("pier") == "The pier is new."


def test_the_history_has_past_versions_with_their_changes(tab: Page, store: Callable[[str, str], None]) -> None:
    for text in ("The pier is grey.", "The pier is green.", "The pier is gone."):
        store("pier", text)
        store("other", text)
    reload_list(tab)
    open_document(tab, "pier")
    tab.get_by_role("button", name="History").click()
    versions = tab.locator(".history li")
    expect(tab.locator(".history")).to_contain_text("Just before that the bank did not have it.")
    expect(versions).to_have_count(3)
    expect(versions.nth(1)).to_contain_text("The pier is green.")
    expect(versions.nth(2)).to_contain_text("The pier is grey.")
    since = [int(line.split("since sequence ")[1].split()[0]) for line in versions.all_inner_texts()]
    assert [since[0] - since[1], since[1] - since[2]] == [2, 2], "each store was one change"


def test_the_history_tells_errors_and_stops_with_the_dialog(tab: Page, store: Callable[[str, str], None]) -> None:
    for n in range(9):
        store("pier", f"The pier has {n} lamps.")
    reload_list(tab)
    open_document(tab, "pier")
    refusal = {"error": {"message": "the bank has too much to do", "param": None, "code": 429}}
    calls: list[Route] = []

    def answer(route: Route) -> None:
        calls.append(route)
        if len(calls) == 3:  # among those that look for the start of a version
            route.fulfill(status=429, json=refusal)
        else:
            route.continue_()

    tab.route("**/v1/regrad/query*", answer)
    tab.get_by_role("button", name="History").click()
    expect(tab.locator(".history .error")).to_have_text("the bank has too much to do")
    expect(tab.locator(".history li")).to_have_count(1)
    tab.get_by_role("button", name="History").click()  # again
    expect(tab.locator(".history")).to_contain_text("Just before that the bank did not have it.")
    expect(tab.locator(".history li")).to_have_count(9)

    tab.unroute("**/v1/regrad/query*")
    tab.keyboard.press("Escape")
    expect(tab.locator("#document")).to_be_hidden()
    slow = held(tab, "**/v1/regrad/query*", "POST")
    open_document(tab, "pier")
    tab.get_by_role("button", name="History").click()
    tab.wait_for_timeout(300)
    tab.keyboard.press("Escape")
    expect(tab.locator("#document")).to_be_hidden()
    slow[0].abort()
    tab.wait_for_timeout(300)
    assert len(slow) == 1
    expect(tab.locator(".history .error")).to_have_count(0)


def test_a_version_from_before_the_kept_past_is_since_a_sequence_or_earlier(tmp_path: Path, browser: Browser) -> None:
    with bank_process(tmp_path) as (process, address), Bank(address) as client:
        for id, text in (("pier", "It is grey."), ("lamp", "It is off."), ("lamp", "It is on.")):
            list(client.ingest([Document(id, text)]))  # the third change ends the past before it
        process.terminate()
        process.wait()
    with bank_process(tmp_path, history_seconds=3600) as (_, address), Bank(address) as client:
        list(client.ingest([Document("pier", "It is green.")]))
        with without_engine(address) as url, opened(browser, url) as tab:
            tab.get_by_role("navigation").get_by_role("link", name="Documents").click()
            open_document(tab, "pier")
            tab.get_by_role("button", name="History").click()
            expect(tab.locator(".history")).to_contain_text("Nothing earlier is kept")
            assert tab.locator(".history li").all_inner_texts() == [
                "Version 2 · since sequence 4",
                "Version 1 · since sequence 3 or earlier\n\nIt is grey.",
            ]
