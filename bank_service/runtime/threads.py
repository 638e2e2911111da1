"""Runs blocking work in threads, outside the event loop. The work keeps the caller's trace context."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor
from typing import ParamSpec, TypeVar

from bank_service.runtime.background import finished

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(pool: Executor, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs ``function(*args)`` in a thread of the pool. If the caller is cancelled, the function still runs to its
    end."""
    context = contextvars.copy_context()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(pool, lambda: context.run(function, *args, **kwargs))


async def stoppable_in_thread(pool: Executor, function: Callable[[Callable[[], None]], T]) -> T:
    """Runs a function that stops when its caller is cancelled. The function gets a callable and must call it now and
    then. The callable raises CancelledError once the caller is cancelled."""
    stopped = threading.Event()

    def go_on() -> None:
        if stopped.is_set():
            raise CancelledError

    try:
        return await in_thread(pool, function, go_on)
    finally:
        stopped.set()


async def ended_in_thread(pool: Executor, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs ``function(*args)`` in a thread of the pool. A cancelled caller continues only after the function's end."""
    return await finished(asyncio.create_task(in_thread(pool, function, *args, **kwargs)))
