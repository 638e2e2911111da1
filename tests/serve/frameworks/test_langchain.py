"""LangChain's own suites for stores and retrievers on a real bank, and its chat model on the real server."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests, VectorStoreIntegrationTests

from bank_service.errors import NotFoundError
from regrad_vllm.client import Bank
from regrad_vllm.frameworks.langchain import ChatRegrad, RegradRetriever, RegradVectorStore
from tests.serve.support import API_KEY, BASE, BankThread, VllmServer

# The suites leave this mark to asyncio's automatic mode, which our tests don't use.
for suite in (VectorStoreIntegrationTests, RetrieversIntegrationTests):
    for member in vars(suite).values():
        if inspect.iscoroutinefunction(member):
            pytest.mark.asyncio(member)


@pytest.fixture
def client(bank: BankThread) -> Iterator[Bank]:
    with Bank(bank.address) as opened:
        yield opened


@pytest.fixture
def store(client: Bank) -> RegradVectorStore:
    """A store of a namespace of its own."""
    return RegradVectorStore(client, namespace=f"store-{uuid.uuid4()}")


class TestLangChainsSuiteOfStores(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, store: RegradVectorStore) -> VectorStore:
        return store


class TestLangChainsSuiteOfRetrievers(RetrieversIntegrationTests):
    num_results_arg_name = "top_k"
    retriever_constructor = RegradRetriever
    retriever_query_example = "What is the answer to riddle 7?"
    client: Bank

    @pytest.fixture(autouse=True)
    def _with_bank(self, client: Bank) -> None:
        type(self).client = client

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"bank": self.client}


def test_a_store_keeps_title_and_metadata_of_any_kind_and_filters_by_them(store: RegradVectorStore) -> None:
    metadata = {"title": "Orlen", "page": 7, "tags": ["a", "b"], "lang": "en", "more": None, "nested": {"x": 1.5}}
    (id,) = store.add_texts(["The harbour master is Ada Quist."], [metadata])
    assert id.startswith("sha256-")
    store.add_documents([Document("Ropes are made of hemp.", id="rope", metadata={"page": 8, "title": 3})])
    assert store.get_by_ids(["rope", id, "nobody"]) == [
        Document("Ropes are made of hemp.", id="rope", metadata={"page": 8, "title": 3}),
        Document("The harbour master is Ada Quist.", id=id, metadata=metadata),
    ]
    stored = store.bank.get(id, namespace=store.namespace).document
    assert (stored.title, stored.metadata["page"]) == ("Orlen", "7")
    both = store.similarity_search_with_score("Who is the harbour master?", k=2)
    assert [document.id for document, _ in both] == [id, "rope"] and both[0][1] > 0.4 > both[1][1]
    for filter, ids in (({"page": 8}, ["rope"]), ({"page": [7, 8]}, [id, "rope"]), ({"lang": "de"}, [])):
        assert [found.id for found in store.similarity_search("harbour", filter=filter)] == ids
    near = store.as_retriever(search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.4})
    assert [found.id for found in near.invoke("Who is the harbour master?")] == [id]


def test_metadata_that_others_have_changed_are_read_as_far_as_they_can_be(store: RegradVectorStore) -> None:
    (id,) = store.add_texts(["Ropes are made of hemp."], [{"page": 7, "line": 3, "size": 1}])
    stored = store.bank.get(id, namespace=store.namespace).document
    changed = {**stored.metadata, "page": "seven"}
    del changed["line"]
    list(store.bank.ingest([replace(stored, metadata=changed)], namespace=store.namespace))
    (found,) = store.similarity_search("ropes")
    assert found.metadata == {"page": "seven", "size": 1}
    list(store.bank.ingest([replace(stored, metadata={"regrad.json": "no JSON"})], namespace=store.namespace))
    assert store.similarity_search("ropes")[0].metadata == {}


def test_a_store_refuses_what_it_can_not_keep_and_stores_nothing(store: RegradVectorStore) -> None:
    with pytest.raises(ValueError, match=r"metadata\['day'\] must be a value of JSON"):
        store.add_texts(["one", "two"], [{}, {"day": date(2026, 11, 30)}])
    with pytest.raises(ValueError, match="shorter"):
        store.add_texts(["one", "two"], [{}])
    with pytest.raises(ValueError, match="ids must name"):
        store.delete()
    assert store.similarity_search("one") == []
    assert store.delete(["one"]) is False


def test_a_store_takes_the_bank_clients_arguments_and_refuses_others(store: RegradVectorStore) -> None:
    (id,) = store.add_texts(["The harbour master is Ada Quist."], [{"title": "Orlen", "page": 7}], in_flight=1)
    search = store.similarity_search
    assert [found.id for found in search("Who is the harbour master?", retrieval="lexical")] == [id]
    assert search("Who is the harbour master?", min_score=1.0) == []
    with pytest.raises(ValueError, match="filter must name metadata, 'title' is none in a bank"):
        search("harbour", filter={"title": "Orlen"})
    for call in (
        lambda: search("harbour", namespace="other"),
        lambda: search("harbour", fetch=1),
        lambda: store.add_texts(["one"], namespace="other"),
        lambda: store.delete([id], namespace="other"),
        lambda: RegradVectorStore.from_texts(["one"], bank=store.bank, namespce="other"),
    ):
        with pytest.raises(TypeError, match="name|fetch"):
            call()
    assert [found.id for found in search("one")] == [id]


def test_the_options_of_an_extra_body_are_sent_too() -> None:
    own = {"top_k": 1, "mode": "cue", "gamma": 1.0}
    chat = ChatRegrad(
        model=BASE, api_key=API_KEY, regrad=own, extra_body={"regrad": {"top_k": 2, "mode": "icl"}, "ttl": 3}
    )
    payload = chat._get_request_payload("Who?", regrad={"mode": "blind"})
    assert payload["extra_body"] == {"regrad": {"top_k": 2, "mode": "blind", "gamma": 1.0}, "ttl": 3}
    payload = chat._get_request_payload("Who?", extra_body=None)
    assert payload["extra_body"] == {"regrad": own}


def test_a_store_is_made_from_texts(client: Bank) -> None:
    made = RegradVectorStore.from_texts(["foo", "bar"], ids=["1", "2"], bank=client, namespace=f"made-{uuid.uuid4()}")
    assert [found.id for found in made.similarity_search("bar", k=1)] == ["2"]
    assert made.delete(["1", "2"]) is True


@pytest.mark.asyncio
async def test_a_retriever_tells_score_and_version_and_knows_the_kinds_of_search(client: Bank) -> None:
    retriever = RegradRetriever(bank=client, retrieval="lexical", top_k=2)
    question = "What is the answer to riddle 7?"
    best = retriever.invoke(question)[0]
    assert best.id == "doc-7" and best.page_content == "Fact number 7: the answer to riddle 7 is 259."
    about = best.metadata["regrad"]
    assert about["version"] == 1 and about["score"] != about["cosine"] and len(about["gradient_digest"]) == 64
    assert [found.id for found in await retriever.ainvoke(question, top_k=1)] == ["doc-7"]
    assert RegradRetriever(bank=client, min_score=1.0).invoke(question) == []
    assert RegradRetriever(bank=client, filter={"lang": "de"}).invoke(question) == []
    with pytest.raises(NotFoundError, match="nowhere"):
        RegradRetriever(bank=client, namespace="nowhere").invoke(question)


@pytest.fixture
def chat(server: VllmServer) -> ChatRegrad:
    return ChatRegrad(
        model=BASE, base_url=f"{server.url}/v1", api_key=API_KEY, temperature=0, max_tokens=4, regrad={"top_k": 1}
    )


@pytest.mark.asyncio
async def test_a_chat_model_sends_its_options_and_tells_the_documents(chat: ChatRegrad) -> None:
    question = "What is the answer to riddle 7?"
    answer = chat.invoke(question)
    used = answer.response_metadata["regrad"]
    assert len(used["documents"]) == 1 and used["query"] == question and used["adapter"]
    assert answer.usage_metadata is not None and 0 < answer.usage_metadata["output_tokens"] <= 4
    # All asynchronous calls are in this test, because LangChain keeps one connection pool and each test has a loop.
    named = await chat.ainvoke(question, regrad={"document_ids": ["doc-3", "doc-4"], "top_k": None})
    assert [found["id"] for found in named.response_metadata["regrad"]["documents"]] == ["doc-3", "doc-4"]
    chunks = [chunk async for chunk in chat.astream(question)]
    assert chunks[0].response_metadata["regrad"]["documents"] == used["documents"]
    off = chat.bind(regrad={"enabled": False}).invoke(question)
    assert off.response_metadata["regrad"] is None
    assert chat.regrad == {"top_k": 1}


def test_a_stream_of_a_chat_model_tells_the_same_documents(chat: ChatRegrad) -> None:
    question = "What is the answer to riddle 7?"
    chunks = list(chat.stream(question))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    documents = chat.invoke(question).response_metadata["regrad"]["documents"]
    assert len(chunks) > 2 and len(documents) == 1
    assert whole.response_metadata["regrad"]["documents"] == documents


def test_retriever_and_chat_model_make_a_chain(chat: ChatRegrad, client: Bank) -> None:
    """The documents of a retriever become the gradients of the answer."""

    def ask(found: list[Document]) -> list[str]:
        answer = chat.invoke("Which riddle?", regrad={"document_ids": [one.id for one in found], "top_k": None})
        return [document["id"] for document in answer.response_metadata["regrad"]["documents"]]

    retriever: BaseRetriever = RegradRetriever(bank=client, top_k=2)
    found = retriever.invoke("Fact number 9")
    assert (retriever | ask).invoke("Fact number 9") == [one.id for one in found] and len(found) == 2
