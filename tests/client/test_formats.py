"""PDF, HTML and DOCX files become the passages that Markdown and plain text of the same words would."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from regrad_vllm.client.corpus import BadInput, CorpusDocument, find_files, read_corpus
from regrad_vllm.client.formats import MAX_FILE_BYTES, MAX_XML_BYTES
from tests.client.made_files import HARBOUR, LAMPS, make_docx, make_html, make_pdf


def _read(folder: Path) -> list[CorpusDocument | BadInput]:
    files, left_out, bad = find_files([folder])
    assert not left_out and not bad
    return list(read_corpus(files))


def _documents(folder: Path) -> list[tuple[str, str, str]]:
    items = _read(folder)
    assert not [item for item in items if isinstance(item, BadInput)]
    return [(item.id, item.title, item.text) for item in items if isinstance(item, CorpusDocument)]


@pytest.mark.parametrize(("name", "make"), [("a.docx", make_docx), ("a.HTML", make_html), ("a.htm", make_html)])
def test_headings_are_titles_and_marks_of_style_are_left_out(tmp_path: Path, name: str, make: object) -> None:
    assert callable(make)
    make(tmp_path / name)
    assert _documents(tmp_path) == [(f"{name}#1", "Orlen", HARBOUR), (f"{name}#2", "Orlen / Lamps", LAMPS)]


def test_the_title_of_an_html_page_without_a_heading_is_the_title(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(
        '<meta charset="iso-8859-1"><title>\n Orlén </title><ul><li>One<li>Two_2</ul>'.encode("latin-1")
    )
    assert _documents(tmp_path) == [("a.html", "Orlén", "* One\n* Two_2")]


def test_the_lines_of_a_pdf_are_joined_and_its_pages_are_paragraphs(tmp_path: Path) -> None:
    make_pdf(tmp_path / "a.pdf", "The har-\nbour of Orlen\nis deep. \nCold, too.", "Its lamps burn oil.")
    assert _documents(tmp_path) == [("a.pdf", "", "The harbour of Orlen is deep.\nCold, too.\n\nIts lamps burn oil.")]


def test_a_pdf_that_only_forbids_printing_is_read(tmp_path: Path) -> None:
    make_pdf(tmp_path / "a.pdf", HARBOUR, password="")
    assert _documents(tmp_path) == [("a.pdf", "", HARBOUR)]


def test_files_that_cannot_be_read_are_named_with_the_reason(tmp_path: Path) -> None:
    make_pdf(tmp_path / "locked.pdf", HARBOUR, password="secret")
    make_pdf(tmp_path / "scan.pdf", "")
    whole = make_pdf(tmp_path / "cut.pdf", HARBOUR).read_bytes()
    (tmp_path / "cut.pdf").write_bytes(whole[:200])
    (tmp_path / "fake.docx").write_bytes(b"PK no")
    with zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("word/document.xml", bytes(MAX_FILE_BYTES + 1))
    with zipfile.ZipFile(tmp_path / "dense.docx", "w", zipfile.ZIP_DEFLATED) as dense:
        dense.writestr("word/document.xml", bytes(MAX_XML_BYTES))
        dense.writestr("word/_rels/document.xml.rels", bytes(1))
        dense.writestr("word/media/image.png", bytes(1))
    with zipfile.ZipFile(tmp_path / "other.docx", "w") as other:
        other.writestr("a.xml", "<a/>")
    for name in ("empty.pdf", "empty.html", "empty.docx"):
        (tmp_path / name).touch()
    (tmp_path / "blank.html").write_text("<p> </p>")
    for name in ("huge.txt", "huge.pdf"):
        with (tmp_path / name).open("wb") as huge:
            huge.truncate(MAX_FILE_BYTES + 1)
    make_html(tmp_path / "good.html")
    items = _read(tmp_path)
    reasons = {Path(item.place).name: item.reason for item in items if isinstance(item, BadInput)}
    assert [item.id for item in items if isinstance(item, CorpusDocument)] == ["good.html#1", "good.html#2"]
    expected = {
        "locked.pdf": "must be readable without a password, it is encrypted; save it without one",
        "scan.pdf": "must hold text, its pages hold images only; run OCR on it first",
        "cut.pdf": "must be a sound PDF file, got: ",
        "fake.docx": "must be a sound DOCX file without a password, it is no ZIP file; save it anew",
        "bomb.docx": "must be at most 67,108,864 bytes unpacked, got 67,108,865; split it",
        "dense.docx": "must be at most 8,388,608 bytes of XML unpacked, got 8,388,609; split it",
        "other.docx": "must be a sound DOCX file, got: ",
        "blank.html": "must hold some text, it is empty",
        "huge.txt": "must be at most 67,108,864 bytes, got 67,108,865; split it",
    }
    expected["huge.pdf"] = expected["huge.txt"]
    expected |= dict.fromkeys(("empty.pdf", "empty.html", "empty.docx"), "must hold some text, it is empty")
    assert reasons.keys() == expected.keys()
    assert all(reasons[name].startswith(reason) for name, reason in expected.items()), reasons


def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pdf(tmp_path / "a.pdf", HARBOUR)
    monkeypatch.setitem(sys.modules, "pypdf", None)
    (bad,) = _read(tmp_path)
    assert str(bad) == (
        f"{tmp_path}/a.pdf: must be read by the package pypdf; run pip install '.[files]' in the project's folder"
    )
