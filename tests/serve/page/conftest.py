"""The page in a real browser, in front of a real bank and the real routes for documents. Most tests need no engine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from playwright.sync_api import Browser, Dialog, Page, expect, sync_playwright

from regrad_vllm.serve.api.web_page import WebPage
from tests.client.conftest import bank_process
from tests.serve.documents.conftest import serving

# What the page reads of a server's status before it starts.
STATUS: dict[str, Any] = {
    "learner": {"fingerprint": "0" * 64, "rank": 4, "top_k": 2, "max_documents": 8, "gamma": 1.0,
                "prompts": {"system": "", "icl": "{documents} {question}", "document": "{title}: {text}",
                            "document_untitled": "{text}"}},
    "models": ["m-regrad"], "namespace": "default", "documents": "write", "bank": {"available": True},
}  # fmt: skip


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None and not os.environ.get("CI"):
        pytest.skip("chromium is not installed: apt-get install chromium")
    assert chromium, "CI needs chromium on the PATH: make programs"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()


@contextmanager
def opened(browser: Browser, url: str) -> Iterator[Page]:
    """A tab with the page. It fails the test if a script fails or asks another host."""
    errors: list[str] = []
    hosts: set[str] = set()
    tab = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="dark")
    tab.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda line: errors.append(line.text) if "Content Security Policy" in line.text else None)
    tab.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    tab.goto(f"{url}/regrad/")
    yield tab
    tab.close()
    assert not errors
    assert hosts == {url.split("/")[2]}


class Questions:
    """Answers the questions that the browser asks in a box of its own, and keeps them."""

    def __init__(self, tab: Page) -> None:
        self.asked: list[str] = []
        self.agrees = False
        tab.on("dialog", self._answer)

    def _answer(self, dialog: Dialog) -> None:
        self.asked.append(dialog.message)
        if self.agrees:
            dialog.accept()
        else:
            dialog.dismiss()


@contextmanager
def without_engine(bank_address: str) -> Iterator[str]:
    """The address of the page and the routes for documents. Nothing answers questions there."""

    def add(app: FastAPI) -> None:
        app.mount("/regrad", WebPage())
        app.add_api_route("/v1/regrad/status", lambda: STATUS)
        app.add_api_route("/v1/models", lambda: {"data": [{"id": "m"}]})

    with serving(bank_address, add) as client:
        yield str(client.base_url).removesuffix("/v1/regrad/")


@pytest.fixture(scope="package")
def bank_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bank that keeps past versions."""
    with bank_process(tmp_path_factory.mktemp("bank"), history_seconds=3600) as (_, address):
        yield address


@pytest.fixture(scope="package")
def url(bank_address: str) -> Iterator[str]:
    with without_engine(bank_address) as address:
        yield address


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    """A namespace for one test."""
    return str(abs(hash(request.node.nodeid)))


@pytest.fixture
def tab(url: str, browser: Browser, namespace: str) -> Iterator[Page]:
    """A tab that shows the documents of the test's namespace."""
    with opened(browser, url) as page:
        page.get_by_label("Namespace").fill(namespace)
        page.get_by_label("Namespace").press("Enter")
        page.get_by_role("navigation").get_by_role("link", name="Documents").click()
        yield page
