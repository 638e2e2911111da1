"""Sends answers on a stream, and gives up on a client that does not read them.

gRPC's keepalive can't do this. It is made for a client that is dead or cut off and answers no ping. Where a client is
alive but reads nothing, its library answers every ping, while flow control holds the answer up for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn, TypeAlias

import grpc

from bank_service.errors import BankError, DeadlineExceededError
from bank_service.wire.errors import abort

Context: TypeAlias = "grpc.aio.ServicerContext"
_LAST_WORD_SECONDS = 1.0  # for a status to go out; it waits behind answers that nobody reads


async def send(context: Context, answer: Any, seconds: float, setting: str) -> None:
    """Returns when the answer is on its way. That takes until the client reads.

    DeadlineExceededError after ``seconds``, which come from ``setting``; CancelledError where the client has gone.
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
    """Ends the call with the error's status. CancelledError where the client has gone or does not read; gRPC then
    resets the stream."""
    try:
        async with asyncio.timeout(_LAST_WORD_SECONDS):
            await abort(context, error)
    except (TimeoutError, grpc.aio.InternalError):
        raise asyncio.CancelledError from None
