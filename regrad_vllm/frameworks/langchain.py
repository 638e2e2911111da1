"""LangChain: ``RegradRetriever`` and ``RegradVectorStore`` on a bank, ``ChatRegrad`` on a server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import run_in_executor
from langchain_core.vectorstores import VectorStore
from langchain_openai import ChatOpenAI
from pydantic import Field

from bank_service.errors import NotFoundError
from bank_service.wire.limits import DEFAULT_NAMESPACE
from regrad_vllm.client import Bank, Query
from regrad_vllm.client.values import Retrieval
from regrad_vllm.frameworks.found import conditions_of, document_of, existing, found, metadata_of, with_options


class RegradRetriever(BaseRetriever):
    """The documents of a bank that are about a text, best first.

    ``metadata["regrad"]`` of each document has ``score``, ``cosine``, ``version`` and ``gradient_digest``.
    ``invoke`` raises BankError, and NotFoundError for an unknown namespace.
    """

    bank: Bank
    namespace: str = DEFAULT_NAMESPACE
    top_k: int = 3
    min_score: float | None = None  # least cosine, −1 to 1
    retrieval: Retrieval = "dense"
    filter: dict[str, Any] = Field(default_factory=dict)  # metadata that documents must have; a list: one of these

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, top_k: int | None = None
    ) -> list[Document]:
        asked = Query(
            query, namespace=self.namespace, top_k=self.top_k if top_k is None else top_k, min_score=self.min_score,
            retrieval=self.retrieval, conditions=conditions_of(self.filter),
        )  # fmt: skip
        return [
            Document(
                document.text, id=hit.id,
                metadata={
                    **metadata_of(document),
                    "regrad": {
                        "score": hit.score, "cosine": hit.cosine, "version": hit.version,
                        "gradient_digest": hit.gradient_digest,
                    },
                },
            )
            for hit, document in found(self.bank, asked)
        ]  # fmt: skip

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, top_k: int | None = None
    ) -> list[Document]:
        sync = run_manager.get_sync()
        return await run_in_executor(None, self._get_relevant_documents, query, run_manager=sync, top_k=top_k)


class RegradVectorStore(VectorStore):
    """A namespace of a bank, empty if it doesn't exist yet. The bank embeds texts and makes their gradients.

    Metadata may have any value of JSON; ``metadata["title"]`` is the document's title. Methods raise BankError, and
    TypeError for arguments that the bank's client doesn't know either.
    """

    def __init__(self, bank: Bank, *, namespace: str = DEFAULT_NAMESPACE) -> None:
        self.bank = bank
        self.namespace = namespace

    @classmethod
    def from_texts(
        cls, texts: list[str], embedding: Embeddings | None = None, metadatas: list[dict[str, Any]] | None = None,
        *, ids: list[str] | None = None, bank: Bank | None = None, namespace: str = DEFAULT_NAMESPACE, **kwargs: Any,
    ) -> Self:  # fmt: skip
        """A store with these texts. ``embedding`` isn't used. bank: one at the default address, if it is left out."""
        store = cls(bank or Bank(), namespace=namespace, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def add_texts(
        self, texts: Iterable[str], metadatas: list[dict[str, Any]] | None = None, *,
        ids: Sequence[str | None] | None = None, **kwargs: Any,
    ) -> list[str]:  # fmt: skip
        """Stores texts and returns their ids. Texts without ids get them from title and text.

        If the bank refuses one, those before it are stored. ValueError for metadata that JSON hasn't, or if the numbers
        of texts, metadatas and ids differ.
        """
        texts = list(texts)
        parts = zip(ids or [None] * len(texts), texts, metadatas or [{}] * len(texts), strict=True)
        documents = [document_of(id or "", text, metadata) for id, text, metadata in parts]
        return [receipt.id for receipt in self.bank.ingest(documents, namespace=self.namespace, **kwargs)]

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents with these ids, in order, without those that the bank hasn't."""
        return [
            Document(document.text, id=document.id, metadata=metadata_of(document))
            for document in existing(self.bank, ids, self.namespace)
        ]

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Deletes documents. False if the bank hasn't one of them. ValueError without ids."""
        if ids is None:
            raise ValueError("ids must name the documents to delete, got None; list them with Bank.list")
        all_there = True
        for id in ids:
            try:
                self.bank.delete(id, namespace=self.namespace, **kwargs)
            except NotFoundError:
                all_there = False
        return all_there

    def similarity_search(
        self, query: str, k: int = 4, filter: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Document]:
        """The k documents nearest to a text. filter: metadata that they must have; a list means one of these.

        kwargs: other fields of the query, such as ``min_score`` and ``retrieval``.
        """
        return [document for document, _ in self.similarity_search_with_score(query, k, filter, **kwargs)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, filter: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As ``similarity_search``, each with its cosine, −1 to 1."""
        asked = Query(query, namespace=self.namespace, top_k=k, conditions=conditions_of(filter), **kwargs)
        try:
            hits = found(self.bank, asked)
        except NotFoundError:  # nothing was stored in this namespace yet
            return []
        return [(Document(doc.text, id=doc.id, metadata=metadata_of(doc)), hit.cosine) for hit, doc in hits]

    def _select_relevance_score_fn(self) -> Any:
        return lambda cosine: max(0.0, cosine)  # LangChain wants 0 to 1


class ChatRegrad(ChatOpenAI):
    """ChatOpenAI on a server with ReGrad. ``response_metadata["regrad"]`` of an answer names its documents.

    A call may bring options of its own, such as ``chat.invoke("…", regrad={"top_k": 2})``. They go before those of the
    model. docs/serving.md lists the options.
    """

    regrad: dict[str, Any] = Field(default_factory=dict)

    def _get_request_payload(self, input_: Any, *, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        of_call = kwargs.pop("regrad", None)
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        payload["extra_body"] = with_options(payload.get("extra_body"), self.regrad, of_call)
        return payload

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        body = response if isinstance(response, dict) else response.model_extra
        for generation in result.generations:
            generation.message.response_metadata["regrad"] = body.get("regrad")
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: Any, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        made = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        if made is not None and "regrad" in chunk:  # in the first chunk alone
            made.message.response_metadata["regrad"] = chunk["regrad"]
        return made
