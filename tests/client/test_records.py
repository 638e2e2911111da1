"""A bank's stream of records is held to what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from bank_service.errors import DataLossError
from bank_service.testing.hash_encoder import spec_of
from bank_service.wire.generated import bank_pb2
from regrad_vllm.client.records import RecordStream


def part(digest: str, chunk: bytes, *, offset: int = 0, record_bytes: int = 3) -> Any:
    return bank_pb2.FetchGradientsResponse(digest=digest, chunk=chunk, offset=offset, record_bytes=record_bytes)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([part("b", b"xyz")], "b was not the one asked for"),
        ([part("a", b"x"), part("a", b"z", offset=2)], "a has a hole: chunk at 2, 1 bytes read"),
        ([part("a", b"x", record_bytes=2**40)], "a claims 1099511627776 bytes, more than any of this learner"),
        ([part("a", b"x")], "a did not arrive"),
        ([part("a", b"xyz"), part("a", b"xyz")], "a was not the one asked for"),
    ],
)
def test_a_record_that_was_not_asked_for_or_is_not_whole_is_an_error(parts: list[Any], message: str) -> None:
    stream = RecordStream(["a"], spec_of())
    with pytest.raises(DataLossError, match=message):
        for each in parts:
            stream.add(each)
        stream.end()


def test_parts_in_order_are_a_record() -> None:
    stream = RecordStream(["a", "b"], spec_of())
    parts = [part("a", b"x"), part("a", b"yz", offset=1), part("b", b"uvw")]
    assert [stream.add(each) for each in parts] == [None, b"xyz", b"uvw"]
    stream.end()
