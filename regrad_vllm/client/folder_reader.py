"""Reads the files of a folder that others write to meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator

from regrad_vllm.client.corpus import BadInput, CorpusDocument, CorpusFile, read_file
from regrad_vllm.data.token_counts import CountTokens

Items = list[CorpusDocument | BadInput]
# It changes with every write to the file, and with every other file of the same name. The last number is the time of
# the last change in nanoseconds since 1970.
_Mark = tuple[int, ...]


class FolderReader:
    """Reads whole files, and none that changes meanwhile. Calls for a file come in one thread."""

    def __init__(self, count: CountTokens, settle_s: float | None = None) -> None:
        """count: measures the passages of texts.

        settle_s: for a folder that is read again and again. A file is read when it has stayed the same for so many
        seconds, and its documents are kept until it changes. None: each file is read at once.
        """
        self.has_unsettled = False  # a file was passed over since ``start``, so the folder must be read again soon
        self._count = count
        self._settle_s = settle_s
        self._seen: dict[str, tuple[_Mark, float]] = {}  # file → its mark, and the time when that was first seen
        self._read: dict[str, tuple[_Mark, Items | None]] = {}  # file → its mark when it was read, and what is kept

    @property
    def keeps_documents(self) -> bool:
        """Whether the documents stay in memory."""
        return self._settle_s is not None

    def start(self, files: Iterable[CorpusFile]) -> None:
        """Begins a pass over the files. Other files are forgotten."""
        self.has_unsettled = False
        ids = {file.id for file in files}
        for entries in (self._seen, self._read):
            for id in entries.keys() - ids:
                del entries[id]

    def read(self, file: CorpusFile) -> Items:
        """The documents of the file, or BadInput in place of those that can't be used."""
        mark = _mark(file)
        before, kept = self._read.get(file.id, ((), None))
        if kept is not None and before == mark:
            return kept
        if mark and not self._is_settled(file, mark):
            self.has_unsettled = True
            return [BadInput(str(file.path), "is still being written", file.source, file.id)]
        items = list(read_file(file, self._count))
        if _mark(file) != mark:
            self.has_unsettled = True
            return [_changed(file)]
        is_kept = self.keeps_documents and mark and not any(isinstance(item, BadInput) for item in items)
        self._read[file.id] = mark, items if is_kept else None
        return items

    def changed(self, files: Iterable[CorpusFile]) -> Iterator[BadInput]:
        """The files that aren't as they were read, new ones among them."""
        for file in files:
            if self._read.get(file.id, ((), None))[0] != _mark(file):
                yield _changed(file)

    def _is_settled(self, file: CorpusFile, mark: _Mark) -> bool:
        if self._settle_s is None or time.time() - mark[-1] / 1e9 >= self._settle_s:
            return True
        now = time.monotonic()  # which tells even if the clocks of this machine and of the drive differ
        seen = self._seen.get(file.id)
        if seen is None or seen[0] != mark:
            self._seen[file.id] = seen = mark, now
        return now - seen[1] >= self._settle_s


def _changed(file: CorpusFile) -> BadInput:
    reason = "must stay the same while it is read, it has changed; sync again"
    return BadInput(str(file.path), reason, file.source, file.id)


def _mark(file: CorpusFile) -> _Mark:
    """Empty for a file that isn't there."""
    try:
        found = os.stat(file.path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
