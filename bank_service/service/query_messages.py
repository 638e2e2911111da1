"""Queries on the wire: turns requests into queries, and results into responses."""

from __future__ import annotations

from bank_service.errors import InvalidArgumentError
from bank_service.search.answer_batch import placed
from bank_service.values.documents import Query, QueryResult, Retrieval
from bank_service.values.filters import Condition, Operator
from bank_service.wire import limits
from bank_service.wire.generated import bank_pb2 as pb


def query_of(request: pb.QueryRequest, at_least: int | None = None) -> Query:
    """The query of a request. ``at_least``: the sequence that its caller shows. InvalidArgumentError names the
    field."""
    return Query(
        namespace=request.namespace,
        text=request.text,
        vector=tuple(request.vector),
        document_ids=tuple(request.document_ids),
        top_k=request.top_k,
        min_score=request.min_score if request.HasField("min_score") else -1.0,
        learner_fingerprint=request.learner_fingerprint,
        include_gradients=request.include_gradients,
        include_text=request.include_text,
        retrieval=_retrieval_of(request.retrieval),
        conditions=conditions_of(request.filter),
        as_of=request.as_of if request.HasField("as_of") else None,
        with_cue=request.with_cue,
        cue_text=request.cue_text,
        at_least=None if request.HasField("as_of") else at_least,
    )


def check_batch(request: pb.BatchQueryRequest) -> None:
    """InvalidArgumentError if there are too many queries. Call it before the work for each query."""
    if not 1 <= len(request.queries) <= limits.MAX_BATCH_QUERIES:
        raise InvalidArgumentError(
            f"queries must be 1..{limits.MAX_BATCH_QUERIES}, got {len(request.queries)}", field="queries"
        )


def queries_of(request: pb.BatchQueryRequest, at_least: int | None = None) -> list[Query]:
    """The queries of a batch. InvalidArgumentError names the field as ``queries[i].field``."""
    queries = []
    for index, item in enumerate(request.queries):
        try:
            queries.append(query_of(item, at_least))
        except InvalidArgumentError as error:
            raise placed(error, index) from error
    return queries


def response_of(result: QueryResult, with_cue: int) -> pb.QueryResponse:
    """``with_cue``: the query's. Its echo tells the client that this bank finds cues."""
    num_whole = len(result.hits) if result.num_with_record is None else result.num_with_record
    hits = [
        pb.QueryResponse.Hit(
            id=hit.id,
            version=hit.version,
            score=hit.score,
            gradient_digest=hit.gradient_digest,
            gradient_bytes=hit.gradient_bytes,
            gradient=result.records.get(hit.gradient_digest, b"") if index < num_whole else b"",
            title=hit.title,
            text=hit.text,
            cosine=hit.cosine,
            cue=[
                pb.QueryResponse.CueSentence(start=item.start, end=item.end, text=item.text, score=item.score)
                for item in hit.cue
            ],
        )
        for index, hit in enumerate(result.hits)
    ]
    return pb.QueryResponse(
        hits=hits, learner_fingerprint=result.learner_fingerprint, sequence=result.sequence, with_cue=with_cue
    )


def _retrieval_of(number: int) -> Retrieval:
    if number == pb.RETRIEVAL_UNSPECIFIED:
        return Retrieval.DENSE
    try:
        return Retrieval(number)
    except ValueError:
        names = ", ".join(item.name for item in Retrieval)
        raise InvalidArgumentError(f"retrieval must be one of {names}, got {number}", field="retrieval") from None


def conditions_of(message: pb.Filter) -> tuple[Condition, ...]:
    conditions = []
    for index, item in enumerate(message.conditions):
        try:
            operator = Operator(item.operator)
        except ValueError:
            field = f"filter.conditions[{index}].operator"
            names = ", ".join(known.name for known in Operator)
            raise InvalidArgumentError(f"{field} must be one of {names}, got {item.operator}", field=field) from None
        conditions.append(Condition(item.key, operator, tuple(item.values)))
    return tuple(conditions)
