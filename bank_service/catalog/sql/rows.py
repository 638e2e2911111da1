"""Turns rows of versions into values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from bank_service.values.documents import Document, Gradient, StoredDocument


def to_stored(row: Mapping[str, Any] | sa.RowMapping) -> StoredDocument:
    document = Document(row["namespace"], row["id"], row["title"], row["text"], json.loads(row["metadata"]))
    gradient = Gradient(
        row["gradient_digest"], row["gradient_bytes"], row["num_tokens"], bool(row["truncated"]), row["embedding"]
    )
    return StoredDocument(row["key"], document, gradient, row["version"], row["began"], row["updated_us"])
