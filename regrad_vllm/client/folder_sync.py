"""Makes a bank hold what a folder holds, for `regrad sync`.

There is no state but the bank's: the metadata of each document say which source put it there, and of which file.
So a sync that was interrupted is run again, and ends as if it had run once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bank_service.errors import NotFoundError
from bank_service.wire.limits import FILE_KEY
from regrad_vllm.client.corpus import BadInput, CorpusDocument, CorpusFile, find_files, read_corpus, source_of
from regrad_vllm.client.folder_reader import FolderReader
from regrad_vllm.client.leftovers import Held, UnknownSourceError, delete_listed, documents_of
from regrad_vllm.client.upload import Refusal, store
from regrad_vllm.client.values import ListedDocument, Outcome, Receipt

if TYPE_CHECKING:
    from regrad_vllm.client.bank import Bank

Action = Literal[Outcome, "deleted"]


@dataclass(frozen=True, slots=True)
class SyncOutcome:
    """The outcome of a sync, or of its dry run."""

    counts: Counter[str]  # documents by action; "truncated" of those sent; "mended" control characters of those sent
    bad: tuple[BadInput, ...]  # files and lines that can't be used
    refused: tuple[Refusal, ...]  # documents that the bank refused
    left_out: tuple[Path, ...]  # files with an ending that isn't read
    gone: tuple[str, ...]  # documents that the folder no longer holds and that stay
    unknown: str  # the reason why the bank doesn't say which documents are the folder's; empty if it does

    @property
    def has_failed(self) -> bool:
        return bool(self.bad or self.refused)


class FolderSync:
    """One folder and one namespace of a bank."""

    def __init__(self, folder: Path, source: str, namespace: str, reader: FolderReader, settle_s: float) -> None:
        """source: the name of the folder's source; empty: its absolute path.

        settle_s: the seconds between two looks at the folder that must agree before a document is deleted.
        """
        self._folder = folder
        self._source = source
        self._namespace = namespace
        self._reader = reader
        self._settle_s = settle_s
        self._stored: dict[str, tuple[CorpusDocument, int]] = {}  # id → what this process stored, and its version

    @property
    def has_unsettled(self) -> bool:
        """Whether the last run passed over files that were still being written."""
        return self._reader.has_unsettled

    def run(self, bank: Bank, *, delete: bool, dry_run: bool, tell: Callable[[Action, str], object]) -> SyncOutcome:
        """Stores new and changed documents.

        delete: then also deletes the documents of the folder that it no longer holds. dry_run: changes nothing.
        tell: called with each change and the document's id, after the change. NotADirectoryError, UploadError,
        BankError.
        """
        if not self._folder.is_dir():
            raise NotADirectoryError(f"FOLDER must be a folder, {self._folder} is none or is gone; name another")
        files, left_out, bad = find_files([self._folder], self._source)
        self._reader.start(files)
        held = Held(files, bad)
        documents = held.noting(read_corpus(files, read=self._reader.read))
        listed, unknown = self._listed(bank)
        counts: Counter[str] = Counter()
        refused: list[Refusal] = []

        def note(action: Action, id: str) -> None:
            counts[action] += 1
            if action != "unchanged":
                tell(action, id)

        if dry_run:
            for document in documents:
                note(_would_be(bank, self._namespace, document), document.id)
        else:
            refused = self._store(bank, self._unsent(documents, listed, counts), counts, note)
        unusable = (*bad, *held.unusable)
        gone = [entry for entry in listed.values() if _is_gone(entry, held, files, bad)]
        stay = tuple(entry.id for entry in gone)
        if delete and gone and held.has_documents:  # without any, the folder may be a drive that isn't mounted
            stay = ()
            if not dry_run:
                gone = self._still_gone(gone, held)
            for entry in gone:
                if dry_run or delete_listed(bank, self._namespace, entry) is not None:
                    note("deleted", entry.id)
        self._stored = {id: stored for id, stored in self._stored.items() if id in held.ids}
        return SyncOutcome(counts, unusable, tuple(refused), tuple(left_out), stay, unknown)

    def _still_gone(self, gone: Iterable[ListedDocument], held: Held) -> list[ListedDocument]:
        """The documents that a second look finds gone too. A file that others write may be away or short a moment."""
        time.sleep(self._settle_s)
        files, _, bad = find_files([self._folder], self._source)
        list(held.noting(self._reader.changed(files)))
        return [entry for entry in gone if _is_gone(entry, held, files, bad)]

    def _listed(self, bank: Bank) -> tuple[dict[str, ListedDocument], str]:
        """The documents of the folder in the bank, or the reason why the bank doesn't say."""
        source = self._source or source_of(self._folder)
        try:
            return {entry.id: entry for entry in documents_of(bank, self._namespace, source)}, ""
        except UnknownSourceError as error:
            return {}, str(error)

    def _store(
        self,
        bank: Bank,
        documents: Iterable[CorpusDocument],
        counts: Counter[str],
        note: Callable[[Action, str], object],
    ) -> list[Refusal]:
        """Stores the documents. Returns those that the bank refused."""
        refused = []
        for document, answer in store(bank, documents, namespace=self._namespace, skip_bad=True):
            if isinstance(answer, Receipt):
                if self._reader.keeps_documents:
                    self._stored[document.id] = document, answer.version
                note(answer.outcome, document.id)
                counts["truncated"] += answer.truncated
            else:
                refused.append(Refusal(document.place, answer))
        return refused

    def _unsent(
        self, documents: Iterable[CorpusDocument], listed: Mapping[str, ListedDocument], counts: Counter[str]
    ) -> Iterator[CorpusDocument]:
        """The documents, except those that this process has stored and that the bank still holds."""
        for document in documents:
            entry = listed.get(document.id)
            if entry is not None and self._stored.get(document.id) == (document, entry.version):
                counts["unchanged"] += 1
            else:
                counts["mended"] += document.num_mended
                yield document


def _would_be(bank: Bank, namespace: str, document: CorpusDocument) -> Outcome:
    """The outcome that an ingest of the document would have."""
    try:
        stored = bank.get(document.id, namespace=namespace).document
    except NotFoundError:
        return "created"
    same = (stored.title, stored.text, stored.metadata) == (document.title, document.text, document.metadata)
    return "unchanged" if same else "updated"


def _is_gone(entry: ListedDocument, held: Held, files: Iterable[CorpusFile], bad: Iterable[BadInput]) -> bool:
    """Whether the folder surely no longer holds a document of its source. Unreadable input may hold it still."""
    file = entry.metadata.get(FILE_KEY)
    if entry.id in held.ids or held.is_linked(entry):
        return False
    if any(file in whole for whole in held.files.values()):
        return True
    if any(item.source for item in bad):  # such as a folder that can't be read
        return False
    if file is not None:
        return all(file != there.id for there in files)
    lines = [there.id for there in files if there.path.suffix.lower() == ".jsonl"]
    return not any(item.id == id or item.id.startswith(f"{id}#") for item in held.unusable for id in lines)
