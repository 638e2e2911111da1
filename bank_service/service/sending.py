"""What a stream's client is sent: within a time, and quietly where it has gone."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn, TypeAlias

import grpc

from bank_service.errors import BankError, DeadlineExceededError
from bank_service.wire.errors import abort

Context: TypeAlias = "grpc.aio.ServicerContext"
_LAST_WORD_SECONDS = 1.0  # for a status to go out; it stands in line behind answers that nobody reads


async def send(context: Context, answer: Any, seconds: float, setting: str) -> None:
    """Returns when the answer is on its way; it waits where the client does not read.

    ``setting``: where ``seconds`` come from. DeadlineExceededError after them, CancelledError where the client
    has gone.
    """
    try:
        async with asyncio.timeout(seconds):
            await context.write(answer)
    except TimeoutError:
        raise DeadlineExceededError(
            f"a stream's client must read its answers, for {seconds:g} s ({setting}) it has read none; what was "
            "acknowledged is stored, ask for the rest on another stream"
        ) from None
    except grpc.aio.InternalError:  # the connection ended under the write, before gRPC cancels the call
        raise asyncio.CancelledError from None


async def end_with(context: Context, error: BankError) -> NoReturn:
    """Ends the call with the error's status. CancelledError where the client has gone, or does not read: gRPC then
    resets the stream."""
    try:
        async with asyncio.timeout(_LAST_WORD_SECONDS):
            await abort(context, error)
    except (TimeoutError, grpc.aio.InternalError):
        raise asyncio.CancelledError from None
