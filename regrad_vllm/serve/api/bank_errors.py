"""The bank's failures in words for a client of the server: what is wrong, and what to do."""

from __future__ import annotations

from bank_service.errors import (
    BankError,
    DeadlineExceededError,
    LearnerMismatchError,
    LimitExceededError,
    OverloadedError,
    UnauthenticatedError,
)
from bank_service.wire.errors import UnreachableError, retry_after_ms
from bank_service.wire.limits import MAX_REQUEST_BYTES
from regrad_vllm.serve.api.request_errors import RequestError


def outage(error: BankError, address: str) -> RequestError:
    """The 503 for a bank that can't answer, or the 409 for one of another learner. ``address``: the bank's."""
    if isinstance(error, LearnerMismatchError):
        return wrong_learner(address, of_bank=error.expected, of_server=error.actual)
    bank = f"the gradient bank at {address}"
    if isinstance(error, UnreachableError):
        message = (
            f"{bank} can't be reached; start it with `regrad bank`, or start the server with its address (--bank). "
            "The server finds a started bank by itself, so send the request again"
        )
    elif isinstance(error, DeadlineExceededError):
        message = (
            f"{bank} did not answer in time; it may be busy, so send the request again, or start the server with a "
            "greater --regrad-bank-timeout-ms"
        )
    elif isinstance(error, UnauthenticatedError):
        message = f"{bank} doesn't know the server's token; start the server with --regrad-bank-token-file"
    elif not error.by_bank:
        return of_connection(error, address, 503)
    else:
        message = f"{bank} can't answer: {error}"
    return RequestError(503, message, retry_after_ms=retry_after_ms(error))


def of_connection(error: BankError, address: str, status: int) -> RequestError:
    """The error for a call that gRPC ended, not the bank: what to do, without gRPC's own words."""
    bank = f"the gradient bank at {address}"
    if isinstance(error, LimitExceededError):
        message = f"{bank} takes at most {MAX_REQUEST_BYTES} bytes at a time, got more; send less"
    elif isinstance(error, OverloadedError):
        message = f"{bank} takes no more calls now; send the request again later"
    elif isinstance(error, DeadlineExceededError):
        message = f"{bank} did not answer in time; send the request again"
    else:
        message = f"the call to {bank} was broken off; look into the bank's log, and whether both have one version"
    return RequestError(status, message, retry_after_ms=retry_after_ms(error))


def wrong_learner(address: str, *, of_bank: str, of_server: str) -> RequestError:
    """The error for a bank whose gradients are another learner's. The fingerprints of both learners."""
    return RequestError(
        409,
        f"the bank at {address} must hold gradients of this server's learner {of_server}, it holds those of {of_bank}; "
        "serve the bank's learner, or begin `regrad upgrade` to this one",
    )
