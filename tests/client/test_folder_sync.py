"""`regrad sync` makes a bank hold what a folder holds, names what it skips, and deletes on request only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from regrad_vllm.cli import main
from regrad_vllm.client import Bank, Document
from regrad_vllm.client.corpus import CorpusFile
from regrad_vllm.client.folder_reader import FolderReader
from regrad_vllm.client.folder_sync import FolderSync
from regrad_vllm.data.token_counts import count_tokens
from tests.client.made_files import HARBOUR, make_docx, make_html, make_pdf

Regrad = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    return f"sync.{request.node.name[-50:]}"


@pytest.fixture
def regrad(
    address: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Regrad:
    """Runs a command in a folder with `docs` in it: (exit status, lines of output, notes)."""
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()

    def run(*arguments: str) -> tuple[int, list[str], str]:
        capsys.readouterr()
        settle = ["--settle", "0.05"] if arguments[0] == "sync" else []
        status = main([*arguments, *settle, "--bank", address, "--namespace", namespace])
        out, notes = capsys.readouterr()
        return status, out.splitlines(), notes

    return run


@pytest.fixture
def versions(address: str, namespace: str) -> Callable[[], dict[str, int]]:
    def read() -> dict[str, int]:
        with Bank(address) as bank:
            return {entry.id: entry.version for entry in bank.list(namespace=namespace)}

    return read


Versions = Callable[[], dict[str, int]]


def _guide(name: str, number: int) -> None:
    Path("docs", name).write_text("".join(f"# Part {n}\n\nPart {n} of the guide.\n\n" for n in range(1, number + 1)))


def test_a_dry_run_shows_what_a_sync_then_does(regrad: Regrad, versions: Versions) -> None:
    _guide("guide.md", 2)
    Path("docs/old.txt").write_text("Old.")
    shown = ["guide.md#1", "guide.md#2", "old.txt"]
    status, out, _ = regrad("sync", "docs", "--dry-run")
    assert (status, out[:-1]) == (0, [f"would create {id}" for id in shown])
    assert out[-1] == "dry run, nothing changed: 3 created, 0 updated, 0 unchanged, 0 deleted"
    with pytest.raises(Exception, match="namespace"):
        versions()
    status, out, _ = regrad("sync", "docs")
    assert (status, out) == (0, [f"created {id}" for id in shown] + ["3 created, 0 updated, 0 unchanged, 0 deleted"])
    Path("docs/guide.md").write_text(Path("docs/guide.md").read_text().replace("Part 2 of", "Section 2 of"))
    Path("docs/old.txt").rename("docs/new.txt")
    before = versions()
    status, out, notes = regrad("sync", "docs", "--dry-run", "--delete")
    changes = ["update guide.md#2", "create new.txt", "delete old.txt"]
    assert (status, out[:-1]) == (0, [f"would {change}" for change in changes])
    assert versions() == before
    status, out, _ = regrad("sync", "docs", "--delete")
    assert out == ["updated guide.md#2", "created new.txt", "deleted old.txt",
                   "1 created, 1 updated, 1 unchanged, 1 deleted"]  # fmt: skip
    assert versions() == {"guide.md#1": 1, "guide.md#2": 2, "new.txt": 1}
    assert regrad("sync", "docs", "--delete")[1] == ["0 created, 0 updated, 3 unchanged, 0 deleted"]


def test_an_ingest_and_a_sync_of_one_folder_agree(regrad: Regrad, versions: Versions) -> None:
    _guide("guide.md", 3)
    make_docx(Path("docs/a.docx"))
    make_html(Path("docs/a.html"))
    make_pdf(Path("docs/a.pdf"), HARBOUR)
    Path("docs/faq.jsonl").write_text('{"id": "own", "text": "One."}\n{"text": "Two."}\n')
    assert regrad("ingest", "docs")[0] == 0
    before = versions()
    assert len(before) == 10
    assert regrad("sync", "docs", "--delete")[:2] == (0, ["0 created, 0 updated, 10 unchanged, 0 deleted"])
    assert regrad("ingest", "docs")[1] == ["0 created, 0 updated, 10 unchanged"]
    assert versions() == before


def test_nothing_is_deleted_unless_it_is_asked_for(regrad: Regrad, versions: Versions) -> None:
    _guide("guide.md", 3)
    Path("docs/faq.jsonl").write_text('{"id": "own", "text": "One."}\n{"text": "Two."}\n')
    regrad("sync", "docs")
    _guide("guide.md", 1)
    Path("docs/faq.jsonl").unlink()
    everything = {"guide.md", "guide.md#1", "guide.md#2", "guide.md#3", "own", "faq.jsonl#2"}
    for arguments in (["--dry-run"], []):
        status, _, notes = regrad("sync", "docs", *arguments)
        assert status == 0
        assert "no longer in the folder, but not deleted: faq.jsonl#2, guide.md#1" in notes
    assert versions().keys() == everything
    regrad("sync", "docs", "--delete")
    assert versions().keys() == {"guide.md"}


def test_only_documents_of_this_folder_are_deleted(
    regrad: Regrad, versions: Versions, address: str, namespace: str
) -> None:
    Path("docs/mine.txt").write_text("Mine.")
    Path("docs/kept.txt").write_text("Kept.")
    Path("other").mkdir()
    Path("other/theirs.txt").write_text("Theirs.")
    regrad("sync", "docs")
    regrad("sync", "other")
    with Bank(address) as bank:
        list(bank.ingest([Document("mine.txt#2", "By a program.")], namespace=namespace))
    Path("docs/mine.txt").unlink()
    assert regrad("sync", "docs", "--delete")[1] == ["deleted mine.txt", "0 created, 0 updated, 1 unchanged, 1 deleted"]
    assert versions().keys() == {"kept.txt", "mine.txt#2", "theirs.txt"}


def test_a_folder_without_a_document_deletes_nothing(regrad: Regrad, versions: Versions) -> None:
    """As a drive leaves it that isn't mounted."""
    _guide("guide.md", 2)
    regrad("sync", "docs")
    Path("docs/guide.md").unlink()
    for name in (None, "empty.txt"):
        if name:
            Path("docs", name).touch()
        for flag in ("--dry-run", "--delete"):
            status, out, notes = regrad("sync", "docs", "--delete", flag)
            assert (status, out[-1][-33:]) == (1, "0 updated, 0 unchanged, 0 deleted")
            assert "not deleted: guide.md#1, guide.md#2; --delete needs a folder with a document" in notes
    assert versions().keys() == {"guide.md#1", "guide.md#2"}


def test_the_documents_of_a_folder_that_became_a_link_stay(regrad: Regrad, versions: Versions) -> None:
    Path("docs/sub").mkdir()
    for name in ("sub/a.txt", "sub.txt", "b.txt"):
        Path("docs", name).write_text("Text.")
    Path("docs/sub/faq.jsonl").write_text('{"id": "own", "text": "One."}\n')
    regrad("sync", "docs")
    Path("docs/sub").rename("moved")
    Path("docs/sub").symlink_to("../moved")
    Path("docs/sub.txt").unlink()
    assert regrad("sync", "docs", "--delete")[1][0] == "deleted sub.txt"
    assert versions().keys() == {"sub/a.txt", "own", "b.txt"}


def test_what_is_away_or_short_for_a_moment_only_stays(
    regrad: Regrad, versions: Versions, address: str, namespace: str
) -> None:
    """Others write to the folder while a sync reads its last file."""
    _guide("guide.md", 3)
    for name in ("a.txt", "gone.txt", "z.txt"):
        Path("docs", name).write_text("Text.")
    Path("docs/faq.jsonl").write_text('{"id": "own", "text": "One."}\n{"text": "Two."}\n')
    regrad("sync", "docs")
    before = versions()
    _guide("guide.md", 1)
    for name in ("a.txt", "faq.jsonl"):
        Path("docs", name).rename(name)
    Path("docs/gone.txt").unlink()
    Path("docs/z.txt").write_text("The last file.")

    def count(text: str) -> int:
        if text == "The last file.":
            _guide("guide.md", 3)
            for name in ("a.txt", "faq.jsonl"):
                Path(name).rename(Path("docs", name))
        return count_tokens(text)

    sync = FolderSync(Path("docs"), "", namespace, FolderReader(count), settle_s=0.0)
    with Bank(address) as bank:
        outcome = sync.run(bank, delete=True, dry_run=False, tell=lambda *told: None)
    assert outcome.counts["deleted"] == 1
    assert versions().keys() == before.keys() - {"gone.txt"} | {"guide.md"}
    assert not outcome.bad


def test_documents_of_what_cannot_be_read_now_stay(regrad: Regrad, versions: Versions) -> None:
    make_pdf(Path("docs/a.pdf"), HARBOUR)
    Path("docs/gone.txt").write_text("Gone.")
    Path("docs/faq.jsonl").write_text('{"id": "own", "text": "One."}\n{"text": "Two."}\n{"text": "Three."}\n')
    regrad("sync", "docs")
    Path("docs/a.pdf").write_bytes(b"%PDF-1.4 broken")
    Path("docs/gone.txt").unlink()
    Path("docs/faq.jsonl").write_text('{broken\n{"text": "Two."}\n')
    status, out, notes = regrad("sync", "docs", "--delete")
    assert status == 1
    assert out[:-1] == ["deleted faq.jsonl#3", "deleted gone.txt"]
    assert versions().keys() == {"a.pdf", "own", "faq.jsonl#2"}
    assert "skipped docs/a.pdf: must be a sound PDF file" in notes
    assert "skipped docs/faq.jsonl:1: must be a JSON object" in notes


def test_the_report_names_what_was_skipped_and_why_and_the_rest_goes_in(regrad: Regrad, versions: Versions) -> None:
    _guide("guide.md", 1)
    make_pdf(Path("docs/locked.pdf"), HARBOUR, password="secret")
    Path("docs/empty.docx").touch()
    for name in ("a.png", "b.png", "LICENSE"):
        Path("docs", name).write_bytes(b"x")
    status, out, notes = regrad("sync", "docs")
    assert (status, out[0]) == (1, "created guide.md")
    lines = notes.splitlines()
    assert "skipped docs/empty.docx: must hold some text, it is empty" in lines
    assert "skipped docs/locked.pdf: must be readable without a password, it is encrypted; save it without one" in lines
    assert [line.partition(": the ending")[0] for line in lines if ": the ending must be" in line] == [
        "skipped 1 file without an ending", "skipped 2 .png files"
    ]  # fmt: skip
    assert lines[-1].endswith("docs/a.png, docs/b.png")
    for name in ("locked.pdf", "empty.docx"):
        Path("docs", name).unlink()
    assert regrad("sync", "docs")[0] == 0, "an ending that isn't read is no failure"


def test_a_sync_that_broke_off_and_is_run_again_ends_as_if_it_had_run_once(
    regrad: Regrad, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    _guide("guide.md", 5)
    delete = Bank.delete
    with monkeypatch.context() as patch:
        patch.setattr("regrad_vllm.cli.sync._teller", lambda dry_run: _break_after(2))
        assert regrad("sync", "docs")[0] == 130
    assert 2 <= len(versions()) <= 5
    regrad("sync", "docs")
    assert len(versions()) == 5
    _guide("guide.md", 2)
    with monkeypatch.context() as patch:
        patch.setattr("regrad_vllm.cli.sync._teller", lambda dry_run: _break_after(1))
        assert regrad("sync", "docs", "--delete")[0] == 130
    assert Bank.delete is delete and len(versions()) == 4
    regrad("sync", "docs", "--delete")
    assert versions() == {"guide.md#1": 1, "guide.md#2": 1}


def _break_after(number: int) -> Callable[[str, str], None]:
    told: list[str] = []

    def tell(action: str, id: str) -> None:
        told.append(id)
        if len(told) == number:
            raise KeyboardInterrupt

    return tell


def test_a_folder_that_is_none_and_a_bank_that_is_away_are_one_line(
    regrad: Regrad, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regrad("sync", "nowhere")[::2] == (2, "regrad sync: FOLDER must be a folder, got nowhere\n")
    _guide("guide.md", 1)
    assert main(["sync", "docs", "--bank", "127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("regrad sync: the bank at 127.0.0.1:9 is not available")


def test_a_file_that_changes_while_it_is_read_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "One."}))

    def slow_count(text: str) -> int:
        with path.open("a") as more:
            more.write(" ")
        return count_tokens(text)

    path = path.rename(tmp_path / "a.txt")
    (bad,) = FolderReader(slow_count).read(CorpusFile(path, "a.txt", "s"))
    assert str(bad) == f"{path}: must stay the same while it is read, it has changed; sync again"
