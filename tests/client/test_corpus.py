"""`regrad ingest` reads documents from files, and reports unusable ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bank_service.wire.limits import MAX_ID_BYTES, MAX_METADATA_PAIRS, MAX_TEXT_BYTES
from regrad_vllm.client.corpus import BadInput, CorpusDocument, find_files, read_corpus


def _read(*paths: Path) -> tuple[list[CorpusDocument], list[BadInput]]:
    files, _, bad = find_files(paths)
    documents = []
    for item in read_corpus(files):
        if isinstance(item, BadInput):
            bad.append(item)
        else:
            documents.append(item)
    return documents, bad


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_ids_are_paths_below_the_folder_with_a_number_where_a_file_has_several_passages(tmp_path: Path) -> None:
    _write(tmp_path / "a.txt", "Short.")
    _write(tmp_path / "sub" / "b.md", "# One\n\nFirst.\n\n# Two\n\nSecond.")
    documents, bad = _read(tmp_path)
    assert not bad
    assert [(document.id, document.title) for document in documents] == [
        ("a.txt", ""),
        ("sub/b.md#1", "One"),
        ("sub/b.md#2", "Two"),
    ]


def test_a_jsonl_line_keeps_its_id_title_and_other_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [{"id": "x", "title": "T", "text": "A.", "year": 1999, "by": "me"}, {"text": "B."}]
    path = _write(tmp_path / "d.jsonl", "\n\n".join(map(json.dumps, lines)) + "\n")
    documents, bad = _read(path)
    assert not bad
    first, second = documents
    assert (first.id, first.title, first.text) == ("x", "T", "A.")
    assert first.metadata == {"year": "1999", "by": "me", "regrad.source": str(path)}
    assert second.id == "d.jsonl#3"
    assert second.metadata == {"regrad.source": str(path), "regrad.file": "d.jsonl"}


def test_null_is_an_absent_field_and_numbers_and_lists_become_text(tmp_path: Path) -> None:
    record = {
        "id": 7, "title": 1984, "text": "A.", "year": 1999, "share": 0.5, "open": True, "by": None,
        "tags": ["a", "é", 3], "metadata": {"by": "me", "place": None},
    }  # fmt: skip
    nulls = dict.fromkeys(("id", "title", "metadata", "year")) | {"text": "B."}
    path = _write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, (record, nulls))))
    (first, second), bad = _read(path)
    assert not bad
    assert (first.id, first.title) == ("7", "1984")
    texts = {"year": "1999", "share": "0.5", "open": "true", "by": "me", "tags": '["a", "é", 3]'}
    assert first.metadata == texts | {"regrad.source": str(path)}, (
        "null doesn't hide the value of the same key in metadata"
    )
    assert second.id.endswith("d.jsonl#2")
    assert (second.title, sorted(second.metadata)) == ("", ["regrad.file", "regrad.source"])


def test_a_number_and_a_string_that_name_the_same_id_are_reported(tmp_path: Path) -> None:
    path = _write(tmp_path / "d.jsonl", '{"id": 7, "text": "A."}\n{"id": "7", "text": "B."}\n')
    _, (twice,) = _read(path)
    assert "id '7' must be unique" in twice.reason


def test_files_that_are_named_have_ids_of_the_paths_they_are_named_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/guide.md", "b/guide.md", "here/guide.md"):
        _write(tmp_path / name, f"The guide {name}.")
    monkeypatch.chdir(tmp_path / "here")
    paths = [Path("guide.md"), Path("../a/./guide.md"), Path("../a/../b/guide.md")]
    documents, bad = _read(*paths)
    assert not bad
    assert [document.id for document in documents] == ["guide.md", "a/guide.md", "b/guide.md"]
    (below,), _ = _read(tmp_path / "here" / "guide.md")
    assert below.id == "guide.md", "the same file has the same id, named absolutely or not"
    (outside,), _ = _read(tmp_path / "a" / "guide.md")
    assert outside.id == f"{tmp_path}/a/guide.md".lstrip("/")


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    documents, _ = _read(_write(tmp_path / "a.txt", "\ufeffHello there."))
    assert documents[0].text == "Hello there."


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object, got list"),
        ('{"body": "x"}', "must have a field 'text'; it has ['body']"),
        ('{"text": 3}', "text must be a string, got int"),
        ('{"text": "  "}', "document.text must not be empty or blank"),
        ('{"text": "a\\u0000b"}', "document.text must not contain control characters"),
        ('{"text": "x", "by": "a\\u0092b"}', "document.metadata must not contain control characters"),
        ('{"text": "x", "id": ""}', "id must not be empty"),
        (
            json.dumps({"text": "x", "id": "i" * (MAX_ID_BYTES + 1)}),
            f"document.id must be at most {MAX_ID_BYTES} bytes",
        ),
        (json.dumps({"text": "x" * (MAX_TEXT_BYTES + 1)}), "document.text must be at most"),
        ('{"text": null}', "must have a field 'text', it is null"),
        ('{"text": "x", "id": true}', "id must be a string or a number, got bool"),
        ('{"text": "x", "title": ["a"]}', "title must be a string or a number, got list"),
        ('{"text": "x", "title": NaN}', "NaN is no value of JSON; write null"),
        ('{"text": "x", "id": 1e400}', "id must be within ±1.8e308 as a number"),
        ('{"text": "x", "size": [1, -1e400]}', "field 'size' must be within ±1.8e308 as a number"),
        ('{"text": "x", "by": {"name": "me"}}', "field 'by' must be a string, a number or a list of these"),
        ('{"text": "x", "metadata": {"tags": [["a"]]}}', "field 'tags' must be a string, a number or a list of these"),
        ('{"text": "x", "metadata": 1}', "metadata must be an object"),
        (
            json.dumps({"text": "x"} | {f"k{n}": "v" for n in range(MAX_METADATA_PAIRS + 1)}),
            "document.metadata must have at most",
        ),
        ('{"text": "\\ud800"}', "must be valid Unicode"),
        ('{"text": "x", "k": "\\ud800"}', "must be valid Unicode"),
        ("[" * 100_000, "must be a JSON object"),
        (b'{"text": "\xff"}', "must be UTF-8, byte 10 is not"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_by_file_and_number(tmp_path: Path, line: str | bytes, reason: str) -> None:
    content = (
        b'{"text": "good"}\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n{"text": "also good"}\n'
    )
    path = _write(tmp_path / "d.jsonl", content)
    documents, bad = _read(path)
    assert [document.text for document in documents] == ["good", "also good"]
    assert len(bad) == 1
    assert bad[0].place == f"{path}:2"
    assert reason in bad[0].reason


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "must hold some text, it is empty"),
        ("a.md", b" \n", "must hold some text, it is empty"),
        ("a.md", b"# Only a heading\n", "must hold some text, it has headings only"),
        ("a.txt", b"GIF89a\0\1", "holds a zero byte at offset 6"),
        ("a.txt", b"caf\xe9", "must be UTF-8, byte 3 is not"),
        ("a.jsonl", b"\n\n", "one JSON object a line"),
        ("a.rtf", b"{", "its ending must be one of .txt, .md, .jsonl, .pdf, .html, .htm, .docx"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = _write(tmp_path / name, content)
    documents, bad = _read(path)
    assert not documents
    assert [item.place for item in bad] == [str(path)]
    assert reason in bad[0].reason


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl"])
def test_stray_control_characters_are_mended_and_counted(tmp_path: Path, name: str) -> None:
    text = "It\x92s \x93so\x94\x81.\x08 Wait\x85 \x1b[1;31mno\x7f."
    content = json.dumps({"text": text, "title": "\x80 5"}) + "\n" if name == "a.jsonl" else text + "\n\x1a"
    (document,), bad = _read(_write(tmp_path / name, content))
    assert not bad
    assert document.text == "It’s “so”. Wait… no."
    assert document.title == ("€ 5" if name == "a.jsonl" else "")
    assert document.num_mended == 9


def test_the_control_characters_of_a_file_are_counted_once(tmp_path: Path) -> None:
    documents, _ = _read(_write(tmp_path / "a.md", "# It\x92s\n\nOne\x85\n\n# Two\n\nTwo."))
    assert [(document.title, document.num_mended) for document in documents] == [("It’s", 2), ("Two", 0)]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    _, bad = _read(tmp_path / "nowhere")
    assert bad == [BadInput(str(tmp_path / "nowhere"), "no such file or folder")]


def test_what_an_ingest_adds_takes_no_room_from_a_documents_own_metadata(tmp_path: Path) -> None:
    own = {f"k{n}": "v" for n in range(MAX_METADATA_PAIRS)}
    (document,), bad = _read(_write(tmp_path / "d.jsonl", json.dumps({"text": "x"} | own)))
    assert not bad
    assert own.items() < document.metadata.items()


def test_the_source_of_what_a_bank_has_printed_is_the_file_that_it_is_in_now(tmp_path: Path) -> None:
    printed = {"id": "a", "text": "x", "metadata": {"regrad.source": "/old", "regrad.file": "old.md", "by": "me"}}
    path = _write(tmp_path / "d.jsonl", json.dumps(printed))
    (document,), _ = _read(path)
    assert document.metadata == {"by": "me", "regrad.source": str(path)}


def test_a_file_that_is_given_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "docs" / "a.txt", "Text.")
    path = _write(tmp_path / "docs" / "b.jsonl", '{"id": "x", "text": "A."}')
    (tmp_path / "link").symlink_to("docs")
    monkeypatch.chdir(tmp_path / "docs")
    documents, bad = _read(tmp_path / "docs", Path("."), tmp_path / "link")
    assert not bad
    assert [document.id for document in documents] == ["a.txt", "x"]
    assert {document.metadata["regrad.source"] for document in documents} == {str(tmp_path / "docs")}
    documents, bad = _read(tmp_path / "docs", Path("b.jsonl"))
    assert not bad, "the same line of the same file is no second document"
    assert path.exists()


def test_a_link_to_a_file_is_one_source_whatever_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(".")
    for version in ("v1.md", "v2.md"):
        _write(tmp_path / version, f"Text of {version}.")
        (tmp_path / "current.md").unlink(missing_ok=True)
        (tmp_path / "current.md").symlink_to(version)
        (document,), _ = _read(tmp_path / "link" / "current.md")
        assert document.text == f"Text of {version}."
        assert document.metadata["regrad.source"] == f"{tmp_path}/current.md"


def test_a_pipe_is_refused_because_it_can_be_read_only_once(tmp_path: Path) -> None:
    pipe = tmp_path / "a.jsonl"
    os.mkfifo(pipe)
    _, (bad,) = _read(pipe)
    assert (bad.place, bad.reason) == (str(pipe), "must be a regular file; save what it gives to one")


def test_what_a_folder_holds_and_is_not_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    for name in ("a.txt", "closed/b.txt", "blind/c.txt"):
        _write(tmp_path / "inside" / name, "Text.")
    os.mkfifo(tmp_path / "inside" / "pipe.txt")
    (tmp_path / "inside" / "gone.txt").symlink_to("nowhere")
    (tmp_path / "inside" / "up").symlink_to("..", target_is_directory=True)
    (tmp_path / "inside" / "closed").chmod(0)
    (tmp_path / "inside" / "blind").chmod(0o444)
    with _no_superuser():
        documents, bad = _read(Path("inside"), Path("inside/closed/b.txt"))
    for name in ("closed", "blind"):
        (tmp_path / "inside" / name).chmod(0o755)
    assert [document.id for document in documents] == ["a.txt"]
    assert sorted(map(str, bad)) == [
        "inside/blind/c.txt: can't be read: Permission denied",
        "inside/closed/b.txt: can't be read: Permission denied",
        "inside/closed: can't be read: Permission denied",
        "inside/gone.txt: no such file or folder",
        "inside/pipe.txt: must be a regular file; save what it gives to one",
        "inside/up: is a link to a folder, which isn't followed; name it as a path of its own",
    ]
    (tmp_path / "inside" / "pipe.txt").unlink()
    documents, _ = _read(Path("inside/up"))
    assert {document.id for document in documents} == {
        f"inside/{name}" for name in ("a.txt", "blind/c.txt", "closed/b.txt")
    }


def test_a_linked_folder_that_is_given_too_is_read_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "docs" / "sub" / "a.txt", "Text.")
    _write(tmp_path / "other" / "b.txt", "Text.")
    (tmp_path / "docs" / "link").symlink_to("../other")
    (tmp_path / "docs" / "sub" / "up").symlink_to("..")
    _, (bad,) = _read(Path("docs"))
    assert (bad.place, bad.source) == ("docs/link", ""), "it makes no source incomplete"
    documents, none = _read(Path("docs"), Path("docs/link"))
    assert not none
    assert [document.id for document in documents] == ["sub/a.txt", "b.txt"]


@contextmanager
def _no_superuser() -> Iterator[None]:
    """Root reads closed folders, so it becomes nobody meanwhile."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_an_id_that_occurs_twice_is_reported_with_both_places(tmp_path: Path) -> None:
    path = _write(tmp_path / "d.jsonl", '{"id": "x", "text": "A."}\n{"id": "x", "text": "B."}\n')
    documents, bad = _read(path)
    assert [document.text for document in documents] == ["A."]
    assert str(bad[0]) == f"{path}:2: id 'x' must be unique, {path}:1 has it too; rename one"


def test_other_files_in_a_folder_are_left_out_and_reported_hidden_ones_ignored(tmp_path: Path) -> None:
    _write(tmp_path / "a.txt", "Text.")
    picture = _write(tmp_path / "b.png", b"\x89PNG")
    _write(tmp_path / ".git" / "c.txt", "hidden")
    files, left_out, bad = find_files([tmp_path])
    assert [file.id for file in files] == ["a.txt"]
    assert left_out == [picture]
    assert not bad


def test_a_text_file_beyond_one_documents_limit_is_cut_into_passages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = "The harbour master of Orlen counts every boat twice before noon. "
    path = _write(tmp_path / "long.txt", sentence * (2 * MAX_TEXT_BYTES // len(sentence)))
    documents, bad = _read(path)
    assert not bad
    assert len(documents) > 100
    assert documents[-1].id == f"long.txt#{len(documents)}"
