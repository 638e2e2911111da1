"""Finds the sentences of a query's hits that are nearest to a question."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace

import numpy as np

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import SentenceVectors, VersionText
from bank_service.records.sentence_embedding import embed_sentences
from bank_service.runtime.seldom import Seldom
from bank_service.runtime.threads import in_thread
from bank_service.values.documents import CueSentence, Hit, Query, QueryResult
from bank_service.values.embedder import Embedder, embedded_query
from bank_service.values.sentences import choose_cue
from bank_service.values.vectors import unit
from bank_service.wire.record import FloatArray
from bank_service.wire.tracing import span

logger = logging.getLogger(__name__)


class CueFinder:
    """Adds cues to hits.

    Versions of older banks, with uploaded gradients, or of a bank without ``embed_sentences`` lack vectors.
    Their sentences are embedded at the first query that needs them. Then the catalog keeps the vectors.
    """

    def __init__(self, catalog: Catalog, embedder: Embedder, reads: Executor, embeds: Executor) -> None:
        self._catalog = catalog
        self._embedder = embedder
        self._reads = reads
        self._embeds = embeds
        self._unwritten = Seldom()

    async def add(self, query: Query, result: QueryResult, vectors: FloatArray | None) -> QueryResult:
        """The result with its cue, if the query asks for one. ``vectors``: the query's own, (n, dimension) in float32.

        A document that was deleted or changed since the search gives no sentence.
        """
        if not (query.with_cue and result.hits):
            return result
        texts = await in_thread(self._reads, self._texts, [hit.sequence for hit in result.hits])
        if query.cue_text or vectors is None:
            with span("bank.embed"):
                vectors = await in_thread(self._embeds, embedded_query, self._embedder, query.question)
        sentences = {began: text.sentences for began, text in texts.items() if text.sentences is not None}
        lacking = {began: text for began, text in texts.items() if began not in sentences}
        if lacking:
            with span("bank.embed_sentences", num_documents=len(lacking)):
                sentences |= await in_thread(self._embeds, self._embedded, lacking)
        return replace(result, hits=_with_cue(result.hits, texts, sentences, unit(vectors), query.with_cue))

    def _texts(self, began: list[int]) -> dict[int, VersionText]:
        with span("catalog.read"), self._catalog.view() as view:
            return view.texts(began)

    def _embedded(self, texts: Mapping[int, VersionText]) -> dict[int, SentenceVectors]:
        found = {}
        for began, text in texts.items():
            found[began] = embed_sentences(self._embedder, text.title, text.text)
            self._catalog.put_sentences(began, found[began]).add_done_callback(self._check)
        return found

    def _check(self, written: Future[bool]) -> None:
        error = None if written.cancelled() else written.exception()
        if error is not None and self._unwritten.is_due():
            logger.warning("the vectors of sentences can't be stored now: %s; a later query tries again", error)


def _with_cue(
    hits: Sequence[Hit],
    texts: Mapping[int, VersionText],
    vectors: Mapping[int, SentenceVectors],
    asked: FloatArray,
    number: int,
) -> tuple[Hit, ...]:
    """The hits with the cue. ``asked``: unit vectors, (n, dimension) in float32. ``texts`` and ``vectors`` are by the
    sequence at which a version began."""
    known = [hit.sequence for hit in hits if hit.sequence in texts]
    places = [np.frombuffer(vectors[began].places, "<i4").reshape(-1, 2).tolist() for began in known]
    sentences = [
        [texts[began].text[start:end] for start, end in some] for began, some in zip(known, places, strict=True)
    ]
    cosines = [_cosines(vectors[began], asked) for began in known]
    cues: dict[int, list[CueSentence]] = {}
    for document, place in choose_cue(sentences, cosines, number):
        start, end = places[document][place]
        sentence = CueSentence(start, end, sentences[document][place], cosines[document][place])
        cues.setdefault(known[document], []).append(sentence)
    return tuple(
        replace(hit, title=texts[hit.sequence].title, cue=tuple(cues[hit.sequence])) if hit.sequence in cues else hit
        for hit in hits
    )


def _cosines(sentences: SentenceVectors, asked: FloatArray) -> list[float]:
    """Each sentence's best cosine with one of the vectors asked for."""
    stored = np.frombuffer(sentences.vectors, "<f2").reshape(-1, asked.shape[1])
    vectors = unit(stored.astype(np.float32))  # float16 has taken some of the length
    # The last bits of ``@`` depend on the row's position. A score must not depend on other sentences, so use einsum.
    cosines = np.clip(np.einsum("ij,nj->in", vectors, asked), -1.0, 1.0)
    return [float(value) for value in cosines.max(axis=1)]
