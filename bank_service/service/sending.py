"""Sends answers on a stream, and ends a call whose client does not read them.

gRPC's keepalive can't do this. It detects a client that answers no ping, because it is dead or cut off. If a client is
alive but reads nothing, its library answers every ping, while flow control delays the answer for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn, TypeAlias

import grpc

from bank_service.errors import BankError, DeadlineExceededError
from bank_service.wire.errors import abort

Context: TypeAlias = "grpc.aio.ServicerContext"
_LAST_WORD_SECONDS = 1.0  # the longest wait to send a status, which queues behind unread answers


async def send(context: Context, answer: Any, seconds: float, setting: str) -> None:
    """Returns when the answer is sent. If the client does not read, this waits.

    DeadlineExceededError after ``seconds``; it names ``setting``. CancelledError if the client has gone.
    """
    try:
        async with asyncio.timeout(seconds):
            await context.write(answer)
    except TimeoutError:
        raise DeadlineExceededError(
            f"a stream's client must read its answers, for {seconds:g} s ({setting}) it has read none; what was "
            "acknowledged is stored, ask for the rest on another stream"
        ) from None
    except grpc.aio.InternalError:  # the connection ended during the write, before gRPC cancels the call
        raise asyncio.CancelledError from None


async def end_with(context: Context, error: BankError) -> NoReturn:
    """Ends the call with the error's status. CancelledError if the client has gone or does not read. gRPC then resets
    the stream."""
    try:
        async with asyncio.timeout(_LAST_WORD_SECONDS):
            await abort(context, error)
    except (TimeoutError, grpc.aio.InternalError):
        raise asyncio.CancelledError from None
