"""Reads the question from a request's body, and puts the learner's prompts into the body.

Each endpoint has a class, because each has another format. A body is any JSON from a client. A malformed one passes
unchanged, and vLLM rejects it. Bodies are never changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

Body = Mapping[str, Any]
Edit = Callable[[str], str]


class PromptShape(Protocol):
    """The format of the prompt in one endpoint's body."""

    @property
    def id_from_header(self) -> bool:
        """Whether vLLM takes a request's id from X-Request-Id before the body's request_id."""

    @property
    def id_in_body(self) -> bool:
        """Whether vLLM takes a request's id from the body's request_id."""

    @property
    def id_prefix(self) -> str:
        """The start of a new request_id in the body."""

    def question(self, body: Body) -> str | None:
        """The text of the user's last message. None without one."""

    def with_question(self, body: Body, edit: Edit) -> Body | None:
        """The body with an edited question. None without a question."""

    def with_system(self, body: Body, system: str) -> Body:
        """The body with a system prompt, unless it has one already or the endpoint doesn't support one."""


class ChatPrompt:
    """/v1/chat/completions: ``messages``."""

    id_from_header = True
    id_in_body = True
    id_prefix = ""

    def question(self, body: Body) -> str | None:
        found = _last_user_text(body.get("messages"))
        return found[1] if found else None

    def with_question(self, body: Body, edit: Edit) -> Body | None:
        messages = _edited(body.get("messages"), edit)
        return None if messages is None else {**body, "messages": messages}

    def with_system(self, body: Body, system: str) -> Body:
        messages = body.get("messages")
        if not isinstance(messages, list) or _has_system(messages):
            return body
        return {**body, "messages": [{"role": "system", "content": system}, *messages]}


class MessagesPrompt(ChatPrompt):
    """/v1/messages, Anthropic's format: ``messages``, with the system prompt in a field of its own."""

    id_in_body = False

    def with_system(self, body: Body, system: str) -> Body:
        messages = body.get("messages")
        if body.get("system") or (isinstance(messages, list) and _has_system(messages)):
            return body
        return {**body, "system": system}


class BatchChatPrompt(ChatPrompt):
    """/v1/chat/completions/batch: ``messages`` is a list of conversations."""

    def question(self, body: Body) -> str | None:
        conversations = _conversations(body)
        return super().question({"messages": conversations[0]}) if len(conversations) == 1 else None

    def with_question(self, body: Body, edit: Edit) -> Body | None:
        conversations = _conversations(body)
        if len(conversations) != 1:
            return None
        edited = super().with_question({"messages": conversations[0]}, edit)
        return None if edited is None else {**body, "messages": [edited["messages"]]}

    def with_system(self, body: Body, system: str) -> Body:
        parts = [super(BatchChatPrompt, self).with_system({"messages": one}, system) for one in _conversations(body)]
        return {**body, "messages": [part["messages"] for part in parts]}


class CompletionPrompt:
    """/v1/completions: ``prompt``, plain text without a system prompt."""

    id_from_header = True
    id_in_body = True
    id_prefix = ""

    def question(self, body: Body) -> str | None:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        return prompt if isinstance(prompt, str) and prompt.strip() else None

    def with_question(self, body: Body, edit: Edit) -> Body | None:
        question = self.question(body)
        return None if question is None else {**body, "prompt": edit(question)}

    def with_system(self, body: Body, system: str) -> Body:
        return body


class ResponsesPrompt:
    """/v1/responses: ``input``, text or messages, and ``instructions``."""

    id_from_header = False
    id_in_body = True
    id_prefix = "resp_"

    def question(self, body: Body) -> str | None:
        given = body.get("input")
        if isinstance(given, str):
            return given if given.strip() else None
        found = _last_user_text(given)
        return found[1] if found else None

    def with_question(self, body: Body, edit: Edit) -> Body | None:
        given = body.get("input")
        if isinstance(given, str):
            return {**body, "input": edit(given)} if given.strip() else None
        items = _edited(given, edit)
        return None if items is None else {**body, "input": items}

    def with_system(self, body: Body, system: str) -> Body:
        given = body.get("input")
        follows = body.get("previous_response_id") is not None  # the earlier responses have the system prompt
        if body.get("instructions") or follows or (isinstance(given, list) and _has_system(given)):
            return body
        return {**body, "instructions": system}


SHAPES: Mapping[str, PromptShape] = {
    "/v1/chat/completions": ChatPrompt(),
    "/v1/completions": CompletionPrompt(),
    "/v1/responses": ResponsesPrompt(),
    "/v1/messages": MessagesPrompt(),
    "/v1/chat/completions/batch": BatchChatPrompt(),
}
# vLLM's routes with a prompt or tokens that ReGrad doesn't support. A request for ReGrad there gets an error.
ROUTES_WITHOUT = frozenset({
    "/invocations", "/cohere/v2/chat", "/cohere/v2/chat/render",
    "/generative_scoring", "/v1/systemone", "/inference/v1/generate", "/v1/chat/completions/render",
    "/v1/completions/render", "/v1/messages/render", "/v1/responses/render", "/v1/chat/completions/derender",
    "/v1/completions/derender",
})  # fmt: skip
# Routes that use the tokenizer alone. There a model's name with ReGrad is the base model's.
TOKENIZING = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})


def split_prompts(body: Body, shape: PromptShape) -> list[Body]:
    """A body for each of several texts of /v1/completions, or for each conversation of a batch. Else the body alone."""
    if isinstance(shape, BatchChatPrompt):
        return [{**body, "messages": [one]} for one in _conversations(body)] or [body]
    prompts = body.get("prompt") if isinstance(shape, CompletionPrompt) else None
    if not isinstance(prompts, list) or len(prompts) < 2 or not all(isinstance(prompt, str) for prompt in prompts):
        return [body]
    return [{**body, "prompt": prompt} for prompt in prompts]


def join_prompts(body: Body, parts: Sequence[Body], shape: PromptShape) -> Body:
    """The body with the prompts of the parts that ``split_prompts`` made of it."""
    if isinstance(shape, BatchChatPrompt):
        return {**body, "messages": [part["messages"][0] for part in parts]}
    return {**body, "prompt": [part["prompt"] for part in parts]}


def _conversations(body: Body) -> list[Any]:
    """The conversations of a batch. Empty for any other messages, which vLLM refuses."""
    messages = body.get("messages")
    return messages if isinstance(messages, list) and all(isinstance(one, list) for one in messages) else []


def _has_system(messages: list[Any]) -> bool:
    return any(isinstance(message, dict) and message.get("role") in ("system", "developer") for message in messages)


def _last_user_text(messages: object) -> tuple[int, str] | None:
    """(index, text) of the last user message that has text."""
    if not isinstance(messages, list):
        return None
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if isinstance(message, dict) and message.get("role") == "user":
            text = _content_text(message.get("content"))
            if not text.strip() and _has_tool_result(message.get("content")):
                continue  # Anthropic's format gives tools' results the role of the user
            return (index, text) if text.strip() else None
    return None


def _content_text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "\n".join(part["text"] for part in content if _is_text(part))


def _has_tool_result(content: object) -> bool:
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") == "tool_result" for part in content
    )


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") in ("text", "input_text") and isinstance(part.get("text"), str)


def _edited(messages: object, edit: Edit) -> list[Any] | None:
    found = _last_user_text(messages)
    if found is None or not isinstance(messages, list):
        return None
    index, text = found
    message = messages[index]
    content = message["content"]
    if isinstance(content, str):
        changed: object = edit(content)
    else:  # the edited text replaces the first text part; parts of other kinds stay
        first = next(place for place, part in enumerate(content) if _is_text(part))
        changed = [
            {**part, "text": edit(text)} if place == first else part
            for place, part in enumerate(content)
            if place == first or not _is_text(part)
        ]
    return [*messages[:index], {**message, "content": changed}, *messages[index + 1 :]]
