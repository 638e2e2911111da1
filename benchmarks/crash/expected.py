"""The possible contents of the bank, as its clients know them, and the right record of each document."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from bank_service.testing.hash_encoder import HashEncoder, spec_of
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, encode_gradient, record_digest


@dataclass(frozen=True, slots=True)
class Content:
    """A document's content. A change draws all of it anew, or ``note`` alone."""

    title: str
    text: str
    note: str

    @classmethod
    def of(cls, document: pb.Document) -> Content:
        return cls(document.title, document.text, document.metadata["note"])

    def document(self, id: str) -> pb.Document:
        return pb.Document(id=id, title=self.title, text=self.text, metadata={"note": self.note})


def record_of(title: str, text: str) -> bytes:
    """The gradient record of a document. Uploads and the bank use the same encoder, so it is the same for both."""
    return encode_gradient(HashEncoder().encode([(title, text)])[0].values, spec_of(), DEFAULT_CODEC)


def is_right(digest: str, record: bytes, title: str, text: str) -> bool:
    """Whether the record is the encoder's one for the document, and its digest is right."""
    return record == record_of(title, text) and record_digest(record) == digest


@dataclass(frozen=True, slots=True)
class Recorded:
    """An acknowledged state of a document."""

    id: str
    content: Content | None
    sequence: int
    acknowledged_s: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class Model:
    """The knowledge of one writer about its documents. They have no other writer."""

    # id → states that the bank may be in; the first is the last one acknowledged. None: no such document.
    states: dict[str, list[Content | None]] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)  # the last one acknowledged or seen
    sequence: int = 0  # of the last change acknowledged
    num_acknowledged: int = 0
    past: deque[Recorded] = field(default_factory=lambda: deque(maxlen=16))


@dataclass(slots=True)
class Verdict:
    """The broken promises."""

    lost: list[str] = field(default_factory=list)  # acknowledged, and not there
    wrong: list[str] = field(default_factory=list)  # everything else
