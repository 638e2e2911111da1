"""Finds and deletes documents that a source put into the bank earlier and no longer holds.

Metadata of each document say which source put it there, so an ingest never removes a document of another source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bank_service.errors import NotFoundError, PermissionDeniedError, VersionConflictError
from bank_service.wire.limits import FILE_KEY, SOURCE_KEY
from regrad_vllm.client.corpus import BadInput, CorpusDocument, CorpusFile
from regrad_vllm.client.values import Condition, Deletion, ListedDocument

if TYPE_CHECKING:
    from regrad_vllm.client.bank import Bank


class Held:
    """The ids that the files of an ingest hold, whether the bank took the documents or not."""

    def __init__(self, files: Iterable[CorpusFile], bad: Iterable[BadInput]) -> None:
        """bad: input that can't be used and isn't in the files, such as a folder that can't be read."""
        self.ids: set[str] = set()
        self.files: dict[str, set[str]] = {}  # source → its files, by id
        for file in files:
            self.files.setdefault(file.source, set()).add(file.id)
        self.last: dict[str, int] = {}  # file → the number of its last passage or line; 0 for a whole file
        self.incomplete = {item.source for item in bad}  # sources with input that can't be used
        self.unusable: list[BadInput] = []  # among the items of ``noting``
        self.has_documents = False  # whether there was a document among them
        self._links = tuple(f"{item.id}/" for item in bad if item.id and not item.source)  # to folders

    def noting(self, items: Iterable[CorpusDocument | BadInput]) -> Iterator[CorpusDocument]:
        """The documents among the items. An unusable line or file holds what it held before."""
        for item in items:
            self.ids.add(item.id)
            if isinstance(item, BadInput):
                self.unusable.append(item)
                self.incomplete.add(item.source)
                self.files[item.source].discard(item.id)
                continue
            if file := item.metadata.get(FILE_KEY):
                number = item.id.removeprefix(file).lstrip("#")
                self.last[file] = max(self.last.get(file, 0), int(number or 0))
            self.has_documents = True
            yield item

    def is_linked(self, entry: ListedDocument) -> bool:
        """Whether the document may be of a folder that is a link now, which isn't followed."""
        file = entry.metadata.get(FILE_KEY)
        return bool(self._links) and (file is None or file.startswith(self._links))


@dataclass(slots=True)
class Leftovers:
    """The documents that no file of the ingest holds."""

    num_removed: int = 0
    sequence: int = 0  # of the last removal
    missing: list[str] = field(default_factory=list)  # ids of the ingest's sources; they stay
    others: list[str] = field(default_factory=list)  # ids like those of the files, but not of their sources; they stay
    unknown: str = ""  # the reason why the bank doesn't say what the sources put there; empty if it does


class UnknownSourceError(Exception):
    """The bank doesn't say what a source has put there. The message is the reason."""


def documents_of(bank: Bank, namespace: str, source: str) -> Iterator[ListedDocument]:
    """The documents that the source has put into the namespace. UnknownSourceError, BankError."""
    try:
        for entry in bank.list(namespace=namespace, conditions=(Condition(SOURCE_KEY, "equals", (source,)),)):
            if entry.metadata.get(SOURCE_KEY) != source:
                raise UnknownSourceError("the bank has an earlier version, which doesn't list a source's documents")
            yield entry
    except PermissionDeniedError as error:  # such as a token that may write only
        raise UnknownSourceError(error.message) from error
    except NotFoundError:  # the namespace has never had a document
        return


def remove_leftovers(bank: Bank, namespace: str, held: Held, *, delete_missing: bool) -> Leftovers:
    """Deletes the passages and lines that their files no longer hold.

    A document stays if its line brought the id, or if its file is gone or can't be used. ``delete_missing`` deletes it
    too, unless some input of its source can't be used. BankError if the bank fails.
    """
    left = Leftovers()
    num_listed = 0
    try:
        for source, files in held.files.items():
            for entry in documents_of(bank, namespace, source):
                num_listed += 1
                if entry.id in held.ids or held.is_linked(entry):
                    continue
                if entry.metadata.get(FILE_KEY) in files or (delete_missing and source not in held.incomplete):
                    deletion = delete_listed(bank, namespace, entry)
                    if deletion is not None:
                        left.num_removed += 1
                        left.sequence = max(left.sequence, deletion.sequence)
                else:
                    left.missing.append(entry.id)
        if bank.stats().namespaces.get(namespace) != num_listed - left.num_removed:  # else there are no others
            known = held.ids.union(left.missing)
            left.others.extend(id for id in _next_ids(held.last) if id not in known and _is_there(bank, namespace, id))
    except UnknownSourceError as error:
        left.unknown = str(error)
    return left


def delete_listed(bank: Bank, namespace: str, entry: ListedDocument) -> Deletion | None:
    """Deletes the document. None if somebody has changed it since it was listed. BankError."""
    try:
        return bank.delete(entry.id, namespace=namespace, expected_version=entry.version)
    except (NotFoundError, VersionConflictError):
        return None


def _next_ids(last: dict[str, int]) -> Iterator[str]:
    """The ids that a file's documents would have if the file were longer, or one passage only."""
    for file, number in last.items():
        if number:
            yield file
        yield f"{file}#{number + 1}"


def _is_there(bank: Bank, namespace: str, id: str) -> bool:
    try:
        bank.get(id, namespace=namespace)
    except NotFoundError:
        return False
    return True
