"""A document's sentences as vectors."""

from __future__ import annotations

import numpy as np

from bank_service.catalog.entries import SentenceVectors
from bank_service.values.embedder import Embedder, embedded_text
from bank_service.values.sentences import sentence_places
from bank_service.wire.record import FloatArray


def embed_sentences(
    embedder: Embedder, title: str, text: str, document_vector: FloatArray | None = None
) -> SentenceVectors:
    """The vectors of a document's sentences, each with the title before it. Blocking.

    ``document_vector``: of title and text. It is that of a text of one sentence, too.
    """
    places = sentence_places(text)
    if document_vector is not None and places == [(0, len(text))]:
        vectors = [document_vector]
    else:
        vectors = [embedder.embed(embedded_text(title, text[start:end])) for start, end in places]
    joined = np.asarray(vectors, dtype="<f2").reshape(len(places), embedder.dimension)
    return SentenceVectors(np.asarray(places, dtype="<i4").tobytes(), joined.tobytes())
