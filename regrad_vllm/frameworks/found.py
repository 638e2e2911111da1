"""Documents of a bank as frameworks have them: with metadata of any JSON value, and the title among them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bank_service.errors import NotFoundError
from regrad_vllm.client import Bank, Condition, Document, Hit, Query

# A bank's metadata are strings. Other values are stored as JSON, and the value of this key names their keys.
JSON_KEYS = "regrad.json"


def document_of(id: str, text: str, metadata: Mapping[str, Any]) -> Document:
    """The document to store. Its title is ``metadata["title"]``. ValueError for metadata that JSON hasn't."""
    strings: dict[str, str] = {}
    others = []
    for key, value in metadata.items():
        if not isinstance(value, str):
            others.append(key)
        strings[key] = _as_text(key, value)
    title = "" if "title" in others else strings.pop("title", "")
    if others:
        strings[JSON_KEYS] = json.dumps(others)
    return Document(id, text, title, strings)


def metadata_of(document: Document) -> dict[str, Any]:
    """The metadata that ``document_of`` was given. A value that others changed since is text, unless it is JSON."""
    metadata: dict[str, Any] = dict(document.metadata)
    keys = _from_text(metadata.pop(JSON_KEYS, "[]"))
    for key in keys if isinstance(keys, list) else []:
        if key in metadata:
            metadata[key] = _from_text(metadata[key])
    return {**metadata, "title": document.title} if document.title else metadata


def _from_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def conditions_of(filter: Mapping[str, Any] | None) -> tuple[Condition, ...]:
    """One condition for each key: the document's value is this one, or one of these if it is a list.

    ValueError for values that JSON hasn't, and for the title, which a bank doesn't filter by.
    """
    if "title" in (filter or {}):
        raise ValueError("filter must name metadata, 'title' is none in a bank; store it under another name as well")
    return tuple(
        Condition(key, "equals", tuple(_as_text(key, one) for one in (value if isinstance(value, list) else [value])))
        for key, value in (filter or {}).items()
    )


def with_options(
    body: Mapping[str, Any] | None, own: Mapping[str, Any], of_call: Mapping[str, Any] | None
) -> dict[str, Any]:
    """An extra body with the options of a model, then those that the body has already, then those of the call."""
    body = body or {}
    return {**body, "regrad": {**own, **(body.get("regrad") or {}), **(of_call or {})}}


def found(bank: Bank, query: Query) -> list[tuple[Hit, Document]]:
    """The hits of a query with their documents, best first. BankError."""
    hits = {hit.id: hit for hit in bank.query(query).hits}
    return [(hits[document.id], document) for document in existing(bank, hits, query.namespace)]


def existing(bank: Bank, ids: Iterable[str], namespace: str) -> Iterator[Document]:
    """The documents with these ids, in order, without those that the bank hasn't. BankError."""
    for id in ids:
        try:
            yield bank.get(id, namespace=namespace).document
        except NotFoundError:  # such as a hit that was deleted after the query
            continue


def _as_text(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata[{key!r}] must be a value of JSON, got {value!r:.80}; make it a string") from error
