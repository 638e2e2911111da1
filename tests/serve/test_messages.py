"""Anthropic's messages and batches of chats take ``regrad``, with the answers that single chats get."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from tests.serve.support import API_KEY, BASE, VllmServer

TWIN = BASE + "-regrad"
GREEDY: Any = {"temperature": 0, "max_tokens": 8}


@pytest.fixture
def client(server: VllmServer) -> Iterator[anthropic.Anthropic]:
    """Anthropic's own client. vLLM takes the API key as a bearer's."""
    with anthropic.DefaultHttpxClient(trust_env=False) as http:
        yield anthropic.Anthropic(
            base_url=server.url, auth_token=API_KEY, api_key=None, http_client=http, max_retries=0
        )


def greedy(**extra: Any) -> Any:
    """The client's arguments. Its newest version has none for the temperature."""
    return {"max_tokens": GREEDY["max_tokens"], "extra_body": {"temperature": 0, **extra}}


def chat(server: VllmServer, question: str, regrad: dict[str, Any]) -> dict[str, Any]:
    body = {"model": TWIN, "messages": [user(question)], "regrad": regrad, **GREEDY}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def user(question: object) -> Any:
    return {"role": "user", "content": question}


@pytest.mark.parametrize("regrad", [{"document_ids": ["doc-3", "doc-4"]}, {"document_ids": ["doc-5"], "mode": "icl"}])
def test_a_message_is_answered_as_the_same_chat_is(
    server: VllmServer, client: anthropic.Anthropic, regrad: dict[str, Any]
) -> None:
    expected = chat(server, "Which riddle?", regrad)
    raw = client.messages.with_raw_response.create(
        model=TWIN, messages=[user("Which riddle?")], extra_headers={"X-Request-Id": "from-the-header"},
        **greedy(regrad=regrad),
    )  # fmt: skip
    message = raw.parse()
    used = (message.model_extra or {})["regrad"]
    assert message.content[0].model_dump()["text"] == expected["choices"][0]["message"]["content"]
    assert message.model == TWIN and message.id.endswith("from-the-header") and used["request_id"] == "from-the-header"
    assert used["documents"] == expected["regrad"]["documents"] and used["adapter"] == expected["regrad"]["adapter"]
    assert raw.headers["x-regrad-adapter"] == used["adapter"]
    assert server.client.get("/v1/regrad/requests/from-the-header").json() == used


def test_a_streamed_message_has_the_documents_in_its_whole(server: VllmServer, client: anthropic.Anthropic) -> None:
    expected = chat(server, "Which riddle?", {"top_k": 1})
    with client.messages.stream(model=BASE, messages=[user("Which riddle?")], **greedy(regrad={"top_k": 1})) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == expected["choices"][0]["message"]["content"]
    assert (message.model_extra or {})["regrad"]["documents"] == expected["regrad"]["documents"]


def test_a_tools_result_is_not_the_question(server: VllmServer, client: anthropic.Anthropic) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "nothing"}
    messages: Any = [user("Which riddle?"), {"role": "assistant", "content": [call]}, user([result])]
    message = client.messages.create(model=TWIN, messages=messages, **greedy())
    assert (message.model_extra or {})["regrad"]["query"] == "Which riddle?"


def test_a_message_without_regrad_is_the_base_models(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model=BASE, messages=[user("Which riddle?")], **greedy())
    assert "regrad" not in (message.model_extra or {}) and message.model == BASE


def test_anthropics_client_gets_the_errors_words(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"regrad\.top_k must be a whole number in 1\.\.16, got 0"):
        client.messages.create(model=BASE, messages=[user("x")], **greedy(regrad={"top_k": 0}))
    with pytest.raises(anthropic.NotFoundError, match=f"model must be one of {BASE}, {TWIN}, got .base-regard-regrad"):
        client.messages.create(model="base-regard-regrad", messages=[user("x")], **greedy())


def test_each_chat_of_a_batch_has_documents_of_its_own(server: VllmServer) -> None:
    questions = ["Tell me riddle 7.", "Tell me riddle 70.", "Tell me riddle 101."]
    alone = [chat(server, question, {"top_k": 1}) for question in questions]
    body = {"model": TWIN, "messages": [[user(one)] for one in questions], "regrad": {"top_k": 1}, **GREEDY}
    answer = server.post("/v1/chat/completions/batch", body).json()
    assert len({one["regrad"]["adapter"] for one in alone}) == len(questions)
    for number, (prompt, expected) in enumerate(zip(answer["regrad"]["prompts"], alone, strict=True)):
        assert prompt["choices"] == [number] and prompt["documents"] == expected["regrad"]["documents"]
        assert answer["choices"][number]["message"]["content"] == expected["choices"][0]["message"]["content"]
    assert answer["model"] == TWIN


def test_chats_of_a_batch_share_the_documents_that_it_names(server: VllmServer) -> None:
    regrad = {"document_ids": ["doc-3"], "mode": "blind"}
    expected = chat(server, "Which riddle?", regrad)
    body = {"model": TWIN, "messages": [[user("Which riddle?")], [user("Which?")]], "regrad": regrad, **GREEDY}
    answer = server.post("/v1/chat/completions/batch", body).json()
    assert answer["regrad"]["adapter"] == expected["regrad"]["adapter"]
    assert answer["choices"][0]["message"]["content"] == expected["choices"][0]["message"]["content"]


def test_a_chat_of_a_batch_without_text_is_named(server: VllmServer) -> None:
    body = {"model": TWIN, "messages": [[user("x")], [{"role": "assistant", "content": "y"}]], **GREEDY}
    answer = server.post("/v1/chat/completions/batch", body)
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("messages[1]: regrad.query")


def test_documents_over_http_are_in_the_next_answer(server: VllmServer) -> None:
    path, here = "/v1/regrad/documents/by-http", {"namespace": "by-http"}
    document = {"text": "The lamp of Orlen is red."}
    assert httpx.put(server.url + path, json=document, trust_env=False).status_code == 401, "without the API key"
    stored = server.client.put(path, params=here, json=document).json()
    used = chat(server, "Which lamp?", here)["regrad"]["documents"]
    assert [(one["id"], one["gradient_digest"]) for one in used] == [("by-http", stored["gradient_digest"])]
    found = server.client.post("/v1/regrad/query", params=here, json={"query": "Which lamp?"}).json()["data"]
    assert [(hit["id"], round(hit["score"], 6), hit["weight"]) for hit in found] == [
        ("by-http", used[0]["score"], used[0]["weight"])
    ]
    assert server.client.delete(path, params=here).status_code == 200
    assert chat(server, "Which lamp?", here)["regrad"]["documents"] == []
