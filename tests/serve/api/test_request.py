"""The ``regrad`` object: what is taken, and what each wrong value is told."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regrad_vllm.client import Condition
from regrad_vllm.serve.api.request import RegradOptions
from regrad_vllm.serve.api.request_errors import RequestError

EQUALS = {"key": "lang", "operator": "equals", "values": ["de"]}


def test_an_empty_object_turns_regrad_on_with_the_defaults() -> None:
    assert RegradOptions.parse({}) == RegradOptions(enabled=True)


def test_every_field_is_taken() -> None:
    options = RegradOptions.parse(
        {"enabled": True, "query": "who?", "namespace": "n", "top_k": 64, "gamma": -16, "min_score": 1, "mode": "icl",
         "retrieval": "hybrid", "filter": [{"key": "lang", "operator": "equals", "values": ["de", ""]},
                                           {"key": "", "operator": "absent"}], "as_of": 2**64 - 1,
         "cue_sentences": 4}
    )  # fmt: skip
    conditions = (Condition("lang", "equals", ("de", "")), Condition("", "absent"))
    assert options == RegradOptions(True, "who?", None, "n", 64, -16.0, 1.0, "icl", "hybrid", conditions, 2**64 - 1, 4)
    assert RegradOptions.parse({"filter": []}) == RegradOptions()
    named = RegradOptions.parse({"document_ids": ["b", "a"], "as_of": 0})
    assert (named.document_ids, named.as_of) == (("b", "a"), 0)


def test_a_field_that_is_null_counts_as_left_out() -> None:
    fields = [field.name for field in dataclasses.fields(RegradOptions)]
    assert RegradOptions.parse(dict.fromkeys(fields)) == RegradOptions()
    named = RegradOptions.parse({**dict.fromkeys(fields), "document_ids": ["a"]})
    assert named == RegradOptions(document_ids=("a",))
    condition = {"key": "lang", "operator": "present", "values": None}
    assert RegradOptions.parse({"filter": [condition]}).filter == (Condition("lang", "present"),)


def test_minus_zero_is_zero_because_the_adapters_are_the_same() -> None:
    gamma = RegradOptions.parse({"gamma": -0.0}).gamma
    assert gamma == 0 and math.copysign(1, gamma) == 1


@pytest.mark.parametrize("value", [True, 1, "on", [], [{}]])
def test_what_is_not_an_object_is_refused(value: object) -> None:
    with pytest.raises(RequestError, match="regrad must be an object") as caught:
        RegradOptions.parse(value)
    assert (caught.value.status, caught.value.param) == (400, "regrad")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enabled", 1), ("enabled", "true"),
        ("query", ""), ("query", "  "), ("query", 3), ("query", "x" * 70_000), ("query", "\ud800"),
        ("namespace", ""), ("namespace", "n" * 65), ("namespace", "a/b"), ("namespace", "a\n"),
        ("top_k", 0), ("top_k", -1), ("top_k", 65), ("top_k", 10**9), ("top_k", True), ("top_k", 1.5), ("top_k", "3"),
        ("gamma", math.nan), ("gamma", math.inf), ("gamma", -math.inf), ("gamma", 1e9), ("gamma", 16.01),
        ("gamma", True), ("gamma", "1"), ("gamma", 10**400),
        ("min_score", -1.01), ("min_score", 1.01), ("min_score", math.nan), ("min_score", []),
        ("retrieval", "bm25"), ("retrieval", []),
        ("filter", {}), ("filter", "lang=de"), ("filter", [EQUALS] * 17),
        ("as_of", -1), ("as_of", 2**64), ("as_of", 1.0), ("as_of", "1"), ("as_of", True),
        ("mode", "both"), ("mode", ["icl"]),
        ("cue_sentences", 0), ("cue_sentences", 5), ("cue_sentences", True), ("cue_sentences", "2"),
        ("document_ids", []), ("document_ids", "a"), ("document_ids", [str(n) for n in range(65)]),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_field(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"regrad.{field} must be ") as caught:
        RegradOptions.parse({field: value})
    assert (caught.value.status, caught.value.param) == (400, f"regrad.{field}")
    assert caught.value.as_json()["error"]["code"] == 400


@pytest.mark.parametrize(
    ("condition", "part"),
    [
        (None, ""), ([], ""), ("lang=de", ""),
        ({}, ".operator"), ({**EQUALS, "operator": "EQUALS"}, ".operator"), ({**EQUALS, "operator": 1}, ".operator"),
        ({**EQUALS, "operator": []}, ".operator"), ({**EQUALS, "value": "v"}, ".value"),
        ({"operator": "present"}, ".key"), ({**EQUALS, "key": None}, ".key"), ({**EQUALS, "key": "k" * 4097}, ".key"),
        ({**EQUALS, "key": "\ud800"}, ".key"),
        ({**EQUALS, "values": None}, ".values"), ({**EQUALS, "values": 0}, ".values"),
        ({"key": "k", "operator": "equals"}, ".values"), ({**EQUALS, "values": []}, ".values"),
        ({**EQUALS, "values": "v"}, ".values"), ({**EQUALS, "values": ["v"] * 65}, ".values"),
        ({**EQUALS, "operator": "absent"}, ".values"), ({**EQUALS, "values": ["v", 1]}, ".values[1]"),
        ({**EQUALS, "values": ["v" * 4097]}, ".values[0]"),
    ],
)  # fmt: skip
def test_a_bad_condition_is_named_by_its_place_and_part(condition: object, part: str) -> None:
    with pytest.raises(RequestError, match=r"regrad\.filter\[1\]\S* must be ") as caught:
        RegradOptions.parse({"filter": [EQUALS, condition]})
    assert (caught.value.status, caught.value.param) == (400, f"regrad.filter[1]{part}")


@pytest.mark.parametrize("ids", [[""], [1], ["x" * 257], ["a", "b", "a"], [None]])
def test_a_bad_document_id_is_named_by_its_place(ids: list[object]) -> None:
    with pytest.raises(RequestError) as caught:
        RegradOptions.parse({"document_ids": ids})
    assert caught.value.param == f"regrad.document_ids[{len(ids) - 1}]"


def test_an_unknown_field_is_told_the_known_ones() -> None:
    with pytest.raises(RequestError, match="one of enabled, query, .*mode") as caught:
        RegradOptions.parse({"topk": 3})
    assert caught.value.param == "regrad.topk"


@pytest.mark.parametrize(
    "extra", [{"query": "x"}, {"top_k": 1}, {"min_score": 0}, {"retrieval": "lexical"}, {"filter": []}]
)
def test_named_documents_leave_nothing_to_search_for(extra: dict[str, object]) -> None:
    with pytest.raises(RequestError) as caught:
        RegradOptions.parse({"document_ids": ["a"], **extra})
    assert caught.value.param == f"regrad.{next(iter(extra))}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.dictionaries(st.sampled_from(["enabled", "query", "document_ids", "top_k", "gamma", "mode", "filter"]), JSON))
def test_any_json_is_options_or_a_request_error(value: dict[str, object]) -> None:
    try:
        options = RegradOptions.parse(value)
    except RequestError as error:
        assert error.status == 400 and error.param is not None and error.param.startswith("regrad")
    else:
        assert options.gamma is None or math.isfinite(options.gamma)
