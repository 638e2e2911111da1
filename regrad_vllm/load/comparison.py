"""Comparisons: contenders under a condition. A cell is one run of one contender under one condition."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from bank_service.wire.limits import DEFAULT_CUE_SENTENCES
from regrad_vllm.evaluate.methods import Shown
from regrad_vllm.load.traffic import Arrival, Popularity

# regrad: vLLM with our plugin, one server for all its contenders. stock: vLLM without the plugin.
# alone: no engine, one request at a time.
Engine = Literal["regrad", "stock", "alone"]
# static: φ* as a plain LoRA adapter, the same for every request. tuned: a LoRA tuned for RAG (FT-RAG), served likewise.
# retrieved: φ* and the hits' gradients.
Adapter = Literal["none", "static", "tuned", "retrieved"]


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    label: str
    engine: Engine
    adapter: Adapter
    shows: Shown = "nothing"  # of the hits, in the prompt
    cue_sentences: int = DEFAULT_CUE_SENTENCES  # of all hits together, nearest to the question, if it shows a cue
    asks_again: bool = False  # mode auto: with the documents, if the model isn't sure of its first answer

    @property
    def retrieves(self) -> bool:
        """Whether it asks the bank. The query is then part of its times."""
        return self.shows != "nothing" or self.adapter == "retrieved"


CONTENDERS: Mapping[str, Contender] = MappingProxyType(
    {
        contender.name: contender
        for contender in (
            Contender("base", "base model, closed book", "regrad", "none"),
            Contender("learner", "φ* alone, a static adapter", "regrad", "static"),
            Contender("rag", "RAG", "regrad", "none", shows="documents"),
            Contender("rag_learner", "RAG + φ* as a static adapter", "regrad", "static", shows="documents"),
            Contender("rag_sentence", "RAG of two sentences", "regrad", "none", shows="cue"),
            Contender("ft_rag_sentence", "FT-RAG of the same two sentences", "regrad", "tuned", shows="cue"),
            Contender("regrad", "ReGrad", "regrad", "retrieved"),
            Contender("regrad_cue", "ReGrad + two sentences", "regrad", "retrieved", shows="cue"),
            Contender("regrad_icl", "ReGrad + ICL", "regrad", "retrieved", shows="documents"),
            Contender("peft_folder", "stock vLLM, a PEFT folder per request", "stock", "retrieved"),
            Contender("published", "batch size 1, weights swapped and restored", "alone", "retrieved"),
        )
    }
)


def fair_rival(names: Collection[str]) -> str | None:
    """The RAG contender to compare ReGrad with, or None if ``names`` has none.

    RAG with φ* comes first, because φ* was trained on questions as ReGrad was. The untuned RAG is second.
    """
    return next((name for name in ("rag_learner", "rag") if name in names), None)


# cost: the main comparison. curve: throughput against latency. growth: over k and the length of documents.
# quality: answers of free length. warm-up: not reported.
Phase = Literal["warm-up", "cost", "curve", "growth", "quality"]
Status = Literal["completed", "failed", "incomplete"]  # incomplete: still running when the cell's time was up


@dataclass(frozen=True, slots=True)
class LoadCondition:
    """Everything that is the same for the contenders of one comparison."""

    phase: Phase
    corpus: str  # the bank's namespace
    passage_tokens: int  # 0: passages with their natural length
    top_k: int
    popularity: Popularity
    prefix_cache: bool
    arrival: Arrival
    output_tokens: int  # 0: the model decides
    num_requests: int

    @property
    def key(self) -> str:
        """A name for people and files."""
        arrival = f"{self.arrival.kind}-{self.arrival.value:g}"
        cache = "cached" if self.prefix_cache else "uncached"
        return f"{self.phase}/{self.corpus}/k{self.top_k}/{self.popularity}/{cache}/{arrival}/{self.output_tokens}"

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RequestLine:
    """One request. Times are in ms from its own start, which is before anything is sent for it."""

    condition: str
    contender: str
    repeat: int
    index: int
    question_id: str
    sent_s: float  # since the cell's start
    late_ms: float  # from its scheduled arrival to its start
    status: Status
    error: str = ""
    retrieve_ms: float = 0.0  # retrieval by the client; retrieval by the server counts towards the first token
    prepare_ms: float = 0.0  # the client composes, writes and loads an adapter
    event_ms: tuple[float, ...] = ()  # arrival of each event with new tokens
    end_ms: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    documents: tuple[str, ...] = ()  # the documents that the answer used
    moved_bytes: int = 0  # texts of passages, gradients and adapter files that the client moved
    server_ms: Mapping[str, float] = field(default_factory=dict)  # the server's time for its adapter, by stage
    text: str = ""


@dataclass(frozen=True, slots=True)
class CellLine:
    """The resources that one cell used."""

    condition: str
    contender: str
    repeat: int
    seconds: float  # from the first request's start to the last one's end
    cpu_s: Mapping[str, float] = field(default_factory=dict)  # by process
    peak_bytes: Mapping[str, int] = field(default_factory=dict)  # proportional set size by process
    peak_kv_share: float | None = None  # the greatest share of the engine's KV blocks in use
    preemptions: float | None = None
    fetched_bytes: float | None = None  # gradients from the bank to the server
    pool_bytes: float | None = None  # documents in the workers' pools at the end, of all requests together
    cache_hits: Mapping[str, float] = field(default_factory=dict)  # hit rate by cache: prefix, arena, worker
