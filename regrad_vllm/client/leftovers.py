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
from regrad_vllm.client.values import Condition, ListedDocument

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
            yield item


@dataclass(slots=True)
class Leftovers:
    """The documents that no file of the ingest holds."""

    num_removed: int = 0
    sequence: int = 0  # of the last removal
    missing: list[str] = field(default_factory=list)  # ids of the ingest's sources; they stay
    others: list[str] = field(default_factory=list)  # ids like those of the files, but not of their sources; they stay
    unknown: str = ""  # the reason why the bank doesn't say what the sources put there; empty if it does


def remove_leftovers(bank: Bank, namespace: str, held: Held, *, delete_missing: bool) -> Leftovers:
    """Deletes the passages and lines that their files no longer hold.

    A document stays if its line brought the id, or if its file is gone or can't be used. ``delete_missing`` deletes it
    too, unless some input of its source can't be used. BankError if the bank fails.
    """
    left = Leftovers()
    num_listed = 0
    try:
        for source, files in held.files.items():
            for entry in bank.list(namespace=namespace, conditions=(Condition(SOURCE_KEY, "equals", (source,)),)):
                if entry.metadata.get(SOURCE_KEY) != source:
                    left.unknown = "the bank has an earlier version, which doesn't list the documents of a source"
                    return left
                num_listed += 1
                if entry.id in held.ids:
                    continue
                if entry.metadata.get(FILE_KEY) in files or (delete_missing and source not in held.incomplete):
                    _delete(bank, namespace, entry, left)
                else:
                    left.missing.append(entry.id)
        if bank.stats().namespaces.get(namespace) != num_listed - left.num_removed:  # else there are no others
            known = held.ids.union(left.missing)
            left.others.extend(id for id in _next_ids(held.last) if id not in known and _is_there(bank, namespace, id))
    except PermissionDeniedError as error:  # such as a token that may write only
        left.unknown = error.message
    except NotFoundError:  # the bank has taken no document, and the namespace had none before
        pass
    return left


def _delete(bank: Bank, namespace: str, entry: ListedDocument, left: Leftovers) -> None:
    """Deletes the document, unless somebody has changed it since it was listed."""
    try:
        deletion = bank.delete(entry.id, namespace=namespace, expected_version=entry.version)
    except (NotFoundError, VersionConflictError):
        return
    left.num_removed += 1
    left.sequence = max(left.sequence, deletion.sequence)


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
