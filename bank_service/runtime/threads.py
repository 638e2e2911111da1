"""Blocking work off the event loop, with the trace context carried along."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(pool: Executor, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """``function(*args)`` in one of the pool's threads. A cancelled caller does not stop it."""
    context = contextvars.copy_context()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(pool, lambda: context.run(function, *args, **kwargs))


async def stoppable_in_thread(pool: Executor, function: Callable[[Callable[[], None]], T]) -> T:
    """As ``in_thread``. The function gets a callable, and calls it now and then. Once the caller is cancelled, the
    callable raises CancelledError."""
    stopped = threading.Event()

    def go_on() -> None:
        if stopped.is_set():
            raise CancelledError

    try:
        return await in_thread(pool, function, go_on)
    finally:
        stopped.set()


async def ended_in_thread(pool: Executor, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """As ``in_thread``, but a cancelled caller goes on only after the function has ended."""
    work = asyncio.ensure_future(in_thread(pool, function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):  # cancelled once more
                await asyncio.wait([work])
        raise
