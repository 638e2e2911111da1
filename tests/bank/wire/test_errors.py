from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from bank_service.errors import (
    BankError,
    DataLossError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    LearnerMismatchError,
    LimitExceededError,
    NotFoundError,
    OutOfRangeError,
    OverloadedError,
    PermissionDeniedError,
    QuotaExceededError,
    UnauthenticatedError,
    UnavailableError,
    UnreachableError,
    VersionConflictError,
)
from bank_service.wire import generate
from bank_service.wire.errors import DETAILS_KEY, DOMAIN, from_rpc_error, to_status

ERRORS = [
    (InvalidArgumentError("top_k must be in 1..64, got 0", field="top_k"), "INVALID_ARGUMENT"),
    (NotFoundError("document 'x' is not there", kind="document", name="x"), "NOT_FOUND"),
    (VersionConflictError("moved", namespace="n", id="i", expected_version=3, actual_version=4), "ABORTED"),
    (LearnerMismatchError("another learner", expected="a" * 64, actual="b" * 64), "FAILED_PRECONDITION"),
    (LimitExceededError("too much", limit="max_message_bytes"), "RESOURCE_EXHAUSTED"),
    (OutOfRangeError("as_of must be at least 7", field="as_of", limit=7), "OUT_OF_RANGE"),
    (DataLossError("gone", digest="c" * 64), "DATA_LOSS"),
    (UnavailableError("stopping"), "UNAVAILABLE"),
    (UnauthenticatedError("who?"), "UNAUTHENTICATED"),
    (PermissionDeniedError("no", scope="write", namespace="n"), "PERMISSION_DENIED"),
    (QuotaExceededError("max_namespace_bytes", limit="max_namespace_bytes", namespace="n"), "RESOURCE_EXHAUSTED"),
    (OverloadedError("busy", limit="max_calls", retry_after_ms=1500), "RESOURCE_EXHAUSTED"),
    (DeadlineExceededError("too late"), "DEADLINE_EXCEEDED"),
    (InternalError("a bug"), "INTERNAL"),
]
DETAILS = {
    "INVALID_ARGUMENT": details.BadRequest,
    "NOT_FOUND": details.ResourceInfo,
    "OUT_OF_RANGE": details.BadRequest,
    "FAILED_PRECONDITION": details.PreconditionFailure,
    "RESOURCE_EXHAUSTED": details.QuotaFailure,
    "UNAVAILABLE": details.RetryInfo,
    "ABORTED": details.ErrorInfo,
    "DATA_LOSS": details.ErrorInfo,
}


def failed_call(code: grpc.StatusCode, message: str, metadata: bytes | None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(*(() if metadata is None else ((DETAILS_KEY, metadata),)))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, message)


@pytest.mark.parametrize(("error", "code"), ERRORS)
def test_a_client_gets_the_error_that_the_bank_raised(error: BankError, code: str) -> None:
    error.index = 7
    status = to_status(error)
    back = from_rpc_error(failed_call(grpc.StatusCode[code], status.message, status.SerializeToString()))
    assert type(back) is type(error)
    assert (back.message, back.fields(), back.index) == (error.message, error.fields(), 7)
    assert status.code == grpc.StatusCode[code].value[0]


@pytest.mark.parametrize(
    ("error", "code"), [pair for pair in ERRORS if pair[1] in DETAILS and not isinstance(pair[0], OverloadedError)]
)
def test_a_generic_client_finds_the_details_of_its_code(error: BankError, code: str) -> None:
    packed = to_status(error).details[0]
    detail = DETAILS[code]()
    assert packed.Unpack(detail)
    for value in list(error.fields().values())[:1]:
        assert value in str(detail)


@pytest.mark.parametrize(
    ("error", "kinds"),
    [
        (OverloadedError("busy", limit="max_calls", retry_after_ms=1500), ["RetryInfo", "ErrorInfo"]),
        (
            QuotaExceededError("much", limit="max_namespace_requests", namespace="n", retry_after_ms=1500),
            ["QuotaFailure", "RetryInfo", "ErrorInfo"],
        ),
        (QuotaExceededError("much", limit="max_namespace_bytes", namespace="n"), ["QuotaFailure", "ErrorInfo"]),
    ],
)
def test_a_refusal_says_when_to_come_back_where_that_helps(error: BankError, kinds: list[str]) -> None:
    packed = to_status(error).details
    assert [item.TypeName().rpartition(".")[2] for item in packed] == kinds
    if "RetryInfo" in kinds:
        info = details.RetryInfo()
        assert packed[kinds.index("RetryInfo")].Unpack(info) and info.retry_delay.ToMilliseconds() == 1500


def test_every_error_of_the_bank_has_its_row() -> None:
    assert {type(error) for error, _ in ERRORS} == set(BankError.__subclasses__())


@pytest.mark.parametrize("metadata", [None, b"\xff\xff not a status"])
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnreachableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.UNIMPLEMENTED, InternalError),
    ],
)
def test_a_failure_of_the_network_is_the_nearest_error(
    code: grpc.StatusCode, kind: type[BankError], metadata: bytes | None
) -> None:
    error = from_rpc_error(failed_call(code, "the wire broke", metadata))
    assert type(error) is kind and "the wire broke" in error.message


@pytest.mark.parametrize(
    ("reason", "metadata"),
    [
        ("UNAVAILABLE", {"index": "last"}),
        ("OVERLOADED", {"limit": "max_calls", "retry_after_ms": "soon"}),
        ("OUT_OF_RANGE", {"field": "as_of", "limit": "yesterday"}),
        ("VERSION_CONFLICT", {"namespace": "n", "id": "i", "expected_version": "3", "actual_version": "new"}),
        ("NOT_FOUND", {"kind": "document", "name": "x", "more": "of a later version"}),
    ],
)
def test_an_error_whose_fields_this_client_does_not_understand_is_an_internal_one(
    reason: str, metadata: dict[str, str]
) -> None:
    status = status_pb2.Status(message="the bank's words")
    status.details.add().Pack(details.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))
    error = from_rpc_error(failed_call(grpc.StatusCode.ABORTED, "", status.SerializeToString()))
    assert type(error) is InternalError and error.message == "the bank's words"


def test_an_error_whose_details_are_damaged_goes_by_its_status_code() -> None:
    status = status_pb2.Status()
    status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
    error = from_rpc_error(failed_call(grpc.StatusCode.UNAVAILABLE, "the wire broke", status.SerializeToString()))
    assert type(error) is UnreachableError and "the wire broke" in error.message


def test_a_call_that_grpcs_client_breaks_off_is_one_to_repeat() -> None:
    error = from_rpc_error(failed_call(grpc.StatusCode.INTERNAL, "Internal error from Core", None))
    assert type(error) is UnreachableError
    assert type(from_rpc_error(failed_call(grpc.StatusCode.INTERNAL, "a bug", None))) is InternalError


def test_what_grpc_itself_refuses_is_a_message_too_large_or_a_call_too_many() -> None:
    for text, kind in (
        ("CLIENT: Received message larger than max (5000000 vs. 4194304)", LimitExceededError),
        ("Concurrent RPC limit exceeded!", OverloadedError),
    ):
        assert type(from_rpc_error(failed_call(grpc.StatusCode.RESOURCE_EXHAUSTED, text, None))) is kind


def test_a_long_message_fits_the_metadata_limit() -> None:
    status = to_status(InvalidArgumentError("x" * 100_000, field="text"))
    assert len(status.message) <= 1000


def test_the_generated_code_is_what_the_contract_gives() -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    root = Path(generate.__file__).parents[2]
    assert generate.stale_files(generate.compile_contract(root / "proto"), root / "bank_service/wire/generated") == []
