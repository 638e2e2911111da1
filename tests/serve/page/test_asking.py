"""Questions on the page, by keyboard alone, with answers that stand in for an engine's."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Page, Route, expect

# All that takes the keyboard and is on the screen, as HTML.
CONTROLS = """[...document.querySelectorAll("a, button, input, textarea, select, summary")]
    .filter((element) => element.checkVisibility({ visibilityProperty: true })).map((element) => element.outerHTML)"""


def answer(route: Route, text: str) -> None:
    """Streams an answer as vLLM does."""
    events = [{"choices": [{"delta": {"content": text}}]}, {"usage": {"prompt_tokens": 3, "completion_tokens": 1}}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    route.fulfill(body=body, content_type="text/event-stream")


@pytest.fixture
def asking(tab: Page) -> Page:
    tab.get_by_role("navigation").get_by_role("link", name="Ask").click()
    return tab


def test_every_control_is_reached_with_tab_and_the_answers_are_spoken(asking: Page) -> None:
    asking.route("**/v1/chat/completions", lambda route: answer(route, "Ada Quist."))
    asking.get_by_text("Options").press("Enter")
    for part, least in (("Documents", 11), ("Ask", 16)):
        asking.get_by_role("navigation").get_by_role("link", name=part).press("Enter")
        expect(asking.get_by_role("heading", name=part, exact=True)).to_be_visible()
        controls = asking.evaluate(CONTROLS)
        assert len(controls) >= least
        reached = set()
        for _ in range(len(controls) + 5):  # the browser's own place comes between the last and the first
            asking.keyboard.press("Tab")
            reached.add(asking.evaluate("document.activeElement.outerHTML"))
        assert [control for control in controls if control not in reached] == []

    asking.get_by_label("Your question").focus()
    asking.keyboard.type("Who is the harbour master?")
    asking.keyboard.press("Enter")
    expect(asking.locator("#spoken")).to_have_text(
        "Base: Ada Quist.. RAG: Ada Quist.. ReGrad: Ada Quist.. ReGrad + cue: Ada Quist."
    )
    expect(asking.locator("#spoken")).to_have_attribute("aria-live", "polite")


def test_only_answers_that_ended_well_are_compared(asking: Page) -> None:
    texts: list[str | None] = ["Ada.", None, "Ada.", "Otto.", "Otto."]
    asked: list[Route] = []

    def reply(route: Route) -> None:
        asked.append(route)
        text = texts[len(asked) - 1]
        if text is None:
            route.fulfill(status=503, json={"error": {"message": "the engine is gone"}})
        else:
            answer(route, text)

    asking.route("**/v1/chat/completions", reply)
    for method in ("RAG", "ReGrad", "ReGrad + cue"):
        asking.get_by_label(method, exact=True).uncheck()
    asking.get_by_label("Your question").fill("Who is it?")
    asking.get_by_label("Your question").press("Enter")
    columns = asking.get_by_role("group", name="Base")
    tags = columns.locator(".tag:visible")

    def again(count: int) -> None:
        expect(asking.locator(".column[aria-busy=false]")).to_have_count(count)
        asking.get_by_role("button", name="Ask again").first.click()
        expect(asking.locator(".column[aria-busy=false]")).to_have_count(count + 1)

    again(1)
    expect(columns.first).to_contain_text("the engine is gone")
    assert tags.count() == 0, "a failed answer is not another one"
    again(2)
    assert tags.count() == 0, "there is nothing to compare with"
    again(3)
    assert re.fullmatch("changed", tags.first.inner_text())
    expect(columns.first.locator(".before")).to_have_text("Before: Ada.")
    again(4)
    expect(tags.first).to_have_text("same answer")
    expect(columns.first.locator(".before")).to_be_hidden()
