"""From a plan to a prepared request: query the bank, fetch the missing gradients, make them resident in the workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from bank_service.wire.channel import may_have_nodes
from bank_service.wire.errors import (
    BankError,
    InvalidArgumentError,
    LimitExceededError,
    NotFoundError,
    OutOfRangeError,
    UnavailableError,
)
from bank_service.wire.record import GradientFormatError, WrongLearnerError
from bank_service.wire.tracing import DATA_SOURCE, OPERATION, RETRIEVAL, span
from regrad_vllm.client import Answer, AsyncBank, BankTooOldError, Hit, Query
from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.bank_errors import outage, wrong_learner
from regrad_vllm.serve.api.engine import Engine, Placement, ResidentError
from regrad_vllm.serve.api.plan import Plan
from regrad_vllm.serve.api.plugin_metrics import Metrics
from regrad_vllm.serve.api.request_errors import RequestError
from regrad_vllm.serve.api.used import Used, UsedDocument, UsedSentence
from regrad_vllm.serve.arena.arena import Arena, ArenaHold
from regrad_vllm.serve.arena.record_files import ArenaError
from regrad_vllm.serve.recipe import Recipe

_SCRAPE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Found:
    """The documents found for a request, with their gradients held."""

    used: Used
    gradients: ArenaHold
    recipe: Recipe | None  # None: no document was found, so the request runs on the base model
    texts: tuple[tuple[str, str], ...]  # (title, text) for the prompt: sentences, or documents in mode icl
    whole: tuple[tuple[str, str], ...] = ()  # in mode auto: (title, text) of the documents, for the second answer
    min_confidence: float = 0.0  # in mode auto


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """The documents held for a request, in the arena and in the workers.

    Without a placement the request runs on the base model.
    """

    found: Found
    placement: Placement | None

    @property
    def used(self) -> Used:
        return self.found.used


class Preparer:
    """Prepares requests with one learner from one bank."""

    def __init__(
        self, learner: Learner, bank: AsyncBank, arena: Arena, engine: Engine, metrics: Metrics, max_bank_permits: int
    ) -> None:
        self._learner = learner
        # Requests that all ask at once would slow each other down until they miss the bank's deadline.
        self._bank_permits = asyncio.Semaphore(max_bank_permits)
        self._bank = bank
        self._arena = arena
        self._engine = engine
        self._metrics = metrics
        self._seen_evictions = 0

    async def prepare(self, plan: Plan, wanted_rank: int | None = None) -> PreparedRequest:
        """Finds a request's documents and makes them resident where it will run.

        The caller must release ``placement`` and ``found.gradients``. After a RequestError nothing is held.
        """
        found = await self._find_held(plan)
        if found.recipe is None:
            return PreparedRequest(found, None)
        placement = self._engine.place(found.recipe, wanted_rank)
        try:
            await self._make_resident(placement, found.used.timings_ms)
            return PreparedRequest(found, placement)
        except ResidentError as error:
            self._engine.release(placement)
            found.gradients.release(discard=error.damaged)  # a damaged record must leave the arena
            raise RequestError(503, f"the documents can't be made resident: {error}") from error
        except BaseException:  # also after a cancellation the holds must end
            self._engine.release(placement)
            found.gradients.release()
            raise

    async def _find_held(self, plan: Plan) -> Found:
        """Finds a request's documents and holds their gradients in the arena. After a RequestError nothing is held."""
        hold = self._arena.hold()
        timings: dict[str, float] = {}
        asked = time.perf_counter()
        try:
            async with self._bank_permits:
                plan, answer = await self._find(plan, hold, timings, asked)
            recipe = self._recipe(plan, answer.hits) if answer.hits else None
            whole = documents_of(answer) if plan.mode == "auto" else ()
            used = self._used(plan, answer, recipe, timings)
            return Found(used, hold, recipe, texts_of(plan, answer), whole, plan.min_confidence)
        except (BankError, GradientFormatError, ArenaError) as error:
            hold.release()
            raise as_request_error(error, self._bank.address) from error
        except BaseException:  # also after a cancellation the hold must end
            hold.release()
            raise

    async def _find(self, plan: Plan, hold: ArenaHold, timings: dict[str, float], asked: float) -> tuple[Plan, Answer]:
        """The bank's hits, and the plan with the mode that they allow. ``hold`` then holds all their gradients in the
        arena. The time of the query runs from ``asked``: it contains the wait for a permit."""
        for last_try in (False, True):
            with (
                self._clock("retrieve", timings, asked),
                span("regrad.retrieve", **{OPERATION: RETRIEVAL, DATA_SOURCE: plan.query.namespace}),
            ):
                plan, answer = await self._query(plan)
            try:
                await self._fetch(answer.hits, hold, timings)
                return plan, answer
            except NotFoundError:
                # A document was updated or deleted between the query and the fetch. A new query gets the new state.
                if last_try:
                    raise
                asked = time.perf_counter()
                plan = replace(plan, query=replace(plan.query, newest=True))
        raise AssertionError("unreachable")

    async def _query(self, plan: Plan) -> tuple[Plan, Answer]:
        try:
            return plan, await self._bank.query(plan.query)
        except BankTooOldError as error:
            bank = f"the bank at {self._bank.address}"
            if plan.keeps_mode:
                message = f"regrad.mode must be blind, because {bank} finds no cues, got {plan.mode}; update the bank"
                raise RequestError(503, message, "regrad.mode") from error
            reason = f"the mode is blind and not the server's {plan.mode}: {bank} finds no cues; update the bank"
            # Another query, if a gradient is gone meanwhile, must not ask for cues again.
            query = replace(plan.query, with_cue=0, cue_text="")
            return replace(plan, mode="blind", query=query, reason=reason), error.answer

    async def _fetch(self, hits: tuple[Hit, ...], hold: ArenaHold, timings: dict[str, float]) -> None:
        missing = hold.take([hit.gradient_digest for hit in hits])
        self._metrics.arena_lookups.labels("hit").inc(len(hits) - len(missing))
        self._metrics.arena_lookups.labels("miss").inc(len(missing))
        with self._clock("fetch", timings), span("regrad.fetch", **{"regrad.num_missing": len(missing)}):
            await self._fetch_missing(missing, hold)
        self._observe_arena()

    async def _fetch_missing(self, missing: list[str], hold: ArenaHold) -> None:
        """Of several nodes, another one is asked once for what a broken stream still owes."""
        lacking = dict.fromkeys(missing)
        last_try = not may_have_nodes(self._bank.address)
        while lacking:
            try:
                async for digest, record in self._bank.fetch([*lacking]):
                    await asyncio.to_thread(hold.put, digest, record)
                    self._metrics.fetched_bytes.inc(len(record))
                    del lacking[digest]
            except UnavailableError:
                if last_try:
                    raise
                last_try = True

    async def _make_resident(self, placement: Placement, timings: dict[str, float]) -> None:
        with self._clock("resident", timings):
            await self._engine.prepare(placement, str(self._arena.folder))
        for worker, figures in self._engine.pools.items():
            self._metrics.observe_worker(worker, figures)

    async def observe(self) -> None:
        """Records the present figures of arena and workers for /metrics.

        The workers answer between two steps. If that takes longer than a second, their last figures stay.
        """
        self._observe_arena()
        with suppress(TimeoutError):
            async with asyncio.timeout(_SCRAPE_SECONDS):
                for found in await self._engine.figures():
                    pool = {name.removeprefix("pool_"): figure for name, figure in found.items()}
                    self._metrics.observe_worker(found["worker"], pool)

    def _observe_arena(self) -> None:
        figures = self._arena.figures()
        self._metrics.observe_arena(figures, self._seen_evictions)
        self._seen_evictions = figures.num_evictions

    def _recipe(self, plan: Plan, hits: tuple[Hit, ...]) -> Recipe:
        return Recipe(
            learner=self._learner.fingerprint,
            digests=tuple(hit.gradient_digest for hit in hits),
            weights=self._weights(hits),
            gamma=plan.gamma,
        )

    def _weights(self, hits: tuple[Hit, ...]) -> tuple[float, ...]:
        # Always the cosine, because the learner's temperature was trained on cosines. Scores of BM25 and hybrid
        # retrieval are none. The first hit has the weight 1, and so has any hit with a greater cosine.
        return self._learner.config.weights([hit.cosine for hit in hits])

    def _used(self, plan: Plan, answer: Answer, recipe: Recipe | None, timings: dict[str, float]) -> Used:
        return Used(
            request_id=plan.request_id,
            namespace=plan.query.namespace,
            mode=plan.mode if recipe or plan.mode != "auto" else "cue",  # without a document nothing is asked twice
            gamma=plan.gamma,
            documents=tuple(
                UsedDocument(hit.id, hit.version, hit.score, weight, hit.gradient_digest)
                for hit, weight in zip(answer.hits, self._weights(answer.hits), strict=True)
            ),
            cue=tuple(
                UsedSentence(hit.id, sentence.start, sentence.end, sentence.text, sentence.score)
                for hit, sentence in answer.cue
            ),
            adapter=recipe.name if recipe else None,
            reason=plan.reason if recipe else no_hits(plan.query),
            timings_ms=timings,
            query=plan.query.text or None,
            sequence=answer.sequence,
        )

    @contextmanager
    def _clock(self, name: str, timings: dict[str, float], start: float | None = None) -> Iterator[None]:
        """Records how long the block takes, also where it fails. ``start``: the moment to count from, if not now."""
        start = time.perf_counter() if start is None else start
        try:
            yield
        finally:
            ms = (time.perf_counter() - start) * 1000
            timings[name] = timings.get(name, 0.0) + ms
            self._metrics.timings[name].observe(ms)


def texts_of(plan: Plan, answer: Answer) -> tuple[tuple[str, str], ...]:
    """(title, text) of the sentences or documents for the prompt, best first. None in mode blind."""
    if plan.mode == "icl":
        return documents_of(answer)
    return tuple((hit.title, sentence.text) for hit, sentence in answer.cue)


def documents_of(answer: Answer) -> tuple[tuple[str, str], ...]:
    """(title, text) of the documents, best first."""
    return tuple((hit.title, hit.text) for hit in answer.hits)


def as_request_error(error: Exception, bank: str) -> RequestError:
    """The error that a client gets for a failure in the preparation."""
    if isinstance(error, NotFoundError) and error.kind in ("namespace", "document"):
        param = {"namespace": "regrad.namespace", "document": "regrad.document_ids"}[error.kind]
        return RequestError(404, error.message, param)
    if isinstance(error, InvalidArgumentError | OutOfRangeError):
        field = "query" if error.field == "text" else error.field
        return RequestError(400, f"regrad.{field} is refused by the bank: {error.message}", f"regrad.{field}")
    if isinstance(error, LimitExceededError):
        return RequestError(
            400,
            f"the documents' texts must fit one message of the bank: {error.message}; ask with a smaller "
            "regrad.top_k, fewer regrad.document_ids or regrad.mode blind",
            "regrad.mode",
        )
    if isinstance(error, WrongLearnerError):
        return wrong_learner(bank, of_bank=error.actual, of_server=error.expected)
    if isinstance(error, BankError):
        return outage(error, bank)
    if isinstance(error, ArenaError):
        return RequestError(503, str(error))
    return RequestError(503, f"the gradient bank at {bank} sent a damaged gradient: {error}")


def no_hits(query: Query) -> str:
    """The reason why no document was used, with the request's conditions on documents."""
    wanted = [
        *(["was there then"] if query.as_of is not None else []),
        *(["matches the filter"] if query.conditions else []),
        *(["has a word of the query"] if query.retrieval == "lexical" else []),
        *([f"scores {query.min_score:g} or more"] if query.min_score is not None else []),
    ]
    return f"no document {' and '.join(wanted) or 'is there'}; the base model answers"
