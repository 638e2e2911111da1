import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Retrieval(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RETRIEVAL_UNSPECIFIED: _ClassVar[Retrieval]
    DENSE: _ClassVar[Retrieval]
    LEXICAL: _ClassVar[Retrieval]
    HYBRID: _ClassVar[Retrieval]
RETRIEVAL_UNSPECIFIED: Retrieval
DENSE: Retrieval
LEXICAL: Retrieval
HYBRID: Retrieval

class Document(_message.Message):
    __slots__ = ("namespace", "id", "title", "text", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    id: str
    title: str
    text: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, namespace: _Optional[str] = ..., id: _Optional[str] = ..., title: _Optional[str] = ..., text: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class IngestDocumentsRequest(_message.Message):
    __slots__ = ("document", "expected_version")
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    document: Document
    expected_version: int
    def __init__(self, document: _Optional[_Union[Document, _Mapping]] = ..., expected_version: _Optional[int] = ...) -> None: ...

class IngestDocumentsResponse(_message.Message):
    __slots__ = ("namespace", "id", "version", "gradient_digest", "outcome", "num_tokens", "truncated", "sequence", "relative_error")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[IngestDocumentsResponse.Outcome]
        CREATED: _ClassVar[IngestDocumentsResponse.Outcome]
        UPDATED: _ClassVar[IngestDocumentsResponse.Outcome]
        UNCHANGED: _ClassVar[IngestDocumentsResponse.Outcome]
    OUTCOME_UNSPECIFIED: IngestDocumentsResponse.Outcome
    CREATED: IngestDocumentsResponse.Outcome
    UPDATED: IngestDocumentsResponse.Outcome
    UNCHANGED: IngestDocumentsResponse.Outcome
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    id: str
    version: int
    gradient_digest: str
    outcome: IngestDocumentsResponse.Outcome
    num_tokens: int
    truncated: bool
    sequence: int
    relative_error: float
    def __init__(self, namespace: _Optional[str] = ..., id: _Optional[str] = ..., version: _Optional[int] = ..., gradient_digest: _Optional[str] = ..., outcome: _Optional[_Union[IngestDocumentsResponse.Outcome, str]] = ..., num_tokens: _Optional[int] = ..., truncated: _Optional[bool] = ..., sequence: _Optional[int] = ..., relative_error: _Optional[float] = ...) -> None: ...

class IngestGradientsRequest(_message.Message):
    __slots__ = ("header", "chunk")
    class Header(_message.Message):
        __slots__ = ("document", "record_bytes", "embedding", "expected_version")
        DOCUMENT_FIELD_NUMBER: _ClassVar[int]
        RECORD_BYTES_FIELD_NUMBER: _ClassVar[int]
        EMBEDDING_FIELD_NUMBER: _ClassVar[int]
        EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
        document: Document
        record_bytes: int
        embedding: _containers.RepeatedScalarFieldContainer[float]
        expected_version: int
        def __init__(self, document: _Optional[_Union[Document, _Mapping]] = ..., record_bytes: _Optional[int] = ..., embedding: _Optional[_Iterable[float]] = ..., expected_version: _Optional[int] = ...) -> None: ...
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: IngestGradientsRequest.Header
    chunk: bytes
    def __init__(self, header: _Optional[_Union[IngestGradientsRequest.Header, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class DeleteDocumentRequest(_message.Message):
    __slots__ = ("namespace", "id", "expected_version", "purge")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    PURGE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    id: str
    expected_version: int
    purge: bool
    def __init__(self, namespace: _Optional[str] = ..., id: _Optional[str] = ..., expected_version: _Optional[int] = ..., purge: _Optional[bool] = ...) -> None: ...

class DeleteDocumentResponse(_message.Message):
    __slots__ = ("version", "sequence")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    version: int
    sequence: int
    def __init__(self, version: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class GetDocumentRequest(_message.Message):
    __slots__ = ("namespace", "id")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    id: str
    def __init__(self, namespace: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class GetDocumentResponse(_message.Message):
    __slots__ = ("document", "version", "gradient_digest", "updated_at", "num_tokens", "truncated", "sequence")
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    document: Document
    version: int
    gradient_digest: str
    updated_at: _timestamp_pb2.Timestamp
    num_tokens: int
    truncated: bool
    sequence: int
    def __init__(self, document: _Optional[_Union[Document, _Mapping]] = ..., version: _Optional[int] = ..., gradient_digest: _Optional[str] = ..., updated_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., num_tokens: _Optional[int] = ..., truncated: _Optional[bool] = ..., sequence: _Optional[int] = ...) -> None: ...

class ListDocumentsRequest(_message.Message):
    __slots__ = ("namespace", "page_size", "page_token", "filter", "prefix", "after_id")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    AFTER_ID_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    page_size: int
    page_token: str
    filter: Filter
    prefix: str
    after_id: str
    def __init__(self, namespace: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., filter: _Optional[_Union[Filter, _Mapping]] = ..., prefix: _Optional[str] = ..., after_id: _Optional[str] = ...) -> None: ...

class ListDocumentsResponse(_message.Message):
    __slots__ = ("documents", "next_page_token")
    class Entry(_message.Message):
        __slots__ = ("id", "title", "version", "gradient_digest", "num_text_bytes", "metadata")
        class MetadataEntry(_message.Message):
            __slots__ = ("key", "value")
            KEY_FIELD_NUMBER: _ClassVar[int]
            VALUE_FIELD_NUMBER: _ClassVar[int]
            key: str
            value: str
            def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
        ID_FIELD_NUMBER: _ClassVar[int]
        TITLE_FIELD_NUMBER: _ClassVar[int]
        VERSION_FIELD_NUMBER: _ClassVar[int]
        GRADIENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
        NUM_TEXT_BYTES_FIELD_NUMBER: _ClassVar[int]
        METADATA_FIELD_NUMBER: _ClassVar[int]
        id: str
        title: str
        version: int
        gradient_digest: str
        num_text_bytes: int
        metadata: _containers.ScalarMap[str, str]
        def __init__(self, id: _Optional[str] = ..., title: _Optional[str] = ..., version: _Optional[int] = ..., gradient_digest: _Optional[str] = ..., num_text_bytes: _Optional[int] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    documents: _containers.RepeatedCompositeFieldContainer[ListDocumentsResponse.Entry]
    next_page_token: str
    def __init__(self, documents: _Optional[_Iterable[_Union[ListDocumentsResponse.Entry, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("conditions",)
    class Condition(_message.Message):
        __slots__ = ("key", "operator", "values")
        class Operator(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
            __slots__ = ()
            OPERATOR_UNSPECIFIED: _ClassVar[Filter.Condition.Operator]
            EQUALS: _ClassVar[Filter.Condition.Operator]
            NOT_EQUALS: _ClassVar[Filter.Condition.Operator]
            PRESENT: _ClassVar[Filter.Condition.Operator]
            ABSENT: _ClassVar[Filter.Condition.Operator]
        OPERATOR_UNSPECIFIED: Filter.Condition.Operator
        EQUALS: Filter.Condition.Operator
        NOT_EQUALS: Filter.Condition.Operator
        PRESENT: Filter.Condition.Operator
        ABSENT: Filter.Condition.Operator
        KEY_FIELD_NUMBER: _ClassVar[int]
        OPERATOR_FIELD_NUMBER: _ClassVar[int]
        VALUES_FIELD_NUMBER: _ClassVar[int]
        key: str
        operator: Filter.Condition.Operator
        values: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, key: _Optional[str] = ..., operator: _Optional[_Union[Filter.Condition.Operator, str]] = ..., values: _Optional[_Iterable[str]] = ...) -> None: ...
    CONDITIONS_FIELD_NUMBER: _ClassVar[int]
    conditions: _containers.RepeatedCompositeFieldContainer[Filter.Condition]
    def __init__(self, conditions: _Optional[_Iterable[_Union[Filter.Condition, _Mapping]]] = ...) -> None: ...

class QueryRequest(_message.Message):
    __slots__ = ("namespace", "text", "vector", "document_ids", "top_k", "min_score", "learner_fingerprint", "include_gradients", "include_text", "retrieval", "filter", "as_of", "with_cue", "cue_text")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_SCORE_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TEXT_FIELD_NUMBER: _ClassVar[int]
    RETRIEVAL_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    AS_OF_FIELD_NUMBER: _ClassVar[int]
    WITH_CUE_FIELD_NUMBER: _ClassVar[int]
    CUE_TEXT_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    text: str
    vector: _containers.RepeatedScalarFieldContainer[float]
    document_ids: _containers.RepeatedScalarFieldContainer[str]
    top_k: int
    min_score: float
    learner_fingerprint: str
    include_gradients: bool
    include_text: bool
    retrieval: Retrieval
    filter: Filter
    as_of: int
    with_cue: int
    cue_text: str
    def __init__(self, namespace: _Optional[str] = ..., text: _Optional[str] = ..., vector: _Optional[_Iterable[float]] = ..., document_ids: _Optional[_Iterable[str]] = ..., top_k: _Optional[int] = ..., min_score: _Optional[float] = ..., learner_fingerprint: _Optional[str] = ..., include_gradients: _Optional[bool] = ..., include_text: _Optional[bool] = ..., retrieval: _Optional[_Union[Retrieval, str]] = ..., filter: _Optional[_Union[Filter, _Mapping]] = ..., as_of: _Optional[int] = ..., with_cue: _Optional[int] = ..., cue_text: _Optional[str] = ...) -> None: ...

class QueryResponse(_message.Message):
    __slots__ = ("hits", "learner_fingerprint", "sequence", "with_cue")
    class CueSentence(_message.Message):
        __slots__ = ("start", "end", "text", "score")
        START_FIELD_NUMBER: _ClassVar[int]
        END_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        SCORE_FIELD_NUMBER: _ClassVar[int]
        start: int
        end: int
        text: str
        score: float
        def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., text: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...
    class Hit(_message.Message):
        __slots__ = ("id", "version", "score", "gradient_digest", "gradient_bytes", "gradient", "title", "text", "cosine", "cue")
        ID_FIELD_NUMBER: _ClassVar[int]
        VERSION_FIELD_NUMBER: _ClassVar[int]
        SCORE_FIELD_NUMBER: _ClassVar[int]
        GRADIENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
        GRADIENT_BYTES_FIELD_NUMBER: _ClassVar[int]
        GRADIENT_FIELD_NUMBER: _ClassVar[int]
        TITLE_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        COSINE_FIELD_NUMBER: _ClassVar[int]
        CUE_FIELD_NUMBER: _ClassVar[int]
        id: str
        version: int
        score: float
        gradient_digest: str
        gradient_bytes: int
        gradient: bytes
        title: str
        text: str
        cosine: float
        cue: _containers.RepeatedCompositeFieldContainer[QueryResponse.CueSentence]
        def __init__(self, id: _Optional[str] = ..., version: _Optional[int] = ..., score: _Optional[float] = ..., gradient_digest: _Optional[str] = ..., gradient_bytes: _Optional[int] = ..., gradient: _Optional[bytes] = ..., title: _Optional[str] = ..., text: _Optional[str] = ..., cosine: _Optional[float] = ..., cue: _Optional[_Iterable[_Union[QueryResponse.CueSentence, _Mapping]]] = ...) -> None: ...
    HITS_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WITH_CUE_FIELD_NUMBER: _ClassVar[int]
    hits: _containers.RepeatedCompositeFieldContainer[QueryResponse.Hit]
    learner_fingerprint: str
    sequence: int
    with_cue: int
    def __init__(self, hits: _Optional[_Iterable[_Union[QueryResponse.Hit, _Mapping]]] = ..., learner_fingerprint: _Optional[str] = ..., sequence: _Optional[int] = ..., with_cue: _Optional[int] = ...) -> None: ...

class BatchQueryRequest(_message.Message):
    __slots__ = ("queries",)
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    queries: _containers.RepeatedCompositeFieldContainer[QueryRequest]
    def __init__(self, queries: _Optional[_Iterable[_Union[QueryRequest, _Mapping]]] = ...) -> None: ...

class BatchQueryResponse(_message.Message):
    __slots__ = ("responses",)
    RESPONSES_FIELD_NUMBER: _ClassVar[int]
    responses: _containers.RepeatedCompositeFieldContainer[QueryResponse]
    def __init__(self, responses: _Optional[_Iterable[_Union[QueryResponse, _Mapping]]] = ...) -> None: ...

class FetchGradientsRequest(_message.Message):
    __slots__ = ("digests",)
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, digests: _Optional[_Iterable[str]] = ...) -> None: ...

class FetchGradientsResponse(_message.Message):
    __slots__ = ("digest", "record_bytes", "offset", "chunk")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RECORD_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    digest: str
    record_bytes: int
    offset: int
    chunk: bytes
    def __init__(self, digest: _Optional[str] = ..., record_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("namespaces", "num_documents", "num_gradients", "gradient_bytes", "sequence", "indexed_sequence", "learner_fingerprint", "layout_id", "codec", "embedder", "embedding_dimension", "cache_hits", "cache_misses", "cache_available", "version", "num_past_versions", "oldest_as_of", "free_disk_bytes", "removals_stopped", "replica")
    class Namespace(_message.Message):
        __slots__ = ("namespace", "num_documents")
        NAMESPACE_FIELD_NUMBER: _ClassVar[int]
        NUM_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
        namespace: str
        num_documents: int
        def __init__(self, namespace: _Optional[str] = ..., num_documents: _Optional[int] = ...) -> None: ...
    class Replica(_message.Message):
        __slots__ = ("is_up", "staleness_ms", "num_reads", "num_behind", "num_down")
        IS_UP_FIELD_NUMBER: _ClassVar[int]
        STALENESS_MS_FIELD_NUMBER: _ClassVar[int]
        NUM_READS_FIELD_NUMBER: _ClassVar[int]
        NUM_BEHIND_FIELD_NUMBER: _ClassVar[int]
        NUM_DOWN_FIELD_NUMBER: _ClassVar[int]
        is_up: bool
        staleness_ms: int
        num_reads: int
        num_behind: int
        num_down: int
        def __init__(self, is_up: _Optional[bool] = ..., staleness_ms: _Optional[int] = ..., num_reads: _Optional[int] = ..., num_behind: _Optional[int] = ..., num_down: _Optional[int] = ...) -> None: ...
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    NUM_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    INDEXED_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    EMBEDDER_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_DIMENSION_FIELD_NUMBER: _ClassVar[int]
    CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    CACHE_MISSES_FIELD_NUMBER: _ClassVar[int]
    CACHE_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_PAST_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_AS_OF_FIELD_NUMBER: _ClassVar[int]
    FREE_DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    REMOVALS_STOPPED_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[GetStatsResponse.Namespace]
    num_documents: int
    num_gradients: int
    gradient_bytes: int
    sequence: int
    indexed_sequence: int
    learner_fingerprint: str
    layout_id: str
    codec: str
    embedder: str
    embedding_dimension: int
    cache_hits: int
    cache_misses: int
    cache_available: bool
    version: str
    num_past_versions: int
    oldest_as_of: int
    free_disk_bytes: int
    removals_stopped: bool
    replica: GetStatsResponse.Replica
    def __init__(self, namespaces: _Optional[_Iterable[_Union[GetStatsResponse.Namespace, _Mapping]]] = ..., num_documents: _Optional[int] = ..., num_gradients: _Optional[int] = ..., gradient_bytes: _Optional[int] = ..., sequence: _Optional[int] = ..., indexed_sequence: _Optional[int] = ..., learner_fingerprint: _Optional[str] = ..., layout_id: _Optional[str] = ..., codec: _Optional[str] = ..., embedder: _Optional[str] = ..., embedding_dimension: _Optional[int] = ..., cache_hits: _Optional[int] = ..., cache_misses: _Optional[int] = ..., cache_available: _Optional[bool] = ..., version: _Optional[str] = ..., num_past_versions: _Optional[int] = ..., oldest_as_of: _Optional[int] = ..., free_disk_bytes: _Optional[int] = ..., removals_stopped: _Optional[bool] = ..., replica: _Optional[_Union[GetStatsResponse.Replica, _Mapping]] = ...) -> None: ...

class CreateSnapshotRequest(_message.Message):
    __slots__ = ("target",)
    TARGET_FIELD_NUMBER: _ClassVar[int]
    target: str
    def __init__(self, target: _Optional[str] = ...) -> None: ...

class CreateSnapshotResponse(_message.Message):
    __slots__ = ("num_gradients", "num_done", "num_copied", "copied_bytes", "is_whole", "sequence", "catalog_digest")
    NUM_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_DONE_FIELD_NUMBER: _ClassVar[int]
    NUM_COPIED_FIELD_NUMBER: _ClassVar[int]
    COPIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IS_WHOLE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CATALOG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    num_gradients: int
    num_done: int
    num_copied: int
    copied_bytes: int
    is_whole: bool
    sequence: int
    catalog_digest: str
    def __init__(self, num_gradients: _Optional[int] = ..., num_done: _Optional[int] = ..., num_copied: _Optional[int] = ..., copied_bytes: _Optional[int] = ..., is_whole: _Optional[bool] = ..., sequence: _Optional[int] = ..., catalog_digest: _Optional[str] = ...) -> None: ...

class RecodeCollectionRequest(_message.Message):
    __slots__ = ("codec",)
    CODEC_FIELD_NUMBER: _ClassVar[int]
    codec: str
    def __init__(self, codec: _Optional[str] = ...) -> None: ...

class RecodeCollectionResponse(_message.Message):
    __slots__ = ("num_documents", "num_done", "num_recoded", "num_failed", "finished")
    NUM_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_DONE_FIELD_NUMBER: _ClassVar[int]
    NUM_RECODED_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    num_documents: int
    num_done: int
    num_recoded: int
    num_failed: int
    finished: bool
    def __init__(self, num_documents: _Optional[int] = ..., num_done: _Optional[int] = ..., num_recoded: _Optional[int] = ..., num_failed: _Optional[int] = ..., finished: _Optional[bool] = ...) -> None: ...

class UpgradeLearnerRequest(_message.Message):
    __slots__ = ("action", "learner")
    class Action(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ACTION_UNSPECIFIED: _ClassVar[UpgradeLearnerRequest.Action]
        STATUS: _ClassVar[UpgradeLearnerRequest.Action]
        BEGIN: _ClassVar[UpgradeLearnerRequest.Action]
        FINISH: _ClassVar[UpgradeLearnerRequest.Action]
        BACK: _ClassVar[UpgradeLearnerRequest.Action]
    ACTION_UNSPECIFIED: UpgradeLearnerRequest.Action
    STATUS: UpgradeLearnerRequest.Action
    BEGIN: UpgradeLearnerRequest.Action
    FINISH: UpgradeLearnerRequest.Action
    BACK: UpgradeLearnerRequest.Action
    ACTION_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    action: UpgradeLearnerRequest.Action
    learner: str
    def __init__(self, action: _Optional[_Union[UpgradeLearnerRequest.Action, str]] = ..., learner: _Optional[str] = ...) -> None: ...

class UpgradeLearnerResponse(_message.Message):
    __slots__ = ("learner_fingerprint", "next_fingerprint", "num_versions", "num_done", "is_level", "problem")
    LEARNER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NEXT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_DONE_FIELD_NUMBER: _ClassVar[int]
    IS_LEVEL_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    learner_fingerprint: str
    next_fingerprint: str
    num_versions: int
    num_done: int
    is_level: bool
    problem: str
    def __init__(self, learner_fingerprint: _Optional[str] = ..., next_fingerprint: _Optional[str] = ..., num_versions: _Optional[int] = ..., num_done: _Optional[int] = ..., is_level: _Optional[bool] = ..., problem: _Optional[str] = ...) -> None: ...
