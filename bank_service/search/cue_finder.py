"""Finds the sentences of a query's hits that are nearest to a question."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import SentenceVectors, VersionText
from bank_service.errors import BankError, OverloadedError
from bank_service.records.sentence_embedding import embed_sentences
from bank_service.records.stores import Pools
from bank_service.runtime.background import Background
from bank_service.runtime.seldom import Seldom
from bank_service.runtime.threads import in_thread
from bank_service.values.documents import CueSentence, Hit, Query, QueryResult
from bank_service.values.embedder import Embedder, embedded_query
from bank_service.values.sentences import choose_cue
from bank_service.values.vectors import unit
from bank_service.wire.limits import RETRY_AFTER_MS
from bank_service.wire.record import FloatArray
from bank_service.wire.tracing import span

MAX_LATE = 256  # documents whose sentences are embedded for queries or wait for that; one more query may add its hits
logger = logging.getLogger(__name__)


class CueFinder:
    """Adds cues to hits.

    Versions of older banks, with uploaded gradients, or of a bank without ``embed_sentences`` lack vectors.
    Their sentences are embedded at the first query that needs them. Then the catalog keeps the vectors.
    """

    def __init__(self, catalog: Catalog, embedder: Embedder, pools: Pools, background: Background) -> None:
        self._catalog = catalog
        self._embedder = embedder
        self._pools = pools
        self._background = background
        self._embedding: dict[int, asyncio.Task[SentenceVectors]] = {}  # by the sequence at which the version began
        self._unwritten = Seldom()

    async def add(self, query: Query, result: QueryResult, vectors: FloatArray | None) -> QueryResult:
        """The result with its cue, if the query asks for one. ``vectors``: the query's own, (n, dimension) in float32.

        A document that was deleted or changed since the search gives no sentence. OverloadedError, ReplicaReadError.
        """
        if not (query.with_cue and result.hits):
            return result
        began = [hit.sequence for hit in result.hits]
        at_least = None if query.at_least is None else max(query.at_least, *began)
        texts = await in_thread(self._pools.reads, self._texts, began, at_least)
        if query.cue_text or vectors is None:
            with span("bank.embed"):
                vectors = await in_thread(self._pools.query_embeds, embedded_query, self._embedder, query.question)
        sentences = {began: text.sentences for began, text in texts.items() if text.sentences is not None}
        lacking = {began: text for began, text in texts.items() if began not in sentences}
        if lacking:
            if len(self._embedding) >= MAX_LATE and not lacking.keys() <= self._embedding.keys():
                raise OverloadedError(
                    f"the bank embeds the sentences of {MAX_LATE} documents at a time for queries and has as many; "
                    "try again later",
                    limit="max_late_sentences",
                    retry_after_ms=RETRY_AFTER_MS,
                )
            with span("bank.embed_sentences", num_documents=len(lacking)):
                late = await asyncio.gather(*(self._late(began, text) for began, text in lacking.items()))
            sentences |= dict(zip(lacking, late, strict=True))
        return replace(result, hits=_with_cue(result.hits, texts, sentences, unit(vectors), query.with_cue))

    def _texts(self, began: list[int], at_least: int | None) -> dict[int, VersionText]:
        with span("catalog.read"), self._catalog.view(at_least) as view:
            return view.texts(began)

    def _late(self, began: int, text: VersionText) -> asyncio.Future[SentenceVectors]:
        """The vectors of a version that has none. Queries share the work, and it goes on where they are cancelled."""
        task = self._embedding.get(began)
        if task is None:
            task = self._background.run(in_thread(self._pools.sentence_embeds, self._embedded, began, text))
            self._embedding[began] = task
            task.add_done_callback(lambda _: self._embedding.pop(began))
        return asyncio.shield(task)

    def _embedded(self, began: int, text: VersionText) -> SentenceVectors:
        found = embed_sentences(self._embedder, text.title, text.text)
        try:
            self._catalog.put_sentences(began, found).result()
        except BankError as error:
            if self._unwritten.is_due():
                logger.warning("the vectors of sentences can't be stored now: %s; a later query tries again", error)
        return found


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
