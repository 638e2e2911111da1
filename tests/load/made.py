"""Lines as a run writes them."""

from __future__ import annotations

from typing import Any

from regrad_vllm.load.comparison import CellLine, LoadCondition, RequestLine
from regrad_vllm.load.traffic import Arrival


def condition(**changes: Any) -> LoadCondition:
    values: dict[str, Any] = {
        "phase": "cost", "corpus": "natural", "passage_tokens": 0, "top_k": 3, "popularity": "zipf",
        "prefix_cache": True, "arrival": Arrival("closed", 2), "output_tokens": 4, "num_requests": 2,
    }  # fmt: skip
    return LoadCondition(**{**values, **changes})


def line(own: LoadCondition, contender: str = "regrad", **changes: Any) -> RequestLine:
    values: dict[str, Any] = {
        "condition": own.key, "contender": contender, "repeat": 0, "index": 0, "question_id": "q", "sent_s": 0.0,
        "late_ms": 0.0, "status": "completed", "event_ms": (100.0, 150.0, 210.0, 250.0), "end_ms": 250.0,
        "prompt_tokens": 20, "output_tokens": 4, "documents": ("d1", "d2"), "text": "an answer",
    }  # fmt: skip
    return RequestLine(**{**values, **changes})


def cell(own: LoadCondition, contender: str = "regrad", **changes: Any) -> CellLine:
    values: dict[str, Any] = {"condition": own.key, "contender": contender, "repeat": 0, "seconds": 2.0}
    return CellLine(**{**values, **changes})
