"""The tools that `regrad mcp` offers: search, get, add and delete on a bank, and ask on a ReGrad server.

Every failure is a tool error with one plain sentence, which the calling model can read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field

from bank_service.errors import BankError, NotFoundError, UnavailableError
from bank_service.wire.limits import MAX_TOP_K
from regrad_vllm.client import AsyncBank, Document, Query
from regrad_vllm.http_client import ServerError, connect, server_errors
from regrad_vllm.serve.settings import Mode

_ASK_SECONDS = 600.0
_INSTRUCTIONS = """A bank of documents. search finds documents by meaning, get reads one by its id. ask answers a
question with the knowledge of the documents that matter, if a server was named. add and delete change the bank, unless
it is read-only. A namespace is a set of documents that is searched by itself."""
_MODE_HELP = """what the prompt gets of the documents: blind: nothing, cue: nearest sentences, icl: all, auto: cue,
then icl if the model isn't sure; left out: the server's mode"""

Namespace = Annotated[str | None, Field(description="whose documents; left out: the default namespace")]
Id = Annotated[str, Field(description="the document's id")]


@dataclass(frozen=True, slots=True)
class AnsweringServer:
    """The server that answers questions."""

    server: str  # http://host:port
    model: str  # a name that the server serves
    max_tokens: int  # of an answer


class SearchHit(BaseModel):
    id: str
    title: str
    text: str
    score: float  # a cosine


class SearchHits(BaseModel):
    documents: list[SearchHit]  # best first
    sequence: int  # the bank's last change that the result reflects


class ReadDocument(BaseModel):
    id: str
    title: str
    text: str
    metadata: dict[str, str]
    version: int


class AddedDocument(BaseModel):
    id: str
    outcome: str  # created, updated or unchanged
    version: int
    truncated: bool  # the text is longer than the learner reads; the rest is searched, but is not in the gradient


class DeletedDocument(BaseModel):
    id: str
    version: int  # the version that was deleted


class UsedInAnswer(BaseModel):
    id: str
    score: float


class AskedAnswer(BaseModel):
    answer: str
    documents: list[UsedInAnswer]  # the documents whose knowledge the answer used, best first
    mode: str | None  # None: the server answered without ReGrad
    reason: str | None  # why no document was used, or why the mode is another one


class BankTools:
    """The tools. Each method is one, and its docstring and annotations tell the calling model how to use it."""

    def __init__(self, bank: AsyncBank, namespace: str, asked: AnsweringServer | None) -> None:
        """namespace: the default one."""
        self._bank = bank
        self._namespace = namespace
        self._asked = asked

    async def search(
        self,
        query: Annotated[str, Field(description="what to search for: a question or a text", min_length=1)],
        top_k: Annotated[int, Field(description="documents at most", ge=1, le=MAX_TOP_K)] = 3,
        namespace: Namespace = None,
    ) -> SearchHits:
        """Finds the documents nearest to a text, and shows their texts."""
        with _plain_errors(self._bank.address):
            found = Query(query, namespace=namespace or self._namespace, top_k=top_k, with_text=True)
            answer = await self._bank.query(found)
        documents = [SearchHit(id=hit.id, title=hit.title, text=hit.text, score=hit.score) for hit in answer.hits]
        return SearchHits(documents=documents, sequence=answer.sequence)

    async def get(self, id: Id, namespace: Namespace = None) -> ReadDocument:
        """Reads one document by its id."""
        with _plain_errors(self._bank.address):
            stored = await self._bank.get(id, namespace=namespace or self._namespace)
        read = stored.document
        return ReadDocument(
            id=read.id, title=read.title, text=read.text, metadata=dict(read.metadata), version=stored.version
        )

    async def add(
        self,
        id: Id,
        text: Annotated[str, Field(description="one passage of about 160 words at most, which says one thing")],
        title: Annotated[str, Field(description="the passage's heading")] = "",
        namespace: Namespace = None,
    ) -> AddedDocument:
        """Stores one document, or replaces title and text of the document of that id."""
        if not id:
            raise ToolError("id must be 1 to 256 bytes, it is empty; choose one that names the document")
        namespace = namespace or self._namespace
        with _plain_errors(self._bank.address):
            try:
                stored = await self._bank.get(id, namespace=namespace)
                metadata, version = stored.document.metadata, stored.version
            except NotFoundError:
                metadata, version = {}, 0
            documents = [Document(id, text, title, metadata, expected_version=version)]
            (receipt,) = [item async for item in self._bank.ingest(documents, namespace=namespace)]
        return AddedDocument(
            id=receipt.id, outcome=receipt.outcome, version=receipt.version, truncated=receipt.truncated
        )

    async def delete(self, id: Id, namespace: Namespace = None) -> DeletedDocument:
        """Deletes one document by its id. Its effect on answers is gone with the next question."""
        with _plain_errors(self._bank.address):
            deletion = await self._bank.delete(id, namespace=namespace or self._namespace)
        return DeletedDocument(id=id, version=deletion.version)

    async def ask(
        self,
        question: Annotated[str, Field(description="the question, in full", min_length=1)],
        mode: Annotated[Mode | None, Field(description=_MODE_HELP)] = None,
        namespace: Namespace = None,
    ) -> AskedAnswer:
        """Asks a language model that has the knowledge of the documents that matter to the question."""
        assert self._asked is not None
        options = {"namespace": namespace or self._namespace} | ({"mode": mode} if mode else {})
        body = {
            "model": self._asked.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self._asked.max_tokens,
            "regrad": options,
        }
        with _plain_errors(self._bank.address), server_errors():
            async with connect(self._asked.server, _ASK_SECONDS) as client:
                response = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
        used = response.get("regrad") or {"reason": "the server is none of `regrad serve`, so it used no document"}
        documents = [UsedInAnswer(id=item["id"], score=item["score"]) for item in used.get("documents", ())]
        return AskedAnswer(
            answer=response["choices"][0]["message"]["content"] or "",
            documents=documents,
            mode=used.get("mode"),
            reason=used.get("reason"),
        )


def make_server(bank: AsyncBank, namespace: str, *, asked: AnsweringServer | None, read_only: bool) -> MCPServer[Any]:
    """A server of the tools. It doesn't run yet.

    namespace: the default. asked: None leaves out ask. read_only: leaves out add and delete.
    """
    server: MCPServer[Any] = MCPServer("regrad", instructions=_INSTRUCTIONS, log_level="WARNING")
    tools = BankTools(bank, namespace, asked)
    reads = ToolAnnotations(read_only_hint=True)
    server.add_tool(tools.search, annotations=reads)
    server.add_tool(tools.get, annotations=reads)
    if not read_only:
        server.add_tool(tools.add, annotations=ToolAnnotations(destructive_hint=True, idempotent_hint=True))
        server.add_tool(tools.delete, annotations=ToolAnnotations(destructive_hint=True))
    if asked is not None:
        server.add_tool(tools.ask, annotations=reads)
    return server


@contextmanager
def _plain_errors(address: str) -> Iterator[None]:
    """Turns the errors of bank and server into tool errors."""
    try:
        yield
    except UnavailableError as error:
        advice = "start it with `regrad bank`, or name another with --bank of `regrad mcp`"
        raise ToolError(f"the bank at {address} is not available; {advice}") from error
    except BankError as error:
        broken = f"the bank at {address} refused or broke off the call; send less at a time, or try again later"
        raise ToolError(error.message if error.by_bank else broken) from error
    except (ServerError, ValueError) as error:
        raise ToolError(" ".join(str(error).split())) from error
