"""`regrad ingest` removes what a source put into the bank and no longer holds, and nothing of anybody else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from regrad_vllm.cli import main
from regrad_vllm.cli.connection import connect
from regrad_vllm.client import Bank, Document

Ingest = Callable[..., tuple[int, str, str]]


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    return f"left.{request.node.name[-50:]}".replace("[", ".").strip("]")


@pytest.fixture
def ingest(
    address: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Ingest:
    """Runs `regrad ingest` in a folder of its own: (exit status, output, notes)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path, namespace: str = namespace) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["ingest", *map(str, arguments), "--bank", address, "--namespace", namespace])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def ids(address: str, namespace: str) -> Callable[..., list[str]]:
    def read(namespace: str = namespace) -> list[str]:
        with Bank(address) as bank:
            return [entry.id for entry in bank.list(namespace=namespace)]

    return read


Ids = Callable[..., list[str]]


def _guide(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"# Part {n}\n\nPart {n} of {path}.\n\n" for n in range(1, number + 1)))
    return path


def _lines(path: str, *records: dict[str, object] | str) -> Path:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    Path(path).write_text("".join(f"{line}\n" for line in lines))
    return Path(path)


def test_a_document_of_another_source_stays_though_its_id_looks_like_the_next_passage(ingest: Ingest, ids: Ids) -> None:
    ingest(_lines("other.jsonl", {"id": "guide.md#3", "text": "Another source."}, {"id": "guide.md", "text": "Too."}))
    status, out, notes = ingest(_guide(Path("guide.md"), 2), "--delete-missing")
    assert (status, out) == (0, "2 created, 0 updated, 0 unchanged\n")
    assert "of another source or an earlier version, so not removed: guide.md, guide.md#3\n" in notes
    assert ids() == ["guide.md", "guide.md#1", "guide.md#2", "guide.md#3"]


def test_no_document_of_others_is_asked_for_where_there_are_none(
    ingest: Ingest, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("one call for each file")

    monkeypatch.setattr(Bank, "get", refuse)
    for number in (3, 1):
        assert ingest(_guide(Path("guide.md"), number), _guide(Path("docs/other.md"), 2))[0] == 0
    assert ids() == ["docs/other.md#1", "docs/other.md#2", "guide.md"]


@pytest.mark.parametrize("gap", ["", json.dumps({"id": "own", "text": "own"}), "{bad"], ids=["blank", "own-id", "bad"])
def test_all_lines_that_a_file_no_longer_holds_go_whatever_lay_between_them(ingest: Ingest, ids: Ids, gap: str) -> None:
    one, two, four, five = ({"text": text} for text in ("one", "two", "four", "five"))
    ingest(_lines("faq.jsonl", one, two, gap, four, five), "--skip-bad")
    assert {"faq.jsonl#1", "faq.jsonl#2", "faq.jsonl#4", "faq.jsonl#5"} <= set(ids())
    _, out, _ = ingest(_lines("faq.jsonl", one, *([gap] if "own" in gap else [])))
    assert out.endswith("unchanged, 3 removed that their files no longer hold\n")
    assert ids() == ["faq.jsonl#1", *(["own"] if "own" in gap else [])]


def test_passages_behind_a_gap_go_too_as_after_a_removal_that_was_interrupted(
    ingest: Ingest, ids: Ids, address: str, namespace: str
) -> None:
    ingest(_guide(Path("guide.md"), 6))
    with Bank(address) as bank:
        bank.delete("guide.md#3", namespace=namespace)
    ingest(_guide(Path("guide.md"), 2))
    assert ids() == ["guide.md#1", "guide.md#2"]


def test_a_document_with_an_own_id_is_named_and_removed_only_on_request(ingest: Ingest, ids: Ids) -> None:
    kept, gone = {"id": "kept", "text": "kept"}, {"id": "faq.jsonl#7", "text": "gone"}
    ingest(_lines("faq.jsonl", kept, gone))
    status, out, notes = ingest(_lines("faq.jsonl", kept))
    assert (status, out) == (0, "0 created, 0 updated, 1 unchanged\n")
    assert "no longer held by their source, but not removed: faq.jsonl#7; --delete-missing removes them\n" in notes
    assert ids() == ["faq.jsonl#7", "kept"]
    status, out, _ = ingest("faq.jsonl", "--delete-missing")
    assert (status, out) == (0, "0 created, 0 updated, 1 unchanged, 1 removed that their files no longer hold\n")
    assert ids() == ["kept"]


def test_a_line_that_cannot_be_used_now_keeps_what_it_was(ingest: Ingest, ids: Ids) -> None:
    ingest(_lines("faq.jsonl", {"text": "one"}, {"text": "two"}, {"id": "own", "text": "own"}, {"text": "four"}))
    status, _, notes = ingest(_lines("faq.jsonl", {"text": "one"}, "{bad", "{bad"), "--skip-bad", "--delete-missing")
    assert status == 1
    assert "but not removed: own; some of its input can't be used\n" in notes
    assert ids() == ["faq.jsonl#1", "faq.jsonl#2", "own"], "the file has no fourth line any more"
    ingest(_guide(Path("guide.md"), 2))
    Path("guide.md").write_bytes(b"\xff")
    ingest("guide.md", "faq.jsonl", "--skip-bad", "--delete-missing")
    assert {"guide.md#1", "guide.md#2"} <= set(ids())


def test_input_that_becomes_unusable_after_the_check_is_named(ingest: Ingest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gone", "good", "broken"):
        _guide(Path(f"docs/{name}.md"), 1)

    def connect_later(bank: str) -> AbstractContextManager[Bank]:
        Path("docs/gone.md").unlink()
        Path("docs/broken.md").write_bytes(b"\xff")
        return connect(bank)

    monkeypatch.setattr("regrad_vllm.cli.ingest.connect", connect_later)
    status, out, notes = ingest("docs")
    assert (status, out) == (1, "1 created, 0 updated, 0 unchanged\n")
    assert "docs/gone.md: no such file or folder\n" in notes
    assert "docs/broken.md: must be UTF-8" in notes
    assert "2 inputs became unusable after the check; mend and ingest again" in notes


def test_the_documents_of_a_file_that_a_folder_has_lost_are_removed_on_request(ingest: Ingest, ids: Ids) -> None:
    old = _guide(Path("docs/old.md"), 2)
    _guide(Path("docs/sub/guide.md"), 1)
    ingest("docs")
    old.rename("docs/new.md")
    status, _, notes = ingest("docs")
    assert status == 0
    assert "but not removed: old.md#1, old.md#2; --delete-missing removes them\n" in notes
    assert ids() == ["new.md#1", "new.md#2", "old.md#1", "old.md#2", "sub/guide.md"]
    ingest("docs/sub", "--delete-missing")
    assert "old.md#1" in ids(), "that folder is another source"
    ingest("docs", "--delete-missing")
    assert ids() == ["guide.md", "new.md#1", "new.md#2", "sub/guide.md"]


def test_a_link_to_a_folder_keeps_no_missing_document(ingest: Ingest, ids: Ids) -> None:
    old = _guide(Path("docs/old.md"), 1)
    _guide(Path("docs/new.md"), 1)
    ingest("docs")
    old.unlink()
    Path("docs/link").symlink_to("..")
    ingest("docs", "--skip-bad", "--delete-missing")
    assert ids() == ["new.md"]


def test_the_documents_of_a_folder_that_became_a_link_stay(ingest: Ingest, ids: Ids) -> None:
    for name in ("sub/a.md", "b.md"):
        _guide(Path("docs", name), 1)
    ingest("docs")
    Path("docs/sub").rename("moved")
    Path("docs/sub").symlink_to("../moved")
    ingest("docs", "--skip-bad", "--delete-missing")
    assert ids() == ["b.md", "sub/a.md"]


def test_a_folder_is_one_source_by_whatever_path_it_is_named(
    ingest: Ingest, ids: Ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = _guide(Path("docs/guide.md"), 4)
    ingest("docs")
    Path("link").symlink_to("docs")
    for number, path in ((3, "link"), (2, tmp_path / "docs")):
        _guide(guide, number)
        ingest(path)
        assert len(ids()) == number
    monkeypatch.chdir("docs")
    Path("guide.md").write_text("Only this.")
    ingest(".")
    assert ids() == ["guide.md"]


def test_files_of_one_name_in_two_places_are_two_sources_unless_they_are_named_one(ingest: Ingest, ids: Ids) -> None:
    _guide(Path("here/guide.md"), 4)
    _guide(Path("there/guide.md"), 2)
    ingest("here")
    status, out, notes = ingest("there", "--delete-missing")
    assert (status, out) == (0, "0 created, 2 updated, 0 unchanged\n")
    assert "of another source or an earlier version, so not removed: guide.md#3\n" in notes
    assert len(ids()) == 4
    ingest("here", "--source", "handbook")
    ingest("there", "--source", "handbook")
    assert ids() == ["guide.md#1", "guide.md#2"]
    with pytest.raises(SystemExit):
        ingest("here", "--source", " ")


def test_only_the_namespace_of_the_ingest_loses_documents(ingest: Ingest, ids: Ids, namespace: str) -> None:
    other = f"{namespace[:60]}.b"
    for name in (namespace, other):
        ingest(_guide(Path("guide.md"), 3), namespace=name)
    ingest(_guide(Path("guide.md"), 1))
    assert ids() == ["guide.md"]
    assert len(ids(other)) == 3


def test_documents_without_a_source_stay_and_get_one_when_their_file_is_ingested(
    ingest: Ingest, ids: Ids, address: str, namespace: str
) -> None:
    guide = _guide(Path("guide.md"), 2)
    with Bank(address) as bank:  # as an earlier version stored them
        texts = {n: f"Part {n} of guide.md." for n in (1, 2, 3, 4)}
        documents = [Document(f"guide.md#{n}", text, f"Part {n}") for n, text in texts.items()]
        digest = list(bank.ingest(documents, namespace=namespace))[0].gradient_digest
        status, out, notes = ingest(guide, "--delete-missing")
        assert (status, out) == (0, "0 created, 2 updated, 0 unchanged\n")
        assert "so not removed: guide.md#3\n" in notes
        assert bank.get("guide.md#1", namespace=namespace).gradient_digest == digest, "it is not encoded again"
        _guide(guide, 1)
        ingest(guide)
        assert ids() == ["guide.md", "guide.md#3", "guide.md#4"]


def test_a_moved_file_takes_its_documents_along(ingest: Ingest, ids: Ids) -> None:
    _guide(Path("a/guide.md"), 3)
    ingest("a")
    shutil.move("a", "b")
    assert ingest("b")[1] == "0 created, 3 updated, 0 unchanged\n"
    _guide(Path("b/guide.md"), 2)
    ingest("b")
    assert ids() == ["guide.md#1", "guide.md#2"]
