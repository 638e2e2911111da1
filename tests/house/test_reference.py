"""The reference in the documentation is the code's."""

from __future__ import annotations

from pathlib import Path

import pytest

from bank_service.values.config import BankConfig
from regrad_vllm.cli.reference import document_schema, main, with_reference
from regrad_vllm.flags import settings_of
from regrad_vllm.serve.settings import Settings, variable
from tests.house.pages import ROOT, pages


def test_the_committed_pages_are_what_the_code_makes() -> None:
    made = {page: page.read_text("utf-8") for page in pages() if "<!-- made: " in page.read_text("utf-8")}
    assert made
    stale = [str(page.relative_to(ROOT)) for page, text in made.items() if with_reference(text) != text]
    assert not stale, "run make docs"


def test_the_committed_schema_is_what_the_code_makes() -> None:
    assert (ROOT / "docs" / "openapi.json").read_text("utf-8") == document_schema(), "run make docs"


def test_each_setting_stands_in_the_pages() -> None:
    text = "\n".join(page.read_text("utf-8") for page in pages())
    missing = [setting.name for setting in settings_of(BankConfig) if f"| `{flag(setting.name)}` |" not in text]
    missing += [setting.name for setting in settings_of(Settings) if f"| `{variable(setting.name)}` |" not in text]
    assert not missing


def test_only_the_marked_part_of_a_page_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- made: bank-settings -->\nstale line\n<!-- end -->\nafter\n", "utf-8")
    (tmp_path / "other.md").write_text("no mark\n", "utf-8")
    assert main([str(tmp_path)]) == 0
    text = page.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n") and "stale line" not in text
    assert "| `--data-dir` | ~/.local/share/regrad/bank |" in text
    assert capsys.readouterr().out == f"{page}\n"


def test_a_mark_that_names_nothing_is_an_error() -> None:
    with pytest.raises(KeyError, match="weather"):
        with_reference("<!-- made: weather -->\n<!-- end -->\n")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
