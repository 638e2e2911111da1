"""Files and folders → documents. Unusable input is reported by file and line.

Texts are cut into passages, also those of PDF, HTML and DOCX files. A .jsonl file holds one document per line. An id
comes from the file's path as given, or from its path relative to a given folder. So a changed file, ingested again,
updates its documents, and two files of the same name have different ids.

Two pairs of metadata say where a document came from: its source, and the file that its id is made of.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from bank_service.errors import InvalidArgumentError
from bank_service.values import documents as bank_documents
from bank_service.wire.limits import FILE_KEY, SOURCE_KEY
from regrad_vllm.client.formats import FORMATS, MAX_FILE_BYTES, FormatError, text_of
from regrad_vllm.client.values import Document
from regrad_vllm.data.mending import mend
from regrad_vllm.data.passages import split_markdown, split_plain
from regrad_vllm.data.token_counts import CountTokens, count_tokens

ENDINGS = (".txt", ".md", ".jsonl", *FORMATS)


@dataclass(frozen=True, slots=True)
class CorpusDocument(Document):
    """A document of a corpus, with its place in the input."""

    place: str = field(kw_only=True)  # its place in the input: "notes.jsonl:3", "guide.md#2"
    num_mended: int = field(default=0, kw_only=True)  # control characters; a text file's are at its first passage


@dataclass(frozen=True, slots=True)
class BadInput:
    """A piece of input that can't be ingested."""

    place: str
    reason: str
    source: str = ""  # its CorpusFile's; empty if it belongs to none
    id: str = ""  # the id that would be made for it; a file's for the whole file; a link's for a link to a folder

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True, slots=True)
class CorpusFile:
    path: Path
    id: str  # the path relative to a given folder, or the given path of the file; "/" between its parts
    source: str  # the name of the file or folder that was given: its absolute path, unless it was named


def find_files(paths: Iterable[Path], source: str = "") -> tuple[list[CorpusFile], list[Path], list[BadInput]]:
    """(files to read in order, files in folders with another ending, unusable paths).

    source: the name of all paths' source. Empty: each path's own, its absolute path.
    """
    files: dict[tuple[Path, str], CorpusFile] = {}  # a file that is given twice under the same id is read once
    left_out: list[Path] = []
    bad: list[BadInput] = []

    def add(path: Path, id: str, source: str) -> None:
        files.setdefault((path.resolve(), id), CorpusFile(path, id, source))

    paths = list(paths)
    given = [Path(os.path.realpath(path)) for path in paths]
    for path in paths:
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except OSError as error:
            bad.append(BadInput(str(path), _reason(error), source))
            continue
        own_source = source or source_of(path)
        if is_folder:
            for found in _walk(path, own_source, given, bad):
                if found.suffix.lower() in ENDINGS:
                    add(found, found.relative_to(path).as_posix(), own_source)
                else:
                    left_out.append(found)
        elif path.suffix.lower() not in ENDINGS:
            reason = f"its ending must be one of {', '.join(ENDINGS)}; convert it to text first"
            bad.append(BadInput(str(path), reason, source))
        else:
            add(path, _named_id(path), own_source)
    return list(files.values()), left_out, bad


def read_corpus(
    files: Sequence[CorpusFile],
    count: CountTokens = count_tokens,
    read: Callable[[CorpusFile], Iterable[CorpusDocument | BadInput]] | None = None,
) -> Iterator[CorpusDocument | BadInput]:
    """Every document of the files, in order. Unusable input is yielded as BadInput. Reads one file at a time.

    count: measures the passages of texts. read: reads a file, in place of ``read_file``.
    """
    read = read or partial(read_file, count=count)
    seen: dict[str, str] = {}
    for file in files:
        shown, absolute = str(file.path), str(file.path.resolve())
        for item in read(file):
            if isinstance(item, CorpusDocument):
                place = absolute + item.place.removeprefix(shown)  # the same for a file that was given twice
                earlier = seen.setdefault(item.id, place)
                if earlier != place:
                    reason = f"id {item.id!r} must be unique, {earlier} has it too; rename one"
                    yield BadInput(item.place, reason, file.source, item.id)
                    continue
            yield item


def _named_id(path: Path) -> str:
    """The path as given, or relative to the current folder if it is inside, without leading "/" and "../"."""
    plain = Path(os.path.normpath(path))
    if plain.is_absolute() and plain.is_relative_to(Path.cwd()):
        plain = plain.relative_to(Path.cwd())
    parts = list(plain.relative_to(plain.anchor).parts)
    while parts[0] == "..":
        del parts[0]
    return "/".join(parts)


def source_of(path: Path) -> str:
    """The source that a given path is. Bytes that are no UTF-8 are escaped, because metadata is text.

    A file that is a link keeps its own name, because such links change their targets with every version.
    """
    source = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    return str(source).encode(errors="backslashreplace").decode()


def _walk(folder: Path, source: str, given: Sequence[Path], bad: list[BadInput]) -> Iterator[Path]:
    """The files below the folder. Folders that can't be read are added to ``bad``.

    So are links to folders, unless their target is one of the resolved paths that were given, or lies below one.
    """

    def note(error: OSError) -> None:
        bad.append(BadInput(error.filename, _reason(error), source))

    for parent, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for link in (Path(parent) / name for name in folders):
            if link.is_symlink() and not any(link.resolve().is_relative_to(path) for path in given):
                reason = "is a link to a folder, which isn't followed; name it as a path of its own"
                id = link.relative_to(folder).as_posix()
                bad.append(BadInput(str(link), reason, id=id))  # of no source, so it makes none incomplete
        yield from (Path(parent) / name for name in sorted(names) if not name.startswith("."))


def _reason(error: OSError) -> str:
    return "no such file or folder" if isinstance(error, FileNotFoundError) else f"can't be read: {error.strerror}"


def read_file(file: CorpusFile, count: CountTokens) -> Iterator[CorpusDocument | BadInput]:
    """The documents of one file, and BadInput in place of those that can't be used."""
    bad = partial(BadInput, str(file.path), source=file.source, id=file.id)
    ending = file.path.suffix.lower()
    try:
        found = file.path.stat()
        if not stat.S_ISREG(found.st_mode):  # such as a pipe, which can't be read a second time
            yield bad("must be a regular file; save what it gives to one")
            return
        if ending != ".jsonl" and found.st_size > MAX_FILE_BYTES:
            yield bad(f"must be at most {MAX_FILE_BYTES:,} bytes, got {found.st_size:,}; split it")
            return
        data = file.path.read_bytes()
    except OSError as error:
        yield bad(_reason(error))
        return
    if ending == ".jsonl":
        lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
        if not lines:
            yield bad("must hold one JSON object a line, it is empty")
        for number, line in lines:
            yield _read_line(file, number, line)
        return
    text = _converted(ending, data) if ending in FORMATS else _decode(data)
    if isinstance(text, _Reason):
        yield bad(text)
        return
    text, num_mended = mend(text)
    split = split_plain if ending in (".txt", ".pdf") else split_markdown
    passages = split(text, count)
    if not passages:
        yield bad(f"must hold some text, it {'has headings only' if text.strip() else 'is empty'}")
    for number, passage in enumerate(passages, 1):
        mark = f"#{number}" if len(passages) > 1 else ""
        made_id, place = file.id + mark, f"{file.path}{mark}"
        metadata = {SOURCE_KEY: file.source, FILE_KEY: file.id}
        document = CorpusDocument(made_id, passage.text, passage.title, metadata, place=place, num_mended=num_mended)
        yield _checked(document, made_id)
        num_mended = 0


def _read_line(file: CorpusFile, number: int, line: bytes) -> CorpusDocument | BadInput:
    place, made_id = f"{file.path}:{number}", f"{file.id}#{number}"
    bad = partial(BadInput, place, source=file.source, id=made_id)
    text = _decode(line)
    if isinstance(text, _Reason):
        return bad(text)
    try:
        record = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return bad(f"must be a JSON object, it is not JSON: {error}")
    if not isinstance(record, dict):
        return bad(f"must be a JSON object, got {type(record).__name__}")
    given = {name: value for name, value in record.items() if value is not None}
    if "text" not in given:
        null = ", it is null" if "text" in record else f"; it has {sorted(record)}"
        return bad(f"must have a field 'text'{null}")
    own = {} if "id" in given else {FILE_KEY: file.id}
    fields = {"id": made_id, "title": "", "text": ""}
    for name, default in fields.items():
        value = given.pop(name, default)
        if name != "text" and isinstance(value, int | float) and not isinstance(value, bool):
            value = _as_text(name, value)
        if isinstance(value, _Reason):
            return bad(value)
        if not isinstance(value, str):
            kinds = "a string" if name == "text" else "a string or a number"
            return bad(f"{name} must be {kinds}, got {type(value).__name__}")
        fields[name] = value
    metadata = _metadata(given)
    if isinstance(metadata, _Reason):
        return bad(metadata)
    metadata |= own | {SOURCE_KEY: file.source}
    document = CorpusDocument(fields["id"], fields["text"], fields["title"], metadata, place=place)
    return _checked(_mended(document), made_id)


class _Reason(str):
    """The reason why a piece of input can't be used."""

    __slots__ = ()


def _converted(ending: str, data: bytes) -> str | _Reason:
    if not data:
        return _Reason("must hold some text, it is empty")
    try:
        return text_of(ending, data)
    except FormatError as error:
        return _Reason(error)


def _decode(data: bytes) -> str | _Reason:
    if b"\0" in data:
        return _Reason(f"must be text, it holds a zero byte at offset {data.index(0)}; convert it to text first")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _Reason(f"must be UTF-8, byte {error.start} is not; convert it first (iconv -t utf-8)")


def _metadata(record: dict[str, object]) -> dict[str, str] | _Reason:
    """All fields except id, title and text, as text. They become the document's metadata.

    Null is an absent field. Numbers, true and false, and lists of these and of strings become JSON's text for them.
    """
    nested = record.pop("metadata", {})
    if not isinstance(nested, dict):
        return _Reason(f"metadata must be an object, got {type(nested).__name__}")
    metadata: dict[str, str] = {}
    for key, value in (nested | record).items():
        if key in (SOURCE_KEY, FILE_KEY):  # of the ingest before, in what `regrad get` has printed
            continue
        if isinstance(value, str):
            metadata[key] = value
        elif isinstance(value, dict) or (isinstance(value, list) and any(isinstance(i, list | dict) for i in value)):
            found = "an object" if isinstance(value, dict) else "a list of lists or objects"
            return _Reason(f"field {key!r} must be a string, a number or a list of these, as metadata are, got {found}")
        elif value is not None:
            text = _as_text(f"field {key!r}", value)
            if isinstance(text, _Reason):
                return text
            metadata[key] = text
    return metadata


def _as_text(name: str, value: object) -> str | _Reason:
    """JSON's text for a value. json.loads reads a number like 1e400 as infinity, which JSON hasn't."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return _Reason(f"{name} must be within ±1.8e308 as a number; write it as a string")


def _no_constant(name: str) -> None:
    """json.loads calls it for NaN and Infinity, which are not JSON. ValueError."""
    raise ValueError(f"{name} is no value of JSON; write null for what is missing")


def _mended(document: CorpusDocument) -> CorpusDocument:
    (title, in_title), (text, in_text) = mend(document.title), mend(document.text)
    return replace(document, title=title, text=text, num_mended=in_title + in_text)


def _checked(document: CorpusDocument, made_id: str) -> CorpusDocument | BadInput:
    """The document, or BadInput if the bank would refuse it. So a bad corpus is refused before anything is sent."""
    bad = partial(BadInput, document.place, source=document.metadata[SOURCE_KEY], id=made_id)
    if not document.id:
        return bad("id must not be empty; leave the field out for an id made from the file's name")
    try:
        bank_documents.Document("", document.id, document.title, document.text, document.metadata)
    except InvalidArgumentError as error:
        return bad(error.message)
    except UnicodeEncodeError:
        return bad("must be valid Unicode, it holds half of a surrogate pair")
    return document
