"""The rules of axe-core hold in each view of the page, in both colour schemes, on a desk and on a phone."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

pytestmark = [
    pytest.mark.only_test_all,
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm must be on the PATH"),
]


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script of axe-core."""
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "axe-core@4"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "node_modules/axe-core/axe.min.js"


@pytest.fixture(params=[("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)])
def view(request: pytest.FixtureRequest, browser: Browser, url: str, namespace: str) -> Iterator[Page]:
    """A tab of a colour scheme and a width, in a namespace with a document."""
    scheme, width = request.param
    body = {"text": "The harbour master of Orlen is Ada Quist.", "title": "Orlen", "metadata": {"language": "en"}}
    httpx.put(f"{url}/v1/regrad/documents/orlen", params={"namespace": namespace}, json=body).raise_for_status()
    # The page's own policy keeps axe's script out.
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
    page.goto(f"{url}/regrad/")
    page.get_by_label("Namespace").fill(namespace)
    page.get_by_label("Namespace").press("Enter")
    yield page
    page.close()


def test_axe_finds_no_fault(view: Page, axe: Path) -> None:
    view.add_script_tag(path=str(axe))

    def faults() -> list[str]:
        run = "() => axe.run().then(found => found.violations.map(fault => `${fault.id}: ${fault.nodes[0].html}`))"
        found: list[str] = view.evaluate(run)
        return found

    assert view.evaluate("() => { document.body.append(new Image()); return axe.run() }")["violations"], "axe works"
    view.evaluate("() => document.body.lastChild.remove()")
    view.get_by_label("Your question").fill("Who is the harbour master?")
    assert faults() == []
    view.get_by_label("Your question").press("Enter")
    expect(view.locator(".column[aria-busy=false]").first).to_be_visible()
    assert faults() == []
    view.get_by_role("navigation").get_by_role("link", name="Documents").click()
    expect(view.locator("#list button")).to_have_count(1)
    assert faults() == []
    view.locator("#list button").click()
    expect(view.get_by_role("button", name="Edit")).to_be_visible()
    assert faults() == []
    view.get_by_role("button", name="Edit").click()
    assert faults() == []
    view.get_by_role("button", name="Cancel").click()
    view.keyboard.press("Escape")
    view.get_by_role("navigation").get_by_role("link", name="State").click()
    assert faults() == []
