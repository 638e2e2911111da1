"""LlamaIndex: ``RegradRetriever`` on a bank, and the LLM ``Regrad`` on a server."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.llms.openai_like import OpenAILike

from bank_service.wire.limits import DEFAULT_NAMESPACE
from regrad_vllm.client import Bank, Query
from regrad_vllm.client.values import Retrieval
from regrad_vllm.frameworks.found import conditions_of, found, metadata_of, with_options


class RegradRetriever(BaseRetriever):
    """The documents of a bank that are about a text, best first, as nodes with the document's id.

    ``retrieve`` raises BankError, and NotFoundError for an unknown namespace.
    """

    def __init__(
        self, bank: Bank, *, namespace: str = DEFAULT_NAMESPACE, top_k: int = 3, min_score: float | None = None,
        retrieval: Retrieval = "dense", filter: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """min_score: least cosine, −1 to 1. filter: metadata that documents must have; a list means one of these."""
        super().__init__()
        self._bank = bank
        self._asked: dict[str, Any] = {
            "namespace": namespace, "top_k": top_k, "min_score": min_score, "retrieval": retrieval,
            "conditions": conditions_of(filter),
        }  # fmt: skip

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [
            NodeWithScore(
                node=TextNode(id_=hit.id, text=document.text, metadata=metadata_of(document)), score=hit.score
            )
            for hit, document in found(self._bank, Query(query_bundle.query_str, **self._asked))
        ]


class Regrad(OpenAILike):
    """OpenAILike on a server with ReGrad. ``additional_kwargs["regrad"]`` of an answer names its documents.

    In a stream the first part has it. A call may bring options of its own, such as
    ``llm.chat(messages, regrad={"top_k": 2})``. They go before those of the model. docs/serving.md lists the options.
    """

    is_chat_model: bool = True
    regrad: dict[str, Any] = Field(default_factory=dict)

    def _get_model_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        of_call = kwargs.pop("regrad", None)
        made: dict[str, Any] = super()._get_model_kwargs(**kwargs)
        return {**made, "extra_body": with_options(made.get("extra_body"), self.regrad, of_call)}

    def _get_response_token_counts(self, raw_response: Any) -> dict[str, Any]:
        counts: dict[str, Any] = super()._get_response_token_counts(raw_response)
        used = getattr(raw_response, "regrad", None)
        return {**counts, "regrad": used} if used else counts
