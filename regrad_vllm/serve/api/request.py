"""The ``regrad`` object of a request's body, parsed strictly.

An option that the server would not use is an error. It is never silently ignored. A field that is null counts as left
out, because typed clients write null for what they don't set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bank_service.wire.limits import MAX_CONDITION_VALUES, MAX_CONDITIONS, MAX_CUE_SENTENCES, MAX_METADATA_BYTES
from regrad_vllm.client import Condition
from regrad_vllm.client.values import OPERATORS, OPERATORS_WITH_VALUES, RETRIEVALS, Retrieval
from regrad_vllm.serve.api.request_errors import RequestError
from regrad_vllm.serve.settings import MAX_GAMMA, MAX_TOP_K, MODES, Mode

MAX_ID_BYTES = 256
MAX_QUERY_BYTES = 64 * 2**10
MAX_SEQUENCE = 2**64 - 1  # the greatest number in a message to the bank


@dataclass(frozen=True, slots=True)
class RegradOptions:
    """The ``regrad`` object. None: the server's or the learner's default."""

    enabled: bool = True
    query: str | None = None
    document_ids: tuple[str, ...] | None = None
    namespace: str | None = None
    top_k: int | None = None
    gamma: float | None = None
    min_score: float | None = None
    mode: Mode | None = None
    retrieval: Retrieval | None = None
    filter: tuple[Condition, ...] = ()
    as_of: int | None = None
    cue_sentences: int | None = None  # in modes cue and auto only
    min_confidence: float | None = None  # in mode auto only

    @classmethod
    def parse(cls, value: object, max_documents: int = MAX_TOP_K) -> RegradOptions:
        """Options from parsed JSON. RequestError (400) names the field ``regrad.<field>`` and its limit.

        max_documents: the server's limit for one request. Each document costs time, bandwidth and memory.
        """
        if not isinstance(value, Mapping):
            raise RequestError.bad("regrad", "an object", value)
        parsers = {**_PARSERS, "top_k": _whole(1, max_documents), "document_ids": _ids(max_documents)}
        unknown = sorted(set(value) - set(parsers))
        if unknown:
            raise RequestError.bad(f"regrad.{unknown[0]}", f"one of {', '.join(parsers)}", unknown[0])
        fields: dict[str, Any] = {}
        for name, raw in value.items():
            if raw is not None:
                fields[name] = parsers[name](f"regrad.{name}", raw)
        options = cls(**fields)
        if options.document_ids is not None:
            for name in ("query", "top_k", "min_score", "retrieval", "filter"):
                if name in fields:
                    raise RequestError.bad(
                        f"regrad.{name}", "absent where regrad.document_ids names the documents", fields[name]
                    )
        return options


def _boolean(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError.bad(field, "true or false", value)
    return value


def _text(max_bytes: int) -> Callable[[str, object], str]:
    def parse(field: str, value: object) -> str:
        if not isinstance(value, str) or not value.strip() or not 1 <= _num_utf8_bytes(value) <= max_bytes:
            raise RequestError.bad(field, f"text of 1 to {max_bytes} bytes", value)
        return value

    return parse


def _num_utf8_bytes(text: str) -> int:
    """The length in UTF-8. 0 for text without UTF-8, because JSON may contain half a surrogate pair."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0


def _namespace(field: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[a-zA-Z0-9._-]{1,64}", value):
        raise RequestError.bad(field, "1 to 64 of a-z A-Z 0-9 . _ -", value)
    return value


def _ids(most: int) -> Callable[[str, object], tuple[str, ...]]:
    def parse(field: str, value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            got = len(value) if isinstance(value, list) else value
            raise RequestError.bad(field, f"a list of 1 to {most} document ids", got)
        text = _text(MAX_ID_BYTES)
        ids = tuple(text(f"{field}[{index}]", item) for index, item in enumerate(value))
        for index, item in enumerate(ids):
            if item in ids[:index]:
                raise RequestError.bad(f"{field}[{index}]", "named once: a document counts once", item)
        return ids

    return parse


def _whole(low: int, high: int) -> Callable[[str, object], int]:
    def parse(field: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise RequestError.bad(field, f"a whole number in {low}..{high}", value)
        return value

    return parse


def _number(low: float, high: float) -> Callable[[str, object], float]:
    def parse(field: str, value: object) -> float:
        # Checked before float(), because an integer of 400 digits has no float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise RequestError.bad(field, f"a finite number in {low:g}..{high:g}", value)
        number = float(value)
        return number if math.copysign(1.0, number) > 0 or number else 0.0  # -0.0 and 0.0 make the same adapter

    return parse


def _mode(field: str, value: object) -> Mode:
    for mode in MODES:
        if value == mode:
            return mode
    raise RequestError.bad(field, f"one of {', '.join(MODES)}", value)


def _retrieval(field: str, value: object) -> Retrieval:
    for retrieval in RETRIEVALS:
        if value == retrieval:
            return retrieval
    raise RequestError.bad(field, f"one of {', '.join(RETRIEVALS)}", value)


def _filter(field: str, value: object) -> tuple[Condition, ...]:
    if not isinstance(value, list) or len(value) > MAX_CONDITIONS:
        raise RequestError.bad(field, f"a list of at most {MAX_CONDITIONS} conditions", value)
    return tuple(_condition(f"{field}[{index}]", item) for index, item in enumerate(value))


def _condition(field: str, value: object) -> Condition:
    known = ("key", "operator", "values")
    if not isinstance(value, Mapping):
        raise RequestError.bad(field, f"an object of {', '.join(known)}", value)
    for name in value:
        if name not in known:
            raise RequestError.bad(f"{field}.{name}", f"one of {', '.join(known)}", name)
    operator = next((name for name in OPERATORS if value.get("operator") == name), None)
    if operator is None:
        raise RequestError.bad(f"{field}.operator", f"one of {', '.join(OPERATORS)}", value.get("operator"))
    key = _metadata_text(f"{field}.key", value.get("key"))
    values = [] if value.get("values") is None else value["values"]
    lowest, highest = (1, MAX_CONDITION_VALUES) if operator in OPERATORS_WITH_VALUES else (0, 0)
    if not isinstance(values, list) or not lowest <= len(values) <= highest:
        rule = f"a list of {lowest} to {highest} texts" if highest else "absent or empty"
        raise RequestError.bad(f"{field}.values", f"{rule} with {operator}", values)
    texts = tuple(_metadata_text(f"{field}.values[{index}]", item) for index, item in enumerate(values))
    return Condition(key, operator, texts)


def _metadata_text(field: str, value: object) -> str:
    """A value of metadata. It may be empty."""
    if value == "":
        return ""
    if not isinstance(value, str) or not 1 <= _num_utf8_bytes(value) <= MAX_METADATA_BYTES:
        raise RequestError.bad(field, f"text of at most {MAX_METADATA_BYTES} bytes, as metadata is", value)
    return value


_PARSERS: Mapping[str, Callable[[str, object], object]] = {
    "enabled": _boolean,
    "query": _text(MAX_QUERY_BYTES),
    "namespace": _namespace,
    "gamma": _number(-MAX_GAMMA, MAX_GAMMA),
    "min_score": _number(-1, 1),
    "retrieval": _retrieval,
    "filter": _filter,
    "as_of": _whole(0, MAX_SEQUENCE),
    "mode": _mode,
    "cue_sentences": _whole(1, MAX_CUE_SENTENCES),
    "min_confidence": _number(0, 1),
}
