"""Converts domain errors to gRPC statuses and back. One table serves both directions.

Every status has an ErrorInfo that names the table's row and the error's fields. A client makes the same error from it.
The google.rpc message that generic clients know for the code comes before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn, cast

import grpc
from google.protobuf.message import DecodeError, Message
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
from bank_service.wire.limits import RETRY_AFTER_MS

__all__ = [
    "BankError",
    "DataLossError",
    "DeadlineExceededError",
    "InternalError",
    "InvalidArgumentError",
    "LearnerMismatchError",
    "LimitExceededError",
    "NotFoundError",
    "OutOfRangeError",
    "OverloadedError",
    "PermissionDeniedError",
    "QuotaExceededError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnreachableError",
    "VersionConflictError",
    "abort",
    "from_rpc_error",
    "retry_after_ms",
    "to_status",
]

DOMAIN = "bank.regrad"
DETAILS_KEY = "grpc-status-details-bin"
# gRPC's default limit for all metadata is 8 KiB, and the details repeat the message.
MAX_MESSAGE_CHARS = 1000
_UNAVAILABLE_MS = 200  # the wait before another try
_BROKEN_CALL = "Internal error from Core"  # gRPC's client reported it once for 350 killed banks
_TOO_LARGE = "larger than max"  # part of gRPC's text for a message above its size limit


def _bad_request(error: InvalidArgumentError | OutOfRangeError) -> Message:
    violation = details.BadRequest.FieldViolation(field=error.field, description=error.message)
    return cast(Message, details.BadRequest(field_violations=[violation]))


def _resource_info(error: NotFoundError) -> Message:
    return cast(
        Message, details.ResourceInfo(resource_type=error.kind, resource_name=error.name, description=error.message)
    )


def _precondition_failure(error: LearnerMismatchError) -> Message:
    violation = details.PreconditionFailure.Violation(
        type="LEARNER", subject=error.actual, description=f"expected {error.expected}"
    )
    return cast(Message, details.PreconditionFailure(violations=[violation]))


def _quota_failure(error: LimitExceededError) -> Message:
    violation = details.QuotaFailure.Violation(subject=error.limit, description=error.message)
    return cast(Message, details.QuotaFailure(violations=[violation]))


def _namespace_quota(error: QuotaExceededError) -> Message:
    violation = details.QuotaFailure.Violation(subject=f"namespace:{error.namespace}", description=error.message)
    return cast(Message, details.QuotaFailure(violations=[violation]))


def _retry_info(error: BankError) -> Message:
    info = details.RetryInfo()
    info.retry_delay.FromMilliseconds(retry_after_ms(error) or 0)
    return cast(Message, info)


def retry_after_ms(error: BankError) -> int | None:
    """The wait before another try, in milliseconds. None if another try would fail too."""
    if isinstance(error, UnavailableError):
        return _UNAVAILABLE_MS
    if isinstance(error, OverloadedError | QuotaExceededError):
        return error.retry_after_ms or None
    return None


@dataclass(frozen=True, slots=True)
class _Row:
    error: Callable[..., BankError]
    code: grpc.StatusCode
    detail: Callable[..., Message] | None = None  # the code's own google.rpc message; ErrorInfo always follows


_TABLE = MappingProxyType(
    {
        "INVALID_ARGUMENT": _Row(InvalidArgumentError, grpc.StatusCode.INVALID_ARGUMENT, _bad_request),
        "NOT_FOUND": _Row(NotFoundError, grpc.StatusCode.NOT_FOUND, _resource_info),
        "VERSION_CONFLICT": _Row(VersionConflictError, grpc.StatusCode.ABORTED),
        "LEARNER_MISMATCH": _Row(LearnerMismatchError, grpc.StatusCode.FAILED_PRECONDITION, _precondition_failure),
        "LIMIT_EXCEEDED": _Row(LimitExceededError, grpc.StatusCode.RESOURCE_EXHAUSTED, _quota_failure),
        "OUT_OF_RANGE": _Row(OutOfRangeError, grpc.StatusCode.OUT_OF_RANGE, _bad_request),
        "UNAUTHENTICATED": _Row(UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
        "PERMISSION_DENIED": _Row(PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
        "QUOTA_EXCEEDED": _Row(QuotaExceededError, grpc.StatusCode.RESOURCE_EXHAUSTED, _namespace_quota),
        "OVERLOADED": _Row(OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED, _retry_info),
        "DATA_LOSS": _Row(DataLossError, grpc.StatusCode.DATA_LOSS),
        "UNAVAILABLE": _Row(UnavailableError, grpc.StatusCode.UNAVAILABLE, _retry_info),
        "DEADLINE_EXCEEDED": _Row(DeadlineExceededError, grpc.StatusCode.DEADLINE_EXCEEDED),
        "INTERNAL": _Row(InternalError, grpc.StatusCode.INTERNAL),
    }
)


def status_code(error: BankError) -> grpc.StatusCode:
    return _TABLE[_reason(error)].code


def to_status(error: BankError) -> status_pb2.Status:
    """The error as google.rpc.Status."""
    reason = _reason(error)
    row = _TABLE[reason]
    info = details.ErrorInfo(reason=reason, domain=DOMAIN, metadata=error.fields())
    if error.index is not None:
        info.metadata["index"] = str(error.index)
    status = status_pb2.Status(code=row.code.value[0], message=error.message[:MAX_MESSAGE_CHARS])
    for detail in (row.detail(error),) if row.detail else ():
        status.details.add().Pack(detail)
    if row.detail is not _retry_info and retry_after_ms(error) is not None:
        status.details.add().Pack(_retry_info(error))
    status.details.add().Pack(info)
    return status


async def abort(context: grpc.aio.ServicerContext, error: BankError) -> NoReturn:
    """Ends the call with the error's status."""
    status = to_status(error)
    metadata = ((DETAILS_KEY, status.SerializeToString()),)
    await context.abort(status_code(error), status.message, metadata)
    raise AssertionError("abort returned")


def from_rpc_error(error: grpc.RpcError) -> BankError:
    """The error of a failed call. A status without the bank's ErrorInfo becomes the nearest error by status code."""
    call = cast(grpc.aio.AioRpcError, error)  # the synchronous client's errors have the same three methods
    sent = _sent_error(call.trailing_metadata() or ())
    if sent is not None:
        return sent
    made = _nearest_error(call)
    made.by_bank = False
    return made


def _nearest_error(call: grpc.aio.AioRpcError) -> BankError:
    """The error for a status that no bank sent."""
    message = f"the bank's call failed with {call.code().name}: {call.details()}"
    if call.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError(message)
    if call.code() is grpc.StatusCode.UNAUTHENTICATED:
        return UnauthenticatedError(message)
    if call.code() is grpc.StatusCode.UNAVAILABLE or call.details() == _BROKEN_CALL:
        return UnreachableError(message)
    if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own checks refused the call
        if _TOO_LARGE in (call.details() or ""):
            return LimitExceededError(message, limit="max_message_bytes")
        return OverloadedError(message, limit="max_calls", retry_after_ms=RETRY_AFTER_MS)  # gRPC gives no wait time
    return InternalError(message)


def _reason(error: BankError) -> str:
    for reason, row in _TABLE.items():
        if row.error in type(error).__mro__:
            return reason
    return "INTERNAL"


def _sent_error(metadata: Iterable[tuple[str, str | bytes]]) -> BankError | None:
    """The error that the bank sent. None without its ErrorInfo."""
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            with suppress(DecodeError):  # a proxy may have changed the details; the code and message remain
                status = status_pb2.Status.FromString(value)
                for packed in status.details:
                    info = details.ErrorInfo()
                    if packed.Unpack(info) and info.domain == DOMAIN and info.reason in _TABLE:
                        return _rebuild(info, status.message)
    return None


def _rebuild(info: details.ErrorInfo, message: str) -> BankError:
    fields = dict(info.metadata)
    try:
        index = int(fields.pop("index")) if "index" in fields else None
        error = _TABLE[info.reason].error(message, **fields)
    except (TypeError, ValueError):  # a bank of another version sent other fields
        return InternalError(message)
    error.index = index
    return error
