"""docs/openapi.json is true: the server does what it says, whatever a client sends."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    negative_data_rejection,
    positive_data_acceptance,
)

from tests.house.pages import ROOT

SCHEMA = schemathesis.openapi.from_path(str(ROOT / "docs" / "openapi.json"))
BOUNDED = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
THOROUGH = settings(BOUNDED, max_examples=300)


@schemathesis.serializer("application/x-ndjson")
def ndjson(context: schemathesis.SerializationContext, value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@SCHEMA.parametrize()
@BOUNDED
def test_every_answer_is_as_the_schema_says(case: schemathesis.Case, routes: httpx.Client) -> None:
    check(case, routes)


@pytest.mark.only_test_all
@SCHEMA.parametrize()
@THOROUGH
def test_every_answer_of_many_is_as_the_schema_says(case: schemathesis.Case, routes: httpx.Client) -> None:
    check(case, routes)


def check(case: schemathesis.Case, routes: httpx.Client) -> None:
    """Asks the server. The bank may refuse more than a schema can say, such as a text of white space.

    The header Allow of a 405 is Starlette's. It names the methods of one of the path's routes.
    """
    server = str(routes.base_url).partition("/v1/")[0]
    excluded = [positive_data_acceptance, allow_header_conformance]
    if case.path.endswith("/batch"):  # a bad line is refused in a line of the answer
        excluded.append(negative_data_rejection)
    case.call_and_validate(base_url=server, excluded_checks=excluded)
